"""The folder of a reproduction: model, expected tensor, Rust test, Python script, issue text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE, UNITS, measure
from candle_mi_parity.files.escape import one_line, templates
from candle_mi_parity.models.generate import generated_model
from candle_mi_parity.models.sae import Sae, load_sae, sae_path
from candle_mi_parity.oracle.compute import SAMPLES
from candle_mi_parity.repro.crate import Dependencies, write_crate
from candle_mi_parity.repro.probe import probe
from candle_mi_parity.repro.repro import Reproduction
from candle_mi_parity.repro.rust import edit_lines, imports
from candle_mi_parity.repro.shrink import Input, Pair
from candle_mi_parity.spec.cases import SaelensDirectory

FORMAT = "candle-mi-parity/expected/1"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Blame:
    """Whose divergence it is.

    :ivar candidate: as the user spelt it.
    :ivar version: of that candle-mi.
    :ivar why: what is listed of it; empty for nothing.
    """

    candidate: str
    version: str
    why: str


def slug(case_id: str) -> str:
    """A case's id as a Rust module and a file name."""
    return "parity_" + re.sub(r"[^a-z0-9]+", "_", case_id.lower())


def write_folder(reproduction: Reproduction, blame: Blame, dependencies: Dependencies, out: Path) -> Path:
    """Write ``out/<case>/`` anew; whatever was there is replaced.

    :returns: the folder.
    """
    folder, name = out / reproduction.original.id, slug(reproduction.original.id)
    shutil.rmtree(folder, ignore_errors=True)
    data = folder / "tests" / name
    data.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="parity-repro-") as scratch:
        shutil.copytree(generated_model(reproduction.pair.case.config, "hub", Path(scratch)), data / "model")
        if (sae := reproduction.pair.case.sae) is not None:
            made = sae_path(sae, reproduction.pair.case.config["hidden_size"], Path(scratch))
            shutil.copytree(made, data / "sae")
    (data / "expected.json").write_text(json.dumps(expected(reproduction)) + "\n", encoding="utf-8")
    facts = _facts(reproduction, blame, load_sae(data / "sae") if sae is not None else None)
    for template, target in {"test.rs": f"tests/{name}.rs", "check.py": "check.py", "ISSUE.md": "ISSUE.md"}.items():
        (folder / target).write_text(
            templates(html=False).get_template(f"{template}.j2").render(facts), encoding="utf-8"
        )
    if (rustfmt := shutil.which("rustfmt")) is not None:
        subprocess.run([rustfmt, "--edition", "2021", folder / "tests" / f"{name}.rs"], check=True)
    write_crate(folder, dependencies)
    return folder


def expected(reproduction: Reproduction) -> dict[str, Any]:
    """The oracle's tensor and the gate of every element of it, row-major.

    ``sigma`` is σ of each element, null where the mask forbids a score, 0 where the value must be met exactly.
    ``position_noise`` is, of each position, the noise that its root mean square error is compared with.
    """
    truth = reproduction.truth.tensors[reproduction.first.name]
    kept = np.broadcast_to(True if truth.allowed is None else truth.allowed, truth.value.shape)
    unit = UNITS[reproduction.pair.case.dtype]
    # Of an error of 1 everywhere the ratio is one over the noise.
    measured = measure(np.ones_like(truth.value), truth.value, truth.noise, kept, unit=unit)
    exact = not truth.noise.any() and bool(kept.all())
    sigma = np.where(kept & (not exact), measured.sigma, 0.0).ravel().tolist()
    if reproduction.first.name.endswith("hook_scores"):
        sigma = [number if there else None for number, there in zip(sigma, kept.ravel(), strict=True)]
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
    }


def _facts(reproduction: Reproduction, blame: Blame, sae: Sae | None) -> dict[str, Any]:
    """What the templates say."""
    first, case = reproduction.first, reproduction.pair.case
    assert first.worst is not None
    config, heads = case.config, case.config["num_attention_heads"]
    shape = list(reproduction.truth.tensors[first.name].value.shape)
    lines, value = probe(reproduction, sae)
    return {
        "slug": slug(reproduction.original.id),
        "case": one_line(reproduction.original.id),
        "command": one_line(f"candle-mi-parity repro {reproduction.original.id} --candidate {blame.candidate}"),
        "version": blame.version,
        "title": one_line(blame.why) or f"`{first.name}` differs from PyTorch",
        "model_type": reproduction.subject.model_type,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "tensor": first.name,
        "shape": shape,
        "rows": shape[-2],
        "last": shape[-1],
        "dtype": case.dtype,
        "candle_dtype": DTYPES[case.dtype],
        "tokens": list(case.tokens),
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": heads,
        "config": json.dumps(config, indent=2),
        "differing": _differing(reproduction),
        "index": first.worst.index,
        "got": f"{first.worst.got:.9g}",
        "expected": f"{first.worst.expected:.17g}",
        "absolute": f"{first.worst.absolute:.3g}",
        "noise": f"{first.worst.noise:.3g}",
        "ratio": f"{first.worst.ratio:.3g}",
        "position_ratio": f"{first.position_ratio:.3g}",
        "element_gate": ELEMENT_GATE,
        "position_gate": POSITION_GATE,
        "detail": one_line(first.detail),
        "samples": SAMPLES,
        "sae": case.sae,
        "edits": [edit_lines(edit, heads, len(case.tokens)) for edit in case.edits],
        "imports": imports(case),
        "probe": lines,
        "value": value,
    }


def _differing(reproduction: Reproduction) -> list[tuple[str, str, str]]:
    """Config key, its value where the two sides differ, its value where they agree."""
    pair = reproduction.pair

    def said(side: Input, key: str) -> str:
        return _cell(json.dumps(side.config[key])) if key in side.config else "absent"

    if pair.control is None:
        return []
    rows = [(_cell(key), said(pair.case, key), said(pair.control, key)) for key in pair.differing]
    if pair.case.dtype != pair.control.dtype:
        rows.append(("(the model's format)", pair.case.dtype, pair.control.dtype))
    return [*rows, *_differing_sae(pair.case.sae, pair.control.sae), *_differing_edits(pair)]


def _cell(text: str) -> str:
    """In a code span of a table: neither ends it."""
    return one_line(text).replace("`", "'").replace("|", "\\|")


def _differing_sae(ours: SaelensDirectory | None, theirs: SaelensDirectory | None) -> list[tuple[str, str, str]]:
    if ours is None or theirs is None:
        return []
    sides = [{**side.cfg, "least threshold": side.threshold} for side in (ours, theirs)]
    said = [{key: _cell(json.dumps(value)) for key, value in side.items()} for side in sides]
    keys = [key for key in {**said[0], **said[1]} if said[0].get(key) != said[1].get(key)]
    return [(f"{key} (SAE)", said[0].get(key, "absent"), said[1].get(key, "absent")) for key in keys]


def _differing_edits(pair: Pair) -> list[tuple[str, str, str]]:
    assert pair.control is not None
    return [
        ("(an intervention)", f"{edit.kind} at {edit.hook}", "none")
        for edit in pair.case.edits
        if edit not in pair.control.edits
    ]
