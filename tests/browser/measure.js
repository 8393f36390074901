// What a reader sees of a loaded page; an async function for Playwright's evaluate. Every list is
// a list of faults.
async () => {
  const root = document.documentElement;
  const name = (element) => {
    const tag = element.tagName.toLowerCase();
    const own = element.id ? "#" + element.id : "";
    const classes = typeof element.className === "string" ? element.className.trim() : "";
    const said = (element.textContent ?? "").trim().replace(/\s+/g, " ").slice(0, 60);
    return `<${tag}${own}${classes && "." + classes.split(/\s+/).join(".")}> ${said}`;
  };
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);

  // Wider than the page: an element that sticks out and that nothing around it lets one scroll.
  const overflow = [];
  if (root.scrollWidth > root.clientWidth) {
    overflow.push(`the page is ${root.scrollWidth} px wide in ${root.clientWidth}`);
  }
  for (const element of document.querySelectorAll("main *:not(svg *):not(mjx-container *)")) {
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2 || !shown(element)) continue;
    if (element.closest("#pst-secondary-sidebar")) continue; // it waits beside the page for its button
    if (box.right <= root.clientWidth + 1 && box.left >= -1) continue;
    let around = element.parentElement;
    while (around && !scrolls(around)) around = around.parentElement;
    if (!around || around === document.body || around === root) {
      overflow.push(`${Math.round(box.left)} to ${Math.round(box.right)} px: ${name(element)}`);
    }
  }

  // Pictures without words. (An empty alt marks a decoration.)
  const images = [...document.querySelectorAll("img, svg.book-figure, main svg[role=img]:not([aria-hidden=true])")]
    .filter((image) =>
      image.tagName === "IMG"
        ? !image.hasAttribute("alt") || /\.(png|svg|jpe?g|gif)$/i.test(image.alt)
        : !(image.getAttribute("aria-label") ?? "").trim(),
    )
    .map(name);
  const broken = [...document.images]
    .filter((image) => image.complete && image.naturalWidth === 0 && image.loading !== "lazy")
    .map((image) => image.src);

  // Equations: every one that Sphinx wrote is set, none with an error, none left over as text.
  const equations = [];
  for (const math of document.querySelectorAll(".math")) {
    if (!math.querySelector("mjx-container")) equations.push(`not set: ${name(math)}`);
    const [body, number] = ["mjx-math", ".eqno"].map((part) => math.querySelector(part));
    if (!body || !number || !shown(math)) continue; // a number stands at the right end of its line
    const over = body.getBoundingClientRect().right - number.getBoundingClientRect().left;
    if (over > 1) equations.push(`runs ${Math.round(over)} px into its number: ${name(math)}`);
  }
  for (const error of document.querySelectorAll("mjx-merror, [data-mjx-error]")) {
    equations.push(`error: ${error.getAttribute("data-mjx-error") ?? ""} ${name(error)}`);
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const around = walker.currentNode.parentElement;
    if (around.closest("pre, code, script, style, textarea, mjx-container, svg")) continue;
    const raw = walker.currentNode.data.match(/\$\$|\\[([]|\\begin\{/);
    if (raw) equations.push(`left over: ${walker.currentNode.data.trim().slice(0, 80)}`);
  }

  const loads = performance.getEntriesByType("resource");
  const page = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return {
    overflow: [...new Set(overflow)],
    images: images.concat(broken.map((src) => `did not load: ${src}`)),
    equations,
    math: document.querySelectorAll("mjx-container").length,
    theme: root.dataset.theme,
    bytes: page.encodedBodySize + loads.reduce((sum, load) => sum + load.encodedBodySize, 0),
    painted: Math.round(paint?.startTime ?? -1),
    loaded: Math.round(page.loadEventEnd),
  };
}
