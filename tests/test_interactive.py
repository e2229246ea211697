"""The interactive page is one small file that loads nothing and holds the port as it stands. Browsers test the rest: docs/interactive."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import eqfact as eq
from eqfact.testing.wire import array_of, network_of

DOCS = Path(__file__).parent.parent / "docs"
BUILD = runpy.run_path(str(DOCS / "interactive" / "build.py"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "interactive" / "index.html"
    assert BUILD["build"](path) == path.stat().st_size
    return path.read_text(encoding="utf-8")


def test_it_is_one_small_file_that_loads_nothing(page):
    assert len(page.encode()) < 1_500_000
    assert re.search(r"Content-Security-Policy\"\s+content=\"default-src 'none';", page)
    assert not re.search(r"<(script|img|iframe|source|object|embed)[^>]*\bsrc=|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", page)
    assert set(re.findall(r'<link[^>]*href="([^"]*)"', page)) == {"data:,"}
    without_links = re.sub(r'<a href="https://[^"]*">', "", page).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://", without_links)


def test_it_holds_the_port_as_it_stands(page):
    assert (DOCS / "ports" / "javascript" / "port.js").read_text(encoding="utf-8") in page


def test_its_networks_are_eqfacts_and_their_outputs_stay(page):
    networks = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert set(networks) == {"toy", "digits"}
    for of in networks.values():
        net, samples = network_of(of["network"]), array_of(of["samples"])
        best = eq.Factorization.of(net, {value: array_of(f) for value, f in of["optimal"].items()})
        assert eq.verify(net, best.apply(net), samples)
        assert len(of["names"]) == len(samples) == 20
        for value, reasons in of["reasons"].items():
            assert [reason is None for reason in reasons] == (eq.channels(net).labels[value] > 0).tolist()
    (toy, digits) = (network_of(networks[name]["network"]) for name in ("toy", "digits"))
    assert eq.degrees_of_freedom(toy) == 8
    assert np.array_equal(eq.channels(toy).labels["sum"] > 0, [True, True, True, False])
    assert eq.degrees_of_freedom(digits) == 1384


def test_a_reason_without_words_is_an_error():
    with pytest.raises(ValueError, match="no words for the reason 'because'"):
        BUILD["in_words"]("because")


def test_a_page_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILD["build"].__globals__, "LARGEST", 1000)
    with pytest.raises(ValueError, match="may have 1000"):
        BUILD["build"](tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
