"""The shape of the house (DESIGN section 3): modules import downwards only, the library does not print, pickle or drag in extras."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import eqfact

ROOT = Path(eqfact.__file__).parent

#: From the ground up: a module may import from those in earlier rows, and from its own. A row may be absent yet.
ROWS = [
    ["ops"],
    ["accumulators", "graph"],
    ["channels", "histograms"],
    ["calibration", "clips"],
    ["factorization", "quantizers"],
    ["folding", "freeing", "gradients", "metrics", "quantization", "roundings", "rules"],
    ["noise", "verification"],
    ["blocks", "logsums", "optimal"],
    ["methods"],
    ["equalization"],
    ["correction", "training"],
    ["serialization"],
    ["onnx"],
    ["files", "testing"],
    ["asked", "demo", "plotting", "report"],
    ["figures"],
    ["commands"],
    ["__main__"],
]
LEVEL = {module: level for level, row in enumerate(ROWS) for module in row}
#: Modules that may need more than numpy, scipy and the standard library, and what. All of it is imported late or by choice.
EXTRAS = {"onnx": {"onnx", "onnxruntime", "google"}, "files": {"onnx"}, "testing": {"hypothesis", "onnx", "pytest", "torch"},
          "plotting": {"matplotlib"}, "demo": {"tqdm"}, "asked": {"tqdm"}, "__main__": {"tqdm"}}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def module_of(path):
    """The module, or first-level package, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def nodes(path):
    """All nodes of a file's syntax tree; the first is the module itself."""
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imports(path):
    """Full names of all modules that a file imports, wherever in it."""
    package, found = ("eqfact", *path.relative_to(ROOT).parts[:-1]), []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            # "from eqfact import x" may mean the module x
            found += [f"eqfact.{alias.name}" for alias in node.names] if module == "eqfact" else [module]
    return found


def own_imports(path):
    """The library's first-level modules that a file imports; ``eqfact`` itself where it takes a public name from the top."""
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "eqfact":
            part = rest.partition(".")[0]
            yield part if (ROOT / part).is_dir() or (ROOT / f"{part}.py").exists() else "eqfact"


any_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


@any_source
def test_every_module_has_its_place(path):
    assert module_of(path) in LEVEL, f"say in ROWS above which modules '{module_of(path)}' stands on"


@any_source
def test_modules_import_downwards_only(path):
    here = module_of(path)
    for module in own_imports(path):
        if module == "eqfact":  # the public names: for what stands on all of them
            assert LEVEL[here] >= LEVEL["testing"], f"{here} imports from the top of eqfact"
        else:
            assert LEVEL[module] <= LEVEL[here], f"{here} stands below {module}, but imports it"


def test_modules_do_not_import_each_other_in_a_circle():
    below = {}
    for path in SOURCES:
        below.setdefault(module_of(path), set()).update(set(own_imports(path)) - {module_of(path), "eqfact"})
    placed = set()
    while len(placed) < len(below):
        ready = {module for module, needs in below.items() if module not in placed and needs <= placed}
        assert ready, f"a circle among {sorted(set(below) - placed)}"
        placed |= ready


def test_no_two_files_of_the_largest_package_need_each_other():
    """Not even for their types: a reader of one file of onnx/ never has to know another that builds on it."""
    needs = {}
    for path in (path for path in SOURCES if module_of(path) == "onnx" and path.name != "__init__.py"):
        module = ".".join(("eqfact", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        needs[module] = {n for n in imports(path) if n != module}
    needs = {module: {n for n in names if n in needs} for module, names in needs.items()}
    sorter = graphlib.TopologicalSorter(needs)
    sorter.prepare()


@any_source
def test_only_what_the_house_allows_is_imported(path):
    foreign = {name.partition(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"eqfact", "numpy", "scipy"}
    assert foreign <= EXTRAS.get(module_of(path), set())


@pytest.mark.parametrize("extra, users", [
    ("hypothesis", {"strategies.py", "checking.py"}),  # strategies, and what draws from them
    ("torch", {"modules.py", "frameworks.py", "strategies.py"}), ("pytest", {"checking.py"}),
])
def test_extras_of_testing_are_needed_in_few_modules(extra, users):
    assert {path.name for path in SOURCES if any(name.partition(".")[0] == extra for name in imports(path))} == users


def test_onnxruntime_is_asked_in_one_module_only():
    users = {path.name for path in SOURCES if any(name.partition(".")[0] == "onnxruntime" for name in imports(path))}
    assert users == {"running.py"}


@any_source
def test_nothing_is_pickled(path):
    assert not {name.partition(".")[0] for name in imports(path)} & {"pickle", "dill", "joblib", "shelve", "marshal"}
    for node in nodes(path):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


@any_source
def test_library_code_never_prints(path):
    if module_of(path) in ("__main__", "commands"):
        pytest.skip("the command line is there to print")
    calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
    names = {func.id for func in calls if isinstance(func, ast.Name)}
    assert not names & {"print", "input", "breakpoint"}


@any_source
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(nodes(path)[0])


@pytest.mark.parametrize("statement", ["import eqfact", "import eqfact.testing.laws", "from eqfact.testing import *"])
def test_importing_the_library_drags_in_no_extra(statement):
    code = f"import sys; {statement}; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in found
    assert not {"onnx", "onnxruntime", "matplotlib", "hypothesis", "tqdm", "torch", "sklearn", "pytest"} & set(found)


def test_commands_do_not_load_what_tests_other_implementations():
    code = "import sys, eqfact.__main__; sys.exit(any(name.startswith('eqfact.testing') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


