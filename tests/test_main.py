"""The command line: every subcommand from its arguments to its files, its text, its JSON, its exit status and its refusals."""

import ast
import dataclasses
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import eqfact as eq
from eqfact import asked, commands, demo, figures, files, methods, plotting, serialization
from eqfact.__main__ import COMMANDS, main, table

RNG = np.random.default_rng(11)


def conv(out: int, inner: int, kernel: int, **options) -> eq.Conv:
    """A convolution whose output channels differ in range."""
    weight = RNG.normal(size=(out, inner, kernel, kernel)) * np.exp2(RNG.uniform(-4, 0, size=(out, 1, 1, 1)))
    return eq.Conv(weight.astype(np.float32), **options)


def batchnorm(channels: int) -> eq.BatchNorm:
    return eq.BatchNorm(*(RNG.uniform(0.5, 2, size=channels).astype(np.float32) for _ in range(4)))


def dense(out: int, inner: int) -> eq.Dense:
    return eq.Dense(RNG.normal(size=(out, inner)).astype(np.float32), RNG.normal(size=out).astype(np.float32))


NET = eq.Graph.chain((2, 6, 6), conv1=conv(8, 2, 3), bn1=batchnorm(8), act1=eq.ReLU6(), dw=conv(8, 1, 3, groups=8, padding=1),
                     act2=eq.ReLU(), pool=eq.GlobalAvgPool(), flat=eq.Flatten(), fc=dense(3, 8))
UNFOLDED, FREE = 24, 16  # degrees of freedom: channels of conv1 (until bn1 is folded into it), act1 and act2
IMAGES = RNG.normal(size=(12, 2, 6, 6)).astype(np.float32)
TWO_INPUTS = eq.Graph({"a": (2,), "b": (3,)}, [
    eq.Node("fa", dense(4, 2), ["a"]), eq.Node("fb", dense(4, 3), ["b"]), eq.Node("sum", eq.Add(), ["fa", "fb"]),
    eq.Node("act", eq.ReLU(), ["sum"]), eq.Node("out", dense(2, 4), ["act"])], ["out"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network and images, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    serialization.save("net.npz", NET)
    np.savez("images.npz", IMAGES)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Run a command line; gives exit status and stdout, of which there is none when there is something on stderr."""
    def run(line: str) -> tuple[int, str]:
        status = main(line.split())
        out, err = capsys.readouterr()
        if status == 3:
            assert out == "" and err.count("\n") == 1 and err.startswith("eqfact: error: "), (out, err)
            return status, err
        assert err == ""
        return status, out
    return run


def facts_of(run, line: str) -> dict:
    """The facts of a command line, from its JSON."""
    status, out = run(f"{line} --json")
    facts = json.loads(out, parse_constant=pytest.fail)
    assert out.count("\n") == 1
    assert status == (0 if facts["ok"] else 1)
    return facts


# --- what each command does --------------------------------------------------------------------------------------------

def test_inspect_counts_and_explains(run):
    facts = facts_of(run, "inspect net.npz")
    assert facts["degrees_of_freedom"] == UNFOLDED
    assert facts["parameters"] == 8 * 2 * 9 + 2 * 8 + 8 * 9 + (3 * 8 + 3)  # conv1, bn1, dw, fc
    assert facts["layers"] == {"Conv": 2, "BatchNorm": 1, "Clip": 1, "ReLU": 1, "GlobalAvgPool": 1, "Flatten": 1, "Dense": 1}
    assert facts["inputs"] == {"x": [2, 6, 6]} and facts["outputs"] == {"fc": [3]}
    assert facts["foldable"] == ["bn1"] and facts["unfoldable"] == {}
    assert [v["name"] for v in facts["values"]] == list(NET.shapes)
    assert {v["name"]: v["pinned"] for v in facts["values"] if v["pinned"]} == {"x": "network input 'x'", "fc": "network output 'fc'"}
    text = run("inspect net.npz")[1]
    assert "24 degrees of freedom" in text and "1 BatchNorm can be folded" in text and "network output 'fc'" in text


def test_fold_writes_the_folded_network(run):
    facts = facts_of(run, "fold net.npz -o folded.npz")
    assert facts["ok"] and facts["folded"] == 1 and facts["foldable"] == []
    folded = serialization.load("folded.npz")
    assert [n.name for n in folded] == [n.name for n in eq.fold_batchnorm(NET)]
    assert eq.verify(NET, folded, IMAGES)
    assert run("fold net.npz -o folded.npz --data images.npz")[1].startswith("1 BatchNorm folded\nequal: ")


def test_fold_says_what_stays_and_why(run):
    serialization.save("stays.npz", eq.Graph.chain((3,), bn=batchnorm(3)))
    assert "not folded: 'bn', 'x' before it is a network input" in run("fold stays.npz -o folded.npz")[1]


@pytest.mark.parametrize("method", methods.METHODS)
def test_equalize_writes_what_the_library_returns(run, method):
    facts = facts_of(run, f"equalize net.npz -o eq.npz --fold --method {method} --data images.npz")
    folded = eq.fold_batchnorm(NET)
    stats = eq.calibrate(folded, IMAGES)
    grids = {"weights": eq.UniformQuantizer(bits=8), "activations": eq.UniformQuantizer(bits=8, symmetric=False)}
    chosen = eq.Optimal(ranges=eq.likely_ranges(folded, stats, eq.batchnorm_gaussians(NET))) if method == "optimal" else method
    result = eq.equalize(folded, chosen, stats=stats, data=IMAGES, **grids)
    written = serialization.load("eq.npz")
    for node in result.graph:
        if isinstance(node.op, eq.Weighted):
            assert np.array_equal(written[node.name].op.weight, node.op.weight)
    assert facts["ok"] and facts["verification"]["equal"] and facts["message"] == result.message
    assert facts["degrees_of_freedom"] == FREE and facts["pinned"] == result.pinned
    assert facts["predicted_sqnr"] == pytest.approx(list(result.predicted)) and facts["gap_db"] == pytest.approx(result.gap_db)
    for side, graph, of in (("before", folded, stats), ("after", result.graph, result.factorization.apply(stats))):
        kernels = [np.abs(n.op.weight).reshape(len(n.op.weight), -1).max(axis=1) for n in graph if isinstance(n.op, eq.Weighted)]
        assert facts[side]["weight_ratio"] == pytest.approx(max(k.max() / k.min() for k in kernels))
        expected = eq.sqnr(eq.forward(folded, IMAGES), eq.forward(eq.quantize(graph, stats=of, **grids), IMAGES))
        assert facts[side]["sqnr"] == {"fc": pytest.approx(expected, abs=1e-3)}


def test_equalize_tells_all_in_text(run):
    status, text = run("equalize net.npz -o eq.npz --data images.npz")
    assert status == 0
    for said in ("optimal: ", "16 degrees of freedom", "largest range ratio of weight channels: ", "of value channels",
                 "W8A8 SQNR of 'fc': ", "pinned: 'x', network input 'x'", "1 BatchNorm folded",
                 "\nequal: ", "(on the first 4 of 12 images of images.npz)", "written to eq.npz"):
        assert said in text
    kept = run("equalize net.npz -o eq.npz --no-fold")[1]
    for said in ("cross_layer: ", "24 degrees of freedom", "1 BatchNorm can be folded: eqfact fold, or --fold",
                 "(on 4 inputs of random numbers (seed 0))"):
        assert said in kept


def test_nothing_else_said_is_optimal_with_data_and_cross_layer_without(run):
    assert facts_of(run, "equalize net.npz -o eq.npz --data images.npz")["method"] == "optimal"
    assert facts_of(run, "equalize net.npz -o eq.npz")["method"] == "cross_layer"


def test_a_result_that_is_expected_to_be_worse_is_warned_of(run):
    serialization.save("balanced.npz", eq.equalize(eq.fold_batchnorm(NET), data=IMAGES).graph)
    status, text = run("equalize balanced.npz -o eq.npz --data images.npz --method one_step --max-factor 4")
    assert status == 0 and text.startswith("WARNING: ") and "--method optimal" in text and "--harmless" in text
    assert "the expected noise rises, from an SQNR of " in text
    assert "WARNING" not in run("equalize balanced.npz -o eq.npz --data images.npz --method one_step --max-factor 4 --harmless")[1]


def test_equalize_exact_keeps_every_bit(run):
    assert facts_of(run, "equalize net.npz -o eq.npz --exact")["ok"]
    assert np.array_equal(eq.forward(serialization.load("eq.npz"), IMAGES), eq.forward(NET, IMAGES))


def test_factors_written_can_be_applied(run):
    facts_of(run, "equalize net.npz -o eq.npz --factors factors.npz --exclude act2")
    with np.load("factors.npz") as factors:
        assert set(factors) == set(eq.fold_batchnorm(NET).shapes)
        assert np.array_equal(factors["act2"], np.ones(8)) and not np.array_equal(factors["act1"], np.ones(8))
    facts = facts_of(run, "equalize net.npz -o again.npz --apply factors.npz")
    assert facts["method"] == "apply" and facts["success"] and "factors of 'factors.npz'" in facts["message"]
    assert Path("eq.npz").read_bytes() == Path("again.npz").read_bytes()


def test_options_reach_the_library(run):
    line = "equalize net.npz -o eq.npz --factors factors.npz"
    assert "not among the values" in facts_of(run, f"{line} --include act1 bn1")["pinned"]["act2"]
    assert "excluded by the caller ('act1')" in facts_of(run, f"{line} --exclude act1")["pinned"]["act1"]
    facts_of(run, f"{line} --max-factor 1.5")
    with np.load("factors.npz") as factors:
        assert max(f.max() for f in factors.values()) <= 1.5
    assert facts_of(run, f"{line} --tol 10")["iterations"] == 1


def test_equalize_not_converged_is_a_negative_verdict(run):
    status, text = run("equalize net.npz -o eq.npz --max-iter 1 --tol 0")
    assert status == 1 and "not converged after 1 sweep" in text
    assert eq.verify(NET, serialization.load("eq.npz"), IMAGES)  # the function is kept all the same


def test_equalize_never_writes_another_function(run, folder, monkeypatch):
    fc = NET["fc"].op
    broken = NET.with_ops({"fc": eq.Dense(1.01 * fc.weight, fc.bias)})
    right = eq.equalize(NET)
    monkeypatch.setattr(commands, "equalize", lambda *_, **__: eq.EqualizeResult(
        broken, right.factorization, True, "wrong", 1, (0.0,), right.pinned))
    before = set(folder.iterdir())
    status, text = run("equalize net.npz -o eq.npz --factors f.npz --report r.json")
    assert status == 1 and "NOT written" in text and "not equal: they part at 'fc'" in text
    assert facts_of(run, "equalize net.npz -o eq.npz")["output"] is None
    assert set(folder.iterdir()) == before


def test_report_file_holds_the_facts_and_every_tensor(run):
    facts = facts_of(run, "equalize net.npz -o eq.npz --fold --data images.npz --report report.json")
    written = json.loads(Path("report.json").read_text())
    tensors = written.pop("tensors")
    assert written == {**facts, "output": "eq.npz"}
    for side in ("before", "after"):
        assert [t["name"] for t in tensors[side] if t["kind"] == "weight"] == ["bn1", "dw", "fc"]
        assert max(t["range_ratio"] for t in tensors[side] if t["kind"] == "weight") == pytest.approx(facts[side]["weight_ratio"])
    assert facts_of(run, "quantize net.npz -o q.npz --data images.npz --report report.json")["sqnr"]
    assert {t["kind"] for t in json.loads(Path("report.json").read_text())["tensors"]} == {"weight", "value"}


def test_quantize_writes_what_the_library_returns(run):
    facts = facts_of(run, "quantize net.npz -o q.npz --fold --data images.npz --weight-bits 5 --weight-granularity per_channel "
                          "--symmetric-activations")
    folded = eq.fold_batchnorm(NET)
    expected = eq.quantize(folded, stats=eq.calibrate(folded, IMAGES), weights=eq.UniformQuantizer(bits=5, granularity="per_channel"),
                           activations=eq.UniformQuantizer(bits=8, symmetric=True))
    output = eq.forward(serialization.load("q.npz"), IMAGES)
    assert np.array_equal(output, eq.forward(expected, IMAGES))
    assert facts["quantizer"] == "W5A8, weights per_channel"
    assert facts["sqnr"]["fc"] == pytest.approx(eq.sqnr(eq.forward(NET, IMAGES), output), abs=1e-3)
    assert re.search(r"W8A8 SQNR of 'fc': [\d.]+ dB, on 12 images of images.npz", run("quantize net.npz -o q.npz --data images.npz")[1])


def test_quantize_weights_alone_needs_no_images(run):
    line = "quantize net.npz -o q.npz --activation-bits float --weight-granularity per_group --group-size 2 --affine-weights"
    assert facts_of(run, line)["quantizer"] == "W8A32, weights per_group"
    assert facts_of(run, "quantize net.npz -o q.npz --activation-bits float --weight-bits float")["sqnr"] == {"fc": "inf"}


def test_train_writes_what_the_library_returns(run):
    facts = facts_of(run, "train net.npz -o q.npz --fold --data images.npz --weight-bits 4 --parameters weights --ranges --steps 6 "
                          "--batch-size 5 --seed 3 --learning-rate 0.05 --schedule constant --report report.json")
    folded = eq.fold_batchnorm(NET)
    stats, bits = eq.calibrate(folded, IMAGES), {"weights": eq.UniformQuantizer(4), "activations": eq.UniformQuantizer(8, symmetric=False)}
    expected = eq.train(folded, eq.shuffled(IMAGES, size=5, seed=3), stats=stats, **bits, parameters="weights", ranges=True, steps=6,
                        learning_rate=0.05, schedule="constant")
    before, after, truth = (eq.forward(g, IMAGES) for g in (eq.quantize(folded, stats=stats, **bits), expected.graph, folded))
    assert np.array_equal(eq.forward(serialization.load("q.npz"), IMAGES), after)
    assert facts["quantizer"] == "W4A8" and facts["loss"] == "squared_error" and facts["steps"] == 6
    for side, made in (("before", before), ("after", after)):
        assert facts[side]["sqnr"]["fc"] == pytest.approx(eq.sqnr(truth, made), abs=1e-3)
        assert facts[side]["loss"] == pytest.approx(((made - truth) ** 2).sum() / (truth**2).sum(), rel=1e-4)
    assert facts["ok"] == (facts["after"]["loss"] <= facts["before"]["loss"])
    assert json.loads(Path("report.json").read_text())["losses"] == pytest.approx(expected.losses.tolist())


def test_train_with_labels_counts_them(run):
    labels = RNG.integers(0, 3, size=12)
    np.savez("images.npz", images=IMAGES, labels=labels)
    line = "train net.npz -o q.npz --data images.npz --labels images.npz --steps 30"
    facts = facts_of(run, line)
    assert facts["loss"] == "cross_entropy" and facts["after"]["loss"] < facts["before"]["loss"]
    assert facts["after"]["top1"] == pytest.approx((eq.forward(serialization.load("q.npz"), IMAGES).argmax(axis=1) == labels).mean())
    text = run(line)[1]
    assert text.startswith("biases trained for 30 steps towards labels, on 12 images of images.npz\nloss: ")
    assert "top-1: " in text and "W8A8 SQNR of 'fc': " in text and "written to q.npz" in text


def test_a_training_that_was_stopped_goes_on_to_the_same_file(run):
    line = "train net.npz --data images.npz --steps 6 --parameters weights --batch-size 5"
    run(f"{line} -o whole.npz --state whole.state.npz")
    assert facts_of(run, f"{line} -o part.npz --stop 2 --state state.npz")["steps"] == 2
    run(f"{line} -o resumed.npz --resume state.npz --state resumed.state.npz")
    assert Path("whole.npz").read_bytes() == Path("resumed.npz").read_bytes() != Path("part.npz").read_bytes()
    with np.load("whole.state.npz") as whole, np.load("resumed.state.npz") as resumed:
        assert set(whole) == set(resumed) and all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_a_training_that_makes_it_worse_is_a_negative_verdict(run):
    status, text = run("train net.npz -o q.npz --data images.npz --steps 2 --learning-rate 300")
    assert status == 1 and "NOT better than before: give more steps, or a lower --learning-rate" in text and Path("q.npz").exists()


def test_train_runs_onnx_files_in_onnxruntime(run):
    pytest.importorskip("onnxruntime")
    run("fold net.npz -o net.onnx")
    facts = facts_of(run, "train net.onnx -o q.onnx --data images.npz --steps 5 --weight-bits 7")
    assert facts["run"]["difference"]["fc"] < 1e-5 and facts["run"]["sqnr"]["fc"] > 20


def test_verify_answers_with_its_exit_status(run):
    run("equalize net.npz -o eq.npz")
    assert run("verify net.npz eq.npz")[0] == 0
    facts = facts_of(run, "verify net.npz eq.npz --data images.npz")
    assert facts["verification"]["equal"] and facts["verification"]["data"] == "12 images of images.npz"
    run("quantize net.npz -o q.npz --data images.npz --weight-bits 4")
    status, text = run("verify net.npz q.npz --data images.npz")
    assert status == 1 and text.startswith("not equal: they part at 'bn1'")
    assert facts_of(run, "verify net.npz q.npz --data images.npz")["ok"] is False


def test_report_rows_against_their_definitions(run):
    run("fold net.npz -o folded.npz")
    folded = serialization.load("folded.npz")
    facts = facts_of(run, "report folded.npz --data images.npz --weight-bits 6")
    stats = eq.calibrate(folded, IMAGES)
    weights = eq.UniformQuantizer(bits=6)
    quantized = eq.quantize(folded, stats=stats, weights=weights, activations=eq.UniformQuantizer(symmetric=False))
    floats, noisy = eq.values(folded, IMAGES), eq.values(quantized, IMAGES)
    rows = {(t["kind"], t["name"]): t for t in facts["tensors"]}
    assert list(rows) == [*(("weight", n) for n in ("bn1", "dw", "fc")), *(("value", n) for n in ("x", "act1", "act2", "pool", "fc"))]
    for (kind, name), row in rows.items():
        op = folded[name].op if kind == "weight" else None
        ranges = np.abs(op.weight).reshape(len(op.weight), -1).max(axis=1) if op else stats[name].max_abs
        test = eq.quantize(folded, weights=weights)[name].op.weight if op else noisy["x.quantized" if name == "x" else name]
        assert row["channels"] == len(ranges) and row["dead"] == 0
        assert row["range_ratio"] == pytest.approx(ranges.max() / ranges.min())
        assert row["weakest_bits"] == pytest.approx((6 if op else 8) - math.log2(ranges.max() / ranges.min()))
        assert row["sqnr"] == pytest.approx(eq.sqnr(op.weight if op else floats[name], test), abs=1e-6)
        assert row["pinned"] == {("value", "x"): "network input 'x'", ("value", "fc"): "network output 'fc'"}.get((kind, name))
    text = run("report folded.npz --data images.npz")[1]
    assert "weakest bits" in text and "network output 'fc'" in text


def test_report_without_images_is_about_weights(run):
    facts = facts_of(run, "report net.npz")
    assert {t["kind"] for t in facts["tensors"]} == {"weight"} and facts["data"] is None and facts["foldable"] == ["bn1"]
    assert "weights only" in run("report net.npz")[1]


def test_dead_channels_are_counted_and_do_not_blow_up_ratios(run):
    weight = np.float32([[4, 1], [0, 0], [2, 2], [-0.5, 0]])
    serialization.save("dead.npz", eq.Graph.chain((2,), fc1=eq.Dense(weight), act=eq.ReLU(), fc2=dense(2, 4)))
    row = facts_of(run, "report dead.npz")["tensors"][0]
    assert (row["dead"], row["range_ratio"], row["weakest_bits"]) == (1, 8.0, 5.0)
    serialization.save("dead.npz", eq.Graph.chain((2,), fc1=eq.Dense(0 * weight)))
    row = facts_of(run, "report dead.npz")["tensors"][0]
    assert (row["dead"], row["range_ratio"], row["weakest_bits"], row["sqnr"]) == (4, 1.0, "-inf", "inf")


# --- images ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [{"any": IMAGES}, {"x": IMAGES, "labels": np.arange(12)}, {"images": IMAGES, "labels": np.arange(12)},
                                   {"x": np.asfortranarray(IMAGES, np.float64)}], ids=["alone", "by input", "images", "fortran"])
def test_images_are_found(run, names):
    np.savez_compressed("images.npz", **names)
    assert facts_of(run, "verify net.npz net.npz --data images.npz")["verification"]["data"] == "12 images of images.npz"


def test_several_inputs_by_name(run):
    serialization.save("two.npz", TWO_INPUTS)
    a, b = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 3))
    np.savez("ab.npz", b=b, a=a)
    assert facts_of(run, "equalize two.npz -o eq.npz --data ab.npz --method two_step")["ok"]
    np.savez("ab.npz", a=a)
    assert "must hold one array for each input (a, b), got a" in run("verify two.npz two.npz --data ab.npz")[1]
    np.savez("ab.npz", a=a, b=b[1:])
    assert "equal batch sizes" in run("verify two.npz two.npz --data ab.npz")[1]


def test_batches_change_nothing(run, monkeypatch):
    whole = facts_of(run, "report net.npz --data images.npz")
    monkeypatch.setattr(files, "BATCH_ENTRIES", 5 * sum(map(math.prod, NET.shapes.values())))
    pieces = facts_of(run, "report net.npz --data images.npz")
    for a, b in zip(whole["tensors"], pieces["tensors"], strict=True):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value) if isinstance(value, float) else value)
    images = files.load_images("images.npz", files.Network("net.npz", NET))
    assert [len(batch["x"]) for batch in images.batches()] == [5, 5, 2] and len(images.first(3)) == 3


# --- refusals ----------------------------------------------------------------------------------------------------------

def bomb() -> bytes:
    """An .npz whose directory claims an array of 8 GiB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", b"1234")
    return stream.getvalue().replace((4).to_bytes(4, "little"), (2**32 - 2).to_bytes(4, "little"))


def lying_header() -> bytes:
    """An .npz with four bytes of data under a header that claims 8 PiB."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1125899906842624,), }\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234")
    return stream.getvalue()


def npz(*arrays, **named) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, *arrays, **named)
    return stream.getvalue()


NOT_FINITE = np.where(np.arange(IMAGES.size).reshape(IMAGES.shape) == 40, np.float32("nan"), IMAGES)
BAD_IMAGES = {
    "text": (b"hello", "is not a readable .npz file"),
    "empty": (b"", "is not a readable .npz file"),
    "pickle": (pickle.dumps([1, 2]), "is not a readable .npz file"),
    "truncated": (npz(IMAGES)[:-200], "is not a readable .npz file"),
    "objects": (npz(x=np.array([{}], object)), "is not a readable .npz file"),
    "no array": (npz(), "got none"),
    "two arrays": (npz(a=IMAGES, b=IMAGES), "must hold one array for each input (x), a single array, or an array called images, got a, b"),
    "shape": (npz(IMAGES[:, :1]), "must be (N, 2, 6, 6), got (12, 1, 6, 6)"),
    "scalar": (npz(np.float32(1)), "must be (N, 2, 6, 6), got ()"),
    "integers": (npz(IMAGES.astype(np.int8)), "must be a floating array, got int8"),
    "nan": (npz(NOT_FINITE), "holds nan at index (0, 1, 0, 4)"),
    "no image": (npz(IMAGES[:0]), "empty batch"),
    "claims gigabytes": (bomb(), "more than"),
    "lies": (lying_header(), "is not a readable .npz file"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(run, folder, name, monkeypatch):
    content, said = BAD_IMAGES[name]
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    Path("bad.npz").write_bytes(content)
    before = set(folder.iterdir())
    for line in ("equalize net.npz -o out.npz --data bad.npz --factors f.npz --report r.json", "quantize net.npz -o out.npz --data bad.npz",
                 "fold net.npz -o out.npz --data bad.npz", "verify net.npz net.npz --data bad.npz --json", "report net.npz --data bad.npz"):
        status, error = run(line)
        assert status == 3 and said in error and "bad.npz" in error
    assert set(folder.iterdir()) == before


REFUSED = {
    "inspect missing.npz": "No such file",
    "inspect images.npz": "'images.npz' is not an eqfact network",
    "inspect net.txt": "must end in .npz or .onnx",
    "inspect .": "must end in .npz or .onnx",
    "inspect folder.npz": "Is a directory",
    "fold net.npz -o out.txt": "must end in .npz or .onnx",
    "fold net.npz -o nowhere/out.npz": "there is no folder",
    "fold net.npz -o folder.npz": "this is a folder",
    "fold net.npz -o net.npz/out.npz": "there is no folder",
    "equalize missing.npz -o out.npz": "No such file",
    "equalize net.npz -o out.npz --factors out.npz": "two outputs have this name",
    "equalize net.npz -o out.npz --report nowhere/report.json": "there is no folder",
    "equalize net.npz -o out.npz --data missing.npz": "No such file",
    "equalize net.npz -o out.npz --include act1 ghost": "include names 'ghost', which is not a value",
    "equalize net.npz -o out.npz --exclude ghost": "exclude names 'ghost', which is not a value",
    "equalize net.npz -o out.npz --max-factor 0.5": "max_factor must be",
    "equalize net.npz -o out.npz --max-factor nan": "max_factor must be",
    "equalize net.npz -o out.npz --max-iter 0": "max_iter must be",
    "equalize net.npz -o out.npz --apply missing.npz": "No such file",
    "equalize net.npz -o out.npz --apply images.npz": "'images.npz' does not fit the network: factors are given for 'arr_0'",
    "equalize net.npz -o out.npz --apply zero.npz": "'zero.npz' does not fit the network: value 'act1', channel 0",
    "equalize net.npz -o out.npz --data images.npz --weight-bits 1 --report r.json": "bits must be an integer from 2 to 16, got 1",
    "quantize net.npz -o out.npz --data images.npz --weight-bits 1": "bits must be an integer from 2 to 16, got 1",
    "quantize net.npz -o out.npz --data images.npz --activation-bits 17": "bits must be an integer from 2 to 16, got 17",
    "quantize net.npz -o out.npz --data images.npz --group-size 4": "group_size goes with granularity 'per_group'",
    "train net.npz -o out.npz --data images.npz --steps 0": "steps must be an integer of at least 1, got 0",
    "train net.npz -o out.npz --data images.npz --batch-size 0": "batches need a size of at least 1",
    "train net.npz -o out.npz --data images.npz --learning-rate nan": "learning_rate must be positive and finite, got nan",
    "train net.npz -o out.npz --data images.npz --labels images.npz": "'images.npz': labels must be whole numbers, one for each of",
    "train net.npz -o out.npz --data images.npz --labels far.npz": "labels must be whole numbers from 0 to 2",
    "train net.npz -o out.npz --data images.npz --resume images.npz": "'images.npz': a training's state holds step, losses",
    "train net.npz -o out.npz --data images.npz --state out.npz": "two outputs have this name",
    "verify net.npz two.npz": "need the same inputs",
    "verify net.npz missing.npz": "No such file",
    "report net.npz --data images.npz --weight-bits 0": "bits must be an integer from 2 to 16, got 0",
    "demo --plot nowhere/figure.png": "there is no folder",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals_say_why_and_leave_nothing(run, folder, line):
    Path("folder.npz").mkdir()
    serialization.save("two.npz", TWO_INPUTS)
    np.savez("zero.npz", act1=np.zeros(8))
    np.savez("far.npz", labels=np.full(12, 3))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for suffix in ("", " --json"):
        status, error = run(line + suffix)
        assert status == 3 and REFUSED[line] in error
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert list(Path("folder.npz").iterdir()) == []


USAGE = ["", "frobnicate", "equalize net.npz", "equalize net.npz -o out.npz --method magic",
         "equalize net.npz -o out.npz --method two_step",
         "equalize net.npz -o out.npz --method one_step --apply f.npz", "equalize net.npz -o out.npz --apply f.npz --tol 0.1",
         "inspect net.onnx --input-shape x", "inspect net.onnx --input-shape x=", "inspect net.onnx --input-shape =3,4,4",
         "inspect net.onnx --input-shape x=3,H,W", "inspect net.onnx --input-shape x=3,0,4",
         "inspect net.onnx --input-shape x=3,4,4 --input-shape x=3,4,4", "demo --strict",
         "quantize net.npz -o out.npz", "train net.npz -o out.npz",
         "train net.npz -o out.npz --data images.npz --weight-bits float --activation-bits float",
         "quantize net.npz -o out.npz --activation-bits many", "verify net.npz", "demo extra"]


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage(folder, capsys, line):
    before = set(folder.iterdir())
    with pytest.raises(SystemExit) as raised:
        main(line.split())
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: eqfact")
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("options", ["--harmless", "--harmless --method two_step", "--method optimal"])
def test_what_needs_images_asks_for_them(folder, capsys, options):
    with pytest.raises(SystemExit) as raised:
        main(f"equalize net.npz -o out.npz {options}".split())
    assert raised.value.code == 2 and capsys.readouterr().err.endswith(": give --data FILE.npz\n")


def test_a_failing_write_leaves_the_old_files(run, folder, monkeypatch):
    Path("f.npz").write_text("old factors")
    Path("out.npz").write_text("old network")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(serialization, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    status, error = run("equalize net.npz -o out.npz --factors f.npz --report r.json")
    assert status == 3 and "No space left" in error
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("line", "modules", "said"), [
    ("equalize net.npz -o out.npz --plot figure.png", ("matplotlib.figure",), "pip install 'eqfact[plot]'"),
    ("inspect net.onnx", ("onnx",), "pip install 'eqfact[onnx]'"),
    ("fold net.npz -o net.onnx", ("onnx",), "pip install 'eqfact[onnx]'"),
])
def test_missing_extras_are_named(run, folder, monkeypatch, line, modules, said):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    before = set(folder.iterdir())
    status, error = run(line)
    assert status == 3 and said in error
    assert set(folder.iterdir()) == before


# --- demo, figure, ONNX, the program -----------------------------------------------------------------------------------

@pytest.fixture
def small_demo(monkeypatch):
    """The demo on a quarter of the images and half of the bits."""
    bundle = demo.load_bundle()
    monkeypatch.setattr(demo, "BITS", (8, 4))
    monkeypatch.setattr(demo, "VERIFIED", 4)
    small = dataclasses.replace(bundle, calibration=bundle.calibration[:64], images=bundle.images[:90], labels=bundle.labels[:90])
    monkeypatch.setattr(demo, "load_bundle", lambda: small)


def test_demo_measures_every_method(run, small_demo):
    facts = facts_of(run, "demo")
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == [name for name, *_ in demo.ROWS]
    assert facts["ok"] and facts["degrees_of_freedom"] == eq.degrees_of_freedom(eq.fold_batchnorm(demo.load_bundle().network))
    assert facts["top1"] > 0.95
    for row in rows.values():
        assert [q["bits"] for q in row["quality"]] == [8, 4]
        assert row["verification"] is None or row["verification"]["equal"]
    at_4_bits = {name: row["quality"][1]["sqnr"] for name, row in rows.items()}
    assert at_4_bits["cross-layer"] > at_4_bits["none"] + 6 and at_4_bits["two-step"] > at_4_bits["none"] + 6
    assert rows["cross-layer"]["weight_ratio"] < rows["none"]["weight_ratio"] == rows["per-channel"]["weight_ratio"]


def test_demo_prints_a_table_that_fits_a_page(run, small_demo):
    pytest.importorskip("matplotlib")
    status, text = run("demo --plot figure.png")
    assert status == 0
    for name, *_ in demo.ROWS:
        assert re.search(rf"^{re.escape(name)} +\d+\.\d +-?\d+\.\d", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100 and text.isascii()
    assert "figure of ranges written to figure.png" in text and Path("figure.png").read_bytes().startswith(b"\x89PNG")


FIGURES = {
    "demo": ("ranges", "noise", "convergence"),
    "equalize net.npz -o eq.npz --data images.npz": ("ranges", "noise", "weights", "convergence"),
    "quantize net.npz -o q.npz --data images.npz": ("weights", "noise", "predicted"),
}


@pytest.mark.parametrize("line", FIGURES)
def test_every_kind_of_figure_is_drawn_by_the_function_of_its_name(run, small_demo, monkeypatch, line):
    pytest.importorskip("matplotlib")
    kinds, last = FIGURES[line], []

    def recording(kind, draw):
        def recorded(*args, **options):
            last[:] = [kind]
            return draw(*args, **options)
        return recorded

    def kept(draw, path, right=figures._draw):
        right(draw, path)
        drawn[path] = last.pop()

    for kind in kinds:
        monkeypatch.setattr(plotting, f"plot_{kind}", recording(kind, getattr(plotting, f"plot_{kind}")))
    drawn = {}
    monkeypatch.setattr(figures, "_draw", kept)
    facts = facts_of(run, f"{line} {' '.join(f'--plot {kind}={kind}.svg' for kind in kinds)} --plot bare.png")
    assert facts["ok"]
    assert facts["plots"] == [{"kind": kind, "file": f"{kind}.svg"} for kind in kinds] + [{"kind": kinds[0], "file": "bare.png"}]
    assert len(drawn) == len(kinds) + 1 and all("<svg" in Path(f"{kind}.svg").read_text() for kind in kinds)
    for path, kind in drawn.items():  # to files that are put into their places together
        assert kind == kinds[0] if path.endswith(".png") else kind in path
    assert Path("bare.png").read_bytes().startswith(b"\x89PNG")


def test_figures_without_data_and_of_quantizers_that_clip(run):
    pytest.importorskip("matplotlib")
    line = "equalize net.npz -o eq.npz --plot ranges=r.png --plot weights=w.png --plot convergence=c.png"
    assert "figure of convergence written to c.png" in run(line)[1]
    clipping = "--weight-range noise --activation-range mse --data images.npz"
    assert facts_of(run, f"{line} --plot noise=n.png {clipping}")["ok"]
    assert facts_of(run, f"quantize net.npz -o q.npz --plot predicted=p.png --plot ./a=b.png {clipping}")["ok"]
    assert Path("a=b.png").exists()
    assert facts_of(run, "quantize net.npz -o q.npz --activation-bits float --plot w.png")["ok"]


@pytest.mark.parametrize(("line", "said"), [
    ("equalize net.npz -o out.npz --plot noise=f.png", ": give --data FILE.npz"),
    ("equalize net.npz -o out.npz --data images.npz --method one_step --plot convergence=f.png", "'one_step' is one pass"),
    ("equalize net.npz -o out.npz --apply f.npz --plot convergence=f.png", "'apply' is one pass"),
    ("equalize net.npz -o out.npz --apply f.npz --data images.npz --plot noise=f.png", "give --method in the place of --apply"),
    ("equalize net.npz -o out.npz --weight-bits float --plot weights=f.png", "leave out --weight-bits float"),
    ("equalize net.npz -o out.npz --plot predicted=f.png", "KIND one of ranges, noise, weights, convergence"),
    ("equalize net.npz -o out.npz --plot noize=f.png", "KIND one of ranges"),
    ("equalize net.npz -o out.npz --plot noise=", "KIND one of ranges"),
    ("quantize net.npz -o out.npz --activation-bits float --plot predicted=f.png", ": give --data FILE.npz"),
    ("quantize net.npz -o out.npz --data images.npz --weight-granularity per_group --group-size 2 --plot noise=f.png", "per_channel"),
    ("quantize net.npz -o out.npz --data images.npz --weight-bits float --activation-bits float --plot noise=f.png", "nothing is q"),
])
def test_figures_that_a_run_cannot_draw_are_refused_before_it(folder, capsys, line, said):
    before = set(folder.iterdir())
    with pytest.raises(SystemExit) as raised:
        main(line.split())
    assert raised.value.code == 2 and said in capsys.readouterr().err
    assert set(folder.iterdir()) == before


def test_a_figure_that_fails_leaves_nothing(run, folder):
    pytest.importorskip("matplotlib")
    serialization.save("bare.npz", eq.Graph.chain((3,), act=eq.ReLU()))
    before = set(folder.iterdir())
    for line, said in (("equalize net.npz -o eq.npz --plot figure.jpeg2077", "cannot be written as 'jpeg2077'"),
                       ("equalize net.npz -o eq.npz --plot noise=f.png --plot f.png --data images.npz", "two outputs have this name"),
                       ("equalize bare.npz -o eq.npz --plot f.png", "at least one"),
                       ("equalize bare.npz -o eq.npz --plot convergence=f.png", "take 'optimal' or 'cross_layer'")):
        status, error = run(line)
        assert status == 3 and said in error
        assert set(folder.iterdir()) == before


def test_the_same_verbs_for_onnx(run):
    pytest.importorskip("onnx")
    assert facts_of(run, "fold net.npz -o folded.onnx")["ok"]
    assert facts_of(run, "inspect folded.onnx")["degrees_of_freedom"] == FREE
    assert facts_of(run, "equalize folded.onnx -o eq.onnx --data images.npz --method two_step --factors f.npz")["ok"]
    assert facts_of(run, "verify net.npz eq.onnx --data images.npz")["ok"]
    assert facts_of(run, "report eq.onnx --data images.npz")["tensors"]
    assert facts_of(run, "quantize eq.onnx -o q.onnx --data images.npz")["ok"]
    assert b"QuantizeLinear" in Path("q.onnx").read_bytes()
    assert run("inspect images.onnx")[0] == 3
    Path("images.onnx").write_bytes(Path("images.npz").read_bytes())
    assert run("inspect images.onnx")[0] == 3


@pytest.fixture
def hard_onnx(folder):
    """A file with open sizes, and with an op that eqfact has no layer for: what no verb can read without help."""
    pytest.importorskip("onnx")
    import onnx
    import onnx_models as small
    nodes = [onnx.helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in (
        ("Conv", ["x", "w1"], "conv"), ("Relu", ["conv"], "act"), ("Conv", ["act", "w2"], "conv2"), ("Cos", ["conv2"], "y"))]
    rng = np.random.default_rng(12)  # its own: else the weights would depend on which tests ran before
    weights = {"w1": rng.normal(size=(8, 2, 3, 3)).astype(np.float32), "w2": rng.normal(size=(3, 8, 1, 1)).astype(np.float32)}
    onnx.save(small.model(nodes, {"x": ["N", 2, "H", "W"]}, ["y"], weights), "hard.onnx")
    return "hard.onnx"


def test_figures_of_what_is_understood_of_a_file(run, hard_onnx):
    pytest.importorskip("matplotlib")
    for verb, kinds in (("equalize", ("ranges", "noise", "weights", "convergence")), ("quantize", ("weights", "noise", "predicted"))):
        plots = " ".join(f"--plot {kind}={verb}-{kind}.png" for kind in kinds)
        facts = facts_of(run, f"{verb} {hard_onnx} -o {verb}.onnx --data images.npz {plots}")
        assert facts["partly"] and [plot["kind"] for plot in facts["plots"]] == list(kinds)
        assert all(Path(plot["file"]).exists() for plot in facts["plots"])


def test_quantize_runs_what_it_wrote(run, monkeypatch):
    """In onnxruntime, with and without sums of 16 bits; what it says is what another run of the file shows."""
    pytest.importorskip("onnxruntime")
    from eqfact.onnx import running
    line = "quantize net.npz -o q.onnx --fold --data images.npz"
    facts = facts_of(run, line)
    folded = eq.fold_batchnorm(NET)
    quantized = eq.quantize(folded, stats=eq.calibrate(folded, IMAGES), weights=eq.UniformQuantizer(),
                            activations=eq.UniformQuantizer(symmetric=False))
    ours, theirs = eq.forward(quantized, IMAGES[:4]), running.run("q.onnx", {"x": IMAGES[:4]}, optimized=True)["fc"]
    assert facts["run"]["with"] == running.runtime()
    assert facts["run"]["difference"]["fc"] == np.abs(theirs - ours).max() / np.abs(ours).max()
    assert facts["run"]["sqnr"]["fc"] == pytest.approx(eq.sqnr(eq.forward(folded, IMAGES[:4]), theirs))
    assert facts["run"]["expected_sqnr"]["fc"] == eq.sqnr(eq.forward(folded, IMAGES[:4]), ours)
    right = running.run

    def saturating(path, feeds, outputs=None, *, optimized=False, entries=None):
        made = right(path, feeds, outputs, optimized=optimized, entries=entries)
        return {name: y + (0 if entries == running.EXACT_SUMS else 0.5 * np.abs(y).max()) for name, y in made.items()}
    monkeypatch.setattr(running, "run", saturating)
    said = run(line)[1]
    assert re.search(r"run by onnxruntime \S+: 'fc' differs from eqfact's by 50 % of its largest, [-\d.]+ dB \(eqfact's: ", said)
    assert re.search(r"this one lacks VNNI .* by up to 5\d %; .* session\.x64quantprecision = 1, or quantize with --weight-bits 7", said)

    def refusing(*args, **options):
        raise running.OnnxError("it does not load")
    monkeypatch.setattr(running, "run", refusing)
    status, said = run(line)[:2]
    assert status == 1 and "NOT run: it does not load" in said
    monkeypatch.setattr(running, "runtime", lambda: "the reference evaluator of onnx")
    assert facts_of(run, line)["run"] is None
    assert facts_of(run, "quantize net.npz -o q.npz --fold --data images.npz")["run"] is None


def test_quantize_runs_files_of_a_fixed_batch(run):
    pytest.importorskip("onnxruntime")
    import onnx

    from eqfact.onnx import running
    run("fold net.npz -o fixed.onnx")
    model = onnx.load("fixed.onnx")
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(model, "fixed.onnx")
    assert facts_of(run, "quantize fixed.onnx -o q.onnx --data images.npz")["run"]["difference"]["fc"] < 1e-5
    assert [len(feed["x"]) for feed in running.fed("q.onnx", {"x": IMAGES[:4]})] == [3, 3]


@pytest.mark.parametrize("nodes, x, y", [
    ("c = Conv(x, w) y = Transpose<perm=[0, 2, 3, 1]>(c)", (0, 2, 6, 6), (0, 6, 6, 3)),
    ("c = Conv(x, w) y = Reshape(c, s)", (0, 2, 6, 6), (0, 3, 36)),
    ("c = MatMul(x, m) y = Relu(c)", (0, 6, 2), (0, 6, 3)),
    ("t = Transpose<perm=[1, 0, 2]>(x) c = MatMul(t, m) y = Transpose<perm=[1, 0, 2]>(c)", (6, 0, 2), (6, 0, 3)),
])
def test_quantized_files_take_and_make_what_the_file_did(run, nodes, x, y):
    """In its order of axes, whichever the network has; and that is how they are compared with eqfact."""
    pytest.importorskip("onnxruntime")
    import onnx
    import onnx_models as small
    dims = ["float[" + ", ".join(str(n or "n") for n in shape) + "]" for shape in (x, y)]
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g ({dims[0]} x) => ({dims[1]} y) {{{nodes}}}')
    constants = {"w": RNG.normal(size=(3, 2, 1, 1)).astype(np.float32), "m": RNG.normal(size=(2, 3)).astype(np.float32),
                 "s": small.ints(0, 3, -1)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items() if f"{name})" in nodes)
    onnx.save(model, "moved.onnx")
    feeds = {"x": RNG.normal(size=[n or 5 for n in x]).astype(np.float32)}
    np.savez("moved.npz", **feeds)
    facts = facts_of(run, "quantize moved.onnx -o q.onnx --data moved.npz")
    assert facts["kept"] == [] and facts["run"]["difference"]["y"] < 1e-5 and facts["run"]["sqnr"]["y"] > 30
    truth, made = (small.run_ort(path, feeds)["y"] for path in ("moved.onnx", "q.onnx"))
    assert made.shape == truth.shape and eq.sqnr(truth, made) > 30
    assert facts_of(run, "equalize moved.onnx -o out.onnx --strict --data moved.npz")["ok"]
    small.close(small.run_ort("out.onnx", feeds), {"y": truth})


VERBS = {"inspect": "", "fold": "-o out.onnx", "equalize": "-o out.onnx", "quantize": "-o out.onnx", "train": "--steps 2 -o out.onnx",
         "verify": "hard.onnx", "report": ""}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_reads_onnx_files_with_open_sizes_and_foreign_ops(run, hard_onnx, verb):
    line = f"{verb} hard.onnx {VERBS[verb]}"
    if verb in ("inspect", "fold", "verify"):  # the others take sizes from the data
        status, error = run(line)
        assert status == 3 and "(?, 2, ?, ?)" in error and "--input-shape x=C,H,W" in error and "--data" in error
        assert not Path("out.onnx").exists()
    shaped = f"{line} --input-shape x=2,6,6" if verb in ("inspect", "fold", "verify") else f"{line} --data images.npz"
    assert run(f"{shaped} --strict")[0] == 3 and not Path("out.onnx").exists()
    facts = facts_of(run, shaped)
    assert facts["ok"] and [kept["op_type"] for kept in facts["kept"]] == ["Cos"] and "no such layer" in facts["kept"][0]["reason"]
    assert run(shaped)[1].startswith("hard.onnx: 3 of 4 nodes are understood; 1 kept (Cos: eqfact has no such layer)\n")
    assert run(f"{line} --input-shape x=2,6,6 --input-shape z=3")[0] == 3
    if verb == "inspect":
        assert facts["outputs"] == {"conv2": [3, 4, 4]}
    if verb == "equalize":  # only statistics let noise be weighed
        assert "noise is weighed at the output of" in run(shaped)[1]
        assert "noise is weighed" not in run(f"{line} --input-shape x=2,6,6")[1]
    if "-o" in line:
        import onnx
        kept = [n for n in onnx.load("out.onnx").graph.node if n.op_type == "Cos"]
        assert kept == [n for n in onnx.load("hard.onnx").graph.node if n.op_type == "Cos"]


def test_a_file_of_which_parts_are_understood_keeps_its_function(run, hard_onnx):
    pytest.importorskip("onnxruntime")
    import onnx
    import onnx_models as small
    feeds = {"x": IMAGES[:3]}
    truth = small.run_ort("hard.onnx", feeds)
    assert facts_of(run, "equalize hard.onnx -o out.onnx --data images.npz")["ok"]
    small.close(small.run_ort("out.onnx", feeds), truth)
    wide = {"x": RNG.normal(size=(2, 2, 9, 7)).astype(np.float32)}  # sizes that were open stay open
    small.close(small.run_ort("out.onnx", wide), small.run_ort("hard.onnx", wide))
    weights = [{t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer} for path in ("hard.onnx", "out.onnx")]
    assert weights[0].keys() == weights[1].keys() and not np.array_equal(weights[0]["w1"], weights[1]["w1"])
    facts = facts_of(run, "quantize out.onnx -o q.onnx --data images.npz")
    assert facts["run"]["sqnr"]["y"] > 15 and facts["run"]["difference"] == {}


def test_parts_of_a_file_are_written_into_files_only(run, hard_onnx):
    for verb in ("fold", "equalize"):
        status, error = run(f"{verb} hard.onnx -o out.npz --input-shape x=2,6,6")
        assert status == 3 and "only parts of 'hard.onnx' are understood" in error and not Path("out.npz").exists()


@pytest.mark.parametrize("flag", ["--strict", "--input-shape x=2,6,6"])
@pytest.mark.parametrize("verb", VERBS)
def test_options_for_onnx_files_are_refused_for_native_ones(folder, capsys, verb, flag):
    with pytest.raises(SystemExit) as raised:
        main(f"{verb} net.npz {VERBS[verb].replace('hard.onnx', 'net.npz').replace('.onnx', '.npz')} {flag}".split())
    assert raised.value.code == 2
    named = "'net.npz' and 'net.npz'" if verb == "verify" else "'net.npz'"
    assert f"error: {flag.split()[0]} is for ONNX files: leave it out for {named}\n" in capsys.readouterr().err


def test_options_for_onnx_files_help_where_one_of_two_is_native(run):
    pytest.importorskip("onnx")
    assert facts_of(run, "fold net.npz -o folded.onnx")["ok"]
    assert facts_of(run, "verify net.npz folded.onnx --strict --input-shape x=2,6,6")["ok"]
    assert facts_of(run, "verify folded.onnx net.npz --strict --input-shape x=2,6,6")["ok"]


def test_progress_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(asked.progress([1, 2], "counting")) == [1, 2]
    monkeypatch.delitem(sys.modules, "tqdm")
    assert list(asked.progress([1, 2], "counting")) == [1, 2]


def test_table_aligns():
    assert list(table(("a", "b"), [("x", "10"), ("yy", "9")], right=(1,))) == ["a    b", "x   10", "yy   9"]


def test_only_the_command_line_prints():
    folder = Path(eq.__file__).parent
    for path in folder.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "print" not in names or path.name == "__main__.py", path


def test_help_tells_what_options_mean_for_each_method(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["equalize", "--help"])
    assert raised.value.code == 0
    help_ = " ".join(capsys.readouterr().out.split())
    for said in ("no |log factor| moves by more (0.001)", "within so many dB of the best (0.05)", "sweeps of cross_layer (1000)",
                 "Newton steps of optimal (200)", "may reach on other data too (eqfact.likely_ranges)"):
        assert said in help_


def test_the_program_starts():
    version, help_ = (subprocess.run([sys.executable, "-m", "eqfact", option], capture_output=True, text=True, check=True).stdout
                      for option in ("--version", "--help"))
    assert version == f"eqfact {eq.__version__}\n"
    assert all(name in help_ for name in COMMANDS)


@pytest.mark.parametrize("verb", ["equalize", "quantize", "report"])
def test_an_output_that_only_moves_entries_is_measured_like_any_other(run, verb):
    """MobileNetV2 without its classifier ends in Flatten: what it puts out lies on the grid of the pooled features."""
    headless = eq.Graph(dict(NET.inputs), NET.nodes[:-1], ["flat"])
    serialization.save("net.npz", headless)
    output = "" if verb == "report" else " -o out.npz --fold"
    facts = facts_of(run, f"{verb} net.npz{output} --data images.npz")
    if verb == "equalize":
        assert 20 < facts["after"]["sqnr"]["flat"] < 80


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    """As ``eqfact ... | head`` is: what reads is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", "eqfact", "inspect", "net.npz"], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert done.returncode == 0 and done.stderr == ""
