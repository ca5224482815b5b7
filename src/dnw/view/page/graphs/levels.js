/* Where edges are so many that single ones say nothing: levels as bars, and between them bands as wide as their edges. */

/* The levels from left to right, each with the bands that leave it: by the level they lead to, edges of each kind. */
function levelsOf(graph) {
  const { run } = graph;
  const s = moment(run);
  const marks = isMarked(run, s);
  const bound = $("strong").checked ? run.strongTenth(s) : 0;
  const key = [s, marks, bound, graph.width, graph.zoom, graph.left].join();
  if (graph.summary?.key !== key) graph.summary = { key, ...summed(graph, s, marks, bound) };
  graph.drawn = graph.summary.drawn;
  return graph.summary.levels;
}

function summed(graph, s, marks, bound) {
  const { run } = graph;
  const levels = [];
  const levelOf = new Int32Array(run.nodes);
  let n = 0;
  run.graphs.forEach(({ levels: sizes }, g) => sizes.forEach((size, l) => {
    const level = { graph: g, name: run.levelName(g, l), x: graph.position(n)[0], size, live: 0, into: 0, out: 0 };
    level.bands = new Map();
    for (let i = 0; i < size; i++, n++) {
      levelOf[n] = levels.length;
      level.live += run.isLive(s, n);
    }
    levels.push(level);
  }));
  let drawn = 0;
  for (let e = 0, at = s * run.num; e < run.num; e++, at++) {
    const now = run.strengths[at];
    const before = marks ? run.strengths[at - run.num] : now;
    if (!now && !before) continue;
    if (now && Math.abs(now) < bound) continue;
    const from = levels[levelOf[run.sources[e]]];
    const to = levelOf[run.targets[e]];
    if (!from.bands.has(to)) from.bands.set(to, [0, 0, 0, 0]);
    from.bands.get(to)[kindOf(now, before)]++;
    if (!now) continue;
    from.out++;
    levels[to].into++;
    drawn++;
  }
  return { levels, drawn };
}

/* Draws bars and bands in the place of nodes and edges. */
function drawLevels(graph) {
  const { run, context, width, height, zoom } = graph;
  const levels = levelsOf(graph);
  const middle = (MARGIN.above + height) / 2 * zoom + graph.top;
  context.fillStyle = colour("panel");
  context.fillRect(0, 0, width, height);
  const { bands, tall } = stacked(levels, middle, (height - 100) * zoom);
  for (const band of bands) drawBand(context, band);
  levels.forEach((level, i) => {
    const gaps = [levels[i - 1], levels[i + 1]].filter(Boolean).map(other => Math.abs(other.x - level.x));
    drawBar(context, level, middle, tall[i], Math.min(99, ...gaps) > 26);
  });
  const edges = run.graphs.map((_, g) => levels.reduce((sum, level) => level.graph === g ? sum + level.out : sum, 0));
  graph.drawTitles(g => number(edges[g]) + " edges");
}

/* Where bands leave and reach the bars, one above the other about a middle, and how tall the bars are.

   The busiest level of a graph fills the height, so that the width of bands is comparable within a graph. */
function stacked(levels, middle, height) {
  const sum = kinds => kinds.reduce((a, b) => a + b);
  const into = levels.map(() => 0);
  const out = levels.map(() => 0);
  const bands = [];
  levels.forEach((level, from) => {
    const furthestFirst = [...level.bands].sort(([a], [b]) => b - a);
    for (const [to, kinds] of furthestFirst) {
      into[to] += sum(kinds);
      out[from] += sum(kinds);
      bands.push({ from, to, kinds });
    }
  });
  const most = {};
  levels.forEach(({ graph }, i) => most[graph] = Math.max(most[graph] ?? 1, into[i], out[i]));
  const each = levels.map(level => height / most[level.graph]); /* the width of one edge */
  const tall = levels.map((_, i) => Math.max(3, Math.max(into[i], out[i]) * each[i]));
  const left = levels.map((_, i) => middle - into[i] * each[i] / 2);
  const right = levels.map((_, i) => middle - out[i] * each[i] / 2);
  for (const band of bands) {
    band.start = right[band.from];
    right[band.from] += sum(band.kinds) * each[band.from];
  }
  for (const band of [...bands].sort((p, q) => p.to - q.to || p.from - q.from)) {
    band.end = left[band.to];
    left[band.to] += sum(band.kinds) * each[band.to];
  }
  for (const band of bands) {
    band.x0 = levels[band.from].x + 3;
    band.x1 = levels[band.to].x - 3;
    band.thick = band.kinds.map(count => count * each[band.from]);
  }
  return { bands, tall };
}

/* One level, full as far as its nodes are live, with their number below where there is room. */
function drawBar(context, level, middle, tall, hasRoom) {
  const full = tall * level.live / level.size;
  context.fillStyle = colour("line");
  context.fillRect(level.x - 3, middle - tall / 2, 6, tall);
  context.fillStyle = colour("ink");
  context.fillRect(level.x - 3, middle - full / 2, 6, full);
  if (!hasRoom) return;
  context.font = font(10);
  context.textAlign = "center";
  context.fillStyle = colour("faint");
  context.fillText(number(level.live), level.x, middle + tall / 2 + 13);
}
