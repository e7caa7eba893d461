"""Notes on a case, and whether the case has exercised anything."""

from __future__ import annotations

import json

from candle_mi_parity.compare.verdict import TOKENS, Status, TensorResult
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.versions import is_at_least, version
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.models.transformers_config import LEGACY_GELU
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.trace.trace import Emitted, Trace
from candle_mi_parity.trace.truth import Truth

SHOWN = 3
"""Number of names in a note."""
LONGEST = 2000
"""Characters of a list of ids in a message."""


def other_ids(subject: PreparedCase, ids: list[int]) -> TensorResult | None:
    """The failure of a tokenizer that gives other ids than transformers; None where they are equal."""
    expected = subject.tokens[0]
    if ids == expected:
        return None
    pairs = enumerate(zip(ids, expected, strict=False))
    place = next((i for i, (one, other) in pairs if one != other), min(len(ids), len(expected)))
    message = f"candle-mi's tokenizer gives other ids from place {place} on: got {one_line(str(ids), LONGEST)}"
    message += f", transformers gives {one_line(str(expected), LONGEST)}{_by_settings(subject, ids)}"
    return TensorResult(TOKENS, Status.FAIL, "values", compared=len(expected), exact=True, detail=message)


def _by_settings(subject: PreparedCase, ids: list[int]) -> str:
    """That ids are those of ``tokenizer.json`` with its own truncation or padding; empty if they are not."""
    path, text = subject.model_dir / "tokenizer.json", subject.case.text
    if text is None or not path.is_file():
        return ""
    import tokenizers

    written = tokenizers.Tokenizer.from_file(str(path))
    on = [name for name in ("truncation", "padding") if getattr(written, name) is not None]
    if not on or written.encode(text).ids != ids:
        return ""
    return (
        f"; candle-mi obeys the {' and '.join(on)} of tokenizer.json, which transformers does only if it is asked: "
        "set it to null in a copy of the file (CMI230)"
    )


def truncation_notes(subject: PreparedCase) -> list[str]:
    """A note where ``tokenizer.json`` has a truncation, which a longer text would show."""
    path = subject.model_dir / "tokenizer.json"
    if not path.is_file() or not isinstance(found := json.loads(path.read_bytes()).get("truncation"), dict):
        return []
    return [
        f"not exercised: tokenizer.json truncates to {one_line(str(found.get('max_length')))} tokens; candle-mi "
        "obeys it, so that a longer text loses a part without a word, and transformers does not (CMI230)"
    ]


def padding_notes(subject: PreparedCase) -> list[str]:
    """A note where a prompt begins or ends with the padding id, which is not masked on either side."""
    pad = subject.special.pad
    if pad is None:
        return []
    left = [_run(row, pad, subject.special.bos) for row in subject.tokens]
    right = [_run(row[::-1], pad, subject.special.eos) for row in subject.tokens]
    places = [f"{max(runs)} at the {side}" for side, runs in (("left", left), ("right", right)) if any(runs)]
    if not places:
        return []
    return [
        f"the prompt holds the padding id {pad} ({', '.join(places)}) as plain tokens: candle-mi takes no attention "
        "mask, so that on both sides every query attends to them"
    ]


def version_notes(subject: PreparedCase) -> list[str]:
    """A note where the installed transformers by itself computes something else than a later one."""
    config = read_config(subject.model_dir)
    if (config.get("model_type"), config.get("hidden_act")) != LEGACY_GELU or is_at_least("transformers", 5, 24):
        return []
    return [
        f"transformers {version('transformers')} by itself computes the exact gelu for this Gemma config; compared "
        "is the tanh approximation, which Gemma's releases mean by gelu and transformers 5.24 computes"
    ]


def absent_notes(trace: Emitted) -> list[str]:
    """A note for each reason why hook points are not compared: a program may say that it does not have them."""
    absent = trace.document.absent if isinstance(trace, Trace) else {}
    notes = []
    for why in sorted(set(absent.values())):
        names = [name for name in absent if absent[name] == why]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        notes.append(f"not compared: {', '.join(names[:SHOWN])}{more}: {why}")
    return notes


def edits_before(first: TensorResult | None, subject: PreparedCase) -> list[str]:
    """The edits of a case that stand before its first diverging tensor: ``zero at blocks.0.hook_mlp_out``.

    An edit acts after the tensor at its own hook was captured.
    """
    order = subject.captures
    end = order.index(first.name) if first is not None and first.name in order else len(order)
    return [f"{edit.kind} at {edit.hook}" for edit in subject.case.edits if order.index(edit.hook) < end]


def _run(row: list[int], pad: int, own: int | None) -> int:
    """Number of padding ids at the start of a row; one less where the id is the BOS or EOS too."""
    run = next((place for place, token in enumerate(row) if token != pad), len(row))
    return run - 1 if run and pad == own else run


def truth_notes(truth: Truth, case: Case) -> list[str]:
    """Notes on ignored tensors of the files, and on constant tensors of the truth."""
    notes = []
    if truth.ignored:
        notes.append(
            f"transformers ignores {_names(truth.ignored)} in the files: the truth does not depend on "
            f"{'it' if len(truth.ignored) == 1 else 'them'}"
        )
    if truth.constant and not case.changed:  # an edit may intend it
        verb = "is" if len(truth.constant) == 1 else "are"
        notes.append(f"not exercised: {_names(list(truth.constant))} {verb} {_everywhere(truth)}")
    return notes


def unexercised(truth: Truth) -> str:
    """Why a case measures nothing: half of its tensors are constant, or no feature of its SAE fires; or empty."""
    if 2 * len(truth.constant) >= len(truth.tensors):
        return (
            f"{len(truth.constant)} of {len(truth.tensors)} tensors are {_everywhere(truth)}: nothing was exercised"
        )
    silent = [name for name in truth.sae if truth.constant.get(f"{name}.features") == 0]
    return "no feature of the SAE fires at any position: it was not exercised" if "sae" in silent else ""


def _everywhere(truth: Truth) -> str:
    return "0 everywhere" if not any(truth.constant.values()) else "one number everywhere"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return one_line(", ".join(names[:SHOWN])) + more
