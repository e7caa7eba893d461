"""What explains a case whose candidate is torch's float32 under another config or with other weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.judge.known import Evidence
from candle_mi_parity.judge.search import search
from candle_mi_parity.models.checkpoint import read_config, weight_files
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.paths import cache_root
from tests.support.planting import Arrays, Real, rerun, with_arrays


def changed(directory: Path, there: Real, config: dict[str, Any], weights: dict[str, float] | None = None) -> Real:
    """float32 under another config, and with the parameters of some endings filled with a number."""
    base = there.subject.model_dir
    directory.mkdir(parents=True)
    changed_config = {key: value for key, value in (read_config(base) | config).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(changed_config))
    for file in weight_files(base):
        tensors = load_file(file)
        for name in tensors:
            for ending, value in (weights or {}).items():
                if name.endswith(ending):
                    tensors[name] = np.full_like(tensors[name], value)
        save_file(tensors, directory / file.name, metadata={"format": "pt"})
    return replace(there, emitted=with_arrays(there.emitted, rerun(there, directory)))


def evidence(there: Real, arrays: Arrays | None = None) -> Evidence:
    emitted = there.emitted if arrays is None else with_arrays(there.emitted, arrays)
    return Evidence(there.oracle, emitted, None, set(), "0.2.2")


def searched(there: Real, arrays: Arrays | None = None) -> CaseResult:
    found = evidence(there, arrays)
    result = CaseResult(there.subject.case.id, "", "", Status.FAIL, "")
    result.tensors = compare(there.truth, found.trace, there.decoder, None)
    search(result, found, NOTHING_KNOWN, cache_root(), [], 120)
    return result
