"""``maint``: maintenance of the suite itself."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from candle_mi_parity.cli.options import (
    DEFAULT_CANDIDATE,
    OUT,
    CandidateOption,
    CasesOption,
    OnlyOption,
    OutOption,
    globs,
)

if TYPE_CHECKING:
    from candle_mi_parity.coverage.census_record import Entry

maint = typer.Typer(no_args_is_help=True)
GEMMA_SCOPE = "google/gemma-scope-2b-pt-res:layer_0/width_16k/average_l0_105/params.npz"


@maint.callback()
def needs_a_clone() -> None:
    """Maintenance of the suite itself, in a clone."""
    from candle_mi_parity.errors import ParityError
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.spec.paths import INSTALLED

    with one_line_errors():
        if INSTALLED:
            raise ParityError(
                "`maint` writes the files of candle-mi-parity itself, so it needs a clone of its repository"
            )


@maint.command()
def store(
    candidate: Annotated[str, typer.Argument(help="A released version, as 0.2.2.")],
    cases: CasesOption = None,
    only: OnlyOption = None,
    out: OutOption = OUT,
) -> None:
    """Emit a release and keep the outcomes in rust_outputs/, with --cases or --only of those cases or parts alone."""
    from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
    from candle_mi_parity.candidate.store import Storing
    from candle_mi_parity.candidate.tokens import emit_tokens
    from candle_mi_parity.cli.run import run_with_progress
    from candle_mi_parity.compare.verdict import Status
    from candle_mi_parity.models.resolve import model_directory
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.run.options import RunOptions
    from candle_mi_parity.spec.cases import load_cases
    from candle_mi_parity.spec.paths import OUTPUTS, cache_root

    with one_line_errors():
        if (chosen := parse_candidate(candidate)).kind != "version":
            raise CandidateError(f"only releases are stored, not {candidate}")
        with Storing(OUTPUTS / f"{candidate}.json", whole=not (cases or only)) as keep:
            options = RunOptions(candidate, globs(cases), out, keep=keep, only=tuple(only or ()), search=0)
            result = run_with_progress(options)
            parts = [result.sections[part].results for part in ("calls", "tokens") if part in result.sections]
            made = [*result.cases, *chain(*parts)]
            lost = [one for one in made if one.status is Status.ERROR]
            if lost or not (made or keep.has_cases):  # what a release does not offer is stored, and not made
                reason = f"{lost[0].id}: {lost[0].error}" if lost else "nothing ran that is stored"
                raise CandidateError(f"nothing is stored of {candidate}: {reason}")
            if "tokens" in options.parts:
                model = next(case.model for case in load_cases() if case.id == "smollm2/hub")
                directory = model_directory(model, cache_root())
                keep.whole_file(
                    "tokens", emit_tokens(chosen, cache_root(), directory, out.resolve() / "tokens.json", print)
                )
        print(result.line())


@maint.command()
def fields(family: Annotated[str | None, typer.Option(help="One model family; without it, all.")] = None) -> None:
    """Every config field that transformers reads, what covers it, and its effect over noise."""
    from candle_mi_parity.coverage.field_check import check
    from candle_mi_parity.coverage.fields import load_fields
    from candle_mi_parity.report import tables
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.spec.cases import load_cases
    from candle_mi_parity.spec.families import family_of, transformers_type
    from candle_mi_parity.spec.paths import cache_root

    with one_line_errors():
        if family is not None:
            family_of(family)
        families = None if family is None else [transformers_type(family)]
        findings = check(load_fields(), load_cases(), cache_root(), families)
        tables.fields_table(findings, tables.stdout())
    raise typer.Exit(1 if any(finding.fault for finding in findings) else 0)


@maint.command()
def census(
    candidate: CandidateOption = DEFAULT_CANDIDATE,
    family: Annotated[str, typer.Option(help="Glob over model types; a part is shown, not stored.")] = "*",
    out: OutOption = OUT,
) -> None:
    """What candle-mi does with every causal language model of transformers: refused, same, different, not asked."""
    from candle_mi_parity.candidate.build import build
    from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
    from candle_mi_parity.coverage.census import take_census
    from candle_mi_parity.coverage.census_record import STORED
    from candle_mi_parity.files.json_out import write_json
    from candle_mi_parity.report import tables
    from candle_mi_parity.report.terminal import one_line_errors, progress_bar
    from candle_mi_parity.report.views import remove
    from candle_mi_parity.spec.paths import cache_root
    from candle_mi_parity.trace.trace import CandleMi

    with one_line_errors():
        chosen = parse_candidate(candidate)
        if not chosen.has_source:
            raise CandidateError(
                f"`census` must build candle-mi, and {candidate} has no source; use 0.2.2, path:DIR or git:URL@REV"
            )
        remove(out, "census.json")
        with progress_bar() as bar:
            task = bar.add_task("starting", total=None)
            done: list[Entry] = []

            def progress(entry: Entry, total: int) -> None:
                done.append(entry)
                bar.update(task, description=f"[{len(done)}/{total}] {entry.model_type}: {entry.outcome}")

            built = build(chosen, cache_root(), lambda line: bar.update(task, description=line))
            identity = CandleMi.model_validate(built.identity["candle_mi"])
            taken = take_census(built.path, identity, family, cache_root(), out / "census", progress)
        whole = family == "*" and chosen.kind == "version"
        path = STORED / f"{candidate}.json" if whole else out / "census.json"
        write_json(taken.model_dump(exclude_defaults=True), path)
        tables.census(taken, tables.stdout())
        print(f"wrote {path}")


@maint.command()
def reference(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    model: Annotated[str, typer.Option(help="Hub id (ID or ID@REVISION) or directory.")] = "google/gemma-2-2b",
    sae: Annotated[str, typer.Option(help="NPZ file or REPO:PATH.")] = GEMMA_SCOPE,
    layer: Annotated[int, typer.Option(min=0)] = 0,
    prompt: Annotated[str, typer.Option()] = "The capital of France is",
    top_k: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    """Write the flat JSON that sae_validation.py writes and candle-mi's validate_sae.rs reads, from float64."""
    from candle_mi_parity.coverage.flat_json import environment, is_last_layer, make_reference, reference_case
    from candle_mi_parity.files.json_out import write_json
    from candle_mi_parity.models.prepared_case import prepare
    from candle_mi_parity.oracle.oracle import Oracle
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.spec.paths import cache_root

    with one_line_errors():
        for name, value in environment().items():
            print(f"{name + ':':<18}{value}")
        subject = prepare(reference_case(model, sae, layer, prompt), cache_root())
        document = make_reference(Oracle(subject, cache_root()), model, sae, top_k)
        if is_last_layer(subject, layer):
            print("warning: hidden_states[-1] is after the final norm; this is the last layer's true resid_post")
        write_json(document, out)
        for download in subject.downloads:
            print(f"{download.repo}@{download.revision} is commit {download.commit}")
        for key in ("d_in", "d_sae", "architecture", "n_tokens", "reconstruction_mse", "n_active_last_pos"):
            print(f"{key + ':':<20}{document[key]}")
        print(f"wrote {out}")
