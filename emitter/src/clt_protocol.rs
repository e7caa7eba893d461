//! The functions of a transcoder that can be called, and their arguments.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A function of the transcoder in the directory `transcoder`; a string is a key of the inputs.
#[cfg_attr(not(feature = "clt"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum CltCall {
    CltConfig {
        transcoder: PathBuf,
    },
    CltEncodePreActivation {
        transcoder: PathBuf,
        x: String,
        layer: usize,
    },
    CltEncode {
        transcoder: PathBuf,
        x: String,
        layer: usize,
        /// The layer whose encoder is loaded before.
        #[serde(default)]
        after: Option<usize>,
    },
    CltTopK {
        transcoder: PathBuf,
        x: String,
        layer: usize,
        k: usize,
    },
    /// Of every feature of a layer.
    CltDecoderVector {
        transcoder: PathBuf,
        layer: usize,
        target: usize,
        /// Whether the vectors lie in the steering cache.
        #[serde(default)]
        cached: bool,
    },
    CltDecoderMatrix {
        transcoder: PathBuf,
        layer: usize,
        target: usize,
    },
    CltExtractDecoderVectors {
        transcoder: PathBuf,
        /// Layer and index.
        features: Vec<(usize, usize)>,
        target: usize,
    },
    CltLoadSkipMatrix {
        transcoder: PathBuf,
        layer: usize,
    },
    CltInject {
        transcoder: PathBuf,
        residual: String,
        /// Layer, index and target layer.
        features: Vec<(usize, usize, usize)>,
        position: usize,
        strength: f32,
    },
    CltScoreFeatures {
        transcoder: PathBuf,
        direction: String,
        scoring: Scoring,
    },
    CltScoreFeaturesBatch {
        transcoder: PathBuf,
        directions: Vec<String>,
        scoring: Scoring,
    },
    CltAttributionGraph {
        transcoder: PathBuf,
        direction: String,
        scoring: Scoring,
        /// The smallest size of a score that is kept.
        least: f32,
    },
}

/// How features are scored.
#[cfg_attr(not(feature = "clt"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scoring {
    pub target: usize,
    /// How many of the highest scores are listed.
    pub k: usize,
    pub cosine: bool,
}

impl CltCall {
    #[cfg_attr(not(feature = "clt"), allow(dead_code))]
    pub fn transcoder(&self) -> &Path {
        match self {
            Self::CltConfig { transcoder }
            | Self::CltEncodePreActivation { transcoder, .. }
            | Self::CltEncode { transcoder, .. }
            | Self::CltTopK { transcoder, .. }
            | Self::CltDecoderVector { transcoder, .. }
            | Self::CltDecoderMatrix { transcoder, .. }
            | Self::CltExtractDecoderVectors { transcoder, .. }
            | Self::CltLoadSkipMatrix { transcoder, .. }
            | Self::CltInject { transcoder, .. }
            | Self::CltScoreFeatures { transcoder, .. }
            | Self::CltScoreFeaturesBatch { transcoder, .. }
            | Self::CltAttributionGraph { transcoder, .. } => transcoder,
        }
    }
}
