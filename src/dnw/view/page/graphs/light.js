/* Edges are drawn as light: each adds some along its line, and where thousands meet, the picture stays readable. */

const LOOP = 6; /* the radius of an edge from a node to itself, in CSS pixels */

/* Light on a raster of so many pixels, of which there are so many, the scale, in a CSS pixel; lines are given in CSS pixels. */
class Light {
  constructor(width, height, scale) {
    Object.assign(this, { width, height, scale });
    this.layers = KINDS.map(() => new Float32Array(width * height));
  }

  clear() {
    for (const layer of this.layers) layer.fill(0);
  }

  /* The part of a line, from 0 to 1, that lies on the raster, or null. */
  visible(x, y, dx, dy) {
    let from = 0;
    let to = 1;
    for (const [p, q] of [[-dx, x], [dx, this.width - 2 - x], [-dy, y], [dy, this.height - 2 - y]]) {
      if (p === 0 && q < 0) return null;
      if (p < 0) from = Math.max(from, q / p);
      if (p > 0) to = Math.min(to, q / p);
    }
    return from <= to ? [from, to] : null;
  }

  /* Adds light along a line, divided between its two nearest pixels; in dashes where an edge has gone. */
  line(kind, x0, y0, x1, y1, amount) {
    const { width, scale } = this;
    const layer = this.layers[kind];
    const dx = (x1 - x0) * scale;
    const dy = (y1 - y0) * scale;
    const part = this.visible(x0 * scale, y0 * scale, dx, dy);
    if (!part) return;
    const [from, to] = part;
    const flat = Math.abs(dx) >= Math.abs(dy);
    const count = Math.ceil(Math.max(Math.abs(dx), Math.abs(dy)) * (to - from));
    const beside = flat ? width : 1;
    let x = x0 * scale + from * dx;
    let y = y0 * scale + from * dy;
    const right = dx * (to - from) / count;
    const down = dy * (to - from) / count;
    for (let i = 0; i <= count && count > 0; i++, x += right, y += down) {
      if (kind === WENT && i & 4) continue;
      const column = x | 0;
      const row = y | 0;
      const rest = flat ? y - row : x - column;
      layer[row * width + column] += amount * (1 - rest);
      layer[row * width + column + beside] += amount * rest;
    }
  }

  /* Adds light along a curve from one node of a ring to another, bent towards the ring's middle. */
  curve(kind, x0, y0, x1, y1, middle, amount) {
    const bend = header.bend;
    const mx = (x0 + x1) / 2 * (1 - bend) + middle[0] * bend;
    const my = (y0 + y1) / 2 * (1 - bend) + middle[1] * bend;
    let px = x0;
    let py = y0;
    for (let i = 1; i <= 10; i++) {
      const t = i / 10;
      const u = 1 - t;
      const x = u * u * x0 + 2 * u * t * mx + t * t * x1;
      const y = u * u * y0 + 2 * u * t * my + t * t * y1;
      this.line(kind, px, py, x, y, amount);
      px = x;
      py = y;
    }
  }

  /* Adds light along a small circle outside a ring, through one of its nodes. */
  loop(kind, x, y, middle, amount) {
    const away = Math.hypot(x - middle[0], y - middle[1]) || 1;
    const cx = x + (x - middle[0]) / away * LOOP;
    const cy = y + (y - middle[1]) / away * LOOP;
    const eighth = Math.PI / 4;
    for (let i = 0; i < 8; i++) {
      const x0 = cx + LOOP * Math.cos(i * eighth);
      const y0 = cy + LOOP * Math.sin(i * eighth);
      const x1 = cx + LOOP * Math.cos((i + 1) * eighth);
      const y1 = cy + LOOP * Math.sin((i + 1) * eighth);
      this.line(kind, x0, y0, x1, y1, amount);
    }
  }

  /* How much to expose, so that nine in ten of the lit pixels stay below three quarters of full colour. */
  exposure() {
    const [l0, l1, l2, l3] = this.layers;
    const every = Math.max(1, l0.length / 20000 | 0);
    const sums = [];
    for (let i = 0; i < l0.length; i += every) {
      const sum = l0[i] + l1[i] + l2[i] + l3[i];
      if (sum > 0) sums.push(sum);
    }
    if (!sums.length) return 1.6;
    sums.sort((a, b) => a - b);
    return Math.min(1.6, 1.4 / sums[Math.floor(sums.length * .9)]);
  }

  /* Paints the light on a canvas as large as the raster, in the inks of its kinds. */
  paint(context, exposure) {
    const { width, height } = this;
    const [l0, l1, l2, l3] = this.layers;
    const image = context.createImageData(width, height);
    const pixels = image.data;
    const ground = rgb(colour("panel"));
    const inks = KINDS.map(kind => rgb(colour(kind)));
    for (let i = 0, p = 0; i < width * height; i++, p += 4) {
      let plus = l0[i];
      let minus = l1[i];
      const came = l2[i];
      const went = l3[i];
      const both = plus + minus;
      const sum = both + came + went;
      pixels[p + 3] = 255;
      if (sum <= 0) { /* most pixels: nothing is to be computed */
        for (let j = 0; j < 3; j++) pixels[p + j] = ground[j];
        continue;
      }
      const cover = 1 - Math.exp(-exposure * sum);
      if (plus && minus) { /* the sign that prevails gets more than its due */
        plus = both * plus ** 3 / (plus ** 3 + minus ** 3);
        minus = both - plus;
      }
      for (let j = 0; j < 3; j++) {
        const lit = plus * inks[PLUS][j] + minus * inks[MINUS][j] + came * inks[CAME][j] + went * inks[WENT][j];
        pixels[p + j] = ground[j] * (1 - cover) + cover / sum * lit;
      }
    }
    context.putImageData(image, 0, 0);
  }
}
