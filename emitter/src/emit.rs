//! A request from start to finish: load, run, encode, write.

use std::fs;
use std::path::Path;
use std::time::Instant;

use crate::error::EmitError;
use crate::forward;
use crate::inputs::Inputs;
use crate::machine;
use crate::model::ModelCache;
use crate::protocol::Request;
use crate::quantized;
use crate::sae::{self, SaeCache, SaeResult};
use crate::tensor::Encoded;
use crate::trace::{self, Document, Entry, Header, Provenance, Run, Seconds};

/// What is kept from one request to the next.
#[derive(Default)]
pub struct Session {
    pub models: ModelCache,
    pub saes: SaeCache,
}

/// Answers one request; afterwards the trace lies at `request.out`.
pub fn emit(request: &Request, session: &mut Session) -> Result<(), EmitError> {
    let started = machine::now();
    let mut seconds = Seconds::default();
    prepare_directory(&request.out, &request.model_dir)?;

    let clock = Instant::now();
    let loaded = session.models.get(
        &request.model_dir,
        request.dtype,
        request.loader,
        &request.device,
    )?;
    loaded.check_tokens(&request.tokens)?;
    let weights = quantized::weights(request, &loaded.device)?;
    let inputs = Inputs::read(request.inputs.as_deref(), &loaded.device)?;
    seconds.load = clock.elapsed().as_secs_f64();

    let clock = Instant::now();
    let sae = match &request.sae {
        Some(wanted) => Some(session.saes.get(wanted, &loaded.device, &request.device)?),
        None => None,
    };
    seconds.sae = clock.elapsed().as_secs_f64();

    let clock = Instant::now();
    let forward = forward::run(loaded, request, &inputs, sae.map(|loaded| &loaded.sae))?;
    seconds.forward = clock.elapsed().as_secs_f64();

    let clock = Instant::now();
    let mut sae_digest = None;
    let mut of_sae = SaeResult::default();
    if let (Some(sae), Some(residual)) = (sae, &forward.residual) {
        let truth = request
            .sae_input
            .as_deref()
            .map(|key| inputs.get(key))
            .transpose()?;
        of_sae = sae::run(sae, residual, truth)?;
        sae_digest = Some(sae.digest.as_str());
    }
    seconds.sae += clock.elapsed().as_secs_f64();

    let clock = Instant::now();
    let tensors = weights
        .iter()
        .chain(&forward.tensors)
        .chain(&of_sae.tensors)
        .map(Encoded::of)
        .collect::<Result<Vec<_>, _>>()?;
    trace::write_tensors(&request.out, &tensors)?;
    seconds.write = clock.elapsed().as_secs_f64();

    let file = trace::tensors_path(&request.out);
    let file = file.file_name().unwrap_or_default().to_string_lossy();
    let document = Document {
        format: trace::FORMAT,
        header: Header::new(Provenance {
            device: &request.device,
            dtype: request.dtype.name(),
            case: &request.case,
            model_digest: &loaded.digest,
            sae_digest,
            inputs_digest: inputs.digest.as_deref(),
        }),
        run: Run {
            started,
            seconds,
            threads: candle_core::utils::get_num_threads(),
            peak_rss_bytes: machine::peak_rss_bytes(),
        },
        tokens: &request.tokens,
        tensors: tensors
            .iter()
            .map(|tensor| Entry::new(tensor, &file))
            .collect(),
        scalars: of_sae
            .scalars
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone().into()))
            .collect(),
        top_features_last_pos: &of_sae.top_features,
    };
    trace::write_document(&request.out, &document)
}

/// Makes the directory of what is written, and refuses to write beside the model: `model.json` would bring a
/// `model.safetensors` with it.
pub fn prepare_directory(out: &Path, model_dir: &Path) -> Result<(), EmitError> {
    let directory = trace::prepare_directory(out)?;
    let real = |path: &Path| fs::canonicalize(path).ok();
    if real(directory).is_some() && real(directory) == real(model_dir) {
        return Err(EmitError::Request(format!(
            "out lies in the model's own directory: {}",
            out.display()
        )));
    }
    Ok(())
}
