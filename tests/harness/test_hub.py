"""Downloads with the real huggingface_hub from a hub on loopback.

It serves a small Gemma 2 in three shards and an SAE in Gemma Scope's layout, under the names and commits of the hub
case in the table. These tests have never run against huggingface.co.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.errors import HubError
from candle_mi_parity.files import digest as digests
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models import hub as downloads
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.run.check import CheckOptions, check
from candle_mi_parity.spec.cases import Download, HubModel, SaeFile, TinyModel, load_cases
from candle_mi_parity.spec.paths import FIXTURES, cache_root
from tests.support.command import process
from tests.support.hub import MEMBER, STRANGER, Fault, Hub, Repo, digest, serving

CASE = next(case for case in load_cases() if case.lane == "hub")
assert isinstance(CASE.model, HubModel) and isinstance(CASE.sae, SaeFile) and CASE.sae.repo and CASE.sae.revision
MODEL, SCOPE, SAE = CASE.model.repo, CASE.sae.repo, CASE.sae.path
COMMIT, SCOPE_COMMIT = CASE.model.revision, CASE.sae.revision
WEIGHTS = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def repos() -> dict[str, Repo]:
    model = TinyModel(source="tiny", config="models/gemma2.json", dialect="hub", shards=3)
    files = {path.name: path.read_bytes() for path in model_directory(model, cache_root()).iterdir()}
    files |= {"tokenizer.json": tokenizer(), "README.md": b"# Gemma 2\n"}
    files["tokenizer_config.json"] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode()
    npz = (FIXTURES / "saes" / "gemma2_l1.npz").read_bytes()
    scope = {SAE: npz, SAE.replace("105", "13"): npz[:100], "README.md": b"# Gemma Scope\n"}
    return {MODEL: Repo(COMMIT, files), SCOPE: Repo(SCOPE_COMMIT, scope)}


def tokenizer() -> bytes:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *str(CASE.text).split()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return made.to_str().encode()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, no token, and no delay between retries."""
    home = tmp_path / "hf"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(home / "xet"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("NO_PROXY", "no_proxy"):  # a proxy does not reach the loopback of this machine
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return home


@pytest.fixture
def hub(repos: dict[str, Repo], home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving({name: Repo(repo.commit, dict(repo.files)) for name, repo in repos.items()}) as served:
        at(monkeypatch, served.endpoint)
        yield served
    _http.close_session()


def at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def fetch(repo: str = MODEL, revision: str = COMMIT, path: str = "") -> tuple[Path, Download]:
    """Fetch a model, or an SAE's file, without the caches of this process."""
    downloads._fetch.cache_clear()
    digests._digests.clear()
    if path:
        return downloads.fetch_sae(SaeFile(repo=repo, revision=revision, path=path, layer=0))
    return downloads.fetch_model(HubModel(source="hub", repo=repo, revision=revision))


def refusal(*what: str) -> str:
    """The error message of a download: one line that names the repository."""
    with pytest.raises(HubError) as caught:
        fetch(*what)
    line = str(caught.value)
    assert "\n" not in line and (what or (MODEL,))[0] in line, line
    return line


def complete(found: tuple[Path, Download], repo: Repo) -> bool:
    """Whether the snapshot holds every wanted file with the hub's bytes, and no other file."""
    where, download = found
    wanted = {name for name in repo.files if name != "README.md"}
    assert set(download.files) == wanted and download.commit == repo.commit == where.name
    return all((where / name).read_bytes() == repo.files[name] for name in wanted) and all(
        file_digest(where / name) == digest for name, digest in download.files.items()
    )


def blob(home: Path, name: str) -> Path:
    """The blob of a file of the model."""
    return next((home / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots").rglob(name)).resolve()


def remove_as_told(line: str) -> None:
    """Run the command in the error message."""
    told = line.split("`")[1]
    assert told.startswith("rm /")
    subprocess.run(told, shell=True, check=True)


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_public_model_is_downloaded_completely_at_its_commit(hub: Hub, revision: str) -> None:
    assert complete(fetch(MODEL, revision), hub.repos[MODEL])
    assert not [path for path in hub.asked if "README" in path]


@pytest.mark.parametrize(
    ("token", "what", "expected"),
    [
        ("", (), ["HTTP 401", "no token was sent", f"https://huggingface.co/{MODEL},", "HF_TOKEN"]),
        (STRANGER, (), ["HTTP 403", "account has no access", f"https://huggingface.co/{MODEL},"]),
        ("", ("google/gemma-9",), ["no such repository, or it is private"]),
        ("", (MODEL, "f" * 40), [f"it has no revision {'f' * 40}", f"https://huggingface.co/{MODEL}/commits"]),
        (
            MEMBER,
            (SCOPE, SCOPE_COMMIT, SAE.replace("105", "106")),
            ["it has no file layer_0/width_16k/average_l0_106/params.npz; it has", SAE],
        ),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_with_the_remedy(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, what: tuple[str, ...], expected: list[str]
) -> None:
    hub.repos[MODEL].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(*what)
    assert all(part in line for part in expected), line
    assert "hf_" not in line, "the token is shown"
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert complete(fetch(), hub.repos[MODEL])


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(WEIGHTS, cut=0), "run again: completed files are kept"),
        (Fault(WEIGHTS, status=503), "503"),
        (Fault(WEIGHTS, body=b"x"), "has size 1"),
    ],
    ids=["cut", "503", "short"],
)
def test_after_a_failed_download_the_next_run_completes_it(hub: Hub, fault: Fault, expected: str) -> None:
    hub.fault = fault
    assert expected in refusal()
    hub.fault = None
    assert complete(fetch(), hub.repos[MODEL])


def test_without_a_server_a_complete_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "http://127.0.0.1:9")
    line = refusal()
    assert "Connection refused" in line and "HF_ENDPOINT (http://127.0.0.1:9)" in line
    at(monkeypatch, hub.endpoint)
    assert complete(fetch(), hub.repos[MODEL])
    at(monkeypatch, "http://127.0.0.1:9")
    assert complete(fetch(), hub.repos[MODEL])


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_bytes_of_the_right_length_are_refused_until_they_are_removed(hub: Hub, name: str) -> None:
    content = hub.repos[MODEL].files[name]
    hub.fault = Fault(f"/{name}", times=1, body=bytes(len(content)))
    line = refusal()
    assert all(part in line for part in (name, digest(name, content), digest(name, bytes(len(content))))), line
    assert refusal() == line
    remove_as_told(line)
    hub.asked.clear()
    assert complete(fetch(), hub.repos[MODEL])
    assert [path for path in hub.asked if "resolve" in path] == [f"/{MODEL}/resolve/{COMMIT}/{name}"]


def test_a_truncated_file_in_a_store_shared_by_repositories_is_refused(hub: Hub, home: Path) -> None:
    fetch()
    place, shared = blob(home, WEIGHTS), home / "hub" / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    place.rename(shared)
    place.symlink_to(os.path.relpath(shared, place.parent))
    assert complete(fetch(), hub.repos[MODEL])
    os.truncate(shared, 10)
    line = refusal()
    assert "(10 bytes)" in line
    remove_as_told(line)
    assert not shared.exists() and not place.is_symlink()
    assert complete(fetch(), hub.repos[MODEL])


def test_offline_sends_no_request(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"HF_HUB_OFFLINE is set and {home / 'hub'} does not hold all of it" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch()
    fetch(SCOPE, SCOPE_COMMIT, SAE)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert complete(fetch(), hub.repos[MODEL])
    if (trees := next(home.rglob("trees"), None)) is not None:  # another client, or before 1.25, keeps no listing
        shutil.rmtree(trees)
    assert "run once" in refusal(SCOPE, SCOPE_COMMIT, SAE.replace("105", "13"))
    blob(home, WEIGHTS).unlink()
    assert "HF_HUB_OFFLINE is set" in refusal()
    assert not hub.asked


def judged(hub: Hub, home: Path, candidate: str, out: Path) -> tuple[int, str, dict[str, Any]]:
    """Run the command on the hub case: its exit code, its output, and the case in ``report.json``."""
    environment = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}
    arguments = ("run", "--candidate", candidate, "--cases", CASE.id, "--out", str(out))
    done = process(*arguments, environment=environment)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads((out / "report.json").read_text())["cases"][0]


@pytest.mark.thorough
@pytest.mark.parametrize("candidate", ["torch", pytest.param("0.2.2", marks=pytest.mark.rust)])
def test_the_case_of_the_table_from_download_to_verdict(hub: Hub, home: Path, tmp_path: Path, candidate: str) -> None:
    status, printed, case = judged(hub, home, candidate, tmp_path)
    assert status == 0 and case["status"] == "PASS", printed
    assert {"sae.features", "sae_on_truth.recon"} <= {tensor["name"] for tensor in case["tensors"]}
    model, scope = case["downloads"]
    assert (model["repo"], model["revision"], model["commit"]) == (MODEL, COMMIT, COMMIT)
    assert scope["files"] == {SAE: digest(SAE, hub.repos[SCOPE].files[SAE])}


@pytest.mark.thorough
def test_a_model_without_access_is_inconclusive(hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.repos[MODEL].gated = True
    status, printed, case = judged(hub, home, "torch", tmp_path)
    assert status == 3 and case["status"] == "UNMEASURED" and not case["downloads"]
    assert "verdict: INCONCLUSIVE" in printed and f"accept the licence at https://huggingface.co/{MODEL}" in printed


def test_a_check_says_that_a_model_is_gated_and_what_it_will_download(hub: Hub, tmp_path: Path) -> None:
    downloads._fetch.cache_clear()
    told: list[str] = []

    class Telling(Progress):
        def keep(self, line: str) -> None:
            told.append(line)

    sae = f"{SCOPE}@{SCOPE_COMMIT}:{SAE}"
    options = CheckOptions(f"{MODEL}@{COMMIT}", sae=sae, hook="blocks.0.hook_resid_post", out=tmp_path)
    hub.repos[MODEL].gated = True
    with pytest.raises(HubError, match="it is gated and no token was sent"):
        check(options, Telling(), opened=TorchSource)
    hub.repos[MODEL].gated = False
    with pytest.raises(HubError, match=r"nobody/nothing@main.*; there is no directory of that name either"):
        check(replace(options, model="nobody/nothing"), opened=TorchSource)
    result = check(options, Telling(), opened=TorchSource)
    assert result.agrees, result.sentence
    assert told[0].startswith(f"{MODEL}@{COMMIT}: ") and "files to download" in told[0]
    assert result.cite[f"{MODEL}@{COMMIT}"] == f"commit {COMMIT}" and "sha256" in result.cite["SAE"]
    assert {prompt.id for prompt in result.prompts} >= {"text", "non-ascii", "random", "one-token"}
