"""The terminal's view of reproductions: how small each became, and what its test did."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from candle_mi_parity.repro_command import Line
from candle_mi_parity.repro_prove import Outcome


def repro_table(lines: list[Line], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in (
        "case",
        "first tensor",
        "layers",
        "width",
        "heads",
        "tokens",
        "element / σ",
        "candidate",
        "mended",
    ):
        right = heading in ("layers", "width", "heads", "tokens", "element / σ")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for line in lines:
        config = line.reproduction.pair.case.config
        table.add_row(
            escape(line.reproduction.original.id),
            escape(line.reproduction.first.name),
            str(config["num_hidden_layers"]),
            str(config["hidden_size"]),
            str(config["num_attention_heads"]),
            str(len(line.reproduction.pair.case.tokens)),
            f"{line.reproduction.first.element_ratio:.3g}",
            _outcome(line.proof, Outcome.DIFFERS),
            _outcome(line.mended, Outcome.PASSES),
        )
    console.print(table)


def _outcome(found: Outcome | None, wanted: Outcome) -> Text:
    if found is None:
        return Text("not run")
    return Text(found.value, style="green" if found is wanted else "bold red")
