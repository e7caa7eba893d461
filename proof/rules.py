"""Rules that people use to say that two runs agree, each asked of the same dump.

A rule is given torch's float32 run as the reference (as its users have it), the float64 truth where it takes one, and
the dump; it says which tensor it first complains of. Its tolerance can be scaled, so that rules are compared at the
tolerance that honest runs need, too. Where a rule takes tensors one by one, it is handed them in execution order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from pytest_regressions.ndarrays_regression import NDArraysRegressionFixture
from torch._dynamo.utils import same

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.verdict import Status, TensorResult
from tests.support import planting
from tests.support.planting import Arrays, Real

UNNAMED = "(no tensor named)"

Check = Callable[[Real, Arrays, float], str | None]
"""(what is there, the dump, factor on the tolerance) → the first tensor complained of, or None."""


@dataclass(frozen=True)
class Rule:
    """:ivar sees: what the rule looks at.
    :ivar default: its tolerance where the factor is 1."""

    name: str
    sees: str
    default: str
    check: Check


def reference_of(there: Real) -> Arrays:
    """torch's float32 run, in execution order; not to be written to."""
    return planting.arrays_of(there.emitted)


def in_order(differs: Callable[[str, np.ndarray, np.ndarray], bool], there: Real, got: Arrays) -> str | None:
    """The first tensor of the reference that differs; one that the rule cannot compare stops its test, so it differs.

    :raises KeyError: a tensor is missing and the rule has no word for that.
    """
    for name, reference in reference_of(there).items():
        try:
            if differs(name, got[name], reference):
                return name
        except (AssertionError, RuntimeError, ValueError):
            return name
    return None


def other_keys(there: Real, got: Arrays) -> str | None:
    """The first name that only one side has, missing before unexpected; what a rule over dictionaries stops at."""
    reference = reference_of(there)
    return next((name for name in [*reference, *got] if (name in got) != (name in reference)), None)


class Ours:
    """The gate, with 8 and 32 scaled; whatever is no matter of size stays as it is."""

    def __init__(self) -> None:
        self._judged: tuple[Arrays, list[TensorResult]] | None = None

    def __call__(self, there: Real, got: Arrays, scale: float) -> str | None:
        def fails(result: TensorResult) -> bool:
            inside = result.position_ratio < POSITION_GATE and result.element_ratio < ELEMENT_GATE
            if result.status is Status.FAIL and inside:
                return True
            return not (result.position_ratio < scale * POSITION_GATE and result.element_ratio < scale * ELEMENT_GATE)

        return next((result.name for result in self._results(there, got) if fails(result)), None)

    def _results(self, there: Real, got: Arrays) -> list[TensorResult]:
        """Written and read again, as a run does it; kept while the same dump is asked at other tolerances."""
        if self._judged is None or self._judged[0] is not got:
            with TemporaryDirectory() as directory:
                path = planting.write(Path(directory), there, got)
                self._judged = got, planting.judge(there, path)
        return self._judged[1]


def dynamo_same(there: Real, got: Arrays, scale: float) -> str | None:
    def differs(name: str, array: np.ndarray, reference: np.ndarray) -> bool:
        truth = torch.from_numpy(there.truth.tensors[name].value)
        return not same(_torch(reference), _torch(array), truth, tol=1e-4 * scale, log_error=lambda *_: None)

    return other_keys(there, got) or in_order(differs, there, got)


def assert_close(there: Real, got: Arrays, scale: float) -> str | None:
    def differs(_: str, array: np.ndarray, reference: np.ndarray) -> bool:
        torch.testing.assert_close(_torch(array), _torch(reference), rtol=1.3e-6 * scale, atol=1e-5 * scale)
        return False

    return other_keys(there, got) or in_order(differs, there, got)


def numpy_allclose(there: Real, got: Arrays, scale: float) -> str | None:
    def differs(_: str, array: np.ndarray, reference: np.ndarray) -> bool:
        return not np.allclose(array, reference, rtol=1e-5 * scale, atol=1e-8 * scale)

    try:
        return in_order(differs, there, got)
    except KeyError as missing:
        return str(missing.args[0])


class _InMemory(NDArraysRegressionFixture):
    """pytest-regressions' own check of two dictionaries, which it would read from two files."""

    def __init__(self, held: dict[str, Arrays], scale: float) -> None:
        self._held, self._tolerances_dict = held, {}
        self._default_tolerance = {"rtol": 1e-5 * scale, "atol": 1e-8 * scale}

    def _load_fn(self, filename: Path) -> Arrays:
        return self._held[str(filename)]


def pytest_regressions(there: Real, got: Arrays, scale: float) -> str | None:
    reference = reference_of(there)
    ordered = {name: got[name] for name in [*reference, *got] if name in got}
    fixture = _InMemory({"got": ordered, "reference": reference}, scale)
    try:
        fixture._check_fn(Path("got"), Path("reference"))
    except AssertionError as error:
        lines = str(error).splitlines()
        named = (line.removesuffix(":") for line in lines if line.endswith(":") and line[:-1] in ordered)
        keys = (line.split()[-1] for line in lines if line.startswith(("  key:", "  Key:")))
        return next(named, None) or next(keys, None) or other_keys(there, got) or UNNAMED
    return None


TOP = 10


def candle_mi_logits(there: Real, got: Arrays, scale: float) -> str | None:
    """tests/validate_*_forward.rs: of the ten largest logits at the last position the order, and 1e-3 each."""
    if "logits" not in got or got["logits"].shape != reference_of(there)["logits"].shape:
        return "logits"
    mine, theirs = got["logits"][0, -1], reference_of(there)["logits"][0, -1]
    order = np.argsort(-theirs, kind="stable")[:TOP]
    if not np.array_equal(np.argsort(-mine, kind="stable")[:TOP], order):
        return "logits"
    return None if (np.abs(mine[order] - theirs[order]) < 1e-3 * scale).all() else "logits"


def candle_mi_sae(there: Real, got: Arrays, scale: float) -> str | None:
    """tests/validate_sae.rs: ten more or fewer active features, half of the top ten, MSE within a factor of 10,
    the residual's norm within 1."""
    hook, reference = there.truth.meta.get("sae_hook"), reference_of(there)
    if hook is None:
        return None
    names = [hook, "sae.features", "sae.recon"]
    if odd := next((name for name in names if name not in got or got[name].shape != reference[name].shape), None):
        return odd
    mine, theirs = (arrays["sae.features"][0, -1] for arrays in (got, reference))
    tops = [
        np.argsort(-features, kind="stable")[: min(TOP, int((features > 0).sum()))] for features in (mine, theirs)
    ]
    shared = min(len(top) for top in tops)
    matches = int((tops[0][:shared] == tops[1][:shared]).sum())
    errors = [float(np.square(a[hook] - a["sae.recon"], dtype=np.float64).mean()) for a in (got, reference)]
    norms = [float(np.linalg.norm(a[hook][0, -1].astype(np.float64))) for a in (got, reference)]
    room = min(scale, 300.0)  # decades; more is no float
    good = (
        abs(len(np.flatnonzero(mine > 0)) - len(np.flatnonzero(theirs > 0))) <= 10 * scale
        and matches >= shared // 2
        and 10**-room <= errors[0] / errors[1] < 10**room
        and abs(norms[0] - norms[1]) < scale
    )
    return None if good else UNNAMED


def llama_cpp(there: Real, got: Arrays, scale: float) -> str | None:
    """check-nmse.py: mean square error of the last position's logits over their variance, below 1e-2."""
    if "logits" not in got or got["logits"].shape != reference_of(there)["logits"].shape:
        return "logits"
    mine, theirs = got["logits"][0, -1], reference_of(there)["logits"][0, -1]
    return None if np.square(mine - theirs).mean() / np.var(theirs) < 1e-2 * scale else "logits"


def transformer_lens_hooks(there: Real, got: Arrays, scale: float) -> str | None:
    """test_forward_hook_parity.py: each hook that both have, scores and other shapes aside, within 5e-4."""
    for name, reference in reference_of(there).items():
        if name.endswith("hook_scores") or name not in got or got[name].shape != reference.shape:
            continue
        close = torch.allclose(_torch(got[name]).float(), _torch(reference), rtol=0, atol=5e-4 * scale)
        if not close:
            return name
    return None


def transformer_lens_logits(there: Real, got: Arrays, scale: float) -> str | None:
    """test_hooked_transformer.py, check_similarity_with_hf_model: probabilities within 1e-5."""
    if "logits" not in got or got["logits"].shape != reference_of(there)["logits"].shape:
        return "logits"
    mine, theirs = (torch.softmax(_torch(a["logits"]).float(), dim=-1) for a in (got, reference_of(there)))
    return None if torch.allclose(mine, theirs, rtol=1e-5 * scale, atol=1e-5 * scale) else "logits"


def built_in() -> Iterator[Rule]:
    """The rules that need no package beyond the suite's own."""
    every = "every tensor"
    yield Rule("this suite", every, "position 8, element 32", Ours())
    yield Rule("torch._dynamo.utils.same, fp64 reference", every, "tol 1e-4", dynamo_same)
    yield Rule("torch.testing.assert_close", every, "rtol 1.3e-6, atol 1e-5", assert_close)
    yield Rule("numpy.allclose", every, "rtol 1e-5, atol 1e-8", numpy_allclose)
    yield Rule("pytest-regressions", every, "rtol 1e-5, atol 1e-8", pytest_regressions)
    yield Rule("candle-mi, validate_*_forward.rs", "10 logits", "1e-3 absolute, order", candle_mi_logits)
    yield Rule("candle-mi, validate_sae.rs", "SAE at one position", "10 features, 10 × MSE, norm 1", candle_mi_sae)
    yield Rule("llama.cpp, check-nmse.py", "last logits", "NMSE 1e-2", llama_cpp)
    yield Rule("TransformerLens, hook parity", "hooks, no scores", "5e-4 absolute", transformer_lens_hooks)
    yield Rule("TransformerLens, logits", "probabilities", "rtol 1e-5, atol 1e-5", transformer_lens_logits)


def _torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
