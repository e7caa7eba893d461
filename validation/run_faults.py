"""Faults in what a run captures, is given or does beside the model: hooks, SAE, edits, tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from candle_mi_parity.candidate import torch_source
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle import interventions
from candle_mi_parity.oracle.hooks import Edits, Recorder
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.spec.edits import Inject, Knockout, PatchAt
from candle_mi_parity.trace.trace import Feature
from validation.disturb import Dump, Running, Tensor, fault, output, register

# --- hook -----------------------------------------------------------------------------------------


@fault
def one_layer_off(run: Running) -> None:
    def late(dump: Dump) -> None:
        arrays = dump.arrays
        for layer in (2, 1):
            for name in [name for name in arrays if name.startswith(f"blocks.{layer}.")]:
                arrays[name] = arrays[name.replace(f"blocks.{layer}.", f"blocks.{layer - 1}.")]

    run.after.append(late)


@fault
def query_after_rotary(run: Running) -> None:
    layers = itertools.count()

    def instead(original: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        turned = original(q, k, cos, sin)
        run.captured[f"blocks.{next(layers)}.attn.hook_q"] = turned[0]
        return turned

    run.rotary(instead)


@fault
def attn_out_before_norm(run: Running) -> None:
    def keep(_: Tensor, out: Tensor) -> Tensor:
        run.captured.setdefault("blocks.0.hook_attn_out", out)
        return out

    output(run.layers[0].self_attn, keep)


@fault
def logits_before_softcap(run: Running) -> None:
    def keep(_: Tensor, logits: Tensor) -> Tensor:
        run.captured.setdefault("logits", logits)  # the lens calls it again
        return logits

    output(run.model.lm_head, keep)


register(
    lens_without_norm=lambda run: run.patch(torch_source, "unembed", lambda model, hidden: model.lm_head(hidden)),
)


# --- SAE ------------------------------------------------------------------------------------------


def _sae(run: Running) -> TorchSae:
    assert run.sae is not None, f"{run.subject.case.id} has no SAE"
    return run.sae


@fault
def sae_threshold_ignored(run: Running) -> None:
    _sae(run).threshold = None


@fault
def sae_encoder_bias_dropped(run: Running) -> None:
    sae = _sae(run)
    sae.b_enc = torch.zeros_like(sae.b_enc)


@fault
def sae_decoder_tied(run: Running) -> None:
    sae = _sae(run)
    sae.W_dec = sae.W_enc.T.contiguous()


@fault
def sae_input_centred(run: Running) -> None:
    _sae(run)._centred = True


@fault
def sae_input_not_centred(run: Running) -> None:
    _sae(run)._centred = False


def _sae_place(run: Running, **place: object) -> None:
    case = run.subject.case
    assert case.sae is not None
    elsewhere = case.model_copy(update={"sae": case.sae.model_copy(update=place)})
    run.subject = replace(run.subject, case=elsewhere)


@fault
def sae_topk_one_more(run: Running) -> None:
    sae = _sae(run)
    assert sae.k is not None
    sae.k += 1


@fault
def sae_topk_by_size(run: Running) -> None:
    def active(sae: TorchSae, pre: Tensor) -> Tensor:
        assert sae.k is not None
        chosen = torch.zeros_like(pre, dtype=torch.bool)
        return chosen.scatter_(-1, pre.abs().topk(sae.k, dim=-1).indices, True)

    run.patch(TorchSae, "active", active)


def _scalar(run: Running, name: str, value: Callable[[Dump], float]) -> None:
    def change(dump: Dump) -> None:
        if name in dump.scalars:  # a forced run has no SAE
            dump.scalars[name] = value(dump)

    run.after.append(change)


@fault
def sae_mse_is_sum(run: Running) -> None:
    name = "sae.reconstruction_mse"
    _scalar(run, name, lambda dump: dump.scalars[name] * dump.arrays["sae.recon"].shape[-1])


@fault
def sae_top_from_one(run: Running) -> None:
    def change(dump: Dump) -> None:
        dump.top_features = [Feature(index=one.index + 1, value=one.value) for one in dump.top_features]

    run.after.append(change)


@fault
def sae_f16(run: Running) -> None:
    sae = _sae(run)
    sae.W_enc = sae.W_enc.half().to(sae.W_enc)


@fault
def sae_normalization_ignored(run: Running) -> None:
    _sae(run)._normalize = "none"


@fault
def sae_decoder_norm_ignored(run: Running) -> None:
    _sae(run)._by_decoder_norm = False


register(
    sae_shrunk=lambda run: run.patch(
        TorchSae, "encode", lambda sae, x: torch.relu(sae.pre_activations(x) - sae.threshold)
    ),
    sae_decoder_bias_dropped=lambda run: _sae(run).b_dec.zero_(),
    sae_other_layer=lambda run: _sae_place(run, layer=0),
    sae_other_point=lambda run: _sae_place(run, point="hook_resid_post"),
    sae_active_everywhere=lambda run: _scalar(
        run, "sae.n_active_last_pos", lambda dump: float((dump.arrays["sae.features"] > 0).sum())
    ),
)


# --- interventions --------------------------------------------------------------------------------


def _edits(run: Running, change: Callable[[Edits], Edits]) -> None:
    original = interventions.edits_of
    run.patch(torch_source, "edits_of", lambda subject, drawn: change(original(subject, drawn)))


@fault
def edit_subtracted(run: Running) -> None:
    def negative(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: 2 * tensor - edit(tensor)

    _edits(run, lambda edits: {hook: [negative(edit) for edit in changes] for hook, changes in edits.items()})


@fault
def edit_of_first_row_only(run: Running) -> None:
    def first(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: torch.cat([edit(tensor)[:1], tensor[1:]])

    _edits(run, lambda edits: {hook: [first(edit) for edit in changes] for hook, changes in edits.items()})


def _rows(run: Running, change: Callable[[Any], Any]) -> None:
    case = run.subject.case
    edited = case.model_copy(update={"edits": [change(edit) for edit in case.edits]})
    run.subject = replace(run.subject, case=edited)


@fault
def knockout_of_all_heads(run: Running) -> None:
    def everywhere(edit: Any) -> Any:
        assert isinstance(edit, Knockout)
        return edit.model_copy(update={"spec": edit.spec.model_copy(update={"heads": None})})

    _rows(run, everywhere)


@fault
def patch_next_position(run: Running) -> None:
    last = len(run.subject.tokens[0]) - 1

    def later(edit: Any) -> Any:
        assert isinstance(edit, PatchAt)
        return edit.model_copy(update={"position": min(edit.position + 1, last)})

    _rows(run, later)


@fault
def injection_strength_ignored(run: Running) -> None:
    def plain(edit: Any) -> Any:
        assert isinstance(edit, Inject)
        return edit.model_copy(update={"features": [(index, 1.0) for index, _ in edit.features]})

    _rows(run, plain)


@fault
def injection_of_encoder(run: Running) -> None:
    def swapped(path: Any) -> Any:
        weights = load_sae(path)
        return replace(weights, W_dec=weights.W_enc.T.copy())

    run.patch(interventions, "load_sae", swapped)


@fault
def steering_unnormalised(run: Running) -> None:
    def scaled(chosen: Any, factor: float) -> Callable[[Tensor], Tensor]:
        return lambda pattern: torch.where(torch.from_numpy(chosen), pattern * factor, pattern)

    run.patch(interventions, "scale_steering", scaled)


@fault
def steering_to_the_future(run: Running) -> None:
    original = interventions.set_steering

    def change(chosen: Any, value: float) -> Callable[[Tensor], Tensor]:
        # Weights that are 0 are taken for ones of almost 0, so that they get a share of what is moved.
        return lambda pattern: original(chosen, value)(torch.where(pattern == 0, 1e-30, pattern))

    run.patch(interventions, "set_steering", change)


@fault
def captured_after_edit(run: Running) -> None:
    original = Recorder.at

    def at(recorder: Recorder, name: str, tensor: Tensor) -> Tensor:
        recorder.tensors[name] = edited = original(recorder, name, tensor)
        return edited

    run.patch(Recorder, "at", at)


register(
    edit_of_embedding_dropped=lambda run: _edits(
        run, lambda edits: {hook: changes for hook, changes in edits.items() if hook != "hook_embed"}
    ),
    edit_order_reversed=lambda run: _edits(
        run, lambda edits: {hook: [*reversed(changes)] for hook, changes in edits.items()}
    ),
    edit_twice=lambda run: _edits(run, lambda edits: {hook: [*changes, *changes] for hook, changes in edits.items()}),
)


# --- tokens ---------------------------------------------------------------------------------------


def _tokens(run: Running, change: Callable[[list[list[int]]], list[list[int]]]) -> None:
    run.subject = replace(run.subject, tokens=change(run.subject.tokens))


@fault
def tokens_next_id(run: Running) -> None:
    size = run.model.config.vocab_size
    _tokens(run, lambda rows: [[(token + 1) % size for token in row] for row in rows])


register(
    tokens_reversed=lambda run: _tokens(run, lambda rows: [row[::-1] for row in rows]),
    tokens_last_replaced=lambda run: _tokens(run, lambda rows: [[*row[:-1], row[-1] - 1] for row in rows]),
    tokens_rows_exchanged=lambda run: _tokens(run, lambda rows: rows[::-1]),
    tokens_cut=lambda run: _tokens(run, lambda rows: [row[:-1] for row in rows]),
)
