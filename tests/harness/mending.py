"""A copy of a released candle-mi with the mends of ``mends.toml``: proof that a reproduction's test can pass.

``python tests/harness/mending.py DIR`` makes one; ``candle-mi-parity repro --mended path:DIR`` runs the tests on it.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from candle_mi_parity.cases import read_toml
from candle_mi_parity.errors import ParityError


class MendError(ParityError):
    """A mend that does not fit the source."""


class Mend(BaseModel):
    """One replacement.

    :ivar kinds: globs over the case ids that it mends; a mend that only makes room for others has none.
    :ivar times: how often ``find`` is in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    kinds: list[str] = []
    file: str
    find: Annotated[str, Field(min_length=1)]
    replace: str
    times: Annotated[int, Field(ge=1)] = 1


class Mends(BaseModel):
    """The whole file.

    :ivar version: of the candle-mi whose source the anchors were taken from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: str
    mend: list[Mend]

    def of(self, case_id: str) -> list[str]:
        """The mends that a case needs."""
        return [mend.id for mend in self.mend if any(fnmatch.fnmatchcase(case_id, kind) for kind in mend.kinds)]


MENDS = Path(__file__).with_name("mends.toml")


def load_mends(path: Path = MENDS) -> Mends:
    """:raises MendError: unreadable, or a key that is unknown, missing or of another type."""
    return read_toml(path, Mends, MendError)


def released_source(version: str) -> Path:
    """Where cargo unpacked a release; never written to.

    :raises MendError: it is not there; building its emitter fetches it.
    """
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    found = sorted((home / "registry" / "src").glob(f"*/candle-mi-{version}"))
    if not found:
        raise MendError(f"candle-mi {version} is not below {home}/registry/src: run the parity suite on it once")
    return found[0]


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
    asked = load_mends()
    print(mended_copy(released_source(asked.version), asked, Path(sys.argv[1])))
