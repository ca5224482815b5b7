/* How numbers travel in the page. */

/* Reads the runs from the one compressed block of numbers in the page. */
async function unpack() {
  const bytes = Uint8Array.from(atob($("data").textContent.trim()), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const block = await new Response(stream).arrayBuffer();
  const kinds = { float32: Float32Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array, uint16: Uint16Array };
  const array = described => new kinds[described.type](block, described.at, described.length);
  return header.runs.map(described => new Run(described, array));
}

/* Turns differences to the snapshot before, so many for each, into values, in place. */
function addUp(differences, each) {
  for (let i = each; i < differences.length; i++) differences[i] += differences[i - each];
  return differences;
}
