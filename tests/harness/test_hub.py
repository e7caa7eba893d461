"""Downloads, each with the real huggingface_hub in a process of its own against a hub on loopback.

What is served is a small Gemma 2 in three shards and an SAE in Gemma Scope's layout, under the names and the commits
of the table's own case. Never run against huggingface.co. The client's waits between two tries are cut short.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.spec.cases import HubModel, SaeFile, TinyModel, load_cases
from candle_mi_parity.spec.paths import FIXTURES, ROOT, cache_root
from tests.harness import hub_client
from tests.harness.hub_client import Found
from tests.harness.hub_server import MEMBER, STRANGER, Fault, Hub, Repo, git_digest, serving, sha256

CASE = next(case for case in load_cases() if case.lane == "hub")
assert isinstance(CASE.model, HubModel) and isinstance(CASE.sae, SaeFile) and CASE.sae.repo and CASE.sae.revision
MODEL, SCOPE, SAE = CASE.model.repo, CASE.sae.repo, CASE.sae.path
COMMIT, SCOPE_COMMIT = CASE.model.revision, CASE.sae.revision
WEIGHTS = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def repos() -> dict[str, Repo]:
    model = TinyModel(source="tiny", config="models/gemma2.json", dialect="hub", shards=3)
    files = {path.name: path.read_bytes() for path in model_directory(model, cache_root()).iterdir()}
    files |= {"tokenizer.json": tokenizer(), "README.md": b"# Gemma 2\n", ".gitattributes": b"*.npz filter=lfs\n"}
    files["tokenizer_config.json"] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode()
    npz = (FIXTURES / "saes" / "gemma2_l1.npz").read_bytes()
    scope = {SAE: npz, SAE.replace("105", "13"): npz[:100], "README.md": b"# Gemma Scope\n"}
    return {MODEL: Repo(COMMIT, files), SCOPE: Repo(SCOPE_COMMIT, scope)}


@pytest.fixture
def hub(repos: dict[str, Repo]) -> Iterator[Hub]:
    with serving({name: Repo(repo.commit, dict(repo.files)) for name, repo in repos.items()}) as served:
        yield served


def tokenizer() -> bytes:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *str(CASE.text).split()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return made.to_str().encode()


class Machine:
    """A user's machine: an HF_HOME, and processes that see it and the hub and nothing of this machine's own."""

    def __init__(self, home: Path, endpoint: str) -> None:
        self.home, self.endpoint = home, endpoint

    def environment(self, **extra: str) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
        own = {key: value for key, value in own.items() if not key.lower().endswith("_proxy")}
        ours = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        return {**own, **ours, "PARITY_CACHE": str(cache_root()), **extra}

    def fetch(
        self, *what: str, stderr: str = "", limit: int | None = None, free: int | None = None, **extra: str
    ) -> Found:
        """What :func:`hub.fetch_model` or :func:`hub.fetch_sae` gives, or its error.

        :param what: repository, revision and file; the model at its commit where they are left out.
        """
        repo, revision, path = [*what, *(MODEL, COMMIT, "")[len(what) :]]
        log = self.home.with_name("stderr")
        found = hub_client.fetch((repo, revision, path), self.environment(**extra), stderr or str(log), limit, free)
        assert found.get("kind") in (None, "HubError"), (found, log.read_text())
        assert stderr or "Traceback" not in log.read_text()
        return found

    def said(self, *what: str, limit: int | None = None, free: int | None = None, **extra: str) -> str:
        """Its error: one line that names the repository."""
        found = self.fetch(*what, limit=limit, free=free, **extra)
        assert "error" in found, found
        line = str(found["error"])
        assert "\n" not in line and (what or (MODEL,))[0] in line, line
        return line

    def blob(self, name: str, repo: str = MODEL) -> Path:
        found = next((self.home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots").rglob(name))
        return found.resolve()


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path / "hf", hub.endpoint)


def whole(found: Found, repo: Repo) -> bool:
    """Whether every wanted file is there with the bytes that the hub has, and nothing else."""
    assert "files" in found, found
    files, where = found["files"], Path(str(found["where"]))
    assert isinstance(files, dict)
    wanted = {name for name in repo.files if name not in ("README.md", ".gitattributes")}
    assert set(files) == wanted and found["commit"] == repo.commit == where.name
    return all((where / name).read_bytes() == repo.files[name] for name in wanted) and all(
        file_digest(where / name) == digest for name, digest in files.items()
    )


def test_a_public_model_arrives_whole_from_the_store_that_sees_no_token(hub: Hub, machine: Machine) -> None:
    assert whole(machine.fetch(HF_TOKEN=MEMBER), hub.repos[MODEL])
    assert len(hub.asked("/lfs/")) == 4 and not any("authorization" in seen.headers for seen in hub.asked("/lfs/"))
    assert all(seen.headers["authorization"] == f"Bearer {MEMBER}" for seen in hub.asked("/api/models"))
    assert len(hub.asked("/tree/")) > 1, "the listing comes in pages"
    assert not hub.asked("README.md", "HEAD")


def test_a_branch_is_resolved_to_its_commit(hub: Hub, machine: Machine) -> None:
    assert whole(machine.fetch(MODEL, "main"), hub.repos[MODEL])


def test_one_file_of_an_sae_repository(hub: Hub, machine: Machine) -> None:
    found = machine.fetch(SCOPE, SCOPE_COMMIT, SAE)
    assert Path(str(found["where"])).read_bytes() == hub.repos[SCOPE].files[SAE]
    assert list(found["files"]) == [SAE] and len(hub.asked("/lfs/")) == 1  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("token", "said"), [("", ["HTTP 401", "no token was sent"]), (STRANGER, ["HTTP 403", "account is not in"])]
)
def test_a_gated_model_names_the_page_of_its_licence(hub: Hub, machine: Machine, token: str, said: list[str]) -> None:
    hub.repos[MODEL].gated = True
    line = machine.said(HF_TOKEN=token)
    assert all(part in line for part in [*said, f"https://huggingface.co/{MODEL},", "HF_TOKEN"]), line
    assert whole(machine.fetch(HF_TOKEN=MEMBER), hub.repos[MODEL])


def test_a_wrong_token_is_told_and_not_shown(machine: Machine) -> None:
    line = machine.said(HF_TOKEN="hf_expired")
    assert "does not accept the token" in line and "settings/tokens" in line and "hf_expired" not in line


@pytest.mark.parametrize(("token", "status"), [("", 401), (MEMBER, 404)])
def test_a_repository_that_is_not_there(machine: Machine, token: str, status: int) -> None:
    assert f"no such repository, or it is private (HTTP {status})" in machine.said("google/gemma-9", HF_TOKEN=token)


@pytest.mark.parametrize("revision", ["f" * 40, "release"])
def test_a_revision_that_is_not_there(machine: Machine, revision: str) -> None:
    line = machine.said(MODEL, revision)
    assert f"it has no revision {revision}" in line and f"https://huggingface.co/{MODEL}/commits" in line


def test_a_file_that_is_not_there_and_its_neighbours(machine: Machine) -> None:
    line = machine.said(SCOPE, SCOPE_COMMIT, SAE.replace("105", "106"))
    assert "it has no file layer_0/width_16k/average_l0_106/params.npz; it has" in line and SAE in line


def test_a_connection_cut_half_way_is_resumed_where_it_broke(hub: Hub, machine: Machine) -> None:
    """The client keeps what came in whole pieces of 10 MiB."""
    content = random.Random(0).randbytes(3 * constants.DOWNLOAD_CHUNK_SIZE)
    hub.repos[SCOPE].files["large.npz"] = content
    hub.faults = [Fault("/lfs/", times=1, cut=len(content) // 2)]
    found = machine.fetch(SCOPE, SCOPE_COMMIT, "large.npz")
    assert found["files"] == {"large.npz": sha256(content)}
    first, second = (seen.headers.get("range") for seen in hub.asked("/lfs/"))
    assert first is None and second == f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"


def test_a_small_file_whose_connection_is_cut_comes_again(hub: Hub, machine: Machine) -> None:
    content = hub.repos[MODEL].files[WEIGHTS]
    hub.faults = [Fault(sha256(content), times=2, cut=len(content) // 2)]
    assert whole(machine.fetch(), hub.repos[MODEL])
    assert len(hub.asked(sha256(content))) == 3


def test_a_connection_that_is_always_cut(hub: Hub, machine: Machine) -> None:
    hub.faults = [Fault(sha256(hub.repos[MODEL].files[WEIGHTS]), cut=0)]
    assert "run again: what is complete is kept" in machine.said()
    hub.faults, hub.requests[:] = [], []
    assert whole(machine.fetch(), hub.repos[MODEL])
    assert len(hub.asked("/lfs/")) < 4, "what was complete came again"


def test_a_server_that_is_not_there(hub: Hub, machine: Machine) -> None:
    gone = Machine(machine.home, "http://127.0.0.1:9")
    line = gone.said()
    assert "Connection refused" in line and "HF_ENDPOINT (http://127.0.0.1:9)" in line
    assert whole(machine.fetch(), hub.repos[MODEL])
    assert whole(gone.fetch(), hub.repos[MODEL]), "what is here needs no hub"


@pytest.mark.parametrize("where", ["/tree/", "/revision/", "/lfs/"])
def test_a_5xx_that_goes_away(hub: Hub, machine: Machine, where: str) -> None:
    hub.faults = [Fault(where, times=1, status=503)]
    assert whole(machine.fetch(MODEL, "main"), hub.repos[MODEL])
    assert hub.faults[0].times == 0


def test_a_5xx_that_stays(hub: Hub, machine: Machine) -> None:
    hub.faults = [Fault("/lfs/", status=503)]
    assert "out of order (HTTP 503): run again later" in machine.said()


def test_too_many_requests(hub: Hub, machine: Machine) -> None:
    hub.faults = [Fault("/tree/", times=1, status=429, headers={"Retry-After": "7"})]
    assert whole(machine.fetch(), hub.repos[MODEL])
    hub.faults = [Fault("/tree/", status=429, headers={"Retry-After": "7"})]
    line = Machine(machine.home.with_name("other"), hub.endpoint).said()
    assert "HTTP 429" in line and "in 7 seconds" in line


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_bytes_of_the_right_length(hub: Hub, machine: Machine, name: str) -> None:
    content = hub.repos[MODEL].files[name]
    lfs = name == WEIGHTS
    hub.faults = [Fault(sha256(content) if lfs else "/config.json", times=1, body=bytes(len(content)))]
    digest = sha256 if lfs else git_digest
    line = machine.said()
    assert all(part in line for part in (name, digest(content), digest(bytes(len(content))))), line
    assert machine.said(HF_HUB_OFFLINE="1") == line
    heal(line)
    hub.requests.clear()
    assert whole(machine.fetch(), hub.repos[MODEL])
    assert [seen.path for seen in hub.asked("/resolve/", "HEAD")] == [f"/{MODEL}/resolve/{COMMIT}/{name}"]


def test_a_wrong_file_that_repositories_share_is_removed_where_it_lies(hub: Hub, machine: Machine) -> None:
    """The client keeps what came over Xet in one store, and in each repository a link to it."""
    machine.fetch()
    blob, shared = machine.blob(WEIGHTS), machine.home / "hub" / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert whole(machine.fetch(), hub.repos[MODEL])
    shared.write_bytes(b"x")
    heal(machine.said())
    assert not shared.exists() and not blob.is_symlink()
    assert whole(machine.fetch(), hub.repos[MODEL])


def test_a_file_that_arrives_short(hub: Hub, machine: Machine) -> None:
    content = hub.repos[MODEL].files[WEIGHTS]
    hub.faults = [Fault(sha256(content), body=content[:-100])]
    line = machine.said()
    assert f"{WEIGHTS} arrived with {len(content) - 100} of {len(content)} bytes: run again" in line
    hub.faults = []
    assert whole(machine.fetch(), hub.repos[MODEL])


def test_offline_with_what_is_needed_asks_nothing(hub: Hub, machine: Machine) -> None:
    for revision in (COMMIT, "main"):
        machine.fetch(MODEL, revision)
    hub.requests.clear()
    for revision in (COMMIT, "main"):
        assert whole(machine.fetch(MODEL, revision, HF_HUB_OFFLINE="1"), hub.repos[MODEL])
    assert not hub.requests


def test_offline_without(hub: Hub, machine: Machine) -> None:
    line = machine.said(HF_HUB_OFFLINE="1")
    assert f"HF_HUB_OFFLINE is set and {machine.home / 'hub'} does not hold it" in line and "HF_HOME" in line
    machine.fetch(SCOPE, SCOPE_COMMIT, SAE)
    hub.requests.clear()
    other = SAE.replace("105", "13")
    assert f"does not hold {other}: run once without" in machine.said(SCOPE, SCOPE_COMMIT, other, HF_HUB_OFFLINE="1")
    # Another client, as candle-mi's own, keeps no listing of the repository.
    shutil.rmtree(next(machine.home.rglob("trees")))
    assert f"does not hold {other}: run once with the hub in reach" in machine.said(
        SCOPE, SCOPE_COMMIT, other, HF_HUB_OFFLINE="1"
    )
    assert not hub.requests


def test_a_snapshot_that_lost_a_file(hub: Hub, machine: Machine) -> None:
    machine.fetch()
    machine.blob(WEIGHTS).unlink()
    line = machine.said(HF_HUB_OFFLINE="1")
    assert f"HF_HUB_OFFLINE is set and {machine.home / 'hub'} does not hold {WEIGHTS}: run once without" in line
    hub.requests.clear()
    assert whole(machine.fetch(), hub.repos[MODEL])
    assert len(hub.asked("/lfs/")) == 1


def test_a_snapshot_with_half_a_file(hub: Hub, machine: Machine) -> None:
    machine.fetch()
    blob = machine.blob(WEIGHTS)
    size = blob.stat().st_size // 2
    os.truncate(blob, size)
    line = machine.said()
    assert f"({size} bytes)" in line and blob.name in line
    heal(line)
    assert whole(machine.fetch(), hub.repos[MODEL])


def test_a_cache_without_links_cannot_be_checked_and_is_refused(machine: Machine) -> None:
    assert "cannot be checked" in machine.said(HF_HUB_DISABLE_SYMLINKS="1")


def test_a_disk_that_is_full(hub: Hub, machine: Machine) -> None:
    assert "File too large" in (line := machine.said(limit=50_000)) and "HF_HOME to a larger disk" in line
    assert not list(machine.home.rglob("*.incomplete"))
    line = machine.said(free=1000)
    assert "Not enough free disk space" in line and "HF_HOME to a larger disk" in line
    assert whole(machine.fetch(), hub.repos[MODEL])


def test_bars_are_drawn_on_a_terminal(machine: Machine) -> None:
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    machine.fetch(stderr=os.ttyname(slave))
    os.close(slave)
    assert b"Fetching 7 files" in os.read(master, 100_000)
    os.close(master)


def heal(line: str) -> None:
    """Do what the error says."""
    command = line.split("`")[1]
    assert command.startswith("rm /")
    subprocess.run(command, shell=True, check=True)


def judged(machine: Machine, candidate: str, out: Path) -> tuple[int, str, dict[str, Any]]:
    """The command on the table's hub case: exit code, what it printed, and the case in ``report.json``."""
    arguments = ("run", "--candidate", candidate, "--cases", CASE.id, "--out", str(out))
    done = subprocess.run(
        [sys.executable, "-c", "from candle_mi_parity.cli.cli import main; main()", *arguments],
        cwd=ROOT,
        env=machine.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads((out / "report.json").read_text())["cases"][0]


@pytest.mark.parametrize("candidate", ["torch", pytest.param("0.2.2", marks=pytest.mark.rust)])
def test_the_case_of_the_table_from_download_to_verdict(
    hub: Hub, machine: Machine, tmp_path: Path, candidate: str
) -> None:
    status, printed, case = judged(machine, candidate, tmp_path)
    assert status == 0 and case["status"] == "PASS", printed
    assert {"sae.features", "sae_on_truth.recon"} <= {tensor["name"] for tensor in case["tensors"]}
    model, scope = case["downloads"]
    assert (model["repo"], model["revision"], model["commit"]) == (MODEL, COMMIT, COMMIT)
    assert scope["files"] == {SAE: sha256(hub.repos[SCOPE].files[SAE])}


def test_a_model_that_is_not_to_be_had_is_inconclusive(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    hub.repos[MODEL].gated = True
    status, printed, case = judged(machine, "torch", tmp_path)
    assert status == 3 and case["status"] == "UNMEASURED" and not case["downloads"]
    assert "verdict: INCONCLUSIVE" in printed and f"accept the licence at https://huggingface.co/{MODEL}" in printed
