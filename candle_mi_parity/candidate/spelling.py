"""Parsing the spelling of a candidate.

``0.2.2``, ``path:DIR`` and ``git:URL@REV`` are built by :mod:`candle_mi_parity.candidate.build`;
``stored:VERSION_OR_DIR`` names stored traces and needs no Rust; ``command:PROGRAM ARGS`` is any program that speaks
the emitter's protocol, ``transformer-lens`` is such a program of this package; ``torch`` is the control.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.explanations import LENS_TABLE, TABLE, numbers

Kind = Literal["version", "path", "git", "stored", "command", "transformer-lens", "torch"]

ACCEPTED = (
    "a version such as 0.2.2, path:DIR, git:URL@REV, stored:VERSION_OR_DIR, command:PROGRAM, transformer-lens, or "
    "torch (float32, the control)"
)

_VERSION = re.compile(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")


class CandidateError(ParityError):
    """The candidate is misspelt, absent or cannot be built."""


class OutOfReachError(CandidateError):
    """The network, a GPU or nvcc is missing, so that the run ends INCONCLUSIVE; the message names the remedy."""


@dataclass(frozen=True)
class Candidate:
    """A parsed candidate.

    :ivar target: the version, the directory, the URL or the command line.
    :ivar revision: of ``git``, before it is resolved to a commit.
    """

    spec: str
    kind: Kind
    label: str
    target: str
    revision: str | None = None

    @property
    def is_candle_mi(self) -> bool:
        """Whether what is known of candle-mi's releases may hold of it."""
        return self.kind not in ("command", "transformer-lens", "torch")

    @property
    def table(self) -> Path:
        """The table of what is known of it."""
        return LENS_TABLE if self.kind == "transformer-lens" else TABLE

    @property
    def has_source(self) -> bool:
        """Whether a candle-mi is built, which can be asked for anything."""
        return self.kind in ("version", "path", "git")


def parse_candidate(spec: str) -> Candidate:
    """Parse a candidate, without a check that it exists.

    :raises CandidateError: lists the accepted forms, and the one that was probably meant.
    """
    text = spec.strip()
    if _VERSION.fullmatch(text):
        return Candidate(text, "version", f"candle-mi {text}", text)
    if text == "torch":
        return Candidate(text, "torch", "torch float32", text)
    if text == "transformer-lens":
        program = shlex.join([sys.executable, "-m", "candle_mi_parity.candidate.lens"])
        return Candidate(text, "transformer-lens", "TransformerLens", program)
    form, _, rest = text.partition(":")
    if form == "path" and rest:
        return Candidate(text, "path", f"candle-mi in {rest}", rest)
    if form == "stored" and rest:
        return Candidate(text, "stored", f"candle-mi {rest} (stored)", rest)
    if form == "command" and rest:
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise CandidateError(f"candidate {spec!r} is no command line: {error}") from error
        if words:
            return Candidate(text, "command", Path(words[-1] if len(words) > 1 else words[0]).name, rest)
    if form == "git":
        # A URL may itself hold an @ (git@host:…).
        url, _, revision = rest.rpartition("@")
        # git would read a leading dash as an option.
        if url and revision and not url.startswith("-") and not revision.startswith("-"):
            return Candidate(text, "git", f"candle-mi at {revision[:12]}", url, revision)
    raise CandidateError(f"unknown candidate {spec!r}: expected {ACCEPTED}{_meant(text)}")


def _meant(text: str) -> str:
    """A hint with the spelling that was probably meant."""
    if _VERSION.fullmatch(text.removeprefix("v")):
        return f"; did you mean {text.removeprefix('v')}?"
    if re.match(r"https?://|ssh://|git@", text):
        return f"; did you mean git:{text}@main?"
    if re.match(r"[./~]", text) or ("/" in text and ":" not in text):
        return f"; did you mean path:{text}?"
    return ""


def stored_releases(outputs: Path) -> list[str]:
    """The stored releases, oldest first.

    :param outputs: ``rust_outputs/``.
    """
    return sorted((path.stem for path in outputs.glob("*.json") if _VERSION.fullmatch(path.stem)), key=numbers)


def stored_index(candidate: Candidate, outputs: Path) -> Path:
    """The index of a ``stored:`` candidate, see :mod:`candle_mi_parity.trace.release`.

    A version names ``rust_outputs/<version>.json``; any other target is a directory with ``release.json``.

    :param outputs: ``rust_outputs/``.
    :raises CandidateError: it does not exist.
    """
    if candidate.kind != "stored":
        raise CandidateError(f"{candidate.spec} is not a stored candidate")
    if _VERSION.fullmatch(candidate.target):
        found = outputs / f"{candidate.target}.json"
    else:
        found = Path(candidate.target).expanduser() / "release.json"
    if found.is_file():
        return found
    versions = ", ".join(stored_releases(outputs)) or "none; pip install 'candle-mi-parity[stored]' adds them"
    raise CandidateError(f"no stored traces: {found} does not exist; stored versions: {versions}")
