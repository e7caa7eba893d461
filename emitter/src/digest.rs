//! SHA-256 over the bytes that were really read, and what tells one state of a file from another.

use std::fs::Metadata;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::EmitError;

/// SHA-256 of `bytes` in lower-case hex.
pub fn sha256(bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        hex.push_str(&format!("{byte:02x}"));
    }
    hex
}

/// One digest for several files: SHA-256 over the lines `<name>:<sha256 of the file>\n`, sorted by name, so that it
/// says neither where the files lie nor in which order they were read.
pub fn of_files<N: std::fmt::Display>(files: &[(N, String)]) -> String {
    let mut lines: Vec<String> = files
        .iter()
        .map(|(name, sha)| format!("{name}:{sha}\n"))
        .collect();
    lines.sort();
    sha256(lines.concat().as_bytes())
}

/// What a file looks like from outside. A cached model is used again only while this is unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    path: PathBuf,
    bytes: u64,
    modified: Option<std::time::SystemTime>,
    inode: u64,
}

impl Stamp {
    pub fn of(path: &Path) -> Result<Self, EmitError> {
        let meta = std::fs::metadata(path).map_err(|error| EmitError::io(path, &error))?;
        Ok(Self {
            path: path.to_path_buf(),
            bytes: meta.len(),
            modified: meta.modified().ok(),
            inode: inode(&meta),
        })
    }
}

/// The stamps of files, in their order.
pub fn stamps(files: &[PathBuf]) -> Result<Vec<Stamp>, EmitError> {
    files.iter().map(|file| Stamp::of(file)).collect()
}

#[cfg(unix)]
fn inode(meta: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(meta)
}

#[cfg(not(unix))]
fn inode(_meta: &Metadata) -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::{of_files, sha256};

    #[test]
    fn sha256_of_abc() {
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn a_set_of_files_is_sorted_by_name() {
        let (a, b) = (
            ("config.json", sha256(b"a")),
            ("model.safetensors", sha256(b"b")),
        );
        assert_eq!(
            of_files(&[a.clone(), b.clone()]),
            of_files(&[b.clone(), a.clone()])
        );
        let text = format!("config.json:{}\nmodel.safetensors:{}\n", a.1, b.1);
        assert_eq!(of_files(&[b, a]), sha256(text.as_bytes()));
    }
}
