//! `parity-emitter` reads requests as JSON Lines on stdin, runs candle-mi on each, and writes a trace (or a
//! document of token ids) per request and one reply line on stdout. It knows nothing of the truth and judges nothing.

mod call;
mod call_measures;
mod call_sae;
mod digest;
mod edits;
mod emit;
mod error;
mod forward;
mod identity;
mod inputs;
mod machine;
mod model;
mod request;
mod sae;
mod tensor;
mod tokenize;
mod trace;
mod weights;

use std::io::{BufRead, Write};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::emit::Session;
use crate::error::{one_line, EmitError};
use crate::request::Asked;

const USAGE: &str = "usage: parity-emitter < requests.jsonl | --once FILE | --version";

/// The last panic's message. Not thread-local: a panic may come up on one of rayon's threads.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// One reply line.
#[derive(Serialize)]
#[serde(untagged)]
enum Reply {
    Done {
        /// `None` for a tokenising request, which has none.
        case: Option<String>,
        ok: bool,
        trace: PathBuf,
    },
    Failed {
        /// `None` when the line was too broken to name its case.
        case: Option<String>,
        ok: bool,
        error: String,
        kind: &'static str,
    },
}

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        let message = one_line(&info.to_string());
        eprintln!("{message}");
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = message;
    }));
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        [] => serve(),
        ["--version"] => say(&identity::Identity::of_this_build()),
        ["--once", file] => once(file),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("parity-emitter: {message}");
            ExitCode::from(2)
        }
    }
}

/// Answers requests until stdin ends. A bad one costs its own reply and nothing else.
fn serve() -> Result<(), String> {
    let mut session = Session::default();
    let mut stdin = std::io::stdin().lock();
    let mut line = Vec::new();
    loop {
        line.clear();
        // Bytes, not text: a line that is not UTF-8 is a bad request, not the end of the process.
        let read = stdin.read_until(b'\n', &mut line);
        if read.map_err(|error| format!("stdin: {error}"))? == 0 {
            return Ok(());
        }
        if !line.trim_ascii().is_empty() {
            say(&answer(&line, &mut session))?;
        }
    }
}

/// Answers the one request in `file`.
fn once(file: &str) -> Result<(), String> {
    let line = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
    match answer(&line, &mut Session::default()) {
        Reply::Failed { error, kind, .. } => Err(format!("{kind}: {error}")),
        done => say(&done),
    }
}

fn answer(line: &[u8], session: &mut Session) -> Reply {
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

/// Writes one line of JSON and flushes it: the reader waits for it.
fn say(value: &impl Serialize) -> Result<(), String> {
    let mut stdout = std::io::stdout().lock();
    serde_json::to_string(value)
        .map_err(|error| error.to_string())
        .and_then(|json| {
            writeln!(stdout, "{json}")
                .and_then(|()| stdout.flush())
                .map_err(|error| format!("stdout: {error}"))
        })
}
