"""Damaged stored traces, models, SAEs and flat JSONs are refused in one line.

Hypothesis damages each kind of file; then come cases that random changes do not find.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from candle_mi_parity.candidate.sources import StoredSource
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.coverage.flat_json import case_of, read_reference
from candle_mi_parity.errors import ParityError, SaeError
from candle_mi_parity.files import untrusted
from candle_mi_parity.files.npz import read_npz
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.judge.case import Progress, judge_mode
from candle_mi_parity.models.prepared_case import prepare, tokenizer
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.hooks import load_model
from candle_mi_parity.trace.trace import Trace
from tests.support.planting import Real, compare_trace, failures, local, real, write
from tests.support.stored import Edit, stored_copy
from tests.support.untrusted import CFG, REFERENCE, damaged_bytes, damaged_tree, refused, sae_arrays, saelens

# --- random damage --------------------------------------------------------------------------------


def is_read(read: Callable[[], object]) -> bool:
    """Whether a file is read; otherwise it must be refused in one line, without any other exception."""
    try:
        read()
    except ParityError as error:
        message = str(error)
    else:
        return True
    assert message and "\n" not in message
    return False


SLOW = [HealthCheck.too_slow]  # the first example may compute a truth
FUZZ = settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=SLOW)


def evidence(there: Real, path: Path) -> list[tuple[str, int]]:
    """The tensors of a trace that passes and how much of each was compared; empty where it fails or is refused."""
    results: list[TensorResult] = []
    passed = is_read(lambda: results.extend(compare_trace(there, path))) and not failures(results)
    return [(result.name, result.compared) for result in results if passed]


@settings(FUZZ, max_examples=20)
@given(data=st.data())
def test_a_damaged_trace_passes_only_with_all_its_evidence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    there = real("gemma2/hub")
    path = write(tmp_path_factory.getbasetemp() / "damaged", there)
    honest, tree = evidence(there, path), json.loads(path.read_bytes())
    path.write_bytes(data.draw(damaged_tree(tree) | damaged_bytes(json.dumps(tree).encode())))
    assert evidence(there, path) in (honest, [])


@FUZZ
@given(data=st.data())
def test_damaged_tensors_of_a_trace_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    there = real("llama/hub")
    path = write(tmp_path_factory.getbasetemp() / "tensors", there)
    file = path.with_suffix(".safetensors")
    content = file.read_bytes()
    damaged = data.draw(damaged_bytes(content))
    file.write_bytes(damaged)
    assert is_read(lambda: compare_trace(there, path)) == (damaged == content)


@pytest.mark.parametrize("kind", ["npz", "cfg", "weights", "reference", "config"])
@FUZZ
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    directory = tmp_path_factory.mktemp(kind)
    if kind == "npz":
        path = directory / "sae.npz"
        np.savez(path, allow_pickle=False, **sae_arrays())
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
        is_read(lambda: load_sae(path))
    elif kind in ("cfg", "weights"):
        path = saelens(directory) / ("cfg.json" if kind == "cfg" else "sae_weights.safetensors")
        damage = damaged_bytes(path.read_bytes())
        path.write_bytes(data.draw(damage | damaged_tree(CFG) if kind == "cfg" else damage))
        is_read(lambda: load_sae(directory))
    elif kind == "reference":
        path = directory / "reference.json"
        path.write_bytes(data.draw(damaged_tree(REFERENCE) | damaged_bytes(json.dumps(REFERENCE).encode())))
        is_read(lambda: case_of(read_reference(path)))
    else:
        case = local(directory / "model")
        path = directory / "model" / "config.json"
        path.write_bytes(data.draw(damaged_tree(json.loads(path.read_bytes()))))
        is_read(lambda: prepare(case, directory))


# --- a trace cannot add or leave out numbers -------------------------------------------------------


@pytest.mark.parametrize(
    ("case_id", "edit"),
    [
        ("llama/hub", lambda d: d["scalars"].update({"sae.reconstruction_mse": 0.5})),
        ("llama/hub", lambda d: d.update(top_features_last_pos=[{"index": 1, "value": 2.0}])),
        ("gemma2/hub", lambda d: d["top_features_last_pos"].pop()),
        ("gemma2/hub", lambda d: d["top_features_last_pos"].append({"index": 95, "value": 0.0})),
    ],
)
def test_other_scalars_or_features_fail_or_are_refused(
    tmp_path: Path, case_id: str, edit: Callable[[dict[str, Any]], object]
) -> None:
    assert evidence(real(case_id), write(tmp_path / "twin", real(case_id)))
    assert not evidence(real(case_id), write(tmp_path, real(case_id), edit=edit))


def stored_trace(directory: Path, case_id: str, edit: Edit) -> None:
    """Judge a copy of a stored case of 0.2.2, after ``edit`` changed its document and tensors."""
    judge_mode(real(case_id).oracle, StoredSource(stored_copy(directory, case_id, edit)), "free", Progress())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "cuda:0"),
        ("case", {"id": "llama/v5", "digest": "0" * 64}),
        ("candle_mi", {"version": "9.9.9", "source": "registry", "checksum": "a" * 64}),
    ],
)
def test_a_stored_trace_of_another_case_or_candle_mi_is_refused(tmp_path: Path, field: str, value: object) -> None:
    refused(lambda: stored_trace(tmp_path, "llama/hub", lambda d, _: d["header"].update({field: value})))


def test_an_index_names_only_unchanged_files_in_its_directory(tmp_path: Path) -> None:
    there = real("llama/hub")
    index = stored_copy(tmp_path / "stored", "llama/hub")
    (path,) = index.parent.rglob("hub.*.json")
    tensors, text, outside = path.with_name("hub.safetensors"), path.read_text(), tmp_path / "outside"

    def read() -> None:
        judge_mode(there.oracle, StoredSource(index), "free", Progress())

    read()
    path.write_text(f"{text} ")
    assert "its bytes have sha256" in refused(read)
    path.rename(outside)
    assert "cannot be read" in refused(read)
    outside.write_text(text)
    path.symlink_to(outside)
    assert "is a link that leads out" in refused(read)
    path.unlink()
    path.write_text(text)
    tensors.rename(outside)
    tensors.symlink_to(outside)
    assert "is not beside it" in refused(read)
    digest = path.suffixes[-2].removeprefix(".")
    index.write_text(index.read_text().replace(digest, "../../../up"))
    assert "cases.llama/hub.free" in refused(read)


@pytest.mark.parametrize("columns", [[0], [0] * 100, list(range(100))])
def test_a_stored_part_cannot_choose_which_logits_are_compared(tmp_path: Path, columns: list[int]) -> None:
    """Otherwise one logit that agrees could stand for the hundred that are stored."""

    def choose(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        entry = next(entry for entry in document["tensors"] if entry["name"] == "logits")
        tensors["logits"] = np.ascontiguousarray(tensors["logits"][..., columns])
        entry["part"]["columns"] = [entry["part"]["columns"][i] for i in columns]
        entry["shape"] = list(tensors["logits"].shape)
        entry["sha256"] = hashlib.sha256(tensors["logits"].tobytes()).hexdigest()

    assert is_read(lambda: stored_trace(tmp_path, "llama/one-token", choose)) == (columns == list(range(100)))


# --- invalid JSON, huge sizes ----------------------------------------------------------------------

ATTACKS = {
    "10^6 lists": b"[" * 10**6 + b"]" * 10**6,
    "key given twice": b'{"k\\n": 0, "k\\n": 0}',
    "NaN": b'{"d_in": NaN}',
    "a number past float64": b'{"d_in": 1e999}',
    "an integer of 10^5 digits": b'{"d_in": ' + b"9" * 10**5 + b"}",
    "not UTF-8": b'{"\xff": 1}',
}


def test_invalid_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for attack in ATTACKS.values():
        path.write_bytes(attack)
        assert "not valid JSON" in refused(lambda: read_json(path, SaeError))
    os.truncate(path, 1 << 40)
    assert "bytes, more than" in refused(lambda: read_json(path, SaeError))
    path.unlink()
    os.mkfifo(path)
    for read in (read_json, read_npz):
        assert "not a regular file" in refused(lambda: read(path, SaeError))  # noqa: B023


def header(claims: dict[str, Any], size: int | None = None) -> bytes:
    text = json.dumps(claims).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


HEADERS = {
    "a header of terabytes": header({}, 1 << 42),
    "a tensor of terabytes": header({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
    "a shape that overflows": header({"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
    "offsets backwards": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}) + bytes(8),
    "nothing": b"",
}


@pytest.mark.parametrize("attack", HEADERS)
def test_a_tensor_file_with_an_invalid_header_is_refused(tmp_path: Path, attack: str) -> None:
    path = write(tmp_path / "trace", real("llama/hub"))
    path.with_suffix(".safetensors").write_bytes(HEADERS[attack])
    refused(lambda: Trace(path).tensor("hook_embed"))
    (saelens(tmp_path / "sae") / "sae_weights.safetensors").write_bytes(HEADERS[attack])
    refused(lambda: load_sae(tmp_path / "sae"))
    case = local(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(HEADERS[attack])
    refused(lambda: prepare(case, tmp_path))


def test_a_pointer_of_git_lfs_is_named_with_its_remedy(tmp_path: Path) -> None:
    case = local(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "pointer of Git LFS in place of the file: run `git lfs pull`" in refused(lambda: prepare(case, tmp_path))


def test_sizes_that_do_not_fit_in_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(CFG | {"d_in": 1 << 20, "d_sae": 1 << 20}))
    claim = header({"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}})
    (tmp_path / "sae_weights.safetensors").write_bytes(claim)
    os.truncate(tmp_path / "sae_weights.safetensors", len(claim) + (1 << 40))  # a sparse file
    assert "of memory" in refused(lambda: load_sae(tmp_path))
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    with pytest.raises(SaeError, match="and 1048576 are available"):
        untrusted.require_memory((1 << 20) + 1, "x", SaeError)


def array_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


NPZ = {
    "a shape of terabytes": (array_header((1 << 40,)), ""),
    "a shape that overflows": (array_header((2**62, 2**62)), ""),
    "a shape below zero": (array_header((-1,)), ""),
    "64 MB of zeros in a few KB": (array_header((1 << 24,)) + bytes(1 << 26), "more than weights can"),
    "a header that is code": (b"\x93NUMPY\1\0" + struct.pack("<H", 20) + b"__import__('os')    ", ""),
}


@pytest.mark.parametrize("attack", NPZ)
def test_an_npz_with_an_invalid_header_is_refused(tmp_path: Path, attack: str) -> None:
    content, expected = NPZ[attack]
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", content)
    message = refused(lambda: load_sae(path))
    assert "not a readable NPZ" in message and expected in message


# --- no code is executed ---------------------------------------------------------------------------


class Payload:
    """An object whose unpickling creates a directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["PARITY_TEST_PAYLOAD"],)


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that exists after a payload was executed."""
    monkeypatch.setenv("PARITY_TEST_PAYLOAD", str(tmp_path / "executed"))
    return tmp_path / "executed"


def test_no_reader_unpickles(tmp_path: Path, executed: Path) -> None:
    array = tmp_path / "x.npz"
    np.savez(array, W_enc=np.array([Payload()], dtype=object))
    assert "not a readable NPZ" in refused(lambda: load_sae(array))
    case = local(tmp_path / "model")
    # Without an index of the shards, transformers would read the pickle.
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    load_model(prepare(case, tmp_path).model_dir, torch.float32)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001-of-00001.safetensors")
    assert "no model.safetensors.index.json, their index" in refused(lambda: prepare(case, tmp_path))
    assert not executed.exists()
    pickle.loads(pickle.dumps(Payload()))
    assert executed.exists(), "the payload has no effect"


@pytest.mark.parametrize("model_type", ["llama", "evil", ...])
def test_code_beside_a_model_is_not_run(
    tmp_path: Path, executed: Path, monkeypatch: pytest.MonkeyPatch, model_type: object
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked a question"))
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    case = local(tmp_path / "model", model_type=model_type, auto_map=names, rope_scaling=...)
    (tmp_path / "model" / "evil.py").write_text("import os\nos.mkdir(os.environ['PARITY_TEST_PAYLOAD'])")
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    if model_type == "llama":
        load_model(prepare(case, tmp_path).model_dir, torch.float32)
    else:
        assert "model_type" in refused(lambda: prepare(case, tmp_path))
    refused(lambda: tokenizer(tmp_path / "model"))
    assert not executed.exists()


# --- no file outside a directory is read -----------------------------------------------------------


@pytest.mark.parametrize("named", ["../evil.safetensors", "model-00002-of-00002.safetensors", None])
def test_an_index_lists_the_shards_beside_it_and_nothing_else(tmp_path: Path, named: str | None) -> None:
    case = local(tmp_path / "model")
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / shard)
    shutil.copy(tmp_path / "model" / shard, tmp_path / "evil.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard, "b": named}}))
    assert "lists" in refused(lambda: prepare(case, tmp_path))
    index.write_text(json.dumps({"weight_map": []}))
    assert "no weight_map" in refused(lambda: prepare(case, tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    prepare(case, tmp_path)


def test_a_link_out_of_a_directory_is_refused_and_one_within_is_not(tmp_path: Path) -> None:
    case, sae = local(tmp_path / "model"), saelens(tmp_path / "sae")
    shutil.copytree(tmp_path / "model", tmp_path / "secret")
    shutil.copytree(sae, tmp_path / "other")
    for directory, name, outside, read in (
        (tmp_path / "model", "model.safetensors", "secret", lambda: prepare(case, tmp_path)),
        (sae, "cfg.json", "other", lambda: load_sae(sae)),
    ):
        place = directory / name
        place.unlink()
        place.symlink_to(tmp_path / outside / name)
        assert f"{name} is a link that leads out" in refused(read)
        place.unlink()
        shutil.copy(tmp_path / outside / name, directory / f"within-{name}")
        place.symlink_to(f"within-{name}")
        read()
