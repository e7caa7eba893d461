"""Hypothesis strategies for calls of generated diffusion models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from candle_mi_parity.coverage.calls import CallRow, CallTable, InputTensor
from candle_mi_parity.coverage.calls_models import DiffusionRow
from candle_mi_parity.hunt.call_inputs import ID, NUMBERS, tensor, tensors

_WIDTHS = st.sampled_from([(1, 8), (2, 8), (3, 12), (1, 6)])
"""Heads and width; of fewer channels the rounding of a norm is that of its few terms."""

_HOOKS = st.sampled_from(
    [
        *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
        *("mlp.hook_pre", "mlp.hook_post", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern"),
    ]
)


@st.composite
def _models(draw: DrawFn) -> DiffusionRow:
    heads, width = draw(_WIDTHS)
    vocabulary, length, layers = draw(st.integers(3, 7)), draw(st.integers(2, 6)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        config: dict[str, Any] = {"model_type": "mdlm", "hidden_dim": width, "n_blocks": layers, "n_heads": heads}
        config |= {"cond_dim": draw(st.integers(1, 4)), "vocab_size": vocabulary, "model_length": length}
    else:
        config = {"model_type": "othello", "vocab_size": vocabulary, "block_size": length, "n_layer": layers}
        config |= {"n_head": heads, "n_embd": width}
        config |= {key: True for key in ("causal", "self_conditioning") if draw(st.booleans())}
    return DiffusionRow(config=config, seed=draw(st.integers(0, 9)))


@st.composite
def _call(draw: DrawFn, fn: str) -> CallTable:
    row = draw(_models())
    config: dict[str, Any] = dict(row.config)
    mdlm = config["model_type"] == "mdlm"
    width: int = config["hidden_dim" if mdlm else "n_embd"]
    longest: int = config["model_length" if mdlm else "block_size"]
    tokens = st.integers(0, config["vocab_size"] - 1)
    named: dict[str, InputTensor] = {}
    args: dict[str, Any] = {}
    if fn == "diffusion_forward":
        size, batch = draw(st.integers(1, longest)), draw(st.integers(1, 2))
        rows = st.lists(st.lists(tokens, min_size=size, max_size=size), min_size=batch, max_size=batch)
        args = {"tokens": draw(rows), "capture": draw(st.sampled_from(["all", "stream", "nothing"]))}
        if config.get("self_conditioning") and draw(st.booleans()):
            args["self_conditioning"] = draw(rows)
        if draw(st.booleans()):
            args["edit"] = draw(_edits(config))
    elif fn == "diffusion_project":
        shape = (draw(st.integers(1, 3)), width)
        named["a"] = tensor(draw(tensors(shape, NUMBERS[:2])), shape)
        args = {"hidden": "a"}
    else:
        args = {"token": draw(st.integers(0, config["vocab_size"]))}
    call = CallRow(id=ID, fn=fn, args=args, diffusion="model", exact=fn == "diffusion_embedding")
    return CallTable(tensors=named, diffusions={"model": row}, call=[call])


@st.composite
def _edits(draw: DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    layers: int = config["n_blocks" if config["model_type"] == "mdlm" else "n_layer"]
    hook = f"blocks.{draw(st.integers(0, layers - 1))}.{draw(_HOOKS)}"
    if draw(st.booleans()):
        return {"kind": "zero", "hook": hook}
    return {"kind": "scale", "hook": hook, "factor": draw(st.sampled_from([0.5, 2.0, -1.0]))}


CALLS: dict[str, Callable[[], SearchStrategy[CallTable]]] = {
    fn: partial(_call, fn) for fn in ("diffusion_forward", "diffusion_project", "diffusion_embedding")
}
"""The sampler is left out: of a generated model which token is the likeliest is not always sure."""
