"""How do other tools equalize the same network?

Each peer has a module here that drives it through its own public API, and a virtual environment of its own in the
cache folder, made on first use. The module reads an ONNX file (or takes the same network as a torch module), times the
equalization alone and writes an ONNX file, which eqfact then measures. What cannot be installed or run is skipped, and
the last line of its error is kept. Nothing here is imported by the library.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
TORCH = "torch==2.13.0"  # pinned for all, so that no peer brings a build of its own
INSTALL_SECONDS, RUN_SECONDS = 900, 600
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Peer:
    """A module beside this one, what its environment needs, which of its ways the module goes, and whether that equalizes."""

    module: str
    requirements: tuple[str, ...]
    way: str = "usual"
    equalizes: bool = True


BREVITAS = ("brevitas==0.13.4", TORCH, "onnx", "onnxscript", "pillow", "lz4")
AIMET = ("aimet-onnx==2.42.0", TORCH)
QUARK = ("amd-quark==0.13", TORCH, "onnxruntime")
PEERS = {
    "brevitas": Peer("brevitas", BREVITAS),
    "brevitas, ReLU6 kept": Peer("brevitas", BREVITAS, "keep"),
    "PPQ": Peer("ppq", ("esp-ppq==1.3.12", TORCH)),
    "AIMET": Peer("aimet", AIMET),
    "AIMET, ReLU6 kept": Peer("aimet", AIMET, "keep"),
    "Quark": Peer("quark", QUARK),
    "Quark, ReLU6 replaced": Peer("quark", QUARK, "replace"),
    "onnxsim": Peer("onnxsim", ("onnxsim==0.8.1",), equalizes=False),
}


@dataclass(frozen=True)
class Answer:
    """What a peer did: the file it wrote and the seconds its equalization took, or why there is none."""

    requirement: str
    path: Path | None = None
    seconds: float | None = None
    remark: str = ""
    failure: str = ""

    def as_row(self) -> dict[str, Any]:
        return {"requirement": self.requirement, "seconds": self.seconds, "remark": self.remark, "failure": self.failure}


def equalize(name: str, network: str, source: Path) -> Answer:
    """Run a peer on a network in its own environment."""
    peer = PEERS[name]
    folder = source.parent / "peers"
    target = folder / f"{network}.{peer.module}.{peer.way}.onnx"
    report = target.with_suffix(".json")
    for stale in (target, report):
        stale.unlink(missing_ok=True)
    try:
        python = environment(folder / peer.module, peer.requirements)
        _checked([str(python), "-m", f"{__name__}.{peer.module}", network, str(source), str(target), str(report), peer.way], RUN_SECONDS)
        found = json.loads(report.read_text())
    except (RuntimeError, OSError) as error:
        return Answer(peer.requirements[0], failure=re.sub(r"(/[^\s/:'\"]+){2,}/", "", str(error)))  # no folders of this machine
    return Answer(peer.requirements[0], target, found["seconds"], found["remark"])


def environment(folder: Path, requirements: tuple[str, ...]) -> Path:
    """The Python of a virtual environment with these requirements, made if it is not there."""
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not (done.exists() and done.read_text().split() == list(requirements)):
        venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
        _checked([str(python), "-m", "pip", "install", "--quiet", *requirements], INSTALL_SECONDS)
        done.write_text("\n".join(requirements))
    return python


def _checked(command: list[str], seconds: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {seconds} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")


# For the modules beside this one --------------------------------------------------------------------------------------

def arguments() -> tuple[str, str, str, str]:
    """Network, the file to read, the file to write, and the way to go."""
    return sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[5]


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the seconds it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def report(seconds: float | None, remark: str = "") -> None:
    """Leave behind how long the equalization took, and what a reader must know about it."""
    Path(sys.argv[4]).write_text(json.dumps({"seconds": seconds, "remark": remark}))
