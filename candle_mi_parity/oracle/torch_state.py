"""torch's process-wide state: set here only, by one thread at a time, and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TORCH = RLock()
"""Held while a model is built, loaded or run: the default dtype is shared by all threads, and two models at once
would need too much memory."""


@contextmanager
def torch_state(dtype: torch.dtype) -> Iterator[None]:
    """Hold the lock, without gradients and with another default dtype.

    An integer tensor times a Python float has the default dtype (as in dynamic rotary's sequence length).
    """
    import torch

    with TORCH, torch.no_grad():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
