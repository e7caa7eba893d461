//! Loading a sparse autoencoder, keeping the last one, and what a trace says of one.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
pub use candle_mi::sae::SparseAutoencoder;
use candle_mi::HookSpec;

use crate::digest::{self, Stamp};
use crate::error::EmitError;
use crate::protocol::SaeRequest;
use crate::tensor::Named;
use crate::trace::Feature;

/// How many of the active features a trace lists.
const TOP: usize = 10;

pub struct LoadedSae {
    pub sae: SparseAutoencoder,
    pub digest: String,
}

#[derive(PartialEq)]
struct Key {
    files: Vec<Stamp>,
    layer: usize,
    device: String,
}

/// The last SAE.
#[derive(Default)]
pub struct SaeCache {
    held: Option<(Key, Device, LoadedSae)>,
}

impl SaeCache {
    /// `device` must be the one that the model lies on, `device_name` its name in the request.
    pub fn get(
        &mut self,
        wanted: &SaeRequest,
        device: &Device,
        device_name: &str,
    ) -> Result<&LoadedSae, EmitError> {
        let files = files_of(&wanted.path)?;
        let key = Key {
            files: digest::stamps(&files)?,
            layer: wanted.layer,
            device: device_name.to_owned(),
        };
        let held = match self.held.take() {
            // Tensors made on two `Device` values for one GPU cannot be mixed.
            Some((old, on, sae)) if old == key && on.same_device(device) => (key, on, sae),
            other => {
                drop(other);
                let sae = load(wanted, &files, device)?;
                // candle-mi opens the files itself: they must not have changed between the hash and the load.
                if digest::stamps(&files)? != key.files {
                    return Err(EmitError::Sae(format!(
                        "{} changed while it was read",
                        wanted.path.display()
                    )));
                }
                (key, device.clone(), sae)
            }
        };
        Ok(&self.held.insert(held).2)
    }
}

/// The files that candle-mi reads for `path`: the archive itself, or `cfg.json` and the weights beside it.
fn files_of(path: &Path) -> Result<Vec<PathBuf>, EmitError> {
    if path.is_file() {
        if path.extension().is_some_and(|ending| ending == "npz") {
            return Ok(vec![path.to_path_buf()]);
        }
        return Err(EmitError::Sae(format!(
            "{} is neither a .npz file nor a directory",
            path.display()
        )));
    }
    let config = path.join("cfg.json");
    // candle-mi's own order of preference.
    let weights = ["sae_weights.safetensors", "model.safetensors"]
        .iter()
        .map(|name| path.join(name))
        .find(|file| file.is_file());
    match (config.is_file(), weights) {
        (true, Some(weights)) => Ok(vec![config, weights]),
        _ => Err(EmitError::Sae(format!(
            "expected a .npz file, or a directory with cfg.json and sae_weights.safetensors or model.safetensors: {}",
            path.display()
        ))),
    }
}

fn load(wanted: &SaeRequest, files: &[PathBuf], device: &Device) -> Result<LoadedSae, EmitError> {
    let mut digests = Vec::with_capacity(files.len());
    for file in files {
        let bytes = std::fs::read(file).map_err(|error| EmitError::io(file, &error))?;
        let name = file.file_name().and_then(|name| name.to_str());
        digests.push((name.unwrap_or_default(), digest::sha256(&bytes)));
    }
    let sae = if wanted.path.is_file() {
        SparseAutoencoder::from_npz(&wanted.path, wanted.layer, device)
    } else {
        SparseAutoencoder::from_local(&wanted.path, device)
    }
    .map_err(|error| EmitError::Sae(error.to_string()))?;
    Ok(LoadedSae {
        sae,
        digest: digest::of_files(&digests),
    })
}

/// Decoder rows at one position, as candle-mi prepares them: where it aims them elsewhere than at the SAE's hook, that
/// is its answer, and the trace shows it.
pub fn injection(
    sae: &SparseAutoencoder,
    features: &[(usize, f32)],
    position: usize,
    width: usize,
    device: &Device,
) -> Result<HookSpec, EmitError> {
    sae.prepare_hook_injection(features, position, width, device)
        .map_err(|error| EmitError::Sae(error.to_string()))
}

/// What a trace says of an SAE.
#[derive(Default)]
pub struct SaeResult {
    pub tensors: Vec<Named>,
    /// Name and value in the order of the trace; whole numbers stay whole.
    pub scalars: Vec<(&'static str, serde_json::Number)>,
    pub top_features: Vec<Feature>,
}

/// Encodes and decodes the candidate's own residual `[B,T,d]` and, if given, the truth's. "Last position" is that of
/// the first row of the batch, as in candle-mi's own SAE reference.
pub fn run(
    loaded: &LoadedSae,
    residual: &Tensor,
    truth: Option<&Tensor>,
) -> Result<SaeResult, EmitError> {
    let failed = |error: candle_mi::MIError| EmitError::Sae(error.to_string());
    let sae = &loaded.sae;
    let features = sae.encode(residual).map_err(failed)?;
    let recon = sae.decode(&features).map_err(failed)?;
    let mse = sae.reconstruction_error(residual).map_err(failed)?;
    let encoded = last_position(&features)?;
    let active = encoded.iter().filter(|value| **value > 0.0).count();
    let mut scalars = vec![("sae.n_active_last_pos", serde_json::Number::from(active))];
    scalars.extend(finite("sae.reconstruction_mse", mse));
    for (name, values) in [
        ("sae.resid_last_norm", &last_position(residual)?),
        ("sae.encoded_last_norm", &encoded),
        ("sae.decoded_last_norm", &last_position(&recon)?),
    ] {
        scalars.extend(finite(name, norm(values)));
    }
    let mut tensors = vec![
        Named::new("sae.features", features),
        Named::new("sae.recon", recon),
    ];
    if let Some(truth) = truth {
        // The SAE computes in float32; the conversion is here so that encode and the error use the same tensor.
        let truth = truth
            .to_dtype(DType::F32)
            .map_err(|error| EmitError::Sae(error.to_string()))?;
        let features = sae.encode(&truth).map_err(failed)?;
        let recon = sae.decode(&features).map_err(failed)?;
        let name = "sae_on_truth.reconstruction_mse";
        let mse = sae.reconstruction_error(&truth).map_err(failed)?;
        scalars.extend(finite(name, mse));
        tensors.push(Named::new("sae_on_truth.features", features));
        tensors.push(Named::new("sae_on_truth.recon", recon));
    }
    Ok(SaeResult {
        tensors,
        scalars,
        top_features: top_features(&encoded),
    })
}

/// The last position of the first row of `[B,T,n]`, widened to f64.
fn last_position(tensor: &Tensor) -> Result<Vec<f64>, EmitError> {
    let values = tensor
        .get(0)
        .and_then(|row| row.get(row.dim(0)?.saturating_sub(1)))
        .and_then(|last| last.to_dtype(DType::F32)?.to_vec1::<f32>())
        .map_err(|error| EmitError::Sae(format!("last position: {error}")))?;
    Ok(values.into_iter().map(f64::from).collect())
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// `None` leaves a non-finite scalar out: JSON has no word for it, the tensors it comes from show it, and its absence
/// is a failure of its own.
fn finite(name: &'static str, value: f64) -> Option<(&'static str, serde_json::Number)> {
    serde_json::Number::from_f64(value).map(|number| (name, number))
}

/// The largest active features, ties by index.
fn top_features(encoded: &[f64]) -> Vec<Feature> {
    let mut active: Vec<Feature> = encoded
        .iter()
        .enumerate()
        .filter(|(_, value)| **value > 0.0 && value.is_finite())
        .map(|(index, value)| Feature {
            index,
            value: *value,
        })
        .collect();
    active.sort_by(|a, b| b.value.total_cmp(&a.value).then(a.index.cmp(&b.index)));
    active.truncate(TOP);
    active
}

#[cfg(test)]
mod tests {
    use super::top_features;

    #[test]
    fn only_active_features_are_listed_and_ties_go_by_index() {
        let top: Vec<usize> = top_features(&[0.0, 2.0, -1.0, 5.0, 2.0])
            .iter()
            .map(|feature| feature.index)
            .collect();
        assert_eq!(top, [3, 1, 4]);
    }
}
