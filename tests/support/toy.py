"""A toy emitter in this process, for the other forwards of a case: honest, or with a fault from its past."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from candle_mi_parity.candidate.build import BuiltEmitter
from candle_mi_parity.candidate.sources import LiveSource, Made
from candle_mi_parity.compare.run_result import Section
from candle_mi_parity.coverage.forwards import judge_forwards
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.trace.trace import FORMAT, Header
from tests.support.planting import RELEASE

HOOKS = ["hook_embed", "blocks.0.attn.hook_q", "hook_final_norm"]
IDS = [[4, 9, 2]]
LLAMA = next(case for case in load_cases() if case.id == "llama/hub")


@dataclass(frozen=True)
class Call:
    """One forward of the toy.

    :ivar past: the forwards since the model was loaded.
    """

    ids: list[list[int]]
    captures: list[str]
    edited: bool
    loads: int
    requests: int
    starts: int
    past: list[Call] = field(default_factory=list)


Fault = Callable[[Call], bool]


class Toy:
    """An emitter in this process, whose tensors follow from ids and edits, and under a fault from its past.

    :ivar tensor: the tensor that is wrong where ``fault`` says so.
    :ivar spoil: changes the document before it is written.
    """

    def __init__(self, fault: Fault = lambda call: False, tensor: str = "logits") -> None:
        self.fault, self.tensor = fault, tensor
        self.spoil: Callable[[dict[str, Any]], object] = lambda document: None
        self.starts = 0
        self.restart()

    def restart(self) -> None:
        self.starts, self.requests, self.loads, self.past = self.starts + 1, 0, 0, list[Call]()

    def tensors(self, call: Call, hooks: list[str]) -> dict[str, np.ndarray]:
        ids = np.array(call.ids, np.float32)[..., None]
        found = {name: np.sin(ids * (len(name) + np.arange(1, 9, dtype=np.float32))) for name in hooks}
        found["logits"] = np.cumsum(np.cos(ids * np.arange(1, 7, dtype=np.float32)), 1) * (0.5 if call.edited else 1)
        if self.fault(call) and self.tensor in found:
            found[self.tensor][0, -1, 2] += 1
        return found

    def emit(self, request: Mapping[str, Any], timeout: float) -> Path:
        rows: list[dict[str, object]] = []
        held: dict[str, dict[str, object]] = {}
        self.requests += 1
        for row in request["forwards"]:
            if row["anew"] or not self.loads:
                self.loads, self.past = self.loads + 1, []
            ids, edited = row["tokens"] or request["tokens"], row["edited"] and bool(request["edits"])
            call = Call(ids, row["captures"], edited, self.loads, self.requests, self.starts, list(self.past))
            self.past.append(call)
            found = self.tensors(call, row["captures"])
            digests = {name: sha(array) for name, array in found.items()}
            logits = digests.pop("logits")
            rows.append({"name": row["name"], "logits": logits, "captures": digests, "error": None})
            if logits not in request["known"]:
                held.setdefault(logits, entry(row["name"], found["logits"]))
        document: dict[str, Any] = {"format": "candle-mi-parity/forwards/1", "header": header(request["case"]["id"])}
        document |= {"forwards": rows, "tensors": list(held.values())}
        self.spoil(document)
        out = Path(request["out"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document))
        return out


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def entry(name: str, array: np.ndarray) -> dict[str, object]:
    values = array.ravel().tolist()
    return {
        "name": name, "shape": list(array.shape), "dtype": "float32", "sha256": sha(array), "nonfinite": 0,
        "values": values,
    }  # fmt: skip


def header(id: str) -> dict[str, Any]:
    return {
        "emitter": "0.1.0", "candle_mi": RELEASE.model_dump(), "candle": "0.11.1", "features": ["transformer"],
        "device": "cpu", "dtype": "float32", "case": {"id": id, "digest": "c" * 64}, "model_digest": "d" * 64,
        "sae_digest": None, "inputs_digest": None,
    }  # fmt: skip


def made(directory: Path, id: str = "toy/plain", edits: tuple[Edit, ...] = (), ids: list[list[int]] = IDS) -> Made:
    """The honest trace of a case, on disk."""
    case = LLAMA.model_copy(update={"id": id, "edits": list(edits)})
    subject = PreparedCase(case, directory, "toy", ids, HOOKS, None, "d" * 64, None, "c" * 64)
    call = Call(ids, HOOKS, bool(edits), 1, 1, 1)
    found = Toy().tensors(call, HOOKS)
    document = {
        "format": FORMAT, "header": header(id), "run": None, "tokens": ids, "scalars": {},
        "tensors": [entry(name, array) for name, array in found.items()], "top_features_last_pos": [],
    }  # fmt: skip
    path = directory / f"{id.replace('/', '-')}.json"
    path.write_text(json.dumps(document))
    digests = {name: sha(array) for name, array in found.items()}
    return Made(subject, directory, path, Header.model_validate(header(id)), digests)


def live(toy: Toy, *traces: Made, device: str = "cpu", patched: Sequence[str] = ()) -> LiveSource:
    source = LiveSource.__new__(LiveSource)
    source.device, source.emitter = device, toy  # type: ignore[assignment]
    source._built, source._lanes = BuiltEmitter(Path(), {"patched": patched}), {}
    source.made = {each.subject.case.id: each for each in traces}
    return source


def judged(toy: Toy, tmp_path: Path, *traces: Made) -> Section:
    return judge_forwards(
        live(toy, *traces), [each.subject.case for each in traces], "0.2.2", tmp_path / "out", False
    )
