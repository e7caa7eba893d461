"""Building the emitter for a candidate, in a cache keyed by content.

Below the cache directory lie ``emitters/<key>/`` (the binaries, one per content), ``crates/`` (a crate
directory per candidate spelling, so that a maintainer's ``path:`` build is incremental) and
``target/candle-<series>/`` (cargo's own output, shared by all candidates on one candle: it is the same 170
crates).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from candle_mi_parity.candidate.cargo import Ran, condense, run_cargo
from candle_mi_parity.candidate.checkout import tree_digest
from candle_mi_parity.candidate.plan import (
    DOWNLOADER,
    EMITTER,
    Plan,
    emitter_sources,
    known_releases,
    lay_out,
    plan_of,
    stand_in_files,
    with_real_downloader,
)
from candle_mi_parity.candidate.spelling import Candidate, CandidateError, OutOfReachError
from candle_mi_parity.files import atomic as durable

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuiltEmitter:
    """An emitter that can be run, and what it says of itself (``parity-emitter --version``)."""

    path: Path
    identity: dict[str, object]


class _StandInError(CandidateError):
    """candle-mi calls something of its downloader that the stand-in lacks."""


def build(candidate: Candidate, cache: Path, log: Progress, features: Sequence[str] = ()) -> BuiltEmitter:
    """The emitter for ``candidate``, from the cache or freshly built.

    Two processes that ask for the same emitter build it once.

    :param log: called with a line now and then.
    :param features: features of the emitter crate (``cuda``).
    :raises CandidateError: one line on why there is no such emitter.
    :raises OutOfReachError: only the network or a compiler for CUDA is missing.
    """
    if candidate.kind == "stored":
        raise CandidateError(f"{candidate.spec} is stored: there is nothing to build")
    if "cuda" in features and shutil.which("nvcc") is None:
        raise OutOfReachError(
            f"no nvcc on PATH, which compiles the CUDA kernels of {candidate.label}: install the CUDA toolkit, "
            "or use --device cpu"
        )
    plan = plan_of(candidate, cache)
    plain = with_real_downloader(plan)
    rustc = _rustc_version()
    if plan != plain and _binary(plain, cache, rustc, features).is_file():
        plan = plain  # found out earlier that the stand-in does not do
    try:
        return _build(candidate, plan, cache, log, rustc, features)
    except _StandInError as error:
        log(f"{error}; building the real {DOWNLOADER}, which takes twice as many crates")
        return _build(candidate, plain, cache, log, rustc, features)


def _build(
    candidate: Candidate, plan: Plan, cache: Path, log: Progress, rustc: str, features: Sequence[str]
) -> BuiltEmitter:
    binary = _binary(plan, cache, rustc, features)
    if not binary.is_file():
        try:
            _build_once(candidate, plan, cache, binary, log, features)
        except OSError as error:
            raise CandidateError(f"cannot write to the cache {cache}: {error}") from error
    identity = _identity(binary)
    _check_identity(candidate, plan, identity)
    return BuiltEmitter(binary, identity)


def _build_once(
    candidate: Candidate, plan: Plan, cache: Path, binary: Path, log: Progress, features: Sequence[str]
) -> None:
    """Build ``binary``, unless another process did while this one waited for it."""
    lock_file = _target(plan, cache).with_name(f"candle-{plan.candle}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_file):
        if binary.is_file():
            return
        log(f"building the emitter for {candidate.label} on candle {plan.candle}")
        made = _cargo_build(candidate, plan, cache, log, features)
        if candidate.kind == "path" and tree_digest(Path(candidate.target)) != plan.tree_digest:
            raise CandidateError(f"{candidate.target} changed while it was built; run again")
        _check_identity(candidate, plan, _identity(made))
        _install(made, binary)


def crate_of(candidate: Candidate, cache: Path, crate: Path) -> Path:
    """Write the emitter's crate for a candidate to ``crate``; returns the target directory it is built in."""
    plan = plan_of(candidate, cache)
    lay_out(crate, plan, cache)
    return _target(plan, cache)


def _target(plan: Plan, cache: Path) -> Path:
    return cache / "target" / f"candle-{plan.candle}"


def _binary(plan: Plan, cache: Path, rustc: str, features: Sequence[str]) -> Path:
    """Where the emitter of a plan lies, by all that it is made of."""
    digest = hashlib.sha256()
    parts: list[tuple[str, bytes]] = [
        (path.relative_to(EMITTER).as_posix(), path.read_bytes()) for path in emitter_sources()
    ]
    if plan.downloader is not None:
        parts += [(f"{DOWNLOADER}/{name}", text.encode()) for name, text in stand_in_files(plan.downloader).items()]
    parts += [
        ("manifest", plan.manifest.encode()),
        ("lock", plan.lock),
        ("rustc", rustc.encode()),
        # Flags such as target-cpu change the numbers.
        ("flags", os.environ.get("RUSTFLAGS", "").encode()),
        ("features", ",".join(sorted(features)).encode()),
        ("tree", (plan.tree_digest or "").encode()),
        ("revision", (plan.revision or "").encode()),
    ]
    for name, content in parts:
        digest.update(f"{name}:{hashlib.sha256(content).hexdigest()}\n".encode())
    return cache / "emitters" / digest.hexdigest()[:32] / "parity-emitter"


def _rustc_version() -> str:
    try:
        done = subprocess.run(["rustc", "-V"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise _no_rust("rustc") from None
    if done.returncode != 0:
        raise CandidateError(f"rustc -V failed: {condense(done.stderr.splitlines())}")
    return done.stdout.strip()


def _no_rust(program: str) -> CandidateError:
    return CandidateError(
        f"no {program} on PATH: install a Rust toolchain (cargo and rustc 1.91 or newer, see rustup.rs), "
        "or use stored:VERSION"
    )


# --- cargo ----------------------------------------------------------------------------------------


def _cargo_build(candidate: Candidate, plan: Plan, cache: Path, log: Progress, features: Sequence[str]) -> Path:
    """Run cargo and return the binary it left in the shared target directory."""
    slug = re.sub(r"[^0-9A-Za-z.]+", "-", candidate.target)[-40:].strip("-")
    spelt = hashlib.sha256(f"{candidate.kind}:{candidate.target}:{plan.candle}".encode()).hexdigest()[:8]
    crate = cache / "crates" / f"{slug}-{spelt}"
    lay_out(crate, plan, cache)
    target = _target(plan, cache)
    command = ["cargo", "build", "--release", "--manifest-path", str(crate / "Cargo.toml")]
    if plan.locked:
        command.append("--locked")
    if features:
        command += ["--features", ",".join(features)]
    environment = {
        **os.environ,
        "CARGO_TARGET_DIR": str(target),
        # The edit-and-run loop of a maintainer: the checkout and the emitter are compiled in part, the dependencies
        # are those of every candidate. A release is compiled whole, whatever the user's shell says.
        "CARGO_INCREMENTAL": "1" if candidate.kind == "path" else "0",
        "PARITY_TREE_DIGEST": plan.tree_digest or "",
        "PARITY_REVISION": plan.revision or "",
    }
    _force_rebuild(target, "parity-emitter")
    if candidate.kind == "path":
        _force_rebuild(target, "candle-mi")
    # A cross-compilation target set by the user would move the binary elsewhere.
    environment.pop("CARGO_BUILD_TARGET", None)
    full_log = crate / "build.log"
    try:
        ran = run_cargo(command, environment, full_log, log)
    except FileNotFoundError:
        raise _no_rust("cargo") from None
    made = ran.executable("parity-emitter")
    if ran.code != 0 or made is None:
        raise _failure(candidate, plan, ran, full_log)
    return made


def _failure(candidate: Candidate, plan: Plan, ran: Ran, full_log: Path) -> CandidateError:
    """Why there is no binary, and whose fault it is."""
    reason = f"{ran.reason()} (full log: {full_log})"
    if not plan.locked and plan.downloader is not None and re.search(r"hf[-_]fetch[-_]model", ran.errors):
        return _StandInError(f"{candidate.label} does not build with the stand-in for {DOWNLOADER}: {reason}")
    if ran.compiled:
        return CandidateError(f"{candidate.label} does not compile: {reason}")
    wanted = f'requirement `candle-mi = "={candidate.target}"`'
    if candidate.kind == "version" and f"failed to select a version for the {wanted}" in ran.errors:
        found = re.search(r"versions found which didn't match: (.*)", ran.errors)
        known = found[1] if found else ", ".join(reversed(known_releases()))
        return CandidateError(f"no candle-mi {candidate.target}; known releases: {known}")
    # cargo has one exit code for every failure, and no JSON before it compiles.
    network = r"could not resolve host|failed to download|failed to fetch|download of .* failed|unable to update"
    if re.search(network, ran.errors, re.IGNORECASE):
        said = f"cargo could not fetch what {candidate.label} needs; check the network, and run again"
        return OutOfReachError(f"{said}: {reason}")
    return CandidateError(f"cargo could not build the emitter for {candidate.label}: {reason}")


def _force_rebuild(target: Path, package: str) -> None:
    """Have cargo compile a package whatever its files' times are.

    It takes a file for unchanged that is older than what was built, as one is that ``cp -p``, ``rsync`` or ``tar``
    put back, or that was written after the clock was set back: the text of before would be judged under the digest of
    now. rustc goes by contents, so it costs little.
    """
    for mark in (target / "release" / ".fingerprint").glob(f"{package}-*"):
        shutil.rmtree(mark)


def _install(made: Path, binary: Path) -> None:
    """Copy beside the destination, then rename: a half-copied binary is never found under its name."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    partial = binary.with_name(f".{binary.name}.{os.getpid()}")
    try:
        shutil.copy2(made, partial)
        durable.put(partial, binary)
    finally:
        partial.unlink(missing_ok=True)


# --- what was built -------------------------------------------------------------------------------


def _identity(binary: Path) -> dict[str, object]:
    try:
        command = [str(binary), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        identity: object = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CandidateError(f"{binary} does not say what it is: {error}") from error
    if not isinstance(identity, dict):
        raise CandidateError(f"{binary} does not say what it is: {done.stdout[:80]!r}")
    return identity


def _check_identity(candidate: Candidate, plan: Plan, identity: dict[str, object]) -> None:
    """The candle-mi in the binary is the one that was asked for: the target directory is shared."""
    inside = identity.get("candle_mi")
    told = inside if isinstance(inside, dict) else {}
    source, field, wanted = {
        "version": ("registry", "version", candidate.target),
        "path": ("path", "tree_digest", plan.tree_digest),
        "git": ("git", "revision", plan.revision),
    }[candidate.kind]
    for name, value in (("source", source), (field, wanted)):
        if told.get(name) != value:
            got = f"candle-mi {name} {told.get(name)}, expected {value}"
            raise CandidateError(f"built for {candidate.spec}, but the emitter has {got}")
