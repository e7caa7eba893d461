//! Who computed the numbers: fixed when the program was built (see `build.rs`), never taken from a request.

use serde::Serialize;

/// The part of a trace's header that is the same for every case.
#[derive(Debug, Serialize)]
pub struct Identity {
    pub emitter: &'static str,
    pub candle_mi: CandleMi,
    pub candle: &'static str,
    /// candle-mi's, sorted.
    pub features: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
pub struct CandleMi {
    pub version: &'static str,
    /// `registry`, `path` or `git`.
    pub source: &'static str,
    pub checksum: Option<&'static str>,
    pub revision: Option<&'static str>,
    pub tree_digest: Option<&'static str>,
}

/// What `--version` says.
#[derive(Debug, Serialize)]
pub struct Version {
    #[serde(flatten)]
    pub identity: Identity,
    /// Crates that are replaced by a local stand-in of the same name; everything else is as published. Not part of a
    /// trace: no number depends on them.
    pub patched: Vec<&'static str>,
}

impl Version {
    pub fn of_this_build() -> Self {
        Self {
            identity: Identity::of_this_build(),
            patched: told(env!("PARITY_PATCHED")).into_iter().collect(),
        }
    }
}

impl Identity {
    pub fn of_this_build() -> Self {
        let features = [
            ("clt", cfg!(feature = "clt")),
            ("cuda", cfg!(feature = "cuda")),
            ("diffusion", cfg!(feature = "diffusion")),
            ("fused-attn", cfg!(feature = "fused-attn")),
            ("mmap", cfg!(feature = "mmap")),
            ("quantized", cfg!(feature = "quantized")),
            ("rwkv", cfg!(feature = "rwkv")),
            ("sae", cfg!(feature = "sae")),
            ("training", cfg!(feature = "training")),
            ("transformer", true),
        ];
        Self {
            emitter: env!("CARGO_PKG_VERSION"),
            candle_mi: CandleMi {
                version: env!("PARITY_CANDLE_MI_VERSION"),
                source: env!("PARITY_CANDLE_MI_SOURCE"),
                checksum: told(env!("PARITY_CANDLE_MI_CHECKSUM")),
                revision: told(env!("PARITY_CANDLE_MI_REVISION")),
                tree_digest: told(env!("PARITY_CANDLE_MI_TREE_DIGEST")),
            },
            candle: env!("PARITY_CANDLE_VERSION"),
            features: features
                .into_iter()
                .filter_map(|(name, built)| built.then_some(name))
                .collect(),
        }
    }
}

/// `build.rs` can only hand over strings; an empty one means that there is nothing to tell.
fn told(value: &'static str) -> Option<&'static str> {
    (!value.is_empty()).then_some(value)
}
