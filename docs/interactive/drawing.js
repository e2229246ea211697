/* A digit drawn by pointer or keyboard, and the image of 8 by 8 pixels that the network reads.
 *
 * The network's images are bitmaps of 32 by 32, fitted to the digit, of which every 4 by 4 are counted (0 to 16) and divided by 16.
 */
'use strict';

const PEN = 5 / 32; // how wide a stroke of the bitmaps is

/* Strokes are lists of points from 0 to 1. `changed` is called when there is something new, `says` when the pen moves by keyboard. */
function drawingArea(canvas, changed, says) {
  let strokes = [], stroke = null, pen = null;
  const context = canvas.getContext('2d'), size = canvas.width;

  function show() {
    context.clearRect(0, 0, size, size);
    stroked(context, strokes.map((points) => points.map(([x, y]) => [x * size, y * size])), size * 0.08);
    if (!pen) return;
    context.beginPath();
    context.arc(pen[0] * size, pen[1] * size, 7, 0, 2 * Math.PI);
    context.lineWidth = 2;
    context.strokeStyle = '#2b6ca3';
    context.stroke();
  }

  function begin(point) { stroke = [point]; strokes.push(stroke); show(); }
  function extend(point) { stroke.push(point); show(); }
  function end() { stroke = null; changed(); }
  function clear() { strokes = []; stroke = null; show(); changed(); }
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };

  canvas.addEventListener('pointerdown', (event) => { canvas.setPointerCapture(event.pointerId); pen = null; begin(place(event)); });
  canvas.addEventListener('pointermove', (event) => { if (stroke && event.buttons) extend(place(event)); });
  for (const over of ['pointerup', 'pointercancel']) canvas.addEventListener(over, () => { if (stroke) end(); });

  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener('focus', () => { if (canvas.matches(':focus-visible')) { pen = pen || [0.5, 0.5]; show(); } });
  canvas.addEventListener('blur', () => { if (pen && stroke) end(); pen = null; show(); });
  canvas.addEventListener('keydown', (event) => {
    const step = steps[event.key];
    if (!step && event.key !== ' ' && event.key !== 'Backspace') return;
    event.preventDefault();
    pen = pen || [0.5, 0.5];
    if (event.key === 'Backspace') { clear(); says('cleared'); return; }
    if (step) {
      pen = pen.map((x, axis) => Math.min(Math.max(x + step[axis] / 16, 0.05), 0.95));
      if (stroke) extend(pen);
    } else if (stroke) end();
    else begin(pen);
    show();
    says(`Pen ${stroke ? 'down' : 'up'}, ${Math.round(100 * pen[0])} % from the left, ${Math.round(100 * pen[1])} % from the top`);
  });

  return { clear, isEmpty: () => strokes.length === 0, pixels: () => pixelsOf(strokes) };
}

function stroked(context, strokes, width) {
  Object.assign(context, { lineWidth: width, lineCap: 'round', lineJoin: 'round', strokeStyle: '#000' });
  for (const points of strokes) {
    context.beginPath();
    context.moveTo(...points[0]);
    for (const point of points) context.lineTo(...point);
    context.stroke();
  }
}

/* As the network's images are made: fitted to the square, and ink counted in each of 64 parts, in sixteenths. */
function pixelsOf(strokes) {
  const size = 64, xs = strokes.flat().map(([x]) => x), ys = strokes.flat().map(([, y]) => y);
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const inner = size * (1 - PEN), scale = inner / Math.max(right - left, bottom - top, 0.05);
  const fitted = ([x, y]) => [size / 2 + scale * (x - (left + right) / 2), size / 2 + scale * (y - (top + bottom) / 2)];
  const canvas = Object.assign(document.createElement('canvas'), { width: size, height: size }), context = canvas.getContext('2d');
  stroked(context, strokes.map((points) => points.map(fitted)), size * PEN);
  const { data } = context.getImageData(0, 0, size, size), part = size / 8, counts = new Float64Array(64);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) if (data[4 * (y * size + x) + 3] > 127) counts[8 * Math.floor(y / part) + Math.floor(x / part)]++;
  }
  return counts.map((n) => Math.round(16 * n / part ** 2) / 16);
}

/* Black on white, as big as the canvas has pixels. */
function showPixels(canvas, pixels) {
  const context = canvas.getContext('2d'), image = context.createImageData(8, 8);
  pixels.forEach((x, k) => image.data.set([255 * (1 - x), 255 * (1 - x), 255 * (1 - x), 255], 4 * k));
  context.putImageData(image, 0, 0);
}
