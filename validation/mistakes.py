"""``python -m validation.mistakes``: ask a candle-mi with each mistake everything that ``run`` asks.

A mistake counts as seen when the run's verdict is FAIL and the last ten lines that it prints name the expected case
and tensor together. Exit code 1 if one is not seen, or if one is that the catalogue says is not.
"""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import Field
from rich.console import Console

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.errors import ParityError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.report.tables import WIDE, run_tables
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.spec.table import TableRow, read_toml
from validation.catalogue import CatalogueError, SourceEdit
from validation.source_faults import Checkout

MISTAKES = Path(__file__).with_name("mistakes.toml")
LAST = 10
"""Number of lines at the end of a run's output in which a mistake has to be named."""
ANY = "*"


class Mistake(TableRow):
    """One row of ``mistakes.toml``, which says what its keys are."""

    id: str
    kind: Literal[
        "cache", "capture", "length", "batch", "type", "range", "edit", "nth", "first", "shared", "load", "call",
        "tokens", "config", "half", "sae", "contrastive", "continuation", "lens", "text",
        "offsets", "attention", "mask", "embedding", "calibration", "names",
        "transcoder", "decoder", "injection", "network", "neuron", "region", "task",
        "vocabulary", "optimizer", "gradient", "diffusion", "sampler", "fused",
        "input", "backward", "moments", "default", "list", "shape", "boundary",
    ]  # fmt: skip
    says: str
    at: str
    first: str
    cases: list[str] = Field(default_factory=list)
    only: list[str] = Field(default_factory=list)
    plain: bool = False
    survives: str = ""
    file: str
    find: str
    replace: str

    @property
    def edit(self) -> SourceEdit:
        return SourceEdit(file=self.file, find=self.find, replace=self.replace)


class _Table(TableRow):
    format: Literal[1]
    mistake: Annotated[list[Mistake], Field(min_length=1)]


@dataclass(frozen=True)
class Seen:
    """What a run said of a mistake.

    :ivar verdict: of the run; or why there was none.
    :ivar last: the last lines that it printed.
    :ivar seconds: of the run, without the build.
    """

    mistake: Mistake
    verdict: str
    last: list[str]
    seconds: float = 0.0

    @property
    def named(self) -> bool:
        """Whether one of the last lines, or one place in the list of them, names the case and what differs first."""
        words = {self.mistake.at, self.mistake.first} - {ANY}
        wanted = [re.compile(rf"(?<!/){re.escape(word)}(?![\w/-])") for word in words]
        places = [place for line in self.last for place in line.split("; ")]
        return any(all(word.search(place) for word in wanted) for place in places)

    @property
    def killed(self) -> bool:
        return self.verdict == Verdict.FAIL and self.named

    @property
    def as_expected(self) -> bool:
        """Seen where the catalogue says; or passed, where it says why."""
        return self.verdict in (Verdict.PASS, Verdict.KNOWN) if self.mistake.survives else self.killed

    def row(self) -> str:
        """A row of a Markdown table."""
        of = self.mistake
        place = of.first if of.at == ANY else f"{of.at}: {of.first}"
        named = of.survives or ("yes" if self.named else "no")
        cells = (of.id, of.kind, "yes" if of.plain else "no", place, self.verdict, named, f"{self.seconds:.0f}")
        return f"| {' | '.join(cells)} |"


def load_mistakes(path: Path = MISTAKES) -> list[Mistake]:
    """All rows.

    :raises CatalogueError: an unreadable file, an unknown key, an id given twice, no row.
    """
    mistakes = read_toml(path, _Table, CatalogueError).mistake
    if len({mistake.id for mistake in mistakes}) < len(mistakes):
        raise CatalogueError(f"{path}: an id is given twice")
    return mistakes


def judge(mistake: Mistake, out: Path, everything: bool) -> Seen:
    """Build candle-mi with the mistake, and run.

    :param out: for the traces.
    :param everything: whether all is asked; otherwise the cases or parts that the row names.
    """
    cases, only = ((), ()) if everything else (tuple(mistake.cases), tuple(mistake.only))
    with Checkout(cache_root()).planted(mistake.edit) as spec:
        options = RunOptions(spec, cases, out / mistake.id, only=only, search=0)
        try:
            build(parse_candidate(spec), options.cache, lambda line: None)  # not part of the time
            result = run(options, lambda count: Progress())
        except ParityError as error:  # it does not build
            return Seen(mistake, str(error), [])
    result.seconds = time.monotonic() - result.tick
    printed = io.StringIO()
    run_tables(result, Console(file=printed, width=WIDE))
    return Seen(mistake, result.verdict, printed.getvalue().splitlines()[-LAST:], result.seconds)


def judge_each(mistakes: list[Mistake], everything: bool) -> Iterator[Seen]:
    """One after the other, in one tree; the traces of a whole run are 300 MB, and are removed at once."""
    for mistake in mistakes:
        with tempfile.TemporaryDirectory() as scratch:
            yield judge(mistake, Path(scratch), everything)


def main(
    only: Annotated[list[str] | None, typer.Option(help="One mistake by its id; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option(help="Only the cases and parts that each row names.")] = False,
    lines: Annotated[bool, typer.Option(help="Print the last lines of each run too.")] = False,
) -> None:
    """Judge the mistakes of the catalogue, and print the table of the documentation."""
    console = Console(soft_wrap=True)
    wanted = [mistake for mistake in load_mistakes() if not only or mistake.id in only]
    right = True
    for seen in judge_each(wanted, not quick):
        right = right and seen.as_expected
        console.print(seen.row(), markup=False, highlight=False)
        if lines or not seen.as_expected:
            console.print("\n".join(seen.last), markup=False, highlight=False)
    raise typer.Exit(0 if right and wanted else 1)


if __name__ == "__main__":
    typer.run(main)
