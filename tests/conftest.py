"""Hypothesis profiles: ``fixed`` tries the same examples in every run; ``HYPOTHESIS_PROFILE=search`` looks for new ones; ``first`` is
``fixed`` that shows the first failure as it is found, for benchmarks/mutation.py.

The whole suite runs on all cores where pytest-xdist is installed; files that are named on the command line run in one process.
"""

import os

# before numpy is imported: on small matrices more threads only wait for each other, for milliseconds if another process has a core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, Phase, settings

# machines differ: no test fails for being slow
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("fixed"), derandomize=False, max_examples=2000, print_blob=True)
settings.register_profile("first", settings.get_profile("fixed"), phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """As ``-n CORES`` would do, but no error where pytest-xdist is missing."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = os.cpu_count()
        config.option.dist = "loadgroup"  # tests of one xdist_group share a process, and what it has drawn


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch):
    """Plant a wrong implementation, and see that a law that holds without it fails with it."""
    def check(law, owner, name, wrong):
        law()
        with monkeypatch.context() as planting:
            planting.setattr(owner, name, wrong)
            with pytest.raises(AssertionError):
                law()
    return check
