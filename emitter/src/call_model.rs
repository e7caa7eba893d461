//! Calls of functions that run a model, or that decode with its tokenizer.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_mi::interp::logit_lens::decode_predictions_with;
use candle_mi::{
    GenericTransformer, HookPoint, HookSpec, LogitLensAnalysis, LogitLensResult, MIError, MIModel,
    MITokenizer, RecurrentPassSpec, TokenPrediction,
};

use crate::answer::{Answer, Outcome};
use crate::call_protocol::{Lens, ModelCall, Recur};
use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::last::Last;
use crate::model;
use crate::weights;

/// The last model, with its tokenizer.
pub type CallModels = Last<MIModel>;

fn with_tokenizer(directory: &Path) -> Result<MIModel, EmitError> {
    let backend = Box::new(transformer(directory)?);
    let tokenizer = Some(tokenizer(directory)?);
    Ok(MIModel::with_tokenizer(backend, Device::Cpu, tokenizer))
}

/// As people load a model whose text they run: candle-mi reads the directory itself, its tokenizer too. Only where the
/// build has candle-mi's real downloader the model is built from its files.
fn from_directory(directory: &Path) -> Result<MIModel, EmitError> {
    weights::files_of(directory)?;
    match model::from_pretrained(directory) {
        Err(EmitError::RealDownloader) => with_tokenizer(directory),
        found => found,
    }
}

fn transformer(directory: &Path) -> Result<GenericTransformer, EmitError> {
    let files = weights::files_of(directory)?;
    Ok(model::build(&files, DType::F32, false, &Device::Cpu)?.transformer)
}

/// The tokenizer beside a model.
pub fn tokenizer(directory: &Path) -> Result<MITokenizer, EmitError> {
    MITokenizer::from_hf_path(directory.join("tokenizer.json"))
        .map_err(|error| EmitError::Model(error.to_string()))
}

pub fn run(
    call: &ModelCall,
    inputs: &Inputs,
    models: &mut CallModels,
) -> Result<Outcome, EmitError> {
    match call {
        ModelCall::GenerateRecurrent(recur) => generate(recur, inputs),
        ModelCall::BuildContrastiveDirection { model, prompts } => {
            contrastive::build(models.get(model, with_tokenizer)?, prompts)
        }
        ModelCall::ContrastiveIntervention(steered) => {
            contrastive::intervene(models.get(&steered.model, with_tokenizer)?, steered)
        }
        ModelCall::ForwardText { model, text, layer } => {
            forward_text(&from_directory(model)?, text, *layer)
        }
        ModelCall::LogitLens(lens) => logit_lens(lens, inputs),
        ModelCall::EmbeddingVector { model, token } => Outcome::tensor(
            models
                .get(model, with_tokenizer)?
                .backend()
                .embedding_vector(*token),
        ),
    }
}

fn outcome(answer: Result<Result<Vec<Answer>, EmitError>, MIError>) -> Result<Outcome, EmitError> {
    match answer {
        Ok(answers) => Ok(Outcome::Results(answers?)),
        Err(error) => Ok(Outcome::Refused(error)),
    }
}

/// `[1,T,V]` → `[V]` of the last position.
fn last(logits: &Tensor) -> Result<Tensor, MIError> {
    Ok(logits.get(0)?.get(logits.dim(1)? - 1)?)
}

fn generate(recur: &Recur, inputs: &Inputs) -> Result<Outcome, EmitError> {
    let model = transformer(&recur.model)?;
    let (first, last) = recur.layers;
    let mut spec = RecurrentPassSpec::no_feedback(first, last)
        .with_depth(recur.depth)
        .with_sustained(recur.sustained);
    for (position, strength, vector) in &recur.feedback {
        spec.add_feedback(*position, inputs.get(vector)?.clone(), *strength);
    }
    let made = model.generate_recurrent(&recur.tokens, recur.max_tokens, 0.0, &recur.stop, &spec);
    outcome(made.map(|tokens| {
        Ok(vec![Answer::list(
            "tokens",
            tokens.into_iter().map(f64::from),
        )])
    }))
}

fn forward_text(model: &MIModel, text: &str, layer: usize) -> Result<Outcome, EmitError> {
    let hook = HookPoint::ResidPost(layer);
    let mut hooks = HookSpec::new();
    hooks.capture(hook.clone());
    outcome(model.forward_text(text, &hooks).and_then(|found| {
        let resid = found.require(&hook)?;
        let logits = last(found.output())?;
        Ok((|| {
            Ok(vec![
                Answer::list("ids", found.encoding().ids.iter().map(|id| f64::from(*id))),
                Answer::of("resid", resid)?,
                Answer::of("logits", &logits)?,
            ])
        })())
    }))
}

/// The likeliest tokens of each layer are found as in candle-mi's own example: softmax, then a stable sort.
fn logit_lens(lens: &Lens, inputs: &Inputs) -> Result<Outcome, EmitError> {
    let tokenizer = tokenizer(&lens.model)?;
    let unreadable = |error: candle_core::Error| EmitError::Request(error.to_string());
    let logits = inputs.get(&lens.logits)?;
    let probabilities: Vec<Vec<f32>> = candle_nn::ops::softmax_last_dim(logits)
        .and_then(|probabilities| probabilities.to_vec2())
        .map_err(unreadable)?;
    let mut analysis = LogitLensAnalysis::new(String::new(), probabilities.len());
    let layers = lens.layers.clone();
    let layers = layers.unwrap_or_else(|| (0..probabilities.len()).collect());
    for (layer, row) in layers.into_iter().zip(probabilities) {
        let mut ranked: Vec<(u32, f32)> = (0..).zip(row).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        let predictions = decode_predictions_with(&ranked, |id| {
            tokenizer
                .decode(&[id])
                .unwrap_or_else(|_| format!("[{id}]"))
        });
        analysis.push(layer_result(layer, predictions));
    }
    let top = analysis.top_predictions();
    let text = top.iter().flat_map(|(token, _)| token.bytes().chain([0]));
    // A layer is far below 2^53.
    let first = analysis
        .first_appearance(&lens.token, lens.k)
        .map_or(-1.0, |layer| layer as f64);
    Ok(Outcome::Results(vec![
        Answer::list(
            "top",
            top.iter().map(|(_, probability)| f64::from(*probability)),
        ),
        Answer::list("text", text.map(f64::from)),
        Answer::scalar("first", first),
    ]))
}

#[cfg(since_0_2_2)]
fn layer_result(layer: usize, predictions: Vec<TokenPrediction>) -> LogitLensResult {
    LogitLensResult::new(layer, predictions)
}

#[cfg(not(since_0_2_2))]
fn layer_result(layer: usize, predictions: Vec<TokenPrediction>) -> LogitLensResult {
    LogitLensResult { layer, predictions }
}

#[cfg(since_0_1_24)]
mod contrastive {
    use candle_core::Tensor;
    use candle_mi::{
        build_contrastive_direction, contrastive_intervention, ContrastiveDirection, HookPoint,
        HookSpec, Intervention, MIError, MIModel, PositionStrategy,
    };

    use super::outcome;
    use crate::answer::{Answer, Outcome};
    use crate::call_protocol::{NamedPlace, Place, Prompts, Steered};
    use crate::error::EmitError;

    pub fn build(model: &MIModel, prompts: &Prompts) -> Result<Outcome, EmitError> {
        Outcome::tensor(direction(model, prompts).map(|found| found.vector))
    }

    /// The vector of the intervention, and the logits of a prompt's last position with it.
    pub fn intervene(model: &MIModel, asked: &Steered) -> Result<Outcome, EmitError> {
        outcome(steered(model, asked).map(|(value, logits)| {
            Ok(vec![
                Answer::of("value", &value)?,
                Answer::of("logits", &logits)?,
            ])
        }))
    }

    fn direction(model: &MIModel, prompts: &Prompts) -> Result<ContrastiveDirection, MIError> {
        let strategy = match prompts.strategy {
            Place::At(position) => PositionStrategy::Explicit(position),
            Place::Named(NamedPlace::Last) => PositionStrategy::Last,
            Place::Named(NamedPlace::FirstNewline) => PositionStrategy::FirstNewline,
        };
        let tokenizer = tokenizer(model)?;
        let [positive, negative] = [&prompts.positive, &prompts.negative]
            .map(|texts| texts.iter().map(String::as_str).collect::<Vec<_>>());
        build_contrastive_direction(
            model,
            tokenizer,
            &positive,
            &negative,
            prompts.layer,
            strategy,
            prompts.normalise,
        )
    }

    fn tokenizer(model: &MIModel) -> Result<&candle_mi::MITokenizer, MIError> {
        model
            .tokenizer()
            .ok_or_else(|| MIError::Config("no tokenizer".to_owned()))
    }

    fn steered(model: &MIModel, asked: &Steered) -> Result<(Tensor, Tensor), MIError> {
        let direction = direction(model, &asked.prompts)?;
        let intervention = contrastive_intervention(&direction, asked.strength)?;
        let Intervention::Add(value) = &intervention else {
            return Err(MIError::Intervention("not an addition".to_owned()));
        };
        let value = value.clone();
        let mut hooks = HookSpec::new();
        hooks.intervene(HookPoint::ResidPost(direction.layer), intervention);
        let ids = tokenizer(model)?.encode(&asked.text)?;
        let tokens = Tensor::new(ids.as_slice(), model.device())?.unsqueeze(0)?;
        let logits = super::last(model.forward(&tokens, &hooks)?.output())?;
        Ok((value, logits))
    }
}

#[cfg(not(since_0_1_24))]
mod contrastive {
    use candle_mi::MIModel;

    use crate::answer::Outcome;
    use crate::call_protocol::{Prompts, Steered};
    use crate::error::EmitError;

    pub fn build(_: &MIModel, _: &Prompts) -> Result<Outcome, EmitError> {
        Ok(Outcome::Absent)
    }

    pub fn intervene(_: &MIModel, _: &Steered) -> Result<Outcome, EmitError> {
        Ok(Outcome::Absent)
    }
}
