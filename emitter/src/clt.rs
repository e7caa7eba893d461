//! Opening a transcoder, and its decoder rows as interventions.

use std::path::Path;

use candle_core::Device;
use candle_mi::clt::CltFeatureId;
pub use candle_mi::clt::CrossLayerTranscoder;
use candle_mi::{HookSpec, MIError};

use crate::error::EmitError;

/// The stand-in for candle-mi's downloader takes the path of a directory for the name of a repository. The repository
/// of Gemma Scope's weights, whose name candle-mi knows, is a folder in that directory.
///
/// # Errors
/// `RealDownloader` where this build cannot ask, and otherwise what candle-mi refuses.
pub fn open(directory: &Path) -> Result<CrossLayerTranscoder, EmitError> {
    if env!("PARITY_PATCHED").is_empty() {
        return Err(EmitError::RealDownloader);
    }
    let path = std::path::absolute(directory).map_err(|error| EmitError::io(directory, &error))?;
    let name = path.to_str().ok_or_else(|| {
        EmitError::Request(format!("transcoder is not UTF-8: {}", path.display()))
    })?;
    // Paths of other repositories are absolute, so that this does not matter to them.
    std::env::set_var("PARITY_HUB", &path);
    CrossLayerTranscoder::open(name).map_err(refused)
}

/// A message of candle-mi without the place of the files, which is another on each machine.
pub fn without_path(message: &str, directory: &Path) -> String {
    message.replace(&*directory.to_string_lossy(), "TRANSCODER")
}

/// What candle-mi refuses is an outcome of the call alone.
pub fn refused(error: impl Into<MIError>) -> EmitError {
    EmitError::Model(error.into().to_string())
}

/// The decoder rows of features, each a source layer and an index, for one layer, added at one position; `at` are the
/// layer, the position and the number of tokens.
///
/// # Errors
/// `Forward` for what candle-mi refuses, also in [`open`].
pub fn injection(
    directory: &Path,
    features: &[(usize, usize)],
    at: (usize, usize, usize),
    strength: f32,
    device: &Device,
) -> Result<HookSpec, EmitError> {
    let (target, position, width) = at;
    let failed = |error: MIError| EmitError::Forward(without_path(&error.to_string(), directory));
    let mut clt = open(directory).map_err(|error| match error {
        EmitError::Model(message) => EmitError::Forward(without_path(&message, directory)),
        other => other,
    })?;
    let features: Vec<(CltFeatureId, usize)> = features
        .iter()
        .map(|(layer, index)| {
            let (layer, index) = (*layer, *index);
            (CltFeatureId { layer, index }, target)
        })
        .collect();
    clt.cache_steering_vectors(&features, device)
        .map_err(failed)?;
    clt.prepare_hook_injection(&features, position, width, strength, device)
        .map_err(failed)
}
