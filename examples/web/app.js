import { openPackage } from "./package.js";
import { WIDTH, drawPicture, readInk } from "./picture.js";

const NAMES = ["original", "merged"]; // the folders below packages/
const SAMPLES = ["7-8", "0-5", "9-2", "6-6", "1-8", "3-4"];
const NAMED = { wasm: "wasm", webgpu: "WebGPU" };
const RUNS = 20, BUDGET_MS = 1000, NOISE = 20; // time per run: the fastest of so many, or of as many as fit; percent that is noise

const $ = (selector) => document.querySelector(selector);
const [board, hint, status] = [$("#ink"), $("#hint"), $("#status")];
const brush = board.getContext("2d", { willReadFrequently: true });

let models = {};
let running = "wasm";
let answers = 0;
let shown = "cells"; // a picture of the model's own size; or another "picture", or "strokes"
let turn = Promise.resolve(); // a session does one thing at a time

/** Do `work` when what was asked for before is done; say what went wrong, if anything does. */
function inTurn(work) {
  turn = turn.then(work).catch((error) => say(`It does not run: ${error.message ?? error}.`, "failed"));
  return turn;
}

function say(text, state = "ready") {
  status.textContent = text;
  document.body.dataset.state = state;
}

function choose(backend) {
  for (const input of document.querySelectorAll("#backend input")) input.checked = input.value === backend;
}

async function load(backend) {
  $("#where").textContent = `on ${NAMED[backend]}`;
  for (const cell of document.querySelectorAll("tbody td")) [cell.textContent, cell.className] = ["…", ""];
  say(`Loading on ${NAMED[backend]}…`, "loading");
  const opened = {};
  try {
    for (const name of NAMES) opened[name] = await openPackage(`packages/${name}/`, backend);
  } catch (error) {
    choose(running); // what ran before goes on
    if (models.merged) costs();
    throw error;
  }
  for (const model of Object.values(models)) await model.close();
  [models, running] = [opened, backend];
  await answer(); // the first run prepares kernels
  await time();
  costs();
  say(`Both models run on ${NAMED[backend]}.`);
}

/** Run the models in turn, so that what else the machine does slows both. */
async function time() {
  const ink = inkNow();
  const times = Object.fromEntries(NAMES.map((name) => [name, []]));
  const start = performance.now();
  for (let run = 0; run < RUNS && (!run || performance.now() - start < BUDGET_MS); run++) {
    for (const name of NAMES) {
      const before = performance.now();
      await probabilities(models[name], ink);
      times[name].push(performance.now() - before);
    }
  }
  for (const name of NAMES) {
    models[name].runMs = Math.min(...times[name]);
  }
}

const inkNow = () => readInk(board, shown === "cells");

async function probabilities(model, ink) {
  const pixels = Float32Array.from(ink, (value) => 2 * value - 1);
  const { logits } = await model.run({ pixel_values: [pixels, [1, 1, 8, WIDTH]] });
  const values = Array.from(await logits.getData());
  const most = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

async function answer() {
  const ink = inkNow();
  const found = {};
  for (const name of NAMES) found[name] = await probabilities(models[name], ink);
  const best = found.merged.indexOf(Math.max(...found.merged));
  const other = found.original.indexOf(Math.max(...found.original));
  $("#answer").innerHTML = `<b>${best}</b><span>${(100 * found.merged[best]).toFixed(1)} % sure.
    ${best === other ? "The original says the same." : `The original says ${other}.`}</span>`;
  $("#chart").replaceChildren(
    ...found.merged.map((_, digit) => {
      const column = document.createElement("div");
      column.classList.toggle("best", digit === best);
      column.innerHTML = `<span>${["merged", "original"].map((name) => {
        const p = found[name][digit];
        return `<i class="${name}" data-p="${p}" style="height:${100 * p}%"></i>`;
      }).join("")}</span>${digit}`;
      return column;
    }),
  );
  const seen = $("#seen").getContext("2d");
  ink.forEach((value, i) => {
    seen.fillStyle = `rgb(${Array(3).fill(Math.round(255 * value))})`;
    seen.fillRect(i % WIDTH, Math.floor(i / WIDTH), 1, 1);
  });
  document.body.dataset.answers = ++answers;
}

/** Show what the models cost where they run; only fewer bytes are shown as a gain. */
function costs() {
  const { original, merged } = models;
  $("#where").textContent = `on ${NAMED[running]}`;
  const rows = [
    ["bytes", (n) => `${Math.round(n / 1000).toLocaleString("en")} kB`],
    ["loadMs", (n) => `${n.toFixed(n < 10 ? 1 : 0)} ms`],
    ["runMs", (n) => `${n.toFixed(n < 10 ? 2 : 0)} ms`],
  ];
  rows.forEach(([key, text], i) => {
    const [before, after, change] = document.querySelectorAll("tbody tr")[i].querySelectorAll("td");
    before.textContent = text(original[key]);
    after.textContent = text(merged[key]);
    const percent = 100 * (merged[key] / original[key] - 1);
    change.textContent = changed(key, percent);
    change.classList.toggle("gain", key === "bytes" && percent < 0);
  });
  const { groups, parameters_before, parameters_after } = merged.manifest.merge;
  const layers = groups.map((group) => group.layers.join(", ")).join("; ");
  $("#note").textContent =
    `In the merged model layers ${layers} share one feed-forward sublayer: ${parameters_after.toLocaleString("en")} ` +
    `parameters instead of ${parameters_before.toLocaleString("en")}. Sharing saves bytes, not ` +
    "arithmetic: the time per run stays, and times of so small a model vary.";
}

/** What a change is in words: the first model's time to load has the runtime's start in it. */
function changed(key, percent) {
  if (key === "loadMs") return "—";
  const text = `${percent > 0 ? "+" : ""}${percent.toFixed(key === "bytes" ? 1 : 0)} %`.replace("-", "−");
  if (key === "bytes") return text;
  if (Math.abs(percent) < NOISE) return `${text}, noise`;
  return `${text}, ${percent > 0 ? "slower" : "faster"}`;
}

async function show(source, sample = null) {
  const image = await createImageBitmap(source, { colorSpaceConversion: "none" });
  await inTurn(async () => {
    shown = drawPicture(board, image) ? "cells" : "picture";
    hint.hidden = true;
    await answer();
    mark(sample);
  });
}

function mark(sample) {
  for (const button of document.querySelectorAll("#samples button")) {
    button.setAttribute("aria-pressed", button === sample);
  }
}

function clear() {
  shown = "strokes";
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, board.width, board.height);
  hint.hidden = false;
  mark(null);
}

// Drawing: a click begins a new picture if the board shows one.
let at = null;
const place = (event) => [
  (event.offsetX * board.width) / board.clientWidth, (event.offsetY * board.height) / board.clientHeight,
];
board.addEventListener("pointerdown", (event) => {
  if (shown !== "strokes") clear();
  hint.hidden = true;
  board.setPointerCapture(event.pointerId);
  at = place(event);
  Object.assign(brush, { strokeStyle: "#fff", lineWidth: board.height / 7, lineCap: "round", lineJoin: "round" });
});
board.addEventListener("pointermove", (event) => {
  if (!at) return;
  const next = place(event);
  brush.beginPath();
  brush.moveTo(...at);
  brush.lineTo(...next);
  brush.stroke();
  at = next;
});
for (const end of ["pointerup", "pointercancel"]) {
  board.addEventListener(end, () => {
    at = null;
    inTurn(answer);
  });
}

$("#clear").addEventListener("click", () => {
  clear();
  inTurn(answer);
});
$("#file").addEventListener("change", (event) => event.target.files[0] && show(event.target.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("#board").classList.add("over");
});
document.addEventListener("dragleave", () => $("#board").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("#board").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file?.type.startsWith("image/")) show(file);
});

for (const name of SAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.innerHTML = `<img src="samples/${name}.png" alt="${name.replace("-", " and ")}">`;
  button.addEventListener("click", async () => {
    show(await (await fetch(`samples/${name}.png`)).blob(), button);
  });
  $("#samples").append(button);
}
$("#backend").addEventListener("change", (event) => inTurn(() => load(event.target.value)));

choose(running); // a browser may remember another choice
clear();
inTurn(async () => {
  const first = await (await fetch(`samples/${SAMPLES[0]}.png`)).blob();
  drawPicture(board, await createImageBitmap(first, { colorSpaceConversion: "none" }));
  shown = "cells";
  hint.hidden = true;
  mark($("#samples button"));
  await load(running);
});
