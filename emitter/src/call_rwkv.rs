//! Calls of candle-mi's tokenizer with an RWKV vocabulary.

use std::path::Path;

use candle_mi::{MIError, MITokenizer};

use crate::answer::{Answer, Outcome};
use crate::error::EmitError;
use crate::last::Last;
use crate::rwkv_protocol::RwkvCall;

/// The last tokenizer.
pub type Vocabularies = Last<MITokenizer>;

pub fn run(call: &RwkvCall, tokenizers: &mut Vocabularies) -> Result<Outcome, EmitError> {
    let tokenizer = tokenizers.get(call.vocabulary(), load)?;
    Ok(match answers(call, tokenizer) {
        Ok(answers) => Outcome::Results(answers),
        Err(error) => Outcome::Refused(error),
    })
}

/// The message of a refusal without the place of the file, which is another on each machine.
fn load(path: &Path) -> Result<MITokenizer, EmitError> {
    MITokenizer::from_rwkv_path(path).map_err(|error| {
        let path = path.to_string_lossy();
        EmitError::Model(error.to_string().replace(&*path, "VOCABULARY"))
    })
}

fn answers(call: &RwkvCall, tokenizer: &MITokenizer) -> Result<Vec<Answer>, MIError> {
    Ok(match call {
        RwkvCall::VocabSize { .. } => {
            // Far below 2^53.
            vec![Answer::scalar("value", tokenizer.vocab_size() as f64)]
        }
        RwkvCall::Encode { texts, .. } => {
            let (mut ids, mut raw, mut decoded) = (Vec::new(), Vec::new(), Vec::new());
            for text in texts {
                let encoded = tokenizer.encode(text)?;
                decoded.push(tokenizer.decode(&encoded)?);
                ids.extend(ended(&encoded));
                raw.extend(ended(&tokenizer.encode_raw(text)?));
            }
            vec![
                Answer::list("tokens", ids),
                Answer::list("raw", raw),
                Answer::texts("text", decoded),
            ]
        }
        RwkvCall::EncodeWithOffsets { text, .. } => {
            let found = tokenizer.encode_with_offsets(text)?;
            let places = found.offsets.iter().flat_map(|(start, end)| [*start, *end]);
            vec![
                Answer::list("tokens", found.ids.iter().copied().map(f64::from)),
                Answer::list("offsets", places.map(|place| place as f64)),
            ]
        }
        RwkvCall::Decode { tokens, .. } => {
            vec![Answer::texts("text", [tokenizer.decode(tokens)?])]
        }
        RwkvCall::DecodeToken { token, .. } => {
            vec![Answer::texts("text", [tokenizer.decode_token(*token)?])]
        }
        RwkvCall::FindTokenId { word, .. } => {
            let found = tokenizer.find_token_id(word)?;
            vec![Answer::scalar("token", f64::from(found))]
        }
    })
}

fn ended(ids: &[u32]) -> impl Iterator<Item = f64> + '_ {
    ids.iter().copied().map(f64::from).chain([-1.0])
}
