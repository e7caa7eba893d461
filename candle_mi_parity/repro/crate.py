"""The crate around a reproduction's test, with the dependencies of the emitter for the same candidate."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from candle_mi_parity.candidate.build import compiled_features, crate_of
from candle_mi_parity.candidate.plan import DOWNLOADER
from candle_mi_parity.candidate.spelling import Candidate
from candle_mi_parity.files.escape import templates


@dataclass(frozen=True)
class Dependencies:
    """Dependencies of a crate of tests.

    :ivar lines: candle-mi, candle-core and candle-nn as ``Cargo.toml`` names them.
    :ivar settings: the tables of ``Cargo.toml`` with which the crates in ``target`` were built.
    :ivar stand_in: the directory of the crate that stands in for the downloader, named in ``settings``.
    :ivar lock: the versions to start from.
    :ivar target: their build directory in the cache.
    """

    lines: str
    settings: str
    stand_in: Path | None
    lock: bytes
    target: Path


def dependencies(candidate: Candidate, cache: Path) -> Dependencies:
    """:raises CandidateError: it is not a candidate that can be built."""
    with tempfile.TemporaryDirectory(prefix="parity-repro-") as scratch:
        crate = Path(scratch)
        target = crate_of(candidate, cache, crate)
        manifest = (crate / "Cargo.toml").read_text(encoding="utf-8")
        start = manifest.index("[profile.release]")
        lines = re.findall(r"^candle-(?:mi|core|nn) = .*$", manifest[:start], re.MULTILINE)
        features = json.dumps(compiled_features(candidate, cache))
        lines = [re.sub(r"features = \[.*?\]", f"features = {features}", line) for line in lines]
        settings = manifest[start:]
        patch = tomllib.loads(manifest)["patch"]["crates-io"].get(DOWNLOADER)
        stand_in = Path(patch["path"]) if patch else None
        return Dependencies("\n".join(lines), settings, stand_in, (crate / "Cargo.lock").read_bytes(), target)


def write_crate(folder: Path, dependencies: Dependencies, extra: str = "") -> None:
    """Write what cargo needs beside ``tests/``.

    :param extra: further lines of ``Cargo.toml``. Without them the folder is self-contained, with a copy of the
        stand-in.
    """
    settings = dependencies.settings
    if not extra and dependencies.stand_in is not None:
        shutil.copytree(dependencies.stand_in, folder / DOWNLOADER, dirs_exist_ok=True)
        settings = settings.replace(json.dumps(str(dependencies.stand_in)), json.dumps(DOWNLOADER))
    template = templates(html=False).get_template("Cargo.toml.j2")
    text = template.render(lines=dependencies.lines, settings=settings, extra=extra)
    (folder / "Cargo.toml").write_text(text, encoding="utf-8")
    (folder / "Cargo.lock").write_bytes(dependencies.lock)
    (folder / "src").mkdir(exist_ok=True)
    (folder / "src" / "lib.rs").write_text("//! Nothing: a crate of tests.\n", encoding="utf-8")
