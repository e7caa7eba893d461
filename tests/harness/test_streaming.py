"""A model that is read layer by layer computes the same as when it is loaded whole."""

import copy
from collections.abc import Callable
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
from candle_mi_parity.spec.families import MAPPED
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
    """A truth pass, and Σa²b² of each matmul."""
    scales = MatmulScales()
    with Truth64(scales), torch.no_grad():
        return forward(model, tokens), list(scales._squares.values())


def assert_same(found: Captured, expected: Captured) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        worst = float((found[name] - value).abs().max() / value.square().mean().sqrt())
        assert worst <= EQUAL, f"{name}: {worst:.3g} of its root mean square"


@pytest.mark.every(4)
@pytest.mark.parametrize("case_id", [*(f"{family}/hub" for family in MAPPED), "gemma2/sharded", BFLOAT16])
def test_a_streamed_model_computes_the_same(case_id: str) -> None:
    whole, streamed, tokens = both(case_id)
    expected, found = dict(whole.named_buffers()), dict(streamed.named_buffers())
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    (one, squares), (other, parts) = run(whole, tokens), run(streamed, tokens)
    assert_same(other.tensors, one.tensors)
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


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("case_id", "mode"),
    [("gemma2/hub", "free"), ("gemma2/hub", "forced"), ("llama/edit-replace-stream", "free"), (BFLOAT16, "free")],
)
def test_a_truth_is_the_same_streamed(
    case_id: str, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lens, SAE and edits; a tiny vocabulary fits in one chunk, so that the draws are the same."""
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


def test_one_layer_is_loaded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
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

Rows = slice | torch.Tensor | None


def with_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    other = copy.copy(weights)
    other.__dict__["_dtype"] = dtype
    return other


FAULTS: dict[str, tuple[str, Callable[[Callable[..., torch.Tensor], Weights, str, Rows], torch.Tensor]]] = {
    "unrounded": (BFLOAT16, lambda read, w, name, rows: read(with_dtype(w, torch.float64), name, rows)),
    "bfloat16": ("llama/hub", lambda read, w, name, rows: read(with_dtype(w, torch.bfloat16), name, rows)),
    "other layer": ("llama/hub", lambda read, w, name, rows: read(w, name.replace("layers.2.", "layers.1."), rows)),
    "token order": (
        "llama/hub",
        lambda read, w, name, rows: read(w, name, rows.flip(0) if isinstance(rows, torch.Tensor) else rows),
    ),
}


RIGHT = streaming.chunks(WHOLE, CHUNK)
CHUNKS: dict[str, list[slice]] = {
    "shifted": [slice(1, RIGHT[0].stop), *RIGHT[1:], slice(0, 1)],
    "one short": [*RIGHT[:-1], slice(RIGHT[-1].start, WHOLE - 1)],
    "swapped": [RIGHT[1], RIGHT[0], *RIGHT[2:]],
}


@pytest.mark.parametrize("fault", [*FAULTS, *CHUNKS])
def test_wrong_weights_and_wrong_chunks_are_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case_id, change = FAULTS.get(fault, ("llama/hub", lambda read, *asked: read(*asked)))
    whole, streamed, tokens = both(case_id)
    read, expected = Weights.read, run(whole, tokens)[0].tensors
    monkeypatch.setattr(Weights, "read", lambda self, name, rows=None: change(read, self, name, rows))
    monkeypatch.setattr(streaming, "chunks", lambda *_: CHUNKS.get(fault, RIGHT))
    with pytest.raises(AssertionError, match="logits" if fault in CHUNKS else "root mean square"):
        assert_same(run(streamed, tokens)[0].tensors, expected)


# --- when a model is streamed, and refusals -------------------------------------------------------


def test_the_size_and_the_memory_that_a_control_group_leaves_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = real("gemma2/hub").subject.model_dir
    size = sum(tensor.numel() for file in weight_files(directory) for tensor in load_file(file).values()) * 8
    for there, streamed in ((4 * size, False), (4 * size - 1, True)):
        monkeypatch.setattr(streaming, "memory_bytes", lambda there=there: there)
        assert streaming.is_streamed(directory) is streamed
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(untrusted, "_CGROUP", limit)
    machine = memory_bytes()
    for text, left in (("max\n", machine), ("1000\n", 1000), (f"{2 * machine}\n", machine)):
        limit.write_text(text)
        assert memory_bytes() == left


def float32_streamed(directory: Path) -> nn.Module:
    return load_streamed(directory, torch.float32)


def copy_of(tmp_path: Path, case_id: str, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A copy of a tiny model with other tensors and settings."""
    directory = changed_model(tmp_path / "model", real(case_id).subject.model_dir, **config)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tensors_of(case_id: str) -> dict[str, torch.Tensor]:
    return load_file(real(case_id).subject.model_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("case_id", "changed", "expected"),
    [
        ("llama/hub", {"model.layers.1.mlp.up_proj.weight": None}, "lacks model.layers.1.mlp.up_proj.weight"),
        ("qwen2/hub", {"model.layers.0.self_attn.q_proj.bias": None}, "lacks model.layers.0.self_attn.q_proj"),
        ("llama/hub", {"model.norm.weight": torch.ones(3)}, r"norm.weight has shape \(3,\), expected \(64,\)"),
    ],
)
def test_incomplete_weights_are_refused(
    case_id: str, changed: dict[str, torch.Tensor | None], expected: str, tmp_path: Path
) -> None:
    """As when they are loaded whole: see ``test_wrong_verdicts.py``."""
    tensors = {name: value for name, value in (tensors_of(case_id) | changed).items() if value is not None}
    with pytest.raises(ModelError, match=f"{expected}.* at random: there is no truth$"):
        float32_streamed(copy_of(tmp_path, case_id, tensors))


def test_unused_tensors_are_listed(tmp_path: Path) -> None:
    name, tensors = "model.layers.9.mlp.up_proj.weight", tensors_of("llama/hub")
    assert ignored_tensors(float32_streamed(real("llama/hub").subject.model_dir)) == []
    more = copy_of(tmp_path, "llama/hub", {**tensors, name: torch.ones(2)})
    assert ignored_tensors(float32_streamed(more)) == [name]


@pytest.mark.parametrize("case_id", ["llama/hub", "qwen3/hub"])
def test_names_without_their_prefix_are_found(case_id: str, tmp_path: Path) -> None:
    """As the model without its head is saved."""
    bare = {name.removeprefix("model."): value for name, value in tensors_of(case_id).items()}
    directory, tokens = copy_of(tmp_path, case_id, bare), torch.tensor([[1, 5, 9]])
    expected = run(load_model(real(case_id).subject.model_dir), tokens)[0].tensors
    for load in (load_model, float32_streamed):
        assert_same(run(load(directory), tokens)[0].tensors, expected)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"a is torch.int64, expected floating"):
        Weights(tmp_path, torch.float32).read("a")


def test_an_unembedding_in_the_files_of_a_tied_model_is_used(tmp_path: Path) -> None:
    """transformers then unties the model."""
    there, tensors = real("gemma2/hub").subject, tensors_of("gemma2/hub")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    directory, tokens = copy_of(tmp_path, "gemma2/hub", tensors), torch.tensor(there.tokens)
    whole, streamed, tied = load_model(directory), float32_streamed(directory), float32_streamed(there.model_dir)
    assert_same(run(whole, tokens)[0].tensors, run(streamed, tokens)[0].tensors)
    assert not torch.allclose(run(tied, tokens)[0].tensors["logits"], run(whole, tokens)[0].tensors["logits"])


@pytest.mark.gpu
def test_a_streamed_model_computes_the_same_on_cuda() -> None:
    directory, tokens, dtype = subject_of("gemma2/hub")
    expected = run(load_model(directory), tokens)[0].tensors
    streamed = load_streamed(directory, dtype, "cuda:0", CHUNK)
    found = run(streamed, tokens.to("cuda:0"))[0].tensors
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=1e-12 * float(value.abs().max()))
