//! Gradients of a forward pass, with respect to what hooks hold and to weights.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use candle_mi::{
    GenericTransformer, HookPoint, HookSpec, Intervention, MIBackend, MIError, TransformerConfig,
};
use candle_nn::{VarBuilder, VarMap};

use crate::answer::{Answer, Outcome};
use crate::error::EmitError;
use crate::hook_point::point;
use crate::inputs::Inputs;
use crate::training_protocol::GradientCall;
use crate::weights::{self, read, CONFIG};

pub fn run(call: &GradientCall, inputs: &Inputs) -> Result<Outcome, EmitError> {
    let GradientCall::TrackedForward {
        model,
        tokens,
        cotangent,
        hooks,
        weights,
    } = call;
    let tokens = Tensor::new(tokens.clone(), &Device::Cpu).map_err(refused)?;
    let hooks = hooks
        .iter()
        .map(|name| point(name))
        .collect::<Result<Vec<HookPoint>, EmitError>>()?;
    let mut loaded = Loaded::read(model, weights)?;
    gradients(&mut loaded, &tokens, inputs.get(cotangent)?, &hooks)
}

fn refused(error: impl Into<MIError>) -> EmitError {
    EmitError::Model(error.into().to_string())
}

/// A model of which some weights are variables.
struct Loaded {
    transformer: GenericTransformer,
    variables: Vec<(String, Var)>,
}

impl Loaded {
    fn read(directory: &Path, wanted: &[String]) -> Result<Self, EmitError> {
        let files = weights::files_of(directory)?;
        let (config, shards): (&PathBuf, &[PathBuf]) = files
            .split_first()
            .ok_or_else(|| EmitError::Model("no files to load".to_owned()))?;
        let json = serde_json::from_slice(&read(config)?)
            .map_err(|error| EmitError::Model(format!("{CONFIG}: {error}")))?;
        let config = TransformerConfig::from_hf_config(&json).map_err(refused)?;
        let mut tensors = HashMap::new();
        for shard in shards {
            let part = candle_core::safetensors::load_buffer(&read(shard)?, &Device::Cpu);
            tensors.extend(part.map_err(refused)?);
        }
        let variables = wanted
            .iter()
            .map(|name| {
                let tensor = tensors
                    .get(name)
                    .ok_or_else(|| EmitError::Request(format!("the model has no {name}")))?;
                Ok((name.clone(), Var::from_tensor(tensor).map_err(refused)?))
            })
            .collect::<Result<Vec<(String, Var)>, EmitError>>()?;
        let builder = if variables.is_empty() {
            VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
        } else {
            tracked(tensors, &variables)?
        };
        let transformer = GenericTransformer::load(config, &Device::Cpu, DType::F32, builder);
        Ok(Self {
            transformer: transformer.map_err(refused)?,
            variables,
        })
    }
}

/// As people load a model that they train: every weight is a variable of the map.
fn tracked(
    tensors: HashMap<String, Tensor>,
    variables: &[(String, Var)],
) -> Result<VarBuilder<'static>, EmitError> {
    let map = VarMap::new();
    {
        let mut held = map
            .data()
            .lock()
            .map_err(|_| EmitError::Model("the map of variables is poisoned".to_owned()))?;
        for (name, tensor) in tensors {
            let asked = variables.iter().find(|(asked, _)| *asked == name);
            let variable = match asked {
                Some((_, variable)) => variable.clone(),
                None => Var::from_tensor(&tensor).map_err(refused)?,
            };
            held.insert(name, variable);
        }
    }
    Ok(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu))
}

/// The logits of the tracked pass, then the gradient of each variable; one that none reaches is 0, as with PyTorch's
/// `materialize_grads`.
fn gradients(
    loaded: &mut Loaded,
    tokens: &Tensor,
    cotangent: &Tensor,
    hooks: &[HookPoint],
) -> Result<Outcome, EmitError> {
    let mut plain = HookSpec::new();
    for hook in hooks {
        plain.capture(hook.clone());
    }
    let cache = loaded
        .transformer
        .forward(tokens, &plain)
        .map_err(refused)?;
    let mut spec = HookSpec::new();
    let mut variables = Vec::with_capacity(hooks.len() + loaded.variables.len());
    for hook in hooks {
        let there = cache.require(hook).map_err(refused)?;
        let zeros = Var::zeros(there.shape(), DType::F32, &Device::Cpu).map_err(refused)?;
        spec.intervene(hook.clone(), Intervention::Add(zeros.as_tensor().clone()));
        variables.push((hook.to_string(), zeros));
    }
    variables.append(&mut loaded.variables);
    let cache = loaded.transformer.forward(tokens, &spec).map_err(refused)?;
    let loss = cache.output().mul(cotangent).map_err(refused)?;
    let loss = loss.sum_all().map_err(refused)?;
    let store = loss.backward().map_err(refused)?;
    let mut answers = vec![Answer::of("logits", cache.output())?];
    for (name, variable) in variables {
        let zeros = || variable.as_tensor().zeros_like().map_err(refused);
        let gradient = store.get(variable.as_tensor()).cloned();
        answers.push(Answer::of(name, &gradient.map_or_else(zeros, Ok)?)?);
    }
    Ok(Outcome::Results(answers))
}
