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

// Overlap of the kept region with the boxes, paper `relevance`, and what a region as large, placed without knowledge,
// would reach: with a and p the shares of boxes and region, a p / (a + p - a p).
export function intersectionOverUnion({ values, top }, { cover, share }, threshold) {
  let kept = 0, both = 0, held = 0;
  for (let i = 0; i < values.length; i++) {
    held += cover[i];
    if (values[i] <= 0 || values[i] < threshold * top) continue;
    kept += 1;
    both += cover[i];
  }
  const part = kept / values.length, joint = held + kept - both;
  return { iou: joint > 0 ? both / joint : NaN, chance: (share * part) / (share + part - share * part) };
}

// Cells strictly nearer to the region than `reach` cells: where a maximum counts as a hit (paper `normgrad`).
function grown({ cover, width, height }, reach) {
  const near = new Uint8Array(cover.length), inside = (x, y) => cover[y * width + x] >= 0.5, span = Math.ceil(reach);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!inside(x, y)) continue;
      near[y * width + x] = 1;
      // Only from the region's edge can a disc reach beyond it.
      const inner = x && y && x < width - 1 && y < height - 1 && inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1);
      if (inner) continue;
      for (let b = Math.max(0, y - span); b <= Math.min(height - 1, y + span); b++) {
        for (let a = Math.max(0, x - span); a <= Math.min(width - 1, x + span); a++) {
          if ((a - x) ** 2 + (b - y) ** 2 < reach ** 2) near[b * width + a] = 1;
        }
      }
    }
  }
  return near;
}

// Pointing game: is the maximum of the map near the boxes? `tolerance` is a share of the longer side.
const acceptance = remember((region, tolerance) => {
  const near = grown(region, tolerance * Math.max(region.width, region.height));
  return { near, chance: near.reduce((sum, value) => sum + value, 0) / near.length };
});
export function pointingGame({ top, bottom, peak }, region, tolerance) {
  const { near, chance } = acceptance(region, tolerance);
  return { hit: top > bottom ? Boolean(near[peak]) : null, chance };
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

