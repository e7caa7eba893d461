"""transformers with hooks: one forward pass, every hook point recorded under candle-mi's name.

:func:`attention`, registered by name, computes eager attention for every family and records scores (scaled, before
softcap and mask) and pattern. All other hook points are hooks on modules (:mod:`families`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from candle_mi_parity.errors import ModelError, OracleError, OutOfRangeError, ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.models.quiet import quiet, transformers_runs
from candle_mi_parity.models.transformers_config import load_config
from candle_mi_parity.models.transformers_private import import_model, private
from candle_mi_parity.oracle import rwkv_hooks
from candle_mi_parity.oracle.plain import require_loads
from candle_mi_parity.oracle.recurrence import Recurrence
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.oracle.torch_state import torch_state
from candle_mi_parity.oracle.variants import keys_of_other_families
from candle_mi_parity.spec.counterfactual import Variant
from candle_mi_parity.spec.families import FAMILIES, RECURRENT, Family, family_of

_ATTENTION = "candle_mi_parity"
FAR_BELOW = -1e30
"""A finite stand-in for −inf, which a softcap turns into −softcap; the noise would turn −inf into NaN."""
_IGNORED = "_candle_mi_parity_ignored"
Captured = dict[str, torch.Tensor]
Edits = Mapping[str, Sequence[Callable[[torch.Tensor], torch.Tensor]]]
"""Hook → functions that are applied to its tensor in order."""

_recorder: ContextVar[Recorder] = ContextVar("recorder")


class Recorder:
    """The tensors of one forward pass at the hook points, in execution order.

    :ivar allowed: layer → boolean [T, T], the entries that the attention mask allows.
    :ivar attended: layer → boolean [H, T, T], the entries that edited scores leave of these.
    :ivar scalings: hook of the scores → the factor by which the products of queries and keys were multiplied.
    :param edits: changes of a hook's tensor after it was recorded (candle-mi's ``Intervention``).
    :param variants: other arithmetic of the attention, for a counterfactual.
    :param recurrence: layers that run several times; their tensors are those of the last pass.
    """

    def __init__(
        self,
        edits: Edits | None = None,
        variants: frozenset[Variant] = frozenset(),
        recurrence: Recurrence | None = None,
    ) -> None:
        self.variants, self.recurrence = variants, recurrence
        self.tensors: Captured = {}
        self.allowed: dict[int, torch.Tensor] = {}
        self.attended: dict[int, torch.Tensor] = {}
        self.scalings: dict[str, float] = {}
        self.edits = edits or {}
        self._owed: Captured = {}

    @property
    def again(self) -> bool:
        """Whether layers run that ran before."""
        return self.recurrence is not None and self.recurrence.again

    def at(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in self.tensors and not self.again:
            raise OracleError(f"{name} fired twice in one forward pass")
        if name.endswith("hook_resid_post") and (owed := self._owed.pop(name, None)) is not None:
            tensor = tensor + owed
        self.tensors[name] = tensor
        edited = tensor
        for edit in self.edits.get(name, ()):
            edited = edit(edited)
            if edited.shape != tensor.shape:
                raise OracleError(f"an edit at {name} made {tuple(edited.shape)} of {tuple(tensor.shape)}")
        owes = Variant.RESID_MID_EDITS_REACH_THE_MLP_ALONE not in self.variants
        if edited is not tensor and name.endswith("hook_resid_mid") and owes:
            # A hook on the norm cannot change the stream in the residual sum at the end of the layer.
            self._owed[name.replace("resid_mid", "resid_post")] = edited - tensor
        return edited


def recorded() -> Captured:
    """What the current forward pass has recorded so far."""
    return _recorder.get().tensors


def scalings() -> dict[str, float]:
    """See :class:`Recorder`; of the current forward pass."""
    return _recorder.get().scalings


def attended(layer: int) -> torch.Tensor:
    """Boolean [T, T] or [H, T, T]: the keys that each query attends to in the current forward pass."""
    recorder = _recorder.get()
    return recorder.attended.get(layer, recorder.allowed[layer])


def replacing(replacement: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The edit that replaces a hook's tensor by another [B, …], repeated where samples share a pass."""
    return lambda tensor: replacement.repeat(tensor.shape[0] // replacement.shape[0], *[1] * (replacement.dim() - 1))


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention for every family: query [B,H,T,D], key and value [B,K,T,D], rotated, before repetition.

    :raises OracleError: there is no mask or no scale.
    """
    if unknown.get("s_aux") is not None:
        raise OracleError(f"{type(module).__name__} passes attention sinks, which are not implemented here")
    if attention_mask is None or scaling is None:
        raise OracleError(f"{type(module).__name__} passes no attention mask or no scaling to its attention")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    groups = query.shape[1] // key.shape[1]
    recorder = _recorder.get()
    window = None
    if Variant.KEYS_OF_OTHER_FAMILIES in recorder.variants:
        scaling, softcap, window = keys_of_other_families(module.config, scaling)
    if Variant.KV_HEADS_TILED in recorder.variants:
        key, value = key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)
    else:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    arrived = scores
    name = f"blocks.{layer}.attn.hook_scores"
    recorder.scalings[name] = scaling
    scores = recorder.at(name, scores)
    allowed = attention_mask == 0
    if Variant.NO_CAUSAL_MASK in recorder.variants:
        allowed = torch.ones_like(allowed)
    unmasked = Variant.CAUSAL_MASK_FOR_NO_MASK in recorder.variants and bool(allowed.all())
    if Variant.CAUSAL_MASK in recorder.variants or unmasked:
        allowed = allowed.tril()
    if window is not None:
        allowed = allowed.triu(-window)
    recorder.allowed[layer] = allowed[0, 0]
    if softcap is not None and Variant.KNOCKOUT_BEFORE_SOFTCAP in recorder.variants:
        scores = scores.masked_fill(scores == -torch.inf, FAR_BELOW)
    elif scores is not arrived:
        # A score of −∞ is a knocked-out edge, also where a softcap would make it finite.
        allowed = allowed & (scores != -torch.inf)
        recorder.attended[layer] = allowed[0]
        if not bool(allowed.any(-1).all()):
            raise OracleError(f"layer {layer}: a query has all its keys knocked out; its softmax is NaN on any side")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, -torch.inf)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = recorder.at(f"blocks.{layer}.attn.hook_pattern", pattern)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


@cache
def our_attention() -> str:
    """Register :func:`attention` with transformers, and return its name.

    Not at import: that part of transformers takes seconds to import.
    """
    transformers.AttentionInterface.register(_ATTENTION, attention)
    transformers.AttentionMaskInterface.register(_ATTENTION, _mask)
    return _ATTENTION


def _mask(*sizes: Any, **settings: Any) -> torch.Tensor:
    """transformers' own mask for eager attention, [B, 1, T, T], also where it forbids nothing and is not needed."""
    eager = private("masking_utils.eager_mask")
    return cast(torch.Tensor, eager(*sizes, **(settings | {"allow_is_bidirectional_skip": False})))


def load_model(
    directory: Path, dtype: torch.dtype = torch.float64, device: str = "cpu", attention: str | None = None
) -> nn.Module:
    """The causal language model of a directory, in eval mode, with :func:`attention` or one of transformers'.

    In float64 it is loaded under the float64 mode too, because rotary tables are computed at construction.

    :raises ModelError: transformers cannot run the config, or the files lack weights of the model.
    """
    attention = attention or our_attention()
    config = model_config(directory, attention)
    try:
        with torch_state(dtype), mode_for(dtype), quiet():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported
            )
    except (OSError, SafetensorError, MemoryError) as error:
        raise ModelError(f"transformers cannot load {directory}: {one_line(str(error))}") from error
    except ParityError:
        raise
    except Exception:
        require_loads(directory)
        raise
    model, report = loaded
    shapes = {name: (tuple(held), tuple(wanted)) for name, held, wanted in report["mismatched_keys"]}
    require_weights(directory, report["missing_keys"], shapes)
    if model.config._attn_implementation != attention:
        raise OracleError(f"{directory}: transformers took {model.config._attn_implementation} for {attention}")
    ignore_tensors(model, report["unexpected_keys"])
    return cast(nn.Module, model.to(device).eval())


def in_format(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight rounded to the format in which a candidate is given it.

    :raises OutOfRangeError: a value is beyond the format's range.
    """
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and bool((rounded.isinf() & ~tensor.isinf()).any()):
        raise OutOfRangeError(f"{name} holds {float(tensor.abs().max()):.2g}, which is beyond float16's range")
    return rounded


def model_config(directory: Path, attention: str) -> Any:
    """transformers' config of a directory, with this attention whatever ``config.json`` says.

    The model's module is imported too, outside of the float64 mode.

    :raises ModelError: transformers cannot run it.
    """
    with transformers_runs(directory):
        config = load_config(directory)
        if config.model_type in FAMILIES and getattr(config, "use_bidirectional_attention", None):
            raise ModelError(
                f"{directory}: with use_bidirectional_attention, transformers' eager attention is causal and its "
                "sdpa is not: there is no one truth"
            )
        config._attn_implementation = attention
        # A training option with which the embedding's output requires a gradient.
        config.gradient_checkpointing = False
        import_model(config)
        return config


Shape = tuple[int, ...]


def require_weights(directory: Path, missing: Iterable[str], mismatched: Mapping[str, tuple[Shape, Shape]]) -> None:
    """Refuse files that lack a part of the model, which transformers would initialise at random.

    :param mismatched: tensor → its shape in the files, and the model's shape.
    :raises ModelError: a tensor is missing or has another shape.
    """
    if absent := sorted(missing):
        more = f" (and {len(absent) - 3} more)" if len(absent) > 3 else ""
        raise ModelError(
            f"{directory}: the file lacks {one_line(', '.join(absent[:3]))}{more}, which transformers would "
            "initialise at random: there is no truth"
        )
    for name, (held, wanted) in sorted(mismatched.items()):
        raise ModelError(
            f"{directory}: {one_line(name)} has shape {held}, expected {wanted} by config.json; transformers would "
            "initialise it at random: there is no truth"
        )


def ignore_tensors(model: nn.Module, names: Iterable[str]) -> None:
    """Note the tensors of the files that are not in the model; see :func:`ignored_tensors`."""
    setattr(model, _IGNORED, sorted(names))


def ignored_tensors(model: nn.Module) -> list[str]:
    """Tensors of the files that transformers ignores, so that the truth does not depend on them."""
    return list(getattr(model, _IGNORED))


def mode_for(dtype: torch.dtype) -> AbstractContextManager[object]:
    return Float64() if dtype == torch.float64 else nullcontext()  # type: ignore[no-untyped-call]


def forward(
    model: nn.Module,
    tokens: torch.Tensor,
    edits: Edits | None = None,
    family: Family | None = None,
    variants: frozenset[Variant] = frozenset(),
    recurrence: Recurrence | None = None,
    gradients: bool = False,
) -> Recorder:
    """One forward pass with every hook point recorded, ``logits`` last.

    :param tokens: int64 [B, T].
    :param edits: see :class:`Recorder`; honoured at every hook, not at ``logits``.
    :param family: None for that of the model's type.
    :param variants: see :class:`Recorder`; ``recurrence`` too.
    :param gradients: whether autograd records the pass.
    """
    recorder = Recorder(edits, variants, recurrence)
    handles = _attach(model, recorder, family)
    token = _recorder.set(recorder)
    # Positions for each sequence, so that samples in one batch have independent rotary noise.
    positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
    try:
        with torch.set_grad_enabled(gradients):
            logits = model(tokens, position_ids=positions, use_cache=False).logits
    finally:
        _recorder.reset(token)
        for handle in handles:
            handle.remove()
    recorder.at("logits", logits)
    return recorder


def _attach(model: Any, recorder: Recorder, family: Family | None) -> list[Any]:
    config = model.config
    if config.model_type in RECURRENT:
        return rwkv_hooks.attach(model, recorder.at, recorder.edits)
    family = family or family_of(config.model_type)
    layers, recurrence = model.model.layers, recorder.recurrence
    handles = [
        layers[0].register_forward_pre_hook(_input("hook_embed", recorder), with_kwargs=True),
        model.model.norm.register_forward_hook(_output("hook_final_norm", recorder)),
    ]
    handles += recurrence.watch(layers) if recurrence else []
    for index, layer in enumerate(layers):
        for name, module, hook in _layer_hooks(f"blocks.{index}.", family, config, recorder):
            target = layer.get_submodule(module) if module else layer
            if name == "input":
                handles.append(target.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(target.register_forward_hook(hook))
    if recurrence:
        handles.append(recurrence.repeat(layers))
    return handles


def _layer_hooks(
    prefix: str, family: Family, config: Any, recorder: Recorder
) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(side, module path, hook) of one layer, in execution order."""
    yield "input", "", _input(f"{prefix}hook_resid_pre", recorder)
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    names = [f"{prefix}attn.hook_{letter}" for letter in "qkv"]
    if family.qkv is not None:
        yield "output", family.qkv, _fused(names, [n_heads, n_kv, n_kv], head_dim, recorder)
    else:
        for name, module in zip(names, (family.q, family.k, family.v), strict=True):
            first = family.heads_first and name[-1] in "qk"
            yield "output", module, _output(name, recorder) if first else _heads(name, head_dim, recorder)
    yield "output", family.attn_out, _output(f"{prefix}hook_attn_out", recorder)
    yield "input", family.resid_mid, _input(f"{prefix}hook_resid_mid", recorder)
    yield "input", "mlp", _input(f"{prefix}mlp.hook_pre", recorder)
    yield "output", "mlp", _output(f"{prefix}mlp.hook_post", recorder)
    yield "output", family.mlp_out, _output(f"{prefix}hook_mlp_out", recorder)
    yield "output", "", _output(f"{prefix}hook_resid_post", recorder)


def _input(name: str, recorder: Recorder) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recorder.again and name == "hook_embed":
            return None
        if args:
            return (recorder.at(name, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": recorder.at(name, kwargs["hidden_states"])}

    return hook


def _output(name: str, recorder: Recorder) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (recorder.at(name, out[0]), *out[1:])
        return recorder.at(name, out)

    return hook


def _heads(name: str, head_dim: int, recorder: Recorder) -> Callable[..., torch.Tensor]:
    """[B,T,n·D] or [B,T,n,D] → [B,n,T,D], candle-mi's layout, and back."""

    def hook(_module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
        return _at_heads(name, out, head_dim, recorder)

    return hook


def _at_heads(name: str, out: torch.Tensor, head_dim: int, recorder: Recorder) -> torch.Tensor:
    heads = out.reshape(*out.shape[:2], -1, head_dim).transpose(1, 2)
    edited = recorder.at(name, heads)
    return out if edited is heads else edited.transpose(1, 2).reshape(out.shape)


def _fused(names: list[str], heads: list[int], head_dim: int, recorder: Recorder) -> Callable[..., torch.Tensor]:
    def hook(_module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
        parts = torch.split(out, [n * head_dim for n in heads], dim=-1)
        left = [_at_heads(name, part, head_dim, recorder) for name, part in zip(names, parts, strict=True)]
        same = all(one is other for one, other in zip(left, parts, strict=True))
        return out if same else torch.cat(left, dim=-1)

    return hook
