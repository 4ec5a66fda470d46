// ---- Small pieces of page ------------------------------------------------------------------------------------

function h(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const field = (name, control) => h("label", { className: "cxr-field" }, h("span", { textContent: name }), control);
const button = (text, name, onclick) => h("button", { type: "button", className: "cxr-button", textContent: text, title: name, ariaLabel: name, onclick });

function fill(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text]) => h("option", { value, textContent: text })));
  select.value = String(chosen);
}

// Text as lines no wider than that; a word that is too long is broken.
function wrapped(pen, text, width) {
  const lines = [""], fits = (line) => pen.measureText(line.trimEnd()).width <= width;
  for (const word of text.split(/(?<=\s)/)) {
    if (!fits(lines.at(-1) + word) && lines.at(-1)) lines.push("");
    for (const letters of fits(word) ? [word] : word) {
      if (!fits(lines.at(-1) + letters)) lines.push("");
      lines[lines.length - 1] += letters;
    }
  }
  return lines.map((line) => line.trimEnd());
}

// A file of the reader's own: made here, sent nowhere.
const download = (href, name) => h("a", { href, download: name.replace(/[^\w.-]+/g, "-") }).click();

// ---- Where images and maps come from -------------------------------------------------------------------------

class PageStore {
  constructor(bundle) { this.bundle = bundle; }
  get computes() { return false; }
  has() { return true; }
  cancel() {}
  // Is there anything of this label?
  stored(image, label) { return this.bundle.series.some(({ maps }) => maps[`${image}/${label}`]); }
  // Not every label of every image is stored: a change of image stays with the label unless another fills more of the
  // shown panels.
  labelFor(image, label, shown) {
    const { series, labels } = this.bundle;
    const filled = labels.map((_, i) => shown.filter((each) => series[each].maps[`${image}/${i}`]).length);
    const most = Math.max(...filled);
    return filled[label] === most ? label : filled.indexOf(most);
  }
  async image(image) { return this.bundle.images[image]; }
  async map(image, label, series) {
    const { maps, logits, probabilities } = this.bundle.series[series];
    const record = maps[`${image}/${label}`];
    const found = { record, logit: logits[image][label], probability: probabilities[image][label] };
    return record ? found : { ...found, error: "This map is not stored in this page; compute it in JupyterLab." };
  }
}

const mapQuestion = (image, label, series) => ({ type: "map", image, label, series });

class KernelStore {
  constructor(model) {
    // `asked`: of every question its key, the promise of its reply, how to keep that, and who hears how far it is.
    // `waiting`: those without a reply, by key. Each asking has a key of its own, in this view and in any other:
    // what comes late of one that was stopped is nobody's.
    Object.assign(this, { model, asked: new Map(), waiting: new Map(), count: 0, own: Math.random().toString(36).slice(2) });
    this.listen = (reply) => this.receive(reply);
    model.on("msg:custom", this.listen);
  }
  get bundle() { return this.model.get("bundle"); }
  get computes() { return true; }
  stored() { return true; }
  labelFor(image, label) { return label; }
  close() { this.model.off("msg:custom", this.listen); }
  has(...place) { return this.asked.has(JSON.stringify(mapQuestion(...place))); }
  image(image) { return this.ask({ type: "image", image }); }
  map(image, label, series, hear) { return this.ask(mapQuestion(image, label, series), hear); }
  ask(question, hear) {
    const entry = this.asked.get(JSON.stringify(question)) ?? this.send(question);
    if (hear) entry.hear = hear;
    return entry.reply;
  }
  send(question) {
    const text = JSON.stringify(question), entry = { text, key: `${this.own} ${this.count += 1} ${text}` };
    entry.reply = new Promise((resolve) => { entry.resolve = resolve; });
    this.asked.set(text, entry);
    this.waiting.set(entry.key, entry);
    if (this.asked.size > 400) this.asked.delete(this.asked.keys().next().value);
    this.model.send({ ...question, key: entry.key });
    return entry;
  }
  // What nobody waits for any more needn't be computed to its end; who comes back to it asks anew.
  cancel(...place) {
    const entry = this.asked.get(JSON.stringify(mapQuestion(...place)));
    if (!this.waiting.has(entry?.key)) return;
    this.model.send({ type: "cancel", key: entry.key });
    this.receive({ key: entry.key, type: "map", error: "Stopped." });
  }
  receive(reply) {
    const entry = this.waiting.get(reply.key);
    if (reply.type === "progress") return entry?.hear?.(reply.share);
    if (!entry) return;
    this.waiting.delete(reply.key);
    if (reply.error && this.asked.get(entry.text) === entry) this.asked.delete(entry.text);
    entry.resolve(reply.type === "image" && !reply.error ? reply.record : reply);
  }
}
