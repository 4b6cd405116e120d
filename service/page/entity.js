// The parts of an entity: tile (thumbnail, symbol or monogram), title and types.

import { thumbnailUrl } from "./api.js";

/** Create an element: `element("p", "hint", "text")`. Text is never parsed as HTML. */
export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

/** Return a hue in degrees that depends only on the entity id. */
function hueOf(entityId) {
  let hash = 2166136261;
  for (const character of entityId) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  return (hash >>> 0) % 360;
}

function monogram(entity) {
  const tile = element("span", "tile monogram");
  tile.style.setProperty("--hue", String(hueOf(entity.entity_id)));
  const words = entity.title.match(/[\p{L}\p{N}]+/gu) ?? ["?"];
  const initials = words.length > 1 ? words[0].at(0) + words[1].at(0) : Array.from(words[0]).slice(0, 2).join("");
  tile.textContent = initials.toLocaleUpperCase();
  return tile;
}

function symbolOrMonogram(entity) {
  return entity.symbol ? element("span", "tile symbol", entity.symbol) : monogram(entity);
}

export function entityTile(entity) {
  if (!entity.has_thumbnail) {
    const tile = symbolOrMonogram(entity);
    tile.setAttribute("aria-hidden", "true");
    return tile;
  }
  const tile = element("img", "tile thumbnail");
  tile.alt = "";
  tile.width = tile.height = 64;
  tile.loading = "lazy";
  const useFallback = () => {
    const fallback = symbolOrMonogram(entity);
    fallback.setAttribute("aria-hidden", "true");
    tile.replaceWith(fallback);
  };
  tile.addEventListener("error", useFallback);
  tile.addEventListener("load", () => URL.revokeObjectURL(tile.src));
  thumbnailUrl(entity.entity_id).then((url) => { tile.src = url; }, useFallback);
  return tile;
}

export function entityTitle(entity) {
  // Only http(s): an untrusted catalog could contain `javascript:` links.
  if (!/^https?:\/\//i.test(entity.url ?? "")) return element("span", "title", entity.title);
  const link = element("a", "title", entity.title);
  link.href = entity.url;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  const arrow = element("span", "elsewhere", "↗");
  arrow.setAttribute("aria-hidden", "true");
  link.append(arrow, element("span", "sr-only", " (opens in a new tab)"));
  return link;
}

/** Return the types as buttons that call `onType(type)`. */
export function entityTypes(entity, onType) {
  const row = element("span", "types");
  for (const type of entity.types ?? []) {
    const chip = element("button", "chip", type);
    chip.type = "button";
    chip.title = `Only ${type}`;
    chip.addEventListener("click", () => onType(type));
    row.append(chip);
  }
  return row;
}
