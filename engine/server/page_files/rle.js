// Masks as COCO's compressed run lengths: runs go down the columns, from the top left, zeros first.

/** A binary mask. `ends[i]` is where run i ends, counted in pixels down the columns; odd runs are the mask. */
export class Mask {
  /** Reads `{size: [height, width], counts: text or list}`; throws on runs that do not fill the size. */
  constructor({ size: [height, width], counts }) {
    this.height = height;
    this.width = width;
    this.ends = sums(typeof counts === "string" ? runs(counts) : counts);
    if ((this.ends.at(-1) ?? 0) !== height * width) throw new RangeError("The mask's runs do not fill its size.");
  }

  /** Pixels of the mask. */
  get area() {
    let area = 0;
    for (let i = 1; i < this.ends.length; i += 2) area += this.ends[i] - this.ends[i - 1];
    return area;
  }

  contains(x, y) {
    return (this.run(x * this.height + y) & 1) === 1;
  }

  /** Index of the run that holds this pixel. */
  run(pixel) {
    let low = 0;
    let high = this.ends.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] > pixel) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /**
   * The mask at `width` x `height`, row by row, 1 inside: each pixel shows the mask's pixel at its centre. What a
   * large mask costs depends on the size asked for and on the number of runs, not on its own size.
   */
  sample(width = this.width, height = this.height) {
    const out = new Uint8Array(width * height);
    const stretch = height / this.height;
    for (let x = 0; x < width; x += 1) {
      const start = Math.min(this.width - 1, Math.floor(((x + 0.5) * this.width) / width)) * this.height;
      const end = start + this.height;
      for (let i = this.run(start); i < this.ends.length; i += 1) {
        const from = i ? Math.max(start, this.ends[i - 1]) : start;
        if (from >= end) break;
        if (!(i & 1)) continue;
        // Rows whose centre lies in the run: ceil(a * stretch - 0.5) and on.
        const top = Math.max(0, Math.ceil((from - start) * stretch - 0.5));
        const bottom = Math.min(height, Math.ceil((Math.min(end, this.ends[i]) - start) * stretch - 0.5));
        for (let y = top, at = top * width + x; y < bottom; y += 1, at += width) out[at] = 1;
      }
    }
    return out;
  }
}

/** Run lengths of the compressed text: 5 bits a character, and from the fourth run on the step from the last but one. */
export function runs(text) {
  const counts = [];
  let at = 0;
  while (at < text.length) {
    let value = 0;
    let bits = 0;
    let code;
    do {
      code = text.charCodeAt(at) - 48;
      if (!(code >= 0 && code < 64) || bits > 30) throw new RangeError("The mask's runs are damaged.");
      value |= (code & 31) << bits;
      bits += 5;
      at += 1;
    } while (code & 32);
    if (code & 16 && bits < 32) value |= -1 << bits;
    if (counts.length > 2) value += counts[counts.length - 2];
    if (value < 0) throw new RangeError("The mask's runs are damaged.");
    counts.push(value);
  }
  return counts;
}

function sums(counts) {
  const ends = new Float64Array(counts.length); // whole numbers beyond 2^32 stay exact
  let end = 0;
  for (let i = 0; i < counts.length; i += 1) ends[i] = end += counts[i];
  return ends;
}

/**
 * Paints masks into `target` (ImageData): filled with their colour, with a rim of `rim` pixels that a dark line keeps
 * apart from what lies below. `layers`: {mask, colour, fill} in order.
 */
export function paint(target, layers, rim) {
  const { width, height } = target;
  const pixels = new Uint32Array(target.data.buffer);
  pixels.fill(0);
  for (const { mask, colour, fill = 0.42 } of layers) {
    const inside = mask.sample(width, height);
    const body = packed(colour, fill);
    const edge = packed(colour, 1);
    const dark = packed([0, 0, 0], 0.55);
    for (let y = 0, at = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1, at += 1) {
        if (!inside[at]) continue;
        // The picture's border is no edge of the mask's colour alone: the mask ends there all the same.
        const rimmed =
          x < rim || y < rim || x >= width - rim || y >= height - rim ||
          !inside[at - rim] || !inside[at + rim] || !inside[at - rim * width] || !inside[at + rim * width];
        pixels[at] = rimmed ? edge : body;
        if (rimmed) {
          if (x > 0 && !inside[at - 1]) pixels[at - 1] = dark;
          if (x < width - 1 && !inside[at + 1]) pixels[at + 1] = dark;
          if (y > 0 && !inside[at - width]) pixels[at - width] = dark;
          if (y < height - 1 && !inside[at + width]) pixels[at + width] = dark;
        }
      }
    }
  }
  return target;
}

/** A colour as `ImageData` has it on little-endian machines (all that browsers run on). */
function packed([r, g, b], alpha) {
  return ((Math.round(alpha * 255) << 24) | (b << 16) | (g << 8) | r) >>> 0;
}
