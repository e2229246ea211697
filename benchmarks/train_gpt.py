"""Where does the small language model of `python -m benchmarks transformers` come from?

This script trains it, from a fixed seed, to guess the next character of the Python standard library's own sources: 96 characters, 64 at a
time; RMSNorm before each branch, rotary positions, grouped queries, SwiGLU. Gradients are `eqfact.backward`'s, so numpy is enough. The
network goes into the ignored cache. A network as small has no outlier channels; large ones do, in the gammas of their normalisations.
:func:`with_outliers` gives it some, the same function.

    python -m benchmarks.train_gpt
"""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

import eqfact as eq

Array = NDArray[Any]

SEED = 0
CONTEXT, WIDTH, BLOCKS, HEADS, KV_HEADS, HIDDEN = 64, 64, 3, 4, 2, 192
#: A line feed and what ASCII prints; all else becomes a question mark.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
STEPS, BATCH, LEARNING_RATE, WARM_UP = 1700, 32, 4e-3, 100
BETAS, TINY = (0.9, 0.98), 1e-9
#: Files of the library, by name, of which every eighth is held out.
FOLDERS = ("", "asyncio", "concurrent/futures", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml/dom")
HELD_OUT = 8
#: So many channels of every gamma, so many times as large.
OUTLIERS, TIMES = 3, 20.0


def text(held_out: bool) -> Array:
    """The sources of the standard library as numbers of characters, the part that is trained on or the one that is not."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for folder in FOLDERS for path in sorted((library / folder).glob("*.py"))]
    chosen = [path for i, path in enumerate(files) if (i % HELD_OUT == 0) == held_out]
    table = np.full(256, CHARACTERS.index("?"), np.int64)
    table[[ord(c) for c in CHARACTERS]] = np.arange(len(CHARACTERS))
    data = "\n".join(path.read_text("utf8").expandtabs(4) for path in chosen).encode("latin1", "replace")
    return table[np.frombuffer(data, np.uint8)]


def windows(characters: Array, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Random pieces of a text, as one-hot ``(N, 96, 64)``, and the next characters ``(N, 64)``."""
    starts = rng.integers(0, len(characters) - CONTEXT, count)
    pieces = characters[starts[:, None] + np.arange(CONTEXT + 1)]
    one_hot = np.zeros((count, CONTEXT, len(CHARACTERS)), np.float32)
    np.put_along_axis(one_hot, pieces[:, :-1, None], 1, axis=2)
    return np.ascontiguousarray(one_hot.swapaxes(1, 2)), pieces[:, 1:]


def build(rng: np.random.Generator) -> eq.Graph:
    """The untrained network."""
    nodes: list[eq.Node] = []

    def layer(name: str, op: eq.Op, *inputs: str) -> str:
        nodes.append(eq.Node(name, op, inputs))
        return name

    def dense(out: int, inner: int, gain: float = 1.0) -> eq.Conv:
        return eq.Conv((gain * rng.normal(size=(out, inner, 1)) / inner**0.5).astype(np.float32))

    def norm() -> eq.RMSNorm:
        return eq.RMSNorm(np.ones(WIDTH, np.float32))

    size = WIDTH // HEADS
    angles = (10000.0 ** (-np.arange(size // 2) / (size // 2)))[:, None] * np.arange(CONTEXT)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    residual = (2 * BLOCKS) ** -0.5  # as in GPT-2: what is added up starts as large as one branch
    x = layer("embedding", dense(WIDTH, len(CHARACTERS), len(CHARACTERS) ** 0.5), "characters")
    for i in map(str, range(BLOCKS)):
        n = layer(f"{i}.norm", norm(), x)
        q = layer(f"{i}.q_turned", eq.Rotary(HEADS, cos, sin), layer(f"{i}.q", dense(WIDTH, WIDTH), n))
        k = layer(f"{i}.k_turned", eq.Rotary(KV_HEADS, cos, sin), layer(f"{i}.k", dense(KV_HEADS * size, WIDTH), n))
        v = layer(f"{i}.v", dense(KV_HEADS * size, WIDTH), n)
        p = layer(f"{i}.p", eq.Softmax(-1, "causal"), layer(f"{i}.scores", eq.Scores(HEADS, KV_HEADS, size**-0.5), q, k))
        o = layer(f"{i}.o", dense(WIDTH, WIDTH, residual), layer(f"{i}.mix", eq.Mix(HEADS, KV_HEADS), p, v))
        x = layer(f"{i}.attended", eq.Add(), x, o)
        n = layer(f"{i}.norm2", norm(), x)
        gate = layer(f"{i}.silu", eq.SiLU(), layer(f"{i}.gate", dense(HIDDEN, WIDTH), n))
        gated = layer(f"{i}.gated", eq.Mul(), gate, layer(f"{i}.up", dense(HIDDEN, WIDTH), n))
        x = layer(f"{i}.out", eq.Add(), x, layer(f"{i}.down", dense(WIDTH, HIDDEN, residual), gated))
    layer("logits", dense(len(CHARACTERS), WIDTH), layer("norm", norm(), x))
    return eq.Graph({"characters": (len(CHARACTERS), CONTEXT)}, tuple(nodes), ("logits",))


def weights(graph: eq.Graph) -> Iterator[tuple[Any, str, Array]]:
    """Every node that is trained, the name of its parameter, and the parameter."""
    for node in graph.nodes:
        if isinstance(node.op, eq.RMSNorm):
            yield node, "gamma", node.op.gamma
        elif isinstance(node.op, eq.Conv):
            yield node, "weight", node.op.weight


def train(graph: eq.Graph, characters: Array, rng: np.random.Generator, steps: int = STEPS) -> eq.Graph:
    """Adam, linear warm-up and a cosine to zero."""
    state = {node.name: np.array(w) for node, _, w in weights(graph)}
    first, second = ({name: np.zeros_like(w) for name, w in state.items()} for _ in range(2))
    a, b = BETAS
    for step in range(1, steps + 1):
        x, target = windows(characters, BATCH, rng)
        slope = special.softmax(eq.forward(graph, x), axis=1)
        guessed = np.take_along_axis(slope, target[:, None], axis=1)
        np.put_along_axis(slope, target[:, None], guessed - 1, axis=1)
        found = eq.backward(graph, x, slope / target.size).weights
        rate = LEARNING_RATE * min(step / WARM_UP, (1 + math.cos(math.pi * step / steps)) / 2)
        for name, w in state.items():
            g = found[name].reshape(w.shape)
            first[name] = a * first[name] + (1 - a) * g
            second[name] = b * second[name] + (1 - b) * g * g
            moved = rate * (first[name] / (1 - a**step)) / (np.sqrt(second[name] / (1 - b**step)) + TINY)
            state[name] = w - moved
        graph = graph.with_ops({node.name: replace(node.op, **{kind: state[node.name]}) for node, kind, _ in weights(graph)})
        if step % 100 == 0:
            print(f"step {step:5d}  loss {-np.log(guessed).mean():.3f}", flush=True)
    return graph


def perplexity(logits: Array, target: Array) -> float:
    """``exp`` of the mean of ``-log p(next character)``; logits ``(N, 96, 64)``."""
    chosen = np.take_along_axis(special.log_softmax(logits.astype(np.float64), axis=1), target[:, None], axis=1)
    return float(np.exp(-chosen.mean()))


def of_pairs(characters: Array, held_out: Array) -> float:
    """The perplexity of a model that knows how often one character follows another."""
    counts = np.full((len(CHARACTERS),) * 2, 0.5)
    np.add.at(counts, (characters[:-1], characters[1:]), 1)
    p = counts / counts.sum(axis=1, keepdims=True)
    return float(np.exp(-np.log(p[held_out[:-1], held_out[1:]]).mean()))


def with_outliers(graph: eq.Graph) -> eq.Graph:
    """The same function: of every normalisation, three gammas 20 times as large, and what reads these channels divided by 20."""
    rng = np.random.default_rng(SEED)
    f = eq.Factorization.identity(graph)
    free = np.array(f.free)
    for node in graph.nodes:
        if isinstance(node.op, eq.RMSNorm):
            free[f.channels.labels[node.name][rng.choice(WIDTH, OUTLIERS, replace=False)]] = TIMES
    return replace(f, free=free).apply(graph)


def trained(path: Path) -> eq.Graph:
    """The trained network in that file, trained first if there is none."""
    if not path.exists():
        rng = np.random.default_rng(SEED)
        start, characters = time.perf_counter(), text(held_out=False)
        graph = train(build(rng), characters, rng)
        x, target = windows(text(held_out=True), 128, np.random.default_rng(SEED))
        print(f"trained in {time.perf_counter() - start:.0f} s on {len(characters)} characters; perplexity on others "
              f"{perplexity(eq.forward(graph, x), target):.2f}, of pairs of characters {of_pairs(characters, text(held_out=True)):.2f}")
        eq.save(path, graph)
    return eq.load(path)


if __name__ == "__main__":
    from benchmarks.networks import cache

    trained(cache() / "gpt.npz")
