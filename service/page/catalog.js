// Title search in the bundle's catalog.

import { Problem, searchEntities } from "./api.js";
import { element, entityTile, entityTitle, entityTypes } from "./entity.js";

const LIMIT = 12;
const DEBOUNCE_MS = 180;
const LANGUAGES = new Intl.DisplayNames(["en"], { type: "language" });

/** Return a note that the query matched the title in another language. */
function foundAs(title, language) {
  const note = element("p", "found-as", "Found as ");
  const quoted = element("q", "", title);
  quoted.lang = language;
  note.append(quoted, ` (${languageName(language)})`);
  return note;
}

function languageName(code) {
  try {
    return LANGUAGES.of(code);
  } catch {
    return code; // a catalog's own code
  }
}

function entityItem(entity, onType) {
  const item = element("li", "entity");
  const text = element("div", "text");
  text.append(entityTitle(entity), entityTypes(entity, onType));
  if (entity.matched_language) text.append(foundAs(entity.titles[entity.matched_language], entity.matched_language));
  if (entity.description) text.append(element("p", "description", entity.description));
  item.append(entityTile(entity), text);
  return item;
}

/** Search while the user types. Calls `onType(type)` for a pressed type and `onFound(entities)` after each search. */
export function startCatalogSearch({ input, list, note, onType, onFound }) {
  const firstNote = note.textContent;
  let debounce = 0;
  let controller = null;

  async function search() {
    controller?.abort();
    const query = input.value.trim();
    if (!query) {
      list.replaceChildren();
      note.textContent = firstNote;
      return;
    }
    controller = new AbortController();
    try {
      const entities = await searchEntities(query, { limit: LIMIT, signal: controller.signal });
      list.replaceChildren(...entities.map((entity) => entityItem(entity, onType)));
      note.textContent = entities.length === 0 ? `No title matches “${query}”.`
        : entities.length === LIMIT ? `The first ${LIMIT} matching titles.`
        : entities.length === 1 ? "One title matches." : `${entities.length} titles match.`;
      onFound(entities);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Problem)) throw error;
      list.replaceChildren();
      note.textContent = `${error.title}: ${error.message}`;
    }
  }

  input.addEventListener("input", () => {
    clearTimeout(debounce);
    debounce = setTimeout(search, DEBOUNCE_MS);
  });
}
