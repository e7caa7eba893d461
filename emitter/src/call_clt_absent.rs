//! In place of `call_clt.rs` in a build without transcoders: a call of one fails, and no other.

use crate::answer::Outcome;
use crate::clt_protocol::CltCall;
use crate::error::EmitError;
use crate::inputs::Inputs;

pub fn run(_: &CltCall, _: &Inputs) -> Result<Outcome, EmitError> {
    Err(EmitError::NotBuilt("clt"))
}
