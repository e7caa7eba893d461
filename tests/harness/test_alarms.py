"""Honest variants do not alarm, a wrong one does, and nothing is claimed of too few."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from candle_mi_parity.errors import CaseTableError, OracleError
from proof import alarm_views, alarms
from proof.alarm_dumps import Judged, NotRun, judge_all
from proof.sums import Reordered
from proof.variants import Setting, Sums, Variant, load_settings, variants_of
from tests.support.planting import CASES

SETTINGS = {setting.id: setting for setting in load_settings()}
ORDERS = [
    Sums(order="permuted", seed=1),
    Sums(order="reversed"),
    Sums(order="blocks", size=4),
    Sums(order="pairwise", size=4),
    Sums(order="one_by_one"),
    Sums(order="float64"),
    Sums(order="openblas"),
]


def judged(setting: Setting, case_id: str = "llama/hub") -> list[Judged]:
    found = list(judge_all([Variant(setting, CASES[case_id])]))
    assert all(isinstance(dump, Judged) for dump in found)
    return [dump for dump in found if isinstance(dump, Judged)]


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
    assert not torch.equal(other, plain), "the order of torch itself"
    assert (other - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (with_bias - exact - plain[0]).abs().max() < 1e-5 * exact.abs().max()


def test_a_permuted_order_moves_means_too() -> None:
    x = torch.randn(64, 300)
    with torch.no_grad(), Reordered(Sums(order="permuted", seed=1)):
        permuted = x.mean(-1, keepdim=True)
    assert not torch.equal(permuted, x.mean(-1, keepdim=True))
    assert torch.allclose(permuted, x.mean(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("name", ["sums permuted, seed 1", "sums one by one", "OpenBLAS", "sums in float64"])
def test_another_order_is_inside_the_gate(name: str) -> None:
    (dump,) = judged(SETTINGS[name])
    assert dump.moved > 10 and not dump.unseen
    assert not dump.alarms and 0.2 < dump.position < 4 and dump.element < 16


def test_only_the_prompts_own_row_of_a_batch_is_judged() -> None:
    (dump,) = judged(SETTINGS["batch of 4"])
    assert not dump.alarms and dump.tensors > 30
    assert dump.unseen == 3, "the lens of each layer is fed one row anyway"


def test_sdpa_leaves_scores_and_patterns_unseen() -> None:
    (dump,) = judged(SETTINGS["sdpa attention"])
    assert not dump.alarms and dump.moved
    assert dump.unseen == 6, "scores and pattern of three layers"


def test_a_variant_that_must_see_all_alarms_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "sees_all", True)
    (dump,) = judged(SETTINGS["sdpa attention"])
    assert any("missing" in alarm for alarm in dump.alarms)


def test_fresh_samples_are_inside_the_gate() -> None:
    dumps = judged(SETTINGS["samples of the noise model"].model_copy(update={"samples": 8}))
    assert len(dumps) == 8 == len({dump.digest for dump in dumps})
    assert all(dump.sample and not dump.alarms and 0.5 < dump.position < 6 for dump in dumps)


@pytest.mark.parametrize("factor", [1 + 1e-4, 1 - 1e-4])
def test_a_wrong_variant_alarms(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr("proof.sums._one_by_one", lambda a, b: torch.matmul(a, b) * factor)
    (dump,) = judged(SETTINGS["sums one by one"])
    assert dump.alarms and dump.position > 8
    found = alarm_views.collect([SETTINGS["sums one by one"]], [dump] * 100)
    assert found.exit_code == 1 and found.verdict.startswith("FALSE ALARM")


def test_a_wrong_sample_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 1 + 1e-4
    monkeypatch.setattr("proof.capture.as_emitted", lambda tensor: (tensor.numpy() * wrong).astype(np.float32))
    (dump,) = judged(SETTINGS["samples of the noise model"].model_copy(update={"samples": 1}))
    assert dump.alarms


def test_a_kernel_that_the_machine_has_not_is_not_run() -> None:
    setting = Setting(id="x", cases=["llama/hub"], cpu_capability="AVX2")
    here = torch.backends.cpu.get_cpu_capability()
    if here == "AVX2":
        setting = setting.model_copy(update={"cpu_capability": "AVX512"})
    (found,) = judge_all([Variant(setting, CASES["llama/hub"])])
    assert isinstance(found, NotRun) and here in found.reason


@pytest.mark.slow
def test_an_environment_holds_in_a_process_of_its_own() -> None:
    (dump,) = judged(SETTINGS["torch without vector units"])
    assert not dump.alarms and dump.moved, "the kernels without vector units gave the very same bits"
    assert torch.backends.cpu.get_cpu_capability() != "DEFAULT", "this process kept its own"


def test_an_order_that_nothing_was_computed_in_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proof.sums._MATMULS", frozenset())
    with pytest.raises(OracleError, match="varies nothing"):
        judged(SETTINGS["sums one by one"])


def test_there_are_sixty_variants_and_the_samples_of_the_stated_confidence() -> None:
    settings = SETTINGS.values()
    assert len(settings) >= 60
    assert sum(len(variants_of(setting)) for setting in settings if setting.id != "float32") >= 60
    (samples,) = [setting.samples for setting in settings if setting.samples]
    assert 1 - 0.95**samples >= 0.95


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('[[setting]]\nid = "x"\ncases = ["*"]\nthread = 1\n', "thread"),
        ('[[setting]]\nid = "x"\ncases = []\n', "cases"),
        ('[[setting]]\nid = "x"\ncases = ["*"]\nsamples = 3\nthreads = 2\n', "threads has no effect"),
        ('[[setting]]\nid = "x"\ncases = ["*"]\n' * 2, "given twice: x"),
        ("setting = []\n", "setting"),
    ],
)
def test_a_wrong_row_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "variants.toml"
    path.write_text("format = 1\n" + rows)
    with pytest.raises(CaseTableError, match=message):
        load_settings(path)


def test_a_glob_without_a_case_is_refused() -> None:
    with pytest.raises(CaseTableError, match="no case matches 'lama/"):
        variants_of(Setting(id="x", cases=["llama/hub", "lama/*"]))


DUMP = Judged("s", "llama/hub", False, "0", 39, 5, 0, 0, 1.5, "blocks.0.attn.hook_q", 5.0, "logits", [])


def dumps(count: int, **change: object) -> list[Judged | NotRun]:
    return [replace(DUMP, digest=str(i), **change) for i in range(count)]  # type: ignore[arg-type]


def test_sixty_distinct_dumps_are_wanted() -> None:
    setting = Setting(id="s", cases=["*"])
    assert alarm_views.collect([setting], dumps(60)).exit_code == 0
    few = alarm_views.collect([setting], [*dumps(59), *dumps(59)])
    assert few.exit_code == 1 and few.verdict.startswith("TOO FEW: 59 distinct")


def test_the_confidence_is_stated_only_with_samples() -> None:
    plain, samples = Setting(id="s", cases=["*"]), Setting(id="s", cases=["*"], samples=59)
    assert "confidence" not in alarm_views.collect([plain], dumps(60)).verdict
    assert "confidence" not in alarm_views.collect([samples], dumps(60)).verdict, "the run broke off before them"
    stated = alarm_views.collect([samples], dumps(118, sample=True)).verdict
    assert "1 − 0.95^59 = 95.2%" in stated and f"fewer than {1 - 0.05 ** (1 / 118):.2%}" in stated


def test_the_views_hold_every_dump_and_the_gate(tmp_path: Path) -> None:
    settings = [Setting(id=name, cases=["*"]) for name in ("s", "never")]
    bad = replace(DUMP, digest="x", position=math.inf, alarms=["logits: FAIL (values)"])
    found = alarm_views.collect(settings, [*dumps(60), bad, NotRun("never", "llama/hub", "no AVX-512 <here>")])
    alarm_views.write(found, tmp_path)
    svg, table = (tmp_path / "alarms.svg").read_text(), (tmp_path / "alarms.md").read_text()
    assert "gate 8" in svg and "gate 32" in svg and "gate-position" in svg
    assert svg.count("<use") >= 2 * 60
    assert "| s | 61 | 61 |" in table and "not run: no AVX-512 <here>" in table and "logits: FAIL (values)" in table
    document = json.loads((tmp_path / "alarms.json").read_text())
    assert document["verdict"].startswith("FALSE ALARM: 1 of 61") and len(document["dumps"]) == 61


def test_the_command_fails_when_it_can_claim_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [SETTINGS["sums reversed"].model_copy(update={"cases": ["llama/hub"]})]
    monkeypatch.setattr(alarms, "load_settings", lambda: few)
    with pytest.raises(typer.Exit) as stopped:
        alarms.main(tmp_path)
    assert stopped.value.exit_code == 1 and "TOO FEW: 1 distinct" in capsys.readouterr().out
    assert (tmp_path / "alarms.json").exists()
