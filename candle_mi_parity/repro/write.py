"""The folder of a reproduction: model, expected tensor, Rust test, Python script, issue text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE, UNITS, measure
from candle_mi_parity.files.escape import one_line, templates
from candle_mi_parity.files.versions import version
from candle_mi_parity.models.sae import Sae, load_sae, sae_path
from candle_mi_parity.models.transformers_config import FULL_ATTENTION
from candle_mi_parity.oracle.compute import SAMPLES
from candle_mi_parity.oracle.provenance import PACKAGE
from candle_mi_parity.repro.crate import Dependencies, write_crate
from candle_mi_parity.repro.probe import place
from candle_mi_parity.repro.repro import Reproduction, model_of
from candle_mi_parity.repro.shrink import Input
from candle_mi_parity.spec.edits import StateKnockout, StateSteer
from candle_mi_parity.spec.families import BIDIRECTIONAL, RECURRENT, transformers_type
from candle_mi_parity.spec.recurrent import feedback_key

FORMAT = "candle-mi-parity/expected/1"
PLAIN = "plain"
"""Directory of a quantised checkpoint's own weights, dequantised, which transformers reads on any machine."""
MODELS, MODELS_NAME = PACKAGE / "models", "candle_mi_parity.models"
"""Where the formulas of RWKV lie, which are copied beside the script."""
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
IMPORTS = {
    "knockout": {"create_knockout_mask", "KnockoutSpec", "Intervention"},
    "steer": {"apply_steering", "SteeringSpec", "Intervention"},
    "scale": {"Intervention"},
    "state_knockout": {"StateKnockoutSpec"},
    "state_steer": {"StateSteeringSpec"},
}
"""Kind of edit → names of ``candle_mi`` that its lines of the Rust test need."""


@dataclass(frozen=True)
class Origin:
    """The candidate that diverges.

    :ivar named: which candle-mi it is, as a reader elsewhere can tell it: a release, or a version and its source.
    :ivar command: what shows the divergence and writes the folder again.
    :ivar known: what is known of the divergence; empty if nothing is.
    """

    named: str
    command: str
    known: str


def slug(case_id: str) -> str:
    """A case's id as a Rust module and a file name."""
    return "parity_" + re.sub(r"[^a-z0-9]+", "_", case_id.lower())


def write_folder(reproduction: Reproduction, origin: Origin, dependencies: Dependencies, folder: Path) -> Path:
    """Write the folder, replacing an older one.

    :returns: the folder.
    """
    name = slug(reproduction.original.id)
    shutil.rmtree(folder, ignore_errors=True)
    data = folder / "tests" / name
    data.mkdir(parents=True)
    quantized = reproduction.subject.quantized_dir
    with tempfile.TemporaryDirectory(prefix="parity-repro-") as scratch:
        shutil.copytree(quantized or model_of(reproduction.pair.case, Path(scratch)), data / "model")
        if quantized is not None:
            shutil.copytree(reproduction.subject.model_dir, data / PLAIN)
        if (sae := reproduction.pair.case.sae) is not None:
            made = sae_path(sae, reproduction.pair.case.config["hidden_size"], Path(scratch))
            shutil.copytree(made, data / "sae")
    (data / "expected.json").write_text(json.dumps(expected(reproduction)) + "\n", encoding="utf-8")
    facts = _facts(reproduction, origin, load_sae(data / "sae") if sae is not None else None)
    script = "check.py"
    if (model_type := reproduction.subject.model_type) in RECURRENT:
        script = "check_rwkv.py"
        for module in ("rwkv", model_type):
            text = (MODELS / f"{module}.py").read_text(encoding="utf-8")
            (folder / f"{module}.py").write_text(text.replace(f"{MODELS_NAME}.", ""), encoding="utf-8")
    for template, target in {"test.rs": f"tests/{name}.rs", script: "check.py", "ISSUE.md": "ISSUE.md"}.items():
        (folder / target).write_text(
            templates(html=False).get_template(f"{template}.j2").render(facts), encoding="utf-8"
        )
    if (rustfmt := shutil.which("rustfmt")) is not None:
        subprocess.run([rustfmt, "--edition", "2021", folder / "tests" / f"{name}.rs"], check=True)
    write_crate(folder, dependencies)
    return folder


def expected(reproduction: Reproduction) -> dict[str, Any]:
    """The truth of a tensor and the gate of each of its elements, row-major.

    ``sigma`` is σ of each element: null for a masked score, 0 if the value must be exact. ``position_noise`` is the
    noise with which the rms error of each position is compared.
    """
    truth = reproduction.truth.tensors[reproduction.first.name]
    kept = np.broadcast_to(True if truth.allowed is None else truth.allowed, truth.value.shape)
    unit = UNITS[reproduction.pair.case.dtype]
    # For an error of 1 everywhere the ratio is 1 / noise.
    measured = measure(np.ones_like(truth.value), truth.value, truth.noise, kept, unit=unit)
    exact = not truth.noise.any() and bool(kept.all())
    sigma = np.where(kept & (not exact), measured.sigma, 0.0).ravel().tolist()
    if reproduction.first.name.endswith("hook_scores"):
        sigma = [number if keep else None for number, keep in zip(sigma, kept.ravel(), strict=True)]
    return {
        "format": FORMAT,
        "tensor": reproduction.first.name,
        "shape": list(truth.value.shape),
        "dtype": reproduction.pair.case.dtype,
        "tokens": list(reproduction.pair.case.tokens),
        "values": truth.value.ravel().tolist(),
        "sigma": sigma,
        "element_gate": ELEMENT_GATE,
        "position_noise": [1 / ratio if ratio else None for ratio in measured.position.ravel().tolist()],
        "position_gate": POSITION_GATE,
        "model_digest": reproduction.subject.model_digest,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "case": reproduction.original.id,
        **{feedback_key(index): vector for index, vector in enumerate(reproduction.fed)},
    }


def _facts(reproduction: Reproduction, origin: Origin, sae: Sae | None) -> dict[str, Any]:
    """The values of the templates."""
    first, case = reproduction.first, reproduction.pair.case
    config, heads, model_type = case.config, reproduction.heads, reproduction.subject.model_type
    watched = case.sae.hook if case.sae is not None and first.name.startswith("sae.") else first.name
    module, side, value = place(watched, model_type, config)
    pretrained, rwkv = case.loader == "pretrained", model_type in RECURRENT
    loaded = {"GenericRwkv", "RwkvConfig"} if rwkv else {"GenericTransformer", "TransformerConfig"}
    names = {"HookPoint", "HookSpec"} | ({"MIModel"} if pretrained else loaded)
    if not pretrained:
        names.add("MIBackend" if case.recurrent is None else "RecurrentPassSpec")
    names = names.union(*(IMPORTS.get(edit.kind, ()) for edit in case.edits))

    def entries(edit: Any) -> list[list[int]]:
        """Heads, queries and keys that an edit of the attention selects."""
        return [each.tolist() for each in edit.spec.chosen(heads, len(case.tokens)).nonzero()]

    return {
        "slug": slug(reproduction.original.id),
        "case": one_line(reproduction.original.id),
        "command": one_line(origin.command),
        "named": one_line(origin.named),
        "title": one_line(origin.known) or f"`{first.name}` differs from PyTorch",
        "model_type": model_type,
        "rwkv": rwkv,
        "oracle": f"torch {version('torch')}" if rwkv else f"transformers {version('transformers')}",
        "writes": _writes(case),
        "stands_for": model_type in BIDIRECTIONAL and transformers_type(config["model_type"]),
        "full_attention": FULL_ATTENTION,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "first": first,
        "tensor": first.name,
        "shape": list(reproduction.truth.tensors[first.name].value.shape),
        "dtype": case.dtype,
        "candle_dtype": DTYPES[case.dtype],
        "tokens": list(case.tokens),
        "config": config,
        "unusual": ", ".join(case.unusual),
        "heads": heads,
        "differing": _differing(reproduction),
        "element_gate": ELEMENT_GATE,
        "position_gate": POSITION_GATE,
        "samples": SAMPLES,
        "sae": case.sae,
        "encoder": sae,
        "edits": case.edits,
        "recurrent": case.recurrent,
        "pretrained": pretrained,
        "plain": PLAIN if reproduction.subject.quantized_dir is not None else "",
        "weight": one_line(reproduction.weight),
        "was_pretrained": reproduction.original.loader == "pretrained",
        "in_attention": [edit for edit in case.edits if edit.hook.endswith(("hook_scores", "hook_pattern"))],
        "entries": entries,
        "imports": ", ".join(sorted(names, key=lambda name: (name[0].isupper(), name))),
        "watched": watched,
        "module": module,
        "side": side,
        "value": value,
        "one_line": one_line,
        "json": partial(json.dumps, indent=2),
    }


def _writes(case: Input) -> dict[int, list[float]]:
    """Layer → the factor of what each position writes into the state, for the layers with an edit of it."""
    edits = [edit for edit in case.edits if isinstance(edit, StateKnockout | StateSteer)]
    layers = [layer for layer in range(case.config["num_hidden_layers"]) if any(edit.holds(layer) for edit in edits)]
    width = len(case.tokens)
    return {layer: np.prod([edit.factors(layer, width) for edit in edits], axis=0).tolist() for layer in layers}


def _differing(reproduction: Reproduction) -> list[tuple[str, str, str]]:
    """Setting, its value in the diverging input, its value in the control."""
    case, control = reproduction.pair.case, reproduction.pair.control
    if control is None:
        return []
    rows = [_row(key, case.config, control.config) for key in reproduction.pair.differing]
    if case.dtype != control.dtype:
        rows.append(("(the model's format)", case.dtype, control.dtype))
    if case.unusual != control.unusual:
        unusual, usual = (", ".join(side.unusual) or "usual" for side in (case, control))
        rows.append(("(weights and their files)", unusual, usual))
    if case.sae is not None and control.sae is not None:
        ours, theirs = ({**sae.cfg, "least threshold": sae.threshold} for sae in (case.sae, control.sae))
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        rows += [_row(key, ours, theirs, " (SAE)") for key in keys]
    edits = [edit for edit in case.edits if edit not in control.edits]
    if case.recurrent != control.recurrent and case.recurrent is not None:
        rows.append(("(layers run again)", code_cell(case.recurrent.model_dump_json(exclude_defaults=True)), "none"))
    return rows + [("(an intervention)", f"{edit.kind} at {edit.hook}", "none") for edit in edits]


def _row(key: str, ours: dict[str, Any], theirs: dict[str, Any], remark: str = "") -> tuple[str, str, str]:
    a, b = (code_cell(json.dumps(side[key])) if key in side else "absent" for side in (ours, theirs))
    return code_cell(key) + remark, a, b


def code_cell(text: str) -> str:
    """Text for a code span in a Markdown table."""
    return one_line(text).replace("`", "'").replace("|", "\\|")
