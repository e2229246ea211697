"""How are products of two values read, and the operators that hold them, by where the entries stand that are multiplied and added up?

Exporters write attention as MatMuls of tensors with axes for samples, heads, tokens and channels in any order. Views say which entries of
which values these are: a product that adds up over channels is :class:`~eqfact.ops.Scores`, one over tokens :class:`~eqfact.ops.Mix`, and
any other is one of the two, too, once its entries are moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from eqfact.onnx.call import AnyArray, Call
from eqfact.onnx.views import BATCH, Atom, Axis, View, channel_order, run
from eqfact.ops import Add, BatchNorm, Identity, Mix, Rotary, Scores, Shape, Softmax, Take


class _Pair(NamedTuple):
    """A run of entries of an axis that two tensors share: samples, heads or space. None for the one entry of an axis of size 1."""

    axis: int
    a: Atom | None
    b: Atom | None

    @property
    def is_batch(self) -> bool:
        return self.a == BATCH

    @property
    def is_head(self) -> bool:
        """Whether it is, or must be, of the channels."""
        return not self.is_batch and (self.b is None or 0 in {atom.axis for atom in (self.a, self.b) if atom})


def _paired(axis: int, a: Axis, b: Axis) -> list[_Pair]:
    """The atoms of an axis of two tensors, split until each is as large as its like."""
    if not (a and b):
        pairs = [*(_Pair(axis, x, None) for x in a), *(_Pair(axis, None, y) for y in b)]
    else:
        pairs, left, right = [], list(a[::-1]), list(b[::-1])
        while left and right:
            x, y = left.pop(), right.pop()
            n = min(x.size, y.size)
            for atom, rest in ((x, left), (y, right)) if n else ():
                if atom.size % n:
                    raise ValueError(f"its axis {axis} is split in two ways")
                if atom.size > n:
                    rest.append(Atom(atom.axis, atom.size // n, atom.step))
            x, y = (Atom(atom.axis, n, atom.step * (atom.size // n)) if n else atom for atom in (x, y))
            pairs.append(_Pair(axis, x, y))
        if left or right:
            raise ValueError(f"its axis {axis} has two sizes")
    if any((p.a == BATCH) != (p.b == BATCH) for p in pairs):
        raise ValueError("it multiplies samples by other samples")
    return pairs


def _turned(view: View) -> View:
    return view.with_axes(*view.axes[:-2], view.axes[-1], view.axes[-2])


def product(call: Call, a: View, b: View, suffix: str = "", scale: float = 1.0, over_tokens: bool | None = None) -> View:
    """``a @ b`` of two tensors of values: over tokens Mix, else Scores, which are scaled; told by the views if it is not said."""
    if min(a.ndim, b.ndim) < 2:
        call.refuse(f"it multiplies values with {a.ndim} and {b.ndim} axes; (N, ..., rows, in) times (N, ..., in, columns) is supported")
    ndim = max(a.ndim, b.ndim)
    a, b = (v.with_axes(*((),) * (ndim - v.ndim), *v.axes) for v in (a, b))
    rows, inner = a.axes[-2:]
    other, columns = b.axes[-2:]
    if a.size(-1) != b.size(-2) or not (a.size(-2) and b.size(-1)):  # none of them is the batch
        raise ValueError(f"it multiplies {a.described()} by {b.described()}")
    pairs = [pair for i in range(ndim - 2) for pair in _paired(i, a.axes[i], b.axes[i])]
    if over_tokens is None:
        over_tokens = _over_space(inner) and _over_space(other) and not (_over_space(rows) and _over_space(columns))
        if _over_space(columns) if over_tokens else any(p.a is None for p in pairs) and all(p.b is not None for p in pairs):
            return _turned(product(call, _turned(b), _turned(a), suffix, scale, over_tokens))
    if any(p.a is None for p in pairs):
        call.refuse("each of its two values has heads that the other one has not")
    # heads of which the second tensor has one for all come last: so many in a row share one
    heads = sorted((p for p in pairs if p.is_head), key=lambda p: p.b is None)
    before = [p for p in pairs if not p.is_head and not p.is_batch]
    count, shared = (math.prod(atom.size for atom in atoms if atom) for atoms in ([p.a for p in heads], [p.b for p in heads]))
    batch = () if a.batch is None else (BATCH,)
    own, theirs = tuple(p.a for p in heads if p.a), tuple(p.b for p in heads if p.b)
    space = tuple((p.a,) for p in before if p.a), tuple((p.b,) for p in before if p.b)
    if over_tokens:
        first = a.with_axes(batch, own, *space[0], rows, inner)
        second = b.with_axes(batch, (*theirs, *columns), *space[1], other)
        value, shared = _unrepeated(call, second, shared)
        made = call.emit(Mix(count, shared), call.value(first), value, suffix=suffix)
        width = b.size(-1)
        last = run(len(before) + 1, a.size(-2)), run(0, width)
    else:
        (first, own_scale), (second, other_scale) = (_unscaled(call, v) for v in (
            a.with_axes(batch, (*own, *inner), *space[0], rows), b.with_axes(batch, (*theirs, *other), *space[1], columns)))
        value, shared = _unrepeated(call, second, shared)
        made = call.emit(Scores(count, shared, scale * own_scale * other_scale), call.value(first), value, suffix=suffix)
        width = 1
        last = run(len(before) + 1, a.size(-2)), run(len(before) + 2, b.size(-1))
    at: dict[_Pair, Atom] = {p: Atom(i + 1, p.a.size) for i, p in enumerate(before) if p.a}
    for p in reversed(heads):
        assert p.a is not None
        at[p] = Atom(0, p.a.size, width)
        width *= p.a.size
    axes = (tuple(at.get(p, BATCH) for p in pairs if p.axis == i) for i in range(ndim - 2))
    return made.with_axes(*axes, *last)


def einsum(call: Call, equation: str) -> View:
    """The same, its axes named by letters."""
    terms, _, made = equation.replace(" ", "").partition("->")
    first, second = terms.split(",")
    a, b = call.views()
    shared, inner = ([x for x in first if x in second and (x in made) == wanted] for wanted in (True, False))
    rows, columns = ([x for x in term if x not in (*shared, *inner)] for term in (first, second))
    order = [*shared, *rows, *columns]
    if (len(first), len(second), len(inner), len(rows), len(columns)) != (a.ndim, b.ndim, 1, 1, 1) or sorted(order) != sorted(made):
        call.refuse(f"'{equation}' is no product of matrices")
    a, b = (v.transpose([term.index(x) for x in letters]) for v, term, letters in (
        (a, first, [*shared, *rows, *inner]), (b, second, [*shared, *inner, *columns])))
    return product(call, a, b).transpose([order.index(x) for x in made])


def _over_space(axis: Axis) -> bool:
    return bool(axis) and all(a.axis > 0 for a in axis)


def _unscaled(call: Call, view: View) -> tuple[View, float]:
    """The tensor before it was multiplied by one number that nothing else reads, and that number."""
    building, value, scale = call.building, view.value, 1.0
    while (node := building.nodes.get(value)) is not None and isinstance(node.op, (BatchNorm, Identity)):
        op = node.op
        shifts = isinstance(op, BatchNorm) and (op.beta.any() or op.mean.any() or (op.var != 1).any() or op.eps)
        if shifts or (isinstance(op, BatchNorm) and (op.gamma != op.gamma[0]).any()) or not building.read_once(value):
            break
        (value,) = node.inputs
        if isinstance(op, BatchNorm):
            scale, view = scale * float(op.gamma[0]), view.of(value)
    return view, scale


def _unrepeated(call: Call, view: View, heads: int) -> tuple[str, int]:
    """The value of keys or values, and how many heads it has; before each was repeated for those that share it, if that was done."""
    node = call.building.nodes.get(view.value)
    if node is not None and isinstance(node.op, Take) and node.op.axis == 0 and all(
            axis == run(i, n) for i, (axis, n) in enumerate(zip(view.axes[2:], view.shape[1:], strict=False), 1)):
        (value,) = node.inputs
        before, width = call.building.shapes[value][0], view.shape[0] // heads
        taken = np.asarray(node.op.indices)[list(channel_order(view))]
        if before % width == 0 and heads % (before // width) == 0:
            once = np.arange(before).reshape(-1, width)
            if np.array_equal(taken, np.repeat(once, heads // len(once), axis=0).reshape(-1)):
                return value, len(once)
    return call.value(view), heads


# ------------------------------------------------------------------------------------------------- masks


def masked(call: Call, i: int, mask: AnyArray, names: Mapping[str, int]) -> View | None:
    """A value of which a Softmax alone reads the sum with a constant ``mask``: that Softmax, which is made here already.

    None where something else reads it, or where the value is no scores and the mask, all finite, may stand by itself.
    """
    building, view = call.building, call.view(i)
    node = building.nodes.get(view.value)
    readers = building.readers.get(call.output, [])
    wanted = (node is not None and isinstance(node.op, Scores)) or not np.isfinite(mask).all()
    if not wanted or building.reads.get(call.output) != 1 or len(readers) != 1:
        return None
    (reader,) = readers
    axis = next((a.i for a in reader.attribute if a.name == "axis"), 1 if call.opset < 13 else -1)
    if reader.op_type != "Softmax" or axis not in (-1, view.ndim - 1) or view.axes[-1] != run(len(view.shape) - 1, view.shape[-1]):
        return None
    own = call.constants_on(view, {"mask": mask})["mask"]
    made = call.emit(Softmax(len(view.shape), own), view.value, names=names)
    building.early.add(made.value)
    return view.of(made.value)


# ------------------------------------------------------------------------------------------------- operators that hold it all


#: Attributes of Attention; one of these is read only where it is 0, and one says what a second output is.
_KNOWN = {"q_num_heads", "kv_num_heads", "scale", "is_causal", "softmax_precision", "softcap", "qk_matmul_output_mode"}


def _as(call: Call, view: View, shape: Callable[[Shape], Sequence[int]]) -> View:
    batches = call.building.batches
    return view.reshape(*(shape(view.full_shape(b)) for b in batches), batches=batches)


def _with_heads(call: Call, i: int, heads: str) -> View:
    """Input ``i``, ``(N, T, heads * d)`` or ``(N, heads, T, d)``, as the latter."""
    view, count = call.view(i), call.integer(heads, 0)
    if view.ndim == 4:
        return view
    if view.ndim != 3 or count < 1:
        call.refuse(f"its input {i} has {view.ndim} axes, and {heads} is {count}")
    return _as(call, view, lambda s: (*s[:2], count, s[2] // count)).transpose((0, 2, 1, 3))


def _joined(call: Call, view: View) -> View:
    """The way back."""
    if call.view().ndim == 4:
        return view
    return _as(call, view.transpose((0, 2, 1, 3)), lambda s: (*s[:2], s[2] * s[3]))


def attention(call: Call) -> View:
    """Scores, Softmax and Mix; what is added to the scores may be a constant or a value."""
    if any(map(call.has, range(4, len(call.inputs)))):
        call.refuse("it reads keys and values of earlier tokens, or their number")
    unknown = sorted(name for name, given in call.attributes.items() if name not in _KNOWN and given != -1)  # windows of any size
    if unknown or call.number("softcap", 0.0):
        call.refuse(f"it has the attribute {', '.join(unknown) or 'softcap'}")
    precision = call.integer("softmax_precision", 0)
    if precision and onnx.helper.tensor_dtype_to_np_dtype(precision) != call.building.dtype:
        call.refuse("its Softmax has a precision of its own")
    query, key, value = (_with_heads(call, i, f"{name}_num_heads") for i, name in enumerate(("q", "kv", "kv")))
    scale = call.number("scale", 1 / math.sqrt(query.size(-1)))
    shared = query.size(1) // key.size(1)

    def grouped(view: View, count: int) -> View:
        return _as(call, view, lambda s: (s[0], s[1] // count, count, *s[2:]))

    def whole(view: View) -> View:
        return _as(call, view, lambda s: (s[0], s[1] * s[2], *s[3:]))
    scores = whole(product(call, grouped(query, shared), _turned(grouped(key, 1)), ".scores", scale, over_tokens=False))
    mask: AnyArray | None = None
    known = call.known(3)
    if call.has(3) and (call.view(3).full_shape(1) if known is None else known.values[0].shape)[-1:] != (scores.size(-1),):
        call.refuse("its mask is not for all keys")
    if known is not None:
        mask = call.constant(3, repeats=True) if known.values[0].dtype == bool else call.operand(3, finite=False)
        mask = np.where(mask, 0, -np.inf).astype(call.building.dtype) if mask.dtype == bool else mask
    elif call.has(3):
        added = call.view(3).like(scores, call.building.batches)
        scores = scores.of(call.emit(Add(), scores.value, call.value(added), suffix=".sum").value)
    causal = bool(call.integer("is_causal", 0))
    if causal and mask is not None:
        mask = mask + np.triu(np.full((scores.size(-2), scores.size(-1)), -np.inf), 1).astype(mask.dtype)
    own = call.constants_on(scores, {"mask": mask})["mask"] if mask is not None else "causal" if causal else None
    weights = call.emit(Softmax(len(scores.shape), own), scores.value, suffix=".probabilities")
    return _joined(call, whole(product(call, grouped(scores.of(weights.value), shared), grouped(value, 1), over_tokens=True)))


def rotary_embedding(call: Call) -> View:
    """Pairs of channels turned by constant angles, the same for all samples."""
    view = _with_heads(call, 0, "num_heads")
    size = call.integer("rotary_embedding_dim", 0) or view.size(-1)

    def table(i: int) -> AnyArray:
        found = []
        for cache, positions in zip(call.constants(i), call.constants(3) if call.has(3) else (None, None), strict=False):
            angles = cache if positions is None else cache[positions]
            if angles.ndim != 3 or (angles != angles[:1]).any():
                call.refuse("its angles differ between samples")
            found.append(angles[0])
        if any(not np.array_equal(other, found[0]) for other in found):
            call.refuse("its angles depend on the size of the batch")
        return np.ascontiguousarray(found[0].astype(call.building.dtype).T)
    cos, sin = table(1), table(2)
    if 2 * len(cos) != size:
        call.refuse(f"it turns {size} channels of a head by {len(cos)} angles")
    standing = view.with_axes(() if view.batch is None else (BATCH,), (*view.axes[1], *view.axes[3]), view.axes[2])
    made = call.emit(Rotary(view.size(1), cos, sin, bool(call.integer("interleaved", 0))), call.value(standing))
    turned = made.with_axes(made.axes[0], made.axes[1], made.axes[2])
    back = _as(call, turned, lambda s: (s[0], view.size(1), view.size(3), s[2])).transpose((0, 1, 3, 2))
    return _joined(call, back)
