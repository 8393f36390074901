// axe-core's serious and critical findings in the page, a line each; of all rules, or of those given.
async (rules) => {
  // What makes axe slow and tells it nothing: the inside of equations and drawings (which have their
  // own checks), and of a listing all tokens of one colour but the first.
  document.querySelectorAll("mjx-container").forEach((e) => e.replaceChildren("equation"));
  document.querySelectorAll("svg.book-figure > *").forEach((e) => e.remove());
  const seen = new Set();
  for (const token of document.querySelectorAll("pre span")) {
    const box = token.closest("[class*=highlight-], .output");
    const kind = [box?.className, !!token.closest(".cell_output"), token.className].join("|");
    if (seen.has(kind)) token.remove();
    seen.add(kind);
  }
  // No preload: axe would fetch style sheets itself, and takes "../basic.css" to be the page's.
  const only = { resultTypes: ["violations"], iframes: false, preload: false };
  const options = { ...only, ...(rules && { runOnly: rules }) };
  return (await axe.run(document, options)).violations
    .filter(({ impact }) => ["serious", "critical"].includes(impact))
    .flatMap(({ id, nodes }) =>
      nodes.map(({ target, failureSummary }) =>
        [id, target.join(" "), failureSummary.split("\n").slice(1).join(" ").trim()].join(": "),
      ),
    );
}
