"""RWKV's vocabularies: World, and small ones that are given token by token.

A vocabulary's file has a line for each token: its id, Python's ``repr`` of it as a text, or as bytes where it is not
UTF-8, and its length in bytes. World is ``rwkv_vocab_v20230424.txt`` of the package rwkv 0.8.32 (Apache-2.0), of
which there is a compressed copy in ``fixtures/vocabularies``.
"""

from __future__ import annotations

import ast
import lzma
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.table import TableRow

_WORLD = FIXTURES / "vocabularies" / "rwkv_vocab_v20230424.txt.xz"
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]


class VocabularyRow(TableRow):
    """A vocabulary; World if nothing is given.

    :ivar tokens: bytes as hexadecimal digits; ids follow one another.
    :ivar every_byte: whether the 256 bytes come first, with the ids 1 to 256, as in World.
    :ivar first: the id of the first of ``tokens``; None for the one that follows.
    :ivar off: what is added to each length that the file gives, which makes it a wrong one.
    """

    tokens: list[Hex] = Field(default_factory=list)
    every_byte: bool = True
    first: int | None = None
    off: int = 0

    def ids(self) -> list[tuple[int, bytes]]:
        """Each token's id and bytes, in the order of the file.

        :raises ValueError: a length of the file is wrong.
        """
        if self.off:
            raise ValueError("the length of a token is another")
        return self._listed()

    def _listed(self) -> list[tuple[int, bytes]]:
        if not self.tokens:
            return world()
        single = [(value + 1, bytes([value])) for value in range(256)] if self.every_byte else []
        first = len(single) + 1 if self.first is None else self.first
        return single + [(first + place, bytes.fromhex(token)) for place, token in enumerate(self.tokens)]

    def at(self, directory: Path) -> Path:
        """The file in the vocabulary's directory."""
        return directory / "vocabulary.txt"

    def write(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        if not self.tokens:
            self.at(directory).write_bytes(lzma.decompress(_WORLD.read_bytes()))
            return
        lines = [f"{id} {_repr(token)} {len(token) + self.off}\n" for id, token in self._listed()]
        self.at(directory).write_text("".join(lines), encoding="utf-8")


def _repr(token: bytes) -> str:
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


@cache
def world() -> list[tuple[int, bytes]]:
    """The tokens of World, as BlinkDL's ``TRIE_TOKENIZER`` reads them."""
    found = []
    with lzma.open(_WORLD, "rt", encoding="utf-8") as lines:
        for line in lines:
            token = ast.literal_eval(line[line.index(" ") : line.rindex(" ")].strip())
            found.append((int(line[: line.index(" ")]), token.encode() if isinstance(token, str) else token))
    return found
