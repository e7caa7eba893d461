//! Tokenising: what candle-mi's own tokenizer makes of texts, without a model.

use std::collections::BTreeMap;
use std::path::Path;

use candle_mi::MITokenizer;
use serde::Serialize;

use crate::digest::{self, Stamp};
use crate::error::{one_line, EmitError};
use crate::identity::{CandleMi, Identity};
use crate::model;
use crate::protocol::{Loader, TokenizeRequest};
use crate::trace;

const FORMAT: &str = "candle-mi-parity/tokens/1";

/// The document at `out`; the lists run parallel to the request's texts. Nothing in it differs between two runs.
#[derive(Serialize)]
struct Document {
    format: &'static str,
    emitter: &'static str,
    candle_mi: CandleMi,
    tokenizer_digest: String,
    /// With the special tokens that the tokenizer adds; `None` where candle-mi failed on the text.
    encode: Vec<Option<Vec<u32>>>,
    /// Without them.
    encode_raw: Vec<Option<Vec<u32>>>,
    /// The text of the ids in `encode`.
    decode: Vec<Option<String>>,
    /// First byte and the one after the last of each id in `encode`, one after the other.
    offsets: Vec<Option<Vec<usize>>>,
    /// Index of a text, and what failed on it.
    errors: BTreeMap<usize, String>,
}

/// Answers one request; afterwards the document lies at `request.out`.
pub fn run(request: &TokenizeRequest) -> Result<(), EmitError> {
    check_target(request)?;
    let (own, tokenizer_digest) = load(&request.tokenizer)?;
    let model = match request.loader {
        Loader::Hf | Loader::Auto => None,
        Loader::Pretrained => {
            let directory = request.tokenizer.parent().unwrap_or(Path::new("."));
            Some(model::from_pretrained(directory)?)
        }
    };
    let tokenizer = match &model {
        None => &own,
        Some(model) => model.tokenizer().ok_or_else(|| {
            EmitError::Model(format!(
                "from_pretrained took no tokenizer from {}",
                request.tokenizer.display()
            ))
        })?,
    };
    let identity = Identity::of_this_build();
    let mut document = Document {
        format: FORMAT,
        emitter: identity.emitter,
        candle_mi: identity.candle_mi,
        tokenizer_digest,
        encode: Vec::with_capacity(request.texts.len()),
        encode_raw: Vec::with_capacity(request.texts.len()),
        decode: Vec::with_capacity(request.texts.len()),
        offsets: Vec::with_capacity(request.texts.len()),
        errors: BTreeMap::new(),
    };
    for (index, text) in request.texts.iter().enumerate() {
        let mut failures = Failures::default();
        let encoded = failures.keep("encode", tokenizer.encode(text));
        let raw = failures.keep("encode_raw", tokenizer.encode_raw(text));
        let decoded = encoded
            .as_deref()
            .and_then(|ids| failures.keep("decode", tokenizer.decode(ids)));
        let offsets = failures.keep("encode_with_offsets", tokenizer.encode_with_offsets(text));
        document.encode.push(encoded);
        document.encode_raw.push(raw);
        document.decode.push(decoded);
        document
            .offsets
            .push(offsets.map(|found| flat(&found.offsets)));
        if let Some(message) = failures.told() {
            document.errors.insert(index, message);
        }
    }
    trace::write_document(&request.out, &document)
}

fn flat(offsets: &[(usize, usize)]) -> Vec<usize> {
    offsets
        .iter()
        .flat_map(|(start, end)| [*start, *end])
        .collect()
}

/// `tokenizer.json` ends in `.json` like any `out`: writing must not replace what was read.
fn check_target(request: &TokenizeRequest) -> Result<(), EmitError> {
    trace::prepare_directory(&request.out)?;
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    if real(&request.out).is_some() && real(&request.out) == real(&request.tokenizer) {
        return Err(EmitError::Request(format!(
            "out is the tokenizer itself: {}",
            request.out.display()
        )));
    }
    Ok(())
}

/// The tokenizer and the SHA-256 of its file.
fn load(path: &Path) -> Result<(MITokenizer, String), EmitError> {
    let missing = |error: EmitError| EmitError::Model(format!("tokenizer {error}"));
    let before = Stamp::of(path).map_err(missing)?;
    let bytes = std::fs::read(path).map_err(|error| missing(EmitError::io(path, &error)))?;
    let tokenizer =
        MITokenizer::from_hf_path(path).map_err(|error| EmitError::Model(error.to_string()))?;
    // candle-mi opens the file itself: it must not have changed between the hash and the load.
    if Stamp::of(path).map_err(missing)? != before {
        return Err(EmitError::Model(format!(
            "{} changed while it was read",
            path.display()
        )));
    }
    Ok((tokenizer, digest::sha256(&bytes)))
}

/// The errors of one text. Steps often fail with the same message, which is given once, under the first step.
#[derive(Default)]
struct Failures(Vec<(&'static str, String)>);

impl Failures {
    fn keep<T>(&mut self, step: &'static str, outcome: candle_mi::Result<T>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                let message = one_line(&error.to_string());
                if !self.0.iter().any(|(_, known)| *known == message) {
                    self.0.push((step, message));
                }
                None
            }
        }
    }

    fn told(self) -> Option<String> {
        let lines: Vec<String> = self
            .0
            .iter()
            .map(|(step, message)| format!("{step}: {message}"))
            .collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}

#[cfg(test)]
#[path = "tokenize_tests.rs"]
mod tests;
