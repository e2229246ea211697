"""The interactive page, in one file that needs no network: `python docs/interactive/build.py -o page.html`.

The page's markup and scripts, the port in JavaScript as it stands, and two networks with what eqfact says about them. All that the page
shows is computed by the port in the browser, but for the factors of "optimal" and the reasons of pins, which come from here.
`--expected FILE` writes what eqfact itself computes with the page's networks, for the tests to compare with.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import eqfact as eq
from eqfact.channels import channels
from eqfact.demo import load_bundle
from eqfact.quantization import grid_of, stored_values
from eqfact.testing.wire import array_json, arrays_json, network_json

HERE = Path(__file__).parent
PORT = HERE.parent / "ports" / "javascript" / "port.js"
SCRIPTS = [PORT, *(HERE / name for name in ("model.js", "charts.js", "views.js", "drawing.js", "page.js"))]
#: Bytes that the page may have.
LARGEST = 1_500_000
#: The page's slider goes from 1 / 64 to 64, and so do the rules without a bound of their own.
MAX_FACTOR = 64.0
METHODS = {
    "one_step": eq.OneStep(), "two_step": eq.TwoStep(), "cross_layer": eq.CrossLayer(MAX_FACTOR, tol=1e-12, max_bias=np.inf),
    "optimal": eq.Optimal(max_factor=MAX_FACTOR),
}
#: Why a channel is pinned, from eqfact's reason to words.
WORDS = [
    (r"network input '(.+)'", "“{0}” is what comes into the network. Nothing before it could make up for a factor."),
    (r"network output '(.+)'", "“{0}” is what the network puts out. A factor would change the answer."),
    (r"(?:read|made) by '(.+)': Sigmoid is not positively homogeneous",
     "a sigmoid, “{0}”, takes part in it. Twice the input of a sigmoid does not give twice its output, so no factor passes."),
]


@dataclass(frozen=True, eq=False)
class Shown:
    """A network of the page: its inputs ``samples`` with the names that they go by, and data to calibrate with."""

    title: str
    about: str
    graph: eq.Graph
    data: np.ndarray
    samples: np.ndarray
    names: list[str]
    value: str
    outputs: list[str]


def toy() -> Shown:
    """A network of 62 weights with a shortcut, whose channels have been given uneven ranges."""
    rng = np.random.default_rng(3)

    def dense(out: int, read: int) -> eq.Dense:
        return eq.Dense(rng.normal(size=(out, read)).astype(np.float32), (0.3 * rng.normal(size=out)).astype(np.float32))

    node = eq.Node
    even = eq.Graph(inputs={"input": (3,)}, outputs=["output"], nodes=[
        node("first", dense(4, 3), ["input"]), node("first_relu", eq.ReLU(), ["first"]),
        node("inner", dense(5, 4), ["first_relu"]), node("inner_relu", eq.ReLU(), ["inner"]), node("back", dense(4, 5), ["inner_relu"]),
        node("sum", eq.Add(), ["first_relu", "back"]),
        node("fourth", eq.Slice(3, 4), ["sum"]), node("gate", eq.Sigmoid(), ["fourth"]), node("joined", eq.Concat(), ["sum", "gate"]),
        node("output", dense(2, 5), ["joined"]),
    ])
    powers = {"sum": [-2.4, 0.7, 2.1, 0.0], "inner": [1.8, -3.3, 0.2, -1.1, 2.6]}
    uneven = eq.Factorization.of(even, {value: 2.0 ** np.array(power) for value, power in powers.items()}).apply(even)
    data = rng.normal(size=(64, 3)).astype(np.float32)
    return Shown("A small network", "Four layers, 62 weights, and a shortcut: what the third layer makes is added to what the first made.",
                 uneven, data, data[:20], [f"Input {n}" for n in range(1, 21)], "inner_relu", ["A", "B"])


def digits() -> Shown:
    """The bundled network, folded, and two images of each digit that it has not seen in training."""
    bundle = load_bundle()
    chosen = np.concatenate([np.flatnonzero(bundle.labels == digit)[:2] for digit in range(10)])
    return Shown("A network that reads digits",
                 "A small MobileNetV2 with 41 530 parameters. It reads images of 8 by 8 pixels, and puts out a number for each digit.",
                 eq.fold_batchnorm(bundle.network), bundle.calibration, bundle.images[chosen],
                 [f"A {bundle.labels[k]}, {'first' if n % 2 == 0 else 'second'} image" for n, k in enumerate(chosen)],
                 "block1.expand_act", [str(n) for n in range(10)])


def in_words(reason: str) -> str:
    """A reason of a pin as the page says it."""
    for pattern, words in WORDS:
        if found := re.fullmatch(pattern, reason):
            return words.format(*found.groups())
    raise ValueError(f"no words for the reason {reason!r} of a pin: add some to WORDS")


def content(shown: Shown) -> dict[str, Any]:
    """What the page needs of a network."""
    graph, found = shown.graph, channels(shown.graph)
    assert found.compound is None, "the page has one factor for every number, not products of them"
    stats = eq.calibrate(graph, shown.data)
    best = eq.equalize(graph, METHODS["optimal"], stats=stats, data=shown.data)
    return {
        "title": shown.title, "about": shown.about, "network": network_json(graph), "outputs": shown.outputs, "value": shown.value,
        "statistics": {value: {"min": array_json(of.min), "max": array_json(of.max)} for value, of in stats.items()},
        "stored": stored_values(graph), "optimal": arrays_json(best.factorization), "optimalSays": best.message,
        "reasons": {value: [reason and in_words(reason) for reason in reasons] for value, reasons in found.reasons.items()},
        "samples": array_json(shown.samples), "names": shown.names,
    }


def expected(shown: Shown) -> dict[str, Any]:
    """What eqfact computes with a network of the page: factors by method, and quality, answers and whole numbers by method and bits."""
    graph = shown.graph
    stats, truth = eq.calibrate(graph, shown.data), eq.forward(graph, shown.samples)
    answers: dict[str, Any] = {"output": truth.tolist(), "degreesOfFreedom": eq.degrees_of_freedom(graph), "methods": {}}
    for name in ("none", *METHODS):
        factorization = None if name == "none" else eq.equalize(graph, METHODS[name], stats=stats, data=shown.data).factorization
        of: dict[str, Any] = {"quality": {}, "exact": {}}
        if factorization is not None:
            of["factors"] = {value: f.tolist() for value, f in factorization.items()}
        for kind, chosen in (("quality", factorization), ("exact", factorization and factorization.power_of_two())):
            for weights, activations in ((8, 8), (4, 8), (6, 5), (2, 2)):
                network, ranges = (graph, stats) if chosen is None else (chosen.apply(graph), chosen.apply(stats))
                quantized = eq.quantize(network, stats=ranges, weights=eq.UniformQuantizer(weights),
                                        activations=eq.UniformQuantizer(activations, symmetric=False))
                outputs = eq.forward(quantized, shown.samples)
                every = eq.values(quantized, shown.samples[:1])
                grids = {value: grid_of(quantized, value) for value in stored_values(graph) if value not in graph.inputs}
                integers = {value: np.ravel(np.rint(every[value] / float(grid.scale.item())) + grid.zero_point).astype(int).tolist()
                            for value, grid in grids.items() if grid is not None}
                of[kind][f"{weights},{activations}"] = {
                    "sqnr": eq.sqnr(truth, outputs), "answers": outputs.argmax(axis=1).tolist(), "integers": integers}
        answers["methods"][name] = of
    return answers


def page(networks: dict[str, dict[str, Any]]) -> str:
    """The page with everything in it."""
    html = (HERE / "page.html").read_text(encoding="utf-8")
    data = json.dumps(networks, separators=(",", ":"), ensure_ascii=False)
    # within a script element these are the only two that HTML reads itself
    assert not re.search(r"</script|<!--", data + "".join(path.read_text(encoding="utf-8") for path in SCRIPTS), re.IGNORECASE)
    scripts = [f'<script id="networks" type="application/json">{data}</script>',
               *(f"<script>\n{path.read_text(encoding='utf-8')}</script>" for path in SCRIPTS)]
    return html.replace("<!-- scripts -->", "\n".join(scripts))


def build(path: Path) -> int:
    """Write the page; its size in bytes, :class:`ValueError` if that is too much."""
    text = page({name: content(shown) for name, shown in (("toy", toy()), ("digits", digits()))}).encode()
    if len(text) > LARGEST:
        raise ValueError(f"the page has {len(text)} bytes, and may have {LARGEST}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the interactive page.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page, one HTML file")
    parser.add_argument("--expected", type=Path, help="what eqfact computes with its networks, JSON for the tests")
    arguments = parser.parse_args()
    print(f"{arguments.output}: {build(arguments.output)} bytes")
    if arguments.expected:
        arguments.expected.write_text(json.dumps({"toy": expected(toy()), "digits": expected(digits())}))


if __name__ == "__main__":
    main()
