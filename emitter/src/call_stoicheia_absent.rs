//! In place of `call_stoicheia.rs` in a build without the feature: a call of one of its functions fails, and no other.

use crate::answer::Outcome;
use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::stoicheia_protocol::StoicheiaCall;

pub fn run(_: &StoicheiaCall, _: &Inputs) -> Result<Outcome, EmitError> {
    if cfg!(since_0_1_8) {
        Err(EmitError::NotBuilt("stoicheia"))
    } else {
        Ok(Outcome::Absent)
    }
}
