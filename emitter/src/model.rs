//! Loading a model from a local directory, and keeping the last one: most requests of a run share theirs.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, DeviceLocation};
use candle_mi::{GenericTransformer, MIBackend, MIError, MIModel, TransformerConfig};

use crate::digest::{self, Stamp};
use crate::error::EmitError;
use crate::protocol::{Loader, Precision};
use crate::rwkv;
use crate::weights::{self, Weights, CONFIG};

/// Whichever way it was loaded.
enum Model {
    Transformer(Box<GenericTransformer>),
    Recurrent(Box<dyn MIBackend>),
    Pretrained(MIModel),
}

pub struct LoadedModel {
    model: Model,
    pub device: Device,
    pub dtype: DType,
    pub vocab_size: usize,
    /// Over the very bytes of `config.json` and the weights that the model was built from.
    pub digest: String,
}

impl LoadedModel {
    pub fn backend(&self) -> &dyn MIBackend {
        match &self.model {
            Model::Transformer(model) => model.as_ref(),
            Model::Recurrent(model) => model.as_ref(),
            Model::Pretrained(model) => model.backend(),
        }
    }

    /// For what `MIBackend` does not have.
    ///
    /// # Errors
    /// `Request` for another backend, and for a model that `from_pretrained` loaded, of which only that trait can be had.
    pub fn transformer(&self) -> Result<&GenericTransformer, EmitError> {
        match &self.model {
            Model::Transformer(model) => Ok(model),
            Model::Recurrent(_) => Err(EmitError::Request(
                "recurrent passes need a transformer".to_owned(),
            )),
            Model::Pretrained(_) => Err(EmitError::Request(
                "recurrent passes need a model that from_pretrained did not load".to_owned(),
            )),
        }
    }

    pub fn layers(&self) -> usize {
        self.backend().num_layers()
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
    loader: Loader,
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
        loader: Loader,
        device: &str,
    ) -> Result<&LoadedModel, EmitError> {
        let files = match loader {
            Loader::Hf | Loader::Auto => weights::files_of(directory)?,
            Loader::Pretrained => weights::files_of_pretrained(directory),
        };
        let key = Key {
            files: digest::stamps(&files)?,
            precision,
            loader,
            device: device.to_owned(),
        };
        let held = match self.held.take() {
            Some((old, model)) if old == key => (key, model),
            other => {
                // Freed before the next one is read: two large models may not fit beside each other.
                drop(other);
                let dtype = dtype_of(precision);
                let model = match loader {
                    Loader::Pretrained => {
                        let model = load_pretrained(directory, &files, &key.files, device)?;
                        self.device = Some((device.to_owned(), model.device.clone()));
                        model
                    }
                    Loader::Hf | Loader::Auto => {
                        load(&files, dtype, loader == Loader::Auto, self.device(device)?)?
                    }
                };
                (key, model)
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

pub fn dtype_of(precision: Precision) -> DType {
    match precision {
        Precision::Float32 => DType::F32,
        Precision::BFloat16 => DType::BF16,
        Precision::Float16 => DType::F16,
    }
}

fn load(
    files: &[PathBuf],
    dtype: DType,
    auto: bool,
    device: Device,
) -> Result<LoadedModel, EmitError> {
    let given = Given::read(files)?;
    let (model, vocab_size, digest) = match rwkv::config(&given.json)? {
        Some(config) => {
            let weights = Weights::read(given.shards, dtype, &device)?;
            let digest = given.digest_with(&weights);
            let model = rwkv::load(config, &device, dtype, weights.builder)?;
            let vocab_size = model.vocab_size();
            (Model::Recurrent(model), vocab_size, digest)
        }
        None => {
            let built = given.transformer(dtype, auto, &device)?;
            let model = Model::Transformer(Box::new(built.transformer));
            (model, built.vocab_size, built.digest)
        }
    };
    Ok(LoadedModel {
        model,
        device,
        dtype,
        vocab_size,
        digest,
    })
}

/// A model that was built from its config and weights.
pub struct Built {
    pub transformer: GenericTransformer,
    vocab_size: usize,
    digest: String,
}

/// Reads `config.json`, the first of `files`, and the weights, the others, as those of a transformer.
///
/// # Errors
/// `Io` and `Model` where a file cannot be read or candle-mi refuses it.
pub fn build(
    files: &[PathBuf],
    dtype: DType,
    auto: bool,
    device: &Device,
) -> Result<Built, EmitError> {
    Given::read(files)?.transformer(dtype, auto, device)
}

/// A config, and the files of weights that belong to it.
struct Given<'a> {
    json: serde_json::Value,
    /// SHA-256 of `config.json`.
    digest: String,
    shards: &'a [PathBuf],
}

impl<'a> Given<'a> {
    fn read(files: &'a [PathBuf]) -> Result<Self, EmitError> {
        let (path, shards) = files
            .split_first()
            .ok_or_else(|| EmitError::Model("no files to load".to_owned()))?;
        let bytes = weights::read(path)?;
        let json = serde_json::from_slice(&bytes).map_err(|error| {
            EmitError::Model(format!("{} is not JSON: {error}", path.display()))
        })?;
        Ok(Self {
            json,
            digest: digest::sha256(&bytes),
            shards,
        })
    }

    fn transformer(&self, dtype: DType, auto: bool, device: &Device) -> Result<Built, EmitError> {
        // Before the weights are read where it can be: a family that candle-mi refuses must not cost gigabytes first.
        let known = if auto {
            None
        } else {
            Some(TransformerConfig::from_hf_config(&self.json).map_err(refused)?)
        };
        let weights = Weights::read(self.shards, dtype, device)?;
        let config = match known {
            Some(config) => config,
            None => auto_config(&self.json, &weights.names)?,
        };
        let vocab_size = config.vocab_size;
        let digest = self.digest_with(&weights);
        let transformer =
            GenericTransformer::load(config, device, dtype, weights.builder).map_err(refused)?;
        Ok(Built {
            transformer,
            vocab_size,
            digest,
        })
    }

    /// One digest for the config and the weights.
    fn digest_with(&self, weights: &Weights) -> String {
        let mut digests = weights.digests.clone();
        digests.push((CONFIG.to_owned(), self.digest.clone()));
        digest::of_files(&digests)
    }
}

/// The stand-in for candle-mi's downloader takes the path of a directory for the name of a repository.
///
/// # Errors
/// `NotBuilt` or `RealDownloader` where this build cannot ask, and otherwise what candle-mi refuses.
pub fn from_pretrained(directory: &Path) -> Result<MIModel, EmitError> {
    if env!("PARITY_PATCHED").is_empty() {
        return Err(EmitError::RealDownloader);
    }
    if !cfg!(feature = "quantized") && is_quantized(directory) {
        return Err(EmitError::NotBuilt("quantized"));
    }
    let path = std::path::absolute(directory).map_err(|error| EmitError::io(directory, &error))?;
    let name = path
        .to_str()
        .ok_or_else(|| EmitError::Request(format!("model_dir is not UTF-8: {}", path.display())))?;
    MIModel::from_pretrained(name).map_err(|error| match error {
        MIError::Download(_) => EmitError::Io(error.to_string()),
        other => refused(other),
    })
}

/// A model that candle-mi read itself.
///
/// # Errors
/// Those of [`from_pretrained`], and `Request` where candle-mi chose another device.
fn load_pretrained(
    directory: &Path,
    files: &[PathBuf],
    before: &[Stamp],
    device: &str,
) -> Result<LoadedModel, EmitError> {
    let model = from_pretrained(directory)?;
    let chosen = match model.device().location() {
        DeviceLocation::Cpu => "cpu".to_owned(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    };
    if chosen != device {
        return Err(EmitError::Request(format!(
            "from_pretrained chooses its device itself: {chosen}, and the request is for {device}"
        )));
    }
    let digest = weights::digest_of(files)?;
    // candle-mi opens the files itself: they must not have changed between the load and the hash.
    if digest::stamps(files)? != before {
        return Err(EmitError::Model(format!(
            "{} changed while it was read",
            directory.display()
        )));
    }
    Ok(LoadedModel {
        device: model.device().clone(),
        dtype: DType::F32,
        vocab_size: model.vocab_size(),
        model: Model::Pretrained(model),
        digest,
    })
}

/// What candle-mi asks a config to tell whether the weights are quantized.
fn is_quantized(directory: &Path) -> bool {
    let config = std::fs::read(directory.join(CONFIG)).ok();
    config
        .and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok())
        .is_some_and(|json| json.get("quantization_config").is_some())
}

fn refused(error: MIError) -> EmitError {
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
