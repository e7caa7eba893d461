//! RWKV models, which candle-mi has behind a feature.

use candle_core::{DType, Device};
use candle_mi::rwkv::SUPPORTED_RWKV_MODEL_TYPES;
use candle_mi::{GenericRwkv, MIBackend, MIError, RwkvConfig};
use candle_nn::VarBuilder;
use serde_json::Value;

use crate::error::EmitError;

/// A config that candle-mi reads as one of RWKV, or nothing for any other model type.
///
/// # Errors
/// `Model` where candle-mi refuses the config.
pub fn config(json: &Value) -> Result<Option<RwkvConfig>, EmitError> {
    let model_type = json.get("model_type").and_then(Value::as_str);
    if !model_type.is_some_and(|name| SUPPORTED_RWKV_MODEL_TYPES.contains(&name)) {
        return Ok(None);
    }
    RwkvConfig::from_hf_config(json)
        .map(Some)
        .map_err(|error| refused(&error))
}

/// The model of a config and its weights.
///
/// # Errors
/// `Model` where candle-mi refuses the weights.
pub fn load(
    config: RwkvConfig,
    device: &Device,
    dtype: DType,
    builder: VarBuilder<'_>,
) -> Result<Box<dyn MIBackend>, EmitError> {
    let model =
        GenericRwkv::load(config, device, dtype, builder).map_err(|error| refused(&error))?;
    Ok(Box::new(model))
}

fn refused(error: &MIError) -> EmitError {
    EmitError::Model(error.to_string())
}
