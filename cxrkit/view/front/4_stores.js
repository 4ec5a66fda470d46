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

// A file of the reader's own: made here, sent nowhere.
const download = (href, name) => h("a", { href, download: name.replace(/[^\w.-]+/g, "-") }).click();

// ---- Where images and maps come from -------------------------------------------------------------------------

class PageStore {
  constructor(bundle) { this.bundle = bundle; }
  has() { return true; }
  cancel() {}
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

const mapQuestion = (image, label, series) => ({ type: "map", image, label, series });

class KernelStore {
  constructor(model) {
    // Of every question: the promise of its reply (oldest first), how to keep that promise, and who hears how far it is.
    Object.assign(this, { model, asked: new Map(), waiting: new Map(), hearing: new Map() });
    this.listen = (reply) => this.receive(reply);
    model.on("msg:custom", this.listen);
  }
  get bundle() { return this.model.get("bundle"); }
  labelFor(image, label) { return label; }
  close() { this.model.off("msg:custom", this.listen); }
  has(...place) { return this.asked.has(JSON.stringify(mapQuestion(...place))); }
  image(image) { return this.ask({ type: "image", image }); }
  map(image, label, series, hear) { return this.ask(mapQuestion(image, label, series), hear); }
  ask(question, hear) {
    const key = JSON.stringify(question);
    if (hear) this.hearing.set(key, hear);
    if (!this.asked.has(key)) {
      this.asked.set(key, new Promise((resolve) => this.waiting.set(key, resolve)));
      if (this.asked.size > 400) this.asked.delete(this.asked.keys().next().value);
      this.model.send({ ...question, key });
    }
    return this.asked.get(key);
  }
  // What nobody waits for any more needn't be computed to its end.
  cancel(...place) {
    const key = JSON.stringify(mapQuestion(...place));
    if (this.waiting.has(key)) this.model.send({ type: "cancel", key });
  }
  receive(reply) {
    if (reply.type === "progress") return this.hearing.get(reply.key)?.(reply.share);
    const resolve = this.waiting.get(reply.key);
    if (!resolve) return;
    this.waiting.delete(reply.key);
    this.hearing.delete(reply.key);
    if (reply.error) this.asked.delete(reply.key); // asked again when the reader comes back to it
    resolve(reply.type === "image" && !reply.error ? reply.record : reply);
  }
}
