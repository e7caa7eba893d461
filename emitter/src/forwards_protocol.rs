//! What a request for forwards holds: forward passes of one model, one after another, of which digests are wanted.

use std::path::PathBuf;

use serde::Deserialize;

use crate::protocol::{Case, Edit, Loader, Precision, Recurrent, SaeRequest};

pub const FORWARDS_REQUEST: &str = "candle-mi-parity/forward/1";

/// Forward passes as people run them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardsRequest {
    /// Checked before the rest (see [`crate::request::parse`]); kept so that the key is known.
    #[serde(rename = "format")]
    pub _format: String,
    pub case: Case,
    pub model_dir: PathBuf,
    /// Token ids, `[B][T]`, of every forward that has none of its own.
    pub tokens: Vec<Vec<u32>>,
    pub dtype: Precision,
    pub device: String,
    pub sae: Option<SaeRequest>,
    /// A safetensors file that the edits and the feedback take tensors from.
    pub inputs: Option<PathBuf>,
    pub edits: Vec<Edit>,
    #[serde(default)]
    pub recurrent: Option<Recurrent>,
    pub forwards: Vec<Wanted>,
    /// SHA-256 of logits that the caller holds; all others are written beside the answer.
    pub known: Vec<String>,
    pub out: PathBuf,
}

/// One forward pass.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    pub name: String,
    /// Hook points that are captured, and no others: not even the edited ones.
    pub captures: Vec<String>,
    /// Other token ids, `[B][T]`, with which there are no edits.
    pub tokens: Option<Vec<Vec<u32>>>,
    /// Whether the request's edits are made, and its layers run several times.
    pub edited: bool,
    /// Whether the model is loaded from its files before.
    pub anew: bool,
    #[serde(default)]
    pub loader: Loader,
}
