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
  const codes = await inflate(record.z), values = new Float32Array(codes.length), lookup = new Float32Array(256);
  const [negative, positive] = record.scale;
  for (let i = 0; i < 128; i++) [lookup[i], lookup[256 - i]] = [levels[i] * positive, -levels[i] * negative];
  let top = -Infinity, bottom = Infinity;
  for (let i = 0; i < codes.length; i++) {
    if (i >= width) codes[i] += codes[i - width];
    const value = values[i] = lookup[codes[i]];
    if (value > top) top = value;
    if (value < bottom) bottom = value;
  }
  return { values, width, height, top, bottom };
}

async function decodeMask(text) {
  if (!text) return null;
  const cover = Float32Array.from(await inflate(text), (byte) => byte / 255);
  return { cover, share: cover.reduce((sum, value) => sum + value, 0) / cover.length };
}

// ---- Numbers -------------------------------------------------------------------------------------------------

// Energy-based pointing game, paper `bcos`, Eq. 2 and 3: keep values of at least `threshold` times the maximum.
// Only the numerator of recall is thresholded. `cover` is the share of each cell that lies in the boxes.
export function energyPointingGame({ values, top }, { cover }, threshold) {
  let inside = 0, total = 0, held = 0;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    held += cover[i] * Math.abs(value);
    if (value <= 0 || value < threshold * top) continue;
    total += value;
    inside += cover[i] * value;
  }
  return { precision: total > 0 ? inside / total : NaN, recall: held > 0 ? inside / held : NaN };
}

// The magnitude that takes the strongest colour.
function limitOf(map, signed, scale) {
  if (scale !== "clip") return Math.max(map.top, signed ? -map.bottom : 0, 0);
  const sorted = map.values.map(signed ? Math.abs : (value) => value).filter((size) => size > 0).sort();
  return sorted.length ? sorted[Math.floor(0.99 * (sorted.length - 1))] : 0;
}

// The last result of a slow function, as long as its arguments stay the same: moving the cross-hair changes none.
function remember(slow) {
  let known, result;
  return (...given) => {
    if (!known || given.some((value, i) => value !== known[i])) [known, result] = [given, slow(...given)];
    return result;
  };
}

function say(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value), text = size && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : value.toPrecision(digits);
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

function paintLayer(canvas, map, limit, signed, strength, threshold) {
  Object.assign(canvas, { width: map.width, height: map.height });
  const up = table(signed ? "positive" : "perceptual", strength), down = table("negative", strength);
  const picture = new ImageData(map.width, map.height), least = threshold * Math.max(map.top, 0);
  // One number per pixel: four times fewer steps.
  const [pixels, ups, downs] = [picture.data, up, down].map((bytes) => new Uint32Array(bytes.buffer));
  for (let i = 0; i < pixels.length; i++) {
    const value = map.values[i], size = Math.abs(value);
    if (!value || size < least || (value < 0 && !signed)) continue;
    pixels[i] = (value < 0 ? downs : ups)[Math.min(255, Math.round((255 * size) / limit))];
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
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
  const at = (x, y) => (x < 0 || y < 0 || x >= columns || y >= rows ? 0 : region.cover[y * columns + x]) - 0.5;
  const lines = [];
  for (let y = -1; region && y < rows; y++) {
    for (let x = -1; x < columns; x++) {
      const value = [at(x, y), at(x + 1, y), at(x + 1, y + 1), at(x, y + 1)], ends = [];
      for (let i = 0; i < 4; i++) {
        const next = (i + 1) % 4, part = value[i] / (value[i] - value[next]);
        if (value[i] < 0 === value[next] < 0) continue;
        const [right, down] = [[part, 0], [1, part], [1 - part, 1], [0, 1 - part]][i]; // along the cell's four sides
        ends.push((x + right + 0.5) / columns, (y + down + 0.5) / rows);
      }
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
    // Of every question: the promise of its reply (oldest first), and how to keep that promise.
    Object.assign(this, { model, asked: new Map(), waiting: new Map() });
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
    Object.assign(this, { viewer, series });
    const layer = h("canvas");
    this.overlay = remember((...look) => paintLayer(layer, ...look));
    [this.limit, this.score] = [remember(limitOf), remember(energyPointingGame)];
    this.model = h("select", { onchange: () => this.choose("model") });
    this.method = h("select", { onchange: () => this.choose("method") });
    this.canvas = h("canvas", { tabIndex: 0, className: "cxr-canvas", role: "img" });
    this.message = h("p", { className: "cxr-message", role: "status" });
    this.bar = h("span", { className: "cxr-gradient" });
    [this.low, this.high, this.readout] = [h("span"), h("span"), h("span", { className: "cxr-readout" })];
    this.scores = h("p", { className: "cxr-scores", ariaLive: "polite" });
    this.modelField = field("Model", this.model);
    this.node = h("section", { className: "cxr-panel" },
      h("div", { className: "cxr-head" }, this.modelField, field("Method", this.method)),
      h("div", { className: "cxr-picture" }, this.canvas, this.message),
      h("p", { className: "cxr-legend" }, this.low, this.bar, this.high, this.readout), this.scores);
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
    this.viewer.load(undefined, this.viewer.state.label);
  }

  get signed() {
    const { colours } = this.viewer.state, own = this.viewer.bundle.series[this.series].signed;
    return colours === "auto" ? own ?? (this.map?.bottom < 0) : colours === "signed";
  }

  async load(turn) {
    const { viewer, series } = this, { image, label } = viewer.state;
    this.pending = true;
    const soon = setTimeout(() => viewer.turn === turn && this.show({ error: "Computing …" }), 150);
    // A reader who runs through a list with the arrow keys shouldn't queue a computation for each entry.
    if (!viewer.store.has(image, label, series)) await new Promise((resolve) => setTimeout(resolve, 120));
    const reply = viewer.turn === turn ? await viewer.store.map(image, label, series) : null;
    const map = reply?.record ? await decodeMap(reply.record, viewer.record.grid, viewer.bundle.levels) : null;
    clearTimeout(soon);
    if (viewer.turn === turn) this.show(reply, map);
  }

  show(reply, map = null) {
    Object.assign(this, { reply, map, pending: false });
    this.message.textContent = reply.error ?? "";
    this.viewer.paint();
  }

  // Until the new map is there the panel stays as it was: an old map must not appear under a new label.
  paint(limit) {
    const { state, record, bitmap, edges, cursor } = this.viewer;
    const box = this.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (!bitmap || !width || this.pending) return;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const pen = this.canvas.getContext("2d");
    Object.assign(pen, { imageSmoothingEnabled: true, imageSmoothingQuality: "high" });
    pen.drawImage(bitmap, 0, 0, width, height);
    if (this.map && limit > 0) {
      pen.imageSmoothingEnabled = state.smooth;
      pen.drawImage(this.overlay(this.map, limit, this.signed, state.strength, state.threshold), 0, 0, width, height);
    }
    if (state.truth) this.outline(pen, edges.truth, "#5df2c8", [], ratio);
    if (state.boxes) this.outline(pen, edges.boxes, "#ffffff", [], ratio);
    if (cursor) {
      const [x, y] = cursor;
      this.outline(pen, [[0, y, 1, y], [x, 0, x, 1]], "#ffffff", [1, 3], ratio);
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
    const { bundle, state, region } = this.viewer, label = bundle.labels[state.label];
    const { model, method } = bundle.series[this.series], { logit, probability } = this.reply;
    this.canvas.ariaLabel = this.map
      ? `Radiograph ${record.id} with the ${method} map of ${model} for ${label}, threshold ${state.threshold}`
      : `Radiograph ${record.id} without a map: ${this.message.textContent}`;
    const stats = [["Logit", say(logit)], ["Probability", say(probability)]];
    if (this.map && region) {
      const { precision, recall } = this.score(this.map, region, state.threshold);
      stats.push(["EPG precision", percent(precision), precision]);
      stats.push(["EPG recall", percent(recall)], ["Chance", percent(region.share)]);
    } else if (this.map) stats.push(["EPG", "no box for this label"]);
    if (this.line === JSON.stringify(stats)) return; // a live region that is rewritten is read out again
    this.line = JSON.stringify(stats);
    this.scores.replaceChildren(...stats.flatMap(([name, text, value]) => {
      const stat = h("span", { className: "cxr-stat" }, h("span", { textContent: name }), " ", h("b", { textContent: text }));
      if (value !== undefined) {
        const title = "The tick marks chance: the share of the image that the boxes cover";
        const meter = stat.appendChild(h("i", { className: "cxr-meter", title }));
        meter.style.cssText = `--value: ${value || 0}; --chance: ${region.share}`;
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
    this.image = h("select", { onchange: () => this.load(Number(this.image.value)) });
    this.label = h("select", { onchange: () => this.load(state.image, Number(this.label.value)) });
    this.fact = h("p", { className: "cxr-fact", ariaLive: "polite" });
    this.grid = h("div", { className: "cxr-panels" });
    this.root.replaceChildren(
      h("div", { className: "cxr-shared" }, field("Image", this.image), field("Label", this.label), this.fact),
      h("div", { className: "cxr-tools" },
        number("Overlay", "strength", (value) => `${Math.round(100 * value)} %`),
        number("Threshold", "threshold", (value) => `${value.toFixed(2)} × max`),
        choice("Colours", "colours", [["auto", "By method"], ["signed", "Signed"], ["positive", "Positive"]]),
        choice("Scale", "scale", [["map", "Each map"], ["clip", "Each map, top 1 % clipped"], ["shared", "Shared"]]),
        h("div", { className: "cxr-toggles" },
          toggle("Boxes", "boxes", "cxr-box"), toggle("True mask", "truth", "cxr-true"), toggle("Smooth", "smooth"))),
      this.grid, h("p", { className: "cxr-note" }));
  }

  // Take the lists from the bundle again: at the start, and when Python added an image.
  renew() {
    const { bundle, state } = this, start = bundle.start ?? {};
    fill(this.image, bundle.images.map(({ id }, i) => [i, id]), start.image ?? state.image);
    this.root.querySelector(".cxr-note").textContent = bundle.note;
    const series = start.panels?.length ? start.panels : bundle.series.slice(0, 2).map((_, i) => i);
    if (!this.panels.length) this.panels = series.map((each) => new Panel(this, each));
    this.grid.replaceChildren(...this.panels.map(({ node }) => node));
    this.resized.disconnect();
    this.panels.forEach(({ canvas }) => this.resized.observe(canvas));
    this.load(start.image, start.label ?? undefined);
  }

  async load(image = this.state.image, label = this.store.labelFor(image, this.state.label)) {
    const turn = ++this.turn, { bundle, state } = this;
    Object.assign(state, { image, label });
    this.changed({ image: state.image, label: state.label, series: this.panels.map(({ series }) => series) });
    const record = await this.store.image(state.image);
    if (turn !== this.turn) return;
    const told = (label) => ({ 1: "present", 0: "absent" })[record.targets?.[label]] ?? "unknown";
    fill(this.label, bundle.labels.map((name, i) => [i, told(i) === "present" ? `${name} (present)` : name]), state.label);
    if (record.error) return this.fail(record.error);
    const [bitmap, region, truth] = await Promise.all([
      createImageBitmap(new Blob([bytesOf(record.png)], { type: "image/png" })),
      decodeMask(record.masks[state.label]), decodeMask(record.truth[state.label])]);
    if (turn !== this.turn) return;
    const boxes = record.boxes[state.label]?.flatMap((box) => frame(box, record.size));
    const edges = { boxes: boxes ?? contour(region, record.grid), truth: contour(truth, record.grid) };
    Object.assign(this, { record, bitmap, region, edges });
    this.fact.textContent = `Truth: ${told(state.label)}${region ? `, boxes cover ${percent(region.share)} of the image` : ""}`;
    for (const { canvas } of this.panels) canvas.style.setProperty("--shape", record.size[1] / record.size[0]);
    await Promise.all(this.panels.map((panel) => panel.load(turn)));
  }

  fail(error) {
    this.record = null;
    this.fact.textContent = "";
    for (const panel of this.panels) {
      panel.show({ error });
      Object.assign(panel.canvas, { width: 0, ariaLabel: error }); // no width: nothing of the last image is left
      panel.scores.replaceChildren(panel.line = "");
    }
  }

  paint() {
    if (!this.record) return;
    const { scale } = this.state, limits = this.panels.map((panel) => panel.pending || !panel.map ? 0
      : panel.limit(panel.map, panel.signed, scale));
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
    new Viewer(root, new PageStore(JSON.parse(root.querySelector("script").textContent)));
  }
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
