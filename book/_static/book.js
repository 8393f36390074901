// The theme lets the keyboard reach what scrolls, but looks only when the window changes. What a
// reader unfolds may scroll as well: the text grows, and the theme looks again.
addEventListener("DOMContentLoaded", () => {
  const article = document.querySelector("article");
  if (article) new ResizeObserver(() => dispatchEvent(new Event("resize"))).observe(article);
});
