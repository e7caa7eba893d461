"""From a divergence to the smallest input that shows it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import Source
from candle_mi_parity.compare.verdict import Explained, Status, TensorResult
from candle_mi_parity.errors import ParityError
from candle_mi_parity.judge.case import Progress, failure_of, judge_mode
from candle_mi_parity.judge.known import Evidence, facts_of, known_divergence, known_refusal
from candle_mi_parity.judge.reproducible import not_reproducible
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.generate import generated_model
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.repro.reductions import STEPS, loaded_plainly
from candle_mi_parity.repro.shrink import RWKV, SHAPE, Config, Divergence, Input, Pair, Shrinker
from candle_mi_parity.spec.cases import (
    Case,
    Layout,
    LocalModel,
    PackageModel,
    SaelensDirectory,
    TinyModel,
)
from candle_mi_parity.spec.edits import Inject
from candle_mi_parity.spec.explanations import Explanation, load_explanations
from candle_mi_parity.spec.hook_points import STATE, WEIGHTS
from candle_mi_parity.spec.recurrent import feedback_key
from candle_mi_parity.trace.truth import Truth


class ReproError(ParityError):
    """A divergence that cannot be reproduced with a generated model."""


class AgreesError(ReproError):
    """There is no divergence to reproduce."""


class RefusedError(ReproError):
    """candle-mi refuses the case, so that there are no numbers to compare."""


@dataclass(frozen=True)
class Reproduction:
    """The smallest input that was found.

    :ivar first: its first diverging tensor.
    :ivar original: the case that it was shrunk from.
    :ivar fed: the vector of each feedback.
    :ivar weight: of a quantised checkpoint, which is not made smaller, what is wrong with the first weight that
        differs; empty if none does.
    """

    original: Case
    pair: Pair
    subject: PreparedCase
    truth: Truth
    first: TensorResult
    fed: tuple[list[float], ...] = ()
    weight: str = ""

    @property
    def heads(self) -> int:
        """Number of heads; what a recurrent model's config holds is their width."""
        state = self.truth.tensors.get(f"blocks.0.{STATE}")
        return int(self.pair.case.config["num_attention_heads"]) if state is None else state.value.shape[1]


def model_of(tried: Input, scratch: Path) -> Path:
    """The directory of an input's model.

    :raises ModelError: a statistic or a layout concerns no tensor of the model.
    """
    config, unusual = dict(tried.config), (tried.weights, tried.layout)
    return generated_model(config, "hub", scratch, tried.shards, tried.seed, *unusual)


def _prepared(tried: Input, scratch: Path) -> PreparedCase:
    """An input that no case table has."""
    layout = tuple(each for each in tried.layout if each is not Layout.PICKLE)
    case = Case(
        id="repro/tried",
        model=LocalModel(source="local", path=str(model_of(replace(tried, layout=layout), scratch))),
        tokens=list(tried.tokens),
        dtype=tried.dtype,
        sae=tried.sae,
        edits=list(tried.edits),
        recurrent=tried.recurrent,
        unmeasured=["*"],
        loader=tried.loader,
        features=list(tried.features),
    )
    given = model_of(tried, scratch) if Layout.PICKLE in tried.layout else None
    return replace(prepare(case, scratch), given_dir=given)


def judge_input(tried: Input, source: Source, scratch: Path) -> tuple[Evidence, TensorResult | None]:
    """Judge an input; also its first divergence.

    :param scratch: where models and truths go.
    :raises Exception: whatever transformers, the oracle or the emitter raises for such an input.
    """
    judged = judge_mode(Oracle(_prepared(tried, scratch), scratch, source.device), source, "free", Progress())
    return judged.evidence, _first(judged.tensors)


def known_of(subject: PreparedCase, source: Source) -> list[Explanation]:
    """The explanations that apply to a case in the candidate's release."""
    table = load_explanations()
    if source.identity is None:
        return []
    return table.applicable(facts_of(subject), table.baseline(source.identity.version))


def reproduce(
    case: Case, source: Source, cache: Path, tell: Callable[[str], None], new: bool = False
) -> Reproduction:
    """Judge a case and shrink its divergence.

    :param new: whether the divergence is in no explanation, so that a known one must not take its place.
    :raises AgreesError: nothing diverges.
    :raises RefusedError: candle-mi refuses the case.
    :raises ReproError: a generated model with its config does not diverge in the same way, or there is no Rust code
        for what the smallest input needs.
    :raises ParityError: the case cannot be judged.
    """
    if why := not_reproducible(case):
        raise ReproError(f"{case.id}: {why}")
    subject = prepare(case, cache)
    oracle = Oracle(subject, cache, source.device)
    try:
        results = judge_mode(oracle, source, "free", Progress()).tensors
    except EmitterError as error:
        if not failure_of(error).refused:
            raise
        raise RefusedError(_refusal(error, oracle, source)) from None
    first = _first(results)
    if first is None:
        raise AgreesError(f"{case.id}: nothing diverges; there is nothing to reproduce")
    if why := not_reproducible(case, first.name):
        raise ReproError(f"{case.id}: {why}")
    if subject.quantized_dir is not None:
        return _quantized(oracle, results)
    wanted = Divergence.at(first.name, first.reason)
    known = {row.id for row in known_of(subject, source)}
    with tempfile.TemporaryDirectory(prefix="parity-repro-") as scratch:

        def first_divergence(tried: Input) -> Divergence | None:
            smaller, first = judge_input(tried, source, Path(scratch))
            if first is None:
                return None
            others = {row.id for row in known_of(smaller.subject, source)} - known
            return Divergence.at(first.name, ", ".join(sorted(others)) or first.reason)

        shrinker = Shrinker(first_divergence, wanted, STEPS, lambda line: tell(f"{case.id}: {line}"))
        # An SAE that the divergence does not touch stays out of the reproduction.
        injected = any(isinstance(edit, Inject) for edit in case.edits)
        sae = case.sae if first.name.startswith("sae.") or injected else None
        assert sae is None or isinstance(sae, SaelensDirectory)
        rest = (tuple(case.edits), case.recurrent)
        start = Input(read_config(subject.model_dir), tuple(subject.tokens[0]), case.dtype, sae, *rest)
        start = replace(start, loader=case.loader, features=tuple(case.features))
        if isinstance(model := case.model, TinyModel):
            unusual = tuple(model.weights), tuple(model.layout)
            start = replace(start, weights=unusual[0], layout=unusual[1], shards=model.shards, seed=model.seed)
        if isinstance(case.model, PackageModel):
            start = _small(start)
        rows = [replace(start, tokens=tuple(row)) for row in subject.tokens]
        pair = next((pair for row in rows for pair in _pairs(case, row, cache) if shrinker.holds(pair)), None)
        if pair is None and len(rows) > 1:
            raise ReproError(
                f"{case.id}: it diverges at {first.name} as a batch of {len(rows)}, and no row of it does alone; a "
                "Rust test is written for one row"
            )
        if pair is None:
            raise ReproError(f"{case.id}: a generated model with its config does not diverge at {first.name}")
        pair = shrinker.shrink(pair)
        evidence, first = judge_input(pair.case, source, Path(scratch))
        assert first is not None
        if needed := ", ".join(feature for feature in pair.case.features if feature != RWKV):
            raise ReproError(
                f"{case.id}: it needs candle-mi's feature {needed}, and the Rust test is built without it"
            )
        if pair.case.shards > 1 and pair.case.loader == "hf":
            raise ReproError(f"{case.id}: it needs several files of weights, and the Rust test loads one")
        if new and (ids := _known_ids(evidence, source)):
            raise ReproError(f"{case.id}: made smaller, it is the known divergence {', '.join(ids)}")
        oracle = evidence.oracle
        return Reproduction(case, pair, evidence.subject, oracle.truth(), first, _fed(pair.case, oracle))


def _refusal(error: EmitterError, oracle: Oracle, source: Source) -> str:
    """What candle-mi refuses, and what transformers does instead."""
    subject = oracle.subject
    text = (
        f"{subject.case.id}: candle-mi refuses it, and transformers computes it, with {len(oracle.truth().tensors)} "
        f"tensors to compare; there is no number of candle-mi's to reproduce. Its message is: {error}."
    )
    if source.identity is not None:
        table = load_explanations()
        known, _ = known_refusal(error, subject, table, table.baseline(source.identity.version))
        text += f" This is known: {known.ids[0]}, {known.says}" if known else " This refusal is not known"
    return text.rstrip(".")


def _quantized(oracle: Oracle, results: list[TensorResult]) -> Reproduction:
    """The divergence of a quantised checkpoint as it is, at the first tensor of the forward pass.

    candle-mi does not hand out a model's weights, so that the Rust test cannot look at them.

    :raises ReproError: only weights differ, or the case is a batch.
    """
    subject = oracle.subject
    case = subject.case
    if len(subject.tokens) > 1:
        raise ReproError(f"{case.id}: a batch of a quantised checkpoint, and a Rust test is written for one row")
    wrong = [result for result in results if result.status is Status.FAIL]
    first = next((result for result in wrong if not result.name.startswith(WEIGHTS)), None)
    if first is None:
        raise ReproError(f"{case.id}: only the weight {wrong[0].name} differs, and candle-mi hands out no weights")
    sae = case.sae if isinstance(case.sae, SaelensDirectory) else None
    whole = Input(read_config(subject.given), tuple(subject.tokens[0]), case.dtype, sae, tuple(case.edits))
    whole = replace(whole, loader=case.loader, features=tuple(case.features))
    weight = f"{wrong[0].name.removeprefix(WEIGHTS)}: {wrong[0].detail}" if wrong[0] is not first else ""
    return Reproduction(case, Pair(whole, None), subject, oracle.truth(), first, weight=weight)


def _fed(case: Input, oracle: Oracle) -> tuple[list[float], ...]:
    """The vector of each feedback."""
    if case.recurrent is None:
        return ()
    given = load_file(oracle.inputs("free"))
    return tuple(given[feedback_key(index)].tolist() for index in range(len(case.recurrent.feedback)))


def _known_ids(evidence: Evidence, source: Source) -> list[str]:
    """The explanations of a divergence; none if it is new."""
    if source.identity is None:
        return []
    table = load_explanations()
    evidence = replace(evidence, release=table.baseline(source.identity.version))
    found = known_divergence(evidence, table, source.identity)
    return found.ids if isinstance(found, Explained) else []


def _first(results: list[TensorResult]) -> TensorResult | None:
    return next((result for result in results if result.status is Status.FAIL), None)


def _pairs(case: Case, start: Input, cache: Path) -> list[Pair]:
    """The case with each possible control, the likeliest first; without a control as a last resort."""
    controls = []
    usual = replace(start, weights=(), layout=(), shards=1)
    if (plain := _plain_config(case, cache)) is not None:
        shape = {key: start.config[key] for key in SHAPE if key in start.config}
        config = {key: value for key, value in plain.items() if key not in SHAPE} | shape
        controls += [replace(usual, config=config), replace(start, config=config)]
    if start.loader == "pretrained":
        controls.append(loaded_plainly(start))
    controls.append(usual)
    if start.dtype != "float32":
        controls.append(replace(start, dtype="float32"))
    if start.edits:
        controls.append(replace(start, edits=()))
    if start.recurrent is not None:
        controls.append(replace(start, recurrent=None))
    if start.sae is not None and not start.edits:
        controls.append(replace(start, sae=_plain_sae(start.sae)))
    different = [control for place, control in enumerate(controls) if control not in [start, *controls[:place]]]
    return [*(Pair(start, control) for control in different), Pair(start, None)]


_OFF = {
    "apply_b_dec_to_input": (True, False),
    "dtype": ("float32", "float32"),
    "normalize_activations": ("none", "none"),
    "rescale_acts_by_decoder_norm": (False, False),
}
"""Optional setting of an SAE → its default, and its value when switched off."""


def _plain_sae(sae: SaelensDirectory) -> SaelensDirectory:
    """The same architecture with all optional settings switched off."""
    off: dict[str, Any] = {key: plain for key, (default, plain) in _OFF.items() if sae.cfg.get(key, default) != plain}
    if not off and isinstance(arguments := sae.cfg.get("activation_fn_kwargs"), dict) and "k" in arguments:
        # Fewer than the positive features.
        off["activation_fn_kwargs"] = {**arguments, "k": 1}
    threshold = None if sae.threshold is None else abs(sae.threshold)
    return sae.model_copy(update={"cfg": sae.cfg | off, "threshold": threshold})


def _plain_config(case: Case, cache: Path) -> Config | None:
    """The config of the hub without what the case changes; None if there is no such config."""
    model = case.model
    if isinstance(model, TinyModel):
        plain = TinyModel(source="tiny", config=model.config, dialect="hub")
        return read_config(model_directory(plain, cache))
    if isinstance(model, PackageModel):
        return read_config(model_directory(model.model_copy(update={"dialect": "hub"}), cache))
    return None


def _small(start: Input) -> Input:
    """The config of a published model in the size of a tiny one, whose weights are quickly generated."""
    sizes = {"vocab_size": 211, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = start.config | sizes | heads
    if "head_dim" in config:
        config["head_dim"] = 16
    tokens = tuple(token if token < 3 else 3 + token % 208 for token in start.tokens)
    return replace(start, config=config, tokens=tokens)
