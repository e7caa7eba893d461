"""Building the emitter, with a fake cargo: what is built, errors, and progress."""

import json
import os
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from candle_mi_parity.candidate import build as builder
from candle_mi_parity.candidate import cargo
from candle_mi_parity.candidate import plan as planning
from candle_mi_parity.candidate.parts import LANES, PARTS, SWITCHED
from candle_mi_parity.candidate.plan import known_releases, lay_out, plan_of
from candle_mi_parity.candidate.spelling import CandidateError, OutOfReachError, parse_candidate
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import EMITTER
from tests.support.crate import committed, touch, write_crate

Cargo = Callable[..., None]
FINISHED = {"reason": "build-finished", "success": False}


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cargo:
    """Put a rustc on PATH, and a cargo that prints messages and fails."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    def put(stderr: str, *messages: object, rustc: str = "echo rustc 9.9.9", before: str = "") -> None:
        stdout = "\n".join(json.dumps(message) for message in messages)
        script = f"{before}\ncat >&2 <<EOF\n{stderr}\nEOF\ncat <<'EOF'\n{stdout}\nEOF\nexit 101"
        for name, text in {"rustc": rustc, "cargo": script}.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)

    return put


def fails(spec: str, cache: Path, said: list[str] | None = None) -> CandidateError:
    said = [] if said is None else said
    with pytest.raises(CandidateError) as caught:
        builder.build(parse_candidate(spec), cache, said.append)
    assert "\n" not in str(caught.value)
    return caught.value


# --- what is built --------------------------------------------------------------------------------


def test_only_a_checkout_is_built_incrementally(put: Cargo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put("error: $* incremental=$CARGO_INCREMENTAL")
    monkeypatch.setenv("CARGO_INCREMENTAL", "1")
    specs = {f"path:{write_crate(tmp_path / 'crate')}": "1", "0.2.2": "0", committed(tmp_path / "repository"): "0"}
    for spec, incremental in specs.items():
        assert re.search(f"--release .* incremental={incremental} ", str(fails(spec, tmp_path / "cache")))


def test_cargo_does_not_rely_on_modification_times(put: Cargo, tmp_path: Path) -> None:
    """A file that was restored with an old time would otherwise count as unchanged."""
    put("error: known: $(ls $CARGO_TARGET_DIR/release/.fingerprint | tr '\\n' ' ').")
    known = tmp_path / "cache" / "target" / "candle-0.11" / "release" / ".fingerprint"
    for name in ("candle-mi-0a1b", "candle-core-2c3d", "parity-emitter-4e5f"):
        (known / name).mkdir(parents=True)
    assert "known: candle-core-2c3d candle-mi-0a1b ." in str(fails("0.2.2", tmp_path / "cache"))
    checkout = f"path:{write_crate(tmp_path / 'crate')}"
    assert "known: candle-core-2c3d ." in str(fails(checkout, tmp_path / "cache"))


@pytest.mark.skipif(sys.platform != "linux", reason="branches are counted on Linux only: run it there")
def test_a_build_that_counts_branches_is_apart_from_the_plain_one(
    put: Cargo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put("error: $(basename $CARGO_TARGET_DIR) wrapper=$RUSTC_WRAPPER,$PARITY_WRAPPED.")
    monkeypatch.setenv("RUSTC_WRAPPER", "sccache")
    said: list[str] = []
    with pytest.raises(CandidateError, match=r"candle-0\.11-counted wrapper=.*emitter/counting\.sh,sccache\."):
        builder.build(parse_candidate("0.2.2"), tmp_path / "cache", said.append, counted=True)
    assert re.search(r"candle-0\.11 wrapper=sccache,\.", str(fails("0.2.2", tmp_path / "cache")))
    plan = plan_of(parse_candidate("0.2.2"), tmp_path / "cache")
    plain, counted, cuda = (
        builder._binary(replace(plan, counted=counted), tmp_path, "rustc", features)
        for counted, features in ((False, ()), (True, ()), (True, ("cuda",)))
    )
    assert len({plain, counted, cuda}) == 3
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CandidateError, match="on Linux only"):
        builder.build(parse_candidate("0.2.2"), tmp_path / "cache", said.append, counted=True)


def test_no_crate_of_a_checkout_counts_as_unchanged_by_its_times(put: Cargo, tmp_path: Path) -> None:
    """A sibling crate that is replaced by one with older files, also with `build.target` or `build.build-dir` set."""
    put("error: known: $(cd $CARGO_BUILD_BUILD_DIR && ls -d */.fingerprint/* x86/*/.fingerprint/* | tr '\\n' ' ').")
    target = tmp_path / "cache" / "target" / "candle-0.11"
    for place in ("release", "x86/release"):
        for name in ("candle-mi-0a1b", "kernel-2c3d", "inner-3d4e", "half-4e5f"):
            (target / place / ".fingerprint" / name).mkdir(parents=True)
    candidate = parse_candidate(f"path:{write_crate(tmp_path / 'crate')}")
    touch(tmp_path / "kernel" / "Cargo.toml", '[package]\nname = "kernel"\n')
    touch(tmp_path / "crate" / "inner" / "Cargo.toml", '[package]\nname = "inner"\n')
    touch(planning.inputs_of(candidate, tmp_path / "cache"), f"{tmp_path / 'kernel' / 'src' / 'lib.rs'}\n")
    told = str(fails(candidate.spec, tmp_path / "cache"))
    assert "known: release/.fingerprint/half-4e5f x86/release/.fingerprint/half-4e5f ." in told


@pytest.mark.parametrize("release", known_releases())
def test_a_release_is_built_from_its_lock(put: Cargo, tmp_path: Path, release: str) -> None:
    put("error: $*")
    assert re.search(r"build --release .* --locked ", str(fails(release, tmp_path / "cache")))
    (lock,) = (tmp_path / "cache" / "crates").glob("*/Cargo.lock")
    assert lock.read_bytes() == (EMITTER / "locks" / f"{release}.lock").read_bytes()


@pytest.mark.parametrize(
    ("repository", "url"),
    [
        ("https://example.org/a.git", "https://example.org/a.git"),
        ("git@example.org:a/b.git", "ssh://git@example.org/a/b.git"),
        ("/src/a b", "file:///src/a%20b"),
    ],
)
def test_cargo_gets_a_repository_as_a_url(repository: str, url: str) -> None:
    assert planning._url(repository) == url


# --- the stand-in for the downloader --------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "version"),
    [
        ("0.12.3", "0.12.999"),
        (">=0.10.7, <0.11", "0.10.999"),
        ("=0.12.6", "0.12.6"),
        ("*", None),
    ],
)
def test_the_stand_in_has_a_version_that_the_checkout_accepts(
    tmp_path: Path, asked: str, version: str | None
) -> None:
    crate = write_crate(tmp_path / "crate", downloader=asked)
    plan = plan_of(parse_candidate(f"path:{crate}"), tmp_path)
    assert plan.downloader == version
    lay_out(tmp_path / "made", plan, tmp_path / "cache")
    patch = tomllib.loads((tmp_path / "made" / "Cargo.toml").read_text())["patch"]["crates-io"]
    if version is None:
        assert patch == {}
    else:
        stand_in = tomllib.loads((Path(patch["hf-fetch-model"]["path"]) / "Cargo.toml").read_text())["package"]
        assert (stand_in["name"], stand_in["version"]) == ("hf-fetch-model", version)


@pytest.mark.parametrize("release", known_releases())
def test_the_lock_of_a_release_names_the_stand_in(tmp_path: Path, release: str) -> None:
    plan = plan_of(parse_candidate(release), tmp_path)
    locked = {one["name"]: one for one in tomllib.loads(plan.lock.decode())["package"]}["hf-fetch-model"]
    assert plan.locked and locked == {"name": "hf-fetch-model", "version": plan.downloader}


def test_a_checkout_that_does_not_build_with_the_stand_in_gets_the_real_one(put: Cargo, tmp_path: Path) -> None:
    error = {"level": "error", "message": "cannot find function `x` in crate `hf_fetch_model`", "spans": []}
    message = {"reason": "compiler-message", "message": error | {"rendered": error["message"]}}
    put("$(grep -c ^hf-fetch-model $4)", message, FINISHED)
    said: list[str] = []
    told = str(fails(f"path:{write_crate(tmp_path / 'crate')}", tmp_path / "cache", said))
    assert "does not compile: error: cannot find function" in told
    assert [line for line in said if "building the real hf-fetch-model" in line]
    assert log_of(told).startswith("0\n"), "no patch the second time"


# --- errors ---------------------------------------------------------------------------------------


def log_of(message: str) -> str:
    """The text of the log that an error names."""
    return Path(message.rpartition("full log: ")[2].rstrip(")")).read_text()


@pytest.mark.parametrize(("name", "candle"), [("other", "0.11"), ("candle-mi", "*")])
def test_a_path_must_hold_candle_mi(tmp_path: Path, name: str, candle: str) -> None:
    crate = write_crate(tmp_path / "c", name, candle)
    assert "Cargo.toml of " in str(fails(f"path:{crate}", tmp_path))
    assert "no Cargo.toml" in str(fails(f"path:{tmp_path}", tmp_path))


def test_without_rust_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert re.search(r"on PATH.*cargo.*rustup.*stored:", str(fails("0.2.2", tmp_path)))


def test_an_error_of_cargo_is_one_line_with_its_cause(put: Cargo, tmp_path: Path) -> None:
    put("    Updating index\nerror: failed to load the manifest\n\nCaused by:\n  no such file")
    said: list[str] = []
    told = str(fails("0.2.2", tmp_path / "cache", said))
    assert "error: failed to load the manifest: no such file" in told
    assert "Updating index" in log_of(told)
    assert any("Updating" in line for line in said)


def test_an_unknown_release_lists_the_known_ones(put: Cargo, tmp_path: Path) -> None:
    unknown = 'error: failed to select a version for the requirement `candle-mi = "=0.9.9"`'
    put(f"{unknown}\ncandidate versions found which didn't match: 0.2.2, 0.2.1, ...".replace("`", "\\`"))
    assert str(fails("0.9.9", tmp_path)) == "no candle-mi 0.9.9; known releases: 0.2.2, 0.2.1, ..."
    put(unknown.replace("`", "\\`"))
    assert str(fails("0.9.9", tmp_path)).endswith("known releases: 0.2.2, 0.1.24, 0.1.10, 0.1.6")


DOWNLOAD = "error: failed to download from \\`https://example.org\\`\n\nCaused by:\n  [7] Could not connect to server"


def test_without_network_the_candidate_is_out_of_reach(put: Cargo, tmp_path: Path) -> None:
    put(DOWNLOAD)
    assert isinstance(fails("0.2.2", tmp_path), OutOfReachError)
    put(DOWNLOAD, FINISHED)  # cargo compiled, so the network is not the reason
    assert not isinstance(fails("0.2.2", tmp_path), OutOfReachError)


def test_a_compiler_error_has_its_place(put: Cargo, tmp_path: Path) -> None:
    spans = [
        {"file_name": "src/a.rs", "line_start": 1, "column_start": 1, "is_primary": False},
        {"file_name": "src/lib.rs", "line_start": 12, "column_start": 5, "is_primary": True},
    ]
    rendered = "error: …\n --> src/lib.rs\n"
    error = {"level": "error", "message": "mismatched types", "spans": spans, "rendered": rendered}
    warning = {**error, "level": "warning", "message": "unused"}
    messages = [{"reason": "compiler-message", "message": one} for one in (warning, error)]
    put("   Compiling hf-fetch-model v0.12.999\nerror: could not compile", *messages, "not a message", FINISHED)
    told = str(fails(f"path:{write_crate(tmp_path / 'crate')}", tmp_path / "cache"))
    assert "crate does not compile: src/lib.rs:12:5: error: mismatched types (full log: " in told
    assert " --> src/lib.rs" in log_of(told)


def test_an_emitter_that_a_changed_interface_breaks_says_whose_line_it_is(put: Cargo, tmp_path: Path) -> None:
    span = {"file_name": "src/forward.rs", "line_start": 40, "column_start": 9, "is_primary": True}
    defined = {
        "message": "method defined here",
        "spans": [{"file_name": "/x/candle-mi/src/hooks.rs", "line_start": 7}],
    }
    error = {"level": "error", "message": "this method takes 2 arguments", "spans": [span], "children": [defined]}
    message = {"reason": "compiler-message", "message": error | {"rendered": "error"}}
    put("error: could not compile", message | {"target": {"name": "parity-emitter"}}, FINISHED)
    told = str(fails(f"path:{write_crate(tmp_path / 'crate')}", tmp_path / "cache"))
    assert "this suite's emitter, which calls candle-mi, does not compile against" in told
    assert (
        "src/forward.rs:40:9: error: this method takes 2 arguments; method defined here at /x/candle-mi/src/" in told
    )
    assert "stored:0.2.2, stored:0.1.24" in told
    put("error: could not compile", message | {"target": {"name": "candle_mi"}}, FINISHED)
    assert "crate does not compile: src/forward.rs:40:9" in str(
        fails(f"path:{write_crate(tmp_path / 'other' / 'crate')}", tmp_path / "cache")
    )


CARGO_WITHOUT_PARTS = """#!/bin/sh
case "$*" in
*"--no-default-features --features {kept} "*)
    mkdir -p "$CARGO_TARGET_DIR/release"
    made="$CARGO_TARGET_DIR/release/parity-emitter"
    printf '#!/bin/sh\\necho \\047{identity}\\047\\n' >"$made"
    chmod 755 "$made"
    echo '{{"reason": "compiler-artifact", "target": {{"name": "parity-emitter"}}, "executable": "'"$made"'"}}' ;;
*)
    cat <<'EOF'
{messages}
EOF
    exit 101 ;;
esac
"""


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        (["call_measures.rs"], {"calls"}),
        (["call_clt.rs"], {"clt"}),
        (["call_rwkv.rs"], {"rwkv-tokenizer"}),
        (["call_stoicheia.rs"], {"stoicheia"}),
        (["sae.rs"], {"sae", "calls"}),
        (["tokenize.rs", "call.rs"], {"tokens", "calls"}),
        (["forward.rs"], None),
        (["call.rs", "forward.rs"], None),
    ],
)
def test_a_part_that_does_not_compile_costs_no_other(
    put: Cargo, tmp_path: Path, broken: list[str], missing: set[str] | None
) -> None:
    put("")
    identity = {"candle_mi": {"version": "0.2.2", "source": "registry"}}
    messages = [{"reason": "build-finished", "success": False}]
    for name in broken:
        span = {"file_name": f"src/{name}", "line_start": 3, "column_start": 1, "is_primary": True}
        error = {"level": "error", "message": "no method named `x`", "spans": [span], "rendered": "error"}
        messages.append({"reason": "compiler-message", "target": {"name": "parity-emitter"}, "message": error})
    messages.append({"reason": "compiler-message", "target": {"name": "parity-emitter"}, "message": ABORTING})
    lines = "\n".join(map(json.dumps, messages))
    kept = ",".join(sorted(set(PARTS) - (missing or set(PARTS))))
    script = CARGO_WITHOUT_PARTS.format(kept=kept, identity=json.dumps(identity), messages=lines)
    (tmp_path / "bin" / "cargo").write_text(script)
    if missing is None:
        assert "does not compile against" in str(fails("0.2.2", tmp_path / "cache"))
        return
    said: list[str] = []
    for _ in range(2):  # built, and from the cache
        built = builder.build(parse_candidate("0.2.2"), tmp_path / "cache", said.append)
        assert set(built.missing) == missing
        assert all("error: no method named `x`" in error for error in built.missing.values())
    assert sum("is left out" in line for line in said) == 1


CARGO_WITH_A_BROKEN_FEATURE = """#!/bin/sh
echo "$*" >>{log}
every={every}
case "$*" in *--no-default-features*) ;; *) set -- --features $every ;; esac
case "$*" in
{pattern})
    cat <<'EOF'
{messages}
EOF
    exit 101 ;;
*)
    mkdir -p "$CARGO_TARGET_DIR/release"
    made="$CARGO_TARGET_DIR/release/parity-emitter"
    printf '#!/bin/sh\\necho \\047{identity}\\047\\n' >"$made"
    chmod 755 "$made"
    echo '{{"reason": "compiler-artifact", "target": {{"name": "parity-emitter"}}, "executable": "'"$made"'"}}' ;;
esac
"""


@pytest.mark.parametrize(
    ("pattern", "file", "missing", "builds"),
    [
        # As a whole; without any feature; without the one that is named, or each until it is found; and as it stays.
        ("*quantized*", "src/quantized.rs", {"quantized"}, 4),
        ("*quantized*", "src/backend.rs", {"quantized"}, 7),
        ("*sae*", "src/sae/mod.rs", {"calls", "sae"}, 4),
        ("*", "src/backend.rs", None, 2),
    ],
)
def test_a_feature_of_candle_mi_that_does_not_compile_costs_no_other(
    put: Cargo, tmp_path: Path, pattern: str, file: str, missing: set[str] | None, builds: int
) -> None:
    put("")
    span = {"file_name": file, "line_start": 1120, "column_start": 5, "is_primary": True}
    error = {"level": "error", "message": "cannot find value `x`", "spans": [span], "rendered": "error"}
    messages = [
        {"reason": "compiler-message", "target": {"name": "candle_mi"}, "message": one} for one in (error, ABORTING)
    ]
    lines = "\n".join(map(json.dumps, [*messages, FINISHED]))
    identity = json.dumps({"candle_mi": {"version": "0.2.2", "source": "registry"}})
    log = tmp_path / "log"
    every = ",".join(sorted(PARTS))
    script = CARGO_WITH_A_BROKEN_FEATURE.format(
        every=every, log=log, pattern=pattern, messages=lines, identity=identity
    )
    (tmp_path / "bin" / "cargo").write_text(script)
    if missing is None:
        assert f"does not compile: {file}:1120:5: error" in str(fails("0.2.2", tmp_path / "cache"))
    else:
        built = builder.build(parse_candidate("0.2.2"), tmp_path / "cache", print)
        assert built.missing == dict.fromkeys(missing, f"{file}:1120:5: error: cannot find value `x`")
    assert len(log.read_text().splitlines()) <= builds


def test_every_feature_that_a_case_needs_is_one_that_the_emitter_switches_on() -> None:
    assert {feature for case in load_cases() for feature in case.features} <= {*SWITCHED.values()}
    assert set(LANES) == {"mmap"} and not set(LANES) & set(PARTS)


def test_a_release_is_built_without_the_features_that_it_does_not_have(put: Cargo, tmp_path: Path) -> None:
    put("")
    old, new = (plan_of(parse_candidate(version), tmp_path) for version in ("0.1.12", "0.1.13"))
    assert (old.absent, new.absent) == (
        ("diffusion", "fused-attn", "quantized", "training"),
        ("diffusion", "fused-attn", "training"),
    )
    features = tomllib.loads(old.manifest)["features"]
    assert features["default"] == ["calls", "clt", "rwkv", "rwkv-tokenizer", "sae", "stoicheia", "tokens"]
    assert features["quantized"] == []
    assert features["mmap"] == ["candle-mi/mmap"]
    crate = write_crate(tmp_path / "crate")
    manifest = crate / "Cargo.toml"
    head = manifest.read_text().partition("[features]")[0]
    for offered, parts in (
        ("sae clt stoicheia", {"calls", "clt", "sae", "stoicheia", "tokens"}),
        ("mmap", {"mmap", "tokens"}),
    ):
        manifest.write_text(f"{head}[features]\n" + "".join(f"{feature} = []\n" for feature in offered.split()))
        assert plan_of(parse_candidate(f"path:{crate}"), tmp_path).absent == tuple(sorted({*PARTS, *LANES} - parts))
    with pytest.raises(builder.AbsentFeatureError, match=r"0\.0\.1 has no feature mmap"):
        builder.build(parse_candidate("0.0.1"), tmp_path / "cache", print, ("mmap",))


ABORTING = {"level": "error", "message": "aborting due to 2 previous errors", "spans": [], "rendered": ""}


# --- progress -------------------------------------------------------------------------------------


def test_progress_names_crates_and_steps(put: Cargo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cargo, "HEARTBEAT_SECONDS", 0.2)
    repeated = tmp_path / "repeated"

    class Said(list[str]):
        def append(self, line: str) -> None:
            super().append(line)
            if self.count("cargo: step 3 of 177: a, b") > 1:
                repeated.touch()

    bar = "    Building [=> ] 3/177: a, b   \\r" * 100
    silent = f"n=0; while [ ! -e {repeated} ] && [ $n -lt 600 ]; do sleep 0.05; n=$((n + 1)); done"
    later = "printf '    Building [==>] 4/177: b   \\r' >&2"
    put("error: x", before=f"printf '   Compiling a v1\\n{bar}' >&2; {silent}; {later}")
    said = Said()
    told = str(fails("0.2.2", tmp_path / "cache", said))
    steps = [line for line in said if "step" in line]
    assert steps[0] == "cargo: step 3 of 177: a, b" and steps[-1] == "cargo: step 4 of 177: b"
    assert 3 <= len(steps) <= 50, "repeated while cargo is silent, but not for each redrawing of its bar"
    assert "Compiling a v1" in log_of(told) and "Building" not in log_of(told)
