/* What the page was written with: runs, their nodes and edges, and how these change from snapshot to snapshot. */

/* How many of the values of each snapshot, so many for each, are not zero. */
function countEach(values, each, snapshots) {
  const counts = new Array(snapshots).fill(0);
  for (let s = 0; s < snapshots; s++) {
    for (let i = s * each; i < (s + 1) * each; i++) counts[s] += values[i] !== 0;
  }
  return counts;
}

/* A run. Nodes and edges have numbers; what changes with time lies in one array, snapshot after snapshot. */
class Run {
  constructor(described, array) {
    Object.assign(this, described);
    this.x = array(described.x);
    this.y = array(described.y);
    this.sources = array(described.sources);
    this.targets = array(described.targets);
    this.nodes = this.x.length;
    this.num = this.sources.length;
    this.snapshots = this.steps.length;
    this.strengths = addUp(array(described.strengths), this.num);
    this.live = addUp(array(described.live), this.nodes);
    this.filters = addUp(array(described.filters), 9 * this.nodes);
    const shaped = one => ({ shape: one.shape, values: array(one) });
    this.images = described.images && shaped(described.images);
    this.maps = described.maps.map(({ snapshot, graphs }) => ({ snapshot, graphs: graphs.map(shaped) }));
    this.edges = countEach(this.strengths, this.num, this.snapshots);
    this.alive = countEach(this.live, this.nodes, this.snapshots);
    this.numberNodes();
  }

  /* Notes for each node its graph, its level there, and which it is of the level. */
  numberNodes() {
    this.graphOf = [];
    this.level = [];
    this.index = [];
    this.graphs.forEach((graph, g) => graph.levels.forEach((size, level) => {
      for (let i = 0; i < size; i++) {
        this.graphOf.push(g);
        this.level.push(level);
        this.index.push(i);
      }
    }));
  }

  strength(s, e) {
    return this.strengths[s * this.num + e];
  }

  isLive(s, n) {
    return this.live[s * this.nodes + n] !== 0;
  }

  /* Calls visit(source, target, strength) for each edge of a snapshot. */
  eachEdge(s, visit) {
    for (let e = 0, at = s * this.num; e < this.num; e++, at++) {
      if (this.strengths[at]) visit(this.sources[e], this.targets[e], this.strengths[at]);
    }
  }

  /* How many edges of a snapshot come in and go out, for each node. */
  degrees(s) {
    const into = new Uint32Array(this.nodes);
    const out = new Uint32Array(this.nodes);
    this.eachEdge(s, (source, target) => {
      into[target]++;
      out[source]++;
    });
    return { into, out };
  }

  /* The same for one node. */
  degree(s, node) {
    const { into, out } = this.degrees(s);
    return { into: into[node], out: out[node] };
  }

  /* What precedes names where there are several graphs. */
  prefix(g) {
    return this.graphs.length > 1 ? this.graphs[g].name + ", " : "";
  }

  nodeName(n) {
    const g = this.graphOf[n];
    const graph = this.graphs[g];
    const level = this.level[n];
    const kind = level === 0 ? "input" : level === graph.levels.length - 1 ? "output" : "node";
    const where = graph.static && kind === "node" ? " of level " + level : "";
    return this.prefix(g) + kind + " " + (this.index[n] + 1) + where;
  }

  /* Whether a node is among the last of its graph, which other layers read. */
  isOutput(n) {
    return this.level[n] === this.graphs[this.graphOf[n]].levels.length - 1;
  }

  levelName(g, level) {
    const last = this.graphs[g].levels.length - 1;
    return this.prefix(g) + (level === 0 ? "inputs" : level === last ? "outputs" : "level " + level);
  }

  /* The last snapshot that is not after an epoch. */
  at(epoch) {
    let s = 0;
    while (s + 1 < this.snapshots && this.epochs[s + 1] <= epoch + 1e-9) s++;
    return s;
  }

  /* The strength from which on an edge belongs to about the strongest tenth of a snapshot. */
  strongTenth(s) {
    const counts = new Uint32Array(header.strongest + 1);
    this.eachEdge(s, (source, target, strength) => counts[Math.abs(strength)]++);
    let rest = this.active[s] / 10;
    let bound = header.strongest;
    while (bound > 1 && (rest -= counts[bound]) > 0) bound--;
    return bound;
  }

  /* How many nodes have no edges, one, two or three, four to seven, and so on by powers of two. */
  degreeCounts(s) {
    const { into, out } = this.degrees(s);
    const counts = [];
    for (let n = 0; n < this.nodes; n++) {
      const degree = into[n] + out[n];
      const bin = degree ? 1 + Math.floor(Math.log2(degree)) : 0;
      counts[bin] = (counts[bin] ?? 0) + 1;
    }
    return Array.from(counts, count => count ?? 0);
  }

  /* How many edges skip no level, one, two, and so on. */
  skipCounts(s) {
    const counts = [];
    this.eachEdge(s, (source, target) => {
      const levels = this.graphs[this.graphOf[source]].static;
      const skipped = levels ? Math.max(0, this.level[target] - this.level[source] - 1) : 0;
      counts[skipped] = (counts[skipped] ?? 0) + 1;
    });
    return Array.from(counts, count => count ?? 0);
  }
}
