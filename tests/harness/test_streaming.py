"""A model that is read layer by layer computes what the same model computes that was loaded whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from candle_mi_parity.errors import ModelError
from candle_mi_parity.files import untrusted
from candle_mi_parity.files.untrusted import memory_bytes
from candle_mi_parity.models.checkpoint import weight_files
from candle_mi_parity.oracle import streaming
from candle_mi_parity.oracle.compute import round_weights, sample
from candle_mi_parity.oracle.hooks import Captured, Recorder, forward, ignored_tensors, load_model
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import MatmulScales, Truth64
from candle_mi_parity.oracle.streaming import Weights, load_streamed
from candle_mi_parity.spec.families import FAMILIES
from candle_mi_parity.spec.hook_points import Mode
from tests.support.planting import changed_model, real

BFLOAT16 = "llama/bf16"
CHUNK = 50
"""Does not divide the vocabulary of 211."""
WHOLE = 211
EQUAL = 1e-13


def subject_of(case_id: str) -> tuple[Path, torch.Tensor, torch.dtype]:
    subject = real(case_id).subject
    return subject.model_dir, torch.tensor(subject.tokens), getattr(torch, subject.case.dtype)


def both(case_id: str, chunk: int = CHUNK) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    directory, tokens, dtype = subject_of(case_id)
    whole = load_model(directory)
    round_weights(whole, dtype)
    return whole, load_streamed(directory, dtype, chunk=chunk), tokens


def run(model: nn.Module, tokens: torch.Tensor) -> tuple[Recorder, list[torch.Tensor]]:
    """A truth pass, and Σa²b² of each of its matmuls."""
    scales = MatmulScales()
    with Truth64(scales), torch.no_grad():
        return forward(model, tokens), list(scales._squares.values())


def assert_same(found: Captured, expected: Captured) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        worst = float((found[name] - value).abs().max() / value.square().mean().sqrt())
        assert worst <= EQUAL, f"{name}: {worst:.3g} of its root mean square"


@pytest.mark.parametrize("case_id", [*(f"{family}/hub" for family in FAMILIES), "gemma2/sharded", BFLOAT16])
def test_a_streamed_model_computes_what_the_whole_one_does(case_id: str) -> None:
    whole, streamed, tokens = both(case_id)
    expected, found = dict(whole.named_buffers()), dict(streamed.named_buffers())
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    (one, squares), (other, parts) = run(whole, tokens), run(streamed, tokens)
    assert_same(other.tensors, one.tensors)
    # The noise of each element has the size that it has in the whole model.
    n_chunks = -(-WHOLE // CHUNK)
    parts = [*parts[:-n_chunks], torch.cat(parts[-n_chunks:], -1)]
    assert len(parts) == len(squares)
    for number, (mine, theirs) in enumerate(zip(parts, squares, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0, msg=f"Σa²b² of matmul {number}")


@pytest.mark.parametrize("case_id", ["gemma2/hub", BFLOAT16])
def test_with_the_same_draws_the_noise_is_the_same_to_the_bit(case_id: str) -> None:
    whole, streamed, tokens = both(case_id, WHOLE)
    one, other = (sample(model, tokens, 1, lambda captured: {}, {})[2] for model in (whole, streamed))
    assert all(torch.equal(other[name], one[name]) for name in one) and bool(one["logits"].all())


def test_with_other_draws_the_noise_has_the_same_size() -> None:
    """In chunks the numbers are drawn chunk by chunk, which are others."""
    whole, streamed, tokens = both("gemma2/hub")
    one, other = (sample(model, tokens, 1, lambda captured: {}, {})[2] for model in (whole, streamed))
    assert not torch.equal(one["logits"], other["logits"])
    for name in one:
        if bool(one[name].any()):
            assert 0.6 < float(other[name].mean().sqrt() / one[name].mean().sqrt()) < 1.6, name


@pytest.mark.parametrize(
    ("case_id", "mode"),
    [("gemma2/hub", "free"), ("gemma2/hub", "forced"), ("llama/edit-replace-stream", "free"), (BFLOAT16, "free")],
)
def test_a_truth_is_the_same_streamed(
    case_id: str, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its lens, its SAE and its edits; the draws are the same, since one chunk holds a tiny vocabulary."""
    there = real(case_id, mode)
    monkeypatch.setattr(streaming, "memory_bytes", lambda: 1)
    oracle = Oracle(there.subject, tmp_path)
    truth = oracle.truth(mode)
    assert (truth.meta["weights"], there.truth.meta["weights"]) == ("streamed", "whole")
    assert_same(
        *({name: torch.from_numpy(t.value) for name, t in each.tensors.items()} for each in (truth, there.truth))
    )
    for name, tensor in there.truth.tensors.items():
        np.testing.assert_allclose(truth.tensors[name].noise, tensor.noise, rtol=1e-5, err_msg=name)
    assert truth.scalars.keys() == there.truth.scalars.keys()
    for name, pair in there.truth.scalars.items():
        np.testing.assert_allclose(truth.scalars[name], pair, rtol=1e-5, err_msg=name)


def test_one_layer_has_weights_at_a_time_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, tokens = both("gemma2/hub")
    held: list[set[str]] = []
    read = Weights.read

    def watch(self: Weights, name: str, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        held.append({there.split(".")[2] for there in present() if there.startswith("model.layers.")})
        return read(self, name, rows)

    def present() -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]

    monkeypatch.setattr(Weights, "read", watch)
    run(model, tokens)
    assert max(len(layers) for layers in held) <= 1 and present() == []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)  # type: ignore[union-attr, index]
    with pytest.raises(ZeroDivisionError):
        run(model, tokens)
    assert present() == [], "weights stay behind when a forward breaks off"


# --- faults in the streaming itself ---------------------------------------------------------------

Read = Callable[[Weights, str, slice | torch.Tensor | None], torch.Tensor]


def unrounded(read: Read, weights: Weights, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
    return read(_with(weights, torch.float64), name, rows)


def through_bfloat16(read: Read, weights: Weights, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
    return read(_with(weights, torch.bfloat16), name, rows)


def other_layer(read: Read, weights: Weights, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
    return read(weights, name.replace("layers.2.", "layers.1."), rows)


def stale_norm(read: Read, weights: Weights, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
    return read(weights, name.replace("model.norm.", "model.layers.0.input_layernorm."), rows)


def sorted_tokens(read: Read, weights: Weights, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
    """The rows of the prompt in another order than their places say."""
    return read(weights, name, rows.flip(0) if isinstance(rows, torch.Tensor) else rows)


def _with(weights: Weights, dtype: torch.dtype) -> Weights:
    other = Weights.__new__(Weights)
    other.__dict__ |= weights.__dict__ | {"_dtype": dtype}
    return other


@pytest.mark.parametrize(
    ("fault", "case_id"),
    [
        (unrounded, BFLOAT16),
        (through_bfloat16, "llama/hub"),
        (other_layer, "llama/hub"),
        (stale_norm, "llama/hub"),
        (sorted_tokens, "llama/hub"),
    ],
)
def test_wrong_weights_are_seen(
    fault: Callable[..., torch.Tensor], case_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, streamed, tokens = both(case_id)
    read = Weights.read
    expected = run(whole, tokens)[0].tensors
    assert_same(run(streamed, tokens)[0].tensors, expected)
    monkeypatch.setattr(Weights, "read", lambda self, name, rows=None: fault(read, self, name, rows))
    with pytest.raises(AssertionError):
        assert_same(run(streamed, tokens)[0].tensors, expected)


@pytest.mark.parametrize("fault", ["shifted", "one short", "overlapping", "swapped"])
def test_chunks_that_are_off_by_one_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, streamed, tokens = both("llama/hub")
    right = streaming.chunks(WHOLE, CHUNK)
    wrong = {
        "shifted": [slice(1, right[0].stop), *right[1:], slice(0, 1)],
        "one short": [*right[:-1], slice(right[-1].start, WHOLE - 1)],
        "overlapping": [right[0], slice(right[1].start - 1, right[1].stop - 1), *right[2:]],
        "swapped": [right[1], right[0], *right[2:]],
    }[fault]
    monkeypatch.setattr(streaming, "chunks", lambda size, step: wrong)
    with pytest.raises(AssertionError, match="logits"):
        assert_same(run(streamed, tokens)[0].tensors, run(whole, tokens)[0].tensors)


@pytest.mark.parametrize(("size", "step"), [(211, 50), (200, 50), (50, 50), (49, 50), (1, 1)])
def test_chunks_cover_each_entry_once(size: int, step: int) -> None:
    found = [list(range(size))[rows] for rows in streaming.chunks(size, step)]
    assert [entry for part in found for entry in part] == [*range(size)] and max(map(len, found)) <= step


# --- when, and what is refused --------------------------------------------------------------------


def test_the_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = real("gemma2/hub").subject.model_dir
    size = sum(tensor.numel() for file in weight_files(directory) for tensor in load_file(file).values()) * 8
    for there, streamed in ((4 * size, False), (4 * size - 1, True)):
        monkeypatch.setattr(streaming, "memory_bytes", lambda there=there: there)
        assert streaming.is_streamed(directory) is streamed


def test_a_control_group_may_leave_less_than_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(untrusted, "_CGROUP", limit)
    machine = memory_bytes()
    for text, left in (("max\n", machine), ("1000\n", 1000), (f"{2 * machine}\n", machine)):
        limit.write_text(text)
        assert memory_bytes() == left


def without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def with_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(2)


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(3)


def float32_streamed(directory: Path) -> nn.Module:
    return load_streamed(directory, torch.float32)


Fault = Callable[[dict[str, torch.Tensor]], None]


def spoilt(tmp_path: Path, fault: Fault, case_id: str = "llama/hub", **change: object) -> Path:
    """A copy of a tiny model in whose files something is otherwise."""
    base = real(case_id).subject.model_dir
    tensors = load_file(base / "model.safetensors")
    fault(tensors)
    directory = changed_model(tmp_path / "model", base, **change)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def without_bias(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.bias"]


def nothing(_: dict[str, torch.Tensor]) -> None: ...


@pytest.mark.parametrize("load", [load_model, float32_streamed])
@pytest.mark.parametrize(
    ("case_id", "change", "fault", "said"),
    [
        ("llama/hub", {}, without, "lacks model.layers.1.mlp.up_proj.weight, which transformers would"),
        ("qwen2/hub", {}, without_bias, "lacks model.layers.0.self_attn.q_proj.bias, which transformers would"),
        (
            "llama/hub",
            {"num_hidden_layers": 4},
            nothing,
            r"model.layers.3.*\(and 6 more\), which transformers wou",
        ),
        ("llama/hub", {}, of_another_shape, r"model.norm.weight has shape \(3,\), expected \(64,\); transf"),
    ],
)
def test_of_files_that_do_not_hold_the_model_there_is_no_truth(
    load: Callable[[Path], nn.Module],
    case_id: str,
    change: dict[str, object],
    fault: Fault,
    said: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load(spoilt(tmp_path, fault, case_id, **change))
    assert str(caught.value).endswith("at random: there is no truth") and "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, float32_streamed])
def test_tensors_that_transformers_does_not_take_are_noted(load: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    whole = real("llama/hub").subject.model_dir
    assert ignored_tensors(load(whole)) == []
    model = load(spoilt(tmp_path, with_more))
    assert ignored_tensors(model) == ["model.layers.9.mlp.up_proj.weight"]
    tokens = torch.tensor([[1, 5, 9]])
    assert_same(run(model, tokens)[0].tensors, run(load(whole), tokens)[0].tensors)


def bare(tensors: dict[str, torch.Tensor]) -> None:
    """As the model without its head is saved."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("case_id", ["llama/hub", "qwen3/hub"])
def test_names_without_their_prefix_are_found(case_id: str, tmp_path: Path) -> None:
    directory, tokens = spoilt(tmp_path, bare, case_id), torch.tensor([[1, 5, 9]])
    expected = run(load_model(real(case_id).subject.model_dir), tokens)[0].tensors
    for load in (load_model, float32_streamed):
        assert_same(run(load(directory), tokens)[0].tensors, expected)


def test_numbers_that_are_whole_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"a is torch.int64, expected floating"):
        Weights(tmp_path, torch.float32).read("a")


def test_an_unembedding_in_the_files_of_a_tied_model_is_taken(tmp_path: Path) -> None:
    """transformers unties such a model; so does the streamed one."""
    there = real("gemma2/hub").subject
    tensors = load_file(there.model_dir / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    directory = changed_model(tmp_path / "model", there.model_dir)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors")
    subject, tokens = replace(there, model_dir=directory), torch.tensor(there.tokens)
    models = load_model(subject.model_dir), load_streamed(subject.model_dir, torch.float32)
    assert_same(*(run(model, tokens)[0].tensors for model in models))
    tied = run(load_streamed(there.model_dir, torch.float32), tokens)[0].tensors["logits"]
    assert not torch.allclose(tied, run(models[1], tokens)[0].tensors["logits"])


@pytest.mark.gpu
def test_a_streamed_model_computes_the_same_on_cuda() -> None:
    directory, tokens, dtype = subject_of("gemma2/hub")
    expected = run(load_model(directory), tokens)[0].tensors
    streamed = load_streamed(directory, dtype, "cuda:0", CHUNK)
    found = run(streamed, tokens.to("cuda:0"))[0].tensors
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=1e-12 * float(value.abs().max()))
