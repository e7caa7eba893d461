//! What of diffusion models can be called, and the arguments.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A function of the model in the directory `diffusion`; a string is a key of the inputs.
#[cfg_attr(not(feature = "diffusion"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", deny_unknown_fields)]
pub enum DiffusionCall {
    #[serde(rename = "diffusion_forward")]
    Forward {
        diffusion: PathBuf,
        tokens: Vec<Vec<u32>>,
        #[serde(default)]
        capture: Capture,
        #[serde(default)]
        self_conditioning: Option<Vec<Vec<u32>>>,
        #[serde(default)]
        edit: Option<DiffusionEdit>,
        /// Whether `MIModel::from_pretrained` reads the directory.
        #[serde(default)]
        pretrained: bool,
    },
    #[serde(rename = "diffusion_project")]
    Project { diffusion: PathBuf, hidden: String },
    #[serde(rename = "diffusion_embedding")]
    Embedding { diffusion: PathBuf, token: u32 },
    /// Steps of the sampler, which takes the likeliest token.
    #[serde(rename = "diffusion_sample")]
    Sample {
        diffusion: PathBuf,
        prompt: Vec<u32>,
        seq_len: usize,
        /// The token that stands for what is masked.
        mask: u32,
        #[serde(default = "one")]
        temperature: f32,
        #[serde(default)]
        seed: u64,
        #[serde(default = "once")]
        steps: usize,
    },
}

#[cfg_attr(not(feature = "diffusion"), allow(dead_code))]
fn once() -> usize {
    1
}

#[cfg_attr(not(feature = "diffusion"), allow(dead_code))]
fn one() -> f32 {
    1.0
}

/// Which hooks are captured.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capture {
    #[default]
    All,
    /// Those outside of the attention.
    Stream,
    Nothing,
}

#[cfg_attr(not(feature = "diffusion"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DiffusionEdit {
    Replace {
        hook: String,
        tensor: String,
    },
    Add {
        hook: String,
        tensor: String,
    },
    PatchAt {
        hook: String,
        position: usize,
        tensor: String,
    },
    Scale {
        hook: String,
        factor: f64,
    },
    Zero {
        hook: String,
    },
    Knockout {
        hook: String,
        /// Query and key.
        edges: Vec<(usize, usize)>,
    },
}

impl DiffusionCall {
    #[cfg_attr(not(feature = "diffusion"), allow(dead_code))]
    pub fn directory(&self) -> &Path {
        match self {
            Self::Forward { diffusion, .. }
            | Self::Project { diffusion, .. }
            | Self::Embedding { diffusion, .. }
            | Self::Sample { diffusion, .. } => diffusion,
        }
    }
}
