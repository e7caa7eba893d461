//! Calls of diffusion models.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_mi::diffusion::{
    generate, generate_trajectory, DiffusionSamplingConfig, GenericMdlm, MdlmConfig, OthelloGpt,
    OthelloGptConfig,
};
use candle_mi::{
    create_knockout_mask, HookCache, HookPoint, HookSpec, Intervention, KnockoutSpec, MIBackend,
    MIError, MIModel,
};

use crate::answer::{Answer, Outcome};
use crate::diffusion_protocol::{Capture, DiffusionCall, DiffusionEdit};
use crate::error::EmitError;
use crate::hook_point::point;
use crate::inputs::Inputs;
use crate::model;
use crate::weights::{self, Weights};

pub fn run(call: &DiffusionCall, inputs: &Inputs) -> Result<Outcome, EmitError> {
    match call {
        DiffusionCall::Forward {
            tokens,
            capture,
            self_conditioning,
            edit,
            pretrained,
            ..
        } => {
            let model = if *pretrained {
                Model::Pretrained(model::from_pretrained(call.directory())?)
            } else {
                Model::read(call.directory())?
            };
            let tokens = ids(tokens)?;
            let mut hooks = captured(model.backend().num_layers(), *capture)?;
            let names: Vec<String> = hooks.iter().map(ToString::to_string).collect();
            let mut spec: HookSpec = hooks.drain(..).collect();
            if let Some(edit) = edit {
                register(edit, model.backend(), &tokens, inputs, &mut spec)?;
            }
            let cache = match self_conditioning {
                Some(before) => match model.conditioned(&tokens, &ids(before)?, &spec)? {
                    Some(cache) => cache,
                    None => return Ok(Outcome::Absent),
                },
                None => model.backend().forward(&tokens, &spec).map_err(refused)?,
            };
            let mut answers = Vec::with_capacity(names.len() + 1);
            for name in names {
                let tensor = cache.require(&point(&name)?).map_err(refused)?.clone();
                answers.push(Answer::of(name, &tensor)?);
            }
            answers.push(Answer::of("logits", cache.output())?);
            Ok(Outcome::Results(answers))
        }
        DiffusionCall::Project { hidden, .. } => {
            let model = Model::read(call.directory())?;
            Outcome::tensor(model.backend().project_to_vocab(inputs.get(hidden)?))
        }
        DiffusionCall::Embedding { token, .. } => {
            let model = Model::read(call.directory())?;
            Outcome::tensor(model.backend().embedding_vector(*token))
        }
        DiffusionCall::Sample {
            prompt,
            seq_len,
            mask,
            temperature,
            seed,
            steps,
            ..
        } => {
            let model = Model::read(call.directory())?;
            let mut config = DiffusionSamplingConfig::default();
            config.seq_len = *seq_len;
            config.num_steps = *steps;
            config.temperature = *temperature;
            config.top_k = Some(1);
            config.seed = *seed;
            sampled(model.backend(), *mask, prompt, &config)
        }
    }
}

fn refused(error: impl Into<MIError>) -> EmitError {
    EmitError::Model(error.into().to_string())
}

fn ids(tokens: &[Vec<u32>]) -> Result<Tensor, EmitError> {
    Tensor::new(tokens.to_vec(), &Device::Cpu).map_err(refused)
}

enum Model {
    Mdlm(Box<GenericMdlm>),
    Othello(Box<OthelloGpt>),
    Pretrained(MIModel),
}

impl Model {
    fn read(directory: &Path) -> Result<Self, EmitError> {
        let files = weights::files_of(directory)?;
        let (config, shards) = files
            .split_first()
            .ok_or_else(|| EmitError::Model("no files to load".to_owned()))?;
        let json: serde_json::Value = serde_json::from_slice(&weights::read(config)?)
            .map_err(|error| EmitError::Model(format!("{}: {error}", config.display())))?;
        let builder = Weights::read(shards, DType::F32, &Device::Cpu)?.builder;
        if json.get("model_type").and_then(|name| name.as_str()) == Some("mdlm") {
            let config = MdlmConfig::from_hf_config(&json).map_err(refused)?;
            let model = GenericMdlm::load(config, &Device::Cpu, DType::F32, builder);
            return Ok(Self::Mdlm(Box::new(model.map_err(refused)?)));
        }
        let config = OthelloGptConfig::from_hf_config(&json).map_err(refused)?;
        let model = OthelloGpt::load(config, builder).map_err(refused)?;
        Ok(Self::Othello(Box::new(model)))
    }

    fn backend(&self) -> &dyn MIBackend {
        match self {
            Self::Mdlm(model) => model.as_ref(),
            Self::Othello(model) => model.as_ref(),
            Self::Pretrained(model) => model.backend(),
        }
    }

    /// Nothing where the release has no self-conditioning.
    #[cfg(since_0_2_2)]
    fn conditioned(
        &self,
        tokens: &Tensor,
        before: &Tensor,
        spec: &HookSpec,
    ) -> Result<Option<HookCache>, EmitError> {
        match self {
            Self::Othello(model) => {
                let found = model.forward_with_self_cond(tokens, Some(before), spec);
                found.map(Some).map_err(refused)
            }
            _ => Err(EmitError::Request(
                "only an Othello-GPT has self-conditioning".to_owned(),
            )),
        }
    }

    #[cfg(not(since_0_2_2))]
    fn conditioned(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &HookSpec,
    ) -> Result<Option<HookCache>, EmitError> {
        Ok(None)
    }
}

/// The hooks in the order in which they fire.
fn captured(layers: usize, capture: Capture) -> Result<Vec<HookPoint>, EmitError> {
    const INSIDE: [&str; 5] = ["hook_q", "hook_k", "hook_v", "hook_scores", "hook_pattern"];
    const AFTER: [&str; 6] = [
        "hook_attn_out",
        "hook_resid_mid",
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    ];
    let mut names = vec!["hook_embed".to_owned()];
    for layer in 0..layers {
        names.push(format!("blocks.{layer}.hook_resid_pre"));
        if matches!(capture, Capture::All) {
            names.extend(INSIDE.map(|name| format!("blocks.{layer}.attn.{name}")));
        }
        names.extend(AFTER.map(|name| format!("blocks.{layer}.{name}")));
    }
    names.push("hook_final_norm".to_owned());
    if matches!(capture, Capture::Nothing) {
        names.clear();
    }
    names.iter().map(|name| point(name)).collect()
}

fn register(
    edit: &DiffusionEdit,
    model: &dyn MIBackend,
    tokens: &Tensor,
    inputs: &Inputs,
    spec: &mut HookSpec,
) -> Result<(), EmitError> {
    let (hook, intervention) = match edit {
        DiffusionEdit::Replace { hook, tensor } => {
            (hook, Intervention::Replace(inputs.get(tensor)?.clone()))
        }
        DiffusionEdit::Add { hook, tensor } => {
            (hook, Intervention::Add(inputs.get(tensor)?.clone()))
        }
        DiffusionEdit::PatchAt {
            hook,
            position,
            tensor,
        } => (hook, patch_at(*position, inputs.get(tensor)?.clone())?),
        DiffusionEdit::Scale { hook, factor } => (hook, Intervention::Scale(*factor)),
        DiffusionEdit::Zero { hook } => (hook, Intervention::Zero),
        DiffusionEdit::Knockout { hook, edges } => {
            let chosen = edges
                .iter()
                .fold(KnockoutSpec::new(), |spec, (query, key)| {
                    spec.edge(*query, *key)
                });
            let width = tokens.dim(1).map_err(refused)?;
            let mask =
                create_knockout_mask(&chosen, model.num_heads(), width, &Device::Cpu, DType::F32);
            (hook, Intervention::Knockout(mask.map_err(refused)?))
        }
    };
    spec.intervene(point(hook)?, intervention);
    Ok(())
}

#[cfg(since_0_1_24)]
fn patch_at(position: usize, value: Tensor) -> Result<Intervention, EmitError> {
    Ok(Intervention::PatchAt { position, value })
}

#[cfg(not(since_0_1_24))]
fn patch_at(_: usize, _: Tensor) -> Result<Intervention, EmitError> {
    Err(EmitError::Model(
        "this candle-mi has no PatchAt, which came with 0.1.24".to_owned(),
    ))
}

fn sampled(
    model: &dyn MIBackend,
    mask: u32,
    prompt: &[u32],
    config: &DiffusionSamplingConfig,
) -> Result<Outcome, EmitError> {
    let last = generate(model, &Device::Cpu, mask, prompt, config).map_err(refused)?;
    let mut answers = vec![Answer::list("value", last.into_iter().map(f64::from))];
    if config.num_steps == 1 {
        let states = generate_trajectory(model, &Device::Cpu, mask, prompt, config);
        answers.push(Answer::of("trajectory", &ids(&states.map_err(refused)?)?)?);
    }
    Ok(Outcome::Results(answers))
}
