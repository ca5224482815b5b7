/* A canvas on which one points, zooms and moves. */

const MOST_ZOOM = 40;

class Pane {
  constructor(run, kind) {
    this.run = run;
    this.canvas = element("canvas");
    this.canvas.className = kind;
    this.canvas.setAttribute("role", "img");
    this.canvas.tabIndex = 0;
    this.context = this.canvas.getContext("2d");
    this.numbers = element("span");
    this.reset();
    this.listenToPointers();
    this.listenToKeys();
  }

  /* Its place in the page, with a name and with numbers that say in words what it shows. */
  figure(name) {
    return element("figure", this.canvas, element("figcaption", element("span", name), this.numbers));
  }

  /* --- what those do that know what is on it --- */

  /* A pointer was pressed and let go at a point, without moving. */
  click(x, y) {}

  /* The pointer is over a point of the canvas. */
  hover(x, y) {}

  /* It has left. */
  leave() {}

  /* What is told of a point, if anything. */
  textAt(x, y) {
    return "";
  }

  /* The next thing on it is chosen, by 1, or the one before, by -1. */
  choose(by) {}

  /* --- what one does --- */

  /* A wheel or two fingers zoom, a pointer moves or points, and where it did not move it clicks. */
  listenToPointers() {
    const { canvas } = this;
    const pointers = new Map(); /* where those that are down were last */
    let moved = 0;
    const positionOf = event => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("wheel", event => {
      if (this.zoom === 1 && event.deltaY > 0) return; /* there is nothing to zoom out of: the page scrolls */
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * .0015), ...positionOf(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", event => {
      pointers.set(event.pointerId, positionOf(event));
      moved = 0;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", event => {
      const [x, y] = positionOf(event);
      const from = pointers.get(event.pointerId);
      if (!from) {
        this.pointer = { x, y, left: event.clientX, top: event.clientY };
        this.hover(x, y);
        this.tell();
      } else if (pointers.size === 2) {
        const before = [...pointers.values()];
        pointers.set(event.pointerId, [x, y]);
        moved = Infinity;
        this.pinch(before, [...pointers.values()]);
      } else {
        moved += Math.hypot(x - from[0], y - from[1]);
        if (moved <= 4) return;
        pointers.set(event.pointerId, [x, y]);
        this.left += x - from[0];
        this.top += y - from[1];
        redraw();
      }
    });
    canvas.addEventListener("pointerup", event => {
      pointers.delete(event.pointerId);
      if (moved > 4) return;
      this.click(...positionOf(event));
    });
    canvas.addEventListener("pointercancel", event => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => {
      this.pointer = null;
      $("tip").hidden = true;
      this.leave();
    });
  }

  /* Plus and minus zoom, 0 shows the whole; n and p choose the next thing and the one before. */
  listenToKeys() {
    this.canvas.addEventListener("keydown", event => {
      const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 1e-9 }[event.key];
      const by = { n: 1, p: -1 }[event.key];
      if (!(factor || by) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      if (factor) this.zoomBy(factor, this.width / 2, this.height / 2);
      else this.choose(by);
    });
  }

  /* Two fingers have moved: what was between them stays between them. */
  pinch([a, b], [c, d]) {
    const x = (c[0] + d[0]) / 2;
    const y = (c[1] + d[1]) / 2;
    this.left += x - (a[0] + b[0]) / 2;
    this.top += y - (a[1] + b[1]) / 2;
    const before = Math.max(1, Math.hypot(a[0] - b[0], a[1] - b[1]));
    this.zoomBy(Math.hypot(c[0] - d[0], c[1] - d[1]) / before, x, y);
  }

  mostZoom() {
    return MOST_ZOOM;
  }

  /* Zooms about a point that stays where it is. */
  zoomBy(factor, x, y) {
    const zoom = clamp(this.zoom * factor, 1, this.mostZoom());
    this.left = x - (x - this.left) * zoom / this.zoom;
    this.top = y - (y - this.top) * zoom / this.zoom;
    this.zoom = zoom;
    redraw();
  }

  /* Shows the whole again. */
  reset() {
    this.zoom = 1;
    this.left = 0;
    this.top = 0;
  }

  /* Says what is under the pointer, as it is now. */
  tell() {
    if (!this.pointer) return;
    const tip = $("tip");
    const text = this.textAt(this.pointer.x, this.pointer.y);
    tip.hidden = !text;
    tip.textContent = text;
    tip.style.left = Math.min(innerWidth - 230, this.pointer.left + 14) + "px";
    tip.style.top = this.pointer.top + 14 + "px";
  }

  /* Makes the canvas as large as it is shown, of at most so many dots; whether it has changed. What is on it stays there. */
  fit(dots = Infinity) {
    const { canvas } = this;
    const box = canvas.getBoundingClientRect();
    this.width = box.width;
    this.height = box.height;
    this.left = clamp(this.left, this.width * (1 - this.zoom), 0);
    this.top = clamp(this.top, this.height * (1 - this.zoom), 0);
    canvas.style.touchAction = this.zoom > 1 ? "none" : "pan-y";
    $("whole").hidden = graphs.every(graph => graph.zoom === 1);
    const scale = Math.min(devicePixelRatio || 1, Math.sqrt(dots / Math.max(1, box.width * box.height)));
    const width = Math.max(1, Math.round(box.width * scale));
    const height = Math.max(1, Math.round(box.height * scale));
    const changed = canvas.width !== width || canvas.height !== height || this.scale !== scale;
    if (changed) Object.assign(canvas, { width, height });
    this.scale = scale;
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    return changed;
  }
}
