/* Circuits: nodes in columns in the order of computing, edges between them, and what the chosen node listens to. */

const $ = id => document.getElementById(id);
const header = JSON.parse($("header").textContent);
const state = { milliseconds: 0 };
const SVG = "http://www.w3.org/2000/svg";
const COLUMN = 96; /* from column to column, in pixels of the drawing */
const ROW = 17; /* from node to node */
const GAP = 24; /* between groups of nodes in a column */
const TOP = 46;
const ATTENTION = ["query", "key", "value"];
const TOKENS = 3; /* read tokens that are drawn of each node of the embedding */

/* A new element with texts, which stay texts, and other elements in it. */
function element(kind, ...content) {
  const made = document.createElement(kind);
  made.append(...content);
  return made;
}

/* A new element of a drawing, with attributes. */
function drawn(kind, attributes, ...content) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

/* Whitespace that can be seen. */
const SHOWN = { "\n": "\u21b5", "\t": "\u2192", " ": "\u00b7", "\0": "\u2205" };
const visible = text => text.replace(/[\n\t \0]/g, letter => SHOWN[letter]);
const lastOf = site => site.split(".").at(-1);
const outer = site => site.split(".").slice(0, -1).join(".");
const signed = value => (value < 0 ? "\u2212" : "+") + Math.abs(value).toPrecision(3);

class Drawing {
  constructor(circuit) {
    Object.assign(this, circuit);
    this.places = new Map(); /* of nodes by number, and of tokens by name */
    this.columns = this.columnsOf();
    this.place();
    this.most = this.edges.reduce((most, edge) => Math.max(most, Math.abs(edge.weight)), 1e-12);
    this.draw();
  }

  /* Sites that are computed side by side share a column: queries, keys and values of one attention. */
  columnsOf() {
    const columns = [];
    for (const site of this.sites) {
      const last = columns.at(-1);
      const beside = ATTENTION.includes(lastOf(site)) && last && ATTENTION.includes(lastOf(last.sites[0]));
      if (beside && outer(last.sites[0]) === outer(site)) last.sites.push(site);
      else columns.push({ sites: [site] });
    }
    return columns;
  }

  /* Tokens whose weights to a node of the embedding are the largest, and all answers. */
  shownTokens(embedding) {
    const edges = this.edges.filter(edge => edge.token !== null && (edge.source === null) === embedding);
    const kept = new Set();
    for (const node of new Set(edges.map(edge => embedding ? edge.target : edge.source))) {
      const own = edges.filter(edge => (embedding ? edge.target : edge.source) === node);
      own.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
      for (const edge of embedding ? own.slice(0, TOKENS) : own) kept.add(edge);
    }
    return [...kept];
  }

  /* Where everything lies: columns of groups of nodes, a group for each head of attention. */
  place() {
    this.read = this.shownTokens(true);
    this.said = this.shownTokens(false);
    const tokens = edges => [...new Set(edges.map(edge => edge.token))].sort();
    const groups = this.columns.map(({ sites }) => {
      const found = new Map();
      this.nodes.forEach((node, number) => {
        if (!sites.includes(node.site)) return;
        const key = node.head === null ? "" : "head " + (node.head + 1);
        if (!found.has(key)) found.set(key, []);
        found.get(key).push(number);
      });
      return [...found].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
    });
    const all = [
      { title: "tokens", groups: [["", tokens(this.read).map(token => "token " + token)]] },
      ...this.columns.map((column, i) => ({ title: this.titleOf(column.sites), groups: groups[i] })),
      { title: "answers", groups: [["", tokens(this.said).map(token => "answer " + token)]] },
    ].filter(column => column.groups.some(([, items]) => items.length));
    const tall = ({ groups: own }) => own.reduce((sum, [, items]) => sum + ROW * items.length + GAP, -GAP);
    this.height = TOP + Math.max(160, ...all.map(tall)) + 20;
    this.width = COLUMN * all.length;
    this.boxes = [];
    this.titles = all.map((column, i) => [column.title, COLUMN * (i + .5)]);
    all.forEach((column, i) => {
      let y = TOP + (this.height - TOP - tall(column)) / 2;
      for (const [name, items] of column.groups) {
        if (name) this.boxes.push({ name, x: COLUMN * (i + .5), y: y - ROW / 2 - 4, height: ROW * items.length + 8 });
        for (const item of items) {
          this.places.set(item, [COLUMN * (i + .5), y]);
          y += ROW;
        }
        y += GAP;
      }
    });
  }

  /* Two lines: which part, and which of its activations. */
  titleOf(sites) {
    const part = outer(sites[0]).replace("blocks.", "block ").replace(".", ", ");
    return [part, sites.length > 1 ? "q, k, v" : lastOf(sites[0])];
  }

  draw() {
    const svg = drawn("svg", { viewBox: [0, 0, this.width, this.height].join(" "), role: "img" });
    svg.setAttribute("aria-label", this.summary());
    for (const [title, x] of this.titles) {
      const lines = Array.isArray(title) ? title : [title];
      lines.forEach((line, i) => svg.append(drawn("text", { x, y: 12 + 12 * i, class: "title" }, line)));
    }
    for (const { name, x, y, height } of this.boxes) {
      svg.append(drawn("rect", { x: x - 30, y, width: 60, height, rx: 7, class: "head" }));
      svg.append(drawn("text", { x, y: y - 3, class: "title" }, name));
    }
    for (const [from, to] of this.residual()) svg.append(this.line(from, to, { class: "residual" }));
    this.lines = [];
    const shown = [...this.edges.filter(edge => edge.token === null), ...this.read, ...this.said];
    shown.sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight));
    for (const edge of shown) {
      const size = Math.abs(edge.weight) / this.most;
      const style = { "stroke-width": (.6 + 4 * size).toFixed(2), opacity: (.25 + .6 * Math.sqrt(size)).toFixed(2) };
      const line = this.line(...this.endsOf(edge), { class: edge.weight < 0 ? "edge minus" : "edge plus", ...style });
      line.append(drawn("title", {}, this.textOf(edge)));
      svg.append(line);
      this.lines.push([edge, line]);
    }
    for (const [item, [x, y]] of this.places) svg.append(this.dot(item, x, y));
    const caption = element("figcaption", element("span", this.task + ": " + this.summary()));
    $("circuits").append(element("figure", svg, caption));
  }

  summary() {
    const between = this.edges.filter(edge => edge.token === null).length;
    return this.nodes.length + " of " + this.num_nodes.toLocaleString("en") + " nodes, " + between + " of "
      + this.num_weights.toLocaleString("en") + " edges; loss " + this.held_out_loss.toFixed(3) + " nats on other prompts, "
      + "the whole network's " + this.full_held_out_loss.toFixed(3) + "; " + (100 * this.accuracy).toFixed(1) + " % right";
  }

  endsOf({ source, target, token }) {
    return [source ?? "token " + token, target ?? "answer " + token];
  }

  /* Channels of the residual stream: what is written and what later reads it. */
  residual() {
    const order = site => this.sites.indexOf(site);
    const is = (node, names) => names.includes(lastOf(node.site));
    const pairs = [];
    this.nodes.forEach((from, a) => this.nodes.forEach((to, b) => {
      const later = order(from.site) < order(to.site);
      if (later && from.index === to.index && is(from, ["embedded", "write"]) && is(to, ["read"])) pairs.push([a, b]);
    }));
    return pairs;
  }

  line(from, to, attributes) {
    const [[x0, y0], [x1, y1]] = [from, to].map(item => this.places.get(item));
    const bend = Math.max(20, (x1 - x0) / 2);
    return drawn("path", { d: `M${x0},${y0}C${x0 + bend},${y0} ${x1 - bend},${y1} ${x1},${y1}`, ...attributes });
  }

  dot(item, x, y) {
    if (typeof item === "string") {
      const token = visible(item.slice(item.indexOf(" ") + 1));
      return drawn("text", { x, y: y + 4, class: "token" }, token, drawn("title", {}, this.nameOf(item)));
    }
    const node = this.nodes[item];
    const group = drawn("g", { class: "node", tabindex: 0, role: "button" });
    const letter = ATTENTION.includes(lastOf(node.site)) ? lastOf(node.site)[0] : "";
    group.append(drawn("circle", { cx: x, cy: y, r: 5.5 }));
    group.append(drawn("text", { x: x + 9, y: y + 3.5, class: "index" }, letter + node.index));
    group.append(drawn("title", {}, this.nameOf(item)));
    group.setAttribute("aria-label", this.nameOf(item));
    group.addEventListener("focus", () => choose(this, item, group));
    group.addEventListener("pointerenter", () => this.mark(item));
    group.addEventListener("pointerleave", () => this.mark(state.drawing === this ? state.node : null));
    return group;
  }

  nameOf(item) {
    if (typeof item === "string") return item.split(" ")[0] + " " + visible(item.slice(item.indexOf(" ") + 1));
    const { site, index, head } = this.nodes[item];
    const name = site.replace("blocks.", "block ").replaceAll(".", ", ") + " " + index;
    return head === null ? name : name + " (head " + (head + 1) + ")";
  }

  textOf(edge) {
    const [from, to] = this.endsOf(edge);
    return this.nameOf(from) + " to " + this.nameOf(to) + ": " + signed(edge.weight);
  }

  /* Lets the edges of a node stand out; of none, all. */
  mark(item) {
    for (const [edge, line] of this.lines) {
      line.classList.toggle("aside", item !== null && !this.endsOf(edge).includes(item));
    }
  }
}

/* Keeps a node, and says all of it. */
function choose(drawing, item, group) {
  for (const one of document.querySelectorAll(".node.chosen")) one.classList.remove("chosen");
  group.classList.add("chosen");
  state.drawing?.mark(null);
  Object.assign(state, { drawing, node: item });
  drawing.mark(item);
  const node = drawing.nodes[item];
  $("nodeName").textContent = drawing.nameOf(item);
  const into = drawing.edges.filter(edge => edge.target === item);
  const out = drawing.edges.filter(edge => edge.source === item);
  const facts = [["mean", node.mean.toPrecision(3)], ["edges in", into.length], ["edges out", out.length]];
  const told = facts.map(([name, value]) => element("div", element("b", String(value)), element("span", name)));
  $("nodeFacts").replaceChildren(...told);
  $("examplesCard").hidden = !node.examples.length;
  $("examples").replaceChildren(...node.examples.map(([text, value]) => {
    const shown = [...text];
    const context = element("code", visible(shown.slice(0, -1).join("")), element("mark", visible(shown.at(-1) ?? "")));
    return element("tr", element("td", context), element("td", signed(value)));
  }));
  $("edgesCard").hidden = false;
  const rows = [...into, ...out].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).map(edge => {
    const [from, to] = drawing.endsOf(edge);
    const other = edge.target === item ? "from " + drawing.nameOf(from) : "to " + drawing.nameOf(to);
    return element("tr", element("td", other), element("td", signed(edge.weight)));
  });
  $("edges").replaceChildren(...rows);
}

function start() {
  const started = performance.now();
  $("title").textContent = header.name;
  for (const mark of document.querySelectorAll(".legend .came, .legend .went")) mark.parentElement.remove();
  for (const circuit of header.circuits) new Drawing(circuit);
  state.milliseconds = performance.now() - started;
}

const ready = Promise.resolve().then(start);
