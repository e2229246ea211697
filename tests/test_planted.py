"""Can the laws fail? Wrong implementations, each a mistake that was made somewhere before, and the law that catches it."""

import dataclasses

import numpy as np
import pytest
from nets import BY_NAME

import eqfact as eq
from eqfact import calibration, factorization
from eqfact.ops.base import Trace, channel_vector, spread
from eqfact.testing import laws


def graph(name):
    """The network built again, so that it is traced with what is planted."""
    net = BY_NAME[name].graph
    return eq.Graph(net.inputs, net.nodes, net.outputs)


def some(net):
    exponents = np.random.default_rng(3).integers(-4, 5, eq.degrees_of_freedom(net) + 1)
    exponents[0] = 0
    return eq.Factorization(eq.channels(net), np.exp2(exponents))


# ------------------------------------------------------------------------------------------------ laws on a network of the table


def every_value(name):
    net = graph(name)
    laws.rescaling_multiplies_every_value_by_its_factor(net, some(net), BY_NAME[name].data())


def function(name):
    net = graph(name)
    laws.rescaling_keeps_the_function(net, some(net), BY_NAME[name].data())


def freedom(name):
    laws.degrees_of_freedom_are_maximal(graph(name), BY_NAME[name].data())


def pins(name):
    laws.every_pin_is_needed(graph(name), BY_NAME[name].data())


def alone(name):
    laws.no_channel_moves_alone(graph(name))


def statistics(name):
    net = graph(name)
    laws.statistics_follow_the_factors(net, some(net), BY_NAME[name].data())


def shards(name):
    x = BY_NAME[name].data()["x"]
    laws.shards_add_up(graph(name), [x[:7], x[7:]])


def inverse(name):
    laws.inverse_undoes(graph(name), some(graph(name)))


def in_turn(name):
    net = graph(name)
    laws.composition_applies_in_turn(net, some(net), some(net))


def neutral(name):
    laws.identity_is_neutral(graph(name), some(graph(name)))


def commutes(name):
    a = some(graph(name))
    laws.composition_is_associative_and_commutes(a, a.inverse(), a @ a)


def magnitude(name):
    x = BY_NAME[name].data()["x"]
    laws.magnitude_bounds_forward(graph(name).nodes[0].op, [x])


# ------------------------------------------------------------------------------------------------ wrong implementations


def keeps_its_parameters(self, f_out, *f_in):
    return self


def forgets_the_bias(self, f_out, *f_in):
    ratio = np.asarray(f_out)[:, None] / f_in[0]
    return dataclasses.replace(self, weight=self.weight * ratio)


def multiplies_on_the_input_side(self, f_out, *f_in):
    return dataclasses.replace(self, weight=self.weight * (np.asarray(f_out)[:, None] * f_in[0]), bias=self.bias * f_out)


def conv_reading(channels_of):
    """Conv.rescale with another idea of which factor belongs to which of the ``in // groups`` weights of an output channel."""

    def rescale(self, f_out, *f_in):
        out, inner, *kernel = self.weight.shape
        ratio = np.array([[f_out[o] / f_in[0][channels_of(o, i, out, inner, self.groups)] for i in range(inner)] for o in range(out)])
        return dataclasses.replace(self, weight=self.weight * ratio.reshape(out, inner, *(1 for _ in kernel)), bias=self.bias * f_out)

    return rescale


first_group_for_all = conv_reading(lambda o, i, out, inner, groups: i)
groups_interleaved = conv_reading(lambda o, i, out, inner, groups: i * groups + o // (out // groups))
outputs_interleaved = conv_reading(lambda o, i, out, inner, groups: o % groups * inner + i)


def forgets_the_mean(self, f_out, *f_in):
    return dataclasses.replace(self, gamma=self.gamma * f_out / f_in[0], beta=self.beta * f_out)


def scales_the_variance(self, f_out, *f_in):
    f = f_in[0]
    return dataclasses.replace(self, gamma=self.gamma * f_out, beta=self.beta * f_out, mean=self.mean * f, var=self.var * f**2)


def only_the_upper_bound(self, f_out, *f_in):
    return dataclasses.replace(self, high=self.high * f_out)


def the_largest_bound_for_all(self, f_out, *f_in):
    return dataclasses.replace(self, low=self.low * f_out.max(), high=self.high * f_out.max())


def passes(self, trace, *inputs):
    """Every factor goes through, nothing is tied."""
    return spread(channel_vector(inputs[0]), self.output_shape(*(x.shape for x in inputs)))


def broadcasts_without_ties(self, trace, *inputs):
    shape = self.output_shape(*(x.shape for x in inputs))
    return spread(channel_vector(max(inputs, key=len)), shape)


def pins_its_input_only(self, trace, *inputs):
    for x in inputs:
        trace.pin(x, "planted")
    return trace.fresh(self.output_shape(*(x.shape for x in inputs)))


def pins_everything(self, trace, *inputs):
    out = pins_its_input_only(self, trace, *inputs)
    trace.pin(out, "planted")
    return out


def pins_what_passes(self, trace, *inputs):
    for x in inputs:
        trace.tie(inputs[0], x)
        trace.pin(x, "planted")
    return passes(self, trace, *inputs)


def ties_all_channels(self, trace, *inputs):
    for x in inputs:
        trace.tie(np.broadcast_to(channel_vector(inputs[0])[:1], len(x)), x)
    return passes(self, trace, *inputs)


def the_sum_for_the_difference(self, trace, *inputs):
    y = trace.fresh(self.output_shape(*(x.shape for x in inputs)))
    trace.relate((1, y), *((1, x) for x in inputs), reason="planted")
    return y


def once_for_twice(self, trace, *inputs):
    y = trace.fresh(self.output_shape(*(x.shape for x in inputs)))
    trace.relate((1, y), *((-1, x) for x in {id(x): x for x in inputs}.values()), reason="planted")
    return y


def ties_queries_to_keys(self, trace, *inputs):
    q, k = map(channel_vector, inputs)
    trace.tie(q, self._repeated(k).reshape(-1))
    return trace.fresh(self.output_shape(*(x.shape for x in inputs)))


def heads_in_turn(self, of_kv):
    return np.tile(of_kv.reshape(self.kv_heads, -1), (self.heads // self.kv_heads, 1))


def absorbs_without_ties(self, trace, *inputs):
    return trace.absorb(self, inputs[0], inputs[0].shape)


def normalised(eps):
    """The rescaled normalisation, with another eps."""
    def rescale(self, f_out, *f_in):
        beta = None if self.beta is None else self.beta * f_out
        return dataclasses.replace(self, gamma=self.gamma * f_out, beta=beta, eps=eps(self, f_in[0].reshape(self.norm_groups, -1)))
    return rescale


eps_forgotten = normalised(lambda op, f: op.eps)
eps_times_s = normalised(lambda op, f: op.eps * f[:, 0])
mean_eps = normalised(lambda op, f: op.eps * np.mean(f, axis=1) ** 2)
for made, name in ((eps_forgotten, "eps_forgotten"), (eps_times_s, "eps_times_s"), (mean_eps, "mean_eps")):
    made.__name__ = name


def slope_multiplied(self, f_out, *f_in):
    return dataclasses.replace(self, slope=self.slope * f_out)


def repeats_pixel_last(self, trace, *inputs):
    return np.tile(channel_vector(inputs[0]), inputs[0][0].size)


def transposes_without_ties(self, trace, *inputs):
    return spread(channel_vector(inputs[0].transpose(self.axes)), self.output_shape(inputs[0].shape))


def unflattens_without_ties(self, trace, *inputs):
    return spread(channel_vector(inputs[0].reshape(self.shape)), self.shape)


def without(reason):
    """Trace.pin, blind for pins of one kind."""
    pin = Trace.pin

    def blind(self, labels, given):
        if reason not in given:
            pin(self, labels, given)

    return blind


def fresh_at_every_use(self, op, read, shape):
    return self.fresh(shape)


def reversed_concat(self, *vectors):
    return np.concatenate(vectors[::-1])


def inverse_permutation(self, *vectors):
    return vectors[0][np.argsort(self.order)]


def from_the_first_channel(self, *vectors):
    (labels,) = vectors
    return labels[:len(labels[self.start:self.stop])]


def squares_forgotten(self, factor):
    return dataclasses.replace(self, **{key: getattr(self, key) * factor for key in ("min", "max", "sum", "sum_square")})


def range_forgotten(self, factor):
    return dataclasses.replace(self, sum=self.sum * factor, sum_square=self.sum_square * factor**2)


def count_forgotten(self, other):
    return dataclasses.replace(self, min=np.minimum(self.min, other.min), max=np.maximum(self.max, other.max),
                               sum=self.sum + other.sum, sum_square=self.sum_square + other.sum_square)


def last_range_wins(self, other):
    return dataclasses.replace(other, count=self.count + other.count, sum=self.sum + other.sum,
                               sum_square=self.sum_square + other.sum_square)


right_apply = eq.Factorization.apply


def applies_the_inverse(self, target):
    return right_apply(self.inverse(), target)


def applies_nothing(self, target):
    return target


def itself(self):
    return self


def the_left_one(self, other):
    return self


def the_quotient(self, other):
    return eq.Factorization(self.channels, self.by_label / other.by_label)


def nothing_refused(*_, **__):
    pass


def signs_kept(self, errors, inputs, u):
    return dataclasses.replace(self, bias=None).forward(*errors)


Stats = calibration.ValueStatistics

PLANTED = [
    # weights
    (eq.Dense, {"rescale": forgets_the_bias}, every_value, "chain", "differ"),
    (eq.Dense, {"rescale": multiplies_on_the_input_side}, every_value, "chain", "differ"),
    (eq.Dense, {"rescale": keeps_its_parameters}, every_value, "chain", "differ"),
    (eq.Conv, {"rescale": first_group_for_all}, every_value, "grouped", "differ"),
    (eq.Conv, {"rescale": groups_interleaved}, every_value, "grouped", "differ"),
    (eq.Conv, {"rescale": outputs_interleaved}, every_value, "depthwise", "differ"),
    (eq.ConvTranspose, {"rescale": first_group_for_all}, every_value, "transposed", "differ"),
    (eq.BatchNorm, {"rescale": forgets_the_mean}, every_value, "batchnorms", "differ"),
    (eq.BatchNorm, {"rescale": scales_the_variance}, every_value, "batchnorms", "differ"),
    (Trace, {"absorb": fresh_at_every_use}, freedom, "conv used twice", "called free"),
    (Trace, {"absorb": fresh_at_every_use}, freedom, "siamese", "called free"),
    # limits
    (eq.Clip, {"rescale": keeps_its_parameters}, every_value, "all activations", "differ"),
    (eq.Clip, {"rescale": only_the_upper_bound}, every_value, "all activations", "differ"),
    (eq.Clip, {"rescale": the_largest_bound_for_all}, every_value, "all activations", "differ"),
    # ties and labels
    (eq.Add, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "residual", "differ"),
    (eq.Add, {"trace": passes, "rescale": keeps_its_parameters}, freedom, "residual", "called free"),
    (eq.Add, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "residual onto the input", "differ"),
    (eq.Add, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "add over space", "differ"),
    (eq.Add, {"trace": ties_all_channels}, freedom, "residual", "called free"),
    (eq.Sub, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "difference", "differ"),
    (eq.Max, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "maximum", "differ"),
    (eq.Add, {"trace": broadcasts_without_ties, "rescale": keeps_its_parameters}, every_value, "one channel joined to all", "differ"),
    (eq.Extend, {"rescale": keeps_its_parameters}, every_value, "constants beside values", "differ"),
    (eq.Extend, {"trace": pins_everything}, freedom, "constants beside values", "0 factors are called free, the equations leave 5"),
    (eq.Flatten, {"trace": repeats_pixel_last, "rescale": keeps_its_parameters}, every_value, "flatten", "differ"),
    (eq.Flatten, {"trace": repeats_pixel_last, "rescale": keeps_its_parameters}, every_value, "flatten, then add", "differ"),
    (eq.Unflatten, {"trace": unflattens_without_ties, "rescale": keeps_its_parameters}, every_value, "unflatten", "differ"),
    (eq.Transpose, {"trace": transposes_without_ties, "rescale": keeps_its_parameters}, every_value, "transpose", "differ"),
    (eq.Concat, {"carry": reversed_concat}, every_value, "concat", "differ"),
    (eq.Permute, {"carry": inverse_permutation}, every_value, "shuffle", "differ"),
    (eq.Slice, {"carry": from_the_first_channel}, every_value, "slice", "differ"),
    (factorization, {"_refuse": nothing_refused}, alone, "residual", "a factor is accepted for"),
    (factorization, {"_refuse": nothing_refused}, alone, "flatten", "a factor is accepted for"),
    # pins: too few
    (eq.Sigmoid, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "sigmoid", "differ"),
    (eq.Sigmoid, {"trace": pins_its_input_only, "rescale": keeps_its_parameters}, every_value, "sigmoid", "differ"),
    (eq.Softmax, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "softmax", "differ"),
    (eq.Mul, {"trace": ties_all_channels, "rescale": keeps_its_parameters}, every_value, "product", "differ"),
    # products
    (eq.Mul, {"trace": the_sum_for_the_difference, "rescale": keeps_its_parameters}, every_value, "product", "differ"),
    (eq.Mul, {"trace": once_for_twice, "rescale": keeps_its_parameters}, every_value, "square", "differ"),
    (eq.Mul, {"trace": pins_everything, "rescale": keeps_its_parameters}, freedom, "product", "4 factors are called free, .* leave 10"),
    (eq.Scores, {"trace": ties_queries_to_keys, "rescale": keeps_its_parameters}, every_value, "attention", "differ"),
    (eq.Scores, {"_repeated": heads_in_turn, "rescale": keeps_its_parameters}, every_value, "grouped queries, rotary", "differ"),
    (eq.Mix, {"_repeated": heads_in_turn, "rescale": keeps_its_parameters}, every_value, "grouped queries, rotary", "differ"),
    (eq.Rotary, {"trace": passes, "rescale": keeps_its_parameters}, every_value, "grouped queries, rotary", "differ"),
    (eq.Rotary, {"trace": ties_all_channels}, freedom, "grouped queries, rotary", "9 factors are called free, .* leave 12"),
    (eq.LayerNorm, {"rescale": eps_forgotten}, every_value, "layernorm", "differ"),
    (eq.LayerNorm, {"rescale": eps_times_s}, every_value, "layernorm", "differ"),
    (eq.InstanceNorm, {"rescale": eps_forgotten}, every_value, "instancenorm", "differ"),
    (eq.GroupNorm, {"trace": absorbs_without_ties, "rescale": mean_eps}, every_value, "groupnorm", "differ"),
    (eq.Sloped, {"rescale": slope_multiplied}, every_value, "slopes", "differ"),
    (eq.Pad, {"_transparent": True}, every_value, "pad with a constant", "differ"),
    (Trace, {"pin": without("network output")}, function, "chain", "output 'fc2' of the rescaled network"),
    (Trace, {"pin": without("network output")}, function, "inner value that is an output", "output 'act' of the rescaled network"),
    (Trace, {"pin": without("network input")}, every_value, "chain", "value 'x'"),
    # pins: too many
    (eq.LeakyReLU, {"trace": pins_everything}, freedom, "all activations", "0 factors are called free, the equations leave 4"),
    (eq.LeakyReLU, {"trace": pins_what_passes}, pins, "all activations", "are pinned, but doubling them changes no output"),
    (eq.Add, {"trace": pins_everything}, freedom, "residual", "6 factors are called free, the equations leave 10"),
    (eq.Add, {"trace": pins_what_passes}, pins, "add over space", "are pinned, but doubling them changes no output"),
    # the group
    (eq.Factorization, {"apply": applies_the_inverse}, every_value, "chain", "differ"),
    (eq.Factorization, {"apply": applies_nothing}, every_value, "chain", "differ"),
    (eq.Factorization, {"inverse": itself}, inverse, "chain", "factors of"),
    (eq.Factorization, {"__matmul__": the_left_one}, in_turn, "chain", "is"),
    (eq.Factorization, {"__matmul__": the_left_one}, neutral, "chain", "factors of"),
    (eq.Factorization, {"__matmul__": the_quotient}, commutes, "chain", "factors of"),
    # statistics
    (Stats, {"rescaled": squares_forgotten}, statistics, "chain", "sum_square of"),
    (Stats, {"rescaled": range_forgotten}, statistics, "chain", "min of"),
    (Stats, {"__add__": count_forgotten}, shards, "chain", "count of"),
    (Stats, {"__add__": last_range_wins}, shards, "chain", "m(in|ax) of"),
    # rounding bounds
    (eq.ops.Weighted, {"passes": signs_kept}, magnitude, "chain", "exceeds its magnitude bound"),
]


def plant_name(case):
    owner, wrong, law, net, _ = case
    mistake = " ".join(w.__name__ if callable(w) else key for key, w in wrong.items())
    return f"{owner.__name__.rpartition('.')[2]} {mistake} - {law.__name__} of {net}"


@pytest.mark.parametrize("case", PLANTED, ids=plant_name)
def test_the_law_catches_the_planted_mistake(case, monkeypatch):
    owner, wrong, law, net, message = case
    law(net)  # without the plant all is well
    for attribute, value in wrong.items():
        monkeypatch.setattr(owner, attribute, value)
    with pytest.raises(AssertionError, match=message):
        law(net)


@pytest.mark.parametrize(("wrong", "net"), [(applies_the_inverse, "chain"), (applies_nothing, "residual")], ids=["inverse", "nothing"])
def test_invariance_alone_misses_some_mistakes(wrong, net, monkeypatch):
    """Why the laws ask for every value, not only for the outputs."""
    monkeypatch.setattr(eq.Factorization, "apply", wrong)
    function(net)


def test_a_law_about_ones_says_nothing():
    """Some nets have no freedom: a law that holds there must be tried on another net, too."""
    net = graph("one layer")
    assert np.all(some(net).by_label == 1)


def test_relu6_without_its_limit_is_another_function():
    """What the tools do (ReLU6 becomes ReLU) changes what saturates."""
    net = BY_NAME["all activations"].graph
    opened = net.with_ops({"clip": eq.Clip(-1.5, np.inf)})
    x = BY_NAME["all activations"].data()
    assert not np.array_equal(eq.forward(opened, x), eq.forward(net, x))
