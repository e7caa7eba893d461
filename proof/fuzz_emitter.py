"""Mutants of requests on the standard input of the built emitter, one process for all: each gets its one line."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import IO, Any

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.candidate import parse_candidate
from candle_mi_parity.candidate.sources import request
from candle_mi_parity.spec.paths import cache_root
from proof.fuzz_mutants import dumped, mutate_bytes, mutate_tree
from tests.support.planting import real

REPLY_SECONDS = 9.0


class Emitter:
    """The process in a directory of its own, in which it may write."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.process = subprocess.Popen(
            [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory
        )
        assert self.process.stdout is not None
        self._replies: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            self._replies.put(line)
        self._replies.put(b"")

    def ask(self, line: bytes) -> dict[str, Any]:
        """Its one reply; nothing else may come with it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()
        reply = self._replies.get(timeout=REPLY_SECONDS)
        assert reply, f"the emitter ended with {self.process.wait(5)}"
        assert self._replies.empty(), "two lines for one request"
        found = json.loads(reply)
        assert isinstance(found, dict) and isinstance(found.get("ok"), bool) and "case" in found, reply
        assert found["ok"] or (found["error"] and "\n" not in found["error"]), reply
        return found


def requests(directory: Path) -> Callable[[Random], str]:
    """Trace, tokenising and call requests of a tiny model, spoilt; a good one must still be answered after each."""
    there = real("llama/hub")
    # A relative name, so that a mutant of it stays where the process works.
    good: dict[str, Any] = json.loads(json.dumps(request(there.subject, "free", there.inputs, Path("o.json"), "cpu")))
    good["captures"] = good["captures"][:3]
    good["project"] = good["project"][:1]
    good["edits"] = [
        {"hook": "blocks.0.hook_resid_pre", "kind": "scale", "factor": 1.5},
        {"hook": "blocks.0.attn.hook_scores", "kind": "knockout", "spec": {"heads": [0], "edges": [[3, 1]]}},
    ]
    tokenizer = f"{good['model_dir']}/tokenizer.json"
    token: dict[str, Any] = {
        "format": "candle-mi-parity/tokenize/1", "tokenizer": tokenizer, "texts": ["a"], "out": "t.json",
    }  # fmt: skip
    binary = build(parse_candidate("0.2.2"), cache_root(), lambda _: None).path
    emitters: list[Emitter] = []

    def one(rng: Random) -> str:
        if not emitters:
            emitters.append(Emitter(binary, directory))
        base = rng.choice((good, good, good, token))
        line = dumped(mutate_tree(rng, base)) if rng.random() < 0.6 else mutate_bytes(rng, dumped(base))
        line = line.replace(b"\n", b" ")
        if not line.strip() or _writes_elsewhere(line):
            return "not asked: writes elsewhere"
        try:
            reply = emitters[0].ask(line)
            assert emitters[0].ask(dumped(good))["ok"], "a good request is refused afterwards"
        except BaseException:
            emitters.pop().process.kill()
            raise
        return "answered" if reply["ok"] else f"refused: {reply['kind']}"

    return one


def _writes_elsewhere(line: bytes) -> bool:
    """A mutant of the output's name that is still a whole request would be obeyed."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    out = found.get("out") if isinstance(found, dict) else None
    return isinstance(out, str) and (os.sep in out or "\x00" in out)
