//! The dequantized weights of a quantized checkpoint, as candle-mi's model is given them.
//!
//! candle-mi does not hand out a model's weights. Its `load_quantized_var_builder` (`src/backend.rs`) has anamnesis
//! dequantize the file to bfloat16 and makes a `VarBuilder` in float32 of the bytes. The same calls are made here, with
//! the anamnesis that candle-mi is linked with, and the weights are what such a `VarBuilder` answers.

use candle_core::{DType, Device};
use candle_nn::VarBuilder;

use crate::error::EmitError;
use crate::protocol::Request;
use crate::tensor::Named;
use crate::weights::WEIGHTS;

/// The weights that a request names, `[1,out,in]`, under `weights.` and their names.
///
/// # Errors
/// `Model` where anamnesis refuses the file, or does not give a weight of a name.
pub fn weights(request: &Request, device: &Device) -> Result<Vec<Named>, EmitError> {
    if request.weights.is_empty() {
        return Ok(Vec::new());
    }
    if !cfg!(anamnesis_of_candle_mi) {
        return Err(EmitError::Request(
            "this emitter is linked with two versions of anamnesis, and cannot tell which of them candle-mi calls"
                .to_owned(),
        ));
    }
    let path = request.model_dir.join(WEIGHTS);
    let refused = |error: anamnesis::AnamnesisError| {
        EmitError::Model(format!("{} by itself: {error}", path.display()))
    };
    let bytes = anamnesis::parse(&path)
        .and_then(|parsed| parsed.remember_to_bytes(anamnesis::TargetDtype::BF16))
        .map_err(refused)?;
    let builder = VarBuilder::from_buffered_safetensors(bytes, DType::F32, device)
        .map_err(|error| EmitError::Model(error.to_string()))?;
    let mut named = Vec::with_capacity(request.weights.len());
    for name in &request.weights {
        let weight = builder
            .get_unchecked(name)
            .and_then(|weight| weight.unsqueeze(0))
            .map_err(|error| EmitError::Model(format!("{name}: {error}")))?;
        named.push(Named::new(&format!("weights.{name}"), weight));
    }
    Ok(named)
}
