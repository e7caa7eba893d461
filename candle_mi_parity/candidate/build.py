"""Building the emitter for a candidate: one source, a manifest per candidate, a cache keyed by content.

Below the cache directory lie ``emitters/<key>/`` (the binaries, one per content), ``crates/`` (a crate
directory per candidate spelling, so that a maintainer's ``path:`` build is incremental) and
``target/candle-<major>/`` (cargo's own output, shared by all candidates on one candle: it is the same 450
crates).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from candle_mi_parity.candidate.candidate import BuiltEmitter, Candidate, CandidateError, OutOfReachError
from candle_mi_parity.candidate.cargo import condense, run_cargo
from candle_mi_parity.files import atomic as durable

Progress = Callable[[str], None]

EMITTER = Path(__file__).parents[2] / "emitter"

# candle-mi moved from candle 0.9 to 0.11 with this release.
_FIRST_ON_CANDLE_0_11 = (0, 1, 19)

# A committed lock per candle that a candidate without one of its own starts from: the versions that the
# released candidate was tried with, rather than whatever is newest today.
_SEED_LOCK = {"0.9": "0.1.10.lock", "0.11": "0.2.2.lock"}


@dataclass(frozen=True)
class _Plan:
    """All that decides what will be built."""

    manifest: str
    lock: bytes
    locked: bool
    candle: str
    tree_digest: str | None
    revision: str | None


def build(candidate: Candidate, cache: Path, log: Progress, features: Sequence[str] = ()) -> BuiltEmitter:
    """The emitter for ``candidate``, from the cache or freshly built.

    ``log`` is called with a line now and then; ``features`` are features of the emitter crate (``cuda``). Two
    processes that ask for the same emitter build it once. Raises :class:`CandidateError` with one line, and
    :class:`OutOfReachError` where only the network or a compiler is missing.
    """
    if candidate.kind == "stored":
        raise CandidateError(f"{candidate.spec} is stored: there is nothing to build")
    if "cuda" in features and shutil.which("nvcc") is None:
        raise OutOfReachError(
            f"no nvcc on PATH, which compiles the CUDA kernels of {candidate.label}: install the CUDA toolkit, "
            "or use --device cpu"
        )
    plan = _plan(candidate, cache)
    key = _key(plan, features)
    binary = cache / "emitters" / key / "parity-emitter"
    if not binary.is_file():
        try:
            _build_once(candidate, plan, cache, binary, log, features)
        except OSError as error:
            raise CandidateError(f"cannot write to the cache {cache}: {error}") from error
    identity = _identity(binary)
    _check_identity(candidate, plan, identity)
    return BuiltEmitter(binary, identity)


def _build_once(
    candidate: Candidate, plan: _Plan, cache: Path, binary: Path, log: Progress, features: Sequence[str]
) -> None:
    """Build ``binary``, unless another process did while this one waited for it."""
    lock_file = cache / "target" / f"candle-{plan.candle}.lock"
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
    plan = _plan(candidate, cache)
    _lay_out(crate, plan)
    return cache / "target" / f"candle-{plan.candle}"


def tree_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of a crate's ``.rs`` and ``.toml`` files, without build outputs."""
    digest = hashlib.sha256()
    root = directory.expanduser()
    for path in sorted(_source_files(root), key=lambda path: path.relative_to(root).as_posix()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}:{content}\n".encode())
    return digest.hexdigest()


def _source_files(root: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(root):
        # CACHEDIR.TAG marks cargo's output under whatever name.
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not (Path(directory) / name / "CACHEDIR.TAG").exists()
        ]
        for name in files:
            path = Path(directory) / name
            if path.suffix in {".rs", ".toml"} and path.is_file():
                yield path


# --- what to build --------------------------------------------------------------------------------


def _plan(candidate: Candidate, cache: Path) -> _Plan:
    digest = revision = None
    if candidate.kind == "version":
        source = f'version = "={candidate.target}"'
        numbers = tuple(int(part) for part in re.split(r"[-+]", candidate.target)[0].split("."))
        candle = "0.11" if numbers >= _FIRST_ON_CANDLE_0_11 else "0.9"
        requirement = candle
    elif candidate.kind == "path":
        directory = Path(candidate.target).expanduser().resolve()
        if not (directory / "Cargo.toml").is_file():
            raise CandidateError(f"no Cargo.toml in {directory}: path: takes a checkout of candle-mi")
        # A JSON string is a TOML basic string: quotes and backslashes in a path survive.
        source = f"path = {json.dumps(str(directory))}"
        text = (directory / "Cargo.toml").read_text(encoding="utf-8")
        requirement, candle = _candle_of(text, str(directory))
        digest, revision = tree_digest(directory), None
    else:
        revision, text = _fetch(candidate, cache)
        source = f'git = {json.dumps(candidate.target)}, rev = "{revision}"'
        requirement, candle = _candle_of(text, candidate.spec)
    lock = EMITTER / "locks" / f"{candidate.target}.lock"
    locked = candidate.kind == "version" and lock.is_file()
    if not locked:
        lock = EMITTER / "locks" / _SEED_LOCK.get(candle, "none")
    return _Plan(
        manifest=_manifest(source, requirement),
        lock=lock.read_bytes() if lock.is_file() else b"",
        locked=locked,
        candle=candle,
        tree_digest=digest,
        revision=revision,
    )


def _candle_of(manifest: str, where: str) -> tuple[str, str]:
    """The candle-core requirement in a candle-mi manifest, and its major (``0.11``)."""
    try:
        parsed = tomllib.loads(manifest)
    except tomllib.TOMLDecodeError as error:
        raise CandidateError(f"Cargo.toml of {where} is not TOML: {error}") from error
    name = parsed.get("package", {}).get("name")
    if name != "candle-mi":
        raise CandidateError(f"Cargo.toml of {where} is of package {name!r}, expected candle-mi")
    entry = parsed.get("dependencies", {}).get("candle-core")
    requirement = entry.get("version") if isinstance(entry, dict) else entry
    found = re.search(r"\d+\.\d+", requirement) if isinstance(requirement, str) else None
    if not isinstance(requirement, str) or found is None:
        raise CandidateError(f"Cargo.toml of {where} names no candle-core version")
    return requirement, found.group()


def _manifest(source: str, candle: str) -> str:
    """The emitter's manifest with its three candle lines turned to the candidate."""
    text = (EMITTER / "Cargo.toml").read_text(encoding="utf-8")
    plain = f'{{ version = "{candle}", default-features = false }}'
    for name, value in {
        "candle-mi": f'{{ {source}, default-features = false, features = ["transformer", "sae"] }}',
        "candle-core": plain,
        "candle-nn": plain,
    }.items():
        # Not re.sub: a path may hold backslashes, which it would read as escapes.
        before, found, rest = text.partition(f"\n{name} = ")
        if not found:
            raise CandidateError(f"emitter/Cargo.toml has no line for {name}")
        text = f"{before}\n{name} = {value}\n{rest.partition(chr(10))[2]}"
    return text


def _fetch(candidate: Candidate, cache: Path) -> tuple[str, str]:
    """The commit that a ``git:`` candidate means, and the text of its ``Cargo.toml``."""
    mirror = cache / "git" / hashlib.sha256(candidate.target.encode()).hexdigest()[:16]
    mirror.parent.mkdir(parents=True, exist_ok=True)
    revision = candidate.revision or ""
    # A private repository is an error, not a question that no one sees.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}

    def git(*arguments: str, failing: type[CandidateError] = CandidateError, remedy: str = "") -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, env=environment)
        except FileNotFoundError:
            raise CandidateError("git is not on PATH: install it, or use path:DIR") from None
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise failing(f"{candidate.spec}: git says: {reason}{remedy}")
        return done.stdout.strip()

    def git_remote(*arguments: str) -> None:
        remedy = "; check the network and the URL, or use path:DIR"
        git(*arguments, failing=OutOfReachError, remedy=remedy)

    with FileLock(mirror.with_suffix(".lock")):
        if not mirror.is_dir():
            partial = mirror.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            git_remote("clone", "--quiet", "--mirror", "--", candidate.target, str(partial))
            durable.put(partial, mirror)
        else:
            # A branch moves; a full commit that is there needs no network.
            known = re.fullmatch(r"[0-9a-f]{40}", revision) and (
                subprocess.run(
                    ["git", "-C", str(mirror), "cat-file", "-e", revision], capture_output=True, check=False
                ).returncode
                == 0
            )
            if not known:
                git_remote("-C", str(mirror), "remote", "update", "--prune")
        commit = git("-C", str(mirror), "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
        commit = commit.splitlines()[-1]
        return commit, git("-C", str(mirror), "show", f"{commit}:Cargo.toml")


def _key(plan: _Plan, features: Sequence[str]) -> str:
    digest = hashlib.sha256()
    parts: list[tuple[str, bytes]] = [
        (path.relative_to(EMITTER).as_posix(), path.read_bytes()) for path in _emitter_sources()
    ]
    parts += [
        ("manifest", plan.manifest.encode()),
        ("lock", plan.lock),
        ("rustc", _rustc_version().encode()),
        # Flags such as target-cpu change the numbers.
        ("flags", os.environ.get("RUSTFLAGS", "").encode()),
        ("features", ",".join(sorted(features)).encode()),
        ("tree", (plan.tree_digest or "").encode()),
        ("revision", (plan.revision or "").encode()),
    ]
    for name, content in parts:
        digest.update(f"{name}:{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _emitter_sources() -> list[Path]:
    return [EMITTER / "build.rs", *sorted((EMITTER / "src").rglob("*.rs"))]


def _rustc_version() -> str:
    try:
        done = subprocess.run(["rustc", "-V"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise _no_rust("rustc") from None
    if done.returncode != 0:
        raise CandidateError(f"rustc -V failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip()


def _no_rust(program: str) -> CandidateError:
    return CandidateError(
        f"no {program} on PATH: install a Rust toolchain (cargo and rustc 1.91 or newer, see rustup.rs), "
        "or use stored:VERSION"
    )


# --- building it ----------------------------------------------------------------------------------


def _cargo_build(candidate: Candidate, plan: _Plan, cache: Path, log: Progress, features: Sequence[str]) -> Path:
    """Run cargo and return the binary it left in the shared target directory."""
    slug = re.sub(r"[^0-9A-Za-z.]+", "-", candidate.target)[-40:].strip("-")
    spelt = hashlib.sha256(f"{candidate.kind}:{candidate.target}:{plan.candle}".encode()).hexdigest()[:8]
    crate = cache / "crates" / f"{slug}-{spelt}"
    _lay_out(crate, plan)
    target = cache / "target" / f"candle-{plan.candle}"
    command = ["cargo", "build", "--release", "--manifest-path", str(crate / "Cargo.toml")]
    if plan.locked:
        command.append("--locked")
    if features:
        command += ["--features", ",".join(features)]
    environment = {
        **os.environ,
        "CARGO_TARGET_DIR": str(target),
        "CARGO_TERM_COLOR": "never",
        # The edit-and-run loop of a maintainer: the checkout and the emitter are compiled in part, the dependencies
        # are those of every candidate. A release is compiled whole, whatever the user's shell says.
        "CARGO_INCREMENTAL": "1" if candidate.kind == "path" else "0",
        "PARITY_TREE_DIGEST": plan.tree_digest or "",
        "PARITY_REVISION": plan.revision or "",
    }
    _distrust_times(target, "parity-emitter")
    if candidate.kind == "path":
        _distrust_times(target, "candle-mi")
    # A cross-compilation target set by the user would move the binary elsewhere.
    environment.pop("CARGO_BUILD_TARGET", None)
    full_log = crate / "build.log"
    try:
        code, lines = run_cargo(command, environment, full_log, log)
    except FileNotFoundError:
        raise _no_rust("cargo") from None
    if code != 0:
        reason = f"{condense(lines)} (full log: {full_log})"
        if _could_not_download(lines):
            said = f"cargo could not fetch what {candidate.label} needs; check the network, and run again"
            raise OutOfReachError(f"{said}: {reason}")
        raise CandidateError(f"cargo could not build the emitter for {candidate.label}: {reason}")
    suffix = ".exe" if os.name == "nt" else ""
    return target / "release" / f"parity-emitter{suffix}"


def _distrust_times(target: Path, package: str) -> None:
    """Have cargo compile a package whatever its files' times are.

    It takes a file for unchanged that is older than what was built, as one is that ``cp -p``, ``rsync`` or ``tar``
    put back, or that was written after the clock was set back: the text of before would be judged under the digest of
    now. rustc goes by contents, so it costs little.
    """
    for mark in (target / "release" / ".fingerprint").glob(f"{package}-*"):
        shutil.rmtree(mark)


def _lay_out(crate: Path, plan: _Plan) -> None:
    """Write the crate anew, also where it is already right.

    The target directory is shared, and cargo tells two crates of one name and version apart by their files' times
    alone: with an old time, what another candidate left there would pass for this one's.
    """
    (crate / "src").mkdir(parents=True, exist_ok=True)
    manifest, lock = crate / "Cargo.toml", crate / "Cargo.lock"
    # A lock that cargo resolved for this very manifest is kept: resolving again would need the network.
    resolved = manifest.is_file() and manifest.read_text(encoding="utf-8") == plan.manifest and lock.is_file()
    if plan.locked or not resolved:
        if plan.lock:
            lock.write_bytes(plan.lock)
        else:
            lock.unlink(missing_ok=True)
    if lock.is_file():
        os.utime(lock)
    sources = {path.relative_to(EMITTER): path for path in _emitter_sources()}
    for stale in (crate / "src").rglob("*.rs"):
        if stale.relative_to(crate) not in sources:
            stale.unlink()
    for relative, path in sources.items():
        (crate / relative).parent.mkdir(parents=True, exist_ok=True)
        (crate / relative).write_bytes(path.read_bytes())
    manifest.write_bytes(plan.manifest.encode())


def _could_not_download(lines: Sequence[str]) -> bool:
    """Whether cargo ended for want of the network; once anything failed to compile it did not."""
    text = "\n".join(lines)
    network = r"could not resolve host|failed to download|failed to fetch|download of .* failed|unable to update"
    return "could not compile" not in text and re.search(network, text, re.IGNORECASE) is not None


def _install(made: Path, binary: Path) -> None:
    """Copy beside the destination, then rename: a half-copied binary is never found under its name."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    partial = binary.with_name(f".{binary.name}.{os.getpid()}")
    try:
        shutil.copy2(made, partial)
        durable.put(partial, binary)
    finally:
        partial.unlink(missing_ok=True)


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


def _check_identity(candidate: Candidate, plan: _Plan, identity: dict[str, object]) -> None:
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
