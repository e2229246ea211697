/* A port of levels 0 to 6 of eqfact's conformance cases, in plain JavaScript, written from docs/porting.md and the pages that it names.
 *
 * Its sections come in the order of that page, and each function says which law it is. No dependencies; as an adapter under Node,
 *
 *     eqfact conform --cmd "node docs/ports/javascript/port.js" --level 0-6
 *
 * and in a browser, as a plain script or as a module: everything is in one object, `eqfact`, and `eqfact.answer(question)` answers.
 *
 * Numbers are JavaScript's, which are float64. In a float32 network every result of an op is rounded with Math.fround; sums within one op
 * are added up in float64 and rounded once, which is at least as near as the bounds ask for. `rounding(dtype)` is all that knows of it.
 */
'use strict';

(function (root) {

class Refused extends Error {} // the question breaks a rule
class Skipped extends Error {} // this port does not do that

function refuse(why) { throw new Refused(why); }
function require_(holds, why) { if (!holds) refuse(why); }

// ---------------------------------------------------------------------------------------------------------------------------------------
// The protocol: arrays
// ---------------------------------------------------------------------------------------------------------------------------------------

const BYTES = { float32: 4, float64: 8, int32: 4, int64: 8 };

/* How results are rounded in a type: the one place where float32 differs from float64. */
function rounding(dtype) { return dtype === 'float32' ? Math.fround : (x) => x; }

function product(shape) { return shape.reduce((a, b) => a * b, 1); }

/* An array of a question: little-endian bytes in C order. Held as float64, of which float32, int32 and the int64 that occur are parts. */
function decodeArray(code) {
  require_(code.dtype in BYTES, `no dtype ${code.dtype}`);
  const text = atob(code.base64), bytes = Uint8Array.from(text, (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  const width = BYTES[code.dtype], data = new Float64Array(product(code.shape));
  require_(bytes.length === width * data.length, 'an array has not the bytes of its shape');
  for (let k = 0; k < data.length; k++) {
    if (code.dtype === 'float32') data[k] = view.getFloat32(k * width, true);
    else if (code.dtype === 'float64') data[k] = view.getFloat64(k * width, true);
    else if (code.dtype === 'int32') data[k] = view.getInt32(k * width, true);
    else {
      data[k] = Number(view.getBigInt64(k * width, true));
      require_(Number.isSafeInteger(data[k]), 'a whole number of more than 53 bits');
    }
  }
  return { dtype: code.dtype, shape: code.shape, data };
}

function encodeArray({ dtype, shape, data }) {
  const width = BYTES[dtype], view = new DataView(new ArrayBuffer(width * data.length));
  data.forEach((x, k) => {
    if (dtype === 'float32') view.setFloat32(k * width, x, true);
    else if (dtype === 'float64') view.setFloat64(k * width, x, true);
    else if (dtype === 'int32') view.setInt32(k * width, x, true);
    else view.setBigInt64(k * width, BigInt(x), true);
  });
  let text = '';
  for (const byte of new Uint8Array(view.buffer)) text += String.fromCharCode(byte);
  return { dtype, shape: [...shape], base64: btoa(text) };
}

function isArray(x) { return x !== null && typeof x === 'object' && x.data instanceof Float64Array; }

/* A new array, entry by entry from its index, rounded to its type. */
function make(dtype, shape, entry) {
  const round = rounding(dtype), data = new Float64Array(product(shape)), index = shape.map(() => 0);
  for (let k = 0; k < data.length; k++) {
    data[k] = round(entry(index, k));
    for (let axis = shape.length - 1; axis >= 0 && ++index[axis] === shape[axis]; axis--) index[axis] = 0;
  }
  return { dtype, shape: [...shape], data };
}

/* The entry at an index; an axis of one entry is repeated. */
function at(x, index) {
  let k = 0;
  for (let axis = 0; axis < x.shape.length; axis++) k = k * x.shape[axis] + (x.shape[axis] === 1 ? 0 : index[axis]);
  return x.data[k];
}

/* A parameter for a channel: a number, or an array with one entry for all channels or one for each. */
function ofChannel(parameter, c) {
  return isArray(parameter) ? parameter.data[parameter.data.length === 1 ? 0 : c] : parameter;
}

function vector(dtype, values) { return make(dtype, [values.length], ([c]) => values[c]); }

/* All indices of a shape, in C order. */
function indices(shape) {
  const all = [];
  make('float64', shape, (index) => all.push([...index]));
  return all;
}

function same(a, b) { return a.length === b.length && a.every((n, k) => n === b[k]); }

// ---------------------------------------------------------------------------------------------------------------------------------------
// The protocol: networks
// ---------------------------------------------------------------------------------------------------------------------------------------

function decodeParameter(x) {
  if (x === null || typeof x !== 'object') return x;
  if (Array.isArray(x)) return x.map(decodeParameter);
  if ('array' in x) return decodeArray(x.array);
  if ('float' in x) return { inf: Infinity, '-inf': -Infinity, nan: NaN }[x.float];
  return Object.fromEntries(Object.entries(x).map(([key, value]) => [key, decodeParameter(value)]));
}

function encodeParameter(x) {
  if (isArray(x)) return { array: encodeArray(x) };
  if (Array.isArray(x)) return x.map(encodeParameter);
  if (x === Infinity || x === -Infinity) return { float: x > 0 ? 'inf' : '-inf' };
  if (x === null || typeof x !== 'object') return x;
  return Object.fromEntries(Object.entries(x).map(([key, value]) => [key, encodeParameter(value)]));
}

/* An op is {kind, parameters}; nodes that share an op hold the same object. */
function decodeOp(code) {
  const [kind, ...more] = Object.keys(code);
  require_(more.length === 0 && Object.hasOwn(OPS, kind), `no op ${kind}`);
  const op = { kind, parameters: { ...OPS[kind].defaults, ...decodeParameter(code[kind]) } };
  checkFinite(op);
  if (kind === 'Sloped') op.parameters.op = decodeOp(code[kind].op);
  return op;
}

function encodeOp({ kind, parameters }) {
  return { [kind]: kind === 'Sloped' ? { op: encodeOp(parameters.op), slope: encodeParameter(parameters.slope) } : encodeParameter(parameters) };
}

/* {inputs: shapes by name, outputs, nodes: [{name, op, inputs}], shapes: of every value without the batch} */
function decodeNetwork(code) {
  const inputs = code.inputs, nodes = [], ops = new Map(), known = new Set(Object.keys(inputs));
  for (const node of code.nodes) {
    require_(!known.has(node.name), `two values are named ${node.name}`);
    for (const name of node.inputs) require_(known.has(name), `${node.name} reads ${name}, which is neither an input nor a node before it`);
    require_(typeof node.op !== 'string' || ops.has(node.op), `${node.name} uses the op of ${node.op}, which is no node before it`);
    const op = typeof node.op === 'string' ? ops.get(node.op) : decodeOp(node.op);
    nodes.push({ name: node.name, op, inputs: [...node.inputs] });
    ops.set(node.name, op);
    known.add(node.name);
  }
  for (const name of code.outputs) require_(known.has(name), `no value ${name} to put out`);
  return withShapes({ inputs, outputs: code.outputs, nodes });
}

/* Shapes are found by running a batch of one: forward refuses what does not fit. */
function withShapes(network) {
  const zeros = Object.entries(network.inputs).map(([name, shape]) => [name, make('float64', [1, ...shape], () => 0)]);
  const shapes = Object.fromEntries(Object.entries(run(network, Object.fromEntries(zeros))).map(([name, x]) => [name, x.shape.slice(1)]));
  return { ...network, shapes };
}

function encodeNetwork({ inputs, outputs, nodes }) {
  const firstUser = new Map();
  const coded = nodes.map((node) => {
    const op = firstUser.has(node.op) ? firstUser.get(node.op) : encodeOp(node.op);
    if (!firstUser.has(node.op)) firstUser.set(node.op, node.name);
    return { name: node.name, op, inputs: node.inputs };
  });
  return { format: 'eqfact network', version: 1, inputs, outputs, nodes: coded };
}

function readersOf(network, value) { return network.nodes.filter((node) => node.inputs.includes(value)); }
function makerOf(network, value) { return network.nodes.find((node) => node.name === value); }
function usersOf(network, op) { return network.nodes.filter((node) => node.op === op); }

// ---------------------------------------------------------------------------------------------------------------------------------------
// The protocol: refusals
// ---------------------------------------------------------------------------------------------------------------------------------------

/* NaN and infinity in weights; bounds of a Clip, the value of a Pad and masks may be infinite. */
function checkFinite({ kind, parameters }) {
  const open = { Clip: ['low', 'high'], Pad: ['value'], Softmax: ['mask'] }[kind] || [];
  for (const [name, parameter] of Object.entries(parameters)) {
    const numbers = isArray(parameter) ? parameter.data : typeof parameter === 'number' ? [parameter] : [];
    for (const x of numbers) require_(open.includes(name) ? !Number.isNaN(x) : Number.isFinite(x), `${kind}: ${name} is not finite`);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Ops. Values are (N, C, *spatial); every op has its defaults, and forward(parameters, values).
// ---------------------------------------------------------------------------------------------------------------------------------------

/* One number for all axes of space, or a list with one for each. */
function forAxes(parameter, axes) {
  const list = Array.isArray(parameter) ? parameter : Array(axes).fill(parameter);
  require_(list.length === axes, `${list.length} numbers for ${axes} axes of space`);
  return list;
}

/* [before, after] for each axis. */
function sides(padding, axes) { return forAxes(padding, axes).map((p) => (Array.isArray(p) ? p : [p, p])); }

/* Where windows lie: their places, the taps of the kernel, and the size of what comes out. */
function windows(p, kernel, spatial) {
  const axes = spatial.length, stride = forAxes(p.stride, axes), dilation = forAxes(p.dilation, axes), pads = sides(p.padding, axes);
  const size = spatial.map((n, a) => Math.floor((n + pads[a][0] + pads[a][1] - dilation[a] * (kernel[a] - 1) - 1) / stride[a]) + 1);
  require_(size.every((n) => n >= 1), 'a window is larger than its padded input');
  const place = (at_, tap) => at_.map((q, a) => stride[a] * q + dilation[a] * tap[a] - pads[a][0]);
  return { size, taps: indices(kernel), place };
}

function inside(place, spatial) { return place.every((q, a) => q >= 0 && q < spatial[a]); }

function checkLayer(p, x, rank) {
  const [out, perGroup] = p.weight.shape, groups = p.groups === undefined ? 1 : p.groups;
  require_(p.weight.shape.length === rank + 2 && x.shape.length === rank + 2, 'weights do not have the axes of what they read');
  require_(x.shape[1] === groups * perGroup && out % groups === 0, `${x.shape[1]} channels do not fit weights for ${groups * perGroup}`);
  require_(p.bias === null || same(p.bias.shape, [out]), 'a bias has one entry for each output channel');
  return { out, perGroup, groups };
}

function bias(p, o) { return p.bias === null ? 0 : p.bias.data[o]; }

/* y[o, p] = b[o] + sum_{i, t} w[o, i, t] x[i, stride p + dilation t - before]; group g reads channels from g in/groups onwards. */
function convolved(p, x) {
  const spatial = x.shape.slice(2), { out, perGroup, groups } = checkLayer(p, x, p.weight.shape.length - 2);
  const { size, taps, place } = windows(p, p.weight.shape.slice(2), spatial), area = product(spatial), channels = x.shape[1];
  const reached = indices(size).map((q) => taps.map((tap, t) => ({ t, from: place(q, tap) })).filter(({ from }) => inside(from, spatial)));
  const places = reached.map((reads) => reads.map(({ t, from }) => [t, ravel(from, spatial)])); // for each place, its taps and what they read
  return make(x.dtype, [x.shape[0], out, ...size], ([n, o], k) => {
    const first = Math.floor(o / (out / groups)) * perGroup, row = o * perGroup, column = n * channels + first;
    let sum = bias(p, o);
    for (const [t, from] of places[k % places.length]) {
      for (let i = 0; i < perGroup; i++) sum += p.weight.data[(row + i) * taps.length + t] * x.data[(column + i) * area + from];
    }
    return sum;
  });
}

/* y[o, stride p + dilation t - before] += w[o, i, t] x[i, p], gathered: the places p that reach an entry of y. */
function transposed(p, x) {
  const spatial = x.shape.slice(2), axes = spatial.length, kernel = p.weight.shape.slice(2), taps = indices(kernel);
  const { out, perGroup, groups } = checkLayer(p, x, p.weight.shape.length - 2);
  const stride = forAxes(p.stride, axes), dilation = forAxes(p.dilation, axes), pads = sides(p.padding, axes);
  const extra = forAxes(p.output_padding, axes);
  const size = spatial.map((n, a) => stride[a] * (n - 1) + dilation[a] * (kernel[a] - 1) + 1 + extra[a] - pads[a][0] - pads[a][1]);
  require_(size.every((n) => n >= 1), 'nothing is left of a transposed convolution');
  return make(x.dtype, [x.shape[0], out, ...size], ([n, o, ...q]) => {
    const first = Math.floor(o / (out / groups)) * perGroup;
    let sum = bias(p, o);
    for (const tap of taps) {
      const from = q.map((to, a) => (to + pads[a][0] - dilation[a] * tap[a]) / stride[a]);
      if (!from.every(Number.isInteger) || !inside(from, spatial)) continue;
      for (let i = 0; i < perGroup; i++) sum += at(p.weight, [o, i, ...tap]) * at(x, [n, first + i, ...from]);
    }
    return sum;
  });
}

/* Pools: a number from the entries of each window that are no padding, and from the size of the kernel. */
function pooled(p, x, number) {
  const spatial = x.shape.slice(2), kernel = forAxes(p.kernel, spatial.length);
  const { size, taps, place } = windows({ ...p, stride: p.stride === null ? p.kernel : p.stride }, kernel, spatial);
  return make(x.dtype, [x.shape[0], x.shape[1], ...size], ([n, c, ...q]) => {
    const places = taps.map((tap) => place(q, tap)).filter((from) => inside(from, spatial));
    return number(places.map((from) => at(x, [n, c, ...from])), taps.length);
  });
}

/* gamma (x - m) / sqrt(v + eps) + beta, mean m and variance v over all entries of one group (and of one place, for LayerNorm and RMSNorm). */
function normalized(p, x, groups, { byPlace = false, centred = true } = {}) {
  const [batch, channels, ...spatial] = x.shape, perGroup = channels / groups;
  require_(Number.isInteger(perGroup) && same(p.gamma.shape, [channels]), `${channels} channels do not fit the normalisation`);
  const members = indices(byPlace ? [perGroup] : [perGroup, ...spatial]), moments = new Map();
  function moment(n, group, place) {
    const key = [n, group, ...place].join();
    if (!moments.has(key)) {
      const entries = members.map(([i, ...q]) => at(x, [n, group * perGroup + i, ...(byPlace ? place : q)]));
      const mean = centred ? entries.reduce((a, b) => a + b, 0) / entries.length : 0;
      moments.set(key, { mean, variance: entries.reduce((a, b) => a + (b - mean) ** 2, 0) / entries.length });
    }
    return moments.get(key);
  }
  return make(x.dtype, x.shape, (index) => {
    const [n, c, ...place] = index, group = Math.floor(c / perGroup), { mean, variance } = moment(n, group, byPlace ? place : []);
    const shift = p.beta === null ? 0 : p.beta.data[c];
    return p.gamma.data[c] * (at(x, index) - mean) / Math.sqrt(variance + ofChannel(p.eps, group)) + shift;
  });
}

/* Entry by entry, with the channel. */
function mapped(x, f) { return make(x.dtype, x.shape, (index, k) => f(x.data[k], index[1])); }

/* Values that meet entry by entry: axes of one entry are repeated; rounded after each step. */
function joined(values, f) {
  const shape = values[0].shape.map((_, axis) => Math.max(...values.map((x) => x.shape[axis])));
  const round = rounding(values[0].dtype);
  for (const x of values) require_(x.shape.length === shape.length && x.shape.every((n, a) => n === shape[a] || n === 1), 'values that meet do not fit');
  return make(values[0].dtype, shape, (index) => values.map((x) => at(x, index)).reduce((a, b) => round(f(a, b))));
}

/* Ops that only move entries: which entry of x stands at an index of y. */
function moved(x, shape, source) { return make(x.dtype, shape, (index) => at(x, source(index))); }

/* The place in C order, and back. */
function ravel(index, shape) { return index.reduce((k, i, axis) => k * shape[axis] + i, 0); }
function unravel(k, shape) {
  const index = shape.map(() => 0);
  for (let axis = shape.length - 1; axis >= 0; axis--) { index[axis] = k % shape[axis]; k = Math.floor(k / shape[axis]); }
  return index;
}

function replaced(list, place, entry) { return list.map((old, k) => (k === place ? entry : old)); }

/* Parts one behind the other along an axis that counts without the batch. */
function concatenated(parts, axis) {
  const along = axis + 1, [first] = parts;
  for (const x of parts) require_(same(replaced(x.shape, along, 0), replaced(first.shape, along, 0)), 'what is concatenated does not fit');
  return make(first.dtype, replaced(first.shape, along, parts.reduce((n, x) => n + x.shape[along], 0)), (index) => {
    let k = index[along], part = 0;
    while (k >= parts[part].shape[along]) k -= parts[part++].shape[along];
    return at(parts[part], replaced(index, along, k));
  });
}

/* exp(-x^2) without the rounding of x^2, which exp would amplify: x = h + (x - h), and h^2 is exact. */
function gaussian(x) {
  const h = Math.fround(x);
  return Math.exp(-h * h) * Math.exp(-(x - h) * (x + h));
}

/* erf by its series 2 / sqrt(pi) exp(-x^2) sum 2^n x^(2n+1) / (2n+1)!!, whose terms have one sign. */
function erf(x) {
  if (Math.abs(x) >= 1) return Math.sign(x) * (1 - erfc(Math.abs(x)));
  let term = x, sum = x;
  for (let n = 1; n < 40; n++) sum += term *= 2 * x * x / (2 * n + 1);
  return 2 / Math.sqrt(Math.PI) * gaussian(x) * sum;
}

/* 1 - erf by its continued fraction exp(-x^2) / sqrt(pi) / (x + (1/2) / (x + 1 / (x + (3/2) / ...))). */
function erfc(x) {
  if (x < 1) return 1 - erf(x);
  if (x > 30) return 0;
  let fraction = x;
  for (let n = 200; n >= 1; n--) fraction = x + n / 2 / fraction;
  return gaussian(x) / Math.sqrt(Math.PI) / fraction;
}

function sigmoid(x) { return 1 / (1 + Math.exp(-x)); }
function clamp(x, low, high) { return Math.min(Math.max(x, low), high); }
function gelu(x, approximate) {
  if (approximate) return x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))) / 2;
  return x * erfc(-x / Math.SQRT2) / 2;
}

/* Heads of queries that share a head of keys or values stand in a row. */
function sharing(p) {
  const keys = p.kv_heads || p.heads;
  require_(p.heads % keys === 0, `${p.heads} heads cannot share ${keys}`);
  return { heads: p.heads, keys, shared: (head) => Math.floor(head / (p.heads / keys)) };
}

/* The pairs of channels that Rotary turns, within one head. */
function turned(p, channels) {
  const [pairs] = p.cos.shape, width = channels / p.heads;
  require_(Number.isInteger(width) && 2 * pairs <= width, `${channels} channels do not fit ${p.heads} heads of ${pairs} pairs`);
  const pair = (i) => (p.interleaved ? [2 * i, 2 * i + 1] : [i, i + pairs]);
  return { width, pairs: Array.from({ length: pairs }, (_, i) => pair(i)) };
}

const LAYER = { bias: null, stride: 1, padding: 0, dilation: 1, groups: 1, grid: null };
const POOL = { stride: null, padding: 0, dilation: 1 };
const NORM = { beta: null, eps: 1e-5 };
const plain = (f) => ({ defaults: {}, forward: (p, [x]) => mapped(x, f) });
const join = (f) => ({ defaults: {}, forward: (p, values) => joined(values, f) });

const OPS = {
  Dense: {
    defaults: { bias: null, grid: null },
    forward: (p, [x]) => { checkLayer(p, x, 0); return convolved({ ...LAYER, ...p }, x); },
  },
  Conv: { defaults: LAYER, forward: (p, [x]) => convolved(p, x) },
  ConvTranspose: { defaults: { ...LAYER, output_padding: 0 }, forward: (p, [x]) => transposed(p, x) },
  BatchNorm: {
    defaults: { eps: 1e-5 },
    forward: (p, [x]) => {
      for (const name of ['gamma', 'beta', 'mean', 'var']) require_(same(p[name].shape, [x.shape[1]]), `BatchNorm: ${name} does not fit`);
      return mapped(x, (v, c) => p.gamma.data[c] * (v - p.mean.data[c]) / Math.sqrt(p.var.data[c] + p.eps) + p.beta.data[c]);
    },
  },
  LayerNorm: { defaults: NORM, forward: (p, [x]) => normalized(p, x, 1, { byPlace: true }) },
  RMSNorm: { defaults: NORM, forward: (p, [x]) => normalized(p, x, 1, { byPlace: true, centred: false }) },
  GroupNorm: { defaults: NORM, forward: (p, [x]) => normalized(p, x, p.norm_groups) },
  InstanceNorm: { defaults: NORM, forward: (p, [x]) => normalized(p, x, x.shape[1]) },
  Identity: plain((x) => x),
  Abs: plain(Math.abs),
  ReLU: plain((x) => Math.max(x, 0)),
  LeakyReLU: { defaults: {}, forward: (p, [x]) => mapped(x, (v) => (v > 0 ? v : p.slope * v)) },
  PReLU: {
    defaults: {},
    forward: (p, [x]) => { checkChannels(p.slope, x); return mapped(x, (v, c) => (v > 0 ? v : ofChannel(p.slope, c) * v)); },
  },
  Clip: {
    defaults: {},
    forward: (p, [x]) => {
      checkChannels(p.low, x);
      checkChannels(p.high, x);
      return mapped(x, (v, c) => clamp(v, ofChannel(p.low, c), ofChannel(p.high, c)));
    },
  },
  Affine: {
    defaults: {},
    forward: (p, [x]) => {
      for (const part of [p.slope, p.shift]) {
        require_(part.shape.length === x.shape.length - 1 && part.shape.every((n, a) => n === 1 || n === x.shape[a + 1]), 'Affine does not fit');
      }
      return make(x.dtype, x.shape, (index) => at(p.slope, index.slice(1)) * at(x, index) + at(p.shift, index.slice(1)));
    },
  },
  MaxPool: { defaults: POOL, forward: (p, [x]) => pooled(p, x, (entries) => Math.max(...entries)) },
  MinPool: { defaults: POOL, forward: (p, [x]) => pooled(p, x, (entries) => Math.min(...entries)) },
  AvgPool: {
    defaults: { ...POOL, count_include_pad: true },
    forward: (p, [x]) => pooled(p, x, (entries, size) => entries.reduce((a, b) => a + b, 0) / (p.count_include_pad ? size : entries.length)),
  },
  LpPool: {
    defaults: { ...POOL, p: 2 },
    forward: (p, [x]) => pooled(p, x, (entries) => {
      const sum = entries.reduce((a, b) => a + Math.abs(b) ** p.p, 0);
      return p.p === 1 ? sum : p.p === 2 ? Math.sqrt(sum) : sum ** (1 / p.p);
    }),
  },
  GlobalAvgPool: {
    defaults: {},
    forward: (p, [x]) => {
      const places = indices(x.shape.slice(2));
      const mean = ([n, c]) => places.reduce((sum, place) => sum + at(x, [n, c, ...place]), 0) / places.length;
      return make(x.dtype, x.shape.map((size, axis) => (axis < 2 ? size : 1)), mean);
    },
  },
  Pad: {
    defaults: { value: 0 },
    forward: (p, [x]) => {
      const spatial = x.shape.slice(2), pads = sides(p.padding, spatial.length), size = spatial.map((n, a) => n + pads[a][0] + pads[a][1]);
      return make(x.dtype, [...x.shape.slice(0, 2), ...size], ([n, c, ...q]) => {
        const from = q.map((to, a) => to - pads[a][0]);
        return inside(from, spatial) ? at(x, [n, c, ...from]) : p.value;
      });
    },
  },
  Upsample: {
    defaults: {},
    forward: (p, [x]) => {
      const factor = [1, 1, ...forAxes(p.factor, x.shape.length - 2)];
      return moved(x, x.shape.map((n, a) => n * factor[a]), (index) => index.map((q, a) => Math.floor(q / factor[a])));
    },
  },
  Blend: {
    defaults: { axis: 1 },
    forward: (p, [x]) => {
      const along = p.axis + 1, [out, count] = p.matrix.shape;
      require_(along < x.shape.length && x.shape[along] === count, 'a matrix does not fit its axis');
      return make(x.dtype, replaced(x.shape, along, out), (index) => {
        let sum = 0;
        for (let k = 0; k < count; k++) sum += at(p.matrix, [index[along], k]) * at(x, replaced(index, along, k));
        return sum;
      });
    },
  },
  Add: join((a, b) => a + b),
  Max: join(Math.max),
  Min: join(Math.min),
  Mul: join((a, b) => a * b),
  Sub: join((a, b) => a - b),
  Concat: { defaults: { axis: 0 }, forward: (p, values) => concatenated(values, p.axis) },
  Extend: {
    defaults: { axis: 0, front: false },
    forward: (p, [x]) => {
      const constant = make(x.dtype, [x.shape[0], ...p.constant.shape], (index) => at(p.constant, index.slice(1)));
      return concatenated(p.front ? [constant, x] : [x, constant], p.axis);
    },
  },
  Flatten: {
    defaults: {},
    forward: (p, [x]) => moved(x, [x.shape[0], product(x.shape.slice(1))], ([n, k]) => [n, ...unravel(k, x.shape.slice(1))]),
  },
  Unflatten: {
    defaults: {},
    forward: (p, [x]) => {
      require_(x.shape.length === 2 && product(p.shape) === x.shape[1], 'a flat value does not fit its new shape');
      return moved(x, [x.shape[0], ...p.shape], ([n, ...index]) => [n, ravel(index, p.shape)]);
    },
  },
  Transpose: {
    defaults: {},
    forward: (p, [x]) => {
      checkOrder(p.axes, x.shape.length - 1);
      return moved(x, [x.shape[0], ...p.axes.map((axis) => x.shape[axis + 1])], ([n, ...index]) => [n, ...index.map((_, a) => index[p.axes.indexOf(a)])]);
    },
  },
  Slice: {
    defaults: {},
    forward: (p, [x]) => {
      const [start, stop] = [p.start, p.stop].map((k) => (k < 0 ? k + x.shape[1] : k));
      require_(0 <= start && start < stop && stop <= x.shape[1], 'a slice of channels that are not there');
      return moved(x, replaced(x.shape, 1, stop - start), ([n, c, ...q]) => [n, start + c, ...q]);
    },
  },
  Permute: {
    defaults: {},
    forward: (p, [x]) => { checkOrder(p.order, x.shape[1]); return moved(x, x.shape, ([n, c, ...q]) => [n, p.order[c], ...q]); },
  },
  Rearrange: {
    defaults: {},
    forward: (p, [x]) => {
      require_(p.split.length === x.shape.length - 1 && p.split.every(([a, b], axis) => a * b === x.shape[axis + 1]), 'axes cannot be split so');
      const sizes = p.split.flat(), shape = p.groups.map((group) => product(group.map((axis) => sizes[axis])));
      checkOrder(p.groups.flat(), sizes.length);
      return moved(x, [x.shape[0], ...shape], ([n, ...index]) => {
        const parts = [];
        p.groups.forEach((group, j) => unravel(index[j], group.map((axis) => sizes[axis])).forEach((k, m) => { parts[group[m]] = k; }));
        return [n, ...p.split.map(([, fast], axis) => parts[2 * axis] * fast + parts[2 * axis + 1])];
      });
    },
  },
  Take: {
    defaults: { axis: 0 },
    forward: (p, [x]) => {
      const along = p.axis + 1;
      require_(along < x.shape.length && p.indices.every((k) => k >= 0 && k < x.shape[along]), 'entries that are not there');
      return moved(x, replaced(x.shape, along, p.indices.length), (index) => replaced(index, along, p.indices[index[along]]));
    },
  },
  Sigmoid: plain(sigmoid),
  Tanh: plain(Math.tanh),
  Erf: plain(erf),
  SiLU: plain((x) => x * sigmoid(x)),
  HardSwish: plain((x) => x * clamp(x / 6 + 0.5, 0, 1)),
  HardSigmoid: { defaults: { alpha: 0.2, beta: 0.5 }, forward: (p, [x]) => mapped(x, (v) => clamp(p.alpha * v + p.beta, 0, 1)) },
  GELU: { defaults: { approximate: false }, forward: (p, [x]) => mapped(x, (v) => gelu(v, p.approximate)) },
  Sloped: {
    defaults: {},
    forward: (p, [x]) => {
      const { kind, parameters } = p.op, sloped = make('float64', x.shape, (index, k) => ofChannel(p.slope, index[1]) * x.data[k]);
      const curve = OPS[kind].forward(parameters, [sloped]);
      return mapped(x.dtype === 'float64' ? curve : { ...curve, dtype: x.dtype }, (v, c) => v / ofChannel(p.slope, c));
    },
  },
  Softmax: {
    defaults: { axis: 1, mask: null },
    forward: (p, [x]) => {
      const axes = x.shape.length, along = p.axis < 0 ? p.axis + axes : p.axis;
      const score = (index) => {
        if (p.mask === 'causal') return index[axes - 1] > index[axes - 2] ? -Infinity : at(x, index);
        return at(x, index) + (p.mask === null ? 0 : at(p.mask, index.slice(axes - p.mask.shape.length)));
      };
      return make(x.dtype, x.shape, (index) => {
        const row = Array.from({ length: x.shape[along] }, (_, k) => score(replaced(index, along, k))), most = Math.max(...row);
        return Math.exp(row[index[along]] - most) / row.reduce((sum, v) => sum + Math.exp(v - most), 0);
      });
    },
  },
  Scores: {
    defaults: { kv_heads: 0, scale: 1 },
    forward: (p, [q, k]) => {
      const { heads, keys, shared } = sharing(p), width = q.shape[1] / heads;
      require_(Number.isInteger(width) && k.shape[1] === keys * width, 'queries and keys do not fit');
      return make(q.dtype, [q.shape[0], heads, q.shape[2], k.shape[2]], ([n, head, t, s]) => {
        let sum = 0;
        for (let d = 0; d < width; d++) sum += at(q, [n, head * width + d, t]) * at(k, [n, shared(head) * width + d, s]);
        return p.scale * sum;
      });
    },
  },
  Mix: {
    defaults: { kv_heads: 0 },
    forward: (p, [weights, v]) => {
      const { heads, keys, shared } = sharing(p), width = v.shape[1] / keys;
      require_(Number.isInteger(width) && weights.shape[1] === heads && weights.shape[3] === v.shape[2], 'weights and values do not fit');
      return make(v.dtype, [v.shape[0], heads * width, weights.shape[2]], ([n, c, t]) => {
        const head = Math.floor(c / width);
        let sum = 0;
        for (let s = 0; s < v.shape[2]; s++) sum += at(weights, [n, head, t, s]) * at(v, [n, shared(head) * width + c % width, s]);
        return sum;
      });
    },
  },
  Rotary: {
    defaults: { interleaved: false },
    forward: (p, [x]) => {
      const { width, pairs } = turned(p, x.shape[1]);
      return make(x.dtype, x.shape, (index) => {
        const [n, c, t] = index, within = c % width, i = pairs.findIndex((pair) => pair.includes(within));
        if (i < 0) return at(x, index);
        const [a, b] = pairs[i].map((d) => at(x, [n, c - within + d, t])), cos = at(p.cos, [i, t]), sin = at(p.sin, [i, t]);
        return within === pairs[i][0] ? a * cos - b * sin : b * cos + a * sin;
      });
    },
  },
  FakeQuantize: {
    defaults: { step: null },
    forward: (p, [x]) => dequantized(onGrid(x, p.grid.Grid), p.grid.Grid, x.dtype),
  },
};

function checkChannels(parameter, x) {
  if (isArray(parameter)) require_([1, x.shape[1]].includes(parameter.data.length), `${parameter.data.length} entries for ${x.shape[1]} channels`);
}

function checkOrder(order, count) { require_(same([...order].sort((a, b) => a - b), [...Array(count).keys()]), 'an order that is none'); }

// ---------------------------------------------------------------------------------------------------------------------------------------
// Level 0: forward
// ---------------------------------------------------------------------------------------------------------------------------------------

/* All values of a network by name. */
function run(network, inputs) {
  const values = { ...inputs };
  for (const { name, op, inputs: read } of network.nodes) values[name] = OPS[op.kind].forward(op.parameters, read.map((value) => values[value]));
  return values;
}

function readInputs(network, coded) {
  const inputs = {};
  for (const [name, shape] of Object.entries(network.inputs)) {
    require_(name in coded, `no input ${name}`);
    inputs[name] = decodeArray(coded[name]);
    require_(same(inputs[name].shape.slice(1), shape), `input ${name} has another shape`);
  }
  return inputs;
}

function forward({ network: code, inputs }) {
  const network = decodeNetwork(code), values = run(network, readInputs(network, inputs));
  return { outputs: Object.fromEntries(network.outputs.map((name) => [name, encodeArray(values[name])])) };
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Level 1: fold_batchnorm
// ---------------------------------------------------------------------------------------------------------------------------------------

const WEIGHTED = ['Dense', 'Conv', 'ConvTranspose'];

/* Nothing but one node reads the value, and it is no output of the network. */
function isOnlyBetween(network, value) {
  return !network.outputs.includes(value) && readersOf(network, value).length === 1 && readersOf(network, value)[0].inputs.length === 1;
}

/* The layer before a BatchNorm, and the Identities between: each value between must be read by nothing else. */
function layerBefore(network, batchnorm) {
  const between = [];
  for (let value = batchnorm.inputs[0]; isOnlyBetween(network, value);) {
    const node = makerOf(network, value);
    if (!node) return null;
    if (WEIGHTED.includes(node.op.kind)) return usersOf(network, node.op).length === 1 ? { layer: node, between } : null;
    if (node.op.kind !== 'Identity') return null;
    between.push(node);
    [value] = node.inputs;
  }
  return null;
}

/* The Dense or Conv without padding behind a BatchNorm, and the Identities between. */
function layerBehind(network, batchnorm) {
  const between = [];
  for (let value = batchnorm.name; isOnlyBetween(network, value);) {
    const [node] = readersOf(network, value);
    if (node.op.kind === 'Dense' || node.op.kind === 'Conv') {
      const pads = node.op.kind === 'Conv' ? [node.op.parameters.padding].flat(2) : [];
      return usersOf(network, node.op).length === 1 && pads.every((n) => n === 0) ? { layer: node, between } : null;
    }
    if (node.op.kind !== 'Identity') return null;
    between.push(node);
    value = node.name;
  }
  return null;
}

/* s = gamma / sqrt(var + eps), t = beta - s mean */
function scaleAndShift({ gamma, beta, mean, var: variance, eps }) {
  const s = Array.from(gamma.data, (g, c) => g / Math.sqrt(variance.data[c] + eps));
  return { s, t: s.map((scale, c) => beta.data[c] - scale * mean.data[c]) };
}

/* W' = s W, b' = s b + t */
function foldedIntoRows({ kind, parameters: p }, batchnorm) {
  const { s, t } = scaleAndShift(batchnorm.parameters), { dtype, shape } = p.weight;
  const weight = make(dtype, shape, (index, k) => s[index[0]] * p.weight.data[k]);
  return { kind, parameters: { ...p, weight, bias: vector(dtype, s.map((scale, o) => scale * bias(p, o) + t[o])) } };
}

/* W' = W s, b' = b + sum W t */
function foldedIntoColumns({ kind, parameters: p }, batchnorm) {
  const { s, t } = scaleAndShift(batchnorm.parameters), { dtype, shape } = p.weight, column = columnOf(shape, p.groups);
  const weight = make(dtype, shape, (index, k) => p.weight.data[k] * s[column(index)]);
  const shift = Array.from({ length: shape[0] }, (_, o) => bias(p, o));
  make('float64', shape, (index, k) => { shift[index[0]] += p.weight.data[k] * t[column(index)]; return 0; });
  return { kind, parameters: { ...p, weight, bias: vector(dtype, shift) } };
}

/* The input channel that W[o, i, ...] reads: group g reads channels g in/groups onwards. */
function columnOf([out, perGroup], groups = 1) { return ([o, i]) => Math.floor(o / (out / groups)) * perGroup + i; }

/* A BatchNorm goes into the rows of the layer before it, which takes its name; if it cannot, into the columns of the one behind it. */
function foldOne(network, batchnorm) {
  const before = layerBefore(network, batchnorm);
  if (before) {
    const folded = { name: batchnorm.name, op: foldedIntoRows(before.layer.op, batchnorm.op), inputs: before.layer.inputs };
    const gone = [batchnorm, ...before.between];
    return { ...network, nodes: network.nodes.filter((node) => !gone.includes(node)).map((node) => (node === before.layer ? folded : node)) };
  }
  const behind = layerBehind(network, batchnorm);
  if (!behind) return null;
  const folded = { ...behind.layer, op: foldedIntoColumns(behind.layer.op, batchnorm.op), inputs: batchnorm.inputs };
  const gone = [batchnorm, ...behind.between];
  return { ...network, nodes: network.nodes.filter((node) => !gone.includes(node)).map((node) => (node === behind.layer ? folded : node)) };
}

function foldBatchnorm({ network: code }) {
  let network = decodeNetwork(code);
  for (let changed = true; changed;) {
    changed = false;
    for (const node of network.nodes.filter(({ op }) => op.kind === 'BatchNorm')) {
      const folded = foldOne(network, node);
      if (folded) { network = folded; changed = true; break; }
    }
  }
  return { network: encodeNetwork(network) };
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Level 2: channels
// ---------------------------------------------------------------------------------------------------------------------------------------

const CURVES = ['Sigmoid', 'Tanh', 'Erf', 'SiLU', 'HardSwish', 'HardSigmoid', 'GELU', 'Softmax', 'FakeQuantize'];
const MOVES = ['Identity', 'Upsample', 'Flatten', 'Unflatten', 'Transpose', 'Slice', 'Permute', 'Rearrange', 'Take'];
const SUMS = ['Add', 'Sub', 'Max', 'Min'];

/* What every op asks for (algebra.md): relations c_1 u_1 + c_2 u_2 + ... = 0 between the logarithms of factors, with whole numbers c.
 * `tie`, `pin` and `relate` take channels, each a pair [value, channel]; what is to be expressed by the rest is named first. */
function askedBy(node, shapes, { tie, pin, relate }) {
  const { name, op: { kind, parameters: p }, inputs } = node, [x] = inputs, made = shapes[name][0], read = shapes[x][0];
  const each = (count, f) => { for (let c = 0; c < count; c++) f(c); };
  if (WEIGHTED.includes(kind) || kind === 'BatchNorm') return; // W' = f_o W / f_i takes up any two factors
  if (CURVES.includes(kind) || (kind === 'Pad' && p.value !== 0 && Number.isFinite(p.value))) { // u = 0
    each(read, (c) => pin([x, c]));
    each(made, (c) => pin([name, c]));
  } else if (kind === 'LayerNorm' || kind === 'RMSNorm') { // channels normalised together: u_i = u_j
    each(read, (c) => tie([x, 0], [x, c]));
  } else if (kind === 'GroupNorm') {
    each(read, (c) => tie([x, c - c % (read / p.norm_groups)], [x, c]));
  } else if (kind === 'InstanceNorm') {
    return;
  } else if (MOVES.includes(kind)) { // entry by entry: u_y = u_x
    let entry = 0;
    const numbered = make('float64', [1, ...shapes[x]], () => entry++), area = product(shapes[x].slice(1));
    const y = OPS[kind].forward(p, [numbered]);
    make('float64', y.shape, (index, k) => { tie([name, index[1]], [x, Math.floor(y.data[k] / area)]); return 0; });
  } else if (SUMS.includes(kind)) { // u_y = u_a = u_b; a single channel meets all
    for (const value of inputs) each(made, (c) => tie([name, c], [value, shapes[value][0] === 1 ? 0 : c]));
  } else if (kind === 'Mul') { // u_y = u_a + u_b
    each(made, (c) => relate([[name, c], 1], ...inputs.map((value) => [[value, shapes[value][0] === 1 ? 0 : c], -1])));
  } else if (kind === 'Concat' && p.axis === 0) {
    let first = 0;
    for (const value of inputs) { each(shapes[value][0], (c) => tie([name, first + c], [value, c])); first += shapes[value][0]; }
  } else if (kind === 'Concat') {
    for (const value of inputs) each(made, (c) => tie([name, c], [value, c]));
  } else if (kind === 'Extend' && p.axis === 0) { // the constant's channels have factors of their own
    each(read, (c) => tie([name, c + (p.front ? p.constant.shape[0] : 0)], [x, c]));
  } else if (kind === 'Blend' && p.axis === 0) { // a sum over channels
    each(read, (c) => tie([x, 0], [x, c]));
    each(made, (c) => tie([x, 0], [name, c]));
  } else if (kind === 'Rotary') { // u_i = u_j for each pair that is turned
    const { width, pairs } = turned(p, read);
    each(read, (c) => tie([name, c], [x, c]));
    pairs.forEach(([a, b], i) => {
      if (indices(p.sin.shape).some((index) => index[0] === i && at(p.sin, index) !== 0)) each(p.heads, (h) => tie([x, h * width + a], [x, h * width + b]));
    });
  } else if (kind === 'Scores') { // u_q + u_k = u_s
    const { heads, shared } = sharing(p), width = read / heads;
    each(heads, (h) => each(width, (d) => relate([[x, h * width + d], 1], [[inputs[1], shared(h) * width + d], 1], [[name, h], -1])));
  } else if (kind === 'Mix') { // u_y = u_p + u_v
    const { heads, shared } = sharing(p), width = made / heads;
    each(heads, (h) => each(width, (d) => relate([[name, h * width + d], 1], [[x, h], -1], [[inputs[1], shared(h) * width + d], -1])));
  } else { // homogeneous, channel by channel: u_y = u_x
    each(made, (c) => tie([name, c], [x, c]));
  }
}

/* All relations of a network: {count, variable(value, c), ties, pins, relations}. */
function relationsOf(network) {
  const { shapes, nodes } = network, first = {}, ties = [], pins = [], relations = [];
  let count = 0;
  for (const [value, [channels]] of Object.entries(shapes)) { first[value] = count; count += channels; }
  const variable = ([value, c]) => first[value] + c;
  const ask = {
    tie: (a, b) => ties.push([variable(a), variable(b)]),
    pin: (a) => pins.push(variable(a)),
    relate: (...terms) => relations.push(terms.map(([channel, c]) => [variable(channel), c])),
  };
  for (const value of [...Object.keys(network.inputs), ...network.outputs]) for (let c = 0; c < shapes[value][0]; c++) ask.pin([value, c]);
  nodes.forEach((node, k) => {
    askedBy(node, shapes, ask);
    const other = nodes.slice(0, k).find(({ op }) => op === node.op); // an op used several times has one set of factors
    if (!other) return;
    const pairs = [[node.name, other.name], ...node.inputs.map((value, i) => [value, other.inputs[i]])];
    for (const [a, b] of pairs) for (let c = 0; c < shapes[a][0]; c++) ask.tie([a, c], [b, c]);
  });
  return { count, variable, ties, pins, relations };
}

/* Solved over the whole numbers (algebra.md): a form for each variable, a Map from free numbers to whole coefficients. */
function solved({ count, ties, pins, relations }) {
  const parent = [...Array(count).keys()];
  const find = (v) => { while (parent[v] !== v) v = parent[v] = parent[parent[v]]; return v; };
  for (const [a, b] of ties) parent[Math.max(find(a), find(b))] = Math.min(find(a), find(b));
  const forms = parent.map((_, v) => new Map(find(v) === v ? [[v, 1]] : []));
  const add = (form, other, times) => {
    for (const [v, c] of other) {
      const sum = (form.get(v) || 0) + times * c;
      if (sum === 0) form.delete(v); else form.set(v, sum);
    }
  };
  const substitute = (v, expression) => {
    for (const form of forms) {
      const c = form.get(v);
      if (c !== undefined) { form.delete(v); add(form, expression, c); }
    }
  };
  for (const v of pins) substitute(find(v), new Map());
  let fresh = count;
  for (const terms of relations) {
    let rest = new Map();
    for (const [v, c] of terms) add(rest, forms[find(v)], c);
    while (rest.size > 0) {
      const [pivot, c] = [...rest].reduce((best, term) => (Math.abs(term[1]) < Math.abs(best[1]) ? term : best));
      const others = [...rest].filter(([v]) => v !== pivot);
      if (others.length === 0) { substitute(pivot, new Map()); break; } // c u = 0: a pin
      if (Math.abs(c) === 1) { substitute(pivot, new Map(others.map(([v, a]) => [v, -a * c]))); break; }
      const replacement = fresh++; // u = u' - sum (a_i // c) u_i leaves c u' + sum (a_i mod c) u_i = 0
      const quotients = others.map(([v, a]) => [v, Math.floor(a / c)]);
      substitute(pivot, new Map([[replacement, 1], ...quotients.filter(([, q]) => q !== 0).map(([v, q]) => [v, -q])]));
      rest = new Map([[replacement, c], ...others.map(([v, a], k) => [v, a - c * quotients[k][1]]).filter(([, a]) => a !== 0)]);
    }
  }
  return parent.map((_, v) => forms[find(v)]);
}

/* {numbers: by value, one for each channel; forms: by number; free: the free numbers}. Equal forms are equal factors; the empty one is 1. */
function channelsOf(network) {
  const relations = relationsOf(network), forms = solved(relations), byKey = new Map([['', 0]]), byNumber = [new Map()], free = new Set();
  const numbers = {};
  for (const [value, [channels]] of Object.entries(network.shapes)) {
    numbers[value] = Array.from({ length: channels }, (_, c) => {
      const form = forms[relations.variable([value, c])], key = [...form].sort(([a], [b]) => a - b).join(';');
      if (!byKey.has(key)) { byKey.set(key, byNumber.length); byNumber.push(form); }
      for (const v of form.keys()) free.add(v);
      return byKey.get(key);
    });
  }
  return { numbers, forms: byNumber, free: [...free] };
}

function channels({ network: code }) {
  const { numbers, free } = channelsOf(decodeNetwork(code));
  return { degrees_of_freedom: free.length, channels: numbers };
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Level 3: rescale
// ---------------------------------------------------------------------------------------------------------------------------------------

const AGREE = 1e-9; // factors that a relation makes equal may differ by roundings

/* Factors for every value, positive and finite, that keep all relations of level 2. */
function checkFactors(network, factors) {
  for (const value of Object.keys(factors)) require_(value in network.shapes, `factors for ${value}, which is no value`);
  for (const [value, [channels]] of Object.entries(network.shapes)) {
    require_(value in factors && same([...factors[value].shape], [channels]), `${value} has not one factor for each channel`);
    for (const f of factors[value].data) require_(f > 0 && Number.isFinite(f), `${value}: a factor that is not positive and finite`);
  }
  const { variable, ties, pins, relations } = relationsOf(network), logarithms = [];
  for (const [value, { data }] of Object.entries(factors)) data.forEach((f, c) => { logarithms[variable([value, c])] = Math.log(f); });
  for (const v of pins) require_(Math.abs(logarithms[v]) < AGREE, 'a factor on a channel that is pinned');
  for (const [a, b] of ties) require_(Math.abs(logarithms[a] - logarithms[b]) < AGREE, 'two factors on channels that are tied');
  for (const terms of relations) require_(Math.abs(terms.reduce((sum, [v, c]) => sum + c * logarithms[v], 0)) < AGREE, 'factors of a product that do not fit');
}

/* An op whose inputs are multiplied by f_in, and that makes its output times f_out. */
function rescaledOp({ kind, parameters: p }, fin, fout) {
  const [f] = fin, times = (v, factor) => make(v.dtype, v.shape, (index, k) => v.data[k] * factor(index));
  const byChannel = (v, dtype) => (isArray(v) && v.data.length === fout.length ? v : vector(isArray(v) ? v.dtype : dtype, fout.map(() => ofChannel(v, 0))));
  let changed = {};
  if (WEIGHTED.includes(kind)) { // W'[o, i] = W[o, i] f_o / f_i, b' = b f_o
    const column = columnOf(p.weight.shape, p.groups);
    changed = { weight: times(p.weight, (index) => fout[index[0]] / f[column(index)]), bias: p.bias && times(p.bias, ([o]) => fout[o]) };
  } else if (kind === 'BatchNorm') { // gamma' = gamma f_o / f_i, mean' = mean f_i, beta' = beta f_o
    changed = { gamma: times(p.gamma, ([c]) => fout[c] / f[c]), mean: times(p.mean, ([c]) => f[c]), beta: times(p.beta, ([c]) => fout[c]) };
  } else if (kind === 'Clip') { // bounds for each channel
    const bound = (v) => (!isArray(v) && !Number.isFinite(v) ? v : times(byChannel(v, 'float64'), ([c]) => fout[c]));
    changed = { low: bound(p.low), high: bound(p.high) };
  } else if (kind === 'Sloped') { // slope' = slope / f
    changed = { slope: times(byChannel(p.slope, 'float64'), ([c]) => 1 / fout[c]) };
  } else if (kind === 'Affine') { // shift' = f shift
    changed = { shift: make(p.shift.dtype, [fout.length, ...p.shift.shape.slice(1)], (index) => at(p.shift, index) * fout[index[0]]) };
  } else if (kind === 'Extend') { // constant' = f constant
    const first = p.axis === 0 && !p.front ? f.length : 0;
    changed = { constant: times(p.constant, ([c]) => fout[first + c]) };
  } else if (kind.endsWith('Norm')) { // gamma' = f_o gamma, beta' = f_o beta, eps' = f_i^2 eps
    const groups = { GroupNorm: p.norm_groups, InstanceNorm: f.length }[kind] || 1;
    const eps = Array.from({ length: groups }, (_, g) => ofChannel(p.eps, g) * f[g * f.length / groups] ** 2);
    const epsilons = eps.every((e) => e === eps[0]) ? eps[0] : vector('float64', eps);
    changed = { gamma: times(p.gamma, ([c]) => fout[c]), beta: p.beta && times(p.beta, ([c]) => fout[c]), eps: epsilons };
  }
  return { kind, parameters: { ...p, ...changed } };
}

/* The network in which every value is its factor times what it was. Factors are plain lists by value here. */
function rescaled(network, factors) {
  const ops = new Map();
  const nodes = network.nodes.map(({ name, op, inputs }) => {
    if (!ops.has(op)) ops.set(op, rescaledOp(op, inputs.map((value) => factors[value]), factors[name]));
    return { name, op: ops.get(op), inputs };
  });
  return { ...network, nodes };
}

function rescale({ network: code, factors: coded }) {
  const network = decodeNetwork(code), factors = Object.fromEntries(Object.entries(coded).map(([value, f]) => [value, decodeArray(f)]));
  checkFactors(network, factors);
  const lists = Object.fromEntries(Object.entries(factors).map(([value, { data }]) => [value, Array.from(data)]));
  return { network: encodeNetwork(rescaled(network, lists)) };
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Level 4: equalize
// ---------------------------------------------------------------------------------------------------------------------------------------

/* A layer's weights other than 0 as {o, i, w}: the largest magnitude over the taps. BatchNorms are layers, gamma / sqrt(var + eps). */
function magnitudes({ kind, parameters: p }) {
  if (kind === 'BatchNorm') return scaleAndShift(p).s.map((s, c) => ({ o: c, i: c, w: Math.abs(s) })).filter(({ w }) => w > 0);
  const column = columnOf(p.weight.shape, p.groups), largest = new Map();
  make('float64', p.weight.shape, (index, k) => {
    const o = index[0], i = column(index), key = `${o},${i}`, w = Math.abs(p.weight.data[k]);
    if (w > 0 && !(largest.has(key) && largest.get(key).w >= w)) largest.set(key, { o, i, w });
    return 0;
  });
  return [...largest.values()];
}

/* Every layer once: its op, its nodes, the numbers (level 2) of what it makes and reads, and its weights. */
function layersOf(network, numbers) {
  const layers = [];
  for (const node of network.nodes) {
    if (![...WEIGHTED, 'BatchNorm'].includes(node.op.kind)) continue;
    const known = layers.find(({ op }) => op === node.op);
    if (known) known.nodes.push(node);
    else layers.push({ op: node.op, nodes: [node], made: numbers[node.name], read: numbers[node.inputs[0]], weights: magnitudes(node.op) });
  }
  return layers;
}

/* Layers whose free channels share a factor, together: in the order of their first layer. */
function blocksOf(layers) {
  let blocks = [];
  for (const layer of layers) {
    const free = layer.made.filter((k) => k !== 0);
    if (free.length === 0) continue;
    const met = blocks.filter((block) => free.some((k) => block.numbers.has(k)));
    const merged = { layers: [...met.flatMap((block) => block.layers), layer], numbers: new Set([...met.flatMap((block) => [...block.numbers]), ...free]) };
    blocks = met.length === 0 ? [...blocks, merged] : blocks.filter((block) => block === met[0] || !met.includes(block)).map((block) => (block === met[0] ? merged : block));
  }
  return blocks;
}

/* The value behind the activations that directly follow a node. */
function activated(network, node) {
  let value = node.name;
  for (;;) {
    const readers = readersOf(network, value);
    if (network.outputs.includes(value) || readers.length !== 1 || !['ReLU', 'LeakyReLU', 'PReLU', 'Clip'].includes(readers[0].op.kind)) return value;
    value = readers[0].name;
  }
}

const MOST = 1024; // an attenuation, or a block in a Concat, goes no further

/* one_step (m = 1) and two_step: every block is looked at once; returns a factor for each number of level 2. */
function stepped(network, statistics, maxFactor, two) {
  const { numbers, forms } = channelsOf(network), layers = layersOf(network, numbers), blocks = blocksOf(layers), f = forms.map(() => 1);
  for (const [k, form] of forms.entries()) if (k && !(form.size === 1 && [...form.values()][0] === 1)) throw new Skipped('products of values in one_step and two_step');
  const scaled = (layer) => layer.weights.map(({ o, i, w }) => ({ o, i, w: w * f[layer.made[o]] / f[layer.read[i]] }));
  const reach = (layer) => { // A_i without factors
    const largest = layer.made.map(() => 0);
    for (const node of layer.nodes) {
      const { min, max } = statistics[activated(network, node)];
      largest.forEach((a, c) => { largest[c] = Math.max(a, Math.abs(min.data[c]), Math.abs(max.data[c])); });
    }
    return largest;
  };
  const concats = network.nodes.filter(({ op }) => op.kind === 'Concat' && op.parameters.axis === 0).map(({ name }) => {
    const standing = layers.filter((layer) => layer.made.some((k) => k !== 0 && numbers[name].includes(k)));
    return { standing, largest: Math.max(...standing.flatMap(reach)) };
  });
  const attenuations = (block) => { // m_i, by number
    const m = new Map([[0, 1], ...[...block.numbers].map((k) => [k, two ? 1 / MOST : 1])]);
    for (const layer of two ? layers : []) {
      if (!layer.read.some((k) => block.numbers.has(k))) continue;
      const weights = scaled(layer), most = weights.reduce((largest, { w }) => Math.max(largest, w), 0);
      for (const { i, w } of weights) if (block.numbers.has(layer.read[i])) m.set(layer.read[i], Math.max(m.get(layer.read[i]), w / most));
    }
    return m;
  };
  for (const block of blocks) {
    const chosen = new Map([...block.numbers].map((k) => [k, Infinity])), m = attenuations(block);
    for (const layer of block.layers) {
      const K = layer.made.map(() => 0), A = reach(layer).map((a, c) => a * f[layer.made[c]]);
      for (const { o, w } of scaled(layer)) K[o] = Math.max(K[o], w);
      const most = (range) => Math.max(...range.map((x, c) => x * m.get(layer.made[c])));
      const candidate = K.map((_, c) => (K[c] > 0 && A[c] > 0 ? Math.min(most(K) / K[c], most(A) / A[c], maxFactor) : Infinity));
      const least = block.layers.length > 1 ? Math.min(...candidate.filter((g, c) => layer.made[c] !== 0)) : 1;
      candidate.forEach((g, c) => { if (layer.made[c] !== 0 && g < Infinity) chosen.set(layer.made[c], Math.min(chosen.get(layer.made[c]), g / least)); });
    }
    const isMade = (k) => layers.some((layer) => layer.weights.some(({ o }) => layer.made[o] === k));
    const isRead = (k) => layers.some((layer) => layer.weights.some(({ i }) => layer.read[i] === k));
    for (const [k, g] of chosen) if (g === Infinity || !isMade(k) || !isRead(k)) chosen.set(k, 1);
    let lift = Infinity; // Concat
    for (const { standing, largest } of concats) {
      for (const layer of block.layers.filter((one) => standing.includes(one))) {
        lift = Math.min(lift, largest / Math.max(...reach(layer).map((a, c) => a * (layer.made[c] === 0 ? 1 : chosen.get(layer.made[c])))));
      }
    }
    const isBound = block.layers.some((layer) => layer.weights.some(({ o }) => layer.made[o] === 0));
    if (!(lift > 1 && lift < Infinity) || isBound) lift = 1;
    for (const [k, g] of chosen) f[k] = g * (isMade(k) && isRead(k) ? Math.min(lift, MOST) : 1);
  }
  return { numbers, factors: f };
}

/* cross_layer: every free number moves by sqrt(shrinking / growing) until nothing moves (algebra.md, Rules). */
function balanced(network, maxFactor) {
  const { numbers, forms, free } = channelsOf(network), layers = layersOf(network, numbers), limit = Math.log(maxFactor);
  const u = forms.map(() => 0); // logarithms of factors, by number
  const byFree = new Map(free.map((t) => [t, { touched: [], carried: [], most: 0 }]));
  forms.forEach((form, k) => form.forEach((power, t) => byFree.get(t).carried.push({ k, power })));
  for (const layer of layers) {
    for (const { o, i, w } of layer.weights) {
      const made = layer.made[o], read = layer.read[i];
      for (const t of new Set([...forms[made].keys(), ...forms[read].keys()])) {
        const power = (forms[made].get(t) || 0) - (forms[read].get(t) || 0), move = byFree.get(t);
        if (power !== 0) move.touched.push({ made, read, w: Math.log(w), power });
        move.most = Math.max(move.most, Math.abs(power));
      }
    }
  }
  const moves = [...byFree.values()];
  for (let sweep = 0, largest = 1; sweep < 10000 && largest > 1e-13; sweep++) {
    largest = 0;
    for (const { touched, carried, most } of moves) {
      let growing = -Infinity, shrinking = -Infinity;
      for (const { made, read, w, power } of touched) {
        const range = w + u[made] - u[read];
        if (power > 0) growing = Math.max(growing, range); else shrinking = Math.max(shrinking, range);
      }
      if (growing === -Infinity || shrinking === -Infinity) continue; // dead: it keeps 1
      let move = (shrinking - growing) / 2 / most;
      for (const { k, power } of carried) { // every factor stays within the bounds
        const [a, b] = [(-limit - u[k]) / power, (limit - u[k]) / power];
        move = clamp(move, Math.min(a, b), Math.max(a, b));
      }
      for (const { k, power } of carried) u[k] += power * move;
      largest = Math.max(largest, Math.abs(move));
    }
  }
  return { numbers, factors: u.map((x) => clamp(Math.exp(x), 1 / maxFactor, maxFactor)) };
}

function equalize({ network: code, method, max_factor: maxFactor, statistics: coded }) {
  const network = decodeNetwork(code);
  require_(['one_step', 'two_step', 'cross_layer'].includes(method), `no method ${method}`);
  const statistics = decodeParameter(Object.fromEntries(Object.entries(coded || {}).map(([value, { min, max }]) => [value, { min: { array: min }, max: { array: max } }])));
  const { numbers, factors } = method === 'cross_layer' ? balanced(network, maxFactor) : stepped(network, statistics, maxFactor, method === 'two_step');
  const lists = Object.fromEntries(Object.entries(numbers).map(([value, list]) => [value, list.map((k) => factors[k])]));
  const arrays = Object.fromEntries(Object.entries(lists).map(([value, list]) => [value, encodeArray(vector('float64', list))]));
  return { factors: arrays, network: encodeNetwork(rescaled(network, lists)) };
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Level 5: grids
// ---------------------------------------------------------------------------------------------------------------------------------------

/* Rounding of magnitudes, whose distance to the whole number below is exact; x + 0.5 would not be. */
function rounded(x, rule) {
  if (!Number.isFinite(x)) return x;
  if (rule === 'floor') return Math.floor(x);
  const below = Math.floor(Math.abs(x)), rest = Math.abs(x) - below;
  const halfUp = { half_even: below % 2 === 1, half_away: true, half_up: x > 0 }[rule];
  require_(halfUp !== undefined, `no rounding ${rule}`);
  return Math.sign(x) * (below + (rest > 0.5 || (rest === 0.5 && halfUp) ? 1 : 0));
}

/* Scales of a grid lie along the channels, (1,) or (C,); those of a network's grids broadcast against what lies on them. */
function alongChannels({ scale, zero_point: zero, ...rest }, axes) {
  const spread = (v) => ({ ...v, shape: [1, v.data.length, ...Array(axes - 2).fill(1)] });
  return { scale: spread(scale), zero_point: spread(zero), ...rest };
}

function entryOf(parameter, index) { return at(parameter, index.slice(index.length - parameter.shape.length)); }

/* q = clip(round(x / scale) + zero_point, qmin, qmax), the division in the type of x. */
function onGrid(x, { scale, zero_point: zero, qmin, qmax, rounding: rule }) {
  const round = rounding(x.dtype);
  return make('int32', x.shape, (index, k) => {
    require_(!Number.isNaN(x.data[k]), 'NaN lies on no grid');
    return clamp(rounded(round(x.data[k] / round(entryOf(scale, index))), rule || 'half_even') + entryOf(zero, index), qmin, qmax);
  });
}

/* x = scale (q - zero_point) in float64, rounded once. */
function dequantized(q, { scale, zero_point: zero }, dtype) {
  return make(dtype, q.shape, (index, k) => entryOf(scale, index) * (q.data[k] - entryOf(zero, index)));
}

/* qmin and qmax of a quantizer's bits. */
function bounds({ bits, symmetric = true, signed = symmetric, narrow_range: narrow = false }) {
  const qmin = (signed ? -(2 ** (bits - 1)) : 0) + (narrow ? 1 : 0), qmax = signed ? 2 ** (bits - 1) - 1 : 2 ** bits - 1;
  return { qmin, qmax, symmetric, middle: signed ? 0 : 2 ** (bits - 1) };
}

/* The scale and the zero point of a range. */
function ofRange(quantizer, low, high) {
  require_(Number.isFinite(low) && Number.isFinite(high) && low <= high, 'a range that is empty or not finite');
  const { qmin, qmax, symmetric, middle } = bounds(quantizer);
  if (symmetric) return { scale: Math.max(Math.abs(low), Math.abs(high)) / (qmax - middle) || 1, zero: middle };
  low = Math.min(low, 0);
  high = Math.max(high, 0);
  const scale = (high - low) / (qmax - qmin) || 1;
  return { scale, zero: rounded(qmin - low / scale, 'half_even') };
}

function grid({ quantizer, low: codedLow, high: codedHigh }) {
  const low = decodeArray(codedLow), high = decodeArray(codedHigh), ranges = Array.from(low.data, (x, c) => ofRange(quantizer, x, high.data[c]));
  const { qmin, qmax } = bounds(quantizer);
  return {
    scale: encodeArray(make('float64', low.shape, (_, c) => ranges[c].scale)),
    zero_point: encodeArray(make('int64', low.shape, (_, c) => ranges[c].zero)), qmin, qmax,
  };
}

/* The rows of weights that share a scale: all, or each by itself. */
function rowGroups(quantizer, rows) {
  return quantizer.granularity === 'per_channel' ? Array.from({ length: rows }, (_, o) => [o]) : [[...Array(rows).keys()]];
}

/* One range for each group of rows; the scale is a number of the weights' type. */
function weightGridOf(quantizer, weight) {
  const [rows] = weight.shape, size = weight.data.length / rows, scales = Array(rows), zeros = Array(rows);
  for (const group of rowGroups(quantizer, rows)) {
    const entries = group.flatMap((o) => Array.from(weight.data.slice(o * size, (o + 1) * size)));
    const { scale, zero } = ofRange(quantizer, Math.min(...entries), Math.max(...entries));
    for (const o of group) { scales[o] = rounding(weight.dtype)(scale); zeros[o] = zero; }
  }
  const spread = (list) => make('float64', weight.shape, ([o]) => list[o]);
  return { scale: spread(scales), zero_point: spread(zeros), ...bounds(quantizer), rounding: 'half_even' };
}

function weightGrid({ quantizer, weight: coded }) {
  const weight = decodeArray(coded), on = weightGridOf(quantizer, weight);
  return { scale: encodeArray(on.scale), q: encodeArray(onGrid(weight, on)) };
}

function decodeGrid(coded) { return { ...coded, scale: decodeArray(coded.scale), zero_point: decodeArray(coded.zero_point) }; }

function quantize({ grid: coded, x: array }) {
  const x = decodeArray(array);
  return { q: encodeArray(onGrid(x, alongChannels(decodeGrid(coded), x.shape.length))) };
}

function dequantize({ grid: coded, q: array, dtype }) {
  const q = decodeArray(array);
  return { x: encodeArray(dequantized(q, alongChannels(decodeGrid(coded), q.shape.length), dtype)) };
}

/* q = clip(round(n M) + zero_point, qmin, qmax), M = (s_x s_w) / s_y; the step s_x s_w, M and the product in the type. */
function requantized(n, step, { scale, zero_point: zero, qmin, qmax }, dtype) {
  const round = rounding(dtype);
  return make('int32', n.shape, (index, k) => {
    const multiplier = round(step(index) / round(entryOf(scale, index)));
    return clamp(rounded(round(round(n.data[k]) * multiplier), 'half_even') + entryOf(zero, index), qmin, qmax);
  });
}

function requantize({ n: array, input_scale: inputScale, weight_scale: weightScale, grid: coded, dtype }) {
  const n = decodeArray(array), weight = decodeArray(weightScale), round = rounding(dtype);
  const step = ([, o]) => round(round(inputScale) * round(ofChannel(weight, o)));
  return { q: encodeArray(requantized(n, step, alongChannels(decodeGrid(coded), n.shape.length), dtype)) };
}

/* A Dense layer for 32-bit sums: |q_b| + sum |q_w| max|q_x - z_x| < 2**31 in every output channel, with s_w raised where that takes it. */
function quantizeLayer({ weight: codedWeight, bias: codedBias, weights: quantizer, input: codedInput }) {
  const weight = decodeArray(codedWeight), b = codedBias === null ? null : decodeArray(codedBias), input = decodeGrid(codedInput);
  const { qmin, qmax, symmetric, middle } = bounds(quantizer);
  if (!symmetric || middle !== 0) throw new Skipped('weights with a zero point in quantize_layer');
  const [rows, columns] = weight.shape, round = rounding(weight.dtype), inputScale = round(input.scale.data[0]), zero = input.zero_point.data[0];
  const reach = Math.max(Math.abs(input.qmin - zero), Math.abs(input.qmax - zero)), first = weightGridOf(quantizer, weight).scale.data;
  const scales = Array(rows), qWeight = Array(rows * columns), qBias = Array(rows).fill(0);
  for (const group of rowGroups(quantizer, rows)) {
    const largestBias = b === null ? 0 : Math.max(...group.map((o) => Math.abs(b.data[o])));
    const isDead = group.every((o) => weight.data.slice(o * columns, (o + 1) * columns).every((w) => w === 0));
    let scale = first[group[0] * columns];
    if (isDead && largestBias > 0) scale = round(largestBias / (2 ** 23 * inputScale));
    else if (group.length === 1) scale = Math.max(scale, round(largestBias / (2 ** 20 * inputScale)));
    for (;;) {
      let most = 0;
      for (const o of group) {
        let sum = 0;
        for (let k = o * columns; k < (o + 1) * columns; k++) {
          qWeight[k] = clamp(rounded(round(weight.data[k] / scale), 'half_even'), qmin, qmax);
          sum += Math.abs(qWeight[k]) * reach;
        }
        if (b !== null) qBias[o] = rounded(b.data[o] / round(inputScale * scale), 'half_even');
        most = Math.max(most, sum + Math.abs(qBias[o]));
      }
      if (most < 2 ** 31) break;
      scale = round(scale * Math.max(1 + 2 ** -20, most / 2 ** 31));
    }
    for (const o of group) scales[o] = scale;
  }
  return {
    scale: encodeArray(vector('float64', scales)), q_b: encodeArray(vector('int64', qBias)),
    q_w: encodeArray(make('int32', weight.shape, (_, k) => qWeight[k])),
  };
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Level 6: quantized_forward. A value is {x} in float, {q, grid} on a grid, or {n, layer, step} as a layer's sums without bias.
// ---------------------------------------------------------------------------------------------------------------------------------------

const KEEPING = [...MOVES, 'MaxPool', 'MinPool']; // these move whole numbers

function isOneScale({ scale, zero_point: zero }) { return scale.data.length === 1 && zero.data.length === 1; }

/* A layer's sums n = sum (q_x - z_x) (q_w - z_w): the op itself, on whole numbers. Padding is the zero point, of which 0 is left. */
function sumsOf({ kind, parameters: p }, { q, grid: on }) {
  const lying = p.grid.Grid, whole = onGrid(p.weight, lying);
  const weight = make('float64', whole.shape, (index, k) => whole.data[k] - entryOf(lying.zero_point, index));
  const x = make('float64', q.shape, (_, k) => q.data[k] - on.zero_point.data[0]);
  return OPS[kind].forward({ ...p, weight, bias: null }, [x]);
}

/* What a node makes of values that are stored, or not. */
function computed({ op }, values, float, dtype) {
  const { kind, parameters: p } = op, [value] = values, on = value.q && isOneScale(value.grid) ? value.grid : null;
  if (WEIGHTED.includes(kind) && p.grid && on) return { n: sumsOf(op, value), layer: op, read: on };
  if (kind === 'FakeQuantize') {
    const stored = p.grid.Grid;
    if (p.step === null || !value.n) return { q: onGrid(float(value), stored), grid: stored };
    const round = rounding(dtype), step = ([, o]) => round(ofChannel(p.step, o)), { bias: b } = value.layer.parameters;
    const n = make('int64', value.n.shape, (index, k) => value.n.data[k] + (b === null ? 0 : rounded(b.data[index[1]] / step(index), 'half_even')));
    return { q: requantized(n, step, { ...stored, ...(isOneScale(stored) ? alongChannels(stored, n.shape.length) : {}) }, dtype), grid: stored };
  }
  if (on && KEEPING.includes(kind)) return { q: OPS[kind].forward(p, [value.q]), grid: on };
  if (on && kind === 'Pad' && p.value === 0) return { q: OPS[kind].forward({ ...p, value: on.zero_point.data[0] }, [value.q]), grid: on };
  if (on && (kind === 'Clip' || kind === 'ReLU')) { // q = min(max(q, q_low), q_high)
    const [low, high] = kind === 'ReLU' ? [0, Infinity] : [p.low, p.high];
    const whole = (v, c) => rounded(ofChannel(v, c) / on.scale.data[0], 'half_even') + on.zero_point.data[0];
    return { q: mapped(value.q, (q, c) => clamp(clamp(q, whole(low, c), whole(high, c)), on.qmin, on.qmax)), grid: on };
  }
  return { x: OPS[kind].forward(p, values.map(float)) };
}

/* All values of a quantized network, and a function that gives what one of them stands for. */
function runQuantized(network, inputs) {
  const values = {};
  let dtype = 'float64';
  for (const [name, x] of Object.entries(inputs)) { values[name] = { x }; dtype = x.dtype; }
  const float = (value) => { // each value is s (q - z) in float64, rounded; sums are s_x s_w n + b
    if (value.x) return value.x;
    if (value.q) return dequantized(value.q, value.grid, dtype);
    const { layer: { parameters: p }, n, read } = value, { scale } = p.grid.Grid;
    return make(dtype, n.shape, (index, k) => {
      const s = scale.data[scale.data.length === 1 ? 0 : index[1] * (scale.data.length / scale.shape[0])];
      return read.scale.data[0] * s * n.data[k] + bias(p, index[1]);
    });
  };
  for (const node of network.nodes) values[node.name] = computed(node, node.inputs.map((name) => values[name]), float, dtype);
  return { values, float };
}

function quantizedForward({ network: code, inputs, stored }) {
  const network = decodeNetwork(code), { values } = runQuantized(network, readInputs(network, inputs));
  return {
    integers: Object.fromEntries(stored.map((name) => {
      require_(name in values && values[name].q, `${name} lies on no grid`);
      return [name, encodeArray({ ...values[name].q, dtype: 'int32' })];
    })),
  };
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Answers
// ---------------------------------------------------------------------------------------------------------------------------------------

const ASKS = {
  hello: () => ({ name: 'eqfact in JavaScript', version: '1', language: 'JavaScript', levels: [0, 1, 2, 3, 4, 5, 6] }),
  forward, fold_batchnorm: foldBatchnorm, channels, rescale, equalize, grid, weight_grid: weightGrid, quantize, dequantize, requantize,
  quantize_layer: quantizeLayer, quantized_forward: quantizedForward,
};

/* The reply to a question: {id, answer}, {id, skip} or {id, error}. */
function answer(question) {
  const { id, ask } = question;
  try {
    if (!Object.hasOwn(ASKS, ask)) return { id, skip: `no ${ask}` };
    return { id, answer: ASKS[ask](question) };
  } catch (error) {
    if (error instanceof Refused) return { id, answer: { refused: error.message } };
    if (error instanceof Skipped) return { id, skip: error.message };
    return { id, error: String((error && error.stack) || error) };
  }
}

root.eqfact = {
  answer, asks: ASKS, decodeArray, encodeArray, decodeNetwork, encodeNetwork, run, channelsOf, rescaled, layersOf, ofRange, bounds, rounded, runQuantized,
};

if (typeof module !== 'undefined' && typeof require === 'function' && require.main === module) {
  require('readline').createInterface({ input: process.stdin }).on('line', (line) => {
    process.stdout.write(`${JSON.stringify(answer(JSON.parse(line)))}\n`);
  });
}

})(globalThis);
