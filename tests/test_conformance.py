"""The conformance kit: cases that are right by other people's code, judges that can say no, and a runner that nothing upsets."""

import hashlib
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnxruntime
import pytest

import eqfact as eq
from benchmarks.faults import FAULTS, PAGE, killed
from eqfact.__main__ import main
from eqfact.ops import Weighted
from eqfact.testing import laws, runner
from eqfact.testing.adapter import answer
from eqfact.testing.cases import LEVELS, all_cases, networks, pairs, read, write
from eqfact.testing.cases.case import LARGEST, Case
from eqfact.testing.judging import JUDGES, Wrong, judge
from eqfact.testing.wire import array_json, array_of, arrays_of, network_json, network_of

CASES = all_cases()
BY_ID = {case.id: case for case in CASES}
ROOT = Path(__file__).parents[1]

each_level = pytest.mark.parametrize("level", [level.number for level in LEVELS])


def of_level(level):
    return [case for case in CASES if case.level == level]


def asked(case):
    """What eqfact's own adapter answers, through JSON and back."""
    reply = json.loads(json.dumps(answer({"id": 1, "ask": case.ask, **case.request})))
    return reply["answer"]


# ------------------------------------------------------------------------------------------------ the cases


@each_level
def test_eqfact_passes(level):
    for case in of_level(level):
        judge(case, asked(case))


def test_cases_are_as_many_and_as_small_as_they_should_be():
    sizes = [len(case.text().encode()) for case in CASES]
    assert 300 <= len(CASES) <= 600 and max(sizes) <= LARGEST and sum(sizes) <= 5_000_000
    assert len(BY_ID) == len(CASES) and {case.level for case in CASES} == set(range(9))
    for case in CASES:
        assert re.fullmatch(r"\d/[a-z0-9_A-Z-]+", case.id) and case.expected["judge"] in JUDGES
        assert case.law and case.source and case.why, case.id


DIGEST = "import hashlib; from eqfact.testing.cases import all_cases; " \
         "print(hashlib.sha256(''.join(case.text() for case in all_cases()).encode()).hexdigest())"


@pytest.mark.parametrize("features", ["", "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR FMA3 AVX2"])
def test_cases_are_the_same_to_the_byte_on_processors_that_compute_otherwise(features):
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": features, "OPENBLAS_CORETYPE": "Nehalem" if features else ""}
    environment = {key: value for key, value in environment.items() if value}
    made = subprocess.run([sys.executable, "-W", "ignore", "-c", DIGEST], env=environment, capture_output=True, text=True, check=True,
                          cwd=ROOT)
    assert made.stdout.strip() == hashlib.sha256("".join(case.text() for case in CASES).encode()).hexdigest()


def test_the_digest_of_other_cases_is_another():
    assert CASES[0].text() != CASES[1].text()


FORWARD = [case for case in of_level(0) if case.expected["judge"] == "arrays"]
#: What onnxruntime has no double-precision kernel for, or computes in its own way.
SINGLE = np.dtype(np.float32)


@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.id)
def test_expected_outputs_are_those_of_onnxruntime(case, tmp_path):
    """The networks of level 0 in single precision, written as ONNX and run by somebody else's code."""
    graph = network_of(case.request["network"])
    single = eq.Graph(graph.inputs, [eq.Node(n.name, networks.cast(n.op, "float32"), n.inputs) for n in graph.nodes], graph.outputs)
    eq.onnx.save(tmp_path / "net.onnx", _one_op_stays_one(graph, single))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    inputs = {name: x.astype(np.float32) for name, x in arrays_of(case.request["inputs"]).items()}
    found = dict(zip(graph.outputs, session.run(list(graph.outputs), inputs), strict=True))
    for name, expected in arrays_of(case.expected["answer"]["outputs"]).items():
        within = case.expected.get("within", {}).get(name, 0.0) or 1e-6
        assert np.abs(found[name] - expected).max() <= max(within, 1e-5), name


def _one_op_stays_one(graph, single):
    first = {}
    return single.with_ops({node.name: first.setdefault(id(graph[node.name].op), node.op) for node in single.nodes})


@pytest.mark.parametrize("net", [net for net in networks.all_networks() if net.exact], ids=lambda net: net.name)
def test_no_order_of_adding_up_rounds_anything(net):
    """Every partial sum of a layer is a whole number of the smallest product, below 2**24 of it: float32 holds it."""
    graph, inputs = net.graph("float32"), net.inputs("float32")
    every = eq.values(graph, inputs)
    for node in graph.nodes:
        if isinstance(node.op, Weighted) and not isinstance(node.op, eq.BatchNorm):
            (x,) = (every[i] for i in node.inputs)
            unit = _unit(node.op.weight) * _unit(x) if node.op.bias is None else min(_unit(node.op.weight) * _unit(x), _unit(node.op.bias))
            bias = 0 if node.op.bias is None else np.abs(node.op.bias).max()
            largest = node.op.absolute.forward(np.abs(x).astype(np.float64)).max() + bias
            assert largest / unit < 2**24, node.name


def _unit(x):
    """The power of two that all entries are multiples of."""
    return min(2.0 ** -int(np.log2(Fraction(float(v)).denominator)) if v % 1 else 1.0 for v in np.ravel(x))


@pytest.mark.parametrize("net", [net for net in networks.all_networks() if net.name != "dead"], ids=lambda net: net.name)
def test_expected_degrees_of_freedom_are_those_that_the_equations_leave(net):
    case = BY_ID[f"2/{net.name}"]
    graph = network_of(case.request["network"])
    rng = np.random.default_rng(1)
    laws.degrees_of_freedom_are_maximal(graph, {name: rng.normal(0, 2, (24, *shape)) for name, shape in graph.inputs.items()})
    assert case.expected["degrees_of_freedom"] == eq.degrees_of_freedom(graph)


PLAIN = ["chain", "convs", "relu6", "prelu", "depthwise", "grouped", "transposed-groups", "flatten"]


@pytest.mark.parametrize("method", ["one_step", "two_step"])
@pytest.mark.parametrize("name", PLAIN)
def test_expected_factors_are_those_of_the_papers_formula(method, name):
    """On networks whose layers each make channels of their own: sections 2 and 3 of the paper, layer after layer, written out."""
    case = next(case for case in of_level(4) if case.id.startswith(f"4/{method}-{name}-float"))
    graph, expected = network_of(case.request["network"]), arrays_of(case.expected["factors"])
    extrema = {value: arrays_of(of) for value, of in case.request["statistics"].items()}
    labels = eq.channels(graph).labels
    f = {value: np.ones(len(of)) for value, of in labels.items()}
    layers = [node for node in graph.nodes if isinstance(node.op, Weighted)]

    def size(node):
        """``|W| f_out / f_in``, largest over the taps, as one matrix over all channels; 0 outside of the groups."""
        taps = np.abs(node.op.taps()).max(axis=3)
        groups, rows, inner = taps.shape
        matrix = np.zeros((groups * rows, groups * inner))
        for g in range(groups):
            matrix[g * rows:(g + 1) * rows, g * inner:(g + 1) * inner] = taps[g]
        return matrix * f[node.name][:, None] / f[node.inputs[0]]

    for node in layers:
        own = labels[node.name]
        if (own == 0).all():
            continue
        value = node.name
        while value not in graph.outputs and len(graph.readers[value]) == 1 and type(graph.readers[value][0].op).__name__ in ("ReLU",
            "Clip", "PReLU"):
            value = graph.readers[value][0].name
        k, a = size(node).max(axis=1), np.maximum(-extrema[value]["min"], extrema[value]["max"])
        m = np.zeros(len(own))
        for reader in layers:
            columns = size(reader).max(axis=0)
            for i, label in enumerate(own):
                mine = columns[labels[reader.inputs[0]] == label]
                m[i] = max(m[i], mine.max(initial=0) / columns.max())
        m = m if method == "two_step" else np.ones(len(own))
        factor = np.minimum((k * m).max() / k, np.minimum((a * m).max() / a, 16))
        for value, of in labels.items():
            for i, label in enumerate(own):
                f[value][of == label] = factor[i]
    for value in graph.shapes:
        np.testing.assert_allclose(expected[value], f[value], rtol=1e-12)


@pytest.mark.parametrize("case", of_level(8), ids=lambda case: case.id)
def test_pairs_are_as_near_and_as_far_apart_as_they_are_said_to_be(case):
    a, b, x = network_of(case.request["a"]), network_of(case.request["b"]), arrays_of(case.request["inputs"])
    of_a, of_b = eq.values(a, x), eq.values(b, x)
    bounds = [laws.rounding_bounds(graph, x) for graph in (a, b)]
    apart = max(float((np.abs(of_a[name].astype(np.float64) - of_b[name]) / (bounds[0][name] + bounds[1][name] + 1e-300)).max())
                for name in a.outputs)
    assert apart < 0.1 if case.expected["answer"]["equal"] else apart > 10


def test_every_change_of_a_pair_is_asked_about():
    assert {f"8/unequal-{name}" for name in pairs.CHANGES} == {case.id.rpartition("-")[0] for case in of_level(8) if "/unequal-" in case.id}


@pytest.mark.parametrize("net", list(networks.all_networks()), ids=lambda net: net.name)
def test_networks_are_read_from_the_files_they_are_written_to(net, tmp_path):
    graph = net.graph("float32")
    eq.onnx.save(tmp_path / "net.onnx", graph)
    (tmp_path / "net.onnx").rename(tmp_path / "of others.onnx")
    read, x = eq.onnx.load(tmp_path / "of others.onnx"), net.inputs("float32")
    assert eq.verify(graph, read, x), net.name


# ------------------------------------------------------------------------------------------------ what kills what


@each_level
def test_every_planted_fault_is_killed_by_a_case_of_its_level(level):
    cases = of_level(level)
    for fault in (fault for fault in FAULTS if fault.level == level):
        assert next(killed(fault, cases), None) is not None, fault.name


def test_a_right_adapter_is_not_a_fault():
    from benchmarks.faults import Fault, with_op
    nothing = Fault(0, "nothing", "", with_op(eq.Dense, lambda op: op))
    assert not list(killed(nothing, of_level(0)))


def test_there_are_faults_enough_and_the_page_has_them_all():
    text = PAGE.read_text()
    assert len(FAULTS) >= 60 and {fault.level for fault in FAULTS} == set(range(9))
    assert len({(fault.level, fault.name) for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert f"| {fault.name} | " in text, f"{fault.name}: run python -m benchmarks faults"
    assert f"{len(FAULTS)} faults, {len(FAULTS)} killed; {len(CASES)} cases" in text


# ------------------------------------------------------------------------------------------------ judges


def test_an_answer_of_another_form_is_wrong_and_says_so():
    case = BY_ID["0/dense-float32"]
    right = asked(case)
    y = array_of(right["outputs"]["y"])
    nan, wrong = y.copy(), y.copy()
    nan[0, 1], wrong[1, 2] = np.nan, 99
    for answer_, part in (([], "an object"), ({}, "outputs"), ({"outputs": {}}, "outputs.y"), ({"outputs": {"y": 3}}, "porting.md"),
                          ({"outputs": {"y": array_json(y.astype(np.float64))}}, "dtype float32"),
                          ({"outputs": {"y": array_json(y[:1])}}, "shape (2, 3)"), ({"outputs": {"y": array_json(nan)}}, "outputs.y[0, 1]"),
                          ({"outputs": {"y": array_json(wrong)}}, "99.0"), ({"refused": "no"}, "no refusal"),
                          ({"outputs": {"y": {**right["outputs"]["y"], "base64": "AAA"}}}, "base64")):
        with pytest.raises(Wrong, match=re.escape(part)):
            judge(case, answer_)
    judge(case, right)
    judge(case, {**right, "more": "is not looked at"})


def test_zero_has_one_sign():
    case = BY_ID["0/relu-float64"]
    y = array_of(case.expected["answer"]["outputs"]["y"])
    judge(case, {"outputs": {"y": array_json(np.where(y == 0, -0.0, y))}})


def test_labels_may_have_any_numbers():
    case = BY_ID["2/residual"]
    right = asked(case)
    renamed = {value: [label and 1000 - 7 * label for label in of] for value, of in right["channels"].items()}
    judge(case, {**right, "channels": renamed})


def test_a_network_alone_is_an_answer_to_equalize():
    """Factors are then read off its weights."""
    bounded = [case for case in of_level(4) if case.expected.get("bounded")]
    assert len(bounded) == 1
    with pytest.raises(Wrong, match="factors, as some are at the bound 4"):
        judge(bounded[0], {"network": asked(bounded[0])["network"]})
    for case in of_level(4):
        if case in bounded:
            continue
        judge(case, {"network": asked(case)["network"]})
        unchanged = {"network": case.request["network"]}
        if case.expected["judge"] == "balanced" and case.expected["balanced"]:
            with pytest.raises(Wrong):
                judge(case, unchanged)


def test_a_judge_that_this_version_does_not_have_is_an_error():
    case = Case("0/x", "forward", {}, {"judge": "oracle"}, "l", "s", "w")
    with pytest.raises(ValueError, match="unknown judge 'oracle'; this eqfact has arrays"):
        judge(case, {})


# ------------------------------------------------------------------------------------------------ files


def test_files_are_what_they_were(tmp_path):
    write(tmp_path / "cases", CASES[::7])
    assert read(tmp_path / "cases") == CASES[::7]
    assert {case.level for case in read(tmp_path / "cases", [3, 4])} == {3, 4}
    write(tmp_path / "cases", CASES[:2])  # replaces what was there
    assert read(tmp_path / "cases") == CASES[:2] and len(list((tmp_path / "cases").rglob("*.json"))) == 3
    assert os.listdir(tmp_path) == ["cases"]


def test_a_folder_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write(tmp_path, CASES[:2])
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(FileNotFoundError, match="make it first"):
        write(tmp_path / "no" / "such", CASES[:2])


TEXT = CASES[0].text()


@pytest.mark.parametrize("text, said", [
    (TEXT[:-100], "truncated"), ("", "truncated"), ("[]", "it must say"), ("null", "it must say"),
    (TEXT.replace('"version": 1', '"version": 2', 1), "version 2, and this eqfact reads version 1"),
    (TEXT.replace("y = W x + b", "y = W x - b"), "edited"), (TEXT.replace('"ask": "forward"', '"ask": 3'), 'needs a str under "ask"'),
    (TEXT.replace('"law"', '"lore"'), 'under "law"'), ("[" * 100_000, "truncated"), (TEXT.replace("{", '{"a": NaN,', 1), "NaN"),
], ids=["cut", "empty", "list", "null", "version", "edited", "kind", "missing", "deep", "nan"])
def test_a_case_file_that_is_none_says_why(tmp_path, text, said, capsys):
    write(tmp_path / "cases", CASES[:2])
    (tmp_path / "cases" / f"{CASES[0].id}.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        read(tmp_path / "cases")
    assert main(["conform", "--cmd", "true", "--cases", str(tmp_path / "cases")]) == 3
    assert capsys.readouterr().err.startswith("eqfact: error: ")


def test_a_missing_case_file_and_a_wrong_index_say_so(tmp_path):
    with pytest.raises(ValueError, match="holds no cases"):
        read(tmp_path)
    write(tmp_path / "cases", CASES[:2])
    (tmp_path / "cases" / f"{CASES[1].id}.json").unlink()
    with pytest.raises(ValueError, match="is missing, and the index names it"):
        read(tmp_path / "cases")
    for text in ("{", '{"cases": ["../../x"]}', '{"cases": 3}', "[]"):
        (tmp_path / "cases" / "index.json").write_text(text)
        with pytest.raises(ValueError, match="no index of cases"):
            read(tmp_path / "cases")


def test_the_command_writes_the_cases(tmp_path):
    command = [sys.executable, "-m", "eqfact.testing.cases", "-o", str(tmp_path / "cases"), "--level", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"{len(of_level(5))} cases written to {tmp_path / 'cases'}\n" and read(tmp_path / "cases") == of_level(5)
    for wrong, status in ((["--level", "9"], 2), (["-o", str(ROOT / "eqfact")], 3)):
        done = subprocess.run(command + wrong, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == status and "error" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ the runner

#: An implementation without libraries, that does not know any answer; ``{}`` is what it does when it is asked case 3.
PORT = """
import json, os, sys, time
hello = {{"name": "port", "version": "1", "language": "Python", "levels": [0]}}
for line in sys.stdin:
    question = json.loads(line)
    number = question["id"]
    if number == 3:
        {}
    reply = {{"answer": hello}} if question["ask"] == "hello" else {{"skip": "nothing"}}
    print(json.dumps({{"id": number, **reply}}), flush=True)
"""


def port(tmp_path, does="pass", program=PORT):
    path = tmp_path / "port.py"
    path.write_text(program.format(does))
    return [sys.executable, "-S", str(path)]


@pytest.mark.parametrize("does, said", [
    ("os._exit(7)", "it ended, with exit status 7"),
    ("raise KeyError('oh')", "it ended, with exit status 1: KeyError: 'oh'"),
    ("time.sleep(60)", "it did not answer within 2 s"),
    ("print('loading weights', flush=True)", "it said what is no JSON: 'loading weights\\\\n'"),
    ("print('{\"id\": 3, \"answer\": {\"noise\": NaN}}', flush=True)", "NaN"),
    ("number = 2", "it answered another question: asked with id 3"),
    ("print('{\"id\": 3}', flush=True); continue", "none of"),
    ("print('x' * 5000000, flush=True)", "a line of more than"),
    ("print('[' * 100000, flush=True)", "no JSON"),
    ("os.close(1); time.sleep(60)", "it ended"),
    ("sys.stdout.buffer.write(bytes([255, 254, 10])); sys.stdout.flush()", "no JSON"),
    ("[print(json.dumps({'id': i, 'skip': 'x'}), flush=True) for i in (3, 4, 5)]; continue", None),
], ids=["exits", "raises", "hangs", "noise", "nan", "order", "form", "long", "deep", "closed", "bytes", "ahead"])
def test_what_an_implementation_does_to_one_case_does_not_touch_the_next(tmp_path, does, said):
    run = runner.run(port(tmp_path, does), CASES[:6], timeout=2 if said and "within" in said else 60)  # a busy machine may take a second
    verdicts = [outcome.verdict for outcome in run.outcomes]
    if said is None:  # answers to questions that were not asked yet: the one behind is the one that fails
        (failed,) = [outcome for outcome in run.outcomes if outcome.verdict == "failed"]
        assert verdicts[:3] == ["skipped"] * 3 and re.search("more than it was asked|another question", failed.wrong.got)
        return
    assert verdicts == ["skipped"] * 2 + ["failed"] + ["skipped"] * 3
    assert said.replace("\\\\", "\\") in run.outcomes[2].wrong.got and not run.ok


def test_one_that_cannot_be_started_again_fails_the_rest_in_time(tmp_path):
    flag = tmp_path / "started"
    program = f"import os, sys\nif os.path.exists({str(flag)!r}): sys.exit(5)\nopen({str(flag)!r}, 'w').close()\n" + PORT
    run = runner.run(port(tmp_path, "os._exit(1)", program.replace("{str", "{{str")), CASES[:12], timeout=1)
    assert [outcome.verdict for outcome in run.outcomes] == ["skipped"] * 2 + ["failed"] * 10
    assert "exit status 5" in run.outcomes[3].wrong.got and "could not be started again" in run.outcomes[-1].wrong.got


def test_an_error_and_levels_that_are_not_claimed(tmp_path):
    program = PORT.replace('{{"skip": "nothing"}}', '{{"error": "no idea"}}')
    run = runner.run(port(tmp_path, "pass", program), [BY_ID["0/dense-float32"], BY_ID["2/chain"]])
    assert [outcome.verdict for outcome in run.outcomes] == ["failed", "skipped"]
    assert "no idea" in run.outcomes[0].wrong.got and run.outcomes[1].reason == "does not claim level 2"


@pytest.mark.parametrize("hello, said", [
    ('{{"version": "1", "language": "C", "levels": [0]}}', "name, version and language"), ("3", "name, version and language"),
    ('{{"name": "p", "version": "1", "language": "C"}}', "needs levels"),
    ('{{"name": "p", "version": "1", "language": "C", "levels": ["all"]}}', "needs levels"),
    ('{{"name": "p", "version": "1", "language": "C", "levels": [0], "protocol": 2}}', "version 2 of the protocol"),
])
def test_hello_has_a_form(tmp_path, hello, said):
    program = re.sub(r"hello = .*", f"hello = {hello}", PORT)
    with pytest.raises(ValueError, match=said):
        runner.run(port(tmp_path, "pass", program), CASES[:2])


def test_what_cannot_be_started_is_an_error(tmp_path):
    for command, said in (("no-such-program-anywhere", "cannot be started"), ("", "is empty"),
                          ([sys.executable, "-c", "pass"], "does not say hello.*it ended, with exit status 0")):
        with pytest.raises(ValueError, match=said):
            runner.run(command, CASES[:1])
    with pytest.raises(ValueError, match="must be positive"):
        runner.run("true", CASES[:1], timeout=0)


def test_no_process_stays(tmp_path):
    with runner.Implementation(port(tmp_path)) as implementation:
        implementation.start()
        process = implementation.process
        assert process.poll() is None
    assert process.poll() is not None


# ------------------------------------------------------------------------------------------------ the command line


def test_eqfact_conforms_by_the_command_line(tmp_path, capsys):
    xml, html = tmp_path / "run.xml", tmp_path / "run.html"
    command = f"{sys.executable} -m eqfact.testing.adapter"
    assert main(["conform", "--cmd", command, "--level", "5-6,8", "--junit", str(xml), "--html", str(html), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and facts["implementation"]["name"] == "eqfact" and not facts["failures"] and not facts["skips"]
    assert [(of["level"], of["passed"]) for of in facts["levels"]] == [(n, len(of_level(n))) for n in (5, 6, 8)]
    suites = ElementTree.parse(xml).getroot()
    assert [int(suite.get("tests")) for suite in suites] == [len(of_level(n)) for n in (5, 6, 8)]
    assert {suite.get(key) for suite in suites for key in ("failures", "errors", "skipped")} == {"0"}
    assert "<h1>eqfact" in html.read_text() and "http" not in html.read_text()


def test_a_wrong_implementation_is_told_what_is_wrong(tmp_path, capsys):
    program = PORT.replace('{{"skip": "nothing"}}', '{{"answer": {{"outputs": {{"y": 3}}, "x": "<b>"}}}}')
    command = " ".join(port(tmp_path, "pass", program))
    xml, html = tmp_path / "run.xml", tmp_path / "run.html"
    assert main(["conform", "--cmd", command, "--level", "0", "--junit", str(xml), "--html", str(html)]) == 1
    said = capsys.readouterr().out
    assert "FAILED 0/dense-float32: answer" in said and "law       y = W x + b" in said and "more failed, see --json" in said
    suite = ElementTree.parse(xml).getroot()[0]
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) > 100
    assert "&lt;" in html.read_text() or "<b>" not in html.read_text()
    assert main(["conform", "--cmd", " ".join(port(tmp_path)), "--level", "0"]) == 1  # that skips everything conforms to nothing
    assert "NOT conforming: no case was answered" in capsys.readouterr().out


def test_the_help_states_the_time_that_is_given(capsys):
    with pytest.raises(SystemExit):
        main(["conform", "--help"])
    assert f"default: {runner.TIMEOUT:g}" in " ".join(capsys.readouterr().out.split())


def test_wrong_usage_and_what_is_refused(tmp_path, capsys):
    for wrong in (["--level", "9"], ["--level", "3-"], ["--level", "x"], []):
        with pytest.raises(SystemExit) as error:
            main(["conform", *(["--cmd", "true"] if wrong else []), *wrong])
        assert error.value.code == 2
    for wrong in (["--cmd", "no-such-program-anywhere"], ["--cmd", "true", "--cases", str(tmp_path)],
                  ["--cmd", "true", "--html", "no/such/folder"]):
        capsys.readouterr()
        assert main(["conform", *wrong]) == 3
        assert capsys.readouterr().err.startswith("eqfact: error: ")


# ------------------------------------------------------------------------------------------------ the page


def test_the_pages_adapter_is_one(tmp_path):
    text = (ROOT / "docs" / "porting.md").read_text()
    path = tmp_path / "my_port.py"
    path.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    run = runner.run([sys.executable, str(path)], of_level(5))
    assert run.ok and run.count("passed") == sum(case.ask == "dequantize" for case in of_level(5)) == 3


def test_the_page_has_every_ask_and_every_op():
    text = (ROOT / "docs" / "porting.md").read_text()
    for ask in {case.ask for case in CASES}:
        assert f"`{ask}`" in text, ask
    table = text.partition("## Ops")[2].partition("\n## ")[0]
    named = set(re.findall(r"[A-Z][A-Za-z]+", " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| "))))
    assert {op.__name__ for op in eq.ops.ALL} <= named | {"Sub"} | set(re.findall(r"Sub of two", table) and ["Sub"])


@pytest.mark.parametrize(("code", "said"), [
    ([], "needs dtype, shape and base64"), ({"dtype": "float32", "shape": [0]}, "needs dtype, shape and base64"),
    *(({"dtype": "float32", "shape": shape, "base64": ""}, "must be a list of whole numbers")
      for shape in (0, [-1], [0, "0"], [0.0], [False])),
    ({"dtype": "float32", "shape": [2], "base64": ""}, "has 8 bytes, got 0"), ({"dtype": "float16", "shape": [0], "base64": ""}, "one of")])
def test_what_is_no_array_is_refused(code, said):
    with pytest.raises(ValueError, match=said):
        array_of(code)
    assert array_of({"dtype": "float32", "shape": [3, 0], "base64": ""}).shape == (3, 0)


def test_networks_of_newer_versions_are_refused():
    code = network_json(next(iter(networks.all_networks())).graph())
    with pytest.raises(ValueError, match=r"a network of version 99, and this eqfact reads versions up to .*; install a newer eqfact"):
        network_of({**code, "version": 99})


def test_networks_travel_whole():
    for net in networks.all_networks():
        code = network_json(net.graph())
        assert network_json(network_of(json.loads(json.dumps(code)))) == code
        before, after = (eq.values(graph, net.inputs()) for graph in (net.graph(), network_of(code)))
        assert all(np.array_equal(after[name], value) for name, value in before.items())
