//! The safetensors file that a request takes tensors from: teacher forcing, interventions, the SAE's own input.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::digest;
use crate::error::EmitError;
use crate::model;
use crate::protocol::Precision;

#[derive(Default)]
pub struct Inputs {
    tensors: HashMap<String, Tensor>,
    pub digest: Option<String>,
}

impl Inputs {
    /// Reads the file once, so that the digest is that of the tensors in use.
    pub fn read(path: Option<&Path>, device: &Device) -> Result<Self, EmitError> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let bytes = std::fs::read(path).map_err(|error| EmitError::io(path, &error))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, device).map_err(|error| {
            EmitError::Request(format!(
                "{} cannot be read as safetensors: {error}",
                path.display()
            ))
        })?;
        Ok(Self {
            tensors,
            digest: Some(digest::sha256(&bytes)),
        })
    }

    pub fn get(&self, key: &str) -> Result<&Tensor, EmitError> {
        self.tensors.get(key).ok_or_else(|| {
            let mut known: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            known.sort_unstable();
            let shown: Vec<&str> = known.iter().take(6).copied().collect();
            EmitError::Request(format!(
                "inputs hold no tensor \"{key}\"; among the {} there: {}",
                known.len(),
                shown.join(", ")
            ))
        })
    }
}

/// Without a precision the tensor is the float32 one of the inputs.
pub fn rounded(tensor: &Tensor, dtype: Option<Precision>) -> Result<Tensor, EmitError> {
    tensor
        .to_dtype(dtype.map_or(DType::F32, model::dtype_of))
        .map_err(|error| EmitError::Request(error.to_string()))
}
