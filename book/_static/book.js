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
  const plain = Search.htmlToText;
  Search.htmlToText = (source, anchor) => {
    const page = new DOMParser().parseFromString(source, "text/html");
    const term = anchor && page.querySelector(`dt${anchor}`);
    const meaning = term?.nextElementSibling?.textContent.trim().replace(/\\[()]/g, "");
    if (term) return `${term.firstChild.textContent}: ${meaning ?? ""}`;
    for (const part of page.querySelectorAll("#jb-print-docs-body, .math")) part.remove();
    return plain(page.documentElement.outerHTML, anchor);
  };
});
