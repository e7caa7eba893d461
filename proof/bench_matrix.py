"""Wall time of whole runs against cases, tokens, layers and workers; and from an edit to its verdict."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from candle_mi_parity.compare.ledger import Ledger

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.candidate import parse_candidate
from candle_mi_parity.errors import ParityError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.run.run import run
from candle_mi_parity.spec.cases import Case, RandomTokens, TinyModel, load_cases, select
from candle_mi_parity.spec.paths import ROOT, cache_root

TOKENS = (16, 64, 256)
LAYERS = (1, 2, 4, 8)
EDIT = "src/transformer/attention.rs"
BEFORE, AFTER = "scores = (scores * self.scale)?;", "scores = scores.affine(self.scale, 0.0)?;"
"""One line that a maintainer might write otherwise; it computes the same."""


def timed(cases: list[Case], candidate: str) -> float:
    """Seconds that a run in this process takes, its imports and its report left out."""
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        run(candidate, cases, {}, cache_root(), Path(out), Ledger(format=1), Progress())
        return time.perf_counter() - started


def by_cases(candidate: str, counts: tuple[int, ...] = (15, 60)) -> dict[int, float]:
    """Evenly chosen from the default lane, and the whole of it; truths are in the cache."""
    table = select(load_cases(), None)
    chosen = {count: table[:: len(table) // count][:count] for count in counts} | {len(table): table}
    timed(table, candidate)
    return {count: timed(cases, candidate) for count, cases in chosen.items()}


def by_shape(candidate: str) -> dict[str, dict[int, dict[str, float]]]:
    """Tiny Llamas of other lengths and depths: with the truth to compute, and with it in the cache."""
    plain = next(case for case in load_cases() if case.id == "llama/hub")
    assert isinstance(plain.model, TinyModel)
    model = plain.model
    longer = {n: plain.model_copy(update={"tokens": RandomTokens(random=n)}) for n in TOKENS}
    deeper = {
        n: plain.model_copy(
            update={"model": model.model_copy(update={"change": model.change | {"num_hidden_layers": n}})}
        )
        for n in LAYERS
    }
    return {
        "tokens": {n: _first_and_cached(case, candidate) for n, case in longer.items()},
        "layers": {n: _first_and_cached(case, candidate) for n, case in deeper.items()},
    }


def _first_and_cached(case: Case, candidate: str) -> dict[str, float]:
    """In a cache of its own, which has the emitters of the real one."""
    real = cache_root()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "emitters").symlink_to(real / "emitters")
        told = os.environ.get("PARITY_CACHE")
        os.environ["PARITY_CACHE"] = directory
        try:
            return {"first": timed([case], candidate), "cached": timed([case], candidate)}
        finally:
            os.environ.pop("PARITY_CACHE")
            os.environ |= {} if told is None else {"PARITY_CACHE": told}


def by_workers(workers: tuple[int, ...] = (1, 2)) -> dict[int, float]:
    """``pytest tests/test_logits.py`` with that many processes."""
    return {count: _command("-m", "pytest", "-q", "tests/test_logits.py", f"-n{count}") for count in workers}


def edit_to_verdict(checkout: Path) -> dict[str, float]:
    """One line changed in a copy of a checkout, and the seconds of cargo and of the rest until the verdict.

    :raises ParityError: the line is not there exactly once.
    """
    # Always the same place: what cargo keeps of a checkout goes by its path.
    copy = cache_root() / "bench" / "candle-mi"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns("target", ".git"))
    with tempfile.TemporaryDirectory() as out:
        file = copy / EDIT
        text = file.read_text(encoding="utf-8")
        if text.count(BEFORE) != 1:
            raise ParityError(f"{checkout / EDIT}: {BEFORE!r} is there {text.count(BEFORE)} times, expected once")
        candidate = parse_candidate(f"path:{copy}")
        seconds = {"cargo, before the edit": _built(candidate.spec)}
        file.write_text(text.replace(BEFORE, AFTER), encoding="utf-8")
        seconds["cargo"] = _built(candidate.spec)
        arguments = ("run", "--candidate", candidate.spec, "--out", out)
        return seconds | {"ours": _command("-c", "from candle_mi_parity.cli.cli import main; main()", *arguments)}


def _built(spec: str) -> float:
    started = time.perf_counter()
    build(parse_candidate(spec), cache_root(), lambda line: None)
    return time.perf_counter() - started


def _command(*arguments: str) -> float:
    """Seconds of a Python command; whatever it finds, it has to come to an end of its own."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2, 3) or "Traceback" in done.stderr:
        raise ParityError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - started
