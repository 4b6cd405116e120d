// Requests to the service.

/** An error to show to the user: the service's problem+json, or a failed connection. */
export class Problem extends Error {
  constructor({ title, detail, type = "", status = 0, requestId = null, retryAfterS = null }) {
    super(detail);
    this.title = title;
    this.type = type;
    this.status = status;
    this.requestId = requestId;
    this.retryAfterS = retryAfterS;
  }
}

/** Return a problem's detail as a sentence. */
function sentence(line) {
  const upper = line.charAt(0).toLocaleUpperCase() + line.slice(1);
  return /[.!?]$/.test(upper) ? upper : `${upper}.`;
}

async function problemOf(response) {
  const isProblem = (response.headers.get("content-type") ?? "").includes("json");
  const body = isProblem ? await response.json() : {};
  const retryAfter = response.headers.get("retry-after");
  return new Problem({
    title: body.title ?? `The service answered ${response.status}`,
    detail: sentence(body.detail ?? "The response gives no reason."),
    type: body.type,
    status: response.status,
    requestId: body.request_id ?? response.headers.get("x-request-id"),
    retryAfterS: retryAfter === null ? null : Number(retryAfter),
  });
}

const KEY_NAME = "wikiclip-api-key";

/** Store an API key until the tab is closed. */
export function storeKey(key) {
  sessionStorage.setItem(KEY_NAME, key);
}

function withKey(options) {
  const key = sessionStorage.getItem(KEY_NAME);
  if (!key) return options;
  const bytes = String.fromCharCode(...new TextEncoder().encode(key)); // headers are bytes, not characters
  return { ...options, headers: { Authorization: `Bearer ${bytes}` } };
}

async function requestJson(path, options = {}) {
  let response;
  try {
    response = await fetch(path, withKey(options));
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "No response",
      detail: options.body
        ? "The connection closed before a response arrived. The file may be too large, or the service may be down."
        : "The service cannot be reached.",
    });
  }
  if (!response.ok) throw await problemOf(response);
  return response.json();
}

/**
 * POST /recognize with one image, or several of one thing. `box` is {x, y, w, h} in fractions of the image, or null for
 * the whole image.
 * Returns the answer and the time of the request as `roundTripMs`.
 */
export async function recognize(images, { topK, types, box, regions, explain, signal }) {
  const parameters = new URLSearchParams({ top_k: String(topK) });
  for (const type of types) parameters.append("types", type);
  if (box) parameters.set("box", [box.x, box.y, box.w, box.h].map((side) => side.toFixed(4)).join(","));
  if (regions) parameters.set("regions", "auto");
  if (explain) parameters.set("explain", "true");
  const form = new FormData();
  for (const image of images) form.append("image", image, image.name ?? "image");
  const startedMs = performance.now();
  const answer = await requestJson(`/recognize?${parameters}`, { method: "POST", body: form, signal });
  return { answer, roundTripMs: performance.now() - startedMs };
}

export function serviceInfo() {
  return requestJson("/info");
}

/** GET /entities: records with matching titles. */
export async function searchEntities(query, { limit, signal }) {
  const { entities } = await requestJson(`/entities?${new URLSearchParams({ query, limit: String(limit) })}`, { signal });
  return entities;
}

/** GET /examples: records of entities spread evenly over the catalog. */
export async function sampleEntities(limit) {
  const { entities } = await requestJson(`/examples?limit=${limit}`);
  return entities;
}

const thumbnailPath = (entityId) => `/entities/${encodeURIComponent(entityId)}/thumbnail`;

/** Return the thumbnail of an entity as a blob. */
export async function thumbnail(entityId) {
  const response = await fetch(thumbnailPath(entityId), withKey({}));
  if (!response.ok) throw await problemOf(response);
  return response.blob();
}

/** Return a URL for an image element. With an API key the image is fetched here, because an element cannot send one. */
export async function thumbnailUrl(entityId) {
  return sessionStorage.getItem(KEY_NAME) ? URL.createObjectURL(await thumbnail(entityId)) : thumbnailPath(entityId);
}
