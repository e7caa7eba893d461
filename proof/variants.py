"""Honest variants as data: ``variants.toml`` read into settings, each of which runs on the cases that it names.

A setting changes how float32 computes, never what: another order of summation, kernel, batch or attention code. Some
change the case instead (one token repeated, a massive activation), for both sides alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.spec.cases import Case, RandomTokens, Row, load_cases, read_toml, select
from candle_mi_parity.spec.edits import Edit

VARIANTS = Path(__file__).parent / "variants.toml"


class Sums(Row):
    """The order in which a matmul adds its terms.

    :ivar order: ``permuted`` and ``reversed`` also reorder means and sums; ``one_by_one`` is a plain loop.
    :ivar size: terms in a block, or at the leaves of the pairwise tree.
    """

    order: Literal["permuted", "reversed", "blocks", "pairwise", "one_by_one", "float64", "openblas"]
    seed: int = 0
    size: Annotated[int, Field(ge=1)] = 8


class Repeat(Row):
    """One token, ``times`` times."""

    token: Annotated[int, Field(ge=0)]
    times: Annotated[int, Field(ge=1)]


class Setting(Row):
    """One way to compute honestly.

    :ivar cases: globs over the ids of the default lane; each must match.
    :ivar batch: rows of the batch; the case's prompt is row 0, and only that row is judged.
    :ivar attention: transformers' own code instead of the recording one; it leaves scores and patterns unseen.
    :ivar environment: variables of a process of its own; libraries read them when they are loaded.
    :ivar cpu_capability: what torch must then say of itself; where it says otherwise the variant is not run.
    :ivar samples: fresh samples of the noise model itself, in place of float32.
    """

    id: str
    cases: Annotated[list[str], Field(min_length=1)]
    threads: Annotated[int, Field(ge=1)] | None = None
    sums: Sums | None = None
    batch: Annotated[int, Field(ge=1)] = 1
    attention: Literal["eager", "sdpa"] | None = None
    onednn: bool = True
    environment: dict[str, str] = Field(default_factory=dict)
    cpu_capability: Literal["DEFAULT", "AVX2", "AVX512"] | None = None
    samples: Annotated[int, Field(ge=0)] = 0
    tokens: RandomTokens | Repeat | None = None
    edits: list[Edit] = Field(default_factory=list)

    @model_validator(mode="after")
    def _samples_are_no_float32(self) -> Setting:
        if self.samples and (idle := self.model_fields_set - {"id", "cases", "samples"}):
            raise ValueError(f"samples come from the float64 model, on which {', '.join(sorted(idle))} has no effect")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether it is torch as it is, if on cases of its own."""
        return self.model_fields_set <= {"id", "cases", "tokens", "edits"}

    @property
    def sees_all(self) -> bool:
        """Whether its dumps hold every tensor of the truth; else only those that they hold are judged."""
        return self.batch == 1 and self.attention is None and not self.samples


class Table(Row):
    format: Literal[1]
    setting: Annotated[list[Setting], Field(min_length=1)]


@dataclass(frozen=True)
class Variant:
    """A setting on one case."""

    setting: Setting
    case: Case

    @property
    def id(self) -> str:
        return f"{self.setting.id}: {self.case.id}"


def load_settings(path: Path = VARIANTS) -> list[Setting]:
    """All rows.

    :raises CaseTableError: unreadable file, unknown or missing key, wrong type, an id given twice.
    """
    settings = read_toml(path, Table, CaseTableError).setting
    ids = [setting.id for setting in settings]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise CaseTableError(f"{path}: settings given twice: {', '.join(doubled)}")
    return settings


def variants_of(setting: Setting) -> list[Variant]:
    """The setting on each of its cases.

    :raises CaseTableError: a glob that matches no case.
    """
    default = select(load_cases(), None)
    chosen = {case.id: case for glob in setting.cases for case in select(default, glob)}
    return [Variant(setting, _changed(case, setting)) for case in chosen.values()]


def _changed(case: Case, setting: Setting) -> Case:
    change: dict[str, object] = {}
    if isinstance(setting.tokens, Repeat):
        change = {"tokens": [setting.tokens.token] * setting.tokens.times, "text": None}
    elif setting.tokens is not None:
        change = {"tokens": setting.tokens, "text": None}
    if setting.edits:
        change["edits"] = [*case.edits, *setting.edits]
    return case.model_copy(update=change)
