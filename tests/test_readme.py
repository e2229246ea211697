"""The README tells the truth: its code prints what stands below it, its commands are those of the gate."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_block_prints_the_numbers_below_it():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks("python")[0], {})
    assert printed.getvalue() == blocks("text")[1]


def test_the_gate_runs_the_readmes_two_commands():
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    main_job, tests, *_ = (block.strip() for block in blocks("sh"))
    assert "demo" in main_job and main_job in gate
    assert "pytest" in tests and tests in gate


def test_every_module_is_on_the_map():
    named = set(re.findall(r"`(\w+)(?:\.py|/)`", README))
    modules = {path.stem for path in (ROOT / "eqfact").iterdir() if (path.suffix == ".py" or (path / "__init__.py").exists())}
    assert modules - {"__init__", "__main__"} - {"demo", "files", "plotting", "report"} <= named


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
