"""The command: exit codes, one line for a bad input, and no file half written."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from candle_mi_parity.spec.paths import ROOT
from tests.support.command import Done, command, one_line, process
from tests.support.full_disk import largest_file
from tests.support.stored import stored_copy


def run(tmp_path: Path, *arguments: str) -> Done:
    return command("run", "--search", "0", "--out", str(tmp_path), *arguments)


SMOLLM2 = pytest.param("smollm2/hub", "PASS", marks=pytest.mark.thorough)


@pytest.mark.parametrize(("case_id", "verdict"), [("llama/hub", "PASS"), ("llama/v5", "KNOWN"), SMOLLM2])
def test_a_run_writes_its_report_and_with_cached_truths_imports_no_torch(
    tmp_path: Path, case_id: str, verdict: str
) -> None:
    arguments = ["--candidate", "stored:0.2.2", "--cases", case_id]
    assert run(tmp_path, *arguments).returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == verdict and report["counts"][verdict] == 1 and len(report["cases"][0]["tensors"]) > 40
    arguments = ["run", "run", *arguments, "--out", str(tmp_path)]
    code = f"""import sys
from candle_mi_parity.cli.cli import main
sys.argv = {arguments}
try:
    main()
finally:
    print("heavy:", *(name for name in ("transformers", "torch") if name in sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "verdict: " in done.stdout and done.stdout.splitlines()[-1] == "heavy:"


def test_a_known_divergence_is_named_and_fails_when_strict(tmp_path: Path) -> None:
    arguments = ("--candidate", "stored:0.2.2", "--cases", "llama/v5")
    lenient, strict = run(tmp_path, *arguments), run(tmp_path, *arguments, "--strict")
    assert lenient.returncode == 0, lenient.stdout + lenient.stderr
    last = "verdict: KNOWN: 1 other numbers. Nothing new since 0.2.2. 42 tensors compared."
    assert "known: ≠ CMI001" in lenient.stdout and lenient.stdout.splitlines()[-1] == last
    assert strict.returncode == 1


def test_a_tampered_trace_fails_with_a_command_that_reproduces_it(tmp_path: Path) -> None:
    stored = tmp_path / "stored"

    def drop(document: dict[str, Any], _: object) -> None:
        document["tensors"] = [entry for entry in document["tensors"] if entry["name"] != "blocks.1.mlp.hook_pre"]

    stored_copy(stored, "llama/hub", drop)
    done = run(tmp_path, "--candidate", f"stored:{stored}", "--cases", "llama/hub")
    assert done.returncode == 1, done.stdout
    assert "blocks.1.mlp.hook_pre: FAIL (missing)" in done.stdout
    printed = next(line for line in done.stdout.splitlines() if line.startswith("  reproduce: "))
    program, *again = shlex.split(printed.removeprefix("  reproduce: "))
    assert (ROOT / program).is_file(), "the command can be run as printed"
    assert command(*again, "--search", "0", "--out", str(tmp_path)).returncode == 1


ABSENT = str(Path(__file__).with_name("absent"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--candidate", "newest"), "unknown candidate 'newest'"),
        (("run", "--candidate", "torch", "--device", "cuda"), "unknown device"),
        (("run", "--candidate", "torch", "--device", "cuda:x"), "unknown device"),
        (("run", "--candidate", "stored:9.9.9"), "no stored traces"),
        (("run", "--candidate", f"path:{ABSENT}"), f"no Cargo.toml in {ABSENT}"),
        (
            ("run", "--candidate", "stored:0.2.2", "--cases", "nothing/*"),
            "no case matches 'nothing/*'; `candle-mi-parity list` shows all",
        ),
        (("maint", "reference", "--model", ABSENT, "--out", "x.json"), f"model directory {ABSENT} does not exist"),
    ],
)
def test_a_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    assert message in one_line(command(*arguments))


@pytest.mark.thorough
def test_no_network_is_one_line(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    done = process("maint", "reference", "--out", str(tmp_path / "x.json"), environment=environment)
    assert "cannot get google/gemma-2-2b@main from the hub" in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "x.json").exists()


def test_a_report_that_cannot_be_written_leaves_no_temporary_file(tmp_path: Path) -> None:
    arguments = ("run", "--out", str(tmp_path), "--candidate", "stored:0.2.2", "--cases", "llama/hub")
    with largest_file(1000):
        assert "cannot write" in one_line(command(*arguments))
    assert list(tmp_path.rglob("*report*")) == []
