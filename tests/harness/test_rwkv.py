"""RWKV-6 and RWKV-7 against the `rwkv` package, and effective attention against what the recurrence does.

The package is not part of the set-up. Where it is not installed, the tests that need it are skipped.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_mi_parity.models.generate import generated_model, tiny_config
from candle_mi_parity.models.rwkv import TimeMix
from candle_mi_parity.oracle.compute import sample
from candle_mi_parity.oracle.hooks import Captured, Edits, Recorder, forward, load_model
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.cases import TinyModel
from candle_mi_parity.spec.hook_points import SIGNED, WRITES
from candle_mi_parity.spec.paths import cache_root

LAYERS, WIDTH = 3, 128
NAMES = {
    "rwkv7": {
        "model.embeddings": "emb", "lm_head": "head", "model.norm": "ln_out", "model.layers": "blocks",
        "pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2", ".attn.": ".att.", "r_proj": "receptance",
        "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "ln_x",
    },
    "rwkv6": {
        "rwkv.embeddings": "emb", "rwkv.ln_out": "ln_out", "rwkv.blocks": "blocks", "pre_ln": "ln0",
        "attention": "att", "feed_forward": "ffn",
    },
}  # fmt: skip
"""The names of tensors in published checkpoints → those of BlinkDL's, which the package reads."""
PACKAGE = """
import sys
import numpy as np
import torch
from rwkv.model import RWKV

torch.set_num_threads(1)
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
state, found = None, {}
logits, state = model.forward([int(token) for token in sys.argv[3].split(",")], state, full_output=True)
found["logits"] = logits.reshape(-1, logits.shape[-1]).numpy()
for layer in range(len(state) // 3):
    found[f"blocks.{layer}"] = state[3 * layer + 1].numpy()
np.savez(sys.argv[2], **found)
"""


def tiny(version: str, **change: object) -> Path:
    model = TinyModel.model_validate(
        {"source": "tiny", "config": f"models/{version}.json", "dialect": "hub", "change": change}
    )
    return generated_model(tiny_config(model), "hub", cache_root())


def captured(directory: Path, tokens: list[int], edits: Edits | None = None) -> Captured:
    with Float64():  # type: ignore[no-untyped-call]
        return forward(load_model(directory), torch.tensor([tokens]), edits).tensors


def blinkdl(version: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint as BlinkDL's own code has it, with the low-rank matrices transposed."""
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in NAMES[version].items():
            name = name.replace(ours, theirs)
        stem, _, kind = name.partition("_lora.lora.")
        if kind:
            name = stem + {"0.weight": "1", "2.weight": "2", "2.bias": "0"}[kind]
            tensor = tensor.T if tensor.dim() == 2 else tensor
        found[name] = tensor.float().contiguous()
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("rwkv") is None,
    reason="rwkv is not installed: pip install '.[rwkv]' beside this suite's packages",
)
@pytest.mark.parametrize("length", [20, 1])
@pytest.mark.parametrize("version", ["rwkv7", "rwkv6"])
def test_truth_is_what_the_rwkv_package_computes(version: str, length: int, tmp_path: Path) -> None:
    """With heads of 64, for which the package has the eps of the norm of heads written into its code."""
    sizes = {"head_dim": 64} if version == "rwkv7" else {"num_attention_heads": 64, "head_size": 64}
    directory = tiny(version, hidden_size=WIDTH, **sizes)
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, 211, length)]
    ours = captured(directory, tokens)
    weights = {name: value.detach() for name, value in load_model(directory).state_dict().items()}
    torch.save(blinkdl(version, weights), tmp_path / "model.pth")
    switches = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(version == "rwkv7"))}
    told = [str(tmp_path / "model"), str(tmp_path / "out.npz"), ",".join(map(str, tokens))]
    subprocess.run([sys.executable, "-c", PACKAGE, *told], env=os.environ | switches, check=True, capture_output=True)
    theirs = dict(np.load(tmp_path / "out.npz"))
    worst = {"logits": np.abs(theirs["logits"] - ours["logits"][0].numpy()).max()}
    for layer in range(LAYERS):
        state = theirs[f"blocks.{layer}"]  # RWKV-7's is value by key there
        state = state.swapaxes(-1, -2) if version == "rwkv7" else state
        worst[f"state {layer}"] = np.abs(state - ours[f"blocks.{layer}.rwkv.hook_state"][0].numpy()).max()
    assert max(worst.values()) < 2e-5, worst


@pytest.mark.parametrize("factors", [None, [1.0, 0.0, 1.0, 2.0, 1.0, 0.5]])
@pytest.mark.parametrize("version", ["rwkv7", "rwkv6"])
def test_effective_attention_is_the_weight_of_each_value_in_the_output(
    version: str, factors: list[float] | None
) -> None:
    """The recurrence is linear in the values: with a single value of 1, its output is the weight of that value."""
    model = load_model(tiny(version))
    mixing: Any = next(module for module in model.modules() if isinstance(module, TimeMix))
    length, count, width = 6, 4, 16
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.randn(2, length, count, width, generator=generator, dtype=torch.float64)

    read, decay, key, value = drawn(), drawn().sigmoid(), drawn(), drawn()
    removed = drawn()
    removed = removed / removed.norm(dim=-1, keepdim=True)
    more = (removed, removed * drawn().sigmoid()) if version == "rwkv7" else (drawn()[0, 0],)
    seen: list[torch.Tensor] = []
    mixing.effective_attention.register_forward_hook(lambda _module, args, _out: seen.append(args[0][0]))
    if factors is not None:
        mixing.writes.register_forward_hook(lambda _module, _args, _out: torch.tensor(factors))
    weights = torch.zeros(2, count, length, length, dtype=torch.float64)
    with Float64():  # type: ignore[no-untyped-call]
        for source in range(length):
            one = torch.zeros_like(value)
            one[:, source, :, 0] = 1
            weights[..., source] = mixing._recurrence(read, decay, key, one, *more)[..., 0].transpose(1, 2)
    assert bool((weights.triu(1) == 0).all()) and bool((weights < 0).any())
    positive = weights.clamp_min(0)
    expected = positive / (positive.sum(-1, keepdim=True) + 1e-10)
    torch.testing.assert_close(seen[0], expected, rtol=1e-9, atol=1e-12)


def test_an_entry_near_0_has_the_noise_that_it_has_without_the_relu() -> None:
    """Of weights that are all negative the samples are 0 too, whether rounding may change a sign or not."""
    far, near = 0.5, 1e-8

    def run(_model: Any, tokens: torch.Tensor, _edits: Edits) -> Recorder:
        recorder = Recorder()
        signed = torch.tensor([[-far, -near, 1.0]], dtype=torch.float64).repeat(tokens.shape[0], 1)
        signed = signed + (signed.abs() + 1) - (signed.abs() + 1)  # rounded as numbers of size 1
        recorder.at("weights", signed.relu())
        recorder.at("weights" + SIGNED, signed)
        return recorder

    tokens = torch.zeros(1, 4, dtype=torch.int64)
    _, values, squares = sample(torch.nn.Identity(), tokens, 0, lambda _captured: {}, {}, run=run)
    assert set(values) == set(squares) == {"weights"}
    noise = squares["weights"].sqrt()[0]
    assert values["weights"].tolist() == [[0.0, 0.0, 1.0]] and noise[0] == 0
    assert 2.0**-25 < noise[1] < 2.0**-22 and 2.0**-25 < noise[2] < 2.0**-22


@pytest.mark.parametrize("version", ["rwkv7", "rwkv6"])
def test_an_edit_of_the_writes_changes_later_positions_only(version: str) -> None:
    """RWKV-6 reads its state before it is written, RWKV-7 after."""
    directory, tokens, knocked = tiny(version), [5, 9, 14, 3, 77, 21], 2
    factors = torch.ones(len(tokens), dtype=torch.float64)
    factors[knocked] = 0
    plain = captured(directory, tokens)
    edited = captured(directory, tokens, {f"blocks.1.{WRITES}": [lambda written: written * factors]})
    changed = {
        name: (plain[name] != edited[name]).flatten(2).any(-1)[0].tolist()
        for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    }
    first = knocked if version == "rwkv7" else knocked + 1
    assert changed["blocks.0.hook_resid_post"] == [False] * 6
    assert changed["blocks.1.hook_resid_post"] == [position >= first for position in range(6)]
    name = "blocks.1.rwkv.hook_effective_attn"
    assert bool((edited[name][..., knocked + 1 :, knocked] == 0).all()) and bool(
        (plain[name][..., knocked] > 0).any()
    )
