"""What an emitter is asked for a case, and the trace that it wrote."""

from __future__ import annotations

from pathlib import Path

from candle_mi_parity.compare.compare import check_header
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.edits import for_emitter
from candle_mi_parity.spec.hook_points import FORCED, Mode, is_lens
from candle_mi_parity.trace.trace import Trace
from candle_mi_parity.trace.truth import Truth

REQUEST_FORMAT = "candle-mi-parity/request/1"
TIMEOUT_SECONDS = 600.0


def request(subject: PreparedCase, mode: Mode, inputs: Path, out: Path, device: str) -> dict[str, object]:
    """The emitter's request for a case; in ``forced`` mode the residual stream is replaced by the truth's."""
    sae = None
    if subject.case.sae is not None and mode == "free":
        sae = {"path": str(subject.sae_file), "layer": subject.case.sae.layer, "hook": subject.case.sae.hook}
    forced = [name for name in subject.captures if name.endswith(FORCED) and mode == "forced"]
    return {
        "format": REQUEST_FORMAT,
        "case": {"id": subject.case.id, "digest": subject.digest},
        "model_dir": str(subject.given),
        "loader": subject.case.loader,
        "tokens": subject.tokens,
        # In forced mode the input of a layer is the output of the previous one, which has its own name.
        "captures": [name for name in subject.captures if name not in forced or name.endswith("resid_mid")],
        "logits": True,
        "dtype": subject.case.dtype,
        "device": device,
        "sae": sae,
        "inputs": str(inputs),
        "sae_input": "sae" if sae else None,
        "project": [name for name in subject.captures if is_lens(name) and mode == "free"],
        **({"weights": list(subject.quantized)} if subject.quantized and mode == "free" else {}),
        "edits": [{"hook": name, "kind": "replace", "tensor": name} for name in forced]
        or for_emitter(subject.case.edits, subject.transcoders),
        **({"recurrent": subject.case.recurrent.for_emitter()} if subject.case.recurrent else {}),
        "out": str(out),
    }


def opened(path: Path, subject: PreparedCase, truth: Truth, inputs: Path, device: str, weights: str) -> Trace:
    """The trace that an emitter wrote just now.

    :param weights: the digest of the model's files that it has to have read.
    :raises TraceError: it is malformed, or of another case, model, input, format or device, or in part.
    """
    trace = Trace(path)
    if any(entry.part is not None for entry in trace.entries.values()):
        raise TraceError(f"{trace.path}: an emitter writes whole tensors, and this trace holds parts")
    if trace.header.device != device:
        raise TraceError(f"{trace.path}: made on {trace.header.device}, expected {device}")
    check_header(truth, trace, file_digest(inputs), weights)
    check_id(trace, subject)
    return trace


def check_id(trace: Trace, subject: PreparedCase) -> None:
    """:raises TraceError: the trace says that it is another case's, of the same numbers or not."""
    if (found := trace.header.case.id) != subject.case.id:
        raise TraceError(f"{trace.path}: of case {one_line(found)}, expected {subject.case.id}")
