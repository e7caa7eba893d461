"""Stored releases: an index, and beside it ``traces/`` with the files that the index names by their digests.

The name of a file in ``traces/`` holds the first twelve digits of its sha256, so that releases share equal files. The
index says which candle-mi wrote them. ``docs/stored-traces.md`` describes the format.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.untrusted import MAX_JSON_BYTES, read_bytes, read_json, read_object, validated
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import CandleMi, Digest, MadeBy, Part, Text, Trace

Short = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class Refusal(Part):
    """Stored in place of a trace if candle-mi refused the case.

    :ivar case: the digest of the case.
    """

    kind: str
    error: str
    case: Digest


class StoredCase(Part):
    """The outcomes of one case.

    :ivar text: digest of the token ids of the case's text.
    """

    free: Short | Refusal | None = None
    forced: Short | Refusal | None = None
    text: Short | None = None


class Release(Part):
    """The index.

    :ivar emitter: as in a trace's header, like ``candle`` and ``features``; empty if no case has a trace.
    :ivar calls: digest of the answers to direct calls.
    :ivar tokens: digest of the tokenised corpus.
    """

    format: Literal["candle-mi-parity/release/1"] = "candle-mi-parity/release/1"
    candle_mi: CandleMi
    emitter: Text = ""
    candle: Text = ""
    features: list[Text] = Field(default_factory=list)
    calls: Short | None = None
    tokens: Short | None = None
    cases: dict[Text, StoredCase] = Field(default_factory=dict)

    def text(self) -> str:
        """The JSON, with one line per case."""
        cases = {name: stored.model_dump(exclude_none=True) for name, stored in sorted(self.cases.items())}
        return readable(self.model_dump(exclude={"cases"}) | {"cases": cases})

    def files(self) -> list[str]:
        """The names of the files in ``traces/`` that belong to this index."""
        named: list[tuple[str, str | Refusal | None]] = [("calls", self.calls), ("tokens", self.tokens)]
        for case, stored in self.cases.items():
            named += [(trace_name(case, "free"), stored.free), (trace_name(case, "forced"), stored.forced)]
            named.append((text_name(case), stored.text))
        return [f"{name}.{digest}.json" for name, digest in named if isinstance(digest, str)]


def trace_name(case: str, mode: Mode) -> str:
    """The file name of a case's trace without its digest."""
    return f"{case}{'' if mode == 'free' else '.forced'}"


def text_name(case: str) -> str:
    """The file name of the ids of a case's text without their digest."""
    return f"{case}.tokens"


class StoredRelease:
    """A stored release, opened.

    :raises TraceError: the index cannot be read or does not match the schema.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        self.release = validated(Release, read_json(index, TraceError), index, TraceError)

    @property
    def traces(self) -> Path:
        return self.index.parent / "traces"

    def file(self, name: str, digest: str) -> Path:
        """The path of a file that the index names.

        :raises TraceError: it is absent, a link out of the directory, or has another digest.
        """
        path = self.traces / f"{name}.{digest}.json"
        if not path.resolve().is_relative_to(self.traces.resolve()):
            raise TraceError(f"{path} is a link that leads out of {self.traces}; it is not followed")
        try:
            found = short_digest(read_bytes(path, MAX_JSON_BYTES))
        except (OSError, ValueError) as error:
            raise TraceError(f"{path}, which {self.index} names, cannot be read: {one_line(str(error))}") from error
        if found != digest:
            raise TraceError(f"{path}: its bytes have sha256 {found}…, and {self.index} names {digest}…")
        return path

    def document(self, name: str, digest: str, *fields: str) -> dict[str, Any]:
        """The content of a file that the index names, completed by fields of the index.

        :raises TraceError: see :meth:`file`.
        """
        return self.release.model_dump(include=set(fields)) | read_object(self.file(name, digest), TraceError)

    def trace(self, case: str, mode: Mode) -> Trace | Refusal | None:
        """The outcome of a case, or None if none is stored.

        :raises TraceError: see :meth:`file`, or the file is not a trace.
        """
        found = getattr(self.release.cases.get(case), mode, None)
        if not isinstance(found, str):
            return found
        given = self.release.model_dump(include=set(MadeBy.model_fields))
        return Trace(self.file(trace_name(case, mode), found), given)


def short_digest(content: bytes) -> str:
    """The digest as it occurs in a file name."""
    return hashlib.sha256(content).hexdigest()[:12]


def readable(document: dict[str, Any]) -> str:
    """JSON with one line per key, and per item of a list or mapping of objects, which gives readable diffs."""

    def text(value: Any) -> str:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not items or not all(isinstance(item, dict) for item in items):
            return json.dumps(value, allow_nan=False)
        if isinstance(value, dict):
            return _block("{}", [f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()], " ")
        return _block("[]", [f"  {json.dumps(item, allow_nan=False)}" for item in value], " ")

    return _block("{}", [f" {json.dumps(key)}: {text(value)}" for key, value in document.items()], "") + "\n"


def _block(brackets: str, lines: list[str], indent: str) -> str:
    return ",\n".join(lines).join((f"{brackets[0]}\n", f"\n{indent}{brackets[1]}"))
