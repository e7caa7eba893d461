"""What every run on a GPU rests on, measured in eight minutes on a machine that has one and needs no network.

    python -m validation.gpu_check [--device cuda:0] [--emitter FILE] [--out build/gpu-check]

Steps, see :mod:`gpu_steps`: the fast tests marked ``gpu``; CUDA's rounding held against the noise that the gate
predicts, one operation at a time; candle-mi on CUDA, one case a family; the same run twice, bit for bit; the peak of
device memory. Each is a process of its own with a limit of time, so that a crash or a hang costs only its step. What
was not measured is NOT RUN.

Exit code 0 if every line passes, 1 if one fails, 2 without the device, 3 if none fails and something was not run.
**It has never run on a GPU**; with ``--device cpu`` the same lines are measured on the CPU.
"""

from __future__ import annotations

import json
import lzma
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from candle_mi_parity.candidate import cuda
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.json_out import write_json
from candle_mi_parity.files.versions import version
from candle_mi_parity.spec.paths import ROOT
from validation.gpu_steps import DATA, STEPS, Line, Outcome, Setup

MODULE = ["-m", "validation.gpu_steps"]
OUT, FILE = "build/gpu-check", "gpu-check.json"


def in_process(step: str, setup: Setup, seconds: float) -> list[Line]:
    """The lines of a step that runs in a process of its own for at most some seconds."""
    command = [sys.executable, *MODULE, step, setup.device, setup.emitter, str(setup.out)]
    written, log = setup.out / f"{step}.jsonl", setup.out / f"{step}.log"
    written.unlink(missing_ok=True)
    code: int | None = None
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    text = written.read_text(encoding="utf-8") if written.is_file() else ""
    # The last line of a process that was killed may be half a line.
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    lines = [Line(**row | {"outcome": Outcome(row["outcome"])}) for row in rows]
    if code is None:
        lines.append(Line(step, "the rest", Outcome.NOT_RUN, f"out of time after {seconds:g} s"))
    elif code != 0 or not lines:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]
        says = f"the process ended with code {code} after {len(lines)} lines, expected 0; it said last: {last}"
        lines.append(Line(step, "the rest", Outcome.FAIL, one_line(says)))
    return lines


def exit_code(lines: list[Line]) -> int:
    """1 if a line fails, 3 if something was not run, otherwise 0."""
    outcomes = {line.outcome for line in lines}
    return 1 if Outcome.FAIL in outcomes else 0 if outcomes == {Outcome.PASS} else 3


def table(lines: list[Line]) -> str:
    """One line a measurement."""
    wide = max(len(line.name) for line in lines)
    return "\n".join(
        f"{line.outcome:<8}{line.step:<13}{line.name:<{wide + 2}}{line.seconds:6.1f} s  {line.says}" for line in lines
    )


def machine(setup: Setup) -> dict[str, str]:
    """Where and with what it was measured."""
    program = Path(setup.emitter)
    emitter = {"emitter_sha256": file_digest(program)} if program.is_file() else {}
    versions = {"torch": version("torch"), "transformers": version("transformers"), "cuda": str(torch.version.cuda)}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, **cuda.versions(setup.device), **versions, "emitter": setup.emitter, **emitter}


def unpacked(emitter: str, out: Path) -> str:
    """The command line of an emitter's file, unpacked if it ends in ``.xz``; a command line stays as it is."""
    file = Path(emitter)
    if not file.is_file():
        return emitter
    if file.suffix == ".xz":
        target = out / file.stem
        target.write_bytes(lzma.decompress(file.read_bytes()))
        target.chmod(0o755)
        file = target
    return shlex.quote(str(file.resolve()))


def main(
    device: Annotated[str, typer.Option(help="cuda:N, or cpu to try this script")] = "cuda:0",
    emitter: Annotated[str, typer.Option(help="the emitter's file, FILE.xz, or a command line")] = "",
    out: Annotated[Path, typer.Option(help="directory of gpu-check.json and of a log for each step")] = Path(OUT),
    step: Annotated[list[str] | None, typer.Option(help=f"only this of {', '.join(STEPS)}")] = None,
) -> None:
    """Measure, print a table, and write gpu-check.json."""
    if reason := cuda.missing(device):
        typer.echo(f"gpu-check: no CUDA device was found: {reason.partition(': ')[2]}", err=True)
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    setup = Setup(device, unpacked(emitter, out), out.resolve())
    lines = [line for name in step or STEPS for line in in_process(name, setup, DATA["seconds"][name])]
    code = exit_code(lines)
    typer.echo(table(lines))
    write_json(
        {"format": 1, "exit_code": code, **machine(setup), "lines": [asdict(line) for line in lines]}, out / FILE
    )
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
