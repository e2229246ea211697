"""ONNX's own backend tests, which ship inside the package onnx, through load and forward.

A case is a model of one node with inputs and expected outputs by an independent formula. Inputs other than the first become
initializers, except where the op joins values. Every case either gives the expected output, or is listed in :data:`EXCLUDED`
with the reason, and then ends in one clear error.
"""

import functools
import glob
import os
import re
import warnings

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

import eqfact as eq
import eqfact.onnx
from eqfact.onnx.nodes import READERS

#: Ops all of whose inputs are values of the network here.
JOINING = ("Add", "Sum", "Sub", "Mul", "Max", "Min", "Concat")
#: Ops that work entry by entry: a case without a batch axis gets one.
ENTRYWISE = ("Add", "Sum", "Mul", "Sub", "Div", "Neg", "Abs", "Relu", "LeakyRelu", "Clip", "Max", "Min", "Sigmoid", "Tanh", "Erf",
             "HardSigmoid", "HardSwish", "Gelu", "Swish", "Identity", "Dropout")
#: Cases in floats that are not computed, by the reason. Cases in integers, strings, sequences or types that numpy lacks are left out.
EXCLUDED = {
    "the output is a shape, not a value of the network": """
        shape_example shape shape_start_1 shape_end_1 shape_start_negative_1 shape_end_negative_1 shape_start_1_end_negative_1
        shape_start_1_end_2 shape_clip_start shape_clip_end shape_start_greater_than_end size_example size
        """,
    "samples would be mixed, or the batch be moved or lost: eqfact computes samples one by one, the batch is the first axis": """
        concat_2d_axis_0 concat_2d_axis_negative_2 concat_3d_axis_0 concat_3d_axis_negative_3 gather_0
        reduce_min_default_axes_keepdims_example reduce_min_default_axes_keepdims_random reduce_l1_default_axes_keepdims_example
        reduce_l1_default_axes_keepdims_random reduce_l2_default_axes_keepdims_example reduce_l2_default_axes_keepdims_random
        reduce_sum_default_axes_keepdims_example reduce_sum_default_axes_keepdims_random cumsum_2d_axis_0 tile tile_precomputed
        expand_dim_changed
        einsum_transpose einsum_sum einsum_batch_diagonal
        reduce_max_default_axes_keepdim_example reduce_max_default_axes_keepdims_random reduce_mean_default_axes_keepdims_example
        reduce_mean_default_axes_keepdims_random slice slice_neg_steps softmax_axis_0 reshape_reordered_all_dims reshape_one_dim
        flatten_axis0 flatten_axis2 flatten_axis3 flatten_negative_axis4 flatten_negative_axis2 flatten_negative_axis1 squeeze
        reshape_negative_extended_dims transpose_default transpose_all_permutations_2 transpose_all_permutations_3
        transpose_all_permutations_4 transpose_all_permutations_5 unsqueeze_axis_0 gemm_transposeA gemm_all_attributes
        """,
    "a value without a batch axis, in an op that does not work entry by entry, or joined with one that has other axes": """
        add_bcast mul_bcast concat_1d_axis_0 concat_1d_axis_negative_1 gather_negative_indices matmul_1d_3d matmul_1d_1d
        split_equal_parts_1d_opset13 split_variable_parts_1d_opset13 split_equal_parts_default_axis_opset13
        split_variable_parts_default_axis_opset13 split_zero_size_splits_opset13 split_equal_parts_1d_opset18
        split_variable_parts_1d_opset18 split_equal_parts_default_axis_opset18 split_variable_parts_default_axis_opset18
        split_zero_size_splits_opset18 split_1d_uneven_split_opset18 einsum_inner_prod einsum_scalar cumsum_1d cumsum_1d_exclusive
        cumsum_1d_reverse cumsum_1d_reverse_exclusive
        """,
    "it normalizes over several axes, with a factor and a shift for every entry of them": """
        layer_normalization_4d_axis0 layer_normalization_4d_axis_negative_4 layer_normalization_4d_axis1
        layer_normalization_4d_axis_negative_3 layer_normalization_4d_axis2 layer_normalization_4d_axis_negative_2
        layer_normalization_2d_axis0 layer_normalization_2d_axis_negative_2 layer_normalization_3d_axis0_epsilon
        layer_normalization_3d_axis_negative_3_epsilon layer_normalization_3d_axis1_epsilon
        layer_normalization_3d_axis_negative_2_epsilon
        rms_normalization_4d_axis0 rms_normalization_4d_axis_negative_4 rms_normalization_4d_axis1
        rms_normalization_4d_axis_negative_3 rms_normalization_4d_axis2 rms_normalization_4d_axis_negative_2
        rms_normalization_2d_axis0 rms_normalization_2d_axis_negative_2 rms_normalization_3d_axis0_epsilon
        rms_normalization_3d_axis_negative_3_epsilon rms_normalization_3d_axis1_epsilon
        rms_normalization_3d_axis_negative_2_epsilon
        """,
    "an axis has the size 0": """
        reduce_max_empty_set reduce_min_empty_set reduce_l1_empty_set reduce_l2_empty_set reduce_sum_empty_set
        reduce_sum_empty_set_non_reduced_axis_zero reshape_allowzero_reordered slice_start_out_of_bounds
        """,
    "a product of two values, or a constant that differs between samples": """
        matmul_3d matmul_4d matmul_bcast matmul_4d_1d gemm_default_matrix_bias prelu_example
        einsum_batch_matmul
        attention_4d_attn_mask_3d attention_4d_attn_mask_3d_causal attention_4d_attn_mask_4d attention_4d_attn_mask_4d_causal
        """,
    "training mode": """
        batchnorm_example_training_mode batchnorm_epsilon_training_mode training_dropout_default training_dropout_default_mask
        training_dropout training_dropout_mask training_dropout_zero_ratio training_dropout_zero_ratio_mask
        """,
    "the standard and its engines read corners of a broken size differently": """
        resize_downsample_scales_linear_align_corners resize_downsample_scales_cubic_align_corners
        """,
    "what lies outside is a constant, not 0": """
        resize_tf_crop_and_resize_extrapolation_value
        """,
    "keys and values of earlier tokens, which a cache holds": """
        attention_4d_with_past_and_present attention_4d_gqa_with_past_and_present attention_4d_gqa_with_past_and_present_fp16
        attention_4d_diff_heads_with_past_and_present attention_4d_diff_heads_with_past_and_present_mask3d
        attention_4d_diff_heads_with_past_and_present_mask4d attention_4d_with_past_and_present_qk_matmul_bias
        attention_4d_with_past_and_present_qk_matmul_bias_3d_mask attention_4d_with_past_and_present_qk_matmul_bias_4d_mask
        attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal
        attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal attention_4d_with_past_and_present_qk_matmul
        attention_3d_with_past_and_present attention_3d_gqa_with_past_and_present attention_3d_diff_heads_with_past_and_present
        attention_3d_with_past_and_present_qk_matmul attention_3d_with_past_and_present_qk_matmul_bias
        attention_3d_with_past_and_present_qk_matmul_softcap attention_3d_with_past_and_present_qk_matmul_softmax
        attention_4d_diff_heads_mask4d_padded_kv attention_4d_gqa_causal_nonpad_decode attention_4d_gqa_causal_nonpad_decode_fp16
        attention_4d_causal_nonpad_continued_prefill attention_4d_causal_with_past_and_present
        attention_4d_causal_nonpad_negative_offset_structural_empty attention_4d_causal_nonpad_attn_mask_composition
        attention_4d_causal_nonpad_batch_prefill attention_local_window_with_past attention_local_window_ext_cache_rank3_head_mask
        attention_local_window_ext_cache_rank4_batch_mask attention_local_window_ext_cache_rank2_mask
        attention_local_window_ext_cache_float16_mask
        """,
    "a softcap, a window, a precision of the Softmax of its own": """
        attention_4d_softcap attention_4d_gqa_softcap attention_4d_diff_heads_sizes_softcap attention_4d_with_qk_matmul_softcap
        attention_3d_softcap attention_3d_gqa_softcap attention_3d_diff_heads_sizes_softcap attention_4d_softcap_neginf_mask
        attention_4d_softcap_neginf_mask_poison attention_24_qk_matmul_output_mode3_softmax_precision attention_local_window
        attention_bidirectional_window attention_local_window_rank1_boolean_mask attention_3d_local_window
        attention_local_window_gqa_rank4_mask
        """,
    "rows of which all is masked": """
        attention_causal_boolmask_nan_robustness attention_23_boolmask_fullymasked_row_nan_robustness
        attention_23_fullymasked_qk_matmul_output_mode3_zero attention_24_fullymasked_qk_matmul_output_mode3_zero
        """,
    "the bounds are out of order; eqfact demands low <= high": """
        clip_min_greater_than_max
        """,
}
#: Ops none of whose cases is left; other tests cover them.
NOTHING_LEFT = ("Cast", "Einsum", "Shape", "Size", "Tile", "Where")

@functools.cache
def cases():
    """All cases of one node whose op type is read, by op type."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, from the making of the cases
        for case in collect_testcases(None):
            if case.model is not None and len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in READERS:
                found.setdefault(case.model.graph.node[0].op_type, {})[case.name] = case
    return found

def in_floats(case):
    """Whether all that the case computes with are arrays of floats (constants behind the first input may be integers)."""
    inputs, outputs = case.data_sets[0]
    kind = case.model.graph.node[0].op_type
    data = [*(inputs if kind in (*JOINING, *ENTRYWISE, "PRelu", "MatMul", "Gemm") and kind != "Dropout" else inputs[:1]), outputs[0]]
    return all(isinstance(x, (np.ndarray, np.generic)) and x.dtype in (np.float16, np.float32, np.float64) for x in data)

def outcome(case, path):
    """The computed and the expected output of a case."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs, outputs = case.data_sets[0]
    kind = model.graph.node[0].op_type
    batch = kind in ENTRYWISE and (np.ndim(inputs[0]) < 2 or kind in ("Sub", "Div"))
    feeds, kept = {}, []
    if kind == "RotaryEmbedding":  # each sample has angles of its own
        inputs, outputs = ([x[:1] if x.ndim > 2 or x.dtype.kind == "i" else x for x in arrays] for arrays in (inputs, outputs))
    for i, (info, value) in enumerate(zip(model.graph.input, inputs, strict=True)):
        if i and kind not in JOINING and not (kind == "Attention" and i < 3):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), info.name))
            continue
        if batch:
            value = np.asarray(value)[None] if np.ndim(value) else np.asarray(value).reshape(1, 1)
            info = helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, value.shape)
        if kind == "RotaryEmbedding":
            info.type.tensor_type.shape.dim[0].dim_value = 1
        kept.append(info)
        feeds[info.name] = value
    del model.graph.input[:], model.graph.output[1:]
    model.graph.input.extend(kept)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    graph = eqfact.onnx.load(path)
    y, expected = eq.forward(graph, feeds), np.asarray(outputs[0])
    return y, expected.reshape(y.shape) if batch and expected.size == y.size else expected

@pytest.mark.parametrize("kind", [k for k in READERS if k not in ("Upsample", "GlobalLpPool", "Pow")])  # of other powers
def test_backend_cases(kind, tmp_path):
    passed, wrong = [], []
    assert cases()[kind]
    for name, case in cases()[kind].items():
        if not in_floats(case) and kind not in ("Shape", "Size"):
            continue
        why = next((why for why, names in EXCLUDED.items() if name.removeprefix("test_") in names.split()), None)
        try:
            y, expected = outcome(case, tmp_path / "case.onnx")
        except eqfact.onnx.OnnxError as error:
            if why is None:
                wrong.append(f"{name}: {error}")
            continue
        rtol = 2 * case.rtol if expected.dtype == np.float16 else case.rtol
        if y.shape != expected.shape or not np.allclose(y, expected, rtol=rtol, atol=max(case.atol, 1e-6)):
            wrong.append(f"{name}: {y.shape} {np.ravel(y)[:4]}, expected {expected.shape} {np.ravel(expected)[:4]}")
        elif why is not None:
            wrong.append(f"{name} is listed as excluded ({why}), but it is computed")
        else:
            passed.append(name)
    assert not wrong, "\n" + "\n".join(wrong)
    assert passed or kind in NOTHING_LEFT, "no case of this op is computed"

def test_every_excluded_case_exists():
    every = {name.removeprefix("test_") for of_kind in cases().values() for name in of_kind}
    assert not {name for names in EXCLUDED.values() for name in names.split()} - every

# ------------------------------------------------------------------------------------------------ files of an old PyTorch

ROOT = os.path.join(os.path.dirname(onnx.__file__), "backend", "test", "data")
FILES = sorted(os.path.basename(f) for f in glob.glob(os.path.join(ROOT, "pytorch-converted", "*")))
#: Op types without a counterpart, in the files of that folder.
NO_COUNTERPART = ("ELU", "Embedding", "Embedding_sparse", "LogSoftmax", "PoissonNLLLLoss_no_reduce",
                  "SELU",
                  "Softplus", "Softsign", "log_softmax_dim3", "log_softmax_lastdim")

@pytest.mark.parametrize("name", FILES)
def test_files_that_pytorch_wrote(name):
    folder = os.path.join(ROOT, "pytorch-converted", name)
    path = os.path.join(folder, "model.onnx")
    if name.removeprefix("test_") in NO_COUNTERPART:
        with pytest.raises(eqfact.onnx.OnnxError, match=re.escape(path)):
            eqfact.onnx.load(path)
        return

    def tensor(file):
        with open(os.path.join(folder, "test_data_set_0", file), "rb") as stream:
            return numpy_helper.to_array(onnx.TensorProto.FromString(stream.read()))

    graph = eqfact.onnx.load(path)
    y = eq.forward(graph, {value: tensor(f"input_{i}.pb") for i, value in enumerate(graph.inputs)})
    np.testing.assert_allclose(y, tensor("output_0.pb"), rtol=1e-4, atol=1e-5)
