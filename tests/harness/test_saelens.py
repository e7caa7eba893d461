"""SAELens directories: refusals, TopK with ties, and one fault for each field of the config.

If SAELens is installed (`pip install '.[saelens]'`), its results are compared too; otherwise that test is skipped.
"""

import importlib.util
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import Source
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import check_header
from candle_mi_parity.compare.compare_sae import decisions, flips
from candle_mi_parity.compare.gate import measure
from candle_mi_parity.compare.verdict import Failure, Status, TensorResult
from candle_mi_parity.errors import CaseTableError, NoTruthError, ParityError, SaeError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.models.sae import Sae, load_sae
from candle_mi_parity.models.saelens import WEIGHTS, own_hook, rounded, stored_values
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.spec.cases import Case, SaeFile, SaelensDirectory
from candle_mi_parity.spec.edits import Inject
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Trace
from candle_mi_parity.trace.truth import SaeTruth, Truth, TruthTensor
from tests.support.planting import CASES, Arrays, Giving, compare_trace, failures, first, judged, real, write

SAELENS = sorted(case.id for case in CASES.values() if isinstance(case.sae, SaelensDirectory))


def directory(path: Path, cfg: dict[str, Any], **arrays: np.ndarray) -> Path:
    """The SAE of public case D11: identity weights, no bias."""
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    path.mkdir(exist_ok=True)
    save_file({"W_enc": eye, "W_dec": eye, "b_enc": zero, "b_dec": zero} | arrays, path / WEIGHTS[0])
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


PLAIN = {"d_in": 4, "d_sae": 4, "dtype": "float32", "apply_b_dec_to_input": False}
X = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "cfg",
    [
        {"architecture": "topk", "activation_fn_kwargs": {"k": 2}},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}},
        {"architecture": "topk", "k": 2, "metadata": {"sae_lens_version": "6.0.0"}},
    ],
    ids=["architecture", "activation", "version 6"],
)
def test_topk_is_topk_in_each_dialect(tmp_path: Path, cfg: dict[str, Any]) -> None:
    sae = load_sae(directory(tmp_path, PLAIN | cfg))
    assert sae.architecture == "TopK" and TorchSae(sae).encode(X).tolist() == [[4, 3, 0, 0]]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (PLAIN | {"activation": "topk"}, "activation"),
    "topk without k": (PLAIN | {"architecture": "topk"}, "with k = None"),
    "k without topk": (PLAIN | {"k": 3, "sae_lens_version": "6.1.0", "architecture": "standard"}, "k = 3"),
    "a missing scale": (PLAIN | {"normalize_activations": "expected_average_only_in"}, "needs a scale"),
    "the same, as true": (PLAIN | {"normalize_activations": True}, "needs a scale"),
    "unknown normalisation": (PLAIN | {"normalize_activations": "covariance_whitening"}, "normalize_activations"),
    "jumprelu without a threshold": (PLAIN | {"architecture": "jumprelu"}, "threshold missing"),
    "another width": (PLAIN | {"d_in": 5}, "cfg.json says (5, 4)"),
    "not an object": ([], "expected a JSON object"),  # type: ignore[dict-item]
    "no dtype": ({"d_in": 4, "d_sae": 4}, "dtype"),
    "decoder norm without topk": (PLAIN | {"rescale_acts_by_decoder_norm": True}, "belongs to topk"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_config_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    cfg, said = REFUSED[name]
    with pytest.raises(SaeError) as caught:
        load_sae(directory(tmp_path, cfg))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_invalid_files_and_tensors_are_refused(tmp_path: Path) -> None:
    for arrays, said in (
        ({"threshold": np.zeros(4, np.float32)}, "unknown arrays threshold"),
        ({"W_dec": np.full((4, 4), np.nan, np.float32)}, "NaN or Inf"),
        ({"b_dec": np.zeros(3, np.float32)}, "b_dec has shape"),
        ({"scaling_factor": np.full(4, 2, np.float32)}, "scaling_factor is not all ones"),
    ):
        with pytest.raises(SaeError, match=said):
            load_sae(directory(tmp_path, PLAIN, **arrays))
    (tmp_path / WEIGHTS[0]).write_bytes(b"\xff" * 64)
    with pytest.raises(SaeError, match="not readable safetensors"):
        load_sae(tmp_path)
    (tmp_path / WEIGHTS[0]).unlink()
    with pytest.raises(SaeError, match="expected cfg"):
        load_sae(tmp_path)


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_weights_are_rounded_as_torch_rounds_them(tmp_path: Path, stored: str, dtype: str) -> None:
    """Ties of each format, its smallest and largest values, NaN and infinities among them."""
    edges = [1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-12, 1 + 2.0**-8 + 2.0**-40, 2.0**-134, 3.4e38, 65519.9, 65520.0]
    edges += [float("inf"), float("-inf"), float("nan"), 1e-8, 6e-8, -0.0, 3.3895314e38]
    drawn = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e3
    values = torch.cat([torch.tensor(edges, dtype=torch.float64), drawn]).to(getattr(torch, stored))
    save_torch({"x": values}, tmp_path / "x.safetensors")
    got = rounded(stored_values(TensorFile(tmp_path / "x.safetensors"), "x"), dtype).astype(np.float64)
    np.testing.assert_array_equal(got, values.to(getattr(torch, dtype)).double().numpy())


def test_a_norm_that_is_not_folded_into_the_decoder_bias_changes_only_the_reconstruction() -> None:
    """Public case D12: s = 0.5, features [2, 2] either way; [6, 8] is right, [5, 6] is not."""
    eye = np.eye(2, dtype=np.float32)
    folded = Sae(eye / 2, eye * 2, np.zeros(2, np.float32), np.array([2, 4], np.float32), None)
    forgotten = replace(folded, b_dec=np.array([1, 2], np.float32))
    x = torch.tensor([[4.0, 4.0]], dtype=torch.float64)
    right, wrong = TorchSae(folded), TorchSae(forgotten)
    assert right.encode(x).tolist() == wrong.encode(x).tolist() == [[2, 2]]
    assert right.decode(right.encode(x)).tolist() == [[6, 8]]
    assert wrong.decode(wrong.encode(x)).tolist() == [[5, 6]]


def topk_truth(pre: list[float], k: int, noise: float = 1e-7) -> SaeTruth:
    value = np.array([[pre]])
    tensor = TruthTensor(value, np.full_like(value, noise))
    return SaeTruth(tensor, np.zeros(len(pre)), np.zeros((1, 1, 2)), k, np.ones((1, 1, 1)))


def test_a_tie_at_the_k_boundary_may_go_either_way_and_is_counted() -> None:
    """Public case D13."""
    truth = decisions(topk_truth([3, 2, 3, 2, 1, 1], 3))
    assert truth.active.tolist() == [[[True, True, True, False, False, False]]]
    other = flips(truth, np.array([[[3.0, 0, 3, 2, 0, 0]]]))
    assert not other.unexcused.any() and other.excused.sum() == 2
    assert "2 of them exact ties" in other.describe()
    near = flips(decisions(topk_truth([3, 2.001, 3, 2, 1, 1], 3)), np.array([[[3.0, 0, 3, 2, 0, 0]]]))
    assert near.unexcused.tolist() == [[[False, True, False, True, False, False]]]
    within = flips(decisions(topk_truth([3, 2.000001, 3, 2, 1, 1], 3)), np.array([[[3.0, 0, 3, 2, 0, 0]]]))
    assert not within.unexcused.any() and "0 of them" not in within.describe()
    for features in ([3.0, 2, 3, 2, 0, 0], [3.0, 0, 3, 0, 0, 0]):  # both, and neither
        found = flips(truth, np.array([[features]]))
        assert not found.excused.any() and found.unexcused.sum() == 1


def test_a_boundary_has_a_noise_of_its_own() -> None:
    """A margin between two noisy values is excused up to 32 times the sum of their noises."""
    sigma = float(measure(np.zeros((1, 1, 2)), np.ones((1, 1, 2)), np.full((1, 1, 2), 1e-7)).sigma[0, 0, 0])
    for margin, excused in ((60, True), (70, False)):
        truth = decisions(topk_truth([1 + margin * sigma, 1.0], 1))
        found = flips(truth, np.array([[[0.0, 1.0]]]))
        assert bool(found.excused.all()) is excused and bool(found.unexcused.all()) is not excused


def test_topk_keeps_no_more_than_is_positive() -> None:
    truth = decisions(topk_truth([3, -1, -2, 2], 3))
    assert truth.active.tolist() == [[[True, False, False, True]]]
    kept = flips(truth, np.array([[[3.0, -1, 0, 2]]]))
    assert kept.unexcused.tolist() == [[[False, True, False, False]]]
    whole = decisions(topk_truth([3, -1, 2], 3))
    assert whole.active.tolist() == [[[True, False, True]]] and whole.margin.tolist() == [[[3, 1, 2]]]


def test_relu_in_place_of_topk_fails_at_the_features(tmp_path: Path) -> None:
    there = real("llama/sae-topk")
    plant = there.arrays
    for chain in ("sae", "sae_on_truth"):
        plant[f"{chain}.features"] = np.maximum(there.truth.sae[chain].pre.value, 0).astype(np.float32)
    found = first(compare_trace(there, write(tmp_path, there, plant)))
    assert (found.name, found.reason) == ("sae.features", "flips")
    assert "expected 8" in found.detail and "fails too" in found.detail


def other_sae(case_id: str, **change: object) -> tuple[Arrays, dict[str, float]]:
    """The float32 results of a case with one changed field of its SAE."""
    there = real(case_id)
    assert there.subject.sae_file is not None
    sae = TorchSae(replace(load_sae(there.subject.sae_file), **change), dtype=torch.float32)  # type: ignore[arg-type]
    arrays, scalars = there.arrays, {}
    for chain, truth in there.truth.sae.items():
        x = torch.from_numpy(truth.residual).float()
        features = sae.encode(x)
        recon = sae.decode(features, x)
        arrays[f"{chain}.features"], arrays[f"{chain}.recon"] = features.numpy(), recon.numpy()
        scalars[f"{chain}.reconstruction_mse"] = float((x - recon).pow(2).mean())
    return arrays, scalars


FAULTS: dict[str, tuple[str, dict[str, object]]] = {
    "b_dec not taken from the input": ("llama/sae-b-dec", {"centred": False}),
    "b_dec taken from the input": ("llama/sae-standard", {"centred": True}),
    "layer norm dropped": ("llama/sae-layer-norm", {"normalize": "none"}),
    "constant norm dropped": ("llama/sae-constant-norm", {"normalize": "none"}),
    "decoder norm dropped": ("llama/sae-decoder-norm", {"by_decoder_norm": False}),
    "one feature more": ("llama/sae-topk", {"k": 9}),
    "TopK as ReLU": ("llama/sae-topk-few-positive", {"k": 40}),
    "no threshold": ("llama/sae-jumprelu", {"threshold": None}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_field_of_the_config_is_detected(tmp_path: Path, name: str) -> None:
    case_id, change = FAULTS[name]
    there = real(case_id)

    def results(directory: Path, change: dict[str, object]) -> list[TensorResult]:
        arrays, scalars = other_sae(case_id, **change)
        return compare_trace(
            there, write(directory, there, arrays, lambda document: document["scalars"].update(scalars))
        )

    divergence = first(results(tmp_path / "fault", change))
    assert divergence.name == "sae.features" and divergence.ratio > 1000
    assert failures(results(tmp_path / "control", {})) == []


@pytest.mark.parametrize("case_id", SAELENS)
def test_saelens_itself_agrees(case_id: str) -> None:
    if importlib.util.find_spec("sae_lens") is None:
        pytest.skip("sae-lens is not installed: pip install '.[saelens]' beside this suite's packages")
    from sae_lens import SAE

    path = real(case_id).subject.sae_file
    assert path is not None
    # Rounded to the config's dtype on loading, then to float32 as in candle-mi, then float64.
    theirs = SAE.load_from_disk(path).to(dtype=torch.float32).to(dtype=torch.float64)
    ours = TorchSae(load_sae(path))
    x = torch.from_numpy(real(case_id).truth.sae["sae_on_truth"].residual)
    features = theirs.encode(x)
    torch.testing.assert_close(ours.encode(x), features, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.decode(features, x), theirs.decode(features), rtol=1e-12, atol=1e-12)


# --- places that a config gives, and kinds without a truth (public cases E5, E8) ------------------


ROW = CASES["llama/sae-standard"]
STANDARD: dict[str, Any] = {"dtype": "float32", "architecture": "standard", "apply_b_dec_to_input": False}


def row(cfg: dict[str, Any], **update: object) -> Case:
    """A generated SAE with this ``cfg.json``, placed at layer 1's output."""
    sae = SaelensDirectory(layer=1, d_sae=96, cfg=cfg)
    return ROW.model_copy(update={"id": "llama/tried", "sae": sae, **update})


# --- E5: the place that an SAE's own config gives

HERE = "blocks.1.hook_resid_post"


def placed(key: str, hook: str) -> dict[str, Any]:
    """The hook under one of the keys that versions of SAELens have used."""
    return {"metadata": {"hook_name": hook, "sae_lens_version": "6.54.12"}} if key == "metadata" else {key: hook}


@pytest.mark.parametrize("edited", [False, True], ids=["read", "injected"])
@pytest.mark.parametrize("key", ["hook_name", "hook_point", "metadata"])
@pytest.mark.parametrize("own", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "model.layers.1"])
def test_a_row_that_places_an_sae_elsewhere_is_refused(tmp_path: Path, own: str, key: str, edited: bool) -> None:
    edits = [Inject(kind="inject", hook=HERE, position=7, features=[[3, 4.0]])] if edited else []
    with pytest.raises(CaseTableError) as caught:
        prepare(row(STANDARD | placed(key, own), edits=edits), tmp_path)
    message = f"llama/tried: the row places its SAE at {HERE}, and the SAE's own cfg.json places it at {own}"
    assert str(caught.value) == message
    assert prepare(row(STANDARD | placed(key, HERE), edits=edits), tmp_path).sae_file


BARE: list[dict[str, Any]] = [{}, {"hook_name": None}, {"metadata": {}}, {"hook_name": "", "metadata": None}]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        *((cfg, "") for cfg in BARE),
        ({"hook_name": "blocks.1.a", "metadata": {"hook_name": "blocks.2.a"}}, "an SAE is at one place"),
        ({"hook_name": "blocks.1.a", "hook_point": "blocks.1.b"}, "an SAE is at one place"),
        ({"hook_name": "blocks.1.a", "hook_layer": 2}, "hook_layer is 2, and the hook is 'blocks.1.a'"),
    ],
)
def test_a_config_without_a_place_or_with_two(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(SaeError, match=message) if message else nullcontext():
        assert own_hook(tmp_path) is None


# --- E8: a kind without a truth

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"architecture": "gated"}, "architecture 'gated': candle-mi-parity computes standard, jumprelu, topk"),
    "batchtopk": ({"architecture": "batchtopk", "k": 8}, "architecture 'batchtopk': "),
    "transcoder": ({"architecture": "transcoder", "hook_name_out": "x"}, "architecture 'transcoder': "),
    "a field of a later version": ({"whitening": True}, "an SAE with 'whitening': "),
    "heads": ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z': candle-mi-parity computes 'none'"),
    "another activation": ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu': "),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_names_the_unsupported_kind(tmp_path: Path, kind: str) -> None:
    cfg, message = KINDS[kind]
    path = prepare(row(STANDARD | cfg), tmp_path).sae_file
    assert path is not None
    with pytest.raises(NoTruthError) as caught:
        load_sae(path)
    assert f"cfg.json: there is no truth for {message}" in str(caught.value), caught.value


def computing(directory: Path, error: ParityError | None = None) -> Giving:
    """A candidate that gives numbers for any SAE, or an error."""

    def give(subject: PreparedCase, _: str, truth: Truth, inputs: Path) -> Trace:
        if error is not None:
            raise error

        def adapted(document: dict[str, Any]) -> None:
            header = {"case": {"id": subject.case.id, "digest": subject.digest}, "sae_digest": subject.sae_digest}
            document["header"] |= header | {"inputs_digest": file_digest(inputs)}
            document["tokens"] = subject.tokens

        trace = Trace(write(directory, real("llama/hub"), edit=adapted))
        check_header(truth, trace, file_digest(inputs))
        return trace

    return Giving(give)


def test_a_refusal_by_candle_mi_is_the_result_and_numbers_without_a_truth_are_unmeasured(tmp_path: Path) -> None:
    refusal, case = EmitterError("sae", "unsupported SAE architecture"), row(STANDARD | KINDS["gated"][0])
    for _ in range(2):  # the second time with the model's own truth in the cache
        found = judged(case, computing(tmp_path, refusal), tmp_path / "cache")
        assert (found.failure, found.error) == (Failure.SAE, str(refusal))
        found = judged(case, computing(tmp_path), tmp_path / "cache")
        assert found.status is Status.UNMEASURED and not found.tensors
        assert found.error.startswith("candle-mi computes something, but ") and "no truth for" in found.error


def test_an_sae_without_a_firing_feature_is_unmeasured_and_others_pass(tmp_path: Path) -> None:
    cfg = STANDARD | {"architecture": "jumprelu"}
    silent, firing = (SaelensDirectory(layer=1, d_sae=96, threshold=theta, cfg=cfg) for theta in (1e3, 0.25))
    with TorchSource() as source:
        found = judged(row({}, sae=silent), source, tmp_path)
        assert found.status is Status.UNMEASURED
        assert found.error == "no feature of the SAE fires at any position: it was not exercised"
        assert judged(row({}, sae=firing), source, tmp_path).status is Status.PASS
        assert judged(row(STANDARD), source, tmp_path).status is Status.PASS


@pytest.mark.rust
@pytest.mark.parametrize("kind", ["gated", "batchtopk", "transcoder"])
def test_the_released_candle_mi_refuses_these_kinds(live: Source, kind: str) -> None:
    case = row(STANDARD | KINDS[kind][0])
    path = prepare(case, cache_root()).sae_file
    for sae in (case.sae, SaeFile(path=str(path), layer=1)):
        found = judged(case.model_copy(update={"sae": sae}), live, cache_root())
        assert found.failure is Failure.SAE
        assert f'unsupported SAE architecture: "{kind}"' in found.error, found.error
