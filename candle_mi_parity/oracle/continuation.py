"""PyTorch's greedy continuation of a prompt, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from candle_mi_parity.files.cache import cached
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.oracle.hooks import forward
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import Float64


def greedy(oracle: Oracle, cache: Path, steps: int) -> list[int]:
    """At most ``steps`` tokens, from the cache or computed, up to the first EOS."""
    found: list[int] = cached(cache, "continuations", [oracle.key, steps], lambda: _computed(oracle, steps))
    return found


def _computed(oracle: Oracle, steps: int) -> list[int]:
    ends: Any = read_config(oracle.subject.model_dir).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    tokens = list(oracle.subject.tokens[0])
    given = len(tokens)
    with Float64():  # type: ignore[no-untyped-call]
        while len(tokens) - given < steps:
            logits = forward(oracle.computation.model, torch.tensor([tokens])).tensors["logits"]
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] in ends:
                break
    return tokens[given:]
