// ---- Colours (RAMPS comes before these files, from cxrkit.view.packing) -----------------------------------------

// 256 colours; opacity grows with the value, so that the radiograph stays visible where a map says little.
const ramps = {};
function table(name) {
  if (ramps[name]) return ramps[name];
  const stops = RAMPS[name], colours = ramps[name] = new Uint8ClampedArray(1024);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    for (let c = 0; c < 3; c++) {
      colours[4 * i + c] = stops[low][c] + (place - low) * (stops[low + 1][c] - stops[low][c]);
    }
    colours[4 * i + 3] = 255 * Math.min(1, 1.15 * (i / 255) ** 0.6);
  }
  return colours;
}

const sheets = new WeakMap(); // of each canvas: the pixels that are written anew at each change

// `colours`: "signed", or the ramp of a map whose negative values are left out. One look-up per pixel.
function paintLayer(canvas, map, limit, colours, threshold) {
  const { width, height, codes } = map;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const signed = colours === "signed", pen = canvas.getContext("2d"), of = new Uint32Array(256);
  if (sheets.get(canvas)?.width !== width || sheets.get(canvas).height !== height) sheets.set(canvas, new ImageData(width, height));
  const picture = sheets.get(canvas);
  const [ups, downs] = [signed ? "positive" : colours, "negative"].map((name) => new Uint32Array(table(name).buffer));
  const least = threshold * Math.max(map.top, 0), pixels = new Uint32Array(picture.data.buffer);
  map.lookup.forEach((value, code) => {
    const size = Math.abs(value);
    if (!value || size < least || (value < 0 && !signed)) return;
    of[code] = (value < 0 ? downs : ups)[Math.min(255, Math.round((255 * size) / limit))];
  });
  for (let i = 0; i < pixels.length; i++) pixels[i] = of[codes[i]];
  pen.putImageData(picture, 0, 0);
  return canvas;
}

function legendGradient(name, strength) {
  const pick = (c, i) => `rgb(${c[4 * i]} ${c[4 * i + 1]} ${c[4 * i + 2]} / ${(strength * c[4 * i + 3]) / 255})`;
  const sample = (ramp, colours = table(ramp)) => Array.from({ length: 18 }, (_, i) => pick(colours, 15 * i));
  const colours = name === "signed" ? [...sample("negative").reverse(), ...sample("positive")] : sample(name);
  return `linear-gradient(to right, ${colours.join(", ")})`;
}

// ---- Outlines, as line segments in fractions of the image ----------------------------------------------------

const contourOf = perRegion(contour); // an image has one grid

// The edge of a region of any shape: where coverage crosses one half between neighbouring cell centres.
function contour(region, [rows, columns]) {
  const lines = [], value = [0, 0, 0, 0];
  const at = (x, y) => (x < 0 || y < 0 || x >= columns || y >= rows ? 0 : region.cover[y * columns + x]) - 0.5;
  for (let y = -1; region && y < rows; y++) {
    for (let x = -1; x < columns; x++) {
      [value[0], value[1], value[2], value[3]] = [at(x, y), at(x + 1, y), at(x + 1, y + 1), at(x, y + 1)];
      const below = value[0] < 0;
      if (below === value[1] < 0 && below === value[2] < 0 && below === value[3] < 0) continue;
      const ends = [];
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

