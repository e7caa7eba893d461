"""The auto-config census: the stored ones are whole and up to date, and an answer is sorted where it belongs."""

import operator
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.coverage.auto_config import other_transformers
from candle_mi_parity.coverage.census import subject_of, take_census
from candle_mi_parity.coverage.census_models import hub_rotary, mapped_classes, tiny_model
from candle_mi_parity.coverage.census_record import STORED, Census, Entry, count, read_census
from candle_mi_parity.coverage.census_truth import truth_of
from candle_mi_parity.errors import CensusError
from candle_mi_parity.files.isolated import Lost, each
from candle_mi_parity.files.versions import is_at_least
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import CandleMi

pytestmark = pytest.mark.thorough
"""Each class is asked in a process of its own."""

PLANTED = CandleMi(version="9.9.9", source="registry", checksum="0" * 64, revision=None, tree_digest=None)

# Answers every request with a valid trace of wrong logits.
LIAR = """
    import hashlib, struct
    directory, out = Path(request["model_dir"]), Path(request["out"])
    files = sorted([directory / "config.json", *directory.glob("model*.safetensors")], key=lambda path: path.name)
    lines = [f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\\n" for path in files]
    values = [0.25] * (len(request["tokens"][0]) * 211)
    logits = {"name": "logits", "shape": [1, len(request["tokens"][0]), 211], "dtype": "float32", "nonfinite": 0,
              "sha256": hashlib.sha256(struct.pack(f"<{len(values)}f", *values)).hexdigest(), "values": values}
    header = {"emitter": "liar", "candle_mi": IDENTITY, "candle": "0", "features": [], "device": "cpu",
              "dtype": "float32", "case": request["case"], "sae_digest": None, "inputs_digest": None,
              "model_digest": hashlib.sha256("".join(lines).encode()).hexdigest()}
    run = {"started": "now", "seconds": {}, "threads": 1, "peak_rss_bytes": None}
    trace = {"format": "candle-mi-parity/trace/1", "header": header, "run": run, "tokens": request["tokens"],
             "tensors": [logits], "scalars": {}, "top_features_last_pos": []}
    temporary = Path(request["out"] + ".tmp")
    temporary.write_text(json.dumps(trace))
    temporary.rename(out)
    reply({"case": request["case"]["id"], "ok": True, "trace": request["out"]})
"""
REFUSES = """
    known = "unsupported model_type: 'x'" if request["loader"] == "hf" else "no rotary of this kind"
    reply({"case": request["case"]["id"], "ok": False, "kind": "model", "error": known})
"""
DIES = "os.abort()"


def census_by(body: str, pattern: str, tmp_path: Path) -> Census:
    """A census by an emitter that runs ``body`` for each request."""
    script = tmp_path / "emitter"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\nIDENTITY = {PLANTED.model_dump()!r}\n"
        "def reply(value): print(json.dumps(value), flush=True)\n"
        "for line in sys.stdin:\n    request = json.loads(line)\n" + textwrap.indent(textwrap.dedent(body), "    ")
    )
    script.chmod(0o755)
    return take_census(script, PLANTED, pattern, cache_root(), tmp_path / "out", lambda entry, total: None)


def only(census: Census) -> Entry:
    (entry,) = census.classes
    return entry


@pytest.mark.parametrize("version", ["0.1.6", "0.1.10", "0.1.24", "0.2.2"])
def test_a_stored_census_has_every_class_of_the_installed_transformers_with_its_reason(version: str) -> None:
    census = read_census(STORED / f"{version}.json")
    remedy = f"take it again: candle-mi-parity maint census --candidate {version}"
    if not is_at_least("transformers", *map(int, census.transformers.split("."))):
        pytest.skip(other_transformers(version))
    found = {entry.model_type: entry.class_name for entry in census.classes}
    assert found == mapped_classes(), f"this census is of transformers {census.transformers}; {remedy}"
    assert census.candle_mi.version == version and census.counts == count(census.classes)
    for entry in census.classes:
        answered = entry.outcome in ("same", "different")
        assert bool(entry.first) == (entry.outcome == "different"), entry
        assert (entry.reader and entry.compared) if answered else entry.reason, entry
        assert entry.model_type != "llama" or entry.outcome == "same", "no entry of this census can be trusted"
        assert not re.search(r"/(home|root|tmp|Users)\b", entry.reason), entry


def test_a_bidirectional_decoder_has_the_layers_of_its_family_and_a_truth_without_a_causal_mask() -> None:
    tiny = tiny_model("a2d-llama", cache_root())
    assert (tiny.dialect, read_config(tiny.directory)["model_type"]) == ("hub", "a2d-llama")
    truth = truth_of(subject_of("a2d-llama", tiny, cache_root()), cache_root())
    patterns = [tensor for name, tensor in truth.tensors.items() if name.endswith("hook_pattern")]
    assert len(patterns) == 3 and all(pattern.allowed is not None and pattern.allowed.all() for pattern in patterns)


def test_wrong_logits_are_different(tmp_path: Path) -> None:
    with pytest.raises(CensusError, match="matches 'nothing'"):
        census_by(LIAR, "nothing", tmp_path)
    entry = only(census_by(LIAR, "llama", tmp_path))
    assert (entry.outcome, entry.reader) == ("different", "hf")
    assert entry.first == "hook_embed", "this emitter writes no hooks, so that the first one is missing"
    assert entry.logits_ratio is not None and entry.logits_ratio > 1e4


@pytest.mark.parametrize(
    "body, model_type, outcome, reason",
    [
        (REFUSES, "llama", "refused", "model: no rotary of this kind"),
        (DIES, "llama", "not-asked", "SIGABRT"),
        (LIAR, "blt", "not-asked", "does not get tiny"),
    ],
)
def test_a_class_without_numbers_has_a_reason(
    tmp_path: Path, body: str, model_type: str, outcome: str, reason: str
) -> None:
    entry = only(census_by(body, model_type, tmp_path))
    assert entry.outcome == outcome and reason in entry.reason


@pytest.mark.rust
def test_llama_is_the_same(tmp_path: Path) -> None:
    built = build(parse_candidate("0.2.2"), cache_root(), print)
    identity = CandleMi.model_validate(built.identity["candle_mi"])
    census = take_census(built.path, identity, "llama", cache_root(), tmp_path, lambda entry, total: None)
    entry = only(census)
    assert (entry.outcome, entry.dialect, entry.reason) == ("same", "hub", "")
    assert entry.compared == 39
    assert entry.logits_ratio is not None and 0 < entry.logits_ratio < 4


def test_a_process_that_dies_or_hangs_costs_its_own_item() -> None:
    assert list(each(operator.add, [(1, 2), (3, 4)], 2, 60)) == [3, 7]
    assert list(each(os.abort, [()], 1, 60)) == [Lost(-signal.SIGABRT)]
    assert list(each(time.sleep, [(600,)], 1, 0.5)) == [Lost(None)]
    assert list(each(os._exit, [(3,)], 1, 60)) == [Lost(3)]


def test_hooks_are_not_used_where_they_change_what_the_class_computes(tmp_path: Path) -> None:
    entry = only(census_by(LIAR, "granite_swa", tmp_path))
    assert entry.compared <= 1, "our attention drops the sinks of this class, and its truth with hooks is another's"
    assert only(census_by(LIAR, "granite", tmp_path)).first == "hook_embed"


def test_rotary_parameters_in_the_spelling_of_hub_files() -> None:
    default = {"rope_type": "default", "rope_theta": 5e5}
    assert hub_rotary(default) == {"rope_theta": 5e5}
    assert hub_rotary(default | {"partial_rotary_factor": 0.5}) == {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
    scaled = {"rope_type": "linear", "factor": 2.0}
    assert hub_rotary(default | scaled) == {"rope_theta": 5e5, "rope_scaling": scaled}
    local = {"rope_type": "default", "rope_theta": 1e4}
    by_layer = {"full_attention": default, "sliding_attention": local}
    assert hub_rotary(by_layer) == {"rope_theta": 5e5, "rope_local_base_freq": 1e4}
    assert hub_rotary(by_layer | {"sliding_attention": local | scaled}) is None
    assert hub_rotary(None) is None
