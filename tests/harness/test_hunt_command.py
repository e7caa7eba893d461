"""The command ``hunt`` and its file: wrong usage and edited files are one line, before anything is judged."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from candle_mi_parity.compare.hunt_result import Branches, Entry, HuntResult
from candle_mi_parity.errors import CaseTableError, TraceError
from candle_mi_parity.hunt.bench import Answer
from candle_mi_parity.hunt.hunt import ROUND
from candle_mi_parity.run.hunt import HuntOptions, Parts, hunt
from tests.support.command import command, one_line
from tests.support.hunting import Faulty, hunted


def test_a_file_that_is_no_hunt_is_refused(tmp_path: Path) -> None:
    HuntResult("torch", 0, ["llama"], entries={"x": Entry(1)}).write(tmp_path / "hunt.json")
    held = json.loads((tmp_path / "hunt.json").read_text())
    cause = {"kind": "call", "what": "x", "first": "x", "reason": "x", "detail": "", "smallest": {}}
    for change, key in (
        ({"format": "other/1"}, "format"),
        ({"seed": "x"}, "seed"),
        ({"tallies": 3}, "tallies"),
        ({"seen": {"llama reads x": "often"}}, r"seen\.llama reads x"),
        ({"corpus": [["llama", {"config.eps": 3}]]}, r"corpus\.0\.1: .*config\.eps is 3, expected"),
        ({"corpus": [["llama", {"config.eps": ["set"]}]]}, r"corpus\.0\.1: .*config\.eps"),
        ({"corpus": [["llama", {"tokens": {"batch": 2}}]]}, r"corpus\.0\.1: .*tokens"),
        ({"corpus": [["llama", {"tokens": "all"}]]}, r"corpus\.0\.1: .*tokens"),
        ({"corpus": [["llama", {"tokens": 3}]]}, r"corpus\.0\.1: .*tokens"),
        ({"corpus": [["gpt2", {}]]}, r"corpus\.0: 'gpt2' is not a family of this hunt"),
        ({"nearest": [[0.5, "llama", {"edit.1": {"kind": "add"}}]]}, r"nearest\.0\.2: .*edit\.1"),
        ({"causes": [cause | {"genes": {"sae.cfg.k": "absent"}}]}, r"causes\.0\.genes: .*sae\.cfg\.k"),
        ({"causes": [cause | {"change": {"no": 3}}]}, r"causes\.0\.change: .*no: Extra"),
        ({"causes": [cause | {"smallest": {"call": 3}}]}, "causes: a smallest call"),
        ({"branches": {"of": 3, "reached": [3]}}, r"branches\.reached"),
    ):
        (tmp_path / "hunt.json").write_text(json.dumps(held | change))
        with pytest.raises(TraceError, match=rf"^[^\n]*hunt\.json: (not a hunt of this version: )?{key}[^\n]*$"):
            HuntResult.read(tmp_path / "hunt.json")


def test_what_a_hunt_draws_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = lambda family, genes: Answer("refused", str(genes))  # noqa: E731
    result = hunted(monkeypatch, tmp_path, answer, 2 * ROUND, HuntResult("torch", 1, ["llama", "gemma2"]))
    result.write(tmp_path / "hunt.json")
    assert len(result.corpus) > ROUND and HuntResult.read(tmp_path / "hunt.json") == result


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--minutes", "0"), "must be more than 0"),
        (("--minutes", "nan"), "must be more than 0"),
        (("--inputs", "0"), r"equal to 1|x>=1"),  # of typer, or of click
    ],
)
def test_a_hunt_of_nothing_is_an_error_of_usage(option: tuple[str, str], said: str) -> None:
    done = command("hunt", "--candidate", "torch", *option)
    assert done.returncode == 2 and f"'{option[0]}'" in done.stderr and re.search(said, done.stderr)


def test_a_directory_that_cannot_be_written_is_reported_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert one_line(command("hunt", "--candidate", "torch", "--out", str(out))).startswith(
        f"candle-mi-parity: cannot write to {out}: Not a directory"
    )


def test_a_hunt_of_another_build_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Counting(Faulty):
        branches = SimpleNamespace(regions=[1, 2, 3])

    monkeypatch.setattr(
        "candle_mi_parity.run.hunt.open_source", lambda *arguments, **named: Counting(lambda *_: None)
    )
    monkeypatch.setattr("candle_mi_parity.run.hunt.LiveSource", Counting)
    monkeypatch.setattr("candle_mi_parity.run.hunt._parts", lambda *arguments: Parts())
    HuntResult("0.2.2", 0, ["llama"], branches=Branches(4, [3])).write(tmp_path / "hunt.json")
    with pytest.raises(CaseTableError, match="had 4 regions of source and has 3 now"):
        hunt(HuntOptions("0.2.2", families="llama", resume=True, out=tmp_path), print, lambda found: None)
