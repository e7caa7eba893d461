//! Calls of a transcoder's functions.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_mi::clt::CltFeatureId;

use crate::answer::{Answer, Outcome};
use crate::clt::{self, refused, CrossLayerTranscoder};
use crate::clt_protocol::CltCall;
use crate::error::EmitError;
use crate::inputs::Inputs;

type Scored = Vec<(CltFeatureId, f32)>;

pub fn run(call: &CltCall, inputs: &Inputs) -> Result<Outcome, EmitError> {
    let told = |message: String| EmitError::Model(clt::without_path(&message, call.transcoder()));
    match answer(call, inputs) {
        Ok(Outcome::Refused(error)) => Err(told(error.to_string())),
        Err(EmitError::Model(message)) => Err(told(message)),
        other => other,
    }
}

fn answer(call: &CltCall, inputs: &Inputs) -> Result<Outcome, EmitError> {
    let absent = match call {
        CltCall::CltEncodePreActivation { .. } | CltCall::CltLoadSkipMatrix { .. } => {
            !cfg!(since_0_1_9)
        }
        CltCall::CltDecoderMatrix { .. } => !cfg!(since_0_1_11),
        _ => false,
    };
    if absent {
        return Ok(Outcome::Absent);
    }
    // A new one for each call: a steering cache or a loaded encoder of an earlier call must not change this one.
    let mut clt = clt::open(call.transcoder())?;
    match call {
        CltCall::CltConfig { .. } => {
            let config = clt.config();
            let sizes = [
                config.n_layers,
                config.d_model,
                config.n_features_per_layer,
                config.n_features_total,
            ];
            let sizes = sizes.map(|size| size as f64);
            Ok(Outcome::Results(vec![Answer::list("value", sizes)]))
        }
        CltCall::CltEncodePreActivation { x, layer, .. } => {
            pre_activation(&mut clt, inputs.get(x)?, *layer)
        }
        CltCall::CltEncode {
            x, layer, after, ..
        } => {
            let x = inputs.get(x)?;
            if let Some(after) = after {
                clt.load_encoder(*after, &Device::Cpu).map_err(refused)?;
            }
            clt.load_encoder(*layer, &Device::Cpu).map_err(refused)?;
            let found = clt.encode(x, *layer).map_err(refused)?;
            features(&clt, *layer, &found.features)
        }
        CltCall::CltTopK { x, layer, k, .. } => {
            let x = inputs.get(x)?;
            clt.load_encoder(*layer, &Device::Cpu).map_err(refused)?;
            let found = clt.top_k(x, *layer, *k).map_err(refused)?;
            features(&clt, *layer, &found.features)
        }
        CltCall::CltDecoderVector {
            layer,
            target,
            cached,
            ..
        } => decoder_vectors(&mut clt, *layer, *target, *cached),
        CltCall::CltDecoderMatrix { layer, target, .. } => {
            decoder_matrix(&mut clt, *layer, *target)
        }
        CltCall::CltExtractDecoderVectors {
            features, target, ..
        } => extracted(&mut clt, features, *target),
        CltCall::CltLoadSkipMatrix { layer, .. } => skip_matrix(&mut clt, *layer),
        CltCall::CltInject {
            residual,
            features,
            position,
            strength,
            ..
        } => {
            let features: Vec<(CltFeatureId, usize)> = features
                .iter()
                .map(|(layer, index, target)| (feature(*layer, *index), *target))
                .collect();
            clt.cache_steering_vectors(&features, &Device::Cpu)
                .map_err(refused)?;
            Outcome::tensor(clt.inject(inputs.get(residual)?, &features, *position, *strength))
        }
        CltCall::CltScoreFeatures {
            direction,
            scoring: of,
            ..
        } => {
            let direction = inputs.get(direction)?;
            let found = clt
                .score_features_by_decoder_projection(direction, of.target, of.k, of.cosine)
                .map_err(refused)?;
            scores(&clt, &[found], false)
        }
        CltCall::CltScoreFeaturesBatch {
            directions,
            scoring: of,
            ..
        } => {
            let directions = directions
                .iter()
                .map(|direction| inputs.get(direction).cloned())
                .collect::<Result<Vec<Tensor>, EmitError>>()?;
            let found = clt
                .score_features_by_decoder_projection_batch(&directions, of.target, of.k, of.cosine)
                .map_err(refused)?;
            scores(&clt, &found, true)
        }
        CltCall::CltAttributionGraph {
            direction,
            least,
            scoring: of,
            ..
        } => {
            let direction = inputs.get(direction)?;
            let graph = clt
                .build_attribution_graph(direction, of.target, of.k, of.cosine)
                .map_err(refused)?
                .top_k(of.k)
                .threshold(*least);
            let found = graph.edges().iter().map(|edge| (edge.feature, edge.score));
            scores(&clt, &[found.collect()], false)
        }
    }
}

fn feature(layer: usize, index: usize) -> CltFeatureId {
    CltFeatureId { layer, index }
}

/// Sparse features of one layer as all of them, and their values in the order of the list.
fn features(
    clt: &CrossLayerTranscoder,
    layer: usize,
    found: &[(CltFeatureId, f32)],
) -> Result<Outcome, EmitError> {
    let mut dense = vec![0.0; clt.config().n_features_per_layer];
    for (feature, value) in found {
        match dense.get_mut(feature.index) {
            Some(place) if feature.layer == layer => *place = f64::from(*value),
            _ => return Err(EmitError::Model(format!("there is no feature {feature}"))),
        }
    }
    Ok(Outcome::Results(vec![
        Answer::list("value", dense),
        Answer::list("listed", found.iter().map(|(_, value)| f64::from(*value))),
    ]))
}

/// Lists of scores as the scores of all features `[n,L,F]`, −∞ of one that is not listed, and the scores in the order
/// of the lists.
fn scores(clt: &CrossLayerTranscoder, lists: &[Scored], batch: bool) -> Result<Outcome, EmitError> {
    let (layers, width) = (clt.config().n_layers, clt.config().n_features_per_layer);
    let mut dense = Vec::new();
    for list in lists {
        let scores: HashMap<CltFeatureId, f32> = list.iter().copied().collect();
        if scores.len() != list.len() {
            return Err(EmitError::Model("a feature is listed twice".to_owned()));
        }
        for layer in 0..layers {
            for index in 0..width {
                let score = scores.get(&feature(layer, index)).copied();
                dense.push(score.unwrap_or(f32::NEG_INFINITY));
            }
        }
    }
    let shape = match batch {
        true => vec![lists.len(), layers, width],
        false => vec![layers, width],
    };
    let value = Tensor::from_vec(dense, shape, &Device::Cpu).map_err(refused)?;
    let listed = lists.iter().flatten().map(|(_, score)| f64::from(*score));
    Ok(Outcome::Results(vec![
        Answer::of("value", &value)?,
        Answer::list("listed", listed),
    ]))
}

/// Every feature's decoder row for a layer, `[F,d]`.
fn decoder_vectors(
    clt: &mut CrossLayerTranscoder,
    layer: usize,
    target: usize,
    cached: bool,
) -> Result<Outcome, EmitError> {
    let features: Vec<CltFeatureId> = (0..clt.config().n_features_per_layer)
        .map(|index| feature(layer, index))
        .collect();
    if cached {
        clt.cache_steering_vectors_all_downstream(&features, &Device::Cpu)
            .map_err(refused)?;
    }
    let rows = features
        .iter()
        .map(|feature| clt.decoder_vector(feature, target, &Device::Cpu))
        .collect::<Result<Vec<Tensor>, _>>()
        .map_err(refused)?;
    stacked(&rows)
}

fn extracted(
    clt: &mut CrossLayerTranscoder,
    wanted: &[(usize, usize)],
    target: usize,
) -> Result<Outcome, EmitError> {
    let ids: Vec<CltFeatureId> = wanted
        .iter()
        .map(|(layer, index)| feature(*layer, *index))
        .collect();
    let found = clt.extract_decoder_vectors(&ids, target).map_err(refused)?;
    let rows = ids
        .iter()
        .map(|id| {
            let row = found.get(id).cloned();
            row.ok_or_else(|| EmitError::Model(format!("{id} is not among the vectors")))
        })
        .collect::<Result<Vec<Tensor>, EmitError>>()?;
    stacked(&rows)
}

fn stacked(rows: &[Tensor]) -> Result<Outcome, EmitError> {
    let value = Tensor::stack(rows, 0).map_err(refused)?;
    Outcome::tensor(value.to_dtype(DType::F32).map_err(Into::into))
}

#[cfg(since_0_1_9)]
fn pre_activation(
    clt: &mut CrossLayerTranscoder,
    x: &Tensor,
    layer: usize,
) -> Result<Outcome, EmitError> {
    clt.load_encoder(layer, &Device::Cpu).map_err(refused)?;
    Outcome::tensor(clt.encode_pre_activation(x, layer))
}

#[cfg(since_0_1_9)]
fn skip_matrix(clt: &mut CrossLayerTranscoder, layer: usize) -> Result<Outcome, EmitError> {
    Outcome::tensor(clt.load_skip_matrix(layer, &Device::Cpu))
}

#[cfg(not(since_0_1_9))]
fn pre_activation(
    _: &mut CrossLayerTranscoder,
    _: &Tensor,
    _: usize,
) -> Result<Outcome, EmitError> {
    Ok(Outcome::Absent)
}

#[cfg(not(since_0_1_9))]
fn skip_matrix(_: &mut CrossLayerTranscoder, _: usize) -> Result<Outcome, EmitError> {
    Ok(Outcome::Absent)
}

#[cfg(since_0_1_11)]
fn decoder_matrix(
    clt: &mut CrossLayerTranscoder,
    layer: usize,
    target: usize,
) -> Result<Outcome, EmitError> {
    Outcome::tensor(clt.decoder_matrix(layer, target, &Device::Cpu))
}

#[cfg(not(since_0_1_11))]
fn decoder_matrix(_: &mut CrossLayerTranscoder, _: usize, _: usize) -> Result<Outcome, EmitError> {
    Ok(Outcome::Absent)
}
