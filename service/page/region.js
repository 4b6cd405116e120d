// The region of the query image to recognise: drawn with the pointer, moved and resized with pointer or keyboard.

const MIN_SIDE = 0.04; // in fractions of the image; a smaller drag counts as a click
const KEY_STEP = 0.02;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const OPPOSITE = { nw: "se", ne: "sw", sw: "ne", se: "nw" };

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

const cornerOf = ({ x, y, w, h }, corner) => ({ x: corner.includes("w") ? x : x + w, y: corner.includes("n") ? y : y + h });

const boxBetween = (a, b) => ({ x: Math.min(a.x, b.x), y: Math.min(a.y, b.y), w: Math.abs(a.x - b.x), h: Math.abs(a.y - b.y) });

/** Return a coordinate moved by `step`, at least `MIN_SIDE` from the opposite side and inside the image. */
function moved(at, opposite, step) {
  return at < opposite ? clamp(at + step, 0, opposite - MIN_SIDE) : clamp(at + step, opposite + MIN_SIDE, 1);
}

/** Return the rectangle, in CSS pixels, that an image fitted into the stage covers. */
export function contentOf(stage, image) {
  const width = stage.clientWidth;
  const height = stage.clientHeight;
  const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
  const w = image.naturalWidth * scale;
  const h = image.naturalHeight * scale;
  return { left: (width - w) / 2, top: (height - h) / 2, w, h };
}

export class Region {
  allowed = true; // whether the image may have a region
  #stage;
  #image;
  #mark;
  #box = null;
  #drag = null;
  #marking = false;
  #onChange;

  /** `onChange(box)` receives {x, y, w, h} in fractions of the image, or null for the whole image. */
  constructor({ stage, image, mark, onChange }) {
    this.#stage = stage;
    this.#image = image;
    this.#mark = mark;
    this.#onChange = onChange;
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#move(event));
    stage.addEventListener("pointerup", () => this.#up());
    stage.addEventListener("pointercancel", () => this.#cancel());
    mark.addEventListener("keydown", (event) => this.#key(event));
    image.addEventListener("dragstart", (event) => event.preventDefault());
    new ResizeObserver(() => this.#show()).observe(stage);
  }

  get box() {
    return this.#box;
  }

  /** Remove the region without calling `onChange`, for a new image. */
  reset() {
    this.#box = this.#drag = null;
    this.#setMarking(false);
    this.#show();
  }

  /** Remove the region and call `onChange(null)`. */
  clear() {
    this.reset();
    this.#onChange(null);
  }

  /** Place a region in the middle, focus it for the keyboard, and let touch draw regions. */
  start() {
    this.#setMarking(true);
    this.#box ??= { x: 0.25, y: 0.25, w: 0.5, h: 0.5 };
    this.#show();
    this.#mark.focus();
    this.#onChange(this.#box);
  }

  #setMarking(on) {
    this.#marking = on;
    this.#stage.classList.toggle("marking", on);
  }

  #content() {
    return contentOf(this.#stage, this.#image);
  }

  #fraction(event) {
    const bounds = this.#stage.getBoundingClientRect();
    const content = this.#content();
    return {
      x: clamp((event.clientX - bounds.left - this.#stage.clientLeft - content.left) / content.w, 0, 1),
      y: clamp((event.clientY - bounds.top - this.#stage.clientTop - content.top) / content.h, 0, 1),
    };
  }

  #down(event) {
    const ready = this.allowed && this.#stage.dataset.mode === "image" && this.#image.naturalWidth > 0;
    const { corner } = event.target.dataset;
    // A touch drag scrolls the page, unless the user chose to mark a region or touches a handle.
    if (!ready || !event.isPrimary || event.button !== 0 || (event.pointerType === "touch" && !this.#marking && !corner)) return;
    const at = this.#fraction(event);
    const inside = this.#box && event.target === this.#mark;
    this.#drag = { from: corner ? cornerOf(this.#box, OPPOSITE[corner]) : at, before: this.#box, moving: inside ? { ...this.#box } : null };
    this.#stage.setPointerCapture(event.pointerId);
  }

  #move(event) {
    if (!this.#drag) return;
    const { from, moving } = this.#drag;
    const at = this.#fraction(event);
    this.#box = moving
      ? { ...moving, x: clamp(moving.x + at.x - from.x, 0, 1 - moving.w), y: clamp(moving.y + at.y - from.y, 0, 1 - moving.h) }
      : boxBetween(from, at);
    this.#show();
  }

  #up() {
    if (!this.#drag) return;
    const { before, moving } = this.#drag;
    this.#drag = null;
    const drawn = this.#box;
    if (!moving && (drawn === before || drawn === null || drawn.w < MIN_SIDE || drawn.h < MIN_SIDE)) {
      this.#box = before;
      this.#show();
      return;
    }
    this.#show();
    this.#onChange(this.#box);
  }

  #cancel() {
    if (!this.#drag) return;
    this.#box = this.#drag.before;
    this.#drag = null;
    this.#show();
  }

  #key(event) {
    if (event.key === "Escape") {
      this.clear();
      return;
    }
    const direction = ARROWS[event.key];
    if (!direction || !this.#box) return;
    event.preventDefault();
    const { x, y, w, h } = this.#box;
    const [dx, dy] = [direction[0] * KEY_STEP, direction[1] * KEY_STEP];
    const { corner } = event.target.dataset;
    if (corner) {
      const fixed = cornerOf(this.#box, OPPOSITE[corner]);
      const at = cornerOf(this.#box, corner);
      this.#box = boxBetween(fixed, { x: moved(at.x, fixed.x, dx), y: moved(at.y, fixed.y, dy) });
    } else this.#box = event.shiftKey
      ? { x, y, w: clamp(w + dx, MIN_SIDE, 1 - x), h: clamp(h + dy, MIN_SIDE, 1 - y) }
      : { x: clamp(x + dx, 0, 1 - w), y: clamp(y + dy, 0, 1 - h), w, h };
    this.#show();
    this.#onChange(this.#box);
  }

  #show() {
    this.#mark.hidden = this.#box === null;
    if (!this.#box || !this.#image.naturalWidth) return;
    const content = this.#content();
    this.#mark.style.left = `${content.left + this.#box.x * content.w}px`;
    this.#mark.style.top = `${content.top + this.#box.y * content.h}px`;
    this.#mark.style.width = `${this.#box.w * content.w}px`;
    this.#mark.style.height = `${this.#box.h * content.h}px`;
  }
}
