/* The page: what is chosen, what is asked of the model then, and where the answers go.
 *
 * A drag shows at once what is quick: ranges, the output of one input, the grid of one layer. What takes longer, all inputs and the whole
 * quantized network, follows when the drag ends, input by input, so that the page stays awake.
 */
'use strict';

const CODED = JSON.parse(document.getElementById('networks').textContent);
const models = {};
const state = { model: null, value: '', channel: 0, factors: [], method: 'none', input: 0, drawn: null, side: 0, bits: { weights: 8, activations: 8 } };
let turn = 0; // of the slow computations: a newer one ends the older
let quantized = null; // the whole network on grids, when it is computed
let overall = null; // the comparison over all inputs, when it is computed

const $ = (id) => document.getElementById(id);
const METHOD_SAYS = {
  none: 'All factors are 1.',
  one_step: 'Channels are amplified until they reach the range of their tensor. From the paper; at most 16 times.',
  two_step: 'First those are attenuated that are read with small weights, then all are amplified. From the paper; at most 16 times.',
  cross_layer: 'Each channel is made and read with weights of one range, as far as 1/64 to 64 goes.',
  optimal: 'The least expected noise at the output. Computed by eqfact when this page was made, for 8 bits.',
};

function snapped(factor) { return $('snap').checked ? powerOfTwo(factor) : factor; }
function number() { return state.model.numbers[state.value][state.channel]; }
function isDrawn() { return state.input === 'drawn'; }
function chosenInput() { return isDrawn() ? { ...sample(state.model.samples, 0), data: state.drawn } : sample(state.model.samples, state.input); }
function plural(n, word) { return `${n} ${word}${n === 1 ? '' : 's'}`; }
function channelName(c) { return c + 1; }
function pause() { return new Promise((resolve) => { setTimeout(resolve); }); }

// ---------------------------------------------------------------------------------------------------------------------------------------
// What is chosen
// ---------------------------------------------------------------------------------------------------------------------------------------

function chooseNetwork(name) {
  models[name] = models[name] || loadNetwork(CODED[name]);
  const model = models[name], { coded, numbers } = model;
  Object.assign(state, { model, method: 'none', factors: factorsOf(model, 'none'), input: 0, drawn: null });
  fill('about', coded.about);
  fill('value', ...Object.entries(numbers).map(([value, list]) => element('option', { value }, `${value} (${list.length})`)));
  fill('sample', ...coded.names.map((text, k) => element('option', { value: k }, text)));
  $('draw').hidden = name !== 'digits';
  $('comparison').hidden = true;
  if (area) area.clear();
  chooseValue(coded.value);
  changed(true);
}

function chooseValue(value) {
  state.value = value;
  $('value').value = value;
  fill('channels', ...state.model.numbers[value].map((k, c) => element('div', {
    class: `channel${k === 0 ? ' pinned' : ''}`, role: 'option', id: `channel-${c}` }, element('i'), element('i'))));
  chooseChannel(Math.min(state.channel, state.model.numbers[value].length - 1));
}

function chooseChannel(c) {
  state.channel = c;
  const k = number(), { numbers } = state.model;
  [...$('channels').children].forEach((option, n) => {
    option.setAttribute('aria-selected', n === c);
    option.classList.toggle('together', n !== c && k !== 0 && numbers[state.value][n] === k);
  });
  $('channels').setAttribute('aria-activedescendant', `channel-${c}`);
  $(`channel-${c}`).scrollIntoView({ block: 'nearest', inline: 'nearest' });
  $('factor').disabled = k === 0;
  const around = layersAround();
  fill('layer', ...around.map(({ layer, side, channel }, n) => (
    element('option', { value: n }, `${side === 'made' ? 'make' : 'read'} the channel: ${nameOf(layer)}, channel ${channelName(channel)}`))));
  state.side = 0;
  sayChannel();
}

/* The layers that make the channel, and those that read it, with the channel of theirs that it is. */
function layersAround() {
  const k = number(), { layers } = state.model, found = [];
  for (const side of ['made', 'read']) {
    for (const layer of layers) {
      if (k !== 0) layer[side].forEach((of, channel) => { if (of === k) found.push({ layer, side, channel }); });
      else if (touches(layer, side)) found.push({ layer, side, channel: state.channel });
    }
  }
  return found;
}

/* A pinned channel has no number of its own: only layers at its value itself are known to make or read it. */
function touches(layer, side) {
  return layer.nodes.some((node) => (side === 'made' ? node.name : node.inputs[0]) === state.value || (
    side === 'made' && activationOf(node.name) === state.value));
}

function activationOf(name) {
  const readers = state.model.network.nodes.filter((node) => node.inputs.includes(name));
  return readers.length === 1 && ['ReLU', 'Clip'].includes(readers[0].op.kind) ? readers[0].name : null;
}

function sayChannel() {
  const k = number(), { numbers, coded } = state.model;
  if (k === 0) {
    fill('channel-says', element('strong', {}, 'Pinned: its factor must be 1. '), coded.reasons[state.value][state.channel]);
    return;
  }
  const mates = Object.entries(numbers).flatMap(([value, list]) => list.flatMap((of, c) => (
    of === k && !(value === state.value && c === state.channel) ? [{ value, c }] : [])));
  const own = mates.every(({ c }) => c === state.channel) ? [...new Set(mates.map(({ value }) => value))] : mates.map(({ value, c }) => `${value}[${channelName(c)}]`);
  fill('channel-says', mates.length ? `Moves together with: ${own.join(', ')}.` : 'Moves alone.');
}

/* The factors of a method; or of one channel, by hand. */
function chooseMethod(method) {
  state.method = method;
  state.factors = factorsOf(state.model, method).map(snapped);
  changed(true);
}

function chooseFactor(factor) {
  if (number() === 0) return;
  state.method = null;
  state.factors = state.factors.map((f, k) => (k === number() ? factor : f));
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// What is shown at once
// ---------------------------------------------------------------------------------------------------------------------------------------

function changed(isFinal) {
  turn += 1; // what is being computed is of the past
  quantized = overall = null;
  fill('quality', '…');
  const network = rescale(state.model, state.factors);
  showChannel(network);
  showOutputs(network);
  for (const button of $('methods').children) button.setAttribute('aria-pressed', button.value === state.method);
  fill('method-says', state.method ? METHOD_SAYS[state.method] : 'Changed by hand.');
  if (isFinal) finish(network);
}

/* Another channel of the same network. */
function showChannel(network = rescale(state.model, state.factors)) {
  showFactor();
  showRanges();
  showLine(network);
}

function showFactor() {
  const factor = state.factors[number()], slider = $('factor'), isSnapped = $('snap').checked;
  slider.step = isSnapped ? 1 : 'any';
  slider.value = Math.log2(factor);
  slider.setAttribute('aria-valuetext', `times ${timesWords(factor)}`);
  fill('factor-says', `× ${timesWords(factor)}`);
}

function showRanges() {
  const { model, factors, value } = state, ones = model.chosen.none, k = number(), list = model.numbers[value];
  const now = weightRanges(model, factors), before = weightRanges(model, ones);
  const most = { made: {}, read: {} }; // by number, the largest share of a tensor's range
  for (const side of ['made', 'read']) {
    for (const of of now) of.layer[side].forEach((n, c) => { most[side][n] = Math.max(most[side][n] || 0, share(of[side][c], of.whole)); });
  }
  [...$('channels').children].forEach((option, c) => {
    const n = list[c], [made, read] = n === 0 ? [0, 0] : [most.made[n] || 0, most.read[n] || 0];
    option.children[0].style.height = `${100 * made}%`;
    option.children[1].style.height = `${100 * read}%`;
    option.setAttribute('aria-label', n === 0 ? `Channel ${channelName(c)}, pinned` : (
      `Channel ${channelName(c)}, times ${timesWords(factors[n])}, made with ${short(100 * made)} %, read with ${short(100 * read)} % of the range`));
  });
  const bits = (x, whole, of) => (x > 0 ? `${short(Math.max(of + Math.log2(x / whole), 0))} of ${of} bits` : 'no range');
  const bars = layersAround().map(({ layer, side, channel }) => {
    const n = model.layers.indexOf(layer), [a, b] = [now[n], before[n]], x = a[side][channel];
    return {
      name: side === 'made' ? `Weights of “${nameOf(layer)}” that make it` : `Weights of “${nameOf(layer)}” that read it`,
      says: `${short(x)} of ${short(a.whole)} · ${bits(x, a.whole, state.bits.weights)}`,
      now: share(x, a.whole), before: share(b[side][channel], b.whole),
    };
  });
  const a = valueRange(model, value, factors), b = valueRange(model, value, ones), x = a.channels[state.channel];
  bars.push({
    name: `The values of “${value}” on data`, says: `${short(x)} of ${short(a.whole)} · ${bits(x, a.whole, state.bits.activations)}`,
    now: share(x, a.whole), before: share(b.channels[state.channel], b.whole),
  });
  showBars('bars', bars);
}

/* Over all inputs, as soon as they are computed; of the one that is shown until then, and of a drawing. */
function showVerdict(one) {
  const { same, count, equal, largest, inputs } = isDrawn() || !overall ? one : overall;
  const whole = plural(count, 'output') + (inputs > 1 ? ` for ${inputs} inputs` : '');
  fill('verdict', equal ? `All ${whole}: equal to the bit` : `${same} of ${whole} equal to the bit; largest difference ${short(largest)}`);
  $('verdict').className = `verdict ${equal ? 'equal' : isRounding(largest) ? '' : 'apart'}`;
}

/* Differences that roundings of float32 explain in networks of so few layers. */
function isRounding(difference) { return difference <= 1e-5 * largestOf(state.model.truth.data); }

function showOutputs(network) {
  const { model, factors } = state, x = chosenInput();
  const before = isDrawn() ? outputsOf(model, model.network, x).data : sample(model.truth, state.input).data, after = outputsOf(model, network, x).data;
  const found = compare(before, after), grids = quantized && runOnGrids(model, quantized, x).output.data;
  const cell = (v) => element('td', {}, full(v), element('code', {}, hexadecimal(v)));
  const rows = model.coded.outputs.map((name, k) => [name, cell(before[k]), cell(after[k]), grids ? short(grids[k]) : '…']);
  table('outputs', 'Outputs for this input', ['Output', 'Original', 'With factors', 'On grids'], rows);
  showVerdict({ ...found, inputs: 1 });
  const exact = factors.every((f) => powerOfTwo(f) === f);
  fill('verdict-why', exact ? 'A factor that is a power of two changes the exponent of a floating-point number and no other bit. So nothing is rounded.'
    : 'Factors that are no powers of two round a little, as every multiplication does in floating point. In exact numbers nothing would change.');
  if (model.input === 'image') showAnswer(before, grids, x.data);
}

function showLine(network) {
  const around = layersAround()[state.side], { model, bits } = state, width = Math.max($('line').clientWidth, 240);
  if (!around) {
    for (const id of ['line', 'errors', 'weights']) fill(id);
    fill('line-says', 'No layer with weights makes or reads this channel by itself.');
    return;
  }
  const { layer, side, channel } = around, { op, inputs: [source], name } = network.nodes.find((node) => node.name === nameOf(layer));
  const { scale, q } = layerOnGrid(op, valueGrid(model, source, state.factors, bits.activations), bits.weights), { qmin, qmax } = eqfact.bounds({ bits: bits.weights });
  const weights = weightsOf({ op }, side, channel).map((of) => ({ ...of, q: q[of.k], becomes: scale * q[of.k] }));
  const root = (f) => Math.sqrt(weights.reduce((sum, of) => sum + f(of) ** 2, 0) / weights.length);
  const error = root(({ w, becomes }) => w - becomes), size = root(({ w }) => w);
  const most = largestOf(weights.map(({ w }) => w)), reach = scale * -qmin;
  const lines = [numberLine(weights, { scale, qmin, qmax }, reach, width, `${plural(weights.length, 'weight')} on the grid of “${name}”, from ${short(-reach)} to ${short(reach)}`)];
  if (most > 0 && most < reach / 8) { // too small to be told apart: once more, larger
    const times = 2 ** Math.floor(Math.log2(reach / Math.max(most, scale * 2)));
    if (times > 1) {
      lines.push(element('p', { class: 'note' }, `The same, ${times} times as large:`));
      lines.push(numberLine(weights, { scale, qmin, qmax }, reach / times, width, `The same weights, ${times} times as large`));
    }
  }
  fill('line', ...lines);
  fill('line-says', `The grid of “${name}” has steps of ${short(scale)}. ${weights.length === 1 ? 'This weight is' : `These ${weights.length} weights are`} off by ${short(error)}${
    weights.length === 1 ? '' : ' (root mean square)'}: ${size > 0 ? `${short(100 * error / size)} % of their size` : 'all are 0'}.`);
  fill('errors', errorBars(weights, most || 1, width, `Errors of ${plural(weights.length, 'weight')}, the largest ${short(100 * largestOf(weights.map(({ w, becomes }) => (becomes - w) / (most || 1))))} %`));
  table('weights', `Weights of “${name}”`, ['To, from, tap', 'Weight', 'Whole number', 'Becomes', 'Error'], weights.map(({ o, i, tap, w, q: n, becomes }) => (
    [`${channelName(o)}, ${channelName(i)}, ${channelName(tap)}`, short(w), short(n), short(becomes), short(becomes - w)])));
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// What takes longer
// ---------------------------------------------------------------------------------------------------------------------------------------

/* Signal and noise of a network on grids over all inputs; null when something newer has begun. */
async function measured(model, network, factors, bits, says) {
  const mine = turn, on = quantize(model, network, factors, bits), total = { signal: 0, noise: 0 }, count = model.samples.shape[0];
  for (let k = 0; k < count; k++) {
    says(k, count);
    await pause();
    if (mine !== turn) return null;
    const { signal, noise } = sums(sample(model.truth, k).data, runOnGrids(model, on, sample(model.samples, k)).output.data);
    total.signal += signal;
    total.noise += noise;
  }
  return { on, decibels: decibels(total) };
}

/* The equality of all inputs' outputs. */
async function allInputs(model, network) {
  const mine = turn, found = { same: 0, count: 0, largest: 0 }, count = model.samples.shape[0];
  for (let k = 0; k < count; k++) {
    await pause();
    if (mine !== turn) return null;
    const one = compare(sample(model.truth, k).data, outputsOf(model, network, sample(model.samples, k)).data);
    found.same += one.same;
    found.count += one.count;
    found.largest = Math.max(found.largest, one.largest);
  }
  return { ...found, equal: found.same === found.count, inputs: count };
}

async function finish(network) {
  const mine = turn, { model, factors, bits } = state, says = (k, n) => fill('quality', `computing, input ${k + 1} of ${n} …`);
  document.body.dataset.busy = 'yes';
  const found = await allInputs(model, network);
  if (!found) return;
  overall = found;
  showOutputs(network);
  const now = await measured(model, network, factors, bits, says);
  if (!now) return;
  const none = await measured(model, model.network, model.chosen.none, bits, () => {});
  if (!none) return;
  quantized = now.on;
  showQuality(now.decibels, none.decibels);
  showOutputs(network);
  if (mine === turn) delete document.body.dataset.busy;
}

const FULL_BAR = 50; // dB

function showQuality(now, none) {
  fill('quality', `${short(now)} dB`);
  const said = { name: 'With your factors', says: `${short(now)} dB`, now: now / FULL_BAR, before: none / FULL_BAR };
  showBars('quality-bars', [said, { name: 'All factors 1', says: `${short(none)} dB`, now: none / FULL_BAR, before: none / FULL_BAR }]);
  fill('quality-says', `${state.model.samples.shape[0]} inputs, weights in ${state.bits.weights} bits, values in ${state.bits.activations}: ${short(now)} dB with your factors, ${
    short(none)} dB without. The full bar is ${FULL_BAR} dB.`);
}

/* All methods, with the bits and the snapping that are set. */
async function compareMethods() {
  turn += 1;
  const mine = turn, { model, bits } = state, rows = [];
  document.body.dataset.busy = 'yes';
  $('comparison').hidden = false;
  for (const [method, title] of Object.entries(METHODS)) {
    const factors = factorsOf(model, method).map(snapped);
    const found = await measured(model, rescale(model, factors), factors, bits, (k, n) => fill('quality-says', `${title}: input ${k + 1} of ${n} …`));
    if (!found) return;
    rows.push([title, `${short(found.decibels)} dB`]);
    table('comparison', `Weights in ${bits.weights} bits, values in ${bits.activations}${$('snap').checked ? ', factors are powers of two' : ''}`, ['Method', 'SQNR'], rows);
  }
  fill('quality-says', 'Five methods compared.');
  if (mine === turn) finish(rescale(model, state.factors));
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Digits
// ---------------------------------------------------------------------------------------------------------------------------------------

function showAnswer(before, grids, pixels) {
  showPixels($('preview'), pixels);
  const float = softmax(before), whole = grids && softmax(grids), percent = (p) => `${(100 * p).toFixed(1)} %`;
  const says = (p) => `${largestAt(p)} (${percent(Math.max(...p))})`;
  fill('answer', element('strong', {}, `The float network says ${says(float)}${whole ? `, the one on grids ${says(whole)}` : ''}.`));
  const cell = (p, kind) => element('td', { class: 'wide' }, element('span', {
    class: `probability ${kind}`, style: `width: ${(50 * p).toFixed(1)}%`, 'aria-hidden': 'true' }), percent(p));
  table('probabilities', 'How sure they are', ['Digit', 'Float', 'On grids'], [...float.keys()].map((d) => (
    [String(d), cell(float[d], ''), whole ? cell(whole[d], 'quantized') : '…'])));
}

/* A drawing becomes one of the inputs that can be chosen. */
function drawn() {
  const select = $('sample');
  let option = select.querySelector('[value="drawn"]');
  if (area.isEmpty()) {
    if (option) option.remove();
    if (isDrawn()) chooseInput(0);
    return;
  }
  if (!option) {
    option = element('option', { value: 'drawn' }, 'Your drawing');
    select.prepend(option);
  }
  state.drawn = area.pixels();
  chooseInput('drawn');
}

function chooseInput(input) {
  state.input = input;
  $('sample').value = input;
  showOutputs(rescale(state.model, state.factors));
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Controls
// ---------------------------------------------------------------------------------------------------------------------------------------

let area = null;
let frame = 0; // a drag asks for one drawing a frame

function dragged() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => changed(false));
}

function setUp() {
  for (const [name, { title }] of Object.entries(CODED)) {
    const radio = element('input', { type: 'radio', name: 'network', value: name, id: `network-${name}` });
    radio.addEventListener('change', () => { state.channel = 0; chooseNetwork(name); });
    $('networks-choice').append(element('div', { class: 'choice' }, radio, element('label', { for: `network-${name}` }, title)));
  }
  for (const [method, title] of Object.entries(METHODS)) {
    const button = element('button', { type: 'button', value: method }, title);
    button.addEventListener('click', () => chooseMethod(method));
    $('methods').append(button);
  }
  $('value').addEventListener('change', () => { chooseValue($('value').value); showChannel(); });
  $('channels').addEventListener('click', (event) => {
    const option = event.target.closest('.channel');
    if (option) { chooseChannel([...$('channels').children].indexOf(option)); showChannel(); }
  });
  $('channels').addEventListener('keydown', (event) => {
    const last = $('channels').children.length - 1, step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    chooseChannel(Math.min(Math.max(state.channel + step, 0), last));
    showChannel();
  });
  $('factor').addEventListener('input', () => { chooseFactor(snapped(2 ** Number($('factor').value))); dragged(); });
  $('factor').addEventListener('change', () => { cancelAnimationFrame(frame); changed(true); });
  $('snap').addEventListener('change', () => {
    state.factors = state.method ? factorsOf(state.model, state.method).map(snapped) : state.factors.map(snapped);
    changed(true);
  });
  for (const which of ['weight', 'activation']) {
    const slider = $(`${which}-bits`), says = () => { fill(`${which}-bits-says`, slider.value); state.bits[`${which}s`] = Number(slider.value); };
    slider.addEventListener('input', () => { says(); dragged(); });
    slider.addEventListener('change', () => { cancelAnimationFrame(frame); changed(true); });
    says();
  }
  $('layer').addEventListener('change', () => { state.side = Number($('layer').value); showLine(rescale(state.model, state.factors)); });
  $('sample').addEventListener('change', () => chooseInput($('sample').value === 'drawn' ? 'drawn' : Number($('sample').value)));
  $('compare').addEventListener('click', compareMethods);
  area = drawingArea($('canvas'), drawn, (text) => fill('pen-says', text));
  $('clear').addEventListener('click', () => area.clear());
  let width = 0;
  new ResizeObserver(() => {
    if ($('line').clientWidth !== width) { width = $('line').clientWidth; showLine(rescale(state.model, state.factors)); }
  }).observe($('line'));
  const first = $('networks-choice').querySelector('input');
  first.checked = true;
  chooseNetwork(first.value);
}

setUp();
