//! One forward pass through candle-mi with the captures and edits of a request.

use candle_core::Tensor;
use candle_mi::{HookCache, HookSpec, MIError, RecurrentPassSpec};

use crate::edits::{self, Editor};
use crate::error::EmitError;
use crate::hook_point::{in_model_dtype, point};
use crate::inputs::Inputs;
use crate::model::LoadedModel;
use crate::protocol::{Edit, Recurrent, Request};
use crate::sae::SparseAutoencoder;
use crate::tensor::Named;

/// What a forward pass left behind.
pub struct Forward {
    /// The requested captures in the request's order, then `logits` `[B,T,V]` if asked for, then the projections.
    pub tensors: Vec<Named>,
    /// The tensor at the SAE's hook point, `[B,T,d]`, if there is an SAE.
    pub residual: Option<Tensor>,
}

/// One forward pass: token ids `[B][T]`, and the hook points that are captured and edited.
pub struct Pass<'a> {
    pub tokens: &'a [Vec<u32>],
    pub captures: Vec<&'a str>,
    pub edits: &'a [Edit],
    pub recurrent: Option<&'a Recurrent>,
}

/// Runs the model for a trace.
///
/// # Errors
/// Those of [`pass`], and `Request` where an edit's tensor has not the shape of its hook point's.
pub fn run(
    loaded: &LoadedModel,
    request: &Request,
    inputs: &Inputs,
    sae: Option<&SparseAutoencoder>,
) -> Result<Forward, EmitError> {
    let sae_hook = request.sae.as_ref().map(|sae| sae.hook.as_str());
    // An edited point is captured too: that is how it is known to have been reached, and with which shape.
    let captures = request.captures.iter().map(String::as_str);
    let edited = request.edits.iter().map(Edit::hook);
    let whole = Pass {
        tokens: &request.tokens,
        captures: captures.chain(sae_hook).chain(edited).collect(),
        edits: &request.edits,
        recurrent: request.recurrent.as_ref(),
    };
    let cache = pass(loaded, inputs, sae, &whole)?;
    edits::check_shapes(&request.edits, inputs, &cache)?;

    let mut tensors = Vec::with_capacity(request.captures.len() + 1 + request.project.len());
    for name in &request.captures {
        tensors.push(Named::new(name, captured(&cache, name)?));
    }
    if request.logits {
        tensors.push(Named::new("logits", cache.output().clone()));
    }
    for key in &request.project {
        tensors.push(project(key, inputs, loaded)?);
    }
    let residual = sae_hook.map(|hook| captured(&cache, hook)).transpose()?;
    Ok(Forward { tensors, residual })
}

/// Runs the model once; nothing is captured that is not named.
///
/// # Errors
/// `Request` where a captured hook point did not fire: candle-mi takes any string for a hook point, and one that it
/// does not know is silently never reached. `Forward` where candle-mi or candle failed.
pub fn pass(
    loaded: &LoadedModel,
    inputs: &Inputs,
    sae: Option<&SparseAutoencoder>,
    asked: &Pass,
) -> Result<HookCache, EmitError> {
    let mut spec = HookSpec::new();
    for name in &asked.captures {
        spec.capture(point(name)?);
    }
    let tokens = token_tensor(asked.tokens, loaded)?;
    let editor = Editor {
        loaded,
        inputs,
        tokens: &tokens,
        sae,
    };
    for edit in asked.edits {
        editor.register(edit, &mut spec)?;
    }
    let cache = match asked.recurrent {
        Some(recurrent) => {
            let passes = passes(recurrent, inputs, loaded)?;
            loaded
                .transformer()?
                .forward_recurrent(&tokens, &spec, &passes)
        }
        None => loaded.backend().forward(&tokens, &spec),
    }
    .map_err(failed)?;
    let mut silent = Vec::new();
    for name in &asked.captures {
        if cache.get(&point(name)?).is_none() {
            silent.push(*name);
        }
    }
    if !silent.is_empty() {
        return Err(EmitError::Request(format!(
            "hook points that candle-mi never reached in this model of {} layers: {}",
            loaded.layers(),
            silent.join(", ")
        )));
    }
    Ok(cache)
}

/// candle-mi's own specification of layers that are run several times.
pub fn passes(
    recurrent: &Recurrent,
    inputs: &Inputs,
    loaded: &LoadedModel,
) -> Result<RecurrentPassSpec, EmitError> {
    let (first, last) = recurrent.layers;
    let mut passes = RecurrentPassSpec::no_feedback(first, last).with_depth(recurrent.depth);
    for row in &recurrent.feedback {
        let vector = in_model_dtype(&row.tensor, inputs, loaded)?;
        passes.add_feedback(row.position, vector, row.strength);
    }
    Ok(passes)
}

/// A tensor that was captured.
pub fn captured(cache: &HookCache, name: &str) -> Result<Tensor, EmitError> {
    cache.require(&point(name)?).cloned().map_err(failed)
}

fn failed(error: MIError) -> EmitError {
    EmitError::Forward(error.to_string())
}

fn token_tensor(tokens: &[Vec<u32>], loaded: &LoadedModel) -> Result<Tensor, EmitError> {
    let rows = tokens.len();
    let width = tokens.first().map_or(0, Vec::len);
    Tensor::from_vec(tokens.concat(), (rows, width), &loaded.device)
        .map_err(|error| EmitError::Forward(format!("token tensor: {error}")))
}

/// candle-mi's logit lens: a residual of the inputs through the final norm and the unembedding.
fn project(key: &str, inputs: &Inputs, loaded: &LoadedModel) -> Result<Named, EmitError> {
    let residual = in_model_dtype(key, inputs, loaded)?;
    let width = loaded.backend().hidden_size();
    // Of another rank or width it could still broadcast through the norm and give numbers that mean nothing.
    if !matches!(residual.dims(), [_, last] | [_, _, last] if *last == width) {
        return Err(EmitError::Request(format!(
            "projected tensor \"{key}\" has shape {:?}, expected [B,T,{width}] or [B,{width}]",
            residual.dims()
        )));
    }
    let projected = loaded.backend().project_to_vocab(&residual);
    let projected = projected.map_err(|error| EmitError::Forward(format!("{key}: {error}")))?;
    Ok(Named::new(&format!("lens.{key}"), projected))
}
