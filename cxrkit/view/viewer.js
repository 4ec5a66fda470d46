// The comparison viewer: one front end for the book's pages (data inside the page, no kernel) and for JupyterLab
// (maps computed by Python when they are first asked for). No dependency; nothing is fetched.
// Text from data only ever becomes text nodes or attribute values, so a label can't turn into markup.

// ---- Decoding what cxrkit.view.packing packed ----------------------------------------------------------------

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// Reading pixels back from a canvas would be simpler, but privacy modes add noise to them: a map must stay exact.
async function inflate(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export async function decodeMap(record, [height, width], levels) {
  const codes = await inflate(record.z);
  for (let i = width; i < codes.length; i++) codes[i] += codes[i - width];
  const signed = new Int8Array(codes.buffer);
  const values = Float32Array.from(signed, (code) =>
    code < 0 ? -levels[-code] * record.scale[0] : levels[code] * record.scale[1]);
  let top = -Infinity;
  for (const value of values) top = Math.max(top, value); // a spread call fails on this many values
  return { values, width, height, top, negative: record.scale[0] > 0 };
}

const decodeMask = async (text) => text ? Float32Array.from(await inflate(text), (byte) => byte / 255) : null;

// ---- Numbers -------------------------------------------------------------------------------------------------

// Energy-based pointing game, paper `bcos`, Eq. 2 and 3: keep values of at least `threshold` times the maximum.
// Only the numerator of recall is thresholded. `region` holds the share of each cell that the boxes cover.
export function energyPointingGame({ values, top }, region, threshold) {
  let inside = 0, total = 0, held = 0;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    held += region[i] * Math.abs(value);
    if (value <= 0 || value < threshold * top) continue;
    total += value;
    inside += region[i] * value;
  }
  return { precision: total > 0 ? inside / total : NaN, recall: held > 0 ? inside / held : NaN };
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// The magnitude that takes the strongest colour.
function limitOf(map, signed, scale) {
  const sizes = map.values.map(signed ? Math.abs : (value) => Math.max(value, 0));
  if (scale !== "clip") return sizes.reduce((most, size) => Math.max(most, size), 0);
  const sorted = sizes.filter((size) => size > 0).sort();
  return sorted.length ? sorted[Math.floor(0.99 * (sorted.length - 1))] : 0;
}

function say(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const text = size && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : value.toPrecision(digits);
  return text.replace("-", "−");
}

const percent = (value) => (Number.isNaN(value) ? "–" : `${(100 * value).toFixed(1)} %`);

// ---- Colours: two hues that colour-blind readers tell apart, and a perceptual ramp for maps without sign -------

const RAMPS = {
  positive: [[255, 176, 92], [255, 132, 46], [240, 78, 16]],
  negative: [[140, 196, 255], [84, 158, 255], [38, 112, 235]],
  perceptual: [[92, 22, 120], [150, 38, 104], [206, 68, 70], [242, 118, 32], [252, 182, 40], [250, 246, 150]],
};

// 256 colours; opacity grows with the value, so that the radiograph stays visible where a map says little.
function table(name, strength) {
  const stops = RAMPS[name], colours = new Uint8ClampedArray(1024);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    for (let c = 0; c < 3; c++) {
      colours[4 * i + c] = stops[low][c] + (place - low) * (stops[low + 1][c] - stops[low][c]);
    }
    colours[4 * i + 3] = 255 * strength * Math.min(1, 1.15 * (i / 255) ** 0.6);
  }
  return colours;
}

function paintLayer(canvas, map, { signed, limit, strength, threshold }) {
  Object.assign(canvas, { width: map.width, height: map.height });
  const up = table(signed ? "positive" : "perceptual", strength), down = table("negative", strength);
  const picture = new ImageData(map.width, map.height), least = threshold * Math.max(map.top, 0);
  for (let i = 0; i < map.values.length; i++) {
    const value = map.values[i], size = Math.abs(value);
    if (!value || size < least || (value < 0 && !signed)) continue;
    const colours = value < 0 ? down : up, at = 4 * Math.min(255, Math.round((255 * size) / limit));
    for (let c = 0; c < 4; c++) picture.data[4 * i + c] = colours[at + c];
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function legendGradient(signed, strength) {
  const pick = (c, i) => `rgb(${c[4 * i]} ${c[4 * i + 1]} ${c[4 * i + 2]} / ${c[4 * i + 3] / 255})`;
  const sample = (name, colours = table(name, strength)) => Array.from({ length: 18 }, (_, i) => pick(colours, 15 * i));
  const colours = signed ? [...sample("negative").reverse(), ...sample("positive")] : sample("perceptual");
  return `linear-gradient(to right, ${colours.join(", ")})`;
}

// ---- Outlines, as line segments in fractions of the image ----------------------------------------------------

function frame([x0, y0, x1, y1], [height, width]) {
  const [a, b, c, d] = [x0 / width, y0 / height, x1 / width, y1 / height];
  return [[a, b, c, b], [c, b, c, d], [c, d, a, d], [a, d, a, b]];
}

// The edge of a region of any shape: where coverage crosses one half between neighbouring cell centres.
function contour(region, [rows, columns]) {
  const at = (x, y) => (x < 0 || y < 0 || x >= columns || y >= rows ? 0 : region[y * columns + x] ?? 0) - 0.5;
  const lines = [];
  for (let y = -1; y < rows; y++) {
    for (let x = -1; x < columns; x++) {
      const corners = [[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1]], ends = [];
      corners.forEach(([x0, y0], i) => {
        const [x1, y1] = corners[(i + 1) % 4], from = at(x0, y0), to = at(x1, y1), part = from / (from - to);
        if (from < 0 === to < 0) return;
        ends.push((x0 + part * (x1 - x0) + 0.5) / columns, (y0 + part * (y1 - y0) + 0.5) / rows);
      });
      for (let i = 0; i < ends.length; i += 4) lines.push(ends.slice(i, i + 4));
    }
  }
  return lines;
}

// ---- Small pieces of page ------------------------------------------------------------------------------------

function h(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const field = (name, control) => h("label", { className: "cxr-field" }, h("span", { textContent: name }), control);

function fill(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text]) => h("option", { value, textContent: text })));
  select.value = String(chosen);
}

// ---- Where images and maps come from -------------------------------------------------------------------------

class PageStore {
  constructor(bundle) { this.bundle = bundle; }
  has() { return true; }
  // Not every label of every image is stored: a change of image stays with the label if it can.
  labelFor(image, label) {
    const keys = this.bundle.series.flatMap(({ maps }) => Object.keys(maps));
    const own = keys.map((key) => key.split("/").map(Number)).flatMap(([i, l]) => (i === image ? [l] : []));
    return own.includes(label) || !own.length ? label : Math.min(...own);
  }
  async image(image) { return this.bundle.images[image]; }
  async map(image, label, series) {
    const { maps, logits, probabilities } = this.bundle.series[series];
    const record = maps[`${image}/${label}`];
    const found = { record, logit: logits[image][label], probability: probabilities[image][label] };
    return record ? found : { ...found, error: "This map is not stored in this page; compute it in JupyterLab." };
  }
}

class KernelStore {
  constructor(model) {
    this.model = model;
    this.asked = new Map(); // key -> promise of the reply, oldest first
    this.waiting = new Map(); // key -> resolve
    this.listen = (reply) => this.receive(reply);
    model.on("msg:custom", this.listen);
  }
  get bundle() { return this.model.get("bundle"); }
  labelFor(image, label) { return label; }
  close() { this.model.off("msg:custom", this.listen); }
  has(image, label, series) { return this.asked.has(JSON.stringify({ type: "map", image, label, series })); }
  image(image) { return this.ask({ type: "image", image }); }
  map(image, label, series) { return this.ask({ type: "map", image, label, series }); }
  ask(question) {
    const key = JSON.stringify(question);
    if (!this.asked.has(key)) {
      this.asked.set(key, new Promise((resolve) => this.waiting.set(key, resolve)));
      if (this.asked.size > 400) this.asked.delete(this.asked.keys().next().value);
      this.model.send({ ...question, key });
    }
    return this.asked.get(key);
  }
  receive(reply) {
    const resolve = this.waiting.get(reply.key);
    if (!resolve) return;
    this.waiting.delete(reply.key);
    if (reply.error) this.asked.delete(reply.key); // asked again when the reader comes back to it
    resolve(reply.type === "image" && !reply.error ? reply.record : reply);
  }
}

// ---- One panel: model and method, picture, legend, scores ------------------------------------------------------

class Panel {
  constructor(viewer, series) {
    this.viewer = viewer;
    this.series = series;
    this.layer = h("canvas");
    this.model = h("select", { onchange: () => this.choose("model") });
    this.method = h("select", { onchange: () => this.choose("method") });
    this.canvas = h("canvas", { tabIndex: 0, className: "cxr-canvas", role: "img" });
    this.message = h("p", { className: "cxr-message", role: "status" });
    this.bar = h("span", { className: "cxr-gradient" });
    [this.low, this.high, this.readout] = ["cxr-number", "cxr-number", "cxr-readout"].map((className) => h("span", { className }));
    this.scores = h("p", { className: "cxr-scores", ariaLive: "polite" });
    this.modelField = field("Model", this.model);
    this.node = h("section", { className: "cxr-panel" },
      h("div", { className: "cxr-head" }, this.modelField, field("Method", this.method)),
      h("div", { className: "cxr-picture" }, this.canvas, this.message),
      h("p", { className: "cxr-legend" }, this.low, this.bar, this.high, this.readout),
      this.scores);
    this.canvas.onpointermove = this.canvas.onpointerdown = ({ offsetX, offsetY }) =>
      viewer.point(offsetX / this.canvas.clientWidth, offsetY / this.canvas.clientHeight);
    this.canvas.onpointerleave = () => viewer.point(null);
    this.canvas.onkeydown = (event) => viewer.step(event, this.map);
    this.list();
  }

  list() {
    const all = this.viewer.bundle.series, now = all[this.series], models = new Set(all.map(({ model }) => model));
    fill(this.model, [...models].map((model) => [model, model]), now.model);
    this.modelField.hidden = models.size < 2;
    const own = all.map(({ model, method }, i) => [i, method, model]).filter(([, , model]) => model === now.model);
    fill(this.method, own, this.series);
  }

  choose(what) {
    const all = this.viewer.bundle.series, { method } = all[this.series];
    const own = all.filter(({ model }) => model === this.model.value);
    const kept = own.find((entry) => entry.method === method) ?? own[0]; // another model, the same method if it has it
    this.series = what === "method" ? Number(this.method.value) : all.indexOf(kept);
    this.list();
    this.viewer.load();
  }

  get signed() {
    const { colours } = this.viewer.state, own = this.viewer.bundle.series[this.series].signed;
    return colours === "auto" ? own ?? Boolean(this.map?.negative) : colours === "signed";
  }

  async load(turn) {
    const { viewer, series } = this, { image, label } = viewer.state;
    const soon = setTimeout(() => viewer.turn === turn && this.show({ error: "Computing …" }), 150);
    // A reader who runs through a list with the arrow keys shouldn't queue a computation for each entry.
    if (!viewer.store.has(image, label, series)) await new Promise((resolve) => setTimeout(resolve, 120));
    const reply = viewer.turn === turn ? await viewer.store.map(image, label, series) : null;
    const map = reply?.record ? await decodeMap(reply.record, viewer.record.grid, viewer.bundle.levels) : null;
    clearTimeout(soon);
    if (viewer.turn === turn) this.show(reply, map);
  }

  show(reply, map = null) {
    Object.assign(this, { reply, map });
    this.message.textContent = reply.error ?? "";
    this.viewer.paint();
  }

  paint(limit) {
    const { state, record, bitmap, edges, cursor } = this.viewer;
    const box = this.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (!bitmap || !width) return;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const pen = this.canvas.getContext("2d");
    Object.assign(pen, { imageSmoothingEnabled: true, imageSmoothingQuality: "high" });
    pen.drawImage(bitmap, 0, 0, width, height);
    if (this.map && limit > 0) {
      const look = { signed: this.signed, limit, strength: state.strength, threshold: state.threshold };
      const made = JSON.stringify(look);
      if (this.made !== made || this.drawn !== this.map) paintLayer(this.layer, this.map, look);
      [this.made, this.drawn] = [made, this.map];
      pen.imageSmoothingEnabled = state.smooth;
      pen.drawImage(this.layer, 0, 0, width, height);
    }
    if (state.truth) this.outline(pen, edges.truth, "#5df2c8", [], ratio);
    if (state.boxes) this.outline(pen, edges.boxes, "#ffffff", [], ratio);
    if (cursor) {
      const [x, y] = [cursor[0] * width, cursor[1] * height];
      this.outline(pen, [[0, cursor[1], 1, cursor[1]], [cursor[0], 0, cursor[0], 1]], "#ffffff", [1, 3], ratio);
      pen.strokeRect(x - 4 * ratio, y - 4 * ratio, 8 * ratio, 8 * ratio);
    }
    this.bar.style.backgroundImage = legendGradient(this.signed, state.strength);
    this.bar.hidden = this.low.hidden = this.high.hidden = !this.map || !limit;
    this.low.textContent = this.signed ? say(-limit, 2) : "0";
    this.high.textContent = say(limit, 2);
    this.readout.textContent = this.read(cursor);
    this.describe(record);
  }

  // A dark halo under a bright line is visible on bone and on lung.
  outline(pen, lines, colour, dash, ratio) {
    const { width, height } = this.canvas, path = new Path2D();
    for (const [a, b, c, d] of lines) {
      path.moveTo(a * width, b * height);
      path.lineTo(c * width, d * height);
    }
    pen.setLineDash(dash.map((length) => length * ratio));
    pen.lineCap = dash.length ? "butt" : "round";
    for (const [strokeStyle, thick] of [["rgb(0 0 0 / 50%)", 4], [colour, 2]]) {
      Object.assign(pen, { strokeStyle, lineWidth: thick * ratio }).stroke(path);
    }
    pen.setLineDash([]);
  }

  read(cursor) {
    if (!cursor) return "";
    const cell = (height, width) => [Math.floor(cursor[0] * width), Math.floor(cursor[1] * height)];
    const [x, y] = cell(...this.viewer.record.size), place = `x ${x}, y ${y}`;
    if (!this.map) return place;
    const { values, width, height } = this.map, [column, row] = cell(height, width);
    return `${place}: ${say(values[row * width + column])}`;
  }

  describe(record) {
    const { bundle, state, region } = this.viewer, { model, method } = bundle.series[this.series];
    const label = bundle.labels[state.label];
    this.canvas.ariaLabel = this.map
      ? `Radiograph ${record.id} with the ${method} map of ${model} for ${label}, threshold ${state.threshold}. Arrow keys move the cross-hair.`
      : `Radiograph ${record.id} without a map: ${this.message.textContent}`;
    const { logit, probability } = this.reply ?? {};
    const stats = [["Logit", say(logit)], ["Probability", say(probability)]];
    const share = region ? mean(region) : NaN;
    if (this.map && region) {
      const { precision, recall } = energyPointingGame(this.map, region, state.threshold);
      stats.push(["EPG precision", percent(precision), precision]);
      stats.push(["EPG recall", percent(recall)], ["Chance", percent(share)]);
    } else if (this.map) stats.push(["EPG", "no box for this label"]);
    if (this.line === JSON.stringify(stats)) return; // a live region that is rewritten is read out again
    this.line = JSON.stringify(stats);
    this.scores.replaceChildren(...stats.flatMap(([name, text, value]) => {
      const stat = h("span", { className: "cxr-stat" }, h("span", { textContent: name }), " ", h("b", { textContent: text }));
      if (value !== undefined) {
        const title = "The tick marks chance: the share of the image that the boxes cover";
        const meter = h("i", { className: "cxr-meter", title });
        meter.style.setProperty("--value", value || 0);
        meter.style.setProperty("--chance", share);
        stat.append(meter);
      }
      return [stat, " "];
    }));
  }
}

// ---- The viewer: what the panels share -------------------------------------------------------------------------

class Viewer {
  constructor(root, store, changed = () => {}) {
    Object.assign(this, { root, store, changed, turn: 0, cursor: null, panels: [] });
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
    this.image = h("select", { onchange: () => {
      state.image = Number(this.image.value);
      state.label = this.store.labelFor(state.image, state.label);
      this.load();
    } });
    this.label = h("select", { onchange: () => { state.label = Number(this.label.value); this.load(); } });
    this.fact = h("p", { className: "cxr-fact", ariaLive: "polite" });
    this.grid = h("div", { className: "cxr-panels" });
    this.root.replaceChildren(
      h("div", { className: "cxr-shared" }, field("Image", this.image), field("Label", this.label), this.fact),
      h("div", { className: "cxr-tools" },
        number("Overlay", "strength", (value) => `${Math.round(100 * value)} %`),
        number("Threshold", "threshold", (value) => `${value.toFixed(2)} × max`),
        choice("Colours", "colours", [["auto", "By method"], ["signed", "Signed"], ["positive", "Positive"]]),
        choice("Scale", "scale", [["map", "Each map"], ["clip", "Each map, top 1 % clipped"], ["shared", "Shared"]]),
        h("div", { className: "cxr-toggles" }, toggle("Boxes", "boxes", "cxr-box"), toggle("True mask", "truth", "cxr-true"), toggle("Smooth", "smooth"))),
      this.grid, h("p", { className: "cxr-note" }));
  }

  // Take the lists from the bundle again: at the start, and when Python added an image.
  renew() {
    const { bundle, state } = this, start = bundle.start ?? {};
    state.image = start.image ?? state.image;
    state.label = start.label ?? this.store.labelFor(state.image, state.label);
    fill(this.image, bundle.images.map(({ id }, i) => [i, id]), state.image);
    this.root.querySelector(".cxr-note").textContent = bundle.note;
    const series = start.panels?.length ? start.panels : bundle.series.slice(0, 2).map((_, i) => i);
    if (!this.panels.length) this.panels = series.map((each) => new Panel(this, each));
    this.grid.replaceChildren(...this.panels.map(({ node }) => node));
    this.resized.disconnect();
    this.panels.forEach(({ canvas }) => this.resized.observe(canvas));
    this.load();
  }

  async load() {
    const turn = ++this.turn, { bundle, state } = this;
    this.changed({ image: state.image, label: state.label, series: this.panels.map(({ series }) => series) });
    const record = await this.store.image(state.image);
    if (turn !== this.turn) return;
    if (record.error) return this.fail(record.error);
    const [bitmap, region, truth] = await Promise.all([
      createImageBitmap(new Blob([bytesOf(record.png)], { type: "image/png" })),
      decodeMask(record.masks[state.label]), decodeMask(record.truth[state.label])]);
    if (turn !== this.turn) return;
    const boxes = record.boxes[state.label]?.flatMap((box) => frame(box, record.size));
    const edges = { boxes: boxes ?? contour(region ?? [], record.grid), truth: contour(truth ?? [], record.grid) };
    Object.assign(this, { record, bitmap, region, edges });
    const told = (label) => ({ 1: "present", 0: "absent" })[record.targets?.[label]] ?? "unknown";
    fill(this.label, bundle.labels.map((name, i) => [i, told(i) === "present" ? `${name} (present)` : name]), state.label);
    this.fact.textContent = `Truth: ${told(state.label)}${region ? `, boxes cover ${percent(mean(region))} of the image` : ""}`;
    for (const { canvas } of this.panels) canvas.style.setProperty("--shape", record.size[1] / record.size[0]);
    await Promise.all(this.panels.map((panel) => panel.load(turn)));
  }

  fail(error) {
    this.record = null;
    for (const { canvas } of this.panels) canvas.width = 0; // clears it
    for (const panel of this.panels) panel.show({ error });
  }

  paint() {
    if (!this.record) return;
    const { scale } = this.state;
    const limits = this.panels.map((panel) => (panel.map ? limitOf(panel.map, panel.signed, scale) : 0));
    this.panels.forEach((panel, i) => panel.paint(scale === "shared" ? Math.max(...limits) : limits[i]));
  }

  // The cross-hair is at the same place in every panel.
  point(x, y) {
    this.cursor = x === null || x < 0 || y < 0 || x >= 1 || y >= 1 ? null : [x, y];
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.paint());
  }

  step(event, map) {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") this.point(null);
    if (!move || !map) return;
    event.preventDefault();
    const [x, y] = this.cursor ?? [0.5, 0.5], within = (value) => Math.min(0.999, Math.max(0, value));
    this.point(within(x + move[0] / map.width), within(y + move[1] / map.height));
  }

  close() {
    this.turn += 1; // answers that still come are ignored
    this.resized.disconnect();
  }
}

// In a page: take over every viewer that waits for it. A page holds this script once per viewer; the first does all.
export function mountAll(page) {
  for (const root of page.querySelectorAll("[data-cxr]")) {
    root.removeAttribute("data-cxr");
    const bundle = JSON.parse(root.querySelector("script").textContent);
    if (bundle.series.length) new Viewer(root, new PageStore(bundle));
  }
}

// In JupyterLab: anywidget calls this for every view of the widget.
export default {
  render({ model, el }) {
    const root = h("div", { className: "cxr" });
    el.append(root);
    const store = new KernelStore(model);
    const viewer = new Viewer(root, store, (selection) => {
      model.set("selection", selection);
      model.save_changes();
    });
    const renew = () => viewer.renew();
    model.on("change:bundle", renew);
    return () => {
      model.off("change:bundle", renew);
      store.close();
      viewer.close();
    };
  },
};
