// Charts that answer to the pointer. A chart is a picture in SVG; when it comes into view its drawing takes the picture's
// place in the page's own colours. The picture stays for print, and wherever no script runs.
(() => {
  const NEAR = 24; // pixels between the pointer and a point that it reads
  const LOOK = `
    :host { --cxr-ink: currentColor; --cxr-soft: currentColor; --cxr-paper: var(--pst-color-background, transparent);
      --cxr-rule: var(--pst-color-border, #c9c9c9); display: block; position: relative }
    svg { display: block; width: 100%; height: auto; fill: currentColor; touch-action: pan-x pan-y pinch-zoom }
    [role=button] { cursor: pointer }
    [role=button][aria-pressed=false], .off { opacity: 0.35 }
    .hit { fill: transparent }
    .gone { display: none }
    .part { fill: none; stroke: currentColor; stroke-dasharray: 3 2 }
    .ring { fill: none; stroke: currentColor; stroke-width: 1.5; pointer-events: none }
    output { position: absolute; padding: 2px 6px; border-radius: 4px; background: #1d2530; color: #fff;
      font: 12px/1.35 system-ui, sans-serif; pointer-events: none; white-space: pre-line; width: max-content;
      max-width: 60% }`;

  const make = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  // The drawing inside a picture, whose source holds it as base64.
  function drawing(picture) {
    const bytes = Uint8Array.from(atob(picture.src.split(",")[1]), (letter) => letter.charCodeAt(0));
    const parsed = new DOMParser().parseFromString(new TextDecoder().decode(bytes), "image/svg+xml");
    return document.importNode(parsed.querySelector("svg"), true);
  }

  // A shadow root keeps the ids of one drawing from those of the next.
  function show(picture) {
    const box = document.createElement("div"), root = box.attachShadow({ mode: "open" });
    const style = document.createElement("style"), svg = drawing(picture), said = document.createElement("output");
    style.textContent = LOOK;
    said.hidden = true;
    box.className = "cxr-interactive";
    box.style.cssText = picture.style.cssText;
    box.style.width = `${picture.getAttribute("width")}px`;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", picture.alt);
    root.append(style, svg, said);
    picture.before(box);
    return { svg, said };
  }

  function legend(svg, series) {
    for (const [place, one] of series.entries()) {
      const own = [...svg.querySelectorAll(`[id^="bar-${place}-"], [id^="mark-${place}-"]`)];
      const keys = [...svg.querySelectorAll(`[id^="key-${place}-"]`)];
      const entries = [...svg.querySelectorAll(`[id^="legend-${place}-"]`)];
      const turn = () => {
        one.off = !one.off;
        for (const each of own) each.classList.toggle("gone", one.off);
        for (const each of keys) each.classList.toggle("off", one.off);
        for (const each of entries) each.setAttribute("aria-pressed", String(!one.off));
      };
      for (const entry of entries) {
        for (const [key, value] of Object.entries({ role: "button", tabindex: 0, "aria-pressed": "true" })) {
          entry.setAttribute(key, value);
        }
        entry.setAttribute("aria-label", one.name);
        const { x, y, width, height } = entry.getBBox();
        entry.append(make("rect", { class: "hit", x: x - 3, y: y - 3, width: width + 6, height: height + 6 }));
        entry.addEventListener("click", turn);
        entry.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          turn();
        });
      }
    }
  }

  // Where an event is, in the drawing's own units.
  const place = (svg, { clientX, clientY }) => new DOMPoint(clientX, clientY).matrixTransform(svg.getScreenCTM().inverse());

  // The point under the pointer: that of the bar, else the nearest one.
  function pointed(svg, series, size, event) {
    const below = svg.getRootNode().elementsFromPoint(event.clientX, event.clientY);
    const bar = below.map((each) => each.closest("[id^=bar-]")?.id).find(Boolean);
    const [, own, number] = /^bar-(\d+)-(\d+)$/.exec(bar) ?? [];
    if (own && series[own].points[number]) return [series[own], series[own].points[number]];
    const at = place(svg, event), reach = NEAR / svg.getScreenCTM().a;
    let best = null, least = reach;
    for (const one of series.filter(({ off }) => !off)) {
      for (const point of one.points.filter(Boolean)) {
        const far = Math.hypot(point[0] * size.width - at.x, point[1] * size.height - at.y);
        if (far < least) [best, least] = [[one, point], far];
      }
    }
    return best;
  }

  function reading(svg, said, series, size) {
    const ring = make("circle", { class: "ring", r: 4.5 });
    const leave = () => { said.hidden = true; ring.remove(); };
    svg.addEventListener("pointermove", (event) => {
      const found = pointed(svg, series, size, event);
      if (!found) return leave();
      const [{ name }, [x, y, text]] = found, box = svg.parentNode.host.getBoundingClientRect();
      const to = new DOMPoint(x * size.width, y * size.height).matrixTransform(svg.getScreenCTM());
      said.textContent = [name, text].filter(Boolean).join("\n");
      said.hidden = !said.textContent;
      const left = Math.min(to.x - box.left + 10, box.width - said.offsetWidth);
      said.style.left = `${Math.max(0, left)}px`;
      said.style.top = `${Math.max(0, to.y - box.top - said.offsetHeight - 8)}px`;
      ring.setAttribute("cx", x * size.width);
      ring.setAttribute("cy", y * size.height);
      svg.append(ring);
    });
    svg.addEventListener("pointerleave", leave);
  }

  // A part that is drawn round with the mouse fills the chart's place; a double click shows the whole again.
  function enlarging(svg) {
    const whole = svg.getAttribute("viewBox");
    let from = null, part = null;
    svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) from = place(svg, event);
    });
    svg.addEventListener("pointermove", (event) => {
      if (!from || !event.buttons) return;
      const to = place(svg, event);
      part ??= svg.appendChild(make("rect", { class: "part" }));
      for (const [name, value] of Object.entries({
        x: Math.min(from.x, to.x), y: Math.min(from.y, to.y),
        width: Math.abs(to.x - from.x), height: Math.abs(to.y - from.y),
      })) part.setAttribute(name, value);
    });
    addEventListener("pointerup", () => {
      const { x, y, width, height } = part?.getBBox() ?? {};
      part?.remove();
      from = part = null;
      if (width > 8 && height > 8) svg.setAttribute("viewBox", `${x} ${y} ${width} ${height}`);
    });
    svg.addEventListener("dblclick", () => svg.setAttribute("viewBox", whole));
  }

  function draw(figure) {
    try {
      const series = JSON.parse(figure.querySelector("script").textContent);
      const { svg, said } = show(figure.querySelector("img"));
      const { width, height } = svg.viewBox.baseVal, size = { width, height };
      svg.style.aspectRatio = `${width} / ${height}`;
      legend(svg, series);
      reading(svg, said, series, size);
      enlarging(svg);
      figure.classList.add("cxr-live");
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
