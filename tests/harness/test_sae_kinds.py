"""SAEs that their own config places elsewhere, and kinds of SAE without a truth (public cases E5, E8)."""

import json
from pathlib import Path
from typing import Any

import pytest

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import Source
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import check_header
from candle_mi_parity.compare.verdict import Failure, Status
from candle_mi_parity.errors import CaseTableError, NoTruthError, ParityError, SaeError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.models.saelens import own_hook
from candle_mi_parity.spec.cases import Case, SaeFile, SaelensDirectory
from candle_mi_parity.spec.edits import Inject
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Trace
from candle_mi_parity.trace.truth import Truth
from tests.support.planting import CASES, Giving, judged, real, write

ROW = CASES["llama/sae-standard"]
PLAIN: dict[str, Any] = {"dtype": "float32", "architecture": "standard", "apply_b_dec_to_input": False}


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
        prepare(row(PLAIN | placed(key, own), edits=edits), tmp_path)
    message = f"llama/tried: the row places its SAE at {HERE}, and the SAE's own cfg.json places it at {own}"
    assert str(caught.value) == message
    assert prepare(row(PLAIN | placed(key, HERE), edits=edits), tmp_path).sae_file


@pytest.mark.parametrize("cfg", [{}, {"hook_name": None}, {"metadata": {}}, {"hook_name": "", "metadata": None}])
def test_a_config_without_a_hook_gives_no_place(tmp_path: Path, cfg: dict[str, Any]) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert own_hook(tmp_path) is None


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"hook_name": "blocks.1.a", "metadata": {"hook_name": "blocks.2.a"}}, "an SAE is at one place"),
        ({"hook_name": "blocks.1.a", "hook_point": "blocks.1.b"}, "an SAE is at one place"),
        ({"hook_name": "blocks.1.a", "hook_layer": 2}, "hook_layer is 2, and the hook is 'blocks.1.a'"),
    ],
)
def test_a_config_that_names_two_places_is_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(SaeError, match=message):
        own_hook(tmp_path)


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
    path = prepare(row(PLAIN | cfg), tmp_path).sae_file
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


def test_a_refusal_by_candle_mi_is_the_result(tmp_path: Path) -> None:
    refusal = EmitterError("sae", 'config error: unsupported SAE architecture: "gated"')
    for _ in range(2):  # the second time with the model's own truth in the cache
        found = judged(row(PLAIN | KINDS["gated"][0]), computing(tmp_path, refusal), tmp_path / "cache")
        assert (found.failure, found.error) == (Failure.SAE, str(refusal))


def test_numbers_without_a_truth_are_unmeasured(tmp_path: Path) -> None:
    for _ in range(2):
        found = judged(row(PLAIN | KINDS["gated"][0]), computing(tmp_path), tmp_path / "cache")
        assert found.status is Status.UNMEASURED and not found.tensors
        assert found.error.startswith("candle-mi computes something, but ") and "no truth for" in found.error


def test_an_sae_without_a_firing_feature_is_unmeasured_and_others_pass(tmp_path: Path) -> None:
    cfg = PLAIN | {"architecture": "jumprelu"}
    silent, firing = (SaelensDirectory(layer=1, d_sae=96, threshold=theta, cfg=cfg) for theta in (1e3, 0.25))
    with TorchSource() as source:
        found = judged(row({}, sae=silent), source, tmp_path)
        assert found.status is Status.UNMEASURED
        assert found.error == "no feature of the SAE fires at any position: it was not exercised"
        assert judged(row({}, sae=firing), source, tmp_path).status is Status.PASS
        assert judged(row(PLAIN), source, tmp_path).status is Status.PASS


@pytest.mark.rust
@pytest.mark.parametrize("kind", ["gated", "batchtopk", "transcoder"])
def test_the_released_candle_mi_refuses_these_kinds(live: Source, kind: str) -> None:
    case = row(PLAIN | KINDS[kind][0])
    path = prepare(case, cache_root()).sae_file
    for sae in (case.sae, SaeFile(path=str(path), layer=1)):
        found = judged(case.model_copy(update={"sae": sae}), live, cache_root())
        assert found.failure is Failure.SAE
        assert f'unsupported SAE architecture: "{kind}"' in found.error, found.error
