"""Tensors that a user's program dumped: ``*.safetensors`` with hook names as keys, and ``tokens.json``.

The tensors may be a part of those of a trace; they are judged as they are.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.spec.hook_points import hook_names
from candle_mi_parity.trace.trace import TOP_FEATURES, Feature, InMemory
from candle_mi_parity.trace.truth import Truth

TOKENS = "tokens.json"
_FORMATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
"""Format in the file → format in which the model is assumed to have run, the narrowest first."""
_SAE = ("sae.features", "sae.recon")


@dataclass(frozen=True)
class Dump:
    """:ivar dtype: the narrowest format among the tensors."""

    directory: Path
    tokens: list[int]
    arrays: dict[str, np.ndarray]
    dtype: str


def read_dump(directory: Path) -> Dump:
    """:raises TraceError: no such directory, no tensors or tokens, a duplicate name, a format that is not a float."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        there = "it holds no *.safetensors" if directory.is_dir() else "it does not exist"
        raise TraceError(f"trace {directory}: {there}; expected tensors named by hook and {TOKENS}")
    arrays: dict[str, np.ndarray] = {}
    formats: set[str] = set()
    for path in files:
        file = TensorFile(path)
        try:
            for name in sorted(file.keys()):
                kind, shape = file.kind(name)
                if kind not in _FORMATS:
                    raise TraceError(f"{path}: {one_line(name)} is {kind}, expected {', '.join(_FORMATS)}")
                if name in arrays:
                    raise TraceError(f"{path}: {one_line(name)} is in another file of the directory too")
                arrays[name] = _read(file, name, kind, shape)
                formats.add(kind)
        except (OSError, SafetensorError) as error:
            raise TraceError(f"{path}: not readable safetensors: {one_line(str(error))}") from error
    if not arrays:
        raise TraceError(f"trace {directory}: its files hold no tensor")
    dtype = next(dtype for kind, dtype in _FORMATS.items() if kind in formats)
    return Dump(directory, _tokens(directory / TOKENS), arrays, dtype)


def _read(file: TensorFile, name: str, kind: str, shape: list[int]) -> np.ndarray:
    if kind != "BF16":
        return file.tensor(name)
    bits = np.frombuffer(file.raw(name), "<u2").astype("<u4") << 16  # the upper half of a float32
    return bits.view("<f4").reshape(shape)


def _tokens(path: Path) -> list[int]:
    """``[1, 2]``, ``[[1, 2]]`` or either of them under the key ``tokens``."""
    found = read_json(path, TraceError)
    found = found.get("tokens") if isinstance(found, dict) else found
    rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    if len(rows) > 1:
        raise TraceError(f"{path}: holds {len(rows)} prompts; dump each into a directory of its own")
    if not isinstance(rows[0], list) or not rows[0] or any(type(token) is not int for token in rows[0]):
        raise TraceError(f"{path}: expected a list of token ids, found {one_line(repr(rows[0]), 80)}")
    return list(rows[0])


def check_names(dump: Dump, n_layers: int, sae_hook: str | None) -> None:
    """:raises TraceError: a name that is not a hook of the model, or incomplete tensors of an SAE."""
    known = [*hook_names(n_layers), "logits", *(_SAE if sae_hook else ())]
    if unknown := [name for name in dump.arrays if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise TraceError(
            f"trace {dump.directory}: {one_line(unknown[0])}{more} is not a hook of this model of {n_layers} layers"
            f"{hint}"
        )
    given = [name for name in _SAE if name in dump.arrays]
    if given and (lacking := {*_SAE, str(sae_hook)} - set(dump.arrays)):
        raise TraceError(f"trace {dump.directory}: {given[0]} is judged together with {', '.join(sorted(lacking))}")


def as_trace(dump: Dump, truth: Truth, dtype: str) -> InMemory:
    """The dump in the truth's shapes; a missing batch axis is added.

    :param dtype: the format in which the model ran.
    :raises TraceError: a tensor has another shape.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, array in dump.arrays.items():
        shape = truth.tensors[name].shape
        if array.shape not in (shape, shape[1:]):
            expected = f"{list(shape)} or {list(shape[1:])}"
            raise TraceError(f"trace {dump.directory}: {name} has shape {list(array.shape)}, expected {expected}")
        arrays[name] = array.reshape(shape)
    scalars, top = _of_sae(arrays, truth.meta["sae_hook"]) if _SAE[0] in arrays else ({}, [])
    return InMemory({name: (array, None) for name, array in arrays.items()}, dtype, scalars, top, set(arrays))


def _of_sae(arrays: dict[str, np.ndarray], hook: str) -> tuple[dict[str, float], list[Feature]]:
    """The scalars and strongest features that the emitter writes, computed from the tensors."""
    resid, features, recon = (arrays[name].astype(np.float64) for name in (hook, *_SAE))
    last = features[0, -1]
    order = [int(index) for index in np.argsort(-last, kind="stable")[:TOP_FEATURES] if last[index] > 0]
    scalars = {
        "sae.n_active_last_pos": float(np.count_nonzero(last > 0)),
        "sae.reconstruction_mse": float(np.square(resid - recon).mean()),
        "sae.resid_last_norm": float(np.linalg.norm(resid[0, -1])),
        "sae.encoded_last_norm": float(np.linalg.norm(last)),
        "sae.decoded_last_norm": float(np.linalg.norm(recon[0, -1])),
    }
    return scalars, [Feature(index=index, value=float(last[index])) for index in order]
