// The results: predictions, abstention, problems and timings.

import { storeKey } from "./api.js";
import { element, entityTile, entityTitle, entityTypes } from "./entity.js";

const $ = (id) => document.getElementById(id);
const STAGES = ["decode", "queue", "encode", "search"];

function milliseconds(value) {
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

/** Format a confidence. Never 0 or 100 %: no calibration is that certain. */
function percent(confidence) {
  const rounded = Math.round(confidence * 100);
  return rounded > 99 ? "> 99 %" : rounded < 1 ? "< 1 %" : `${rounded} %`;
}

/** Show the score, and the confidence unless the service abstained. */
function scoreBar(prediction, abstained) {
  const row = element("div", "score");
  const track = element("span", "track");
  const fill = element("span", "fill");
  fill.style.inlineSize = `${Math.max(0, Math.min(1, prediction.score)) * 100}%`;
  track.append(fill);
  track.setAttribute("aria-hidden", "true");
  const figure = element("span", "figure", prediction.score.toFixed(3));
  figure.title = "Score: the cosine between image and entity";
  figure.prepend(element("span", "sr-only", "score "));
  row.append(track, figure);
  if (!abstained && prediction.confidence !== null && prediction.confidence !== undefined) {
    row.append(element("span", "confidence", `${percent(prediction.confidence)} sure`));
  }
  return row;
}

/** Show the heat map of a prediction. */
function explain(item, prediction, onExplain) {
  for (const other of $("predictions").children) other.classList.toggle("explained", other === item);
  onExplain(prediction);
}

function predictionItem(prediction, abstained, onType, onExplain) {
  const item = element("li", "prediction");
  item.dataset.entityId = item.dataset.key = prediction.entity_id;
  const rank = element("span", "rank", String(prediction.rank));
  rank.setAttribute("aria-hidden", "true");
  const text = element("div", "text");
  const heading = element("div", "heading");
  heading.append(entityTitle(prediction), entityTypes(prediction, onType));
  for (const control of heading.querySelectorAll("a, button")) control.dataset.key = `${prediction.entity_id} ${control.textContent}`;
  text.append(heading);
  if (prediction.description) text.append(element("p", "description", prediction.description));
  const words = prediction.explanation?.words;
  if (words) text.append(element("p", "description", `Most important words: ${words.slice(0, 6).map(({ word }) => word).join(", ")}`));
  text.append(scoreBar(prediction, abstained));
  item.append(rank, entityTile(prediction), text);
  if (prediction.explanation?.heat_map) {
    item.tabIndex = 0;
    item.addEventListener("pointerenter", () => explain(item, prediction, onExplain));
    item.addEventListener("focusin", () => explain(item, prediction, onExplain));
  }
  return item;
}

function skeletonItem() {
  const item = element("li", "prediction skeleton");
  const text = element("div", "text");
  text.append(element("span", "bone wide"), element("span", "bone"), element("span", "bone thin"));
  item.append(element("span", "rank"), element("span", "tile bone"), text);
  return item;
}

/** Show that a request is running: fade the old predictions, or show placeholders. */
export function showWaiting(topK) {
  const list = $("predictions");
  $("answer-list").dataset.state = "waiting";
  $("answers").setAttribute("aria-busy", "true");
  if (list.hidden || list.childElementCount === 0) {
    list.replaceChildren(...Array.from({ length: Math.min(topK, 5) }, skeletonItem));
    list.setAttribute("aria-hidden", "true");
  }
  $("answers-empty").hidden = true;
  list.hidden = false;
}

function settle(state) {
  $("answer-list").dataset.state = state;
  $("answers").removeAttribute("aria-busy");
  $("predictions").removeAttribute("aria-hidden");
}

/** Call `render`, which replaces elements. If the focused one goes, the same control of the new ones gets the focus. */
function keepFocus(render) {
  const focused = document.activeElement;
  const inResults = $("answers").contains(focused);
  render();
  if (!inResults || focused.isConnected) return;
  const same = [...document.querySelectorAll("#predictions [data-key]")].find(({ dataset }) => dataset.key === focused.dataset.key);
  (same ?? $("answers")).focus({ preventScroll: true });
}

/** Show an answer. `onExplain(prediction)` is called to draw its heat map, with null to remove it. */
export function showAnswer(answer, roundTripMs, options) {
  keepFocus(() => renderAnswer(answer, roundTripMs, options));
}

/** List the best entity of each thing that was found. `onRegion(index)` emphasises its box, -1 none. */
function renderRegions(answer, onType, onRegion) {
  const { regions } = answer;
  $("found-heading").hidden = $("whole-heading").hidden = !regions;
  $("found-list").hidden = !regions?.length;
  $("found-heading").textContent = regions?.length ? "Things in the image" : "No single thing stands out.";
  $("found-list").replaceChildren(...(regions ?? []).map(({ predictions: [best] }, index) => {
    const item = predictionItem({ ...best, rank: index + 1 }, false, onType);
    item.addEventListener("pointerenter", () => onRegion(index));
    item.addEventListener("focusin", () => onRegion(index));
    item.addEventListener("pointerleave", () => onRegion(-1));
    return item;
  }));
}

function renderAnswer(answer, roundTripMs, { onType, onExplain, onRegion }) {
  settle("answered");
  $("problem").hidden = true;
  $("problem").replaceChildren();
  const found = answer.regions?.length ?? 0;
  $("abstained").hidden = !answer.abstained || found > 0; // it is about the image as a whole
  $("level").hidden = !answer.level;
  $("level").textContent = answer.level ? `Surely: ${answer.level.title}` : "";
  renderRegions(answer, onType, onRegion);
  const list = $("predictions");
  const item = (prediction) => predictionItem(prediction, answer.abstained, onType, onExplain);
  list.replaceChildren(...answer.predictions.map(item));
  list.hidden = answer.predictions.length === 0;
  $("answers-empty").hidden = answer.predictions.length > 0;
  if (answer.predictions.length === 0) {
    showEmpty("No entity of this type", "No entity in the catalog has this type. Clear the type to see all entities.");
  }
  showTimes(answer, roundTripMs);
  const [best] = answer.predictions;
  if (best?.explanation) explain(list.firstElementChild, best, onExplain);
  else onExplain(null);
  const prefix = found ? `Found ${answer.regions.map(({ predictions }) => predictions[0].title).join(", ")}. `
    : answer.abstained ? "Probably not in the catalog. " : "";
  $("status").textContent = best
    ? `${prefix}Best match: ${best.title}, score ${best.score.toFixed(2)}. ${answer.predictions.length} shown.`
    : "No entity of this type.";
}

function showEmpty(heading, text) {
  $("answers-empty").replaceChildren(element("p", "big", heading), element("p", "", text));
  $("answers-empty").hidden = false;
}

/** Return a form for an API key. `onKey` is called after the key is stored. */
function keyForm(onKey) {
  const form = element("form", "key-form");
  const label = element("label", "", "API key ");
  const field = element("input");
  field.type = "password";
  field.id = "api-key";
  field.required = true;
  field.autocomplete = "off";
  label.append(field);
  form.append(label, element("button", "button", "Use key"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    storeKey(field.value.trim());
    onKey();
  });
  return form;
}

/** Show a problem. If a retry can help, a button calls `onRetry`. */
export function showProblem(problem, onRetry) {
  keepFocus(() => renderProblem(problem, onRetry));
}

function renderProblem(problem, onRetry) {
  settle("refused");
  $("abstained").hidden = $("level").hidden = true;
  $("predictions").replaceChildren();
  $("predictions").hidden = true;
  renderRegions({});
  $("times").hidden = true;
  $("status").textContent = "";
  showEmpty("No results", "Try another image or other options.");
  const box = $("problem");
  box.replaceChildren(element("strong", "", problem.title), element("p", "", problem.message));
  if (problem.status === 401) box.append(keyForm(onRetry));
  const actions = element("p", "problem-foot");
  const canRetry = problem.status === 0 || problem.status === 429 || problem.status >= 500;
  if (canRetry) {
    const wait = problem.retryAfterS ? ` in ${Math.ceil(problem.retryAfterS)} s` : "";
    const retry = element("button", "button", `Try again${wait}`);
    retry.type = "button";
    if (problem.retryAfterS) {
      retry.disabled = true;
      setTimeout(() => { retry.disabled = false; retry.textContent = "Try again"; }, problem.retryAfterS * 1000);
    }
    retry.addEventListener("click", onRetry);
    actions.append(retry);
  }
  if (problem.requestId) actions.append(element("span", "request-id", `request ${problem.requestId}`));
  if (actions.childElementCount) box.append(actions);
  box.hidden = false;
}

function showTimes(answer, roundTripMs) {
  const { total = 0, ...stages } = answer.timings_ms;
  const names = [...STAGES.filter((name) => name in stages), ...Object.keys(stages).filter((name) => !STAGES.includes(name))];
  const parts = names.map((name) => ({ name, ms: stages[name] }));
  const rest = total - parts.reduce((sum, part) => sum + part.ms, 0);
  if (rest > 0.05) parts.push({ name: "other", ms: rest });
  const whole = parts.reduce((sum, part) => sum + part.ms, 0) || 1;

  const bar = $("times-bar");
  bar.replaceChildren(...parts.map(({ name, ms }) => {
    const piece = element("span", "piece");
    piece.dataset.stage = name;
    piece.style.flexGrow = String(ms / whole);
    return piece;
  }));
  bar.setAttribute("aria-label", parts.map(({ name, ms }) => `${name} ${milliseconds(ms)}`).join(", "));
  $("times-legend").replaceChildren(...parts.map(({ name, ms }) => {
    const entry = element("li");
    const swatch = element("span", "swatch");
    swatch.dataset.stage = name;
    entry.append(swatch, name, element("span", "ms", milliseconds(ms)));
    return entry;
  }));
  $("times-total").textContent = `${milliseconds(total)} in the service, ${milliseconds(roundTripMs)} including the network`;
  $("cached").hidden = !answer.cached;
  $("provenance").replaceChildren(
    "Model ", element("code", "", answer.model), ", bundle ", element("code", "", answer.bundle),
  );
  $("raw").textContent = JSON.stringify(answer, null, 2);
  $("times").hidden = false;
}
