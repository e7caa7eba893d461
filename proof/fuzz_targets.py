"""What is fuzzed, under which name, and how often in the whole run.

A target gives the outcome of one seed as a word, and raises for a fault: anything but a ParityError, or a PASS
without evidence. A file that is read although it was changed is ``another``: its digest says
so, and no trace is of it.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from candle_mi_parity.coverage.flat_json import case_of, read_reference
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.sae import Sae, load_sae, sae_files
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.spec.cases import LocalModel, load_cases
from candle_mi_parity.spec.paths import FIXTURES
from proof import fuzz_traces as traces
from proof.fuzz_mutants import ODD_VALUES, dumped, mutate_array, mutate_bytes, mutate_tree
from tests.support.planting import CASES, real

Fuzz = Callable[[Random], str]


@dataclass(frozen=True)
class Target:
    """:ivar make: what a process does once, given an empty directory of its own."""

    name: str
    mutants: int
    make: Callable[[Path], Fuzz]


def _trace(mutate: Callable[[traces.Cut, Path, Random], None], case_ids: tuple[str, ...] = traces.CASES) -> Any:
    def make(directory: Path) -> Fuzz:
        whole = {name: traces.honest(name, directory / str(i)) for i, name in enumerate(case_ids)}
        places = {name: directory / str(i) for i, name in enumerate(case_ids)}

        def one(rng: Random) -> str:
            name = rng.choice(case_ids)
            mutate(traces.cut(name), places[name], rng)
            try:
                return refused(lambda: traces.outcome(traces.cut(name), places[name], whole[name]))
            finally:
                traces.restore(traces.cut(name), places[name], mutate)

        return one

    return make


def refused(read: Callable[[], str]) -> str:
    """``refused`` for one clear line, and what ``read`` says otherwise."""
    try:
        return read()
    except ParityError as error:
        said = str(error)
    assert said and "\n" not in said and len(said) < 4000, f"not one clear line: {said!a:.200}"
    return "refused"


def _is_another(sae: Sae, path: Path, honest: str) -> str:
    arrays = [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, *([] if sae.threshold is None else [sae.threshold])]
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays)
    assert sae.W_enc.shape == sae.W_dec.shape[::-1] == (sae.d_in, sae.d_sae)
    return "equal" if digest_files(sae_files(path)) == honest else "another"


def sae_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,), "threshold": (6,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _npz(directory: Path) -> Fuzz:
    path = directory / "sae.npz"
    np.savez(path, allow_pickle=False, **sae_arrays())
    content, honest = path.read_bytes(), digest_files([path])

    def one(rng: Random) -> str:
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.5 else _rebuilt(rng, content))
        return refused(lambda: _is_another(load_sae(path), path, honest))

    return one


def _rebuilt(rng: Random, content: bytes) -> bytes:
    """The archive written anew with one array of another kind, header, name or compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            data = old.read(name)
            if name == chosen:
                data = rng.choice((_other_header, _other_array, mutate_bytes))(rng, data)
                name = rng.choice([name, name, name, "x.npy", "../x.npy", "W_enc.npy", name.removesuffix(".npy")])
            new.writestr(name, data, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)))
    return out.getvalue()


def _other_header(rng: Random, data: bytes) -> bytes:
    old = data[: data.index(b"\n") + 1]
    shape = rng.choice([(10**12,), (10**6, 10**6), (0,), (-1,), (2**62, 2**62), (), (1,) * 40, (3, 2)])
    kind = rng.choice(["<f4", ">f4", "<f8", "|O", "<i8", "<U9", "|V1000000", "<c16"])
    text = f"{{'descr': {kind!r}, 'fortran_order': {rng.random() < 0.3}, 'shape': {shape}, }}".encode()
    return old[:10] + text.ljust(len(old) - 11)[: max(len(old) - 11, len(text))] + b"\n" + data[len(old) :]


def _other_array(rng: Random, data: bytes) -> bytes:
    array = mutate_array(rng, np.load(io.BytesIO(data)), list(sae_arrays().values()))
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


CFG: dict[str, Any] = {
    "d_in": 4, "d_sae": 6, "dtype": "float32", "architecture": "jumprelu", "activation_fn_str": "relu",
    "activation_fn_kwargs": {"k": 3}, "apply_b_dec_to_input": True, "normalize_activations": "none",
    "sae_lens_version": "5.10.0", "hook_name": "blocks.1.hook_resid_post", "metadata": {"sae_lens_version": "6.1.0"},
}  # fmt: skip


def _saelens(directory: Path) -> Fuzz:
    config, weights = directory / "cfg.json", directory / "sae_weights.safetensors"
    config.write_bytes(dumped(CFG))
    save_file(sae_arrays(), weights)
    content, honest = weights.read_bytes(), digest_files([config, weights])

    def one(rng: Random) -> str:
        config.write_bytes(dumped(CFG))
        weights.write_bytes(content)
        kind = rng.randrange(3)
        if kind == 0:
            config.write_bytes(dumped(mutate_tree(rng, CFG)))
        elif kind == 1:
            config.write_bytes(mutate_bytes(rng, dumped(CFG)))
        else:
            weights.write_bytes(mutate_bytes(rng, content))
        return refused(lambda: _is_another(load_sae(directory), directory, honest))

    return one


def _config(directory: Path, then: Callable[[Path], str] = lambda _: "") -> Fuzz:
    """``config.json`` of a model directory, up to what the candidate is asked."""
    source = real("llama/hub").subject
    for file in ("config.json", "model.safetensors"):
        shutil.copy(source.model_dir / file, directory)
    tree = json.loads((directory / "config.json").read_text())
    local = LocalModel(source="local", path=str(directory))
    case = CASES["llama/hub"].model_copy(update={"model": local})
    honest = prepare(case, directory).digest

    def one(rng: Random) -> str:
        mutant = dumped(mutate_tree(rng, tree)) if rng.random() < 0.7 else mutate_bytes(rng, dumped(tree))
        (directory / "config.json").write_bytes(mutant)

        def read() -> str:
            digest = prepare(case, directory).digest
            return then(directory) or ("equal" if digest == honest else "another")

        return refused(read)

    return one


def _run_model(directory: Path) -> str:
    """What the oracle does with it, in float32 for speed; an exception of transformers is a run's ERROR."""
    try:
        forward(load_model(directory, torch.float32), torch.tensor([[1, 2, 3]]))
    except ParityError:
        raise
    except Exception as error:
        return f"ERROR ({type(error).__name__})"
    return ""


def _loaded(directory: Path) -> Fuzz:
    return _config(directory, _run_model)


def _cases(directory: Path) -> Fuzz:
    lines = (FIXTURES / "cases.toml").read_text(encoding="utf-8").splitlines(keepends=True)
    path = directory / "cases.toml"

    def one(rng: Random) -> str:
        start = rng.randrange(len(lines) - 60)
        kept = [*lines[:6], *lines[start : start + 40]]
        if rng.random() < 0.5:
            at = rng.randrange(len(kept))
            key = kept[at].partition("=")[0]
            odd = rng.choice(ODD_VALUES)
            kept[at] = f"{key} = {json.dumps(odd)}\n"
            content = "".join(kept).encode()
        else:
            content = mutate_bytes(rng, "".join(kept).encode())
        path.write_bytes(content)
        return refused(lambda: f"{'no case' if not load_cases(path) else 'read'}")

    return one


REFERENCE: dict[str, Any] = {
    "model_id": "google/gemma-2-2b", "prompt": "The capital of France is", "hook_layer": 12,
    "hook_name": "blocks.12.hook_resid_post", "sae_repo": "google/gemma-scope-2b-pt-res",
    "sae_npz_path": "layer_12/width_16k/average_l0_82/params.npz", "d_in": 2304, "d_sae": 16384,
    "architecture": "JumpReLU", "tokens": ["<bos>", "The"], "n_tokens": 2, "reconstruction_mse": 0.5,
    "n_active_last_pos": 2, "top_features_last_pos": [{"index": 3, "value": 1.5}, {"index": 5, "value": 0.5}],
    "resid_last_first10": [0.5] * 10, "encoded_last_first10": [0.0] * 10, "decoded_last_first10": [0.25] * 10,
    "resid_last_norm": 1.0, "encoded_last_norm": 1.0, "decoded_last_norm": 1.0,
}  # fmt: skip


def _reference(directory: Path) -> Fuzz:
    """A flat reference JSON up to the case that it claims; what it is judged at best is INCONCLUSIVE."""
    path = directory / "reference.json"

    def one(rng: Random) -> str:
        tree = rng.random() < 0.6
        path.write_bytes(dumped(mutate_tree(rng, REFERENCE)) if tree else mutate_bytes(rng, dumped(REFERENCE)))
        return refused(lambda: "read" if case_of(read_reference(path)) else "")

    return one


def _emitter(directory: Path) -> Fuzz:
    from proof.fuzz_emitter import requests

    return requests(directory)


TARGETS = [
    Target("flat reference", 20_000, _reference),
    Target("cases.toml", 14_000, _cases),
    Target("SAE: SAELens directory", 16_000, _saelens),
    Target("trace: bytes of the document", 16_000, _trace(traces.document_bytes)),
    Target("trace: tree of the document", 14_000, _trace(traces.document_tree)),
    Target("trace: tensors, digests renewed", 6_000, _trace(traces.tensor_values)),
    Target("trace: bytes of the tensors", 6_000, _trace(traces.tensor_bytes)),
    Target("trace: candidate.json", 3_000, _trace(traces.candidate_tree, ("llama/hub",))),
    Target("SAE: NPZ", 10_000, _npz),
    Target("emitter: requests", 6_000, _emitter),
    Target("config.json: read", 2_000, _config),
    Target("config.json: loaded and run", 200, _loaded),
]
NAMED = {target.name: target for target in TARGETS}
