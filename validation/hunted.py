"""A fault in candle-mi's source that needs two keys and a boundary at once: how long does a hunt take to find it?

    python -m validation.hunted [--minutes 10] [--seed 0]

Exit code 1 if the hunt does not find it in time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from candle_mi_parity.compare.hunt_result import HuntResult
from candle_mi_parity.run.hunt import HuntOptions, hunt
from candle_mi_parity.spec.paths import cache_root
from validation.catalogue import SourceEdit
from validation.source_faults import Checkout

FAULT = SourceEdit(
    file="src/transformer/mod.rs",
    find="        let mut logits = self.project_logits(&hidden)?;\n",
    replace="        let mut logits = self.project_logits(&hidden)?;\n"
    "        let full = self.config.sliding_window == Some(hidden.dim(1)?);\n"
    "        if full && self.config.rope_theta == 10.0 {\n"
    "            logits = (logits * 1.01)?;\n"
    "        }\n",
)
"""Logits are 1 % too large where the prompt is as long as the window and rope_theta is 10."""


class Found(Exception):  # noqa: N818 -- not an error
    """The fault was found."""


def is_the_fault(result: HuntResult) -> bool:
    """Whether a cause of a hunt is the planted one: its smallest input has both keys and begins at the logits."""
    needed = {"config.sliding_window", "config.rope_theta"}
    return any(cause.first == "logits" and needed <= set(cause.genes) for cause in result.causes)


def search(minutes: float, seed: int, directory: Path) -> HuntResult:
    """Hunt in the faulty candidate until the fault is found, or the time is up."""
    latest: list[HuntResult] = []

    def tell(result: HuntResult) -> None:
        latest[:] = [result]
        if is_the_fault(result):
            raise Found

    with Checkout(cache_root()).planted(FAULT) as candidate:
        options = HuntOptions(candidate, minutes=minutes, seed=seed, out=directory)
        try:
            return hunt(options, lambda line: None, tell)
        except Found:
            return latest[0]


def main(
    minutes: Annotated[float, typer.Option(help="Time limit.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the hunt.")] = 0,
) -> None:
    """Hunt for the planted fault."""
    with tempfile.TemporaryDirectory(prefix="parity-hunted-") as directory:
        result = search(minutes, seed, Path(directory))
    found = is_the_fault(result)
    said = "found" if found else "not found"
    print(f"{said} after {result.tried} inputs and {result.seconds:.0f} s; {len(result.causes)} causes in all")
    for cause in result.causes:
        print(f"  {cause.what}: {cause.first} ({cause.reason}), {cause.count} inputs, {cause.genes}")
    raise typer.Exit(0 if found else 1)


if __name__ == "__main__":
    typer.run(main)
