import { openPackage } from "./package.js";
import { WIDTH, drawPicture, readInk } from "./picture.js";

const NAMES = ["original", "merged"]; // the folders below packages/
const SAMPLES = ["7-8", "0-5", "9-2", "6-6", "1-8", "3-4"];
const RUNS = 20, BUDGET_MS = 400; // time per run: the median of at most so many runs, or so long

const $ = (selector) => document.querySelector(selector);
const [board, hint, status] = [$("#ink"), $("#hint"), $("#status")];
const brush = board.getContext("2d", { willReadFrequently: true });

let models = {};
let answers = 0;
let cells = true; // the board shows a picture of the model's own size
let turn = Promise.resolve(); // a session does one thing at a time

/** Do `work` when what was asked for before is done; say what went wrong, if anything does. */
function inTurn(work) {
  turn = turn.then(work).catch((error) => say(`It does not run: ${error.message ?? error}`, true));
  return turn;
}

function say(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("error", bad);
  document.body.dataset.state = bad ? "failed" : "ready";
}

async function load(backend) {
  document.body.dataset.state = "loading";
  status.textContent = "Loading…";
  for (const model of Object.values(models)) await model.close();
  models = {};
  for (const name of NAMES) {
    const model = await openPackage(`packages/${name}/`, backend);
    await timed(model); // the first run prepares kernels
    model.runMs = await timed(model);
    models[name] = model;
  }
  await answer();
  costs();
  say(`Both models run on ${backend === "webgpu" ? "WebGPU" : "wasm"}.`);
}

async function timed(model) {
  const ink = readInk(board, cells);
  const times = [];
  const start = performance.now();
  while (!times.length || (times.length < RUNS && performance.now() - start < BUDGET_MS)) {
    const before = performance.now();
    await probabilities(model, ink);
    times.push(performance.now() - before);
  }
  return times.toSorted((a, b) => a - b)[times.length >> 1];
}

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
  const ink = readInk(board, cells);
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

function costs() {
  const { original, merged } = models;
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
    change.textContent = key === "bytes" ? `${percent.toFixed(1)} %`.replace("-", "−") : "—";
  });
  const { groups, parameters_before, parameters_after } = merged.manifest.merge;
  const layers = groups.map((group) => group.layers.join(", ")).join("; ");
  $("#note").textContent =
    `In the merged model layers ${layers} share one feed-forward sublayer: ${parameters_after.toLocaleString("en")} ` +
    `parameters instead of ${parameters_before.toLocaleString("en")}. Sharing saves bytes, not ` +
    "arithmetic: the time per run stays, and times of so small a model vary.";
}

async function show(source, sample = null) {
  const image = await createImageBitmap(source, { colorSpaceConversion: "none" });
  await inTurn(async () => {
    cells = drawPicture(board, image);
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
  cells = false;
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
  if (cells) clear();
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

const [wanted] = new URLSearchParams(location.search).getAll("backend");
for (const input of document.querySelectorAll("#backend input")) input.checked = input.value === (wanted ?? "wasm");
clear();
inTurn(async () => {
  const first = await (await fetch(`samples/${SAMPLES[0]}.png`)).blob();
  cells = drawPicture(board, await createImageBitmap(first, { colorSpaceConversion: "none" }));
  hint.hidden = true;
  mark($("#samples button"));
  await load($("#backend input:checked").value);
});
