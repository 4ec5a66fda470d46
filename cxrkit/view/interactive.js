// Pictures that carry their chart as JSON become interactive when they come into view. The picture stays in the page:
// it is printed, and it is what one sees should the library not load.
(() => {
  const CONFIG = { responsive: true, displayModeBar: false, scrollZoom: false };
  const NARROW = 560; // pixels: a phone
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

  // Text as lines of at most so many letters, broken at spaces.
  function lines(text, letters) {
    const found = [""];
    for (const word of text.split(" ")) {
      const longer = found.at(-1) ? `${found.at(-1)} ${word}` : word;
      if (longer.length > letters && found.at(-1)) found.push(word);
      else found[found.length - 1] = longer;
    }
    return found.join("<br>");
  }

  // Names keep to their panel. On a phone they are smaller, and those of rows leave room for what they name.
  function fit(data, layout, width) {
    const small = width < NARROW, letter = small ? 5.8 : 7, line = small ? 14 : 17, { margin } = layout;
    const axes = Object.keys(layout).filter((name) => /^xaxis/.test(name)).map((name) => layout[name]);
    const share = Math.min(...axes.map(({ domain: [from, to] = [0, 1] }) => to - from));
    const letters = (width - margin.l - margin.r) * share / letter;
    const broken = (named) => { named.text = lines(named.text, letters); return named.text.split("<br>").length - 1; };
    const titles = (layout.annotations ?? []).filter(({ yref }) => yref === "paper");
    const above = Math.max(0, ...titles.map(broken));
    const below = Math.max(0, ...axes.flatMap(({ title }) => (title?.text ? [broken(title)] : [])));
    margin.t += line * above;
    margin.b += line * below;
    layout.height += line * (above + below);
    if (!small) return;
    layout.font.size = 10;
    for (const each of titles) each.font = { ...each.font, size: 11 };
    for (const trace of data) {
      if (typeof trace.y?.[0] === "string") trace.y = trace.y.map((name) => lines(name, 0.4 * width / letter));
    }
  }

  // In the page's colours, light or dark; those of the data stay.
  function read(script, width) {
    const style = getComputedStyle(document.body), ink = style.color, none = "rgba(0,0,0,0)";
    const rule = style.getPropertyValue("--pst-color-border").trim() || "#c9c9c9";
    const { data, layout } = JSON.parse(script.textContent.replaceAll(JSON.stringify(script.dataset.ink), JSON.stringify(ink)));
    Object.assign(layout, { paper_bgcolor: none, plot_bgcolor: none, font: { ...layout.font, color: ink } });
    // A finger that moves over a chart scrolls the page.
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    for (const name of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      Object.assign(layout[name], { gridcolor: rule, linecolor: rule, zerolinecolor: rule });
    }
    fit(data, layout, width);
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
      await Plotly.newPlot(box, ...read(script, box.clientWidth));
      figure.classList.add("cxr-live");
      const themes = new MutationObserver(() => Plotly.react(box, ...read(script, box.clientWidth)));
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
