"""``report.json`` and its model, from which ``docs/report.schema.json`` is generated:

python -m candle_mi_parity.report.report_model > docs/report.schema.json
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import fields
from types import GenericAlias
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, ConfigDict, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from candle_mi_parity.compare.run_result import RunResult, Section, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Explained, Outcome, Status
from candle_mi_parity.report.causes import CauseSeen, known_causes, new_causes

FORMAT = "candle-mi-parity/report/6"


def _model_of(source: type, without: Collection[str] = (), **computed: Any) -> Any:
    """A model of the fields of a dataclass, and of its computed properties."""
    hints = get_type_hints(source)
    kept = {field.name: hints[field.name] for field in fields(source) if field.name not in without}
    wanted: dict[str, Any] = {name: (kind, ...) for name, kind in (kept | computed).items()}
    return create_model(
        source.__name__, __config__=ConfigDict(extra="forbid", from_attributes=True), __doc__=source.__doc__, **wanted
    )


def _several(model: Any) -> Any:
    return GenericAlias(list, (model,))


Name = Annotated[str, BeforeValidator(lambda value: getattr(value, "name", value))]
"""A tensor result by its name."""
Id = Annotated[str, BeforeValidator(lambda value: getattr(value, "id", value))]
"""A case by its id."""
EXPLAINED = _model_of(Explained, tensors=int, worst=float)
CASE = _model_of(
    CaseResult,
    explained=EXPLAINED | None,
    outcome=Outcome,
    compared=int,
    unmeasured=int,
    first_divergence=Name | None,
)
SECTION = _model_of(Section, results=_several(CASE))
CAUSE = _model_of(CauseSeen, cases=list[Id], status=Status, outcome=Outcome, worst=float | None)
REPORT = _model_of(
    RunResult,
    ("identity", "tick", "known", "build"),
    format=Literal["candle-mi-parity/report/6"],
    verdict=Verdict,
    right=str,
    new=str,
    line=str,
    candle_mi=dict[str, str],
    counts=dict[Status, int],
    tally=dict[str, int],
    causes=_several(CAUSE),
    cases=_several(CASE),
    sections=GenericAlias(dict, (str, SECTION)),
)


def document(result: RunResult) -> dict[str, Any]:
    """The report as data, for :func:`json_out.write_json`."""
    computed = {
        "format": FORMAT,
        "right": result.is_right(),
        "new": result.is_new(),
        "line": result.line(),
        "candle_mi": result.identity,
        "counts": {status: result.count(status) for status in Status},
        "tally": result.tally(),
        "causes": [*new_causes(result), *known_causes(result)],
    }
    found = {name: computed[name] if name in computed else getattr(result, name) for name in REPORT.model_fields}
    return dict(REPORT.model_validate(found).model_dump())


class _Strict(GenerateJsonSchema):
    """Infinity and NaN are strings, because JSON cannot represent them. All keys are required, no others allowed."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["inf", "-inf", "nan"]}]}

    def field_is_required(self, field: Any, total: bool) -> bool:
        return True

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        return super().dataclass_schema(schema) | {"additionalProperties": False}


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of ``report.json``."""
    schema = REPORT.model_json_schema(mode="serialization", schema_generator=_Strict)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
