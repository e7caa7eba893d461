//! In place of `call_diffusion.rs` in a build without the feature: a release has none, or its part was left out.

use crate::answer::Outcome;
use crate::diffusion_protocol::DiffusionCall;
use crate::error::EmitError;
use crate::inputs::Inputs;

pub fn run(_: &DiffusionCall, _: &Inputs) -> Result<Outcome, EmitError> {
    if cfg!(since_0_1_14) {
        return Err(EmitError::NotBuilt("diffusion"));
    }
    Ok(Outcome::Absent)
}
