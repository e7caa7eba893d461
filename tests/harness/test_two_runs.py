"""Two runs that share a cache: what both need is made once, and both get it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time
from pathlib import Path
from candle_mi_parity.files.cache import publish

shared = Path(sys.argv[1])

def make(out):
    with (shared / "made").open("a") as file:
        file.write("once\\n")
    time.sleep(1)
    (out / "weights").write_text("whole")

(shared / f"here-{sys.argv[2]}").touch()
while len(list(shared.glob("here-*"))) < 2:
    time.sleep(0.005)
print((publish(shared / "cache" / "key", make) / "weights").read_text())
"""


def test_an_entry_of_the_cache_is_made_once(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path), str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["whole", "whole"]
    assert (tmp_path / "made").read_text() == "once\n"
