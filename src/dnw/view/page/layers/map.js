/* The network as a whole: layers as bars as tall as their channels, bands between them as wide as their edges. */

/* Around the picture, in CSS pixels. */
const MARGIN = { side: 30, above: 30, below: 22 };

/* The layer that is looked at, as a number of the first run. */
const chosenLayer = () => runs[0].numberOf.has(state.layer) ? runs[0].numberOf.get(state.layer) : 0;

/* Looks at a layer, by its name. */
function choose(name) {
  state.layer = name;
  for (const pane of graphs) if (pane instanceof Matrix) pane.reset();
  render();
}

/* The next layer, or the one before. */
function chooseNext(by) {
  const { layers } = runs[0];
  choose(layers[(chosenLayer() + by + layers.length) % layers.length].name);
}

/* The first run, and where there is one, another: each has its map, and the matrix of the layer that is looked at. */
function panes() {
  const shown = runs.slice(0, 2);
  $("layer").append(...runs[0].layers.map(layer => new Option(layer.name)));
  $("layer").addEventListener("change", () => choose($("layer").value));
  $("before").addEventListener("click", () => chooseNext(-1));
  $("after").addEventListener("click", () => chooseNext(1));
  $("signsLabel").hidden = !runs.some(run => run.layers.some(layer => layer.weights.size));
  return [...shown.map(run => new NetworkMap(run)), ...shown.map(run => new Matrix(run))];
}

class NetworkMap extends Pane {
  constructor(run) {
    super(run, "graph");
    const about = run.about ? " (" + run.about + ")" : "";
    $("graphs").append(this.figure(runs.length > 1 ? run.name + about : ""));
    this.most = Math.max(1, ...run.layers.flatMap(layer => layer.active));
    this.widest = Math.max(1, ...run.blocks.map(block => block.channels));
    const rows = new Map();
    for (const { x } of run.blocks) rows.set(x, (rows.get(x) ?? 0) + 1);
    this.rows = run.blocks.map(({ x }) => rows.get(x));
  }

  click(x, y) {
    const block = this.run.blocks[this.nearest(x, y)];
    if (block && this.run.numberOf.has(block.name)) choose(block.name);
  }

  choose(by) {
    chooseNext(by);
  }

  textAt(x, y) {
    const block = this.run.blocks[this.nearest(x, y)];
    if (!block) return "";
    const layer = this.run.layers[this.run.numberOf.get(block.name)];
    if (!layer || block.kind !== "layer") {
      const what = { input: "", layer: ", dense", join: ", where several meet" }[block.kind];
      return block.name + what + ": " + number(block.channels) + " channels";
    }
    const s = moment(this.run);
    const unused = number(layer.unused("into", s)) + " of " + number(layer.targets) + " targets without an edge";
    return block.name + ": " + number(layer.active[s]) + " edges, " + percentText(layer.density(s)) + "; " + unused;
  }

  /* --- where things are, in CSS pixels --- */

  position(i) {
    const { x, y } = this.run.blocks[i];
    const width = this.width - 2 * MARGIN.side;
    const height = this.height - MARGIN.above - MARGIN.below;
    return [(MARGIN.side + x * width) * this.zoom + this.left, (MARGIN.above + y * height) * this.zoom + this.top];
  }

  /* How tall the bar of a block is: as the root of its channels, where there is room. */
  tall(i) {
    const height = (this.height - MARGIN.above - MARGIN.below) * this.zoom;
    const wanted = .8 * height * Math.sqrt(this.run.blocks[i].channels / this.widest);
    return clamp(wanted, 4, .84 * height / this.rows[i]);
  }

  /* The block whose bar or band is under a point, or -1. */
  nearest(x, y) {
    let best = -1;
    let least = 16;
    this.run.blocks.forEach((block, i) => {
      const [a, b] = this.position(i);
      const from = block.reads.length ? Math.max(...block.reads.map(j => this.position(j)[0])) : a;
      const beside = x > a ? x - a : Math.max(0, from + .3 * (a - from) - x);
      const above = Math.max(0, Math.abs(y - b) - this.tall(i) / 2);
      if (beside + above < least) [best, least] = [i, beside + above];
    });
    return best;
  }

  /* --- drawing --- */

  draw() {
    const started = performance.now();
    this.fit(2.4e6);
    const s = moment(this.run);
    const { context } = this;
    context.fillStyle = colour("panel");
    context.fillRect(0, 0, this.width, this.height);
    this.run.blocks.forEach((block, i) => this.drawReads(block, i, s));
    this.run.blocks.forEach((block, i) => this.drawBlock(block, i, s));
    state.milliseconds = performance.now() - started;
    this.writeCaption(s);
    this.tell();
  }

  /* What a block reads: a band as wide as the root of its edges, or, where it has none, a line. */
  drawReads(block, i, s) {
    const { context } = this;
    const [x1, y1] = this.position(i);
    const layer = block.kind === "layer" ? this.run.layers[this.run.numberOf.get(block.name)] : null;
    for (const j of block.reads) {
      const [x0, y0] = this.position(j);
      if (!layer) {
        this.drawLine(x0, y0, x1, y1, block.kind === "layer");
        continue;
      }
      const room = .9 * Math.min(this.tall(i), .7 * (this.height - MARGIN.above - MARGIN.below) * this.zoom);
      const wide = Math.max(1.2, room * Math.sqrt(layer.active[s] / this.most));
      const marks = isMarked(this.run, s);
      const edges = Math.max(1, layer.active[s]);
      const came = marks ? Math.min(edges, layer.came[s]) : 0;
      const old = (1 - came / edges) * wide;
      const plus = old * layer.positive[s] / edges;
      const thick = [plus, old - plus, wide - old, marks ? wide * Math.min(1, layer.went[s] / edges) : 0];
      const top = y => y - (thick[PLUS] + thick[MINUS] + thick[CAME]) / 2;
      drawBand(context, { x0: x0 + 3, x1: x1 - 3, start: top(y0), end: top(y1), thick });
    }
  }

  /* A thin line from block to block, bent upwards where it leads past others; thicker into a dense layer. */
  drawLine(x0, y0, x1, y1, dense) {
    const { context } = this;
    const far = x1 - x0 > 2.5 * (this.width - 2 * MARGIN.side) * this.zoom / Math.max(1, this.columns());
    const up = far ? .32 * (this.height - MARGIN.above) * this.zoom : 0;
    context.strokeStyle = colour("faint");
    context.globalAlpha = dense ? .5 : .8;
    context.lineWidth = dense ? 3 : 1;
    context.beginPath();
    context.moveTo(x0, y0);
    context.bezierCurveTo(x0 + (x1 - x0) / 3, y0 - up, x1 - (x1 - x0) / 3, y1 - up, x1, y1);
    context.stroke();
    context.globalAlpha = 1;
    context.lineWidth = 1;
  }

  columns() {
    return new Set(this.run.blocks.map(block => block.x)).size;
  }

  /* A bar, full as far as its channels have edges; of a dense layer an outline, of a join a dot. */
  drawBlock(block, i, s) {
    const { context } = this;
    const [x, y] = this.position(i);
    const tall = this.tall(i);
    const layer = block.kind === "layer" ? this.run.layers[this.run.numberOf.get(block.name)] : null;
    if (block.kind === "join") {
      context.fillStyle = colour("faint");
      fillDot(context, x, y);
    } else if (!layer) {
      context.strokeStyle = colour("faint");
      context.strokeRect(x - 3, y - tall / 2, 6, tall);
    } else {
      const full = tall * (1 - layer.unused("into", s) / layer.targets);
      const chosen = this.run.numberOf.get(block.name) === this.run.numberOf.get(runs[0].layers[chosenLayer()].name);
      context.fillStyle = colour("line");
      context.fillRect(x - 3, y - tall / 2, 6, tall);
      context.fillStyle = colour("ink");
      context.fillRect(x - 3, y - full / 2, 6, full);
      if (chosen) {
        context.strokeStyle = colour("plus");
        context.lineWidth = 2;
        context.strokeRect(x - 6, y - tall / 2 - 3, 12, tall + 6);
        context.lineWidth = 1;
      }
    }
    this.drawName(block, i);
  }

  /* The name of a block below it, where it has room. */
  drawName(block, i) {
    const { context } = this;
    const [x, y] = this.position(i);
    const room = (this.width - 2 * MARGIN.side) * this.zoom / Math.max(1, this.columns() - 1);
    context.font = font(10);
    context.fillStyle = colour("faint");
    context.textAlign = "center";
    const name = block.kind === "layer" ? block.name.replace(/\.weight$/, "") : block.name;
    if (block.kind === "join") {
      if (room > 34) context.fillText(name, x, y - 6);
      return;
    }
    const parts = name.split(".");
    while (parts.length > 1 && context.measureText(parts.join(".")).width > room - 4) parts.shift();
    const text = parts.join(".");
    if (text !== name && /^[\d.]*$/.test(text)) return;
    if (context.measureText(text).width <= room - 2) context.fillText(text, x, y + this.tall(i) / 2 + 12);
  }

  /* Says in words what is drawn. */
  writeCaption(s) {
    const { run } = this;
    $("hint").textContent = "a bar is a layer's targets, full as far as they have edges, and as tall as the root of their "
      + "number, as bands are; click a layer, wheel or pinch to zoom, drag to move; keys: n and p choose, + and - zoom";
    const ended = times[state.now] > run.epochs.at(-1) + 1e-9 ? "ended; " : "";
    const edges = number(run.active[s]) + " of " + number(run.candidates) + " edges";
    const density = percentText(run.active[s] / run.candidates);
    this.numbers.textContent = ended + edges + " (" + density + ") in " + run.layers.length + " layers";
    this.canvas.setAttribute("aria-label", run.name + ", epoch " + run.epochs[s].toFixed(2) + ": " + this.numbers.textContent);
  }
}

/* A share as percent, with two digits that matter. */
function percentText(share) {
  return (100 * share).toFixed(share < .001 ? 3 : share < .01 ? 2 : 1) + " %";
}
