// Example query images, drawn in the browser: flags made of shapes, and emoji from the user's own font.

const SIZE_PX = 256;

function canvas() {
  const square = document.createElement("canvas");
  square.width = square.height = SIZE_PX;
  const context = square.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, SIZE_PX, SIZE_PX);
  return [square, context];
}

/** Return a 2:3 flag on a white square. `paint(context)` draws it on 240 by 160 pixels. */
function flag(paint) {
  const [square, context] = canvas();
  context.translate(8, 48);
  context.beginPath();
  context.rect(0, 0, 240, 160);
  context.clip();
  paint(context);
  return square;
}

function fill(context, colour, x, y, w, h) {
  context.fillStyle = colour;
  context.fillRect(x, y, w, h);
}

function stripes(colours, { upright = false } = {}) {
  return flag((context) => colours.forEach((colour, i) => {
    const share = 1 / colours.length;
    if (upright) fill(context, colour, i * share * 240, 0, share * 240 + 1, 160);
    else fill(context, colour, 0, i * share * 160, 240, share * 160 + 1);
  }));
}

function disc(field, colour, radiusPx) {
  return flag((context) => {
    fill(context, field, 0, 0, 240, 160);
    context.fillStyle = colour;
    context.beginPath();
    context.arc(120, 80, radiusPx, 0, 2 * Math.PI);
    context.fill();
  });
}

function nordicCross(field, cross) {
  return flag((context) => {
    fill(context, field, 0, 0, 240, 160);
    fill(context, cross, 75, 0, 30, 160);
    fill(context, cross, 0, 65, 240, 30);
  });
}

function emoji(character) {
  const [square, context] = canvas();
  context.font = `${SIZE_PX * 0.72}px "Apple Color Emoji", "Segoe UI Emoji", "Noto Color Emoji", sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = "#000000";
  context.fillText(character, SIZE_PX / 2, SIZE_PX * 0.53);
  return isColoured(context) ? square : null;
}

/** Return whether any pixel has a colour. Without an emoji font, a character is a black outline or an empty box. */
function isColoured(context) {
  const { data } = context.getImageData(0, 0, SIZE_PX, SIZE_PX);
  for (let i = 0; i < data.length; i += 16) {
    if (Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 40) return true;
  }
  return false;
}

const EXAMPLES = [
  ["Giraffe", () => emoji("🦒")],
  ["Three upright stripes: blue, white, red", () => stripes(["#1f3f94", "#ffffff", "#d8303b"], { upright: true })],
  ["Rocket", () => emoji("🚀")],
  ["A red disc on white", () => disc("#ffffff", "#bc2339", 48)],
  ["Pizza", () => emoji("🍕")],
  ["A yellow cross on blue", () => nordicCross("#1c5ba2", "#f7c934")],
  ["Octopus", () => emoji("🐙")],
  ["Three stripes: black, red, gold", () => stripes(["#141414", "#d8232a", "#f9c80e"])],
  ["Violin", () => emoji("🎻")],
  ["Three upright stripes: green, white, orange", () => stripes(["#1f9a5f", "#ffffff", "#f58a3c"], { upright: true })],
];

/** Fill `row` with buttons that call `onPick(blob, name)`. */
export function showExamples(row, onPick) {
  for (const [name, draw] of EXAMPLES) {
    const picture = draw();
    if (!picture) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "example";
    button.setAttribute("aria-label", `Example: ${name}`);
    button.title = name;
    button.append(picture);
    button.addEventListener("click", () => picture.toBlob((blob) => onPick(blob, name), "image/png"));
    row.append(button);
  }
}
