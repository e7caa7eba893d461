"""Direct calls of candle-mi's public functions: ``fixtures/calls.toml``, its inputs, and the emitter's answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from safetensors.numpy import save, save_file

from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.sources import LiveSource, NotStoredError, Source, StoredSource
from candle_mi_parity.coverage.calls_models import DiffusionRow, ModelRow
from candle_mi_parity.coverage.calls_networks import NetworkRow
from candle_mi_parity.coverage.calls_vocabularies import VocabularyRow
from candle_mi_parity.errors import CaseTableError, TraceError
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.untrusted import read_json, validated
from candle_mi_parity.models.transcoder import Weights, transcoder_weights, write_transcoder
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.table import TableRow, read_toml
from candle_mi_parity.spec.transcoder import GeneratedTranscoder
from candle_mi_parity.trace.trace import CandleMi, CaseRef, Digest, Part

TIMEOUT_SECONDS = 120.0
Argument = str | bool | int | float | list[int] | list[list[int]] | list[str] | list[list[int | float | str]]
Arguments = dict[str, Argument | dict[str, Argument]]
LAYOUT = 2
"""Version of the input files; raise it when other files are written for the same table."""


class InputTensor(TableRow):
    """A float32 or float16 tensor: its values, or a shape and the seed of normal numbers.

    :ivar attention: absolute values, with rows that sum to 1.
    :ivar half: float16; the truth is computed from the rounded numbers.
    """

    values: Any = None
    shape: list[int] = Field(default_factory=list)
    seed: int = 0
    attention: bool = False
    half: bool = Field(default=False, exclude_if=lambda half: not half)

    def array(self) -> np.ndarray:
        """float32 or float16, of ``shape`` or the shape of ``values``."""
        dtype = np.float16 if self.half else np.float32
        if self.values is not None:
            return np.asarray(self.values, dtype=dtype)
        numbers = np.random.Generator(np.random.PCG64(self.seed)).standard_normal(self.shape)
        if self.attention:
            numbers = np.abs(numbers) / np.abs(numbers).sum(-1, keepdims=True)
        return numbers.astype(dtype)


class SaeRow(TableRow):
    """An SAE in SAELens' layout, with identity weights, or with normal numbers if there is a ``seed``.

    :ivar tensors: values of weights that are neither.
    """

    architecture: Literal["standard", "jumprelu", "topk"]
    width: int
    features: int
    k: int = 0
    threshold: list[float] = Field(default_factory=list)
    seed: int | None = None
    tensors: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda tensors: not tensors)

    def weights(self) -> dict[str, np.ndarray]:
        """float32: ``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_in], ``b_enc``, ``b_dec``, ``threshold``."""
        shape = (self.width, self.features)
        if self.seed is None:
            arrays = {"W_enc": np.eye(*shape), "W_dec": 2 * np.eye(*shape[::-1])}
            arrays |= {"b_enc": np.zeros(self.features), "b_dec": np.zeros(self.width)}
        else:
            draw = np.random.Generator(np.random.PCG64(self.seed)).standard_normal
            arrays = {"W_enc": draw(shape), "W_dec": draw(shape[::-1])}
            arrays |= {"b_enc": draw(self.features), "b_dec": draw(self.width)}
        if self.threshold:
            arrays["threshold"] = np.asarray(self.threshold)
        arrays |= {name: np.asarray(values) for name, values in self.tensors.items()}
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def write(self, directory: Path) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors``."""
        directory.mkdir(exist_ok=True)
        config: dict[str, object] = {"d_in": self.width, "d_sae": self.features, "architecture": self.architecture}
        config |= {"dtype": "float32", "apply_b_dec_to_input": False, "hook_name": "blocks.0.hook_resid_post"}
        if self.k:
            config["activation_fn_kwargs"] = {"k": self.k}
        (directory / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(self.weights(), directory / "sae_weights.safetensors")


class WeightsRow(TableRow):
    """The files of a checkpoint, for what lists its tensors.

    :ivar tensors: names of the file's tensors, in this order.
    :ivar index: the content of ``model.safetensors.index.json``; None for no index.
    :ivar cut: how many bytes at the end of ``model.safetensors`` are missing.
    """

    tensors: list[str] = Field(default_factory=list)
    metadata: dict[str, str] | None = None
    index: dict[str, Any] | None = None
    cut: int = 0

    def write(self, directory: Path) -> None:
        """Write ``model.safetensors``, and the index if there is one."""
        directory.mkdir(exist_ok=True)
        # Of 1, 2, … numbers, so that no order of the tensors by size is that of their names.
        arrays = {name: np.zeros(place + 1, np.float32) for place, name in enumerate(self.tensors)}
        data = save(arrays, self.metadata)
        (directory / "model.safetensors").write_bytes(data[: len(data) - self.cut])
        if self.index is not None:
            (directory / "model.safetensors.index.json").write_text(json.dumps(self.index), encoding="utf-8")


class TranscoderRow(GeneratedTranscoder):
    """A transcoder for a number of layers of a width.

    :ivar comments: whether the list of Gemma Scope's files has a comment and an empty line between two of them.
    """

    layers: int
    width: int
    comments: bool = Field(default=False, exclude_if=lambda comments: not comments)

    def weights(self) -> list[Weights]:
        """Those of each layer."""
        return transcoder_weights(self, self.layers, self.width)

    def write(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        write_transcoder(self, self.layers, self.width, directory)
        if self.comments:
            config = directory / "config.yaml"
            text = config.read_text(encoding="utf-8")
            config.write_text(text.replace('npz"\n', 'npz"\n  # another\n\n', 1), encoding="utf-8")


class CallRow(TableRow):
    """One call.

    :ivar args: the function's arguments; the name of a tensor of the table stands for that tensor.
    :ivar model: whose functions, or whose tokenizer, are called.
    :ivar weights: whose tensors are listed.
    :ivar transcoder: whose functions are called.
    :ivar network: whose functions are called.
    :ivar vocabulary: of a tokenizer, whose functions are called.
    :ivar diffusion: whose functions are called.
    :ivar exact: the result must be bitwise equal to the truth in float32.
    :ivar ties: any of equal features may be kept, but as many as in the truth and with the same values.
    :ivar raises: PyTorch raises, so that any result is wrong, and a refusal is right.
    """

    id: str
    fn: str
    args: Arguments = Field(default_factory=dict)
    sae: str | None = None
    model: str | None = Field(default=None, exclude_if=lambda model: model is None)
    weights: str | None = Field(default=None, exclude_if=lambda weights: weights is None)
    transcoder: str | None = Field(default=None, exclude_if=lambda transcoder: transcoder is None)
    network: str | None = Field(default=None, exclude_if=lambda network: network is None)
    vocabulary: str | None = Field(default=None, exclude_if=lambda vocabulary: vocabulary is None)
    diffusion: str | None = Field(default=None, exclude_if=lambda diffusion: diffusion is None)
    exact: bool = False
    ties: bool = False
    raises: bool = Field(default=False, exclude_if=lambda raises: not raises)


class CallTable(TableRow):
    tensors: dict[str, InputTensor]
    saes: dict[str, SaeRow] = Field(default_factory=dict)
    models: dict[str, ModelRow] = Field(default_factory=dict, exclude_if=lambda models: not models)
    weights: dict[str, WeightsRow] = Field(default_factory=dict, exclude_if=lambda weights: not weights)
    transcoders: dict[str, TranscoderRow] = Field(default_factory=dict, exclude_if=lambda found: not found)
    networks: dict[str, NetworkRow] = Field(default_factory=dict, exclude_if=lambda networks: not networks)
    vocabularies: dict[str, VocabularyRow] = Field(default_factory=dict, exclude_if=lambda found: not found)
    diffusions: dict[str, DiffusionRow] = Field(default_factory=dict, exclude_if=lambda found: not found)
    call: list[CallRow]

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.array() for name, tensor in self.tensors.items()}

    def digest(self) -> str:
        """SHA-256 of the whole table."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def inputs_digest(self) -> str:
        """SHA-256 of the inputs file, as the emitter computes it."""
        return hashlib.sha256(save(self.arrays())).hexdigest()

    def lay_out(self, cache: Path) -> Path:
        """Where :meth:`write` wrote; once."""
        return publish(cache / "calls" / content_key(LAYOUT, self.digest()), lambda out: self.write(out, cache))

    def write(self, out: Path, cache: Path) -> None:
        """Write ``inputs.safetensors`` and a directory for all else that is named.

        :param cache: for the models that are generated.
        """
        save_file(self.arrays(), out / "inputs.safetensors")
        for name, row in self.saes.items():
            row.write(out / name)
        for name, model in self.models.items():
            model.write(out / name, cache)
        for name, weights in self.weights.items():
            weights.write(out / name)
        for name, transcoder in self.transcoders.items():
            transcoder.write(out / name)
        for name, network in self.networks.items():
            network.write(out / name)
        for name, vocabulary in self.vocabularies.items():
            vocabulary.write(out / name)
        for name, diffusion in self.diffusions.items():
            diffusion.write(out / name)

    def request(self, directory: Path, out: Path) -> dict[str, object]:
        """The emitter's request for all calls.

        :param directory: where the inputs were written.
        """
        return {
            "format": "candle-mi-parity/call/1",
            "case": {"id": "calls", "digest": self.digest()},
            "inputs": str(directory / "inputs.safetensors"),
            "calls": [{"id": row.id, "run": self._run(row, directory)} for row in self.call],
            "out": str(out.resolve()),
        }

    def _run(self, row: CallRow, directory: Path) -> dict[str, object]:
        sae = {} if row.sae is None else {"sae": {"path": str(directory / row.sae), "layer": 0}}
        model = {} if row.model is None else {"model": str(directory / row.model)}
        weights = {} if row.weights is None else {"path": str(directory / row.weights)}
        transcoder = {} if row.transcoder is None else {"transcoder": str(directory / row.transcoder)}
        network, vocabulary = {}, {}
        if row.network is not None:
            network["network"] = self.networks[row.network].request(directory / row.network)
        if row.vocabulary is not None:
            vocabulary["vocabulary"] = str(self.vocabularies[row.vocabulary].at(directory / row.vocabulary))
        diffusion = {} if row.diffusion is None else {"diffusion": str(directory / row.diffusion)}
        return {
            "fn": row.fn, **row.args, **sae, **model, **weights, **transcoder, **network, **vocabulary, **diffusion,
        }  # fmt: skip


class Answer(Part):
    name: str
    shape: list[int]
    values: list[float | Literal["nan", "inf", "-inf"]]

    def array(self) -> np.ndarray:
        """float64.

        :raises TraceError: the shape does not fit the values.
        """
        flat = np.asarray([float(value) for value in self.values])
        if flat.size != int(np.prod(self.shape)):
            raise TraceError(f"{self.name} has {flat.size} values and the shape {self.shape}")
        return flat.reshape(self.shape)


class Answered(Part):
    id: str
    outcome: Literal["results", "error", "absent"]
    results: list[Answer]
    error: str | None

    @model_validator(mode="after")
    def _unique(self) -> Answered:
        if len({result.name for result in self.results}) != len(self.results):
            raise ValueError(f"{self.id} has a result twice")
        return self


class Calls(Part):
    """What the emitter wrote."""

    format: Literal["candle-mi-parity/calls/1"]
    emitter: str
    candle_mi: CandleMi
    case: CaseRef
    inputs_digest: Digest
    calls: list[Answered]


def load_calls(path: Path = FIXTURES / "calls.toml") -> CallTable:
    """:raises CaseTableError: malformed, a call twice, or of an SAE, model or the like that is unknown."""
    table = read_toml(path, CallTable, CaseTableError)
    ids = [row.id for row in table.call]
    if not ids or len(set(ids)) != len(ids):
        raise CaseTableError(f"{path}: no calls, or a call twice")
    known: dict[str, Collection[str]] = {
        "SAE": table.saes, "model": table.models, "weights": table.weights, "transcoder": table.transcoders,
        "network": table.networks, "vocabulary": table.vocabularies,
        "diffusion": table.diffusions,
    }  # fmt: skip
    for kind, names in known.items():
        asked = {row.id: getattr(row, kind.lower()) for row in table.call}
        if unknown := [id for id, name in asked.items() if name is not None and name not in names]:
            raise CaseTableError(f"{path}: unknown {kind} in {', '.join(unknown)}")
    return table


def answers(source: Source, table: CallTable, cache: Path, out: Path) -> Calls:
    """The answers of a candidate, stored or live.

    :param out: the JSON file that a live candidate writes.
    :raises NotStoredError: no answers are stored, or the candidate is not candle-mi.
    :raises EmitterError: the emitter refused the request, crashed or hung.
    :raises TraceError: the file is malformed.
    """
    if isinstance(source, LiveSource):
        directory = table.lay_out(cache)
        try:
            return read_calls(source.emitter.emit(table.request(directory, out), TIMEOUT_SECONDS))
        except EmitterError as error:
            if error.kind != "crash":
                raise
            last = _last_before_the_end(source.emitter, table, directory, out)
            raise EmitterError(
                "crash", f"{last} ends the process, and no call is answered: {error.message}"
            ) from error
    if not isinstance(source, StoredSource):
        raise NotStoredError("this candidate is not candle-mi, whose functions are called")
    stored = source.stored
    if stored.release.calls is None:
        raise NotStoredError(f"no answers are stored in {stored.index}; `candle-mi-parity maint store` keeps them")
    document = stored.document("calls", stored.release.calls, "emitter", "candle_mi")
    return validated(Calls, document, stored.index, TraceError)


def _last_before_the_end(emitter: EmitterProcess, table: CallTable, directory: Path, out: Path) -> str:
    """The id of the call at which the process ends, by bisection over the first calls of the table."""
    answered, ended = 0, len(table.call)
    while ended - answered > 1:
        middle = (answered + ended) // 2
        try:
            first = table.model_copy(update={"call": table.call[:middle]})
            emitter.emit(first.request(directory, out), TIMEOUT_SECONDS)
            answered = middle
        except EmitterError:
            ended = middle
    return table.call[ended - 1].id


def read_calls(path: Path) -> Calls:
    """:raises TraceError: the file is malformed."""
    return validated(Calls, read_json(path, TraceError), path, TraceError)
