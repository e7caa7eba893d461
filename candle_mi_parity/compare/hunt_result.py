"""The result of ``candle-mi-parity hunt``: plain data, from which a hunt is also resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, TypeAdapter, ValidationError

from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.json_out import unplain, write_json
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.spec.counterfactual import Counterfactual

HUNT_FORMAT = "candle-mi-parity/hunt/1"
Kind = Literal["forward", "call", "text"]


def _genes(genes: dict[str, Any]) -> dict[str, Any]:
    """:raises ValueError: a slot does not hold what a hunt draws for it."""
    for slot, value in genes.items():
        if slot.startswith(("config.", "sae.cfg.")):
            plain_key = value in (["null"], ["absent"])
            right = plain_key or (isinstance(value, list) and len(value) == 2 and value[0] == "set")
            wanted = '["set", value], ["null"] or ["absent"]'
        elif slot.startswith("edit."):
            right = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("kind", "hook"))
            wanted = "an edit with a kind and a hook"
        elif slot == "tokens":
            numbers = list(value.values()) if isinstance(value, dict) and "random" in value else value
            right = isinstance(numbers, list) and all(isinstance(number, int) for number in numbers)
            wanted = "a list of ids, or a number of random ones"
        else:
            continue
        if not right:
            raise ValueError(f"{slot} is {json.dumps(value)[:100]}, expected {wanted}")
    return genes


def _rows(table: Any) -> list[Any]:
    return table if isinstance(table, list) else [table]


def _change(change: dict[str, Any]) -> dict[str, Any]:
    """:raises ValueError: it is no counterfactual."""
    try:
        Counterfactual.model_validate(change)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return change


Genes = Annotated[dict[str, Any], AfterValidator(_genes)]


@dataclass
class Cause:
    """Inputs that diverge in one way that no explanation of the release covers.

    :ivar what: the family, the function or the tokenizer.
    :ivar first: the first diverging tensor or result.
    :ivar reason: in which way, as ``values`` or ``panic``.
    :ivar smallest: the smallest input that was found, as a row of its table.
    :ivar explained: what the candidate computes instead; empty if no search found it.
    :ivar change: the same as a counterfactual.
    :ivar count: number of inputs with this divergence.
    :ivar genes: the smallest input as the hunt draws it.
    :ivar proposed: the row of ``fixtures/explanations.toml`` that ``change`` would be, to be completed by hand.
    :ivar folder: the reproduction, below the directory of ``hunt.json``; or ``no_folder``, why there is none.
    """

    kind: Kind
    what: str
    first: str
    reason: str
    detail: str
    smallest: dict[str, Any]
    explained: str = ""
    change: Annotated[dict[str, Any], AfterValidator(_change)] = field(default_factory=dict)
    count: int = 1
    genes: Genes = field(default_factory=dict)
    proposed: str = ""
    folder: str = ""
    no_folder: str = ""


@dataclass
class Tally:
    """What became of the inputs of one kind.

    :ivar tried: number of inputs that were generated.
    :ivar agree: number in which every result passes the gate.
    :ivar known: id of an explanation → number of inputs that it explains.
    :ivar refused: message of the candidate, with its numbers left out → number of inputs.
    :ivar no_truth: message of PyTorch or of the oracle, likewise → number of inputs.
    :ivar unmeasured: number of inputs that are too noisy to judge, or excite nothing that is compared.
    """

    tried: int = 0
    agree: int = 0
    known: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    no_truth: dict[str, int] = field(default_factory=dict)
    unmeasured: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        self.tried += other.tried
        self.agree += other.agree
        self.unmeasured += other.unmeasured
        for mine, theirs in (
            (self.known, other.known),
            (self.refused, other.refused),
            (self.no_truth, other.no_truth),
        ):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count

    @property
    def judged(self) -> int:
        """Number of inputs that agree or diverge as is known; those of new causes are counted there."""
        return self.agree + sum(self.known.values())


@dataclass
class Entry:
    """An entry of the menu in one family.

    :ivar tried: number of inputs with it, and ``dull`` of those that were refused or without a truth.
    :ivar asked: how often an input was computed without it too, to see whether it changes anything.
    :ivar excites: whether it ever changed what either side computes.
    """

    tried: int = 0
    dull: int = 0
    asked: int = 0
    excites: bool = False

    @property
    def dead(self) -> bool:
        return self.asked >= TRIES and not self.excites

    @property
    def weight(self) -> float:
        """How often it is drawn, relative to an entry of which nothing is known."""
        if self.dead:
            return 0.05
        dullness = min(0.95, self.dull / self.tried) if self.tried >= ENOUGH else 0.0
        return (2.0 if self.excites else 1.0) * (1 - dullness)


@dataclass
class Branches:
    """The regions of candle-mi's source that were reached; ``of`` is 0 without a build that counts them.

    :ivar of: number of all regions.
    :ivar reached: numbers of the regions.
    :ivar never: functions of which no region was reached.
    """

    of: int = 0
    reached: list[int] = field(default_factory=list)
    never: list[str] = field(default_factory=list)


@dataclass
class HuntResult:
    """A hunt so far.

    :ivar version: of the candle-mi that was asked; empty for the control.
    :ivar command: what was typed, without limits.
    :ivar rounds: number of rounds that are complete; a hunt is resumed after the last.
    :ivar seconds: of all rounds, without builds.
    :ivar position: the largest ratio of a passing input's positions, in tenths of the gate's 8 → number of inputs.
    :ivar element: likewise of its elements, in tenths of 32.
    :ivar nearest: the :data:`NEAREST` passing inputs nearest to the gate: the larger of both ratios as a part of its
        gate, family, genes.
    :ivar faults: exceptions in this suite.
    :ivar skipped: kinds of input that were not generated, and why.
    :ivar seen: what has been reached: messages, first divergences, config keys that are read.
    :ivar corpus: family and genes of the inputs that reached something first.
    :ivar pairs: digests of the pairs of config entries that were drawn, with the length of the prompt.
    :ivar entries: ``family: entry of the menu`` → what is known of it.
    """

    candidate: str
    seed: int
    families: list[str]
    version: str = ""
    command: str = ""
    format: str = HUNT_FORMAT
    rounds: int = 0
    seconds: float = 0.0
    tallies: dict[Kind, Tally] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)
    position: dict[int, int] = field(default_factory=dict)
    element: dict[int, int] = field(default_factory=dict)
    nearest: list[tuple[float, str, Genes]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    corpus: list[tuple[str, Genes]] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    pairs: list[str] = field(default_factory=list)
    branches: Branches = field(default_factory=Branches)

    @property
    def tried(self) -> int:
        return sum(tally.tried for tally in self.tallies.values())

    @property
    def dead(self) -> list[str]:
        """Entries of the menu that never changed what either side computes, in any family."""
        names = {name.partition(": ")[2] for name in self.entries}
        open_ones = {name.partition(": ")[2] for name, entry in self.entries.items() if not entry.dead}
        return sorted(names - open_ones)

    @property
    def verdict(self) -> Verdict:
        """FAIL where something new was found, ERROR where this suite failed or nothing was judged."""
        if self.causes:
            return Verdict.FAIL
        judged = sum(tally.judged for tally in self.tallies.values())
        return Verdict.ERROR if self.faults or not judged else Verdict.PASS

    def write(self, path: Path) -> None:
        """:raises ReportError: the disk is full or read-only."""
        write_json(asdict(self), path)

    @staticmethod
    def read(path: Path) -> HuntResult:
        """:raises TraceError: the file is no hunt."""
        try:
            found = _ADAPTER.validate_python(read_json(path, TraceError))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise TraceError(f"{path}: not a hunt of this version: {place}: {one_line(first['msg'], 300)}") from error
        if found.format != HUNT_FORMAT:
            raise TraceError(f"{path}: format is {one_line(found.format)}, expected {HUNT_FORMAT}")
        for name, inputs in (("corpus", found.corpus), ("nearest", [each[1:] for each in found.nearest])):
            for index, (family, _) in enumerate(inputs):
                if family not in found.families:
                    raise TraceError(f"{path}: {name}.{index}: {one_line(family, 80)!r} is not a family of this hunt")
        if found.branches.of and not all(0 <= region < found.branches.of for region in found.branches.reached):
            raise TraceError(f"{path}: branches.reached: not all are numbers of {found.branches.of} regions")
        for cause in found.causes:
            if cause.kind == "call":  # of which NaN and infinities are values
                if not all(isinstance(row, dict) for rows in cause.smallest.values() for row in _rows(rows)):
                    raise TraceError(f"{path}: causes: a smallest call has other tables than fixtures/calls.toml")
                cause.smallest = unplain(cause.smallest)
        return found


ENOUGH = 3
"""Inputs with an entry from which one learns how often it is dull."""
NEAREST = 8
TRIES = 4
"""How often an entry of the menu is left out of an input of a family before it counts as dead there."""
_ADAPTER = TypeAdapter(HuntResult)
