//! What goes in and out by line: requests and the replies to them, as serde types that know nothing of candle. Everything in a request is untrusted.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The formats of a request, by what it asks for; that of direct calls is in `call_protocol`.
pub const TRACE_REQUEST: &str = "candle-mi-parity/request/1";
pub const TOKENIZE_REQUEST: &str = "candle-mi-parity/tokenize/1";

/// One forward pass: what to run, what to capture, where to write.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Checked before the rest (see [`crate::request::parse`]); kept so that the key is known.
    #[serde(rename = "format")]
    pub _format: String,
    pub case: Case,
    pub model_dir: PathBuf,
    /// Token ids, `[B][T]`.
    pub tokens: Vec<Vec<u32>>,
    /// Hook points in candle-mi's spelling, in execution order.
    pub captures: Vec<String>,
    pub logits: bool,
    pub dtype: Precision,
    pub device: String,
    #[serde(default)]
    pub sae: Option<SaeRequest>,
    /// A safetensors file that `sae_input`, `project` and the edits take tensors from.
    #[serde(default)]
    pub inputs: Option<PathBuf>,
    /// Key in `inputs`: a residual `[B,T,d]` for the SAE alone.
    #[serde(default)]
    pub sae_input: Option<String>,
    #[serde(default)]
    pub edits: Vec<Edit>,
    /// Layers that are run several times.
    #[serde(default)]
    pub recurrent: Option<Recurrent>,
    #[serde(default)]
    pub loader: Loader,
    /// Keys in `inputs`: residuals `[B,T,d]` or `[B,d]` that are taken to logits by themselves.
    #[serde(default)]
    pub project: Vec<String>,
    /// Dequantized weights of a quantized checkpoint, by their names in the file; needs [`Loader::Pretrained`].
    #[serde(default)]
    pub weights: Vec<String>,
    pub out: PathBuf,
}

/// Copied into the header; never interpreted.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    pub id: String,
    pub digest: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaeRequest {
    /// A `.npz` file, or a directory with `cfg.json` and weights.
    pub path: PathBuf,
    pub layer: usize,
    /// The hook point whose tensor is encoded.
    pub hook: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    Float32,
    BFloat16,
    Float16,
}

impl Precision {
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

/// How a model directory becomes a model: candle-mi is given the config, by its family's own parser or for a family that
/// it does not know by what the tensors are called, and the weights; or it reads the directory itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loader {
    /// `TransformerConfig::from_hf_config`.
    #[default]
    Hf,
    /// `TransformerConfig::from_hf_config_auto`.
    Auto,
    /// `MIModel::from_pretrained`, which takes float32 only.
    Pretrained,
}

/// One intervention; `tensor` is a key in `inputs`.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Edit {
    Replace {
        hook: String,
        tensor: String,
    },
    Add {
        hook: String,
        tensor: String,
    },
    /// Overwrites one position with a vector `[d]`.
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
    /// candle-mi's own mask of a `KnockoutSpec`.
    Knockout {
        hook: String,
        spec: Attention,
    },
    /// candle-mi's own `apply_steering` of a `SteeringSpec`, on the pattern that a run before it gave.
    Steer {
        hook: String,
        how: Steering,
        value: f32,
        spec: Attention,
    },
    /// The request's SAE's own `prepare_hook_injection`; features are pairs of index and strength.
    Inject {
        hook: String,
        position: usize,
        features: Vec<(usize, f32)>,
    },
    /// A transcoder's own `prepare_hook_injection` for the hook's layer; features are pairs of layer and index.
    CltInject {
        hook: String,
        transcoder: PathBuf,
        features: Vec<(usize, usize)>,
        position: usize,
        strength: f32,
    },
    /// candle-mi's `StateKnockoutSpec`.
    StateKnockout {
        hook: String,
        at: Vec<usize>,
        #[serde(default)]
        layers: Option<Layers>,
    },
    /// candle-mi's `StateSteeringSpec`.
    StateSteer {
        hook: String,
        at: Vec<usize>,
        #[serde(default)]
        layers: Option<Layers>,
        factor: f32,
    },
}

/// The layers of a state's specification, the first and last of a range or all; without it, the layer of the edit's hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    Range(usize, usize),
    Named(All),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum All {
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Steering {
    Scale,
    SetValue,
}

/// Entries of the attention matrix, by candle-mi's four ways of naming them; no `heads` is all of them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// First and last layer of the specification's range; without it, the layer of the edit's hook.
    #[serde(default)]
    pub layers: Option<(usize, usize)>,
    #[serde(default)]
    pub heads: Option<Vec<usize>>,
    #[serde(default)]
    pub edges: Vec<(usize, usize)>,
    #[serde(default)]
    pub from_positions: Vec<usize>,
    #[serde(default)]
    pub to_positions: Vec<usize>,
    #[serde(default)]
    pub from_to: Vec<FromTo>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FromTo {
    pub query: usize,
    pub keys: Vec<usize>,
}

/// candle-mi's `RecurrentPassSpec`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recurrent {
    /// First and last layer.
    pub layers: (usize, usize),
    pub depth: usize,
    pub feedback: Vec<Feedback>,
}

/// A vector `[d]` that is added at one position; `tensor` is a key in `inputs`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Feedback {
    pub position: usize,
    pub strength: f32,
    pub tensor: String,
}

impl Edit {
    pub fn hook(&self) -> &str {
        match self {
            Self::Replace { hook, .. }
            | Self::Add { hook, .. }
            | Self::PatchAt { hook, .. }
            | Self::Scale { hook, .. }
            | Self::Zero { hook }
            | Self::Knockout { hook, .. }
            | Self::Steer { hook, .. }
            | Self::Inject { hook, .. }
            | Self::CltInject { hook, .. }
            | Self::StateKnockout { hook, .. }
            | Self::StateSteer { hook, .. } => hook,
        }
    }

    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::Replace { tensor, .. }
            | Self::Add { tensor, .. }
            | Self::PatchAt { tensor, .. } => Some(tensor),
            Self::Scale { .. }
            | Self::Zero { .. }
            | Self::Knockout { .. }
            | Self::Steer { .. }
            | Self::Inject { .. }
            | Self::CltInject { .. }
            | Self::StateKnockout { .. }
            | Self::StateSteer { .. } => None,
        }
    }

    pub fn position(&self) -> Option<usize> {
        match self {
            Self::PatchAt { position, .. }
            | Self::Inject { position, .. }
            | Self::CltInject { position, .. } => Some(*position),
            _ => None,
        }
    }
}

/// Texts for candle-mi's own tokenizer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// Checked before the rest (see [`crate::request::parse`]); kept so that the key is known.
    #[serde(rename = "format")]
    pub _format: String,
    /// A `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// With `pretrained`, the tokenizer is that of the model in the same directory.
    #[serde(default)]
    pub loader: Loader,
    pub texts: Vec<String>,
    pub out: PathBuf,
}

/// One reply line.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Reply {
    Done {
        /// `None` for a tokenising request, which has none.
        case: Option<String>,
        ok: bool,
        trace: PathBuf,
    },
    Failed {
        /// `None` when the line was too broken to name its case.
        case: Option<String>,
        ok: bool,
        error: String,
        kind: &'static str,
    },
}
