"""The user's script: the same twenty keys, and its float32 numbers accepted as a candidate.

The script is written here once more in torch, without the suite. In its last layer, `hidden_states[-1]` is after the
final norm, which must not be mistaken for a divergence.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.coverage.flat_json import is_last_layer, make_reference, read_reference, reference_case
from candle_mi_parity.errors import TraceError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run_reference
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import FIXTURES, cache_root
from tests.support.untrusted import REFERENCE

SAE = FIXTURES / "saes" / "smollm2_l15.npz"
PROMPT = "The capital of France is"
KEYS = tuple(REFERENCE)


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return model_directory(next(case for case in load_cases() if case.id == "smollm2/hub").model, cache_root())


@pytest.fixture(scope="module")
def script(model_dir: Path) -> Callable[[int], dict[str, Any]]:
    """The script's own computation, in float32, with `hidden_states[layer + 1]`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.eval()  # type: ignore[no-untyped-call]
    w = {name: torch.from_numpy(array) for name, array in np.load(SAE).items()}

    def compute(layer: int) -> dict[str, Any]:
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            resid = model(ids, output_hidden_states=True).hidden_states[layer + 1]
            pre = resid @ w["W_enc"] + w["b_enc"]
            encoded = pre * (pre > w["threshold"]).float()
            decoded = encoded @ w["W_dec"] + w["b_dec"]
        active = int((encoded[0, -1] > 0).sum())
        values, indices = torch.topk(encoded[0, -1], min(10, active))
        tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        top = [{"index": i, "value": v} for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
        where = [str(model_dir), PROMPT, layer, f"blocks.{layer}.hook_resid_post", str(SAE.parent), SAE.name]
        ascii_only = [token.encode("ascii", errors="replace").decode() for token in tokens]
        found = [len(tokens), float(torch.mean((resid - decoded) ** 2)), active, top]
        vectors = [part[0, -1] for part in (resid, encoded, decoded)]
        numbers = [*(v.tolist()[:10] for v in vectors), *(float(v.norm()) for v in vectors)]
        return dict(zip(KEYS, [*where, *w["W_enc"].shape, "JumpReLU", ascii_only, *found, *numbers], strict=True))

    return compute


def judged(document: dict[str, Any], path: Path) -> RunResult:
    path.write_text(json.dumps(document), encoding="utf-8")
    return run_reference(RunOptions(f"stored:{path}"), path, Progress())


@pytest.mark.thorough
def test_the_twenty_keys_agree_with_the_script(
    model_dir: Path, script: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    oracle = Oracle(prepare(reference_case(str(model_dir), str(SAE), 15, PROMPT), cache_root()), cache_root())
    ours, theirs = make_reference(oracle, str(model_dir), str(SAE), 10), script(15)
    assert tuple(ours) == KEYS == tuple(theirs)
    assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]
    exact = [key for key, value in theirs.items() if key == "tokens" or not isinstance(value, float | list)]
    assert [ours[key] for key in exact] == [theirs[key] for key in exact]
    top = [[feature["index"] for feature in document["top_features_last_pos"]] for document in (ours, theirs)]
    assert top[0] == top[1]
    (tmp_path / "r.json").write_text(json.dumps(ours), encoding="utf-8")
    assert read_reference(tmp_path / "r.json").model_dump() == ours


def test_the_scripts_own_numbers_are_right_but_prove_nothing(
    script: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    result = judged(script(15), tmp_path / "r.json")
    assert result.verdict is Verdict.INCONCLUSIVE, [case.message() for case in result.cases]
    assert result.cases[0].compared == result.cases[0].expected == 9
    assert "does not say what made it" in result.cases[0].error


@pytest.mark.parametrize(
    ("key", "change", "tensor"),
    [
        ("resid_last_norm", lambda v: v * (1 + 1e-4), "sae.resid_last_norm"),
        ("reconstruction_mse", lambda v: v * 1.01, "sae.reconstruction_mse"),
        ("n_active_last_pos", lambda v: v + 5, "sae.n_active_last_pos"),
        ("decoded_last_first10", lambda v: [-v[0], *v[1:]], "sae.recon"),
        ("top_features_last_pos", lambda v: v[1:], "sae.top_features_last_pos"),
        ("resid_last_first10", lambda v: [v[0] * (1 + 1e-4), *v[1:]], "blocks.15.hook_resid_post"),
    ],
)
def test_one_wrong_number_fails_where_it_is(
    script: Callable[[int], dict[str, Any]], tmp_path: Path, key: str, change: Callable[[Any], Any], tensor: str
) -> None:
    document = script(15)
    document[key] = change(document[key])
    result = judged(document, tmp_path / "r.json")
    assert result.verdict is Verdict.FAIL
    assert [t.name for t in result.cases[0].tensors if t.status == "FAIL"] == [tensor]


@pytest.mark.thorough
def test_the_last_layer_of_the_script_is_after_the_final_norm(
    model_dir: Path, script: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    result = judged(script(29), tmp_path / "r.json")
    assert result.verdict is Verdict.FAIL
    first = result.cases[0].first_divergence
    assert first is not None
    assert first.name == "blocks.29.hook_resid_post"
    assert "equals hook_final_norm" in first.detail
    subject = prepare(reference_case(str(model_dir), str(SAE), 29, PROMPT), cache_root())
    assert is_last_layer(subject, 29)
    true = make_reference(Oracle(subject, cache_root()), str(model_dir), str(SAE), 10)
    assert abs(true["resid_last_norm"] / script(29)["resid_last_norm"] - 1) > 0.1


@pytest.mark.parametrize("broken", ["d_in", "tokens"])
def test_a_file_without_a_key_is_refused(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({key: 1 for key in KEYS if key != broken}), encoding="utf-8")
    with pytest.raises(TraceError):
        read_reference(path)
