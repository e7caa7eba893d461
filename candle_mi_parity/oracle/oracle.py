"""The oracle: truth and its rounding noise from transformers in float64. The only source of expectations.

A truth does not depend on the candidate. It is cached by content: the case, the libraries, the modules of this
package that affect a number, and the counterfactual. Cached truths are read without torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

from candle_mi_parity.compare.gate import UNITS
from candle_mi_parity.errors import OracleError
from candle_mi_parity.files.cache import publish
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle.arithmetic import ACCUMULATION, Arithmetic
from candle_mi_parity.oracle.provenance import made_with
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual
from candle_mi_parity.spec.hook_points import FORCED, Mode, is_lens
from candle_mi_parity.trace.formats import round_to_dtype
from candle_mi_parity.trace.truth import Truth

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from candle_mi_parity.oracle.compute import Computation


class Oracle:
    """One case's truths; the model is loaded when the first of them is not in the cache.

    :param device: of the candidate, which decides the noise; the truth is always computed on the CPU.
    :param change: a counterfactual.
    :param filed: whether truths are kept in the cache, and not in memory alone.
    :ivar load: see :class:`Computation`.
    """

    def __init__(
        self,
        subject: PreparedCase,
        cache: Path,
        device: str = "cpu",
        change: Counterfactual = PLAIN,
        filed: bool = True,
    ) -> None:
        self.subject, self.change = subject, change
        self.arithmetic = Arithmetic(UNITS[subject.case.dtype], ACCUMULATION[device.partition(":")[0]])
        self.key = truth_key(subject, self.arithmetic, change)
        self._cache, self._device, self._filed = cache, device, filed
        self.load: Callable[[Path], nn.Module] | None = None
        self._directory = cache / "truth" / self.key
        self._truths: dict[Mode, Truth] = {}

    @cached_property
    def plain(self) -> Oracle:
        """The oracle of the same case with nothing changed."""
        return self if self.change == PLAIN else Oracle(self.subject, self._cache, self._device, filed=self._filed)

    def under(self, change: Counterfactual) -> Oracle:
        """The oracle of a counterfactual of the same case."""
        oracle = Oracle(self.subject, self._cache, self._device, change, self._filed)
        oracle.__dict__["plain"], oracle.load = self.plain, self.load
        return oracle

    def without_sae(self) -> Oracle:
        """The oracle of the same case without its SAE, for an SAE without a truth; it has another digest."""
        digest = hashlib.sha256(f"{self.subject.digest} without its SAE".encode()).hexdigest()
        return Oracle(replace(self.subject, sae_file=None, digest=digest), self._cache, self._device)

    @cached_property
    def computation(self) -> Computation:
        from candle_mi_parity.oracle.compute import Computation

        return Computation(self.subject, self.arithmetic, self.change, self.load)

    def truth(self, mode: Mode = "free") -> Truth:
        """The truth of a mode, from the cache or computed.

        :raises OracleError: an operation without a noise rule, a non-finite truth, an unreadable cache file, or a
            case with edits or a recurrence teacher-forced.
        :raises ModelError: transformers cannot load or run the model.
        :raises NoTruthError: the case's SAE is of an unsupported kind.
        """
        if mode == "forced" and self.subject.case.changed:
            raise OracleError(
                f"{self.subject.case.id}: a case with edits or a recurrence has no teacher-forced truth"
            )

        def computed() -> Truth:
            return self._signed(self.computation.truth(mode, self._given(mode)))

        def compute(out: Path) -> None:
            computed().save(out / "truth.safetensors")

        if mode not in self._truths and not self._filed:
            self._truths[mode] = computed()
        if mode not in self._truths:
            path = publish(self._directory / mode, compute) / "truth.safetensors"
            self._truths[mode] = Truth.load(path)
        return self._truths[mode]

    def values(self) -> Truth:
        """The truth's values with a noise of 0, not cached."""
        return self.computation.truth("free", self._given("free"), samples=0)

    def without_noise(self) -> Truth:
        """The truth's values with a noise of 0, in place of the truth of this oracle, which is not kept."""
        self._truths["free"] = self._signed(self.values())
        return self._truths["free"]

    def inputs(self, mode: Mode) -> Path:
        """A safetensors file of float32 inputs from the plain truth, which both sides are given.

        ``free``: every layer's output at the last position, [B, 1, d], for the logit lens; ``sae``, the residual for
        the SAE alone; and the tensors of edits and feedback. ``forced``: each layer's :data:`FORCED` hooks.
        """
        if self.plain is not self:
            return self.plain.inputs(mode)
        case = self.subject.case

        def write(out: Path) -> None:
            free = {name: tensor.value for name, tensor in self.truth().tensors.items()}
            if mode == "forced":
                arrays = {name: value for name, value in free.items() if name.endswith(FORCED)}
            else:
                arrays = {name: value[:, -1:] for name, value in free.items() if is_lens(name)}
                arrays |= {"sae": free[case.sae.hook]} if case.sae else {}
            given = {name: round_to_dtype(value, case.dtype) for name, value in arrays.items()}
            given |= self._drawn() if mode == "free" else {}
            save_file(given, out / "inputs.safetensors")

        return publish(self._directory / f"inputs.{mode}", write) / "inputs.safetensors"

    def _given(self, mode: Mode) -> dict[str, np.ndarray]:
        """The inputs of a computation; the plain truth fixes those of the lens and the SAE itself."""
        if mode == "forced" or self.plain is not self:
            return load_file(self.inputs(mode))
        return self._drawn()

    def _drawn(self) -> dict[str, np.ndarray]:
        """The tensors of the case's edits and feedback, float32, from the cache or drawn."""
        if not self.subject.case.changed:
            return {}

        def write(out: Path) -> None:
            save_file(self.computation.drawn(), out / "edits.safetensors")

        return load_file(publish(self._directory / "edits", write) / "edits.safetensors")

    def _signed(self, truth: Truth) -> Truth:
        """Add the provenance."""
        truth.meta.update(made_with(self.subject.model_type))
        if self.change != PLAIN:
            truth.meta["counterfactual"] = self.change.key()
        return truth


def truth_key(subject: PreparedCase, arithmetic: Arithmetic, change: Counterfactual = PLAIN) -> str:
    """Content key of a case's truths, see :mod:`provenance`."""
    content = [subject.digest, made_with(subject.model_type), asdict(arithmetic), change.key()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
