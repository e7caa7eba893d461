"""``make fullsize``: each stage is told with its own cost, and one that fails ends the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from candle_mi_parity.errors import ParityError
from proof import fullsize
from proof.fullsize import Stage, measured, table

STAGES = [Stage("truth", 10.4, 7.0, 3_000_000_000, "1 tensor"), Stage("emit", 5.2, 6.0, 2_000_000_000, "fast")]


def test_the_table_adds_times_and_takes_the_largest_peak() -> None:
    assert table(STAGES).splitlines()[2:] == [
        "| truth | 10 | 7 | 3.0 | 1 tensor |",
        "| emit | 5 | 6 | 2.0 | fast |",
        "| whole | 16 | 13 | 3.0 |  |",
    ]


def test_a_stage_runs_in_a_process_of_its_own_whose_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    answer = '{"processor": 2.5, "peak": 7, "said": "x"}'
    for script, code in ((f"echo noise; echo '{answer}'", 0), ("echo 'KeyError: x' >&2", 1)):
        python.write_text(f"#!/bin/sh\n[ $4 = emit ] || exit 9\n{script}\nexit {code}\n")
        python.chmod(0o755)
        if code:
            with pytest.raises(ParityError, match="emit: KeyError: x"):
                measured("emit", tmp_path, "0.2.2")
        else:
            stage = measured("emit", tmp_path, "0.2.2")
            assert (stage.processor, stage.peak, stage.said) == (2.5, 7, "x") and 0 < stage.seconds < 60


@pytest.mark.parametrize(("said", "code"), [("2 of 2 pass", 0), ("1 of 2 pass; first logits: FAIL, ratio 9", 1)])
def test_a_tensor_that_does_not_pass_is_the_exit_code(
    said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullsize, "measured", lambda name, work, candidate: Stage(name, 1.0, 1.0, 1, said))
    done = CliRunner().invoke(fullsize.app, ["--out", str(tmp_path)])
    assert done.exit_code == code and said in done.stdout
    stages = json.loads((tmp_path / "fullsize.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == list(fullsize.STAGES)


def test_the_emitter_is_not_started_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fullsize.available() > 0
    monkeypatch.setattr(fullsize, "PATIENCE", -1.0)
    for free in (13.9, 14.0):
        monkeypatch.setattr(fullsize, "available", lambda free=free: free)
        if free < fullsize.NEEDED:
            with pytest.raises(ParityError, match=r"needs 14 GB of free memory, and there are 13\.9"):
                fullsize.wait_for_memory()
        else:
            assert fullsize.wait_for_memory() < 1


def test_a_stage_that_fails_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def until_emit(name: str, _work: Path, _candidate: str) -> Stage:
        if name == "emit":
            raise ParityError("emit: killed")
        return Stage(name, 1.0, 1.0, 1, "")

    monkeypatch.setattr(fullsize, "measured", until_emit)
    done = CliRunner().invoke(fullsize.app, ["--out", str(tmp_path)])
    assert done.exit_code == 2 and "emit: killed" in done.stderr
    assert len(json.loads((tmp_path / "fullsize.json").read_text())["stages"]) == 3
