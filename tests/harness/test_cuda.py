"""The CUDA lane with a fake GPU; these tests do not show what a GPU computes."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from candle_mi_parity.candidate import cuda, torch_source
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.errors import DeviceError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.run import diff as diff_run
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.paths import cache_root
from tests.support.command import command
from tests.support.planting import CASES, Giving

CASE = CASES["llama/hub"]


def settings() -> tuple[dict[str, bool], bool, str | None]:
    return cuda._settings(), torch.are_deterministic_algorithms_enabled(), os.environ.get(cuda.WORKSPACE)


@pytest.mark.parametrize("workspace", [None, ":0:0"])
def test_strict_settings_are_restored(monkeypatch: pytest.MonkeyPatch, workspace: str | None) -> None:
    monkeypatch.delenv(cuda.WORKSPACE, raising=False)
    if workspace is not None:
        monkeypatch.setenv(cuda.WORKSPACE, workspace)
    before = settings()
    with cuda.strict_float32("cuda:0"):
        assert not any(value for name, value in cuda._settings().items() if name.startswith("matmul"))
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32
        assert torch.are_deterministic_algorithms_enabled() and os.environ[cuda.WORKSPACE] == ":4096:8"
    assert settings() == before and before[2] == workspace
    with pytest.raises(KeyError), cuda.strict_float32("cuda:0"):
        raise KeyError
    assert settings() == before
    with cuda.strict_float32("cpu"):
        assert settings() == before


def test_a_changed_setting_is_named() -> None:
    for name in cuda._settings():
        with pytest.raises(DeviceError, match=name), cuda.strict_float32("cuda:0"):
            cuda._set({name: not cuda._STRICT[name]})
    with pytest.raises(DeviceError, match="deterministic algorithms"), cuda.strict_float32("cuda:0"):
        torch.use_deterministic_algorithms(False)


def test_a_trace_on_cuda_is_made_under_the_strict_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(TorchSource, "_trace", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    for device in ("cuda:0", "cpu"):
        TorchSource(device).trace(SimpleNamespace(case=CASE), "free", SimpleNamespace(tensors={}), tmp_path)  # type: ignore[arg-type]
    assert seen == [True, False]


def test_out_of_memory_names_the_sizes_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_source, "load_model", full)
    monkeypatch.setattr(torch_source, "weight_bytes", lambda *_: 10 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 8 * 2**30))
    with pytest.raises(DeviceError) as caught:
        TorchSource("cuda:0").model(Path("gemma"))
    said = str(caught.value)
    assert said.startswith(
        "cuda:0 is out of memory at loading gemma, which takes at least 10.00 GiB: 3.00 GiB of 8.00"
    )
    assert "nvidia-smi" in said and "--device cpu" in said and "\n" not in said


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One GPU, and a PATH with only nvidia-smi."""
    card = SimpleNamespace(name="NVIDIA A", total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 550.54\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("a_gpu")
def test_no_nvcc_is_inconclusive_with_the_remedy(tmp_path: Path) -> None:
    done = command("run", "--device", "cuda:0", "--cases", "llama/hub", "--out", str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert "no nvcc on PATH" in done.stdout + done.stderr and "install the CUDA toolkit" in done.stdout + done.stderr


def test_a_diff_of_cpu_and_cuda_judges_each_side_with_its_own_noise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpus = TorchSource().trace  # the CPU's numbers, with the name of another device
    monkeypatch.setattr(diff_run, "open_source", lambda *given: Giving(cpus, None, given[-1]))
    devices, empty = ("cpu", "cuda:0"), NOTHING_KNOWN
    found = diff_run.diff(("torch", "torch"), [CASE], cache_root(), tmp_path, empty, Progress(), devices)
    assert found.versions["device"] == "cpu against cuda:0" and found.verdict.exit_code == 0
    cpu, gpu = found.cases[0].a.result, found.cases[0].b.result
    assert "--device cuda:0" in gpu.reproduce and "--device" not in cpu.reproduce
    a, b = ({tensor.name: tensor.position_ratio for tensor in side.tensors} for side in (cpu, gpu))
    # The same error over more noise: for one matmul, K/6 against K/16 is a factor of 1.6.
    assert b["blocks.0.attn.hook_q"] < 0.95 * a["blocks.0.attn.hook_q"] and b["logits"] < a["logits"]
