"""How good is eqfact on real networks, and how fast?

`python -m benchmarks quality` measures quantized networks, `speed` times and memory, `integer` the quantized export. These keep what
they found in `docs/benchmarks.json`, row by row, and write `docs/benchmarks.md` from it, so a run over part of the rows
renews these rows only; `quality` draws `docs/predicted.svg`, too. Needs the extra `benchmarks` (torch, onnxruntime, onnx, pillow, lz4,
scikit-learn) and matplotlib.

`files` measures ONNX files that people ship, and writes `docs/files.md` (onnx, onnxruntime and pillow); `operators` writes
`docs/operators.md` (the extra `onnx`); `clipping` measures ranges that clip; `transformers` trains and measures transformers, and writes
`docs/transformers.md`; `training` trains the bundled network in few bits, and writes `docs/training.md` (matplotlib). Four write nothing,
and need the extra `test`: `fuzz` reads broken ONNX files, `foreign` proves random valid ones, `mutation` changes eqfact, `modules` proves
`eqfact.testing` on PyTorch modules.
"""

from __future__ import annotations

import argparse
import importlib
import sys

#: Modules of their own, with their own arguments and exit status.
APART = {"ports": "the port within PyTorch on the conformance cases",
         "conform": "other tools on the conformance cases",
         "faults": "planted faults: which cases of the conformance kit find them",
         "clipping": "clipping and equalization, alone and together",
         "files": "ONNX files that people ship: read, written and quantized", "fuzz": "broken ONNX files: one error each, or a network",
         "foreign": "random ONNX files: the same function after all that eqfact does?",
         "modules": "networks as PyTorch modules, and what breaks passes over them",
         "mutation": "small changes to eqfact: does a test fail?", "operators": "what eqfact makes of every operator of ONNX",
         "training": "the bundled network, trained in few bits from several starts",
         "transformers": "SQNR and the task itself, of quantized transformers"}


def parser() -> argparse.ArgumentParser:
    from benchmarks import peers, quality, speed
    from benchmarks.networks import SOURCES

    main = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure eqfact on trained networks.")
    commands = main.add_subparsers(dest="command", required=True)
    rows = [row.name for row in quality.ROWS]

    one = commands.add_parser("quality", help="SQNR and top-1 agreement of quantized networks")
    one.add_argument("--only", nargs="+", choices=list(SOURCES), default=list(SOURCES), metavar="NETWORK",
                     help=f"networks, of {', '.join(SOURCES)}")
    one.add_argument("--methods", nargs="*", choices=rows, default=rows, metavar="METHOD", help=f"rows, of: {'; '.join(rows)}")
    one.add_argument("--peers", nargs="*", choices=list(peers.PEERS), metavar="PEER", default=[],
                     help=f"other tools, of {', '.join(peers.PEERS)}; all of them without a name")
    one.add_argument("--no-peers", dest="peers", action="store_const", const=[], help="no other tools (the default)")
    one.add_argument("--jitters", type=int, default=quality.JITTERS, help="jitters of the factors for each half of the images")
    one.add_argument("--serial", action="store_true", help="one process; the default takes one for each half of the images")

    two = commands.add_parser("speed", help="time and memory, side by side with other runtimes")
    two.add_argument("--only", nargs="+", choices=list(speed.PARTS), default=list(speed.PARTS), metavar="PART",
                     help=f"parts, of {', '.join(speed.PARTS)}")

    three = commands.add_parser("integer", help="the quantized export in onnxruntime against eqfact's own forward")
    three.add_argument("--only", nargs="+", choices=list(SOURCES), default=list(SOURCES), metavar="NETWORK",
                       help=f"networks, of {', '.join(SOURCES)}")

    for name, question in APART.items():
        commands.add_parser(name, help=question)

    commands.add_parser("page", help="write docs/benchmarks.md and docs/predicted.svg again from docs/benchmarks.json")
    return main


def main() -> int:
    argv = sys.argv[1:]
    if argv and argv[0] in APART:
        return int(importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:]))
    from benchmarks import integer, peers, quality, speed
    from benchmarks.results import write_page

    arguments = parser().parse_args(argv)
    if arguments.command == "quality":
        chosen = list(peers.PEERS) if "--peers" in argv and not arguments.peers and "--no-peers" not in argv else arguments.peers
        quality.measure(arguments.only, arguments.methods, chosen, arguments.jitters, arguments.serial)
    elif arguments.command == "speed":
        speed.measure(arguments.only)
    elif arguments.command == "integer":
        integer.measure(arguments.only)
    if arguments.command in ("quality", "page"):
        quality.draw()
    print(f"wrote {write_page()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
