// A small drawing board. It stores a list of strokes and redraws them all after each change, so undo is exact.

const COLOURS = [
  ["black", "#1f2024"], ["grey", "#8d939e"], ["white", "#ffffff"], ["brown", "#7a4a2b"],
  ["red", "#dc2f36"], ["orange", "#f28c28"], ["yellow", "#fbd13d"], ["green", "#2f9e52"],
  ["teal", "#38b6c9"], ["blue", "#2356c7"], ["purple", "#7c4dbd"], ["pink", "#f48fb1"],
];
const KEY_STEP_PX = 12;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Board {
  #canvas;
  #context;
  #strokes = [];
  #current = null;
  #colour = COLOURS[0][1];
  #shape = "brush";
  #sizePx = 18;
  #pen = { x: 256, y: 256, down: false };
  #onChange;

  /** `onChange(isEmpty)` is called after each stroke, undo and clear. */
  constructor(canvas, { palette, shapes, size, onChange }) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#onChange = onChange;
    this.#makePalette(palette);
    shapes.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      this.#shape = button.dataset.shape;
      press(shapes, button);
    });
    size.addEventListener("input", () => { this.#sizePx = Number(size.value); });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", () => this.#finish());
    canvas.addEventListener("pointercancel", () => this.#finish());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => { if (this.#pen.down) this.#finish(); this.#pen.down = false; this.#paint(); });
    this.#paint();
  }

  get isEmpty() {
    return this.#strokes.length === 0;
  }

  undo() {
    this.#strokes.pop();
    this.#paint();
    this.#onChange(this.isEmpty);
  }

  clear() {
    this.#strokes = [];
    this.#paint();
    this.#onChange(true);
  }

  /** Return the drawing as a PNG blob, without the keyboard's crosshair. */
  blob() {
    this.#paint({ crosshair: false });
    return new Promise((resolve) => this.#canvas.toBlob((blob) => {
      this.#paint();
      resolve(blob);
    }, "image/png"));
  }

  #makePalette(palette) {
    for (const [name, value] of COLOURS) {
      const swatch = document.createElement("button");
      swatch.type = "button";
      swatch.className = "swatch-button";
      swatch.style.setProperty("--colour", value);
      swatch.setAttribute("aria-label", name);
      swatch.title = name;
      swatch.setAttribute("aria-pressed", String(value === this.#colour));
      swatch.addEventListener("click", () => { this.#colour = value; press(palette, swatch); });
      palette.append(swatch);
    }
  }

  #point(event) {
    const bounds = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - bounds.left) / bounds.width) * this.#canvas.width,
      y: ((event.clientY - bounds.top) / bounds.height) * this.#canvas.height,
    };
  }

  #begin(point) {
    this.#current = { shape: this.#shape, colour: this.#colour, sizePx: this.#sizePx, points: [point] };
  }

  #down(event) {
    if (!event.isPrimary || event.button !== 0) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#pen.down = false;
    this.#begin(this.#point(event));
    this.#paint();
  }

  #move(event) {
    if (!this.#current || this.#pen.down || !event.isPrimary) return;
    // Coalesced events keep fast strokes smooth: without them there is one point per frame.
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) this.#current.points.push(this.#point(each));
    this.#paint();
  }

  #finish() {
    if (!this.#current) return;
    this.#strokes.push(this.#current);
    this.#current = null;
    this.#paint();
    this.#onChange(false);
  }

  #key(event) {
    if (event.key === " ") {
      event.preventDefault();
      this.#pen.down = !this.#pen.down;
      if (this.#pen.down) this.#begin({ x: this.#pen.x, y: this.#pen.y });
      else this.#finish();
      this.#paint();
      return;
    }
    const direction = ARROWS[event.key];
    if (!direction) return;
    event.preventDefault();
    const limit = this.#canvas.width;
    this.#pen.x = Math.max(0, Math.min(limit, this.#pen.x + direction[0] * KEY_STEP_PX));
    this.#pen.y = Math.max(0, Math.min(limit, this.#pen.y + direction[1] * KEY_STEP_PX));
    if (this.#pen.down) this.#current.points.push({ x: this.#pen.x, y: this.#pen.y });
    this.#paint();
  }

  #paint({ crosshair = true } = {}) {
    const context = this.#context;
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
    for (const stroke of this.#current ? [...this.#strokes, this.#current] : this.#strokes) paintStroke(context, stroke);
    if (crosshair && this.#canvas.matches(":focus-visible")) this.#paintCrosshair();
  }

  #paintCrosshair() {
    const { x, y, down } = this.#pen;
    const context = this.#context;
    context.strokeStyle = down ? "#dc2f36" : "#3552b8";
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(x - 12, y);
    context.lineTo(x + 12, y);
    context.moveTo(x, y - 12);
    context.lineTo(x, y + 12);
    context.stroke();
  }
}

function press(group, chosen) {
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === chosen));
}

function paintStroke(context, { shape, colour, sizePx, points }) {
  const first = points[0];
  const last = points.at(-1);
  context.fillStyle = context.strokeStyle = colour;
  context.lineWidth = sizePx;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  if (shape === "rectangle") {
    context.fillRect(Math.min(first.x, last.x), Math.min(first.y, last.y), Math.abs(last.x - first.x), Math.abs(last.y - first.y));
  } else if (shape === "ellipse") {
    context.ellipse((first.x + last.x) / 2, (first.y + last.y) / 2, Math.abs(last.x - first.x) / 2, Math.abs(last.y - first.y) / 2, 0, 0, 2 * Math.PI);
    context.fill();
  } else if (points.length === 1) {
    context.arc(first.x, first.y, sizePx / 2, 0, 2 * Math.PI);
    context.fill();
  } else {
    context.moveTo(first.x, first.y);
    for (let i = 1; i < points.length - 1; i += 1) {
      const middle = { x: (points[i].x + points[i + 1].x) / 2, y: (points[i].y + points[i + 1].y) / 2 };
      context.quadraticCurveTo(points[i].x, points[i].y, middle.x, middle.y);
    }
    context.lineTo(last.x, last.y);
    context.stroke();
  }
}
