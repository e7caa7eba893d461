"""Rules of packages that are no part of the set-up: the optional extra ``rivals`` names them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch

from proof.rules import UNNAMED, Rule, reference_of
from tests.support.planting import Arrays, Real, rerun

RUNS, SAFETY = 16, 6.0
"""firefly's own defaults of its calibration."""


@dataclass(frozen=True)
class Absent:
    """A rule that was not run."""

    name: str
    reason: str


def from_packages() -> list[Rule | Absent]:
    """Each package's rule, or why it is not run."""
    makers: list[tuple[str, Callable[[], Rule]]] = [
        ("polygraphy", _polygraphy),
        ("pytest-torch", _pytest_torch),
        ("firefly-ml", _firefly),
    ]
    return [_made(name, make) for name, make in makers]


def _made(name: str, make: Callable[[], Rule]) -> Rule | Absent:
    try:
        return make()
    except ImportError as error:
        return Absent(name, f"not installed ({error}); the extra `rivals` has it")


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy(order="C")) for name, array in arrays.items()}


def _polygraphy() -> Rule:
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    def check(there: Real, got: Arrays, scale: float) -> str | None:
        runs = RunResults()
        for name, arrays in (("got", got), ("reference", reference_of(there))):
            runs.add([{key: np.ascontiguousarray(array) for key, array in arrays.items()}], runner_name=name)
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            try:
                compare = SimpleCompareFunc(rtol=1e-5 * scale, atol=1e-5 * scale)
                compared = Comparator.compare_accuracy(runs, compare_func=compare)
            except PolygraphyException:  # it will not compare these at all
                return UNNAMED
        outputs = compared[0]["got", "reference"][0]
        return next((name for name, matched in outputs.items() if not matched), None if compared else UNNAMED)

    return Rule(f"Polygraphy {version('polygraphy')}", "every tensor", "rtol 1e-5, atol 1e-5", check)


def _pytest_torch() -> Rule:
    from pytest_torch.assertions import assert_outputs_close

    def check(there: Real, got: Arrays, scale: float) -> str | None:
        try:
            assert_outputs_close(_tensors(got), _tensors(reference_of(there)), rtol=1.3e-6 * scale, atol=1e-5 * scale)
        except AssertionError as error:
            named = re.search(r"\['([^']+)'\]", str(error))
            return named[1] if named else UNNAMED
        return None

    return Rule(f"pytest-torch {version('pytest-torch')}", "every tensor", "rtol 1.3e-6, atol 1e-5", check)


def _firefly() -> Rule:
    """Calibrated as the package does it: the reference, run again, and six times its largest deviation."""
    from firefly.attribution import attribute_first_divergence
    from firefly.calibrate import derive_tolerances
    from firefly.compare import TapTolerance, diff_captures

    calibrated: dict[str, dict[str, TapTolerance]] = {}

    def tolerances(there: Real) -> dict[str, TapTolerance]:
        if there.subject.digest not in calibrated:
            runs = [_tensors(rerun(there, there.subject.model_dir)) for _ in range(RUNS)]
            captures = {name: [run[name] for run in runs] for name in runs[0]}
            calibrated[there.subject.digest] = derive_tolerances(
                _tensors(reference_of(there)), captures, safety_factor=SAFETY, n_runs=RUNS
            )
        return calibrated[there.subject.digest]

    def check(there: Real, got: Arrays, scale: float) -> str | None:
        reference = reference_of(there)
        scaled = {name: TapTolerance(atol=tap.atol * scale) for name, tap in tolerances(there).items()}
        try:
            diffs = diff_captures(_tensors(reference), _tensors(got), list(reference), scaled)
        except ValueError as error:  # missing, or of another shape
            named = re.search(r"'([^']+)'", str(error))
            return named[1] if named else UNNAMED
        first: str | None = attribute_first_divergence(diffs).first_divergent_tap
        return first

    return Rule(f"firefly-ml {version('firefly-ml')}, calibrated", "every tensor", "6 × run to run, ≥ 1e-5", check)
