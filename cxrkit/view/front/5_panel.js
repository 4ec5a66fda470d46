// ---- One panel: model and method, picture, legend, scores ------------------------------------------------------

class Panel {
  constructor(viewer, series) {
    Object.assign(this, { viewer, series, pending: true, asked: null });
    const layer = h("canvas");
    this.overlay = remember((...look) => paintLayer(layer, ...look));
    this.shade = remember((...look) => { this.bar.style.backgroundImage = legendGradient(...look); });
    [this.limit, this.held] = [limitOf, covered].map(remember);
    this.model = h("select", { onchange: () => this.choose("model") });
    this.method = h("select", { onchange: () => this.choose("method") });
    this.canvas = h("canvas", { tabIndex: 0, className: "cxr-canvas", role: "img", ariaLabel: "A picture, being drawn" });
    this.message = h("p", { className: "cxr-message", role: "status" });
    this.stop = button("Stop", "Stop computing this map", () => viewer.store.cancel(...this.asked));
    this.again = button("Compute", "Compute this map again", () => this.retry());
    this.stop.hidden = this.again.hidden = true;
    this.bar = h("span", { className: "cxr-gradient" });
    [this.low, this.high, this.readout] = [h("span"), h("span"), h("span", { className: "cxr-readout" })];
    this.scores = h("p", { className: "cxr-scores", ariaLive: "polite" });
    this.modelField = field("Model", this.model);
    this.node = h("section", { className: "cxr-panel" },
      h("div", { className: "cxr-head" }, this.modelField, field("Method", this.method)),
      h("div", { className: "cxr-picture" }, this.canvas, h("div", { className: "cxr-status" }, this.message, this.stop, this.again)),
      h("p", { className: "cxr-legend" }, this.low, this.bar, this.high, this.readout), this.scores);
    new Gestures(this.canvas, viewer, this);
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

  // The ramp: the reader's, or by default two colours for maps whose sign means something.
  get colours() {
    const { colours } = this.viewer.state, own = this.viewer.bundle.series[this.series].signed;
    return colours !== "auto" ? colours : own ?? this.map?.bottom < 0 ? "signed" : "heat";
  }

  get name() {
    const { model, method } = this.viewer.bundle.series[this.series];
    return this.modelField.hidden ? method : `${model}: ${method}`;
  }

  async load(turn) {
    const { viewer, series } = this, { image, label } = viewer.state, place = [image, label, series];
    if (this.asked && String(this.asked) !== String(place)) viewer.forget(this.asked);
    Object.assign(this, { pending: true, asked: place });
    const hear = (share) => viewer.turn === turn && this.say(`Computing … ${Math.round(100 * share)} %`, true);
    // A picture for one label is not left clear, with its scores, beside the name of another.
    const soon = setTimeout(() => viewer.turn === turn && this.say("Computing …", true), 150);
    // A reader who runs through a list with the arrow keys shouldn't queue a computation for each entry.
    if (!viewer.store.has(...place)) await new Promise((resolve) => setTimeout(resolve, 120));
    const reply = viewer.turn === turn ? await viewer.store.map(...place, hear) : null;
    const map = reply?.record ? await decodeMap(reply.record, viewer.record.grid, viewer.bundle.levels) : null;
    clearTimeout(soon);
    if (viewer.turn === turn) this.show(reply, map);
  }

  say(text, computing = false) {
    if (this.message.textContent !== text) this.message.textContent = text; // a live region, read out when it is written
    this.stop.hidden = !computing;
    this.again.hidden = computing || !text || !this.viewer.store.computes;
    this.node.classList.toggle("cxr-pending", computing);
  }

  // After a stop or an error.
  retry() {
    if (!this.viewer.record) return this.viewer.load(undefined, this.viewer.state.label);
    this.load(this.viewer.turn);
  }

  show(reply, map = null) {
    Object.assign(this, { reply, map, pending: false });
    this.viewer.repaint(); // once, for all the panels whose maps came together
  }

  // Until the new map is there the panel stays as it was: an old map must not appear under a new label.
  paint(limit, box) {
    const { state, record, bitmap, edges, cursor, view } = this.viewer;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (!bitmap || !width || this.pending) return;
    this.say(this.reply.error ?? ""); // with the picture and the scores: never beside those of the map before
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const pen = this.canvas.getContext("2d"), side = 1 / view.zoom;
    const put = (picture) => pen.drawImage(picture, view.x * picture.width, view.y * picture.height,
      side * picture.width, side * picture.height, 0, 0, width, height);
    Object.assign(pen, { imageSmoothingEnabled: true, imageSmoothingQuality: "high" });
    put(bitmap);
    if (this.map && limit > 0) {
      Object.assign(pen, { imageSmoothingEnabled: state.smooth, globalAlpha: state.strength });
      put(this.overlay(this.map, limit, this.colours, state.threshold));
      pen.globalAlpha = 1;
    }
    if (state.truth) this.outline(pen, edges.truth(), "#5df2c8", [], ratio);
    if (state.boxes) this.outline(pen, edges.boxes(), "#ffffff", [], ratio);
    if (cursor) {
      const [x, y] = cursor;
      this.outline(pen, [[0, y, 1, y], [x, 0, x, 1]], "#ffffff", [1, 3], ratio);
    }
    this.full = limit;
    this.shade(this.colours, state.strength);
    this.bar.hidden = this.low.hidden = this.high.hidden = !this.map || !limit;
    [this.low.textContent, this.high.textContent] = [this.colours === "signed" ? say(-limit, 2) : "0", say(limit, 2)];
    this.readout.textContent = this.read(cursor);
    this.describe(record);
  }

  // A dark halo under a bright line is visible on bone and on lung.
  outline(pen, lines, colour, dash, ratio) {
    const { width, height } = this.canvas, { x, y, zoom } = this.viewer.view, path = new Path2D();
    for (const [a, b, c, d] of lines) {
      path.moveTo((a - x) * zoom * width, (b - y) * zoom * height);
      path.lineTo((c - x) * zoom * width, (d - y) * zoom * height);
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
    const { codes, lookup, width, height } = this.map, [column, row] = cell(height, width);
    return `${place}: ${say(lookup[codes[row * width + column]])}`;
  }

  // What this panel says in numbers: name, text, the value as a plain number or word, and for scores with a tick chance.
  get stats() {
    const { state, region, bundle } = this.viewer, { logit, probability } = this.reply;
    const stats = logit === undefined ? [] : [["Logit", say(logit), logit], ["Probability", say(probability), probability]];
    if (this.map && !region) stats.push(["EPG", "no box for this label", ""]);
    if (!this.map || !region) return stats;
    const { precision, recall, iou, blind } = scoresOf(this.map, this.held(this.map, region), state.threshold);
    const { hit, chance } = pointingGame(this.map, region, bundle.tolerance);
    const share = (name, value, tick) => stats.push([name, percent(value), value, tick]);
    share("EPG precision", precision, region.share);
    share("EPG recall", recall);
    share("Chance (EPG)", region.share);
    share("IoU", iou, blind);
    share("Chance (IoU)", blind);
    const pointed = hit === null ? "–" : hit ? "hit" : "miss";
    stats.push(["Pointing", pointed, pointed]);
    share("Chance (pointing)", chance);
    return stats;
  }

  // The same as lines of text, with what the colours mean: for a picture that leaves the page.
  get lines() {
    const colours = COLOURS.find(([name]) => name === this.colours)[1], said = this.message.textContent;
    const range = this.bar.hidden ? [] : [`${colours}: ${this.low.textContent} … ${this.high.textContent}`];
    return [...range, ...this.stats.map(([name, text]) => `${name} ${text}`), ...(said ? [said] : [])];
  }

  describe(record) {
    const { bundle, state } = this.viewer, label = bundle.labels[state.label];
    const { model, method } = bundle.series[this.series];
    this.canvas.ariaLabel = this.map
      ? `Radiograph ${record.id} with the ${method} map of ${model} for ${label}, threshold ${state.threshold}`
      : `Radiograph ${record.id} without a map: ${this.message.textContent}`;
    const { stats } = this;
    if (this.line === JSON.stringify(stats)) return; // a live region that is rewritten is read out again
    this.line = JSON.stringify(stats);
    this.scores.replaceChildren(...stats.flatMap(([name, text, value, chance]) => {
      const stat = h("span", { className: "cxr-stat" }, h("span", { textContent: name }), " ", h("b", { textContent: text }));
      if (chance !== undefined) {
        const title = `The tick marks chance, ${percent(chance)}: what a map that knows nothing would reach`;
        const meter = stat.appendChild(h("i", { className: "cxr-meter", title }));
        meter.style.cssText = `--value: ${value || 0}; --chance: ${chance || 0}`;
      }
      return [stat, " "];
    }));
  }
}

// ---- Mouse, touch and keyboard on a picture: cross-hair, zoom and pan ---------------------------------------------

class Gestures {
  constructor(canvas, viewer, panel) {
    Object.assign(this, { canvas, viewer, panel, fingers: new Map() });
    canvas.onpointermove = (event) => this.move(event);
    canvas.onpointerdown = (event) => this.down(event);
    canvas.onpointerup = canvas.onpointercancel = ({ pointerId }) => this.fingers.delete(pointerId);
    canvas.onpointerleave = ({ pointerId, pointerType }) => {
      this.fingers.delete(pointerId);
      if (pointerType === "mouse") viewer.point(null); // a finger hides what it points at until it is lifted
    };
    canvas.ondblclick = (event) => viewer.zoomBy(viewer.view.zoom > 1 ? 0 : 3, ...this.place(event));
    canvas.onkeydown = (event) => viewer.key(event, panel.map);
    // Over a page the wheel scrolls; it zooms with Ctrl, as everywhere, and on a picture that was chosen.
    canvas.addEventListener("wheel", (event) => {
      const meant = event.ctrlKey || event.metaKey, { zoom } = viewer.view;
      const ended = event.deltaY > 0 ? zoom <= 1 : zoom >= MOST_ZOOM; // then the page goes on
      if (!meant && (document.activeElement !== canvas || ended)) return;
      event.preventDefault();
      viewer.zoomBy(Math.exp(-0.002 * event.deltaY), ...this.place(event));
    }, { passive: false });
  }

  // Of an event, in fractions of the canvas.
  place({ offsetX, offsetY }) { return [offsetX / this.canvas.clientWidth, offsetY / this.canvas.clientHeight]; }

  down(event) {
    this.fingers.set(event.pointerId, this.place(event));
    if (this.viewer.view.zoom > 1 || this.fingers.size > 1) this.canvas.setPointerCapture(event.pointerId);
    this.viewer.pointIn(...this.place(event));
  }

  move(event) {
    const { fingers, viewer } = this, now = this.place(event), before = fingers.get(event.pointerId);
    if (!before) return viewer.pointIn(...now);
    const others = [...fingers].flatMap(([id, place]) => (id === event.pointerId ? [] : [place]));
    fingers.set(event.pointerId, now);
    if (others.length) {
      const [[x, y]] = others, reach = ([a, b]) => Math.hypot(a - x, b - y);
      viewer.zoomBy(reach(now) / Math.max(reach(before), 0.01), (x + now[0]) / 2, (y + now[1]) / 2);
    } else if (viewer.view.zoom > 1) viewer.pan(before[0] - now[0], before[1] - now[1]);
    else viewer.pointIn(...now);
  }
}
