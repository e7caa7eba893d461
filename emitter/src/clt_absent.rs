//! In place of `clt.rs` in a build without transcoders: an edit that needs one is refused, and no other.

use std::path::Path;

use candle_core::Device;
use candle_mi::HookSpec;

use crate::error::EmitError;

pub fn injection(
    _: &Path,
    _: &[(usize, usize)],
    _: (usize, usize, usize),
    _: f32,
    _: &Device,
) -> Result<HookSpec, EmitError> {
    Err(EmitError::NotBuilt("clt"))
}
