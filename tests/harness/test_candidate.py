"""Spellings of a candidate, and an emitter process that misbehaves."""

import os
import re
import stat
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from candle_mi_parity.candidate import sources
from candle_mi_parity.candidate.build import BuiltEmitter
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.sources import LiveSource
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate, stored_index
from candle_mi_parity.compare.verdict import Failure
from candle_mi_parity.judge.case import failure_of
from tests.support.planting import RELEASE

# --- spelling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kind", "target", "revision"),
    [
        ("0.2.2", "version", "0.2.2", None),
        ("0.3.0-rc.1", "version", "0.3.0-rc.1", None),
        ("path:../candle-mi", "path", "../candle-mi", None),
        ("git:https://example.org/candle-mi@main", "git", "https://example.org/candle-mi", "main"),
        ("git:git@example.org:a/candle-mi@abc123", "git", "git@example.org:a/candle-mi", "abc123"),
        ("stored:some/dir", "stored", "some/dir", None),
    ],
)
def test_spellings(spec: str, kind: str, target: str, revision: str | None) -> None:
    candidate = parse_candidate(spec)
    assert (candidate.spec, candidate.kind, candidate.target) == (spec, kind, target)
    assert candidate.revision == revision and candidate.label


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("", ""),
        ("path:", ""),
        ("git:https://example.org/x", ""),
        ("git:@main", ""),
        ("git:--upload@x", ""),
        ("../candle-mi", "path:../candle-mi"),
        ("~/candle-mi", "path:~/candle-mi"),
        ("src/candle-mi", "path:src/candle-mi"),
        ("v0.2.2", "0.2.2"),
        ("https://example.org/candle-mi", "git:https://example.org/candle-mi@main"),
    ],
)
def test_an_unknown_spelling_lists_the_accepted_ones(spec: str, hint: str) -> None:
    with pytest.raises(CandidateError, match=re.escape(f"did you mean {hint}?") if hint else "unknown") as caught:
        parse_candidate(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert all(form in message for form in ("0.2.2", "path:DIR", "git:URL@REV", "stored:VERSION_OR_DIR"))


def test_the_index_of_a_stored_version_and_of_a_stored_directory(tmp_path: Path) -> None:
    for name in ("0.10.0", "0.2.2", "release"):
        (tmp_path / f"{name}.json").touch()
    assert stored_index(parse_candidate("stored:0.2.2"), tmp_path) == tmp_path / "0.2.2.json"
    assert stored_index(parse_candidate(f"stored:{tmp_path}"), tmp_path / "other") == tmp_path / "release.json"
    for spec in ("stored:9.9.9", f"stored:{tmp_path / 'absent'}"):
        with pytest.raises(CandidateError, match=r"stored versions: 0\.2\.2, 0\.10\.0"):
            stored_index(parse_candidate(spec), tmp_path)


# --- the emitter process --------------------------------------------------------------------------

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
    """Make an emitter that runs ``body`` for the request of case ``bad``, and answers any other correctly."""

    def make(body: str) -> Path:
        script = tmp_path / "fake-emitter"
        script.write_text(
            f"#!{sys.executable}\n"
            "import json, os, signal, sys, time\n"
            "from pathlib import Path\n"
            "def reply(value): print(json.dumps(value), flush=True)\n"
            "for line in sys.stdin:\n"
            "    request = json.loads(line)\n"
            "    if request['case']['id'] == 'bad':\n"
            f"        {body}\n"
            "        continue\n" + textwrap.indent(GOOD, "    ")
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return script

    return make


def ask(out: Path, case: str = "bad", **more: object) -> dict[str, object]:
    return {"case": {"id": case, "digest": "00"}, "out": str(out), **more}


def fails(emitter: EmitterProcess, request: dict[str, object], timeout: float = 20.0) -> EmitterError:
    with pytest.raises(EmitterError) as caught:
        emitter.emit(request, timeout=timeout)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_refusal_keeps_its_kind_and_the_process(fake: Fake, tmp_path: Path) -> None:
    refusal = 'reply({"case": "bad", "ok": False, "kind": "model", "error": f"no {os.getpid()}"})'
    with EmitterProcess(fake(refusal)) as emitter:
        first, second = (fails(emitter, ask(tmp_path / "o.json")) for _ in range(2))
        assert first.kind == "model" and first.message == second.message
        assert fails(emitter, ask(tmp_path / "o.json", factor=float("nan"))).kind == "request"
        assert emitter.emit(ask(tmp_path / "o.json", case="good"), timeout=20) == tmp_path / "o.json"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('print("out of cheese", file=sys.stderr); sys.exit(3)', ("code 3", "out of cheese")),
        ("os.kill(os.getpid(), signal.SIGABRT)", ("SIGABRT",)),
        ("os.close(1); time.sleep(60)", ("closed its output without ending, and was killed",)),
        ("import subprocess; subprocess.Popen(['sleep', '60']); sys.exit(5)", ("code 5 before it replied",)),
    ],
)
def test_a_crash_fails_its_own_case(fake: Fake, tmp_path: Path, body: str, expected: tuple[str, ...]) -> None:
    with EmitterProcess(fake(body)) as emitter:
        error = fails(emitter, ask(tmp_path / "o.json"))
        assert error.kind == "crash" and all(part in error.message for part in expected)
        emitter.emit(ask(tmp_path / "o.json", case="good"), timeout=20)


def test_an_end_between_two_requests_is_a_crash_that_a_new_process_follows(fake: Fake, tmp_path: Path) -> None:
    ends = 'reply({"case": "bad", "ok": False, "kind": "model", "error": "no"}); sys.exit(7)'
    with EmitterProcess(fake(ends)) as emitter:
        assert fails(emitter, ask(tmp_path / "o.json")).kind == "model"
        assert emitter._pipes
        emitter._pipes.process.wait()
        error = fails(emitter, ask(tmp_path / "o.json", case="good"))
        assert str(error) == "crash: emitter exited with code 7 after it replied to another case"
        emitter.emit(ask(tmp_path / "o.json", case="good"), timeout=20)


@pytest.mark.parametrize("pipe", ["stdout", "stderr"])
def test_output_without_an_end_is_read_in_parts(fake: Fake, tmp_path: Path, pipe: str) -> None:
    """A line without an end is no reply, and is not kept whole."""
    with EmitterProcess(fake(f"sys.{pipe}.write('x' * 40_000_000); sys.{pipe}.flush(); sys.exit(3)")) as emitter:
        error = fails(emitter, ask(tmp_path / "o.json"))
        assert error.kind == ("protocol" if pipe == "stdout" else "crash") and len(str(error)) < 600
        emitter.emit(ask(tmp_path / "o.json", case="good"), timeout=20)


def test_replies_to_no_request_are_not_kept_without_a_limit(fake: Fake, tmp_path: Path) -> None:
    refusal = 'reply({"case": "bad", "ok": False, "kind": "model", "error": "no"})'
    flood = f"{refusal}\n        while True: reply(1)"
    with EmitterProcess(fake(flood)) as emitter:
        assert fails(emitter, ask(tmp_path / "o.json")).kind == "model"
        assert emitter._pipes
        time.sleep(0.3)
        assert emitter._pipes.replies.qsize() < 100
        assert fails(emitter, ask(tmp_path / "o.json")).kind == "protocol"


@pytest.mark.parametrize("reply", ['"kind": "banana", "error": "no"', '"kind": [], "error": "no"', '"kind": "model"'])
def test_a_failure_of_no_known_kind_is_an_invalid_reply(fake: Fake, tmp_path: Path, reply: str) -> None:
    with EmitterProcess(fake(f'reply({{"case": "bad", "ok": False, {reply}}})')) as emitter:
        error = fails(emitter, ask(tmp_path / "o.json"))
    assert error.kind == "protocol" and "expected one of absent, request, model" in error.message


def test_a_hang_ends_at_the_timeout(fake: Fake, tmp_path: Path) -> None:
    with EmitterProcess(fake("time.sleep(600)")) as emitter:
        started = time.monotonic()
        assert fails(emitter, ask(tmp_path / "o.json"), timeout=0.5).kind == "timeout"
        # This request is longer than the buffer of a pipe, and is not read.
        assert fails(emitter, ask(tmp_path / "o.json", filler="x" * 2_000_000), timeout=0.5).kind == "timeout"
        assert time.monotonic() - started < 15
        emitter.emit(ask(tmp_path / "o.json", case="good"), timeout=20)


@pytest.mark.parametrize(
    "answer",
    [
        'print("Loading weights…", flush=True)',
        'reply({"ok": True})',
        'reply({"case": "another", "ok": True, "trace": request["out"]})',
        'reply({"case": "bad", "ok": "yes", "trace": request["out"]})',
        'reply({"case": "bad", "ok": True, "trace": request["out"]})',  # no trace was written
        'reply({"case": "bad", "ok": True, "trace": "/elsewhere.json"})',
    ],
)
@pytest.mark.parametrize("stale", [False, True])
def test_an_invalid_reply_is_refused(fake: Fake, tmp_path: Path, answer: str, stale: bool) -> None:
    out = tmp_path / "o.json"
    if stale:
        out.write_text("{}")  # the trace of an earlier run must not pass for the answer
    with EmitterProcess(fake(answer)) as emitter:
        assert fails(emitter, ask(out)).kind == "protocol"
        assert emitter.emit(ask(out, case="good"), timeout=20) == out


def test_a_part_that_was_not_built_is_refused_with_the_compilers_reason(fake: Fake, tmp_path: Path) -> None:
    told = "this emitter was built without its part `sae`"
    path = fake(f'reply({{"case": "bad", "ok": False, "kind": "not-built", "error": "{told}"}})')
    with EmitterProcess(path, {"calls": "emitter/call.rs:1", "sae": "emitter/src/sae.rs:9: error: x"}) as emitter:
        error = fails(emitter, ask(tmp_path / "o.json"))
    assert (error.kind, error.message) == (
        "not-built",
        f"{told}, which does not compile against this candle-mi: emitter/src/sae.rs:9: error: x",
    )
    assert failure_of(error) is Failure.NOT_BUILT and not failure_of(error).crashed


def test_a_part_that_the_candidate_does_not_have_is_absent(fake: Fake, tmp_path: Path) -> None:
    path = fake('reply({"case": "bad", "ok": False, "kind": "not-built", "error": "without its part `quantized`"})')
    with EmitterProcess(path, absent=("quantized",)) as emitter:
        error = fails(emitter, ask(tmp_path / "o.json"))
    assert (error.kind, error.message) == ("absent", "this candle-mi has no feature quantized")


def test_a_case_gets_the_build_that_has_its_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A lane is built once, when it is first asked for; what cannot be asked says whether it is absent or broken."""
    built: list[tuple[str, ...]] = []

    def build(*args: object, counted: bool = False) -> BuiltEmitter:
        features = args[3] if len(args) > 3 else ()
        assert isinstance(features, tuple)
        built.append(features)
        if "clt" in features:
            raise CandidateError("candle-mi 0.2.2 does not compile: src/clt/mod.rs:1:1: error: x")
        broken = {"quantized": "src/backend.rs:9:1: error: x"}
        return BuiltEmitter(tmp_path / str(len(built)), {"candle_mi": RELEASE.model_dump()}, broken, ("sae", "rwkv"))

    monkeypatch.setattr(sources, "build", build)
    monkeypatch.setattr(sources, "LANES", ("mmap", "clt", "rwkv"))
    source = LiveSource(parse_candidate("0.2.2"), tmp_path, tmp_path, print, "cpu")
    assert source.emitter_with(()) is source.emitter and built == [()]
    mapped = source.emitter_with(["mmap"])
    assert mapped is source.emitter_with(["mmap"]) is not source.emitter and built == [(), ("mmap",)]
    for features, kind, told in (
        (["sae"], "absent", "candle-mi 0.2.2 has no feature sae"),
        (["rwkv"], "absent", "candle-mi 0.2.2 has no feature rwkv"),
        (["quantized"], "not-built", "src/backend.rs:9:1: error: x"),
        (["clt"], "not-built", "src/clt/mod.rs:1:1: error: x"),
    ):
        for _ in range(2):
            with pytest.raises(EmitterError) as caught:
                source.emitter_with(features)
            assert caught.value.kind == kind and told in caught.value.message
    assert built.count(("clt",)) == 1
    source.__exit__()


def test_close_ends_an_emitter_that_another_thread_is_ending(fake: Fake, tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    body = f'open({str(noted)!r}, "w").write(f"{{os.getpid()}} "); os.close(1); time.sleep(60)'
    emitter = EmitterProcess(fake(body))
    asking = Thread(target=lambda: fails(emitter, ask(tmp_path / "o.json")))
    asking.start()
    while not (noted.is_file() and noted.read_text().endswith(" ")):
        time.sleep(0.01)
    while emitter._pipes is not None:  # until the other thread has taken it, to give it a second
        time.sleep(0.01)
    emitter.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    asking.join()


def test_an_absent_binary_is_an_error(tmp_path: Path) -> None:
    with EmitterProcess(tmp_path / "absent") as emitter:
        assert fails(emitter, ask(tmp_path / "o.json")).kind == "crash"
