"""What of torch is the whole process's: set in one place, by one thread at a time, and set back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TORCH = RLock()
"""Held while a model is made, loaded or run: the default dtype and the hooks of all modules are the process's, and
two models in memory are one too many."""


@contextmanager
def torch_state(dtype: torch.dtype) -> Iterator[None]:
    """Hold torch, without gradients, and with a default dtype that is set back at the end.

    An integer tensor times a Python float takes the default dtype (dynamic rotary's sequence length does).
    """
    import torch

    with TORCH, torch.no_grad():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
