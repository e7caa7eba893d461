"""The wheel: built, installed into a fresh environment, and used from an empty directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from candle_mi_parity.spec.paths import ROOT

MOST = 20e6
"""Bytes."""
DATA = {"emitter": "data/emitter", "fixtures": "data/fixtures", "rust_outputs/census": "data/census"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both wheels."""
    out = tmp_path_factory.mktemp("dist")
    for source in (ROOT, ROOT / "packages" / "stored"):
        command = [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and "hatchling" in done.stderr:
            pytest.skip(
                f"the build backend cannot be fetched, which needs the network: {done.stderr.splitlines()[-1]}"
            )
        assert done.returncode == 0, done.stderr
    return out


def held(wheel: Path) -> set[str]:
    assert wheel.stat().st_size < MOST
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if "/target/" in name or name.endswith(".pyc")]
    return names


@pytest.mark.thorough
def test_the_wheels_hold_the_data_and_stay_small(dist: Path) -> None:
    [program], [stored] = dist.glob("candle_mi_parity-*.whl"), dist.glob("candle_mi_parity_stored-*.whl")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    expected = {path for path in tracked if path.startswith("candle_mi_parity/")}
    for tree, data in DATA.items():
        under = [path for path in tracked if path.startswith(f"{tree}/")]
        assert under, tree
        expected |= {path.replace(tree, f"candle_mi_parity/{data}", 1) for path in under}
    assert expected - held(program) == set()
    traces = {
        path.replace("rust_outputs", "candle_mi_parity_stored", 1) for path in tracked if "rust_outputs/" in path
    }
    assert traces - held(stored) == set()


@pytest.mark.thorough
@pytest.mark.rust
def test_the_wheel_works_in_a_fresh_environment_from_an_empty_directory(dist: Path) -> None:
    packages = (Path(sys.prefix) / "packages").read_text(encoding="utf-8")  # which setup.sh wrote
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [ROOT / ".github" / "try-wheel.sh", dist, packages], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
