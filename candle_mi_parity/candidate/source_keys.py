"""The keys of ``config.json`` and of an SAE's ``cfg.json`` that the candidate's own Rust source reads.

A record of what transformers reads lacks the keys and the defaults that only candle-mi has. The source is searched as
text: calls such as ``config.get("…")`` and ``get_f64_or(config, "…", 1e-5)`` on values that are declared as JSON, and
the fields of structs that serde reads.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from candle_mi_parity.candidate.build import crate_of
from candle_mi_parity.candidate.cargo import condense
from candle_mi_parity.candidate.spelling import Candidate
from candle_mi_parity.errors import ParityError

Default = bool | int | float | str
Keys = dict[str, set[Default]]
"""Key → the literal defaults that it is given; a key in an inner object is ``outer.key``."""

FEATURES = {"transformer", "sae", "rwkv"}
"""The features of candle-mi that read a config; modules for others are not searched."""
_OTHER_FILES = {"weight_map"}
"""Keys of ``model.safetensors.index.json``."""
_LITERAL = r'-?\d[\d_]*(?:\.[\d_]*)?(?:[eE][-+]?\d+)?|true|false|"[^"]*"|[A-Z][A-Z0-9_]+'
_READ = re.compile(
    r"""\b(?: (?P<value>\w+) \s* (?: \.(?:get|pointer)\(\s* | \[ ) "/?(?P<key>[\w/]+)"
    | get_\w+?(?P<or>_or)? \(\s* &?(?P<argument>\w+), \s* "(?P<argument_key>\w+)"
      (?(or),\s*(?P<default>[^,()]+?),?\s*\))? )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class SourceKeys:
    """The keys that a candidate reads.

    :ivar config: those of ``config.json``.
    :ivar sae: those of ``cfg.json``.
    :ivar rwkv: those of the ``config.json`` of a recurrent model.
    """

    config: Keys
    sae: Keys
    rwkv: Keys


def source_keys(candidate: Candidate, cache: Path) -> SourceKeys:
    """The keys that the source of a candidate reads.

    :raises ParityError: there is no source, or no key is found in it.
    """
    directory = source_directory(candidate, cache)
    found = keys_in({path.relative_to(directory): path.read_text("utf-8") for path in _compiled(directory)})
    if not found.config:
        raise ParityError(f"{directory}: no key of config.json was found in the source of {candidate.label}")
    return found


def source_directory(candidate: Candidate, cache: Path) -> Path:
    """The directory ``src`` of a candidate.

    :raises ParityError: the candidate has no source, or cargo does not find it.
    """
    if candidate.kind == "path":
        directory = Path(candidate.target).expanduser().resolve()
    elif candidate.kind in ("version", "git"):
        with tempfile.TemporaryDirectory() as crate:
            crate_of(candidate, cache, Path(crate))
            directory = _unpacked(candidate, Path(crate))
    else:
        raise ParityError(f"{candidate.spec} has no source: expected a version, path:DIR or git:URL@REV")
    if not (directory / "src" / "lib.rs").is_file():
        raise ParityError(f"no source of {candidate.label}: {directory}/src/lib.rs does not exist")
    return directory / "src"


def _unpacked(candidate: Candidate, crate: Path) -> Path:
    """Where cargo unpacked the candle-mi of a crate; it does so now if need be."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=crate, capture_output=True, text=True, check=False)

    try:
        # The crates of other platforms are not there after a build.
        host = run("rustc", "--print", "host-tuple").stdout.strip()
        metadata = ("cargo", "metadata", "--format-version", "1", "--filter-platform", host)
        done = run(*metadata, "--offline")
        if done.returncode:
            done = run(*metadata)
    except FileNotFoundError as error:
        raise ParityError(f"no {error.filename} on PATH: install a Rust toolchain") from None
    if done.returncode:
        raise ParityError(f"cargo finds no source of {candidate.label}: {condense(done.stderr.splitlines())}")
    packages = json.loads(done.stdout)["packages"]
    return next(Path(each["manifest_path"]).parent for each in packages if each["name"] == "candle-mi")


def _compiled(directory: Path) -> Iterator[Path]:
    """The files of a crate, without the modules of other features."""
    without = set()
    declared = r"#\[cfg\(([^\]]*)\)\]\s*(?:pub(?:\(\w+\))? )?mod (\w+);"
    for condition, module in re.findall(declared, (directory / "lib.rs").read_text("utf-8")):
        features = set(re.findall(r'feature = "(\w+)"', condition))
        if "test" in condition or (features and not features & FEATURES):
            without.add(module)
    for path in sorted(directory.rglob("*.rs")):
        if path.relative_to(directory).parts[0].removesuffix(".rs") not in without:
            yield path


def keys_in(files: Mapping[Path, str]) -> SourceKeys:
    """The keys that are read in Rust source.

    :param files: path relative to ``src`` → text. Files in ``sae/`` read ``cfg.json``, those in ``rwkv/`` the
        ``config.json`` of a recurrent model, and all others that of any other.
    """
    texts = {path: _code(text) for path, text in files.items()}
    named = rf"\b(?:const (\w+): [^=;]+ = |fn (\w+)\(\) -> [^{{]+\{{\s*)({_LITERAL})"
    constants = {each[1] or each[2]: each[3] for text in texts.values() for each in re.finditer(named, text)}
    found: dict[str, Keys] = {place: defaultdict(set) for place in ("config", "sae", "rwkv")}
    for path, text in texts.items():
        of_file = found[next((place for place in path.with_suffix("").parts if place in ("sae", "rwkv")), "config")]
        for key, default in [*_serde(text), *_calls(text)]:
            if key not in _OTHER_FILES:
                of_file[key] |= _value(constants.get(default, default))
    return SourceKeys(**{place: dict(sorted(keys.items())) for place, keys in found.items()})


def _code(text: str) -> str:
    """Source without comments and its tests."""
    text = re.split(r"#\[cfg\(test\)\]\s*mod \w+ \{", text)[0]
    return re.sub(r"^\s*//.*|\s//.*", "", text, flags=re.MULTILINE)


def _serde(text: str) -> Iterator[tuple[str, str]]:
    """The fields of structs for configurations, each with its default as source."""
    struct = r"#\[derive\([^\]]*\bDeserialize[^\]]*\)\][^{};]*?\bstruct \w*(?:Config|Cfg)\w*\s*\{(.*?)\n\}"
    for body in re.findall(struct, text, re.DOTALL):
        for notes, name, kind in re.findall(r"((?:#\[[^\]]*\]\s*)*)(?:pub(?:\(\w+\))? )?(\w+): ([^\n]+),", body):
            function = re.search(r'\bdefault = "(?:\w+::)*(\w+)"', notes)
            default = function[1] if function else "false" if "default" in notes and kind == "bool" else ""
            renamed = re.search(r'\brename = "([^"]+)"', notes)
            for key in [renamed[1] if renamed else name, *re.findall(r'\balias = "([^"]+)"', notes)]:
                yield key, default


def _calls(text: str) -> Iterator[tuple[str, str]]:
    """The keys that calls read, each with its default as source."""
    # Name of a value that is declared as JSON → where in the document it may be.
    places = {name: {""} for name in re.findall(r"\b(\w+): (?:Option<)?&?(?:serde_json::)?Value\b", text)}
    for name in places:  # a parameter `kwargs` is the field `activation_fn_kwargs`
        places[name] = {f"{other}." for other in places if other.endswith(f"_{name}")} or {""}
    for outer, argument in re.findall(r"\b(\w+)\s*\.and_then\(\|(\w+)\| \2\b", text):
        places.setdefault(argument, places.get(outer, set()))
    for read in _READ.finditer(text):
        inside = places.get(read["value"] or read["argument"], set())
        expression = text[read.start() : _end(text, read.start())]
        keys = {_key(each) for each in _READ.finditer(expression)}
        default = re.search(rf"\.unwrap_or\(({_LITERAL})\)|\.or\(Some\(({_LITERAL})\)\)", expression)
        literal = (default[1] or default[2]) if default else read["default"] or ""
        # The default of `a.get("x").or_else(|| a.get("y")).unwrap_or(1)` is that of both.
        yield from ((place + key, literal) for place in inside for key in (keys if default else {_key(read)}))
        bound = re.search(
            r"\blet (?:Some\()?(\w+)\)?(?:: [^=;]+)? = $", text[max(0, read.start() - 99) : read.start()]
        )
        if bound and inside:
            nested = {f"{place}{key}." for place in inside for key in keys}
            places[bound[1]] = places.get(bound[1], set()) - {""} | nested


def _key(read: re.Match[str]) -> str:
    return (read["key"] or read["argument_key"]).replace("/", ".")


def _end(text: str, start: int) -> int:
    """Where the expression that starts at a place ends."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if depth < 0 or (depth == 0 and text[at] in ",;"):
            return at
    return len(text)


def _value(source: str) -> set[Default]:
    """The value of a literal; nothing for any other expression."""
    if not re.fullmatch(_LITERAL, source) or source[0].isupper():
        return set()
    if source[0].isalpha() or source[0] == '"':
        return {json.loads(source)}
    number = source.replace("_", "")
    return {float(number) if re.search(r"[.eE]", number) else int(number)}
