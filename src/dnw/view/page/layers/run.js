/* What the page was written with: runs, their layers, and how these change from snapshot to snapshot. */

/* A run. Layers have numbers; what changes with time lies in one array, snapshot after snapshot. */
class Run {
  constructor(described, array) {
    Object.assign(this, described);
    this.snapshots = this.steps.length;
    this.layers = described.layers.map(layer => new Layer(layer, array, this.snapshots));
    this.numberOf = new Map(this.layers.map((layer, l) => [layer.name, l]));
    const summed = key => this.steps.map((_, s) => this.layers.reduce((sum, layer) => sum + layer[key][s], 0));
    this.edges = this.active = summed("active");
    this.came = summed("came");
    this.went = summed("went");
    this.candidates = this.layers.reduce((sum, layer) => sum + layer.candidates, 0);
    this.nodes = this.layers.reduce((sum, layer) => sum + layer.targets + layer.sources, 0);
    const unused = this.steps.map((_, s) => this.layers.reduce((sum, l) => sum + l.unused("into", s) + l.unused("out", s), 0));
    this.alive = unused.map(count => this.nodes - count);
    for (const block of this.blocks) {
      const layer = this.layers[this.numberOf.get(block.name)];
      if (block.kind === "layer" && layer) Object.assign(layer, { heads: block.heads, headsRead: block.heads_read });
    }
  }

  /* The last snapshot that is not after an epoch. */
  at(epoch) {
    let s = 0;
    while (s + 1 < this.snapshots && this.epochs[s + 1] <= epoch + 1e-9) s++;
    return s;
  }
}

/* One layer: its matrix has targets down and sources across. */
class Layer {
  constructor(described, array, snapshots) {
    Object.assign(this, { heads: 1, headsRead: 1 }, described);
    this.into = addUp(array(described.into), this.targets);
    this.out = addUp(array(described.out), this.sources);
    const [height, width] = described.shares.shape;
    const shares = addUp(array(described.shares.values), height * width); /* modulo 256, so a share above a half is negative */
    this.shares = { ...described.shares, values: new Uint8Array(shares.buffer, shares.byteOffset, shares.length) };
    this.weights = new Map(described.weights.map(one => [one.snapshot, { ...one, values: array(one.values) }]));
  }

  density(s) {
    return this.active[s] / this.candidates;
  }

  /* Edges of each target, or of each source, at a snapshot: key is "into" or "out". */
  degrees(key, s) {
    const size = key === "into" ? this.targets : this.sources;
    return this[key].subarray(s * size, (s + 1) * size);
  }

  /* How many targets, or sources, have no edge. */
  unused(key, s) {
    let count = 0;
    for (const degree of this.degrees(key, s)) count += degree === 0;
    return count;
  }

  /* How many have no edges, one, two or three, four to seven, and so on by powers of two. */
  degreeCounts(key, s) {
    const counts = [];
    for (const degree of this.degrees(key, s)) {
      const bin = degree ? 1 + Math.floor(Math.log2(degree)) : 0;
      counts[bin] = (counts[bin] ?? 0) + 1;
    }
    return Array.from(counts, count => count ?? 0);
  }

  /* The matrix at a snapshot: { side, shape, values } of blocks, with signs where weights are stored and wanted. */
  matrix(s, signs) {
    const weights = signs ? this.weights.get(s) : null;
    if (weights) return { ...weights, signed: true };
    const size = this.shares.shape[0] * this.shares.shape[1];
    return { ...this.shares, values: this.shares.values.subarray(s * size, (s + 1) * size), signed: false };
  }

  /* What a target is called, or a source: its number, and which head of attention it belongs to. */
  nodeName(key, i) {
    const heads = key === "target" ? this.heads : this.headsRead;
    const name = key + " " + (i + 1) + (key === "source" && this.num_groups > 1 ? " of its group" : "");
    return heads > 1 ? name + " (" + this.headName(heads, Math.floor(i * heads / this.sizeOf(key))) + ")" : name;
  }

  sizeOf(key) {
    return key === "target" ? this.targets : this.sources;
  }

  /* Where one layer makes queries, keys and values, its heads are those of all three. */
  headName(heads, head) {
    const times = heads % 3 === 0 && this.targets === 3 * this.sources ? 3 : 1;
    const what = times === 3 ? ["query ", "key ", "value "][Math.floor(3 * head / heads)] : "";
    return what + "head " + (head % (heads / times) + 1);
  }
}
