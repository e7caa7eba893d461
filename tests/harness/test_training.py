"""The optimizer, the average of weights and gradients: the truth against torch's own, and a fault in each."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from candle_mi_parity.coverage.calls_truth import truth_of
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.oracle.gradients import GradientNoise, GradientTruth, with_respect_to
from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool
from candle_mi_parity.spec.paths import cache_root
from tests.support.calls import ARRAYS, ROWS, TABLE, Values, changed, passes, right, truth, where

OURS = {row.id: row for row in TABLE.call if row.id.startswith(("adamw/", "ema/", "gradient/"))}


def given(name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[name]).to(dtype)


def by_torch(call: str, dtype: torch.dtype = torch.float64, **changed: Any) -> Values:
    """torch's own optimizer and average."""
    args: dict[str, Any] = ROWS[call].args | changed
    if ROWS[call].fn == "fold_ema":
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(args["decay"])  # type: ignore[no-untyped-call]
        shadows = [given(name, dtype).clone() for name in args["shadows"]]
        for step in args["steps"]:
            average(shadows, [given(name, dtype) for name in step], 1)
        return {f"value{place}": shadow.double().numpy() for place, shadow in enumerate(shadows)}
    values = [given(name, dtype).clone().requires_grad_() for name in args["parameters"]]
    settings = {"lr": args["lr"], "eps": args["eps"], "weight_decay": args["weight_decay"]}
    optimizer = torch.optim.AdamW(values, betas=(args["beta1"], args["beta2"]), foreach=False, **settings)
    for step, gradients in enumerate(args["steps"]):
        if (later := args.get("later")) and later["after"] == step:
            optimizer.param_groups[0]["lr"] = later["lr"]
        for value, name in zip(values, gradients, strict=True):
            value.grad = given(name, dtype) if name else None
        optimizer.step()
    found: Values = {}
    for place, value in enumerate(values):
        state = optimizer.state[value]
        zeros = torch.zeros_like(value)
        moments = (state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros))
        named = zip(("value", "first", "second"), (value, *moments), strict=True)
        found |= {f"{kind}{place}": tensor.detach().double().numpy() for kind, tensor in named}
    return found


OPTIMIZED = [call for call, row in OURS.items() if row.fn != "tracked_forward"]


@pytest.mark.every(5)
@pytest.mark.parametrize("call", OPTIMIZED)
def test_torch_gives_the_truth_of_the_optimizer_and_in_float32_stays_within_its_noise(call: str) -> None:
    found = by_torch(call)
    assert found.keys() == truth(call).keys()
    for name, tensor in truth(call).items():
        np.testing.assert_allclose(found[name], tensor.value, rtol=1e-12, atol=1e-18)
    assert passes(call, by_torch(call, torch.float32))


GRADIENTS = [call for call, row in OURS.items() if row.fn == "tracked_forward"]
STREAM = {
    "hook_embed": ("model.layers.0", False),
    **{f"blocks.{layer}.hook_resid_pre": (f"model.layers.{layer}", False) for layer in range(2)},
    **{f"blocks.{layer}.hook_resid_post": (f"model.layers.{layer}", True) for layer in range(2)},
    **{f"blocks.{layer}.mlp.hook_post": (f"model.layers.{layer}.mlp", True) for layer in range(2)},
    **{f"blocks.{layer}.mlp.hook_pre": (f"model.layers.{layer}.mlp", False) for layer in range(2)},
    "hook_final_norm": ("model.norm", True),
}
"""Hook → a module of transformers, and whether it is its output."""


@functools.cache
def by_autograd(call: str, dtype: torch.dtype) -> Values:
    """Plain transformers and ``backward``: the hooks that are a module's input or output, and all weights."""
    row, args = ROWS[call], dict(ROWS[call].args)
    directory = where(row.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    held: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            held[name] = out[0] if isinstance(out, tuple) else out
            held[name].retain_grad()

        return hook

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_module: Any, given: Any, kwargs: Any) -> None:
            held[name] = given[0] if given else kwargs["hidden_states"]
            held[name].retain_grad()

        return hook

    for name in args.get("hooks", []):  # type: ignore[union-attr]
        if name not in STREAM:
            continue
        module, output = STREAM[str(name)]
        part = model.get_submodule(module)
        if output:
            part.register_forward_hook(keep(str(name)))
        else:
            part.register_forward_pre_hook(keep_input(str(name)), with_kwargs=True)
    logits = model(torch.tensor(args["tokens"]), use_cache=False).logits
    (logits * given(str(args["cotangent"]), dtype)).sum().backward()
    found = {"logits": logits} | {name: tensor.grad for name, tensor in held.items()}
    weights = dict(model.named_parameters())
    found |= {str(name): weights[str(name)].grad for name in args.get("weights", [])}  # type: ignore[union-attr]
    return {name: tensor.detach().double().numpy() for name, tensor in found.items()}


@pytest.mark.every(4)
@pytest.mark.parametrize("call", GRADIENTS)
def test_autograd_gives_the_truth_and_in_float32_stays_within_its_noise(call: str) -> None:
    expected = truth(call)
    for name, value in by_autograd(call, torch.float64).items():
        # transformers computes norms and rotary tables in float32, also of a float64 model.
        np.testing.assert_allclose(value, expected[name].value, rtol=1e-4, atol=2e-6 * np.abs(value).max())
    single = right(call) | by_autograd(call, torch.float32)
    assert passes(call, single)


def test_every_gradient_of_a_row_is_compared_with_autograd_in_some_row() -> None:
    compared = {name for call in GRADIENTS for name in by_autograd(call, torch.float64)}
    asked = {name for call in GRADIENTS for name in truth(call)}
    # What plain transformers has no module for; the weights behind it are compared.
    others = {f"blocks.{layer}.{name}" for layer in range(2) for name in (
        "hook_attn_out", "hook_resid_mid", "hook_mlp_out",
        *(f"attn.hook_{kind}" for kind in ("q", "k", "v", "scores", "pattern")))}  # fmt: skip
    assert asked - compared == others


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "hook", ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_scores", "attn.hook_pattern"]
)
@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_a_gradient_inside_the_attention_is_a_difference_quotient(model: str, hook: str) -> None:
    """Central differences of the logits in float64, along the gradient of one layer."""
    from candle_mi_parity.oracle.hooks import forward, load_model
    from candle_mi_parity.oracle.rounding import Float64

    call, name, size = f"gradient/{model}-inside", f"blocks.0.{hook}", 1e-4
    row = ROWS[call]
    loaded = load_model(where(row.model))
    gradient = torch.from_numpy(truth(call)[name].value)
    direction = gradient / gradient.norm()
    tokens = torch.tensor(row.args["tokens"])
    cotangent = given(str(row.args["cotangent"]), torch.float64)

    def loss(step: float) -> float:
        with Float64():  # type: ignore[no-untyped-call]
            found = forward(loaded, tokens, {name: [lambda tensor: tensor + step * direction]})
        return float((found.tensors["logits"] * cotangent).sum())

    assert (loss(size) - loss(-size)) / (2 * size) == pytest.approx(float(gradient.norm()), rel=1e-5)


SILU_AND_MORE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "softmax": lambda x: torch.softmax(x, -1) @ torch.arange(float(x.shape[-1]), dtype=x.dtype)[:, None],
    "sum": lambda x: (x * x[:1]).sum(0),
}


@pytest.mark.parametrize("name", SILU_AND_MORE)
def test_the_noise_of_a_backward_operation_is_that_of_float32(name: str) -> None:
    """Of float32's error its root mean square is neither a fifth nor five times."""
    x = 2 * torch.from_numpy(np.random.default_rng(5).standard_normal((40, 50)))

    def gradient(values: torch.Tensor) -> torch.Tensor:
        return with_respect_to(lambda held: SILU_AND_MORE[name](held["x"]).square().sum(), {"x": values}, {})["x"]

    scales = MatmulScales()
    with GradientTruth(scales):
        right = gradient(x.float().double())
    with GradientNoise(NoisePool(3), scales):
        noise = (gradient(x.float().double()) - right).square().mean().sqrt()
    error = (gradient(x.float()).double() - right).square().mean().sqrt()
    assert 0.2 < float(noise / error) < 5


# --- faults -----------------------------------------------------------------------------------------


PLANTED: dict[str, Callable[[], tuple[str, Values]]] = {
    "weight decay added to the gradient": lambda: changed("adamw/much-decay", lambda value: value * 1.001, "value0"),
    "another eps": lambda: ("adamw/tiny-gradients", by_torch("adamw/tiny-gradients", eps=1.1e-8)),
    "another count of steps": lambda: (
        "adamw/late-gradient",
        right("adamw/late-gradient", Formula.STEPS_OF_THE_OPTIMIZER),
    ),
    "moments swapped": lambda: (
        "adamw/other-betas",
        by_torch("adamw/other-betas", beta1=0.75, beta2=0.5),
    ),
    "a step too few": lambda: ("adamw/steps", by_torch("adamw/steps", steps=ROWS["adamw/steps"].args["steps"][:3])),  # type: ignore[index]
    "the old learning rate": lambda: ("adamw/rate-changed", by_torch("adamw/rate-changed", later=None)),
    "eps inside the root": lambda: ("adamw/large-eps", by_torch("adamw/large-eps", eps=0.5**2)),
    "moments lost": lambda: ("adamw/restored", by_torch("adamw/restored") | by_torch("adamw/one-step")),
    "an average of 1 − decay": lambda: ("ema/one", by_torch("ema/one", decay=0.1)),
    "a decay in float16": lambda: ("ema/slow", by_torch("ema/slow", decay=float(np.float16(0.99999)))),
    "one ULP more decay than float32 has": lambda: ("ema/slow", by_torch("ema/slow", decay=0.99999 + 2.0**-20)),
    "the gradient of the other sign": lambda: changed(
        "gradient/llama-one-hook", np.negative, "blocks.0.hook_resid_post"
    ),
    "a gradient of 0": lambda: changed("gradient/gemma2-weights", np.zeros_like, "model.embed_tokens.weight"),
    "one position's gradient missing": lambda: changed(
        "gradient/llama-stream", lambda value: value * (np.arange(6) != 3)[:, None], "hook_embed"
    ),
    "a padding row": lambda: ("gradient/gemma2-padding", right("gradient/gemma2-padding", Formula.PADDING_TRAINED)),
    "a mean over the batch": lambda: changed(
        "gradient/llama-batch", lambda value: value / 2, "model.layers.0.mlp.up_proj.weight"
    ),
    "a query's gradient where it has one key": lambda: changed(
        "gradient/llama-inside", lambda value: value + 1e-4 * (np.arange(6) == 0)[:, None], "blocks.0.attn.hook_q"
    ),
    "gelu's slope by erf": lambda: changed(
        "gradient/gemma2-weights", lambda value: value * (1 + 1e-4), "model.layers.1.mlp.gate_proj.weight"
    ),
    "NaN": lambda: changed("gradient/llama-stream", lambda value: value * np.nan, "hook_embed"),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails(name: str) -> None:
    call, values = PLANTED[name]()
    assert passes(call, right(call)) and not passes(call, values)


def test_a_gradient_has_no_other_formula_and_names_of_hooks_are_checked() -> None:
    row = ROWS["gradient/llama-one-hook"]
    with pytest.raises(CaseTableError, match="has no formula last-of-equal"):
        truth_of(row, TABLE, cache_root(), Formula.LAST_OF_EQUAL)
    other = row.model_copy(update={"args": row.args | {"hooks": ["blocks.7.hook_resid_post"]}})
    with pytest.raises(CaseTableError, match=r"PyTorch raises there is no hook blocks\.7"):
        truth_of(other, TABLE, cache_root())
