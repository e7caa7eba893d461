"""The truth of a class without an entry in :mod:`families`.

It has every hook point if the class names its modules like a known family, else the logits alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from candle_mi_parity.coverage import census_models
from candle_mi_parity.errors import OracleError, ParityError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle import hooks
from candle_mi_parity.oracle.compute import sample
from candle_mi_parity.oracle.hooks import Edits, Recorder
from candle_mi_parity.oracle.provenance import library_versions, rules_digest
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.families import FAMILIES, Family
from candle_mi_parity.spec.hook_points import hook_names
from candle_mi_parity.trace.truth import Truth, TruthTensor


def truth_of(subject: PreparedCase, cache: Path, generated: bool = True) -> Truth:
    """The truth, from the cache or computed; it holds ``hook_embed`` if it holds the hook points.

    :param generated: whether the weights are generated; transformers must then load them as they were saved.
    :raises OracleError: an operation without a noise rule, or a truth that is not finite.
    :raises Exception: whatever the class's forward pass raises.
    """
    own = digest_files([Path(str(census_models.__file__)), Path(__file__)])
    key = content_key(subject.digest, own, rules_digest(), library_versions())
    path = publish(
        cache / "truth" / f"census-{key}", lambda out: _compute(subject, generated).save(out / "truth.safetensors")
    )
    return Truth.load(path / "truth.safetensors")


def _compute(subject: PreparedCase, generated: bool) -> Truth:
    tokens = torch.tensor(subject.tokens)
    eager = hooks.load_model(subject.model_dir, attention="eager")
    with Float64():  # type: ignore[no-untyped-call]
        logits = logits_only(eager, tokens, {}).tensors["logits"]
    model = hooks.load_model(subject.model_dir)
    family = next((guess for guess in family_maps(model) if _fits(model, tokens, guess, logits)), None)
    if family is None:
        model = eager
    if generated:
        census_models.check_filled(model)
    run = logits_only if family is None else partial(hooks.forward, family=family)
    seed = int(subject.digest[:16], 16)
    # One sample a pass: experts are given other rows of a batch in another order, and some classes take no positions.
    recorder, values, squares = sample(model, tokens, seed, lambda captured: {}, {}, run=run, batch=1)
    tensors = {}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all() and torch.isfinite(squares[name]).all()):
            raise OracleError(f"the truth's {name} holds NaN or Inf")
        attention = name.endswith(("hook_scores", "hook_pattern"))
        allowed = recorder.allowed[int(name.split(".")[1])].numpy() if attention else None
        tensors[name] = TruthTensor(value.numpy(), squares[name].sqrt().numpy(), allowed)
    meta = {"case": subject.digest, "model": subject.model_digest, "mode": "free", "dtype": subject.case.dtype}
    order = _names(model) if family else ["logits"]
    return Truth(subject.tokens, {name: tensors[name] for name in order}, meta=meta)


def logits_only(model: nn.Module, tokens: torch.Tensor, _edits: Edits) -> Recorder:
    """One forward pass of any causal language model, ``logits`` recorded."""
    recorder = Recorder()
    with torch.no_grad():
        recorder.at("logits", model(tokens, use_cache=False).logits)
    return recorder


def family_maps(model: Any) -> list[Family]:
    """Possible hook maps of a class: its own entry, or those suggested by the names of its modules.

    The norms of a layer determine the residual streams: two as in Llama, or four as in Gemma 2.
    """
    if known := FAMILIES.get(model.config.model_type):
        return [known]
    try:
        layer = model.model.layers[0]
        parts = {name for name, _ in layer.named_modules()}
        _ = model.model.norm
    except AttributeError:
        return []
    norms = {name for name in parts if "." not in name and "norm" in name}
    normed = {"self_attn.q_norm", "self_attn.k_norm"} <= parts
    q, k = ("self_attn.q_norm", "self_attn.k_norm") if normed else ("self_attn.q_proj", "self_attn.k_proj")
    qkv = "self_attn.qkv_proj" if "self_attn.qkv_proj" in parts else None
    if not {"self_attn", "mlp"} <= parts or not ({q, k, "self_attn.v_proj"} <= parts or qkv):
        return []
    found = Family(q=q, k=k, qkv=qkv)
    gemma = FAMILIES["gemma2"]
    if norms == {"input_layernorm", gemma.attn_out, gemma.resid_mid, gemma.mlp_out}:
        found = replace(found, attn_out=gemma.attn_out, resid_mid=gemma.resid_mid, mlp_out=gemma.mlp_out)
    elif norms != {"input_layernorm", "post_attention_layernorm"}:
        return []
    return [found, replace(found, heads_first=True)]


SAME = 1e-9
"""Fraction of the rms of the logits by which two float64 passes of the same computation may differ."""


def _fits(model: nn.Module, tokens: torch.Tensor, family: Family, logits: torch.Tensor) -> bool:
    """Whether a pass records each hook point, finite, with the queries in candle-mi's layout.

    :param logits: computed with the class's own attention; the recording one would leave out sinks, for example.
    """
    try:
        with Float64():  # type: ignore[no-untyped-call]
            found = hooks.forward(model, tokens, family=family).tensors
    except (ParityError, AttributeError, RuntimeError, TypeError, ValueError, KeyError):
        return False
    if not set(_names(model)) <= set(found) or not all(bool(found[name].isfinite().all()) for name in _names(model)):
        return False
    if not float((found["logits"] - logits).abs().max()) < SAME * float(logits.square().mean().sqrt()):
        return False
    query, pattern = (found[f"blocks.0.attn.hook_{part}"] for part in ("q", "pattern"))
    return query.shape[:-1] == pattern.shape[:-1]


def _names(model: Any) -> list[str]:
    """All that is compared of a class with hooks, in execution order."""
    return [*hook_names(model.config.num_hidden_layers), "logits"]
