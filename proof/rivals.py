"""Rivals, side by side: rules that people use today on the same honest and faulty dumps, in one run.

``python -m proof.rivals`` asks each rule at its default; then at 1.5 × the tolerance that the honest dumps need, once
with a tolerance of its own for each model and once with one for all. Table and JSON go to ``build/proof``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from proof import OUT, capture, rival_views
from proof.catalogue import Fault, load_faults
from proof.packages import Absent, from_packages
from proof.plant import emitted
from proof.rival_scores import Dumps, Faulty, Score, score
from proof.rules import Rule, built_in, reference_of
from proof.variants import Variant, load_settings
from tests.support.planting import CASES, Arrays, Real, arrays_of, real, real_of

FIGURES = ("sae.n_active_last_pos", "sae.top_features_last_pos", "sae.reconstruction_mse")
"""Names under which the suite judges what is beside the tensors."""
HONEST = (
    "sums permuted, seed 1",
    "sums permuted, seed 2",
    "sums permuted, seed 3",
    "sums reversed",
    "sums in blocks of 16",
    "sums in blocks of 64",
    "sums one by one",
    "OpenBLAS",
)
"""Settings of ``variants.toml`` whose dumps stand for honest runs."""


def all_dumps() -> Iterator[Dumps]:
    """The catalogue's dumps, and honest ones of each case that it uses."""
    faults = [*shown_in_a_dump(load_faults())]
    faults += [
        fault.model_copy(update={"case": rival_views.REAL}) for fault in faults if moves_to_real_weights(fault)
    ]
    for case_id in dict.fromkeys(fault.case for fault in faults):
        there = real(case_id) if case_id != rival_views.REAL else without_sae(case_id)
        faulty = [
            Faulty(fault.id, fault.first, _sharing(arrays_of(emitted(fault, there)), there))
            for fault in faults
            if fault.case == case_id
        ]
        yield Dumps(there, honest_dumps(there), faulty)


def without_sae(case_id: str) -> Real:
    """A case without its SAE.

    Honest runs of SmolLM2 flip one of its features, where most rules would need a tolerance 200,000 times their own:
    on equal footing they could see nothing any more.
    """
    return real_of(CASES[case_id].model_copy(update={"sae": None}))


def shown_in_a_dump(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Those that a rule can be handed: faults of the file, of candle-mi's source, of figures beside the tensors, and
    those that change nothing are left to the catalogue's own run."""
    for fault in faults:
        if fault.scored and not (fault.io or fault.source) and fault.first not in FIGURES:
            yield fault


def moves_to_real_weights(fault: Fault) -> bool:
    """Whether a fault of the tiny Llama is as good a fault of SmolLM2, a Llama of 30 layers with massive activations.

    A change of one captured tensor is, but for the one that is told the number of positions.
    """
    return fault.tensor is not None and fault.case == "llama/hub" and fault.tensor.change != "heads_last"


def _sharing(arrays: Arrays, there: Real) -> Arrays:
    """With the honest run's own arrays where they are equal to the bit: dumps of SmolLM2 would not fit otherwise."""
    reference = reference_of(there)

    def shared(name: str, array: np.ndarray) -> np.ndarray:
        other = reference.get(name)
        same = other is not None and other.dtype == array.dtype and np.array_equal(other, array)
        return other if same and other is not None else array

    return {name: shared(name, array) for name, array in arrays.items()}


def honest_dumps(there: Real, wanted: Sequence[str] = HONEST) -> dict[str, Arrays]:
    """Dumps of a case under settings of ``variants.toml``, by setting.

    :raises ValueError: a dump that is the reference itself, which every rule would pass.
    """
    settings = {setting.id: setting for setting in load_settings()}
    case, reference, found = there.subject.case, reference_of(there), {}
    for name in wanted:
        dump = arrays_of(next(capture.dumps(Variant(settings[name], case), there.oracle)))
        if all(np.array_equal(array, reference[key]) for key, array in dump.items()):
            raise ValueError(f"{name} varies nothing in {case.id}")
        found[name] = dump
    return found


def main(out: Annotated[Path, typer.Option(help="Where table and JSON go.")] = OUT) -> None:
    """Ask every rule about every dump; rules whose package is absent are listed as not run."""
    console = Console(stderr=True)
    found = list(all_dumps())
    made = [*built_in(), *from_packages()]
    absent = [rule for rule in made if isinstance(rule, Absent)]
    scores: list[Score] = []
    for rule in made:
        if isinstance(rule, Rule):
            console.print(rule.name, highlight=False)
            scores.append(score(rule, found))
            rival_views.write(scores, absent, out)  # what is known so far, should the run break off
    print(rival_views.markdown(scores, absent))


if __name__ == "__main__":
    typer.run(main)
