// The heat map of a prediction, drawn over the query image.

import { contentOf } from "./region.js";

const MIN_OPACITY = 0.05;
const MAX_OPACITY = 0.62; // the image stays visible

export class HeatMap {
  #stage;
  #image;
  #canvas;
  #explanation = null;

  constructor({ stage, image, canvas }) {
    this.#stage = stage;
    this.#image = image;
    this.#canvas = canvas;
    new ResizeObserver(() => this.#place()).observe(stage);
  }

  hide() {
    this.#explanation = null;
    this.#canvas.hidden = true;
  }

  /** Draw the heat map of an explanation. Hide the canvas if there is none. */
  show(explanation) {
    if (!explanation?.heat_map) {
      this.hide();
      return;
    }
    this.#explanation = explanation;
    const rows = explanation.heat_map;
    this.#canvas.height = rows.length;
    this.#canvas.width = rows[0].length;
    const values = rows.flat();
    const low = Math.min(...values);
    const range = Math.max(...values) - low || 1;
    const context = this.#canvas.getContext("2d");
    const pixels = context.createImageData(this.#canvas.width, this.#canvas.height);
    values.forEach((value, index) => {
      const share = (value - low) / range;
      const alpha = MIN_OPACITY + share * (MAX_OPACITY - MIN_OPACITY);
      pixels.data.set([255, 40 + 150 * (1 - share), 20, 255 * alpha], 4 * index);
    });
    context.putImageData(pixels, 0, 0);
    this.#canvas.hidden = false;
    this.#place();
  }

  #place() {
    if (!this.#explanation || !this.#image.naturalWidth) return;
    const [x, y, w, h] = this.#explanation.region;
    const content = contentOf(this.#stage, this.#image);
    const style = this.#canvas.style;
    style.left = `${content.left + x * content.w}px`;
    style.top = `${content.top + y * content.h}px`;
    style.width = `${w * content.w}px`;
    style.height = `${h * content.h}px`;
  }
}
