//! The functions of a tokenizer with an RWKV vocabulary that can be called, and their arguments.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// `vocabulary` is the file of one.
#[cfg_attr(not(feature = "rwkv-tokenizer"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum RwkvCall {
    RwkvVocabSize {
        vocabulary: PathBuf,
    },
    /// The ids of each text with and without special tokens, each list ended by −1, and the texts of the ids.
    RwkvEncode {
        vocabulary: PathBuf,
        texts: Vec<String>,
    },
    RwkvEncodeWithOffsets {
        vocabulary: PathBuf,
        text: String,
    },
    RwkvDecode {
        vocabulary: PathBuf,
        tokens: Vec<u32>,
    },
    RwkvDecodeToken {
        vocabulary: PathBuf,
        token: u32,
    },
    RwkvFindTokenId {
        vocabulary: PathBuf,
        word: String,
    },
}

impl RwkvCall {
    #[cfg_attr(not(feature = "rwkv-tokenizer"), allow(dead_code))]
    pub fn vocabulary(&self) -> &Path {
        match self {
            Self::RwkvVocabSize { vocabulary }
            | Self::RwkvEncode { vocabulary, .. }
            | Self::RwkvEncodeWithOffsets { vocabulary, .. }
            | Self::RwkvDecode { vocabulary, .. }
            | Self::RwkvDecodeToken { vocabulary, .. }
            | Self::RwkvFindTokenId { vocabulary, .. } => vocabulary,
        }
    }
}
