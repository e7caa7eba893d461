"""Faults in candle-mi's own source: an edited copy of the released crate, built as a ``path:`` candidate."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from candle_mi_parity.candidate.sources import Source, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.spec.paths import EMITTER
from validation.catalogue import CatalogueError, SourceEdit

VERSION = "0.2.2"


@functools.cache
def released_crate() -> Path:
    """The directory in which cargo keeps the source of the release.

    :raises CatalogueError: cargo is missing, or the version is another one.
    """
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    command += ["--manifest-path", str(EMITTER / "Cargo.toml")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CatalogueError(f"cargo cannot say where candle-mi {VERSION} is: {error}") from error
    packages = [package for package in json.loads(done.stdout)["packages"] if package["name"] == "candle-mi"]
    if (versions := [package["version"] for package in packages]) != [VERSION]:
        raise CatalogueError(f"the emitter is locked to candle-mi {versions}, not {VERSION}")
    return Path(packages[0]["manifest_path"]).parent


def edited(text: str, edit: SourceEdit) -> str:
    """The text of a file with its anchor replaced.

    :raises CatalogueError: the anchor is not there exactly once, or nothing changes.
    """
    if (count := text.count(edit.find)) != 1:
        raise CatalogueError(f"{edit.file}: anchor found {count} times, expected once: {edit.find!r}")
    if edit.find == edit.replace:
        raise CatalogueError(f"{edit.file}: the anchor is replaced by itself: {edit.find!r}")
    return text.replace(edit.find, edit.replace)


def check_anchors(edits: Iterable[SourceEdit], crate: Path) -> None:
    """Every edit finds its anchor exactly once; nothing is built.

    :raises CatalogueError: the first that does not.
    """
    for edit in edits:
        edited((crate / edit.file).read_text(encoding="utf-8"), edit)


class Checkout:
    """A copy of the crate in which one edit after the other is made, so that cargo builds incrementally.

    :param cache: for the copy, always at the same place, which one process at a time has.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._directory = cache / "validation" / f"candle-mi-{VERSION}"

    @contextmanager
    def planted(self, edit: SourceEdit | None) -> Iterator[str]:
        """The candidate's spelling, ``path:…``; without an edit the release as it is.

        :raises CatalogueError: the anchor is not there exactly once.
        """
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._directory}.lock"):
            self._lay_out(edit)
            yield f"path:{self._directory}"

    @contextmanager
    def candidate(self, name: str, edit: SourceEdit | None, out: Path) -> Iterator[Source]:
        """The built candidate.

        :param name: of the directory of its traces in ``out``.
        :raises ParityError: the anchor is not found, or the crate does not build.
        """
        with (
            self.planted(edit) as spec,
            open_source(parse_candidate(spec), self._cache, out / name, lambda line: None) as source,
        ):
            yield source

    def _lay_out(self, edit: SourceEdit | None) -> None:
        crate = released_crate()
        self._directory.mkdir(exist_ok=True)
        for path in sorted(crate.rglob("*")):
            target = self._directory / path.relative_to(crate)
            if path.is_dir():
                target.mkdir(exist_ok=True)
                continue
            content = path.read_bytes()
            if edit and path.relative_to(crate).as_posix() == edit.file:
                content = edited(content.decode(), edit).encode()
            if not target.is_file() or target.read_bytes() != content:
                shutil.copyfile(path, target)
                target.write_bytes(content)
