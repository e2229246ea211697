"""How does a network come out of an ONNX file, and how does it go back into one?

``load`` converts what exporters write into the few ops of this library, ``save`` writes them again under the names that they
had; ``save_qdq`` writes a quantized network with QuantizeLinear and DequantizeLinear. Needs the extra ``eqfact[onnx]``.

Entries that are only moved (Reshape, Transpose, Squeeze, Slice ...) become no ops on the way in: every ONNX tensor is known
as a *view*, an array of positions in an eqfact value, and only what is left of all the moves when a layer reads the
tensor is written down, as Flatten, Permute, Slice, Transpose or Unflatten. So layout sandwiches cancel by themselves.
"""

from eqfact.onnx.checking import check
from eqfact.onnx.importing import load
from eqfact.onnx.opened import Kept, Opened, open
from eqfact.onnx.origin import OnnxError, Origin, UnsupportedNode
from eqfact.onnx.patching import save
from eqfact.onnx.qdq import save_qdq

__all__ = ["Kept", "OnnxError", "Opened", "Origin", "UnsupportedNode", "check", "load", "open", "save", "save_qdq"]
