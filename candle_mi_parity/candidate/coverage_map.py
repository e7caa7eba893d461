"""The coverage map of a binary that was built with ``-C instrument-coverage``: regions of source, and their counters.

A region is a span of source code that runs as a whole. Its count is a sum and difference of counters. The format is
described in LLVM's ``docs/CoverageMappingFormat.rst``, that of the counters in ``InstrProfData.inc``.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from typing import NamedTuple

from candle_mi_parity.errors import ParityError

RECORD = struct.Struct("<6QI3H2xI")
"""What a profile holds of a function: hash of its name, hash of its code, place of its counters, and what is not used
here."""
_VERSION = 6
_IDENTIFIER = re.compile(r"s[0-9A-Za-z]*_|B[0-9A-Za-z]*_|(\d+)_?|.")


class BranchError(ParityError):
    """The branches of a build cannot be read."""


class Region(NamedTuple):
    """A span of source code."""

    file: str
    line: int
    column: int
    last_line: int
    last_column: int


Sum = dict[int, int]
"""A sum of counters: index of a counter → its factor."""


@dataclass(frozen=True)
class CoverageMap:
    """The regions of a crate.

    :ivar functions: number of functions with counters in the whole binary.
    :ivar counters: number of counters in the whole binary.
    :ivar regions: name of the function, region, and its count; a region occurs once for each copy of its function.
    """

    functions: int
    counters: int
    regions: list[tuple[str, Region, Sum]]


def coverage_map(binary: Path, crate: str) -> CoverageMap:
    """Read the coverage map of a crate from an executable.

    :raises BranchError: the binary has none, or one in a format that is not read here.
    """
    elf = binary.read_bytes()
    if elf[:6] != b"\x7fELF\x02\x01":
        raise BranchError(f"{binary}: branches are read from executables of 64-bit Linux only")
    try:
        sections = _sections(elf)
        for name in ("prf_data", "prf_cnts", "prf_names", "covmap", "covfun"):
            if name not in sections:
                raise BranchError(f"{binary} counts no branches: it has no section __llvm_{name}")
        return _read(sections, crate)
    except (struct.error, IndexError, ValueError, KeyError, zlib.error) as error:
        raise BranchError(f"{binary}: its coverage map cannot be read: {error!r}") from error


def _sections(elf: bytes) -> dict[str, tuple[int, bytes]]:
    """The sections ``__llvm_…``: address and content, by the rest of the name."""
    table, (size, count, names) = struct.unpack_from("<Q", elf, 40)[0], struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    found = {}
    for name, _, _, address, offset, length in headers:
        start = headers[names][4] + name
        text = elf[start : elf.index(b"\0", start)].decode()
        if text.startswith("__llvm_"):
            found[text.removeprefix("__llvm_")] = address, elf[offset : offset + length]
    return found


def _read(sections: dict[str, tuple[int, bytes]], crate: str) -> CoverageMap:
    address, data = sections["prf_data"]
    counters, cells = sections["prf_cnts"]
    first: dict[int, list[int]] = defaultdict(list)  # a function that is inlined has counters in each place
    for at in range(0, len(data), RECORD.size):
        name, _, relative, *_ = RECORD.unpack_from(data, at)
        first[name].append((address + at + relative - counters) % 2**64 // 8)
    paths = {_hash(name): _path(name.decode()) for name in _names(sections["prf_names"][1])}
    files, records, at = dict(_files(sections["covmap"][1])), sections["covfun"][1], 0
    regions = []
    while at < len(records):
        name, size, _, unit = struct.unpack_from("<QIQQ", records, at)
        of_crate, *path = paths[name]
        if of_crate == crate:
            raw = records[at + 28 : at + 28 + size]
            # A function that is nowhere called was not compiled, and has no counters.
            for start in first.get(name, [None]):
                regions += [("::".join(path), *each) for each in _regions(raw, files[unit], start)]
        at += -(-(28 + size) // 8) * 8
    return CoverageMap(len(data) // RECORD.size, len(cells) // 8, regions)


class _Numbers:
    """Numbers in LEB128, one after the other."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def next(self) -> int:
        value = shift = 0
        while True:
            byte = self.raw[self.at]
            self.at, value, shift = self.at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    def take(self, size: int) -> bytes:
        self.at += size
        return self.raw[self.at - size : self.at]

    def unpacked(self, size: int) -> bytes:
        """``size`` bytes, which may be compressed."""
        packed = self.next()
        return zlib.decompress(self.take(packed)) if packed else self.take(size)


def _hash(name: bytes) -> int:
    return int.from_bytes(md5(name, usedforsecurity=False).digest()[:8], "little")


def _names(raw: bytes) -> Iterator[bytes]:
    numbers = _Numbers(raw)
    while numbers.at < len(raw):
        if raw[numbers.at] == 0:  # padding between two crates
            numbers.at += 1
        else:
            yield from numbers.unpacked(numbers.next()).split(b"\x01")


def _files(raw: bytes) -> Iterator[tuple[int, list[str]]]:
    """The files of each compilation unit, by the hash of their list."""
    at = 0
    while at < len(raw):
        _, size, _, version = struct.unpack_from("<4I", raw, at)
        if version != _VERSION:
            raise BranchError(f"rustc wrote a coverage map of version {version + 1}, expected {_VERSION + 1}")
        encoded = raw[at + 16 : at + 16 + size]
        numbers = _Numbers(encoded)
        count, length = numbers.next(), numbers.next()
        listed = _Numbers(numbers.unpacked(length))
        place, *names = [listed.take(listed.next()).decode() for _ in range(count)]
        yield _hash(encoded), [place, *(str(Path(place) / name) for name in names)]
        at += -(-(16 + size) // 8) * 8


def _regions(raw: bytes, files: Sequence[str], first: int | None) -> Iterator[tuple[Region, Sum]]:
    """The regions of one copy of a function.

    :param first: index of its first counter; None if it was not compiled.
    """
    numbers = _Numbers(raw)
    own = [files[numbers.next()] for _ in range(numbers.next())]
    expressions = [(numbers.next(), numbers.next()) for _ in range(numbers.next())]
    known: dict[int, Sum] = {}

    def count(code: int) -> Sum:
        kind, index = code & 3, code >> 2  # zero, a counter, a difference, a sum
        if kind == 0 or first is None:
            return {}
        if kind == 1:
            return {first + index: 1}
        if code not in known:
            left, right = map(count, expressions[index])
            total = {each: left.get(each, 0) + (2 * kind - 5) * right.get(each, 0) for each in left | right}
            known[code] = {each: factor for each, factor in total.items() if factor}
        return known[code]

    for file in own:
        line = 0
        for _ in range(numbers.next()):
            code = numbers.next()
            pseudo = 0 if code & 3 else code >> 2
            skipped = pseudo == 4 or pseudo & 1  # no code at all, or the place of a macro's call
            if pseudo and not skipped:
                raise BranchError(f"rustc wrote a region of kind {pseudo >> 1}, which is not read here")
            line += numbers.next()
            column, lines, end = numbers.next(), numbers.next(), numbers.next()
            if not skipped and not end >> 31:  # the highest bit marks white space between two regions
                yield Region(file, line, column, line + lines, end), count(code)


def _path(symbol: str) -> list[str]:
    """The names in a symbol (v0 mangling), from its crate on; those of generic arguments are at the end."""
    found, at = [], 0
    while at < len(symbol):
        step = _IDENTIFIER.match(symbol, at)
        assert step
        at = step.end() + int(step[1] or 0)
        if step[1] and symbol[step.end() : at]:
            found.append(symbol[step.end() : at])
    return found or [symbol]
