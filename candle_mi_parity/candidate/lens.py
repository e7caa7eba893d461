"""TransformerLens as a candidate: a program that answers requests as ``docs/emitter-protocol.md`` says.

``candle-mi-parity run --candidate transformer-lens`` starts it. It boots ``TransformerBridge``, the interface that
TransformerLens 4 documents, from the model's directory, with the weights as they are: ``enable_compatibility_mode``,
which folds and centres them, is not called. What each hook point of candle-mi is there: docs/transformer-lens.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from candle_mi_parity.candidate.program import lens_identity
from candle_mi_parity.candidate.requests import REQUEST_FORMAT
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.versions import version
from candle_mi_parity.models.checkpoint import model_digest, read_config
from candle_mi_parity.oracle.interventions import scale_steering, set_steering
from candle_mi_parity.spec.edits import Attention
from candle_mi_parity.spec.hook_points import hook_names
from candle_mi_parity.trace.trace import FORMAT

Request = Mapping[str, Any]
Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]

POINTS = {
    "hook_final_norm": "ln_final.hook_out",
    "attn.hook_scores": "attn.hook_attn_scores",
    "mlp.hook_pre": "mlp.hook_in",
    "mlp.hook_post": "mlp.hook_out",
}
"""candle-mi's hook points that have another name in TransformerLens, without ``blocks.i.``. Its own ``mlp.hook_pre``
and ``mlp.hook_post`` are the MLP's inner activations, which candle-mi has no hook for."""
NORMED = {"attn.hook_q": "attn.hook_q_normed", "attn.hook_k": "attn.hook_k_normed"}
"""The same where queries and keys are normalised: candle-mi's hook is behind the norm, ``attn.hook_q`` before it."""
HEADS_BEHIND = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
"""Hooks that are [B, T, H, D] in TransformerLens and [B, H, T, D] in candle-mi; the normed ones are the latter."""
SOFTCAPPED = "TransformerLens hooks attention scores behind the soft cap only"


class AbsentError(Exception):
    """TransformerLens does not have what a request asks for."""


def boot(directory: str, dtype: str, device: str) -> Any:
    """The bridge of a model's directory.

    Token ids are given, but the bridge wants a tokenizer, and most models of the suite have none: it gets an empty
    one.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    unused = make(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    return TransformerBridge.boot_transformers(
        directory, tokenizer=unused, dtype=getattr(torch, dtype), device=device, trust_remote_code=False
    )


class Pass:
    """One forward pass: what it captures, and what it changes.

    :ivar found: hook point → its tensor in candle-mi's layout, before the edits.
    :ivar absent: hook point → why TransformerLens has no such tensor.
    """

    def __init__(self, bridge: Any, request: Request, given: Tensors) -> None:
        self.found: Tensors = {}
        self._bridge, self._request, self._given = bridge, request, given
        self._names = hook_names(len(bridge.blocks))
        self._seen: Tensors = {}
        cap = getattr(bridge.original_model.config, "attn_logit_softcapping", None)
        capped = {name for name in self._names if name.endswith("attn.hook_scores") and cap is not None}
        self.absent = {name: SOFTCAPPED for name in request["captures"] if name in capped}
        self._changes: dict[str, list[Change]] = {}
        for edit in request["edits"]:
            if edit["hook"] in capped and edit["kind"] != "knockout":
                raise AbsentError(f"{edit['kind']} at {edit['hook']}: {SOFTCAPPED}")
            if (change := self._change(edit)) is not None:
                self._changes.setdefault(edit["hook"], []).append(change)

    def run(self) -> Tensors:
        """The captures that are asked for, and the logits.

        :raises RuntimeError: a hook was not called.
        """
        tokens = torch.tensor(self._request["tokens"], device=self._request["device"])
        hooks = [(self.point(name), partial(self._at, name=name)) for name in self._names]
        with torch.no_grad():
            logits = self._bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        asked = [name for name in self._request["captures"] if name not in self.absent]
        if missed := [name for name in asked if name not in self.found]:
            raise RuntimeError(f"TransformerLens did not call the hook of {missed[0]}")
        return {name: self.found[name] for name in asked} | {"logits": logits}

    def point(self, name: str) -> str:
        """TransformerLens' name of a hook point of candle-mi."""
        kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
        block = name.removesuffix(kind)
        normed = block + NORMED.get(kind, "")
        return normed if normed in self._bridge.hook_dict else block + POINTS.get(kind, kind)

    def _at(self, tensor: torch.Tensor, hook: object, name: str) -> torch.Tensor | None:
        turned = self.point(name).endswith(HEADS_BEHIND)
        there = tensor.transpose(1, 2) if turned else tensor
        self.found[name] = there.clone()
        if name.endswith("attn.hook_scores"):
            # Masked scores are the format's most negative number, or its sum with a score.
            self._seen[name] = seen = there > torch.finfo(there.dtype).min / 2
        if name not in self._changes:
            return None
        changed = there
        for change in self._changes[name]:
            changed = change(changed)
        if name.endswith("attn.hook_scores"):
            # candle-mi's scores are changed before the mask, so that a masked one stays masked.
            changed = torch.where(seen, changed, there)
        return changed.transpose(1, 2) if turned else changed

    def _change(self, edit: Mapping[str, Any]) -> Change | None:
        kind, hook = edit["kind"], edit["hook"]
        if kind in ("knockout", "steer"):
            spec = Attention.model_validate(edit["spec"])
            return self._on_edges(edit, spec) if spec.applies_at(hook) else None
        if kind == "scale":
            return lambda tensor: tensor * edit["factor"]
        if kind == "zero":
            return torch.zeros_like
        if kind not in ("replace", "add", "patch_at"):
            raise AbsentError(f"TransformerLens has no SAE, transcoder or state for the edit {kind}")
        value = self._given[edit["tensor"]].to(self._bridge.cfg.dtype)
        if kind == "add":
            return lambda tensor: tensor + value
        if kind == "replace":
            return lambda tensor: value.expand_as(tensor)
        return lambda tensor: _patched(tensor, edit["position"], value)

    def _on_edges(self, edit: Mapping[str, Any], spec: Attention) -> Change:
        """A knockout or steering: TransformerLens has no function for either, so a hook does it."""
        scores = edit["hook"].replace("hook_pattern", "hook_scores")

        def change(tensor: torch.Tensor) -> torch.Tensor:
            times = spec.times(tensor.shape[1], tensor.shape[-1])
            if edit["kind"] == "knockout":
                return tensor.masked_fill(torch.from_numpy(times > 0).to(tensor.device), -torch.inf)
            once = times.clip(max=1)
            if edit["how"] == "scale":
                return scale_steering(once, edit["value"])(tensor)
            return set_steering(once, edit["value"], keys=lambda: self._seen[scores])(tensor)

        return change


def _patched(tensor: torch.Tensor, position: int, value: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[:, position : position + 1] = value
    return changed


class Answers:
    """Answers requests; the bridge of the last model is kept."""

    def __init__(self) -> None:
        self._key: tuple[str, str, str] | None = None
        self._bridge: Any = None

    def bridge(self, request: Request) -> Any:
        """The bridge that a request needs; whatever TransformerLens raises is passed on."""
        key = request["model_dir"], request["dtype"], request["device"]
        if key != self._key:
            self._key, self._bridge = None, boot(*key)
            self._key = key
        return self._bridge

    def reply(self, request: Request) -> dict[str, object]:
        """Write the trace of a request, and say so or why not."""
        kind = "request"
        try:
            require_known(request)
            kind = "model"
            bridge = self.bridge(request)
            kind = "forward"
            given = load_file(request["inputs"], device=request["device"])
            forward = Pass(bridge, request, given)
            write(request, forward.run() | lenses(bridge, request, given), forward.absent)
            return {"ok": True, "trace": request["out"]}
        except AbsentError as error:
            return {"ok": False, "kind": "absent", "error": one_line(str(error))}
        except Exception as error:
            return {"ok": False, "kind": kind, "error": one_line(f"{type(error).__name__}: {error}")[:900]}


def require_known(request: Request) -> None:
    """Refuse a request that cannot be answered.

    :raises AbsentError: it needs what TransformerLens does not have.
    :raises ValueError: it is of another format.
    """
    if request["format"] != REQUEST_FORMAT:
        raise ValueError(f"format is {request['format']}, expected {REQUEST_FORMAT}")
    if request["sae"]:
        raise AbsentError("TransformerLens has no SAEs")
    if request.get("recurrent"):
        raise AbsentError("TransformerLens has no recurrent passes")
    config = read_config(Path(request["model_dir"]))
    if (model_type := config.get("model_type")) not in CONFIG_MAPPING:
        raise AbsentError(f"TransformerLens boots models of transformers, which has no model type {model_type}")
    if request.get("weights") or config.get("quantization_config"):
        raise AbsentError("a quantised checkpoint: this program loads plain weights")


def lenses(bridge: Any, request: Request, given: Tensors) -> Tensors:
    """Residual streams taken to logits without the final soft cap, as candle-mi's ``project_to_vocab`` is documented.

    TransformerLens' own ``logit_readout`` caps them.
    """
    with torch.no_grad():
        streams = {name: given[name].to(bridge.cfg.dtype) for name in request["project"]}
        return {f"lens.{name}": bridge.unembed(bridge.ln_final(stream)) for name, stream in streams.items()}


def write(request: Request, tensors: Tensors, absent: Mapping[str, str]) -> None:
    """The trace: a JSON file, and the tensors beside it."""
    out = Path(request["out"])
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out.with_suffix(".safetensors"))
    entries = [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(),
            "nonfinite": int((~tensor.isfinite()).sum()),
            "file": out.with_suffix(".safetensors").name,
            "key": name,
        }
        for name, tensor in tensors.items()
    ]
    header = {
        "emitter": "1",
        "candle_mi": lens_identity().model_dump(exclude_none=True),
        "candle": f"torch {version('torch')}",
        "features": [],
        "device": request["device"],
        "dtype": request["dtype"],
        "case": request["case"],
        "model_digest": model_digest(Path(request["model_dir"])),
        "sae_digest": None,
        "inputs_digest": file_digest(Path(request["inputs"])),
    }
    document = {
        "format": FORMAT,
        "header": header,
        "tokens": request["tokens"],
        "tensors": entries,
        "scalars": {},
        "top_features_last_pos": [],
        **({"absent": dict(absent)} if absent else {}),
    }
    out.write_text(json.dumps(document), encoding="utf-8")


def replies(lines: Iterator[str]) -> Iterator[str]:
    """One reply for each line of a request."""
    answers = Answers()
    for line in lines:
        request = json.loads(line)
        # TransformerLens and transformers may print.
        with contextlib.redirect_stdout(sys.stderr):
            reply = answers.reply(request)
        yield json.dumps(reply | {"case": request["case"]["id"]})


def main() -> None:
    for reply in replies(iter(sys.stdin)):
        print(reply, flush=True)


if __name__ == "__main__":
    main()
