//! One request: what to run, what to capture, where to write. Everything in it is untrusted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::call::{self, CallRequest};
use crate::error::EmitError;
use crate::tokenize::{self, TokenizeRequest};

pub const FORMAT: &str = "candle-mi-parity/request/1";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Checked before the rest (see [`parse`]); kept so that the key is known.
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
    /// Which of candle-mi's parsers reads `config.json`.
    #[serde(default)]
    pub config: ConfigReader,
    /// Keys in `inputs`: residuals `[B,T,d]` or `[B,d]` that are taken to logits by themselves.
    #[serde(default)]
    pub project: Vec<String>,
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
    pub fn dtype(self) -> DType {
        match self {
            Self::Float32 => DType::F32,
            Self::BFloat16 => DType::BF16,
            Self::Float16 => DType::F16,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::BFloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

/// candle-mi's two ways from a `config.json` to a model: by its family's own parser, or for a family that it does not
/// know by what the tensors are called.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConfigReader {
    #[default]
    Hf,
    Auto,
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
            | Self::Inject { hook, .. } => hook,
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
            | Self::Inject { .. } => None,
        }
    }

    fn position(&self) -> Option<usize> {
        match self {
            Self::PatchAt { position, .. } | Self::Inject { position, .. } => Some(*position),
            _ => None,
        }
    }
}

/// The least that is read of a line that may be of another format, or broken further down.
#[derive(Deserialize)]
struct Envelope {
    format: Option<String>,
    case: Option<EnvelopeCase>,
}

#[derive(Deserialize)]
struct EnvelopeCase {
    id: Option<String>,
}

/// The case id in a line that may be bad otherwise, so that the error reply can name its case.
pub fn case_id(line: &[u8]) -> Option<String> {
    let envelope: Envelope = serde_json::from_slice(line).ok()?;
    envelope.case?.id
}

/// What a line asks for.
pub enum Asked {
    Trace(Box<Request>),
    Tokens(TokenizeRequest),
    Calls(CallRequest),
}

/// Parses and checks one request; all that can be judged without reading a file.
pub fn parse(line: &[u8]) -> Result<Asked, EmitError> {
    let bad =
        |error: serde_json::Error| EmitError::Request(format!("request is not valid: {error}"));
    // The format first: a newer request should be told so, not that it has an unknown key.
    let envelope: Envelope = serde_json::from_slice(line).map_err(bad)?;
    match envelope.format.as_deref() {
        Some(FORMAT) => {
            let request: Request = serde_json::from_slice(line).map_err(bad)?;
            check(&request)?;
            Ok(Asked::Trace(Box::new(request)))
        }
        Some(tokenize::REQUEST_FORMAT) => {
            let request: TokenizeRequest = serde_json::from_slice(line).map_err(bad)?;
            check_out(&request.out)?;
            Ok(Asked::Tokens(request))
        }
        Some(call::REQUEST_FORMAT) => {
            let request: CallRequest = serde_json::from_slice(line).map_err(bad)?;
            call::check(&request)?;
            check_out(&request.out)?;
            Ok(Asked::Calls(request))
        }
        other => Err(EmitError::Request(format!(
            "request format is {}, this emitter reads \"{FORMAT}\", \"{}\" and \"{}\"",
            other.map_or("missing".to_owned(), |format| format!("\"{format}\"")),
            tokenize::REQUEST_FORMAT,
            call::REQUEST_FORMAT
        ))),
    }
}

fn check(request: &Request) -> Result<(), EmitError> {
    let refuse = |message: String| Err(EmitError::Request(message));
    let Some(width) = request.tokens.first().map(Vec::len) else {
        return refuse("tokens are empty: expected [B][T] with B, T >= 1".to_owned());
    };
    for (row, tokens) in request.tokens.iter().enumerate() {
        if tokens.is_empty() {
            return refuse(format!("tokens row {row} is empty"));
        }
        if tokens.len() != width {
            return refuse(format!(
                "tokens are ragged: row 0 has {width}, row {row} has {}",
                tokens.len()
            ));
        }
    }
    let mut seen = HashSet::new();
    if let Some(twice) = request.captures.iter().find(|name| !seen.insert(*name)) {
        return refuse(format!("capture named twice: {twice}"));
    }
    let mut seen = HashSet::new();
    if let Some(twice) = request.project.iter().find(|key| !seen.insert(*key)) {
        return refuse(format!("project names a tensor twice: {twice}"));
    }
    let needs_inputs = request.sae_input.is_some()
        || !request.project.is_empty()
        || request.edits.iter().any(|edit| edit.tensor().is_some());
    if needs_inputs && request.inputs.is_none() {
        return refuse(
            "an edit, sae_input or project names a tensor, but inputs is null".to_owned(),
        );
    }
    check_edits(request, width)?;
    if request.sae_input.is_some() && request.sae.is_none() {
        return refuse("sae_input is given, but sae is null".to_owned());
    }
    check_out(&request.out)
}

fn check_edits(request: &Request, width: usize) -> Result<(), EmitError> {
    let refuse = |message: String| Err(EmitError::Request(message));
    for edit in &request.edits {
        let hook = edit.hook();
        if let Some(position) = edit.position().filter(|position| *position >= width) {
            return refuse(format!(
                "edit at {hook}: position {position} is outside the prompt of {width} tokens"
            ));
        }
        if matches!(edit, Edit::Steer { .. }) && request.edits.len() > 1 {
            return refuse(format!(
                "edit at {hook}: a steer takes the pattern of a run without edits, and stands alone"
            ));
        }
        if matches!(edit, Edit::Inject { .. })
            && request.sae.as_ref().is_none_or(|sae| sae.hook != hook)
        {
            return refuse(format!(
                "edit at {hook}: an injection needs an SAE at this hook"
            ));
        }
    }
    Ok(())
}

fn check_out(out: &Path) -> Result<(), EmitError> {
    if out.extension().is_none_or(|ending| ending != "json") {
        return Err(EmitError::Request(format!(
            "out must end in .json: {}",
            out.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "request_fuzz.rs"]
mod fuzz;
