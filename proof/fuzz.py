"""``make fuzz``: every mutant is refused in one line or judged other than PASS, within bounds of time and memory.

Each target runs in a process of its own with a limit on its memory; the parent ends it when a mutant takes longer
than :data:`SECONDS`, and goes on behind that one. A fault is anything else than the property; its seed is
recorded, and ``python -m proof.fuzz --target NAME --seed N`` shows it alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from proof.fuzz_targets import NAMED, TARGETS, Target

SECONDS = 10.0
"""Of the processor's time on one mutant; of the clock's, on a machine that is busy otherwise, six times that."""
MEMORY = 2 << 30
"""Bytes of address space beyond what the process has when it starts."""
SET_UP_SECONDS = 300.0


@dataclass
class Tally:
    """:ivar outcomes: word → count. :ivar faults: seed → what happened."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def mutants(self) -> int:
        return self.outcomes.total() + len(self.faults)


def generator(target: str, seed: int) -> Random:
    return Random(f"{target}:{seed}")


def one(target: Target, seed: int, fuzz: Any) -> tuple[str, str]:
    """Outcome and fault of a seed; one of the two is empty."""
    try:
        return fuzz(generator(target.name, seed)), ""
    except Exception as error:  # whatever it is, it is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "", f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"


def _work(name: str, seeds: range, now: Any, pipe: Any, directory: str) -> None:
    """In a process of its own: ``now`` holds the seed at work, the pipe carries (seed, outcome, fault, seconds)."""
    fuzz = NAMED[name].make(Path(directory))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    sys.stdin = open(os.devnull)  # noqa: SIM115 -- nothing may ask a question
    for seed in seeds:
        now.value = seed
        started = time.monotonic()
        outcome, fault = one(NAMED[name], seed, fuzz)
        pipe.send((seed, outcome, fault, time.monotonic() - started))
    pipe.send(None)


def run_target(target: Target, seeds: range) -> Tally:
    """All seeds of a target, whatever becomes of the process."""
    tally, started = Tally(target.name), time.monotonic()
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    while seeds:
        with tempfile.TemporaryDirectory(prefix="parity-fuzz-", dir=shm) as directory:
            seeds = _stretch(target, seeds, tally, directory)
    tally.seconds = time.monotonic() - started
    return tally


def _stretch(target: Target, seeds: range, tally: Tally, directory: str) -> range:
    """Work until the process ends in whichever way; the seeds that are left."""
    context = multiprocessing.get_context("fork")
    now = context.Value("q", -1, lock=False)
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(target.name, seeds, now, theirs, directory), daemon=True)
    worker.start()
    theirs.close()
    done = seeds.start
    try:
        while True:
            if _hangs(ours, worker.pid, SECONDS if now.value >= 0 else SET_UP_SECONDS):
                tally.faults[done] = "hang: no answer in time"
                break
            answer = ours.recv()
            if answer is None:
                return range(0)
            seed, outcome, fault, seconds = answer
            tally.slowest, done = max(tally.slowest, seconds), seed + 1
            if fault:
                tally.faults[seed] = fault
            else:
                tally.outcomes[outcome] += 1
    except EOFError:
        worker.join(5)
        tally.faults[done] = f"crash: the process ended with {worker.exitcode}"
    finally:
        worker.kill()
        worker.join()
    if now.value < 0:
        raise SystemExit(f"{target.name}: its set-up failed")
    return range(done + 1, seeds.stop)


def _hangs(pipe: Any, pid: int | None, seconds: float) -> bool:
    """Whether no answer comes within ``seconds`` of the worker's processor time, or six times as long in all."""
    began, late = _spent(pid), time.monotonic() + 6 * seconds
    while not pipe.poll(seconds / 4):
        if _spent(pid) - began > seconds or time.monotonic() > late:
            return True
    return False


def _spent(pid: int | None) -> float:
    """A process's user and system time in seconds; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def document(tallies: list[Tally], start: int, share: float) -> dict[str, Any]:
    return {
        "format": "candle-mi-parity/fuzz/1",
        "seeds": f"Random('TARGET:N'), N from {start}",
        "share": share,
        "seconds_limit": SECONDS,
        "memory_limit_bytes": MEMORY,
        "mutants": sum(tally.mutants for tally in tallies),
        "faults": sum(len(tally.faults) for tally in tallies),
        "targets": [
            {
                "name": tally.target,
                "mutants": tally.mutants,
                "outcomes": dict(sorted(tally.outcomes.items())),
                "faults": {str(seed): fault for seed, fault in sorted(tally.faults.items())},
                "seconds": round(tally.seconds, 1),
                "slowest_seconds": round(tally.slowest, 3),
            }
            for tally in tallies
        ],
    }


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| target | mutants | outcomes | faults | slowest |", "|---|---|---|---|---|"]
    for target in found["targets"]:
        outcomes = ", ".join(f"{count} {word}" for word, count in target["outcomes"].items())
        lines.append(
            f"| {target['name']} | {target['mutants']} | {outcomes} | {len(target['faults'])} "
            f"| {target['slowest_seconds']:.2f} s |"
        )
    return "\n".join([*lines, f"| all | {found['mutants']} | | {found['faults']} | |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m proof.fuzz")
    parser.add_argument("--share", type=float, default=1.0, help="of each target's mutants")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--target", choices=sorted(NAMED), help="this one only")
    parser.add_argument("--seed", type=int, help="one mutant, its error not caught; needs --target")
    parser.add_argument("--out", type=Path, default=Path("build/proof"))
    told = parser.parse_args()
    if told.seed is not None:
        with tempfile.TemporaryDirectory(prefix="parity-fuzz-") as directory:
            print(NAMED[told.target].make(Path(directory))(generator(told.target, told.seed)))
        return
    tallies: list[Tally] = []
    told.out.mkdir(parents=True, exist_ok=True)
    for target in TARGETS if told.target is None else [NAMED[told.target]]:
        seeds = range(told.start, told.start + max(1, round(target.mutants * told.share)))
        tallies.append(run_target(target, seeds))
        found = document(tallies, told.start, told.share)
        (told.out / "fuzz.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (told.out / "fuzz.md").write_text(table(found), encoding="utf-8")
        print(table(document(tallies[-1:], told.start, told.share)).splitlines()[2], flush=True)
        for seed, fault in sorted(tallies[-1].faults.items())[:20]:
            print(f"  FAULT seed {seed}: {fault}", flush=True)
    sys.exit(1 if any(tally.faults for tally in tallies) else 0)


if __name__ == "__main__":
    main()
