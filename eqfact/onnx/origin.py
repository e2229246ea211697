"""What does a network remember of the ONNX file that it came from?

Values keep their names, because an eqfact node is named after the value that it makes. What else people see when they
compare files (names of nodes and initializers, the layout of a weight, the file's header) is kept in ``Node.origin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class OnnxError(ValueError):
    """A file that cannot be read or written; the message starts with its path."""


class UnsupportedNode(OnnxError):
    """A node that has no counterpart in eqfact; ``load(..., opaque=True)`` keeps it as it is."""


@dataclass(frozen=True)
class Origin:
    """What a node was called in its file: the ONNX node's name, and the initializers' by the op's parameter names."""

    node: str
    initializers: Mapping[str, str] = field(default_factory=dict)
    #: The weight of a Gemm or MatMul stood as ``(in, out)``.
    transposed: bool = False
    #: The file without its nodes and weights, as bytes of a ``ModelProto``: opset, producer, inputs, outputs, metadata.
    header: bytes = field(default=b"", repr=False)
