//! What can go wrong with one request, by who is to look at it.

use std::path::Path;

/// A failed request. The variant names the culprit: the caller, the model's files, the SAE's files, candle-mi's
/// forward pass, the disk, a bug that panicked, or the build.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    #[error("{0}")]
    Request(String),
    #[error("{0}")]
    Model(String),
    #[error("{0}")]
    Sae(String),
    #[error("{0}")]
    Forward(String),
    #[error("{0}")]
    Io(String),
    #[error("{0}")]
    Panic(String),
    /// A part that was left out, because it does not compile against this candle-mi, or candle-mi does not have it.
    #[error("this emitter was built without its part `{0}`")]
    NotBuilt(&'static str),
    /// `from_pretrained` of a build without the stand-in for the downloader.
    #[error(
        "this emitter was built with the real hf-fetch-model, through which from_pretrained reads repositories over the \
         network and no directory"
    )]
    RealDownloader,
}

impl EmitError {
    /// An I/O failure with the path that it happened at, which `std::io::Error` does not carry.
    pub fn io(path: &Path, error: &impl std::fmt::Display) -> Self {
        Self::Io(format!("{}: {error}", path.display()))
    }

    /// The word used for this kind of failure in a reply.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Request(_) => "request",
            Self::Model(_) => "model",
            Self::Sae(_) => "sae",
            Self::Forward(_) => "forward",
            Self::Io(_) => "io",
            Self::Panic(_) => "panic",
            Self::NotBuilt(_) | Self::RealDownloader => "not-built",
        }
    }

    /// The message on one line of bounded length: candle appends a backtrace when one is enabled, and a reply is a
    /// line.
    pub fn one_line(&self) -> String {
        one_line(&self.to_string())
    }
}

/// `text` without line breaks or a backtrace, cut at 600 characters.
pub fn one_line(text: &str) -> String {
    const LONGEST: usize = 600;
    let told: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("0: ") && *line != "stack backtrace:")
        .filter(|line| !line.is_empty())
        .collect();
    let joined = told.join("; ");
    match joined.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", joined.get(..end).unwrap_or_default()),
        None => joined,
    }
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn a_backtrace_is_dropped_and_lines_are_joined() {
        assert_eq!(
            one_line("shape mismatch\n  in matmul\n   0: candle::bt\n   1: main"),
            "shape mismatch; in matmul"
        );
    }

    #[test]
    fn a_long_message_is_cut() {
        assert_eq!(one_line(&"é".repeat(900)).chars().count(), 601);
    }
}
