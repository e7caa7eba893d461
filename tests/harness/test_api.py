"""The ledger of public functions: complete for every release, and it fails where it should."""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from candle_mi_parity.candidate.build import EMITTER
from candle_mi_parity.cli.cli import app
from candle_mi_parity.coverage.api import (
    RELEASES,
    ApiError,
    RustdocFormatError,
    Surface,
    load_surface,
    public_functions,
)
from candle_mi_parity.coverage.api_ledger import (
    ApiLedger,
    ApiRow,
    Comparisons,
    comparisons,
    emitted,
    faults,
    load_api,
    load_surfaces,
    makes_numbers,
    totals,
)
from candle_mi_parity.coverage.api_rustdoc import record
from candle_mi_parity.spec.paths import FIXTURES, cache_root

NOTHING = Comparisons(*[frozenset[str]()] * 4)
"""Comparisons of which none is there."""

LEDGER, SURFACES = load_api(), load_surfaces()
ENCODE = "sae::SparseAutoencoder::encode"


def references() -> Comparisons:
    """All that the ledger names, as if it were there: the tables of cases and calls have tests of their own."""
    named = {reference for row in LEDGER.api for reference in row.compared or []}
    split = [reference.partition(":") for reference in named]
    return Comparisons(
        edits=frozenset(name for kind, _, name in split if kind == "edit"),
        calls=frozenset(name for kind, _, name in split if kind == "call"),
        named=frozenset(named),
        emitted=emitted(EMITTER),
    )


def with_function(item: str, signature: str = "fn(x: &Tensor) -> Result<Tensor>") -> list[Surface]:
    last = SURFACES[-1]
    return [*SURFACES[:-1], last.model_copy(update={"items": {**last.items, item: signature}})]


def with_row(row: ApiRow) -> ApiLedger:
    return LEDGER.model_copy(update={"api": [*LEDGER.api, row]})


def test_every_function_of_every_release_is_in_one_row() -> None:
    assert faults(LEDGER, SURFACES, references()) == []


def test_every_comparison_that_the_ledger_names_exists() -> None:
    assert faults(LEDGER, SURFACES, comparisons()) == []


def test_totals_add_up() -> None:
    found = totals(LEDGER, SURFACES)
    assert [total.version for total in found] == list(RELEASES)
    for total, surface in zip(found, SURFACES, strict=True):
        assert sum(total.covers.values()) == total.functions == len(surface.items)
        assert "unlisted" not in total.covers and total.covers["compared"] > 0
    for before, after in pairwise(found):
        assert after.functions == before.functions + len(after.added) - len(after.removed)
    assert "nn_ops::rope" in found[-1].added and "cache::KVCache::new" in found[-1].removed


def test_a_new_function_is_unlisted_and_named() -> None:
    found = faults(LEDGER, with_function("sae::SparseAutoencoder::encode_twice"), references())
    assert len(found) == 1 and found[0].startswith("sae::SparseAutoencoder::encode_twice: unlisted")
    counted = totals(LEDGER, with_function("sae::SparseAutoencoder::encode_twice"))[-1]
    assert counted.covers["unlisted"] == 1 and "sae::SparseAutoencoder::encode_twice" in counted.added


def test_a_function_without_its_row_is_unlisted() -> None:
    short = LEDGER.model_copy(update={"api": [row for row in LEDGER.api if ENCODE not in row.items]})
    assert [line.partition(": ")[0] for line in faults(short, SURFACES, references())] == [ENCODE]


@pytest.mark.parametrize("pattern", [ENCODE, "sae::SparseAutoencoder::encod[e]", "sae::SparseAutoencoder::enc*de"])
def test_two_rows_for_one_function_fail(pattern: str) -> None:
    found = faults(with_row(ApiRow(items=[pattern], compared=["sae"])), SURFACES, references())
    expected = "stale" if "[" in pattern else "in 2 rows"
    assert len(found) == 1 and expected in found[0], "a bracket is Rust's own, not a glob's"


@pytest.mark.parametrize("pattern", ["sae::SparseAutoencoder::encode_nothing", "nowhere::*"])
def test_an_item_that_no_release_has_is_stale(pattern: str) -> None:
    found = faults(with_row(ApiRow(items=[pattern], compared=["sae"])), SURFACES, references())
    assert len(found) == 1 and found[0].startswith(f"{pattern}: stale")


@pytest.mark.parametrize("reference", ["edit:nonsense", "call:nonsense", "nonsense", "sae:encode", "edit:", "call"])
def test_a_dead_reference_fails(reference: str) -> None:
    row = next(row for row in LEDGER.api if ENCODE in row.items)
    rows = [one if one is not row else row.model_copy(update={"compared": [reference]}) for one in LEDGER.api]
    found = faults(LEDGER.model_copy(update={"api": rows}), SURFACES, references())
    assert len(found) == 1 and found[0].startswith(f"{ENCODE}: {reference}: no ")


def test_without_cases_and_calls_nothing_is_compared(tmp_path: Path) -> None:
    (tmp_path / "cases.toml").write_text("format = 1\ncase = []\n")
    assert comparisons(tmp_path, tmp_path, tmp_path) == NOTHING
    nothing = replace(NOTHING, emitted=emitted(EMITTER))
    assert len(faults(LEDGER, SURFACES, nothing)) == sum(len(row.compared or []) for row in LEDGER.api)


def test_comparisons_are_read_from_the_tables(tmp_path: Path) -> None:
    (tmp_path / "cases.toml").write_text('[[case]]\nid = "a/b"\nedits = [{ kind = "scale" }, { kind = "zero" }]\n')
    (tmp_path / "calls.toml").write_text('[[call]]\nid = "c"\nfn = "encode"\n')
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.rs").write_text("sae.encode(x); // sae.decode(x)\ncandle_mi::kl(p, q); let lone = f(x);\n")
    (tmp_path / "src" / "a_tests.rs").write_text("sae.reconstruct(x);\n")
    found = comparisons(tmp_path, tmp_path, tmp_path)
    assert found.edits == {"scale", "zero"} and found.calls == {"encode"} and found.named == {"hooks"}
    assert found.emitted == {"encode", "kl"}
    (tmp_path / "calls.toml").write_text("[[call]\n")
    with pytest.raises(ApiError, match=r"calls\.toml"):
        comparisons(tmp_path, tmp_path)


@pytest.mark.parametrize("reason", ["accessor", "builder", "display"])
def test_a_function_that_computes_is_not_excused_as_an_accessor(reason: str) -> None:
    row = ApiRow.model_validate({"items": ["sae::planted"], "reason": reason, "why": "planted for the test"})
    found = faults(with_row(row), with_function("sae::planted"), references())
    assert len(found) == 1 and f"so it is no {reason}" in found[0]


@pytest.mark.parametrize("item", ["nn_ops::planted", "download::planted", "hooks::HookSpec::num_planted"])
def test_a_new_function_that_makes_numbers_has_no_reason_by_a_glob(item: str) -> None:
    row = ApiRow(items=["nn_ops::p*"], reason="internal layer", why="planted for the test")
    found = faults(with_row(row) if item.startswith("nn_ops") else LEDGER, with_function(item), references())
    assert any(line.startswith(f"{item}: returns numbers, so it needs its name") for line in found)


def test_what_the_emitter_never_calls_is_not_compared() -> None:
    row = ApiRow(items=["sae::never_called"], compared=["sae"])
    found = faults(with_row(row), with_function("sae::never_called"), references())
    assert found == ["sae::never_called: listed as compared, and the emitter never calls it"]


def test_a_call_compares_the_function_of_its_name() -> None:
    row = ApiRow(items=["planted::decode"], compared=["call:encode"])
    found = faults(with_row(row), with_function("planted::decode"), references())
    assert found == ["planted::decode: compared by a call of encode"]


@pytest.mark.parametrize(
    ("item", "signature", "numbers"),
    [
        ("a::b", "fn(self: &Self) -> &Tensor", False),
        ("a::b", "fn(self: &Self, layer: usize) -> Option<&Tensor>", False),
        ("a::b", "fn(self: &Self) -> &[Tensor]", False),
        ("a::into_output", "fn(self: Self) -> Tensor", False),
        ("a::b", "fn(x: &Tensor)", False),
        ("a::b", "fn(self: &Self) -> Result<Vec<(u32, f32)>>", True),
        ("a::b", "fn(self: &Self) -> f64", True),
        ("a::b", "fn(x: &Tensor) -> Result<Tensor>", True),
    ],
)
def test_which_functions_make_numbers(item: str, signature: str, numbers: bool) -> None:
    assert makes_numbers(item, signature) is numbers


BAD = {
    "unknown key": 'items = ["a"]\ncompared = ["sae"]\nnote = "x"',
    "neither": 'items = ["a"]',
    "both": 'items = ["a"]\ncompared = ["sae"]\nreason = "hub"\nwhy = "downloads it"',
    "no why": 'items = ["a"]\nreason = "hub"',
    "a why without reason": 'items = ["a"]\ncompared = ["sae"]\nwhy = "downloads it"',
    "unknown reason": 'items = ["a"]\nreason = "boring"\nwhy = "nobody wants it"',
    "no items": 'items = []\ncompared = ["sae"]',
    "nothing compared": 'items = ["a"]\ncompared = []',
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "api.toml"
    path.write_text(f"format = 1\n[[api]]\n{BAD[name]}\n")
    with pytest.raises(ApiError) as caught:
        load_api(path)
    assert "\n" not in str(caught.value)


SPOIL: dict[str, Callable[[str], str]] = {
    "of another release": lambda text: text.replace('"version": "0.2.2"', '"version": "0.2.1"'),
    "cut off": lambda text: text[:1000],
    "empty": lambda text: '{"format": 1, "version": "0.2.2", "items": {}}',
    "unknown key": lambda text: text.replace('"format": 1', '"format": 1, "more": 2'),
}


@pytest.mark.parametrize("name", SPOIL)
def test_a_spoilt_record_is_one_line(tmp_path: Path, name: str) -> None:
    text = (FIXTURES / "api" / "0.2.2.json").read_text()
    (tmp_path / "0.2.2.json").write_text(SPOIL[name](text))
    with pytest.raises(ApiError) as caught:
        load_surface("0.2.2", tmp_path)
    assert "\n" not in str(caught.value)


def _item(identity: int, name: str, inner: dict[str, Any], visibility: str = "public") -> dict[str, Any]:
    return {"id": identity, "name": name, "visibility": visibility, "attrs": [], "inner": inner}


def _function(*inputs: str) -> dict[str, Any]:
    return {"function": {"sig": {"inputs": [[name, {"primitive": "f32"}] for name in inputs], "output": None}}}


def small_crate() -> dict[str, Any]:
    """A crate with a public and a private module, of which the root re-exports one function each."""
    items = [
        _item(0, "crate", {"module": {"items": [1, 2, 3, 4]}}),
        _item(1, "open", {"module": {"items": [5, 7]}}),
        _item(2, "hidden", {"module": {"items": [6]}}, "default"),
        _item(3, "", {"use": {"id": 5, "name": "shown", "is_glob": False}}),
        _item(4, "", {"use": {"id": 6, "name": "renamed", "is_glob": False}}),
        _item(5, "shown", _function("x")),
        _item(6, "inner", _function()),
        _item(7, "private", _function(), "default"),
    ]
    return {"root": 0, "format_version": 57, "index": {str(item["id"]): item for item in items}}


def test_a_function_is_called_by_where_it_is_documented() -> None:
    assert public_functions(small_crate()) == {"open::shown": "fn(x: f32)", "renamed": "fn()"}


@pytest.mark.parametrize("version", [56, 58, "57", None])
def test_an_unknown_format_of_rustdoc_is_refused(version: object) -> None:
    with pytest.raises(RustdocFormatError, match=f"is of format {version}, known: 57"):
        public_functions({**small_crate(), "format_version": version})


def test_a_type_of_an_unknown_kind_is_refused() -> None:
    crate = small_crate()
    crate["index"]["5"]["inner"] = {"function": {"sig": {"inputs": [["x", {"tensor_view": 1}]], "output": None}}}
    with pytest.raises(ApiError, match="unknown here: tensor_view"):
        public_functions(crate)


def test_a_spoilt_crate_of_rustdoc_is_one_line() -> None:
    crate = small_crate()
    del crate["index"]["5"]["inner"]["function"]["sig"]
    with pytest.raises(ApiError, match="format 57, lacks 'sig'"):
        public_functions(crate)


@pytest.mark.rust
def test_the_record_is_what_rustdoc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candle_mi_parity.coverage.api_rustdoc.save_surface", lambda surface: saved.append(surface))
    saved: list[Surface] = []
    try:
        record("0.2.2", cache_root())
    except RustdocFormatError as error:  # of another toolchain; the record itself stays as it is
        pytest.skip(str(error))
    assert saved == [load_surface("0.2.2")]


def test_the_command_prints_the_totals() -> None:
    result = CliRunner().invoke(app, ["api"], env={"COLUMNS": "200"})
    assert result.exit_code in (0, 1)
    assert ["all", *(str(len(surface.items)) for surface in SURFACES)] in [
        line.split() for line in result.stdout.splitlines()
    ]
    assert "0.2.2 - cache::KVCache::new" in result.stdout


def test_the_file_says_what_the_vocabulary_means() -> None:
    text = (FIXTURES / "api.toml").read_text()
    used = {row["reason"] for row in tomllib.loads(text)["api"] if "reason" in row}
    assert all(f"{reason}" in text.partition("format = 1")[0] for reason in used)
