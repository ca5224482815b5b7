/* What stands beside the graphs: numbers, curves, histograms, the adjacency matrix, one node, and the table. */

/* The adjacency matrix, of at most 300 cells a side; where a cell is one entry it is as large as there is room. */
function adjacency(run, s) {
  const { canvas, context, width, height } = cleared("adjacency");
  const cells = Math.min(run.nodes, 300);
  const cell = n => Math.floor(n * cells / run.nodes);
  const plus = new Float32Array(cells * cells);
  const minus = new Float32Array(cells * cells);
  const counts = new Uint32Array(cells * cells);
  run.eachEdge(s, (source, target, strength) => {
    counts[cell(target) * cells + cell(source)]++;
    const layer = strength > 0 ? plus : minus;
    layer[cell(target) * cells + cell(source)] += .3 + .7 * Math.abs(strength) / header.strongest;
  });
  const [ground, warm, cold] = ["panel", "plus", "minus"].map(name => rgb(colour(name)));
  const typical = Math.max(1, 3 * run.active[s] / (cells * cells));
  const picture = bitmap(cells, cells, i => {
    const sum = plus[i] + minus[i];
    if (!sum) return ground;
    const cover = 1 - Math.exp(-(cells < run.nodes ? 1.2 : 3) * sum / typical);
    return ground.map((k, j) => k * (1 - cover) + cover * (plus[i] * warm[j] + minus[i] * cold[j]) / sum);
  });
  const side = Math.min(width, height);
  context.imageSmoothingEnabled = cells > 150;
  context.drawImage(picture, (width - side) / 2, 0, side, side);
  context.strokeStyle = colour("line");
  context.strokeRect((width - side) / 2 + .5, .5, side - 1, side - 1);
  told.set(canvas, (x, y) => {
    const [column, row] = [x - (width - side) / 2, y].map(at => Math.floor(at / side * cells));
    if (Math.min(column, row) < 0 || Math.max(column, row) >= cells) return "";
    const first = i => run.nodeName(Math.ceil(i * run.nodes / cells));
    const from = cells < run.nodes ? "from about " : "from ";
    return from + first(column) + " to " + first(row) + ": " + edgesText(counts[row * cells + column]);
  });
  describe(canvas, "");
}

/* What is said of a run at its own moment: [name, value] each. */
function numbersOf(run, epoch) {
  const s = moment(run);
  return [
    ["edges", number(run.active[s])],
    ["live", run.alive[s] + " of " + run.nodes],
    ["come", number(run.came[s])],
    ["gone", number(run.went[s])],
    ...latest(run, epoch, "accuracy", "top1", value => (100 * value).toFixed(1) + " %"),
    ...latest(run, epoch, "loss", "train_loss", value => value.toFixed(3)),
  ];
}

/* Draws everything beside the graphs, as it is now. */
function drawBeside() {
  const run = runs[0];
  const s = moment(run);
  drawRuns();
  const byDegree = runs.map((one, i) => ({ ...named(one, i), counts: one.degreeCounts(moment(one)) }));
  const bySkip = runs.map((one, i) => ({ ...named(one, i), counts: one.skipCounts(moment(one)) }));
  bars("degrees", byDegree, i => i > 1 ? 2 ** (i - 1) + "-" + (2 ** i - 1) : String(i));
  bars("skips", bySkip, String);
  $("whose").textContent = runs.length > 1 ? " (" + nameApart(run) + ")" : "";
  adjacency(run, s);
  drawNodeCard();
}

/* The node that was picked: its degree over time, and what is inside it. */
function drawNodeCard() {
  $("node").hidden = !state.picked;
  if (!state.picked) return;
  const { run, node } = state.picked;
  const s = moment(run);
  const history = run.epochs.map((epoch, k) => ({ epoch, ...run.degree(k, node) }));
  const born = run.epochs.findIndex((_, k) => run.isLive(k, node));
  $("nodeName").textContent = run.nodeName(node);
  facts("nodeFacts", [
    ["edges in", history[s].into],
    ["edges out", history[s].out],
    ["now", run.isLive(s, node) ? "live" : "dead"],
    ["first live", born < 0 ? "never" : "epoch " + run.epochs[born].toFixed(2)],
  ]);
  const into = { name: "in", colour: colour("minus"), points: history.map(one => [one.epoch, one.into]) };
  const out = { name: "out", colour: colour("plus"), points: history.map(one => [one.epoch, one.out]) };
  chart("nodeDegree", [into, out], { zero: true });
  drawInside(run, node, s);
}

/* The filter of a node, the images, and what they look like there at the stored moment that is nearest. */
function drawInside(run, node, s) {
  const at = 9 * (s * run.nodes + node);
  const filter = run.filters.subarray(at, at + 9); /* empty where none are stored */
  const far = one => Math.abs(one.snapshot - s);
  const near = run.maps.reduce((best, one) => !best || far(one) < far(best) ? one : best, null);
  $("inside").hidden = $("insideTitle").hidden = !filter.length && !near;
  if ($("inside").hidden) return;
  const { canvas, context, width } = cleared("inside");
  const titles = filter.length ? ["3x3 filter"] : [];
  if (near) {
    const images = run.images.shape[0] + " test images, epoch " + run.epochs[near.snapshot].toFixed(2);
    titles.push("what it sends for " + images);
  }
  $("insideTitle").textContent = titles.join("; ");
  describe(canvas, "");
  context.imageSmoothingEnabled = false;
  const side = Math.min(58, width / 4.4);
  const gap = 8;
  const [ground, warm, cold] = ["ground", "plus", "minus"].map(name => rgb(colour(name)));
  const signed = value => ground.map((k, j) => k + ((value < 0 ? cold : warm)[j] - k) * Math.min(1, Math.abs(value)));
  const tile = (w, h, pixel, x, y) => {
    context.drawImage(bitmap(w, h, pixel), x, y, side, side * h / w);
    context.strokeStyle = colour("line");
    context.strokeRect(x + .5, y + .5, side - 1, side * h / w - 1);
  };
  if (filter.some(Boolean)) tile(3, 3, i => signed(filter[i] / 127), 0, 0);
  if (!near) return;
  const g = run.graphOf[node];
  const { shape: [, nodes, h, w], values } = near.graphs[g];
  const { shape: [images, channels, height, across], values: pixels } = run.images;
  for (let k = 0; k < images; k++) {
    const x = (k + 1) * (side + gap);
    const map = (k * nodes + node - run.graphOf.indexOf(g)) * h * w;
    const plane = j => (k * channels + Math.min(j, channels - 1)) * height * across;
    tile(across, height, i => [0, 1, 2].map(j => pixels[plane(j) + i]), x, 0);
    tile(w, h, i => signed((values[map + i] - 128) / 127), x, side + gap);
  }
}

/* All numbers of all snapshots, without columns that would be empty. */
function fillTable() {
  const digits = (value, count) => value == null ? "" : value.toFixed(count);
  const columns = {
    "run": run => run.name + (run.about ? ", " + run.about : ""),
    "epoch": (run, s) => run.epochs[s].toFixed(2),
    "step": (run, s) => run.steps[s],
    "edges": (run, s) => run.active[s],
    "come": (run, s) => run.came[s],
    "gone": (run, s) => run.went[s],
    "live nodes": (run, s) => run.alive[s],
    "accuracy, %": (run, s, m) => digits(m.top1 == null ? null : 100 * m.top1, 2),
    "loss, nats": (run, s, m) => digits(m.train_loss, 4),
    "test loss, nats": (run, s, m) => digits(m.test_loss, 4),
  };
  const rows = runs.flatMap(run => run.steps.map((_, s) => {
    const metrics = run.metrics.find(m => m.epoch === run.epochs[s]) ?? {};
    return Object.values(columns).map(value => String(value(run, s, metrics)));
  }));
  const line = (kind, texts) => {
    const filled = texts.filter((_, i) => rows.some(row => row[i] !== ""));
    return element("tr", ...filled.map(text => element(kind, text)));
  };
  const top = line("th", Object.keys(columns));
  for (const cell of top.children) cell.scope = "col";
  const caption = element("caption", runs.some(run => run.omitted) ? "Snapshots" : "Every snapshot");
  const body = element("tbody", ...rows.map(row => line("td", row)));
  $("table").replaceChildren(caption, element("thead", top), body);
}
