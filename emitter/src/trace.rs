//! Writing a trace: the tensors into a safetensors file, the document that names them into JSON beside it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::SafeTensors;
use serde::Serialize;

use crate::error::EmitError;
use crate::identity::{CandleMi, Identity};
use crate::protocol::Case;
use crate::tensor::Encoded;

pub const FORMAT: &str = "candle-mi-parity/trace/1";

/// A trace document. Everything but `run` is the same bytes each time the same case is emitted.
#[derive(Serialize)]
pub struct Document<'a> {
    pub format: &'static str,
    pub header: Header<'a>,
    pub run: Run,
    pub tokens: &'a [Vec<u32>],
    pub tensors: Vec<Entry<'a>>,
    /// `serde_json::Map` keeps its keys sorted.
    pub scalars: serde_json::Map<String, serde_json::Value>,
    pub top_features_last_pos: &'a [Feature],
}

#[derive(Serialize)]
pub struct Header<'a> {
    emitter: &'static str,
    candle_mi: CandleMi,
    candle: &'static str,
    features: Vec<&'static str>,
    device: &'a str,
    dtype: &'static str,
    case: &'a Case,
    model_digest: &'a str,
    sae_digest: Option<&'a str>,
    inputs_digest: Option<&'a str>,
}

/// The part of a header that a request decides.
pub struct Provenance<'a> {
    pub device: &'a str,
    pub dtype: &'static str,
    pub case: &'a Case,
    pub model_digest: &'a str,
    pub sae_digest: Option<&'a str>,
    pub inputs_digest: Option<&'a str>,
}

impl<'a> Header<'a> {
    pub fn new(from: Provenance<'a>) -> Self {
        let identity = Identity::of_this_build();
        Self {
            emitter: identity.emitter,
            candle_mi: identity.candle_mi,
            candle: identity.candle,
            features: identity.features,
            device: from.device,
            dtype: from.dtype,
            case: from.case,
            model_digest: from.model_digest,
            sae_digest: from.sae_digest,
            inputs_digest: from.inputs_digest,
        }
    }
}

#[derive(Serialize)]
pub struct Run {
    pub started: String,
    pub seconds: Seconds,
    pub threads: usize,
    /// Of the whole process so far, not of this request alone.
    pub peak_rss_bytes: Option<u64>,
}

/// Wall seconds by stage. `load` covers model and inputs, near 0 when the model was still held; `write` covers
/// hashing and the safetensors file, not the JSON that it is written in.
#[derive(Default, Serialize)]
pub struct Seconds {
    pub load: f64,
    pub forward: f64,
    pub sae: f64,
    pub write: f64,
}

/// One tensor of a document: its values, or where they lie.
#[derive(Serialize)]
pub struct Entry<'a> {
    name: &'a str,
    shape: &'a [usize],
    dtype: &'static str,
    sha256: &'a str,
    nonfinite: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<&'a [f64]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
}

impl<'a> Entry<'a> {
    /// `file` is the base name of the safetensors file.
    pub fn new(tensor: &'a Encoded, file: &'a str) -> Self {
        let values = tensor.inline.as_deref();
        Self {
            name: &tensor.name,
            shape: &tensor.shape,
            dtype: tensor.dtype_name(),
            sha256: &tensor.sha256,
            nonfinite: tensor.nonfinite,
            values,
            file: values.is_none().then_some(file),
            key: values.is_none().then_some(&tensor.name),
        }
    }
}

/// An active feature of an SAE.
#[derive(Debug, Serialize)]
pub struct Feature {
    pub index: usize,
    pub value: f64,
}

/// A file that is being written: it takes its name only when whole, and leaves nothing behind when dropped before.
struct Pending {
    temporary: PathBuf,
    target: PathBuf,
    done: bool,
}

impl Pending {
    fn new(target: &Path) -> Self {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        Self {
            temporary: target.with_file_name(format!(".{name}.{}.tmp", std::process::id())),
            target: target.to_path_buf(),
            done: false,
        }
    }

    fn publish(mut self) -> Result<(), EmitError> {
        fs::rename(&self.temporary, &self.target)
            .map_err(|error| EmitError::io(&self.target, &error))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.done {
            // Nothing more can be done about a temporary file that cannot be removed.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// The safetensors file that belongs to a document.
pub fn tensors_path(out: &Path) -> PathBuf {
    out.with_extension("safetensors")
}

/// Writes the tensors that are not inline; no file when there are none.
pub fn write_tensors(out: &Path, tensors: &[Encoded]) -> Result<(), EmitError> {
    let stored: Vec<&Encoded> = tensors.iter().filter(|t| t.inline.is_none()).collect();
    if stored.is_empty() {
        return Ok(());
    }
    let target = tensors_path(out);
    let pending = Pending::new(&target);
    let path = &pending.temporary;
    let failed = |error: safetensors::SafeTensorError| EmitError::io(&target, &error);
    let mut views = Vec::with_capacity(stored.len());
    for tensor in &stored {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        views.push((tensor.name.as_str(), view.map_err(failed)?));
    }
    // The writer orders by dtype and name, so the order of the bytes does not depend on anything else.
    safetensors::serialize_to_file(views, None, path).map_err(failed)?;
    let synced = File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.sync_all());
    synced.map_err(|error| EmitError::io(&target, &error))?;

    // Read back before it is given its name: a full disk can be silent.
    let bytes = fs::read(path).map_err(|error| EmitError::io(&target, &error))?;
    let written = SafeTensors::deserialize(&bytes).map_err(failed)?;
    for tensor in &stored {
        let view = written.tensor(&tensor.name).map_err(failed)?;
        if view.data() != tensor.bytes.as_slice() {
            return Err(EmitError::Io(format!(
                "{}: {} reads back differently",
                target.display(),
                tensor.name
            )));
        }
    }
    pending.publish()
}

/// Makes the directory that `out` is to lie in, and returns it.
pub fn prepare_directory(out: &Path) -> Result<&Path, EmitError> {
    let directory = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(directory).map_err(|error| EmitError::io(directory, &error))?;
    Ok(directory)
}

/// Writes the document last: a trace is complete if its document is new.
pub fn write_document(out: &Path, document: &impl Serialize) -> Result<(), EmitError> {
    let pending = Pending::new(out);
    let failed = |error: &dyn std::fmt::Display| EmitError::io(out, &error);
    let mut bytes = serde_json::to_vec(document).map_err(|error| failed(&error))?;
    bytes.push(b'\n');
    File::create(&pending.temporary)
        .and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        })
        .map_err(|error| failed(&error))?;
    pending.publish()
}
