//! In place of `call_rwkv.rs` in a build without RWKV's tokenizer: a call of it fails, and no other.

use crate::answer::Outcome;
use crate::error::EmitError;
use crate::rwkv_protocol::RwkvCall;

#[derive(Default)]
pub struct Vocabularies;

pub fn run(_: &RwkvCall, _: &mut Vocabularies) -> Result<Outcome, EmitError> {
    Err(EmitError::NotBuilt("rwkv-tokenizer"))
}
