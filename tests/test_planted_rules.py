"""Can the laws of rules, folding, quantizers and verify fail? Wrong implementations, each of a kind that others have shipped."""

from __future__ import annotations

import dataclasses
import math

import handmade
import numpy as np
import pytest
import test_equalization
import test_folding
import test_metrics
import test_quantization
import test_rules
from handmade import Maker

import eqfact as eq
from eqfact import accumulators, blocks, folding, methods, quantization, rules, verification
from eqfact.ops import base, grid
from eqfact.ops.base import Weighted


@pytest.fixture
def caught(monkeypatch):
    """Plant a wrong implementation, and see that a law that holds without it fails with it."""

    def check(law, *planted):
        law()
        with monkeypatch.context() as planting:
            for owner, name, wrong in planted:
                planting.setattr(owner, name, wrong)
            with pytest.raises((AssertionError, ValueError, RuntimeWarning)):
                law()

    return check


def keeps_the_function_of(build, method="cross_layer"):
    def law():
        m = Maker(1)
        graph = build(m)
        x = 3 * m.data(graph)
        test_equalization.keeps_the_function(graph, x, test_equalization.equalized(graph, x, method), method)

    return law


def converges_on(build):
    return lambda: test_equalization.made_equals_read(eq.equalize(build(Maker(2)), eq.CrossLayer(tol=1e-9, max_bias=np.inf)), 1e-7)


# ------------------------------------------------------------------------------------------------ rules


def test_a_rule_with_one_over_f_is_caught(caught):
    """The DFQ paper's s is 1/f. Invariance holds for any factors, so only the optimality laws can see it."""
    right = rules.cross_layer
    wrong = (methods, "cross_layer", lambda block: 1 / right(block))
    caught(converges_on(handmade.plain), wrong)
    caught(test_equalization.test_cross_layer_by_hand, wrong)


def test_a_rule_with_the_ratio_instead_of_its_root_is_caught(caught):
    wrong = (methods, "cross_layer", lambda block: rules.cross_layer(block) ** 2)
    caught(test_equalization.test_cross_layer_by_hand, wrong)


def test_one_step_with_the_largest_over_the_wrong_channels_is_caught(caught):
    def swapped(maker, m, max_factor):
        f = np.minimum(maker.kernel / maker.kernel.min(), max_factor)
        return np.minimum(f, maker.activation / maker.activation.min())

    caught(test_rules.test_one_step_is_the_papers_formula, (rules, "_amplify", swapped))


def test_two_step_that_forgets_m_is_caught(caught):
    """Fault 1 of the authors' script: with one consumer, two-step was one-step."""
    wrong = (rules, "two_step", rules.one_step)
    caught(test_rules.test_two_step_is_the_papers_formula, wrong)
    wrong = (methods, "two_step", rules.one_step)
    caught(test_equalization.test_fault_1_two_step_differs_from_one_step_on_a_plain_chain_with_one_consumer, wrong)
    caught(lambda: test_equalization.test_the_papers_rules_agree_with_a_step_by_step_implementation("two_step", True, 0), wrong)


def test_a_forgotten_bound_of_16_is_caught(caught):
    right = rules._amplify
    caught(test_rules.test_one_step_factors_lie_within_1_and_16, (rules, "_amplify", lambda maker, m, _: right(maker, m, math.inf)))


def test_a_dead_channel_that_gets_an_infinite_factor_is_caught(caught):
    """torch.ao: range 0 gives NaN or infinity, and a loop without end."""
    def unguarded(block):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(block.read / block.made)

    wrong = (methods, "cross_layer", unguarded)
    law = test_equalization.test_dead_nearly_dead_constant_subnormal_and_huge_channels
    for kind in ("dead", "constant"):
        caught(lambda kind=kind: law(kind, "float64", "cross_layer"), wrong)


def test_nearly_dead_channels_that_are_blown_up_are_caught(caught):
    caught(lambda: test_equalization.test_dead_nearly_dead_constant_subnormal_and_huge_channels("1e-12", "float64", "cross_layer"),
           (methods, "METHODS", {"cross_layer": lambda: eq.CrossLayer(max_factor=1e12)}))


def test_residual_partners_that_do_not_limit_each_other_are_caught(caught):
    caught(test_rules.test_residual_sharing_by_hand, (rules, "_share", lambda candidates: candidates.max(axis=0, keepdims=True)))


def test_a_concat_without_lift_is_caught(caught):
    wrong = (rules, "_lift", lambda block, f: 1.0)
    caught(test_rules.test_concat_mates_are_lifted_to_a_common_range_after_the_bound, wrong)
    caught(lambda: test_equalization.test_the_concat_rule_of_the_paper_lifts_the_mates_to_one_range("one_step"), wrong)


# ------------------------------------------------------------------------------------------------ the loop


def test_readers_beyond_the_first_that_are_forgotten_are_caught(caught):
    right = blocks.BlockPlan.largest

    def first_only(plan, places, ranges):
        return right(plan, places[:1], ranges[:1])

    caught(test_equalization.test_m_is_the_largest_over_all_readers, (blocks.BlockPlan, "largest", first_only))
    caught(converges_on(handmade.fan_out), (blocks.BlockPlan, "largest", first_only))


def test_a_depthwise_kernel_range_that_collapses_to_one_number_is_caught(caught):
    """Fault 2 of the authors' script."""
    right = blocks.Layer.made_range

    def collapsed(layer, f):
        k = right(layer, f)
        return np.full_like(k, k.max()) if layer.op.groups > 1 else k

    wrong = (blocks.Layer, "made_range", collapsed)
    caught(lambda: test_equalization.test_fault_2_outputs_of_depthwise_layers_are_amplified("one_step"), wrong)
    caught(converges_on(handmade.mobile), wrong)


def test_ranges_of_stale_weights_are_caught(caught):
    """Ranges taken once, before earlier layers were rescaled."""
    right = blocks.Layer.made_range
    wrong = (blocks.Layer, "made_range", lambda layer, f: right(layer, np.where(np.arange(len(f)) < 5, 1.0, f)))
    caught(lambda: test_equalization.test_the_papers_rules_agree_with_a_step_by_step_implementation("one_step", False, 1), wrong)


def test_maxima_instead_of_magnitudes_of_activations_are_caught(caught):
    """Fault 6 of the authors' script."""
    caught(test_equalization.test_fault_6_outputs_without_relu_range_over_their_magnitude,
           (eq.ValueStatistics, "max_abs", property(lambda self: np.maximum(self.max, 0))))


def test_a_factor_on_the_wrong_side_of_the_reader_is_caught(caught):
    right = Weighted.rescale
    wrong = (Weighted, "rescale", lambda op, f_out, *f_in: right(op, f_out, *(1 / f for f in f_in)))
    for method in test_equalization.METHODS:
        caught(keeps_the_function_of(handmade.plain, method), wrong)


def test_a_bias_that_is_not_rescaled_is_caught(caught):
    right = Weighted.rescale
    wrong = (Weighted, "rescale", lambda op, f_out, *f_in: dataclasses.replace(right(op, f_out, *f_in), bias=op.bias))
    caught(keeps_the_function_of(handmade.plain), wrong)


def test_relu6_that_stays_at_6_is_caught(caught):
    caught(keeps_the_function_of(handmade.mobile), (eq.Clip, "rescale", lambda op, f_out, *f_in: op))


def test_an_unpinned_output_is_caught(caught):
    """Fault 3 of the authors' script: a layer that feeds a conv and an output."""
    def law():
        m = Maker(4)
        plain = handmade.plain(m)
        graph = eq.Graph(dict(plain.inputs), plain.nodes, ["act1", "fc"])
        x = m.data(graph)
        test_equalization.keeps_the_function(graph, x, eq.equalize(graph), "cross_layer")

    right = base.Trace.pin

    def without_act1(trace, labels, reason):
        if "act1" not in reason:
            right(trace, labels, reason)

    caught(law, (base.Trace, "pin", without_act1))


def test_factors_that_are_rounded_to_no_power_of_two_are_caught(caught):
    def law():
        m = Maker(5)
        graph = handmade.plain(m)
        x = m.data(graph)
        test_equalization.bit_identical(graph, x, eq.equalize(graph, exact=True))

    caught(law, (eq.Factorization, "power_of_two", lambda f: eq.Factorization(f.channels, np.round(f.by_label, 1))))


# ------------------------------------------------------------------------------------------------ folding


def folds(layer, bias=True):
    return lambda: test_folding.test_a_batchnorm_folds_into_the_layer_before_it(test_folding.LAYERS[layer], bias, "float64")


def test_folding_that_forgets_an_existing_bias_is_caught(caught):
    right = folding._scaled_rows
    wrong = (folding, "_scaled_rows", lambda op, s, t: dataclasses.replace(right(op, s, t), bias=t))
    caught(folds("conv 2d"), wrong)
    caught(test_folding.test_bug_an_existing_bias_is_scaled_and_kept, wrong)


def test_folding_that_does_not_scale_the_bias_is_caught(caught):
    right = folding._scaled_rows
    caught(folds("dense"), (folding, "_scaled_rows", lambda op, s, t: dataclasses.replace(right(op, s, t), bias=op.bias + t)))


@pytest.mark.parametrize("layer", ["square conv", "square transposed", "grouped"])
def test_folding_along_the_input_channels_is_caught(caught, layer):
    right = folding._scaled_rows

    def wrong_axis(op, s, t):
        slopes = np.resize(s, op.weight.shape[1]).reshape(1, -1, *(1,) * (op.weight.ndim - 2))
        return dataclasses.replace(right(op, s, t), weight=op.weight * slopes)

    caught(folds(layer), (folding, "_scaled_rows", wrong_axis))


def test_one_eps_for_all_batchnorms_is_caught(caught):
    right = folding._affine
    wrong = (folding, "_affine", lambda node: right(dataclasses.replace(node, op=dataclasses.replace(node.op, eps=1e-5))))
    caught(test_folding.test_bug_each_batchnorm_has_its_own_eps, wrong)
    caught(folds("conv 1d"), wrong)


def test_folding_across_a_value_with_another_reader_is_caught(caught):
    wrong = (folding, "_not_alone", lambda *_: None)
    caught(test_folding.test_a_batchnorm_behind_a_value_with_another_reader_stays, wrong)
    caught(test_folding.test_a_batchnorm_behind_a_shared_conv_stays, wrong)


def test_folding_a_shift_through_padding_is_caught(caught):
    right = folding._into_reader

    def blind(graph, node):
        reader = graph.readers[node.name][0]
        padless = graph.with_ops({reader.name: dataclasses.replace(reader.op, padding=0)})
        folded = right(padless, node)
        padded = dataclasses.replace(folded[reader.name].op, padding=reader.op.padding)
        return folded.with_ops({reader.name: padded})

    caught(lambda: test_folding.test_a_batchnorm_before_padding_stays_if_it_shifts("conv 1d"), (folding, "_into_reader", blind))


# ------------------------------------------------------------------------------------------------ quantizers


def test_rounding_half_up_instead_of_to_even_is_caught(caught):
    wrong = (grid, "rounded", lambda x, rounding: np.floor(np.asarray(x) + 0.5))
    caught(test_quantization.test_ties_go_to_even_by_default, wrong)
    caught(lambda: test_quantization.test_ties_by_hand("half_even", [-2, -2, 0, 0, 2, 2]), (test_quantization, "rounded", wrong[2]))


def test_a_zero_point_that_is_not_clipped_into_the_grid_is_caught(caught):
    """A range that does not hold zero, not widened: zero is not on the grid."""
    def unwidened(quantizer, low, high):
        scale = (np.asarray(high) - low) / (quantizer.qmax - quantizer.qmin)
        return grid.Grid(scale, np.rint(quantizer.qmin - low / scale), quantizer.qmin, quantizer.qmax)

    caught(test_quantization.test_grids_by_hand, (eq.UniformQuantizer, "grid", unwidened))


def test_values_that_wrap_around_instead_of_saturating_are_caught(caught):
    def wrapping(self, x):
        q = np.rint(np.asarray(x, float) / self.scale) + self.zero_point
        return ((q - self.qmin) % (self.qmax - self.qmin + 1) + self.qmin).astype(np.int64)

    def law():
        assert eq.UniformQuantizer(bits=4).grid(-7.0, 7.0).quantize([8.0, -9.0, 100.0]).tolist() == [7, -8, 7]

    caught(law, (grid.Grid, "quantize", wrapping))


def test_per_channel_scales_of_input_channels_are_caught(caught):
    right = eq.UniformQuantizer.weight_grid

    def by_columns(quantizer, op):
        if quantizer.granularity != "per_channel":
            return right(quantizer, op)
        top = np.abs(op.weight).max(axis=(0, *range(2, op.weight.ndim)), keepdims=True)
        return quantizer.grid(-top, top)

    caught(lambda: test_quantization.test_weights_that_share_a_scale_are_those_of_the_granularity("per_channel", None, "dense"),
           (eq.UniformQuantizer, "weight_grid", by_columns))


def test_biases_on_the_grid_of_the_weights_are_caught(caught):
    right = accumulators.on_accumulator

    def coarse(op, step, input_grid):
        return right(op, op.grid.scale.reshape(-1), input_grid)

    caught(test_quantization.test_a_quantized_layer_computes_what_integers_compute, (accumulators, "on_accumulator", coarse))


def test_sums_that_are_rounded_as_floats_are_caught(caught):
    right = grid.Grid.quantize
    caught(test_quantization.test_sums_in_the_middle_of_two_steps_go_to_even_whatever_float_made_of_them,
           (grid.Grid, "quantize", lambda self, x, step=None: right(self, x)))


def test_a_step_of_another_layer_is_caught(caught):
    right = accumulators.accumulator_step
    caught(lambda: test_quantization.test_layers_store_the_whole_numbers_that_an_integer_engine_stores(
        handmade.plain, "float32", "per_tensor", False), (accumulators, "accumulator_step", lambda *args: 3 * right(*args)))


def test_bounds_that_are_left_between_two_steps_are_caught(caught):
    def unrounded(node, bounds, rounding, dtype, fresh):
        (value,) = node.inputs
        clip = eq.Clip(*bounds)
        return [eq.Node(f"{value}.quantized", rounding, (value,)), dataclasses.replace(node, op=clip, inputs=(f"{value}.quantized",))]

    caught(test_quantization.test_clips_on_rounded_values_are_rounded_clips, (quantization, "_rounded_then_clipped", unrounded))


def test_a_forgotten_value_that_engines_store_is_caught(caught):
    right = quantization.stored_values
    caught(lambda: test_quantization.test_an_inner_output_is_rounded_where_it_is_read(),
           (quantization, "stored_values", lambda graph, outputs=False: [v for v in right(graph, outputs=outputs) if v != "act1"]))


# ------------------------------------------------------------------------------------------------ verification


def test_a_verify_that_always_says_yes_is_caught(caught):
    right = verification._Compared.agreement
    caught(lambda: test_metrics.test_a_bias_forgotten_when_rescaling_is_found("float64"),
           (verification._Compared, "agreement", lambda *args: dataclasses.replace(right(*args), excess=0.0, near=True, sharp=True)))


def test_a_verify_that_trusts_a_bare_relative_tolerance_is_caught(caught):
    """PAPER 8: through cancellation the elementwise relative error of an equivalent network reaches percents."""
    def bare(compared, near):
        return verification._Agreement(float(compared.error.max()), 1e-7, float(compared.error.max()) / 1e-7, near=True, sharp=True)

    law = test_metrics.test_every_rescaled_network_is_equal_and_itself_without_error
    caught(lambda: law(handmade.plain, "float32"), (verification._Compared, "agreement", bare))


@pytest.mark.parametrize(("owner", "end"), [(base.Commuting, "relu6"), (eq.Sigmoid, "sigmoid"), (eq.Softmax, "softmax")], ids=str)
def test_an_op_that_passes_magnitudes_for_errors_is_caught(owner, end, caught):
    """What was asked of ops once: how large may the output be? A bound, or the 1 of a sigmoid, is not as small as an error."""
    def magnitude(self, errors, inputs, u):
        largest = max(float(np.max(np.abs(bound))) for bound in getattr(self, "bounds", None) or (1.0, 1.0))
        return np.maximum(np.maximum.reduce(errors), largest)

    law = test_metrics.test_a_change_of_a_small_channel_is_found_whatever_comes_behind
    caught(lambda: law("float32", end, 1e-8), (owner, "passes", magnitude), (owner, "rounds", lambda self, inputs, output: self.roundings))


def test_a_verify_that_reads_every_factor_off_the_data_and_forgets_the_weights_is_caught(caught):
    """Then the doubt about the factors grows from layer to layer, until a wrong weight hides in it."""
    right = verification._read_off_weights
    law = test_metrics.test_fifty_layers_are_still_equal_after_cross_layer_and_one_percent_in_the_middle_is_still_found
    caught(lambda: law("float32"), (verification, "_read_off_weights", lambda a, b: (right(a, b)[0], np.full(a.shape[1], -1.0))))
