"""``candle-mi-parity check``: does a candidate compute PyTorch's numbers on a user's own model?

Each prompt becomes a case, which is judged as any case of the table is. Importing this module loads no torch: what
the config alone says comes first, see :func:`foretold`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from candle_mi_parity.candidate.sources import refuse_device
from candle_mi_parity.candidate.spelling import CandidateError, parse_candidate
from candle_mi_parity.compare.check_result import CheckResult
from candle_mi_parity.coverage.census_record import STORED, read_census
from candle_mi_parity.errors import HubError, ModelError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.judge.known import facts_about
from candle_mi_parity.models.checkpoint import local_path, read_config, require_model
from candle_mi_parity.models.resolve import as_model
from candle_mi_parity.models.sae import sae_path
from candle_mi_parity.run.check_inputs import Prompt, sae_of
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
    """What is checked.

    :ivar model: a directory, or a hub id ``ID[@REVISION]``.
    :ivar prompts: without any, :func:`candle_mi_parity.run.check_inputs.built_in` makes some.
    :ivar sae: see :func:`candle_mi_parity.run.check_inputs.sae_of`; ``hook`` is where it reads.
    :ivar candidate: as the user spells it; empty for the newest release that the suite knows.
    :ivar trace: a directory of tensors that the user's own program dumped; they are judged in place of a candidate's.
    :ivar dtype: the format in which the model runs; None for float32, or for the format of the trace.
    :ivar hooks: globs over hook names; empty for all hooks.
    :ivar generate: number of tokens of the greedy continuation.
    :ivar search: seconds that the search for an unlisted explanation may take.
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
    hooks: tuple[str, ...] = ()
    generate: int = 0
    search: float = 120.0
    out: Path = Path("build/check")
    cache: Path = field(default_factory=cache_root)

    @property
    def sae_file(self) -> SaeFile | None:
        """:raises ParityError: there is no such SAE, or it has no place."""
        return sae_of(self.sae, self.hook) if self.sae else None

    def command(self) -> str:
        """The command that repeats the check. Edits are left out: they came from a file."""
        words = ["candle-mi-parity", "check", self.model]
        for prompt in self.prompts:
            if prompt.text is not None:
                words += ["--prompt", prompt.text]
            else:
                words += ["--tokens", ",".join(map(str, prompt.tokens or ()))]
        for name in ("sae", "hook", "candidate", "trace", "dtype", "generate"):
            if value := getattr(self, name):
                words += [f"--{name}", str(value)]
        words += [] if self.device == "cpu" else ["--device", self.device]
        return shlex.join([*words, *(word for glob in self.hooks for word in ("--hooks", glob))])


def foretold(options: CheckOptions) -> CheckResult:
    """The result before anything is computed: what the config alone says of a candidate on a model.

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
    sae = options.sae_file
    facts = facts_about(
        config,
        sae_path(sae, 0, options.cache) if sae else None,
        0,
        options.dtype or "float32",
        [edit.model_dump() for edit in options.edits],
    )
    known = [] if named.kind == "torch" else forecast(table, known_release(candidate, table), facts)
    who = f"the trace in {options.trace}" if options.trace else named.label
    census = _census(str(config.get("model_type")), known_release(candidate, table))
    return CheckResult(options.model, who, candidate, keys=len(config), forecast=known, census=census)


def check(
    options: CheckOptions,
    progress: Progress | None = None,
    result: CheckResult | None = None,
    opened: Callable[[], Source] | None = None,
) -> CheckResult:
    """Judge a candidate on a model.

    :param result: of :func:`foretold`. It is filled as prompts are judged, so that they are not lost when the check
        breaks off.
    :param opened: opens the source of the traces; None for the candidate's own.
    :raises ParityError: the model, the SAE, a prompt or the candidate cannot be used; nothing was judged.
    """
    from candle_mi_parity.run.check_judge import Checking

    result = result or foretold(options)
    Checking(options, result, progress or Progress(), opened).run()
    return result


def known_release(candidate: str, table: Explanations) -> str:
    """The release whose known divergences apply; for a build from source the newest, until it says its version."""
    named = parse_candidate(candidate)
    version = named.target if named.kind in ("version", "stored") else table.releases[-1]
    return table.baseline(version) or table.releases[-1]


def _census(model_type: str, release: str) -> str:
    """What the census of a release found of a model type whose family is not among the table's."""
    if model_type in FAMILIES or not (path := STORED / f"{release}.json").is_file():
        return ""
    entries = {entry.model_type: entry for entry in read_census(path).classes}
    return entries[model_type].line(f"candle-mi {release}") if model_type in entries else ""


def _config(model: Model) -> dict[str, Any]:
    """``config.json``, which of a hub model is all that is downloaded here.

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
    return read_config(require_model(directory))
