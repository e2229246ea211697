"""Level 2: which channels may have factors of their own, which must share one, and which are pinned?"""

from __future__ import annotations

from collections.abc import Iterator

from eqfact.channels import channels
from eqfact.testing.cases.case import Case
from eqfact.testing.cases.networks import all_networks
from eqfact.testing.wire import network_json


def cases() -> Iterator[Case]:
    """The cases of this level."""
    for net in all_networks():
        graph = net.graph()
        found = channels(graph)
        expected = {"judge": "labels", "degrees_of_freedom": found.degrees_of_freedom, "channels": found.numbers()}
        yield Case(f"2/{net.name}", "channels", {"network": network_json(graph)}, expected, net.law, "docs/algebra.md", net.why)
