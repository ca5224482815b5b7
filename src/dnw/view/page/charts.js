/* Numbers, curves and histograms, and what is told where one points at them. */

/* What is said where a pointer is on a canvas, by the canvas: a function of a place in CSS pixels that gives a text. */
const told = new WeakMap();

/* Shows the values under the pointer, wherever a canvas has some to tell. */
function listenToHover() {
  const tip = $("tip");
  const aside = document.querySelector("aside");
  aside.addEventListener("pointermove", event => {
    const text = told.get(event.target)?.(event.offsetX, event.offsetY) ?? "";
    tip.hidden = !text;
    tip.textContent = text;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - 16 - tip.offsetWidth) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
  aside.addEventListener("pointerleave", () => tip.hidden = true);
}

/* A canvas as large as it is shown, empty, to be drawn on in CSS pixels. */
function cleared(id) {
  const canvas = $(id);
  told.delete(canvas);
  const { width, height } = canvas.getBoundingClientRect();
  const scale = devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.font = font(10);
  return { canvas, context, width, height };
}

/* Says what a canvas shows: its heading, and the numbers on it. */
function describe(canvas, text) {
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", canvas.previousElementSibling.textContent + text);
}

/* The axes of curves and histograms, in CSS pixels. */
const AXES = { left: 40, right: 4, top: 5, bottom: 15 };

/* A number as an axis has room for it. */
function short(value) {
  if (Math.abs(value) >= 1e4) return (value / 1e3).toFixed(0) + "k";
  return Number.isInteger(value) ? String(value) : value.toFixed(2);
}

/* The least and the largest number that an axis is to show. */
function rangeOf(values, zero, outliers) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted[sorted.length >> 1];
  const low = zero ? 0 : sorted[0];
  let high = sorted.at(-1);
  if (outliers && high > 4 * middle) high = 4 * middle; /* else one bad epoch hides all others */
  return [low, high];
}

/* Curves over epochs, each with a colour and points [epoch, number], and a line at the present moment. */
function chart(id, lines, { zero = false, percent = false, outliers = false } = {}) {
  const points = lines.flatMap(line => line.points);
  $(id).parentElement.hidden = !points.length && !header.reload;
  const { canvas, context, width, height } = cleared(id);
  if (!points.length) {
    context.fillStyle = colour("faint");
    context.fillText("no numbers yet", AXES.left, height / 2);
    return;
  }
  const last = Math.max(...points.map(([epoch]) => epoch), times.at(-1), 1e-9);
  let [low, high] = rangeOf(points.map(([, value]) => value), zero, outliers);
  const marks = high > low ? [low, high] : [low];
  if (high <= low) {
    low -= Math.abs(low) * .1 || 1;
    high += Math.abs(high) * .1 || 1;
  }
  const toX = epoch => AXES.left + epoch / last * (width - AXES.left - AXES.right);
  const toY = value => AXES.top + (high - Math.min(high, value)) / (high - low) * (height - AXES.top - AXES.bottom);
  const text = value => percent ? (100 * value).toFixed(high - low < .1 ? 1 : 0) : short(value);

  context.strokeStyle = colour("line");
  context.fillStyle = colour("faint");
  context.textAlign = "right";
  for (const value of marks) {
    stroke(context, [[AXES.left, toY(value)], [width - AXES.right, toY(value)]]);
    context.fillText(text(value), AXES.left - 5, toY(value) + (value === high ? 8 : 0));
  }
  context.fillText(last.toFixed(last < 2 ? 1 : 0), width - AXES.right, height - 3);
  context.textAlign = "left";
  context.fillText("0", AXES.left, height - 3);

  context.lineWidth = 1.6;
  for (const line of lines) {
    const path = line.points.map(([epoch, value]) => [toX(epoch), toY(value)]);
    context.strokeStyle = line.colour;
    context.fillStyle = line.colour;
    context.setLineDash(line.dashed ? [4, 3] : []);
    stroke(context, path);
    if (path.length < 30) for (const [x, y] of path) fillDot(context, x, y);
  }
  const x = toX(times[state.now]);
  context.setLineDash([]);
  context.lineWidth = 1;
  context.strokeStyle = colour("ink");
  context.globalAlpha = .5;
  stroke(context, [[x, AXES.top], [x, height - AXES.bottom]]);
  told.set(canvas, at => {
    const wanted = (at - AXES.left) / (width - AXES.left - AXES.right) * last;
    const near = line => line.points.reduce((best, one) => Math.abs(one[0] - wanted) < Math.abs(best[0] - wanted) ? one : best);
    const found = lines.filter(line => line.points.length).map(line => [line, near(line)]);
    const values = found.map(([line, [, value]]) => (line.name ? line.name + " " : "") + precise(value, percent));
    return "epoch " + found[0][1][0].toFixed(2) + ": " + values.join(", ");
  });
  const latest = lines.map(line => line.points.filter(([epoch]) => epoch <= times[state.now] + 1e-9).at(-1));
  const now = latest.filter(Boolean).map(([, value]) => text(value));
  describe(canvas, now.length ? ", now " + now.join(" and ") : "");
}

/* A number with all its digits that matter. */
function precise(value, percent) {
  if (percent) return (100 * value).toFixed(2) + " %";
  return Number.isInteger(value) ? number(value) : value.toFixed(4);
}

function stroke(context, path) {
  context.beginPath();
  for (const [x, y] of path) context.lineTo(x, y);
  context.stroke();
}

function fillDot(context, x, y) {
  context.beginPath();
  context.arc(x, y, 2, 0, 7);
  context.fill();
}

/* Histograms beside each other, each with a colour and counts; label(i) names the i-th bar. */
function bars(id, sets, label) {
  const { canvas, context, width, height } = cleared(id);
  const count = Math.max(...sets.map(set => set.counts.length));
  const high = Math.max(1, ...sets.flatMap(set => set.counts));
  const each = (width - AXES.left - AXES.right) / count;
  const thin = each * .84 / sets.length;
  sets.forEach((set, k) => {
    context.fillStyle = set.colour;
    set.counts.forEach((value, i) => {
      const tall = value / high * (height - AXES.top - AXES.bottom);
      context.fillRect(AXES.left + i * each + k * thin, height - AXES.bottom - tall, Math.max(1, thin - .5), tall);
    });
  });
  context.fillStyle = colour("faint");
  context.textAlign = "right";
  context.fillText(short(high), AXES.left - 5, AXES.top + 8);
  context.fillText("0", AXES.left - 5, height - AXES.bottom);
  context.textAlign = "center";
  const widest = Math.max(...Array.from({ length: count }, (_, i) => context.measureText(label(i)).width));
  for (let i = 0; i < count; i += Math.max(Math.ceil(count / 9), Math.ceil((widest + 6) / each))) {
    context.fillText(label(i), AXES.left + (i + .42) * each, height - 3);
  }
  told.set(canvas, at => {
    const i = Math.floor((at - AXES.left) / each);
    if (i < 0 || i >= count) return "";
    return label(i) + ": " + sets.map(set => (set.name ? set.name + " " : "") + number(set.counts[i] ?? 0)).join(", ");
  });
  const texts = sets.map(set => set.counts.map((value, i) => label(i) + ": " + value).join(", "));
  describe(canvas, ": " + texts.join("; "));
}

/* A small picture, its pixels given as [red, green, blue], to be drawn larger. */
function bitmap(width, height, pixel) {
  const canvas = element("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  image.data.fill(255);
  for (let i = 0; i < width * height; i++) image.data.set(pixel(i), 4 * i);
  context.putImageData(image, 0, 0);
  return canvas;
}

const edgesText = count => count === 1 ? "1 edge" : number(count) + " edges";

/* Numbers with their names. */
function facts(id, pairs) {
  $(id).replaceChildren(...pairs.map(([name, value]) => element("div", element("b", value), element("span", name))));
}

/* The same of all runs, a column each, headed by what tells the runs apart. */
function factsBeside(id, names, columns) {
  const cells = (kind, texts) => texts.map(text => element(kind, text));
  const heads = runs.map((run, i) => {
    const mark = element("i");
    mark.style.background = "var(--" + TINTS[i % TINTS.length] + ")";
    return element("th", mark, nameApart(run));
  });
  const rows = names.map((name, k) => {
    const head = element("th", name);
    head.scope = "row";
    return element("tr", head, ...cells("td", columns.map(column => column[k] ?? "")));
  });
  for (const head of heads) head.scope = "col";
  $(id).replaceChildren(element("table", element("tr", element("td"), ...heads), ...rows));
}

/* Of the i-th run, in curves. */
const tint = i => colour(TINTS[i % TINTS.length]);

/* The latest number of a kind, with its name; nothing where a run has ended and has none. */
function latest(run, epoch, name, key, text) {
  const known = run.metrics.filter(m => m[key] != null);
  if (!known.length && !header.reload) return [];
  const last = known.filter(m => m.epoch <= epoch + 1e-9).at(-1);
  return [[name, last ? text(last[key]) : "none yet"]];
}

/* Numbers of one run, or of several beside each other. */
function fillFacts(id, columns) {
  if (columns.length === 1) return facts(id, columns[0]);
  const maps = columns.map(column => new Map(column));
  const names = [...new Set(maps.flatMap(map => [...map.keys()]))];
  factsBeside(id, names, maps.map(map => names.map(name => map.get(name))));
}

/* A line or a set of bars of the i-th run: its colour, and its name where there are several. */
const named = (run, i) => ({ colour: tint(i), name: runs.length > 1 ? nameApart(run) : "" });

/* The moment, and what is said and drawn of runs whatever they are of: numbersOf(run, epoch) tells the numbers. */
function drawRuns() {
  const run = runs[0];
  const epoch = times[state.now];
  $("when").textContent = "epoch " + epoch.toFixed(2) + ", step " + number(run.steps[moment(run)]);
  $("when").setAttribute("aria-live", state.playing ? "off" : "polite");
  fillFacts("now", runs.map(one => numbersOf(one, epoch)));
  const measured = (key, dashed, what = "") => runs.map((one, i) => {
    const line = named(one, i);
    const points = one.metrics.map(m => [m.epoch, m[key]]).filter(([, value]) => value != null);
    return { ...line, name: [line.name, what].filter(Boolean).join(" "), dashed, points };
  });
  const counted = key => runs.map((one, i) => ({ ...named(one, i), points: one.epochs.map((e, k) => [e, one[key][k]]) }));
  const come = counted("came").map(line => ({ ...line, points: line.points.slice(1) }));
  chart("accuracy", measured("top1"), { percent: true });
  chart("loss", [...measured("train_loss", false, "training"), ...measured("test_loss", true, "test")], { outliers: true });
  chart("swaps", come, { zero: true });
  chart("alive", counted("alive"));
}
