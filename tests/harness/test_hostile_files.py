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
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from candle_mi_parity import untrusted
from candle_mi_parity.cases import FIXTURES, Case, LocalModel, load_cases
from candle_mi_parity.errors import CaseTableError, GoldenError, ModelError, ParityError, SaeError, TraceError
from candle_mi_parity.hooks import load_model
from candle_mi_parity.models import file_digest, model_directory, read_config
from candle_mi_parity.npz import read_npz
from candle_mi_parity.reference import case_of, read_reference
from candle_mi_parity.sae import load_sae
from candle_mi_parity.subject import prepare, tokenizer
from candle_mi_parity.tensor_file import MAX_HEADER
from candle_mi_parity.trace import Trace, read_json
from proof.fuzz_targets import CFG, REFERENCE, sae_arrays
from proof.planting import CASES, real, write

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


def refused(read: Callable[[], object]) -> str:
    """The one line of the refusal."""
    with pytest.raises(ParityError) as caught:
        read()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


def saelens(directory: Path) -> Path:
    """A good SAELens directory."""
    directory.mkdir(exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps(CFG))
    save_file(sae_arrays(), directory / "sae_weights.safetensors")
    return directory


def model(directory: Path, **change: object) -> Case:
    """A case of a copy of the tiny Llama, whose config is changed; None takes a key away."""
    source = real("llama/hub").subject.model_dir
    directory.mkdir()
    config = {key: value for key, value in (read_config(source) | change).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "model.safetensors", directory)
    return CASES["llama/hub"].model_copy(update={"model": LocalModel(source="local", path=str(directory))})


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


# --- sizes before memory


def header(claims: dict[str, Any], size: int | None = None) -> bytes:
    text = json.dumps(claims).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


HEADERS: dict[str, bytes] = {
    "a header of terabytes": header({}, 1 << 42),
    "a header of 2^64 - 1": header({}, 2**64 - 1),
    "a header of 100 MB": struct.pack("<Q", 100_000_000) + b"{}" + b" " * 1000,
    "a tensor of terabytes": header({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
    "a shape that overflows": header({"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
    "offsets backwards": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}) + bytes(8),
    "deep": header({}, 8 + 2 * 10**5) + b"[" * 10**5 + b"]" * 10**5,
    "nothing": b"",
}


@pytest.mark.parametrize("attack", HEADERS)
def test_a_tensor_file_that_claims_too_much_is_one_line_in_every_reader(tmp_path: Path, attack: str) -> None:
    path = write(tmp_path / "trace", real("llama/hub"))
    path.with_suffix(".safetensors").write_bytes(HEADERS[attack])
    refused(lambda: Trace(path).tensor("hook_embed"))
    (saelens(tmp_path / "sae") / "sae_weights.safetensors").write_bytes(HEADERS[attack])
    refused(lambda: load_sae(tmp_path / "sae"))
    case = model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(HEADERS[attack])
    refused(lambda: prepare(case, tmp_path))
    assert MAX_HEADER < 100_000_000


def test_a_file_with_a_hole_of_a_terabyte_is_judged_by_its_header(tmp_path: Path, memory: Callable[[], int]) -> None:
    """It is as long as it says, and costs nothing to make."""
    count = 1 << 38
    claim = header({"x": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}})

    def hole(path: Path) -> Path:
        with path.open("wb") as file:
            file.write(claim)
            file.truncate(len(claim) + 4 * count)
        return path

    path = write(tmp_path / "trace", real("llama/hub"))
    text = path.read_text()
    for dtype in ("float32", "bfloat16"):
        path.write_text(text.replace('"key": "hook_embed"', '"key": "x"').replace('"float32"', f'"{dtype}"'))
        hole(path.with_suffix(".safetensors"))
        assert "declared" in refused(lambda: Trace(path).tensor("hook_embed"))
    hole(saelens(tmp_path / "sae") / "sae_weights.safetensors")
    assert "cfg.json says" in refused(lambda: load_sae(tmp_path / "sae"))
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(CFG | {"d_in": 1 << 20, "d_sae": 1 << 20}))
    assert "of memory" in refused(lambda: load_sae(tmp_path / "sae"))
    assert memory() < 1 << 28


@pytest.fixture
def memory() -> Callable[[], int]:
    """Bytes by which the process grew at its largest."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def npz(path: Path, spoil: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> Path:
    """An NPZ of good arrays, as ``spoil`` writes them."""
    arrays: dict[str, bytes] = {}
    for name, array in sae_arrays().items():
        np.save(out := io.BytesIO(), array)
        arrays[f"{name}.npy"] = out.getvalue()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        spoil(archive, arrays)
    return path


def claims(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    """An array's header alone."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue()


def _spoilt(**members: bytes) -> Callable[[zipfile.ZipFile, dict[str, bytes]], None]:
    def spoil(archive: zipfile.ZipFile, arrays: dict[str, bytes]) -> None:
        for name, data in (arrays | {f"{key}.npy": data for key, data in members.items()}).items():
            archive.writestr(name, data)

    return spoil


def _twice(archive: zipfile.ZipFile, arrays: dict[str, bytes]) -> None:
    _spoilt()(archive, arrays)
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("W_enc.npy", arrays["W_enc.npy"])


def _both_names(archive: zipfile.ZipFile, arrays: dict[str, bytes]) -> None:
    _spoilt()(archive, arrays)
    archive.writestr("W_enc", arrays["W_enc.npy"])


MAGIC = b"\x93NUMPY"
BOMBS: dict[str, tuple[Callable[[zipfile.ZipFile, dict[str, bytes]], None], str]] = {
    "a shape of terabytes": (_spoilt(W_enc=claims((1 << 40,))), "and has 0"),
    "a shape that overflows": (_spoilt(W_enc=claims((2**62, 2**62))), "and has 0"),
    "an element of gigabytes": (_spoilt(b_enc=claims((6,), "|V2000000000")), "and has 0"),
    "a shape below zero": (_spoilt(W_enc=claims((-1,))), "claims"),
    "64 MB of zeros in a few KB": (_spoilt(W_enc=claims((1 << 24,)) + bytes(1 << 26)), "more than weights can"),
    "a header of a megabyte": (_spoilt(W_enc=MAGIC + b"\2\0" + struct.pack("<I", 1 << 20) + b" " * (1 << 20)), ""),
    "a header that is code": (_spoilt(W_enc=MAGIC + b"\1\0" + struct.pack("<H", 20) + b"__import__('os')    "), ""),
    "the same name twice": (_twice, "given twice"),
    "the same name with and without its ending": (_both_names, "given twice"),
    "big-endian": (_spoilt(b_enc=claims((6,), ">f4") + bytes(24)), "b_enc is >f4"),
}  # fmt: skip


@pytest.mark.parametrize("attack", BOMBS)
def test_an_archive_that_claims_too_much_is_one_line(tmp_path: Path, attack: str, memory: Callable[[], int]) -> None:
    spoil, said = BOMBS[attack]
    path = npz(tmp_path / "x.npz", spoil)
    before = memory()
    assert said in refused(lambda: load_sae(path))
    assert memory() - before < 1 << 27
    load_sae(npz(tmp_path / "twin.npz", _spoilt()))


def test_a_declared_size_that_is_not_the_real_one_is_one_line(tmp_path: Path) -> None:
    """The archive's own record of how much a member expands to is a claim, too."""
    path = npz(tmp_path / "x.npz", _spoilt())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        sizes = {member.file_size for member in archive.infolist()}
    for size in sizes:
        for claim in (0, 1, size - 1, size + 1, 2**32 - 2):
            path.write_bytes(content.replace(struct.pack("<I", size), struct.pack("<I", claim)))
            refused(lambda: load_sae(path))


def test_more_than_the_machine_s_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    untrusted.require_memory(1 << 20, "x", SaeError)
    with pytest.raises(SaeError, match="x would take"):
        untrusted.require_memory(1 << 60, "x", SaeError)
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    with pytest.raises(SaeError, match="there are 1048576"):
        untrusted.require_memory((1 << 20) + 1, "x", SaeError)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"hidden_size": 10**12},
        {"num_hidden_layers": True},
        {"num_hidden_layers": "3"},
        {"vocab_size": 3},
        {"rms_norm_eps": "x"},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_config_of_sizes_that_the_weights_have_not_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    case = model(tmp_path / "model", **change)
    assert "config.json" in refused(lambda: prepare(case, tmp_path)) or "vocab_size" in change


def test_many_tensors_cost_their_number_and_not_their_square(tmp_path: Path) -> None:
    path = write(tmp_path, real("llama/hub"))
    document = json.loads(path.read_text())
    one = {"shape": [0], "dtype": "float32", "sha256": "0" * 64, "nonfinite": 0, "values": []}
    document["tensors"] += [one | {"name": f"x{i}"} for i in range(30_000)]
    path.write_text(json.dumps(document))
    assert len(Trace(path).entries) > 30_000
    document["tensors"].append(document["tensors"][-1])
    path.write_text(json.dumps(document))
    assert "given twice" in refused(lambda: Trace(path))


@pytest.mark.parametrize("where", ["shape", "part"])
def test_a_shape_of_a_million_axes_is_refused_unmultiplied(tmp_path: Path, where: str) -> None:
    path = write(tmp_path, real("llama/hub"))
    document = json.loads(path.read_text())
    entry = document["tensors"][0]
    long = [2**62] * 10**6
    if where == "shape":
        document["tensors"][0] = {k: v for k, v in entry.items() if k not in ("file", "key")} | {
            "shape": long,
            "values": [1.0],
        }
    else:
        entry["part"] = {"shape": long, "rows": [0], "columns": None}
    path.write_text(json.dumps(document))
    assert "shape" in refused(lambda: Trace(path))


@pytest.mark.parametrize("key", ["format", "tokens", "name", "unknown"])
def test_a_line_stays_a_line_however_long_what_is_wrong_is(tmp_path: Path, key: str) -> None:
    long = "x" * 10**6 + "\x1b[2J"
    there = real("llama/hub")

    def edit(document: dict[str, Any]) -> None:
        if key == "format":
            document["format"] = long
        elif key == "tokens":
            document["tokens"] = [[1] * 10**5]
        elif key == "name":
            document["tensors"][0]["name"] = long
        else:
            document[long] = 1

    path = write(tmp_path, there, edit=edit)
    from proof.planting import judge

    said = refused(lambda: judge(there, path))
    assert "\x1b" not in said


def test_a_golden_that_is_a_link_or_a_bomb_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", BOMBS["64 MB of zeros in a few KB"][0])
    with pytest.raises(GoldenError, match="more than weights can"):
        read_npz(path, GoldenError)


@pytest.mark.parametrize("error", [ModelError, SaeError, TraceError, GoldenError, CaseTableError])
def test_each_of_these_ends_a_run_with_two(error: type[ParityError]) -> None:
    assert issubclass(error, ParityError)
