"""Goldens: a slice of the float64 truth in the repository, with its provenance.

The arrays are pytest-regressions' ``.npz``, and a ``.json`` beside each holds the provenance. It is checked first: a
golden of another model, other tokens or another transformers is stale, not wrong.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.files.npz import read_npz
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.files.versions import is_at_least
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.trace.truth import Truth


class GoldenError(ParityError):
    """A golden is absent, stale, or not made by the oracle."""


TOLERANCE = 1e-9
"""Fraction of a tensor's rms: room for float64 sums on another machine, far below float32's rounding (6e-8)."""
REMAKE = "make it with: pytest tests/test_golden.py --force-regen --reason '...'"


class Meta(BaseModel):
    """Provenance of a golden.

    :ivar sigma: array → rms of its predicted float32 noise, absolute.
    :ivar reason: why it was last made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["candle-mi-parity/golden/1"] = "candle-mi-parity/golden/1"
    producer: Literal["oracle: transformers in float64"] = "oracle: transformers in float64"
    case: str
    digest: str
    model: str
    sae: str | None
    tokenizer: str | None
    modeling: str
    tokens: list[list[int]]
    versions: dict[str, str]
    sigma: dict[str, float]
    reason: Annotated[str, Field(min_length=10)]


def has_golden(case: Case) -> bool:
    """Whether a case has a golden: each family's plain case, and the case of its window."""
    return case.lane == "default" and case.id.endswith(("/hub", "/window"))


@dataclass(frozen=True)
class Golden:
    """The golden of one case."""

    subject: PreparedCase
    truth: Truth
    directory: Path

    @property
    def path(self) -> Path:
        """The ``.npz``; the ``.json`` has the same stem."""
        return self.directory / f"{self.subject.case.id.replace('/', '-')}.npz"

    def arrays(self) -> dict[str, np.ndarray]:
        """Name → float64 array of the last position, batch row 0; scalars as arrays of one."""
        last = {name: self.truth.tensors[name].value[0, ..., -1, :].copy() for name in self._names()}
        return last | {name: np.array([value]) for name, (value, _) in self.truth.scalars.items()}

    def _names(self) -> list[str]:
        wanted = ("hook_embed", "hook_resid_post", "attn.hook_pattern", "logits", "sae.features", "sae.recon")
        return [name for name in self.truth.tensors if name.endswith(wanted) and not name.startswith("lens")]

    def tolerances(self) -> dict[str, dict[str, float]]:
        """Absolute only, :data:`TOLERANCE` of each array's rms."""
        rms = {name: float(np.sqrt(np.square(array).mean())) for name, array in self.arrays().items()}
        return {name: {"rtol": 0.0, "atol": TOLERANCE * size} for name, size in rms.items()}

    def meta(self, reason: str) -> Meta:
        """The provenance that the installed oracle would write."""
        tokenizer = self.subject.model_dir / "tokenizer.json"
        noise = {name: self.truth.tensors[name].noise[0, ..., -1, :] for name in self._names()}
        return Meta(
            case=self.subject.case.id,
            digest=self.subject.digest,
            model=self.subject.model_digest,
            sae=self.subject.sae_digest,
            tokenizer=digest_files([tokenizer]) if tokenizer.is_file() else None,
            modeling=self.truth.meta["modeling"],
            tokens=self.subject.tokens,
            versions={name: self.truth.meta[name] for name in ("torch", "transformers")},
            sigma={name: float(f"{np.sqrt(np.square(n, dtype=float).mean()):.3e}") for name, n in noise.items()},
            reason=reason,
        )

    def check(self) -> None:
        """Check that the golden is up to date; pytest-regressions then compares names, shapes and numbers.

        :raises GoldenError: what differs, and the command that makes the golden anew.
        """
        try:
            kept = Meta.model_validate(read_json(self.path.with_suffix(".json"), GoldenError))
        except (ParityError, ValidationError) as error:
            raise GoldenError(f"golden {self.path.name}: {str(error).splitlines()[0]}; {REMAKE}") from error
        now = self.meta(kept.reason)
        made, installed = kept.versions["transformers"], now.versions["transformers"]
        fields = ["case", "tokens", "tokenizer", "sae", "model", "digest"]
        # An older transformers than the golden's has other code, and the same numbers.
        fields += ["modeling"] if is_at_least("transformers", *map(int, made.split("."))) else []
        if changed := [name for name in fields if getattr(kept, name) != getattr(now, name)]:
            raise GoldenError(
                f"stale golden {self.path.name}: {', '.join(changed)} changed since it was made with transformers "
                f"{made} (installed {installed}); {REMAKE}"
            )
        if odd := [name for name, array in self.arrays().items() if not np.isfinite(array).all()]:
            raise GoldenError(f"golden {self.path.name}: {', '.join(odd)} of the truth holds NaN or Inf")

    def record(self, reason: str) -> None:
        """Write the ``.json`` of a regeneration; pytest-regressions writes the arrays.

        :raises GoldenError: the regeneration would drop an array.
        """
        lost = set(read_npz(self.path, GoldenError)) - set(self.arrays()) if self.path.is_file() else None
        if lost:
            raise GoldenError(f"regenerating {self.path.name} would drop {', '.join(lost)}; delete the file first")
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.meta(reason).model_dump(), indent=1) + "\n"
        self.path.with_suffix(".json").write_text(text, encoding="utf-8")
