//! One request line to one reply: which handler answers it, and what a failure or a panic of one reads like.

#[cfg(feature = "calls")]
use crate::call;
use crate::emit::{self, Session};
use crate::error::EmitError;
use crate::forwards;
use crate::panics;
use crate::protocol::Reply;
use crate::request::{self, Asked};
#[cfg(feature = "tokens")]
use crate::tokenize;

/// Answers one request line. A bad one costs its own reply and nothing else.
pub fn answer(line: &[u8], session: &mut Session) -> Reply {
    let outcome = panics::caught(|| {
        Ok(match request::parse(line)? {
            Asked::Trace(request) => {
                emit::emit(&request, session)?;
                (Some(request.case.id), request.out)
            }
            Asked::Forwards(request) => {
                forwards::run(&request, session)?;
                (Some(request.case.id), request.out)
            }
            #[cfg(feature = "tokens")]
            Asked::Tokens(request) => {
                tokenize::run(&request)?;
                (None, request.out)
            }
            #[cfg(not(feature = "tokens"))]
            Asked::Tokens(_) => return Err(EmitError::NotBuilt("tokens")),
            #[cfg(feature = "calls")]
            Asked::Calls(request) => {
                call::run(&request)?;
                (Some(request.case.id), request.out)
            }
            #[cfg(not(feature = "calls"))]
            Asked::Calls(_) => return Err(EmitError::NotBuilt("calls")),
        })
    });
    if matches!(outcome, Err(EmitError::Panic(_))) {
        // What a panic left half done is not used again.
        *session = Session::default();
    }
    match outcome {
        Ok((case, trace)) => Reply::Done {
            case,
            ok: true,
            trace,
        },
        Err(error) => Reply::Failed {
            case: request::case_id(line),
            ok: false,
            error: error.one_line(),
            kind: error.kind(),
        },
    }
}
