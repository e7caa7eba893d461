"""Which branches of candle-mi's source a running emitter has taken, read between two requests.

The emitter is built with ``-C instrument-coverage`` (``emitter/counting.sh``). LLVM's continuous mode maps the
counters into a file, so that the process need not be asked for them.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from candle_mi_parity.candidate.coverage_map import RECORD, BranchError, Region, coverage_map

_HEADER = struct.Struct("<16Q")
_MAGIC = int.from_bytes(b"\xfflprofr\x81", "big")
_VERSION = 10


class Branches:
    """The regions of candle-mi's source that the processes of an emitter have reached.

    After a panic a region behind it may count as reached: LLVM takes the count of a branch without a counter to be
    that of the code before it less that of the other branch. Restart the emitter before the next reading to avoid it.

    :param binary: an emitter that was built with ``counted=True``.
    :param profile: the file of the counters; each process of the emitter starts it anew.
    :ivar function: region → its ``file: function``.
    :ivar regions: the regions, in the order of :meth:`reached`; files are relative to candle-mi's ``src``.
    :ivar environment: what the emitter's process needs.
    :raises BranchError: the binary counts no branches, or in a format that is not read here.

    >>> built = build(candidate, cache, print, counted=True)                                   # doctest: +SKIP
    >>> branches = Branches(built.path, out / "counters.profraw")                              # doctest: +SKIP
    >>> with EmitterProcess(built.path, built.missing, branches.environment) as emitter:       # doctest: +SKIP
    ...     emitter.emit(request, timeout=600)
    ...     print(branches.reached().sum(), "of", len(branches.regions))
    """

    def __init__(self, binary: Path, profile: Path) -> None:
        found = coverage_map(binary, "candle_mi")
        if not found.regions:
            raise BranchError(f"{binary} counts no branches of candle-mi: it has no region of that crate")
        self.profile = profile
        if "%" in str(profile.absolute()):
            raise BranchError(f"{profile.absolute()}: LLVM would replace the % in the name; choose another directory")
        self.environment = {"LLVM_PROFILE_FILE": f"{profile.absolute()}%c"}  # %c is the continuous mode
        self._shape = (found.functions, found.counters)
        # Macros of other crates, such as tracing's, bring their own files with them.
        root, _ = Counter(region.file.rpartition("/src/")[0] for _, region, _ in found.regions).most_common(1)[0]
        rows = [
            (name, region._replace(file=region.file.removeprefix(f"{root}/src/")), terms)
            for name, region, terms in found.regions
            if region.file.rpartition("/src/")[0] == root
        ]
        self.function = {region: f"{region.file}: {name}" for name, region, _ in reversed(rows)}
        self.regions: list[Region] = sorted(self.function)
        self._reached = np.zeros(len(self.regions), bool)
        # A generic function has a row for each type, and its region is reached if the count of one row is not zero.
        # The counter behind the last one is always zero, for a function that was not compiled.
        index = {region: i for i, region in enumerate(self.regions)}
        sums = [terms or {found.counters: 0} for _, _, terms in rows]
        self._region = np.array([index[region] for _, region, _ in rows])
        self._start = np.cumsum([0, *map(len, sums)])[:-1]
        self._counter = np.array([counter for terms in sums for counter in terms])
        self._factor = np.array([factor for terms in sums for factor in terms.values()])

    def reached(self) -> npt.NDArray[np.bool_]:
        """Whether each region was reached, in this process of the emitter or an earlier one that was read.

        It is to be called between two requests.

        :raises BranchError: the file of the counters is missing, damaged or of another build.
        """
        self._reached |= self.taken(None)
        return self._reached.copy()

    def taken(self, before: npt.NDArray[np.int64] | None) -> npt.NDArray[np.bool_]:
        """Whether each region was reached since the counters were ``before``; None for the start of the process.

        :raises BranchError: see :meth:`reached`.
        """
        now = self.counts()
        if before is not None and (now >= before).all():  # otherwise another process was started
            now = now - before
        taken = np.zeros(len(self.regions), bool)
        terms = np.append(now, 0)[self._counter] * self._factor
        taken[self._region[np.add.reduceat(terms, self._start) > 0]] = True
        return taken

    def functions(self) -> dict[str, tuple[int, int]]:
        """``file: function`` → number of its regions that were reached when last read, and of all its regions."""
        found: dict[str, list[bool]] = defaultdict(list)
        for region, reached in zip(self.regions, self._reached.tolist(), strict=True):
            found[self.function[region]].append(reached)
        return {name: (sum(reached), len(reached)) for name, reached in found.items()}

    def never_entered(self) -> list[str]:
        """The functions of which no region was reached, in the files of which some region was."""
        used = {region.file for region, reached in zip(self.regions, self._reached, strict=True) if reached}
        return [
            name for name, (reached, _) in self.functions().items() if not reached and name.split(": ")[0] in used
        ]

    def counts(self) -> npt.NDArray[np.int64]:
        """The counters now.

        :raises BranchError: see :meth:`reached`.
        """
        try:
            raw = self.profile.read_bytes()
        except OSError as error:
            raise BranchError(f"{self.profile}: the emitter wrote no counters: {error.strerror}") from error
        if len(raw) < _HEADER.size:
            raise BranchError(f"{self.profile}: {len(raw)} bytes, expected a profile; is the file damaged?")
        magic, version, ids, functions, padding, counters, *_ = _HEADER.unpack_from(raw)
        start = _HEADER.size + ids + functions * RECORD.size + padding
        found = (hex(magic), version, functions, counters)
        expected = (hex(_MAGIC), _VERSION, *self._shape)
        if found != expected:
            raise BranchError(
                f"{self.profile}: magic number, version, number of functions and of counters are {found}, expected "
                f"{expected}: the file is damaged, of another build or of another LLVM"
            )
        if len(raw) < start + 8 * counters:
            raise BranchError(f"{self.profile}: {len(raw)} bytes, expected at least {start + 8 * counters}: damaged")
        return np.frombuffer(raw, np.int64, counters, start)
