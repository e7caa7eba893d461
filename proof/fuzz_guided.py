"""A coverage-guided fuzzer over the reader of traces: ``pip install atheris`` in an environment of its own, then

``PYTHONPATH=SITE .venv/bin/python -m proof.fuzz_guided -max_total_time=60 CORPUS``

Bytes are a document. The property is that of :mod:`proof.fuzz`. Not a
dependency and not part of any test: what it finds becomes a test, and a mutation in :mod:`proof.fuzz_mutants`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        "candle_mi_parity.trace.trace",
        "candle_mi_parity.compare.tensor_result",
        "candle_mi_parity.compare.compare",
    ]
):
    from proof import fuzz_traces
    from proof.fuzz_targets import refused

from proof.fuzz_mutants import dumped


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="parity-guided-", dir="/dev/shm"))
    case = fuzz_traces.cut("llama/hub")
    compared = fuzz_traces.honest("llama/hub", directory)
    corpus = Path(sys.argv[-1])
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "honest").write_bytes(dumped(case.document))

    def one(data: bytes) -> None:
        (directory / case.path).write_bytes(data)
        refused(lambda: fuzz_traces.outcome(case, directory, compared))

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
