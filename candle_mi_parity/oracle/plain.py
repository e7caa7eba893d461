"""Whether transformers alone can build and run a model, without the float64 mode and hooks.

Asked after an exception in the oracle: if this fails too, the config is at fault, otherwise the suite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from candle_mi_parity.models.quiet import transformers_runs
from candle_mi_parity.models.transformers_config import load_config
from candle_mi_parity.models.transformers_private import no_init_weights


def require_runs(directory: Path, tokens: list[list[int]] | None = None) -> None:
    """Build and run the model of a directory, with weights that take no memory.

    :param tokens: token ids [B][T]; None for any two.
    :raises ModelError: transformers raised an exception.
    """
    with transformers_runs(directory), torch.no_grad(), torch.device("cpu"):
        config = load_config(directory)
        config._attn_implementation = "eager"
        with no_init_weights(), parameters_on_meta():
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:  # one number, repeated
                    number = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                    module._parameters[name] = nn.Parameter(number, requires_grad=False)
        model.eval()(torch.tensor(tokens or [[0, 0]]), use_cache=False)


def require_loads(directory: Path) -> None:
    """:raises ModelError: transformers cannot run the config, or cannot load the weights."""
    require_runs(directory)
    with transformers_runs(directory, "load these weights"):
        transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            config=load_config(directory),
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules register their parameters on the meta device; unlike ``torch.device("meta")``, this keeps buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
