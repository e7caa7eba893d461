"""The flat reference JSON that ``sae_validation.py`` writes and candle-mi's ``validate_sae.rs`` reads.

It has twenty keys about one SAE at one hook and the last position. :func:`make_reference` makes one from the oracle;
:func:`judge_reference` checks one from anywhere. The file has no provenance, so that it alone proves nothing.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import TensorResult
from candle_mi_parity.errors import CaseTableError, TraceError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.untrusted import read_json, validated
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import PreparedCase, tokenizer
from candle_mi_parity.models.resolve import as_model
from candle_mi_parity.models.sae import load_npz
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import Case, SaeFile
from candle_mi_parity.trace.trace import Feature, InMemory, Selection
from candle_mi_parity.trace.truth import Truth

FIRST = 10
"""Number of leading values of a vector in the file."""

Value = Annotated[float, Field(allow_inf_nan=False)]


class Reference(BaseModel):
    """The file, with its keys in order."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_id: str
    prompt: str
    hook_layer: Annotated[int, Field(ge=0)]
    hook_name: str
    sae_repo: str
    sae_npz_path: str
    d_in: Annotated[int, Field(ge=1)]
    d_sae: Annotated[int, Field(ge=1)]
    architecture: str
    tokens: list[str]
    n_tokens: int
    reconstruction_mse: Value
    n_active_last_pos: int
    top_features_last_pos: list[Feature]
    resid_last_first10: list[Value]
    encoded_last_first10: list[Value]
    decoded_last_first10: list[Value]
    resid_last_norm: Value
    encoded_last_norm: Value
    decoded_last_norm: Value


def read_reference(path: Path) -> Reference:
    """:raises TraceError: the file is not JSON, or a key or type is wrong; names the first."""
    return validated(Reference, read_json(path, TraceError), path, TraceError)


def reference_case(model: str, sae: str, layer: int, prompt: str) -> Case:
    """The case of a model, an SAE (an NPZ file, or ``REPO:PATH`` on the hub) at a layer, and a prompt."""
    if Path(sae).expanduser().is_file() or ":" not in sae:
        file = SaeFile(path=str(Path(sae).expanduser().resolve()), layer=layer)
    else:
        repo, _, path = sae.partition(":")
        file = SaeFile(path=path, layer=layer, repo=repo, revision="main")
    return Case(id=f"{model}/reference", model=as_model(model), text=prompt, sae=file, lane="hub")


def case_of(reference: Reference) -> Case:
    """The case of a file.

    :raises ParityError: ``model_id`` is not a model, or the SAE is not an SAE.
    """
    try:
        path = Path(reference.sae_repo) / reference.sae_npz_path
        sae = str(path) if path.is_file() else f"{reference.sae_repo}:{reference.sae_npz_path}"
        return reference_case(reference.model_id, sae, reference.hook_layer, reference.prompt)
    except (OSError, ValueError, RuntimeError) as error:  # a path that is too long, has a NUL or an unknown home
        raise TraceError(f"reference: sae_repo or sae_npz_path: {one_line(str(error))}") from error


def is_last_layer(subject: PreparedCase, layer: int) -> bool:
    """Whether ``hidden_states[layer + 1]`` would be after the final norm, and not ``resid_post``."""
    return layer + 1 == read_config(subject.model_dir)["num_hidden_layers"]


def _described(subject: PreparedCase) -> dict[str, Any]:
    """The keys that do not depend on the numbers; tokens are ASCII, with a question mark for any other character."""
    assert subject.sae_file is not None and subject.case.sae is not None
    weights, words = load_npz(subject.sae_file), tokenizer(subject.model_dir).convert_ids_to_tokens(subject.tokens[0])
    return {
        "hook_name": subject.case.sae.hook,
        "d_in": weights.d_in,
        "d_sae": weights.d_sae,
        "architecture": weights.architecture,
        "tokens": [word.encode("ascii", errors="replace").decode() for word in words],
        "n_tokens": len(words),
    }


def make_reference(oracle: Oracle, model: str, sae: str, top_k: int) -> dict[str, Any]:
    """The twenty keys from the float64 truth, in the script's order.

    :param top_k: number of features listed, at most those that are active.
    """
    subject = oracle.subject
    case = subject.case
    if not isinstance(case.sae, SaeFile) or case.text is None or subject.sae_file is None:
        raise CaseTableError(f"{case.id}: a reference needs a prompt and an SAE")
    truth = oracle.truth()
    vectors = {
        "resid": truth.sae["sae"].residual[0, -1],
        "encoded": truth.tensors["sae.features"].value[0, -1],
        "decoded": truth.tensors["sae.recon"].value[0, -1],
    }
    encoded = vectors["encoded"]
    active = int(np.count_nonzero(encoded > 0))
    order = np.argsort(-encoded, kind="stable")[: min(top_k, active)]
    repo, path = (case.sae.repo, case.sae.path) if case.sae.repo else (str(Path(sae).parent), Path(sae).name)
    document = _described(subject) | {
        "model_id": model,
        "prompt": case.text,
        "hook_layer": case.sae.layer,
        "sae_repo": str(repo),
        "sae_npz_path": path,
        "reconstruction_mse": truth.scalars["sae.reconstruction_mse"][0],
        "n_active_last_pos": active,
        "top_features_last_pos": [Feature(index=int(i), value=float(encoded[i])) for i in order],
    }
    document |= {f"{name}_last_first10": vector[:FIRST].tolist() for name, vector in vectors.items()}
    document |= {f"{name}_last_norm": float(np.linalg.norm(vector)) for name, vector in vectors.items()}
    return Reference.model_validate(document).model_dump()


def judge_reference(reference: Reference, oracle: Oracle) -> list[TensorResult]:
    """Compare every number of the file with the truth, after its tokens, widths, architecture and hook.

    :raises TraceError: one of the latter differs.
    """
    subject = oracle.subject
    assert subject.sae_file is not None and subject.case.sae is not None
    for key, value in _described(subject).items():
        if (found := getattr(reference, key)) != value:
            raise TraceError(f"reference: {key} is {one_line(repr(found))}, expected {one_line(repr(value))}")
    truth = oracle.truth()
    given = _in_memory(reference, truth)
    results = compare(truth, given, load_npz(subject.sae_file).W_dec, set(given.entries))
    if is_last_layer(subject, subject.case.sae.layer):
        normed = truth.tensors["hook_final_norm"].value[0, -1, :FIRST]
        if np.allclose(normed, reference.resid_last_first10, rtol=1e-4):
            hint = "equals hook_final_norm: hidden_states[-1] is after the final norm, not resid_post"
            hook = subject.case.sae.hook
            results = [replace(result, detail=hint) if result.name == hook else result for result in results]
    return results


def environment() -> dict[str, str]:
    """The versions that the script prints first."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    lines = {
        "Python": sys.version.replace("\n", " "),
        "Platform": platform.platform(),
        "PyTorch": torch.__version__,
        "CUDA avail": str(cuda),
    }
    if cuda:
        lines |= {"CUDA version": str(torch.version.cuda), "GPU": torch.cuda.get_device_name(0)}
    return lines | {"transformers": transformers.__version__, "numpy": np.__version__}


def _in_memory(reference: Reference, truth: Truth) -> InMemory:
    """The file's numbers as parts of tensors."""

    def part(name: str, values: list[float]) -> tuple[np.ndarray, Selection]:
        columns = list(range(len(values)))
        shape = list(truth.tensors[name].value.shape)
        selection = Selection(shape=shape, rows=[reference.n_tokens - 1], columns=columns)
        return np.array(values, np.float32).reshape(1, 1, -1), selection

    vectors = {
        truth.meta["sae_hook"]: reference.resid_last_first10,
        "sae.features": reference.encoded_last_first10,
        "sae.recon": reference.decoded_last_first10,
    }
    arrays = {name: part(name, values) for name, values in vectors.items()}
    keys = ("reconstruction_mse", "n_active_last_pos", "resid_last_norm", "encoded_last_norm", "decoded_last_norm")
    scalars = {f"sae.{key}": float(getattr(reference, key)) for key in keys}
    return InMemory(dict(arrays), "float32", scalars, reference.top_features_last_pos)
