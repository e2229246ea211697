"""What does the page of results say? Text and tables, from the measurements kept and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text(kept: Mapping[str, Any]) -> str:
    return str(dict(kept))
