"""Files that claim more than there is: each is judged by what it says of itself before memory or time is spent."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.errors import CaseTableError, GoldenError, ModelError, ParityError, SaeError, TraceError
from candle_mi_parity.files import untrusted
from candle_mi_parity.files.npz import read_npz
from candle_mi_parity.files.tensor_file import MAX_HEADER
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.trace.trace import Trace
from proof.fuzz_targets import CFG, sae_arrays
from tests.support.hostile import model, refused, saelens
from tests.support.planting import judge, real, write


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


@pytest.mark.parametrize("key", ["format", "tokens", "name", "file", "key", "device", "scalars", "unknown"])
def test_a_line_stays_a_line_however_long_what_is_wrong_is(tmp_path: Path, key: str) -> None:
    long = "x" * 10**6 + "\x1b[2J"
    there = real("llama/hub")

    def edit(document: dict[str, Any]) -> None:
        if key == "format":
            document["format"] = long
        elif key == "tokens":
            document["tokens"] = [[1] * 10**5]
        elif key in ("name", "file", "key"):
            document["tensors"][0][key] = long.removesuffix("\x1b[2J")
        elif key == "device":
            document["header"]["device"] = long
        elif key == "scalars":
            document["scalars"]["y" * 5000] = 1.0
        else:
            document[long] = 1

    path = write(tmp_path, there, edit=edit)
    said = refused(lambda: judge(there, path))
    assert "\x1b" not in said


def test_a_golden_that_is_a_link_or_a_bomb_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", BOMBS["64 MB of zeros in a few KB"][0])
    with pytest.raises(GoldenError, match="more than weights can"):
        read_npz(path, GoldenError)


@pytest.mark.parametrize("error", [ModelError, SaeError, TraceError, GoldenError, CaseTableError])
def test_each_of_these_ends_a_run_with_two(error: type[ParityError]) -> None:
    assert issubclass(error, ParityError)
