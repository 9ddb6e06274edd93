// Pictures for a model that was trained on the digits of scikit-learn: 8 x 8 cells each, ink 0 to 1.

const CELLS = 8;
export const WIDTH = 2 * CELLS;

/** Draw a picture on the board: one of the model's own size cell by cell, any other as ink on black. */
export function drawPicture(board, image) {
  const brush = board.getContext("2d", { willReadFrequently: true });
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, board.width, board.height);
  const cells = image.width === WIDTH && image.height === CELLS;
  const scale = Math.min(board.width / image.width, board.height / image.height);
  const [w, h] = [image.width * scale, image.height * scale];
  brush.imageSmoothingEnabled = !cells;
  brush.drawImage(image, (board.width - w) / 2, (board.height - h) / 2, w, h);
  if (!cells) whiteOnBlack(brush, (board.width - w) / 2, (board.height - h) / 2, w, h);
  return cells;
}

/** Return the ink in each cell, rows first; `cells`: the board shows cells, else strokes. */
export function readInk(board, cells) {
  if (cells) return averaged(board);
  const fitted = new OffscreenCanvas(board.width, board.height);
  const brush = fitted.getContext("2d", { willReadFrequently: true });
  const half = board.width / 2;
  for (const left of [0, half]) {
    const box = inkBox(board, left, half);
    if (!box) continue;
    // As in the training pictures, a digit is as high as its half; a wide one is as wide.
    const scale = Math.min(board.height / box.h, half / box.w);
    const [w, h] = [box.w * scale, box.h * scale];
    const at = [left + (half - w) / 2, (board.height - h) / 2];
    brush.drawImage(board, box.x, box.y, box.w, box.h, ...at, w, h);
  }
  return averaged(fitted);
}

function pixelsOf(canvas, ...area) {
  return canvas.getContext("2d").getImageData(...area).data;
}

function averaged(canvas) {
  const side = canvas.height / CELLS;
  const pixels = pixelsOf(canvas, 0, 0, canvas.width, canvas.height);
  const ink = new Float64Array(WIDTH * CELLS); // float32 sums of 1,600 would show in the answer
  for (let i = 0; i < pixels.length / 4; i++) {
    const [x, y] = [i % canvas.width, Math.floor(i / canvas.width)];
    ink[Math.floor(y / side) * WIDTH + Math.floor(x / side)] += pixels[4 * i] / 255 / side ** 2;
  }
  return ink;
}

function inkBox(board, left, width) {
  const pixels = pixelsOf(board, left, 0, width, board.height);
  let [x0, y0, x1, y1] = [Infinity, Infinity, -1, -1];
  for (let i = 0; i < pixels.length / 4; i++) {
    if (pixels[4 * i] < 96) continue;
    const [x, y] = [i % width, Math.floor(i / width)];
    [x0, x1, y0, y1] = [Math.min(x0, x), Math.max(x1, x), Math.min(y0, y), Math.max(y1, y)];
  }
  return x1 < 0 ? null : { x: left + x0, y: y0, w: x1 - x0 + 1, h: y1 - y0 + 1 };
}

/** Make a photograph what the model knows: gray, ink bright (most of a page is paper), paper 0. */
function whiteOnBlack(brush, ...area) {
  const picture = brush.getImageData(...area.map(Math.round));
  const gray = Float32Array.from({ length: picture.data.length / 4 }, (_, i) => {
    const [r, g, b] = picture.data.subarray(4 * i, 4 * i + 3);
    return 0.299 * r + 0.587 * g + 0.114 * b;
  });
  const paper = gray.toSorted()[gray.length >> 1];
  const ink = gray.map((value) => Math.abs(value - paper));
  const most = Math.max(1, ink.reduce((a, b) => Math.max(a, b)));
  ink.forEach((value, i) => {
    const bright = 255 * Math.max(0, (value / most - 0.25) / 0.75); // below a quarter: shadows
    picture.data.set([bright, bright, bright, 255], 4 * i);
  });
  brush.putImageData(picture, Math.round(area[0]), Math.round(area[1]));
}
