"""What ``candle-mi-parity repro`` does: choose the cases, reproduce, write, prove."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.judge.known import facts_of
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.repro.crate import dependencies
from candle_mi_parity.repro.prove import Outcome, prove
from candle_mi_parity.repro.repro import AgreesError, Reproduction, reproduce
from candle_mi_parity.repro.write import Blame, slug, write_folder
from candle_mi_parity.spec.cases import Case, load_cases, select
from candle_mi_parity.spec.explanations import Explanations, load_explanations


@dataclass
class Line:
    """One case's outcome.

    :ivar proof: what its test does on the diverging candle-mi, and on the fixed one; None where it was not run.
    """

    reproduction: Reproduction
    folder: Path
    proof: Outcome | None = None
    fixed: Outcome | None = None

    @property
    def proven(self) -> bool:
        """Nothing that was asked contradicts it."""
        return self.proof in (None, Outcome.DIFFERS) and self.fixed in (None, Outcome.PASSES)


def repro(
    pattern: str | None,
    candidate: str,
    out: Path,
    cache: Path,
    tell: Callable[[str], None],
    proof: bool = False,
    fixed: str | None = None,
) -> list[Line]:
    """Reproduce cases, write a folder for each, and prove them.

    :param pattern: glob over case ids, of which those that agree are passed over; None for every known divergence
        of the candidate.
    :raises AgreesError: nothing diverges.
    :raises ParityError: a case that is refused, or a candidate that cannot be built.
    """
    chosen = parse_candidate(candidate)
    if chosen.kind in ("stored", "torch"):
        raise CandidateError(f"a reproduction asks an emitter: it needs a candidate to build, not {candidate}")
    # Of token ids that a vocabulary of eight does not have.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    table, lines = load_explanations(), []
    with (
        tempfile.TemporaryDirectory(prefix="parity-repro-") as traces,
        open_source(chosen, cache, Path(traces), tell) as source,
    ):
        assert source.identity is not None
        release = source.identity.version
        needed = dependencies(chosen, cache)
        for case in select(load_cases(), [pattern] if pattern else []):
            why = _known(case, table, release, cache)
            if not (pattern or why):
                continue
            try:
                reproduction = reproduce(case, source, cache, tell)
            except AgreesError:
                if pattern == case.id:
                    raise
                continue
            blame = Blame(candidate, release, why)
            folder = write_folder(reproduction, blame, needed, out)
            lines.append(Line(reproduction, folder))
    if not lines:
        raise AgreesError(f"no case of {pattern or 'the default lane'} diverges; there is nothing to reproduce")
    tests = [line.folder / "tests" / f"{slug(line.reproduction.original.id)}.rs" for line in lines]
    for spec, field in ((candidate if proof or fixed else None, "proof"), (fixed, "fixed")):
        if spec is not None:
            tell(f"cargo test: {len(tests)} tests against {spec}")
            outcomes = prove(tests, parse_candidate(spec), cache)
            for line, test in zip(lines, tests, strict=True):
                setattr(line, field, outcomes[test.stem])
    return lines


def _known(case: Case, table: Explanations, release: str, cache: Path) -> str:
    """What is listed of a case that gives other numbers in a release; empty for nothing."""
    rows = table.applicable(facts_of(prepare(case, cache)), table.baseline(release))
    return " ".join(row.says for row in rows if row.change is not None)


def repro_table(lines: list[Line], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in (
        "case",
        "first tensor",
        "layers",
        "width",
        "heads",
        "tokens",
        "element / σ",
        "candidate",
        "fixed",
    ):
        right = heading in ("layers", "width", "heads", "tokens", "element / σ")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for line in lines:
        config = line.reproduction.pair.case.config
        table.add_row(
            escape(line.reproduction.original.id),
            escape(line.reproduction.first.name),
            str(config["num_hidden_layers"]),
            str(config["hidden_size"]),
            str(config["num_attention_heads"]),
            str(len(line.reproduction.pair.case.tokens)),
            f"{line.reproduction.first.element_ratio:.3g}",
            _outcome(line.proof, Outcome.DIFFERS),
            _outcome(line.fixed, Outcome.PASSES),
        )
    console.print(table)


def _outcome(found: Outcome | None, wanted: Outcome) -> Text:
    if found is None:
        return Text("not run")
    return Text(found.value, style="green" if found is wanted else "bold red")
