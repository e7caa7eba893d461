"""transformers' configuration object of a model directory, also of a model type that transformers does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.transformers_private import require_rope
from candle_mi_parity.spec.families import BIDIRECTIONAL, RECURRENT, transformers_type

FULL_ATTENTION = {"is_causal": False, "use_sliding_window": False, "layer_types": None}
"""Keys with which transformers lets every position attend to every other in each layer."""
LEGACY_GELU = ("gemma", "gelu")
"""Model type and activation by which the official releases of Gemma mean the tanh approximation."""


def load_config(directory: Path) -> Any:
    """The configuration of ``config.json``; code that lies beside it is not run.

    A model type of :data:`BIDIRECTIONAL` becomes the family whose layers it has, with :data:`FULL_ATTENTION`.

    :raises LibraryError: it has a rope type that the installed transformers is too old for.
    :raises Exception: whatever transformers raises for a config that it cannot read.
    """
    import transformers

    config = read_config(directory)
    for block in (config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(block, dict):
            require_rope(block.get("rope_type") or block.get("type"))
    if config.get("model_type") in RECURRENT:
        from candle_mi_parity.models.rwkv_auto import register

        register()
    if (written := str(config.get("model_type"))) not in BIDIRECTIONAL:
        return as_meant(
            transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        )
    kind = transformers_type(written)
    return transformers.CONFIG_MAPPING[kind].from_dict({**config, **FULL_ATTENTION, "model_type": kind})


def as_meant(config: Any) -> Any:
    """A configuration as transformers 5.24 reads it, where older ones read something else; see docs/versions.md."""
    if (config.model_type, getattr(config, "hidden_act", None)) == LEGACY_GELU:
        config.hidden_act = "gelu_pytorch_tanh"
    return config
