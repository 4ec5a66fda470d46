// The comparison viewer: one front end for the book's pages (data inside the page, no kernel) and for JupyterLab
// (maps computed by Python when they are first asked for). No dependency; nothing is fetched. The files of this folder
// are joined in the order of their numbers into one module (cxrkit.view.viewer.front).
// Text from data only ever becomes text nodes or attribute values, so a label can't turn into markup.

// ---- Decoding what cxrkit.view.packing packed ----------------------------------------------------------------

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// Reading pixels back from a canvas would be simpler, but privacy modes add noise to them: a map must stay exact.
async function inflate(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// A map has at most 256 different values, one per code: what is asked of it is asked of the codes' counts.
// Codes are bytes of signed codes, which are in the order of their values; of equal maxima the first is the peak.
const decoded = new WeakMap(); // a map that was shown before is there at once
export async function decodeMap(record, grid, levels) {
  if (!decoded.has(record)) decoded.set(record, await decode(record, grid, levels));
  return decoded.get(record);
}

async function decode(record, [height, width], levels) {
  const codes = await inflate(record.z), lookup = new Float32Array(256), counts = new Uint32Array(256);
  const [negative, positive] = record.scale, signed = new Int8Array(codes.buffer);
  for (let i = 0; i < 128; i++) [lookup[i], lookup[(256 - i) & 255]] = [levels[i] * positive, -levels[i] * negative];
  lookup[0] = 0;
  let highest = -128, lowest = 127, peak = 0;
  for (let i = 0; i < codes.length; i++) {
    if (i >= width) codes[i] += codes[i - width];
    counts[codes[i]] += 1;
    if (signed[i] > highest) [highest, peak] = [signed[i], i];
    if (signed[i] < lowest) lowest = signed[i];
  }
  return { codes, lookup, counts, width, height, top: lookup[highest & 255], bottom: lookup[lowest & 255], peak };
}

// `texts`: the packed regions of one image, by label; like maps, what was shown before is there at once.
const regions = new WeakMap();
async function decodeMask(texts, label, grid) {
  if (!texts[label]) return null;
  if (!regions.has(texts)) regions.set(texts, new Map());
  const known = regions.get(texts);
  if (!known.has(label)) known.set(label, await unpackMask(texts[label], grid));
  return known.get(label);
}

async function unpackMask(text, [height, width]) {
  const cover = Float32Array.from(await inflate(text), (byte) => byte / 255);
  return { cover, width, height, share: cover.reduce((sum, value) => sum + value, 0) / cover.length };
}

const pictures = new WeakMap();
async function decodeImage(record) {
  if (!pictures.has(record)) {
    pictures.set(record, await createImageBitmap(new Blob([bytesOf(record.png)], { type: "image/png" })));
  }
  return pictures.get(record);
}

