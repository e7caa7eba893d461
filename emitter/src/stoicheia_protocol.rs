//! The functions of candle-mi's module `stoicheia` that can be called, and their arguments.

use std::path::PathBuf;

use serde::Deserialize;

#[cfg_attr(not(feature = "stoicheia"), allow(dead_code))]
#[derive(Debug, Clone, Copy, Deserialize)]
pub enum Task {
    #[serde(rename = "2nd_argmax")]
    SecondArgmax,
    #[serde(rename = "argmedian")]
    Argmedian,
    #[serde(rename = "median")]
    Median,
    #[serde(rename = "longest_cycle")]
    LongestCycle,
}

/// The file of a network and the config that it is loaded with; what is `None` is as the task has it.
#[cfg_attr(not(feature = "stoicheia"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub path: PathBuf,
    pub task: Task,
    pub hidden_size: usize,
    pub seq_len: usize,
    #[serde(default)]
    pub num_layers: Option<usize>,
    #[serde(default)]
    pub num_heads: Option<usize>,
    #[serde(default)]
    pub input_range: Option<usize>,
}

#[cfg_attr(not(feature = "stoicheia"), allow(dead_code))]
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EditKind {
    Replace,
    Add,
    Knockout,
    Scale,
    Zero,
    PatchAt,
}

/// A hook point, a kind, the factor or the position (0 where there is none), and a key of the inputs (or "").
pub type NetworkEdit = (String, EditKind, f64, String);

/// A function; a string is a key of the inputs. `x` are a network's inputs, a row for each.
#[cfg_attr(not(feature = "stoicheia"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum StoicheiaCall {
    /// Layers, width, outputs and heads as the backend has them, outputs and parameters as the config has them.
    NetworkConfig {
        network: Network,
    },
    NetworkWeights {
        network: Network,
    },
    /// The output without captures, and with all of them the output and the tensors at the hook points.
    NetworkForward {
        network: Network,
        x: String,
        #[serde(default)]
        edits: Vec<NetworkEdit>,
    },
    NetworkProject {
        network: Network,
        x: String,
    },
    ForwardFast {
        network: Network,
        x: String,
    },
    ForwardFastAblated {
        network: Network,
        x: String,
        ablated: Vec<usize>,
    },
    /// Of one input.
    ForwardFastTraced {
        network: Network,
        x: String,
    },
    Accuracy {
        network: Network,
        x: String,
        targets: Vec<u32>,
    },
    ArgmaxF32 {
        x: String,
    },
    AblateNeurons {
        network: Network,
        x: String,
        targets: Vec<u32>,
    },
    AblateNeuronPairs {
        network: Network,
        x: String,
        targets: Vec<u32>,
    },
    /// And the outputs of the standardized network.
    StandardizeRnn {
        network: Network,
        x: String,
    },
    /// Of pre-activations `[T, H]`.
    ActivationPattern {
        x: String,
    },
    ClassifyRegions {
        network: Network,
        x: String,
    },
    /// In the region of an input, or of pre-activations `[T, H]`.
    RegionLinearMap {
        network: Network,
        #[serde(default)]
        x: Option<String>,
        #[serde(default)]
        pre: Option<String>,
    },
    ProbeNeurons {
        network: Network,
        n_probes: usize,
    },
    SurpriseAccounting {
        network: Network,
        n_samples: usize,
        /// What the estimator always predicts; without it the estimator is the oracle.
        #[serde(default)]
        class: Option<u32>,
    },
    /// The value at the position that is predicted; of other tasks the prediction.
    OraclePredict {
        task: Task,
        x: String,
    },
    /// The value at the position that is found.
    SecondArgmax {
        x: String,
    },
    /// The value at the position that is found.
    Argmedian {
        x: String,
    },
    Median {
        x: String,
    },
    LongestCycle {
        x: String,
        /// Whether the integers are signed, of 64 bits.
        signed: bool,
    },
}
