/* Bars, number lines and tables, from numbers. Nothing here computes what it shows. */
'use strict';

/* An element with attributes and children; `svg:` before the name makes one of a drawing. */
function element(name, attributes = {}, ...children) {
  const [, svg, tag] = name.match(/^(svg:)?(.*)$/);
  const made = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function fill(id, ...children) { document.getElementById(id).replaceChildren(...children); }

/* Three significant digits, with a real minus sign. */
function short(x) {
  if (!Number.isFinite(x)) return String(x).replace('-', '−').replace('Infinity', '∞');
  const text = x === 0 ? '0' : Math.abs(x) >= 1e-4 && Math.abs(x) < 1e5 ? String(Number(x.toPrecision(3))) : x.toExponential(1);
  return text.replaceAll('-', '−');
}

/* Nine digits tell every float32 from every other. */
function full(x) { return x.toPrecision(9).replace('-', '−'); }

function timesWords(factor) {
  const power = Math.log2(factor);
  if (Number.isInteger(power) && power < 0) return `1/${2 ** -power}`;
  return short(factor);
}

function share(x, whole) { return whole > 0 ? x / whole : 0; }

/* A bar with where it was before; the text says all that the bar shows. */
function bar({ name, says, now, before = null }) {
  const track = element('div', { class: 'track', 'aria-hidden': 'true' });
  track.append(element('div', { class: 'fill', style: `width: ${100 * Math.min(Math.max(now, 0), 1)}%` }));
  if (before !== null) track.append(element('div', { class: 'was', style: `left: ${100 * Math.min(Math.max(before, 0), 1)}%` }));
  return element('li', {}, element('div', { class: 'of' }, element('span', {}, name), element('span', {}, says)), track);
}

/* Bars that are there move; others are made. */
function showBars(id, bars) {
  const list = document.getElementById(id);
  if (list.children.length !== bars.length) { list.replaceChildren(...bars.map(bar)); return; }
  bars.forEach((of, k) => {
    const [old, fresh] = [list.children[k], bar(of)];
    old.firstChild.replaceWith(fresh.firstChild);
    const [from, to] = [old.lastChild, fresh.lastChild];
    if (from.children.length !== to.children.length) { from.replaceWith(to); return; }
    [...to.children].forEach((part, n) => from.children[n].setAttribute('style', part.getAttribute('style')));
  });
}

function table(id, caption, heads, rows) {
  const head = element('tr', {}, ...heads.map((text) => element('th', { scope: 'col' }, text)));
  const lines = rows.map(([first, ...cells]) => element('tr', {}, element('th', { scope: 'row' }, first), ...cells.map((cell) => (
    cell instanceof Element && cell.tagName === 'TD' ? cell : element('td', {}, cell)))));
  fill(id, element('caption', {}, caption), element('thead', {}, head), element('tbody', {}, ...lines));
}

/* One line: the grid from -reach to reach, weights above and what they become on it. */
function numberLine(weights, { scale, qmin, qmax }, reach, width, says) {
  const margin = 14, x = (v) => margin + (v / reach + 1) / 2 * (width - 2 * margin), high = 22, low = 62, parts = [];
  const first = Math.max(qmin, Math.ceil(-reach / scale)), last = Math.min(qmax, Math.floor(reach / scale)), apart = x(scale) - x(0);
  if (apart < 3) {
    parts.push(element('svg:rect', { class: 'band', x: x(first * scale), y: low - 7, width: (last - first) * apart, height: 14 }));
  } else {
    for (let q = first; q <= last; q++) {
      parts.push(element('svg:line', { class: 'tick', x1: x(q * scale), x2: x(q * scale), y1: low - 7, y2: low + 7 }));
    }
  }
  parts.push(element('svg:line', { class: 'axis', x1: margin, x2: width - margin, y1: low, y2: low }));
  for (const { w, becomes } of weights) {
    const [a, b] = [x(w), x(becomes)], r = 4;
    parts.push(element('svg:line', { class: 'link', x1: a, x2: b, y1: high + r, y2: low - r }));
    parts.push(element('svg:circle', { class: 'weight', cx: a, cy: high, r }));
    parts.push(element('svg:path', { class: 'becomes', d: `M${b - r},${low - r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}` }));
  }
  const label = (v, anchor) => parts.push(element('svg:text', { x: x(v), y: low + 24, 'text-anchor': anchor }, short(v)));
  label(-reach, 'start');
  label(0, 'middle');
  label(reach, 'end');
  return element('svg:svg', { role: 'img', 'aria-label': says, viewBox: `0 0 ${width} 92`, height: 92 }, ...parts);
}

/* A bar for each weight's error, as a share of `size`; the axis ends at 100 %, or 10 %, or ... */
function errorBars(weights, size, width, says) {
  const height = 80, middle = height / 2, left = 50, each = (width - left - 4) / weights.length, parts = [];
  const errors = weights.map(({ w, becomes }) => (becomes - w) / size), most = Math.max(...errors.map(Math.abs));
  const end = most > 0 ? 10 ** Math.ceil(Math.log10(most) - 1e-6) : 1;
  for (const [y, text] of [[1, `${short(100 * end)} %`], [middle, '0'], [height - 1, `${short(-100 * end)} %`]]) {
    parts.push(element('svg:line', { class: 'link', x1: left, x2: width, y1: y, y2: y }), element('svg:text', { x: 0, y: y + 4 }, text));
  }
  errors.forEach((error, k) => {
    const tall = error / end * (middle - 1);
    parts.push(element('svg:rect', {
      class: 'error', x: left + 4 + k * each, width: Math.max(Math.min(each * 0.8, 40), 0.6), height: Math.abs(tall),
      y: tall > 0 ? middle - tall : middle,
    }));
  });
  return element('svg:svg', { role: 'img', 'aria-label': says, viewBox: `0 -6 ${width} ${height + 12}`, height: height + 12 }, ...parts);
}
