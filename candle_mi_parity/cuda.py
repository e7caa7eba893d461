"""CUDA as the suite needs it: whether it is there."""

from __future__ import annotations

import torch


def missing(device: str) -> str:
    """Why nothing can run on a device here, and the remedy; empty when it can.

    :param device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if not device.startswith("cuda"):
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device: run on a machine with an NVIDIA GPU and its driver"
    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    return "" if number < count else f"no {device}: this machine has {count} CUDA devices, the first is cuda:0"
