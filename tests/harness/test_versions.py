"""What an older version of a library changes is said in one sentence; the lower bounds are those that are tested."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from transformers import modeling_rope_utils

from candle_mi_parity.candidate.sources import LiveSource
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.verdict import Outcome
from candle_mi_parity.coverage import auto_config
from candle_mi_parity.errors import OracleError
from candle_mi_parity.files import versions
from candle_mi_parity.judge import notes
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.models.transformers_config import as_meant
from candle_mi_parity.models.transformers_private import LATER_ROPES, TESTED, config_fields, private, tied_weights
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run
from candle_mi_parity.run.sections import judge_classes
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.paths import ROOT
from tests.support.planting import CASES, real


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_lower_bounds_are_the_versions_of_the_lowest_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = pins("lowest.lock")
    for asked in map(Requirement, project["dependencies"]):
        (bound,) = asked.specifier
        assert bound.operator == ">=", f"{asked} has no lower bound"
        tested = lowest[asked.name.replace("_", "-")]
        assert Specifier(f"=={bound.version}").contains(tested), (
            f"{asked}, and lowest.lock has {tested}: run make lock"
        )


def test_the_versions_of_transformers_that_a_message_names_are_those_of_the_locks() -> None:
    tested = [".".join(pins(lock)["transformers"].split(".")[:2]) for lock in ("lowest.lock", "requirements.lock")]
    assert " to ".join(tested) == TESTED


def test_the_page_names_every_lower_bound() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for asked in map(Requirement, project["dependencies"]):
        (bound,) = asked.specifier
        assert f"| {asked.name} | {bound.version} |" in page, f"docs/versions.md does not have {asked}"


def test_a_private_name_that_transformers_lacks_is_named_with_the_versions_that_have_it() -> None:
    found = versions.version("transformers")
    with pytest.raises(OracleError) as gone:
        private("masking_utils.no_such_mask")
    with pytest.raises(OracleError, match=r"no transformers\.no_such_module\.name"):
        private("no_such_module.name")
    with pytest.raises(OracleError, match="all_tied_weights_keys"):
        tied_weights(object())
    with pytest.raises(OracleError, match="dataclasses"):
        config_fields(object)
    assert str(gone.value) == (
        f"transformers {found} has no transformers.masking_utils.no_such_mask, which this suite needs; "
        f"transformers {TESTED} have it: install one of these"
    )


def test_private_names_are_looked_up_in_one_module() -> None:
    """Modules of transformers that its documentation lists may be imported anywhere."""
    used = re.compile(
        r"(?:from|import) transformers\.(?!modeling_outputs)\w+|transformers\.(?!logging\b)[a-z]\w*\.\w"
    )
    assert used.search("    from transformers.masking_utils import sdpa_mask") and used.search("transformers.a.b()")
    files = [path for path in (ROOT / "candle_mi_parity").rglob("*.py") if path.stem != "transformers_private"]
    assert not {path.stem: hits for path in files if (hits := used.findall(path.read_text(encoding="utf-8")))}


def test_a_case_that_needs_a_later_transformers_is_not_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: rule for name, rule in modeling_rope_utils.ROPE_INIT_FUNCTIONS.items() if name not in LATER_ROPES}
    monkeypatch.setattr(modeling_rope_utils, "ROPE_INIT_FUNCTIONS", known)
    case = CASES["llama/rope-proportional"]
    with TorchSource() as source:
        found = judge_case(case, source, "torch", tmp_path, NOTHING_KNOWN, Progress()).result
    says = (
        f"transformers {versions.version('transformers')} has no rope type 'proportional'; install transformers 5.5 "
        "or later"
    )
    assert (found.outcome, found.error) == (Outcome.ABSENT, says)
    options = RunOptions("torch", cases=(case.id, "llama/one-token"), cache=tmp_path, out=tmp_path / "out")
    whole = run(options, lambda _: Progress())
    assert whole.skipped == {case.id: says} and [judged.id for judged in whole.cases] == ["llama/one-token"]


def test_gelu_in_a_gemma_config_is_the_tanh_approximation_and_an_older_transformers_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = {kind: SimpleNamespace(model_type=kind, hidden_act="gelu") for kind in ("gemma", "starcoder2")}
    assert {kind: as_meant(config).hidden_act for kind, config in read.items()} == {
        "gemma": "gelu_pytorch_tanh",
        "starcoder2": "gelu",
    }
    gemma, other = real("gemma/hub").subject, real("llama/hub").subject
    installed = {"5.24.0": 0, "5.17.2": 1, "5.4.0": 1, "6.0": 0}
    for installed_version, count in installed.items():
        monkeypatch.setattr(versions, "version", lambda _, found=installed_version: found)
        monkeypatch.setattr(notes, "version", lambda _, found=installed_version: found)
        said = notes.version_notes(gemma)
        assert len(said) == count and all(installed_version in line and "exact gelu" in line for line in said)
        assert notes.version_notes(other) == []


def test_the_generic_reader_is_not_held_to_a_census_of_another_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = object.__new__(LiveSource)
    source.device = "cpu"
    monkeypatch.setattr(auto_config, "version", lambda _: "5.4.0")
    section = judge_classes(source, "0.2.2", "0.2.2", tmp_path, tmp_path)
    assert not section.results
    assert section.skipped == (
        "the census of candle-mi 0.2.2 was taken with transformers 5.24.0, and 5.4.0 is installed; install "
        "transformers 5.24.0"
    )
