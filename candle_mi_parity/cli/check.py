"""``check``: a user's own model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from candle_mi_parity.compare.check_result import CheckResult
    from candle_mi_parity.run.check import CheckOptions

Many = list[str] | None


def check_command(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id as ID or ID@REVISION.")],
    prompt: Annotated[Many, typer.Option(help="A prompt; may be given again.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line, or JSONL with id and text.")] = None,
    tokens: Annotated[Many, typer.Option(help="Token ids, as 1,450,7483; may be given again.")] = None,
    sae: Annotated[str | None, typer.Option(help="NPZ, SAELens directory, or of the hub REPO or REPO:FILE.")] = None,
    hook: Annotated[str | None, typer.Option(help="Where the SAE reads, as blocks.12.hook_resid_post.")] = None,
    edits: Annotated[Path | None, typer.Option(help="Interventions, as rows `edits` of a TOML file.")] = None,
    generate: Annotated[int, typer.Option(min=0, help="Compare a greedy continuation of so many tokens.")] = 0,
    candidate: Annotated[str, typer.Option(help="As for run; without it, the newest release.")] = "",
    trace: Annotated[Path | None, typer.Option(help="Judge the tensors of this directory; needs no Rust.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 | bfloat16 | float16")] = None,
    device: Annotated[str, typer.Option(help="cpu | cuda:N")] = "cpu",
    loader: Annotated[str, typer.Option(help="hf | pretrained: load by MIModel::from_pretrained.")] = "hf",
    layers: Annotated[str | None, typer.Option(help="Look at these layers alone, as 0-3,11.")] = None,
    hooks: Annotated[
        Many, typer.Option(help="Look at the hooks that match a glob, within --layers; may be given again.")
    ] = None,
    search: Annotated[float, typer.Option(min=0, help="Seconds that explaining a new divergence may take.")] = 120.0,
    out: Annotated[Path, typer.Option(help="Where check.html, check.json and traces go.")] = Path("build/check"),
    json_out: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Does candle-mi compute PyTorch's numbers on my model? Exit code 0 yes, 1 no, 2 no answer, 3 not measured."""
    from candle_mi_parity.errors import CaseTableError
    from candle_mi_parity.report.terminal import one_line_errors
    from candle_mi_parity.run.check import CheckOptions
    from candle_mi_parity.run.check_inputs import prompts_of, read_edits

    with one_line_errors():
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise CaseTableError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
        if loader not in ("hf", "pretrained") or (loader == "pretrained" and dtype not in (None, "float32")):
            raise CaseTableError(f"--loader {loader}: expected hf, or pretrained, which loads float32")
        options = CheckOptions(
            model=model,
            prompts=tuple(prompts_of(prompt or [], prompts, tokens or [])),
            sae=sae,
            hook=hook,
            edits=tuple(read_edits(edits)) if edits else (),
            candidate=candidate,
            trace=trace,
            dtype=dtype,  # type: ignore[arg-type]
            device=device,
            loader=loader,  # type: ignore[arg-type]
            hooks=tuple(hooks or ()),
            layers=tuple(layers_of(layers)),
            generate=generate,
            search=search,
            out=out,
        )
        result = check_and_write(options, json_out)
    raise typer.Exit(result.verdict.exit_code)


def layers_of(layers: str | None) -> Iterator[int]:
    """``0-2,5`` as numbers.

    :raises CaseTableError: not such a list.
    """
    from candle_mi_parity.errors import CaseTableError

    for part in layers.split(",") if layers else ():
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if found is None:
            raise CaseTableError(f"--layers {layers}: expected layers such as 0-3,11")
        yield from range(int(found[1]), int(found[2] or found[1]) + 1)


def check_and_write(options: CheckOptions, as_json: bool) -> CheckResult:
    """Check, write ``check.json`` and ``check.html``, and print the answer; an interrupted check is written too.

    :raises ParityError: nothing could be judged; nothing is written.
    """
    import json

    from candle_mi_parity.errors import Stopped
    from candle_mi_parity.files.escape import printable
    from candle_mi_parity.files.json_out import write_json, write_text
    from candle_mi_parity.report.check_page import foretold_lines, lines, page
    from candle_mi_parity.report.terminal import Terminal, progress_bar
    from candle_mi_parity.report.views import Interrupted, remove
    from candle_mi_parity.run.check import check, foretold

    remove(options.out, "check.json", "check.html")
    result = foretold(options)
    with progress_bar() as bar:
        terminal = Terminal(bar)
        for line in foretold_lines(result):
            terminal.keep(line)
        try:
            check(options, terminal, result)
        except (KeyboardInterrupt, Stopped):
            result.fault = f"interrupted after {len(result.prompts)} prompts"
        except Exception:
            if result.prompts:
                result.fault = "it broke off with an error"
                write_json(result.document(), options.out / "check.json")
            raise
    write_json(result.document(), options.out / "check.json")
    write_text(page(result), options.out / "check.html")
    if result.fault:
        raise Interrupted(f"{result.fault}; what was judged is in {options.out}/check.json, and truths are cached")
    answer = "\n".join([*lines(result), f"page: {options.out}/check.html"])
    print(json.dumps(result.document(), indent=1) if as_json else printable(answer))
    return result
