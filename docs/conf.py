"""How the site is made: `python -m sphinx -W docs docs/_build`, into static files that need no network.

Pages are Markdown (MyST). Cells of code are executed by MyST-NB, and kept by their content, so that a page is computed again only when
it changes; an error in a cell, a broken reference or any warning fails the build. Mathematics is set by a MathJax that is copied in.
"""

import os
import runpy
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

import eqfact
import eqfact.onnx
import eqfact.testing

project = "eqfact"
author = "the developers of eqfact"
version = release = eqfact.__version__
html_title = f"eqfact {version}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx-mathjax-offline", "sphinx_copybutton"]
html_theme = "furo"
exclude_patterns = ["_build", "jupyter_execute", "ports", "interactive"]
nitpicky = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
# the kernels that execute pages inherit it
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent / "matplotlibrc")

html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False


def every_public_name_is_there(app: Sphinx, env: BuildEnvironment) -> None:
    """The reference is complete: a public name that it lacks fails the build."""
    described = set(env.domaindata["py"]["objects"])
    public = {f"{module.__name__}.{name}" for module in (eqfact, eqfact.onnx, eqfact.testing) for name in module.__all__}
    if missing := sorted(public - described - {"eqfact.onnx"}):
        raise ExtensionError(f"docs/reference.md lacks {', '.join(missing)}")


def interactive_page(app: Sphinx, error: Exception | None) -> None:
    """The page that computes in the browser is no page of Sphinx: it is one file, beside the others."""
    if error is None and app.builder.format == "html":
        runpy.run_path(str(Path(__file__).parent / "interactive" / "build.py"))["build"](Path(app.outdir) / "interactive" / "index.html")


def setup(app: Sphinx) -> None:
    """Checks and pages of our own."""
    app.connect("env-check-consistency", every_public_name_is_there)
    app.connect("build-finished", interactive_page)
