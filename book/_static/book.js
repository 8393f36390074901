// The theme lets the keyboard reach what scrolls, but looks only when the window changes. What a
// reader unfolds may scroll as well: the text grows, and the theme looks again.
addEventListener("DOMContentLoaded", () => {
  const article = document.querySelector("article");
  if (article) new ResizeObserver(() => dispatchEvent(new Event("resize"))).observe(article);
});

// On the search page an excerpt is from the text, not from the contents that are there for print, and
// without the source of equations; and a term of the glossary comes with what it means.
addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const others = "#jb-print-docs-body, .math, .headerlink, script, style";
  Search.htmlToText = (source, anchor) => {
    const main = new DOMParser().parseFromString(source, "text/html").querySelector('[role="main"]');
    const term = anchor && main.querySelector(`dt${anchor}`);
    const meaning = term?.nextElementSibling?.textContent.trim().replace(/\\[()]/g, "");
    if (term) return `${term.firstChild.textContent}: ${meaning ?? ""}`;
    for (const part of main.querySelectorAll(others)) part.remove();
    return ((anchor && main.querySelector(anchor)) || main).textContent;
  };
});
