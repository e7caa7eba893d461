"""Files that attack whoever reads them, given to every reader: nothing runs, nothing hangs, nothing is followed.

Each attack has its harmless twin in the same test, or a proof that it would have done harm.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_mi_parity.coverage.flat_json import case_of, read_reference
from candle_mi_parity.errors import CaseTableError, GoldenError, ParityError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.npz import read_npz
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import prepare, tokenizer
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.hooks import load_model
from candle_mi_parity.spec.cases import LocalModel, load_cases
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.trace.trace import Trace, read_json
from proof.fuzz_targets import REFERENCE
from tests.support.hostile import model, refused, saelens
from tests.support.planting import real, write

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "trace": ("x.json", Trace),
    "candidate.json": ("x.json", read_json),
    "flat reference": ("x.json", read_reference),
    "config.json": ("config.json", lambda path: read_config(path.parent)),
    "cfg.json": ("cfg.json", lambda path: load_sae(path.parent)),
    "NPZ": ("x.npz", load_sae),
    "golden": ("x.npz", lambda path: read_npz(path, GoldenError)),
    "cases": ("cases.toml", load_cases),
    "digest": ("x", file_digest),
}
"""Reader → the name under which it looks for its file, and how it is called."""
JSON = [name for name, (file, _) in READERS.items() if file.endswith(".json")]


@pytest.fixture(autouse=True)
def _ends_in_time() -> Iterator[None]:
    """A reader that waits for ever must fail here and not hold up the suite."""

    def late(*_: object) -> None:
        raise AssertionError("still reading after a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    saelens(tmp_path)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / name).unlink(missing_ok=True)
        make(tmp_path / name)
        refused(lambda: read(tmp_path / name))


def test_a_pipe_in_place_of_tensors_is_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", real("llama/hub"))
    case = model(tmp_path / "model")
    for place, read in (
        (path.with_suffix(".safetensors"), lambda: Trace(path).tensor("hook_embed")),
        (saelens(tmp_path / "sae") / "sae_weights.safetensors", lambda: load_sae(tmp_path / "sae")),
        (tmp_path / "model" / "model.safetensors", lambda: prepare(case, tmp_path)),
    ):
        place.unlink()
        os.mkfifo(place)
        refused(read)


DEEP: dict[str, str] = {
    "10^6 lists": "[" * 10**6 + "]" * 10**6,
    "10^6 objects": '{"a":' * 10**6 + "1" + "}" * 10**6,
    "key twice among many": "{" + ",".join(f'"k{i}":0' for i in range(10**5)) + ',"k99999":0}',
    "NaN": '{"d_in": NaN}',
    "a number past float64": '{"d_in": 1e999}',
    "an integer of 10^5 digits": '{"d_in": ' + "9" * 10**5 + "}",
    "no UTF-8": '{"\udcff": 1}',
}


@pytest.mark.parametrize("attack", DEEP)
@pytest.mark.parametrize("reader", JSON)
def test_json_that_attacks_its_parser_is_one_line(tmp_path: Path, reader: str, attack: str) -> None:
    name, read = READERS[reader]
    saelens(tmp_path)
    (tmp_path / name).write_bytes(DEEP[attack].encode("utf-8", "surrogateescape"))
    assert "not valid JSON" in refused(lambda: read(tmp_path / name))


@pytest.mark.parametrize("reader", [*JSON, "cases"])
def test_a_document_too_large_is_refused_unread(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    saelens(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    assert "bytes, more than" in refused(lambda: read(tmp_path / name))


def test_toml_that_attacks_its_parser_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.toml"
    for text in ("a = " + "[" * 10**5 + "]" * 10**5, "a = " + "9" * 10**5, "a = '\x00'", "a.b" * 1000):
        path.write_text(text)
        refused(lambda: load_cases(path))


# --- nothing runs


class Payload:
    """Unpickling this makes a directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["PARITY_TEST_PAYLOAD"],)


def payload(name: str) -> bytes:
    """A file that makes the directory when it is unpickled."""
    out = io.BytesIO()
    if name.endswith((".npy", ".npz")):
        np.save(out, np.array([Payload()], dtype=object), allow_pickle=True)
        if name.endswith(".npz"):
            inner = out.getvalue()
            with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
                archive.writestr("W_enc.npy", inner)
    elif name.endswith(".pt"):
        torch.save(Payload(), out)
    else:
        pickle.dump(Payload(), out)
    return out.getvalue()


PICKLES = ("pytorch_model.bin", "model.pt", "sae.pt", "sae_weights.pkl", "x.npz", "x.npy", "training_args.bin")


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that exists once a payload ran."""
    monkeypatch.setenv("PARITY_TEST_PAYLOAD", str(tmp_path / "executed"))
    return tmp_path / "executed"


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_unpickled_by_no_reader(tmp_path: Path, executed: Path, name: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    path = there / name
    path.write_bytes(payload(name))
    for read in (read_config, load_sae, Trace, read_reference, load_cases):
        for place in (there, path):
            refused(lambda read=read, place=place: read(place))  # type: ignore[misc]
    refused(lambda: model_directory(LocalModel(source="local", path=str(there)), tmp_path))
    beside = model(tmp_path / "model")
    shutil.copy(path, tmp_path / "model" / name)
    load_model(prepare(beside, tmp_path).model_dir, torch.float32)
    shutil.copy(path, saelens(tmp_path / "sae"))
    load_sae(tmp_path / "sae")
    assert not executed.exists(), f"{name} was unpickled"
    if name.endswith((".npy", ".npz")):
        loaded = np.load(path, allow_pickle=True)
        _ = loaded["W_enc"] if name.endswith(".npz") else loaded
    elif name.endswith(".pt"):
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert executed.exists(), "the payload does nothing: the test excites nothing"


def test_weights_that_only_a_pickle_holds_are_not_taken_for_shards(tmp_path: Path, executed: Path) -> None:
    """transformers falls back to the pickle where shards have no index, and its digest would be the decoy's."""
    case = model(tmp_path / "model")
    decoy = tmp_path / "model" / "model-00001-of-00001.safetensors"
    (tmp_path / "model" / "model.safetensors").rename(decoy)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(payload("pytorch_model.bin"))
    assert "model.safetensors.index.json: no such file" in refused(lambda: prepare(case, tmp_path))
    assert not executed.exists()


CODE = "import os\nos.mkdir(os.environ['PARITY_TEST_PAYLOAD'])\nclass Evil: pass\n"


@pytest.mark.parametrize("model_type", ["llama", "evil", None])
def test_code_beside_a_model_is_not_run_and_nobody_is_asked(
    tmp_path: Path, executed: Path, monkeypatch: pytest.MonkeyPatch, model_type: str | None
) -> None:
    """transformers asks on the terminal whether it may run it, unless it is told that it may not."""

    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    case = model(tmp_path / "model", model_type=model_type, auto_map=names)
    (tmp_path / "model" / "evil.py").write_text(CODE)
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    if model_type == "llama":
        load_model(prepare(case, tmp_path).model_dir, torch.float32)
    else:
        assert "model_type" in refused(lambda: prepare(case, tmp_path))
    refused(lambda: tokenizer(tmp_path / "model"))
    assert not executed.exists()
    exec(CODE)
    assert executed.exists(), "the code does nothing: the test excites nothing"


# --- nothing is followed


def test_a_config_cannot_point_at_other_weights(tmp_path: Path) -> None:
    for i, key in enumerate(("transformers_weights", "quantization_config")):
        case = model(tmp_path / f"model{i}", **{key: {"x": "../model.safetensors"}})
        assert key in refused(lambda: prepare(case, tmp_path))  # noqa: B023
    case = model(tmp_path / "adapted", _name_or_path="/elsewhere", base_model_name_or_path="/elsewhere")
    prepare(case, tmp_path)
    (tmp_path / "adapted" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "an adapter to another model" in refused(lambda: prepare(case, tmp_path))


@pytest.mark.parametrize("named", ["../evil.safetensors", "/dev/zero", "model-00002-of-00002.safetensors", "", None])
def test_an_index_lists_the_shards_beside_it_and_nothing_else(tmp_path: Path, named: str | None) -> None:
    case = model(tmp_path / "model")
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / shard)
    shutil.copy(tmp_path / "model" / shard, tmp_path / "evil.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard, "b": named}}))
    assert "lists" in refused(lambda: prepare(case, tmp_path))
    empty: list[Any] = [[], {"weight_map": []}, {"weight_map": {}}, {}]
    for other in empty:
        index.write_text(json.dumps(other))
        refused(lambda: prepare(case, tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    prepare(case, tmp_path)


def test_a_link_out_of_a_directory_is_refused_and_one_within_is_not(tmp_path: Path) -> None:
    case, sae = model(tmp_path / "model"), saelens(tmp_path / "sae")
    shutil.copytree(tmp_path / "model", tmp_path / "secret")
    shutil.copytree(sae, tmp_path / "other")
    for directory, name, outside, read in (
        (tmp_path / "model", "config.json", "secret", lambda: prepare(case, tmp_path)),
        (tmp_path / "model", "model.safetensors", "secret", lambda: prepare(case, tmp_path)),
        (sae, "cfg.json", "other", lambda: load_sae(sae)),
        (sae, "sae_weights.safetensors", "other", lambda: load_sae(sae)),
    ):
        place = directory / name
        place.unlink()
        place.symlink_to(tmp_path / outside / name)
        assert f"{name} is a link that leads out" in refused(read)
        place.unlink()
        shutil.copy(tmp_path / outside / name, directory / f"within-{name}")
        place.symlink_to(f"within-{name}")
        read()


def test_the_links_of_the_hub_s_own_cache_are_followed(tmp_path: Path) -> None:
    model(tmp_path / "model")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "model" / name, blobs / f"sha-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"sha-{name}")
    local = LocalModel(source="local", path=str(snapshot))
    assert model_directory(local, tmp_path) == snapshot
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "model" / "config.json")
    assert "leads out" in refused(lambda: model_directory(local, tmp_path))


@pytest.mark.parametrize("text", ["../x", "/etc/x", "a/../../x", "a//b", ".hidden/x", "a/\x1b[2J", "a b/c", ""])
def test_a_case_s_names_stay_below_where_they_are_used(tmp_path: Path, text: str) -> None:
    good = (FIXTURES / "cases.toml").read_text(encoding="utf-8")
    assert 'id = "llama/hub"' in good and 'config = "models/llama.json"' in good
    path = tmp_path / "cases.toml"
    for old, new in (('"llama/hub"', json.dumps(text)), ('"models/llama.json"', json.dumps(text))):
        path.write_text(good.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(CaseTableError):
            load_cases(path)


@pytest.mark.parametrize("key", ["model_id", "sae_repo", "sae_npz_path"])
@pytest.mark.parametrize("text", ["~nobody-here/x", "\x00", "a" * 5000, "\ud800"])
def test_a_reference_that_names_no_place_is_one_line(tmp_path: Path, key: str, text: str) -> None:
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(REFERENCE | {key: text}))
    with pytest.raises(ParityError) as caught:
        prepare(case_of(read_reference(path)), tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
