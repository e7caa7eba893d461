"""Building the emitter for a candidate, in a cache keyed by content.

The cache holds ``emitters/<key>/`` (binaries), ``crates/`` (a crate per spelling of a candidate, so that ``path:``
builds are incremental) and ``target/candle-<series>/`` (cargo's output, shared by all candidates on one candle;
builds that count branches have ``target/candle-<series>-counted/``, so that neither kind rebuilds for the other).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from candle_mi_parity.candidate.cargo import Ran, condense, run_cargo
from candle_mi_parity.candidate.checkout import configuration, note_inputs, packages_of, written_since
from candle_mi_parity.candidate.parts import SWITCHED, broken_feature, broken_parts
from candle_mi_parity.candidate.plan import (
    COUNTING,
    DOWNLOADER,
    Plan,
    crate_directory,
    emitter_sources,
    inputs_of,
    known_releases,
    lay_out,
    plan_of,
    stand_in_files,
    with_real_downloader,
)
from candle_mi_parity.candidate.spelling import Candidate, CandidateError, OutOfReachError
from candle_mi_parity.files import atomic
from candle_mi_parity.spec.paths import EMITTER
from candle_mi_parity.trace.trace import CandleMi

Progress = Callable[[str], None]
MISSING = "missing.json"


@dataclass(frozen=True)
class BuiltEmitter:
    """An emitter's binary.

    :ivar identity: the output of ``parity-emitter --version``.
    :ivar missing: part that does not compile against the candidate → its first error.
    :ivar absent: parts and lanes for which the candidate has no feature.
    """

    path: Path
    identity: dict[str, object]
    missing: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


class AbsentFeatureError(CandidateError):
    """The candidate has no such feature."""


class _StandInError(CandidateError):
    """candle-mi uses a part of its downloader that the stand-in does not have."""


def build(
    candidate: Candidate, cache: Path, log: Progress, features: Sequence[str] = (), counted: bool = False
) -> BuiltEmitter:
    """The emitter for ``candidate``, from the cache or built now, once for all processes.

    :param log: called with lines of progress.
    :param features: features of the emitter crate beside its parts: ``cuda``, or a lane.
    :param counted: whether candle-mi counts the branches that it takes, see :mod:`branches`.
    :raises CandidateError: one line on why the build failed.
    :raises OutOfReachError: the network or nvcc is missing.
    """
    if candidate.kind == "stored":
        raise CandidateError(f"{candidate.spec} is stored: there is nothing to build")
    if "cuda" in features and shutil.which("nvcc") is None:
        raise OutOfReachError(
            f"no nvcc on PATH, which compiles the CUDA kernels of {candidate.label}: install the CUDA toolkit, "
            "or use --device cpu"
        )
    if counted and sys.platform != "linux":
        raise CandidateError("the branches that candle-mi takes can be counted on Linux only")
    plan = replace(plan_of(candidate, cache), counted=counted)
    if lacking := [feature for feature in features if feature in plan.absent]:
        raise AbsentFeatureError(f"{candidate.label} has no feature {lacking[0]}")
    plain = with_real_downloader(plan)
    compiler = _compiler(candidate, cache)
    if plan != plain and _binary(plain, cache, compiler, features).is_file():
        plan = plain  # an earlier build with the stand-in failed
    try:
        return _build(candidate, plan, cache, log, compiler, features)
    except _StandInError as error:
        log(f"{error}; building the real {DOWNLOADER}, with twice as many crates")
        return _build(candidate, plain, cache, log, compiler, features)


def _build(
    candidate: Candidate, plan: Plan, cache: Path, log: Progress, compiler: str, features: Sequence[str]
) -> BuiltEmitter:
    binary = _binary(plan, cache, compiler, features)
    if not binary.is_file():
        try:
            read = _build_once(candidate, plan, cache, binary, log, features)
        except OSError as error:
            raise CandidateError(f"cannot write to the cache {cache}: {error}") from error
        if read != plan.tree_digest:
            log("cargo read files that no build read before; the emitter is built once more, under their digest")
            return _build(candidate, replace(plan, tree_digest=read), cache, log, compiler, features)
    identity = _identity(binary)
    _check_identity(candidate, plan, identity)
    return BuiltEmitter(binary, identity, _missing_beside(binary), plan.absent)


def _build_once(
    candidate: Candidate, plan: Plan, cache: Path, binary: Path, log: Progress, features: Sequence[str]
) -> str | None:
    """Build ``binary``, unless another process built it while this one waited for the lock.

    :returns: the digest of the checkout with the files that this build was the first to read; nothing is installed
        if it is not the plan's.
    """
    # One lock for both target directories, since the crate of a candidate is laid out in one place.
    lock_file = cache / "target" / f"candle-{plan.candle}.lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_file):
        if binary.is_file():
            return plan.tree_digest
        log(f"building the emitter for {candidate.label} on candle {plan.candle}")
        inputs = inputs_of(candidate, cache)
        known = inputs.read_bytes() if inputs.is_file() else b""
        started = time.time_ns()
        made, ran, missing = _without_broken_parts(candidate, plan, cache, log, features)
        if candidate.kind == "path" and written_since(Path(candidate.target), inputs, started):
            # An edit that was taken back is not in the digest. Once only: a build script may write each time.
            log("a file of the checkout was written while it was built; it is built once more")
            made, ran, missing = _without_broken_parts(candidate, plan, cache, log, features)
        if candidate.kind == "path":
            note_inputs(made.with_suffix(".d"), ran, cache / "crates", inputs)
            digest = plan_of(candidate, cache).tree_digest
            if digest != plan.tree_digest and inputs.read_bytes() != known:
                return digest
            if digest != plan.tree_digest:
                raise CandidateError(f"{candidate.target} changed while it was built; run again")
        _check_identity(candidate, plan, _identity(made))
        if missing:
            atomic.write_text(json.dumps(missing), binary.with_name(MISSING))
        _install(made, binary)
        return plan.tree_digest


def _without_broken_parts(
    candidate: Candidate, plan: Plan, cache: Path, log: Progress, features: Sequence[str]
) -> tuple[Path, Ran, dict[str, str]]:
    """Build with every part that compiles; returns the binary, cargo's messages, and other part → its first error.

    :raises CandidateError: what every case needs does not compile.
    """
    missing: dict[str, str] = {}

    def attempt(without: Collection[str] = ()) -> tuple[Path | None, Ran]:
        return _cargo_build(candidate, plan, cache, log, features, {*missing, *without})

    made, ran = attempt()
    while made is None:
        broken = {part: error for part, error in broken_parts(ran).items() if part not in missing}
        if not broken:
            left = [part for part in plan.parts if part not in missing]
            broken = broken_feature(ran, left, lambda without: attempt(without)[1])
        if not broken:
            raise _failure(candidate, plan, ran, crate_directory(candidate, cache) / "build.log")
        missing |= broken
        parts = ", ".join(broken)
        log(f"the emitter's part {parts} does not compile against {candidate.label}, and is left out")
        made, ran = attempt()
    return made, ran, missing


def changed_since(candidate: Candidate, identity: CandleMi | None, cache: Path) -> str:
    """Why a result is not that of the checkout as it is now, in one line; empty if it is, or for a release."""
    if candidate.kind != "path" or identity is None or plan_of(candidate, cache).tree_digest == identity.tree_digest:
        return ""
    return f"{candidate.target} was edited after its emitter was built: these are the numbers of the tree before that"


def crate_of(candidate: Candidate, cache: Path, crate: Path) -> Path:
    """Write the emitter's crate for a candidate to ``crate``; returns its target directory."""
    plan = plan_of(candidate, cache)
    lay_out(crate, plan, cache)
    return _target(plan, cache)


def compiled_features(candidate: Candidate, cache: Path) -> list[str]:
    """The features of candle-mi in a candidate's build, without those that are known not to compile."""
    plan = plan_of(candidate, cache)
    missing = _missing_beside(_binary(plan, cache, _compiler(candidate, cache), ()))
    left_out = {SWITCHED[part] for part in missing if part in SWITCHED}
    return [feature for feature in plan.features if feature not in left_out]


def _missing_beside(binary: Path) -> dict[str, str]:
    beside = binary.with_name(MISSING)
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


def _target(plan: Plan, cache: Path) -> Path:
    return cache / "target" / f"candle-{plan.candle}{'-counted' if plan.counted else ''}"


def _binary(plan: Plan, cache: Path, compiler: str, features: Sequence[str]) -> Path:
    """The path of a plan's emitter, keyed by everything that it is built from."""
    digest = hashlib.sha256()
    parts: list[tuple[str, bytes]] = [
        (path.relative_to(EMITTER).as_posix(), path.read_bytes()) for path in emitter_sources()
    ]
    if plan.downloader is not None:
        parts += [(f"{DOWNLOADER}/{name}", text.encode()) for name, text in stand_in_files(plan.downloader).items()]
    parts += [
        ("manifest", plan.manifest.encode()),
        ("lock", plan.lock),
        ("compiler", compiler.encode()),
        ("features", ",".join(sorted(features)).encode()),
        ("tree", (plan.tree_digest or "").encode()),
        ("revision", (plan.revision or "").encode()),
    ]
    if plan.counted:
        parts.append(("counted", COUNTING.read_bytes()))
    for name, content in parts:
        digest.update(f"{name}:{hashlib.sha256(content).hexdigest()}\n".encode())
    return cache / "emitters" / digest.hexdigest()[:32] / "parity-emitter"


def _place(candidate: Candidate, cache: Path) -> Path:
    """Where cargo and rustc run: a checkout's own configuration and toolchain apply to it, and to nothing else."""
    if candidate.kind == "path":
        return Path(candidate.target).expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _compiler(candidate: Candidate, cache: Path) -> str:
    """The compiler's version and all configuration of cargo: flags such as target-cpu change the numbers."""
    place = _place(candidate, cache)
    try:
        done = subprocess.run(["rustc", "-vV"], cwd=place, capture_output=True, text=True, check=True)
        return f"{done.stdout.strip()}\n{configuration(place)}"
    except FileNotFoundError:
        raise _no_rust("rustc") from None
    except subprocess.CalledProcessError as error:
        raise CandidateError(f"rustc -vV failed: {condense(error.stderr.splitlines())}") from error


def _no_rust(program: str) -> CandidateError:
    return CandidateError(
        f"no {program} on PATH: install a Rust toolchain (cargo and rustc 1.91 or newer, see rustup.rs), "
        "or use stored:VERSION"
    )


# --- cargo ----------------------------------------------------------------------------------------


def _cargo_build(
    candidate: Candidate,
    plan: Plan,
    cache: Path,
    log: Progress,
    features: Sequence[str],
    without: Collection[str],
) -> tuple[Path | None, Ran]:
    """Run cargo; returns the binary in the shared target directory, if there is one.

    :param without: parts that are left out.
    """
    crate = crate_directory(candidate, cache).absolute()
    lay_out(crate, plan, cache)
    target = _target(plan, cache)
    command = ["cargo", "build", "--release", "--manifest-path", str(crate / "Cargo.toml")]
    if plan.locked:
        command.append("--locked")
    if without:
        command.append("--no-default-features")
        features = [*features, *(part for part in plan.parts if part not in without)]
    if features:
        command += ["--features", ",".join(features)]
    environment = {
        **os.environ,
        "CARGO_TARGET_DIR": str(target.absolute()),
        # The fingerprints are here, whatever the configuration says.
        "CARGO_BUILD_BUILD_DIR": str(target.absolute()),
        # Incremental for the edit-and-run loop of a maintainer only, whatever the user's environment says.
        "CARGO_INCREMENTAL": "1" if candidate.kind == "path" else "0",
        "PARITY_TREE_DIGEST": plan.tree_digest or "",
        "PARITY_REVISION": plan.revision or "",
    }
    _force_rebuild(target, "parity-emitter")
    if plan.counted:
        # The wrapper ends with the user's own, such as sccache. cargo does not notice when it changes.
        environment |= {"RUSTC_WRAPPER": str(COUNTING), "PARITY_WRAPPED": os.environ.get("RUSTC_WRAPPER", "")}
        _force_rebuild(target, "candle-mi")
    if candidate.kind == "path":
        for package in packages_of(Path(candidate.target), inputs_of(candidate, cache)):
            _force_rebuild(target, package)
    # A cross-compilation target would move the binary.
    environment.pop("CARGO_BUILD_TARGET", None)
    full_log = crate / "build.log"
    try:
        ran = run_cargo(command, environment, full_log, log, _place(candidate, cache))
    except FileNotFoundError:
        raise _no_rust("cargo") from None
    return (ran.executable("parity-emitter") if ran.code == 0 else None), ran


def _failure(candidate: Candidate, plan: Plan, ran: Ran, full_log: Path) -> CandidateError:
    """The error for a build without a binary."""
    reason = f"{ran.reason()} (full log: {full_log})"
    if not plan.locked and plan.downloader is not None and re.search(r"hf[-_]fetch[-_]model", ran.errors):
        return _StandInError(f"{candidate.label} does not build with the stand-in for {DOWNLOADER}: {reason}")
    if ran.compiled and ran.broken == "parity-emitter":
        stored = ", ".join(f"stored:{release}" for release in reversed(known_releases()))
        return CandidateError(
            f"this suite's emitter, which calls candle-mi, does not compile against {candidate.label}: {reason}. The "
            f"place is in emitter/; adapt it to the changed interface. What runs without a build: {stored}"
        )
    if ran.compiled:
        return CandidateError(f"{candidate.label} does not compile: {reason}")
    wanted = f'requirement `candle-mi = "={candidate.target}"`'
    if candidate.kind == "version" and f"failed to select a version for the {wanted}" in ran.errors:
        found = re.search(r"versions found which didn't match: (.*)", ran.errors)
        known = found[1] if found else ", ".join(reversed(known_releases()))
        return CandidateError(f"no candle-mi {candidate.target}; known releases: {known}")
    # Before compilation cargo writes no JSON, and its exit code is the same for every failure.
    network = r"could not resolve host|failed to download|failed to fetch|download of .* failed|unable to update"
    if re.search(network, ran.errors, re.IGNORECASE):
        return OutOfReachError(
            f"cargo could not fetch the crates of {candidate.label}; check the network, and run again: {reason}"
        )
    return CandidateError(f"cargo could not build the emitter for {candidate.label}: {reason}")


def _force_rebuild(target: Path, package: str) -> None:
    """Have cargo compile a package whatever the modification times of its files.

    Otherwise a file that was restored with an old time, for instance by ``rsync``, would count as unchanged.
    """
    for release in ("release", "*/release"):  # the second with `build.target` in a configuration
        for fingerprint in target.glob(f"{release}/.fingerprint/{package}-*"):
            shutil.rmtree(fingerprint)


def _install(made: Path, binary: Path) -> None:
    """Copy the binary atomically."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    partial = binary.with_name(f".{binary.name}.{os.getpid()}")
    try:
        shutil.copy2(made, partial)
        atomic.put(partial, binary)
    finally:
        partial.unlink(missing_ok=True)


# --- what was built -------------------------------------------------------------------------------


def _identity(binary: Path) -> dict[str, object]:
    try:
        command = [str(binary), "--version"]
        # A build that counts branches would leave a file of its counters behind.
        environment = {**os.environ, "LLVM_PROFILE_FILE": os.devnull}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
        return dict(json.loads(done.stdout))
    except (OSError, ValueError, TypeError, subprocess.TimeoutExpired) as error:
        raise CandidateError(f"{binary} --version gave no valid answer: {error}") from error


def _check_identity(candidate: Candidate, plan: Plan, identity: dict[str, object]) -> None:
    """Check which candle-mi is in the binary, since the target directory is shared.

    :raises CandidateError: it is not the candidate's.
    """
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
