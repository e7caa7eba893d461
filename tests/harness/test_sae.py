"""SAE files that are refused, the edge of JumpReLU, and features that flip.

A feature may differ only where rounding can turn it; reconstruction and MSE then follow the candidate's decision.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.errors import SaeError
from candle_mi_parity.models.sae import Sae, load_npz
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.torch_sae import TorchSae
from tests.support.planting import Arrays, compare_trace, failures, first, real, write
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
