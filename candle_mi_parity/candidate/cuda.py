"""CUDA: whether it is available, strict float32, and messages for a lack of memory.

This code has never run on a GPU; the tests replace parts of torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from candle_mi_parity.errors import DeviceError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_MATMUL = (
    "allow_tf32",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_CUDNN = {"allow_tf32": False, "benchmark": False, "deterministic": True}


def missing(device: str) -> str:
    """Why a device cannot be used on this machine, with the remedy; empty if it can.

    :param device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if not device.startswith("cuda"):
        return ""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device: run on a machine with an NVIDIA GPU and its driver"
    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    return "" if number < count else f"no {device}: this machine has {count} CUDA devices, the first is cuda:0"


def describe(device: str) -> str:
    """The GPU, its memory, its driver and torch's CUDA version; ``none`` if there is no GPU."""
    if not device.startswith("cuda") or missing(device):
        return "none"
    import torch

    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, {_gib(card.total_memory)}, driver {_driver()}, CUDA {torch.version.cuda}"


def versions(device: str) -> dict[str, str]:
    """The report's entries on the candidate's device."""
    return {"device": device} | ({"gpu": describe(device)} if device != "cpu" else {})


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["unknown"])[0]


@contextmanager
def strict_float32(device: str) -> Iterator[None]:
    """On CUDA: no TF32, no reduced-precision sums, deterministic algorithms. Earlier settings are restored.

    :raises DeviceError: a setting has no effect, or was changed inside the block.
    """
    if not device.startswith("cuda"):
        yield
        return
    import torch

    before, workspace = _settings(), os.environ.get(WORKSPACE)
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        os.environ[WORKSPACE] = ":4096:8"  # without it, cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
        _set({name: _STRICT[name] for name in before})
        check_strict()
        yield
        check_strict()
    finally:
        _set(before)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = workspace


def check_strict() -> None:
    """:raises DeviceError: names each setting that is not strict."""
    import torch

    wrong = [name for name, value in _settings().items() if value != _STRICT[name]]
    wrong += [] if torch.are_deterministic_algorithms_enabled() else ["deterministic algorithms"]
    wrong += [] if os.environ.get(WORKSPACE) in (":4096:8", ":16:8") else [WORKSPACE]
    if wrong:
        raise DeviceError(f"results are not float32 or not deterministic: wrong setting of {', '.join(wrong)}")


def _settings() -> dict[str, bool]:
    import torch

    place = torch.backends.cuda.matmul  # torch 2.6 has no accumulation in float16, and no setting for it
    matmul = {f"matmul.{name}": bool(getattr(place, name)) for name in _MATMUL if hasattr(place, name)}
    return matmul | {f"cudnn.{name}": bool(getattr(torch.backends.cudnn, name)) for name in _CUDNN}


def _set(settings: dict[str, bool]) -> None:
    import torch

    places = {"matmul": torch.backends.cuda.matmul, "cudnn": torch.backends.cudnn}
    for name, value in settings.items():
        place, _, setting = name.partition(".")
        setattr(places[place], setting, value)


_STRICT = {f"matmul.{name}": False for name in _MATMUL} | {f"cudnn.{name}": value for name, value in _CUDNN.items()}


@contextmanager
def explain_out_of_memory(device: str, what: str, needed: Callable[[], int]) -> Iterator[None]:
    """Turn an out-of-memory error into one line.

    :param needed: a lower bound of the bytes that ``what`` needs on the device.
    :raises DeviceError: with the needed and the free memory, and the remedy.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise DeviceError(
            f"{device} is out of memory at {what}, which takes at least {_gib(needed())}: {_gib(free)} of "
            f"{_gib(total)} are free; end what else runs on it (nvidia-smi), use a larger one, or --device cpu"
        ) from error


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
