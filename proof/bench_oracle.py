"""What a truth costs, what its noise costs, and the emitter, beside one plain float32 forward of transformers."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from candle_mi_parity.candidate.candidate import parse_candidate
from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.compute import SAMPLES, sample
from candle_mi_parity.oracle.hooks import load_model
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Trace


@dataclass(frozen=True)
class OracleCost:
    """Seconds of one processor, the best of the rounds.

    :ivar emitter: the phases that it timed itself, by the clock and on as many threads as it takes.
    :ivar truth: the values in float64, without what only the samples need.
    :ivar noise: all the samples, and the Σa²b² of the matmuls that give them their size.
    :ivar cached: reading the truth of the case from the cache, the digest of the model known.
    """

    tokens: int
    plain: float
    truth: float
    noise: float
    cached: float
    model_loaded: bool
    emitter: dict[str, float]


def oracle_cost(case: Case, candidate: str, rounds: int = 3) -> OracleCost:
    """The parts in turn, on one thread and in processor time, which a load on the machine stretches least."""
    torch.set_num_threads(1)
    subject = prepare(case, cache_root())
    tokens = torch.tensor(subject.tokens)
    exact, plain = load_model(subject.model_dir), load_model(subject.model_dir, torch.float32, attention="eager")
    best = dict.fromkeys(("plain", "truth", "both"), math.inf)

    def noisy(samples: int) -> Callable[[], object]:
        return lambda: sample(exact, tokens, 0, lambda captured: {}, {}, samples=samples)

    def forward() -> object:
        with torch.no_grad():
            return plain(tokens)

    arms: dict[str, Callable[[], object]] = {"plain": forward, "truth": noisy(0), "both": noisy(SAMPLES)}
    for run in arms.values():
        run()
    for _ in range(rounds):
        for name, run in arms.items():
            best[name] = min(best[name], _seconds(run))
    Oracle(subject, cache_root()).truth()  # computed where this is the first to ask
    again = Oracle(subject, cache_root())
    cached = _seconds(again.truth)
    truth = again.truth()
    with tempfile.TemporaryDirectory() as out:
        source = open_source(parse_candidate(candidate), cache_root(), Path(out), lambda line: None)
        with source:
            traces = [source.trace(subject, "free", truth, again.inputs("free")) for _ in range(rounds)]
    runs = [trace.document.run.seconds for trace in traces if isinstance(trace, Trace)]
    emitter = {phase: min(run[phase] for run in runs) for phase in runs[0]}
    loaded = "model" in vars(again)
    return OracleCost(
        tokens.numel(), best["plain"], best["truth"], best["both"] - best["truth"], cached, loaded, emitter
    )


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started
