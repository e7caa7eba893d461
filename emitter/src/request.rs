//! Reading one request line: everything in it is untrusted, and what can be judged without reading a file is judged here.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use crate::call_protocol::{CallRequest, CALL_REQUEST};
use crate::error::EmitError;
use crate::forwards_protocol::{ForwardsRequest, FORWARDS_REQUEST};
use crate::protocol::{
    Edit, Loader, Precision, Request, SaeRequest, TokenizeRequest, TOKENIZE_REQUEST, TRACE_REQUEST,
};

/// What a line asks for.
pub enum Asked {
    Trace(Box<Request>),
    Forwards(Box<ForwardsRequest>),
    Tokens(TokenizeRequest),
    Calls(CallRequest),
}

/// The least that is read of a line that may be of another format, or broken further down.
#[derive(Deserialize)]
struct Envelope {
    format: Option<String>,
    case: Option<EnvelopeCase>,
}

#[derive(Deserialize)]
struct EnvelopeCase {
    id: Option<String>,
}

/// The case id in a line that may be bad otherwise, so that the error reply can name its case.
pub fn case_id(line: &[u8]) -> Option<String> {
    let envelope: Envelope = serde_json::from_slice(line).ok()?;
    envelope.case?.id
}

/// Parses and checks one request; all that can be judged without reading a file.
pub fn parse(line: &[u8]) -> Result<Asked, EmitError> {
    let bad =
        |error: serde_json::Error| EmitError::Request(format!("request is not valid: {error}"));
    // The format is checked first, so that a newer request is not refused for an unknown key.
    let envelope: Envelope = serde_json::from_slice(line).map_err(bad)?;
    match envelope.format.as_deref() {
        Some(TRACE_REQUEST) => {
            let request: Request = serde_json::from_slice(line).map_err(bad)?;
            check(&request)?;
            Ok(Asked::Trace(Box::new(request)))
        }
        Some(FORWARDS_REQUEST) => {
            let request: ForwardsRequest = serde_json::from_slice(line).map_err(bad)?;
            check_forwards(&request)?;
            Ok(Asked::Forwards(Box::new(request)))
        }
        Some(TOKENIZE_REQUEST) => {
            let request: TokenizeRequest = serde_json::from_slice(line).map_err(bad)?;
            check_out(&request.out)?;
            Ok(Asked::Tokens(request))
        }
        Some(CALL_REQUEST) => {
            let request: CallRequest = serde_json::from_slice(line).map_err(bad)?;
            check_calls(&request)?;
            check_out(&request.out)?;
            Ok(Asked::Calls(request))
        }
        other => Err(EmitError::Request(format!(
            "request format is {}, this emitter reads \"{TRACE_REQUEST}\", \"{FORWARDS_REQUEST}\", \
             \"{TOKENIZE_REQUEST}\" and \"{CALL_REQUEST}\"",
            other.map_or("missing".to_owned(), |format| format!("\"{format}\"")),
        ))),
    }
}

fn check(request: &Request) -> Result<(), EmitError> {
    let refuse = |message: String| Err(EmitError::Request(message));
    let width = check_tokens(&request.tokens)?;
    check_captures(&request.captures)?;
    check_loader(request.loader, request.dtype)?;
    if let Some(twice) = twice(&request.project) {
        return refuse(format!("project names a tensor twice: {twice}"));
    }
    if let Some(twice) = twice(&request.weights) {
        return refuse(format!("weights names a tensor twice: {twice}"));
    }
    if !request.weights.is_empty() && request.loader != Loader::Pretrained {
        return refuse(
            "weights are dequantized by from_pretrained, and loader is another".to_owned(),
        );
    }
    let fed = request
        .recurrent
        .as_ref()
        .is_some_and(|recurrent| !recurrent.feedback.is_empty());
    let needs_inputs = request.sae_input.is_some() || !request.project.is_empty() || fed;
    if needs_inputs && request.inputs.is_none() {
        return refuse(
            "sae_input, project or recurrent names a tensor, but inputs is null".to_owned(),
        );
    }
    check_edits(
        &request.edits,
        width,
        request.sae.as_ref(),
        request.inputs.as_deref(),
    )?;
    if request.sae_input.is_some() && request.sae.is_none() {
        return refuse("sae_input is given, but sae is null".to_owned());
    }
    check_out(&request.out)
}

fn check_forwards(request: &ForwardsRequest) -> Result<(), EmitError> {
    let refuse = |message: String| Err(EmitError::Request(message));
    let width = check_tokens(&request.tokens)?;
    check_edits(
        &request.edits,
        width,
        request.sae.as_ref(),
        request.inputs.as_deref(),
    )?;
    if request.forwards.is_empty() {
        return refuse("forwards are empty".to_owned());
    }
    if let Some(twice) = twice(request.forwards.iter().map(|forward| &forward.name)) {
        return refuse(format!("forward named twice: {twice}"));
    }
    for forward in &request.forwards {
        check_captures(&forward.captures)?;
        check_loader(forward.loader, request.dtype)?;
        if let Some(tokens) = &forward.tokens {
            check_tokens(tokens)?;
            if forward.edited {
                return refuse(format!(
                    "{}: the edits are for the request's own tokens",
                    forward.name
                ));
            }
        }
    }
    check_out(&request.out)
}

/// The width of token ids `[B][T]`.
fn check_tokens(tokens: &[Vec<u32>]) -> Result<usize, EmitError> {
    let refuse = |message: String| Err(EmitError::Request(message));
    let Some(width) = tokens.first().map(Vec::len) else {
        return refuse("tokens are empty: expected [B][T] with B, T >= 1".to_owned());
    };
    for (row, ids) in tokens.iter().enumerate() {
        if ids.is_empty() {
            return refuse(format!("tokens row {row} is empty"));
        }
        if ids.len() != width {
            return refuse(format!(
                "tokens are ragged: row 0 has {width}, row {row} has {}",
                ids.len()
            ));
        }
    }
    Ok(width)
}

fn check_captures(captures: &[String]) -> Result<(), EmitError> {
    match twice(captures) {
        Some(twice) => Err(EmitError::Request(format!("capture named twice: {twice}"))),
        None => Ok(()),
    }
}

fn check_loader(loader: Loader, dtype: Precision) -> Result<(), EmitError> {
    if loader == Loader::Pretrained && dtype != Precision::Float32 {
        return Err(EmitError::Request(format!(
            "from_pretrained always loads float32, and the request is for {}",
            dtype.name()
        )));
    }
    Ok(())
}

/// The first name that comes a second time.
fn twice<'a>(names: impl IntoIterator<Item = &'a String>) -> Option<&'a String> {
    let mut seen = HashSet::new();
    names.into_iter().find(|name| !seen.insert(*name))
}

fn check_edits(
    edits: &[Edit],
    width: usize,
    sae: Option<&SaeRequest>,
    inputs: Option<&Path>,
) -> Result<(), EmitError> {
    let refuse = |message: String| Err(EmitError::Request(message));
    for edit in edits {
        let hook = edit.hook();
        if edit.tensor().is_some() && inputs.is_none() {
            return refuse(format!(
                "edit at {hook}: it names a tensor, but inputs is null"
            ));
        }
        if let Some(position) = edit.position().filter(|position| *position >= width) {
            return refuse(format!(
                "edit at {hook}: position {position} is outside the prompt of {width} tokens"
            ));
        }
        if matches!(edit, Edit::Steer { .. }) && edits.len() > 1 {
            return refuse(format!(
                "edit at {hook}: a steer takes the pattern of a run without edits, and stands alone"
            ));
        }
        if matches!(edit, Edit::Inject { .. }) && sae.is_none_or(|sae| sae.hook != hook) {
            return refuse(format!(
                "edit at {hook}: an injection needs an SAE at this hook"
            ));
        }
    }
    Ok(())
}

fn check_calls(request: &CallRequest) -> Result<(), EmitError> {
    if let Some(twice) = twice(request.calls.iter().map(|call| &call.id)) {
        return Err(EmitError::Request(format!("call named twice: {twice}")));
    }
    if request.calls.is_empty() {
        return Err(EmitError::Request("calls are empty".to_owned()));
    }
    Ok(())
}

fn check_out(out: &Path) -> Result<(), EmitError> {
    if out.extension().is_none_or(|ending| ending != "json") {
        return Err(EmitError::Request(format!(
            "out must end in .json: {}",
            out.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "request_fuzz.rs"]
mod fuzz;
