//! In place of `rwkv.rs` in a build without the feature: a model of RWKV is refused, and no other.

use candle_core::{DType, Device};
use candle_mi::MIBackend;
use candle_nn::VarBuilder;
use serde_json::Value;

use crate::error::EmitError;

/// There is none.
pub enum RwkvConfig {}

pub fn config(json: &Value) -> Result<Option<RwkvConfig>, EmitError> {
    match json.get("model_type").and_then(Value::as_str) {
        Some("rwkv6" | "rwkv7") => Err(EmitError::NotBuilt("rwkv")),
        _ => Ok(None),
    }
}

pub fn load(
    config: RwkvConfig,
    _: &Device,
    _: DType,
    _: VarBuilder<'_>,
) -> Result<Box<dyn MIBackend>, EmitError> {
    match config {}
}
