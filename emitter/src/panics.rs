//! A panic of candle-mi as an error of what was asked, with its message.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

use crate::error::{one_line, EmitError};

/// The last panic's message. Not thread-local: a panic may come up on one of rayon's threads.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Installs a panic hook that prints one line on stderr and keeps it for the error.
pub fn keep() {
    std::panic::set_hook(Box::new(|info| {
        let message = one_line(&info.to_string());
        eprintln!("{message}");
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = message;
    }));
}

/// What `work` returns. What it was at work on when it panicked must not be used again.
///
/// # Errors
/// Those of `work`, or `Panic`.
pub fn caught<T>(work: impl FnOnce() -> Result<T, EmitError>) -> Result<T, EmitError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        let message = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        Err(EmitError::Panic(message.clone()))
    })
}
