//! What candle-mi calls of hf-fetch-model 0.9 to 0.12, without a network: the repository `owner/name` is the folder
//! `owner/name` below the directory that the environment variable `PARITY_HUB` names.
//!
//! The signatures are hf-fetch-model's, `async` included; none of these functions ever waits.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::progress::ProgressEvent;

/// The environment variable that names the directory of all repositories.
pub const HUB: &str = "PARITY_HUB";

/// Why a file of a repository cannot be had.
#[derive(Debug)]
pub enum FetchError {
    /// `PARITY_HUB` is not set.
    NoHub,
    /// The folder does not exist.
    RepoNotFound { repo: String, folder: PathBuf },
    /// The repository holds no such file.
    FileNotFound { repo: String, file: String },
    /// The folder cannot be listed.
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    /// What only a server can do.
    Unsupported(&'static str),
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHub => write!(
                f,
                "{HUB} is not set: it names the directory that stands in for the hub"
            ),
            Self::RepoNotFound { repo, folder } => {
                write!(f, "repository {repo} not found at {}", folder.display())
            }
            Self::FileNotFound { repo, file } => write!(f, "{repo} holds no file {file}"),
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Unsupported(what) => write!(f, "the local stand-in for the hub cannot {what}"),
        }
    }
}

impl std::error::Error for FetchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// What a download is configured with: here nothing.
pub struct FetchConfig;

pub struct FetchConfigBuilder;

impl FetchConfig {
    #[must_use]
    pub fn builder() -> FetchConfigBuilder {
        FetchConfigBuilder
    }

    #[must_use]
    pub fn token(&self) -> Option<&str> {
        None
    }

    #[must_use]
    pub fn revision(&self) -> Option<&str> {
        None
    }
}

impl FetchConfigBuilder {
    /// A folder needs no token.
    #[must_use]
    pub fn token_from_env(self) -> Self {
        self
    }

    /// Never called back: a file that is there takes no time.
    #[must_use]
    pub fn on_progress<F>(self, _callback: F) -> Self
    where
        F: Fn(&ProgressEvent) + Send + Sync + 'static,
    {
        self
    }

    /// # Errors
    /// None here; hf-fetch-model has some.
    pub fn build(self) -> Result<FetchConfig, FetchError> {
        Ok(FetchConfig)
    }
}

pub mod progress {
    /// The progress of one file, as candle-mi logs it.
    #[derive(Debug, Clone, Default)]
    pub struct ProgressEvent {
        pub filename: String,
        pub bytes_downloaded: u64,
        pub bytes_total: u64,
        pub percent: f64,
        pub files_remaining: usize,
    }

    /// Draws nothing.
    #[derive(Default)]
    pub struct IndicatifProgress;

    impl IndicatifProgress {
        #[must_use]
        pub fn new() -> Self {
            Self
        }

        pub fn handle(&self, _event: &ProgressEvent) {}
    }
}

/// Every file is there already.
#[derive(Debug, Clone)]
pub enum DownloadOutcome<T> {
    Cached(T),
}

impl<T> DownloadOutcome<T> {
    pub fn into_inner(self) -> T {
        let Self::Cached(inner) = self;
        inner
    }
}

/// The folder of a repository.
fn folder(repo: &str) -> Result<PathBuf, FetchError> {
    let hub = std::env::var_os(HUB)
        .filter(|hub| !hub.is_empty())
        .ok_or(FetchError::NoHub)?;
    let folder = Path::new(&hub).join(repo);
    if folder.is_dir() {
        return Ok(folder);
    }
    let repo = repo.to_owned();
    Err(FetchError::RepoNotFound { repo, folder })
}

/// The files of a repository by their paths in it, sorted: a listing must not depend on the file system.
fn files(repo: &str) -> Result<Vec<(String, PathBuf)>, FetchError> {
    let root = folder(repo)?;
    let mut found = Vec::new();
    let mut waiting = vec![root.clone()];
    while let Some(directory) = waiting.pop() {
        let failed = |source| FetchError::Io {
            path: directory.clone(),
            source,
        };
        for entry in std::fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_dir() {
                waiting.push(path);
            } else if let Ok(relative) = path.strip_prefix(&root) {
                let name = relative.to_string_lossy().replace('\\', "/");
                found.push((name, path));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The file `filename` of a repository.
///
/// # Errors
/// [`FetchError::FileNotFound`], or another error of the repository.
pub fn download_file_blocking(
    repo: String,
    filename: &str,
    _config: &FetchConfig,
) -> Result<DownloadOutcome<PathBuf>, FetchError> {
    let path = folder(&repo)?.join(filename);
    if path.is_file() {
        return Ok(DownloadOutcome::Cached(path));
    }
    let file = filename.to_owned();
    Err(FetchError::FileNotFound { repo, file })
}

/// All files of a repository by name.
///
/// # Errors
/// What is wrong with the repository.
pub fn download_files_blocking(
    repo: String,
) -> Result<DownloadOutcome<HashMap<String, PathBuf>>, FetchError> {
    let found = files(&repo)?.into_iter().collect();
    Ok(DownloadOutcome::Cached(found))
}

/// The same.
///
/// # Errors
/// What is wrong with the repository.
pub fn download_files_with_config_blocking(
    repo: String,
    _config: &FetchConfig,
) -> Result<DownloadOutcome<HashMap<String, PathBuf>>, FetchError> {
    download_files_blocking(repo)
}

/// The folder that holds the files of a repository.
///
/// # Errors
/// What is wrong with the repository.
pub async fn download_with_config(
    repo: String,
    _config: &FetchConfig,
) -> Result<DownloadOutcome<PathBuf>, FetchError> {
    folder(&repo).map(DownloadOutcome::Cached)
}

/// Stands in for an HTTP client.
pub struct Client;

/// # Errors
/// None here; hf-fetch-model has some.
pub fn build_client(_token: Option<&str>) -> Result<Client, FetchError> {
    Ok(Client)
}

pub mod repo {
    #[cfg(listing_takes_a_client)]
    use super::Client;
    use super::{files, FetchError};

    #[derive(Debug, Clone)]
    pub struct RepoFile {
        pub filename: String,
        pub size: Option<u64>,
        pub sha256: Option<String>,
    }

    /// The files of a repository, without the sizes and hashes that a server knows.
    ///
    /// # Errors
    /// What is wrong with the repository.
    pub async fn list_repo_files_with_metadata(
        repo: &str,
        _token: Option<&str>,
        _revision: Option<&str>,
        #[cfg(listing_takes_a_client)] _client: &Client,
    ) -> Result<Vec<RepoFile>, FetchError> {
        let listed = files(repo)?.into_iter().map(|(filename, _)| RepoFile {
            filename,
            size: None,
            sha256: None,
        });
        Ok(listed.collect())
    }
}

/// One array of an archive.
pub struct NpzTensor {
    pub name: String,
    pub shape: Vec<usize>,
}

pub struct NpzHeader {
    pub tensors: Vec<NpzTensor>,
}

/// What a probe cost.
pub struct RangeStats {
    pub requests: usize,
    pub bytes_fetched: u64,
}

/// A probe of an archive's header by range requests. candle-mi then reads the whole file, which is here at hand.
///
/// # Errors
/// Always [`FetchError::Unsupported`].
pub async fn inspect_npz_with_config(
    _repo: &str,
    _filename: &str,
    _config: &FetchConfig,
) -> Result<(NpzHeader, &'static str, Option<RangeStats>), FetchError> {
    Err(FetchError::Unsupported("answer range requests"))
}

#[cfg(test)]
mod tests {
    use super::{download_file_blocking, download_files_blocking, FetchConfig, FetchError, HUB};

    #[test]
    fn a_repository_is_a_folder_and_what_is_not_there_is_named() {
        let config = FetchConfig::builder().build().expect("no settings");
        let file = |repo: &str, name: &str| download_file_blocking(repo.to_owned(), name, &config);
        std::env::remove_var(HUB);
        assert!(matches!(file("a/b", "c.json"), Err(FetchError::NoHub)));

        let hub = std::env::temp_dir().join(format!("parity-hub-{}", std::process::id()));
        std::fs::create_dir_all(hub.join("a/b/sub")).expect("a directory");
        std::fs::write(hub.join("a/b/sub/c.json"), "{}").expect("a file");
        std::fs::write(hub.join("a/b/b.txt"), "").expect("a file");
        std::env::set_var(HUB, &hub);
        let found = file("a/b", "sub/c.json").expect("it is there").into_inner();
        assert_eq!(found, hub.join("a/b/sub/c.json"));
        let all = download_files_blocking("a/b".to_owned()).expect("it is there");
        let mut names: Vec<String> = all.into_inner().into_keys().collect();
        names.sort();
        assert_eq!(names, ["b.txt", "sub/c.json"]);

        let told = |error: FetchError| error.to_string();
        assert_eq!(
            file("a/b", "sub").map_err(told).expect_err("a folder"),
            "a/b holds no file sub"
        );
        assert!(matches!(
            file("a/x", "c.json"),
            Err(FetchError::RepoNotFound { .. })
        ));
        std::fs::remove_dir_all(&hub).expect("it was made here");
    }
}
