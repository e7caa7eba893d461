"""Faults in what a run captures, is given or does beside the model: hooks, SAE, edits, tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from candle_mi_parity.candidate import torch_source
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle import interventions
from candle_mi_parity.oracle.hooks import Edits, Recorder
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.spec.edits import Attention
from candle_mi_parity.trace.trace import Feature, InMemory
from tests.support.planting import Arrays
from validation.disturb import Running, Tensor, directly, fault, output, register

# --- hook -----------------------------------------------------------------------------------------


@fault()
def one_layer_off(run: Running) -> None:
    def late(arrays: Arrays, _: InMemory) -> None:
        for layer in (2, 1):
            for name in [name for name in arrays if name.startswith(f"blocks.{layer}.")]:
                arrays[name] = arrays[name.replace(f"blocks.{layer}.", f"blocks.{layer - 1}.")]

    run.after.append(late)


@fault()
def query_after_rotary(run: Running) -> None:
    layers = itertools.count()

    def instead(original: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        turned = original(q, k, cos, sin)
        run.captured[f"blocks.{next(layers)}.attn.hook_q"] = turned[0]
        return turned

    run.rotary(instead)


@fault()
def attn_out_before_norm(run: Running) -> None:
    def keep(_: Tensor, out: Tensor) -> Tensor:
        run.captured.setdefault("blocks.0.hook_attn_out", out)
        return out

    output(run.layers[0].self_attn, keep)


@fault()
def logits_before_softcap(run: Running) -> None:
    def keep(_: Tensor, logits: Tensor) -> Tensor:
        run.captured.setdefault("logits", logits)  # the lens calls it again
        return logits

    output(run.model.lm_head, keep)


@fault()
def lens_without_norm(run: Running) -> None:
    run.patch(torch_source, "unembed", lambda model, hidden: model.lm_head(hidden))


# --- SAE ------------------------------------------------------------------------------------------


def _sae(run: Running) -> TorchSae:
    assert run.sae is not None, f"{run.subject.case.id} has no SAE"
    return run.sae


def _sae_with(run: Running, **values: object) -> None:
    """Other values of attributes of the SAE."""
    for name, value in values.items():
        assert hasattr(_sae(run), name)
        setattr(_sae(run), name, value)


def _sae_place(run: Running, **place: object) -> None:
    case = run.subject.case
    assert case.sae is not None
    elsewhere = case.model_copy(update={"sae": case.sae.model_copy(update=place)})
    run.subject = replace(run.subject, case=elsewhere)


@fault()
def sae_topk_by_size(run: Running) -> None:
    def active(sae: TorchSae, pre: Tensor) -> Tensor:
        assert sae.k is not None
        chosen = torch.zeros_like(pre, dtype=torch.bool)
        return chosen.scatter_(-1, pre.abs().topk(sae.k, dim=-1).indices, True)

    run.patch(TorchSae, "active", active)


def _scalar(run: Running, name: str, value: Callable[[Arrays, float], float]) -> None:
    def change(arrays: Arrays, left: InMemory) -> None:
        if name in left.scalars:  # a forced run has no SAE
            left.scalars[name] = value(arrays, left.scalars[name])

    run.after.append(change)


@fault()
def sae_mse_is_sum(run: Running) -> None:
    _scalar(run, "sae.reconstruction_mse", lambda arrays, mean: mean * arrays["sae.recon"].shape[-1])


@fault()
def sae_top_from_one(run: Running) -> None:
    def change(_: Arrays, left: InMemory) -> None:
        left.top_features[:] = [Feature(index=each.index + 1, value=each.value) for each in left.top_features]

    run.after.append(change)


register(
    directly,
    sae_shrunk=lambda run: run.patch(
        TorchSae, "encode", lambda sae, x: torch.relu(sae.pre_activations(x) - sae.threshold)
    ),
    sae_threshold_ignored=lambda run: _sae_with(run, threshold=None),
    sae_encoder_bias_dropped=lambda run: _sae_with(run, b_enc=torch.zeros_like(_sae(run).b_enc)),
    sae_decoder_bias_dropped=lambda run: _sae(run).b_dec.zero_(),
    sae_decoder_tied=lambda run: _sae_with(run, W_dec=_sae(run).W_enc.T.contiguous()),
    sae_input_centred=lambda run: _sae_with(run, _centred=True),
    sae_input_not_centred=lambda run: _sae_with(run, _centred=False),
    sae_topk_one_more=lambda run: _sae_with(run, k=(_sae(run).k or 0) + 1),
    sae_f16=lambda run: _sae_with(run, W_enc=_sae(run).W_enc.half().to(_sae(run).W_enc)),
    sae_normalization_ignored=lambda run: _sae_with(run, _normalize="none"),
    sae_decoder_norm_ignored=lambda run: _sae_with(run, _by_decoder_norm=False),
    sae_other_layer=lambda run: _sae_place(run, layer=0),
    sae_other_point=lambda run: _sae_place(run, point="hook_resid_post"),
    sae_active_everywhere=lambda run: _scalar(
        run, "sae.n_active_last_pos", lambda arrays, _: float((arrays["sae.features"] > 0).sum())
    ),
)


# --- interventions --------------------------------------------------------------------------------


def _edits(run: Running, change: Callable[[Edits], Edits]) -> None:
    original = interventions.edits_of
    run.patch(torch_source, "edits_of", lambda subject, drawn: change(original(subject, drawn)))


def _each_edit(run: Running, change: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]) -> None:
    _edits(run, lambda edits: {hook: [change(edit) for edit in changes] for hook, changes in edits.items()})


def _rows(run: Running, change: Callable[[Any], Any]) -> None:
    case = run.subject.case
    edited = case.model_copy(update={"edits": [change(edit) for edit in case.edits]})
    run.subject = replace(run.subject, case=edited)


@fault()
def injection_of_encoder(run: Running) -> None:
    def swapped(path: Any) -> Any:
        weights = load_sae(path)
        return replace(weights, W_dec=weights.W_enc.T.copy())

    run.patch(interventions, "load_sae", swapped)


@fault()
def steering_unnormalised(run: Running) -> None:
    def scaled(chosen: Any, factor: float) -> Callable[[Tensor], Tensor]:
        return lambda pattern: torch.where(torch.from_numpy(chosen > 0), pattern * factor, pattern)

    run.patch(interventions, "scale_steering", scaled)


@fault()
def steering_to_the_future(run: Running) -> None:
    original = interventions.set_steering

    def change(chosen: Any, value: float, all_columns: bool, keys: object) -> Callable[[Tensor], Tensor]:
        # Keys in the future have a share of what is moved too, as if the query attended to them.
        return original(chosen, value, all_columns, keys=lambda: torch.ones(1, dtype=torch.bool))

    run.patch(interventions, "set_steering", change)


@fault()
def captured_after_edit(run: Running) -> None:
    original = Recorder.at

    def at(recorder: Recorder, name: str, tensor: Tensor) -> Tensor:
        recorder.tensors[name] = edited = original(recorder, name, tensor)
        return edited

    run.patch(Recorder, "at", at)


register(
    _edits,
    edit_of_embedding_dropped=lambda edits: {hook: each for hook, each in edits.items() if hook != "hook_embed"},
    edit_order_reversed=lambda edits: {hook: [*reversed(changes)] for hook, changes in edits.items()},
    edit_twice=lambda edits: {hook: [*changes, *changes] for hook, changes in edits.items()},
)
register(
    _each_edit,
    edit_subtracted=lambda edit: lambda tensor: 2 * tensor - edit(tensor),
    edit_of_first_row_only=lambda edit: lambda tensor: torch.cat([edit(tensor)[:1], tensor[1:]]),
)
register(
    _rows,
    knockout_of_all_heads=lambda edit: edit.model_copy(update={"spec": edit.spec.model_copy(update={"heads": None})}),
    injection_strength_ignored=lambda edit: edit.model_copy(
        update={"features": [(index, 1.0) for index, _ in edit.features]}
    ),
)


@fault()
def edit_tensor_of_first_row(run: Running) -> None:
    """A tensor [B, 1, d] is read as if its first row were every row's."""

    def first(tensor: Tensor) -> Tensor:
        return tensor[:1].expand_as(tensor) if tensor.dim() == 3 and tensor.shape[1] == 1 else tensor

    original = interventions.edits_of

    def edits_of(subject: PreparedCase, drawn: dict[str, Tensor]) -> Edits:
        return original(subject, {key: first(tensor) for key, tensor in drawn.items()})

    run.patch(torch_source, "edits_of", edits_of)


def _range_holds(run: Running, holds: Callable[[list[int], int], bool]) -> None:
    """``holds([first, last], layer)``, whether a range of layers contains one."""
    run.patch(Attention, "applies_at", lambda spec, hook: holds(spec.layers, int(hook.split(".")[1])))


register(
    _range_holds,
    layer_range_without_its_end=lambda ends, layer: ends[0] <= layer < ends[1],
    layer_range_without_its_start=lambda ends, layer: ends[0] < layer <= ends[1],
)


@fault()
def patch_next_position(run: Running) -> None:
    last = len(run.subject.tokens[0]) - 1
    _rows(run, lambda edit: edit.model_copy(update={"position": min(edit.position + 1, last)}))


# --- tokens ---------------------------------------------------------------------------------------


def _tokens(run: Running, change: Callable[[list[list[int]]], list[list[int]]]) -> None:
    run.subject = replace(run.subject, tokens=change(run.subject.tokens))


@fault()
def tokens_next_id(run: Running) -> None:
    size = run.model.config.vocab_size
    _tokens(run, lambda rows: [[(token + 1) % size for token in row] for row in rows])


register(
    _tokens,
    tokens_in_16_bits=lambda rows: [[token & 0xFFFF for token in row] for row in rows],
    tokens_reversed=lambda rows: [row[::-1] for row in rows],
    tokens_last_replaced=lambda rows: [[*row[:-1], row[-1] - 1] for row in rows],
    tokens_rows_exchanged=lambda rows: rows[::-1],
    tokens_cut=lambda rows: [row[:-1] for row in rows],
)
