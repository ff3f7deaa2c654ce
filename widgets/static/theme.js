function isDark() {
  const said = document.body.dataset.jpThemeLight;
  if (said !== undefined) return said === "false";
  if (document.body.dataset.vscodeThemeKind) return document.body.dataset.vscodeThemeKind.includes("dark");
  const [r, g, b] = (getComputedStyle(document.body).backgroundColor.match(/\d+/g) ?? [255, 255, 255]).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b < 128;
}

function render({ model, el }) {
  el.style.display = "none";
  const report = () => {
    const dark = isDark();
    if (dark !== model.get("dark")) {
      model.set("dark", dark);
      model.save_changes();
    }
  };
  report();
  const themes = new MutationObserver(report);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "style"] });

  // a plot drawn in a hidden tab has no width; plotly measures again when the window says it was resized
  const sizes = new ResizeObserver((entries) => {
    if (entries.some((e) => e.contentRect.width > 0)) window.dispatchEvent(new Event("resize"));
  });
  const watched = new WeakSet();
  const watch = () => {
    const root = el.closest(".wb-app, .wb-panel");
    for (const plot of root?.querySelectorAll(".wb-chart") ?? []) {
      if (!watched.has(plot)) {
        watched.add(plot);
        sizes.observe(plot);
      }
    }
    return root;
  };
  let children;
  const start = () => {
    const root = watch();
    if (!root) return requestAnimationFrame(start);
    children = new MutationObserver(watch);
    children.observe(root, { childList: true, subtree: true });
  };
  let frame = requestAnimationFrame(start);
  return () => {
    cancelAnimationFrame(frame);
    themes.disconnect();
    sizes.disconnect();
    children?.disconnect();
  };
}

export default { render };
