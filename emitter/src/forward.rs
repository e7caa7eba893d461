//! One forward pass through candle-mi with the captures and edits of a request.

use candle_core::Tensor;
use candle_mi::sae::SparseAutoencoder;
use candle_mi::{HookPoint, HookSpec, MIBackend};

use crate::edits::{self, Editor};
use crate::error::EmitError;
use crate::hook_point::{in_model_dtype, point};
use crate::inputs::Inputs;
use crate::model::LoadedModel;
use crate::protocol::{Edit, Request};
use crate::tensor::Named;

/// What a forward pass left behind.
pub struct Forward {
    /// The requested captures in the request's order, then `logits` `[B,T,V]` if asked for, then the projections.
    pub tensors: Vec<Named>,
    /// The tensor at the SAE's hook point, `[B,T,d]`, if there is an SAE.
    pub residual: Option<Tensor>,
}

/// Runs the model.
///
/// # Errors
/// `Request` where a hook point did not fire: candle-mi takes any string for a hook point, and one that it does not
/// know is silently never reached. `Forward` where candle-mi or candle failed.
pub fn run(
    loaded: &LoadedModel,
    request: &Request,
    inputs: &Inputs,
    sae: Option<&SparseAutoencoder>,
) -> Result<Forward, EmitError> {
    let mut spec = HookSpec::new();
    let mut asked: Vec<(&str, HookPoint)> = Vec::new();
    let sae_hook = request.sae.as_ref().map(|sae| sae.hook.as_str());
    // An edited point is captured too: that is how it is known to have been reached, and with which shape.
    for name in request
        .captures
        .iter()
        .map(String::as_str)
        .chain(sae_hook)
        .chain(request.edits.iter().map(Edit::hook))
    {
        let point = point(name)?;
        spec.capture(point.clone());
        asked.push((name, point));
    }
    let failed = |error: candle_mi::MIError| EmitError::Forward(error.to_string());
    let tokens = token_tensor(request, loaded)?;
    let editor = Editor {
        loaded,
        inputs,
        tokens: &tokens,
        sae,
    };
    for edit in &request.edits {
        editor.register(edit, &mut spec)?;
    }

    let cache = loaded.model.forward(&tokens, &spec).map_err(failed)?;

    let silent: Vec<&str> = asked
        .iter()
        .filter(|(_, point)| cache.get(point).is_none())
        .map(|(name, _)| *name)
        .collect();
    if !silent.is_empty() {
        return Err(EmitError::Request(format!(
            "hook points that candle-mi never reached in this model of {} layers: {}",
            loaded.layers(),
            silent.join(", ")
        )));
    }
    edits::check_shapes(&request.edits, inputs, &cache)?;

    let captured = |name: &str| -> Result<Tensor, EmitError> {
        cache.require(&point(name)?).cloned().map_err(failed)
    };
    let mut tensors = Vec::with_capacity(request.captures.len() + 1 + request.project.len());
    for name in &request.captures {
        tensors.push(Named::new(name, captured(name)?));
    }
    if request.logits {
        tensors.push(Named::new("logits", cache.output().clone()));
    }
    for key in &request.project {
        tensors.push(project(key, inputs, loaded)?);
    }
    let residual = sae_hook.map(captured).transpose()?;
    Ok(Forward { tensors, residual })
}

fn token_tensor(request: &Request, loaded: &LoadedModel) -> Result<Tensor, EmitError> {
    let rows = request.tokens.len();
    let width = request.tokens.first().map_or(0, Vec::len);
    Tensor::from_vec(request.tokens.concat(), (rows, width), &loaded.device)
        .map_err(|error| EmitError::Forward(format!("token tensor: {error}")))
}

/// candle-mi's logit lens: a residual of the inputs through the final norm and the unembedding.
fn project(key: &str, inputs: &Inputs, loaded: &LoadedModel) -> Result<Named, EmitError> {
    let residual = in_model_dtype(key, inputs, loaded)?;
    let width = loaded.model.hidden_size();
    // Of another rank or width it could still broadcast through the norm and give numbers that mean nothing.
    if !matches!(residual.dims(), [_, last] | [_, _, last] if *last == width) {
        return Err(EmitError::Request(format!(
            "projected tensor \"{key}\" has shape {:?}, expected [B,T,{width}] or [B,{width}]",
            residual.dims()
        )));
    }
    let projected = loaded.model.project_to_vocab(&residual);
    let projected = projected.map_err(|error| EmitError::Forward(format!("{key}: {error}")))?;
    Ok(Named::new(&format!("lens.{key}"), projected))
}
