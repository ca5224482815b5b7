/* The matrix of one layer at one moment: targets down, sources across, and how many edges each of them has. */

const DEGREES = 46; /* beside the matrix, and below it, in CSS pixels */
const AROUND = { left: 14, top: 30 };

class Matrix extends Pane {
  constructor(run) {
    super(run, "matrix");
    $("matrices").append(this.figure(runs.length > 1 ? nameApart(run) : ""));
  }

  /* The layer that is looked at, in this run, or null where it has none of this name. */
  get layer() {
    return this.run.layers[this.run.numberOf.get(runs[0].layers[chosenLayer()].name)] ?? null;
  }

  mostZoom() {
    return this.layer ? Math.max(8, Math.max(this.layer.targets, this.layer.sources) / 12) : 1;
  }

  click(x, y) {
    this.zoomBy(4, x, y);
  }

  choose(by) {
    chooseNext(by);
  }

  /* Where the whole matrix lies, in CSS pixels: cells are squares, unless one side is much longer than the other. */
  area() {
    const { targets, sources } = this.layer;
    const [across, down] = [this.width - AROUND.left - DEGREES - 12, this.height - AROUND.top - DEGREES - 16];
    let [wide, tall] = [across / sources, down / targets];
    wide = Math.min(wide, 4 * tall);
    tall = Math.min(tall, 4 * wide);
    const [left, top] = [AROUND.left + Math.max(0, (across - wide * sources) / 2), AROUND.top];
    return { x: left * this.zoom + this.left, y: top * this.zoom + this.top, wide: wide * this.zoom, tall: tall * this.zoom };
  }

  /* The target and the source under a point, or null. */
  entryAt(x, y) {
    const area = this.area();
    const [target, source] = [Math.floor((y - area.y) / area.tall), Math.floor((x - area.x) / area.wide)];
    const inside = target >= 0 && source >= 0 && target < this.layer.targets && source < this.layer.sources;
    return inside ? { target, source } : null;
  }

  textAt(x, y) {
    const entry = this.layer && this.entryAt(x, y);
    if (!entry) return "";
    const s = moment(this.run);
    const { layer } = this;
    const matrix = layer.matrix(s, $("signs").checked);
    const { side, shape: [, width], values } = matrix;
    const value = values[Math.floor(entry.target / side) * width + Math.floor(entry.source / side)];
    const names = ["source", "target"].map(key => {
      const first = entry[key] - entry[key] % side;
      const last = Math.min(layer.sizeOf(key), first + side);
      return side > 1 ? key + "s " + (first + 1) + "-" + last : layer.nodeName(key, entry[key]);
    });
    const [into, out] = [layer.degrees("into", s)[entry.target], layer.degrees("out", s)[entry.source]];
    const degrees = side > 1 ? "" : "; the target has " + number(into) + " in, the source " + number(out) + " out";
    return "from " + names[0] + " to " + names[1] + ": " + this.valueText(matrix, value) + degrees;
  }

  /* What the number of a cell says. */
  valueText({ side, signed, largest }, value) {
    if (!value) return "no edge";
    const many = side > 1 || this.layer.kernel > 1;
    const size = (value / 127) ** 2 * largest;
    if (signed && many) return "magnitudes of weights sum up to " + size.toPrecision(2);
    if (signed) return "weight about " + (Math.sign(value) * size).toPrecision(2);
    return many ? "at most " + percentText(value / 255) + " of entries are edges" : "an edge";
  }

  draw() {
    this.fit(2.4e6);
    const { context, layer } = this;
    context.fillStyle = colour("panel");
    context.fillRect(0, 0, this.width, this.height);
    if (!layer) {
      this.numbers.textContent = "no layer of this name";
      return;
    }
    const s = moment(this.run);
    const matrix = layer.matrix(s, $("signs").checked);
    const area = this.area();
    const { side, shape: [height, width] } = matrix;
    const picture = this.picture(matrix, s);
    context.save();
    context.beginPath();
    context.rect(0, AROUND.top, this.width - DEGREES - 8, this.height - AROUND.top - DEGREES - 12);
    context.clip();
    context.imageSmoothingEnabled = area.wide * side < 1.5 || area.tall * side < 1.5;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, area.x, area.y, width * side * area.wide, height * side * area.tall);
    context.strokeStyle = colour("line");
    context.strokeRect(area.x - .5, area.y - .5, layer.sources * area.wide + 1, layer.targets * area.tall + 1);
    this.drawHeads(area);
    context.restore();
    this.drawDegrees(area, s);
    this.writeCaption(matrix, s);
    this.tell();
  }

  /* The cells as pixels; made once for a moment. */
  picture(matrix, s) {
    const colours = ["panel", "plus", "minus", "ink"].map(colour);
    const key = [this.layer.name, s, matrix.signed, ...colours].join();
    if (this.made?.key === key) return this.made.canvas;
    const { shape: [height, width], values, signed } = matrix;
    const canvas = element("canvas");
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const table = this.table(signed, s, colours.map(rgb));
    for (let i = 0; i < values.length; i++) pixels[i] = table[values[i] & 255];
    context.putImageData(image, 0, 0);
    this.made = { key, canvas };
    return canvas;
  }

  /* The colour of every value, as the bytes of a pixel. Shares are scaled to the density of the layer. */
  table(signed, s, [ground, warm, cold, ink]) {
    const full = signed ? 1 : Math.min(1, 3 * this.layer.density(s) + .02);
    return Uint32Array.from({ length: 256 }, (_, byte) => {
      const value = signed ? (byte << 24 >> 24) / 127 : byte / 255;
      const size = Math.abs(value);
      const cover = size ? signed ? .3 + .7 * size : Math.min(1, .15 + .85 * size / full) : 0;
      const to = signed ? value < 0 ? cold : warm : ink;
      const [r, g, b] = ground.map((k, j) => Math.round(k + (to[j] - k) * cover));
      return (255 << 24 | b << 16 | g << 8 | r) >>> 0;
    });
  }

  /* Lines between the heads of attention. */
  drawHeads(area) {
    const { context, layer } = this;
    const wide = layer.sources * area.wide;
    const tall = layer.targets * area.tall;
    context.strokeStyle = colour("faint");
    context.globalAlpha = .7;
    for (let i = 1; i < layer.heads; i++) {
      const y = area.y + tall * i / layer.heads;
      stroke(context, [[area.x, y], [area.x + wide, y]]);
    }
    for (let i = 1; i < layer.headsRead; i++) {
      const x = area.x + wide * i / layer.headsRead;
      stroke(context, [[x, area.y], [x, area.y + tall]]);
    }
    context.globalAlpha = 1;
  }

  /* Edges of each target at the right, of each source below, those without one as a line in another colour. */
  drawDegrees(area, s) {
    const { context, layer } = this;
    const [right, below] = [this.width - DEGREES, this.height - DEGREES];
    const [grey, warning] = [colour("second"), colour("went")];
    const draw = (degrees, start, each, low, high, bar) => {
      const most = degrees.reduce((a, b) => Math.max(a, b), 1);
      const thick = Math.max(1, each > 4 ? each - 1 : each);
      degrees.forEach((degree, i) => {
        const at = Math.max(low, start + i * each);
        const end = Math.min(high, start + i * each + thick);
        if (end <= at) return;
        context.fillStyle = degree ? grey : warning;
        bar(at, end - at, degree ? .82 * DEGREES * degree / most : 5);
      });
      return most;
    };
    const into = [...layer.degrees("into", s)];
    const out = [...layer.degrees("out", s)];
    const lowest = this.height - DEGREES - 12;
    const rows = draw(into, area.y, area.tall, AROUND.top, lowest, (at, each, size) => context.fillRect(right, at, size, each));
    const most = this.width - DEGREES - 8;
    const columns = draw(out, area.x, area.wide, 0, most, (at, each, size) => context.fillRect(at, below, each, size));
    context.fillStyle = colour("faint");
    context.font = font(10);
    context.textAlign = "left";
    context.fillText("\u2264 " + number(rows), right, below + 12);
    context.fillText("\u2264 " + number(columns), right, below + 25);
  }

  writeCaption(matrix, s) {
    const { layer, run } = this;
    const blocks = matrix.side > 1 ? "blocks of " + matrix.side + " x " + matrix.side + "; " : "";
    const what = matrix.signed ? "weights" : "shares of entries that are edges";
    this.numbers.textContent = blocks + what + "; " + number(layer.active[s]) + " edges";
    const when = run.name + ", epoch " + run.epochs[s].toFixed(2) + ", " + layer.name;
    this.canvas.setAttribute("aria-label", "Matrix of " + when + ": " + this.numbers.textContent);
  }
}
