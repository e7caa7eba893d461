"""The public functions of a release of candle-mi, as rustdoc documents them.

``fixtures/api/<version>.json`` holds them, so that the ledger's check needs no Rust; :mod:`api_rustdoc` makes it.
An item is called by the path under which it is documented below the crate, ``sae::SparseAutoencoder::encode``.
Counted are free functions, methods of public types, methods of public traits, and methods by which a public type
implements a trait, of candle-mi or of another crate; not those that the compiler derives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.cases import Row
from candle_mi_parity.spec.paths import FIXTURES

RELEASES = ("0.1.6", "0.1.10", "0.1.24", "0.2.2")

RUSTDOC_FORMATS = frozenset({57})
"""``format_version`` of the JSON that the walk below was checked against (rustdoc 1.95)."""


class ApiError(ParityError):
    """The public functions cannot be listed, or ``fixtures/api.toml`` is malformed."""


class RustdocFormatError(ApiError):
    """The toolchain's rustdoc writes JSON of a format that the walk was not checked against."""


class Surface(Row):
    """What one release offers under its features ``transformer`` and ``sae``.

    :ivar items: documented path → signature.
    """

    format: Literal[1]
    version: str
    items: dict[str, str]


def load_surface(version: str, directory: Path = FIXTURES / "api") -> Surface:
    """The recorded functions of a release.

    :raises ApiError: not recorded, unreadable, or recorded of another release.
    """
    path = directory / f"{version}.json"
    try:
        surface = Surface.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise ApiError(f"{path}: {str(error).splitlines()[0]}") from error
    if surface.version != version or not surface.items:
        raise ApiError(f"{path} holds {len(surface.items)} functions of {surface.version}, not those of {version}")
    return surface


def save_surface(surface: Surface, directory: Path = FIXTURES / "api") -> Path:
    """Write a release's record, one function a line so that a diff of two releases reads."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{surface.version}.json"
    content = {**surface.model_dump(), "items": dict(sorted(surface.items.items()))}
    path.write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def public_functions(doc: dict[str, Any]) -> dict[str, str]:
    """Documented path → signature of every public function in rustdoc's JSON of a crate.

    :raises RustdocFormatError: another format than those known here.
    :raises ApiError: the JSON lacks what the walk needs, or two functions are documented under one path.
    """
    if doc.get("format_version") not in RUSTDOC_FORMATS:
        # In another format an item may have another name for its kind, and would be passed over in silence.
        known = ", ".join(map(str, sorted(RUSTDOC_FORMATS)))
        raise RustdocFormatError(
            f"rustdoc's JSON is of format {doc.get('format_version')}, known: {known} (rustc 1.95)"
        )
    walk = _Walk(doc)
    try:
        walk.module(doc["root"], ())
    except (KeyError, TypeError) as error:
        raise ApiError(f"rustdoc's JSON, format {doc.get('format_version')}, lacks {error}") from error
    return walk.found


class _Walk:
    """From the crate's root through public modules; where an item is defined goes before where it is re-exported."""

    def __init__(self, doc: dict[str, Any]) -> None:
        self.index = doc["index"]
        self.found: dict[str, str] = {}
        self.seen: set[int] = set()

    def module(self, identity: int, path: tuple[str, ...]) -> None:
        items = self._items(self.index[str(identity)]["inner"]["module"]["items"])
        reexports = [item for item in items if "use" in item["inner"]]
        for item in items:
            if item["visibility"] == "public" and "use" not in item["inner"]:
                self._item(item, path, item["name"])
        for item in reexports:
            use = item["inner"]["use"]
            # Without a target in the index it is another crate's.
            target = self.index.get(str(use["id"]))
            if item["visibility"] != "public" or target is None:
                continue
            if use["is_glob"]:
                self.module(target["id"], path)
            else:
                self._item(target, path, use["name"])

    def _items(self, identities: list[int]) -> list[dict[str, Any]]:
        return [self.index[str(identity)] for identity in identities if str(identity) in self.index]

    def _item(self, item: dict[str, Any], path: tuple[str, ...], name: str) -> None:
        if item["id"] in self.seen:
            return
        self.seen.add(item["id"])
        inner, here = item["inner"], (*path, name)
        if "module" in inner:
            self.module(item["id"], here)
        elif "function" in inner:
            self._add(here, inner["function"])
        elif "trait" in inner:
            for member in self._items(inner["trait"]["items"]):
                if "function" in member["inner"]:
                    self._add((*here, member["name"]), member["inner"]["function"])
        else:
            kind = next((kind for kind in ("struct", "enum", "union") if kind in inner), None)
            for impl in self._items(inner[kind]["impls"]) if kind else []:
                # rustdoc lists `impl From<A> for B` under A too.
                if impl["inner"]["impl"]["for"].get("resolved_path", {}).get("id") == item["id"]:
                    self._impl(impl, here)

    def _impl(self, item: dict[str, Any], path: tuple[str, ...]) -> None:
        impl = item["inner"]["impl"]
        derived = "automatically_derived" in json.dumps(item["attrs"])
        if impl["is_synthetic"] or impl["blanket_impl"] or derived:
            return
        trait = impl["trait"]
        for member in self._items(impl["items"]):
            if "function" not in member["inner"] or (trait is None and member["visibility"] != "public"):
                continue
            # As Rust spells a method of a trait: two traits may have one of the same name.
            via = () if trait is None else (f"<{trait['path'].rpartition('::')[2]}{_generics(trait['args'])}>",)
            self._add((*path, *via, member["name"]), member["inner"]["function"])

    def _add(self, path: tuple[str, ...], function: dict[str, Any]) -> None:
        name = "::".join(path)
        if name in self.found:
            raise ApiError(f"two public functions are documented as {name}")
        signature = function["sig"]
        inputs = ", ".join(f"{name}: {_type(kind)}" for name, kind in signature["inputs"])
        output = f" -> {_type(signature['output'])}" if signature["output"] is not None else ""
        self.found[name] = f"fn({inputs}){output}"


def _generics(arguments: dict[str, Any] | None) -> str:
    if not arguments or "angle_bracketed" not in arguments:
        return ""
    given = arguments["angle_bracketed"]["args"]
    kinds = [_type(argument["type"]) for argument in given if isinstance(argument, dict) and "type" in argument]
    return f"<{', '.join(kinds)}>" if kinds else ""


def _type(kind: dict[str, Any]) -> str:
    """A type as Rust spells it, without lifetimes and bounds."""
    name, inner = next(iter(kind.items()))
    if name == "resolved_path":
        return f"{inner['path'].rpartition('::')[2]}{_generics(inner['args'])}"
    if name in ("primitive", "generic"):
        return str(inner)
    if name == "borrowed_ref":
        return f"&{'mut ' if inner['is_mutable'] else ''}{_type(inner['type'])}"
    if name == "tuple":
        return f"({', '.join(_type(member) for member in inner)})"
    if name == "slice":
        return f"[{_type(inner)}]"
    if name == "array":
        return f"[{_type(inner['type'])}; {inner['len']}]"
    if name == "dyn_trait":
        return "dyn " + " + ".join(str(bound["trait"]["path"]).rpartition("::")[2] for bound in inner["traits"])
    if name == "impl_trait":
        paths = [bound["trait_bound"]["trait"] for bound in inner if "trait_bound" in bound]
        return "impl " + " + ".join(path["path"].rpartition("::")[2] + _generics(path["args"]) for path in paths)
    if name == "qualified_path":
        return f"{_type(inner['self_type'])}::{inner['name']}"
    raise ApiError(f"rustdoc's JSON has a type of a kind that is unknown here: {name}")
