"""The table of cases: what a bad row is refused with, how globs select, and what the digest depends on."""

import re
from pathlib import Path

import pytest

from candle_mi_parity.errors import CaseTableError, ModelError, ParityError
from candle_mi_parity.models import prepared_case
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.spec.cases import OPT_IN_LANES, Case, HubModel, SaeFile, load_cases, select
from candle_mi_parity.spec.paths import cache_root

MODEL = 'model = { source = "tiny", config = "models/llama.json", dialect = "hub" }\n'
GOOD = f'[[case]]\nid = "a/b"\n{MODEL}tokens = [1, 5]\n'


def table(tmp_path: Path, text: str, form: str = "format = 1\n") -> Path:
    path = tmp_path / "cases.toml"
    path.write_text(form + text)
    return path


BAD: dict[str, tuple[str, str]] = {
    "no row": ("case = []\n", "no case; nothing would be compared"),
    "no table of rows": ("", "case: Field required"),
    "unknown key": (GOOD + "colour = 1\n", "case.0.colour"),
    "unknown key of a model": (GOOD.replace("dialect =", "size = 1, dialect ="), "case.0.model.tiny.size"),
    "unknown source": (GOOD.replace('"tiny"', '"moon"'), "case.0.model"),
    "unknown dialect": (GOOD.replace('"hub"', '"v4"'), "case.0.model.tiny.dialect"),
    "two inputs": (GOOD + 'text = "x"\n', "give exactly one of `tokens` and `text`"),
    "no input": (GOOD.replace("tokens = [1, 5]\n", ""), "give exactly one of `tokens` and `text`"),
    "empty tokens": (GOOD.replace("[1, 5]", "[]"), "case.0.tokens"),
    "negative token": (GOOD.replace("[1, 5]", "[1, -5]"), "case.0.tokens"),
    "text for a token": (GOOD.replace("[1, 5]", '[1, "5"]'), "case.0.tokens"),
    "no random token": (GOOD.replace("[1, 5]", "{ random = 0 }"), "case.0.tokens"),
    "negative SAE layer": (GOOD + 'sae = { path = "a", layer = -1 }\n', "case.0.sae.SaeFile.layer"),
    "duplicate id": (GOOD + GOOD, "case ids given twice: a/b"),
    "half a table": ("[[case", "cases.toml"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    assert [case.id for case in load_cases(table(tmp_path, GOOD))] == ["a/b"]
    with pytest.raises(CaseTableError) as caught:
        load_cases(table(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_of_another_format_or_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaseTableError, match="No such file"):
        load_cases(tmp_path / "cases.toml")
    for form in ("", "format = 2\n", 'format = "1"\n'):
        with pytest.raises(CaseTableError, match="format"):
            load_cases(table(tmp_path, GOOD, form))
    (tmp_path / "cases.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CaseTableError, match="utf-8"):
        load_cases(tmp_path / "cases.toml")


def test_globs_select_in_the_order_of_the_table() -> None:
    cases = load_cases()
    ids = [case.id for case in cases]
    assert [case.id for case in select(cases, ["llama/*"])] == [name for name in ids if name.startswith("llama/")]
    assert [case.id for case in select(cases, ["*/window"])] == [name for name in ids if name.endswith("/window")]
    assert [case.id for case in select(cases, ["gemma2/hub", "llama/v5"])] == ["llama/v5", "gemma2/hub"]
    with pytest.raises(CaseTableError, match=r"no case matches 'gemm2/hub'; did you mean gemma2/hub") as caught:
        select(cases, ["llama/*", "gemm2/hub"])
    assert len(str(caught.value)) < 300


def test_a_case_that_needs_a_download_runs_only_when_named() -> None:
    cases = load_cases()
    waiting = {case.id for case in cases} - {case.id for case in select(cases, [])}
    assert waiting == {case.id for case in cases if case.lane in OPT_IN_LANES} != set()
    for name in waiting:
        assert [case.id for case in select(cases, [name])] == [name]
        assert name not in {case.id for case in select(cases, ["*"])}, "a wildcard starts no download"
        with pytest.raises(CaseTableError, match=f"does not start; name them: .*{re.escape(name)}"):
            select(cases, [name[:-1] + "*"])


def test_hub_models_and_saes_are_pinned_to_a_commit() -> None:
    hub = [case for case in load_cases() if case.lane == "hub"]
    assert hub and all(isinstance(case.model, HubModel) for case in hub)
    revisions = [case.model.revision for case in hub if isinstance(case.model, HubModel)]
    revisions += [str(case.sae.revision) for case in hub if isinstance(case.sae, SaeFile) and case.sae.repo]
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in revisions), revisions


def concrete(**row: object) -> Case:
    model = {"source": "tiny", "config": "models/llama.json", "dialect": "hub"}
    return Case.model_validate({"id": "a/b", "model": model, **row})


def test_an_input_that_the_model_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(concrete(tokens=[1, 210]), cache_root()).tokens == [[1, 210]]
    with pytest.raises(ParityError, match=r"token 211.*vocabulary of 211"):
        prepare(concrete(tokens=[1, 211]), cache_root())
    with pytest.raises(CaseTableError, match="SAE layer 3, but the model has 3 layers"):
        prepare(concrete(tokens=[1, 5], sae={"path": "saes/gemma2_l1.npz", "layer": 3}), cache_root())
    with pytest.raises(ModelError, match=r"^[^\n]*no usable tokenizer in[^\n]*$"):
        prepare(concrete(text="hello"), cache_root())
    monkeypatch.setattr(prepared_case, "tokenizer", lambda _: lambda text: {"input_ids": [5] if text else []})
    assert prepare(concrete(text="x"), cache_root()).tokens == [[5]]
    with pytest.raises(
        CaseTableError, match=r"a/b: there is no token, as the tokenizer of .* gives none for the text; nothing"
    ):
        prepare(concrete(text=""), cache_root())


def test_the_digest_depends_on_the_inputs_and_not_on_the_name() -> None:
    def digest(**row: object) -> str:
        return prepare(concrete(**{"tokens": [1, 5], **row}), cache_root()).digest

    assert digest() == digest(id="c/d", lane="hub", stored="part")
    sae = {"path": "saes/gemma2_l1.npz", "layer": 1}
    others = [digest(tokens=[1, 6]), digest(tokens={"random": 2}), digest(sae=sae), digest(sae=sae | {"layer": 2})]
    assert len({digest(), *others}) == 5


def test_transformers_warnings_about_a_config_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for case in load_cases():
        if case.id in ("gemma/activation", "gemma/hub", "phi3/longrope"):
            prepare(case, cache_root())
    assert "[transformers]" not in capfd.readouterr().err
