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

export async function decodeMap(record, [height, width], levels) {
  const codes = await inflate(record.z), values = new Float32Array(codes.length), lookup = new Float32Array(256);
  const [negative, positive] = record.scale;
  for (let i = 0; i < 128; i++) [lookup[i], lookup[256 - i]] = [levels[i] * positive, -levels[i] * negative];
  let top = -Infinity, bottom = Infinity, peak = 0;
  for (let i = 0; i < codes.length; i++) {
    if (i >= width) codes[i] += codes[i - width];
    const value = values[i] = lookup[codes[i]];
    if (value > top) [top, peak] = [value, i]; // of equal maxima the first counts, as in cxrkit.metrics
    if (value < bottom) bottom = value;
  }
  return { values, width, height, top, bottom, peak };
}

async function decodeMask(text, [height, width]) {
  if (!text) return null;
  const cover = Float32Array.from(await inflate(text), (byte) => byte / 255);
  return { cover, width, height, share: cover.reduce((sum, value) => sum + value, 0) / cover.length };
}

