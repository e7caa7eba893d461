//! A hook point by its name, and a tensor that is put there.

use candle_core::Tensor;
use candle_mi::HookPoint;

use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::model::LoadedModel;

/// The hook point called `name`, which must be candle-mi's own spelling of it: `blocks.01.…` would parse as layer 1
/// and put a name into the trace that no one else knows.
pub fn point(name: &str) -> Result<HookPoint, EmitError> {
    let point = HookPoint::from(name);
    let spelt = point.to_string();
    if spelt != name {
        return Err(EmitError::Request(format!(
            "hook point \"{name}\" is spelt \"{spelt}\""
        )));
    }
    Ok(point)
}

/// An input tensor in the model's dtype: the truth is float64, and candle-mi takes what it is given.
pub fn in_model_dtype(
    key: &str,
    inputs: &Inputs,
    loaded: &LoadedModel,
) -> Result<Tensor, EmitError> {
    inputs.get(key)?.to_dtype(loaded.dtype).map_err(|error| {
        EmitError::Request(format!("inputs tensor \"{key}\" cannot be used: {error}"))
    })
}
