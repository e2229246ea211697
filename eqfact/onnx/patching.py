"""How does a changed graph go back into the file that it was read from? Node by node: what did not change is written as it was read.

A node with other parameters becomes ONNX nodes on the tensors that its own node read, in the order of axes that they have in the file,
so that nothing around it changes: sizes that the file leaves open stay open, and moves of entries stay where they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from eqfact.graph import Graph, Node
from eqfact.onnx.building import names_read, same_op
from eqfact.onnx.call import AnyArray
from eqfact.onnx.exporting import write_model
from eqfact.onnx.layers import Einsum
from eqfact.onnx.origin import Constant, OnnxError, Origin, Source, source_of
from eqfact.onnx.views import View
from eqfact.onnx.writers import GraphWriter, one_eps
from eqfact.ops import BatchNorm, Conv, ConvTranspose, Dense, Extend, Normalization

#: From which opset on these take a second input as it is written here.
OLDEST_FORM = {"Add": 7, "Mul": 7, "PRelu": 7, "Max": 8, "Min": 8, "Slice": 10, "Clip": 11}
#: Attributes that multiply parameters of a node.
SCALING = ("alpha", "beta")


def save(path: str | os.PathLike[str], graph: Graph) -> None:
    """Write a network as an ONNX file.

    One that came from a file and has its structure (rescaled, or with BatchNorms folded) is that file with other parameters: every node
    that did not change is as it was read, and sizes that the file leaves open stay open. Any other network is written anew, with a free
    batch, or with the batch of the file that it came from; opset and IR version are those of that file (at least 13 and 8), or 17 and 8;
    a newer opset is taken where an op needs one (dilated AvgPool: 19). Float64 networks stay in float64, which onnxruntime does not run for
    every op: convert the weights to float32 for deployment.

    Raises :class:`OnnxError` (a :class:`ValueError`) that names the node whose op has no ONNX counterpart; no file is left then.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> eq.onnx.save("net.onnx", net)
    >>> eq.onnx.load("net.onnx").outputs
    ('fc',)
    """
    source = source_of(graph)
    if source is not None and source.read is not None and source.read.outputs == graph.outputs and source.read.inputs == graph.inputs:
        with contextlib.suppress(OnnxError):
            patch(path, graph, source.read, source)
            return
    write_model(path, GraphWriter(path, graph).model())


def patch(path: str | os.PathLike[str], graph: Graph, read: Graph, source: Source) -> None:
    """Write the file of ``source``, of which ``read`` was understood, with the parameters of ``graph``."""
    write_model(path, Patcher(path, graph, read, source).model(), full=False)


class Patcher(GraphWriter):
    """A writer whose nodes stand among those of a file."""

    def __init__(self, path: str | os.PathLike[str], graph: Graph, read: Graph, source: Source) -> None:
        super().__init__(path, graph)
        self.standard.version = next(o.version for o in source.model.opset_import if o.domain in ("", "ai.onnx"))
        self.source = source
        self.before = {node.name: node for node in read.nodes}
        self._makers = {str(name): proto for proto in source.model.graph.node for name in proto.output}
        self.node_names = {str(node.name) for node in source.model.graph.node}
        #: Multiplications by channel that were put before normalizations, and are in no file.
        self.scales = {node.name: node for node in graph.nodes if node.name not in self.before and isinstance(node.op, BatchNorm)
                       and not node.op.bias.any() and all(isinstance(r.op, Normalization) for r in graph.readers[node.name])}
        self._view: View | None = None

    def model(self) -> onnx.ModelProto:
        """The whole file."""
        protos, outputs = list(self.source.model.graph.node), {str(info.name) for info in self.source.model.graph.output}
        made = {str(name): i for i, proto in enumerate(protos) for name in proto.output if name}
        placed: dict[int, Node] = {}
        norms: list[tuple[Node, Node]] = []
        for node in self.graph.nodes:
            old = self.before.get(node.name)
            if node.name in self.scales:
                continue
            if old is None or old.inputs != node.inputs or not (old.op is node.op or same_op(old.op, node.op)):
                if isinstance(node.op, Normalization):
                    new = self._emptied(node, protos, made)
                    norms.append((node, new))
                else:
                    new = self._placed(node)
                    placed[made[new.name]] = new
                value, own = node.name, self._own(node).name
                while new.name != self._makes(node.name) and value != own:  # folded across moves: what was folded passes its input on
                    if not (makes := self._makes(value)):
                        raise self._refused(node)
                    proto = protos[made[makes]]
                    (tensor,) = (name for name in proto.input if isinstance(self.source.tensors.get(name), View))
                    protos[made[makes]] = helper.make_node("Identity", [tensor], [makes], name=proto.name)
                    (value,) = self.before[value].inputs
        alive = _alive([(placed[i].inputs if i in placed else names_read(proto), proto.output) for i, proto in enumerate(protos)], outputs)
        as_read = [proto for i, proto in enumerate(protos) if i in alive and i not in placed]
        self.names = {name for proto in protos for name in proto.output} | {name for proto in as_read for name in names_read(proto)} | {
            str(info.name) for info in self.source.model.graph.input}
        lines = [[proto] for proto in protos]
        for node, old in norms:
            self._filled(node, old, lines, made)
        nodes: list[onnx.NodeProto] = []
        for i, proto in enumerate(protos):
            if i in placed:
                self.node_names.discard(proto.name)
                self.nodes = []
                self._view = self._tensor(placed[i].name)
                self.write(placed[i])
                nodes += self._as_they_were()
            elif i in alive:
                nodes += lines[i]
        model = onnx.ModelProto()
        model.CopyFrom(self.source.model)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        read = {name for node in nodes for name in names_read(node)} | outputs
        arrays = {**self.source.initializers, **self.initializers}
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read)
        self.source.without_weights(model)
        return model

    def _as_they_were(self) -> list[onnx.NodeProto]:
        """What was written in the place of nodes: those nodes themselves with other parameters, if it is of their kinds."""
        before = [self._makers.get(node.output[0]) for node in self.nodes]
        if any(proto is None or proto.op_type != node.op_type for proto, node in zip(before, self.nodes, strict=True)):
            return self.nodes
        made = []
        for node in self.nodes:
            same = copied(self._makers[node.output[0]])
            same.input[:] = node.input
            for attribute in [a for a in same.attribute if a.name in SCALING]:
                same.attribute.remove(attribute)  # they went into the parameters
            made.append(same)
        return made

    # ------------------------------------------------------------------------------------------- where nodes stand

    def _placed(self, node: Node) -> Node:
        """The node on the tensors of the file."""
        origin, makes = node.origin, self._makes(node.name)
        if not isinstance(origin, Origin) or not origin.reads or not makes:
            raise self._refused(node)
        own = self._own(node)
        if not self._makes(own.name):
            raise self._refused(node)
        if any(isinstance(part := self.before[i].origin, Origin) and part.makes == origin.makes for i in own.inputs if i in self.before):
            raise self._refused(node)  # it is the last of several that one node of the file became
        if self._tensor(makes).axes != self._tensor(origin.makes).axes:
            makes = origin.makes
        reads, inputs = origin.reads, own.inputs
        while inputs != node.inputs:  # other nodes were folded into it: what those read
            folded = self.before.get(inputs[0])
            folded_from = folded.origin if folded is not None else None
            if folded is None or not isinstance(folded_from, Origin) or reads != (folded_from.makes,):
                raise self._refused(node)
            reads, inputs = folded_from.reads, folded.inputs
        return replace(node, name=makes, inputs=reads)

    def _own(self, node: Node) -> Node:
        """The node as it was read."""
        own = next((n for n in self.before.values() if n.origin is node.origin), None)
        if own is None:
            raise self._refused(node)
        return own

    def _makes(self, value: str) -> str:
        """The tensor of the file that a value's own node makes; none if it is not the value itself, or there is none."""
        origin = self.before[value].origin if value in self.before else None
        makes = origin.makes if isinstance(origin, Origin) else ""
        return makes if makes and self._tensor(makes).value == value else ""

    def _constant_at(self, proto: onnx.NodeProto) -> int:
        """Which input of a sum or product is the constant."""
        return next(i for i, name in enumerate(proto.input) if isinstance(self.source.tensors[name], Constant))

    def _tensor(self, name: str) -> View:
        tensor = self.source.tensors[name]
        assert isinstance(tensor, View)
        return tensor

    def _refused(self, node: Node) -> OnnxError:
        return OnnxError(f"{self.path}: node '{node.name}' has no place of its own in the file that the network was read from; a network "
                         "of another structure (folded across moves, quantized) is written by eqfact.onnx.save or save_qdq, if it was "
                         "understood whole")

    # ------------------------------------------------------------------------------------------- what writers ask

    def need_opset(self, version: int, node: Node) -> None:
        if self.standard.version < version:
            raise OnnxError(f"{self.path}: node '{node.name}': {type(node.op).__name__} needs opset {version}, and the nodes around it "
                            f"have {self.standard.version}; convert the file with onnx.version_converter")

    def node(self, kind: str, inputs: Sequence[str], output: str, of: Node, suffix: str = "", **attributes: Any) -> str:
        self.need_opset(OLDEST_FORM[kind] if kind in OLDEST_FORM and len(inputs) > 1 else 1, of)
        return super().node(kind, inputs, output, of, suffix, **attributes)

    def vector(self, node: Node, name: str, value: AnyArray) -> str:
        assert self._view is not None
        channels = self._view.shape[0]
        try:
            array = self._view.spread(np.broadcast_to(value, (channels,))) if value.size > 1 else value.reshape(())
        except ValueError as error:
            raise self._refused(node) from error
        return self.parameter(node, name, array)

    def channels_second(self, node: Node) -> bool:
        assert self._view is not None
        layout = self._view.layout()
        return layout is not None and layout[0] == 1

    def spatial(self, node: Node) -> int:
        assert self._view is not None
        return self._view.ndim - 2

    def over_space(self, node: Node, name: str, value: AnyArray) -> str:
        assert self._view is not None
        return self.parameter(node, name, self._view.tensor_of(np.broadcast_to(value, self._view.shape)[None]))

    def beside(self, node: Node, op: Extend) -> tuple[AnyArray, int]:
        assert self._view is not None
        layout = self._view.layout()
        if layout is None:
            raise self._refused(node)
        return op.constant.transpose([int(i) for i in np.argsort(layout)])[None], layout[op.axis]

    def samples(self, node: Node) -> int | None:
        assert self._view is not None
        return 1 if self._view.batch is None else None

    def write(self, node: Node) -> None:
        op, origin = node.op, node.origin
        if not isinstance(op, (Conv, ConvTranspose, Dense)) or not isinstance(origin, Origin):
            super().write(node)
        elif (kind := self._makers[origin.makes].op_type) == "Add":
            self._sum(node, op, origin)
        elif isinstance(op, (Conv, Dense)) and kind in ("MatMul", "Einsum"):
            self._product(node, op, self._makers[origin.makes])
        elif isinstance(op, (Conv, Dense)) and kind == "Gemm":
            transposed = any(a.name == "transB" and a.i for a in self._makers[origin.makes].attribute)
            weight = self.weight(node, op, lambda w: w.reshape(w.shape[:2]) if transposed else w.reshape(w.shape[:2]).T)
            bias = [] if op.bias is None else [self.parameter(node, "bias", op.bias)]
            self.node("Gemm", [*node.inputs, weight, *bias], node.name, node, transB=int(transposed))
        else:
            super().write(node)

    def _emptied(self, node: Node, protos: list[onnx.NodeProto], made: Mapping[str, int]) -> Node:
        """A normalization as it was read. Its ONNX nodes stay, without those parameters that change."""
        own, new = self._own(node), node.op
        old, origin = own.op, own.origin
        assert isinstance(old, Normalization) and isinstance(new, Normalization) and isinstance(origin, Origin)
        if own.inputs != tuple(self.scales[i].inputs[0] if i in self.scales else i for i in node.inputs):
            raise self._refused(node)
        values: dict[str, Any] = {"gamma": new.gamma, "beta": new.beta, "eps": one_eps(new, old.eps)[0]}
        for name, (tensor, i) in origin.places.items():
            if not np.array_equal(getattr(old, name), values[name]):
                protos[made[tensor]] = copied(protos[made[tensor]])
                protos[made[tensor]].input[i] = ""
        return replace(own, name=origin.makes)

    def _filled(self, node: Node, own: Node, lines: list[list[onnx.NodeProto]], made: Mapping[str, int]) -> None:
        """The parameters that change; for those without a place in the file, nodes beside its own."""
        old, new, origin = own.op, node.op, own.origin
        assert isinstance(old, Normalization) and isinstance(new, Normalization) and isinstance(origin, Origin)
        (eps, factor), core = one_eps(new, old.eps), origin.span[-1]
        for name, (tensor, i) in origin.places.items():
            (*_, proto), self._view = lines[made[tensor]], self._tensor(core if name == "eps" or tensor in origin.span else tensor)
            if not proto.input[i]:
                spread = proto.op_type in ("Add", "Mul", "Sub") and name != "eps"
                proto.input[i] = (self.vector(node, name, getattr(new, name)) if spread else
                                  self.parameter(node, name, *((eps, ()) if name == "eps" else (getattr(new, name),))))
        if "eps" not in origin.places and eps != old.eps:
            lines[made[core]] = [copied(proto, epsilon=eps) for proto in lines[made[core]]]
        self._view, self.nodes = self._tensor(core), []
        for scale in (self.scales[i].op for i in node.inputs if i in self.scales):
            assert isinstance(scale, BatchNorm)
            slope = scale.weight[:, 0]
            factor = slope if factor is None else factor * slope
        if factor is not None:  # one eps for all groups, or a factor for each channel: their inputs are multiplied
            reads = {name for tensor in origin.span for name in lines[made[tensor]][0].input
                     if name not in origin.span and not isinstance(self.source.tensors.get(name), Constant | None)}
            scaled = self.node("Mul", [min(reads), self.vector(node, "factor", factor)], self.inner(node, "scaled"), node, ".scaled")
            for tensor in origin.span:
                (proto,) = lines[made[tensor]]
                lines[made[tensor]] = [copied(proto)]
                lines[made[tensor]][0].input[:] = [scaled if name in reads else name for name in proto.input]
            first = made[origin.span[0]]
            lines[first] = [*self.nodes, *lines[first]]
        shift = 0 if new.beta is None else new.beta
        if "gamma" not in origin.places:
            slope = np.divide(new.gamma, old.gamma, out=np.ones_like(new.gamma), where=old.gamma != 0)
            self._behind(node, "Mul", "gamma", slope, lines[made[core]])
            shift = shift - (0 if old.beta is None else slope * old.beta)
        if "beta" not in origin.places:
            self._view = self._tensor(origin.makes)
            self._behind(node, "Add", "beta", shift + 0 * new.gamma, lines[made[origin.makes]])

    def _behind(self, node: Node, kind: str, name: str, value: AnyArray, line: list[onnx.NodeProto]) -> None:
        """One more node at the end of a line, if it does something."""
        if (value == (kind == "Mul")).all():
            return
        last = line[-1] = copied(line[-1])
        made, last.output[0] = last.output[0], self.inner(node, f"before_{name}")
        self.nodes = []
        self.node(kind, [last.output[0], self.vector(node, name, value)], made, node, f".{name}")
        line += self.nodes

    def _sum(self, node: Node, op: Conv | ConvTranspose | Dense, origin: Origin) -> None:
        """A layer whose bias is added by a node of its own."""
        proto = self._makers[origin.makes]
        at = self._constant_at(proto)
        product = str(proto.input[1 - at])
        self.write(replace(node, name=product, op=replace(op, bias=None), origin=replace(origin, makes=product)))
        inputs = [product]
        if op.bias is not None:
            inputs.insert(at, self.vector(node, "bias", op.bias))
        self.node("Add" if op.bias is not None else "Identity", inputs, node.name, node)

    def _product(self, node: Node, op: Conv | Dense, proto: onnx.NodeProto) -> None:
        """A product with the constant on either side, as it was, and a sum if there is a bias."""
        rows = op.weight.reshape(op.weight.shape[:2])
        at = self._constant_at(proto)
        options = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
        if proto.op_type == "Einsum":
            value, constant = self._tensor(proto.input[1 - at]), self.source.tensors[proto.input[at]]
            assert isinstance(constant, Constant)
            terms = Einsum.of(options["equation"].decode(), at, value.ndim)
            assert terms is not None
            rows = terms.back(rows, constant.values[0].shape)
        elif at == 1:
            rows = rows.T
        inputs = list(node.inputs)
        inputs.insert(at, self.parameter(node, "weight", rows, key=op.weight))
        if op.bias is None:
            self.node(proto.op_type, inputs, node.name, node, **options)
            return
        made = self.node(proto.op_type, inputs, self.inner(node, "product"), node, ".product", **options)
        self.node("Add", [made, self.vector(node, "bias", op.bias)], node.name, node)


def copied(proto: onnx.NodeProto, **attributes: Any) -> onnx.NodeProto:
    """A copy of a node, to be changed; some attributes are others."""
    made = onnx.NodeProto()
    made.CopyFrom(proto)
    for attribute in [a for a in made.attribute if a.name in attributes]:
        made.attribute.remove(attribute)
    made.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return made


def _alive(nodes: Sequence[tuple[Sequence[str], Sequence[str]]], outputs: set[str]) -> set[int]:
    """Which nodes, given by what they read and make, an output needs."""
    wanted, alive = set(outputs), set()
    for i in range(len(nodes) - 1, -1, -1):
        reads, makes = nodes[i]
        if wanted.intersection(makes):
            wanted.update(reads)
            alive.add(i)
    return alive
