"""What a reader of a diff sees: short on the terminal, whole in the files, every name escaped, nothing fetched."""

from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from candle_mi_parity.compare.diff import CaseDiff, Diff, Side
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.report import diff_views
from candle_mi_parity.report.diff_views import Cost, costs
from candle_mi_parity.trace.trace import Run
from tests.harness.test_diff import LLAMA, POST, between, scale
from tests.support.command import command, one_line
from tests.support.planting import Arrays
from tests.support.results import shown


def terminal(diff: Diff) -> str:
    return shown(partial(diff_views.terminal, diff), 140)


def test_the_terminal_names_the_tensor_the_sizes_and_the_verdict() -> None:
    text = terminal(between(None, scale(POST, 1.001)))
    assert POST in text and "agrees → diverges" in text and "away" in text
    assert text.rstrip().splitlines()[-1].startswith("verdict: WORSE: 1 of 1 cases")
    assert terminal(between(None, None)).rstrip().splitlines()[-1].startswith("verdict: NOTHING WORSE")


def test_the_terminal_stays_short_however_much_moved() -> None:
    diff = between(None, scale(POST, 1.001))
    diff.cases = diff.cases * 150
    assert len(terminal(diff).splitlines()) < 80
    assert "and 130 more in diff.html" in terminal(diff)


def test_the_page_shows_what_moved_and_when_it_began() -> None:
    def spoil(arrays: Arrays) -> None:
        arrays[POST][0, 5, 7] = float("nan")

    honest, spoilt = between(None, None), between(None, spoil)
    assert POST in diff_views.page(spoilt) and "∞" in diff_views.page(spoilt)
    assert POST not in diff_views.page(honest) and honest.started in diff_views.page(honest)
    assert datetime.fromisoformat(honest.started).tzinfo


def ran(forward: float | None, peak: int | None) -> CaseDiff:
    """A case whose two sides took a forward of ``forward`` and of 0.2 seconds."""
    result = CaseResult(LLAMA, "llama", "", Status.PASS, "")
    recorded = [
        Run(started="", seconds={} if seconds is None else {"forward": seconds}, threads=2, peak_rss_bytes=memory)
        for seconds, memory in ((forward, peak), (0.2, 4 << 20))
    ]
    return CaseDiff(Side(result, None, recorded[0]), Side(result, None, recorded[1]))


def test_speed_is_compared_over_the_cases_that_both_recorded() -> None:
    cases = [ran(0.1, 2 << 20), ran(0.1, 2 << 20), ran(9.0, 1 << 20), ran(None, None)]
    assert costs(cases) == [Cost("forward, median", "s", 0.1, 0.2), Cost("peak memory", "MiB", 2.0, 4.0)]
    assert costs([ran(None, None)]) == []


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (("stored:0.2.2", "stored:0.2.2", "--case", "llama/hub"), 0, "NOTHING WORSE; 0 better, 44 tensors"),
        (("stored:0.1.10", "stored:0.2.2", "--case", "llama/rope-linear"), 0, "diverges → agrees"),
        (("stored:0.1.10", "stored:0.2.2", "--cases", "qwen3/window"), 1, "refused → diverges"),
        (("stored:0.2.2", "stored:0.2.2", "--case", "qwen3/rope-yarn"), 3, "INCONCLUSIVE: nothing was compared"),
        pytest.param(
            ("torch", "stored:0.2.2", "--case", "smollm2/hub"),
            0,
            "restricted to that part",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_the_command(tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = command("diff", *arguments, "--out", str(tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    assert text in done.stdout
    assert (tmp_path / "diff.html").is_file()


def test_a_candidate_that_holds_no_trace_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "flat.json").write_text("{}")
    flat = f"stored:{tmp_path / 'flat.json'}"
    assert "is a flat JSON" in one_line(command("diff", flat, "stored:0.2.2", "--out", str(tmp_path)))


def test_a_stored_candidate_has_no_other_device_on_either_side(tmp_path: Path) -> None:
    for pair in (("stored:0.1.10", "torch"), ("torch", "stored:0.2.2")):
        stored = next(spec for spec in pair if spec != "torch")
        done = command("diff", *pair, "--device", "cuda:0", "--case", LLAMA, "--out", str(tmp_path))
        assert f"{stored} was emitted on a CPU; --device cuda:0 needs a build" in one_line(done)
        assert not (tmp_path / "diff.html").exists()
