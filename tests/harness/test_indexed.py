"""A whole file of weights with an index of shards beside it: transformers reads the file, candle-mi the shards."""

import json
import shutil
from pathlib import Path

import numpy as np
import transformers
from safetensors.numpy import load_file

from candle_mi_parity.compare.verdict import Explained
from candle_mi_parity.judge.known import facts_of, known_divergence
from candle_mi_parity.models.indexed import INDEX, WHOLE, files_read, read_digest, shards_beside
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.spec.cases import LocalModel
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.paths import cache_root
from tests.support.explaining import changed, evidence
from tests.support.planting import CASES, RELEASE, real

CASE = CASES["llama/pretrained-shards-beside"]
NORM = "model.norm.weight"


def test_transformers_reads_the_whole_file() -> None:
    directory = prepare(CASE, cache_root()).model_dir
    [shard] = shards_beside(directory, "pretrained")
    whole, other = load_file(directory / WHOLE), load_file(shard)
    assert (other[NORM] == 1).all() and not np.array_equal(whole[NORM], other[NORM])
    assert all(np.array_equal(whole[name], other[name]) for name in whole if name != NORM)
    read = transformers.AutoModelForCausalLM.from_pretrained(directory).get_parameter(NORM)
    assert np.array_equal(read.detach().float().numpy(), whole[NORM])


def test_what_candle_mi_reads_depends_on_the_loader(tmp_path: Path) -> None:
    subject = prepare(CASE, cache_root())
    directory = tmp_path / "model"
    shutil.copytree(subject.model_dir, directory)
    assert facts_of(subject).shards_beside and read_digest(subject) != subject.model_digest
    assert [path.name for path in files_read(directory, "hf")] == [WHOLE]
    case = CASE.model_copy(update={"loader": "hf"})
    handed = prepare(case, cache_root())
    assert not facts_of(handed).shards_beside and read_digest(handed) == handed.model_digest
    # Several shards need the feature mmap, and a shard that is not there or lies elsewhere is none.
    index = json.loads((directory / INDEX).read_text())
    shutil.copyfile(directory / "model-00001-of-00001.safetensors", directory / "model-00002-of-00002.safetensors")
    index["weight_map"] |= {NORM: "model-00002-of-00002.safetensors", "x": "../x.safetensors", "y": "y.safetensors"}
    (directory / INDEX).write_text(json.dumps(index))
    local = CASE.model_copy(update={"model": LocalModel(source="local", path=str(directory))})
    facts = facts_of(prepare(local, cache_root()))
    assert facts.files == 2 and "CMI060" in [row.id for row in load_explanations().applicable(facts, "0.2.2")]


def test_the_shards_of_the_case_are_known_and_no_others(tmp_path: Path) -> None:
    found = {}
    for name, weights in (("shards", {NORM: 1.0}), ("others", {NORM: 1.0, "layers.1.input_layernorm.weight": 1.0})):
        there = changed(tmp_path / name, real(CASE.id), {}, weights)
        found[name] = known_divergence(evidence(there), load_explanations(), RELEASE)
    assert isinstance(found["shards"], Explained) and found["shards"].ids == ["CMI231"]
    assert not isinstance(found["others"], Explained) and found["others"].first == "blocks.1.attn.hook_q"
