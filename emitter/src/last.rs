//! What was loaded last from a directory: most calls in a row share theirs.

use std::path::{Path, PathBuf};

use crate::error::EmitError;

pub struct Last<V> {
    held: Option<(PathBuf, V)>,
}

impl<V> Default for Last<V> {
    fn default() -> Self {
        Self { held: None }
    }
}

impl<V> Last<V> {
    /// What a directory holds; it is loaded unless it was the last one.
    ///
    /// # Errors
    /// Those of `load`; nothing is held then.
    pub fn get(
        &mut self,
        directory: &Path,
        load: impl FnOnce(&Path) -> Result<V, EmitError>,
    ) -> Result<&V, EmitError> {
        let held = match self.held.take() {
            Some(held) if held.0 == directory => held,
            other => {
                // Freed before the next one is read.
                drop(other);
                (directory.to_path_buf(), load(directory)?)
            }
        };
        Ok(&self.held.insert(held).1)
    }
}
