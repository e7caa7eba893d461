"""``hunt``: set up the candidate and what is varied, then hunt."""

from __future__ import annotations

import shlex
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from candle_mi_parity.candidate import branches as candidate_branches
from candle_mi_parity.candidate.source_keys import source_keys
from candle_mi_parity.candidate.sources import LiveSource, Source, open_source
from candle_mi_parity.candidate.spelling import Candidate, parse_candidate
from candle_mi_parity.compare.hunt_result import Branches, HuntResult
from candle_mi_parity.errors import CaseTableError, HubError, Stopped
from candle_mi_parity.hunt.grammar import Grammar, all_families
from candle_mi_parity.hunt.hunt import Hunt, Limits
from candle_mi_parity.hunt.keys import defaults_of, keys_of, keys_read
from candle_mi_parity.models.tokenizers import load_tokenizers, tokenizer_directory
from candle_mi_parity.report.hunt_page import PAGE
from candle_mi_parity.report.views import remove, require_writable
from candle_mi_parity.run.hunt_files import CAUSES, JSON, reproduce_causes, write
from candle_mi_parity.spec.explanations import NOTHING_KNOWN, load_explanations
from candle_mi_parity.spec.paths import cache_root

MINUTES = 5.0
WRITE_SECONDS = 10.0
"""Between two writings of the result, which takes as long as ten inputs."""


@dataclass(frozen=True)
class HuntOptions:
    """The options of a hunt.

    :ivar minutes: how long; None for no limit, or for :data:`MINUTES` where ``inputs`` is None too.
    :ivar inputs: how many inputs; None for no limit.
    :ivar families: a glob.
    :ivar resume: whether the hunt in ``out`` goes on.
    :ivar branches: whether candle-mi is built so that its branches are counted, which takes a build of its own.
    """

    candidate: str
    minutes: float | None = None
    inputs: int | None = None
    seed: int = 0
    families: str = "*"
    resume: bool = False
    branches: bool = True
    out: Path = Path("build/hunt")
    cache: Path = field(default_factory=cache_root)

    @property
    def command(self) -> str:
        """What starts this hunt, without limits; with ``--resume`` it goes on."""
        words = ["candle-mi-parity", "hunt", "--candidate", self.candidate, "--seed", str(self.seed)]
        words += ["--families", self.families] if self.families != "*" else []
        words += [] if self.branches else ["--no-branches"]
        return shlex.join([*words, "--out", str(self.out)])

    @property
    def limits(self) -> Limits:
        minutes = MINUTES if self.minutes is None and self.inputs is None else self.minutes
        return Limits(None if minutes is None else 60 * minutes, self.inputs)


def hunt(options: HuntOptions, log: Callable[[str], None], tell: Callable[[HuntResult], None]) -> HuntResult:
    """Hunt, write ``hunt.json`` and ``hunt.html`` now and then, and in the end the folder of each new cause.

    :param log: called with a line on what is being set up.
    :param tell: called after every round.
    :raises ParityError: the candidate cannot be built, the directory is not writable, or the hunt to resume is of
        another kind.
    """
    families = all_families(options.families)
    path = options.out / JSON
    require_writable(options.out)
    result = HuntResult(options.candidate, options.seed, families, command=options.command)
    if options.resume:
        result = HuntResult.read(path)
        held = (result.candidate, result.families, result.seed)
        if held != (options.candidate, families, options.seed):
            raise CaseTableError(
                f"{path} is a hunt of {result.candidate} in {', '.join(result.families)} with seed {result.seed}; "
                "give the same --candidate, --families and --seed, or hunt anew without --resume"
            )
    candidate = parse_candidate(options.candidate)
    if candidate.kind == "stored":
        raise CaseTableError(f"{options.candidate} is stored, and cannot be asked about new inputs")
    counted = candidate.has_source and options.branches
    with open_source(candidate, options.cache, options.out / "traces", log, counted=counted) as source:
        result.version = source.identity.version if source.identity is not None else ""
    parts = _parts(source, options.cache)
    result.skipped = parts.skipped
    branches = source.branches if isinstance(source, LiveSource) else None
    if branches is not None and result.branches.of not in (0, len(branches.regions)):
        raise CaseTableError(
            f"{path}: candle-mi had {result.branches.of} regions of source and has {len(branches.regions)} now: it "
            "is another candle-mi; hunt anew without --resume"
        )

    written = time.monotonic()

    def round_ends(found: HuntResult) -> None:
        nonlocal written
        if branches is not None:
            found.branches = Branches(len(branches.regions), found.branches.reached, _never(branches, found))
        if time.monotonic() - written >= WRITE_SECONDS or found.rounds == 1:
            write(found, options.out)
            written = time.monotonic()
        tell(found)

    log("reading which keys of config.json both libraries read")
    grammar = _grammar(candidate, families, options.cache)
    table = load_explanations() if result.version else NOTHING_KNOWN
    setting = (table, options.cache, options.limits, round_ends, counted, parts.calls, parts.tokenizers)
    if not options.resume:
        remove(options.out, JSON, PAGE)
        shutil.rmtree(options.out / CAUSES, ignore_errors=True)
    try:
        result = Hunt(result, grammar, *setting, note=log).run()
    except Stopped as stopped:
        # What terminates a process kills it soon after; a person who pressed Ctrl-C can press it again.
        if str(stopped) == signal.SIGINT.name and path.is_file():
            # What came after the last writing does not count; a hunt that goes on repeats it.
            reproduce_causes(HuntResult.read(path), options.out, options.cache, log)
        raise
    write(result, options.out)
    reproduce_causes(result, options.out, options.cache, log)
    return result


@dataclass
class Parts:
    """What is generated beside forwards.

    :ivar skipped: kind of input → why it is not generated.
    """

    calls: bool = True
    tokenizers: list[tuple[str, Path]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def _parts(source: Source, cache: Path) -> Parts:
    """The kinds of input that a candidate can be asked about."""
    parts = Parts()
    if not isinstance(source, LiveSource):
        parts.skipped["text"] = "the control has no tokenizer of its own"
        return parts
    if "calls" in source.missing:
        parts.calls, parts.skipped["call"] = False, source.missing["calls"]
    if "tokens" in source.missing:
        parts.skipped["text"] = source.missing["tokens"]
        return parts
    unreachable = ""
    for row in load_tokenizers().tokenizer:
        try:
            parts.tokenizers.append((row.name, tokenizer_directory(row, cache, unreachable)))
        except HubError as error:
            unreachable = parts.skipped[f"text ({row.name})"] = str(error)
    return parts


def _grammar(candidate: Candidate, families: list[str], cache: Path) -> Grammar:
    """Of the config keys that transformers and the candidate read."""
    theirs = source_keys(candidate, cache) if candidate.has_source else None
    keys = {
        family: keys_read(family, cache) | {key for key in keys_of(family, theirs) if "." not in key}
        for family in families
    }
    return Grammar(families, keys, {family: defaults_of(family, theirs) for family in families})


def _never(branches: candidate_branches.Branches, result: HuntResult) -> list[str]:
    """The functions of candle-mi of which no region was reached."""
    entered = {branches.function[branches.regions[number]] for number in result.branches.reached}
    return sorted(set(branches.function.values()) - entered)
