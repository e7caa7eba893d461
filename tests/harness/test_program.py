"""``command:PROGRAM``: the example port passes, and a program that lies does not."""

import json
import shlex
import sys
from pathlib import Path

import jsonschema
import pytest

from candle_mi_parity.candidate.program import ProgramSource
from candle_mi_parity.candidate.requests import request
from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.paths import ROOT, cache_root
from candle_mi_parity.trace.trace import Document
from tests.support.planting import CASES, judged

PORT = ROOT / "docs" / "examples" / "port.py"
HUB = CASES["llama/hub"]


def results(out: Path, cases: list[Case], lie: tuple[str, str] = ("", ""), seconds: float = 60.0) -> list[CaseResult]:
    """Judge the example with one text of its source replaced by another."""
    text = PORT.read_text(encoding="utf-8")
    assert lie[0] in text
    program = out / "port.py"
    program.write_text(text.replace(*lie) if lie[0] else text, encoding="utf-8")
    candidate = parse_candidate("command:" + shlex.join([sys.executable, str(program)]))
    with open_source(candidate, cache_root(), out / "traces", print) as source:
        assert isinstance(source, ProgramSource)
        source.seconds = seconds
        return [judged(case, source) for case in cases]


def test_the_example_computes_pytorchs_numbers(tmp_path: Path) -> None:
    [found] = results(tmp_path, [HUB])
    assert (found.status, found.error) == (Status.PASS, "")
    assert {tensor.status for tensor in found.tensors} == {Status.PASS}


def test_what_the_example_does_not_know_is_absent_and_no_pass(tmp_path: Path) -> None:
    [found] = results(tmp_path, [CASES["mistral/hub"]])
    assert (found.outcome, found.status) == (Outcome.ABSENT, Status.UNMEASURED)
    assert "this port knows the plain Llama in float32" in found.error


LIES = {
    "another angle": (('config["rope_theta"] **', "10000 **"), "FAIL", "blocks.0.attn.hook_scores"),
    "a tensor left out": (('if name in request["captures"]', 'if name != "hook_embed"'), "FAIL", "hook_embed"),
    "NaN": (('at("logits", at(', 'at("logits", np.nan * at('), "FAIL", "logits"),
    "another shape": (("(array, np.float32) for", "(array[:, 1:], np.float32) for"), "FAIL", "hook_embed"),
    "zeros": (("(array, np.float32) for", "(array * 0, np.float32) for"), "FAIL", "hook_embed"),
    "no trace": (("write(asked, run(asked))", "run(asked)"), "ERROR", "replied ok but wrote no new trace"),
    "another case": (('reply | {"case": asked["case"]["id"]}', 'reply | {"case": "x"}'), "ERROR", "invalid reply"),
    "another model": (('"model_digest": sha(', '"model_digest": sha(b"x" + '), "ERROR", "model digest is"),
    "stale inputs": (('"inputs_digest": sha(', '"inputs_digest": sha(b"x" + '), "ERROR", "inputs digest is"),
    "a hang": (("asked = json.loads(line)", "__import__('time').sleep(60)"), "ERROR", "no reply"),
    "a crash": (("asked = json.loads(line)", "sys.exit('gone')"), "ERROR", "stderr: gone"),
    "no JSON": (("print(json.dumps(", "print('x' + json.dumps("), "ERROR", "invalid reply"),
    "a refusal": (("write(asked, run(asked))", "raise ValueError('no')"), "ERROR", "forward: no"),
}
"""What is replaced in the example's source, the status of the case, and where it fails or what is said."""


@pytest.mark.every(3)
@pytest.mark.parametrize("lie", LIES)
def test_a_program_that_lies_does_not_pass(tmp_path: Path, lie: str) -> None:
    planted, status, where = LIES[lie]
    [found] = results(tmp_path, [HUB], planted, seconds=2.0 if lie == "a hang" else 60.0)
    assert found.status.value == status
    first = found.first_divergence
    assert where in found.error if status == "ERROR" else first is not None and first.name == where


def test_a_program_says_always_the_same_of_itself(tmp_path: Path) -> None:
    """Otherwise two programs might answer in turn."""
    lie = ('"numpy port 1"', "str(out)")
    first, second = results(tmp_path, [HUB, CASES["llama/one-token"]], lie)
    assert first.status is Status.PASS
    assert "and earlier traces by" in second.error


@pytest.mark.parametrize("spelt", ["command:", "command: ", "command:'a"])
def test_a_command_that_names_no_program_is_refused(spelt: str) -> None:
    with pytest.raises(CandidateError):
        parse_candidate(spelt)


def test_a_program_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with open_source(parse_candidate(f"command:{tmp_path}/none"), cache_root(), tmp_path, print) as source:
        assert "cannot be started" in judged(HUB, source).error


@pytest.mark.every(40)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lane == "default"])
def test_requests_and_traces_are_as_their_schemas_say(name: str) -> None:
    schema = json.loads((ROOT / "docs" / "request.schema.json").read_text(encoding="utf-8"))
    subject = prepare(CASES[name], cache_root())
    for mode in ("free", "forced"):
        asked = request(subject, mode, Path("inputs.safetensors"), Path("out.json"), "cpu")
        jsonschema.validate(asked, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(asked | {"more": 1}, schema)


def test_the_schema_of_a_trace_is_that_of_the_reader() -> None:
    stored = json.loads((ROOT / "docs" / "trace.schema.json").read_text(encoding="utf-8"))
    assert stored == Document.model_json_schema(), "run the command in docs/emitter-protocol.md"
