//! Dumps candle-mi's `HookCache` so that `candle-mi-parity check MODEL --trace DIR` can judge it.
//!
//! Copy [`dump`] into a program of your own; `main` shows its use:
//! `cargo run --example dump_hook_cache -- MODEL_DIR 1,450,7483 DIR`

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::{env, fs};

use candle_core::{safetensors, DType, Device, Tensor};
use candle_mi::{GenericTransformer, HookCache, HookPoint, HookSpec, MIBackend, TransformerConfig};
use candle_nn::VarBuilder;

type Outcome = Result<(), Box<dyn Error>>;

/// Writes what was captured, by the names of the hook points, the logits, and the token ids, to `directory`.
fn dump(cache: &HookCache, tokens: &[u32], directory: &Path) -> Outcome {
    fs::create_dir_all(directory)?;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for (point, tensor) in cache.captures() {
        tensors.insert(point.to_string(), tensor.contiguous()?);
    }
    tensors.insert("logits".to_owned(), cache.output().contiguous()?);
    safetensors::save(&tensors, directory.join("tensors.safetensors"))?;
    fs::write(
        directory.join("tokens.json"),
        serde_json::to_string(tokens)?,
    )?;
    Ok(())
}

fn main() -> Outcome {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [model, tokens, out] = arguments.as_slice() else {
        return Err("usage: dump_hook_cache MODEL_DIR 1,450,7483 DIR".into());
    };
    let tokens = tokens
        .split(',')
        .map(|token| token.trim().parse())
        .collect::<Result<Vec<u32>, _>>()?;

    let json = serde_json::from_slice(&fs::read(Path::new(model).join("config.json"))?)?;
    let config = TransformerConfig::from_hf_config(&json)?;
    let weights = fs::read(Path::new(model).join("model.safetensors"))?;
    let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
    let layers = config.num_layers;
    let model = GenericTransformer::load(config, &Device::Cpu, DType::F32, weights)?;

    let mut hooks = HookSpec::new();
    for layer in 0..layers {
        hooks.capture(HookPoint::AttnPattern(layer));
        hooks.capture(HookPoint::ResidPost(layer));
    }
    let input = Tensor::new(tokens.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
    let cache = model.forward(&input, &hooks)?;
    dump(&cache, &tokens, Path::new(out))
}
