"""A copy of a released candle-mi with the mends of ``mends.toml``: proof that a reproduction's test can pass.

``python -m proof.mending DIR`` makes one; ``candle-mi-parity repro --mended path:DIR`` runs the tests on it.
"""

from __future__ import annotations

import fnmatch
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.cases import Row, read_toml
from proof.catalogue import SourceEdit
from proof.source import released_crate


class MendError(ParityError):
    """A mend that does not fit the source."""


class Mend(SourceEdit):
    """One replacement.

    :ivar kinds: globs over the case ids that it mends; a mend that only makes room for others has none.
    :ivar times: how often ``find`` is in the file.
    """

    id: str
    kinds: list[str] = Field(default_factory=list)
    times: Annotated[int, Field(ge=1)] = 1


class Mends(Row):
    """The whole file.

    :ivar version: of the candle-mi whose source the anchors were taken from.
    """

    version: Literal["0.2.2"]
    mend: list[Mend]

    def of(self, case_id: str) -> list[str]:
        """The mends that a case needs."""
        return [mend.id for mend in self.mend if any(fnmatch.fnmatchcase(case_id, kind) for kind in mend.kinds)]


MENDS = Path(__file__).with_name("mends.toml")


def load_mends(path: Path = MENDS) -> Mends:
    """:raises MendError: unreadable, or a key that is unknown, missing or of another type."""
    return read_toml(path, Mends, MendError)


def mended_copy(source: Path, mends: Mends, out: Path) -> Path:
    """``out``, made anew: the source with every mend.

    :raises MendError: an anchor that is not there as often as its mend says.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("target", ".cargo-ok"))
    for mend in mends.mend:
        path = out / mend.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(mend.find)) != mend.times:
            raise MendError(
                f"dead mend: {mend.id}: its anchor is {found} times in {mend.file}, expected {mend.times}"
            )
        path.write_text(text.replace(mend.find, mend.replace), encoding="utf-8")
    return out


if __name__ == "__main__":
    print(mended_copy(released_crate(), load_mends(), Path(sys.argv[1])))
