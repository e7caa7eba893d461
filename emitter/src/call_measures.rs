//! Calls of the measures on logits and attention, of the masks, and of PCA.

use candle_core::{DType, Device};
use candle_mi::{AblationResult, InterventionType, KnockoutSpec, SteeringSpec};

use crate::answer::{Answer, Outcome};
use crate::call_protocol::Measure;
use crate::entries::name_entries;
use crate::error::EmitError;
use crate::inputs::{rounded, Inputs};
use crate::protocol::Attention;

pub fn run(measure: &Measure, inputs: &Inputs) -> Result<Outcome, EmitError> {
    Ok(match measure {
        Measure::KlDivergence { baseline, other } => Outcome::scalar(candle_mi::kl_divergence(
            inputs.get(baseline)?,
            inputs.get(other)?,
        )),
        Measure::LogitDiff {
            baseline,
            ablated,
            token,
        } => Outcome::scalar(ablation(inputs, baseline, ablated)?.logit_diff(*token)),
        Measure::TopChangedTokens {
            baseline,
            ablated,
            k,
        } => match ablation(inputs, baseline, ablated)?.top_changed_tokens(*k) {
            Ok(rows) => Outcome::Results(vec![
                Answer::list("tokens", rows.iter().map(|row| f64::from(row.0))),
                Answer::list("baseline", rows.iter().map(|row| f64::from(row.1))),
                Answer::list("ablated", rows.iter().map(|row| f64::from(row.2))),
                Answer::list("change", rows.iter().map(|row| f64::from(row.3))),
            ]),
            Err(error) => Outcome::Refused(error),
        },
        Measure::AttentionToTargets {
            attention,
            from,
            targets,
        } => Outcome::scalar(candle_mi::measure_attention_to_targets(
            inputs.get(attention)?,
            *from,
            targets,
        )),
        Measure::ExtractTokenProb { logits, token } => {
            Outcome::scalar(candle_mi::extract_token_prob(inputs.get(logits)?, *token))
        }
        Measure::SampleToken {
            logits,
            temperature,
        } => match candle_mi::sample_token(inputs.get(logits)?, *temperature) {
            Ok(token) => Outcome::Results(vec![Answer::scalar("token", f64::from(token))]),
            Err(error) => Outcome::Refused(error),
        },
        Measure::PcaTopK {
            matrix,
            k,
            iterations,
        } => match candle_mi::pca_top_k(inputs.get(matrix)?, *k, *iterations) {
            Ok(pca) => Outcome::Results(vec![
                Answer::of("components", &pca.components)?,
                Answer::list("eigenvalues", pca.eigenvalues.into_iter().map(f64::from)),
                Answer::list(
                    "explained",
                    pca.explained_variance_ratio.into_iter().map(f64::from),
                ),
            ]),
            Err(error) => Outcome::Refused(error),
        },
        Measure::CreateKnockoutMask {
            heads,
            edges,
            n_heads,
            seq_len,
        } => {
            let chosen = entries(heads, edges);
            let spec = name_entries!(KnockoutSpec::new(), chosen);
            Outcome::tensor(candle_mi::create_knockout_mask(
                &spec,
                *n_heads,
                *seq_len,
                &Device::Cpu,
                DType::F32,
            ))?
        }
        Measure::ApplySteering {
            attention,
            heads,
            edges,
            scale,
            set_value,
        } => {
            let kind = match (scale, set_value) {
                (Some(factor), None) => InterventionType::Scale(*factor),
                (None, Some(target)) => InterventionType::SetValue(*target),
                _ => {
                    return Err(EmitError::Request(
                        "apply_steering takes scale or set_value".to_owned(),
                    ))
                }
            };
            steer(inputs, attention, &entries(heads, edges), kind)?
        }
        Measure::CreateCausalMask { seq_len } => Outcome::tensor(candle_mi::create_causal_mask(
            *seq_len,
            &Device::Cpu,
            DType::F32,
        ))?,
        #[cfg(since_0_1_24)]
        Measure::PositionDelta {
            direction,
            position,
            seq_len,
            dtype,
        } => {
            let direction = rounded(inputs.get(direction)?, *dtype)?;
            Outcome::tensor_of(
                candle_mi::position_delta(&direction, *position, *seq_len),
                *dtype,
            )?
        }
        #[cfg(not(since_0_1_24))]
        Measure::PositionDelta { .. } => Outcome::Absent,
    })
}

fn steer(
    inputs: &Inputs,
    attention: &str,
    chosen: &Attention,
    kind: InterventionType,
) -> Result<Outcome, EmitError> {
    let attention = inputs.get(attention)?;
    let (_, n_heads, seq_len, _) = attention
        .dims4()
        .map_err(|error| EmitError::Request(format!("attention: {error}")))?;
    let spec = name_entries!(SteeringSpec::new(kind), chosen);
    Outcome::tensor(candle_mi::apply_steering(
        attention, &spec, n_heads, seq_len,
    ))
}

fn entries(heads: &Option<Vec<usize>>, edges: &[(usize, usize)]) -> Attention {
    Attention {
        heads: heads.clone(),
        edges: edges.to_vec(),
        ..Attention::default()
    }
}

fn ablation(inputs: &Inputs, baseline: &str, ablated: &str) -> Result<AblationResult, EmitError> {
    Ok(AblationResult::new(
        inputs.get(baseline)?.clone(),
        inputs.get(ablated)?.clone(),
        KnockoutSpec::new(),
    ))
}
