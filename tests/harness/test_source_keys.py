"""The keys that candle-mi's own source reads."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from candle_mi_parity.candidate.source_keys import FEATURES, keys_in, source_directory, source_keys
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.errors import ParityError
from candle_mi_parity.spec.paths import EMITTER, cache_root
from tests.support.crate import touch, write_crate

CONFIG = """
//! let json: Value = from_str(r#"{"documented": 1}"#); json.get("documented")
const DEFAULT_THETA: f64 = 10_000.0;
fn parse(config: &Value, weights: &HashMap<String, Tensor>) -> Result<Config> {
    let eps = get_f64_or(config, "rms_norm_eps", 1e-5); // get_f64_or(config, "commented", 2)
    let other = crate::config::get_f64_or(
        &config,
        "rms_norm_eps",
        1e-6,
    );
    let theta = get_f64_or(config, "rope_theta", DEFAULT_THETA);
    let heads = get_usize(config, "num_attention_heads")?;
    let groups = get_usize_or(config, "num_key_value_heads", heads);
    let layers = get_usize_in(config, "n_layer", "rwkv")?;
    let tied = config["tie_word_embeddings"].as_bool().unwrap_or(true);
    let window = config
        .get("sliding_window")
        .and_then(Value::as_u64)
        .or_else(|| config.get("window").and_then(Value::as_u64))
        .unwrap_or(4096);
    let scalar = get_optional_f64(config, "query_pre_attn_scalar").or(Some(-256.0));
    let act = config.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
    let deep = config.pointer("/text_config/hidden_size");
    let weight = weights.get("lm_head");
    let vector = vb.get(hidden_size, "bias")?;
    let Some(rs) = config.get("rope_scaling").or_else(|| config.get("rope_parameters")) else { return Ok(None) };
    let factor = get_f64_or(rs, "factor", 8.0);
    let index: Value = read()?;
    let map = index.get("weight_map");
}
#[cfg(test)]
mod tests {
    fn test(config: &Value) { config.get("tested"); }
}
"""
SAE = """
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawSaeConfig {
    pub d_in: usize,
    #[serde(rename = "hook", alias = "hook_name", alias = "hook_point")]
    named: Option<String>,
    #[serde(default)]
    apply_b_dec_to_input: bool,
    #[serde(default = "one")]
    scale: f64,
    #[serde(default)]
    activation_fn_kwargs: Option<serde_json::Value>,
}
#[derive(Deserialize)]
struct Row {
    label: String,
}
fn one() -> f64 {
    1.0
}
fn k(kwargs: Option<&serde_json::Value>) -> Option<u64> {
    kwargs.and_then(|v| v.get("k")).and_then(Value::as_u64)
}
"""


def test_the_keys_of_a_config_with_their_defaults() -> None:
    assert keys_in({Path("config.rs"): CONFIG}).config == {
        "hidden_act": {"silu"},
        "n_layer": set(),
        "num_attention_heads": set(),
        "num_key_value_heads": set(),
        "query_pre_attn_scalar": {-256.0},
        "rms_norm_eps": {1e-5, 1e-6},
        "rope_parameters": set(),
        "rope_parameters.factor": {8.0},
        "rope_scaling": set(),
        "rope_scaling.factor": {8.0},
        "rope_theta": {10_000.0},
        "sliding_window": {4096},
        "text_config.hidden_size": set(),
        "tie_word_embeddings": {True},
        "window": {4096},
    }


def test_the_keys_that_serde_reads() -> None:
    found = keys_in({Path("sae/mod.rs"): SAE})
    assert found.config == {}
    assert found.sae == {
        "activation_fn_kwargs": set(),
        "activation_fn_kwargs.k": set(),
        "apply_b_dec_to_input": {False},
        "d_in": set(),
        "hook": set(),
        "hook_name": set(),
        "hook_point": set(),
        "scale": {1.0},
    }


def test_modules_of_other_features_are_not_searched(tmp_path: Path) -> None:
    crate = write_crate(tmp_path / "crate")
    switched = {"rwkv": "pub mod rwkv", "diffusion": "mod other"}
    lib = "".join(f'#[cfg(feature = "{feature}")]\n{module};\n' for feature, module in switched.items())
    lib += '#[cfg(any(feature = "clt", feature = "sae"))]\nmod both;\n'
    touch(crate / "src" / "lib.rs", lib + "mod config;")
    for name in ("rwkv/config.rs", "other/config.rs", "both.rs", "config.rs"):
        touch(crate / "src" / name, f'fn f(config: &Value) {{ config.get("of_{name[:4]}"); }}')
    found = source_keys(parse_candidate(f"path:{crate}"), tmp_path)
    assert found.config.keys() == {"of_both", "of_conf"} and found.rwkv.keys() == {"of_rwkv"}


def test_without_a_source_or_a_key_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crate = write_crate(tmp_path / "crate")

    def fails(spec: str, error: str) -> None:
        with pytest.raises(ParityError, match=error):
            source_keys(parse_candidate(spec), tmp_path / "cache")

    fails(f"path:{crate}", r"crate/src: no key of config\.json was found in the source of candle-mi in ")
    (crate / "src" / "lib.rs").unlink()
    fails(f"path:{crate}", r"no source of candle-mi in .*/crate/src/lib\.rs does not exist")
    fails("stored:0.2.2", "stored:0.2.2 has no source: expected a version, path:DIR or git:URL@REV")
    fails("torch", "torch has no source")
    tools = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(tools))
    fails("0.2.2", "no rustc on PATH: install a Rust toolchain")
    touch(tools / "rustc", "#!/bin/sh\n")
    touch(tools / "cargo", "#!/bin/sh\necho 'error: failed to download' >&2\nexit 101\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    fails("0.2.2", "cargo finds no source of candle-mi 0.2.2: error: failed to download")


@pytest.mark.rust
def test_the_keys_of_the_real_release() -> None:
    if shutil.which("cargo") is None:
        pytest.skip("no cargo on PATH: install a Rust toolchain")
    candidate = parse_candidate("0.2.2")
    found = source_keys(candidate, cache_root())
    assert found.config["rope_theta"] == {10_000.0, 1_000_000.0}
    assert found.config["rms_norm_eps"] == {1e-5, 1e-6}
    inner = {"factor", "type", "rope_type", "low_freq_factor", "long_factor", "original_max_position_embeddings"}
    assert {f"{outer}.{key}" for outer in ("rope_scaling", "rope_parameters") for key in inner} < found.config.keys()
    assert {"d_in", "d_sae", "architecture", "activation_fn_str", "activation_fn_kwargs.k"} < found.sae.keys()
    assert found.rwkv["head_size_divisor"] == {8} and "rope_theta" not in found.rwkv
    assert {"head_size_divisor", "decay_low_rank_dim", "norm_eps"}.isdisjoint(found.config)
    # candle-mi lists what it reads, for a report of its own.
    source = (source_directory(candidate, cache_root()) / "config.rs").read_text("utf-8")
    listed = re.search(r"const CONSUMED_CONFIG_KEYS: &\[&str\] = &\[(.*?)\];", source, re.DOTALL)
    assert listed
    told = set(re.findall(r'^\s*"(\w+)",$', listed[1], re.MULTILINE))
    assert len(told) == 25 and told <= found.config.keys()
    more = {"original_max_position_embeddings", "quantization_config"}
    assert {key for key in found.config if "." not in key} - told == more, "which its list lacks"


def test_the_features_are_those_of_the_emitter() -> None:
    manifest = tomllib.loads((EMITTER / "Cargo.toml").read_text("utf-8"))
    assert {*manifest["dependencies"]["candle-mi"]["features"], "sae", "rwkv"} == FEATURES
