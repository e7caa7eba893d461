//! `parity-emitter` reads requests as JSON Lines on stdin, runs candle-mi on each, and writes a trace (or a
//! document of token ids, of digests or of answers to calls) per request and one reply line on stdout. It knows nothing of the truth and judges nothing.

#[cfg(feature = "calls")]
mod answer;
#[cfg(feature = "calls")]
mod call;
#[cfg(feature = "calls")]
mod call_caches;
#[cfg(feature = "calls")]
#[cfg_attr(not(feature = "clt"), path = "call_clt_absent.rs")]
mod call_clt;
#[cfg(feature = "calls")]
#[cfg_attr(not(feature = "diffusion"), path = "call_diffusion_absent.rs")]
mod call_diffusion;
#[cfg(feature = "calls")]
mod call_gradients;
#[cfg(feature = "calls")]
mod call_measures;
#[cfg(feature = "calls")]
mod call_model;
#[cfg(feature = "calls")]
mod call_offsets;
mod call_protocol;
#[cfg(feature = "calls")]
#[cfg_attr(not(feature = "rwkv-tokenizer"), path = "call_rwkv_absent.rs")]
mod call_rwkv;
#[cfg(feature = "calls")]
mod call_sae;
#[cfg(feature = "calls")]
#[cfg_attr(not(feature = "stoicheia"), path = "call_stoicheia_absent.rs")]
mod call_stoicheia;
#[cfg(feature = "calls")]
#[cfg_attr(not(feature = "training"), path = "call_training_absent.rs")]
mod call_training;
#[cfg_attr(not(feature = "clt"), path = "clt_absent.rs")]
mod clt;
mod clt_protocol;
mod diffusion_protocol;
mod digest;
mod dispatch;
mod edits;
mod emit;
mod entries;
mod error;
mod forward;
mod forwards;
mod forwards_protocol;
mod hook_point;
mod identity;
mod inputs;
#[cfg(feature = "calls")]
mod last;
mod machine;
mod model;
mod panics;
mod protocol;
#[cfg_attr(not(feature = "quantized"), path = "quantized_absent.rs")]
mod quantized;
mod request;
#[cfg_attr(not(feature = "rwkv"), path = "rwkv_absent.rs")]
mod rwkv;
mod rwkv_protocol;
#[cfg_attr(not(feature = "sae"), path = "sae_absent.rs")]
mod sae;
#[cfg(all(feature = "calls", feature = "stoicheia"))]
mod stoicheia;
mod stoicheia_protocol;
mod tensor;
#[cfg(feature = "tokens")]
mod tokenize;
mod trace;
mod training_protocol;
mod weights;

use std::io::{BufRead, Write};
use std::process::ExitCode;

use serde::Serialize;

use crate::dispatch::answer;
use crate::emit::Session;
use crate::protocol::Reply;

const USAGE: &str = "usage: parity-emitter < requests.jsonl | --once FILE | --version";

fn main() -> ExitCode {
    panics::keep();
    // candle asks for this number before each matrix product, and without the variable reads /proc/cpuinfo each time.
    let threads = candle_core::utils::get_num_threads();
    std::env::set_var("RAYON_NUM_THREADS", threads.to_string());
    // The stand-in for candle-mi's downloader joins this and the name of a repository, which is here an absolute path.
    std::env::set_var("PARITY_HUB", std::path::MAIN_SEPARATOR_STR);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        [] => serve(),
        ["--version"] => say(&identity::Version::of_this_build()),
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

/// Answers requests until stdin ends.
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
