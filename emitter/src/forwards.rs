//! Forward passes as people run them: without captures, with one, after another prompt, on a model loaded anew. Of each
//! the digests of its tensors are answered, so that the caller can tell whether they are equal to the bit.

use std::collections::BTreeMap;

use candle_mi::HookCache;
use serde::Serialize;

use crate::emit::{prepare_directory, Session};
use crate::error::EmitError;
use crate::forward::{self, Pass};
use crate::forwards_protocol::{ForwardsRequest, Wanted};
use crate::inputs::Inputs;
use crate::model::{LoadedModel, ModelCache};
use crate::panics;
use crate::protocol::Loader;
use crate::sae::SparseAutoencoder;
use crate::tensor::{Encoded, Named};
use crate::trace::{self, Entry, Header, Provenance};

const FORMAT: &str = "candle-mi-parity/forwards/1";

#[derive(Serialize)]
struct Document<'a> {
    format: &'static str,
    header: Header<'a>,
    forwards: Vec<Answered<'a>>,
    /// The logits that the caller does not hold, each once, under the name of the first forward that gave them.
    tensors: Vec<Entry<'a>>,
}

/// SHA-256 of the raw bytes of what a forward gave, or its error.
#[derive(Serialize)]
struct Answered<'a> {
    name: &'a str,
    logits: Option<String>,
    captures: BTreeMap<&'a str, String>,
    error: Option<String>,
}

/// Answers one request; afterwards the document lies at `request.out`.
pub fn run(request: &ForwardsRequest, session: &mut Session) -> Result<(), EmitError> {
    prepare_directory(&request.out, &request.model_dir)?;
    let Session { models, saes } = session;
    let first = request.forwards.first().map(|wanted| wanted.loader);
    let loaded = load(request, first.unwrap_or_default(), models)?;
    let (model_digest, device) = (loaded.digest.clone(), loaded.device.clone());
    let inputs = Inputs::read(request.inputs.as_deref(), &device)?;
    let sae = match &request.sae {
        Some(wanted) => Some(saes.get(wanted, &device, &request.device)?),
        None => None,
    };

    let mut passes = Vec::with_capacity(request.forwards.len());
    let mut broken = false;
    for wanted in &request.forwards {
        let outcome = panics::caught(|| {
            if wanted.anew || broken {
                models.forget();
            }
            let loaded = load(request, wanted.loader, models)?;
            pass(request, wanted, loaded, &inputs, sae.map(|held| &held.sae))
        });
        broken = matches!(outcome, Err(EmitError::Panic(_)));
        passes.push(outcome);
    }

    // Only now, so that a tensor which a later forward writes over is seen.
    let mut answered = Vec::with_capacity(passes.len());
    let mut written: Vec<Encoded> = Vec::new();
    for (wanted, outcome) in request.forwards.iter().zip(passes) {
        answered.push(match outcome.and_then(|cache| digests(wanted, cache)) {
            Ok((logits, captures)) => {
                let digest = logits.sha256.clone();
                let held = request.known.contains(&digest)
                    || written.iter().any(|other| other.sha256 == digest);
                if !held {
                    written.push(logits);
                }
                Answered {
                    name: &wanted.name,
                    logits: Some(digest),
                    captures,
                    error: None,
                }
            }
            Err(error) => Answered {
                name: &wanted.name,
                logits: None,
                captures: BTreeMap::new(),
                error: Some(format!("{}: {}", error.kind(), error.one_line())),
            },
        });
    }
    trace::write_tensors(&request.out, &written)?;
    let file = trace::tensors_path(&request.out);
    let file = file.file_name().unwrap_or_default().to_string_lossy();
    trace::write_document(
        &request.out,
        &Document {
            format: FORMAT,
            header: Header::new(Provenance {
                device: &request.device,
                dtype: request.dtype.name(),
                case: &request.case,
                model_digest: &model_digest,
                sae_digest: sae.map(|held| held.digest.as_str()),
                inputs_digest: inputs.digest.as_deref(),
            }),
            forwards: answered,
            tensors: written
                .iter()
                .map(|tensor| Entry::new(tensor, &file))
                .collect(),
        },
    )
}

fn load<'a>(
    request: &ForwardsRequest,
    loader: Loader,
    models: &'a mut ModelCache,
) -> Result<&'a LoadedModel, EmitError> {
    let (directory, device) = (&request.model_dir, &request.device);
    models.get(directory, request.dtype, loader, device)
}

/// One forward.
fn pass(
    request: &ForwardsRequest,
    wanted: &Wanted,
    loaded: &LoadedModel,
    inputs: &Inputs,
    sae: Option<&SparseAutoencoder>,
) -> Result<HookCache, EmitError> {
    let pass = Pass {
        tokens: wanted.tokens.as_ref().unwrap_or(&request.tokens),
        captures: wanted.captures.iter().map(String::as_str).collect(),
        edits: if wanted.edited { &request.edits } else { &[] },
        recurrent: request.recurrent.as_ref().filter(|_| wanted.edited),
    };
    loaded.check_tokens(pass.tokens)?;
    forward::pass(loaded, inputs, sae, &pass)
}

/// The logits of a forward, and the digests of its captures.
fn digests(
    wanted: &Wanted,
    cache: HookCache,
) -> Result<(Encoded, BTreeMap<&str, String>), EmitError> {
    let mut captures = BTreeMap::new();
    for name in &wanted.captures {
        let tensor = forward::captured(&cache, name)?;
        captures.insert(
            name.as_str(),
            Encoded::of(&Named::new(name, tensor))?.sha256,
        );
    }
    let logits = Encoded::of(&Named::new(&wanted.name, cache.into_output()))?;
    Ok((logits, captures))
}
