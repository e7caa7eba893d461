"""The candidate as a person spells it: which candle-mi is on trial.

``0.2.2``, ``path:DIR`` and ``git:URL@REV`` are built by :mod:`candle_mi_parity.candidate.build`;
``stored:VERSION_OR_DIR`` is traces that were emitted earlier and needs no Rust; ``torch`` is the control.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.explanations import numbers

Kind = Literal["version", "path", "git", "stored", "torch"]

ACCEPTED = "a version such as 0.2.2, path:DIR, git:URL@REV, stored:VERSION_OR_DIR, or torch (float32, the control)"

_VERSION = re.compile(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")


class CandidateError(ParityError):
    """The candidate is misspelt, absent or cannot be built."""


class OutOfReachError(CandidateError):
    """What the candidate needs lies outside this suite and is not there (network, GPU, nvcc): nothing is known
    against it, and a run ends INCONCLUSIVE. The text says what is missing and the remedy."""


@dataclass(frozen=True)
class Candidate:
    """A candidate as the user spelt it.

    ``target`` is the version, the directory or the URL; ``revision`` is given for ``git`` only, as spelt
    and not yet resolved to a commit.
    """

    spec: str
    kind: Kind
    label: str
    target: str
    revision: str | None = None


def parse_candidate(spec: str) -> Candidate:
    """Read a candidate's spelling; whether it exists is found out when it is used.

    :raises CandidateError: one line that lists the accepted forms, and the one that was probably meant.
    """
    text = spec.strip()
    if _VERSION.fullmatch(text):
        return Candidate(text, "version", f"candle-mi {text}", text)
    if text == "torch":
        return Candidate(text, "torch", "torch float32", text)
    form, _, rest = text.partition(":")
    if form == "path" and rest:
        return Candidate(text, "path", f"candle-mi in {rest}", rest)
    if form == "stored" and rest:
        return Candidate(text, "stored", f"candle-mi {rest} (stored)", rest)
    if form == "git":
        # The last @: a URL may hold one of its own (git@host:…).
        url, _, revision = rest.rpartition("@")
        # A leading dash would be read as an option by git.
        if url and revision and not url.startswith("-") and not revision.startswith("-"):
            return Candidate(text, "git", f"candle-mi at {revision[:12]}", url, revision)
    raise CandidateError(f"unknown candidate {spec!r}: expected {ACCEPTED}{_meant(text)}")


def _meant(text: str) -> str:
    """The spelling that a person who wrote ``text`` probably wants."""
    if _VERSION.fullmatch(text.removeprefix("v")):
        return f"; did you mean {text.removeprefix('v')}?"
    if re.match(r"https?://|ssh://|git@", text):
        return f"; did you mean git:{text}@main?"
    if re.match(r"[./~]", text) or ("/" in text and ":" not in text):
        return f"; did you mean path:{text}?"
    return ""


def stored_releases(outputs: Path) -> list[str]:
    """The releases that are stored, oldest first.

    :param outputs: ``rust_outputs/``.
    """
    return sorted((path.stem for path in outputs.glob("*.json") if _VERSION.fullmatch(path.stem)), key=numbers)


def stored_index(candidate: Candidate, outputs: Path) -> Path:
    """The index of a ``stored:`` candidate, see :mod:`candle_mi_parity.trace.release`.

    A version names ``rust_outputs/<version>.json``; anything else is a directory that holds ``release.json``.

    :param outputs: ``rust_outputs/``.
    :raises CandidateError: there is none.
    """
    if candidate.kind != "stored":
        raise CandidateError(f"{candidate.spec} is not stored: it has to be built and run")
    if _VERSION.fullmatch(candidate.target):
        found = outputs / f"{candidate.target}.json"
    else:
        found = Path(candidate.target).expanduser() / "release.json"
    if found.is_file():
        return found
    raise CandidateError(
        f"no stored traces: {found} does not exist; stored versions: {', '.join(stored_releases(outputs)) or 'none'}"
    )
