//! What a request for direct calls holds: the functions of candle-mi that can be called, and their arguments.

use std::path::PathBuf;

use serde::Deserialize;

use crate::clt_protocol::CltCall;
use crate::diffusion_protocol::DiffusionCall;
use crate::protocol::{Case, Precision};
use crate::rwkv_protocol::RwkvCall;
use crate::stoicheia_protocol::StoicheiaCall;
use crate::training_protocol::{GradientCall, TrainingCall};

pub const CALL_REQUEST: &str = "candle-mi-parity/call/1";

/// Direct calls of candle-mi's functions.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallRequest {
    /// Checked before the rest (see [`crate::request::parse`]); kept so that the key is known.
    #[serde(rename = "format")]
    pub _format: String,
    pub case: Case,
    /// A safetensors file; the calls' tensor arguments are keys in it.
    pub inputs: PathBuf,
    pub calls: Vec<Call>,
    pub out: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    pub id: String,
    pub run: Function,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Function {
    Measure(Measure),
    Sae(SaeCall),
    Model(ModelCall),
    Offsets(OffsetsCall),
    Cache(CacheCall),
    Clt(CltCall),
    Rwkv(RwkvCall),
    Stoicheia(StoicheiaCall),
    Diffusion(DiffusionCall),
    Gradient(GradientCall),
    Training(TrainingCall),
}

/// A function and its arguments; a string is a key of the inputs.
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum Measure {
    KlDivergence {
        baseline: String,
        other: String,
    },
    LogitDiff {
        baseline: String,
        ablated: String,
        token: u32,
    },
    TopChangedTokens {
        baseline: String,
        ablated: String,
        k: usize,
    },
    #[serde(rename = "measure_attention_to_targets")]
    AttentionToTargets {
        attention: String,
        from: usize,
        targets: Vec<usize>,
    },
    ExtractTokenProb {
        logits: String,
        token: u32,
    },
    SampleToken {
        logits: String,
        #[serde(default)]
        temperature: f32,
    },
    PcaTopK {
        matrix: String,
        k: usize,
        iterations: usize,
    },
    CreateKnockoutMask {
        heads: Option<Vec<usize>>,
        edges: Vec<(usize, usize)>,
        n_heads: usize,
        seq_len: usize,
    },
    ApplySteering {
        attention: String,
        heads: Option<Vec<usize>>,
        edges: Vec<(usize, usize)>,
        #[serde(default)]
        scale: Option<f32>,
        #[serde(default)]
        set_value: Option<f32>,
    },
    CreateCausalMask {
        seq_len: usize,
    },
    #[cfg_attr(not(since_0_1_24), allow(dead_code))]
    PositionDelta {
        direction: String,
        position: usize,
        seq_len: usize,
        /// To which the direction is rounded, and of which the answer says whether it has it.
        #[serde(default)]
        dtype: Option<Precision>,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaeFile {
    pub path: PathBuf,
    pub layer: usize,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    Auto,
    Cpu,
    Gpu,
}

/// A function of the SAE in `sae`; `x` is a key of the inputs.
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum SaeCall {
    Encode {
        sae: SaeFile,
        x: String,
    },
    EncodeWithStrategy {
        sae: SaeFile,
        x: String,
        strategy: Strategy,
    },
    EncodeSparse {
        sae: SaeFile,
        x: String,
    },
    Decode {
        sae: SaeFile,
        x: String,
    },
    Reconstruct {
        sae: SaeFile,
        x: String,
    },
    ReconstructionError {
        sae: SaeFile,
        x: String,
    },
    DecoderVector {
        sae: SaeFile,
        feature: usize,
    },
}

/// A function that runs the model in the directory `model`, or decodes with its tokenizer.
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelCall {
    GenerateRecurrent(Recur),
    BuildContrastiveDirection {
        model: PathBuf,
        prompts: Prompts,
    },
    ContrastiveIntervention(Steered),
    ForwardText {
        model: PathBuf,
        text: String,
        layer: usize,
    },
    LogitLens(Lens),
    EmbeddingVector {
        model: PathBuf,
        token: u32,
    },
}

/// A greedy continuation; each feedback is a position, a strength and a key of the inputs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recur {
    pub model: PathBuf,
    pub tokens: Vec<u32>,
    pub max_tokens: usize,
    pub stop: Vec<u32>,
    /// First and last layer.
    pub layers: (usize, usize),
    pub depth: usize,
    pub feedback: Vec<(usize, f32, String)>,
    pub sustained: bool,
}

/// Prompts whose residuals are averaged.
#[cfg_attr(not(since_0_1_24), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompts {
    pub positive: Vec<String>,
    pub negative: Vec<String>,
    pub layer: usize,
    pub strategy: Place,
    pub normalise: bool,
}

/// An intervention by the direction of `prompts`, and the prompt in which it is made.
#[cfg_attr(not(since_0_1_24), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steered {
    pub model: PathBuf,
    pub prompts: Prompts,
    pub strength: f32,
    pub text: String,
}

/// A position by its index or by candle-mi's name for it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
pub enum Place {
    At(usize),
    Named(NamedPlace),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamedPlace {
    Last,
    FirstNewline,
}

/// Logits `[L,V]`, a key of the inputs, and the token that is looked for among the `k` likeliest of each layer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lens {
    pub model: PathBuf,
    pub logits: String,
    pub k: usize,
    pub token: String,
    /// Of the rows of `logits`; all from 0 where they are not given.
    #[serde(default)]
    pub layers: Option<Vec<usize>>,
}

impl SaeCall {
    pub fn file(&self) -> &SaeFile {
        match self {
            Self::Encode { sae, .. }
            | Self::EncodeWithStrategy { sae, .. }
            | Self::EncodeSparse { sae, .. }
            | Self::Decode { sae, .. }
            | Self::Reconstruct { sae, .. }
            | Self::ReconstructionError { sae, .. }
            | Self::DecoderVector { sae, .. } => sae,
        }
    }
}

/// A function of the tokenizer in the directory `model`, or of what it makes of a text.
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum OffsetsCall {
    EncodeWithOffsets {
        model: PathBuf,
        text: String,
    },
    EncodeRawWithOffsets {
        model: PathBuf,
        text: String,
    },
    DecodeToken {
        model: PathBuf,
        token: u32,
    },
    FindTokenId {
        model: PathBuf,
        word: String,
    },
    CharToToken {
        model: PathBuf,
        text: String,
        positions: Vec<usize>,
    },
    CharToTokenFuzzy {
        model: PathBuf,
        text: String,
        positions: Vec<usize>,
    },
    CharToTokenStart {
        model: PathBuf,
        text: String,
        positions: Vec<usize>,
    },
    CharRangeToTokens {
        model: PathBuf,
        text: String,
        start: usize,
        end: usize,
    },
    TokenToCharRange {
        model: PathBuf,
        text: String,
        tokens: Vec<usize>,
    },
    LabelSpans {
        model: PathBuf,
        text: String,
        /// Name, start and end.
        spans: Vec<(String, usize, usize)>,
    },
    ConvertPositions {
        model: PathBuf,
        text: String,
        positions: Vec<usize>,
    },
}

impl OffsetsCall {
    pub fn model(&self) -> &PathBuf {
        match self {
            Self::EncodeWithOffsets { model, .. }
            | Self::EncodeRawWithOffsets { model, .. }
            | Self::DecodeToken { model, .. }
            | Self::FindTokenId { model, .. }
            | Self::CharToToken { model, .. }
            | Self::CharToTokenFuzzy { model, .. }
            | Self::CharToTokenStart { model, .. }
            | Self::CharRangeToTokens { model, .. }
            | Self::TokenToCharRange { model, .. }
            | Self::LabelSpans { model, .. }
            | Self::ConvertPositions { model, .. } => model,
        }
    }
}

/// A function of a cache of tensors, whose layers are keys of the inputs, a mask, or arithmetic on measured attention.
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum CacheCall {
    AttentionFromPosition {
        patterns: Vec<String>,
        layer: usize,
        position: usize,
        /// Of the patterns; float32 if it is left out.
        #[serde(default)]
        dtype: Option<Precision>,
    },
    AttentionToPosition {
        patterns: Vec<String>,
        layer: usize,
        position: usize,
        /// Of the patterns; float32 if it is left out.
        #[serde(default)]
        dtype: Option<Precision>,
    },
    TopAttendedPositions {
        patterns: Vec<String>,
        layer: usize,
        position: usize,
        k: usize,
    },
    GetPosition {
        layers: Vec<String>,
        layer: usize,
        position: usize,
    },
    #[serde(rename = "to_f32_vecs")]
    ToF32Vecs {
        layers: Vec<String>,
        /// Whether they are bfloat16.
        half: bool,
    },
    #[cfg_attr(not(since_0_1_24), allow(dead_code))]
    CreateBidirectionalMask { seq_len: usize },
    CreateGenerationMask {
        new_seq_len: usize,
        total_seq_len: usize,
        start_pos: usize,
        /// That is asked for, and of which the answer says whether the mask has it; float32 if it is left out.
        #[serde(default)]
        dtype: Option<Precision>,
    },
    SteeringCalibration {
        source: f32,
        baseline: f32,
        target: f32,
    },
    AttentionRatio {
        #[serde(default)]
        baseline: Option<f32>,
        steered: f32,
    },
    ScaleForTarget {
        /// Scale and level of attention.
        points: Vec<(f32, f32)>,
        target: f32,
    },
    TensorNamesFromSafetensors {
        /// A directory with `model.safetensors`.
        path: PathBuf,
    },
    TensorNamesFromIndex {
        /// A directory with `model.safetensors.index.json`.
        path: PathBuf,
    },
}
