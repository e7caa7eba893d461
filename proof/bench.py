"""``make bench``: what the suite costs, each as a ratio within one run, and the figures that it is to keep.

Exit code 1 when a figure is missed. Seconds of whole runs depend on the machine: they are told, not judged.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from candle_mi_parity.errors import ParityError
from candle_mi_parity.report.proof_record import rules_digest
from candle_mi_parity.run.run import library_versions
from candle_mi_parity.spec.cases import load_cases
from proof import OUT
from proof.bench_dump import Cost, costs, generate
from proof.bench_matrix import by_cases, by_shape, by_workers, edit_to_verdict
from proof.bench_oracle import OracleCost, oracle_cost

PEAK = 3.0
ALLCLOSE = 2.5
TRUTH = 2.5
NOISE = 40.0
MIB = 1 << 20
DUMPS = {"10 MiB": (10, 1 * MIB), "100 MiB": (2, 50 * MIB), "1 GiB": (8, 128 * MIB)}
"""Name → tensors, bytes of each."""
SMALL = "10 MiB"
"""Its tensors are judged whole, so that its peak is a few MiB whatever the dump's size, and no multiple of one."""
ORACLES = ("llama/hub", "gemma2/hub", "smollm2/hub")

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Figure:
    """One number and what it must stay below; None where it is told only."""

    name: str
    value: float
    below: float | None = None
    unit: str = "×"

    @property
    def kept(self) -> bool:
        """Written so that NaN is missed."""
        return self.below is None or self.value < self.below


def dump_figures(name: str, size: int, largest: int, found: dict[str, Cost]) -> list[Figure]:
    """Of one dump: throughput, peak memory, and the ratios to numpy and torch."""
    ours = found["ours"]
    peak = max(ours.allocated, ours.resident)
    judged = name != SMALL
    return [
        Figure(f"dump of {name}: throughput", size / 1e9 / ours.seconds, unit="GB/s"),
        Figure(f"dump of {name}: time / numpy.allclose", ours.seconds / found["allclose"].seconds, ALLCLOSE),
        Figure(f"dump of {name}: time / torch.testing.assert_close", ours.seconds / found["assert_close"].seconds),
        Figure(f"dump of {name}: peak memory", peak / MIB, unit="MiB"),
        Figure(f"dump of {name}: peak memory / largest tensor", peak / largest, PEAK if judged else None),
    ]


def oracle_figures(name: str, cost: OracleCost) -> list[Figure]:
    """Of one case, in units of a plain float32 forward."""
    return [
        Figure(f"{name}: plain float32 forward of {cost.tokens} tokens", 1e3 * cost.plain, unit="ms"),
        Figure(f"{name}: truth / plain forward", cost.truth / cost.plain, TRUTH),
        Figure(f"{name}: 16 noise samples / plain forward", cost.noise / cost.plain, NOISE),
        Figure(f"{name}: models loaded for a cached truth", float(cost.model_loaded), 0.5, ""),
        Figure(f"{name}: reading a cached truth", 1e3 * cost.cached, unit="ms"),
        Figure(f"{name}: emitter's forward / plain forward", cost.emitter["forward"] / cost.plain),
        Figure(f"{name}: emitter, all phases", 1e3 * sum(cost.emitter.values()), unit="ms"),
    ]


def matrix_figures(candidate: str) -> list[Figure]:
    """Seconds of whole runs."""
    figures = [Figure(f"run of {n} cases, truths cached", s, unit="s") for n, s in by_cases(candidate).items()]
    for axis, points in by_shape(candidate).items():
        for n, seconds in points.items():
            figures += [Figure(f"tiny Llama, {axis} {n}: {what}", s, unit="s") for what, s in seconds.items()]
    return figures + [Figure(f"tests/test_logits.py, workers {n}", s, unit="s") for n, s in by_workers().items()]


def table(figures: list[Figure]) -> str:
    """Markdown."""
    lines = ["| what | measured | must be | |", "|---|---|---|---|"]
    for figure in figures:
        limit = "" if figure.below is None else f"< {figure.below:g}"
        said = "" if figure.below is None else "kept" if figure.kept else "**missed**"
        lines.append(f"| {figure.name} | {figure.value:.3g} {figure.unit} | {limit} | {said} |")
    return "\n".join(lines) + "\n"


def save(figures: list[Figure], out: Path) -> None:
    """``bench.json`` and ``bench.md``."""
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "measured_by": rules_digest(),
        "versions": library_versions(),
        "figures": [asdict(figure) | {"kept": figure.kept} for figure in figures],
    }
    (out / "bench.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(table(figures), encoding="utf-8")


@app.command()
def main(
    candidate: Annotated[str, typer.Option(help="Whose emitter is timed; it needs a build.")] = "0.2.2",
    checkout: Annotated[
        Path | None, typer.Option(help="A candle-mi checkout; a copy is edited and judged. Without it, not timed.")
    ] = None,
    matrix: Annotated[bool, typer.Option(help="Whole runs too, some minutes.")] = True,
    out: Annotated[Path, typer.Option(help="Where bench.json and bench.md go.")] = OUT,
) -> None:
    """Measure, print the table, and exit with 1 when a figure is missed."""
    figures: list[Figure] = []
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("bench", total=len(DUMPS) + len(ORACLES) + matrix + (checkout is not None))
            for name, (tensors, size) in DUMPS.items():
                progress.update(task, description=f"dump of {name}")
                with tempfile.TemporaryDirectory() as directory:
                    largest = generate(Path(directory), tensors, size)
                    found = costs(Path(directory), ["ours", "allclose", "assert_close"])
                figures += dump_figures(name, tensors * size, largest, found)
                progress.advance(task)
            cases = {case.id: case for case in load_cases()}
            for name in ORACLES:
                progress.update(task, description=f"oracle of {name}")
                figures += oracle_figures(name, oracle_cost(cases[name], candidate))
                progress.advance(task)
            if matrix:
                progress.update(task, description="whole runs")
                figures += matrix_figures(candidate)
                progress.advance(task)
            if checkout is not None:
                progress.update(task, description="edit to verdict")
                seconds = edit_to_verdict(checkout)
                figures += [Figure(f"edit to verdict: {part}", s, unit="s") for part, s in seconds.items()]
    except ParityError as error:
        console.print(f"bench: {error}", style="bold red", markup=False)
        raise typer.Exit(2) from error
    finally:
        save(figures, out)
    print(table(figures), end="")
    missed = [figure.name for figure in figures if not figure.kept]
    print(f"{len(missed)} figures missed" + "".join(f"\n  {name}" for name in missed))
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    app()
