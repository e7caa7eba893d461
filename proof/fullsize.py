"""``make fullsize``: the case of full size, each stage in a process of its own, with its seconds and its peak memory.

One stage after the other, so that the two sides are never in memory together. The truth of the case is computed anew
each time; the model is generated where it is not there yet, and then takes no time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from candle_mi_parity.candidate.candidate import parse_candidate
from candle_mi_parity.candidate.sources import open_source, same_candidate, trace_path
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.errors import ParityError
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.compute import sample
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.run.run import library_versions
from candle_mi_parity.spec.cases import Case, load_cases
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Trace
from proof import OUT

CASE = "gemma-2-2b/generated"
NEEDED = 14
"""GB that must be free before candle-mi copies the model into memory: 10.5 of weights, and what it computes."""
PATIENCE = 300.0
"""Seconds that a busy machine is given to free them."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Stage:
    """What one stage cost.

    :ivar seconds: by the clock.
    :ivar processor: seconds of processor time, which a load on the machine stretches least.
    :ivar peak: the most memory that its process held, in bytes, pages of mapped files included.
    :ivar said: its result in a few words.
    """

    name: str
    seconds: float
    processor: float
    peak: int
    said: str


def _case() -> Case:
    return next(case for case in load_cases() if case.id == CASE)


def generate(_work: Path) -> str:
    """Model and SAE into the cache, and their digests."""
    subject = prepare(_case(), cache_root())
    return f"{sum(file.stat().st_size for file in subject.model_dir.iterdir()) / 1e9:.1f} GB of model"


def truth(work: Path) -> str:
    """The truth's own pass, without lens and SAE and without noise; nothing is kept."""
    oracle = Oracle(prepare(_case(), cache_root()), work)
    tokens = torch.tensor(oracle.subject.tokens)
    recorder, *_ = sample(oracle.model, tokens, 0, lambda captured: {}, {}, samples=0)
    return f"{len(recorder.tensors)} tensors"


def noise(work: Path) -> str:
    """The truth with lens and SAE, and 16 samples of its noise, into a file."""
    oracle = Oracle(prepare(_case(), cache_root()), work)
    found = oracle.truth()
    size = sum(file.stat().st_size for file in work.rglob("truth.safetensors"))
    return f"{len(found.tensors)} tensors, weights {found.meta['weights']}, {size / 1e6:.0f} MB"


def emit(work: Path, candidate: str) -> str:
    """candle-mi's side; the emitter is built before."""
    oracle = Oracle(prepare(_case(), cache_root()), work)
    found, inputs = oracle.truth(), oracle.inputs("free")
    waited = wait_for_memory()
    with open_source(parse_candidate(candidate), cache_root(), work, lambda line: None) as source:
        trace = source.trace(oracle.subject, "free", found, inputs)
    assert isinstance(trace, Trace)
    run = trace.document.run
    parts = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.seconds.items())
    return f"emitter's own peak {(run.peak_rss_bytes or 0) / 1e9:.1f} GB; {parts}; waited {waited:.0f} s for memory"


def available() -> float:
    """GB that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9


def wait_for_memory() -> float:
    """Seconds until there was enough.

    :raises ParityError: there never was; better than a machine that kills what it likes.
    """
    started = time.monotonic()
    while (free := available()) < NEEDED:
        if time.monotonic() - started > PATIENCE:
            raise ParityError(f"the emitter needs {NEEDED} GB of free memory, and there are {free:.1f}")
        time.sleep(5)
    return time.monotonic() - started


def judge(work: Path, candidate: str) -> str:
    """Every tensor of the trace against the truth."""
    subject = prepare(_case(), cache_root())
    assert subject.sae_file is not None
    trace = Trace(trace_path(work, CASE, "free"))
    if parse_candidate(candidate).kind == "version":
        assert trace.header.candle_mi.version == candidate
    same_candidate(trace, trace.header.candle_mi)
    results = compare(Oracle(subject, work).truth(), trace, load_sae(subject.sae_file).decoder, None)
    worst = max(results, key=lambda result: result.ratio)
    bad = [result for result in results if result.status is not Status.PASS]
    first = f"; first {bad[0].name}: {bad[0].status.value}, ratio {bad[0].ratio:.3g}" if bad else ""
    return f"{len(results) - len(bad)} of {len(results)} pass, worst {worst.ratio:.3g} at {worst.name}{first}"


STAGES: dict[str, Callable[..., str]] = {
    "generate": generate,
    "truth": truth,
    "truth and noise": noise,
    "emit": emit,
    "compare": judge,
}


def measured(name: str, work: Path, candidate: str) -> Stage:
    """One stage in a process of its own.

    :raises ParityError: it failed; with its last line.
    """
    command = [sys.executable, "-m", "proof.fullsize", "--stage", name, "--work", str(work), "--candidate", candidate]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ParityError(f"{name}: {last}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Stage(name, seconds, **answer)


def table(stages: list[Stage]) -> str:
    """Markdown."""
    whole = Stage(
        "whole", sum(s.seconds for s in stages), sum(s.processor for s in stages), max(s.peak for s in stages), ""
    )
    lines = ["| stage | seconds | processor seconds | peak GB | |", "|---|---|---|---|---|"]
    lines += [
        f"| {s.name} | {s.seconds:.0f} | {s.processor:.0f} | {s.peak / 1e9:.1f} | {s.said} |"
        for s in [*stages, whole]
    ]
    return "\n".join(lines) + "\n"


@app.command()
def main(
    candidate: Annotated[str, typer.Option(help="Whose emitter runs; it needs a build.")] = "0.2.2",
    out: Annotated[Path, typer.Option(help="Where fullsize.json and fullsize.md go.")] = OUT,
    stage: Annotated[str | None, typer.Option(hidden=True, help="One stage, in this process.")] = None,
    work: Annotated[
        Path | None, typer.Option(hidden=True, help="Where the stages leave what the next one reads.")
    ] = None,
) -> None:
    """Run the stages and print the table; exit code 1 when a tensor does not pass, 2 when a stage fails."""
    console = Console(stderr=True)
    if stage is not None and work is not None:
        arguments = (work, candidate) if stage in ("emit", "compare") else (work,)
        said = STAGES[stage](*arguments)
        # Of the process itself and of the emitter that it waited for, whichever held more.
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        processor, peak = sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used) * 1024
        print(json.dumps({"processor": processor, "peak": peak, "said": said}))
        return
    stages: list[Stage] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for name in STAGES:
                console.print(f"fullsize: {name}", style="dim", highlight=False)
                stages.append(measured(name, Path(directory), candidate))
        except ParityError as error:
            console.print(f"fullsize: {error}", style="bold red", markup=False)
            raise typer.Exit(2) from error
        finally:
            out.mkdir(parents=True, exist_ok=True)
            document = {"versions": library_versions(), "stages": [asdict(found) for found in stages]}
            (out / "fullsize.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            (out / "fullsize.md").write_text(table(stages) if stages else "", encoding="utf-8")
    print(table(stages), end="")
    raise typer.Exit(1 if "; first " in stages[-1].said else 0)


if __name__ == "__main__":
    app()
