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

  // Colours of the page, light or dark; those of the data stay.
  function look() {
    const style = getComputedStyle(document.body);
    const ink = style.color;
    const rule = style.getPropertyValue("--pst-color-border").trim() || "#c9c9c9";
    return { ink, rule };
  }

  function dressed(layout) {
    const { ink, rule } = look();
    const dress = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    dress.font = { ...layout.font, color: ink };
    // A finger that moves over a chart scrolls the page.
    dress.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis/.test(name)) dress[name] = { ...layout[name], gridcolor: rule, linecolor: rule, zerolinecolor: rule };
    }
    return dress;
  }

  async function draw(figure) {
    const picture = figure.querySelector("img");
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    try {
      await load();
      const box = document.createElement("div");
      box.className = "cxr-interactive";
      Object.assign(box, { role: "img", ariaLabel: picture.alt });
      figure.prepend(box);
      await Plotly.newPlot(box, data, dressed(layout), CONFIG);
      figure.classList.add("cxr-live");
      new MutationObserver(() => Plotly.react(box, data, dressed(layout), CONFIG)).observe(document.documentElement, {
        attributeFilter: ["data-theme"],
      });
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
