// Where in the query image a prediction matches: its heat map, laid over the image.

import { contentOf } from "./region.js";

const COLDEST = 0.05; // of the opacity, so that the image stays to be seen
const HOTTEST = 0.62;

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

  /** Draw an explanation of the service, or nothing where it has no heat map. */
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
    values.forEach((value, place) => {
      const share = (value - low) / range;
      const alpha = COLDEST + share * (HOTTEST - COLDEST);
      pixels.data.set([255, 40 + 150 * (1 - share), 20, 255 * alpha], 4 * place);
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
