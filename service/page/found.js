// The things found in the query image: numbered boxes over it.

import { element } from "./entity.js";
import { contentOf } from "./region.js";

export class FoundBoxes {
  #stage;
  #image;
  #layer;
  #regions = [];

  constructor({ stage, image, layer }) {
    this.#stage = stage;
    this.#image = image;
    this.#layer = layer;
    new ResizeObserver(() => this.#place()).observe(stage);
  }

  /** Draw a box for each region, numbered from 1. */
  show(regions) {
    this.#regions = regions;
    this.#layer.replaceChildren(...regions.map((_, index) => element("span", "found-box", String(index + 1))));
    this.#layer.hidden = regions.length === 0;
    this.#place();
  }

  hide() {
    this.show([]);
  }

  /** Emphasise the box of one region, -1 for none. */
  mark(index) {
    [...this.#layer.children].forEach((box, number) => box.classList.toggle("marked", number === index));
  }

  #place() {
    if (!this.#image.naturalWidth) return;
    const content = contentOf(this.#stage, this.#image);
    this.#regions.forEach(({ box: [x, y, w, h] }, index) => {
      const { style } = this.#layer.children[index];
      style.left = `${content.left + x * content.w}px`;
      style.top = `${content.top + y * content.h}px`;
      style.width = `${w * content.w}px`;
      style.height = `${h * content.h}px`;
    });
  }
}
