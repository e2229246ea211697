"""The ports in docs/ports answer the conformance cases that they claim, and the cases find mistakes that are planted in one of them.

They are asked through the command line, as docs/porting.md tells a porter to.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PORTS = Path(__file__).parent.parent / "docs" / "ports"
PORT = PORTS / "javascript" / "port.js"


def needed(tool: str, package: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool} here: install {package}")
    return found


def asked(command: str, levels: str) -> tuple[dict, set[str]]:
    """The runner's report, and which cases failed."""
    arguments = [sys.executable, "-m", "eqfact", "conform", "--cmd", command, "--level", levels, "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    return report, {failure["id"] for failure in report["failures"]}


def test_javascript_answers_levels_0_to_6():
    report, failed = asked(f'{needed("node", "Node.js")} "{PORT}"', "0-6")
    assert not failed
    assert [level["level"] for level in report["levels"]] == list(range(7))
    assert all(level["passed"] and not level["skipped"] for level in report["levels"])


def test_c_answers_level_5(tmp_path):
    cc = needed("cc", "a C compiler")
    program = tmp_path / "adapter"
    options = ["-std=c99", "-O2", "-ffp-contract=off", "-o", str(program)]
    subprocess.run([cc, *options, str(PORTS / "c" / "adapter.c"), "-lm"], check=True)
    report, failed = asked(f'"{program}"', "5")
    assert not failed
    assert report["levels"][0]["passed"]


MISTAKES = {
    "groups ignored": ("0", "const first = Math.floor(o / (out / groups)) * perGroup;", "const first = 0;"),
    "channels last": (
        "0",
        "[n, ...unravel(k, x.shape.slice(1))]",
        "[n, k % x.shape[1], ...unravel(Math.floor(k / x.shape[1]), x.shape.slice(2))]",
    ),
    "no eps": ("1", "Math.sqrt(variance.data[c] + eps)", "Math.sqrt(variance.data[c])"),
    "sums not tied": ("2", "const SUMS = ['Add', ", "const SUMS = ["),
    "pins not checked": ("3", "for (const v of pins) require_", "for (const v of []) require_"),
    "root upside down": ("4", "(shrinking - growing) / 2", "(growing - shrinking) / 2"),
    "halves up": ("5", "half_even: below % 2 === 1", "half_even: x > 0"),
    "no bias": ("6", "rounded(b.data[index[1]] / step(index), 'half_even')", "0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name, tmp_path):
    node = needed("node", "Node.js")
    level, right, wrong = MISTAKES[name]
    source = PORT.read_text(encoding="utf-8")
    assert right in source
    mistaken = tmp_path / "port.js"
    mistaken.write_text(source.replace(right, wrong), encoding="utf-8")
    report, failed = asked(f'{node} "{mistaken}"', level)
    assert failed
    assert report["levels"][0]["passed"]  # a mistake in one place, not a program that does not run


def test_javascript_stands_alone(tmp_path):
    node = needed("node", "Node.js")
    subprocess.run([node, "--check", str(PORT)], check=True)
    source = PORT.read_text(encoding="utf-8")
    assert re.findall(r"\brequire\(([^)]*)\)", source) == ["'readline'"]
    assert not re.search(r"\beval\b|\bimport\b|^export\b", source.split("'use strict';")[1], re.MULTILINE)
    # as a plain script that has nothing but what browsers have, and as a module
    module = tmp_path / "port.mjs"
    module.write_text(source, encoding="utf-8")
    script = (
        "const vm = require('vm'), page = { atob, btoa }, before = Object.keys(page).length;"
        "vm.runInNewContext(require('fs').readFileSync(process.argv[1], 'utf8'), page);"
        "const asked = (eqfact) => eqfact.answer({ id: 0, ask: 'hello' }).answer.levels.length;"
        "import(process.argv[1]).then(() => console.log(Object.keys(page).length - before, asked(page.eqfact), asked(globalThis.eqfact)));"
    )
    done = subprocess.run([node, "-e", script, str(module)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "7", "7"]
