//! Calls of the caches of attention and of activations, of the masks that no plain forward uses, of the calibration of
//! a steering, and of the lists of a file's tensors.

use candle_core::{DType, Device, Tensor};
use candle_mi::config::{tensor_names_from_index, tensor_names_from_safetensors};
use candle_mi::{
    ActivationCache, AttentionCache, DoseResponseCurve, FullActivationCache, InterventionType,
    MIError, SteeringCalibration, SteeringResult, SteeringSpec,
};

use crate::answer::{Answer, Outcome};
use crate::call_protocol::CacheCall;
use crate::error::EmitError;
use crate::inputs::{rounded, Inputs};
use crate::model;
use crate::protocol::Precision;

pub fn run(call: &CacheCall, inputs: &Inputs) -> Result<Outcome, EmitError> {
    Ok(match call {
        CacheCall::AttentionFromPosition {
            patterns,
            layer,
            position,
            dtype,
        } => list(
            "value",
            attention(inputs, patterns, *dtype)?.attention_from_position(*layer, *position),
        ),
        CacheCall::AttentionToPosition {
            patterns,
            layer,
            position,
            dtype,
        } => list(
            "value",
            attention(inputs, patterns, *dtype)?.attention_to_position(*layer, *position),
        ),
        CacheCall::TopAttendedPositions {
            patterns,
            layer,
            position,
            k,
        } => match attention(inputs, patterns, None)?.top_attended_positions(*layer, *position, *k)
        {
            Ok(found) => Outcome::Results(vec![
                // A position is far below 2^53.
                Answer::list("positions", found.iter().map(|(at, _)| *at as f64)),
                Answer::list(
                    "weights",
                    found.iter().map(|(_, weight)| f64::from(*weight)),
                ),
            ]),
            Err(error) => Outcome::Refused(error),
        },
        CacheCall::GetPosition {
            layers,
            layer,
            position,
        } => {
            let mut cache = FullActivationCache::with_capacity(layers.len());
            for key in layers {
                cache.push(inputs.get(key)?.clone());
            }
            Outcome::tensor(cache.get_position(*layer, *position))?
        }
        CacheCall::ToF32Vecs { layers, half } => {
            let mut cache = ActivationCache::with_capacity(layers.len());
            for key in layers {
                let dtype = half.then_some(Precision::BFloat16);
                cache.push(rounded(inputs.get(key)?, dtype)?);
            }
            list("value", cache.to_f32_vecs().map(|found| found.concat()))
        }
        #[cfg(since_0_1_24)]
        CacheCall::CreateBidirectionalMask { seq_len } => Outcome::tensor(
            candle_mi::create_bidirectional_mask(*seq_len, &Device::Cpu, DType::F32),
        )?,
        #[cfg(not(since_0_1_24))]
        CacheCall::CreateBidirectionalMask { .. } => Outcome::Absent,
        CacheCall::CreateGenerationMask {
            new_seq_len,
            total_seq_len,
            start_pos,
            dtype,
        } => Outcome::tensor_of(
            candle_mi::create_generation_mask(
                *new_seq_len,
                *total_seq_len,
                *start_pos,
                &Device::Cpu,
                dtype.map_or(DType::F32, model::dtype_of),
            ),
            *dtype,
        )?,
        CacheCall::SteeringCalibration {
            source,
            baseline,
            target,
        } => calibration(*source, *baseline, *target),
        CacheCall::AttentionRatio { baseline, steered } => ratio(*baseline, *steered)?,
        CacheCall::ScaleForTarget { points, target } => {
            let mut curve = DoseResponseCurve::new(String::new(), String::new(), 0, 0.0);
            for (scale, level) in points {
                curve.add_point(*scale, *level, 0.0);
            }
            let found = curve.scale_for_target(*target).map(f64::from);
            Outcome::Results(vec![Answer::list("value", found)])
        }
        CacheCall::TensorNamesFromSafetensors { path } => names(tensor_names_from_safetensors(
            &path.join("model.safetensors"),
        )),
        CacheCall::TensorNamesFromIndex { path } => names(tensor_names_from_index(
            &path.join("model.safetensors.index.json"),
        )),
    })
}

fn attention(
    inputs: &Inputs,
    patterns: &[String],
    dtype: Option<Precision>,
) -> Result<AttentionCache, EmitError> {
    let mut cache = AttentionCache::with_capacity(patterns.len());
    for key in patterns {
        cache.push(rounded(inputs.get(key)?, dtype)?);
    }
    Ok(cache)
}

fn list(name: &'static str, values: Result<Vec<f32>, MIError>) -> Outcome {
    match values {
        Ok(values) => Outcome::Results(vec![Answer::list(name, values.into_iter().map(f64::from))]),
        Err(error) => Outcome::Refused(error),
    }
}

fn calibration(source: f32, baseline: f32, target: f32) -> Outcome {
    let found = SteeringCalibration::new(source, baseline, 0, 1, 1).with_target(target);
    let levels = found.dose_levels_absolute();
    Outcome::Results(vec![
        Answer::scalar("ratio", f64::from(found.attention_ratio)),
        Answer::scalar(
            "for_target",
            f64::from(found.scale_factor_for_target(target)),
        ),
        Answer::scalar("to_source", f64::from(found.scale_factor_to_source())),
        Answer::list("doses", levels.iter().map(|(dose, _)| f64::from(*dose))),
        Answer::list("levels", levels.iter().map(|(_, level)| f64::from(*level))),
    ])
}

/// Without measurements where `baseline` is `None`; no value where there is no ratio.
fn ratio(baseline: Option<f32>, steered: f32) -> Result<Outcome, EmitError> {
    let logits = Tensor::zeros(1, DType::F32, &Device::Cpu)
        .map_err(|error| EmitError::Forward(error.to_string()))?;
    let spec = SteeringSpec::new(InterventionType::Scale(1.0));
    let mut result = SteeringResult::new(logits.clone(), logits, spec);
    if let Some(baseline) = baseline {
        result = result.with_attention_measurements(baseline, steered);
    }
    let found = result.attention_ratio().map(f64::from);
    Ok(Outcome::Results(vec![Answer::list("value", found)]))
}

/// Sorted, because no order is documented.
fn names(found: Result<Vec<String>, MIError>) -> Outcome {
    match found {
        Ok(mut names) => {
            names.sort_unstable();
            Outcome::Results(vec![Answer::texts("text", names)])
        }
        Err(error) => Outcome::Refused(error),
    }
}
