//! In place of `call_training.rs` in a build without the feature: a release has no optimizer, or its part was left out.

use crate::answer::Outcome;
use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::training_protocol::TrainingCall;

pub fn run(_: &TrainingCall, _: &Inputs) -> Result<Outcome, EmitError> {
    if cfg!(since_0_1_21) {
        return Err(EmitError::NotBuilt("training"));
    }
    Ok(Outcome::Absent)
}
