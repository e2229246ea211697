"""How does equalization fit into a ``torch.fx`` pipeline? ``fold_batchnorm``, ``channels``, ``rescale`` and ``equalize`` of a GraphModule.

Run as a program, this file answers levels 0 to 4 of the conformance kit (docs/porting.md, whose laws stand beside the code):

    eqfact conform --cmd "python docs/ports/torch_fx.py" --level 0-4

The idea: *labels by interpretation*. A label is the number of an unknown factor. A walk over the module computes, beside each value, a
tensor of labels of the value's shape ``(1, ...)``. Layers make fresh labels. What only moves entries is run by torch itself, on the labels;
so no move needs a rule. What joins entries ties their labels, what multiplies them states a relation, what is unknown pins. The solution
of all that says which factors may be chosen. Nothing of eqfact's analysis is used: only its JSON, and its ``to_torch``, which makes the
modules of questions. Functions work on the module in place; ``copy.deepcopy`` keeps one.
"""

from __future__ import annotations

import json
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

Shapes = Mapping[str, tuple[int, ...]]
Form = dict[int, Fraction]

#: Two labels: of an entry that is 0 or infinite, which any factor leaves as it is; and of one whose factor is 1.
NOTHING, ONE = 0, 1
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _InstanceNorm)
LAYERS = (nn.Linear, _ConvNd, _BatchNorm, *NORMS)
#: Layers and norms of which the channels are the last axis; axis 1 for all others.
LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
CLIPS = (nn.ReLU6, nn.Hardtanh)
#: ``op(f x) = f op(x)`` for every ``f > 0``, entry by entry; the bounds of clips take the factor up.
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, *CLIPS)
ACTIVATIONS = HOMOGENEOUS
MOVING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Upsample, nn.Dropout)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d,
         nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
MOVES = {torch.cat, torch.movedim, torch.index_select, torch.repeat_interleave, torch.permute, torch.reshape, torch.flatten,
         torch.transpose, operator.getitem, "permute", "reshape", "unflatten", "flatten", "transpose", "expand", "view", "squeeze",
         "unsqueeze", "contiguous"}
JOINS = {operator.add, operator.sub, torch.add, torch.sub, torch.maximum, torch.minimum}
SAME = {operator.neg, torch.abs, torch.neg, torch.clamp, torch.relu, nn.functional.relu}
PRODUCTS = {operator.mul: 1, torch.mul: 1, operator.truediv: -1, torch.div: -1}


# ---------------------------------------------------------------------------------------------------------------
# Level 2: which factors are free?


@dataclass
class Layer:
    """A module with weights: the lines that call it, and the labels of what it reads ``(in,)`` and makes ``(out,)``."""

    name: str
    module: Any
    read: Tensor
    made: Tensor
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def divides(self) -> bool:
        """Whether weights are divided by the factors of what they read; normalisations take them up in ``eps``."""
        return not isinstance(self.module, NORMS)


class Labels(fx.Interpreter):
    """A walk that runs a module on zeros, for the shapes, and keeps beside each value a tensor of labels of its shape."""

    def __init__(self, module: fx.GraphModule, named: set[fx.Node]) -> None:
        super().__init__(module)
        self.named, self.size = named, 2
        self.of: dict[fx.Node, Any] = {}
        self.constants: set[fx.Node] = set()
        #: Factors of slopes that multiply in front of a curve and divide behind it.
        self.slopes: dict[fx.Node, Tensor] = {}
        self.layers: dict[str, Layer] = {}
        self.ties: list[Tensor] = []
        self.relations: set[tuple[tuple[int, int], ...]] = set()

    def run_node(self, n: fx.Node) -> Any:
        real = super().run_node(n)
        label = self.label(n, real) if isinstance(real, Tensor) else real  # sizes are what they are
        if n in self.named:  # a factor belongs to a channel: one for all of space
            rows = label[0].reshape(label.shape[1], -1)
            top = rows.amax(1)
            top = torch.where(top == NOTHING, self.fresh(len(top)), top)
            self.tie(rows, top[:, None])
            label = torch.where(label == NOTHING, top.reshape(1, -1, *(1,) * (label.ndim - 2)), label)
        if n.op == "output":
            for of in n.all_input_nodes:
                self.tie(self.of[of], torch.tensor(float(ONE)))
        self.of[n] = label
        return real

    def label(self, n: fx.Node, real: Tensor) -> Tensor:
        """The labels of the value of a line. Laws: the table of docs/algebra.md."""
        shape = real.shape
        if n.op == "placeholder":
            return torch.full(shape, float(ONE), dtype=torch.float64)
        if n.op == "get_attr":
            self.constants.add(n)
            return self.fresh(real.numel()).reshape(shape) if real.is_floating_point() else real
        args, kwargs = (fx.node.map_arg(of, lambda a: self.of[a]) for of in (n.args, n.kwargs))
        x, target = args[0], n.target
        if n.op == "call_module":
            module = self.fetch_attr(str(target))
            if isinstance(module, LAYERS) and module.weight is not None:
                return self.layer(n, module, x, shape)
            if isinstance(module, HOMOGENEOUS):
                return x
            if isinstance(module, MOVING):
                return module(x)
            if isinstance(module, POOLS):
                return self.over(x, tuple(range(2, x.ndim))).expand(shape)
        elif target in MOVES:
            if all(a in self.constants for a in n.all_input_nodes):
                self.constants.add(n)
            return getattr(x, target)(*args[1:], **kwargs) if n.op == "call_method" else target(*args, **kwargs)
        elif target in SAME:
            return x
        elif target in JOINS:
            return self.join(n, args, shape)
        elif target in PRODUCTS:
            return self.product(n, args, PRODUCTS[target])
        elif target is torch.matmul:
            return self.matmul(n, *args)
        elif target is nn.functional.pad:
            value = kwargs.get("value") or 0.0
            return nn.functional.pad(x, args[1], value=NOTHING if value == 0 or math.isinf(value) else ONE)
        elif target in ("mean", torch.mean):
            axes = args[1] if len(args) > 1 else kwargs["dim"]
            return self.over(x, (axes,) if isinstance(axes, int) else tuple(axes)).reshape(shape)
        elif target in (torch.sqrt, operator.pow, torch.pow):
            power = Fraction(0.5 if target is torch.sqrt else args[1]).limit_denominator(64)
            y = self.determined(x[..., None])
            self.relate((power.denominator, y), (-power.numerator, x))
            return y
        for of in n.all_input_nodes:  # curves, and whatever is not known
            self.tie(self.of[of], torch.tensor(float(ONE)))
        return torch.full(shape, float(ONE), dtype=torch.float64)

    def layer(self, n: fx.Node, module: Any, x: Tensor, shape: torch.Size) -> Tensor:
        """What layers make is free of what they read; a layer that is called twice has one set of factors."""
        axis = x.ndim - 1 if isinstance(module, LAST) else 1
        read = self.over(x, tuple(i for i in range(x.ndim) if i != axis)).reshape(-1)
        if isinstance(module, NORMS):  # what is normalised together has one factor
            self.tie(read.reshape(groups_of(module), -1), read.reshape(groups_of(module), -1)[:, :1])
        made = self.fresh(shape[axis])
        first = self.layers.setdefault(str(n.target), Layer(str(n.target), module, read, made))
        first.nodes.append(n)
        self.tie(first.read, read)
        self.tie(first.made, made)
        return made.reshape(-1, *(1,) * (len(shape) - 1 - axis)).expand(shape)

    def join(self, n: fx.Node, args: Any, shape: torch.Size) -> Tensor:
        """``f a + g b = h (a + b)`` only if ``f = g = h``. A constant takes the factor up; a number cannot."""
        values = []
        for node, label in zip(n.args, args, strict=True):
            if not isinstance(node, fx.Node):
                values += [torch.tensor(float(ONE if node else NOTHING), dtype=torch.float64)]
            elif node not in self.constants:
                values += [label]
        result = values[0].expand(shape)
        for other in values[1:]:
            self.tie(result, other.expand(shape))
            result = torch.where(result == NOTHING, other.expand(shape), result)
        return result

    def product(self, n: fx.Node, args: Any, sign: int) -> Tensor:
        """``u_y = u_a + u_b``, or ``u_a - u_b``. Constants and numbers keep as they are, but slopes of curves: ``slope' = slope / f``."""
        a, b = (label if isinstance(node, fx.Node) and node not in self.constants else None
                for node, label in zip(n.args, args, strict=True))
        constant = n.args[1]
        if isinstance(constant, fx.Node) and constant in self.constants:
            users = {user.target for user in constant.users}
            if {operator.mul, operator.truediv} <= users:
                if constant not in self.slopes:
                    self.slopes[constant] = self.fresh(a.shape[1]).reshape(1, -1, *(1,) * (a.ndim - 2))
                b = self.slopes[constant]
        if a is None or b is None:
            return a if b is None else b
        a, b = torch.broadcast_tensors(a, b)
        y = self.determined(torch.stack([a, b], -1))
        y = torch.where((a == NOTHING) | (b == NOTHING), NOTHING, y)
        self.relate((1, y), (-1, a), (-sign, b))
        return y

    def matmul(self, n: fx.Node, a: Tensor, b: Tensor) -> Tensor:
        """Every term of ``y_ts = sum_d a_td b_ds`` has the factor of the sum: ``u_y = u_a + u_b`` for each ``d``."""
        if n.args[1] in self.constants:
            b = torch.full_like(b, ONE)
        a, b = torch.broadcast_tensors(a.unsqueeze(-2), b.mT.unsqueeze(-3))  # (..., t, s, d)
        y = self.determined(torch.cat([a, b], -1))
        self.relate((1, y[..., None].expand(a.shape)), (-1, a), (-1, b))
        return y

    def fresh(self, count: int) -> Tensor:
        """New labels."""
        self.size += count
        return torch.arange(self.size - count, self.size, dtype=torch.float64)

    def determined(self, keys: Tensor) -> Tensor:
        """New labels for entries that follow from others: one for each different row of ``keys`` ``(..., n)``."""
        rows, at = torch.unique(keys.reshape(-1, keys.shape[-1]), dim=0, return_inverse=True)
        return self.fresh(len(rows))[at].reshape(keys.shape[:-1])

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Equal factors, entry by entry."""
        pairs = torch.stack([of.reshape(-1) for of in torch.broadcast_tensors(a.double(), b.double())])
        self.ties.append(torch.unique(pairs[:, (pairs != NOTHING).all(0)], dim=1).long())

    def over(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The labels with these axes gone to one entry, of which all share the factor."""
        if not axes:
            return x
        top = x.amax(axes, keepdim=True)
        self.tie(x, top)
        return top

    def relate(self, *terms: tuple[int, Tensor]) -> None:
        """``sum c log f = 0``, entry by entry; not of entries that are 0."""
        rows = torch.stack([of.reshape(-1) for _, of in terms], 1)
        for row in torch.unique(rows[(rows != NOTHING).all(1)], dim=0).long().tolist():
            self.relations.add(tuple((c, label) for (c, _), label in zip(terms, row, strict=True)))


@dataclass
class Channels:
    """What was found: every label belongs to a class of tied ones, and every class has a form, ``u = sum c t`` of free classes ``t``."""

    values: dict[str, fx.Node]
    labels: Labels
    classes: Tensor
    forms: list[Form]

    def at(self, labels: Tensor) -> Tensor:
        """The classes of labels."""
        return self.classes[labels.long()]

    def of(self, value: str) -> Tensor:
        """The class of each channel of a value, ``(C,)``."""
        label = self.labels.of[self.values[value]][0]
        return self.at(label.reshape(len(label), -1).amax(1))

    @property
    def numbers(self) -> Tensor:
        """A whole number for every class: 0 where the factor must be 1, equal where factors always are."""
        known: dict[tuple[tuple[int, Fraction], ...], int] = {(): 0}
        return torch.tensor([known.setdefault(tuple(sorted(form.items())), len(known)) for form in self.forms])

    @property
    def degrees_of_freedom(self) -> int:
        """How many factors of values can be chosen freely."""
        return len({free for value in self.values for at in self.of(value).tolist() for free in self.forms[at]})


def channels(module: fx.GraphModule, shapes: Shapes, values: Mapping[str, fx.Node] | None = None) -> Channels:
    """Which channels' factors are free, tied or pinned? ``shapes`` are those of the inputs, ``(C, *spatial)``.

    ``values`` are the lines whose axis 1 holds channels; without them those that ``to_torch`` has named, or else the inputs, and what
    convolutions, BatchNorms and the like make.
    """
    named = dict(values if values is not None else values_of(module))
    walk = Labels(module, set(named.values()))
    dtype = next((t.dtype for t in module.state_dict().values() if t.is_floating_point()), torch.float64)
    with torch.no_grad():
        walk.run(*(torch.zeros((1, *shapes[n.name if n.name in shapes else n.meta["eqfact"][0]]), dtype=dtype)
                   for n in module.graph.nodes if n.op == "placeholder"))
    pairs = torch.cat(walk.ties, 1).numpy() if walk.ties else np.zeros((2, 0), np.int64)
    links = coo_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(walk.size, walk.size))
    found = Channels(named, walk, torch.from_numpy(connected_components(links, directed=False)[1].astype(np.int64)), [])
    found.forms = solved(found, {at for value in named for at in found.of(value).tolist()})
    return found


def solved(found: Channels, visible: set[int]) -> list[Form]:
    """Gauss-Jordan elimination over fractions. What is no channel of a value is expressed by what is one."""
    forms: list[Form] = [{at: Fraction(1)} for at in range(int(found.classes.max()) + 1)]
    forms[int(found.classes[ONE])] = {}
    for relation in sorted(found.labels.relations):
        row: Form = {}
        for c, label in relation:
            for free, amount in forms[int(found.classes[label])].items():
                row[free] = row.get(free, Fraction(0)) + c * amount
        row = {free: c for free, c in row.items() if c}
        if row:
            pivot = min(row, key=lambda free: (free in visible, abs(abs(row[free]) - 1), -free))
            rest = {free: -c / row[pivot] for free, c in row.items() if free != pivot}
            for form in forms:
                if (amount := form.pop(pivot, None)) is not None:
                    for free, c in rest.items():
                        form[free] = form.get(free, Fraction(0)) + amount * c
                        if not form[free]:
                            del form[free]
    return forms


def values_of(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The lines whose axis 1 holds channels, by name."""
    named = {name: n for n in module.graph.nodes for name in n.meta.get("eqfact", ())}
    first = (_ConvNd, _BatchNorm, nn.GroupNorm, _InstanceNorm)
    return named or {n.name: n for n in module.graph.nodes if n.op == "placeholder" or _is(module, n, first)}


# ---------------------------------------------------------------------------------------------------------------
# Weights, whatever their layout


def groups_of(module: Any) -> int:
    """How many groups of channels a layer has, or a normalisation normalises, each by itself."""
    if isinstance(module, _InstanceNorm):
        return int(module.num_features)
    return int(getattr(module, "num_groups", getattr(module, "groups", 1)))


def taps(module: Any) -> Tensor:
    """The weights as ``(out, in / groups, *kernel)``; torch keeps transposed convolutions as ``(in, out / groups, *kernel)``."""
    w = module.weight.detach()
    if not isinstance(module, _ConvTransposeNd):
        return w
    inner, out, *kernel = w.shape
    return w.reshape(module.groups, inner // module.groups, out, *kernel).transpose(1, 2).reshape(-1, inner // module.groups, *kernel)


def matrix(module: Any, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The weights ``(out, in)`` in float64, taps reduced to a number; 0 where groups keep channels apart."""
    if isinstance(module, (*NORMS, _BatchNorm)):
        w = module.weight.detach().double()
        if isinstance(module, _BatchNorm):
            w = w / torch.sqrt(module.running_var.double() + module.eps)
        return torch.diag(reduce(w[:, None]))
    w = taps(module).double()
    rows = reduce(w.reshape(*w.shape[:2], -1)).reshape(groups_of(module), -1, w.shape[1])
    return torch.block_diag(*rows)


def multiply(module: Any, rows: Tensor, columns: Tensor, shift: Tensor | None = None) -> None:
    """``W'[o, i] = W[o, i] rows_o columns_i``, ``b' = b rows_o + shift_o``, in float64, rounded once."""
    groups = groups_of(module)
    if isinstance(module, nn.Linear):
        factor = rows[:, None] * columns
    elif isinstance(module, _ConvTransposeNd):
        factor = (columns.reshape(groups, -1, 1) * rows.reshape(groups, 1, -1)).flatten(0, 1)
    else:
        factor = (rows.reshape(groups, -1, 1) * columns.reshape(groups, 1, -1)).flatten(0, 1)
    with torch.no_grad():
        module.weight.copy_(module.weight.double() * factor.reshape(*factor.shape, *(1,) * (module.weight.ndim - 2)))
        if module.bias is None and shift is not None:
            module.bias = nn.Parameter(torch.zeros(len(rows), dtype=module.weight.dtype))
        if module.bias is not None:
            module.bias.copy_(module.bias.double() * rows + (0 if shift is None else shift))


# ---------------------------------------------------------------------------------------------------------------
# Level 1


def fold_batchnorm(module: fx.GraphModule) -> fx.GraphModule:
    """Fold every BatchNorm that can go: into the rows of the layer before it, ``W' = s W, b' = s b + t``, or else into the columns of the
    Linear or convolution behind it, ``W' = W s, b' = b + sum W t``. An Identity between goes too. A Linear before or behind is taken to
    have its channels where BatchNorm has them, in values ``(N, C)``. In place."""
    while any(_folded(module, n) for n in module.graph.nodes if _is(module, n, _BatchNorm)):
        pass
    module.recompile()
    return module


def _is(module: fx.GraphModule, n: Any, kinds: Any) -> bool:
    return isinstance(n, fx.Node) and n.op == "call_module" and isinstance(module.get_submodule(n.target), kinds)


def _affine(module: Any) -> bool:
    """Whether a layer has weights; normalisations a bias, too."""
    return module.weight is not None and (isinstance(module, (nn.Linear, _ConvNd)) or module.bias is not None)


def _folded(module: fx.GraphModule, n: fx.Node) -> bool:
    """Whether this BatchNorm went. It stays where the value between is read by others, or an output, or where weights are shared."""
    of = module.get_submodule(n.target)
    if not _affine(of) or of.running_var is None:
        return False
    calls = [other.target for other in module.graph.nodes if other.op == "call_module"]
    s = of.weight.double() / torch.sqrt(of.running_var.double() + of.eps)
    t = of.bias.double() - s * of.running_mean.double()
    maker: Any = n.args[0]
    while _is(module, maker, nn.Identity) and len(maker.users) == 1:
        maker = maker.args[0]
    call, makers = maker, (nn.Linear, _ConvNd, _BatchNorm, nn.GroupNorm, _InstanceNorm)
    alone = len(maker.users) == 1
    if alone and maker.target is operator.getitem and isinstance(maker.args[1], tuple) and maker.args[1][1:2] == (slice(None),):
        call = maker.args[0]  # behind a crop of space, which transposed convolutions may need
    elif alone and maker.target is torch.movedim and maker.args[1:] == (-1, 1):
        call, makers = maker.args[0], (nn.LayerNorm,)
    if _is(module, call, makers) and len(call.users) == 1 and calls.count(call.target) == 1 and _affine(module.get_submodule(call.target)):
        layer = module.get_submodule(call.target)
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            with torch.no_grad():
                layer.weight.copy_(layer.weight * s)
                layer.bias.copy_(layer.bias * s + t)
        else:
            multiply(layer, s, torch.ones(taps(layer).shape[1] * groups_of(layer), dtype=torch.float64), t)
        _drop(module, n, maker)
        maker.meta["eqfact"] = n.meta.get("eqfact", [])
        return True
    behind = n
    while len(behind.users) == 1 and _is(module, next(iter(behind.users)), nn.Identity):
        behind = next(iter(behind.users))
    reader = next(iter(behind.users), None)
    if len(behind.users) > 1 or not _is(module, reader, (nn.Linear, _ConvNd)) or calls.count(reader.target) > 1:
        return False
    layer = module.get_submodule(reader.target)
    if t.any() and isinstance(layer, _ConvNd) and (isinstance(layer, _ConvTransposeNd) or any(layer.padding)):
        return False  # the shift would not be there at the border
    shift = matrix(layer, lambda w: w.sum(2)) @ t if not isinstance(layer, _ConvTransposeNd) else None
    multiply(layer, torch.ones(len(taps(layer)), dtype=torch.float64), s, shift)
    _drop(module, behind, n.args[0])
    return True


def _drop(module: fx.GraphModule, last: fx.Node, instead: Any) -> None:
    """Lines from ``last`` back to ``instead`` go; who read them reads that."""
    last.replace_all_uses_with(instead)
    while last is not instead:
        before = last.args[0]
        module.graph.erase_node(last)
        last = before


# ---------------------------------------------------------------------------------------------------------------
# Level 3


def checked_factors(found: Channels, factors: Mapping[str, Any]) -> Tensor:
    """The factor of every class. ValueError for what the network does not allow: not 1 on pinned channels, unequal on tied ones, not as
    relations say."""
    f, given = torch.ones(len(found.forms), dtype=torch.float64), torch.zeros(len(found.forms), dtype=torch.bool)
    for value, of in factors.items():
        if value not in found.values:
            raise ValueError(f"there is no value '{value}'")
        at, of = found.of(value), torch.as_tensor(of, dtype=torch.float64)
        if of.shape != at.shape or not (torch.isfinite(of) & (of > 0)).all():
            raise ValueError(f"'{value}' needs {len(at)} positive and finite factors")
        for one, factor in zip(at.tolist(), of.tolist(), strict=True):
            if (factor != 1 and not found.forms[one]) or (given[one] and f[one] != factor):
                raise ValueError(f"a channel of '{value}' is {'tied' if found.forms[one] else 'pinned'}: its factor cannot be {factor}")
            f[one], given[one] = factor, True
    free = torch.log2(f)
    for one, form in enumerate(found.forms):
        expected = f[one] if form == {one: 1} else torch.exp2(sum((float(c) * free[t] for t, c in form.items()), torch.tensor(0.0)))
        if given[one] and abs(f[one] - expected) > 1e-12 * expected:
            raise ValueError(f"factors of a product do not fit: {f[one]} is given, and {expected} follows from others")
        if not given[one]:
            f[one] = expected
    return f


def rescale(module: fx.GraphModule, found: Channels, factors: Mapping[str, Any]) -> fx.GraphModule:
    """Multiply every value by its factors, ``(C,)`` by name: ``W' = W f_o / f_i``, ``b' = b f_o``; the function stays. In place."""
    f = checked_factors(found, factors)
    for layer in found.labels.layers.values():
        _rescale_layer(layer, f[found.at(layer.made)], f[found.at(layer.read)])
    for n in list(module.graph.nodes):
        if n.op == "get_attr" and n in found.labels.slopes:  # slope' = slope / f
            _replace(module, n, f[found.at(found.labels.slopes[n])])
        elif n.op == "get_attr" and getattr(module, n.target).is_floating_point() and all(u.target == "expand" for u in n.users):
            _replace(module, n, f[found.at(found.labels.of[n])])  # constant' = f constant
        elif n.op == "call_function" and n.target in JOINS:
            for constant in n.args:
                if isinstance(constant, fx.Node) and constant.op == "get_attr":  # shift' = f shift
                    _replace(module, constant, f[found.at(_narrowed(found.labels.of[n], getattr(module, constant.target).shape))])
        elif n.target is torch.clamp or _is(module, n, CLIPS):
            _rescale_clip(module, n, f[found.at(_narrowed(found.labels.of[n], ()))])
    module.recompile()
    return module


def _rescale_layer(layer: Layer, made: Tensor, read: Tensor) -> None:
    module = layer.module
    with torch.no_grad():
        if isinstance(module, _BatchNorm):
            module.weight.copy_(module.weight * (made / read))
            module.running_mean.copy_(module.running_mean * read)
            module.bias.copy_(module.bias * made)
        elif isinstance(module, NORMS):  # gamma' = f_o gamma, beta' = f_o beta, eps' = f_i^2 eps
            module.weight.copy_(module.weight * made)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(module.bias * made)
            eps = module.eps * read.reshape(groups_of(module), -1)[:, 0] ** 2
            if (eps == eps[0]).all():
                module.eps = float(eps[0])
            else:
                module.register_buffer("every_eps", eps)
                module.forward = lambda x: _grouped(module, x)
        else:
            multiply(module, made, 1 / read)


def _grouped(module: Any, x: Tensor) -> Tensor:
    """A GroupNorm or InstanceNorm with an eps for each group."""
    grouped = x.reshape(len(x), groups_of(module), -1)
    var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    y = ((grouped - mean) / torch.sqrt(var + module.every_eps.to(x.dtype)[:, None])).reshape(x.shape)
    shape = (-1, *(1,) * (x.ndim - 2))
    return y * module.weight.reshape(shape) + module.bias.reshape(shape)


def _rescale_clip(module: fx.GraphModule, n: fx.Node, f: Tensor) -> None:
    """``low' = low f``, ``high' = high f``: bounds for each channel."""
    if (f == 1).all():
        return
    own = module.get_submodule(n.target) if n.op == "call_module" else None
    bounds = (own.min_val, own.max_val) if own is not None else n.args[1:]
    dtype = next(module.parameters()).dtype
    with module.graph.inserting_before(n):
        new = []
        for name, bound in zip(("low", "high"), bounds, strict=True):
            bound = getattr(module, bound.target).double() if isinstance(bound, fx.Node) else float(bound)
            module.register_buffer(f"{n.name}_{name}_rescaled", (bound * f)[0].to(dtype))
            new.append(module.graph.get_attr(f"{n.name}_{name}_rescaled"))
    n.op, n.target, n.args = "call_function", torch.clamp, (n.args[0], *new)


def _narrowed(label: Tensor, shape: Any) -> Tensor:
    """The labels ``(1, C, *spatial)``, with one entry for axes of space in which a constant has one."""
    sizes = (*(1,) * (label.ndim - len(shape)), *shape)
    return label[(slice(None), slice(None), *(slice(0, n) for n in sizes[2:]))]


def _replace(module: fx.GraphModule, n: fx.Node, factor: Tensor) -> None:
    old = getattr(module, n.target)
    new = old.detach().double() * factor
    new = (new[0] if new.ndim > old.ndim else new).to(old.dtype)
    setattr(module, n.target, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


# ---------------------------------------------------------------------------------------------------------------
# Level 4


@dataclass
class _Plan:
    """A layer as the rules see it: largest weights ``(out, in)``, numbers of what it makes and reads, ``A`` and that of its Concat."""

    weights: Tensor
    made: Tensor
    read: Tensor | None
    seen: Tensor | None = None
    mates: float = 0.0

    def magnitudes(self, f: Tensor) -> Tensor:
        """``|W| f_made / f_read``."""
        return self.weights * f[self.made][:, None] / (1 if self.read is None else f[self.read])


def equalize(module: fx.GraphModule, found: Channels, method: str, max_factor: float,
             statistics: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Factors by value, for :func:`rescale`. ``method`` is "one_step", "two_step" or "cross_layer"; the first two need ``statistics``,
    the largest magnitude ``(C,)`` of every value.

    NotImplementedError where a product of values leaves a channel with more than one free number, or stands anywhere for the first two.
    """
    if method not in ("one_step", "two_step", "cross_layer"):
        raise ValueError(f"unknown method '{method}'")
    seen = {at for value in found.values for at in found.of(value).tolist()}
    if any(list(found.forms[at].values()) not in ([], [1]) for at in seen):
        raise NotImplementedError("factors of products: a channel has several free numbers, or the inverse of one")
    if method != "cross_layer" and found.labels.relations:
        raise NotImplementedError("one-step and two-step with products of values, which docs/porting.md does not state")
    numbers, plans = found.numbers, []
    for layer in found.labels.layers.values():
        plan = _Plan(matrix(layer.module, lambda w: w.abs().amax(-1)), numbers[found.at(layer.made)],
                     numbers[found.at(layer.read)] if layer.divides else None)
        if statistics is not None:
            after = [_stored(module, found, n) for n in layer.nodes]
            plan.seen = torch.stack([torch.as_tensor(statistics[name], dtype=torch.float64) for name in after]).amax(0)
            if not layer.divides:  # the weights of a normalisation lie on no grid; what it puts out does (docs/algebra.md, Rules)
                plan.weights = torch.diag(plan.seen)
        plans.append(plan)
    if statistics is not None:
        _meet(module, found, plans)
    f = torch.ones(int(numbers.max()) + 1, dtype=torch.float64)
    blocks = _blocks(plans)
    if method == "cross_layer":
        for _ in range(10000):
            before = f.clone()
            for block in blocks:
                _balance(plans, block, f, max_factor)
            if (abs(f / before - 1) < 1e-13).all():
                break
    else:
        for block in blocks:
            _amplify(plans, block, f, max_factor, method == "two_step")
    return {value: f[numbers[found.of(value)]] for value in found.values}


def _blocks(plans: list[_Plan]) -> list[Tensor]:
    """The numbers that one layer makes belong together, and all layers that share one; in the order of the first layers."""
    blocks: list[set[int]] = []
    for plan in plans:
        mine = set(plan.made.tolist()) - {0}
        touched = [block for block in blocks if block & mine]
        if touched:
            touched[0].update(mine, *touched[1:])
            blocks = [block for block in blocks if block is touched[0] or not any(block is other for other in touched)]
        elif mine:
            blocks.append(mine)
    return [torch.tensor(sorted(block)) for block in blocks]


def _largest(size: int, at: Tensor, numbers: Tensor) -> Tensor:
    return torch.zeros(size, dtype=torch.float64).scatter_reduce(0, at, numbers, "amax")


def _ranges(plans: list[_Plan], f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each number the largest weights that make and that read it, and the latter relative to the largest of their layer."""
    made, read, consumed = (torch.zeros_like(f) for _ in range(3))
    for plan in plans:
        w = plan.magnitudes(f)
        made = torch.maximum(made, _largest(len(f), plan.made, w.amax(1)))
        if plan.read is not None:
            of = w.amax(0)
            read = torch.maximum(read, _largest(len(f), plan.read, of))
            consumed = torch.maximum(consumed, _largest(len(f), plan.read, of / of.max().clamp(min=1e-300)))
    return made, read, consumed


def _balance(plans: list[_Plan], block: Tensor, f: Tensor, bound: float) -> None:
    """``f_i *= sqrt(read_i / made_i)``; the root of it where a layer makes and reads the block, so that it does not swing."""
    made, read, _ = _ranges(plans, f)
    live = block[(made[block] > 0) & (read[block] > 0)]
    both = any(plan.read is not None and torch.isin(plan.made, block).any() and torch.isin(plan.read, block).any() for plan in plans)
    f[live] = (f[live] * (read[live] / made[live]) ** (0.25 if both else 0.5)).clamp(1 / bound, bound)


def _amplify(plans: list[_Plan], block: Tensor, f: Tensor, bound: float, two: bool) -> None:
    """``g_i = min(max_j(K_j m_j) / K_i, min(max_j(A_j m_j) / A_i, max_factor))``; the least of all layers; then Concat."""
    made, read, consumed = _ranges(plans, f)
    m = torch.ones_like(f)
    if two:
        m[block] = consumed[block].clamp(min=1 / 1024)
    candidates, lifts, held = [], [], False
    makers = [plan for plan in plans if torch.isin(plan.made, block).any()]
    for plan in makers:
        assert plan.seen is not None, "needs statistics"
        k, a = plan.magnitudes(f).amax(1), plan.seen * f[plan.made]
        inside = torch.isin(plan.made, block)
        held |= bool((k[~inside] > 0).any())
        g = torch.minimum((k * m[plan.made]).max() / k, ((a * m[plan.made]).max() / a).clamp(max=bound))
        g = torch.where((k > 0) & (a > 0) & inside, g, math.inf)
        own = torch.full_like(f, math.inf).scatter_reduce(0, plan.made, g, "amin")
        if len(makers) > 1 and torch.isfinite(own).any():
            own = own / own.min()
        candidates.append(own)
    g = torch.stack(candidates).amin(0)
    g = torch.where(torch.isfinite(g) & (made > 0) & (read > 0), g, 1.0)
    for plan in makers:
        inside = torch.isin(plan.made, block)
        reached = float((g[plan.made] * f[plan.made] * plan.seen)[inside].max())
        if plan.mates and reached:
            lifts.append(plan.mates / reached)
    f[block] *= g[block] * (min(max(min(lifts), 1.0), 1024.0) if lifts and not held else 1.0)


def _stored(module: fx.GraphModule, found: Channels, n: fx.Node) -> str:
    """The value behind the activation that directly follows a layer: while it is the only reader and its input is no output."""
    names = {node: name for name, node in found.values.items()}
    while n not in names:  # a crop, or axes moved back, which are the layer's own
        n = next(iter(n.users))
    while len(n.users) == 1:
        reader = next(iter(n.users))
        if not _is(module, reader, ACTIVATIONS) and reader.target is not torch.clamp:
            break
        n = reader
    return names[n]


def _meet(module: fx.GraphModule, found: Channels, plans: list[_Plan]) -> None:
    """``A`` of each Concat: the largest of all layers whose channels stand in it."""
    layers = list(found.labels.layers.values())
    for n in module.graph.nodes:
        if n.target is torch.cat and not any(a in found.labels.constants for a in n.all_input_nodes):
            mates = [plan for plan, layer in zip(plans, layers, strict=True) if torch.isin(layer.made, found.labels.of[n]).any()]
            top = max((float(plan.seen.max()) for plan in mates if plan.seen is not None), default=0.0)
            for plan in mates:
                plan.mates = max(plan.mates, top)


# ---------------------------------------------------------------------------------------------------------------
# The protocol: only here eqfact is used, for its JSON and its modules


WEIGHTED = ("Dense", "Conv", "ConvTranspose", "BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
STEPS = "a normalisation of single entries, or with several eps, which PyTorch has no module for: to_torch writes it out in steps"


def _module_of(network: Any, dtype: str | None = None) -> tuple[Any, fx.GraphModule]:
    from eqfact.testing.modules import to_torch
    from eqfact.testing.wire import network_of

    graph = network_of(network)
    return graph, to_torch(graph, dtype)


def _written(network: Any, module: fx.GraphModule, origin: Mapping[str, fx.Node]) -> Any:
    """The network of a question with the parameters that the module has now; ``origin`` are the lines of its nodes before."""
    kept = {n: n.meta["eqfact"] for n in module.graph.nodes if n.meta.get("eqfact")}
    names = {name: name for name in network["inputs"]}
    nodes, ops, written = [], {}, dict[str, str]()
    for node in network["nodes"]:
        line, inputs = origin[node["name"]], [names[name] for name in node["inputs"]]
        op = ops[node["op"]] if isinstance(node["op"], str) else node["op"]
        ops[node["name"]] = op
        if line not in kept:  # folded: what reads it reads what stands before it
            names[node["name"]] = inputs[0]
            continue
        name = node["name"] if node["name"] in kept[line] else kept[line][0]
        names[node["name"]] = name
        call = _layer_line(line) if next(iter(op)) in WEIGHTED else None
        first = name if call is None else written.setdefault(str(call.target), name)  # a module that is called again is one op
        nodes.append({"name": name, "op": _parameters(op, module, line) if first == name else first, "inputs": inputs})
    return {**network, "nodes": nodes}


def _layer_line(line: fx.Node) -> fx.Node | None:
    """The call of the layer that a value comes from: perhaps behind a crop, moved axes, or a beta added."""
    owner = line.graph.owning_module
    while line.op != "call_module" and line.all_input_nodes:
        line = line.all_input_nodes[0]
        if line.meta.get("eqfact"):  # another value
            return None
    return line if _is(owner, line, LAYERS) else None


def _parameters(op: Any, module: fx.GraphModule, line: fx.Node) -> Any:
    """An op of the format with the parameters of the line that computes it."""
    from eqfact.testing.wire import array_json, array_of

    ((kind, old),) = op.items()
    new: dict[str, Any] = {}

    def constant(at: int, shape: Any) -> Tensor:
        return getattr(module, line.args[at].target).detach().reshape(shape)  # type: ignore[union-attr]

    if kind in WEIGHTED:
        call = _layer_line(line)
        if call is None:  # written out in steps, which folding leaves alone
            return op
        layer = module.get_submodule(call.target)
        if kind in ("Dense", "Conv", "ConvTranspose"):
            new = {"weight": taps(layer), "bias": layer.bias, "grid": None}
        else:
            new = {"gamma": layer.weight, "beta": getattr(layer, "bias", None)}
            if kind == "BatchNorm":
                new |= {"mean": layer.running_mean, "var": layer.running_var}
            else:
                new["eps"] = getattr(layer, "every_eps", layer.eps)
            if kind == "RMSNorm" and old.get("beta") is not None:
                new["beta"] = constant(1, -1)
    elif kind == "Clip" and line.target is torch.clamp and isinstance(line.args[1], fx.Node):
        new = {"low": constant(1, -1), "high": constant(2, -1)}
    elif kind == "Affine":
        shift = getattr(module, line.args[1].target)
        new = {"shift": shift.reshape(shift.shape[-len(array_of(old["shift"]["array"]).shape):])}
    elif kind == "Extend":
        new = {"constant": getattr(module, line.args[0][1 if not old.get("front") else 0].args[0].target)}
    elif kind == "Sloped":
        new = {"slope": constant(1, -1)}
    coded = {key: {"array": array_json(v.detach().numpy())} if isinstance(v, Tensor) else v for key, v in new.items()}
    return {kind: {**old, **coded}}


def _hello(protocol: int) -> Any:
    return {"name": "equalization within PyTorch", "version": torch.__version__, "language": "Python", "levels": [0, 1, 2, 3, 4]}


def _forward(network: Any, inputs: Any) -> Any:
    from eqfact.testing.wire import arrays_json, arrays_of

    given = arrays_of(inputs)
    graph, module = _module_of(network, next((x.dtype.name for x in given.values()), None))
    if {name: x.shape[1:] for name, x in given.items()} != graph.inputs or any(not len(x) for x in given.values()):
        raise ValueError(f"the inputs are {dict(graph.inputs)}, each with a batch in front")
    with torch.no_grad():
        y = module(*(torch.from_numpy(given[name].copy()) for name in graph.inputs))
    outputs = zip(graph.outputs, y if isinstance(y, tuple) else (y,), strict=True)
    return {"outputs": arrays_json({name: of.numpy() for name, of in outputs})}


def _fold(network: Any) -> Any:
    _, module = _module_of(network)
    origin = values_of(module)
    return {"network": _written(network, fold_batchnorm(module), origin)}


def _analysed(network: Any) -> tuple[fx.GraphModule, Channels]:
    graph, module = _module_of(network)
    lines = values_of(module)
    if any(type(node.op).__name__ in WEIGHTED and _layer_line(lines[node.name]) is None for node in graph.nodes):
        raise NotImplementedError(STEPS)
    return module, channels(module, graph.inputs)


def _labels(network: Any) -> Any:
    found = _analysed(network)[1]
    return {"degrees_of_freedom": found.degrees_of_freedom,
            "channels": {value: found.numbers[found.of(value)].tolist() for value in found.values}}


def _rescaled(network: Any, factors: Any) -> Any:
    from eqfact.testing.wire import arrays_of

    module, found = _analysed(network)
    return {"network": _written(network, rescale(module, found, {k: v.copy() for k, v in arrays_of(factors).items()}), found.values)}


def _equalized(network: Any, method: str, max_factor: float, statistics: Any = None) -> Any:
    from eqfact.testing.wire import arrays_json, arrays_of

    module, found = _analysed(network)
    seen = None if statistics is None else {
        value: np.maximum(*(np.abs(array) for array in arrays_of(ends).values())) for value, ends in statistics.items()}
    return {"factors": arrays_json({name: f.numpy() for name, f in equalize(module, found, method, max_factor, seen).items()})}


ASKS: dict[str, Callable[..., Any]] = {"hello": _hello, "forward": _forward, "fold_batchnorm": _fold, "channels": _labels,
                                       "rescale": _rescaled, "equalize": _equalized}


def main() -> None:
    """Answer questions, a line each. What breaks a rule is refused, which is an answer; what is not done is skipped, with the reason."""
    for line in sys.stdin:
        question = json.loads(line)
        ask, number = question.pop("ask"), question.pop("id")
        try:
            reply = {"answer": ASKS[ask](**question)} if ask in ASKS else {"skip": f"no {ask}"}
        except NotImplementedError as reason:
            reply = {"skip": str(reason)}
        except ValueError as reason:
            reply = {"answer": {"refused": str(reason)}}
        except Exception as error:  # go on to the next question
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"id": number, **reply}), flush=True)


if __name__ == "__main__":
    main()
