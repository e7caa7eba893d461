//! The files of a model directory: which of them are read, and what the weights among them hold.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::digest;
use crate::error::EmitError;

pub const CONFIG: &str = "config.json";
pub const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const PICKLE: &str = "pytorch_model.bin";

/// `config.json`, then the weights: `model.safetensors`, or the shards `model-*-of-*.safetensors` in order.
pub fn files_of(directory: &Path) -> Result<Vec<PathBuf>, EmitError> {
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

/// What `MIModel::from_pretrained` reads of a directory: `config.json`, then the shards that the index names, or else
/// `model.safetensors`, or else `pytorch_model.bin`. A file that is missing is left out: it is candle-mi that judges.
pub fn files_of_pretrained(directory: &Path) -> Vec<PathBuf> {
    let mut names = vec![CONFIG.to_owned()];
    let index = directory.join(INDEX);
    if index.is_file() {
        names.extend(shards_of(&index));
    } else if directory.join(WEIGHTS).is_file() {
        names.push(WEIGHTS.to_owned());
    } else {
        names.push(PICKLE.to_owned());
    }
    let paths = names.iter().map(|name| directory.join(name));
    paths.filter(|path| path.is_file()).collect()
}

/// The files that an index names, sorted; none if it cannot be read.
fn shards_of(index: &Path) -> BTreeSet<String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let read = fs::read(index).ok();
    let parsed: Option<Index> = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    parsed
        .map(|index| index.weight_map.into_values().collect())
        .unwrap_or_default()
}

/// One digest for files that candle-mi read itself.
pub fn digest_of(files: &[PathBuf]) -> Result<String, EmitError> {
    let mut digests = Vec::with_capacity(files.len());
    for file in files {
        digests.push((name_of(file), digest::sha256(&read(file)?)));
    }
    Ok(digest::of_files(&digests))
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

/// The weights of a model.
pub struct Weights {
    pub builder: VarBuilder<'static>,
    /// Every tensor's name, sorted: candle-mi quotes the first few in its diagnostics, and a hash map's order would
    /// make a refusal differ from run to run.
    pub names: Vec<String>,
    /// File name and SHA-256 of each file.
    pub digests: Vec<(String, String)>,
}

impl Weights {
    /// Reads every file once, so that the digest is that of the weights in use.
    pub fn read(shards: &[PathBuf], dtype: DType, device: &Device) -> Result<Self, EmitError> {
        let mut digests = Vec::with_capacity(shards.len());
        let (builder, mut names) = if let [only] = shards {
            let bytes = read(only)?;
            digests.push((name_of(only), digest::sha256(&bytes)));
            let (_, header) =
                SafeTensors::read_metadata(&bytes).map_err(|error| unreadable(only, &error))?;
            let builder = VarBuilder::from_buffered_safetensors(bytes, dtype, device)
                .map_err(|error| unreadable(only, &error))?;
            (builder, header.offset_keys())
        } else {
            let mut tensors = HashMap::new();
            for shard in shards {
                let bytes = read(shard)?;
                digests.push((name_of(shard), digest::sha256(&bytes)));
                let part = candle_core::safetensors::load_buffer(&bytes, device)
                    .map_err(|error| unreadable(shard, &error))?;
                for (name, tensor) in part {
                    if tensors.insert(name.clone(), tensor).is_some() {
                        return Err(EmitError::Model(format!("{name} is in two shards")));
                    }
                }
            }
            let names = tensors.keys().cloned().collect();
            (VarBuilder::from_tensors(tensors, dtype, device), names)
        };
        names.sort();
        Ok(Self {
            builder,
            names,
            digests,
        })
    }
}

/// A file's bytes, with its path in the error.
pub fn read(path: &Path) -> Result<Vec<u8>, EmitError> {
    fs::read(path).map_err(|error| EmitError::io(path, &error))
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn unreadable(path: &Path, error: &impl std::fmt::Display) -> EmitError {
    EmitError::Model(format!(
        "{} cannot be read as safetensors: {error}",
        path.display()
    ))
}
