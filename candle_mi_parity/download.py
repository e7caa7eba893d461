"""What came from the hub, as a report names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Download:
    """Files of one repository.

    :ivar revision: as asked for.
    :ivar commit: which it was resolved to.
    :ivar files: sha256 of each file's bytes, by its path in the repository.
    """

    repo: str
    revision: str
    commit: str
    files: dict[str, str]
