"""Hypothesis profiles: ``fixed`` tries the same examples in every run; ``HYPOTHESIS_PROFILE=search`` looks for new ones."""

import os

# before numpy is imported: on small matrices more threads only wait for each other, for milliseconds if another process has a core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

# machines differ: no test fails for being slow
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("fixed"), derandomize=False, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
