"""SAE files that are refused, the edge of JumpReLU, and features that flip.

A feature may differ only where rounding can turn it; reconstruction and MSE then follow the candidate's decision.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_mi_parity.compare.compare_sae import decisions, flips
from candle_mi_parity.compare.gate import measure
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.errors import SaeError
from candle_mi_parity.models.sae import Sae, load_npz
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.torch_sae import TorchSae
from candle_mi_parity.trace.truth import SaeTruth, Truth, TruthTensor
from tests.support.planting import Arrays, Real, compare_trace, failures, first, real, write
from tests.support.untrusted import refused, sae_arrays

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "array missing": ({"W_dec": None}, "lacks W_dec; it holds W_enc"),
    "array unknown": ({"scale": np.ones(1, np.float32)}, "unknown arrays scale"),
    "W_enc not a matrix": ({"W_enc": np.ones(4, np.float32)}, "W_enc has shape (4,)"),
    "W_dec transposed": ({"W_dec": np.ones((4, 6), np.float32)}, "W_dec has shape (4, 6), expected (6, 4)"),
    "one threshold for all": ({"threshold": np.ones((), np.float32)}, "threshold has shape (), expected (6,)"),
    "b_dec too wide": ({"b_dec": np.ones(6, np.float32)}, "b_dec has shape (6,), expected (4,)"),
    "float16": ({"W_enc": np.ones((4, 6), np.float16)}, "W_enc is float16"),
    "integers": ({"b_enc": np.ones(6, np.int64)}, "b_enc is int64"),
    "text": ({"b_enc": np.array(["a"] * 6)}, "b_enc is <U1"),
    "NaN": ({"b_enc": np.full(6, np.nan, np.float32)}, "b_enc holds NaN or Inf"),
    "infinity": ({"W_dec": np.full((6, 4), np.inf, np.float32)}, "W_dec holds NaN or Inf"),
    "too large for float32": ({"b_dec": np.full(4, 1e300)}, "b_dec holds NaN or Inf, or a value too large"),
    "no array": (dict.fromkeys(sae_arrays()), "it holds nothing"),
}


def saved(path: Path, content: dict[str, Any]) -> Path:
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def refusal(path: Path) -> str:
    message = refused(lambda: load_npz(path))
    assert path.name in message
    return message


@pytest.mark.parametrize("name", BAD)
def test_an_npz_that_is_not_an_sae_is_refused(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    assert message in refusal(saved(tmp_path / "sae.npz", sae_arrays() | change))


def test_a_valid_npz_is_read_with_and_without_a_threshold(tmp_path: Path) -> None:
    whole = load_npz(saved(tmp_path / "a.npz", sae_arrays()))
    assert (whole.d_in, whole.d_sae, whole.architecture) == (4, 6, "JumpReLU")
    assert load_npz(saved(tmp_path / "b.npz", sae_arrays() | {"threshold": None})).architecture == "ReLU"
    wide = load_npz(saved(tmp_path / "c.npz", {name: array.astype(float) for name, array in sae_arrays().items()}))
    np.testing.assert_array_equal(wide.W_enc, whole.W_enc)


def test_a_file_that_is_not_a_whole_zip_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "sae.npz", sae_arrays())
    content = path.read_bytes()
    for bad in (b"", b"PK", b"not a zip at all", *(content[:n] for n in range(30, len(content), 97))):
        path.write_bytes(bad)
        refusal(path)
    path.unlink()
    refusal(path)
    np.save(tmp_path / "one.npy", sae_arrays()["W_enc"])
    refusal(tmp_path / "one.npy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jumprelu_fires_strictly_above_its_threshold(dtype: torch.dtype) -> None:
    theta = np.float32(1.3)
    eye, zero = np.eye(1, dtype=np.float32), np.zeros(1, np.float32)
    sae = TorchSae(Sae(eye, eye, zero, zero, np.full(1, theta, np.float32)), dtype=dtype)
    for value, fires in (
        (np.nextafter(theta, np.float32(0)), False),
        (theta, False),
        (np.nextafter(theta, np.float32(2)), True),
    ):
        found = sae.encode(torch.tensor([[float(value)]], dtype=dtype))
        assert found.item() == (float(value) if fires else 0.0), f"{value:.9g} against {theta:.9g}"
    relu = TorchSae(Sae(eye, eye, zero, zero, None), dtype=dtype)
    assert relu.encode(torch.tensor([[-0.0], [1e-30]], dtype=dtype)).flatten().tolist() == [0.0, pytest.approx(1e-30)]


def test_an_sae_of_another_width_is_refused(tmp_path: Path) -> None:
    there = real("gemma2/hub")
    subject = replace(there.subject, sae_file=saved(tmp_path / "sae.npz", sae_arrays()))
    with pytest.raises(SaeError, match="SAE has d_in 4, the model has hidden_size 64"):
        Oracle(subject, tmp_path).truth()


def spoilt(tmp_path: Path, arrays: Arrays, scalars: dict[str, float] | None = None) -> list[TensorResult]:
    there = real("gemma2/hub")
    path = write(tmp_path, there, arrays, lambda document: document["scalars"].update(scalars or {}))
    return compare_trace(there, path)


@pytest.mark.parametrize("fault", ["lost", "gained", "halved", "negated", "relu"])
def test_a_wrong_feature_fails_at_the_features(tmp_path: Path, fault: str) -> None:
    there = real("gemma2/hub")
    plant, pre = there.arrays, there.truth.sae["sae"].pre.value
    features = plant["sae.features"]
    strongest = (0, 23, int(features[0, -1].argmax()))
    if fault == "relu":
        plant["sae.features"] = np.maximum(pre, 0).astype(np.float32)
    elif fault == "gained":
        features[0, 23, int(pre[0, 23].argmin())] = 1.0
    else:
        features[strongest] *= {"lost": 0, "halved": 0.5, "negated": -1}[fault]
    found = first(spoilt(tmp_path, plant))
    assert found.name == "sae.features"
    assert found.reason == ("values" if fault in ("halved", "negated") else "flips")
    assert fault != "relu" or "0 with |pre − θ| < 32σ" in found.detail


SCALARS = ["sae.reconstruction_mse", "sae_on_truth.reconstruction_mse"]
SCALARS += ["sae.resid_last_norm", "sae.decoded_last_norm", "sae.encoded_last_norm"]


@pytest.mark.parametrize("name", [*SCALARS, "sae.n_active_last_pos"])
@pytest.mark.parametrize("factor", [1 + 1e-4, float("1e30"), -1.0])
def test_a_wrong_scalar_fails_alone(tmp_path: Path, name: str, factor: float) -> None:
    value = real("gemma2/hub").emitted.scalars[name]
    wrong = value * factor if name in SCALARS else value + 1
    assert failures(spoilt(tmp_path, real("gemma2/hub").arrays, {name: wrong})) == [name]


def test_missing_scalars_and_top_features_fail(tmp_path: Path) -> None:
    there = real("gemma2/hub")

    def nothing(document: dict[str, Any]) -> None:
        document.update(scalars={}, top_features_last_pos=[])

    found = failures(compare_trace(there, write(tmp_path, there, edit=nothing)))
    assert set(found) == {*there.emitted.scalars, "sae.top_features_last_pos"}


# --- flips near the threshold are excused only if rounding can switch them ------------------------


LAST = (0, 23)


def near_threshold(margin: float) -> tuple[Real, int]:
    """A truth in which the strongest feature of the last position is ``margin``·σ above its threshold."""
    there = real("gemma2/hub")
    assert there.subject.sae_file is not None
    sae, b_dec = there.truth.sae["sae"], load_npz(there.subject.sae_file).b_dec.astype(np.float64)
    feature = int(sae.pre.value[LAST].argmax())
    sigma = measure(np.zeros_like(sae.pre.value), sae.pre.value, sae.pre.noise).sigma
    threshold = sae.threshold.copy()
    threshold[feature] = sae.pre.value[LAST][feature] - margin * sigma[LAST][feature]
    tensors, saes, scalars = dict(there.truth.tensors), dict(there.truth.sae), dict(there.truth.scalars)
    for chain, old in there.truth.sae.items():
        saes[chain] = replace(old, threshold=threshold)
        features = np.where(old.pre.value > threshold, old.pre.value, 0.0)
        recon = features @ np.asarray(there.decoder, np.float64) + b_dec
        for name, value in (("features", features), ("recon", recon)):
            noise = tensors[f"{chain}.{name}"].noise if name == "recon" else np.where(features != 0, old.pre.noise, 0)
            tensors[f"{chain}.{name}"] = TruthTensor(value, noise)
        mse = float(np.square(old.residual - recon).mean())
        scalars[f"{chain}.reconstruction_mse"] = (mse, scalars[f"{chain}.reconstruction_mse"][1])
    truth = Truth(there.truth.tokens, tensors, saes, scalars, there.truth.meta)
    return replace(there, truth=truth), feature


def candidate(there: Real, feature: int, flipped: bool, follow: bool = True) -> tuple[Arrays, dict[str, float]]:
    """Honest numbers in which the feature did not fire, and the reconstruction follows (or does not)."""
    arrays, scalars = there.arrays, dict(there.emitted.scalars)
    decoder = np.asarray(there.decoder, np.float64)
    for chain, sae in there.truth.sae.items():
        features = there.truth.tensors[f"{chain}.features"].value.copy()
        recon = there.truth.tensors[f"{chain}.recon"].value.copy()
        if flipped and chain == "sae":  # the SAE alone has less noise, and its own margin
            if follow:
                recon[LAST] -= features[LAST][feature] * decoder[feature]
            features[LAST][feature] = 0
        arrays[f"{chain}.features"], arrays[f"{chain}.recon"] = features.astype(np.float32), recon.astype(np.float32)
        scalars[f"{chain}.reconstruction_mse"] = float(np.square(sae.residual - recon).mean())
        if chain == "sae":
            scalars["sae.n_active_last_pos"] = float(np.count_nonzero(features[LAST]))
            scalars["sae.encoded_last_norm"] = float(np.linalg.norm(features[LAST]))
            scalars["sae.decoded_last_norm"] = float(np.linalg.norm(recon[LAST]))
    return arrays, scalars


def judged(tmp_path: Path, margin: float, flipped: bool, follow: bool = True) -> dict[str, TensorResult]:
    there, feature = near_threshold(margin)
    arrays, scalars = candidate(there, feature, flipped, follow)
    features = arrays["sae.features"][LAST]
    order = np.argsort(-features)[:10]
    top = [{"index": int(i), "value": float(features[i])} for i in order if features[i]]
    edit = lambda document: document.update(scalars=scalars, top_features_last_pos=top)  # noqa: E731
    return {result.name: result for result in compare_trace(there, write(tmp_path, there, arrays, edit))}


@pytest.mark.parametrize("margin", [0.5, 20.0])
def test_a_flip_inside_the_gate_is_excused_and_granted_to_what_follows(tmp_path: Path, margin: float) -> None:
    assert not failures(list(judged(tmp_path / "twin", margin, flipped=False).values()))
    results = judged(tmp_path / "flipped", margin, flipped=True)
    assert "1 features flipped, 1 with |pre − θ| < 32σ" in results["sae.features"].detail
    assert "1 excused flips granted to the reconstruction" in results["sae.recon"].detail
    assert results["sae.reconstruction_mse"].status == "PASS", results["sae.reconstruction_mse"].message()
    assert not failures(list(results.values()))


def test_a_flip_outside_the_gate_or_that_is_not_followed_fails(tmp_path: Path) -> None:
    failed = failures(list(judged(tmp_path, 0.5, flipped=True, follow=False).values()))
    assert "sae.recon" in failed and "sae.features" not in failed
    results = judged(tmp_path, 40.0, flipped=True)
    found = results["sae.features"]
    assert (found.status, found.reason) == ("FAIL", "flips")
    assert found.element_ratio == pytest.approx(40, rel=0.01) and found.past == 1
    assert {"sae.recon", "sae.reconstruction_mse"} <= set(failures(list(results.values()))), "a flip was granted"


def test_a_flip_is_seen_in_both_directions_and_at_the_threshold_itself() -> None:
    pre = np.array([[[1.0, 2.0, 3.0]]])
    noise = np.full_like(pre, 1e-7)
    theta = np.array([1.0, 1.0, 3.5])
    sae = decisions(SaeTruth(TruthTensor(pre, noise), theta, np.zeros((1, 1, 2)), 0, np.ones((1, 1, 1))))
    honest = np.array([[[0.0, 2.0, 0.0]]])
    assert not flips(sae, honest).excused.any() and not flips(sae, honest).unexcused.any()
    at_threshold = flips(sae, np.array([[[1.0, 2.0, 0.0]]]))
    assert at_threshold.excused.tolist() == [[[True, False, False]]] and not at_threshold.unexcused.any()
    gained, lost = flips(sae, np.array([[[0.0, 2.0, 3.0]]])), flips(sae, np.zeros((1, 1, 3)))
    assert gained.unexcused.tolist() == [[[False, False, True]]]
    assert lost.unexcused.tolist() == [[[False, True, False]]]
