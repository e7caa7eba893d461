"""Downloads with the real huggingface_hub, against a hub on loopback.

What is served is a small Gemma 2 in three shards and an SAE in Gemma Scope's layout, under the names and the commits
of the table's own case. Never run against huggingface.co.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import types
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
    """An empty cache of the hub's client, no token, and no waiting between two tries."""
    home = tmp_path / "hf"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(home / "xet"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
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
    """A model at its commit, or an SAE's file; nothing is remembered of an earlier download."""
    downloads._fetch.cache_clear()
    digests._digests.clear()
    if path:
        return downloads.fetch_sae(SaeFile(repo=repo, revision=revision, path=path, layer=0))
    return downloads.fetch_model(HubModel(source="hub", repo=repo, revision=revision))


def refusal(*what: str) -> str:
    """The error of a download, one line that names the repository."""
    with pytest.raises(HubError) as caught:
        fetch(*what)
    line = str(caught.value)
    assert "\n" not in line and (what or (MODEL,))[0] in line, line
    return line


def whole(found: tuple[Path, Download], repo: Repo) -> bool:
    """Whether every wanted file is there with the bytes that the hub has, and nothing else."""
    where, download = found
    wanted = {name for name in repo.files if name != "README.md"}
    assert set(download.files) == wanted and download.commit == repo.commit == where.name
    return all((where / name).read_bytes() == repo.files[name] for name in wanted) and all(
        file_digest(where / name) == digest for name, digest in download.files.items()
    )


def blob(home: Path, name: str) -> Path:
    """Where the bytes of a file of the model lie."""
    return next((home / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots").rglob(name)).resolve()


def remove_as_told(line: str) -> None:
    """Run the command that the error names."""
    told = line.split("`")[1]
    assert told.startswith("rm /")
    subprocess.run(told, shell=True, check=True)


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_public_model_arrives_whole_at_its_commit(hub: Hub, revision: str) -> None:
    assert whole(fetch(MODEL, revision), hub.repos[MODEL])
    assert not [path for path in hub.asked if "README" in path]


@pytest.mark.parametrize(
    ("token", "what", "said"),
    [
        ("", (), ["HTTP 401", "no token was sent", f"https://huggingface.co/{MODEL},", "HF_TOKEN"]),
        (STRANGER, (), ["HTTP 403", "account is not in", f"https://huggingface.co/{MODEL},"]),
        ("hf_expired", (), ["does not accept the token", "settings/tokens"]),
        ("", ("google/gemma-9",), ["no such repository, or it is private (HTTP 401)"]),
        (MEMBER, ("google/gemma-9",), ["no such repository, or it is private (HTTP 404)"]),
        ("", (MODEL, "f" * 40), [f"it has no revision {'f' * 40}", f"https://huggingface.co/{MODEL}/commits"]),
        (
            MEMBER,
            (SCOPE, SCOPE_COMMIT, SAE.replace("105", "106")),
            ["it has no file layer_0/width_16k/average_l0_106/params.npz; it has", SAE],
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_remedy(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, what: tuple[str, ...], said: list[str]
) -> None:
    hub.repos[MODEL].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(*what)
    assert all(part in line for part in said), line
    assert "hf_" not in line, "the token is shown"
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    assert whole(fetch(), hub.repos[MODEL])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(WEIGHTS, cut=0), "run again: what is complete is kept"),
        (Fault(WEIGHTS, status=503), "out of order (HTTP 503): run again later"),
        (
            Fault("/tree/", status=429, headers={"Retry-After": "7"}),
            "(HTTP 429): run again in 7 seconds",
        ),
        (Fault(WEIGHTS, body=b"x"), f"{WEIGHTS} arrived with 1 of "),
    ],
    ids=["cut", "503", "429", "short"],
)
def test_what_goes_wrong_on_the_way_is_one_line_and_the_next_run_is_whole(hub: Hub, fault: Fault, said: str) -> None:
    hub.faults = [fault]
    assert said in refusal()
    hub.faults = []
    assert whole(fetch(), hub.repos[MODEL])


@pytest.mark.parametrize("where", ["/tree/", "/revision/", WEIGHTS])
def test_a_5xx_that_goes_away_costs_nothing(hub: Hub, where: str) -> None:
    hub.faults = [Fault(where, times=1, status=503)]
    assert whole(fetch(MODEL, "main"), hub.repos[MODEL])
    assert hub.faults[0].times == 0


def test_a_server_that_is_not_there_is_not_needed_for_what_is_here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "http://127.0.0.1:9")
    line = refusal()
    assert "Connection refused" in line and "HF_ENDPOINT (http://127.0.0.1:9)" in line
    at(monkeypatch, hub.endpoint)
    assert whole(fetch(), hub.repos[MODEL])
    at(monkeypatch, "http://127.0.0.1:9")
    assert whole(fetch(), hub.repos[MODEL])


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_bytes_of_the_right_length_are_refused_until_they_are_removed(hub: Hub, name: str) -> None:
    content = hub.repos[MODEL].files[name]
    hub.faults = [Fault(f"/{name}", times=1, body=bytes(len(content)))]
    line = refusal()
    assert all(part in line for part in (name, digest(name, content), digest(name, bytes(len(content))))), line
    assert refusal() == line
    remove_as_told(line)
    hub.asked.clear()
    assert whole(fetch(), hub.repos[MODEL])
    assert [path for path in hub.asked if "resolve" in path] == [f"/{MODEL}/resolve/{COMMIT}/{name}"]


def test_a_truncated_file_is_refused_also_where_repositories_share_it(hub: Hub, home: Path) -> None:
    """The client keeps what came over Xet in one store, and in each repository a link to it."""
    fetch()
    place, shared = blob(home, WEIGHTS), home / "hub" / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    place.rename(shared)
    place.symlink_to(os.path.relpath(shared, place.parent))
    assert whole(fetch(), hub.repos[MODEL])
    os.truncate(shared, 10)
    line = refusal()
    assert "(10 bytes)" in line
    remove_as_told(line)
    assert not shared.exists() and not place.is_symlink()
    assert whole(fetch(), hub.repos[MODEL])


def test_offline_asks_nothing_and_says_what_is_missing(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"HF_HUB_OFFLINE is set and {home / 'hub'} does not hold it" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch()
    fetch(SCOPE, SCOPE_COMMIT, SAE)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert whole(fetch(), hub.repos[MODEL])
    other = SAE.replace("105", "13")
    assert f"does not hold {other}: run once without" in refusal(SCOPE, SCOPE_COMMIT, other)
    # Another client, such as candle-mi's own, keeps no listing of the repository.
    shutil.rmtree(next(home.rglob("trees")))
    assert "run once with" in refusal(SCOPE, SCOPE_COMMIT, other)
    blob(home, WEIGHTS).unlink()
    assert "HF_HUB_OFFLINE is set" in refusal()
    assert not hub.asked


def test_a_full_disk_names_the_remedy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
        line = refusal()
    assert "Not enough free disk space" in line and "HF_HOME to a larger disk" in line
    assert whole(fetch(), hub.repos[MODEL])


def judged(hub: Hub, home: Path, candidate: str, out: Path) -> tuple[int, str, dict[str, Any]]:
    """The command on the table's hub case: exit code, what it printed, and the case in ``report.json``."""
    environment = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}
    arguments = ("run", "--candidate", candidate, "--cases", CASE.id, "--out", str(out))
    done = process(*arguments, environment=environment)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads((out / "report.json").read_text())["cases"][0]


@pytest.mark.thorough
@pytest.mark.thorough
@pytest.mark.parametrize("candidate", ["torch", pytest.param("0.2.2", marks=pytest.mark.rust)])
def test_the_case_of_the_table_from_download_to_verdict(hub: Hub, home: Path, tmp_path: Path, candidate: str) -> None:
    status, printed, case = judged(hub, home, candidate, tmp_path)
    assert status == 0 and case["status"] == "PASS", printed
    assert {"sae.features", "sae_on_truth.recon"} <= {tensor["name"] for tensor in case["tensors"]}
    model, scope = case["downloads"]
    assert (model["repo"], model["revision"], model["commit"]) == (MODEL, COMMIT, COMMIT)
    assert scope["files"] == {SAE: digest(SAE, hub.repos[SCOPE].files[SAE])}


def test_a_model_that_cannot_be_had_is_inconclusive(hub: Hub, home: Path, tmp_path: Path) -> None:
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
