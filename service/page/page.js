// The page: takes an image in, asks the service, shows what came back.

import { Problem, recognize, serviceInfo } from "./api.js";
import { startCatalogSearch } from "./catalog.js";
import { Board } from "./draw.js";
import { showExamples } from "./examples.js";
import { HeatMap } from "./heat.js";
import { Region } from "./region.js";
import { showAnswer, showProblem, showWaiting } from "./results.js";

const $ = (id) => document.getElementById(id);
const SETTLE_MS = 350; // a run of key presses or strokes is one question

let picked = null; // the file, paste or example last taken in
let drawn = null; // the drawing as it stands
let image = null; // the query image: one of the two, by mode
let asked = null; // the AbortController of the question under way
let settling = 0;
const knownTypes = new Set();

async function ask() {
  clearTimeout(settling);
  if (!image) return;
  asked?.abort();
  const controller = new AbortController();
  asked = controller;
  const topK = Number($("top-k").value);
  const types = $("types").value.split(",").map((type) => type.trim()).filter(Boolean);
  showWaiting(topK);
  try {
    const { answer, roundTripMs } = await recognize(image, {
      topK, types, box: region.box, explain: image === picked && $("explain").checked, signal: controller.signal,
    });
    showAnswer(answer, roundTripMs, { onType: filterByType, onExplain: (explanation) => heat.show(explanation) });
    learnTypes(answer.predictions);
  } catch (error) {
    if (error.name === "AbortError") return; // a newer question has taken its place
    if (!(error instanceof Problem)) throw error;
    heat.hide();
    showProblem(error, ask);
  }
}

function askSoon() {
  clearTimeout(settling);
  settling = setTimeout(ask, SETTLE_MS);
}

function learnTypes(entities) {
  for (const type of entities.flatMap((entity) => entity.types ?? [])) {
    if (knownTypes.has(type)) continue;
    knownTypes.add(type);
    const option = document.createElement("option");
    option.value = type;
    $("known-types").append(option);
  }
}

function filterByType(type) {
  $("types").value = $("types").value === type ? "" : type;
  ask();
}

// ---- the stage: empty, an image, or the drawing board ----

const region = new Region({
  stage: $("stage"),
  image: $("preview"),
  mark: $("region"),
  onChange: (box) => {
    $("clear-region").hidden = box === null;
    askSoon();
  },
});

const heat = new HeatMap({ stage: $("stage"), image: $("preview"), canvas: $("heat") });

const board = new Board($("board"), {
  palette: $("palette"),
  shapes: $("shapes"),
  size: $("brush-size"),
  onChange: async (isEmpty) => {
    $("undo").disabled = $("clear").disabled = isEmpty;
    $("board-hint").hidden = !isEmpty;
    drawn = image = isEmpty ? null : await board.blob();
    if (drawn) askSoon();
    else clearTimeout(settling);
  },
});

function setMode(mode) {
  const drawing = mode === "draw";
  heat.hide();
  image = drawing ? drawn : picked;
  $("stage").dataset.mode = drawing ? "draw" : picked ? "image" : "empty";
  $("mode-image").setAttribute("aria-pressed", String(!drawing));
  $("mode-draw").setAttribute("aria-pressed", String(drawing));
  $("tools-image").hidden = drawing;
  $("tools-draw").hidden = !drawing;
  $("board").hidden = !drawing;
  $("board-hint").hidden = !drawing || !board.isEmpty;
  $("stage-empty").hidden = $("stage").dataset.mode !== "empty";
  $("preview").hidden = $("stage").dataset.mode !== "image";
  $("preview-blind").hidden = true;
  if (drawing) region.reset();
  $("clear-region").hidden = region.box === null;
}

function takeImage(blob, name) {
  picked = blob;
  region.reset();
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.alt = `The query image: ${name}`;
  preview.src = URL.createObjectURL(blob);
  $("mark-region").disabled = true;
  $("image-hint").textContent = name;
  $("image-hint").title = name;
  setMode("image");
  ask();
  // Stacked, the answers begin below the fold.
  if (matchMedia("(max-width: 900px)").matches) $("answers").scrollIntoView({ block: "start" });
}

$("preview").addEventListener("load", () => {
  $("mark-region").disabled = false;
  $("preview-blind").hidden = true;
  $("image-hint").textContent = "Drag over the image to ask about a part of it.";
});
$("preview").addEventListener("error", () => {
  $("preview").hidden = true;
  $("preview-blind").hidden = false;
});

// ---- ways in ----

for (const [button, input] of [["choose", "file"], ["choose-first", "file"], ["camera", "photo"]]) {
  $(button).addEventListener("click", () => $(input).click());
}
for (const input of [$("file"), $("photo")]) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    if (file) takeImage(file, file.name);
    input.value = ""; // so that choosing the same file again asks again
  });
}

let dragDepth = 0; // dragenter and dragleave come for every child crossed
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (carriesFiles(event)) { dragDepth += 1; document.body.classList.add("dropping"); }
});
document.addEventListener("dragleave", (event) => {
  if (carriesFiles(event) && (dragDepth -= 1) <= 0) { dragDepth = 0; document.body.classList.remove("dropping"); }
});
document.addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  dragDepth = 0;
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  takeImage(file, file.name);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file) return; // text pasted into a field is none of ours
  event.preventDefault();
  takeImage(file, "pasted image");
});

$("mode-image").addEventListener("click", () => setMode("image"));
$("mode-draw").addEventListener("click", () => { setMode("draw"); $("board").focus({ preventScroll: true }); });
$("undo").addEventListener("click", () => board.undo());
$("clear").addEventListener("click", () => board.clear());
$("mark-region").addEventListener("click", () => region.start());
$("clear-region").addEventListener("click", () => region.clear());
$("top-k").addEventListener("change", ask);
$("explain").addEventListener("change", ask);
$("types").addEventListener("change", ask);

// ---- what is being served ----

async function showInfo() {
  const chip = $("bundle");
  try {
    const { bundle, entities, model, device } = await serviceInfo();
    const [name] = bundle.split("@");
    chip.dataset.state = "ready";
    chip.title = bundle;
    $("bundle-name").textContent = name;
    $("bundle-count").textContent = `${entities.toLocaleString("en")} entities`;
    $("model-name").textContent = `${model} on ${device}`;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    chip.dataset.state = "unready";
    $("bundle-name").textContent = error.title;
  }
}

showExamples($("examples"), takeImage);
startCatalogSearch({
  input: $("catalog-query"), list: $("catalog-list"), note: $("catalog-note"), onType: filterByType, onFound: learnTypes,
});
showInfo();
