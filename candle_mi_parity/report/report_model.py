"""The model of ``report.json``; ``docs/report.schema.json`` is made from it.

python -m candle_mi_parity.report.report_model > docs/report.schema.json
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import Diagnosis, SaeView, Status, TensorResult
from candle_mi_parity.spec.cases import Download


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CaseReport(Part):
    """One case; the meaning of each field is :class:`candle_mi_parity.compare.verdict.CaseResult`'s."""

    id: str
    family: str
    digest: str
    status: Status
    compared: int
    expected: int
    unmeasured: int
    in_part: bool
    first_divergence: str | None
    diagnosis: Diagnosis | None
    sae: list[SaeView]
    error: str
    known: str
    notes: list[str]
    reproduce: str
    seconds: float
    downloads: list[Download]
    tensors: list[TensorResult]
    forced: list[TensorResult]


class CallsReport(Part):
    """Direct calls; the meaning of each field is :class:`candle_mi_parity.compare.run_result.DirectCalls`'s."""

    results: list[CaseReport]
    skipped: str


class Report(Part):
    """A run; the meaning of each field is :class:`candle_mi_parity.compare.verdict.RunResult`'s."""

    format: Literal["candle-mi-parity/report/3"]
    verdict: Verdict
    line: str = Field(description="the verdict in one line, all counts in it")
    candidate: str
    candle_mi: dict[str, str]
    versions: dict[str, str]
    strict: bool
    started: str = Field(description="when the run began, ISO 8601")
    seconds: float = Field(description="how long it took")
    fault: str
    counts: dict[Status, int] = Field(description="cases by status")
    cases: list[CaseReport]
    calls: CallsReport | None
    skipped: dict[str, str]
    stale: list[str]


class _Strict(GenerateJsonSchema):
    """JSON has no infinity and no NaN: the report spells them. No key is optional, none unknown."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["inf", "-inf", "nan"]}]}

    def field_is_required(self, field: Any, total: bool) -> bool:
        return True

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        return super().dataclass_schema(schema) | {"additionalProperties": False}


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of ``report.json``."""
    schema = Report.model_json_schema(mode="serialization", schema_generator=_Strict)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
