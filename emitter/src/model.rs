//! Loading a model from a local directory, and keeping the last one: most requests of a run share theirs.

use std::collections::HashMap;
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
    /// Over the very bytes of `config.json` and the weights that the model was built from.
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
    files: Vec<Stamp>,
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
            files: files
                .iter()
                .map(|file| Stamp::of(file))
                .collect::<Result<_, _>>()?,
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

/// `config.json`, then the weights: `model.safetensors`, or the shards `model-*-of-*.safetensors` in order.
fn files_of(directory: &Path) -> Result<Vec<PathBuf>, EmitError> {
    let listing = fs::read_dir(directory).map_err(|error| {
        EmitError::Model(format!(
            "model directory {} cannot be read: {error}",
            directory.display()
        ))
    })?;
    let mut names: Vec<String> = listing
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    let shards: Vec<&String> = if names.iter().any(|name| name == WEIGHTS) {
        names.iter().filter(|name| *name == WEIGHTS).collect()
    } else {
        names.iter().filter(|name| is_shard(name)).collect()
    };
    if shards.is_empty() {
        return Err(EmitError::Model(format!(
            "expected {WEIGHTS} or its shards in {}, found {}",
            directory.display(),
            some_of(&names)
        )));
    }
    if !names.iter().any(|name| name == CONFIG) {
        return Err(EmitError::Model(format!(
            "expected {CONFIG} in {}, found none",
            directory.display()
        )));
    }
    Ok(std::iter::once(CONFIG)
        .chain(shards.into_iter().map(String::as_str))
        .map(|name| directory.join(name))
        .collect())
}

fn is_shard(name: &str) -> bool {
    name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors")
}

fn some_of(names: &[String]) -> String {
    match names {
        [] => "nothing".to_owned(),
        names if names.len() > 4 => format!("{}, …", names[..4].join(", ")),
        names => names.join(", "),
    }
}

/// Reads every file once: what is hashed is what is used.
fn load(files: &[PathBuf], dtype: DType, device: Device) -> Result<LoadedModel, EmitError> {
    let read = |path: &Path| fs::read(path).map_err(|error| EmitError::io(path, &error));
    let (config_path, shards) = files
        .split_first()
        .ok_or_else(|| EmitError::Model("no files to load".to_owned()))?;
    let config_bytes = read(config_path)?;
    let json: serde_json::Value = serde_json::from_slice(&config_bytes).map_err(|error| {
        EmitError::Model(format!("{} is not JSON: {error}", config_path.display()))
    })?;
    let refused = |error: candle_mi::MIError| EmitError::Model(error.to_string());
    let config = TransformerConfig::from_hf_config(&json).map_err(refused)?;
    let vocab_size = config.vocab_size;

    let mut digests = vec![(CONFIG.to_owned(), digest::sha256(&config_bytes))];
    let builder = if let [only] = shards {
        let weights = read(only)?;
        digests.push((name_of(only), digest::sha256(&weights)));
        VarBuilder::from_buffered_safetensors(weights, dtype, &device)
            .map_err(|error| unreadable(only, &error))?
    } else {
        let mut tensors = HashMap::new();
        for shard in shards {
            let weights = read(shard)?;
            digests.push((name_of(shard), digest::sha256(&weights)));
            let part = candle_core::safetensors::load_buffer(&weights, &device)
                .map_err(|error| unreadable(shard, &error))?;
            for (name, tensor) in part {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(EmitError::Model(format!("{name} is in two shards")));
                }
            }
        }
        VarBuilder::from_tensors(tensors, dtype, &device)
    };
    let model = GenericTransformer::load(config, &device, dtype, builder).map_err(refused)?;
    Ok(LoadedModel {
        model,
        device,
        dtype,
        vocab_size,
        digest: digest::of_files(&digests),
    })
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn unreadable(path: &Path, error: &candle_core::Error) -> EmitError {
    EmitError::Model(format!(
        "{} cannot be read as safetensors: {error}",
        path.display()
    ))
}
