//! One request line to one reply: which handler answers it, and what a failure or a panic of one reads like.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

use crate::call;
use crate::emit::{self, Session};
use crate::error::{one_line, EmitError};
use crate::protocol::Reply;
use crate::request::{self, Asked};
use crate::tokenize;

/// The last panic's message. Not thread-local: a panic may come up on one of rayon's threads.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Installs a panic hook that prints one line on stderr and keeps it for the reply.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|info| {
        let message = one_line(&info.to_string());
        eprintln!("{message}");
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = message;
    }));
}

/// Answers one request line. A bad one costs its own reply and nothing else.
pub fn answer(line: &[u8], session: &mut Session) -> Reply {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        Ok(match request::parse(line)? {
            Asked::Trace(request) => {
                emit::emit(&request, session)?;
                (Some(request.case.id), request.out)
            }
            Asked::Tokens(request) => {
                tokenize::run(&request)?;
                (None, request.out)
            }
            Asked::Calls(request) => {
                call::run(&request)?;
                (Some(request.case.id), request.out)
            }
        })
    }))
    .unwrap_or_else(|_| {
        // What a panic left half done is not used again.
        *session = Session::default();
        let message = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        Err(EmitError::Panic(message.clone()))
    });
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
