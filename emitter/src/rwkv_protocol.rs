//! The functions of a tokenizer with an RWKV vocabulary that can be called, and their arguments.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// `vocabulary` is the file of one.
#[cfg_attr(not(feature = "rwkv-tokenizer"), allow(dead_code))]
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", deny_unknown_fields)]
pub enum RwkvCall {
    #[serde(rename = "rwkv_vocab_size")]
    VocabSize { vocabulary: PathBuf },
    /// The ids of each text with and without special tokens, each list ended by −1, and the texts of the ids.
    #[serde(rename = "rwkv_encode")]
    Encode {
        vocabulary: PathBuf,
        texts: Vec<String>,
    },
    #[serde(rename = "rwkv_encode_with_offsets")]
    EncodeWithOffsets { vocabulary: PathBuf, text: String },
    #[serde(rename = "rwkv_decode")]
    Decode {
        vocabulary: PathBuf,
        tokens: Vec<u32>,
    },
    #[serde(rename = "rwkv_decode_token")]
    DecodeToken { vocabulary: PathBuf, token: u32 },
    #[serde(rename = "rwkv_find_token_id")]
    FindTokenId { vocabulary: PathBuf, word: String },
}

impl RwkvCall {
    #[cfg_attr(not(feature = "rwkv-tokenizer"), allow(dead_code))]
    pub fn vocabulary(&self) -> &Path {
        match self {
            Self::VocabSize { vocabulary }
            | Self::Encode { vocabulary, .. }
            | Self::EncodeWithOffsets { vocabulary, .. }
            | Self::Decode { vocabulary, .. }
            | Self::DecodeToken { vocabulary, .. }
            | Self::FindTokenId { vocabulary, .. } => vocabulary,
        }
    }
}
