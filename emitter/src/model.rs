//! Loading a model from a local directory, and keeping the last one: most requests of a run share theirs.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_mi::{GenericTransformer, MIBackend, TransformerConfig};
use candle_nn::VarBuilder;

use crate::digest::{self, Stamp};
use crate::error::EmitError;
use crate::request::Precision;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

pub struct LoadedModel {
    pub model: GenericTransformer,
    pub device: Device,
    pub dtype: DType,
    pub vocab_size: usize,
    /// Over the very bytes of `config.json` and `model.safetensors` that the model was built from.
    pub digest: String,
}

impl LoadedModel {
    pub fn layers(&self) -> usize {
        self.model.num_layers()
    }

    /// Refuses ids that have no row in the embedding, which candle would report as an index error without the id.
    pub fn check_tokens(&self, tokens: &[Vec<u32>]) -> Result<(), EmitError> {
        for (row, ids) in tokens.iter().enumerate() {
            for (position, id) in ids.iter().enumerate() {
                if usize::try_from(*id).map_or(true, |id| id >= self.vocab_size) {
                    return Err(EmitError::Request(format!(
                        "token {id} at row {row}, position {position} is outside the vocabulary of {}",
                        self.vocab_size
                    )));
                }
            }
        }
        Ok(())
    }
}

/// What must be equal for a loaded model to be used again.
#[derive(PartialEq)]
struct Key {
    files: [Stamp; 2],
    precision: Precision,
    device: String,
}

/// The last model, and the last device: tensors made on two `Device` values for one GPU cannot be mixed.
#[derive(Default)]
pub struct ModelCache {
    held: Option<(Key, LoadedModel)>,
    device: Option<(String, Device)>,
}

impl ModelCache {
    pub fn get(
        &mut self,
        directory: &Path,
        precision: Precision,
        device: &str,
    ) -> Result<&LoadedModel, EmitError> {
        let files = files_of(directory)?;
        let key = Key {
            files: [Stamp::of(&files[0])?, Stamp::of(&files[1])?],
            precision,
            device: device.to_owned(),
        };
        let held = match self.held.take() {
            Some((old, model)) if old == key => (key, model),
            other => {
                // Freed before the next one is read: two large models may not fit beside each other.
                drop(other);
                let on = self.device(device)?;
                (key, load(&files, precision.dtype(), on)?)
            }
        };
        Ok(&self.held.insert(held).1)
    }

    fn device(&mut self, name: &str) -> Result<Device, EmitError> {
        if let Some((known, device)) = &self.device {
            if known == name {
                return Ok(device.clone());
            }
        }
        let device = open_device(name)?;
        self.device = Some((name.to_owned(), device.clone()));
        Ok(device)
    }
}

fn open_device(name: &str) -> Result<Device, EmitError> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let ordinal: usize = name
        .strip_prefix("cuda:")
        .and_then(|ordinal| ordinal.parse().ok())
        .ok_or_else(|| {
            EmitError::Request(format!(
                "device \"{name}\" is neither \"cpu\" nor \"cuda:N\""
            ))
        })?;
    Device::new_cuda(ordinal)
        .map_err(|error| EmitError::Request(format!("device \"{name}\" cannot be opened: {error}")))
}

/// `config.json` and the one weights file of `directory`.
fn files_of(directory: &Path) -> Result<[PathBuf; 2], EmitError> {
    let listing = fs::read_dir(directory).map_err(|error| {
        EmitError::Model(format!(
            "model directory {} cannot be read: {error}",
            directory.display()
        ))
    })?;
    let mut weights: Vec<String> = listing
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| {
            name.ends_with(".safetensors")
                || name.ends_with(".safetensors.index.json")
                || name.ends_with(".bin")
                || name.ends_with(".gguf")
        })
        .collect();
    weights.sort();
    let sharded = weights
        .iter()
        .any(|name| name.ends_with(".index.json") || name.contains("-of-"));
    if sharded || !weights.iter().any(|name| name == WEIGHTS) {
        let found = match weights.as_slice() {
            [] => "no weights file".to_owned(),
            names => names
                .iter()
                .take(4)
                .cloned()
                .chain((names.len() > 4).then(|| format!("{} more", names.len() - 4)))
                .collect::<Vec<_>>()
                .join(", "),
        };
        return Err(EmitError::Model(format!(
            "expected one {WEIGHTS} (not sharded) in {}, found {found}",
            directory.display()
        )));
    }
    if !directory.join(CONFIG).is_file() {
        return Err(EmitError::Model(format!(
            "expected {CONFIG} in {}, found none",
            directory.display()
        )));
    }
    Ok([directory.join(CONFIG), directory.join(WEIGHTS)])
}

/// Reads both files once: what is hashed is what is used.
fn load(files: &[PathBuf; 2], dtype: DType, device: Device) -> Result<LoadedModel, EmitError> {
    let [config_path, weights_path] = files;
    let read = |path: &Path| fs::read(path).map_err(|error| EmitError::io(path, &error));
    let config_bytes = read(config_path)?;
    let weights = read(weights_path)?;
    let digest = digest::of_files(&[
        (CONFIG, digest::sha256(&config_bytes)),
        (WEIGHTS, digest::sha256(&weights)),
    ]);
    let json: serde_json::Value = serde_json::from_slice(&config_bytes).map_err(|error| {
        EmitError::Model(format!("{} is not JSON: {error}", config_path.display()))
    })?;
    let refused = |error: candle_mi::MIError| EmitError::Model(error.to_string());
    let config = TransformerConfig::from_hf_config(&json).map_err(refused)?;
    let vocab_size = config.vocab_size;
    let builder =
        VarBuilder::from_buffered_safetensors(weights, dtype, &device).map_err(|error| {
            EmitError::Model(format!(
                "{} cannot be read as safetensors: {error}",
                weights_path.display()
            ))
        })?;
    let model = GenericTransformer::load(config, &device, dtype, builder).map_err(refused)?;
    Ok(LoadedModel {
        model,
        device,
        dtype,
        vocab_size,
        digest,
    })
}
