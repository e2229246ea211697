"""README and docs tell the truth: their code prints what stands below it, the README's commands are those of the gate."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_print_what_stands_below_them(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code, expected in re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", path.read_text(), re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue() == expected


LESSONS = sorted((ROOT / "docs" / "lessons").rglob("[1-9]*.md"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_cells_of_lessons_and_solutions_run(path):
    """Their own checks among them; the site shows what they print."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    names = {}
    cells = re.findall(r"```\{code-cell\}\n(?::tags:[^\n]*\n)?(.*?)```", path.read_text(), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in cells:
            exec(cell, names)
    pyplot.close("all")
    assert len(cells) == path.read_text().count("```{code-cell}") > 2
    if "solutions" in path.parts:
        lesson = (ROOT / "docs" / "lessons" / path.name).read_text()
        assert set(re.findall(r"(check_\w+)\(", lesson)) <= set(names), "every check is run on a solution"


def test_every_lesson_has_solutions():
    names = {path.name for path in (ROOT / "docs" / "lessons").glob("[1-9]*.md")}
    assert names == {path.name for path in (ROOT / "docs" / "lessons" / "solutions").glob("[1-9]*.md")}


def test_there_are_examples_to_run():
    assert sum(len(blocks("python", path.read_text())) for path in DOCUMENTS) >= 2


def test_the_gate_runs_the_readmes_two_commands():
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    main_job, tests, *_ = (block.strip() for block in blocks("sh"))
    assert "demo" in main_job and main_job in gate
    assert "pytest" in tests and tests in gate


def test_every_module_is_on_the_map():
    named = set(re.findall(r"`(\w+)(?:\.py|/)`", README))
    modules = {path.stem for path in (ROOT / "eqfact").iterdir() if (path.suffix == ".py" or (path / "__init__.py").exists())}
    assert modules - {"__init__", "__main__"} <= named


def test_every_fault_names_the_test_that_keeps_it_out():
    of_script = (ROOT / "docs" / "faults.md").read_text().partition("\n## ")[0]
    rows = [line.split(" | ")[-1] for line in of_script.splitlines() if line.startswith("| ")][1:]
    named = [re.fullmatch(r"`(test_\w+)` \|", cell).group(1) for cell in rows]
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_equalization.py").read_text(), re.MULTILINE)
    assert len(named) == len(set(named)) == 7 and set(named) <= set(tests)
    assert {test for test in tests if test.startswith("test_fault_")} <= set(named)


@pytest.mark.parametrize("path", [*DOCUMENTS, *LESSONS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", re.sub(r"`[^`\n]*`", "", path.read_text())):
        assert "://" in target or (path.parent / target).exists(), target
