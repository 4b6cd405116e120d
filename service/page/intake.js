// Images that the user drops or pastes, also from other pages.

import { Problem } from "./api.js";

/** Return the address of the image in a drag from a page, null if it has none. A linked image has both addresses. */
function draggedAddress(transfer) {
  const html = new DOMParser().parseFromString(transfer.getData("text/html"), "text/html"); // runs and loads nothing
  const address = html.querySelector("img[src]")?.getAttribute("src") || transfer.getData("text/uri-list");
  return address.split(/[\r\n]+/).find((line) => line && !line.startsWith("#")) ?? null;
}

/** Return the image at an address. Raises `Problem` if the browser does not let this page read it. */
async function imageAt(address) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (url?.protocol === "data:" || url?.origin === location.origin) {
    const response = await fetch(url);
    if (response.ok) return response.blob();
  }
  throw new Problem({
    title: "This image cannot be read",
    detail: `The browser does not let this page read images of ${url?.host || "other pages"}. Copy the image and paste it here, or save it and choose the file.`,
    status: 403,
  });
}

/** Call `onImages(blobs, name)` for what is dropped on the page or pasted, `onProblem(problem)` if it cannot be read. */
export function takeDropsAndPastes(onImages, onProblem) {
  let depth = 0; // dragenter and dragleave also fire for every child element
  const isImage = (event) => ["Files", "text/uri-list"].some((type) => event.dataTransfer?.types.includes(type));
  document.addEventListener("dragenter", (event) => {
    if (isImage(event)) { depth += 1; document.body.classList.add("dropping"); }
  });
  document.addEventListener("dragleave", (event) => {
    if (isImage(event) && (depth -= 1) <= 0) { depth = 0; document.body.classList.remove("dropping"); }
  });
  document.addEventListener("dragover", (event) => { if (isImage(event)) event.preventDefault(); });
  document.addEventListener("drop", async (event) => {
    depth = 0;
    document.body.classList.remove("dropping");
    if (!isImage(event)) return; // text, for example into the search field
    event.preventDefault();
    const files = [...event.dataTransfer.files];
    const address = draggedAddress(event.dataTransfer);
    try {
      if (files.length) onImages(files, files[0].name);
      else if (address) onImages([await imageAt(address)], "dropped image");
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      onProblem(error);
    }
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return; // pasted text
    event.preventDefault();
    onImages(files, "pasted image");
  });
}
