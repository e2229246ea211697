/* What is shown of the state: each function fills one part of the page. What is chosen, and when, is in page.js. */
'use strict';

const EXACT = 'A factor that is a power of two changes the exponent of a floating-point number and no other bit. So nothing is rounded.';
const ROUNDED = 'Factors that are no powers of two round a little, as every multiplication does in floating point. In exact numbers '
  + 'nothing would change.';
const FULL_BAR = 50; // dB

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
  const { model, factors, value } = state, ones = model.chosen.none, list = model.numbers[value];
  const now = weightRanges(model, factors), before = weightRanges(model, ones);
  const most = { made: {}, read: {} }; // by number, the largest share of a tensor's range
  for (const side of ['made', 'read']) {
    for (const of of now) of.layer[side].forEach((n, c) => { most[side][n] = Math.max(most[side][n] || 0, share(of[side][c], of.whole)); });
  }
  [...$('channels').children].forEach((option, c) => {
    const n = list[c], [made, read] = n === 0 ? [0, 0] : [most.made[n] || 0, most.read[n] || 0];
    option.children[0].style.height = `${100 * made}%`;
    option.children[1].style.height = `${100 * read}%`;
    const says = `times ${timesWords(factors[n])}, made with ${short(100 * made)} %, read with ${short(100 * read)} % of the range`;
    option.setAttribute('aria-label', `Channel ${channelName(c)}, ${n === 0 ? 'pinned' : says}`);
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
  const before = isDrawn() ? outputsOf(model, model.network, x).data : sample(model.truth, state.input).data,
    after = outputsOf(model, network, x).data;
  const found = compare(before, after), grids = quantized && runOnGrids(model, quantized, x).output.data;
  const cell = (v) => element('td', {}, full(v), element('code', {}, hexadecimal(v)));
  const rows = model.coded.outputs.map((name, k) => [name, cell(before[k]), cell(after[k]), grids ? short(grids[k]) : '…']);
  table('outputs', 'Outputs for this input', ['Output', 'Original', 'With factors', 'On grids'], rows);
  showVerdict({ ...found, inputs: 1 });
  const exact = factors.every((f) => powerOfTwo(f) === f);
  fill('verdict-why', exact ? EXACT : ROUNDED);
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
  const { scale, q } = layerOnGrid(op, valueGrid(model, source, state.factors, bits.activations), bits.weights),
    { qmin, qmax } = eqfact.bounds({ bits: bits.weights });
  const weights = weightsOf({ op }, side, channel).map((of) => ({ ...of, q: q[of.k], becomes: scale * q[of.k] }));
  const root = (f) => Math.sqrt(weights.reduce((sum, of) => sum + f(of) ** 2, 0) / weights.length);
  const error = root(({ w, becomes }) => w - becomes), size = root(({ w }) => w);
  const most = largestOf(weights.map(({ w }) => w)), reach = scale * -qmin;
  const lines = [numberLine(weights, { scale, qmin, qmax }, reach, width,
    `${plural(weights.length, 'weight')} on the grid of “${name}”, from ${short(-reach)} to ${short(reach)}`)];
  if (most > 0 && most < reach / 8) { // too small to be told apart: once more, larger
    const times = 2 ** Math.floor(Math.log2(reach / Math.max(most, scale * 2)));
    if (times > 1) {
      lines.push(element('p', { class: 'note' }, `The same, ${times} times as large:`));
      lines.push(numberLine(weights, { scale, qmin, qmax }, reach / times, width, `The same weights, ${times} times as large`));
    }
  }
  fill('line', ...lines);
  const off = weights.length === 1 ? `This weight is off by ${short(error)}` : (
    `These ${weights.length} weights are off by ${short(error)} (root mean square)`);
  fill('line-says', `The grid of “${name}” has steps of ${short(scale)}. ${off}: ${
    size > 0 ? `${short(100 * error / size)} % of their size` : 'all are 0'}.`);
  const worst = largestOf(weights.map(({ w, becomes }) => becomes - w)) / (most || 1);
  fill('errors', errorBars(weights, most || 1, width,
    `Errors of ${plural(weights.length, 'weight')}, the largest ${short(100 * worst)} %`));
  table('weights', `Weights of “${name}”`, ['To, from, tap', 'Weight', 'Whole number', 'Becomes', 'Error'],
    weights.map(({ o, i, tap, w, q: n, becomes }) => (
    [`${channelName(o)}, ${channelName(i)}, ${channelName(tap)}`, short(w), short(n), short(becomes), short(becomes - w)])));
}

function showQuality(now, none) {
  fill('quality', `${short(now)} dB`);
  const said = { name: 'With your factors', says: `${short(now)} dB`, now: now / FULL_BAR, before: none / FULL_BAR };
  showBars('quality-bars', [said, { name: 'All factors 1', says: `${short(none)} dB`, now: none / FULL_BAR, before: none / FULL_BAR }]);
  const { model: { samples, coded }, bits: { weights, activations }, method } = state;
  fill('quality-says', `${samples.shape[0]} inputs, weights in ${weights} bits, values in ${activations}: ${short(now)} dB with your `
    + `factors, ${short(none)} dB without. The full bar is ${FULL_BAR} dB.`
    + (method === 'optimal' ? ` When this page was made, eqfact said: “${coded.optimalSays}”` : ''));
}

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
