// ---- The viewer: what the panels share -------------------------------------------------------------------------

const MOST_PANELS = 6, MOST_ZOOM = 16;
const COLOURS = [["auto", "By method"], ["signed", "Signed, blue to red"], ["heat", "Heat"], ["viridis", "Viridis"], ["white", "White"]];
const SCALES = [["map", "Each map"], ["clip", "Each map, top 1 % clipped"], ["row", "Each row of panels"], ["shared", "Shared"]];

class Viewer {
  constructor(root, store, changed = () => {}) {
    Object.assign(this, { root, store, changed, turn: 0, cursor: null, panels: [], view: { x: 0, y: 0, zoom: 1 } });
    this.state = { image: 0, label: 0, strength: 0.75, threshold: 0, colours: "auto", scale: "map" };
    Object.assign(this.state, { smooth: true, boxes: true, truth: false });
    this.resized = new ResizeObserver(() => this.paint());
    this.build();
    this.renew();
  }

  get bundle() { return this.store.bundle; }

  build() {
    const { state } = this, step = this.bundle.step;
    const number = (name, key, text) => {
      const shown = h("b"), input = h("input", { type: "range", min: 0, max: 1, step, value: state[key], ariaLabel: name });
      const tell = () => { shown.textContent = input.ariaValueText = text(state[key] = Number(input.value)); };
      input.oninput = () => { tell(); this.paint(); };
      tell();
      return h("label", { className: "cxr-field cxr-slider" }, h("span", {}, name, " ", shown), input);
    };
    const choice = (name, key, options) => {
      const select = h("select", { onchange: () => { state[key] = select.value; this.paint(); } });
      fill(select, options, state[key]);
      return field(name, select);
    };
    const toggle = (name, key, mark = "") => {
      const input = h("input", { type: "checkbox", checked: state[key] });
      input.onchange = () => { state[key] = input.checked; this.paint(); };
      return h("label", { className: `cxr-toggle ${mark}` }, input, h("span", { textContent: name }));
    };
    this.image = h("select", { onchange: () => this.load(Number(this.image.value)) });
    this.label = h("select", { onchange: () => this.load(state.image, Number(this.label.value)) });
    this.count = h("select", { onchange: () => this.arrange(Number(this.count.value)) });
    this.fact = h("p", { className: "cxr-fact", ariaLive: "polite" });
    this.grid = h("div", { className: "cxr-panels" });
    this.zoomed = button("100 %", "Whole image", () => this.zoomBy(0));
    this.table = h("table");
    this.numbers = h("details", { className: "cxr-numbers", ontoggle: () => this.tabulate() },
      h("summary", { textContent: "Numbers as a table" }),
      h("div", { tabIndex: 0, role: "region", ariaLabel: "Numbers as a table" }, this.table));
    this.root.replaceChildren(
      h("div", { className: "cxr-shared" }, field("Image", this.image), field("Label", this.label), this.fact),
      h("div", { className: "cxr-tools" },
        number("Overlay", "strength", (value) => `${Math.round(100 * value)} %`),
        number("Threshold", "threshold", (value) => `${value.toFixed(2)} × max`),
        choice("Colours", "colours", COLOURS), choice("Scale", "scale", SCALES), field("Panels", this.count),
        h("div", { className: "cxr-toggles" },
          toggle("Boxes", "boxes", "cxr-box"), toggle("True mask", "truth", "cxr-true"), toggle("Smooth", "smooth")),
        h("div", { className: "cxr-toggles cxr-zoom", role: "group", ariaLabel: "Zoom" },
          button("−", "Zoom out", () => this.zoomBy(1 / 1.5)), this.zoomed, button("+", "Zoom in", () => this.zoomBy(1.5))),
        h("div", { className: "cxr-toggles" }, button("Save picture", "Save the panels as a PNG picture", () => this.savePicture()),
          button("Save numbers", "Save the numbers as a CSV table", () => this.saveNumbers()))),
      h("p", { className: "cxr-settings" }), this.grid, this.numbers, h("p", { className: "cxr-note" }));
  }

  // Take the lists from the bundle again: at the start, and when Python added an image.
  renew() {
    const { bundle, state } = this, start = bundle.start ?? {};
    fill(this.image, bundle.images.map(({ id }, i) => [i, id]), start.image ?? state.image);
    this.root.querySelector(".cxr-note").textContent = bundle.note;
    const series = start.panels?.length ? start.panels : bundle.series.slice(0, 2).map((_, i) => i);
    if (!this.panels.length) this.panels = series.map((each) => new Panel(this, each));
    const most = Math.max(Math.min(MOST_PANELS, bundle.series.length), this.panels.length);
    fill(this.count, Array.from({ length: most }, (_, i) => [i + 1, i + 1]), this.panels.length);
    this.lay();
    this.load(start.image, start.label ?? (this.record ? undefined : this.present(start.image ?? state.image)));
  }

  // Where nothing was said the viewer starts on a label that is there.
  present(image) {
    const label = (this.bundle.images[image]?.targets ?? []).indexOf(1);
    return label < 0 ? undefined : this.labelFor(image, label);
  }

  labelFor(image, label) { return this.store.labelFor(image, label, this.panels.map(({ series }) => series)); }

  // More panels show what isn't shown yet; fewer leave out the last.
  arrange(count) {
    const shown = new Set(this.panels.map(({ series }) => series));
    const open = this.bundle.series.map((_, i) => i).filter((i) => !shown.has(i));
    while (this.panels.length < count) this.panels.push(new Panel(this, open.shift() ?? 0));
    this.panels.length = count;
    this.lay();
    this.load(undefined, this.state.label);
  }

  lay() {
    this.grid.replaceChildren(...this.panels.map(({ node }) => node));
    this.resized.disconnect();
    this.panels.forEach(({ canvas }) => this.resized.observe(canvas));
  }

  async load(image = this.state.image, label = this.labelFor(image, this.state.label)) {
    const turn = ++this.turn, { bundle, state } = this;
    Object.assign(state, { image, label });
    for (const panel of this.panels) panel.pending = true; // what they show is another label's
    this.repaint();
    this.tell();
    const record = await this.store.image(state.image);
    if (turn !== this.turn) return;
    const told = (label) => ({ 1: "present", 0: "absent" })[record.targets?.[label]] ?? "unknown";
    const marks = (i) => [...(told(i) === "present" ? ["present"] : []), ...(this.store.stored(image, i) ? [] : ["not stored"])];
    const marked = (name, i) => [i, marks(i).length ? `${name} (${marks(i).join(", ")})` : name];
    fill(this.label, bundle.labels.map(marked), state.label);
    if (record.error) return this.fail(record.error);
    const [bitmap, region, truth] = await Promise.all([
      decodeImage(record), decodeMask(record.masks, state.label, record.grid), decodeMask(record.truth, state.label, record.grid)]);
    if (turn !== this.turn) return;
    const [high, wide] = record.size;
    const boxes = record.outlines[state.label]?.map(([a, b, c, d]) => [a / wide, b / high, c / wide, d / high]);
    // Traced when they are first drawn.
    const edges = { boxes: () => boxes ?? contourOf(region, record.grid), truth: () => contourOf(truth, record.grid) };
    Object.assign(this, { record, bitmap, region, edges });
    this.fact.textContent = `Truth: ${told(state.label)}${region ? `, boxes cover ${percent(region.share)} of the image` : ""}`;
    for (const { canvas } of this.panels) canvas.style.setProperty("--shape", record.size[1] / record.size[0]);
    await Promise.all(this.panels.map((panel) => panel.load(turn)));
  }

  // A panel no longer waits for a map: it is not computed to its end, unless another panel wants it.
  forget(place) {
    const wanted = this.panels.some(({ series }) => String([this.state.image, this.state.label, series]) === String(place));
    if (!wanted) this.store.cancel(...place);
  }

  fail(error) {
    this.record = null;
    this.fact.textContent = "";
    for (const panel of this.panels) {
      panel.show({ error });
      panel.say(error);
      Object.assign(panel.canvas, { width: 0, ariaLabel: error }); // no width: nothing of the last image is left
      panel.scores.replaceChildren(panel.line = "");
    }
  }

  paint() {
    if (!this.record) return;
    const { scale } = this.state, { panels } = this;
    const limits = panels.map((panel) => panel.pending || !panel.map ? 0 : panel.limit(panel.map, panel.colours === "signed", scale));
    const rows = panels.map(({ node }) => (scale === "row" ? node.offsetTop : 0));
    const joint = (i) => Math.max(...limits.filter((_, k) => rows[k] === rows[i]));
    // Sizes are read before anything is written: a page laid out anew for each panel would be slow.
    const sizes = panels.map(({ canvas }) => canvas.getBoundingClientRect());
    panels.forEach((panel, i) => panel.paint(scale === "row" || scale === "shared" ? joint(i) : limits[i], sizes[i]));
    this.root.querySelector(".cxr-settings").textContent = this.settings;
    if (this.numbers.open) this.tabulate();
    clearTimeout(this.telling);
    this.telling = setTimeout(() => this.tell(), 100); // not at each step of a slider
  }

  // Python hears all that makes the picture, and of each panel what its colours mean (null while it is computed).
  tell() {
    const { image, label, strength, threshold, colours, scale, smooth, boxes, truth } = this.state;
    const panels = this.panels.map((panel) => ({ colours: panel.colours, full_colour: panel.pending ? null : panel.full ?? null }));
    const now = { image, label, series: this.panels.map(({ series }) => series), overlay: strength, threshold, colours, scale,
      smooth, boxes, true_mask: truth, zoom: this.view.zoom, left: this.view.x, top: this.view.y, panels };
    if (this.told === JSON.stringify(now)) return;
    this.told = JSON.stringify(now);
    this.changed(now);
  }

  // How the panels are drawn, in one line: for paper and saved pictures, which have no controls.
  get settings() {
    const { state, view } = this, named = (options, key) => options.find(([value]) => value === key)[1].toLowerCase();
    const shown = [["boxes", state.boxes], ["true mask", state.truth], ["smooth", state.smooth]];
    const extras = shown.map(([name, on]) => `${name} ${on ? "on" : "off"}`).join(", ");
    const part = (from) => `${Math.round(100 * from)} to ${Math.round(100 * (from + 1 / view.zoom))} %`;
    const where = view.zoom > 1 ? ` (across ${part(view.x)}, down ${part(view.y)} of the image)` : "";
    return `Overlay ${Math.round(100 * state.strength)} %; threshold ${state.threshold.toFixed(2)} × max; `
      + `colours: ${named(COLOURS, state.colours)}; scale: ${named(SCALES, state.scale)}; ${extras}; `
      + `zoom ${Math.round(100 * view.zoom)} %${where}`;
  }

  repaint() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.paint());
  }

  // The cross-hair is at the same place in every panel; places are fractions of the image.
  point(x, y, keyed = false) {
    for (const { readout, canvas } of this.panels) { // a mouse would never let it be read to its end
      readout.ariaLive = keyed && document.activeElement === canvas ? "polite" : "off";
    }
    this.cursor = x === null || x < 0 || y < 0 || x >= 1 || y >= 1 ? null : [x, y];
    this.repaint();
  }

  pointIn(x, y) { this.point(this.view.x + x / this.view.zoom, this.view.y + y / this.view.zoom); }

  // All panels show the same part of the image. The place (fractions of a canvas) stays where it is; 0: whole image.
  zoomBy(factor, x = 0.5, y = 0.5) {
    const { view } = this, zoom = Math.min(MOST_ZOOM, Math.max(1, view.zoom * factor)), gain = 1 / view.zoom - 1 / zoom;
    this.show({ x: view.x + x * gain, y: view.y + y * gain, zoom });
  }

  pan(x, y) { this.show({ ...this.view, x: this.view.x + x / this.view.zoom, y: this.view.y + y / this.view.zoom }); }

  show({ x, y, zoom }) {
    const within = (value) => Math.min(1 - 1 / zoom, Math.max(0, value));
    this.view = { x: within(x), y: within(y), zoom };
    this.zoomed.textContent = `${Math.round(100 * zoom)} %`;
    this.root.classList.toggle("cxr-zoomed", zoom > 1);
    this.repaint();
  }

  key(event, map) {
    const zoom = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 }[event.key];
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") this.point(null);
    if (zoom === undefined && (!move || (!map && !event.shiftKey))) return;
    event.preventDefault();
    if (zoom !== undefined) return this.zoomBy(zoom);
    if (event.shiftKey) return this.pan(0.1 * move[0], 0.1 * move[1]);
    const [x, y] = this.cursor ?? [0.5, 0.5], within = (value) => Math.min(0.999, Math.max(0, value));
    this.point(within(x + move[0] / map.width), within(y + move[1] / map.height), true);
  }

  // The same numbers as under the pictures, for those who read tables: name, text, and a plain number or word for files.
  get rows() {
    const { bundle, state, record } = this;
    if (!record) return [];
    return this.panels.map((panel) => {
      const { map } = panel, { model, method } = bundle.series[panel.series];
      const about = [["Image", bundle.images[state.image].id], ["Label", bundle.labels[state.label]], ["Model", model], ["Method", method],
        ["Threshold", String(state.threshold), state.threshold]];
      if (panel.pending) return [...about, ["Note", "computing"]];
      const where = map ? `${(map.peak % map.width) + 1} of ${map.width}, ${Math.floor(map.peak / map.width) + 1} of ${map.height}` : "–";
      return [...about, ...panel.stats, ["Strongest cell", where], ["Highest", say(map?.top), map?.top ?? NaN],
        ["Lowest", say(map?.bottom), map?.bottom ?? NaN], ["Note", panel.reply.error ?? ""]];
    });
  }

  // Names, then the cells of each row; `told` picks what a cell holds. The shown table follows.
  listed(told) {
    const { rows } = this, longest = [...rows].sort((a, b) => b.length - a.length); // its names are in their order
    const names = [...new Set(longest.flatMap((row) => row.map(([name]) => name)))];
    const cells = rows.map((row) => new Map(row.map((cell) => [cell[0], told(cell)])));
    return [names, ...cells.map((row) => names.map((name) => row.get(name) ?? ""))];
  }

  tabulate() {
    const [names, ...rows] = this.listed(([, text]) => text);
    const line = (tag, cells) => h("tr", {}, ...cells.map((textContent) => h(tag, { textContent })));
    this.table.replaceChildren(h("thead", {}, line("th", names)),
      h("tbody", {}, ...rows.map((row) => line("td", row))));
  }

  get heading() { return `${this.bundle.images[this.state.image].id}: ${this.bundle.labels[this.state.label]}`; }
  get title() { return `${this.bundle.images[this.state.image].id} ${this.bundle.labels[this.state.label]}`; }

  saveNumbers() {
    if (!this.record) return;
    const cell = (value) => {
      if (typeof value === "number") return Number.isFinite(value) ? String(Number(value.toPrecision(6))) : "";
      // A cell that starts like a formula would be run by a spreadsheet.
      return `"${(/^[=+@\t\r-]/.test(value) ? `'${value}` : value).replaceAll('"', '""')}"`;
    };
    const text = this.listed(([, text, value]) => value ?? text).map((row) => row.map(cell).join(",")).join("\r\n");
    download(`data:text/csv;charset=utf-8,${encodeURIComponent(`\ufeff${text}\r\n`)}`, `${this.title}.csv`);
  }

  // At most three panels in a row, each with its numbers below. Of panels that are being computed nothing is saved: their
  // pictures are those of another label.
  savePicture() {
    const shown = this.panels.filter(({ canvas, pending }) => canvas.width && !pending);
    if (!this.record || !shown.length) return;
    const ratio = window.devicePixelRatio || 1, gap = 16 * ratio, columns = Math.min(3, shown.length);
    const wide = Math.max(220 * ratio, ...shown.map(({ canvas }) => canvas.width));
    const sheet = h("canvas", { width: columns * (wide + gap) + gap }), pen = sheet.getContext("2d");
    const style = (size) => { pen.font = `${size * ratio}px system-ui, sans-serif`; };
    const block = (size, width, texts) => {
      style(size);
      const lines = texts.flatMap((text) => wrapped(pen, text, width));
      return { size, lines, height: 1.45 * size * ratio * lines.length };
    };
    const write = ({ size, lines, height }, x, y) => {
      style(size);
      lines.forEach((line, i) => pen.fillText(line, x, y + ((i + 0.75) * height) / lines.length));
      return y + height;
    };
    const full = sheet.width - 2 * gap;
    const head = [block(18, full, [this.heading]), block(13, full, [this.settings])], foot = block(13, full, [this.bundle.note]);
    const cells = shown.map((panel) => ({ panel, name: block(15, wide, [panel.name]), told: block(13, wide, panel.lines) }));
    const rows = Array.from({ length: Math.ceil(cells.length / columns) }, (_, i) => cells.slice(columns * i, columns * (i + 1)));
    const most = (row, height) => Math.max(...row.map(height));
    const heights = rows.map((row) => [({ name }) => name.height, ({ panel }) => panel.canvas.height, ({ told }) => told.height]
      .map((height) => most(row, height) + gap / 2));
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    sheet.height = 2.5 * gap + sum(head.map(({ height }) => height)) + foot.height + sum(heights.flat()) + (rows.length * gap) / 2;
    Object.assign(pen, { fillStyle: "#ffffff" }).fillRect(0, 0, sheet.width, sheet.height);
    pen.fillStyle = "#1d2530";
    let top = head.reduce((y, lines) => write(lines, gap, y), gap / 2) + gap / 2;
    rows.forEach((row, i) => {
      const [title, picture, numbers] = heights[i];
      row.forEach(({ panel, name, told }, k) => {
        const left = gap + k * (wide + gap);
        write(name, left, top);
        pen.drawImage(panel.canvas, left, top + title);
        write(told, left, top + title + picture);
      });
      top += title + picture + numbers + gap / 2;
    });
    write(foot, gap, top);
    download(sheet.toDataURL("image/png"), `${this.title}.png`);
  }

  close() {
    this.turn += 1; // answers that still come are ignored
    clearTimeout(this.telling);
    this.resized.disconnect();
  }
}

// In a page: take over every viewer that waits for it, when the reader comes near. A page holds this script once per
// viewer; the first does all.
export function mountAll(page) {
  const mount = (root) => new Viewer(root, new PageStore(JSON.parse(root.querySelector("script").textContent)));
  const near = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
    if (!isIntersecting) return;
    near.unobserve(target);
    mount(target);
  }), { rootMargin: "800px" });
  const waiting = page.querySelectorAll("[data-cxr]");
  for (const root of waiting) root.removeAttribute("data-cxr"), near.observe(root);
  // Paper shows what was never scrolled to.
  addEventListener("beforeprint", () => waiting.forEach((root) => {
    if (!root.querySelector(".cxr-panels")) near.unobserve(root), mount(root);
  }));
}

// In JupyterLab: anywidget calls this for every view of the widget.
export default {
  render({ model, el }) {
    const root = h("div", { className: "cxr" });
    el.append(root);
    const store = new KernelStore(model), renew = () => viewer.renew();
    const tell = (selection) => { model.set("selection", selection); model.save_changes(); };
    const viewer = new Viewer(root, store, tell);
    model.on("change:bundle", renew);
    return () => {
      model.off("change:bundle", renew);
      store.close();
      viewer.close();
    };
  },
};
