"""What a figure shows is what the formulas give: read off its artists. And what is measured, tensor by tensor."""

import sys

import numpy as np
import pytest
from nets import NETS

import eqfact as eq
from eqfact import demo
from eqfact.report import TensorNoise, noise_report

pytest.importorskip("matplotlib")
from eqfact import plotting

W4, W8, A8 = eq.UniformQuantizer(4), eq.UniformQuantizer(8), eq.UniformQuantizer(8, symmetric=False)
BUNDLE = demo.load_bundle()
NET = eq.fold_batchnorm(BUNDLE.network)
STATS = eq.calibrate(NET, BUNDLE.calibration)
RESULT = eq.equalize(NET, data=BUNDLE.calibration, weights=W4, activations=A8)
RNG = np.random.default_rng(5)
SMALL = eq.Graph.chain((3,), fc1=eq.Dense(RNG.normal(size=(8, 3)) * np.exp2(RNG.uniform(-3, 0, size=(8, 1)))), act=eq.ReLU(),
                       fc2=eq.Dense(RNG.normal(size=(4, 8))))
X = RNG.normal(size=(40, 3))


def labels_of(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def line(axes, label):
    """The offsets of the line whose label begins so."""
    (found,) = (of for of in axes.lines if str(of.get_label()).startswith(label))
    return found.get_xydata()


def tops(bars):
    return [bar.get_y() + bar.get_height() for bar in bars]


# --- ranges

def test_ranges_are_shares_of_the_largest_weight():
    (axes,) = plotting.plot_ranges(SMALL, eq.equalize(SMALL).graph).axes
    assert labels_of(axes) == ["fc1", "fc2"]
    first = np.sort(np.abs(SMALL["fc1"].op.weight).max(axis=1))
    assert np.allclose(axes.lines[0].get_ydata(), first / first[-1])


# --- noise

def test_bars_of_noise_are_predicted_before_and_after():
    s = eq.gradient_sensitivities(SMALL, X)
    after = eq.equalize(SMALL, "two_step", data=X)
    f = after.factorization
    sides = [eq.predict_noise(graph, stats, weights=W4, activations=A8, sensitivities=of) for graph, stats, of in (
        (SMALL, eq.calibrate(SMALL, X), s), (after.graph, f.apply(eq.calibrate(SMALL, X)), s.rescaled(SMALL, f)))]
    (axes,) = plotting.plot_noise(*sides).axes
    assert labels_of(axes) == ["fc1.weight", "fc2.weight", "x", "act"]
    for bars, side, label in zip(axes.containers, sides, ("before", "after"), strict=True):
        assert np.allclose(tops(bars), [side[name] for name in labels_of(axes)])
        assert bars.get_label() == label
        total = sum(10 ** (db / 10) for db in side.values())
        assert np.allclose(line(axes, f"sum {label}")[:, 1], 10 * np.log10(total))
    lefts = [bar.get_x() for bars in axes.containers for bar in bars]
    assert len(set(lefts)) == 8  # none hides another


@pytest.mark.parametrize("options", [{"weights": W4, "activations": A8}, {"harmless": True}, {"exact": True}, {"method": "cross_layer"}, {
    "weights": eq.UniformQuantizer(4, range="mse"), "activations": eq.UniformQuantizer(8, symmetric=False, range="noise")}], ids=str)
def test_the_noise_of_a_result_adds_up_to_what_it_predicts(options):
    result = eq.equalize(SMALL, data=X, **options)
    assert list(result.noise[0]) == list(result.noise[1])
    assert [-10 * np.log10(sum(10 ** (db / 10) for db in side.values())) for side in result.noise] == pytest.approx(list(result.predicted))


def test_a_network_that_is_returned_as_it_is_has_the_noise_it_had():
    rising, kept = (eq.equalize(NET, "one_step", data=BUNDLE.calibration, harmless=harmless) for harmless in (False, True))
    assert rising.predicted[1] < rising.predicted[0] and rising.noise[1] != rising.noise[0]
    assert kept.noise == (rising.noise[0], rising.noise[0])


def test_of_many_tensors_the_noisiest_are_drawn_in_their_order():
    noise = {f"t{i}": -float(i * 7 % 50) for i in range(50)}
    figure = plotting.plot_noise(noise, most=10)
    shown = labels_of(figure.axes[0])
    assert shown == [name for name in noise if noise[name] > -10] and len(shown) == 10
    assert "10 of 50" in figure.get_suptitle()


def test_tensors_of_next_to_no_noise_stand_at_the_floor():
    (axes,) = plotting.plot_noise({"a": -20.0, "b": -np.inf, "c": -300.0}).axes
    a, b, c = tops(axes.containers[0])
    assert a == pytest.approx(-20) and b == c == pytest.approx(-20 - plotting.FLOOR_DB)


# --- predicted and measured

def test_what_is_measured_is_one_tensor_alone_on_its_grid():
    """By another way: a network in which only this weight, or only this value, is rounded."""
    s = eq.gradient_sensitivities(SMALL, X)
    stats = eq.calibrate(SMALL, X)
    rows = noise_report(SMALL, [X[:25], X[25:]], weights=W4, activations=A8, sensitivities=s, stats=stats)
    assert [(row.name, row.kind) for row in rows] == [("fc1.weight", "weight"), ("fc2.weight", "weight"), ("x", "value"), ("act", "value")]
    w1, w2 = (SMALL[name].op.weight for name in ("fc1", "fc2"))

    def rounded(a, step):
        return step * np.rint(a / step)
    hidden = np.maximum(X @ w1.T, 0)
    outputs = [np.maximum(X @ rounded(w1, np.abs(w1).max() / 7).T, 0) @ w2.T, hidden @ rounded(w2, np.abs(w2).max() / 7).T,
               np.maximum(rounded(X, np.ptp(X) / 255) @ w1.T, 0) @ w2.T, rounded(hidden, hidden.max() / 255) @ w2.T]
    truth = hidden @ w2.T
    assert [row.measured for row in rows] == pytest.approx(
        [10 * np.log10(((y - truth) ** 2).sum() / (truth**2).sum()) for y in outputs], abs=0.2)
    assert {row.name: row.predicted for row in rows} == eq.predict_noise(SMALL, stats, weights=W4, activations=A8, sensitivities=s)


@pytest.mark.parametrize("net", NETS, ids=str)
def test_any_network_is_measured(net):
    """Fan-out, residuals, shared weights, several inputs and outputs: the rows are those of the prediction, and weights measure as in
    a network that holds them, wherever they are used, as ``quantize`` makes them.
    """
    x = net.data()
    stats = eq.calibrate(net.graph, x)
    s = eq.gradient_sensitivities(net.graph, x, relative_to=stats)
    rows = noise_report(net.graph, x, weights=W8, activations=A8, sensitivities=s, stats=stats)
    assert {row.name: row.predicted for row in rows} == eq.predict_noise(net.graph, stats, weights=W8, activations=A8, sensitivities=s)
    whole, truth = eq.quantize(net.graph, weights=W8), eq.values(net.graph, x)
    for row in (row for row in rows if row.kind == "weight"):
        op = net.graph[row.name.removesuffix(".weight")].op
        y = eq.values(net.graph.with_ops({n.name: whole[n.name].op for n in net.graph if n.op is op}), x)
        shares = [10 ** (-eq.sqnr(truth[name], y[name]) / 10) for name in net.graph.outputs]
        assert row.measured == pytest.approx(10 * np.log10(np.mean(shares)))


def test_noise_is_measured_beside_an_output_of_zeros():
    rng = np.random.default_rng(0)
    weights, x = {"y": rng.normal(size=(2, 3)), "zero": np.zeros((2, 3))}, rng.normal(size=(9, 3))
    graph = eq.Graph({"x": (3,)}, [eq.Node(name, eq.Dense(w), ["x"]) for name, w in weights.items()], list(weights))
    (row,) = noise_report(graph, x, weights=W4, activations=None, sensitivities=eq.gradient_sensitivities(graph, x))
    sqnr = eq.sqnr(*(eq.forward(g, x)["y"] for g in (graph, eq.quantize(graph, weights=W4))))
    assert row.name == "y.weight" and row.measured == pytest.approx(-sqnr - 10 * np.log10(2))


def test_prediction_and_measure_agree_on_the_bundled_network():
    s = eq.gradient_sensitivities(NET, BUNDLE.calibration[:16])
    rows = noise_report(NET, BUNDLE.images[:60], weights=W4, activations=A8, sensitivities=s, stats=STATS)
    assert np.mean([abs(row.predicted - row.measured) for row in rows]) < 2


def test_points_are_predicted_across_and_measured_upwards():
    rows = [TensorNoise("a.weight", "weight", -30.0, -31.0), TensorNoise("b.weight", "weight", -20.0, -23.0),
            TensorNoise("b", "value", -50.0, -45.0), TensorNoise("c", "value", -60.0, -np.inf)]
    figure = plotting.plot_predicted(rows)
    (axes,) = figure.axes
    weights, activations = axes.collections
    assert weights.get_offsets().tolist() == [[-30, -31], [-20, -23]] and activations.get_offsets().tolist() == [[-50, -45]]
    assert not np.array_equal(weights.get_facecolor(), activations.get_facecolor())
    diagonal = line(axes, "equal")
    assert np.array_equal(diagonal[:, 0], diagonal[:, 1]) and diagonal.min() < -50 and diagonal.max() > -20
    assert "off by 3.0 dB" in figure.get_suptitle() and "1 make none" in figure.get_suptitle()
    assert axes.texts[0].get_text() == "farthest off: b, +5.0 dB"


def test_measuring_needs_an_output():
    s = eq.gradient_sensitivities(SMALL, X)
    with pytest.raises(ValueError, match="relative to the output, which is 0"):
        noise_report(SMALL, [], weights=W4, activations=None, sensitivities=s)


# --- weights on their grid

@pytest.mark.parametrize("quantizer", [W4, W8, eq.UniformQuantizer(3, symmetric=False), eq.UniformQuantizer(4, granularity="per_channel"),
                                       eq.UniformQuantizer(4, granularity="per_group", group_size=3)],
                         ids=["4 bits", "8 bits", "affine", "per channel", "per group"])
def test_weights_stand_on_multiples_of_the_scale(quantizer):
    quantized = eq.quantize(SMALL, weights=quantizer)
    figure = plotting.plot_weights(quantized)
    for axes, name in zip(figure.axes, ("fc1", "fc2"), strict=True):
        op = quantized[name].op
        bars = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in axes.patches}
        assert sum(bars.values()) == op.weight.size
        assert all(at == pytest.approx(round(at), abs=1e-9) for at in bars)
        steps = (op.weight / op.grid.scale).ravel()
        for at, count in bars.items():
            assert count == (np.abs(steps - at) < 1e-6).sum() > 0
        assert axes.get_title("left") == f"{name}, {len(bars)} of {2 ** quantizer.bits} levels"


def test_weights_before_and_after_stand_beside_each_other():
    f = RESULT.factorization
    before, after = (eq.quantize(graph, weights=W4, activations=A8, stats=stats) for graph, stats in (
        (NET, STATS), (RESULT.graph, f.apply(STATS))))
    figure = plotting.plot_weights(before, after, noise=RESULT.noise[0], most=3)
    layers = sorted((n.name for n in NET if isinstance(n.op, eq.Weighted)), key=lambda name: -RESULT.noise[0][f"{name}.weight"])[:3]
    shown = [axes.get_title("left") for axes in figure.axes]
    assert {title.partition(",")[0] for title in shown} == set(layers) and len(shown) == 6
    assert "3 of 18 layers of most expected noise" in figure.get_suptitle()
    for left, right in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        name = left.get_title("left").partition(",")[0]
        assert right.get_title("left").startswith(f"{name}, after: ") and ", before: " in left.get_title("left")
        assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
        for axes, graph in ((left, before), (right, after)):
            assert sum(bar.get_height() for bar in axes.patches) == graph[name].op.weight.size
            assert len(axes.patches) == len(np.unique(graph[name].op.weight))


def test_layers_by_name_and_shared_weights_once():
    op = eq.Dense(RNG.normal(size=(3, 3)))
    net = eq.Graph.chain((3,), a=op, r=eq.ReLU(), b=op, c=eq.Dense(RNG.normal(size=(2, 3))))
    quantized = eq.quantize(net, weights=W4)
    titles = [[axes.get_title("left").partition(",")[0] for axes in figure.axes] for figure in (
        plotting.plot_weights(quantized), plotting.plot_weights(quantized, names=["c"]))]
    assert titles == [["a", "c"], ["c"]]


# --- convergence

@pytest.mark.parametrize("method", [eq.Optimal(), eq.Optimal(objective="range"), eq.Optimal(tol=1e-3, ridge=0.0)], ids=str)
@pytest.mark.parametrize("net", [SMALL, NET], ids=["small", "bundled"])
def test_history_ends_at_the_result_and_the_certificate_stays_below(net, method):
    result = eq.equalize(net, method, data=X if net is SMALL else BUNDLE.calibration)
    steps, reached, bound = (np.array(column) for column in zip(*result.history, strict=True))
    assert steps[0] == 0 and steps[-1] == result.iterations and (np.diff(steps) >= 0).all()
    assert (np.diff(reached) <= 0).all() and (np.diff(bound) >= 0).all() and bound.max() <= reached.min()
    assert bound[0] == 0 and bound[-1] == result.bound
    assert 10 * np.log10(reached[-1] / bound[-1]) == pytest.approx(result.gap_db)
    assert 10 * np.log10(reached[1:] / bound[1:]) == pytest.approx(list(result.residual), abs=1e-6)
    (axes,) = plotting.plot_convergence(result).axes
    noise, certified = line(axes, "reached"), line(axes, "certified")
    assert np.allclose(noise, np.stack([steps, 10 * np.log10(reached / bound[-1])], axis=1))
    assert np.allclose(certified, np.stack([steps[1:], 10 * np.log10(bound[1:] / bound[-1])], axis=1))
    assert certified[:, 1].max() <= noise[:, 1].min()
    assert line(axes, "returned").tolist() == [[steps[-1], pytest.approx(result.gap_db)]]


def test_what_is_returned_is_not_always_what_was_reached():
    result = eq.equalize(SMALL, data=X, exact=True)
    (axes,) = plotting.plot_convergence(result).axes
    assert line(axes, "returned")[0, 1] == pytest.approx(result.gap_db) != pytest.approx(line(axes, "reached")[-1, 1])


def test_turns_of_clips_have_no_certificate():
    weights, activations = eq.UniformQuantizer(4, range="noise"), eq.UniformQuantizer(4, symmetric=False, range="noise")
    result = eq.equalize(SMALL, eq.Optimal(tol=1e-4), data=X, weights=weights, activations=activations)
    assert all(of.bound == 0 for of in result.history) and len(result.history) == len(result.residual) > 1
    (axes,) = plotting.plot_convergence(result).axes
    assert np.allclose(line(axes, "reached")[:, 1], result.residual)
    assert not [of for of in axes.lines if str(of.get_label()).startswith("certified")]


def test_sweeps_show_how_far_factors_moved():
    result = eq.equalize(NET)
    (axes,) = plotting.plot_convergence(result).axes
    assert axes.get_yscale() == "log"
    assert line(axes, "sweep").tolist() == [[1 + i, moved] for i, moved in enumerate(result.residual)]


# --- files and refusals

FIGURES = {
    "ranges": lambda **o: plotting.plot_ranges(SMALL, SMALL, **o),
    "noise": lambda **o: plotting.plot_noise({"a": -3.0}, **o),
    "predicted": lambda **o: plotting.plot_predicted([TensorNoise("a", "value", -3.0, -4.0)], **o),
    "weights": lambda **o: plotting.plot_weights(eq.quantize(SMALL, weights=W4), **o),
    "convergence": lambda **o: plotting.plot_convergence(RESULT, **o),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_every_figure_is_returned_written_titled_and_no_business_of_pyplots(draw, tmp_path, monkeypatch):
    figure = draw(path=str(tmp_path / "f.svg"), title="A title")
    assert "<svg" in (tmp_path / "f.svg").read_text() and "A title" in figure.get_suptitle()
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
    with pytest.raises(ValueError, match=r"'f\.xyz': a figure cannot be written as 'xyz': give a name that ends in .*\.png"):
        draw(path="f.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'eqfact\[plot\]'"):
        draw()


@pytest.mark.parametrize(("draw", "said"), [
    (lambda: plotting.plot_ranges(SMALL, NET), "same weight tensors, at least one"),
    (lambda: plotting.plot_noise({}), "same tensors before and after, at least one"),
    (lambda: plotting.plot_noise({"a": -1.0}, {"b": -1.0}), "predict both with the same quantizers"),
    (lambda: plotting.plot_noise({"a": -1.0}, most=0), "most must be at least 1, got 0"),
    (lambda: plotting.plot_predicted([]), "a tensor that makes noise"),
    (lambda: plotting.plot_weights(SMALL), "same quantized layers, at least one"),
    (lambda: plotting.plot_weights(eq.quantize(SMALL, weights=W4), SMALL), "same quantized layers, at least one, got 2 and 0"),
    (lambda: plotting.plot_weights(eq.quantize(SMALL, weights=W4), names=["act"]), "node 'act' has no weights on a grid: give some of fc1"),
    (lambda: plotting.plot_convergence(eq.equalize(SMALL, "one_step", data=X)), "one that ends at once"),
])
def test_what_cannot_be_drawn_is_refused(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
