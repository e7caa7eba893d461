//! Direct calls of candle-mi's public functions: no model and no forward pass, tensors in and small tensors out.

use std::collections::HashSet;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use candle_mi::MIError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::call_measures::{self, Measure};
use crate::call_sae::{self, SaeCall};
use crate::error::{one_line, EmitError};
use crate::identity::{CandleMi, Identity};
use crate::inputs::Inputs;
use crate::request::Case;
use crate::sae::SaeCache;
use crate::trace;

pub const REQUEST_FORMAT: &str = "candle-mi-parity/call/1";
const FORMAT: &str = "candle-mi-parity/calls/1";

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
}

/// How one call ended. A refusal of candle-mi is an outcome of that call alone.
pub enum Outcome {
    Results(Vec<Answer>),
    Refused(MIError),
    /// The release has no such function.
    #[cfg_attr(since_0_1_24, allow(dead_code))]
    Absent,
}

/// One small tensor; an infinity or NaN is a string, which JSON has no number for.
#[derive(Serialize)]
pub struct Answer {
    pub name: &'static str,
    pub shape: Vec<usize>,
    pub values: Vec<Value>,
}

impl Answer {
    pub fn of(name: &'static str, tensor: &Tensor) -> Result<Self, EmitError> {
        let values = tensor
            .to_dtype(DType::F64)
            .and_then(|wide| wide.flatten_all()?.to_vec1::<f64>())
            .map_err(|error| EmitError::Forward(format!("{name} cannot be read out: {error}")))?;
        Ok(Self {
            name,
            shape: tensor.dims().to_vec(),
            values: values.into_iter().map(number).collect(),
        })
    }

    pub fn scalar(name: &'static str, value: f64) -> Self {
        Self {
            name,
            shape: Vec::new(),
            values: vec![number(value)],
        }
    }

    pub fn list(name: &'static str, values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<Value> = values.into_iter().map(number).collect();
        Self {
            name,
            shape: vec![values.len()],
            values,
        }
    }
}

fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or_else(
        || {
            let word = match (value.is_nan(), value > 0.0) {
                (true, _) => "nan",
                (false, true) => "inf",
                (false, false) => "-inf",
            };
            Value::String(word.to_owned())
        },
        Value::Number,
    )
}

#[derive(Serialize)]
struct Answered<'a> {
    id: &'a str,
    outcome: &'static str,
    results: Vec<Answer>,
    error: Option<String>,
}

#[derive(Serialize)]
struct Document<'a> {
    format: &'static str,
    emitter: &'static str,
    candle_mi: CandleMi,
    case: &'a Case,
    inputs_digest: Option<&'a str>,
    calls: Vec<Answered<'a>>,
}

/// What only a look at the request can tell.
pub fn check(request: &CallRequest) -> Result<(), EmitError> {
    let mut seen = HashSet::new();
    if let Some(call) = request.calls.iter().find(|call| !seen.insert(&call.id)) {
        return Err(EmitError::Request(format!("call named twice: {}", call.id)));
    }
    if request.calls.is_empty() {
        return Err(EmitError::Request("calls are empty".to_owned()));
    }
    Ok(())
}

/// Answers one request; afterwards the document lies at `request.out`.
pub fn run(request: &CallRequest) -> Result<(), EmitError> {
    trace::prepare_directory(&request.out)?;
    let inputs = Inputs::read(Some(&request.inputs), &Device::Cpu)?;
    let identity = Identity::of_this_build();
    let mut saes = SaeCache::default();
    let mut calls = Vec::with_capacity(request.calls.len());
    for call in &request.calls {
        let outcome = catch_unwind(AssertUnwindSafe(|| match &call.run {
            Function::Measure(measure) => call_measures::run(measure, &inputs),
            Function::Sae(wanted) => call_sae::run(wanted, &inputs, &mut saes),
        }));
        let (outcome, results, error) = match outcome {
            Ok(Ok(Outcome::Results(results))) => ("results", results, None),
            Ok(Ok(Outcome::Refused(error))) => {
                ("error", Vec::new(), Some(one_line(&error.to_string())))
            }
            Ok(Ok(Outcome::Absent)) => ("absent", Vec::new(), None),
            Ok(Err(error)) => return Err(error),
            Err(_) => ("error", Vec::new(), Some("panicked".to_owned())),
        };
        calls.push(Answered {
            id: &call.id,
            outcome,
            results,
            error,
        });
    }
    trace::write_document(
        &request.out,
        &Document {
            format: FORMAT,
            emitter: identity.emitter,
            candle_mi: identity.candle_mi,
            case: &request.case,
            inputs_digest: inputs.digest.as_deref(),
            calls,
        },
    )
}
