// The heat map of a prediction, drawn over the query image.

import { contentOf } from "./region.js";

const MAX_OPACITY = 0.7; // the image stays visible
const CLEAR_RANGE = 0.1; // a map whose cosines differ by less says little, and is fainter

export class HeatMap {
  #stage;
  #image;
  #canvas;
  #legend;
  #explanation = null;

  constructor({ stage, image, canvas, legend }) {
    this.#stage = stage;
    this.#image = image;
    this.#canvas = canvas;
    this.#legend = legend;
    new ResizeObserver(() => this.#place()).observe(stage);
  }

  hide() {
    this.#explanation = null;
    this.#canvas.hidden = this.#legend.hidden = true;
  }

  /** Draw the heat map of a prediction. Hide it if there is none. Patches below the average are transparent. */
  show(prediction) {
    const explanation = prediction?.explanation;
    if (!explanation?.heat_map) {
      this.hide();
      return;
    }
    this.#explanation = explanation;
    const rows = explanation.heat_map;
    this.#canvas.height = rows.length;
    this.#canvas.width = rows[0].length;
    const values = rows.flat();
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const low = Math.min(...values);
    const high = Math.max(...values);
    const opacity = MAX_OPACITY * Math.min(1, (high - low) / CLEAR_RANGE);
    const context = this.#canvas.getContext("2d");
    const pixels = context.createImageData(this.#canvas.width, this.#canvas.height);
    values.forEach((value, index) => {
      const share = Math.max(0, (value - mean) / (high - mean || 1));
      pixels.data.set([255, 40 + 150 * (1 - share), 20, 255 * opacity * share], 4 * index);
    });
    context.putImageData(pixels, 0, 0);
    this.#canvas.hidden = this.#legend.hidden = false;
    this.#legend.querySelector("b").textContent = prediction.title;
    this.#legend.title = `Cosine of each part of the image with ${prediction.title}: ${low.toFixed(2)} to ${high.toFixed(2)}`;
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
