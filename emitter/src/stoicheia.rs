//! Loading one of AlgZoo's networks, and its forward pass with captures and edits.

use candle_core::{DType, Device, Tensor};
pub use candle_mi::stoicheia::StoicheiaRnn as Rnn;
use candle_mi::stoicheia::{StoicheiaArch, StoicheiaConfig, StoicheiaTask, StoicheiaTransformer};
use candle_mi::{HookPoint, HookSpec, Intervention, MIBackend, MIError};

use crate::answer::{Answer, Outcome};
use crate::edits::patch_at;
use crate::error::EmitError;
use crate::hook_point::point;
use crate::inputs::Inputs;
use crate::stoicheia_protocol::{EditKind, Network, NetworkEdit, Task};

/// What candle-mi refuses is an outcome of the call alone.
pub fn refused(error: impl Into<MIError>) -> EmitError {
    EmitError::Model(error.into().to_string())
}

pub fn task(asked: Task) -> StoicheiaTask {
    match asked {
        Task::SecondArgmax => StoicheiaTask::SecondArgmax,
        Task::Argmedian => StoicheiaTask::Argmedian,
        Task::Median => StoicheiaTask::Median,
        Task::LongestCycle => StoicheiaTask::LongestCycle,
    }
}

pub fn config(network: &Network) -> StoicheiaConfig {
    let mut config =
        StoicheiaConfig::from_task(task(network.task), network.hidden_size, network.seq_len);
    config.num_layers = network.num_layers.unwrap_or(config.num_layers);
    config.num_heads = network.num_heads.unwrap_or(config.num_heads);
    config.input_range = network.input_range.unwrap_or(config.input_range);
    config
}

/// A message of candle-mi without the place of the file, which is another on each machine.
fn at_load(network: &Network, error: &MIError) -> EmitError {
    let path = network.path.to_string_lossy();
    EmitError::Model(error.to_string().replace(&*path, "NETWORK"))
}

pub fn rnn(network: &Network) -> Result<Rnn, EmitError> {
    Rnn::load(config(network), &network.path, &Device::Cpu)
        .map_err(|error| at_load(network, &error))
}

fn backend(network: &Network) -> Result<Box<dyn MIBackend>, EmitError> {
    Ok(match config(network).arch {
        StoicheiaArch::Transformer => Box::new(
            StoicheiaTransformer::load(config(network), &network.path, &Device::Cpu)
                .map_err(|error| at_load(network, &error))?,
        ),
        _ => Box::new(rnn(network)?),
    })
}

pub fn sizes(network: &Network) -> Result<Outcome, EmitError> {
    let (backend, config) = (backend(network)?, config(network));
    let sizes = [
        backend.num_layers(),
        backend.hidden_size(),
        backend.vocab_size(),
        backend.num_heads(),
        config.output_size(),
        config.param_count(),
    ];
    let sizes = sizes.map(|size| size as f64);
    Ok(Outcome::Results(vec![Answer::list("value", sizes)]))
}

pub fn weights(network: &Network) -> Result<Outcome, EmitError> {
    let rnn = rnn(network)?;
    Ok(Outcome::Results(vec![
        Answer::of("weight_ih", rnn.weight_ih())?,
        Answer::of("weight_hh", rnn.weight_hh())?,
        Answer::of("weight_oh", rnn.weight_oh())?,
    ]))
}

pub fn project(network: &Network, x: &Tensor) -> Result<Outcome, EmitError> {
    Outcome::tensor(backend(network)?.project_to_vocab(x))
}

pub fn forward(
    network: &Network,
    inputs: &Inputs,
    x: &str,
    edits: &[NetworkEdit],
) -> Result<Outcome, EmitError> {
    let (backend, x) = (backend(network)?, inputs.get(x)?);
    let steps = x.dim(1).map_err(refused)?;
    let (x, names) = match config(network).arch {
        StoicheiaArch::Transformer => {
            let tokens = x.to_dtype(DType::U32).map_err(refused)?;
            (tokens, hooks_of_layers(backend.num_layers()))
        }
        _ => (x.clone(), hooks_of_steps(steps)),
    };
    let mut hooks = HookSpec::new();
    for (hook, kind, number, tensor) in edits {
        let hook: HookPoint = point(hook)?;
        let intervention = match kind {
            EditKind::Replace => Intervention::Replace(inputs.get(tensor)?.clone()),
            EditKind::Add => Intervention::Add(inputs.get(tensor)?.clone()),
            EditKind::Knockout => Intervention::Knockout(inputs.get(tensor)?.clone()),
            EditKind::Scale => Intervention::Scale(*number),
            EditKind::Zero => Intervention::Zero,
            EditKind::PatchAt => {
                // A release without it refuses the call.
                let at = patch_at(*number as usize, inputs.get(tensor)?.clone());
                at.map_err(|error| EmitError::Model(error.to_string()))?
            }
        };
        hooks.intervene(hook, intervention);
    }
    // Where nothing is captured, candle-mi takes other ways.
    let bare = backend.forward(&x, &hooks).map_err(refused)?;
    for name in &names {
        hooks.capture(point(name)?);
    }
    let cache = backend.forward(&x, &hooks).map_err(refused)?;
    let mut found = vec![
        Answer::of("output", bare.output())?,
        Answer::of("captured_output", cache.output())?,
    ];
    for name in names {
        let tensor = cache.require(&point(&name)?).map_err(refused)?;
        found.push(Answer::of(name, tensor)?);
    }
    Ok(Outcome::Results(found))
}

fn hooks_of_steps(steps: usize) -> Vec<String> {
    let each = (0..steps).flat_map(|step| {
        [
            format!("rnn.hook_pre_activation.{step}"),
            format!("rnn.hook_hidden.{step}"),
        ]
    });
    each.chain(["rnn.hook_final_state", "rnn.hook_output"].map(str::to_owned))
        .collect()
}

fn hooks_of_layers(layers: usize) -> Vec<String> {
    const LAYER: [&str; 5] = [
        "hook_resid_pre",
        "attn.hook_scores",
        "attn.hook_pattern",
        "hook_attn_out",
        "hook_resid_post",
    ];
    let each = (0..layers).flat_map(|layer| LAYER.map(|name| format!("blocks.{layer}.{name}")));
    ["hook_embed".to_owned()].into_iter().chain(each).collect()
}
