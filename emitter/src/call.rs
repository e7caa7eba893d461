//! Direct calls of candle-mi's public functions: tensors or texts in, and small tensors out.

use std::panic::{catch_unwind, AssertUnwindSafe};

use candle_core::Device;
use serde::Serialize;

use crate::answer::{Answer, Outcome};
use crate::call_caches;
use crate::call_clt;
use crate::call_diffusion;
use crate::call_gradients;
use crate::call_measures;
use crate::call_model::{self, CallModels};
use crate::call_offsets::{self, Tokenizers};
use crate::call_protocol::{CallRequest, Function};
use crate::call_rwkv::{self, Vocabularies};
use crate::call_sae;
use crate::call_stoicheia;
use crate::call_training;
use crate::error::{one_line, EmitError};
use crate::identity::{CandleMi, Identity};
use crate::inputs::Inputs;
use crate::protocol::Case;
use crate::sae::SaeCache;
use crate::trace;

const FORMAT: &str = "candle-mi-parity/calls/1";

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

/// Answers one request; afterwards the document lies at `request.out`.
pub fn run(request: &CallRequest) -> Result<(), EmitError> {
    trace::prepare_directory(&request.out)?;
    let inputs = Inputs::read(Some(&request.inputs), &Device::Cpu)?;
    let identity = Identity::of_this_build();
    let mut saes = SaeCache::default();
    let mut models = CallModels::default();
    let mut tokenizers = Tokenizers::default();
    let mut vocabularies = Vocabularies::default();
    let mut calls = Vec::with_capacity(request.calls.len());
    for call in &request.calls {
        let outcome = catch_unwind(AssertUnwindSafe(|| match &call.run {
            Function::Measure(measure) => call_measures::run(measure, &inputs),
            Function::Sae(wanted) => call_sae::run(wanted, &inputs, &mut saes),
            Function::Model(wanted) => call_model::run(wanted, &inputs, &mut models),
            Function::Offsets(wanted) => call_offsets::run(wanted, &mut tokenizers),
            Function::Cache(wanted) => call_caches::run(wanted, &inputs),
            Function::Clt(wanted) => call_clt::run(wanted, &inputs),
            Function::Rwkv(wanted) => call_rwkv::run(wanted, &mut vocabularies),
            Function::Stoicheia(wanted) => call_stoicheia::run(wanted, &inputs),
            Function::Diffusion(wanted) => call_diffusion::run(wanted, &inputs),
            Function::Gradient(wanted) => call_gradients::run(wanted, &inputs),
            Function::Training(wanted) => call_training::run(wanted, &inputs),
        }));
        let (outcome, results, error) = match outcome {
            Ok(Ok(Outcome::Results(results))) => ("results", results, None),
            Ok(Ok(Outcome::Refused(error))) => {
                ("error", Vec::new(), Some(one_line(&error.to_string())))
            }
            Ok(Ok(Outcome::Absent)) => ("absent", Vec::new(), None),
            // A model that candle-mi does not load costs its own calls.
            Ok(Err(EmitError::Model(error))) => ("error", Vec::new(), Some(one_line(&error))),
            // So does a part that was left out.
            Ok(Err(error @ EmitError::NotBuilt(_))) => {
                ("error", Vec::new(), Some(error.one_line()))
            }
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
