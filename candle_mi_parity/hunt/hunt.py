"""The hunt: rounds of inputs, drawn from what earlier rounds reached, judged by several processes at once.

A round is drawn whole from the state after the round before, so that a seed gives the same inputs whatever the number
of processes. Time decides only how many rounds there are, and how long explanations are searched for.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from candle_mi_parity.compare.hunt_result import ENOUGH, NEAREST, TRIES, Cause, Entry, HuntResult, Tally
from candle_mi_parity.compare.suspects import in_any_layer
from candle_mi_parity.hunt import worker
from candle_mi_parity.hunt.bench import Answer, Found
from candle_mi_parity.hunt.genes import Genes, entries_of
from candle_mi_parity.hunt.grammar import Grammar
from candle_mi_parity.hunt.shrink import as_drawn
from candle_mi_parity.hunt.worker import Input, Report, Search, Searched
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import Explanations

ROUND = 192
"""Inputs of a round."""
CHUNK = 6
"""Inputs that a process takes at once."""
CALLS_EVERY, CALLS = 2, 100
"""Direct calls are generated in every second round, and how many."""
TEXTS_EVERY, TEXTS = 6, 300
"""Texts are generated in every sixth round, for one tokenizer after the other, and how many."""
LARGEST_CORPUS = 400
MEMORY = Path("/dev/shm")
"""A file system in memory, where writing an input's files takes no time; the usual place where there is none."""
DIED = "the process of this suite died"
NOTE_SECONDS = 10.0
READ_EVERY = 24
"""Of so many inputs, one is loaded again to record the config keys that transformers reads."""


@dataclass
class Limits:
    """When a hunt ends: after a number of seconds or of inputs, whichever comes first; None for no such limit.

    :ivar search: seconds for the explanation of one cause.
    """

    seconds: float | None = None
    inputs: int | None = None
    search: float = 15.0

    def reached(self, result: HuntResult, started_with: tuple[float, int]) -> bool:
        """:param started_with: seconds and inputs of the result when this command began."""
        seconds, inputs = started_with
        late = self.seconds is not None and result.seconds - seconds >= self.seconds
        return late or (self.inputs is not None and result.tried - inputs >= self.inputs)


class Processes(ProcessPoolExecutor):
    """A process for each core, each with a candidate of its own and one thread; their files are removed with them."""

    def __init__(self, hunt: Hunt) -> None:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        # transformers' messages list sets, and which messages are new decides what is drawn.
        os.environ["PYTHONHASHSEED"] = "0"
        self._shared = Path(tempfile.mkdtemp(prefix="parity-hunt-", dir=MEMORY if MEMORY.is_dir() else None))
        what = hunt.result.candidate, hunt.cache, hunt.table, hunt.counted, self._shared
        super().__init__(os.cpu_count(), multiprocessing.get_context("spawn"), worker.start, what)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        shutil.rmtree(self._shared, ignore_errors=True)


@dataclass
class Hunt:
    """A hunt in progress.

    :ivar tell: called after each round.
    :ivar counted: whether candle-mi is built so that its branches are counted.
    :ivar calls: whether direct calls are generated too.
    :ivar tokenizers: names and directories of those for which texts are generated.
    :ivar note: called with what is being done, at least every :data:`NOTE_SECONDS` during a round.
    :ivar start: what starts the processes; again after one died.
    """

    result: HuntResult
    grammar: Grammar
    table: Explanations
    cache: Path
    limits: Limits
    tell: Callable[[HuntResult], None]
    counted: bool = False
    calls: bool = False
    tokenizers: Sequence[tuple[str, Path]] = ()
    start: Callable[[Hunt], Executor] = Processes
    note: Callable[[str], None] = lambda line: None
    _pool: Executor | None = None
    _everywhere: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for feature in self.result.seen:  # of a hunt that goes on
            family, reads, key = feature.partition(" reads ")
            if reads and "." not in key and family in self.grammar.keys:  # a message may hold the word, too
                self.grammar.keys[family].add(key)

    @cached_property
    def _pairs(self) -> set[str]:
        """Digests of the pairs of entries that were drawn."""
        return set(self.result.pairs)

    @cached_property
    def _reached(self) -> set[int]:
        """Regions of candle-mi's source that an input has reached."""
        return set(self.result.branches.reached)

    def run(self) -> HuntResult:
        """Rounds until a limit is reached."""
        begun = self.result.seconds, self.result.tried
        try:
            while not self.limits.reached(self.result, begun):
                started = time.monotonic()
                self._round()
                self.result.rounds += 1
                self.result.seconds += time.monotonic() - started
                self.result.branches.reached = sorted(self._reached)
                self.result.pairs = sorted(self._pairs)
                self.tell(self.result)
        finally:
            self._close()
        return self.result

    def _round(self) -> None:
        inputs = self._drawn()
        others = [(search, self._submit(worker.searched, search)) for search in self._searches()]
        reports = self._judged(inputs)
        for report in reports:
            self._count(report)
        for search, future in others:
            self._take(search, future)
        self._close_in([report for report in reports if is_new(report.answer)])

    def _searches(self) -> list[Search]:
        """The direct calls and texts of the next round."""
        result, searches = self.result, []
        seed = random.Random(f"{result.seed}:{result.rounds}:others").getrandbits(32)
        if self.calls and result.rounds % CALLS_EVERY == 0:
            already = [cause for cause in result.causes if cause.kind == "call"]
            searches.append(Search(result.version, seed, CALLS, already))
        if self.tokenizers and result.rounds % TEXTS_EVERY == TEXTS_EVERY - 1:
            tokenizer = self.tokenizers[result.rounds // TEXTS_EVERY % len(self.tokenizers)]
            already = [cause for cause in result.causes if cause.kind == "text"]
            searches.append(Search(result.version, seed, TEXTS, already, tokenizer))
        return searches

    def _take(self, search: Search, future: Future[Searched]) -> None:
        """Add what a search in calls or texts gave."""
        try:
            found: Searched = self._done(future, "judging direct calls" if search.kind == "call" else "judging texts")
        except BrokenProcessPool:
            self._close()
            found = Searched(Tally(), [], search.already, f"{DIED} ({search.kind})")
        result = self.result
        if found.fault:
            result.faults[found.fault] = result.faults.get(found.fault, 0) + 1
        result.tallies.setdefault(search.kind, Tally()).add(found.tally)
        counts = iter(found.already)
        result.causes = [next(counts) if cause.kind == search.kind else cause for cause in result.causes]
        result.causes += found.causes
        self._reached |= set(found.branches)

    def _drawn(self) -> list[Input]:
        """The inputs of the next round."""
        result, inputs = self.result, []
        self._everywhere = _joined(result.entries)
        asked: dict[str, int] = {}
        for place in range(ROUND):
            rng = random.Random(f"{result.seed}:{result.rounds}:{place}")
            family, genes = self.grammar.draw(rng, result.corpus, self._weight, self._pairs)
            ask = self._to_ask(family, genes, asked)
            inputs.append(Input(family, genes, tuple(ask), place % READ_EVERY == 0))
        return inputs

    def _weight(self, family: str, entry: str) -> float:
        """How often an entry is drawn; where the family tells little yet, by what the others tell."""
        found = self.result.entries.get(f"{family}: {entry}", Entry())
        everywhere = self._everywhere.get(entry, found)
        hopeless = found.tried < ENOUGH and everywhere.tried >= 2 * ENOUGH and everywhere.dull == everywhere.tried
        return 0.05 if hopeless else found.weight

    def _to_ask(self, family: str, genes: Genes, asked: dict[str, int]) -> list[str]:
        """The entries of one slot of which it is not known whether they change anything.

        :param asked: entry → how often it is tried in this round already.
        """
        ask: dict[str, list[str]] = {}
        for name, slot in entries_of(genes).items():
            entry = self.result.entries.setdefault(f"{family}: {name}", Entry())
            if not entry.excites and entry.asked + asked.get(f"{family}: {name}", 0) < TRIES:
                ask.setdefault(slot, []).append(name)
        first = next(iter(ask.values()), [])
        for name in first:
            asked[f"{family}: {name}"] = asked.get(f"{family}: {name}", 0) + 1
        return first

    def _judged(self, inputs: list[Input]) -> list[Report]:
        found = self._found()
        chunks = [inputs[start : start + CHUNK] for start in range(0, len(inputs), CHUNK)]
        waiting = [self._submit(worker.judge_all, chunk, found) for chunk in chunks]
        pool = self._pool
        reports: list[Report] = []
        for chunk, future in zip(chunks, waiting, strict=True):
            try:
                reports += self._done(future, f"judging round {self.result.rounds + 1}")
            except BrokenProcessPool:
                if self._pool is pool:  # the processes that replaced it are still good
                    self._close()
                reports += [self._alone(one, found) for one in chunk]
        return reports

    def _alone(self, one: Input, found: Sequence[Found]) -> Report:
        """One input of a chunk during which a process of this suite died."""
        try:
            reports: list[Report] = self._done(self._submit(worker.judge_all, [one], found), "an input alone")
            return reports[0]
        except BrokenProcessPool:
            self._close()
            return Report(one, Answer("fault", detail=DIED))

    def _count(self, report: Report) -> None:
        """Add a report to the result."""
        result, answer = self.result, report.answer
        tally = result.tallies.setdefault("forward", Tally())
        tally.tried += 1
        if answer.kind == "agree":
            tally.agree += 1
            for spread, value in ((result.position, answer.position / 8), (result.element, answer.element / 32)):
                tenth = min(int(value * 10), 9)
                spread[tenth] = spread.get(tenth, 0) + 1
            near = (max(answer.position / 8, answer.element / 32), report.input.family, report.input.genes)
            result.nearest = sorted([*result.nearest, near], key=lambda one: -one[0])[:NEAREST]
        elif answer.kind == "unmeasured":
            tally.unmeasured += 1
        elif answer.kind == "fault":
            result.faults[answer.detail] = result.faults.get(answer.detail, 0) + 1
        for kind, counts in (("known", tally.known), ("refused", tally.refused), ("no-truth", tally.no_truth)):
            if answer.kind == kind:
                counts[answer.key] = counts.get(answer.key, 0) + 1
        for name in entries_of(report.input.genes):
            entry = result.entries.setdefault(f"{report.input.family}: {name}", Entry())
            entry.tried += 1
            entry.dull += answer.kind in ("refused", "no-truth")
            entry.asked += name in report.input.ask and bool(answer.digest)
            entry.excites |= name in report.excites
        self._remember(report)

    def _remember(self, report: Report) -> None:
        """Keep an input that reached something first, and the keys that are read."""
        result, answer, family = self.result, report.answer, report.input.family
        features = [f"{family} reads {key}" for key in report.keys]
        fresh = set(report.branches) - self._reached
        self._reached |= fresh
        features += ["a branch"] * bool(fresh)
        self.grammar.keys[family].update(key for key in report.keys if "." not in key)
        if answer.kind in ("known", "refused", "no-truth"):
            features.append(f"{answer.kind}: {answer.key}")
        if answer.kind in ("new", "broken", "fault"):
            features.append(" ".join((family, *answer.signature)))
        if (fresh or any(feature not in result.seen for feature in features)) and len(result.corpus) < LARGEST_CORPUS:
            result.corpus.append((family, report.input.genes))
        for feature in features:
            result.seen[feature] = result.seen.get(feature, 0) + 1

    def _close_in(self, reports: list[Report]) -> None:
        """Shrink and explain what is new, and count what is not."""
        left = self._attributed(reports)
        if not left:
            return
        first, *others = left
        one, found = first.input, self._found()
        future = self._submit(worker.close_in, one.family, one.genes, first.answer, found, self.limits.search)
        doing = f"shrinking and explaining what differs in {one.family} at {first.answer.first}"
        try:
            cause = self._done(future, doing)
        except BrokenProcessPool:
            self._close()
            told = f"{DIED} while it shrank this input"
            self.result.faults[told] = self.result.faults.get(told, 0) + 1
            answer = replace(first.answer, detail=f"broken: {told}; {first.answer.detail}")
            cause = as_drawn(one.family, one.genes, answer)
        self.result.causes.append(cause)
        again = self._judged([Input(report.input.family, report.input.genes) for report in others])
        self._close_in([report for report in again if is_new(report.answer)])

    def _attributed(self, reports: list[Report]) -> list[Report]:
        """Count the inputs that have an earlier cause; the others, and what is left of an input without its cause."""
        left, alike = [], []
        for report in reports:
            if report.answer.key:
                self.result.causes[int(report.answer.key)].count += 1
            elif (cause := self._alike(report)) is not None:
                cause.count += 1
                if set(cause.genes) != {"tokens"}:  # without a gene to leave out, the plain input has the cause
                    alike.append((report.input, cause))
            else:
                left.append(report)
        rest = []
        for one, cause in alike:
            kept = {slot: value for slot, value in one.genes.items() if slot == "tokens" or slot not in cause.genes}
            rest.append(Input(one.family, kept))
        again = [each for each in self._judged(rest) if is_new(each.answer)]
        return left + (self._attributed(again) if again else [])

    def _alike(self, report: Report) -> Cause | None:
        """A cause without an explanation, of the same divergence, whose smallest genes an input has."""
        for cause in self.result.causes:
            same = Answer("new", first=cause.first, reason=cause.reason).signature[1:] == report.answer.signature[1:]
            genes = {slot: value for slot, value in cause.genes.items() if slot != "tokens"}
            if (
                not cause.change
                and cause.what == report.input.family
                and same
                and all(report.input.genes.get(slot) == value for slot, value in genes.items())
            ):
                return cause
        return None

    def _found(self) -> list[Found]:
        return [
            Found(number, Counterfactual.model_validate(cause.change), in_any_layer(cause.first))
            for number, cause in enumerate(self.result.causes)
            if cause.change
        ]

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            self._pool = self._pool or self.start(self)
            return self._pool.submit(work, *arguments)
        except BrokenProcessPool:  # a process died since the last submission
            self._close()
            self._pool = self.start(self)
            return self._pool.submit(work, *arguments)

    def _done(self, future: Future[Any], doing: str) -> Any:
        """A result, with notes while it is awaited."""
        line = f"{self.result.tried} inputs, {len(self.result.causes)} causes that are new; {doing}"
        self.note(line)
        while not wait([future], NOTE_SECONDS).done:
            self.note(line)
        return future.result()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _joined(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """What is known of each entry of the menu in all families together."""
    joined: dict[str, Entry] = {}
    for name, entry in entries.items():
        held = joined.setdefault(name.partition(": ")[2], Entry())
        held.tried += entry.tried
        held.dull += entry.dull
    return joined


def is_new(answer: Answer) -> bool:
    """Whether an input diverges in a way that nothing known explains, or the candidate fails on it."""
    return answer.kind in ("new", "broken")
