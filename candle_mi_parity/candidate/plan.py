"""What is built for a candidate: the versions of candle-mi and candle, the lock, and the downloader.

:func:`lay_out` writes a plan as a crate: the emitter's source with its own manifest. candle-mi's downloader,
hf-fetch-model, is replaced by the stand-in in ``emitter/hf-fetch-model``, because the emitter downloads nothing and
half of all crates belong to the downloader; candle-mi itself is not changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from candle_mi_parity.candidate.checkout import fetch, tree_digest
from candle_mi_parity.candidate.parts import PARTS, SWITCHED, absent_parts
from candle_mi_parity.candidate.spelling import Candidate, CandidateError
from candle_mi_parity.files.atomic import write_text
from candle_mi_parity.spec.paths import EMITTER

DOWNLOADER = "hf-fetch-model"
ANY = "*"
"""The requirement of anamnesis for a release, whose lock holds the one that it is linked with."""
COUNTING = EMITTER / "counting.sh"
"""The wrapper of rustc for a build that counts branches."""

# The first release on each pair of candle and hf-fetch-model, newest first.
_DEPENDENCIES = (
    ((0, 1, 24), "0.11", "0.12"),
    ((0, 1, 20), "0.11", "0.11"),
    ((0, 1, 19), "0.11", "0.10"),
    ((0, 1, 11), "0.9", "0.10"),
    ((0, 1, 9), "0.9", "0.9"),
    ((0, 1, 5), "0.9", "=0.9.5"),  # hf-fetch-model 0.9.6 changed a signature
    ((0, 0, 0), "0.9", "0.7"),
)

# The first release with a feature of candle-mi; the others are as old as candle-mi.
_FIRST_WITH = {
    "mmap": (0, 0, 2),
    "rwkv": (0, 0, 3),
    "stoicheia": (0, 1, 8),
    "quantized": (0, 1, 13),
    "diffusion": (0, 1, 14),
    "training": (0, 1, 21),
    "fused-attn": (0, 2, 2),
}

# The lock from which a candidate without its own lock starts, by candle series: tested versions, not the newest.
_SEED_LOCK = {"0.9": "0.1.10.lock", "0.11": "0.2.2.lock"}


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is built.

    :ivar manifest: the emitter's ``Cargo.toml``; it names the stand-in by its path beside the emitter.
    :ivar locked: whether ``lock`` belongs to this candidate.
    :ivar candle: the series, such as ``0.11``.
    :ivar downloader: the version of the stand-in; ``None`` if the real downloader is built.
    :ivar absent: the emitter's parts and lanes for which the candidate has no feature.
    :ivar counted: whether candle-mi counts the branches that it takes, see :mod:`branches`.
    """

    manifest: str
    lock: bytes
    locked: bool
    candle: str
    downloader: str | None
    tree_digest: str | None
    revision: str | None
    absent: tuple[str, ...] = ()
    counted: bool = False

    @property
    def features(self) -> list[str]:
        """The features of candle-mi in a build in which every part compiles, without those of lanes."""
        return ["transformer", *(SWITCHED[part] for part in self.parts if part in SWITCHED)]

    @property
    def parts(self) -> list[str]:
        """The emitter's parts that are built where they compile."""
        return [part for part in PARTS if part not in self.absent]


def plan_of(candidate: Candidate, cache: Path) -> Plan:
    """Decide what to build.

    :raises CandidateError: the candidate's source does not hold candle-mi.
    """
    digest = revision = None
    anamnesis = ANY
    if candidate.kind == "version":
        source = f'version = "={candidate.target}"'
        numbers = _numbers(candidate.target)
        candle, downloader = _dependencies_of(numbers)
        absent = absent_parts(lambda feature: numbers >= _FIRST_WITH.get(feature, ()))
        requirement = candle
    elif candidate.kind == "path":
        directory = Path(candidate.target).expanduser().resolve()
        if not (directory / "Cargo.toml").is_file():
            raise CandidateError(f"no Cargo.toml in {directory}: path: takes a checkout of candle-mi")
        # A JSON string is a TOML basic string, which escapes quotes and backslashes.
        source = f"path = {json.dumps(str(directory))}"
        text = (directory / "Cargo.toml").read_text(encoding="utf-8")
        requirement, candle, downloader, absent, anamnesis = _read_manifest(text, str(directory))
        digest = tree_digest(directory, inputs_of(candidate, cache))
    else:
        revision, text = fetch(candidate, cache)
        source = f'git = {json.dumps(_url(candidate.target))}, rev = "{revision}"'
        requirement, candle, downloader, absent, anamnesis = _read_manifest(text, candidate.spec)
    lock = EMITTER / "locks" / f"{candidate.target}.lock"
    locked = candidate.kind == "version" and lock.is_file()
    if not locked:
        lock = EMITTER / "locks" / _SEED_LOCK.get(candle, "none")
    plan = Plan(
        manifest=_manifest(source, requirement, absent, anamnesis),
        lock=lock.read_bytes() if lock.is_file() else b"",
        locked=locked,
        candle=candle,
        downloader=downloader,
        tree_digest=digest,
        revision=revision,
        absent=absent,
    )
    return plan if downloader else with_real_downloader(plan)


def crate_directory(candidate: Candidate, cache: Path) -> Path:
    """Where the emitter's crate is laid out: one place a spelling, so that ``path:`` builds are incremental."""
    slug = re.sub(r"[^0-9A-Za-z.]+", "-", candidate.target)[-40:].strip("-")
    spelt = hashlib.sha256(f"{candidate.kind}:{candidate.target}".encode()).hexdigest()[:8]
    return cache / "crates" / f"{slug}-{spelt}"


def inputs_of(candidate: Candidate, cache: Path) -> Path:
    """The file that lists what the builds of a checkout read."""
    return crate_directory(candidate, cache) / "inputs.txt"


def with_real_downloader(plan: Plan) -> Plan:
    """The plan without the stand-in."""
    if plan.downloader is None:
        return plan
    return replace(plan, manifest=_with_line(plan.manifest, DOWNLOADER, ""), downloader=None)


def known_releases() -> list[str]:
    """The releases with a lock, oldest first."""
    return sorted((path.stem for path in (EMITTER / "locks").glob("*.lock")), key=_numbers)


def emitter_sources() -> list[Path]:
    """The source files of the emitter."""
    return [EMITTER / "build.rs", *sorted((EMITTER / "src").rglob("*.rs"))]


def _url(repository: str) -> str:
    """A repository as a URL for cargo; git also accepts a directory and ``git@host:path``."""
    if "://" in repository:
        return repository
    short = re.fullmatch(r"([^/:]+@[^/:]+):(.+)", repository)
    return f"ssh://{short[1]}/{short[2]}" if short else Path(repository).expanduser().resolve().as_uri()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.split(r"[-+]", version)[0].split("."))


def _dependencies_of(numbers: tuple[int, ...]) -> tuple[str, str]:
    """The series of candle and the version of the stand-in for a release."""
    candle, series = next((candle, series) for first, candle, series in _DEPENDENCIES if numbers >= first)
    return candle, _stand_in_version(series)


def _stand_in_version(requirement: str) -> str:
    """A version that satisfies a requirement such as ``0.12.3``."""
    found = re.match(r"\s*(=?)[\^~>=]*\s*(\d+\.\d+)(\.\d+)?", requirement)
    if found is None:
        return ""
    exactly, series, patch = found.groups()
    return f"{series}{patch or '.0'}" if exactly else f"{series}.999"


def _read_manifest(manifest: str, where: str) -> tuple[str, str, str, tuple[str, ...], str]:
    """What a candle-mi manifest says.

    :returns: the candle-core requirement, its series (``0.11``), the stand-in's version, the absent parts, and
        the anamnesis requirement.
    """
    try:
        parsed = tomllib.loads(manifest)
    except tomllib.TOMLDecodeError as error:
        raise CandidateError(f"Cargo.toml of {where} is not TOML: {error}") from error
    name = parsed.get("package", {}).get("name")
    if name != "candle-mi":
        raise CandidateError(f"Cargo.toml of {where} is of package {name!r}, expected candle-mi")
    requirement = _requirement(parsed, "candle-core")
    found = re.search(r"\d+\.\d+", requirement)
    if found is None:
        raise CandidateError(f"Cargo.toml of {where} names no candle-core version")
    features = parsed.get("features", {})
    absent = absent_parts(lambda feature: feature in features)
    stand_in = _stand_in_version(_requirement(parsed, DOWNLOADER))
    return requirement, found.group(), stand_in, absent, _requirement(parsed, "anamnesis") or ANY


def _requirement(manifest: dict[str, object], dependency: str) -> str:
    dependencies = manifest.get("dependencies")
    entry = dependencies.get(dependency) if isinstance(dependencies, dict) else None
    requirement = entry.get("version") if isinstance(entry, dict) else entry
    return requirement if isinstance(requirement, str) else ""


def _manifest(source: str, candle: str, absent: Collection[str], anamnesis: str) -> str:
    """The emitter's manifest with the candidate's versions of candle-mi, candle-core and candle-nn.

    :param absent: parts that switch on no feature of this candle-mi.
    """
    text = (EMITTER / "Cargo.toml").read_text(encoding="utf-8")
    plain = f'{{ version = "{candle}", default-features = false }}'
    for name, value in {
        "candle-mi": f'{{ {source}, default-features = false, features = ["transformer"] }}',
        "candle-core": plain,
        "candle-nn": plain,
        "anamnesis": f'{{ version = "{anamnesis}", default-features = false, optional = true }}',
    }.items():
        text = _with_line(text, name, f"{name} = {value}")
    if absent:
        # cargo refuses a manifest with a feature that the dependency does not have, also where it is not asked for.
        text = _with_line(text, "default", f"default = {json.dumps([part for part in PARTS if part not in absent])}")
        for part in (part for part in absent if part in SWITCHED):
            text = _with_line(text, part, f"{part} = []")
    return text


def _with_line(manifest: str, name: str, line: str) -> str:
    """A manifest with the line of ``name`` replaced."""
    # re.sub would interpret backslashes in a path.
    before, found, rest = manifest.partition(f"\n{name} = ")
    if not found:
        raise CandidateError(f"emitter/Cargo.toml has no line for {name}")
    return f"{before}\n{line}\n{rest.partition(chr(10))[2]}"


# --- on disk --------------------------------------------------------------------------------------


def lay_out(crate: Path, plan: Plan, cache: Path) -> None:
    """Write the crate of a plan, with new modification times even if it is unchanged.

    The target directory is shared, and cargo distinguishes two crates of one name and version only by these times.
    """
    (crate / "src").mkdir(parents=True, exist_ok=True)
    text = plan.manifest
    if plan.downloader is not None:
        place = f"{DOWNLOADER} = {{ path = {json.dumps(str(_stand_in(plan.downloader, cache)))} }}"
        text = _with_line(text, DOWNLOADER, place)
    manifest, lock = crate / "Cargo.toml", crate / "Cargo.lock"
    # A lock that cargo resolved for this manifest is kept, because resolving again needs the network.
    resolved = manifest.is_file() and manifest.read_text(encoding="utf-8") == text and lock.is_file()
    if plan.locked or not resolved:
        if plan.lock:
            lock.write_bytes(plan.lock)
        else:
            lock.unlink(missing_ok=True)
    if lock.is_file():
        os.utime(lock)
    sources = {path.relative_to(EMITTER): path for path in emitter_sources()}
    for stale in (crate / "src").rglob("*.rs"):
        if stale.relative_to(crate) not in sources:
            stale.unlink()
    for relative, path in sources.items():
        (crate / relative).parent.mkdir(parents=True, exist_ok=True)
        (crate / relative).write_bytes(path.read_bytes())
    manifest.write_bytes(text.encode())


def stand_in_files(version: str) -> dict[str, str]:
    """The files of the stand-in crate with a version: path → text."""
    home = EMITTER / DOWNLOADER
    manifest = _with_line((home / "Cargo.toml").read_text(encoding="utf-8"), "version", f'version = "{version}"')
    sources = {name: (home / name).read_text(encoding="utf-8") for name in ("build.rs", "src/lib.rs")}
    return {"Cargo.toml": manifest, **sources}


def _stand_in(version: str, cache: Path) -> Path:
    """The directory of the stand-in, keyed by content and shared by all candidates."""
    files = stand_in_files(version)
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]
    home = cache / "crates" / f"{DOWNLOADER}-{version}-{digest}"
    for name, text in files.items():
        if not (home / name).is_file():
            write_text(text, home / name)
    return home
