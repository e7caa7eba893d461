//! What of training can be called: the optimizer, the average of weights, and gradients of a tracked forward pass.

use std::path::PathBuf;

use serde::Deserialize;

/// A string is a key of the inputs.
#[cfg_attr(not(feature = "training"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum TrainingCall {
    AdamwStep(Optimized),
    FoldEma {
        shadows: Vec<String>,
        /// The parameters of each fold.
        steps: Vec<Vec<String>>,
        decay: f64,
    },
}

/// Steps of the optimizer.
#[cfg_attr(not(feature = "training"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimized {
    pub parameters: Vec<String>,
    /// Of each step, the gradient of each parameter; an empty string for none.
    pub steps: Vec<Vec<String>>,
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Number of steps after which the state is handed to a new optimizer.
    #[serde(default)]
    pub restored_after: Option<usize>,
    /// Number of steps after which the optimizer is handed its own state of the first parameter.
    #[serde(default)]
    pub partly_restored_after: Option<usize>,
    #[serde(default)]
    pub later: Option<Later>,
}

/// Another learning rate, after a number of steps.
#[cfg_attr(not(feature = "training"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Later {
    pub after: usize,
    pub lr: f64,
}

/// Gradients of the sum of all logits times `cotangent` `[B,T,V]`.
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum GradientCall {
    TrackedForward {
        model: PathBuf,
        tokens: Vec<Vec<u32>>,
        cotangent: String,
        /// Hooks at which a variable of zeros is added.
        #[serde(default)]
        hooks: Vec<String>,
        /// Names of the weights that are variables.
        #[serde(default)]
        weights: Vec<String>,
    },
}
