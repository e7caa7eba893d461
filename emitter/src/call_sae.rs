//! Calls of a sparse autoencoder's functions.

use std::path::PathBuf;

use candle_core::Device;
use candle_mi::sae::TopKStrategy;
use serde::Deserialize;

use crate::call::{Answer, Outcome};
use crate::call_measures::tensor;
use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::request::SaeRequest;
use crate::sae::SaeCache;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaeFile {
    pub path: PathBuf,
    pub layer: usize,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    Auto,
    Cpu,
    Gpu,
}

/// A function of the SAE in `sae`; `x` is a key of the inputs.
#[derive(Debug, Deserialize)]
#[serde(tag = "fn", rename_all = "snake_case", deny_unknown_fields)]
pub enum SaeCall {
    Encode {
        sae: SaeFile,
        x: String,
    },
    EncodeWithStrategy {
        sae: SaeFile,
        x: String,
        strategy: Strategy,
    },
    EncodeSparse {
        sae: SaeFile,
        x: String,
    },
    Decode {
        sae: SaeFile,
        x: String,
    },
    Reconstruct {
        sae: SaeFile,
        x: String,
    },
    ReconstructionError {
        sae: SaeFile,
        x: String,
    },
    DecoderVector {
        sae: SaeFile,
        feature: usize,
    },
}

impl SaeCall {
    fn file(&self) -> &SaeFile {
        match self {
            Self::Encode { sae, .. }
            | Self::EncodeWithStrategy { sae, .. }
            | Self::EncodeSparse { sae, .. }
            | Self::Decode { sae, .. }
            | Self::Reconstruct { sae, .. }
            | Self::ReconstructionError { sae, .. }
            | Self::DecoderVector { sae, .. } => sae,
        }
    }
}

pub fn run(call: &SaeCall, inputs: &Inputs, saes: &mut SaeCache) -> Result<Outcome, EmitError> {
    let file = call.file();
    let wanted = SaeRequest {
        path: file.path.clone(),
        layer: file.layer,
        hook: String::new(),
    };
    let sae = &saes.get(&wanted, &Device::Cpu, "cpu")?.sae;
    match call {
        SaeCall::Encode { x, .. } => tensor(sae.encode(inputs.get(x)?)),
        SaeCall::EncodeWithStrategy { x, strategy, .. } => {
            let strategy = match strategy {
                Strategy::Auto => TopKStrategy::Auto,
                Strategy::Cpu => TopKStrategy::Cpu,
                Strategy::Gpu => TopKStrategy::Gpu,
            };
            tensor(sae.encode_with_strategy(inputs.get(x)?, &strategy))
        }
        SaeCall::EncodeSparse { x, .. } => Ok(match sae.encode_sparse(inputs.get(x)?) {
            Ok(sparse) => {
                let (indices, values): (Vec<f64>, Vec<f64>) = sparse
                    .features
                    .iter()
                    // A feature index is far below 2^53.
                    .map(|(feature, value)| (feature.index as f64, f64::from(*value)))
                    .unzip();
                Outcome::Results(vec![
                    Answer::list("indices", indices),
                    Answer::list("values", values),
                ])
            }
            Err(error) => Outcome::Refused(error),
        }),
        SaeCall::Decode { x, .. } => tensor(sae.decode(inputs.get(x)?)),
        SaeCall::Reconstruct { x, .. } => tensor(sae.reconstruct(inputs.get(x)?)),
        SaeCall::ReconstructionError { x, .. } => {
            Ok(match sae.reconstruction_error(inputs.get(x)?) {
                Ok(value) => Outcome::Results(vec![Answer::scalar("value", value)]),
                Err(error) => Outcome::Refused(error),
            })
        }
        SaeCall::DecoderVector { feature, .. } => tensor(sae.decoder_vector(*feature)),
    }
}
