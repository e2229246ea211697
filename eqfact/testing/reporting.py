"""How is a conformance run told to others? As a JUnit file for a build, as a page for a reader, as facts for a program."""

from __future__ import annotations

import html
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from eqfact.testing.cases import LEVELS
from eqfact.testing.runner import VERDICTS, Outcome, Run


def facts(run: Run) -> dict[str, Any]:
    """The run as plain data: who was asked, the count of verdicts by level, what failed and why, and every case."""
    asked = {outcome.case.level for outcome in run.outcomes}
    return {
        "ok": run.ok, "implementation": run.hello,
        "levels": [{"level": level.number, "title": level.title, **{v: run.count(v, level.number) for v in VERDICTS}}
                   for level in LEVELS if level.number in asked],
        "failures": [failure(o) for o in run.outcomes if o.verdict == "failed"],
        "skips": dict(Counter(o.reason for o in run.outcomes if o.verdict == "skipped").most_common()),
        "cases": [{"id": o.case.id, "verdict": o.verdict, "seconds": round(o.seconds, 6)} for o in run.outcomes],
    }


def failure(outcome: Outcome) -> dict[str, str]:
    """What is wrong with an answer, and which law it breaks."""
    case, wrong = outcome.case, outcome.wrong
    assert wrong is not None
    return {"id": case.id, "where": wrong.where, "expected": wrong.expected, "got": wrong.got, "law": case.law, "source": case.source,
            "why": case.why}


def write_junit(path: str, run: Run) -> None:
    """The run as JUnit XML, a suite a level."""
    suites = ElementTree.Element("testsuites", name=f"{run.hello['name']} {run.hello['version']}")
    for level in LEVELS:
        outcomes = [o for o in run.outcomes if o.case.level == level.number]
        if not outcomes:
            continue
        suite = ElementTree.SubElement(suites, "testsuite", name=f"{level.number} {level.title}", tests=str(len(outcomes)), errors="0",
                                       failures=str(run.count("failed", level.number)), skipped=str(run.count("skipped", level.number)))
        for outcome in outcomes:
            entry = ElementTree.SubElement(suite, "testcase", classname=f"level{level.number}", name=_printable(outcome.case.name),
                                           time=f"{outcome.seconds:.6f}")
            if outcome.verdict == "failed":
                told = failure(outcome)
                ElementTree.SubElement(entry, "failure", message=_printable(str(outcome.wrong))).text = _printable(
                    f"{told['law']} ({told['source']})")
            elif outcome.verdict == "skipped":
                ElementTree.SubElement(entry, "skipped", message=_printable(outcome.reason))
    ElementTree.indent(suites)
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def write_html(path: str, run: Run) -> None:
    """The run as one page that needs nothing else."""
    told, escaped = facts(run), html.escape
    hello = run.hello
    rows = "".join(f"<tr><td>{level['level']}</td><td>{escaped(level['title'])}</td>" + "".join(
        f"<td class={verdict}>{level[verdict] or ''}</td>" for verdict in VERDICTS) + "</tr>" for level in told["levels"])
    wrong = "".join(f"<details><summary>{escaped(f['id'])}: {escaped(f['where'])}</summary><dl>" + "".join(
        f"<dt>{key}</dt><dd>{escaped(f[key])}</dd>" for key in ("expected", "got", "law", "source", "why")) + "</dl></details>"
        for f in told["failures"]) or "<p>None.</p>"
    skipped = "".join(f"<li>{count} cases: {escaped(reason)}</li>" for reason, count in told["skips"].items())
    title = f"{escaped(hello['name'])} {escaped(hello['version'])} ({escaped(hello['language'])})"
    Path(path).write_text(f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Conformance of {title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color-scheme: light dark }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #8884; text-align: right }}
td:nth-child(2), th:nth-child(2) {{ text-align: left }} .failed {{ color: #c33; font-weight: bold }} .passed {{ color: #283 }}
dt {{ font-weight: bold }} dd {{ margin: 0 0 .4em 1em; font-family: ui-monospace, monospace; overflow-wrap: anywhere }}
</style></head><body><h1>{title}</h1>
<p>{run.count('passed')} cases passed, {run.count('failed')} failed, {run.count('skipped')} skipped.</p>
<table><tr><th>level</th><th>what is asked</th><th>passed</th><th>failed</th><th>skipped</th></tr>{rows}</table>
<h2>Failed</h2>{wrong}{'<h2>Skipped</h2><ul>' + skipped + '</ul>' if skipped else ''}</body></html>
""", encoding="utf-8")
