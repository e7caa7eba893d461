"""``make licences``: every Rust crate and Python package that is built or installed here, by licence.

Crates as cargo knows them, of each release's lock; packages as they say themselves. ``docs/licences.md`` is what it
writes, and the tests read it: a crate that is not in it, or a licence that is not allowed, fails.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from candle_mi_parity.candidate.build import crate_of
from candle_mi_parity.candidate.candidate import parse_candidate
from candle_mi_parity.coverage.api import RELEASES
from candle_mi_parity.spec.paths import ROOT, cache_root

DOCUMENT = ROOT / "docs" / "licences.md"

ALLOWED = {
    *(
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CDLA-Permissive-2.0",
        "CNRI-Python",
    ),
    *("ISC", "LGPL-2.1-or-later", "LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unicode-3.0"),
    *("Unlicense", "Zlib", "LicenseRef-NVIDIA-Proprietary"),
}
"""Every name that a licence may hold, alternatives too. The LGPL is one alternative of two crates."""

SPELT = {
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "ISC License (ISCL)": "ISC",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
}
"""What packages say that is no SPDX name."""

SILENT = {"cuda-toolkit": "LicenseRef-NVIDIA-Proprietary"}
"""Packages that say nothing: this one is empty and names the others of NVIDIA."""

Licences = Mapping[str, str]


def not_allowed(licences: Licences) -> list[str]:
    """What is under a licence that holds a name which is not allowed, or that has none."""
    return sorted(f"{name}: {licence or 'none'}" for name, licence in licences.items() if not _allowed(licence))


def _allowed(licence: str) -> bool:
    names = set(re.findall(r"[\w.-]+", licence)) - {"AND", "OR", "WITH"}
    return bool(names) and names <= ALLOWED


def package_licences() -> dict[str, str]:
    """``name version`` → licence of every Python package that can be imported here, but for this one."""
    found = {}
    for package in distributions():
        if package.name != "candle-mi-parity":
            found[f"{package.name} {package.version}"] = licence_of(package)
    return found


def licence_of(package: Distribution) -> str:
    """As SPDX where the package says it so, or else its classifiers or its own words; empty when it is silent."""

    def said(field: str) -> list[str]:
        return [str(value) for value in package.metadata.get_all(field) or []]

    classifiers = [line.rpartition(" :: ")[2] for line in said("Classifier") if line.startswith("License ::")]
    for words in (*said("License-Expression"), *classifiers, *said("License")):
        if words and words != "OSI Approved":
            return SPELT.get(words, words)
    return SILENT.get(package.name, "")


def crate_licences() -> dict[str, str]:
    """``name version`` → licence of every crate that an emitter of a release is built from, whatever the platform."""
    found: dict[str, str] = {}
    for release in RELEASES:
        with tempfile.TemporaryDirectory() as scratch:
            crate_of(parse_candidate(release), cache_root(), Path(scratch))
            command = ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=True)
        for package in json.loads(done.stdout)["packages"]:
            if package["source"]:
                # A slash is an older spelling of OR.
                found[f"{package['name']} {package['version']}"] = (package["license"] or "").replace("/", " OR ")
    return found


def text(crates: Licences, packages: Licences) -> str:
    """The document: a heading a licence, then all that is under it."""
    return (
        "# Licences\n\nOf every crate that an emitter is built from, for all platforms and releases, and of every\n"
        "Python package of the set-up on Linux with x86-64. Written by `make licences`.\n\n"
        f"## Rust crates ({len(crates)})\n{_by_licence(crates)}\n"
        f"## Python packages ({len(packages)})\n{_by_licence(packages)}"
    )


def _by_licence(licences: Licences) -> str:
    under: defaultdict[str, list[str]] = defaultdict(list)
    for name, licence in licences.items():
        under[" ".join(licence.split())].append(name)
    ordered = sorted(under.items(), key=lambda item: (-len(item[1]), item[0]))
    return "".join(f"\n### {licence}\n\n{_list(names)}\n" for licence, names in ordered)


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names, key=str.lower))


def read(document: str, section: str) -> dict[str, str]:
    """``name version`` → licence of one section of the document, as :func:`text` wrote it."""
    _, found, body = document.partition(f"\n## {section} (")
    if not found:
        raise ValueError(f"no section {section!r}")
    parts = re.split(r"^### (.+)$", body.partition("\n## ")[0], flags=re.MULTILINE)[1:]
    return {
        name.strip(): licence
        for licence, names in zip(parts[::2], parts[1::2], strict=True)
        for name in names.split(",")
    }


def main() -> None:
    crates, packages = crate_licences(), package_licences()
    DOCUMENT.write_text(text(crates, packages), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
    for line in not_allowed(crates | packages):
        print(f"not allowed: {line}")


if __name__ == "__main__":
    main()
