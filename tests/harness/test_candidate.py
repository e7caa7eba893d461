"""The candidate's side of the harness: spellings, and an emitter that lies."""

from __future__ import annotations

import re
import stat
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate, stored_index

# --- spelling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kind", "target", "revision"),
    [
        ("0.2.2", "version", "0.2.2", None),
        ("0.3.0-rc.1", "version", "0.3.0-rc.1", None),
        ("path:../candle-mi", "path", "../candle-mi", None),
        ("git:https://example.org/candle-mi@main", "git", "https://example.org/candle-mi", "main"),
        ("git:git@example.org:a/candle-mi@abc123", "git", "git@example.org:a/candle-mi", "abc123"),
        ("stored:0.2.2", "stored", "0.2.2", None),
        ("stored:some/dir", "stored", "some/dir", None),
    ],
)
def test_spellings(spec: str, kind: str, target: str, revision: str | None) -> None:
    candidate = parse_candidate(spec)
    assert (candidate.kind, candidate.target, candidate.revision) == (kind, target, revision)
    assert candidate.spec == spec
    assert candidate.label


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "0.2",
        "v0.2.2",
        "path:",
        "git:https://example.org/x",
        "git:@main",
        "git:url@",
        "git:--upload@x",
        "hub:x",
    ],
)
def test_an_unknown_spelling_lists_the_accepted_ones(spec: str) -> None:
    with pytest.raises(CandidateError) as caught:
        parse_candidate(spec)
    message = str(caught.value)
    assert "\n" not in message
    for form in ("0.2.2", "path:DIR", "git:URL@REV", "stored:VERSION_OR_DIR"):
        assert form in message


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("../candle-mi", "path:../candle-mi"),
        ("/src/candle-mi", "path:/src/candle-mi"),
        ("~/candle-mi", "path:~/candle-mi"),
        ("src/candle-mi", "path:src/candle-mi"),
        ("v0.2.2", "0.2.2"),
        ("https://example.org/candle-mi", "git:https://example.org/candle-mi@main"),
    ],
)
def test_what_was_probably_meant_is_said(spec: str, meant: str) -> None:
    with pytest.raises(CandidateError, match=re.escape(f"did you mean {meant}?")):
        parse_candidate(spec)


def test_a_stored_version_has_its_index_in_rust_outputs_and_a_directory_its_own(tmp_path: Path) -> None:
    for name in ("0.10.0", "0.2.2", "release"):
        (tmp_path / f"{name}.json").touch()
    assert stored_index(parse_candidate("stored:0.2.2"), tmp_path) == tmp_path / "0.2.2.json"
    assert stored_index(parse_candidate(f"stored:{tmp_path}"), tmp_path / "other") == tmp_path / "release.json"
    for spec in ("stored:9.9.9", f"stored:{tmp_path / 'absent'}"):
        with pytest.raises(CandidateError, match=r"stored versions: 0\.2\.2, 0\.10\.0"):
            stored_index(parse_candidate(spec), tmp_path)


# --- an emitter that lies -------------------------------------------------------------------------

Fake = Callable[[str], Path]

GOOD = """
    Path(request["out"]).unlink(missing_ok=True)
    temporary = Path(request["out"] + ".tmp")
    temporary.write_text("{}")
    temporary.rename(request["out"])
    reply({"case": request["case"]["id"], "ok": True, "trace": request["out"]})
"""


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Make an emitter that runs ``body`` for each ``request``."""

    def make(body: str) -> Path:
        script = tmp_path / "fake-emitter"
        script.write_text(
            f"#!{sys.executable}\n"
            "import json, os, signal, sys, time\n"
            "from pathlib import Path\n"
            "def reply(value): print(json.dumps(value), flush=True)\n"
            "for line in sys.stdin:\n"
            "    request = json.loads(line)\n" + textwrap.indent(textwrap.dedent(body), "    ")
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return script

    return make


def ask(out: Path, case: str = "a/b/1", **more: object) -> dict[str, object]:
    return {"case": {"id": case, "digest": "00"}, "out": str(out), **more}


def fails(emitter: EmitterProcess, request: dict[str, object], timeout: float = 20.0) -> EmitterError:
    with pytest.raises(EmitterError) as caught:
        emitter.emit(request, timeout=timeout)
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_honest_emitter_answers_many(fake: Fake, tmp_path: Path) -> None:
    with EmitterProcess(fake(GOOD)) as emitter:
        for number in range(3):
            out = tmp_path / f"{number}.json"
            assert emitter.emit(ask(out, case=str(number)), timeout=20) == out


def test_a_refusal_keeps_its_kind_and_the_process(fake: Fake, tmp_path: Path) -> None:
    body = 'reply({"case": request["case"]["id"], "ok": False, "kind": "model", "error": f"no {os.getpid()}"})'
    with EmitterProcess(fake(body)) as emitter:
        first, second = (fails(emitter, ask(tmp_path / "o.json")) for _ in range(2))
    assert first.kind == "model"
    assert first.message == second.message  # the same process


def test_a_request_without_a_case_is_answered_without_one(fake: Fake, tmp_path: Path) -> None:
    out = tmp_path / "tokens.json"
    named = textwrap.dedent(GOOD).replace('request["case"]["id"]', 'request.get("other")')
    with EmitterProcess(fake(named)) as emitter:
        assert emitter.emit({"out": str(out)}, timeout=20) == out
        assert fails(emitter, {"out": str(out), "other": "a/b/1"}).kind == "protocol"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('print("out of cheese", file=sys.stderr); sys.exit(3)', ("code 3", "out of cheese")),
        ("os.kill(os.getpid(), signal.SIGABRT)", ("SIGABRT",)),
        ("os.close(1); time.sleep(60)", ("SIGKILL",)),
    ],
)
def test_a_crash_costs_its_own_case(fake: Fake, tmp_path: Path, body: str, told: tuple[str, ...]) -> None:
    crashing = f'if request["case"]["id"] == "bad":\n{textwrap.indent(body, "    ")}\n' + textwrap.dedent(GOOD)
    with EmitterProcess(fake(crashing)) as emitter:
        error = fails(emitter, ask(tmp_path / "o.json", case="bad"))
        assert error.kind == "crash"
        for part in told:
            assert part in error.message
        emitter.emit(ask(tmp_path / "o.json"), timeout=20)


def test_a_hang_ends_at_the_time_out(fake: Fake, tmp_path: Path) -> None:
    hanging = 'if request["case"]["id"] == "bad": time.sleep(600)\n' + textwrap.dedent(GOOD)
    with EmitterProcess(fake(hanging)) as emitter:
        started = time.monotonic()
        error = fails(emitter, ask(tmp_path / "o.json", case="bad"), timeout=0.5)
        assert error.kind == "timeout"
        assert time.monotonic() - started < 15
        emitter.emit(ask(tmp_path / "o.json"), timeout=20)


def test_an_emitter_that_does_not_read_hangs_nothing(tmp_path: Path) -> None:
    script = tmp_path / "deaf"
    script.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    script.chmod(0o755)
    with EmitterProcess(script) as emitter:
        # More than a pipe holds.
        assert fails(emitter, ask(tmp_path / "o.json", filler="x" * 2_000_000), timeout=1.0).kind == "timeout"


@pytest.mark.parametrize(
    "answer",
    [
        'print("Loading weights…", flush=True)',
        'print("[1, 2]", flush=True)',
        'reply({"ok": True})',
        'reply({"case": "another", "ok": True, "trace": request["out"]})',
        'reply({"case": request["case"]["id"], "ok": "yes", "trace": request["out"]})',
        # Says that it wrote, and did not.
        'reply({"case": request["case"]["id"], "ok": True, "trace": request["out"]})',
        'reply({"case": request["case"]["id"], "ok": True, "trace": "/elsewhere.json"})',
    ],
)
@pytest.mark.parametrize("stale", [False, True])
def test_a_liar_is_caught_and_replaced(fake: Fake, tmp_path: Path, answer: str, stale: bool) -> None:
    out = tmp_path / "o.json"
    if stale:
        # A trace of an earlier run must not pass for an answer.
        out.write_text("{}")
    body = f'if request["case"]["id"] == "bad":\n    {answer}\n    continue\n' + textwrap.dedent(GOOD)
    with EmitterProcess(fake(body)) as emitter:
        assert fails(emitter, ask(out, case="bad")).kind == "protocol"
        assert emitter.emit(ask(out), timeout=20) == out


def test_no_binary_is_one_error(tmp_path: Path) -> None:
    with EmitterProcess(tmp_path / "absent") as emitter:
        assert fails(emitter, ask(tmp_path / "o.json")).kind == "crash"


def test_what_json_cannot_say_is_not_sent(fake: Fake, tmp_path: Path) -> None:
    with EmitterProcess(fake(GOOD)) as emitter:
        assert fails(emitter, ask(tmp_path / "o.json", factor=float("nan"))).kind == "request"
