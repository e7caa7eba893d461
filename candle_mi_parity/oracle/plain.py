"""transformers by itself: whether it can make and run a model at all, without any mode, hook or weight of ours.

Asked where an exception passed through the oracle: what fails here as well is the config's fault, and what does
not is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from candle_mi_parity.models.quiet import transformers_runs


def require_runs(directory: Path, tokens: list[list[int]] | None = None) -> None:
    """Make the model of a directory and run it as transformers does, on weights that take no memory.

    :param tokens: token ids [B][T]; None for any two.
    :raises ModelError: transformers raised something, which the error tells.
    """
    with transformers_runs(directory), torch.no_grad(), torch.device("cpu"):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
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
    """Load a model as transformers does.

    :raises ModelError: it cannot run the config, or cannot load the weights; which, the error tells.
    """
    require_runs(directory)
    with transformers_runs(directory, "load these weights"):
        transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory when a module takes them; a buffer, which no file holds, keeps it.

    Under ``torch.device("meta")`` buffers would be lost too.
    """
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
