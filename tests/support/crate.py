"""A crate that a checkout of candle-mi may be, in a few files."""

import subprocess
from pathlib import Path


def write_crate(root: Path, name: str = "candle-mi", candle: str = "0.11", downloader: str = "0.12.3") -> Path:
    (root / "src").mkdir(parents=True)
    (root / "Cargo.toml").write_text(
        f'[package]\nname = "{name}"\nversion = "9.9.9"\n[dependencies]\ncandle-core = "{candle}"\n'
        f'hf-fetch-model = {{ version = "{downloader}", features = ["indicatif"] }}\n'
    )
    (root / "src" / "lib.rs").write_text("// a")
    return root


def touch(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def committed(root: Path) -> str:
    """The spelling of a git repository with a crate, at HEAD."""
    crate = write_crate(root)
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "a")):
        subprocess.run(["git", "-C", str(crate), *command], check=True)
    return f"git:{crate}@HEAD"
