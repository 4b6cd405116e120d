// The page: takes an image, or several of one thing, sends them to the service and shows the predictions.

import { Problem, recognize, serviceInfo } from "./api.js";
import { startCatalogSearch } from "./catalog.js";
import { Board } from "./draw.js";
import { showExamples } from "./examples.js";
import { FoundBoxes } from "./found.js";
import { HeatMap } from "./heat.js";
import { takeDropsAndPastes } from "./intake.js";
import { Region } from "./region.js";
import { showAnswer, showProblem, showWaiting } from "./results.js";

const $ = (id) => document.getElementById(id);
const READABLE = "Choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file.";
const FORM_BYTES = 1024; // what the form adds to the file
const DEBOUNCE_MS = 350; // several key presses or strokes make one request

let info = null; // what the service says about itself
let photo = null; // the last file, paste or example
let others = []; // more photographs of the same thing as `photo`
let drawing = null; // the current drawing
let image = null; // the query image: the photo or the drawing, by mode
let pending = null; // the AbortController of the current request
let debounce = 0;
const knownTypes = new Set();

async function recognizeImage() {
  clearTimeout(debounce);
  pending?.abort();
  if (!image) return;
  const images = image === photo ? [photo, ...others] : [image];
  const refusal = info && refusalOf(images);
  if (refusal) {
    showRefusal(new Problem({ ...refusal, status: 413 }));
    return;
  }
  const controller = new AbortController();
  pending = controller;
  const topK = Number($("top-k").value);
  const types = $("types").value.split(",").map((type) => type.trim()).filter(Boolean);
  showWaiting(topK);
  try {
    const one = image === photo && !others.length;
    const { answer, roundTripMs } = await recognize(images, {
      topK, types, box: region.box, regions: one && !region.box && $("find").checked, explain: one && $("explain").checked, signal: controller.signal,
    });
    found.show(answer.regions ?? []);
    showAnswer(answer, roundTripMs, {
      onType: filterByType, onExplain: (prediction) => heat.show(prediction), onRegion: (index) => found.mark(index),
    });
    learnTypes(answer.predictions);
    if (images.length > 1) showViews(images, answer.skipped);
  } catch (error) {
    if (error.name === "AbortError") return; // superseded by a newer request
    if (!(error instanceof Problem)) throw error;
    explainRefusal(error);
    showRefusal(error);
  }
}

/** Return why the service would not take these images, null if it would. */
function refusalOf(images) {
  const size = images.reduce((sum, { size }) => sum + size, 0);
  const { max_body_bytes: maxBytes, max_views: maxViews } = info.limits;
  if (images.length > maxViews) {
    return { title: "Too many files", detail: `You chose ${images.length} files. The service takes up to ${maxViews} of one thing. Choose fewer.` };
  }
  if (size <= maxBytes - images.length * FORM_BYTES) return null;
  const [what, smaller] = images.length > 1 ? [`${images.length} files have`, "fewer or smaller files"] : [`${imageName()} has`, "a smaller file"];
  return { title: "The file is too large", detail: `${what} ${megabytes(size)}. The service takes up to ${megabytes(maxBytes)}. Choose ${smaller}.` };
}

/** Say how many images have one answer, and name those that were skipped. */
function showViews(images, skipped = []) {
  const names = skipped.map(({ index }) => images[index].name ?? `image ${index + 1}`);
  const used = images.length - names.length;
  const text = `${used} ${used === 1 ? "photograph" : "photographs of one thing"}.${names.length ? ` Cannot be read: ${names.join(", ")}.` : ""}`;
  $("image-hint").textContent = $("image-hint").title = text;
  $("status").textContent += ` ${text}`;
}

/** Say in the user's words why the service refused the file. Other problems stay as they are. */
function explainRefusal(problem) {
  if (others.length) return; // the service says which
  const [title, reason] =
    problem.status === 415 ? ["Not an image that can be read", `is not an image. ${READABLE}`]
    : problem.type.endsWith("#problem-undecodable-image") ? ["The image cannot be read", `is damaged or not an image. ${READABLE}`]
    : problem.status === 413 ? ["The image is too large", "has too many bytes or pixels. Choose a smaller one."]
    : [];
  if (!title) return;
  problem.title = title;
  problem.message = `${imageName()} ${reason}`;
}

function showRefusal(problem) {
  pending?.abort(); // its answer is for an earlier image
  heat.hide();
  found.hide();
  showProblem(problem, recognizeImage);
}

const imageName = () => image?.name ?? "This file";
const megabytes = (bytes) => `${Number((bytes / 2 ** 20).toPrecision(2))} MB`;

function recognizeSoon() {
  clearTimeout(debounce);
  debounce = setTimeout(recognizeImage, DEBOUNCE_MS);
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
  recognizeImage();
}

// ---- the stage: empty, an image, or the drawing board ----

const region = new Region({
  stage: $("stage"),
  image: $("preview"),
  mark: $("region"),
  onChange: (box) => {
    if (box === null) $("mark-region").focus(); // the region, or its button, had the focus and is hidden now
    $("clear-region").hidden = box === null;
    recognizeSoon();
  },
});

const heat = new HeatMap({ stage: $("stage"), image: $("preview"), canvas: $("heat"), legend: $("heat-legend") });

const found = new FoundBoxes({ stage: $("stage"), image: $("preview"), layer: $("found") });

const board = new Board($("board"), {
  palette: $("palette"),
  shapes: $("shapes"),
  size: $("brush-size"),
  onChange: async (isEmpty) => {
    if (isEmpty && document.activeElement.closest("#tools-draw")) $("board").focus(); // disabled buttons lose the focus
    $("undo").disabled = $("clear").disabled = isEmpty;
    $("board-hint").hidden = !isEmpty;
    drawing = image = isEmpty ? null : await board.blob();
    if (drawing) recognizeSoon();
    else clearTimeout(debounce);
  },
});

function setMode(mode) {
  const isDrawing = mode === "draw";
  heat.hide();
  found.hide();
  image = isDrawing ? drawing : photo;
  $("stage").dataset.mode = isDrawing ? "draw" : photo ? "image" : "empty";
  $("mode-image").setAttribute("aria-pressed", String(!isDrawing));
  $("mode-draw").setAttribute("aria-pressed", String(isDrawing));
  $("tools-image").hidden = isDrawing;
  $("tools-draw").hidden = !isDrawing;
  $("board").hidden = !isDrawing;
  $("board-hint").hidden = !isDrawing || !board.isEmpty;
  const chooses = document.activeElement === $("choose-first");
  $("stage-empty").hidden = $("stage").dataset.mode !== "empty";
  if (chooses) $("choose").focus({ preventScroll: true });
  $("preview").hidden = $("stage").dataset.mode !== "image";
  $("preview-blind").hidden = true;
  if (isDrawing) region.reset();
  $("clear-region").hidden = region.box === null;
}

/** Take an image, and `more` of the same thing. */
function takeImage(blob, name, more = []) {
  photo = blob;
  others = more;
  region.allowed = !others.length;
  region.reset();
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.alt = `The query image: ${name}`;
  preview.src = URL.createObjectURL(blob);
  $("mark-region").disabled = true;
  $("image-hint").textContent = $("image-hint").title = others.length ? `${others.length + 1} photographs of one thing.` : name;
  setMode("image");
  recognizeImage();
  // On narrow screens the predictions are below the fold.
  if (matchMedia("(max-width: 900px)").matches) $("answers").scrollIntoView({ block: "start" });
}

function takeImages([first, ...more], name) {
  takeImage(first, name, more);
}

$("preview").addEventListener("load", () => {
  $("preview-blind").hidden = true;
  if (others.length) return; // a region or a heat map of one of them would not explain the answer
  $("mark-region").disabled = false;
  $("image-hint").textContent = "Drag over the image to recognise a part of it.";
});
$("preview").addEventListener("error", () => {
  $("preview").hidden = true;
  $("preview-blind").hidden = false;
});

// ---- file, camera, drop, paste and example ----

for (const [button, input] of [["choose", "file"], ["choose-first", "file"], ["camera", "photo"]]) {
  $(button).addEventListener("click", () => $(input).click());
}
for (const input of [$("file"), $("photo")]) {
  input.addEventListener("change", () => {
    if (input.files.length) takeImages([...input.files], input.files[0].name);
    input.value = ""; // so that choosing the same file again fires "change"
  });
}

takeDropsAndPastes(takeImages, showRefusal);

$("mode-image").addEventListener("click", () => setMode("image"));
$("mode-draw").addEventListener("click", () => { setMode("draw"); $("board").focus({ preventScroll: true }); });
$("undo").addEventListener("click", () => board.undo());
$("clear").addEventListener("click", () => board.clear());
$("mark-region").addEventListener("click", () => region.start());
$("clear-region").addEventListener("click", () => region.clear());
for (const id of ["top-k", "explain", "find", "types"]) $(id).addEventListener("change", recognizeImage);

// ---- the bundle ----

async function showInfo() {
  const chip = $("bundle");
  try {
    info = await serviceInfo();
    const { bundle, entities, model, device } = info;
    const [name] = bundle.split("@");
    chip.dataset.state = "ready";
    chip.title = bundle;
    $("bundle-name").textContent = name;
    $("bundle-count").textContent = `${entities.toLocaleString("en")} entities`;
    $("model-name").textContent = `${model} on ${device}`;
    $("modes").hidden = model !== "tiny"; // other encoders are for photographs
    $("explain-label").hidden = !info.heat_maps;
    $("find-label").hidden = !info.regions;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    chip.dataset.state = "unready";
    $("bundle-name").textContent = error.title;
  }
}

startCatalogSearch({
  input: $("catalog-query"), list: $("catalog-list"), note: $("catalog-note"), onType: filterByType, onFound: learnTypes,
});
showInfo();
showExamples($("examples-section"), $("examples"), takeImage);
