"""Files to spoil, and the one way in which a reader may say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from candle_mi_parity.errors import ParityError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.spec.cases import Case, LocalModel
from proof.fuzz_targets import CFG, sae_arrays
from tests.support.planting import CASES, real


def refused(read: Callable[[], object]) -> str:
    """The one line of the refusal."""
    with pytest.raises(ParityError) as caught:
        read()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


def saelens(directory: Path) -> Path:
    """A good SAELens directory."""
    directory.mkdir(exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps(CFG))
    save_file(sae_arrays(), directory / "sae_weights.safetensors")
    return directory


def model(directory: Path, **change: object) -> Case:
    """A case of a copy of the tiny Llama, whose config is changed; None takes a key away."""
    source = real("llama/hub").subject.model_dir
    directory.mkdir()
    config = {key: value for key, value in (read_config(source) | change).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "model.safetensors", directory)
    return CASES["llama/hub"].model_copy(update={"model": LocalModel(source="local", path=str(directory))})
