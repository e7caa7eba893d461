//! Reads the `Cargo.lock` beside this file and hands candle-mi's identity to the program.
//!
//! The lock is what cargo builds from, so a binary cannot claim a candle-mi that it was not linked with: what the
//! builder says in `PARITY_*` (a digest over a local tree) is used only where the lock has nothing to say.

use std::fs;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=Cargo.lock");
    println!("cargo:rerun-if-env-changed=PARITY_TREE_DIGEST");
    println!("cargo:rerun-if-env-changed=PARITY_REVISION");
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| ".".to_owned());
    let lock = fs::read_to_string(Path::new(&directory).join("Cargo.lock")).unwrap_or_default();
    let Some(candle_mi) = package(&lock, "candle-mi") else {
        println!("cargo:warning=no candle-mi in Cargo.lock");
        std::process::exit(1);
    };
    // What a release lacks is compiled out, and answered as absent or refused.
    let version = field(&candle_mi, "version").unwrap_or_default();
    for (name, first) in [
        ("since_0_1_8", [0, 1, 8]),
        ("since_0_1_9", [0, 1, 9]),
        ("since_0_1_11", [0, 1, 11]),
        ("since_0_1_14", [0, 1, 14]),
        ("since_0_1_21", [0, 1, 21]),
        ("since_0_1_24", [0, 1, 24]),
        ("since_0_2_2", [0, 2, 2]),
    ] {
        println!("cargo:rustc-check-cfg=cfg({name})");
        if numbers(&version) >= first.to_vec() {
            println!("cargo:rustc-cfg={name}");
        }
    }
    // Of two versions, the emitter could dequantize with another than candle-mi does.
    println!("cargo:rustc-check-cfg=cfg(anamnesis_of_candle_mi)");
    if lock.matches("name = \"anamnesis\"\n").count() == 1 {
        println!("cargo:rustc-cfg=anamnesis_of_candle_mi");
    }
    let source = field(&candle_mi, "source").unwrap_or_default();
    let (kind, revision, digest) = if source.starts_with("registry+") {
        ("registry", String::new(), String::new())
    } else if source.starts_with("git+") {
        // cargo writes `git+URL?rev=…#<full commit>`.
        let revision = source
            .rsplit_once('#')
            .map_or("", |(_, commit)| commit)
            .to_owned();
        ("git", revision, String::new())
    } else {
        let from_env = |name: &str| std::env::var(name).unwrap_or_default();
        (
            "path",
            from_env("PARITY_REVISION"),
            from_env("PARITY_TREE_DIGEST"),
        )
    };
    let candle = package(&lock, "candle-core")
        .and_then(|block| field(&block, "version"))
        .unwrap_or_default();
    for (name, value) in [
        ("CANDLE_MI_VERSION", version),
        ("CANDLE_MI_SOURCE", kind.to_owned()),
        (
            "CANDLE_MI_CHECKSUM",
            field(&candle_mi, "checksum").unwrap_or_default(),
        ),
        ("CANDLE_MI_REVISION", revision),
        ("CANDLE_MI_TREE_DIGEST", digest),
        ("CANDLE_VERSION", candle),
        ("PATCHED", patched(&lock).to_owned()),
    ] {
        println!("cargo:rustc-env=PARITY_{name}={value}");
    }
}

/// The crate that is not what the registry holds under its name: a patch has no source in the lock.
fn patched(lock: &str) -> &'static str {
    const DOWNLOADER: &str = "hf-fetch-model";
    match package(lock, DOWNLOADER) {
        Some(block) if field(&block, "source").is_none() => DOWNLOADER,
        _ => "",
    }
}

/// `1.2.3-alpha` as `[1, 2, 3]`; a part that is not a number counts as 0.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(['-', '+'])
        .next()
        .unwrap_or_default()
        .split('.')
        .map(|part| part.parse().unwrap_or(0))
        .collect()
}

/// The `[[package]]` block of `name`, as its lines.
fn package(lock: &str, name: &str) -> Option<Vec<String>> {
    let wanted = format!("name = \"{name}\"");
    lock.split("[[package]]")
        .map(|block| {
            block
                .lines()
                .map(|line| line.trim().to_owned())
                .collect::<Vec<_>>()
        })
        .find(|lines| lines.contains(&wanted))
}

/// The string value of `key` in a block.
fn field(block: &[String], key: &str) -> Option<String> {
    let start = format!("{key} = \"");
    block.iter().find_map(|line| {
        line.strip_prefix(&start)
            .and_then(|rest| rest.strip_suffix('"'))
            .map(str::to_owned)
    })
}
