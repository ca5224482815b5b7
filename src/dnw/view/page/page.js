/* What the page shows, when, and how one moves through time. */

/* --- small helpers --- */

const $ = id => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const number = value => value.toLocaleString("en");
const font = size => size + "px system-ui, sans-serif";
/* A colour of the style, such as "#c76a00", by its name; and its red, green and blue, from 0 to 255. */
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const rgb = text => [1, 3, 5].map(i => parseInt(text.slice(i, i + 2), 16));

/* A new element with texts, which stay texts, and other elements in it. */
function element(kind, ...content) {
  const made = document.createElement(kind);
  made.append(...content);
  return made;
}

/* --- what is shown --- */

/* What one looks at: the moment, as an index of times; nodes, each { run, node } or null; in a page of layers one, by name. */
const state = { now: 0, picked: null, hovered: null, layer: null, playing: 0, milliseconds: 0 };
const header = JSON.parse($("header").textContent);
const switches = [...document.querySelectorAll(".switches input")];
const TINTS = ["ink", "second"]; /* of the curves of the first run, the second, and so on in turn */
let runs = [];
let times = []; /* epochs at which some run has a snapshot */
let graphs = []; /* the panes that move with the time */

/* The snapshot of a run that is shown. */
const moment = run => runs.length === 1 ? state.now : run.at(times[state.now]);

/* Whether to mark what has changed: in the moment of the snapshot itself, not while another run goes on. */
const isMarked = (run, s) => $("changes").checked && s > 0 && Math.abs(run.epochs[s] - times[state.now]) < 1e-9;

/* The node of a run that stands out, or -1. */
function focus(run) {
  const one = state.hovered ?? state.picked;
  return one?.run === run ? one.node : -1;
}

/* Keeps a node; lets go of the one that is kept where it is the same, or -1. */
function pick(run, node) {
  const same = state.picked?.node === node && state.picked.run === run;
  state.picked = node < 0 || same ? null : { run, node };
  state.hovered = null;
  render();
}

/* --- drawing, at most once a frame --- */

let waiting = 0; /* to draw the graphs */
let due = 0; /* to draw everything */

function drawGraphs() {
  for (const graph of graphs) graph.draw();
}

function render() {
  drawGraphs();
  drawBeside();
}

function redraw() {
  waiting ||= requestAnimationFrame(() => {
    waiting = 0;
    drawGraphs();
  });
}

/* --- time --- */

/* Goes to a moment. */
function show(index) {
  state.now = clamp(index, 0, times.length - 1);
  $("time").value = state.now;
  $("time").setAttribute("aria-valuetext", "epoch " + times[state.now].toFixed(2));
  cancelAnimationFrame(due);
  due = requestAnimationFrame(render);
}

/* Starts to play, from the beginning where it is at the end, or stops. */
function play(on) {
  const last = times.length - 1;
  const next = () => {
    if (state.now === last) return play(false);
    show(state.now + 1);
    state.playing = setTimeout(next, clamp(8000 / times.length, 60, 450));
  };
  clearTimeout(state.playing);
  state.playing = 0;
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(on));
  if (!on) return;
  if (state.now === last) show(0);
  state.playing = setTimeout(next, 300);
}

/* --- start --- */

async function start() {
  try {
    runs = await unpack();
  } catch (error) {
    const failed = element("p", "This browser could not unpack the page: it needs one of 2023 or newer.");
    failed.id = "failed";
    document.querySelector("main").replaceChildren(failed);
    throw error;
  }
  const all = new Set(runs.flatMap(run => run.epochs));
  times = runs.length === 1 ? runs[0].epochs : [...all].sort((a, b) => a - b);
  graphs = panes();
  fillHeadings();
  $("time").max = times.length - 1;
  listen();
  fillTable();
  show(times.length - 1);
  recall();
  if (header.reload) setInterval(reload, 1000 * header.reload);
}

/* What tells a run from the others. */
function nameApart(run) {
  const alike = new Set(runs.map(one => one.about)).size < runs.length;
  return alike ? run.name : run.about;
}

/* Names of the runs, what tells their curves apart, and how many snapshots are left out. */
function fillHeadings() {
  $("title").textContent = [...new Set(runs.map(run => run.name))].join(" and ");
  $("about").textContent = runs.map(run => run.about).join("; ");
  if (runs.length > 1) {
    $("legend").append(...runs.map((run, i) => {
      const mark = element("i");
      mark.style.background = "var(--" + TINTS[i % TINTS.length] + ")";
      return element("span", mark, "curves: " + nameApart(run));
    }));
  }
  const omitted = runs.reduce((sum, run) => sum + run.omitted, 0);
  $("omitted").hidden = !omitted;
  const are = omitted === 1 ? " snapshot is" : " snapshots are";
  $("omitted").textContent = omitted + are + " left out to keep this page small.";
}

function listen() {
  $("time").addEventListener("input", () => {
    play(false);
    show(+$("time").value);
  });
  $("play").addEventListener("click", () => play(!state.playing));
  for (const one of switches) one.addEventListener("change", redraw);
  $("whole").addEventListener("click", () => {
    for (const graph of graphs) graph.reset();
    graphs[0].canvas.focus({ preventScroll: true });
    if ($("sum")?.checked) pick(runs[0], -1);
    else redraw();
  });
  addEventListener("keydown", onKey);
  listenToHover();
  let resizing = 0;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(render, 80);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
}

/* Arrows go through time, space plays, escape lets go of the picked node; other controls keep keys of their own. */
function onKey(event) {
  const { key, target } = event;
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (key === " " && target.matches("button, summary, select, input[type=checkbox]")) return;
  if (key !== " " && key !== "Escape" && target.matches("select, input[type=range]")) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (by) {
    event.preventDefault();
    play(false);
    show(state.now + by);
  } else if (key === " ") {
    event.preventDefault();
    play(!state.playing);
  } else if (key === "Escape") {
    pick(runs[0], -1);
  }
}

/* --- while a run trains the page reads itself again: what is looked at stays as it was --- */

function reload() {
  if (state.playing) return;
  remember();
  location.reload();
}

function remember() {
  const { picked } = state;
  const kept = {
    epoch: state.now === times.length - 1 ? null : times[state.now],
    picked: picked && { run: runs.indexOf(picked.run), node: picked.node },
    layer: state.layer,
    views: graphs.map(graph => [graph.zoom, graph.left, graph.top]),
    switches: switches.map(one => one.checked),
    open: document.querySelector("details").open,
    scroll: scrollY,
    focus: document.activeElement.id,
  };
  try {
    sessionStorage.setItem(location.pathname, JSON.stringify(kept));
  } catch (error) { /* then it begins anew */ }
}

function recall() {
  let kept = null;
  try {
    kept = JSON.parse(sessionStorage.getItem(location.pathname));
    sessionStorage.removeItem(location.pathname);
  } catch (error) { /* then it begins anew */ }
  if (!kept) return;
  graphs.forEach((graph, i) => {
    if (kept.views[i]) [graph.zoom, graph.left, graph.top] = kept.views[i];
  });
  switches.forEach((one, i) => one.checked = kept.switches[i]);
  state.layer = kept.layer;
  if (kept.picked && runs[kept.picked.run]) state.picked = { run: runs[kept.picked.run], node: kept.picked.node };
  document.querySelector("details").open = kept.open;
  if (kept.epoch != null) show(Math.max(0, times.findLastIndex(epoch => epoch <= kept.epoch + 1e-9)));
  $(kept.focus)?.focus({ preventScroll: true });
  requestAnimationFrame(() => scrollTo(0, kept.scroll));
}

const ready = start();
