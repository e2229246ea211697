"""Where are measurements kept, and how do they become a page?

`docs/benchmarks.json` holds every row with the day it was measured; `docs/benchmarks.md` is written from it and from
nothing else. A part of a run renews its own rows. Numbers are kept as samples where they scatter: the page computes
means and deviations.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, PAGE = DOCS / "benchmarks.json", DOCS / "benchmarks.md"
PACKAGES = ("eqfact", "numpy", "scipy", "onnx", "onnxruntime", "torch")


def load() -> dict[str, Any]:
    """All measurements kept so far, section by section."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(section: str, rows: Mapping[str, Any]) -> None:
    """Renew some rows of a section, `{key: row}`, with today's date and the machine that this runs on."""
    kept = load()
    kept.setdefault(section, {})
    for key, row in rows.items():
        kept[section][key] = {**row, "date": datetime.date.today().isoformat()}
    kept["machine"] = machine()
    DOCS.mkdir(exist_ok=True)
    unfinished = RESULTS.with_suffix(f".{os.getpid()}")
    unfinished.write_text(_dump(kept))
    unfinished.replace(RESULTS)


def _dump(kept: Mapping[str, Any]) -> str:
    """JSON with one line a row, so that a difference between two runs can be read."""
    sections = []
    for section, rows in sorted(kept.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(rows[key], sort_keys=True)}" for key in sorted(rows))
        sections.append(f" {json.dumps(section)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def machine() -> dict[str, str]:
    """Processor, cores, system and the versions of what takes part."""
    known = {"processor": _processor(), "cores": str(os.cpu_count()), "system": f"{platform.system()} {platform.machine()}",
             "python": platform.python_version()}
    for package in PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "eqfact" not in known:
        import eqfact

        known["eqfact"] = eqfact.__version__
    return known


def _processor() -> str:
    """The processor's name where the system tells it, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_page() -> Path:
    """Write the page from what is kept, and return where."""
    from benchmarks import page

    PAGE.write_text(page.text(load()))
    return PAGE
