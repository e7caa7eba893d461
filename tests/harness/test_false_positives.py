"""Honest variants of the arithmetic are inside the gate, and a wrong one is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from candle_mi_parity.errors import CaseTableError, OracleError
from tests.support.planting import CASES
from validation.false_positives import Setting, cases_of, judge, load_settings
from validation.summation import Reordered, Sums

SETTINGS = {setting.id: setting for setting in load_settings()}
ORDERS = [
    Sums(order="permuted", seed=1),
    Sums(order="blocks", size=4),
    Sums(order="one_by_one"),
    Sums(order="float64"),
    Sums(order="openblas"),
]
LLAMA = CASES["llama/hub"]


@pytest.mark.parametrize("sums", ORDERS, ids=lambda sums: sums.order)
def test_another_order_of_a_sum_differs_by_rounding_alone(sums: Sums) -> None:
    a, b = torch.randn(5, 96), torch.randn(96, 33)
    exact, plain = a.double() @ b.double(), a @ b
    with torch.no_grad(), Reordered(sums) as mode:
        other = a @ b
        batched = torch.bmm(a[None], b[None])[0]
        with_bias = torch.nn.functional.linear(a, b.T.contiguous(), plain[0])
    assert mode.calls == 3
    assert torch.equal(other, batched)
    assert not torch.equal(other, plain), "this is the order of torch itself"
    assert (other - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (with_bias - exact - plain[0]).abs().max() < 1e-5 * exact.abs().max()


def test_a_permuted_order_moves_means_too() -> None:
    x = torch.randn(64, 300)
    with torch.no_grad(), Reordered(Sums(order="permuted", seed=1)):
        permuted = x.mean(-1, keepdim=True)
    assert not torch.equal(permuted, x.mean(-1, keepdim=True))
    assert torch.allclose(permuted, x.mean(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["sums permuted, seed 1", "sums one by one", "OpenBLAS", "sums in float64", "sdpa attention"],
)
def test_an_honest_variant_is_inside_the_gate(name: str) -> None:
    (run,) = judge(SETTINGS[name], LLAMA)
    assert not run.failures and 0.2 < run.position < 4 and run.element < 16


def test_fresh_samples_are_inside_the_gate() -> None:
    runs = judge(SETTINGS["samples of the noise model"].model_copy(update={"samples": 8}), LLAMA)
    assert len({run.position for run in runs}) == 8, "the samples are one and the same"
    assert all(not run.failures and 0.5 < run.position < 6 for run in runs)


@pytest.mark.parametrize("factor", [1 + 1e-4, 1 - 1e-4])
def test_a_wrong_variant_fails(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr("validation.summation._one_by_one", lambda a, b: torch.matmul(a, b) * factor)
    (run,) = judge(SETTINGS["sums one by one"], LLAMA)
    assert run.failures and run.position > 8


def test_a_wrong_sample_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "validation.false_positives.as_emitted", lambda tensor: (tensor.numpy() * (1 + 1e-4)).astype(np.float32)
    )
    (run,) = judge(SETTINGS["samples of the noise model"].model_copy(update={"samples": 1}), LLAMA)
    assert run.failures


def test_a_variant_that_must_record_all_fails_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "records_all", True)
    (run,) = judge(SETTINGS["sdpa attention"], LLAMA)
    assert any("missing" in failure for failure in run.failures)


def test_an_order_in_which_nothing_was_computed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("validation.summation._MATMULS", frozenset())
    with pytest.raises(OracleError, match="varies nothing"):
        judge(SETTINGS["sums one by one"], LLAMA)


def test_every_setting_has_its_cases() -> None:
    assert len(SETTINGS) >= 30
    assert all(cases_of(setting) for setting in SETTINGS.values())
    with pytest.raises(CaseTableError, match="no case matches 'lama/"):
        cases_of(Setting(id="x", cases=["llama/hub", "lama/*"]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('[[setting]]\nid = "x"\ncases = ["*"]\nthread = 1\n', "thread"),
        ('[[setting]]\nid = "x"\ncases = []\n', "cases"),
        ('[[setting]]\nid = "x"\ncases = ["*"]\nsamples = 3\nattention = "eager"\n', "attention has no effect"),
        ('[[setting]]\nid = "x"\ncases = ["*"]\n' * 2, "given twice: x"),
        ("setting = []\n", "setting"),
    ],
)
def test_a_wrong_row_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "variants.toml"
    path.write_text("format = 1\n" + rows)
    with pytest.raises(CaseTableError, match=message):
        load_settings(path)
