/* Edges by kind, and many of them as one band. */

/* The kinds of edges: positive and negative ones, such as have just come and just gone. */
const KINDS = ["plus", "minus", "came", "went"];
const [PLUS, MINUS, CAME, WENT] = KINDS.keys();

/* One band, its kinds one below the other; what has gone has a dashed edge. */
function drawBand(context, { x0, x1, start, end, thick }) {
  const bend = (x1 - x0) / 2;
  let y0 = start;
  let y1 = end;
  for (const kind of [CAME, PLUS, MINUS, WENT]) {
    const t = thick[kind];
    if (!t) continue;
    context.globalAlpha = [.5, .5, .75, .3][kind];
    context.fillStyle = colour(KINDS[kind]);
    context.beginPath();
    context.moveTo(x0, y0);
    context.bezierCurveTo(x0 + bend, y0, x1 - bend, y1, x1, y1);
    context.lineTo(x1, y1 + t);
    context.bezierCurveTo(x1 - bend, y1 + t, x0 + bend, y0 + t, x0, y0 + t);
    context.fill();
    if (kind === WENT) {
      context.globalAlpha = .9;
      context.strokeStyle = colour(KINDS[kind]);
      context.setLineDash([4, 3]);
      context.stroke();
      context.setLineDash([]);
    }
    y0 += t;
    y1 += t;
  }
  context.globalAlpha = 1;
}
