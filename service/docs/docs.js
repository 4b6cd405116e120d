// Renders the service's own OpenAPI document. Text is never parsed as HTML.

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** A schema in a few words: its type, bounds and default. */
function inWords(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(inWords).join(" or ");
  if (schema.type === "array") return `list of ${inWords(schema.items)}`;
  const words = [schema.type ?? "any"];
  if (schema.minimum !== undefined) words.push(`from ${schema.minimum}`);
  if (schema.maximum !== undefined) words.push(`to ${schema.maximum}`);
  if (schema.default !== undefined && schema.default !== null) words.push(`(default ${schema.default})`);
  return words.join(" ");
}

function table(head, rows) {
  const made = element("table");
  const headRow = element("tr");
  headRow.append(...head.map((text) => element("th", "", text)));
  const thead = element("thead");
  thead.append(headRow);
  const body = element("tbody");
  body.append(...rows.map((cells) => {
    const row = element("tr");
    row.append(...cells.map((cell, place) => {
      const held = element("td");
      held.append(place === 0 ? element("code", "", cell) : cell);
      return held;
    }));
    return row;
  }));
  made.append(thead, body);
  return made;
}

function curlFor(method, path, operation) {
  const here = location.origin;
  if (path === "/recognize") return `curl -F image=@photo.jpg '${here}/recognize?top_k=5'`;
  if (path === "/recognize/batch") return `curl -F image=@one.jpg -F image=@two.jpg ${here}/recognize/batch`;
  const needed = (operation.parameters ?? []).filter((each) => each.in === "query" && each.required);
  const query = needed.map((each) => `${each.name}=…`).join("&");
  return `curl '${here}${path}${query ? `?${query}` : ""}'`;
}

function operationSection(path, method, operation) {
  const section = element("section", "operation");
  const heading = element("h2");
  heading.append(element("span", `method ${method}`, method.toUpperCase()), element("code", "", path));
  section.append(heading, element("p", "", operation.summary ?? ""));
  const parameters = operation.parameters ?? [];
  if (parameters.length) {
    section.append(element("h3", "", "Parameters"));
    section.append(table(["Name", "Where", "What", "Takes"], parameters.map((each) => [
      each.name, each.in, each.description ?? "", inWords(each.schema),
    ])));
  }
  const bodies = Object.keys(operation.requestBody?.content ?? {});
  if (bodies.length) section.append(element("h3", "", "Body"), element("p", "", bodies.join(", ")));
  section.append(element("h3", "", "Answers"));
  section.append(table(["Status", "Meaning", "Body"], Object.entries(operation.responses).map(([status, response]) => {
    const [kind, content] = Object.entries(response.content ?? {})[0] ?? ["", {}];
    return [status, response.description ?? "", [kind, inWords(content.schema)].filter((part) => part && part !== "any").join(": ")];
  })));
  section.append(element("pre", "", curlFor(method, path, operation)));
  return section;
}

function schemaSection(name, schema) {
  const section = element("section", "schema");
  section.append(element("h2", "", name));
  section.append(table(["Field", "Type", "What"], Object.entries(schema.properties ?? {}).map(([field, each]) => [
    field, inWords(each), each.description ?? "",
  ])));
  return section;
}

function showProblems(types) {
  const section = document.getElementById("problems");
  section.querySelector("tbody").append(...types.map(({ type, title, status }) => {
    const row = element("tr");
    row.id = type.split("#").at(-1);
    const code = element("td");
    code.append(element("code", "", type));
    row.append(element("td", "", String(status)), element("td", "", title), code);
    return row;
  }));
  section.hidden = false;
}

const main = document.getElementById("operations");
try {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw new Error(`the service answered ${answer.status}`);
  const api = await answer.json();
  document.getElementById("summary").textContent = `${api.info.summary ?? ""} Version ${api.info.version}.`;
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => operationSection(path, method, operation)));
  const shapes = Object.entries(api.components.schemas).map(([name, schema]) => schemaSection(name, schema));
  main.replaceChildren(...operations, ...shapes);
  showProblems(api.components.schemas.Problem["x-types"]);
  // The browser looked for the fragment before the rows were there.
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
} catch (error) {
  main.replaceChildren(element("p", "", `The API description cannot be shown: ${error.message}.`));
}
main.removeAttribute("aria-busy");
