//! In place of `quantized.rs` in a build without the feature: a request for weights is refused, and no other.

use candle_core::Device;

use crate::error::EmitError;
use crate::protocol::Request;
use crate::tensor::Named;

/// No weights, which is an error where some are asked for.
pub fn weights(request: &Request, _device: &Device) -> Result<Vec<Named>, EmitError> {
    if request.weights.is_empty() {
        Ok(Vec::new())
    } else {
        Err(EmitError::NotBuilt("quantized"))
    }
}
