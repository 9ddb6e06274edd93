// Does in one headless browser what tests/test_web.py asks for; prints what it found as JSON.
//   node check.mjs '{"url": "http://localhost:8000/", "chromium": "/usr/bin/chromium", ...}'
import { chromium } from "playwright-core";

const job = JSON.parse(process.argv[2]);
const ARGUMENTS = [
  "--enable-unsafe-webgpu", // the software device, where there is no graphics card
  "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
  ...(process.getuid?.() === 0 ? ["--no-sandbox"] : []), // Chromium has none for root
];

/** Open a page that counts what it gives the GPU to do; an error in it ends this program. */
async function open(browser, path, settings) {
  const page = await browser.newPage(settings);
  page.on("pageerror", (error) => {
    throw error;
  });
  await page.addInitScript(() => {
    window.dispatches = 0;
    window.loading = []; // the costs that stand there while models are loaded
    new MutationObserver(() => {
      if (document.body?.dataset.state !== "loading") return;
      window.loading.push(document.querySelector("[aria-labelledby=costs]").innerText);
    }).observe(document, { attributes: true, attributeFilter: ["data-state"], subtree: true });
    const pass = window.GPUComputePassEncoder?.prototype;
    for (const name of ["dispatchWorkgroups", "dispatchWorkgroupsIndirect"]) {
      const original = pass?.[name];
      if (original) pass[name] = function (...sizes) {
        window.dispatches++;
        return original.apply(this, sizes);
      };
    }
  });
  await page.goto(new URL(path, job.url).href);
  return page;
}

/** Do something to the page; return the probabilities it then shows, and the dispatches it took. */
async function answer(page, action) {
  const before = await page.evaluate(() => [Number(document.body.dataset.answers ?? 0), window.dispatches]);
  await action();
  await page.waitForFunction(
    ([answers]) => document.body.dataset.answers > answers || document.body.dataset.state === "failed",
    before, { timeout: 120_000 },
  );
  if ((await page.getAttribute("body", "data-state")) === "failed") {
    throw new Error(await page.textContent("#status"));
  }
  const bars = (name) =>
    page.$$eval(`#chart i.${name}`, (found) => found.map((bar) => Number(bar.dataset.p)));
  return {
    merged: await bars("merged"),
    original: await bars("original"),
    dispatches: (await page.evaluate(() => window.dispatches)) - before[1],
  };
}

/** Use the page as a visitor does, at both widths. */
async function demo(browser, backend) {
  const desktop = { width: 1180, height: 940 };
  const page = await open(browser, "", { viewport: desktop });
  await answer(page, () => {});
  if (backend === "webgpu") await answer(page, () => page.click("text=WebGPU"));
  await page.waitForSelector("body[data-state=ready]");
  const found = { samples: {} };
  for (const button of await page.$$("#samples button")) {
    const name = (await (await button.$("img")).getAttribute("src")).split(/[/.]/).at(-2);
    found.samples[name] = await answer(page, () => button.click());
  }
  const shot = (name) => page.screenshot({ path: `${job.out}/${backend}-${name}.png`, fullPage: true });
  found.costs = await page.locator("tbody").innerText();
  found.where = await page.textContent("#where");
  found.gains = await page.$$eval("td.gain", (cells) => cells.map((cell) => cell.innerText));
  found.loading = await page.evaluate(() => window.loading);
  const strokes = async () => {
    let last;
    for (const stroke of job.strokes) last = await answer(page, () => draw(page, stroke));
    return last;
  };
  found.drawn = await strokes();
  found.photo = await answer(page, () => page.setInputFiles("#file", job.photo));
  found.again = await strokes();
  await shot("desktop");
  await page.emulateMedia({ colorScheme: backend === "webgpu" ? "dark" : "light" });
  await page.setViewportSize({ width: 390, height: 844 });
  await shot("phone");
  found.overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  found.isolated = await page.evaluate(() => crossOriginIsolated);
  await page.evaluate(() => Object.defineProperty(navigator, "gpu", { value: undefined }));
  await page.click("text=wasm");
  await page.waitForSelector("body[data-state=ready]");
  await page.click("text=WebGPU");
  await page.waitForSelector("body[data-state=failed]");
  found.without = [await page.textContent("#status"), await page.isChecked("[value=wasm]")];
  found.kept = [await page.textContent("#where"), await page.locator("tbody").innerText()];
  await page.close();
  return found;
}

/** Draw one stroke with the mouse; its points are fractions of the board. */
async function draw(page, points) {
  const { x, y, width, height } = await page.locator("#ink").boundingBox();
  const places = points.map(([right, down]) => [x + right * width, y + down * height]);
  await page.mouse.move(...places[0]);
  await page.mouse.down();
  for (const place of places.slice(1)) await page.mouse.move(...place, { steps: 8 });
  await page.mouse.up();
}

/** Let transformers.js classify or generate, in a page for each model: an error in one stops it. */
async function library(browser, device, [name, dtype, kind]) {
  const page = await open(browser, "transformers.html");
  const found = await page.evaluate(async ([name, dtype, device, kind, { prompts, tokens, picture }]) => {
    const hub = await import("./transformers.js");
    const settings = { device, dtype };
    if (kind === "image-classification") {
      const classify = await hub.pipeline(kind, name, settings);
      return { scores: await classify(picture, { top_k: null }) };
    }
    const tokenizer = await hub.AutoTokenizer.from_pretrained(name);
    const inputs = await tokenizer(prompts, { padding: true });
    const Auto = kind === "text-generation" ? hub.AutoModelForCausalLM : hub.AutoModelForSeq2SeqLM;
    const model = await Auto.from_pretrained(name, settings);
    const length = { max_new_tokens: tokens, min_new_tokens: tokens };
    const ids = await model.generate({ ...inputs, ...length, do_sample: false });
    const numbers = (tensor) => tensor.tolist().map((row) => row.map(Number));
    const found = { inputs: numbers(inputs.input_ids), ids: numbers(ids) };
    if (kind === "text-generation") found.logits = (await model(inputs)).logits.tolist();
    return found;
  }, [name, dtype, device, kind, job]);
  found.dispatches = await page.evaluate(() => window.dispatches);
  await page.close();
  return found;
}

const browser = await chromium.launch({ executablePath: job.chromium, args: ARGUMENTS });
try {
  const found = { demo: {}, library: {} };
  for (const backend of ["wasm", "webgpu"]) {
    found.demo[backend] = await demo(browser, backend);
    found.library[backend] = {};
    for (const [key, ...model] of job.models[backend]) {
      found.library[backend][key] = await library(browser, backend, model);
    }
  }
  console.log(JSON.stringify(found));
} finally {
  await browser.close();
}
