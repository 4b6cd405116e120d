// Drive the page in headless Chromium and print the findings of each scenario as one JSON object.
// test_page.py makes the assertions.
//   node browse.mjs BASE_URL CHROMIUM FOLDER_OF_IMAGES [SCENARIO ...]

import { readFile } from "node:fs/promises";
import { basename, extname, join } from "node:path";
import process from "node:process";
import { chromium } from "playwright-core";

const [base, executablePath, folder, ...only] = process.argv.slice(2);
const TIMEOUT_MS = 60_000; // for one step; long enough for a busy machine
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const MEDIA_TYPES = { ".png": "image/png", ".jpg": "image/jpeg", ".txt": "text/plain" };

const file = (name) => join(folder, name);

/** Drop or paste files as a browser does: an event with a DataTransfer. */
async function hand(page, kind, ...names) {
  const files = await Promise.all(names.map(async (name) => ({
    bytes: [...await readFile(file(name))], name: basename(name), type: MEDIA_TYPES[extname(name)],
  })));
  await page.evaluate(({ kind, files }) => {
    const transfer = new DataTransfer();
    for (const { bytes, name, type } of files) transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
    const event = kind === "drop"
      ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
      : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
    document.getElementById("stage").dispatchEvent(event);
  }, { kind, files });
}

const isRecognition = (response) => response.url().includes("/recognize?");

/** Run `act`, which sends a request. Return the response once the page shows it. */
async function asking(page, act) {
  const [response] = await Promise.all([page.waitForResponse(isRecognition), act()]);
  await page.locator("#answers:not([aria-busy])").waitFor();
  await page.locator('#answer-list:is([data-state="answered"], [data-state="refused"])').waitFor();
  const parameters = Object.fromEntries(new URL(response.url()).searchParams);
  return { status: response.status(), parameters, body: await response.json() };
}

const pick = (page, name) => asking(page, () => page.setInputFiles("#file", file(name)));

function shown(page) {
  return page.evaluate(() => {
    const text = (selector, within = document) => within.querySelector(selector)?.textContent.trim() ?? null;
    const visible = (id) => !document.getElementById(id).hidden;
    return {
      predictions: [...document.querySelectorAll("#predictions > li")].map((item) => ({
        entity_id: item.dataset.entityId,
        title: item.querySelector(".title").firstChild.textContent,
        link: item.querySelector("a.title")?.href ?? null,
        types: [...item.querySelectorAll(".chip")].map((chip) => chip.textContent),
        score: Number(text(".figure", item).replace("score ", "")),
        confidence: text(".confidence", item),
        tile: item.querySelector(".tile").className.split(" ")[1],
        tile_text: text(".tile", item),
      })),
      abstained: visible("abstained"),
      level: visible("level") ? text("#level") : null,
      problem: visible("problem") ? text("#problem") : null,
      stages: visible("times") ? [...document.querySelectorAll("#times-legend li")].map((entry) => entry.textContent) : null,
      times: text("#times-total"),
      cached: visible("cached"),
      provenance: text("#provenance"),
      status: text("#status"),
    };
  });
}

async function stroke(page, from, to) {
  const board = await page.locator("#board").boundingBox();
  const at = ([x, y]) => [board.x + x * board.width, board.y + y * board.height];
  await page.mouse.move(...at(from));
  await page.mouse.down();
  await page.mouse.move(...at(to), { steps: 4 });
  await page.mouse.up();
}

/** Drop what a browser hands over when an image is dragged from a page: no file, but HTML with its address. */
async function drag(page, address) {
  await page.evaluate((address) => {
    const transfer = new DataTransfer();
    transfer.setData("text/uri-list", "https://elsewhere.example/page-that-the-image-links-to");
    transfer.setData("text/html", `<a href="https://elsewhere.example/"><img src="${address}"></a>`);
    document.getElementById("stage").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }, address);
}

const focused = (page) => page.evaluate(() => {
  const { id, textContent } = document.activeElement;
  return id || textContent;
});

const pixel = (page, x, y) => page.evaluate(([x, y]) => {
  const board = document.getElementById("board");
  return [...board.getContext("2d").getImageData(x * board.width, y * board.height, 1, 1).data];
}, [x, y]);

// What scenarios change in the answer of /info.
const INFO = {
  drawn: { model: "tiny", heat_maps: false },
  drawn_by_keyboard: { model: "tiny" },
  narrow: { model: "tiny" },
  schemes: { model: "tiny" },
  too_large: { limits: { max_body_bytes: 2048 } },
};

const SCENARIOS = {
  async first_look(page) {
    return {
      bundle: await page.textContent("#bundle"),
      examples: await page.locator("#examples button").evaluateAll((buttons) => buttons.map((button) => button.title)),
      drawing: await page.isVisible("#mode-draw"),
      heat_map: await page.isVisible("#explain"),
      hint_gap: await page.evaluate(() => {
        const hint = document.getElementById("image-hint").getBoundingClientRect();
        return document.getElementById("examples-section").getBoundingClientRect().top - hint.bottom;
      }),
      unnamed: await page.evaluate(() => [...document.querySelectorAll("button, input, select, a, [tabindex='0']")]
        .filter((control) => !(control.getAttribute("aria-label") || control.labels?.length || control.textContent.trim()))
        .map((control) => control.outerHTML)),
    };
  },

  async dropped(page) {
    const { body } = await asking(page, () => hand(page, "drop", "giraffe.png"));
    return { body, shown: await shown(page) };
  },

  async several(page) {
    const hint = () => page.locator("#image-hint").textContent();
    const several = await asking(page, () => hand(page, "drop", "broken.jpg", "giraffe.png", "lion.png"));
    const seen = { several, shown: await shown(page), hint: await hint(), region: await page.isDisabled("#mark-region") };
    const chosen = await asking(page, () => page.setInputFiles("#file", ["giraffe.png", "giraffe.png"].map(file)));
    const chosenHint = await hint();
    await page.setInputFiles("#file", Array(9).fill(file("giraffe.png")));
    await page.locator("#problem").waitFor();
    const tooMany = await shown(page);
    const single = await pick(page, "giraffe.png");
    await page.locator("#mark-region:enabled").waitFor();
    return { ...seen, chosen, chosenHint, tooMany, single };
  },

  async explained(page) {
    await pick(page, "giraffe.png");
    const { body } = await asking(page, () => page.check("#explain"));
    const look = () => page.evaluate(() => {
      const heat = document.getElementById("heat").getBoundingClientRect();
      const image = document.getElementById("preview").getBoundingClientRect();
      const canvas = document.getElementById("heat");
      return {
        hidden: canvas.hidden,
        grid: [canvas.width, canvas.height],
        alphas: [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 === 3),
        legend: document.getElementById("heat-legend").innerText.replaceAll("\n", " "),
        share: [heat.width / image.width, heat.height / image.height],
        marked: [...document.querySelectorAll("#predictions > li")].findIndex((item) => item.classList.contains("explained")),
      };
    });
    const first = await look();
    await page.locator("#predictions > li").nth(1).hover();
    const second = await look();
    await asking(page, () => page.uncheck("#explain"));
    return { body, first, second, off: await look() };
  },

  async found(page) {
    await pick(page, "giraffe.png");
    const real = await asking(page, () => page.check("#find"));
    const regions = [[0.5, 0.25, 0.25, 0.5], [0, 0, 0.5, 0.5]].map((box, index) => ({ box, known: 0.9, predictions: real.body.predictions.slice(index) }));
    await page.route("**/recognize?*", (route) => route.fulfill({ json: { ...real.body, regions } }));
    await pick(page, "lion.png");
    const look = () => page.evaluate(() => {
      const image = document.getElementById("preview").getBoundingClientRect();
      return {
        boxes: [...document.querySelectorAll(".found-box")].map((box) => {
          const { x, y, width, height } = box.getBoundingClientRect();
          return { text: box.textContent, marked: box.classList.contains("marked"), x: (x - image.x) / image.width, y: (y - image.y) / image.height, width: width / image.width, height: height / image.height };
        }),
        titles: [...document.querySelectorAll("#found-list .title")].map((title) => title.firstChild.textContent),
        heading: document.getElementById("found-heading").textContent,
        whole: document.querySelectorAll("#predictions > li").length,
      };
    });
    const first = await look();
    await page.locator("#found-list > li").nth(1).hover();
    const marked = (await look()).boxes.map((box) => box.marked);
    await page.unroute("**/recognize?*");
    const off = await asking(page, () => page.uncheck("#find"));
    return { real, regions, first, marked, off: { parameters: off.parameters, ...await look() } };
  },

  async pasted(page) {
    await asking(page, () => hand(page, "paste", "giraffe.png"));
    return { shown: await shown(page) };
  },

  async picked_twice(page) {
    const first = await pick(page, "lion.png");
    const second = await pick(page, "lion.png");
    return { first: first.body, second: second.body, shown: await shown(page) };
  },

  async every_thumbnail(page) {
    await page.selectOption("#top-k", "100");
    const { body } = await pick(page, "lion.png");
    await page.waitForFunction(() => [...document.querySelectorAll("img.thumbnail")].every((image) => image.complete));
    return { body, shown: await shown(page) };
  },

  async example(page) {
    await asking(page, () => page.click('[aria-label="Example: Orange"]'));
    return { shown: await shown(page) };
  },

  async abstained(page) {
    const { body } = await pick(page, "giraffe.png");
    const level = { id: "Q729", title: "animal", kind: "type", confidence: 0.95 };
    await page.route("**/recognize?*", (route) => route.fulfill({ json: { ...body, abstained: true, level } }));
    await pick(page, "apple.png");
    return { shown: await shown(page) };
  },

  async drawn(page) {
    const heat_map = await page.isVisible("#explain-label");
    await page.click("#mode-draw");
    await page.click('[aria-label="red"]');
    const painted = await asking(page, () => stroke(page, [0.2, 0.5], [0.8, 0.5]));
    const predictions = (await shown(page)).predictions;
    const middle = await pixel(page, 0.5, 0.5);
    await page.click('[data-shape="rectangle"]');
    await page.click('[aria-label="blue"]');
    await asking(page, () => stroke(page, [0.3, 0.3], [0.7, 0.7]));
    const covered = await pixel(page, 0.5, 0.5);
    await asking(page, () => page.click("#undo"));
    const undone = await pixel(page, 0.5, 0.5);
    await page.click("#clear");
    const cleared = await pixel(page, 0.5, 0.5);
    return { status: painted.status, predictions, middle, covered, undone, cleared, can_undo: await page.isEnabled("#undo"), heat_map, focused: await focused(page) };
  },

  async drawn_by_keyboard(page) {
    await page.focus("#mode-draw");
    await page.keyboard.press("Enter");
    await page.keyboard.press("Space");
    for (let i = 0; i < 6; i += 1) await page.keyboard.press("ArrowRight");
    const { status } = await asking(page, () => page.keyboard.press("Space"));
    return { status, trail: await pixel(page, 0.56, 0.5), predictions: (await shown(page)).predictions.length };
  },

  async region(page) {
    await pick(page, "giraffe.png");
    const stage = await page.locator("#stage").boundingBox();
    const dragged = await asking(page, async () => {
      await page.mouse.move(stage.x + stage.width * 0.25, stage.y + stage.height * 0.25);
      await page.mouse.down();
      await page.mouse.move(stage.x + stage.width * 0.75, stage.y + stage.height * 0.5, { steps: 4 });
      await page.mouse.up();
    });
    await page.focus("#region");
    const nudged = await asking(page, () => page.keyboard.press("ArrowDown"));
    const whole = await asking(page, () => page.keyboard.press("Escape"));
    const back = await focused(page);
    const marked = await asking(page, () => page.click("#mark-region"));
    await page.focus('[data-corner="nw"]');
    const widened = await asking(page, () => page.keyboard.press("ArrowLeft"));
    const corner = await page.locator('[data-corner="se"]').boundingBox();
    const resized = await asking(page, async () => {
      await page.mouse.move(corner.x + corner.width / 2, corner.y + corner.height / 2);
      await page.mouse.down();
      await page.mouse.move(stage.x + stage.width * 0.5, stage.y + stage.height * 0.5, { steps: 4 });
      await page.mouse.up();
    });
    const boxes = Object.entries({ dragged, nudged, whole, marked, widened, resized }).map(([name, { parameters }]) => [name, parameters]);
    return { ...Object.fromEntries(boxes), back };
  },

  async narrowed(page) {
    await pick(page, "apple.png");
    await asking(page, () => page.selectOption("#top-k", "3"));
    const three = (await shown(page)).predictions;
    await asking(page, () => page.locator("#predictions .chip", { hasText: "fruit" }).first().click());
    const fruit = (await shown(page)).predictions;
    const kept = await focused(page);
    await page.fill("#types", "no such type");
    await asking(page, () => page.keyboard.press("Enter"));
    return { three, fruit, kept, none: await shown(page) };
  },

  async searched(page) {
    const search = async (query) => {
      await page.fill("#catalog-query", "");
      await page.locator("#catalog-note", { hasText: "Type a few letters" }).waitFor();
      await page.fill("#catalog-query", query);
      await page.locator("#catalog-note", { hasText: "match" }).waitFor();
      return {
        titles: await page.locator("#catalog-list .title").evaluateAll((titles) => titles.map((title) => title.firstChild.textContent)),
        note: await page.textContent("#catalog-note"),
        found_as: await page.locator("#catalog-list .found-as").allTextContents(),
      };
    };
    return { lion: await search("lion"), girafe: await search("girafe"), nothing: await search("qqqq") };
  },

  async undecodable(page) {
    const refused = await pick(page, "broken.jpg");
    const seen = await shown(page);
    await pick(page, "giraffe.png");
    return { refused, seen, after: await shown(page) };
  },

  async not_an_image(page) {
    const refused = await asking(page, () => hand(page, "drop", "note.txt"));
    return { refused, seen: await shown(page) };
  },

  async too_large(page) {
    await hand(page, "drop", "large.png");
    await page.locator("#problem").waitFor();
    return await shown(page);
  },

  async dragged_from_a_page(page) {
    await drag(page, "https://elsewhere.example/giraffe.png");
    await page.locator("#problem").waitFor();
    const elsewhere = await shown(page);
    const bytes = await readFile(file("giraffe.png"));
    await asking(page, () => drag(page, `data:image/png;base64,${bytes.toString("base64")}`));
    return { elsewhere, embedded: await shown(page) };
  },

  async narrow(page) {
    await page.setViewportSize({ width: 360, height: 740 });
    await page.emulateMedia({ reducedMotion: "reduce" }); // no smooth scrolling while a click is aimed
    const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    const empty = await overflow();
    await pick(page, "giraffe.png");
    const answered = await overflow();
    await asking(page, () => page.check("#explain"));
    const centres = await page.evaluate(() => ["heat", "preview"].map((id) => {
      const { x, y, width, height } = document.getElementById(id).getBoundingClientRect();
      return [x + width / 2, y + height / 2];
    }));
    await page.click("#mode-draw");
    return { overflows: [empty, answered, await overflow()], centres };
  },

  async steady(page) {
    await page.setViewportSize({ width: 1280, height: 1500 }); // only visible shifts count
    await page.evaluate(() => {
      window.shift = 0;
      new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.shift += entry.value; })
        .observe({ type: "layout-shift", buffered: true });
    });
    await pick(page, "giraffe.png");
    await pick(page, "lion.png");
    await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve))));
    return { shift: await page.evaluate(() => window.shift) };
  },

  async documented(page) {
    await page.goto(`${base}/docs#problem-bad-parameter`);
    const row = page.locator("#problem-bad-parameter");
    await row.waitFor();
    await page.waitForFunction(() => window.scrollY > 0);
    const problem = await row.textContent();
    const operation = page.locator(".opblock", { has: page.locator('.opblock-summary-path[data-path="/recognize"]') });
    await operation.locator(".opblock-summary-control").click();
    await operation.locator(".try-out__btn").click();
    await operation.locator('input[type="file"]').setInputFiles(file("giraffe.png"));
    const [response] = await Promise.all([page.waitForResponse(isRecognition), operation.locator("button.execute").click()]);
    await operation.locator(".live-responses-table").waitFor();
    return { problem, status: response.status(), body: await response.json() };
  },

  async schemes(page) {
    const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await page.emulateMedia({ colorScheme: "light" });
    const light = await paper();
    await page.emulateMedia({ colorScheme: "dark" });
    const tabs = await page.evaluate(() => ["mode-image", "modes"].map((id) => getComputedStyle(document.getElementById(id)).backgroundColor));
    return { light, dark: await paper(), tabs };
  },
};

async function play(browser, name, act) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  page.setDefaultTimeout(TIMEOUT_MS);
  const seen = { console: [], elsewhere: [], headers: null };
  page.on("console", (message) => {
    if (message.type() === "error") seen.console.push(message.text());
  });
  page.on("pageerror", (error) => seen.console.push(String(error)));
  page.on("request", (request) => {
    const url = new URL(request.url());
    if (!["blob:", "data:"].includes(url.protocol) && url.origin !== new URL(base).origin) seen.elsewhere.push(request.url());
  });
  if (INFO[name]) {
    await page.route("**/info", async (route) => {
      const response = await route.fetch();
      await route.fulfill({ response, json: { ...await response.json(), ...INFO[name] } });
    });
  }
  try {
    const response = await page.goto(base);
    seen.headers = response.headers();
    await page.locator('#bundle[data-state="ready"]').waitFor();
    await page.locator("#examples:not([aria-busy])").waitFor();
    seen.result = await act(page);
  } catch (error) {
    seen.failure = String(error.stack ?? error);
  } finally {
    await context.close();
  }
  return seen;
}

const browser = await chromium.launch({ executablePath, headless: true, args: FLAGS });
const report = {};
try {
  for (const [name, act] of Object.entries(SCENARIOS)) {
    if (only.length === 0 || only.includes(name)) report[name] = await play(browser, name, act);
  }
} finally {
  await browser.close();
}
process.stdout.write(JSON.stringify(report));
