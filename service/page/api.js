// What the page asks of the service, and how a refusal reaches the reader.

/** A refusal that can be shown: the service's problem+json, or its absence. */
export class Problem extends Error {
  constructor({ title, detail, status = 0, requestId = null, retryAfterS = null }) {
    super(detail);
    this.title = title;
    this.status = status;
    this.requestId = requestId;
    this.retryAfterS = retryAfterS;
  }
}

async function problemOf(response) {
  const isProblem = (response.headers.get("content-type") ?? "").includes("json");
  const body = isProblem ? await response.json() : {};
  const retryAfter = response.headers.get("retry-after");
  return new Problem({
    title: body.title ?? `The service answered ${response.status}`,
    detail: body.detail ?? "It gave no reason.",
    status: response.status,
    requestId: body.request_id ?? response.headers.get("x-request-id"),
    retryAfterS: retryAfter === null ? null : Number(retryAfter),
  });
}

const KEY_NAME = "wikiclip-api-key";

/** Keep an API key until the tab is closed. */
export function keepKey(key) {
  sessionStorage.setItem(KEY_NAME, key);
}

function withKey(options) {
  const key = sessionStorage.getItem(KEY_NAME);
  if (!key) return options;
  const bytes = String.fromCharCode(...new TextEncoder().encode(key)); // a header takes bytes, not characters
  return { ...options, headers: { Authorization: `Bearer ${bytes}` } };
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, withKey(options));
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "No answer",
      detail: options.body
        ? "The connection closed before an answer came: the file may be too large, or the service is not running."
        : "The service cannot be reached.",
    });
  }
  if (!response.ok) throw await problemOf(response);
  return response.json();
}

/**
 * POST /recognize. `box` is {x, y, w, h} in fractions of the image, or null for all of it.
 * Returns the answer and `roundTripMs`, as the browser saw it.
 */
export async function recognize(image, { topK, types, box, explain, signal }) {
  const parameters = new URLSearchParams({ top_k: String(topK) });
  for (const type of types) parameters.append("types", type);
  if (box) parameters.set("box", [box.x, box.y, box.w, box.h].map((side) => side.toFixed(4)).join(","));
  if (explain) parameters.set("explain", "true");
  const form = new FormData();
  form.append("image", image, image.name ?? "image");
  const startedMs = performance.now();
  const answer = await ask(`/recognize?${parameters}`, { method: "POST", body: form, signal });
  return { answer, roundTripMs: performance.now() - startedMs };
}

export function serviceInfo() {
  return ask("/info");
}

/** GET /entities: records whose title matches. */
export async function searchEntities(query, { limit, signal }) {
  const found = await ask(`/entities?${new URLSearchParams({ query, limit: String(limit) })}`, { signal });
  return Array.isArray(found) ? found : found.entities;
}

/** Where an image element finds a thumbnail: with a key it is fetched here, since an element cannot send one. */
export async function thumbnailUrl(entityId) {
  const path = `/entities/${encodeURIComponent(entityId)}/thumbnail`;
  if (!sessionStorage.getItem(KEY_NAME)) return path;
  const response = await fetch(path, withKey({}));
  if (!response.ok) throw await problemOf(response);
  return URL.createObjectURL(await response.blob());
}
