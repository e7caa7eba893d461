//! Calls of a tokenizer's functions for single tokens and for where tokens stand in a text.

use candle_mi::{convert_positions, EncodingWithOffsets, MIError, MITokenizer};

use crate::answer::{Answer, Outcome};
use crate::call_model::tokenizer;
use crate::call_protocol::OffsetsCall;
use crate::error::EmitError;
use crate::last::Last;

/// The last tokenizer.
pub type Tokenizers = Last<MITokenizer>;

pub fn run(call: &OffsetsCall, tokenizers: &mut Tokenizers) -> Result<Outcome, EmitError> {
    let tokenizer = tokenizers.get(call.model(), tokenizer)?;
    Ok(match answers(call, tokenizer) {
        Ok(answers) => Outcome::Results(answers),
        Err(error) => Outcome::Refused(error),
    })
}

fn answers(call: &OffsetsCall, tokenizer: &MITokenizer) -> Result<Vec<Answer>, MIError> {
    Ok(match call {
        OffsetsCall::EncodeWithOffsets { text, .. } => {
            encoding(&tokenizer.encode_with_offsets(text)?)
        }
        OffsetsCall::EncodeRawWithOffsets { text, .. } => {
            encoding(&tokenizer.encode_raw_with_offsets(text)?)
        }
        OffsetsCall::DecodeToken { token, .. } => {
            vec![Answer::texts("text", [tokenizer.decode_token(*token)?])]
        }
        OffsetsCall::FindTokenId { word, .. } => {
            let found = tokenizer.find_token_id(word)?;
            vec![Answer::scalar("token", f64::from(found))]
        }
        OffsetsCall::CharToToken {
            text, positions, ..
        } => {
            let encoded = tokenizer.encode_with_offsets(text)?;
            vec![each(positions, |at| encoded.char_to_token(at))]
        }
        OffsetsCall::CharToTokenFuzzy {
            text, positions, ..
        } => {
            let encoded = tokenizer.encode_with_offsets(text)?;
            vec![each(positions, |at| encoded.char_to_token_fuzzy(at))]
        }
        OffsetsCall::CharToTokenStart {
            text, positions, ..
        } => {
            let encoded = tokenizer.encode_with_offsets(text)?;
            vec![each(positions, |at| encoded.char_to_token_start(at))]
        }
        OffsetsCall::CharRangeToTokens {
            text, start, end, ..
        } => {
            let encoded = tokenizer.encode_with_offsets(text)?;
            let found = encoded.char_range_to_tokens(*start, *end);
            vec![Answer::list("tokens", found.into_iter().map(index))]
        }
        OffsetsCall::TokenToCharRange { text, tokens, .. } => {
            let encoded = tokenizer.encode_with_offsets(text)?;
            let ranges: Vec<Option<(usize, usize)>> = tokens
                .iter()
                .map(|token| encoded.token_to_char_range(*token))
                .collect();
            let end = |pick: fn((usize, usize)) -> usize| -> Vec<f64> {
                ranges.iter().map(|range| place(range.map(pick))).collect()
            };
            vec![
                Answer::list("start", end(|range| range.0)),
                Answer::list("end", end(|range| range.1)),
            ]
        }
        OffsetsCall::LabelSpans { text, spans, .. } => {
            let encoded = tokenizer.encode_with_offsets(text)?;
            let spans: Vec<(&str, std::ops::Range<usize>)> = spans
                .iter()
                .map(|(name, start, end)| (name.as_str(), *start..*end))
                .collect();
            vec![Answer::texts("text", encoded.label_spans(&spans))]
        }
        OffsetsCall::ConvertPositions {
            text, positions, ..
        } => {
            let encoded = tokenizer.encode_with_offsets(text)?;
            let found = convert_positions(&encoded, positions);
            let texts = found
                .iter()
                .map(|each| each.token.clone().unwrap_or_default());
            vec![
                Answer::list("token", found.iter().map(|each| place(each.token_idx))),
                Answer::texts("text", texts),
                Answer::list(
                    "exact",
                    found
                        .iter()
                        .map(|each| f64::from(u8::from(each.exact_match))),
                ),
            ]
        }
    })
}

fn encoding(encoded: &EncodingWithOffsets) -> Vec<Answer> {
    let tokens = encoded.tokens_with_offsets();
    vec![
        Answer::list("ids", encoded.ids.iter().map(|id| f64::from(*id))),
        Answer::texts("text", tokens.iter().map(|token| &token.token)),
        Answer::list("start", tokens.iter().map(|token| index(token.start))),
        Answer::list("end", tokens.iter().map(|token| index(token.end))),
    ]
}

fn each(positions: &[usize], find: impl Fn(usize) -> Option<usize>) -> Answer {
    Answer::list("token", positions.iter().map(|at| place(find(*at))))
}

/// -1 where there is none.
fn place(found: Option<usize>) -> f64 {
    found.map_or(-1.0, index)
}

/// An index into a text is far below 2^53.
fn index(at: usize) -> f64 {
    at as f64
}
