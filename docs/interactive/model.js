/* What the page computes, by the port: factors, ranges, outputs, grids. Nothing here knows of the page.
 *
 * Factors are a list by number (level 2 of docs/porting.md): channels with one number share a factor, and number 0 keeps 1.
 */
'use strict';

const METHODS = { none: 'None', one_step: 'One-step', two_step: 'Two-step', cross_layer: 'Cross-layer', optimal: 'Optimal' };
const LIMIT = { one_step: 16, two_step: 16, cross_layer: 64 }; // the paper's bound; the page's slider

/* A network with all that never changes. */
function loadNetwork(coded) {
  const network = eqfact.decodeNetwork(coded.network), { numbers, forms } = eqfact.channelsOf(network);
  const [input] = Object.keys(network.inputs), [output] = network.outputs, samples = eqfact.decodeArray(coded.samples);
  const statistics = Object.fromEntries(Object.entries(coded.statistics).map(([value, { min, max }]) => (
    [value, { min: eqfact.decodeArray(min).data, max: eqfact.decodeArray(max).data }])));
  return {
    coded, network, numbers, count: forms.length, layers: eqfact.layersOf(network, numbers), statistics, input, output, samples,
    truth: eqfact.run(network, { [input]: samples })[output], chosen: { none: forms.map(() => 1) }, quality: {},
  };
}

/* One of a batch. */
function sample(batch, k) {
  const size = batch.data.length / batch.shape[0];
  return { dtype: batch.dtype, shape: [1, ...batch.shape.slice(1)], data: batch.data.slice(k * size, (k + 1) * size) };
}

function byValue({ numbers }, factors) {
  return Object.fromEntries(Object.entries(numbers).map(([value, list]) => [value, list.map((k) => factors[k])]));
}

/* The factors of a method. "Optimal" was computed by eqfact when the page was built; the others are computed here, once. */
function factorsOf(model, method) {
  if (!model.chosen[method]) {
    const { network, statistics, optimal } = model.coded;
    const found = method === 'optimal' ? optimal : eqfact.asks.equalize({ network, statistics, method, max_factor: LIMIT[method] }).factors;
    const factors = Array(model.count).fill(1);
    for (const [value, f] of Object.entries(found)) eqfact.decodeArray(f).data.forEach((x, c) => { factors[model.numbers[value][c]] = x; });
    factors[0] = 1;
    model.chosen[method] = factors;
  }
  return model.chosen[method];
}

function powerOfTwo(factor) { return 2 ** Math.round(Math.log2(factor)); }

function rescale(model, factors) { return eqfact.rescaled(model.network, byValue(model, factors)); }

function outputsOf(model, network, x) { return eqfact.run(network, { [model.input]: x })[model.output]; }

/* Are two lists of numbers the same bits? 0 and -0 are not, NaN and NaN are. */
function compare(a, b) {
  let same = 0, largest = 0;
  a.forEach((x, k) => { if (Object.is(x, b[k])) same++; else largest = Math.max(largest, Math.abs(x - b[k])); });
  return { same, count: a.length, equal: same === a.length, largest };
}

/* A float32 as its 32 bits, in hexadecimal digits. */
function hexadecimal(x) {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, x);
  return view.getUint32(0).toString(16).padStart(8, '0');
}

function nameOf(layer) { return layer.nodes[0].name; }

function largestOf(list) { return list.reduce((a, b) => Math.max(a, Math.abs(b)), 0); }

/* The ranges of all layers' weights with factors: by channel as made and as read, and of the whole tensor. */
function weightRanges(model, factors) {
  return model.layers.map((layer) => {
    const made = layer.made.map(() => 0), read = layer.read.map(() => 0);
    for (const { o, i, w } of layer.weights) {
      const range = w * factors[layer.made[o]] / factors[layer.read[i]];
      made[o] = Math.max(made[o], range);
      read[i] = Math.max(read[i], range);
    }
    return { layer, made, read, whole: largestOf(made) };
  });
}

/* The range of a value's channels with factors, on the data that it was calibrated with. */
function valueRange(model, value, factors) {
  const { min, max } = model.statistics[value];
  const channels = model.numbers[value].map((k, c) => factors[k] * Math.max(Math.abs(min[c]), Math.abs(max[c])));
  return { channels, whole: largestOf(channels) };
}

/* The weights that make an output channel of a layer, or that read an input channel of it. */
function weightsOf({ op }, side, channel) {
  const { weight, groups = 1 } = op.parameters, [out, perGroup] = weight.shape, taps = weight.data.length / (out * perGroup), found = [];
  weight.data.forEach((w, k) => {
    const o = Math.floor(k / (taps * perGroup)), i = Math.floor(o / (out / groups)) * perGroup + Math.floor(k / taps) % perGroup;
    if ((side === 'made' ? o : i) === channel) found.push({ k, o, i, tap: k % taps, w });
  });
  return found;
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// The network on grids, as eqfact.quantize makes it
// ---------------------------------------------------------------------------------------------------------------------------------------

const LAYERS = ['Dense', 'Conv'];
const MOVING = ['Slice', 'Flatten'];

function filled(shape, x, dtype = 'float64') {
  return { dtype, shape, data: new Float64Array(shape.reduce((a, b) => a * b, 1)).fill(x) };
}

function gridOf(quantizer, low, high) {
  const { scale, zero } = eqfact.ofRange(quantizer, low, high), { qmin, qmax } = eqfact.bounds(quantizer);
  return { scale: Math.fround(scale), zero, qmin, qmax };
}

function asGrid({ scale, zero, qmin, qmax }, axes = 1) {
  const shape = Array(axes).fill(1);
  return { Grid: { scale: filled(shape, scale), zero_point: filled(shape, zero), qmin, qmax, rounding: 'half_even' } };
}

/* A layer with its weights on a grid, and its bias on that of its sums. A convolution's rows are those of a Dense layer. */
function layerOnGrid({ kind, parameters: p }, input, bits) {
  const rows = p.weight.shape[0], flat = { ...p.weight, shape: [rows, p.weight.data.length / rows] };
  const coded = {
    weight: eqfact.encodeArray(flat), bias: p.bias && eqfact.encodeArray(p.bias), weights: { bits },
    input: {
      ...input, scale: eqfact.encodeArray(filled([1], input.scale)), zero_point: eqfact.encodeArray(filled([1], input.zero, 'int64')),
    },
  };
  const answer = eqfact.asks.quantize_layer(coded), [scale] = eqfact.decodeArray(answer.scale).data;
  const q = eqfact.decodeArray(answer.q_w).data, qBias = eqfact.decodeArray(answer.q_b).data, step = Math.fround(input.scale * scale);
  const { qmin, qmax } = eqfact.bounds({ bits });
  return {
    step, q, scale,
    op: { kind, parameters: {
      ...p, weight: { ...p.weight, data: q.map((n) => Math.fround(n * scale)) },
      bias: p.bias && { ...p.bias, data: qBias.map((n) => Math.fround(n * step)) },
      grid: asGrid({ scale, zero: 0, qmin, qmax }, p.weight.shape.length),
    } },
  };
}

/* A ReLU or Clip after rounding: its bounds on the grid; null where the grid ends as early. */
function clipOnGrid({ kind, parameters: p }, { scale, zero, qmin, qmax }) {
  const place = (x) => eqfact.rounded(Math.fround(Math.fround(x) / scale), 'half_even') + zero;
  const round = (x) => Math.fround(scale * (Math.min(Math.max(place(x), qmin), qmax) - zero));
  const ends = kind === 'ReLU' ? [0, Infinity] : [p.low, p.high];
  const arrays = ends.map((end) => (typeof end === 'number' ? filled([1], end) : end));
  const [low, high] = arrays.map((end) => ({ ...end, data: end.data.map(round) }));
  const cuts = low.data.some((x) => x > round(-Infinity)) || high.data.some((x) => x < round(Infinity));
  return cuts ? { kind: 'Clip', parameters: { low, high } } : null;
}

/* The grid that a value lies on: its own, or that of what an op moved. */
function valueGrid(model, value, factors, bits) {
  const { statistics, numbers, network, coded: { stored } } = model;
  if (!stored.includes(value)) return valueGrid(model, network.nodes.find(({ name }) => name === value).inputs[0], factors, bits);
  const scaled = (ends) => Array.from(ends, (x, c) => x * factors[numbers[value][c]]), { min, max } = statistics[value];
  return gridOf({ bits, symmetric: false }, Math.min(...scaled(min)), Math.max(...scaled(max)));
}

/* The rescaled network with weights and values on grids, for `eqfact.runQuantized`. */
function quantize(model, rescaled, factors, bits) {
  const { coded: { stored } } = model, grids = {}, nodes = [], layers = {}, renamed = {};
  for (const value of stored) grids[value] = valueGrid(model, value, factors, bits.activations);
  const roundTo = (name, value, from, step = null) => {
    const steps = step && filled([1], step);
    nodes.push({ name, op: { kind: 'FakeQuantize', parameters: { grid: asGrid(grids[value]), step: steps } }, inputs: [from] });
  };
  for (const value of Object.keys(rescaled.inputs)) {
    renamed[value] = `${value}.quantized`;
    roundTo(renamed[value], value, value);
  }
  for (const node of rescaled.nodes) {
    let { op } = node;
    const [source] = node.inputs, inputs = node.inputs.map((value) => renamed[value] || value);
    if (LAYERS.includes(op.kind)) {
      layers[node.name] = layerOnGrid(op, grids[source], bits.weights);
      op = layers[node.name].op;
    } else if (MOVING.includes(op.kind)) {
      grids[node.name] = grids[source];
    }
    if (!stored.includes(node.name)) {
      nodes.push({ name: node.name, op, inputs });
    } else if (['ReLU', 'Clip'].includes(op.kind) && !(source in grids)) {
      const clip = clipOnGrid(op, grids[node.name]), name = clip ? `${source}.quantized` : node.name;
      roundTo(name, node.name, source, layers[source] && layers[source].step);
      if (clip) nodes.push({ name: node.name, op: clip, inputs: [name] });
    } else {
      nodes.push({ name: `${node.name}.float`, op, inputs });
      roundTo(node.name, node.name, `${node.name}.float`, layers[node.name] && layers[node.name].step);
    }
  }
  return { network: { ...rescaled, nodes }, layers, grids };
}

/* What a quantized network puts out, and the whole numbers of the values that it stores. */
function runOnGrids(model, quantized, x) {
  const { values, float } = eqfact.runQuantized(quantized.network, { [model.input]: x });
  return { output: float(values[model.output]), integers: (value) => values[value].q.data };
}

/* Signal to quantization noise in dB, of sums of squares that add up. */
function sums(truth, output) {
  let signal = 0, noise = 0;
  truth.forEach((y, k) => { signal += y * y; noise += (y - output[k]) ** 2; });
  return { signal, noise };
}

function decibels({ signal, noise }) { return noise === 0 ? Infinity : 10 * Math.log10(signal / noise); }

function softmax(x) {
  const most = Math.max(...x), e = Array.from(x, (v) => Math.exp(v - most)), whole = e.reduce((a, b) => a + b, 0);
  return e.map((v) => v / whole);
}

function largestAt(list) { return list.indexOf(Math.max(...list)); }
