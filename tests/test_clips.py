"""Clips: histograms against the data that they count, ends against scans of the data, noise against noise that was measured."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eqfact as eq
from eqfact import calibration, clips, histograms, noise
from eqfact.__main__ import main
from eqfact.histograms import BINS, Counting, histogram_of

RNG = np.random.default_rng(0)
HALF = 1 + 1 / (2 * BINS)  # an entry and the middle of its bin are no further apart, as a ratio
#: Entries of several channels: normal, with outliers, one-sided with many zeros, in other units, dead, tiny.
DATA = np.stack([RNG.normal(size=4000), RNG.standard_t(2, size=4000), np.maximum(RNG.normal(size=4000), 0),
                 1e4 * RNG.exponential(size=4000), np.zeros(4000), 1e-35 * RNG.normal(size=4000)])
QUANTIZERS = [eq.UniformQuantizer(bits, symmetric=symmetric, granularity=granularity)
              for bits in (3, 8) for symmetric in (True, False) for granularity in ("per_tensor", "per_channel")]
RULES = ("percentile", "mse", "entropy", "noise")
PER_CHANNEL = [quantizer for quantizer in QUANTIZERS if quantizer.granularity == "per_channel"]
any_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: f"{q.bits} {q.symmetric} {q.granularity}")
any_rule = pytest.mark.parametrize("rule", RULES)


def same(a, b):
    return a.count == b.count and all(np.array_equal(getattr(a, key), getattr(b, key)) for key in ("top", "unit", "counts"))


def statistics(entries):
    """Of a value with these entries ``(C, n)``."""
    return eq.calibrate(eq.Graph.chain((len(entries),), act=eq.Identity()), entries.T)["act"]


# ----------------------------------------------------------------------------------------------------------- histograms

@pytest.mark.parametrize("rows", [slice(None), slice(-1)], ids=["all", "none tiny"])  # one that is makes all count in float64
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_histogram_counts_entries_between_its_edges(dtype, rows):
    below_edges = np.nextafter(np.resize(1 + np.arange(BINS, dtype=dtype) / BINS, 4000), dtype(0))
    x = np.concatenate([DATA[rows].astype(dtype), [below_edges, -below_edges]])
    found = histogram_of(x)
    for c, row in enumerate(x.astype(np.float64)):
        largest = np.abs(row).max()
        octave = math.floor(math.log2(largest)) if largest else 0
        edges = [2.0**(octave - 15 + k // BINS) * (1 + k % BINS / BINS) for k in range(16 * BINS)] + [2.0**(octave + 1)]
        for sign, side in ((-1, 0), (1, 1)):
            assert np.array_equal(np.histogram(row[sign * row > 0] * sign, edges)[0][::-1], found.counts[c, side])
        assert found.zeros[c] == (np.abs(row) < edges[0]).sum()


@pytest.mark.parametrize("rows", [slice(None), slice(-1)], ids=["all", "none tiny"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float32_and_float64_are_counted_alike(dtype, rows):
    x = DATA[rows].astype(np.float32)
    assert same(histogram_of(x.astype(dtype)), histogram_of(x.astype(np.float64)))


def test_channels_too_small_for_bins_count_as_zeros():
    """Where the lowest bins would lie among the subnormal numbers, whose leading bits tell no magnitude."""
    found = histogram_of(np.array([[0.0, 1e-310, -1e-312], [2.0**-1006, 0.0, -2.0**-1010], [2.0**-990, 0.0, -2.0**-1000]]))
    assert found.zeros.tolist() == [3, 3, 1]


shards = st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.5, 2.0**-20, 3e5, -1e-6, 7.0]), min_size=1, max_size=9), min_size=1, max_size=5)


def shards_merge(parts):
    parts = [np.array(part)[None] for part in parts]
    whole = histogram_of(np.concatenate(parts, axis=1))
    for order in itertools.islice(itertools.permutations([histogram_of(part) for part in parts]), 24):
        left, right = order[0], order[-1]
        for one in order[1:]:
            left = left + one
        for one in order[-2::-1]:
            right = one + right
        assert same(left, whole)
        assert same(right, whole)
    counting = Counting()
    for part in parts * 200:  # more than wait for each other
        counting.add(part, np.abs(part).max(axis=1))
    assert same(counting.result(), histogram_of(np.concatenate(parts * 200, axis=1)))


@given(shards)
def test_shards_add_up_to_the_whole_in_any_order(parts):
    shards_merge(parts)


def test_counts_beyond_32_bits_do_not_overflow():
    one = histogram_of(np.array([[3.0]]))
    for many in (2**32 - 2, 2**32 - 1, 2**33 - 1):
        huge = histograms.Histogram(many, one.top, one.unit, one.counts.astype(np.uint64) * many)
        assert (huge + one).counts.sum(axis=2).tolist() == (one + huge).counts.sum(axis=2).tolist() == [[0, many + 1]]


@given(st.lists(st.integers(-60, 60), min_size=6, max_size=6))
def test_powers_of_two_rescale_exactly(exponents):
    f = np.exp2(exponents)
    assert same(histogram_of(DATA).rescaled(f), histogram_of(DATA * f[:, None]))
    assert same(histogram_of(DATA).rescaled(f).rescaled(1 / f), histogram_of(DATA))


def within(histogram, channel, magnitudes, ratio, lowest=0.0):
    """Are there as many magnitudes above every lower edge as the histogram says, were they off by a ratio?"""
    edges = histogram.middles[channel] - histogram.widths[channel] / 2
    counts = np.cumsum(histogram.counts[channel].sum(axis=0))
    least, most = (len(magnitudes) - np.searchsorted(np.sort(magnitudes), edges * r) for r in (ratio, 1 / ratio))
    return ((least <= counts) & (counts <= most))[edges > lowest].all()


@given(st.floats(1e-3, 1e3))
def test_other_factors_move_the_edges(factor):
    f = np.full(len(DATA), factor)
    for c, row in enumerate(np.abs(DATA * factor)):
        assert not row.any() or within(histogram_of(DATA).rescaled(f), c, row, 1 + 1e-14)


@given(st.floats(1e-3, 1e3))
def test_histograms_of_other_units_merge_within_half_a_bin(factor):
    f = np.full(len(DATA), factor)
    merged = histogram_of(DATA) + histogram_of(DATA).rescaled(f)
    for c, row in enumerate(np.abs(np.concatenate([DATA, DATA * factor], axis=1))):
        # what leaves the window is told no more
        assert not row.any() or within(merged, c, row, HALF * (1 + 1e-14), lowest=row.max() / 2.0**14)


def test_calibration_holds_the_histogram_of_its_data_whatever_the_batches():
    graph = eq.Graph.chain((3, 4, 4), act=eq.Identity())
    x = RNG.normal(size=(50, 3, 4, 4)).astype(np.float32)
    whole = eq.calibrate(graph, x)["act"].histogram
    assert same(whole, histogram_of(np.moveaxis(x, 1, 0).reshape(3, -1)))
    assert same(whole, eq.calibrate(graph, [image[None] for image in x])["act"].histogram)
    assert same(whole, (eq.calibrate(graph, x[:7]) + eq.calibrate(graph, x[7:]))["act"].histogram)
    assert eq.calibrate(graph, x, histograms=False)["act"].histogram is None


def test_batches_that_are_overwritten_are_counted_before():
    graph, buffer = eq.Graph.chain((1,), act=eq.Identity()), np.zeros((1, 1))

    def batches():
        for number in (1.0, -2.0):
            buffer[:] = number
            yield buffer
    assert eq.calibrate(graph, batches())["x"].histogram.counts.sum(axis=2).tolist() == [[1, 1]]


# ---------------------------------------------------------------------------------------------------------------- rules

def error(x, low, high, quantizer):
    """``E`` on raw data, by the law."""
    x = x[x != 0]
    if quantizer.symmetric:
        end = max(-low, high)
        low, high, levels = -end, end, quantizer.qmax
        step = end / levels
    else:
        low, high = min(low, 0), max(high, 0)
        step = (high - low) / (2**quantizer.bits - 1)
    return len(x) * step**2 / 12 + ((x - np.clip(x, low, high)) ** 2).sum()


def ranges_of(quantizer, rule, rows, weights=None):
    """The range of every grid of an activation with these entries, and the entries on each."""
    low, high = dataclasses.replace(quantizer, range=rule).value_range(statistics(rows), np.ones(len(rows)) if weights is None else weights)
    grids = [rows.ravel()] if len(low) == 1 else list(rows)
    return list(zip(grids, low.tolist(), high.tolist(), strict=True))


@any_quantizer
@any_rule
@pytest.mark.parametrize("rows", [DATA, DATA[:3]], ids=["all", "alike"])
def test_ranges_lie_within_the_extrema(quantizer, rule, rows):
    for x, low, high in ranges_of(quantizer, rule, rows):
        assert x.min() <= low <= high <= x.max()


def scan(x, quantizer):
    """The least ``E`` over many ends, and these."""
    most, least = max(x.max(), 0), max(-x.min(), 0)
    if quantizer.symmetric:
        most = max(most, least)
        ends = [(-h, h) for h in np.linspace(0, most, 800)]
    else:
        ends = [(-low, high) for low in np.linspace(0, least, 60 if least else 1) for high in np.linspace(0, most, 60 if most else 1)]
    return min((error(x, low, high, quantizer), low, high) for low, high in ends)


def mse_is_the_least(quantizer):
    for x, low, high in ranges_of(quantizer, "mse", DATA[:3]):
        found, (best, *ends) = error(x, low, high, quantizer), scan(x, quantizer)

        def moved(low, high, x=x):
            """By how much the root of ``E`` may be off: those beyond, or nearly, move by half a bin at most, |x| / 16."""
            return np.sqrt(((x[(x > high / HALF) | (x < low / HALF)] / (2 * BINS)) ** 2).sum())
        if quantizer.symmetric:
            low, high = -max(-low, high), max(-low, high)
        assert np.sqrt(found) <= np.sqrt(best) + moved(low, high) + moved(*ends)
        assert found <= 1.03 * best
        assert np.sqrt(found) <= np.sqrt(error(x, x.min(), x.max(), quantizer)) + moved(low, high)


@any_quantizer
def test_the_least_error_is_that_of_a_scan_of_the_data(quantizer):
    mse_is_the_least(quantizer)


def weights_are_exact(quantizer):
    op = eq.Conv(np.concatenate([DATA[1, :90], DATA[0, :90]]).reshape(4, 5, 3, 3))
    low, high = dataclasses.replace(quantizer, range="mse").weight_range(op)
    rows = [op.weight.ravel()] if low.size == 1 else list(op.weight.reshape(4, -1))
    for x, a, b in zip(rows, low.ravel(), high.ravel(), strict=True):
        found = error(x, a, b, quantizer)
        assert found <= scan(x, quantizer)[0] * (1 + 1e-12)
        assert found <= error(x, x.min(), x.max(), quantizer)


@any_quantizer
def test_weights_are_clipped_exactly(quantizer):
    weights_are_exact(quantizer)


@pytest.mark.parametrize("symmetric", [True, False])
@any_rule
def test_groups_and_channels_are_clipped_as_tensors_are_alone(rule, symmetric):
    weight = RNG.standard_t(2, size=(3, 5, 2, 2))
    s = RNG.exponential(size=(1, 3, 5))
    whole = eq.UniformQuantizer(4, symmetric=symmetric, range=rule, percentile=90)
    groups = dataclasses.replace(whole, granularity="per_group", group_size=2)
    low, high = groups.weight_range(eq.Conv(weight), s)
    assert low.shape == (3, 5, 1, 1)
    rows = dataclasses.replace(whole, granularity="per_channel").weight_range(eq.Conv(weight), s)
    for out in range(3):
        for columns in (slice(0, 2), slice(2, 4), slice(4, 5)):
            alone = whole.weight_range(eq.Conv(weight[out:out + 1, columns]), s[:, out:out + 1, columns])
            assert np.allclose([low[out, columns], high[out, columns]], np.reshape(alone, (2, 1, 1, 1)), rtol=1e-12)
        alone = whole.weight_range(eq.Conv(weight[out:out + 1]), s[:, out:out + 1])
        assert np.allclose([rows[0][out], rows[1][out]], np.reshape(alone, (2, 1, 1, 1)), rtol=1e-12)


@pytest.mark.parametrize("quantizer", PER_CHANNEL)
@any_rule
def test_channels_are_clipped_as_tensors_are_alone(quantizer, rule):
    alone = dataclasses.replace(quantizer, granularity="per_tensor")
    for c, (_, low, high) in enumerate(ranges_of(quantizer, rule, DATA)):
        ((_, a, b),) = ranges_of(alone, rule, DATA[c:c + 1])
        assert (low, high) == pytest.approx((a, b), rel=1e-12)


@any_quantizer
def test_percentiles_are_those_of_the_data(quantizer):
    quantizer = dataclasses.replace(quantizer, percentile=97.5)
    for x, low, high in ranges_of(quantizer, "percentile", DATA[:4]):
        if quantizer.symmetric:
            low, high = -max(-low, high), max(-low, high)
            below = above = np.quantile(np.abs(x), 0.975, method="inverted_cdf")
        else:
            below, above = -min(-np.quantile(-x, 0.975, method="inverted_cdf"), 0), np.quantile(x, 0.975, method="inverted_cdf")
            low = min(low, 0)
        assert below / HALF <= -low <= below * HALF
        assert above / HALF <= high <= above * HALF


@pytest.mark.parametrize("percentile", [50, 90, 99, 100])
def test_percentiles_of_weights_are_exact(percentile):
    w = RNG.normal(size=(1, 101))
    affine = eq.UniformQuantizer(8, symmetric=False, range="percentile", percentile=percentile).weight_range(eq.Dense(w))
    symmetric = eq.UniformQuantizer(8, range="percentile", percentile=percentile).weight_range(eq.Dense(w))
    share = percentile / 100
    assert affine[1].item() == max(np.quantile(w, share, method="inverted_cdf"), 0)
    assert affine[0].item() == min(-np.quantile(-w, share, method="inverted_cdf"), 0)
    assert max(-symmetric[0].item(), symmetric[1].item()) == np.quantile(np.abs(w), share, method="inverted_cdf")


def kullback_leibler(counts, end, levels):
    """Migacz' algorithm, number by number."""
    p = [float(n) for n in counts[:end]]
    p[-1] += float(sum(counts[end:]))
    q = [0.0] * end
    for level in range(levels):
        inside = range(level * end // levels, (level + 1) * end // levels)
        live = [i for i in inside if counts[i] > 0]
        for i in live:
            q[i] = sum(float(counts[j]) for j in live) / len(live)
    total_p, total_q = sum(p), sum(q)
    result = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            if b == 0 or total_q == 0:
                return math.inf
            result += a / total_p * math.log(a / total_p / (b / total_q))
    return result


@given(st.lists(st.integers(0, 9), min_size=12, max_size=24).filter(any), st.integers(1, 6), st.data())
def test_divergence_is_kullback_and_leiblers(counts, levels, data):
    end = data.draw(st.integers(levels, len(counts)))
    if sum(counts[:end]) == 0:
        counts[0] = 1
    assert clips.divergence(np.array(counts, float), end, levels) == pytest.approx(kullback_leibler(counts, end, levels), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=9))
def test_entries_of_bins_are_evenly_spread(bins):
    start, width, count = (np.array(column, float) for column in zip(*bins, strict=True))
    at = np.linspace(-1.0, 31.0, 65)
    below = sum(n * np.clip((at - a) / w, 0, 1) for a, w, n in zip(start, width, count, strict=True))
    assert clips._distribution(start + width / 2, width, count, at) == pytest.approx(below, abs=1e-9)


@pytest.mark.parametrize(("signs", "steps", "symmetric", "levels"), [(2, 127, True, 127), (2, 255, False, 128), (1, 127, False, 127)])
def test_the_least_divergence_is_found_among_all_ends_tried(signs, steps, symmetric, levels):
    """An affine grid over both signs has half of its numbers for the magnitudes of each."""
    x = np.append(np.random.default_rng(5).normal(size=20000), [9.0, -12.0])
    x = x if signs == 2 else np.abs(x)
    end = clips.least_divergence(clips.of_numbers(x), steps, symmetric)
    counts, edges = np.histogram(np.abs(x), clips.LINEAR_BINS, (0, np.abs(x).max()))
    tried = [*range(levels, clips.LINEAR_BINS, clips.TRIED), clips.LINEAR_BINS]
    best = min(tried, key=lambda i: (kullback_leibler(counts, i, levels), -i))
    assert end == pytest.approx(edges[best])
    assert end < 0.8 * np.abs(x).max()
    ((_, low, high),) = ranges_of(eq.UniformQuantizer(8, symmetric=symmetric), "entropy", x[None])
    assert max(-low, high) == pytest.approx(end, rel=0.3)  # by bins of log2, evenly filled: a close relative


def test_equal_sensitivities_make_noise_the_error():
    live = histogram_of(DATA[:4]).live.astype(float)  # but a few entries so small that they count as 0
    op = eq.Conv(DATA[1, :180].reshape(4, 5, 3, 3))
    for quantizer in QUANTIZERS:
        for (_, *a), (_, *b) in zip(ranges_of(quantizer, "noise", DATA[:4], live), ranges_of(quantizer, "mse", DATA[:4]), strict=True):
            assert a == pytest.approx(b, rel=1e-9)
        by_noise = dataclasses.replace(quantizer, range="noise").weight_range(op, np.full((1, 4, 5), 9.0))
        assert np.allclose(by_noise, dataclasses.replace(quantizer, range="mse").weight_range(op), rtol=1e-12)


@pytest.mark.parametrize("rule", ["mse", "percentile", "entropy"])
def test_only_the_rule_of_noise_looks_at_sensitivities(rule):
    x, options = DATA[0], {"steps": 7, "symmetric": rule == "entropy", "percentile": 99}
    silent, loud = (clips.of_numbers(x, np.full_like(x, s)) for s in (0, 1))
    extrema = x.min(), x.max()
    assert clips.clipped(silent, rule, *extrema, **options) == clips.clipped(loud, rule, *extrema, **options) != extrema
    assert clips.clipped(silent, "noise", *extrema, **options) == extrema != clips.clipped(loud, "noise", *extrema, **options)


def test_channels_that_do_not_matter_are_clipped_first():
    rows = np.stack([RNG.normal(size=2000), 8 * RNG.normal(size=2000)])
    quantizer = eq.UniformQuantizer(4)
    highs = [ranges_of(quantizer, "noise", rows, np.array(s))[0][2] for s in ([1.0, 1e-6], [1.0, 1.0])]
    assert highs[0] < 5 < highs[1]
    assert ranges_of(quantizer, "noise", rows, np.zeros(2))[0][1:] == ranges_of(quantizer, "minmax", rows)[0][1:]


# ------------------------------------------------------------------------------------------------------------- networks

def network(outliers=4.0):
    rng = np.random.default_rng(1)
    spread = np.exp(rng.normal(size=(16, 1)))
    graph = eq.Graph.chain((8,), fc1=eq.Dense(spread * rng.standard_t(3, size=(16, 8))), act=eq.ReLU(),
                           fc2=eq.Dense(rng.standard_t(3, size=(5, 16)) / spread.T))
    x = rng.normal(size=(800, 8))
    x[0] *= outliers
    return graph, x


W, A = (eq.UniformQuantizer(4, range="noise"), eq.UniformQuantizer(5, symmetric=False, range="noise"))


@pytest.mark.parametrize("rule", ["mse", "noise", "percentile"])
def test_clips_beat_extrema_where_there_are_outliers(rule):
    graph, x = network(outliers=20.0)
    stats, s = eq.calibrate(graph, x), eq.gradient_sensitivities(graph, x[1:100])
    activations = eq.UniformQuantizer(5, symmetric=False, percentile=99.5)
    plain, clipped = (eq.quantize(graph, activations=q, stats=stats, sensitivities=s)
                      for q in (activations, dataclasses.replace(activations, range=rule)))
    for some, gain in ((x, 2), (x[1:], 3)):
        y = eq.forward(graph, some)
        assert eq.sqnr(y, eq.forward(clipped, some)) > eq.sqnr(y, eq.forward(plain, some)) + gain


def noise_is_measured(rule):
    """One layer: what is predicted of its input's rounding and saturation is what is found."""
    rng = np.random.default_rng(2)
    x = rng.standard_t(2.5, size=(20000, 3)) * [1.0, 2.0, 0.5]
    graph = eq.Graph.chain((3,), fc=eq.Dense(rng.normal(size=(4, 3))))
    s, stats = eq.gradient_sensitivities(graph, x[:4], projections=300), eq.calibrate(graph, x)
    quantizer = eq.UniformQuantizer(5, symmetric=False, range=rule, percentile=99.5)
    found = eq.forward(graph, x) - eq.forward(eq.quantize(graph, activations=quantizer, stats=stats, sensitivities=s), x)
    predicted = eq.noise_model(graph, stats, weights=None, activations=quantizer, sensitivities=s)
    saturating = predicted.saturation / sum(predicted.terms().values())
    assert saturating > 0.1
    assert sum(predicted.terms().values()) == pytest.approx((found**2).sum(axis=1).mean(), rel=0.3)


@pytest.mark.parametrize("rule", ["mse", "noise", "percentile"])
def test_predicted_noise_counts_saturation(rule):
    noise_is_measured(rule)


def test_the_model_after_a_factorization_is_that_of_the_equivalent_network():
    graph, x = network()
    stats, s = eq.calibrate(graph, x), eq.gradient_sensitivities(graph, x[:50])
    f = eq.Factorization.of(graph, {"act": np.exp(np.random.default_rng(3).normal(size=16))})
    for weights, activations in ((W, A), (dataclasses.replace(W, symmetric=False, granularity="per_channel"),
                                          dataclasses.replace(A, symmetric=True, granularity="per_channel"))):
        def modelled(graph, stats, s, at=None, weights=weights, activations=activations):
            return eq.noise_model(graph, stats, weights=weights, activations=activations, sensitivities=s, at=at)
        there = modelled(graph, stats, s, f).terms(f)
        apart = modelled(f.apply(graph), f.apply(stats), s.rescaled(graph, f)).terms()
        assert there == pytest.approx(apart, rel=1e-9)
        # clips that stay with their channels can be no better than new ones
        assert sum(there.values()) <= sum(modelled(graph, stats, s).terms(f).values())


def turns_go_down():
    graph, x = network()
    stats, s = eq.calibrate(graph, x), eq.gradient_sensitivities(graph, x[:50])

    def expected(f, weights, activations):
        model = eq.noise_model(graph, stats, weights=weights, activations=activations, sensitivities=s, at=f)
        return sum(model.terms(f).values())
    result = eq.equalize(graph, eq.Optimal(s, stats, tol=1e-3), stats=stats, weights=W, activations=A)
    plain = {"weights": dataclasses.replace(W, range="minmax"), "activations": dataclasses.replace(A, range="minmax")}
    factors = eq.equalize(graph, eq.Optimal(s, stats, tol=1e-3), stats=stats, **plain).factorization
    identity = eq.Factorization.identity(graph)
    both, alone, of_clips, none = (expected(result.factorization, W, A), expected(factors, **plain), expected(identity, W, A),
                                   expected(identity, **plain))
    assert both < min(alone, of_clips) < max(alone, of_clips) < none
    assert expected(factors, W, A) > both
    assert len(result.residual) > 1
    assert list(result.residual) == sorted(result.residual, reverse=True)
    assert min(result.residual) == 0
    assert result.success
    assert "of factors alone" in result.message
    assert f"{10 * np.log10(s.signal / both):.1f} dB is expected" in result.message
    assert result.predicted == pytest.approx((10 * np.log10(s.signal / of_clips), 10 * np.log10(s.signal / both)))
    assert 0 <= result.gap_db <= 1


def test_factors_and_clips_in_turn_only_gain():
    turns_go_down()


def test_ranges_that_are_given_need_no_rule():
    graph, x = network()
    q = eq.quantize(graph, weights=eq.UniformQuantizer(4, range="noise"), ranges={"fc1.weight": (-1, 1), "fc2.weight": (-1, 1)})
    assert q["fc1"].op.grid.scale.item() == pytest.approx(1 / 7)
    hand = eq.Statistics({name: dataclasses.replace(of, histogram=None) for name, of in eq.calibrate(graph, x).items()})
    eq.quantize(graph, activations=eq.UniformQuantizer(8, symmetric=False), stats=hand)
    eq.quantize(graph, activations=A, ranges={"x": (-1, 1), "act": (0, 1)}, stats=hand)


# ------------------------------------------------------------------------------------------------------------- refusals

def test_bad_input_is_refused():
    graph, x = network()
    stats, s = eq.calibrate(graph, x), eq.gradient_sensitivities(graph, x[:2])
    with pytest.raises(ValueError, match=r"range must be one of \('minmax', .*, got 'max'"):
        eq.UniformQuantizer(range="max")
    for percentile in (49, 101, math.nan):
        with pytest.raises(ValueError, match="percentile must be a number from 50 to 100, got"):
            eq.UniformQuantizer(range="percentile", percentile=percentile)
    with pytest.raises(ValueError, match=r"'fc1\.weight': range 'noise' needs sensitivities of these weights: give sensitivities="):
        eq.quantize(graph, weights=W)
    with pytest.raises(ValueError, match="'x': range 'noise' needs sensitivities of this value: give sensitivities="):
        eq.quantize(graph, activations=A, stats=stats)
    hand = eq.Statistics({name: dataclasses.replace(of, histogram=None) for name, of in stats.items()})
    with pytest.raises(ValueError, match=r"'x': range 'noise' needs a histogram, .*: give those of calibrate\(graph, batches\), or "):
        eq.quantize(graph, activations=A, stats=hand, sensitivities=s)
    assert (hand + stats)["x"].histogram is None


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graph, x = network(outliers=20.0)
    eq.save("net.npz", graph)
    np.savez("images.npz", x)


@pytest.mark.parametrize("command", ["quantize net.npz -o q.npz", "equalize net.npz -o e.npz", "report net.npz"])
def test_the_command_line_clips(files, capsys, command):
    facts = []
    for rule in ("minmax", "percentile", "mse", "entropy", "noise"):
        line = f"{command} --data images.npz --json --weight-bits 4 --activation-bits 5 --activation-range {rule} --weight-range {rule}"
        assert main([*line.split(), *(["--percentile", "99"] if rule == "percentile" else [])]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    assert facts[0]["quantizer"] == "W4A5"
    assert facts[2]["quantizer"] == "W4A5, weights mse, activations mse"
    found = {json.dumps(of.get("sqnr") or of.get("after") or of["tensors"]) for of in facts}
    assert len(found) == 5


@pytest.mark.parametrize(("line", "message"), [
    ("report net.npz --weight-range noise", "come from images: give --data"),
    ("report net.npz --percentile 99", "--percentile goes with --weight-range percentile"),
])
def test_the_command_line_refuses(files, capsys, line, message):
    with pytest.raises(SystemExit):
        main(line.split())
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- planted mistakes

def test_windows_that_do_not_move_are_caught(caught):
    caught(lambda: shards_merge([[1.0], [7.0, 1e-6], [3e5]]), histograms.Histogram, "_lowered", lambda self, top: self.counts)


def test_saturation_that_is_forgotten_is_caught(caught):
    right = noise._capped
    caught(lambda: noise_is_measured("mse"), noise, "_capped", lambda *a: dataclasses.replace(right(*a), saturation=0.0))


def test_steps_of_the_wrong_half_are_caught(caught):
    right = clips.least_error
    for law in (mse_is_the_least, weights_are_exact):
        caught(lambda law=law: law(QUANTIZERS[0]), clips, "least_error", lambda e, w, steps, symmetric: right(e, w, 2 * steps, symmetric))


def test_middles_beyond_the_extrema_are_caught(caught):
    def law():
        """All of a clipped activation's mass may be at its largest value: nothing is beyond it."""
        ((_, _, high),) = ranges_of(eq.UniformQuantizer(8, symmetric=False), "mse", np.array([[0.5, *[6.0] * 99]]))
        model = eq.noise_model(eq.Graph.chain((1,), fc=eq.Dense(np.ones((1, 1)))), eq.Statistics({"x": statistics(
            np.array([[0.5, *[6.0] * 99]])), "fc": None}), weights=None, activations=eq.UniformQuantizer(8, symmetric=False, range="mse"),
            sensitivities=eq.Sensitivities({}, {"x": np.ones(1)}, 1.0))
        assert 5.99 <= high <= 6
        assert model.saturation < 1e-6
    caught(law, histograms.Histogram, "values", lambda self, low, high: np.stack([-self.middles, self.middles], axis=1))


def test_sensitivities_that_stay_are_caught(caught):
    caught(test_the_model_after_a_factorization_is_that_of_the_equivalent_network, eq.Sensitivities, "rescaled",
           lambda self, graph, f: self)


def test_entries_that_wait_and_are_lost_are_caught(caught):
    caught(test_calibration_holds_the_histogram_of_its_data_whatever_the_batches, calibration.Counting, "add",
           lambda self, entries, largest: self._count(histogram_of(entries[:, :1], largest)))
