// Pictures that carry their chart as JSON become interactive when they come into view. The picture stays in the page:
// it is printed, and it is what one sees should the library not load.
(() => {
  const CONFIG = { responsive: true, displayModeBar: false, scrollZoom: false };
  let library;

  const root = () => document.documentElement.dataset.content_root ?? "";

  function load() {
    library ??= new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = root() + "_vendor/plotly.min.js";
      script.onload = done;
      script.onerror = failed;
      document.head.append(script);
    });
    return library;
  }

  // In the page's colours, light or dark; those of the data stay.
  function read(script) {
    const style = getComputedStyle(document.body), ink = style.color, none = "rgba(0,0,0,0)";
    const rule = style.getPropertyValue("--pst-color-border").trim() || "#c9c9c9";
    const { data, layout } = JSON.parse(script.textContent.replaceAll(JSON.stringify(script.dataset.ink), JSON.stringify(ink)));
    Object.assign(layout, { paper_bgcolor: none, plot_bgcolor: none, font: { ...layout.font, color: ink } });
    // A finger that moves over a chart scrolls the page.
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    for (const name of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      Object.assign(layout[name], { gridcolor: rule, linecolor: rule, zerolinecolor: rule });
    }
    return [data, layout, CONFIG];
  }

  async function draw(figure) {
    const picture = figure.querySelector("img"), script = figure.querySelector("script");
    try {
      await load();
      const box = document.createElement("div");
      box.className = "cxr-interactive";
      Object.assign(box, { role: "img", ariaLabel: picture.alt });
      figure.prepend(box);
      await Plotly.newPlot(box, ...read(script));
      figure.classList.add("cxr-live");
      const themes = new MutationObserver(() => Plotly.react(box, ...read(script)));
      themes.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    } catch {
      figure.querySelector(".cxr-interactive")?.remove();
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    const near = new IntersectionObserver((seen) => {
      for (const { isIntersecting, target } of seen) {
        if (!isIntersecting) continue;
        near.unobserve(target);
        draw(target);
      }
    }, { rootMargin: "200px" });
    // The page first, then its charts.
    addEventListener("load", () => document.querySelectorAll("figure.cxr-chart").forEach((one) => near.observe(one)));
  });
})();
