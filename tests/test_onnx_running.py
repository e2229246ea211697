"""Two runtimes that are not ours must tell the same of one model, wherever its weights are and whatever values are asked for."""

import builtins

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import TensorProto

from eqfact.onnx import OnnxError
from eqfact.onnx.running import EXACT_SUMS, run, runtime


@pytest.fixture(params=["onnxruntime", "the reference evaluator"])
def engine(request, monkeypatch):
    """Each of the two: without the first, the second runs."""
    if request.param != "onnxruntime":
        real = builtins.__import__

        def absent(name, *args, **kwargs):
            if name.partition(".")[0] == "onnxruntime":
                raise ImportError(name)
            return real(name, *args, **kwargs)
        monkeypatch.setattr(builtins, "__import__", absent)
    return request.param


def network():
    weight, bias = np.float32([[1, -2], [3, 0.5]]), np.float32([1, -1])
    return small.model([onnx.helper.make_node("Gemm", ["x", "w", "b"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["r"]),
                        onnx.helper.make_node("Neg", ["r"], ["y"])], {"x": ["N", 2]}, ["y"], {"w": weight, "b": bias})


X = np.float32([[1, 2], [-1, 3], [0.5, -4]])
H = X @ np.float32([[1, -2], [3, 0.5]]) + np.float32([1, -1])


def test_the_runtime_says_which_it_is(engine):
    assert runtime().startswith({"onnxruntime": "onnxruntime 1."}.get(engine, "the reference evaluator of onnx 1."))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("names", [None, ["y"], ["h"], ["y", "h", "r"], ["r", "r"]], ids=str)
def test_outputs_and_inner_values_by_name(engine, names, optimized):
    model = network()
    before = model.SerializeToString()
    made = run(model, {"x": X}, names, optimized=optimized, entries=EXACT_SUMS)
    expected = {"h": H, "r": np.maximum(H, 0), "y": -np.maximum(H, 0)}
    assert list(made) == list(dict.fromkeys(names or ["y"]))
    assert all(np.array_equal(made[name], expected[name]) for name in made)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("names", [None, ["h", "y"]], ids=str)
def test_weights_in_other_files_are_found_beside_the_model(engine, names, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(network(), folder / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (folder / "weights.bin").exists()
    made = run(folder / "net.onnx", {"x": X}, names)
    assert np.array_equal(made["y"], -np.maximum(H, 0))
    assert names is None or np.array_equal(made["h"], H)


def test_what_a_runtime_refuses_is_an_error_that_names_file_and_runtime(engine, tmp_path):
    wrong = small.model([onnx.helper.make_node("NoSuchOp", ["x"], ["y"])], {"x": ["N", 2]}, ["y"])
    onnx.save(wrong, tmp_path / "net.onnx")
    for model, start in ((wrong, ""), (tmp_path / "net.onnx", f"{tmp_path / 'net.onnx'}: ")):
        with pytest.raises(OnnxError, match=rf"^{start}{runtime()} does not run this model: .*NoSuchOp"):
            run(model, {"x": X})


def test_integers_and_halves_are_handed_over_as_they_are(engine):
    model = small.model([onnx.helper.make_node("Neg", ["x"], ["y"])], {"x": ["N"]}, ["y"], elem_type=TensorProto.INT32)
    made = run(model, {"x": np.int32([1, -2])})["y"]
    assert made.dtype == np.int32 and made.tolist() == [-1, 2]
