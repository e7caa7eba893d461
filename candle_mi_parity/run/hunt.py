"""``hunt``: set up the candidate and what is varied, then hunt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.hunt_result import HuntResult
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.hunt.grammar import Grammar, all_families
from candle_mi_parity.hunt.hunt import Hunt, Limits
from candle_mi_parity.hunt.keys import defaults_of, keys_read
from candle_mi_parity.spec.explanations import NOTHING_KNOWN, load_explanations
from candle_mi_parity.spec.paths import cache_root

MINUTES = 5.0


@dataclass(frozen=True)
class HuntOptions:
    """The options of a hunt.

    :ivar minutes: how long; None for no limit, or for :data:`MINUTES` where ``inputs`` is None too.
    :ivar inputs: how many inputs; None for no limit.
    :ivar families: a glob.
    :ivar resume: whether the hunt in ``out`` goes on.
    """

    candidate: str
    minutes: float | None = None
    inputs: int | None = None
    seed: int = 0
    families: str = "*"
    resume: bool = False
    out: Path = Path("build/hunt")
    cache: Path = field(default_factory=cache_root)

    @property
    def limits(self) -> Limits:
        minutes = MINUTES if self.minutes is None and self.inputs is None else self.minutes
        return Limits(None if minutes is None else 60 * minutes, self.inputs)


def hunt(options: HuntOptions, log: Callable[[str], None], tell: Callable[[HuntResult], None]) -> HuntResult:
    """Hunt, and write ``hunt.json`` after every round.

    :param log: called with a line on what is being set up.
    :param tell: called after every round.
    :raises ParityError: the candidate cannot be built, or the hunt to resume is of another kind.
    """
    families = all_families(options.families)
    path = options.out / "hunt.json"
    result = HuntResult(options.candidate, options.seed, families)
    if options.resume:
        result = HuntResult.read(path)
        if (result.candidate, result.families) != (options.candidate, families):
            raise CaseTableError(f"{path}: of {result.candidate} and {', '.join(result.families)}")
    candidate = parse_candidate(options.candidate)
    if candidate.kind == "stored":
        raise CaseTableError(f"{options.candidate} is stored, and cannot be asked about new inputs")
    with open_source(candidate, options.cache, options.out / "traces", log) as source:
        result.version = source.identity.version if source.identity is not None else ""
    log("reading which keys of config.json transformers reads")
    keys = {family: keys_read(family, options.cache) for family in families}
    grammar = Grammar(families, keys, {family: defaults_of(family) for family in families})
    table = load_explanations() if result.version else NOTHING_KNOWN

    def round_ends(found: HuntResult) -> None:
        found.write(path)
        tell(found)

    return Hunt(result, grammar, table, options.cache, options.limits, round_ends).run()
