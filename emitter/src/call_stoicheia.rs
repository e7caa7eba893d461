//! Calls of the functions of candle-mi's module `stoicheia`, whose networks are AlgZoo's.

use candle_core::{DType, Tensor};
use candle_mi::stoicheia::piecewise::{self, ActivationPattern};
use candle_mi::stoicheia::probing::{self, NeuronRole};
use candle_mi::stoicheia::surprise::{self, MechanisticEstimator, OracleEstimator};
use candle_mi::stoicheia::{ablation, fast, standardize, tasks, StoicheiaConfig};
use candle_mi::RnnWeights;

use crate::answer::{Answer, Outcome};
use crate::error::EmitError;
use crate::inputs::Inputs;
use crate::stoicheia::{self, config, refused, task, Rnn};
use crate::stoicheia_protocol::{Network, StoicheiaCall, Task};

pub fn run(call: &StoicheiaCall, inputs: &Inputs) -> Result<Outcome, EmitError> {
    Ok(match call {
        StoicheiaCall::NetworkConfig { network } => stoicheia::sizes(network)?,
        StoicheiaCall::NetworkWeights { network } => stoicheia::weights(network)?,
        StoicheiaCall::NetworkForward { network, x, edits } => {
            stoicheia::forward(network, inputs, x, edits)?
        }
        StoicheiaCall::NetworkProject { network, x } => {
            stoicheia::project(network, inputs.get(x)?)?
        }
        StoicheiaCall::ForwardFast { network, x } => {
            let raw = Raw::load(network)?;
            let (n, x) = rows(inputs, x)?;
            let out = raw.outputs(&raw.weights, &x, n)?;
            Outcome::Results(vec![raw.of_outputs(&out)])
        }
        StoicheiaCall::ForwardFastAblated {
            network,
            x,
            ablated,
        } => {
            let raw = Raw::load(network)?;
            let (n, x) = rows(inputs, x)?;
            let mut marked = vec![false; raw.weights.hidden_size];
            for neuron in ablated {
                let mark = marked.get_mut(*neuron);
                *mark.ok_or_else(|| EmitError::Request(format!("no neuron {neuron}")))? = true;
            }
            let mut out = unset(n * raw.weights.output_size);
            fast::forward_fast_ablated(&raw.weights, &x, &mut out, n, &raw.config, &marked)
                .map_err(refused)?;
            Outcome::Results(vec![raw.of_outputs(&out)])
        }
        StoicheiaCall::ForwardFastTraced { network, x } => {
            let raw = Raw::load(network)?;
            let (pre, out) = raw.traced(&rows(inputs, x)?.1)?;
            let width = raw.weights.hidden_size;
            Outcome::Results(vec![
                Answer::shaped("pre", vec![raw.config.seq_len, width], wide(&pre)),
                Answer::list("value", wide(&out)),
            ])
        }
        StoicheiaCall::Accuracy {
            network,
            x,
            targets,
        } => {
            let raw = Raw::load(network)?;
            let (n, x) = rows(inputs, x)?;
            Outcome::scalar(fast::accuracy(&raw.weights, &x, targets, n, &raw.config))
        }
        StoicheiaCall::ArgmaxF32 { x } => {
            let (_, x) = rows(inputs, x)?;
            Outcome::Results(vec![Answer::scalar("value", fast::argmax_f32(&x).into())])
        }
        StoicheiaCall::AblateNeurons {
            network,
            x,
            targets,
        } => ablate(&Raw::load(network)?, &rows(inputs, x)?, targets)?,
        StoicheiaCall::AblateNeuronPairs {
            network,
            x,
            targets,
        } => ablate_pairs(&Raw::load(network)?, &rows(inputs, x)?, targets)?,
        StoicheiaCall::StandardizeRnn { network, x } => {
            standardized(&Raw::load(network)?, &rows(inputs, x)?)?
        }
        StoicheiaCall::ActivationPattern { x } => {
            let pattern = pattern_of(inputs.get(x)?)?;
            let [steps, width] = dims(inputs.get(x)?)?;
            Outcome::Results(vec![
                Answer::shaped("value", vec![steps, width], bits(&pattern, steps, width)),
                Answer::scalar("active", pattern.count_active().into()),
                Answer::scalar("slots", pattern.total_slots() as f64),
                Answer::list(
                    "each",
                    pattern.active_per_timestep().into_iter().map(f64::from),
                ),
            ])
        }
        StoicheiaCall::ClassifyRegions { network, x } => {
            regions(&Raw::load(network)?, &rows(inputs, x)?)?
        }
        StoicheiaCall::RegionLinearMap { network, x, pre } => {
            let raw = Raw::load(network)?;
            let pattern = match (x, pre) {
                (Some(x), None) => raw.pattern(&rows(inputs, x)?.1)?,
                (None, Some(pre)) => pattern_of(inputs.get(pre)?)?,
                _ => return Err(EmitError::Request("give `x` or `pre`".to_owned())),
            };
            let map = piecewise::region_linear_map(&raw.weights, &pattern, &raw.config)
                .map_err(refused)?;
            let shape = vec![raw.weights.output_size, raw.config.seq_len];
            Outcome::Results(vec![Answer::shaped("value", shape, wide(&map))])
        }
        StoicheiaCall::ProbeNeurons { network, n_probes } => {
            let raw = Raw::load(network)?;
            let report = probing::probe_neurons(&raw.weights, &raw.config, *n_probes)
                .map_err(refused)?
                .neurons;
            Outcome::Results(vec![
                Answer::list("role", report.iter().map(|found| number(found.role))),
                Answer::list("value", report.iter().map(|found| found.correlation.into())),
            ])
        }
        StoicheiaCall::SurpriseAccounting {
            network,
            n_samples,
            class,
        } => surprise_of(&Raw::load(network)?, *n_samples, *class)?,
        StoicheiaCall::OraclePredict { task: asked, x } => oracle(*asked, inputs.get(x)?)?,
        StoicheiaCall::SecondArgmax { x } => {
            let x = inputs.get(x)?;
            at(x, tasks::second_argmax(x).map_err(refused)?)?
        }
        StoicheiaCall::Argmedian { x } => {
            let x = inputs.get(x)?;
            at(x, tasks::argmedian(x).map_err(refused)?)?
        }
        StoicheiaCall::Median { x } => Outcome::tensor(tasks::median(inputs.get(x)?))?,
        StoicheiaCall::LongestCycle { x, signed } => {
            let dtype = if *signed { DType::I64 } else { DType::U32 };
            let x = inputs.get(x)?.to_dtype(dtype).map_err(refused)?;
            Outcome::tensor(tasks::longest_cycle(&x))?
        }
    })
}

/// The weights of an RNN outside of any tensor.
struct Raw {
    rnn: Rnn,
    weights: RnnWeights,
    config: StoicheiaConfig,
}

impl Raw {
    fn load(network: &Network) -> Result<Self, EmitError> {
        let rnn = stoicheia::rnn(network)?;
        Ok(Self {
            weights: RnnWeights::from_model(&rnn).map_err(refused)?,
            config: config(network),
            rnn,
        })
    }

    fn outputs(&self, weights: &RnnWeights, x: &[f32], n: usize) -> Result<Vec<f32>, EmitError> {
        let mut out = unset(n * weights.output_size);
        fast::forward_fast(weights, x, &mut out, n, &self.config).map_err(refused)?;
        Ok(out)
    }

    fn of_outputs(&self, out: &[f32]) -> Answer {
        let width = self.weights.output_size;
        Answer::shaped("value", vec![out.len() / width.max(1), width], wide(out))
    }

    /// Pre-activations and output of one input.
    fn traced(&self, x: &[f32]) -> Result<(Vec<f32>, Vec<f32>), EmitError> {
        let mut pre = unset(self.config.seq_len * self.weights.hidden_size);
        let mut out = unset(self.weights.output_size);
        fast::forward_fast_traced(&self.weights, x, &mut pre, &mut out, &self.config)
            .map_err(refused)?;
        Ok((pre, out))
    }

    fn pattern(&self, x: &[f32]) -> Result<ActivationPattern, EmitError> {
        let (pre, _) = self.traced(x)?;
        let (width, steps) = (self.weights.hidden_size, self.config.seq_len);
        Ok(ActivationPattern::from_pre_activations(&pre, width, steps))
    }
}

/// What a function has to fill.
fn unset(count: usize) -> Vec<f32> {
    vec![f32::NAN; count]
}

/// How many rows an input has, and its numbers.
fn rows(inputs: &Inputs, key: &str) -> Result<(usize, Vec<f32>), EmitError> {
    let x = inputs.get(key)?;
    let n = x.dims().first().copied().unwrap_or(1);
    let values = x.flatten_all().and_then(|flat| flat.to_vec1());
    Ok((n, values.map_err(refused)?))
}

fn wide(values: &[f32]) -> impl Iterator<Item = f64> + '_ {
    values.iter().copied().map(f64::from)
}

fn dims(x: &Tensor) -> Result<[usize; 2], EmitError> {
    let (rows, width) = x.dims2().map_err(refused)?;
    Ok([rows, width])
}

fn pattern_of(pre: &Tensor) -> Result<ActivationPattern, EmitError> {
    let [steps, width] = dims(pre)?;
    let pre: Vec<f32> = pre
        .flatten_all()
        .and_then(|flat| flat.to_vec1())
        .map_err(refused)?;
    Ok(ActivationPattern::from_pre_activations(&pre, width, steps))
}

fn bits(pattern: &ActivationPattern, steps: usize, width: usize) -> Vec<f64> {
    (0..steps)
        .flat_map(|step| (0..width).map(move |neuron| (step, neuron)))
        .map(|(step, neuron)| f64::from(u8::from(pattern.is_active(step, neuron))))
        .collect()
}

/// The accuracies in the order of the neurons, and their differences once more as they are listed.
fn ablate(raw: &Raw, (n, x): &(usize, Vec<f32>), targets: &[u32]) -> Result<Outcome, EmitError> {
    let mut sweep =
        ablation::ablate_neurons(&raw.weights, x, targets, *n, &raw.config).map_err(refused)?;
    let listed: Vec<f64> = sweep
        .results
        .iter()
        .map(|found| found.accuracy_delta.into())
        .collect();
    sweep.results.sort_by_key(|found| found.neuron);
    let by_neuron = sweep.results;
    Ok(Outcome::Results(vec![
        Answer::scalar("baseline", sweep.baseline_accuracy.into()),
        Answer::list(
            "value",
            by_neuron.iter().map(|found| found.ablated_accuracy.into()),
        ),
        Answer::list(
            "delta",
            by_neuron.iter().map(|found| found.accuracy_delta.into()),
        ),
        Answer::list("listed", listed),
    ]))
}

fn ablate_pairs(
    raw: &Raw,
    (n, x): &(usize, Vec<f32>),
    targets: &[u32],
) -> Result<Outcome, EmitError> {
    let sweep =
        ablation::ablate_neurons(&raw.weights, x, targets, *n, &raw.config).map_err(refused)?;
    let pairs = ablation::ablate_neuron_pairs(&raw.weights, x, targets, *n, &raw.config, &sweep)
        .map_err(refused)?;
    let neurons = pairs
        .iter()
        .flat_map(|pair| [pair.neuron_a as f64, pair.neuron_b as f64]);
    Ok(Outcome::Results(vec![
        Answer::shaped("pairs", vec![pairs.len(), 2], neurons),
        Answer::list(
            "value",
            pairs.iter().map(|pair| pair.ablated_accuracy.into()),
        ),
        Answer::list("delta", pairs.iter().map(|pair| pair.accuracy_delta.into())),
        Answer::list(
            "interaction",
            pairs.iter().map(|pair| pair.interaction_score.into()),
        ),
    ]))
}

fn standardized(raw: &Raw, (n, x): &(usize, Vec<f32>)) -> Result<Outcome, EmitError> {
    let found = standardize::standardize_rnn(&raw.rnn).map_err(refused)?;
    let width = found.hidden_size;
    let out = raw.outputs(&found.to_rnn_weights(), x, *n)?;
    Ok(Outcome::Results(vec![
        Answer::list("scales", wide(&found.scales)),
        Answer::list("weight_ih", wide(&found.weight_ih)),
        Answer::shaped("weight_hh", vec![width, width], wide(&found.weight_hh)),
        Answer::shaped(
            "weight_oh",
            vec![found.output_size, width],
            wide(&found.weight_oh),
        ),
        Answer::scalar(
            "quality",
            standardize::standardization_quality(&found).into(),
        ),
        raw.of_outputs(&out),
    ]))
}

struct Region {
    count: usize,
    pattern: Vec<f64>,
    /// The pattern of its representative.
    own: Vec<f64>,
}

/// The regions by count, largest first; of equal counts no order is documented, and here it is that of the patterns.
fn regions(raw: &Raw, (n, x): &(usize, Vec<f32>)) -> Result<Outcome, EmitError> {
    let (width, steps) = (raw.weights.hidden_size, raw.config.seq_len);
    let map = piecewise::classify_regions(&raw.weights, x, *n, &raw.config).map_err(refused)?;
    let listed: Vec<f64> = map.regions.iter().map(|each| each.count as f64).collect();
    let mut found = Vec::with_capacity(map.regions.len());
    for each in &map.regions {
        found.push(Region {
            count: each.count,
            pattern: bits(&each.pattern, steps, width),
            own: bits(&raw.pattern(&each.representative)?, steps, width),
        });
    }
    found.sort_by(|a, b| {
        let by_pattern = a.pattern.partial_cmp(&b.pattern);
        let order = b.count.cmp(&a.count);
        order.then(by_pattern.unwrap_or(std::cmp::Ordering::Equal))
    });
    let shape = vec![found.len(), steps, width];
    let patterns = found.iter().flat_map(|each| each.pattern.clone());
    let own = found.iter().flat_map(|each| each.own.clone());
    let counts = found.iter().map(|each| each.count as f64);
    Ok(Outcome::Results(vec![
        Answer::scalar("total", map.total_inputs as f64),
        Answer::list("listed", listed),
        Answer::shaped("patterns", shape.clone(), patterns),
        Answer::list("counts", counts),
        Answer::shaped("own", shape, own),
    ]))
}

/// The place of a role in candle-mi's own list.
fn number(role: NeuronRole) -> f64 {
    match role {
        NeuronRole::RunningMax => 0.0,
        NeuronRole::RunningMin => 1.0,
        NeuronRole::MaxIncrement => 2.0,
        NeuronRole::LeaveOneOutMax => 3.0,
        NeuronRole::RecentInput => 4.0,
        NeuronRole::Comparator => 5.0,
        NeuronRole::Unknown => 6.0,
        _ => 7.0,
    }
}

struct Always(u32);

impl MechanisticEstimator for Always {
    fn predict(&self, _: &[f32]) -> u32 {
        self.0
    }

    fn description(&self) -> &'static str {
        "always the same"
    }
}

fn surprise_of(raw: &Raw, n_samples: usize, class: Option<u32>) -> Result<Outcome, EmitError> {
    let oracle = OracleEstimator::new(raw.config.task, raw.config.seq_len);
    let always = class.map(Always);
    let estimator: &dyn MechanisticEstimator = match &always {
        Some(always) => always,
        None => &oracle,
    };
    let found = surprise::surprise_accounting(&raw.weights, estimator, &raw.config, n_samples)
        .map_err(refused)?;
    Ok(Outcome::Results(vec![
        Answer::scalar("model", found.model_accuracy.into()),
        Answer::scalar("estimate", found.estimate_accuracy.into()),
        Answer::scalar("disagreement", found.disagreement_rate.into()),
        Answer::scalar("agreement", found.agreement_rate.into()),
        Answer::scalar("chance", found.chance_accuracy.into()),
        Answer::list("counts", [found.param_count as f64, found.n_samples as f64]),
    ]))
}

fn oracle(asked: Task, x: &Tensor) -> Result<Outcome, EmitError> {
    let found: Vec<Vec<f32>> = x.to_vec2().map_err(refused)?;
    let [_, steps] = dims(x)?;
    let oracle = OracleEstimator::new(task(asked), steps);
    let classes: Vec<u32> = found.iter().map(|row| oracle.predict(row)).collect();
    let classes = Tensor::new(classes, x.device()).map_err(refused)?;
    match asked {
        Task::SecondArgmax | Task::Argmedian => at(x, classes),
        Task::Median | Task::LongestCycle => {
            Outcome::tensor(classes.to_dtype(DType::F32).map_err(Into::into))
        }
    }
}

/// The value at a position of each row, because which of equal ones is taken is documented nowhere.
fn at(x: &Tensor, positions: Tensor) -> Result<Outcome, EmitError> {
    if positions.elem_count() == 0 {
        return Ok(Outcome::Results(vec![Answer::list("value", [])])); // candle's gather panics
    }
    let found = positions
        .unsqueeze(1)
        .and_then(|positions| x.gather(&positions.contiguous()?, 1)?.squeeze(1));
    Outcome::tensor(found.map_err(Into::into))
}
