//! Loading a model from a local directory, and keeping the last one: most requests of a run share theirs.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_mi::{GenericTransformer, MIBackend, TransformerConfig};

use crate::digest::{self, Stamp};
use crate::error::EmitError;
use crate::protocol::{ConfigReader, Precision};
use crate::weights::{self, Weights, CONFIG};

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
    reader: ConfigReader,
    device: String,
}

/// The last model, and the last device: tensors made on two `Device` values for one GPU cannot be mixed.
#[derive(Default)]
pub struct ModelCache {
    held: Option<(Key, LoadedModel)>,
    device: Option<(String, Device)>,
}

impl ModelCache {
    /// The next model is read from its files, whichever it is.
    pub fn forget(&mut self) {
        self.held = None;
    }

    pub fn get(
        &mut self,
        directory: &Path,
        precision: Precision,
        reader: ConfigReader,
        device: &str,
    ) -> Result<&LoadedModel, EmitError> {
        let files = weights::files_of(directory)?;
        let key = Key {
            files: files
                .iter()
                .map(|file| Stamp::of(file))
                .collect::<Result<_, _>>()?,
            precision,
            reader,
            device: device.to_owned(),
        };
        let held = match self.held.take() {
            Some((old, model)) if old == key => (key, model),
            other => {
                // Freed before the next one is read: two large models may not fit beside each other.
                drop(other);
                let on = self.device(device)?;
                (key, load(&files, dtype_of(precision), reader, on)?)
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

fn dtype_of(precision: Precision) -> DType {
    match precision {
        Precision::Float32 => DType::F32,
        Precision::BFloat16 => DType::BF16,
        Precision::Float16 => DType::F16,
    }
}

fn load(
    files: &[PathBuf],
    dtype: DType,
    reader: ConfigReader,
    device: Device,
) -> Result<LoadedModel, EmitError> {
    let (config_path, shards) = files
        .split_first()
        .ok_or_else(|| EmitError::Model("no files to load".to_owned()))?;
    let config_bytes = weights::read(config_path)?;
    let json: serde_json::Value = serde_json::from_slice(&config_bytes).map_err(|error| {
        EmitError::Model(format!("{} is not JSON: {error}", config_path.display()))
    })?;
    // Before the weights are read where it can be: a family that candle-mi refuses must not cost gigabytes first.
    let known = match reader {
        ConfigReader::Hf => Some(TransformerConfig::from_hf_config(&json).map_err(refused)?),
        ConfigReader::Auto => None,
    };
    let weights = Weights::read(shards, dtype, &device)?;
    let config = match known {
        Some(config) => config,
        None => auto_config(&json, &weights.names)?,
    };
    let vocab_size = config.vocab_size;
    let model =
        GenericTransformer::load(config, &device, dtype, weights.builder).map_err(refused)?;
    let mut digests = weights.digests;
    digests.push((CONFIG.to_owned(), digest::sha256(&config_bytes)));
    Ok(LoadedModel {
        model,
        device,
        dtype,
        vocab_size,
        digest: digest::of_files(&digests),
    })
}

fn refused(error: candle_mi::MIError) -> EmitError {
    EmitError::Model(error.to_string())
}

/// candle-mi's own verdict comes first: the parser alone has a default for most of what it does not find, and would
/// turn a model of another make into numbers.
fn auto_config(json: &serde_json::Value, names: &[String]) -> Result<TransformerConfig, EmitError> {
    let report = TransformerConfig::check_auto_compatibility(json, names);
    let issues = report.issues.join("; ");
    report.into_result().map_err(|_| {
        EmitError::Model(format!(
            "candle-mi calls the model incompatible with its auto-config: {issues}"
        ))
    })?;
    TransformerConfig::from_hf_config_auto(json, names).map_err(refused)
}
