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

// A row of many buttons is a track: with the button or the finger down, the figure follows. Without
// this, and in a notebook, one presses the buttons.
addEventListener("pointerdown", ({ target }) => {
  const track = target.closest(".book-frames .track");
  if (!track) return;
  const follow = ({ clientX }) => {
    for (const label of track.querySelectorAll("label")) {
      const { left, right } = label.getBoundingClientRect();
      if (left <= clientX && clientX < right && !label.control.checked) label.control.click();
    }
  };
  const until = new AbortController();
  addEventListener("pointermove", follow, { signal: until.signal });
  for (const end of ["pointerup", "pointercancel"]) {
    addEventListener(end, () => until.abort(), { signal: until.signal });
  }
});
