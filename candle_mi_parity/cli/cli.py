"""The command ``candle-mi-parity``."""

from __future__ import annotations

import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.candidate.tokens import emit_tokens
from candle_mi_parity.cli.check import check_command
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.coverage.calls_judge import expectations, hold_known, judge_source
from candle_mi_parity.coverage.census import take_census
from candle_mi_parity.coverage.census_record import STORED, Entry
from candle_mi_parity.coverage.field_check import check
from candle_mi_parity.coverage.fields import load_fields
from candle_mi_parity.coverage.flat_json import environment, is_last_layer, make_reference, reference_case
from candle_mi_parity.errors import Stopped
from candle_mi_parity.files.escape import printable
from candle_mi_parity.files.json_out import write_json, write_text
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.report import diff_views, history, tables
from candle_mi_parity.report.terminal import Terminal, one_line_errors, progress_bar, say
from candle_mi_parity.report.views import VIEWS, remove, written
from candle_mi_parity.repro.command import repro, repro_table
from candle_mi_parity.run.diff import diff
from candle_mi_parity.run.repeat import repeat
from candle_mi_parity.run.run import RunOptions, blank, run
from candle_mi_parity.spec.cases import load_cases, select
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.families import family_of
from candle_mi_parity.spec.paths import ROOT, cache_root
from candle_mi_parity.trace.trace import CandleMi

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command("check")(check_command)

CandidateOption = Annotated[
    str, typer.Option(help="0.2.2 | path:DIR | git:URL@REV | stored:VERSION_OR_DIR", show_default=True)
]
CasesOption = Annotated[str | None, typer.Option(help="Glob over case ids; without it, the default lane.")]
DeviceOption = Annotated[str, typer.Option(help="cpu | cuda:N (the emitter is then built with CUDA)")]
OutOption = Annotated[Path, typer.Option(help="Where traces and reports go.")]
GEMMA_SCOPE = "google/gemma-scope-2b-pt-res:layer_0/width_16k/average_l0_105/params.npz"
DEFAULT_CANDIDATE = "0.2.2"
OUT = Path("build/parity")


def globs(pattern: str | None) -> tuple[str, ...]:
    return () if pattern is None else (pattern,)


def judge(options: RunOptions, result: RunResult | None = None) -> RunResult:
    """Select, and run with progress."""
    with progress_bar() as bar:
        return run(options, lambda count: Terminal(bar, count), result)


def judge_and_write(options: RunOptions) -> RunResult:
    """Judge, and write every view of the result, also of a run that breaks off."""
    remove(options.out, *VIEWS)  # before anything that takes time: of a run that is killed there is no older report
    with written(blank(options), options.out) as result:
        judge(options, result)
    return result


@app.command("run")
def run_command(
    candidate: CandidateOption = DEFAULT_CANDIDATE,
    cases: CasesOption = None,
    out: OutOption = OUT,
    device: DeviceOption = "cpu",
    strict: Annotated[bool, typer.Option(help="Known divergences fail too.")] = False,
) -> None:
    """Judge a candle-mi against PyTorch. Exit code 0 PASS or KNOWN, 1 FAIL, 2 ERROR, 3 INCONCLUSIVE."""
    with one_line_errors():
        result = judge_and_write(RunOptions(candidate, globs(cases), out, strict, device=device))
        tables.run_tables(result, tables.stdout(), out / "report.html")
    raise typer.Exit(result.verdict.exit_code)


@app.command()
def reference(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    model: Annotated[str, typer.Option(help="Hub id (ID or ID@REVISION) or directory.")] = "google/gemma-2-2b",
    sae: Annotated[str, typer.Option(help="NPZ file or REPO:PATH.")] = GEMMA_SCOPE,
    layer: Annotated[int, typer.Option(min=0)] = 0,
    prompt: Annotated[str, typer.Option()] = "The capital of France is",
    top_k: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    """Write the flat JSON that sae_validation.py writes and candle-mi's validate_sae.rs reads, from float64."""
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


@app.command()
def ratios(candidate: CandidateOption = DEFAULT_CANDIDATE, cases: CasesOption = None, out: OutOption = OUT) -> None:
    """The clean-ratio table: how close the passing cases come to the gate. `torch` judges torch's own float32."""
    with one_line_errors():
        result = judge(RunOptions(candidate, globs(cases), out))
        clean = [case for case in result.cases if case.status is Status.PASS]
        result.cases = clean
        tables.stdout().print(tables.clean_ratios(result))
    outside = [case.id for case in clean if tables.clean_row(case.tensors)[-1] != "yes"]
    raise typer.Exit(1 if outside or not clean else 0)


@app.command()
def store(
    candidate: Annotated[str, typer.Argument(help="A released version, as 0.2.2.")], out: OutOption = OUT
) -> None:
    """Emit every case of the default lane and keep the outcome in rust_outputs/, replacing what was there."""
    with one_line_errors():
        if parse_candidate(candidate).kind != "version":
            raise CandidateError(f"only releases are stored, not {candidate}")
        result = judge(RunOptions(candidate, out=out, keep=ROOT / "rust_outputs" / candidate))
        model = next(case.model for case in load_cases() if case.id == "smollm2/hub")
        directory = model_directory(model, cache_root())
        target = ROOT / "rust_outputs" / candidate / "tokens.json"
        emit_tokens(parse_candidate(candidate), cache_root(), directory, target, print)
        print(result.line())


@app.command("history")
def history_command(out: OutOption = OUT) -> None:
    """When each divergence came and went, over every stored release; writes history.html and history.json."""
    with one_line_errors():
        remove(out, "history.json", "history.html")
        told = history.make_history(_stored_releases(out))
        write_json(history.document(told), out / "history.json")
        write_text(history.page(told), out / "history.html")
        history.terminal(told, tables.stdout())
        print(f"wrote {out / 'history.html'}")


def _stored_releases(out: Path) -> dict[str, RunResult]:
    stored = sorted((path.parent.name for path in (ROOT / "rust_outputs").glob("*/candidate.json")), key=_numbers)
    return {version: judge(RunOptions(f"stored:{version}", out=out / version)) for version in stored}


@app.command("diff")
def diff_command(
    a: Annotated[str, typer.Argument(help="The candidate before, spelt as for `run`.")],
    b: Annotated[str, typer.Argument(help="The candidate after.")],
    cases: Annotated[
        str | None, typer.Option("--cases", "--case", help="Glob over case ids; without it, the default lane.")
    ] = None,
    out: OutOption = OUT,
    device: DeviceOption = "cpu",
    device_b: Annotated[str | None, typer.Option(help="Of B, where it is not A's: a GPU against the CPU.")] = None,
) -> None:
    """Compare two candidates with each other and with PyTorch. Exit code 0, or 1 when B is worse anywhere."""
    with one_line_errors():
        chosen = select(load_cases(), list(globs(cases)))
        remove(out, "diff.json", "diff.html")
        with progress_bar() as bar:
            progress = Terminal(bar, len(chosen))
            found = diff(
                (a, b),
                chosen,
                cache_root(),
                out / "diff",
                load_explanations(),
                progress,
                (device, device_b or device),
                calls=cases is None,
            )
        write_json(diff_views.document(found), out / "diff.json")
        write_text(diff_views.page(found), out / "diff.html")
        diff_views.terminal(found, tables.stdout())
        print(f"wrote {out / 'diff.html'}")
    raise typer.Exit(found.verdict.exit_code)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@app.command("census")
def census_command(
    candidate: CandidateOption = DEFAULT_CANDIDATE,
    family: Annotated[str, typer.Option(help="Glob over model types; a part is shown, not stored.")] = "*",
    out: OutOption = OUT,
) -> None:
    """What candle-mi does with every causal language model of transformers: refused, same, different, not asked."""
    with one_line_errors():
        chosen = parse_candidate(candidate)
        if chosen.kind in ("stored", "torch"):
            raise CandidateError(f"the census asks an emitter: it needs a candidate to build, not {candidate}")
        remove(out, "census.json")
        with progress_bar() as bar:
            task = bar.add_task("starting", total=None)
            done: list[Entry] = []

            def progress(entry: Entry, total: int) -> None:
                done.append(entry)
                bar.update(task, description=f"[{len(done)}/{total}] {entry.model_type}: {entry.outcome}")

            built = build(chosen, cache_root(), lambda line: bar.update(task, description=line))
            identity = CandleMi.model_validate(built.identity["candle_mi"])
            census = take_census(built.path, identity, family, cache_root(), out / "census", progress)
        whole = family == "*"
        path = STORED / f"{candidate}.json" if whole and chosen.kind == "version" else out / "census.json"
        write_json(census.model_dump(exclude_defaults=True), path)
        tables.census(census, tables.stdout())
        print(f"wrote {path}")


@app.command("calls")
def calls_command(candidate: CandidateOption = DEFAULT_CANDIDATE, out: OutOption = OUT) -> None:
    """Judge direct calls of candle-mi's public functions. Exit codes as of `run`."""
    with one_line_errors():
        result, held_to = blank(RunOptions(candidate)), expectations(cache_root())
        with open_source(parse_candidate(candidate), cache_root(), out / "traces", lambda line: None) as source:
            judged = judge_source(source, candidate, held_to, cache_root(), out / "calls.json")
            if judged.lost is None and source.identity is not None:
                hold_known(judged, held_to, source.identity, result)
        result.calls, result.known = judged.direct, dict(held_to.rows)
        tables.run_tables(result, tables.stdout())
    raise typer.Exit(result.verdict.exit_code)


@app.command("repro")
def repro_command(
    case: Annotated[str | None, typer.Argument(help="Case id or glob; without it, every known divergence.")] = None,
    candidate: CandidateOption = DEFAULT_CANDIDATE,
    out: Annotated[Path, typer.Option(help="Where the folders go.")] = Path("build/repro"),
    prove: Annotated[bool, typer.Option("--prove", help="Run the Rust test; it must fail on the candidate.")] = False,
    fixed: Annotated[str | None, typer.Option(help="A candidate on which the test must pass.")] = None,
) -> None:
    """Shrink a divergence and write its model, expected tensor, Rust test, Python script and issue text."""
    with one_line_errors():
        with progress_bar() as bar:
            task = bar.add_task("starting", total=None)
            lines = repro(
                case, candidate, out, cache_root(), lambda line: bar.update(task, description=line), prove, fixed
            )
        repro_table(lines, tables.stdout())
        print(f"{len(lines)} reproduced, below {out}")
    raise typer.Exit(0 if all(line.proven for line in lines) else 1)


@app.command("fields")
def fields_command(
    family: Annotated[str | None, typer.Option(help="One model family; without it, all.")] = None,
) -> None:
    """The config-field ledger: every field that transformers reads, what covers it, its effect over noise."""
    with one_line_errors():
        if family is not None:
            family_of(family)
        families = None if family is None else [family]
        findings = check(load_fields(), load_cases(), cache_root(), families)
        tables.fields_table(findings, tables.stdout())
    raise typer.Exit(1 if any(finding.fault for finding in findings) else 0)


@app.command("repeat")
def repeat_command(
    candidate: CandidateOption = DEFAULT_CANDIDATE,
    cases: CasesOption = None,
    device: DeviceOption = "cpu",
    times: Annotated[int, typer.Option(min=2, help="How often each case runs.")] = 3,
    out: OutOption = OUT,
) -> None:
    """Run the same case several times and count the tensors whose bytes differ. Measures: exit code 0 either way."""
    with one_line_errors():
        chosen = select(load_cases(), list(globs(cases)))
        remove(out, "repeat.json")
        with progress_bar() as bar:
            found = repeat(candidate, chosen, times, cache_root(), out / "repeat", device, Terminal(bar, len(chosen)))
        write_json(asdict(found), out / "repeat.json")
        for case in found.cases:
            print(printable(f"{case.id}: {case.line}"))
        print(found.line)


def main() -> None:
    """The command; our own crash and a stop end with 2, not with Python's or typer's 1, which would read as FAIL."""
    try:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(name) is not signal.SIG_IGN:  # as nohup and a shell's background jobs have it
                signal.signal(name, _stop)
        app()
    except Stopped as stopped:
        say(f"stopped by {stopped}")
        sys.exit(Verdict.ERROR.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(Verdict.ERROR.exit_code)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)
