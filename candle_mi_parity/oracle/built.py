"""A generated model built in memory from its config, which takes a third of the time of loading its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn

from candle_mi_parity.models.transformers_private import no_init_weights
from candle_mi_parity.oracle.hooks import ignore_tensors, mode_for, model_config, our_attention
from candle_mi_parity.oracle.plain import require_runs
from candle_mi_parity.oracle.torch_state import torch_state

Shapes = dict[str, tuple[int, ...]]


def built_model(
    directory: Path, weights: Callable[[Shapes], Mapping[str, np.ndarray]], dtype: torch.dtype = torch.float64
) -> nn.Module:
    """The same model as :func:`hooks.load_model` gives for a directory with these weights.

    :param directory: holds ``config.json``.
    :param weights: maps the shapes of the model's tensors, without those that are tied, to their float32 values.
    :raises ModelError: transformers cannot run the config.
    """
    attention = our_attention()
    config = model_config(directory, attention)
    try:
        with torch_state(dtype), mode_for(dtype), no_init_weights():
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
            model.tie_weights()
    except Exception:
        require_runs(directory)
        raise
    parameters = dict(model.named_parameters())  # a tied one once
    arrays = weights({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(arrays[name]))
    ignore_tensors(model, [])
    return cast(nn.Module, model.eval())
