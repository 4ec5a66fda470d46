// ---- Numbers -------------------------------------------------------------------------------------------------

// The last result of a slow function, as long as its arguments stay the same: moving the cross-hair changes none.
function remember(slow) {
  let known, result;
  return (...given) => {
    if (!known || given.some((value, i) => value !== known[i])) [known, result] = [given, slow(...given)];
    return result;
  };
}

// What is found out about a region once (with always the same other arguments).
function perRegion(slow) {
  const known = new WeakMap();
  return (region, ...given) => {
    if (!region) return slow(region, ...given);
    if (!known.has(region)) known.set(region, slow(region, ...given));
    return known.get(region);
  };
}

// How much of the boxes each code covers, in cells: with the counts all that scores need to know of map and region.
function covered({ codes }, { cover }) {
  const held = new Float64Array(256);
  for (let i = 0; i < codes.length; i++) held[codes[i]] += cover[i];
  return held;
}

// Energy-based pointing game, paper `bcos`, Eq. 2 and 3: keep values of at least `threshold` times the maximum; only
// the numerator of recall is thresholded. And the overlap of the kept region with the boxes, paper `relevance`, with what
// a region as large, placed without knowledge, would reach: with a and p the shares of boxes and region,
// a p / (a + p - a p). `held` is what `covered` gives.
export function scoresOf({ lookup, counts, codes, top }, held, threshold) {
  let inside = 0, total = 0, size = 0, kept = 0, both = 0, area = 0;
  for (let code = 0; code < 256; code++) {
    const value = lookup[code];
    size += held[code] * Math.abs(value);
    area += held[code];
    if (value <= 0 || value < threshold * top) continue;
    total += counts[code] * value;
    inside += held[code] * value;
    kept += counts[code];
    both += held[code];
  }
  const share = area / codes.length, part = kept / codes.length, joint = area + kept - both;
  return {
    precision: total > 0 ? inside / total : NaN, recall: size > 0 ? inside / size : NaN,
    iou: joint > 0 ? both / joint : NaN, blind: (share * part) / (share + part - share * part),
  };
}

// Cells strictly nearer to the region than `reach` cells: where a maximum counts as a hit (paper `normgrad`). A disc is
// a stack of rows; each run of the region, widened, adds one step up and one down to every row that the disc reaches.
function grown({ cover, width, height }, reach) {
  const steps = new Int32Array((width + 1) * height), near = new Uint8Array(cover.length);
  const wide = Array.from({ length: Math.ceil(reach) }, (_, away) => Math.ceil(Math.sqrt(reach ** 2 - away ** 2)) - 1);
  for (let y = 0; y < height; y++) {
    for (let x = 0, start = -1; x <= width; x++) {
      const inside = x < width && cover[y * width + x] >= 0.5;
      if (inside && start < 0) start = x;
      if (inside || start < 0) continue;
      for (let b = Math.max(0, y - wide.length + 1); b <= Math.min(height - 1, y + wide.length - 1); b++) {
        const more = wide[Math.abs(b - y)];
        steps[b * (width + 1) + Math.max(0, start - more)] += 1;
        steps[b * (width + 1) + Math.min(width, x + more)] -= 1;
      }
      start = -1;
    }
  }
  for (let y = 0; y < height; y++) {
    for (let x = 0, level = 0; x < width; x++) {
      level += steps[y * (width + 1) + x];
      near[y * width + x] = level > 0 ? 1 : 0;
    }
  }
  return near;
}

// Pointing game: is the maximum of the map near the boxes? `tolerance` is a share of the longer side.
const acceptance = perRegion((region, tolerance) => {
  const near = grown(region, tolerance * Math.max(region.width, region.height));
  return { near, chance: near.reduce((sum, value) => sum + value, 0) / near.length };
});
export function pointingGame({ top, bottom, peak }, region, tolerance) {
  const { near, chance } = acceptance(region, tolerance);
  return { hit: top > bottom ? Boolean(near[peak]) : null, chance };
}

// The magnitude that takes the strongest colour.
function limitOf({ lookup, counts, top, bottom }, signed, scale) {
  if (scale !== "clip") return Math.max(top, signed ? -bottom : 0, 0);
  const sizes = [...lookup].flatMap((value, code) => {
    const size = signed ? Math.abs(value) : value;
    return size > 0 && counts[code] ? [[size, counts[code]]] : [];
  }).sort(([a], [b]) => a - b);
  let place = Math.floor(0.99 * (sizes.reduce((sum, [, count]) => sum + count, 0) - 1));
  return sizes.find(([, count]) => (place -= count) < 0)?.[0] ?? 0;
}

function say(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value), text = size && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : value.toPrecision(digits);
  return text.replace("-", "−");
}

const percent = (value) => (Number.isNaN(value) ? "–" : `${(100 * value).toFixed(1)} %`);

