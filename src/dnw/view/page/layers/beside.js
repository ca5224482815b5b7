/* What stands beside the map: numbers, curves and histograms of the network and of one layer, and all layers as a table. */

/* What is said of a run at its own moment: [name, value] each. */
function numbersOf(run, epoch) {
  const s = moment(run);
  return [
    ["edges", number(run.active[s])],
    ["density", percentText(run.active[s] / run.candidates)],
    ["come", number(run.came[s])],
    ["gone", number(run.went[s])],
    ...latest(run, epoch, "accuracy", "top1", value => (100 * value).toFixed(1) + " %"),
    ...latest(run, epoch, "loss", "train_loss", value => value.toFixed(3)),
  ];
}

/* The same of a layer. */
function numbersOfLayer(layer, s) {
  const into = [...layer.degrees("into", s)].sort((a, b) => a - b);
  return [
    ["edges", number(layer.active[s])],
    ["density", percentText(layer.density(s))],
    ["come", number(layer.came[s])],
    ["gone", number(layer.went[s])],
    ["targets without", number(layer.unused("into", s))],
    ["sources without", number(layer.unused("out", s))],
    ["edges in, median", number(into[into.length >> 1])],
    ["edges in, most", number(into.at(-1))],
  ];
}

/* Draws everything beside the map, as it is now. */
function drawBeside() {
  const run = runs[0];
  drawRuns();
  const densityOf = (one, layer) => layer ? +(100 * layer.density(moment(one))).toFixed(2) : 0;
  const percent = one => run.layers.map(({ name }) => densityOf(one, one.layers[one.numberOf.get(name)]));
  const densities = runs.map((one, i) => ({ ...named(one, i), counts: percent(one) }));
  bars("densities", densities, l => shortName(run.layers[l]?.name ?? ""));
  drawLayerCard();
  fillTable();
}

const shortName = name => name.replace(/\.weight$/, "").split(".").slice(-2).join(".");

/* The layer that is looked at, in each run. */
function drawLayerCard() {
  const { name, targets, sources, kernel, num_groups: groups } = runs[0].layers[chosenLayer()];
  $("layer").value = name;
  $("layerName").textContent = name;
  const of = groups > 1 ? " of each of " + groups + " groups" : "";
  const entries = kernel > 1 ? ", " + kernel + " entries each" : "";
  $("shape").textContent = number(targets) + " targets, " + number(sources) + " sources" + of + entries;
  const found = runs.map((run, i) => ({ run, i, layer: run.layers[run.numberOf.get(name)] }));
  fillFacts("layerFacts", found.map(({ run, layer }) => layer ? numbersOfLayer(layer, moment(run)) : []));
  const having = found.filter(({ layer }) => layer);
  const line = (one, points) => ({ ...named(one.run, one.i), points });
  const over = (one, value) => one.run.epochs.map((epoch, s) => [epoch, value(one.layer, s)]);
  chart("layerDensity", having.map(one => line(one, over(one, (layer, s) => 100 * layer.density(s)))));
  chart("layerCame", having.map(one => line(one, over(one, (layer, s) => layer.came[s]).slice(1))), { zero: true });
  const bin = i => i > 1 ? 2 ** (i - 1) + "-" + (2 ** i - 1) : String(i);
  for (const key of ["into", "out"]) {
    bars(key, having.map(one => ({ ...named(one.run, one.i), counts: one.layer.degreeCounts(key, moment(one.run)) })), bin);
  }
}

/* All layers of the first run at this moment; a click on one looks at it. */
function fillTable() {
  const run = runs[0];
  const s = moment(run);
  const columns = {
    "layer": layer => layer.name,
    "shape": ({ targets, sources, kernel }) => [targets, sources, ...(kernel > 1 ? [kernel] : [])].join(" x "),
    "edges": layer => layer.active[s],
    "density, %": layer => (100 * layer.density(s)).toFixed(2),
    "come": layer => layer.came[s],
    "gone": layer => layer.went[s],
    "targets without": layer => layer.unused("into", s),
    "sources without": layer => layer.unused("out", s),
  };
  const cells = (kind, texts) => texts.map(text => element(kind, String(text)));
  const head = element("tr", ...cells("th", Object.keys(columns)));
  for (const cell of head.children) cell.scope = "col";
  const rows = run.layers.map(layer => {
    const row = element("tr", ...cells("td", Object.values(columns).map(value => value(layer))));
    row.addEventListener("click", () => choose(layer.name));
    return row;
  });
  const caption = element("caption", "Layers at epoch " + run.epochs[s].toFixed(2));
  $("table").replaceChildren(caption, element("thead", head), element("tbody", ...rows));
}
