//! Calls of a sparse autoencoder's functions.

use candle_core::Device;
use candle_mi::sae::TopKStrategy;

use crate::answer::{Answer, Outcome};
use crate::call_protocol::{SaeCall, Strategy};
use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::protocol::SaeRequest;
use crate::sae::SaeCache;

pub fn run(call: &SaeCall, inputs: &Inputs, saes: &mut SaeCache) -> Result<Outcome, EmitError> {
    let file = call.file();
    let wanted = SaeRequest {
        path: file.path.clone(),
        layer: file.layer,
        hook: String::new(),
    };
    let sae = &saes.get(&wanted, &Device::Cpu, "cpu")?.sae;
    match call {
        SaeCall::Encode { x, .. } => Outcome::tensor(sae.encode(inputs.get(x)?)),
        SaeCall::EncodeWithStrategy { x, strategy, .. } => {
            let strategy = match strategy {
                Strategy::Auto => TopKStrategy::Auto,
                Strategy::Cpu => TopKStrategy::Cpu,
                Strategy::Gpu => TopKStrategy::Gpu,
            };
            Outcome::tensor(sae.encode_with_strategy(inputs.get(x)?, &strategy))
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
        SaeCall::Decode { x, .. } => Outcome::tensor(sae.decode(inputs.get(x)?)),
        SaeCall::Reconstruct { x, .. } => Outcome::tensor(sae.reconstruct(inputs.get(x)?)),
        SaeCall::ReconstructionError { x, .. } => {
            Ok(match sae.reconstruction_error(inputs.get(x)?) {
                Ok(value) => Outcome::Results(vec![Answer::scalar("value", value)]),
                Err(error) => Outcome::Refused(error),
            })
        }
        SaeCall::DecoderVector { feature, .. } => Outcome::tensor(sae.decoder_vector(*feature)),
    }
}
