"""rustdoc's JSON of a release, from what building the emitter leaves behind.

``cargo rustdoc`` would check candle-mi's 450 dependencies anew; rustdoc itself, shown the libraries that the build
made, takes seconds. Cargo is asked which libraries those are, and builds what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from candle_mi_parity.candidate.build import crate_of
from candle_mi_parity.candidate.candidate import parse_candidate
from candle_mi_parity.coverage.api import ApiError, Surface, public_functions, save_surface


def record(version: str, cache: Path) -> Path:
    """Write ``fixtures/api/<version>.json`` anew and return its path.

    :raises ApiError: cargo or rustdoc fails, or its JSON is of an unknown format.
    """
    crate = cache / "crates" / f"api-{version}"
    target = crate_of(parse_candidate(version), cache, crate)
    with FileLock(target.with_suffix(f"{target.suffix}.lock")):
        doc = _rustdoc(crate, target)
    if doc.get("crate_version") not in (version, None):
        raise ApiError(f"asked for {version}, documented {doc['crate_version']}")
    return save_surface(Surface(format=1, version=version, items=public_functions(doc)))


def _rustdoc(crate: Path, target: Path) -> dict[str, Any]:
    manifest = ["--manifest-path", str(crate / "Cargo.toml"), "--locked"]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    # A cross-compilation target set by the user would move the libraries elsewhere.
    environment.pop("CARGO_BUILD_TARGET", None)
    build = ["cargo", "build", "--release", "-p", "candle-mi", "--message-format", "json", *manifest]
    told = [json.loads(line) for line in _run(build, environment).splitlines()]
    made = {one["package_id"]: one for one in told if _is_library(one)}
    metadata = json.loads(_run(["cargo", "metadata", "--format-version", "1", *manifest], environment))
    own = next(one for one in made.values() if one["target"]["name"] == "candle_mi")
    node = next(node for node in metadata["resolve"]["nodes"] if node["id"] == own["package_id"])
    command = ["rustdoc", own["target"]["src_path"], "--crate-name", "candle_mi"]
    command += ["--edition", own["target"]["edition"], "--cap-lints", "allow", "-L", f"dependency={_deps(target)}"]
    for feature in own["features"]:
        command += ["--cfg", f'feature="{feature}"']
    for dependency in node["deps"]:
        if dependency["pkg"] in made:
            command += ["--extern", f"{dependency['name']}={_library(made[dependency['pkg']])}"]
    out = crate / "doc"
    command += ["-Z", "unstable-options", "--output-format", "json", "--out-dir", str(out)]
    # Only a nightly rustdoc writes JSON unasked.
    _run(command, {**environment, "RUSTC_BOOTSTRAP": "1"})
    doc: dict[str, Any] = json.loads((out / "candle_mi.json").read_text(encoding="utf-8"))
    return doc


def _is_library(message: dict[str, Any]) -> bool:
    kinds = {"lib", "rlib", "proc-macro"}
    return message["reason"] == "compiler-artifact" and bool(kinds & set(message["target"]["kind"]))


def _deps(target: Path) -> Path:
    return target / "release" / "deps"


def _library(artifact: dict[str, Any]) -> str:
    """The compiled library: for a dependency in ``deps``, ending in ``.rlib``, or ``.so`` for a macro."""
    files: list[str] = artifact["filenames"]
    return next((file for file in files if not file.endswith(".rmeta")), files[0])


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise ApiError(f"no {command[0]} on PATH") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        raise ApiError(f"{' '.join(command[:2])}: {(errors or [done.stderr.strip()])[0][:300]}")
    return done.stdout
