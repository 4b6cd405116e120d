// Example query images: pictures of entities in the catalog, which are thumbnails or symbols.

import { Problem, sampleEntities, thumbnail } from "./api.js";

const COUNT = 10;
const SAMPLE = 60; // entities asked for, because many may have no picture
const SIZE_PX = 256;

/** Draw a symbol, such as an emoji, with the user's own font. Return null if no font has it in colour. */
function drawn(symbol) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIZE_PX;
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, SIZE_PX, SIZE_PX);
  context.font = `${SIZE_PX * 0.72}px "Apple Color Emoji", "Segoe UI Emoji", "Noto Color Emoji", sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = "#000000";
  context.fillText(symbol, SIZE_PX / 2, SIZE_PX * 0.53);
  if (!isColoured(context)) return null;
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** Return whether any pixel has a colour. Without an emoji font, a character is a black outline or an empty box. */
function isColoured(context) {
  const { data } = context.getImageData(0, 0, SIZE_PX, SIZE_PX);
  for (let i = 0; i < data.length; i += 16) {
    if (Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 40) return true;
  }
  return false;
}

function exampleButton(entity, picture, onPick) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "example";
  button.setAttribute("aria-label", `Example: ${entity.title}`);
  button.title = entity.title;
  const image = document.createElement("img");
  image.alt = "";
  image.src = URL.createObjectURL(picture);
  button.append(image);
  button.addEventListener("click", () => onPick(picture, entity.title));
  return button;
}

async function exampleButtons(onPick) {
  const pictured = (await sampleEntities(SAMPLE)).filter((entity) => entity.has_thumbnail || entity.symbol);
  const step = Math.max(1, pictured.length / COUNT);
  const chosen = pictured.filter((_, i) => Math.floor(i / step) !== Math.floor((i - 1) / step)).slice(0, COUNT);
  const pictures = await Promise.all(
    chosen.map((entity) => (entity.has_thumbnail ? thumbnail(entity.entity_id) : drawn(entity.symbol))),
  );
  return chosen.flatMap((entity, i) => (pictures[i] ? [exampleButton(entity, pictures[i], onPick)] : []));
}

/** Fill `row` with buttons that call `onPick(blob, name)`. Hide `section` if there is no picture, or no access to it. */
export async function showExamples(section, row, onPick) {
  try {
    row.replaceChildren(...await exampleButtons(onPick));
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
  }
  row.removeAttribute("aria-busy");
  section.hidden = row.childElementCount === 0;
}
