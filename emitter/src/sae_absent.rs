//! In place of `sae.rs` in a build without SAEs: a request for one is refused, and no other.

use candle_core::{Device, Tensor};
use candle_mi::HookSpec;

use crate::error::EmitError;
use crate::protocol::SaeRequest;
use crate::tensor::Named;
use crate::trace::Feature;

/// There is none.
pub enum SparseAutoencoder {}

pub struct LoadedSae {
    pub sae: SparseAutoencoder,
    pub digest: String,
}

#[derive(Default)]
pub struct SaeCache;

impl SaeCache {
    pub fn get(&mut self, _: &SaeRequest, _: &Device, _: &str) -> Result<&LoadedSae, EmitError> {
        Err(EmitError::NotBuilt("sae"))
    }
}

pub fn injection(
    sae: &SparseAutoencoder,
    _: &[(usize, f32)],
    _: usize,
    _: usize,
    _: &Device,
) -> Result<HookSpec, EmitError> {
    match *sae {}
}

#[derive(Default)]
pub struct SaeResult {
    pub tensors: Vec<Named>,
    pub scalars: Vec<(&'static str, serde_json::Number)>,
    pub top_features: Vec<Feature>,
}

pub fn run(loaded: &LoadedSae, _: &Tensor, _: Option<&Tensor>) -> Result<SaeResult, EmitError> {
    match loaded.sae {}
}
