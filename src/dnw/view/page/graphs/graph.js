/* The picture of a run's graphs at one moment, and what pointing, zooming and moving do to it. */

/* Around the picture, in CSS pixels; above it titles, where there are several graphs. */
const MARGIN = { side: 26, above: 34, titled: 50, below: 14 };

/* What is beside each other: the first run, and where there is one, another. */
function panes() {
  $("sum").checked = runs.some(run => Math.max(...run.edges) > 60000);
  $("sumLabel").hidden = !runs.some(run => run.graphs.every(graph => graph.static));
  return runs.slice(0, 2).map(run => new Graph(run));
}

class Graph extends Pane {
  constructor(run) {
    super(run, "graph");
    const about = run.about ? " (" + run.about + ")" : "";
    $("graphs").append(this.figure(runs.length > 1 ? run.name + about : ""));
  }

  /* --- what one does --- */

  click(x, y) {
    if (this.isSummed()) this.zoomBy(6, x, y);
    else pick(this.run, this.nearest(x, y));
  }

  /* The node there stands out. */
  hover(x, y) {
    const node = this.isSummed() ? -1 : this.nearest(x, y);
    const hovered = node < 0 ? null : { run: this.run, node };
    if (hovered?.node === state.hovered?.node) return;
    state.hovered = hovered;
    redraw();
  }

  leave() {
    if (!state.hovered) return;
    state.hovered = null;
    redraw();
  }

  textAt(x, y) {
    return this.isSummed() ? this.textOfLevel(x) : this.textOfNode(x, y);
  }

  /* Picks the next live node, or the one before, in the order of levels. */
  choose(by) {
    const { run } = this;
    const s = moment(run);
    const chosen = state.picked?.run === run ? state.picked.node : by > 0 ? -1 : run.nodes;
    for (let i = 1; i <= run.nodes; i++) {
      const n = (chosen + by * i + 2 * run.nodes) % run.nodes;
      if (n === chosen || !run.isLive(s, n)) continue;
      return pick(run, n);
    }
  }

  textOfNode(x, y) {
    const n = this.nearest(x, y);
    if (n < 0) return "";
    const s = moment(this.run);
    const { into, out } = this.run.degree(s, n);
    const what = this.run.isOutput(n) ? "; a channel for the layers that come after, no class" : "";
    return this.run.nodeName(n) + ": " + into + " in, " + out + " out" + (this.run.isLive(s, n) ? "" : ", dead") + what;
  }

  textOfLevel(x) {
    const level = levelsOf(this).find(one => Math.abs(one.x - x) < 9);
    if (!level) return "";
    const live = number(level.live) + " of " + number(level.size) + " nodes live";
    return level.name + ": " + live + ", " + number(level.into) + " edges in, " + number(level.out) + " out";
  }

  /* --- where things are, in CSS pixels --- */

  /* From the layout's 0 to 1. */
  toScreen(x, y) {
    const above = this.run.graphs.length > 1 ? MARGIN.titled : MARGIN.above;
    const width = this.width - 2 * MARGIN.side;
    const height = this.height - above - MARGIN.below;
    return [(MARGIN.side + x * width) * this.zoom + this.left, (above + y * height) * this.zoom + this.top];
  }

  position(n) {
    return this.toScreen(this.run.x[n], this.run.y[n]);
  }

  /* The node that is nearest to a point, or -1 where none is near. */
  nearest(x, y) {
    let best = -1;
    let least = 14 ** 2;
    for (let n = 0; n < this.run.nodes; n++) {
      const [a, b] = this.position(n);
      const distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least) {
        least = distance;
        best = n;
      }
    }
    return best;
  }

  /* Whether bands between levels are shown in place of edges. */
  isSummed() {
    return $("sum").checked && this.zoom < 3 && this.run.graphs.every(graph => graph.static) && focus(this.run) < 0;
  }

  /* --- drawing --- */

  draw() {
    const started = performance.now();
    const s = moment(this.run);
    if (this.fit(1.6e6) || !this.light) this.light = new Light(this.canvas.width, this.canvas.height, this.scale);
    if (this.isSummed()) {
      drawLevels(this);
    } else {
      const chosen = focus(this.run);
      this.drawEdges(s, chosen);
      this.drawNodes(s, chosen);
      this.drawTitles();
      this.drawEnds();
    }
    state.milliseconds = performance.now() - started;
    this.writeCaption(s);
    this.tell();
  }

  /* The edges as light, those of the chosen node strong and the others faint. */
  drawEdges(s, chosen) {
    const { run } = this;
    const marks = isMarked(run, s);
    const bound = $("strong").checked ? run.strongTenth(s) : 0;
    const positions = Array.from({ length: run.nodes }, (_, n) => this.position(n));
    const middles = run.graphs.map(graph => graph.static ? null : this.toScreen(graph.middle, .5));
    const faint = chosen >= 0 ? .16 : 1;
    const strong = .9 * this.light.scale;
    const plain = faint * clamp(14 / Math.sqrt(run.active[s] / this.zoom + 1), .1, 1);
    const mark = faint * Math.min(.3, 3 / Math.sqrt(run.came[s] + 1));
    this.light.clear();
    this.drawn = 0;
    for (let e = 0, at = s * run.num; e < run.num; e++, at++) {
      const now = run.strengths[at];
      const before = marks ? run.strengths[at - run.num] : now;
      if (!now && !before) continue;
      const a = run.sources[e];
      const b = run.targets[e];
      const own = a === chosen || b === chosen;
      if (now && Math.abs(now) < bound && !own) continue;
      if (now) this.drawn++;
      const kind = kindOf(now, before);
      let amount = strong;
      if (!own && kind === CAME) amount = Math.max(plain, mark);
      else if (!own && kind === WENT) amount = .8 * plain;
      else if (!own) amount = plain * (.15 + .85 * (now / header.strongest) ** 2);
      this.drawEdge(kind, positions[a], positions[b], middles[run.graphOf[a]], amount);
    }
    this.light.paint(this.context, chosen >= 0 ? 1.6 : this.light.exposure());
  }

  /* One edge: straight, or in a ring, which has a middle, a curve or a loop. */
  drawEdge(kind, [x0, y0], [x1, y1], middle, amount) {
    if (!middle) this.light.line(kind, x0, y0, x1, y1, amount);
    else if (x0 === x1 && y0 === y1) this.light.loop(kind, x0, y0, middle, amount);
    else this.light.curve(kind, x0, y0, x1, y1, middle, amount);
  }

  /* The nodes as dots, as large as there is room; the chosen one and those that it has edges with stand out. */
  drawNodes(s, chosen) {
    const { run, context } = this;
    const dot = clamp(90 / Math.sqrt(run.nodes), .7, 4.2) * Math.min(2.4, Math.sqrt(this.zoom));
    const room = size => Math.max(.7, .42 * (this.height - 50) * this.zoom / size);
    const radii = run.graphs.map(graph => graph.levels.map(size => graph.static ? Math.min(dot, room(size)) : dot));
    const { into, out } = run.degrees(s);
    const [ink, faint] = [colour("ink"), colour("faint")];
    const related = new Set();
    run.eachEdge(s, (source, target) => {
      if (source === chosen) related.add(target);
      if (target === chosen) related.add(source);
    });
    for (let n = 0; n < run.nodes; n++) {
      const live = run.isLive(s, n);
      const radius = radii[run.graphOf[n]][run.level[n]];
      let alpha = into[n] + out[n] ? .3 : .15;
      if (live) alpha = chosen < 0 || related.has(n) ? .85 : .3;
      if (n === chosen) alpha = 1;
      context.globalAlpha = alpha;
      context.fillStyle = live ? ink : faint;
      context.beginPath();
      context.arc(...this.position(n), n === chosen ? Math.max(4, radius + 2.5) : radius * (live ? 1 : .8), 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  /* The names of graphs, where there are several, above them; below each a line of its own where there is room. */
  drawTitles(second = () => "") {
    const { run, context } = this;
    if (run.graphs.length === 1) return;
    const roomy = this.width * this.zoom > 110 * run.graphs.length;
    context.fillStyle = colour("faint");
    context.textAlign = "center";
    run.graphs.forEach((graph, g) => {
      const [x] = this.toScreen(graph.middle, 0);
      const name = graph.name || "graph";
      context.font = font(11);
      context.fillText(roomy ? name : name.split(".").at(-1), x, 38);
      context.font = font(10);
      if (roomy) context.fillText(second(g), x, 51);
    });
  }

  /* The words "inputs" and "outputs" beside those of rings. */
  drawEnds() {
    const { run, context } = this;
    context.font = font(11);
    context.textAlign = "left";
    run.graphs.forEach((graph, g) => {
      if (graph.static) return;
      for (const [level, text] of [[0, "inputs"], [2, "outputs"]]) {
        const first = run.level.findIndex((one, n) => run.graphOf[n] === g && one === level);
        if (first < 0) continue;
        const [x, y] = this.position(first + Math.floor(graph.levels[level] / 2));
        const wide = context.measureText(text).width;
        const left = level ? Math.min(x + 12, this.width - wide - 3) : Math.max(x - 12 - wide, 3);
        context.globalAlpha = .8;
        context.fillStyle = colour("panel");
        context.fillRect(left - 2, y - 8, wide + 4, 16);
        context.globalAlpha = 1;
        context.fillStyle = colour("faint");
        context.fillText(text, left, y + 4);
      }
    });
  }

  /* Says in words what is drawn. */
  writeCaption(s) {
    const { run } = this;
    const bands = "a bar is a level, full as far as its nodes are live, their number below; "
      + "a band is as wide as its number of edges; click to zoom in, ";
    const hint = this.isSummed() ? bands : "point at a node, click to keep it, ";
    $("hint").textContent = hint + "wheel or pinch to zoom, drag to move; keys: n and p choose, + and - zoom";
    const ended = times[state.now] > run.epochs.at(-1) + 1e-9 ? "ended; " : "";
    const shown = this.drawn < run.edges[s] ? number(this.drawn) + " shown of " : "";
    const shared = " by " + number(run.active[s]) + " weights, of which some serve several or none";
    const weights = run.edges[s] === run.active[s] ? "" : shared;
    const nodes = number(run.alive[s]) + " of " + number(run.nodes) + " nodes live";
    this.numbers.textContent = ended + shown + number(run.edges[s]) + " edges" + weights + ", " + nodes;
    const when = run.name + ", epoch " + run.epochs[s].toFixed(2);
    this.canvas.setAttribute("aria-label", when + ": " + this.numbers.textContent);
  }
}

/* Of the light of an edge that has a strength now and had one before. */
function kindOf(now, before) {
  if (!now) return WENT;
  if (!before) return CAME;
  return now > 0 ? PLUS : MINUS;
}
