/* The page: what is chosen, what is asked of the model then, and where the answers go.
 *
 * A drag shows at once what is quick: ranges, the output of one input, the grid of one layer. What takes longer, all inputs and the whole
 * quantized network, follows when the drag ends, input by input, so that the page stays awake.
 */
'use strict';

const CODED = JSON.parse(document.getElementById('networks').textContent);
const models = {};
const state = {
  model: null, value: '', channel: 0, factors: [], method: 'none', input: 0, drawn: null, side: 0, bits: { weights: 8, activations: 8 },
};
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
function chosenInput() {
  const { model: { samples }, input, drawn: data } = state;
  return isDrawn() ? { ...sample(samples, 0), data } : sample(samples, input);
}
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
  const does = { made: 'make', read: 'read' };
  fill('layer', ...around.map(({ layer, side, channel }, n) => (
    element('option', { value: n }, `${does[side]} the channel: ${nameOf(layer)}, channel ${channelName(channel)}`))));
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
  const alike = mates.every(({ c }) => c === state.channel); // channels of one place need no number
  const own = alike ? mates.map(({ value }) => value) : mates.map(({ value, c }) => `${value}[${channelName(c)}]`);
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
  const key = Object.values(bits).join(), { quality } = model; // of factors 1, which never change: once for these bits
  if (!(key in quality)) {
    const none = await measured(model, model.network, model.chosen.none, bits, () => {});
    if (!none) return;
    quality[key] = none.decibels;
  }
  quantized = now.on;
  showQuality(now.decibels, quality[key]);
  showOutputs(network);
  if (mine === turn) delete document.body.dataset.busy;
}

/* All methods, with the bits and the snapping that are set. */
async function compareMethods() {
  turn += 1;
  const mine = turn, { model, bits } = state, rows = [];
  document.body.dataset.busy = 'yes';
  $('comparison').hidden = false;
  const caption = `Weights in ${bits.weights} bits, values in ${bits.activations}${$('snap').checked ? ', factors are powers of two' : ''}`;
  for (const [method, title] of Object.entries(METHODS)) {
    const factors = factorsOf(model, method).map(snapped);
    const found = await measured(model, rescale(model, factors), factors, bits,
      (k, n) => fill('quality-says', `${title}: input ${k + 1} of ${n} …`));
    if (!found) return;
    rows.push([title, `${short(found.decibels)} dB`]);
    table('comparison', caption, ['Method', 'SQNR'], rows);
  }
  fill('quality-says', 'Five methods compared.');
  if (mine === turn) finish(rescale(model, state.factors));
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Digits
// ---------------------------------------------------------------------------------------------------------------------------------------

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
    const last = $('channels').children.length - 1;
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity }[event.key];
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
    const slider = $(`${which}-bits`), says = () => {
      fill(`${which}-bits-says`, slider.value);
      state.bits[`${which}s`] = Number(slider.value);
    };
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
