"""``candle-mi-parity check``: does a candidate compute PyTorch's numbers on a user's own model?

Each prompt is judged as a case of the table is. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from candle_mi_parity.candidate.sources import refuse_device
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.compare.check_result import CheckResult
from candle_mi_parity.coverage.census_record import STORED, read_census
from candle_mi_parity.errors import HubError, ModelError, SaeError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.judge.known import facts_about
from candle_mi_parity.models.checkpoint import local_path, read_config, require_model
from candle_mi_parity.models.indexed import shards_beside
from candle_mi_parity.models.quantized_facts import weight_facts
from candle_mi_parity.models.resolve import as_model
from candle_mi_parity.models.sae import sae_path
from candle_mi_parity.run.check_files import require_usable
from candle_mi_parity.run.check_inputs import Prompt, sae_of
from candle_mi_parity.spec import paths
from candle_mi_parity.spec.cases import HubModel, Model, SaeFile
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.spec.explanations import Explanations, load_explanations
from candle_mi_parity.spec.families import FAMILIES
from candle_mi_parity.spec.forecast import forecast
from candle_mi_parity.spec.paths import cache_root

if TYPE_CHECKING:
    from candle_mi_parity.candidate.sources import Source


@dataclass(frozen=True)
class CheckOptions:
    """The options of a check.

    :ivar model: a directory, or a hub id ``ID[@REVISION]``.
    :ivar prompts: empty for those of :func:`candle_mi_parity.run.check_inputs.built_in`.
    :ivar sae: see :func:`candle_mi_parity.run.check_inputs.sae_of`; ``hook`` is its hook point.
    :ivar candidate: empty for the newest release that the suite knows.
    :ivar trace: a directory of tensors that a user's program dumped, which are judged in place of a candidate's.
    :ivar dtype: None for float32, or for the format of the trace.
    :ivar loader: as of a case; ``pretrained`` for candle-mi's ``MIModel::from_pretrained``, which takes float32 only.
    :ivar hooks: globs over hook names; empty for all hooks.
    :ivar layers: the layers in which hooks are looked at; empty for all, and for what lies in no layer.
    :ivar generate: number of tokens of the greedy continuation.
    :ivar search: seconds for the search for an unlisted explanation.
    """

    model: str
    prompts: tuple[Prompt, ...] = ()
    sae: str | None = None
    hook: str | None = None
    edits: tuple[Edit, ...] = ()
    candidate: str = ""
    trace: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    loader: Literal["hf", "pretrained"] = "hf"
    hooks: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    generate: int = 0
    search: float = 120.0
    out: Path = Path("build/check")
    cache: Path = field(default_factory=cache_root)

    @property
    def sae_file(self) -> SaeFile | None:
        """:raises ParityError: the SAE does not exist or has no hook point, or a hook point has no SAE."""
        if self.hook and not self.sae:
            raise SaeError(f"--hook {one_line(self.hook)} says where an SAE reads; give the SAE with --sae")
        return sae_of(self.sae, self.hook) if self.sae else None

    def command(self) -> str:
        """The command that repeats the check, without edits, which come from a file."""
        words = ["check", self.model]
        for prompt in self.prompts:
            if prompt.text is not None:
                words += ["--prompt", prompt.text]
            else:
                words += ["--tokens", ",".join(map(str, prompt.tokens or ()))]
        for name in ("sae", "hook", "candidate", "trace", "dtype", "generate"):
            if value := getattr(self, name):
                words += [f"--{name}", str(value)]
        words += ["--layers", ",".join(map(str, self.layers))] if self.layers else []
        words += [] if self.device == "cpu" else ["--device", self.device]
        words += [] if self.loader == "hf" else ["--loader", self.loader]
        return paths.command(*words, *(word for glob in self.hooks for word in ("--hooks", glob)))


def foretold(options: CheckOptions) -> CheckResult:
    """The result before anything is computed: the forecast from the config.

    :raises ParityError: the model, the SAE or the candidate does not exist or is misspelt.
    """
    table = load_explanations()
    candidate = options.candidate or table.releases[-1]
    named = parse_candidate(candidate)
    refuse_device(named, options.device)
    if named.kind == "stored":
        raise CandidateError(
            f"{candidate} holds traces of this suite's own cases; for tensors of your own program use --trace DIR"
        )
    config = _config(as_model(options.model))
    sae = sae_path(sae_file, 0, options.cache) if (sae_file := options.sae_file) else None
    edits = [edit.model_dump() for edit in options.edits]
    directory = Path(options.model).expanduser()
    stored = weight_facts(directory) if config.get("quantization_config") and directory.is_dir() else {}
    facts = facts_about(config, sae, 0, options.dtype or "float32", edits, stored)
    loader = "pretrained" if config.get("quantization_config") else options.loader
    twice = bool(shards_beside(directory, "pretrained"))
    facts = replace(facts, loader=loader, shards_beside=twice and loader == "pretrained")
    known = forecast(table, known_release(candidate, table), facts) if named.is_candle_mi else []
    who = f"the trace in {options.trace}" if options.trace else named.label
    census = _census(str(config.get("model_type")), known_release(candidate, table))
    result = CheckResult(options.model, who, candidate, keys=len(config), forecast=known, census=census)
    conditions = {row.id: row.conditions for row in table.explanation}
    for found in known:
        subjects = [subject for c in conditions[found.id] for subject in (c.subject, c.other)]
        result.sae_keys[found.id] = [s.removeprefix("sae.") for s in subjects if s.startswith("sae.")]
    result.in_part = bool(options.hooks or options.layers)
    if twice and loader == "hf" and named.is_candle_mi:
        result.notes.append(
            "there are model.safetensors and an index with its shards; read was model.safetensors, as transformers "
            "does, and candle-mi's from_pretrained reads the shards (CMI231): ask with --loader pretrained"
        )
    return result


def check(
    options: CheckOptions,
    progress: Progress | None = None,
    result: CheckResult | None = None,
    opened: Callable[[], Source] | None = None,
) -> CheckResult:
    """Judge a candidate on a model.

    :param result: of :func:`foretold`; it is filled as prompts are judged, so that a stopped check keeps them.
    :param opened: opens the source of the traces; None for the candidate's own.
    :raises ParityError: the model, the SAE, a prompt or the candidate cannot be used.
    """
    from candle_mi_parity.run.check_judge import Checking

    result = result or foretold(options)
    Checking(options, result, progress or Progress(), opened).run()
    return result


def known_release(candidate: str, table: Explanations) -> str:
    """The release whose known divergences apply; the newest for a build from source of unknown version."""
    named = parse_candidate(candidate)
    version = named.target if named.kind in ("version", "stored") else table.releases[-1]
    return table.baseline(version) or table.releases[-1]


def _census(model_type: str, release: str) -> str:
    """The census of a release on a model type without a hook map, or empty."""
    if model_type in FAMILIES or not (path := STORED / f"{release}.json").is_file():
        return ""
    entries = {entry.model_type: entry for entry in read_census(path).classes}
    return entries[model_type].line(f"candle-mi {release}") if model_type in entries else ""


def _config(model: Model) -> dict[str, Any]:
    """``config.json``, the only file of a hub model that is downloaded here.

    :raises ParityError: no such model, or no config.
    """
    if isinstance(model, HubModel):
        from candle_mi_parity.models.hub import fetch_config

        try:
            return read_config(fetch_config(model))
        except HubError as error:
            raise HubError(f"{error}; there is no directory of that name either") from error
    directory = local_path(getattr(model, "path", ""), ModelError)
    if directory.is_file():
        raise ModelError(f"{directory} is a file; give the directory that holds config.json and safetensors weights")
    require_usable(require_model(directory))
    return read_config(directory)
