//! Calls of candle-mi's optimizer and of its average of weights.

use candle_core::{Device, Tensor, Var};
use candle_mi::optim::{fold_ema, AdamW, ParamsAdamW};
use candle_mi::MIError;

use crate::answer::{Answer, Outcome};
use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::training_protocol::{Optimized, TrainingCall};

pub fn run(call: &TrainingCall, inputs: &Inputs) -> Result<Outcome, EmitError> {
    match call {
        TrainingCall::AdamwStep(asked) => adamw(asked, inputs),
        TrainingCall::FoldEma {
            shadows,
            steps,
            decay,
        } => ema(shadows, steps, *decay, inputs),
    }
}

fn refused(error: impl Into<MIError>) -> EmitError {
    EmitError::Model(error.into().to_string())
}

/// The parameters after the last step, with both moments of each.
fn adamw(asked: &Optimized, inputs: &Inputs) -> Result<Outcome, EmitError> {
    let variables = asked
        .parameters
        .iter()
        .enumerate()
        .map(|(place, key)| {
            let variable = Var::from_tensor(inputs.get(key)?).map_err(refused)?;
            Ok((place.to_string(), variable))
        })
        .collect::<Result<Vec<(String, Var)>, EmitError>>()?;
    let mut params = ParamsAdamW {
        lr: asked.lr,
        beta1: asked.beta1,
        beta2: asked.beta2,
        eps: asked.eps,
        weight_decay: asked.weight_decay,
    };
    let mut optimizer = AdamW::new(variables.clone(), params.clone()).map_err(refused)?;
    for (step, gradients) in asked.steps.iter().enumerate() {
        if let Some(later) = asked.later.as_ref().filter(|later| later.after == step) {
            params.lr = later.lr;
            optimizer.set_learning_rate(later.lr);
        }
        if asked.restored_after == Some(step) {
            let (state, taken) = (optimizer.state(), optimizer.steps_taken());
            optimizer = AdamW::new(variables.clone(), params.clone()).map_err(refused)?;
            optimizer.restore(&state, taken).map_err(refused)?;
        }
        if asked.partly_restored_after == Some(step) {
            let mut state = optimizer.state();
            state.retain(|name, _| name.ends_with(".0"));
            let taken = optimizer.steps_taken();
            optimizer.restore(&state, taken).map_err(refused)?;
        }
        let loss = loss(&variables, gradients, inputs)?;
        optimizer
            .step(&loss.backward().map_err(refused)?)
            .map_err(refused)?;
    }
    let state = optimizer.state();
    let mut answers = Vec::with_capacity(3 * variables.len());
    for (name, variable) in &variables {
        answers.push(Answer::of(format!("value{name}"), variable.as_tensor())?);
        for moment in ["first", "second"] {
            let key = format!("adamw.{moment}.{name}");
            let tensor = state
                .get(&key)
                .ok_or_else(|| EmitError::Model(format!("the state has no {key}")))?;
            answers.push(Answer::of(format!("{moment}{name}"), tensor)?);
        }
    }
    Ok(Outcome::Results(answers))
}

/// Of which each variable's gradient is the tensor that is given, to the bit.
fn loss(
    variables: &[(String, Var)],
    gradients: &[String],
    inputs: &Inputs,
) -> Result<Tensor, EmitError> {
    let mut loss = Tensor::new(0f32, &Device::Cpu).map_err(refused)?;
    for ((_, variable), key) in variables.iter().zip(gradients) {
        if key.is_empty() {
            continue;
        }
        let term = variable.as_tensor().mul(inputs.get(key)?);
        let term = term.and_then(|product| product.sum_all());
        loss = term.and_then(|term| loss.add(&term)).map_err(refused)?;
    }
    Ok(loss)
}

fn ema(
    shadows: &[String],
    steps: &[Vec<String>],
    decay: f64,
    inputs: &Inputs,
) -> Result<Outcome, EmitError> {
    let mut averages = shadows
        .iter()
        .map(|key| inputs.get(key).cloned())
        .collect::<Result<Vec<Tensor>, EmitError>>()?;
    for keys in steps {
        let parameters = keys
            .iter()
            .map(|key| inputs.get(key))
            .collect::<Result<Vec<&Tensor>, EmitError>>()?;
        fold_ema(averages.iter_mut().zip(parameters), decay).map_err(refused)?;
    }
    let named = averages
        .iter()
        .enumerate()
        .map(|(place, average)| Answer::of(format!("value{place}"), average));
    Ok(Outcome::Results(named.collect::<Result<_, EmitError>>()?))
}
