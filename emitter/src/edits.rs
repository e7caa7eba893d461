//! A request's edits as candle-mi's interventions, each by candle-mi's own helper where it has one.

use candle_core::Tensor;
use candle_mi::{
    apply_steering, create_knockout_mask, HookCache, HookPoint, HookSpec, Intervention,
    KnockoutSpec, MIError, StateKnockoutSpec, StateSteeringSpec, SteeringSpec,
};

use crate::clt;
use crate::entries::name_entries;
use crate::error::EmitError;
use crate::hook_point::{in_model_dtype, point};
use crate::inputs::Inputs;
use crate::model::LoadedModel;
use crate::protocol::{All, Attention, Edit, Layers, Steering};
use crate::sae::{self, SparseAutoencoder};

/// The two specifications of a state have the same methods and no trait in common.
macro_rules! in_layers {
    ($spec:expr, $hook:expr, $layers:expr) => {
        match ($layers, $hook) {
            (Some(Layers::Named(All::All)), _) => $spec,
            (Some(Layers::Range(first, last)), _) => $spec.layer_range(*first, *last),
            (None, HookPoint::RwkvState(layer)) => $spec.layer(*layer),
            (None, other) => return Err(misplaced("state edit", "rwkv.hook_state", other)),
        }
    };
}

/// What edits are made from.
pub struct Editor<'a> {
    pub loaded: &'a LoadedModel,
    pub inputs: &'a Inputs,
    /// Token ids `[B,T]`.
    pub tokens: &'a Tensor,
    pub sae: Option<&'a SparseAutoencoder>,
}

impl Editor<'_> {
    /// Registers one edit behind those that `spec` holds.
    ///
    /// # Errors
    /// `Request` where the edit names what is not there or this candle-mi has no such intervention, `Forward` and
    /// `Sae` where candle-mi refuses to make it.
    pub fn register(&self, edit: &Edit, spec: &mut HookSpec) -> Result<(), EmitError> {
        let hook = point(edit.hook())?;
        let tensor = |key: &str| in_model_dtype(key, self.inputs, self.loaded);
        let intervention = match edit {
            Edit::Replace { tensor: key, .. } => Intervention::Replace(tensor(key)?),
            Edit::Add { tensor: key, .. } => Intervention::Add(tensor(key)?),
            Edit::PatchAt {
                position,
                tensor: key,
                ..
            } => patch_at(*position, tensor(key)?)?,
            Edit::Scale { factor, .. } => Intervention::Scale(*factor),
            Edit::Zero { .. } => Intervention::Zero,
            Edit::Knockout { spec: chosen, .. } => match self.knockout(&hook, chosen)? {
                Some(knockout) => knockout,
                None => return Ok(()),
            },
            Edit::Steer {
                how,
                value,
                spec: chosen,
                ..
            } => match self.steer(&hook, *how, *value, chosen)? {
                Some(steering) => steering,
                None => return Ok(()),
            },
            Edit::Inject {
                position, features, ..
            } => {
                spec.extend(&self.injection(&hook, *position, features)?);
                return Ok(());
            }
            Edit::CltInject {
                transcoder,
                features,
                position,
                strength,
                ..
            } => {
                let HookPoint::ResidPost(target) = hook else {
                    return Err(misplaced("clt_inject", "hook_resid_post", &hook));
                };
                let (width, device) = (self.width()?, &self.loaded.device);
                let at = (target, *position, width);
                spec.extend(&clt::injection(
                    transcoder, features, at, *strength, device,
                )?);
                return Ok(());
            }
            Edit::StateKnockout { at, layers, .. } => {
                let written = StateKnockoutSpec::new().positions(at);
                spec.set_state_knockout(in_layers!(written, &hook, layers));
                return Ok(());
            }
            Edit::StateSteer {
                at, layers, factor, ..
            } => {
                let written = StateSteeringSpec::new(*factor).positions(at);
                spec.set_state_steering(in_layers!(written, &hook, layers));
                return Ok(());
            }
        };
        spec.intervene(hook, intervention);
        Ok(())
    }

    fn width(&self) -> Result<usize, EmitError> {
        let width = self.tokens.dim(1);
        width.map_err(|error| EmitError::Forward(format!("token tensor: {error}")))
    }

    /// Nothing where the layer is outside of the specification's range, as candle-mi says itself.
    fn knockout(
        &self,
        hook: &HookPoint,
        chosen: &Attention,
    ) -> Result<Option<Intervention>, EmitError> {
        let HookPoint::AttnScores(layer) = hook else {
            return Err(misplaced("knockout", "attn.hook_scores", hook));
        };
        let spec = match chosen.layers {
            Some((first, last)) => KnockoutSpec::new().layer_range(first, last),
            None => KnockoutSpec::new().layers(&[0, *layer]), // registered at this layer alone
        };
        let spec = name_entries!(spec, chosen);
        let (heads, width) = (self.loaded.backend().num_heads(), self.width()?);
        spec.validate(self.loaded.layers(), heads, width)
            .map_err(|error| refused(hook, &error))?;
        if !spec.applies_to_layer(*layer) {
            return Ok(None);
        }
        let (device, dtype) = (&self.loaded.device, self.loaded.dtype);
        let mask = create_knockout_mask(&spec, heads, width, device, dtype);
        Ok(Some(Intervention::Knockout(mask.map_err(failed)?)))
    }

    /// A forward pass gives the pattern, candle-mi steers it, and the second pass is given the result.
    fn steer(
        &self,
        hook: &HookPoint,
        how: Steering,
        value: f32,
        chosen: &Attention,
    ) -> Result<Option<Intervention>, EmitError> {
        let HookPoint::AttnPattern(layer) = hook else {
            return Err(misplaced("steer", "attn.hook_pattern", hook));
        };
        let spec = match how {
            Steering::Scale => SteeringSpec::scale(value),
            Steering::SetValue => SteeringSpec::set_value(value),
        };
        let spec = match chosen.layers {
            Some((first, last)) => spec.layer_range(first, last),
            None => spec.layers(&[0, *layer]), // registered at this layer alone
        };
        let spec = name_entries!(spec, chosen);
        let (heads, width) = (self.loaded.backend().num_heads(), self.width()?);
        spec.validate(self.loaded.layers(), heads, width)
            .map_err(|error| refused(hook, &error))?;
        if !spec.applies_to_layer(*layer) {
            return Ok(None);
        }
        let mut baseline = HookSpec::new();
        baseline.capture(hook.clone());
        let cache = self.loaded.backend().forward(self.tokens, &baseline);
        let cache = cache.map_err(failed)?;
        let steered = cache
            .require(hook)
            .and_then(|pattern| apply_steering(pattern, &spec, heads, width));
        Ok(Some(Intervention::Replace(steered.map_err(failed)?)))
    }

    fn injection(
        &self,
        hook: &HookPoint,
        position: usize,
        features: &[(usize, f32)],
    ) -> Result<HookSpec, EmitError> {
        let Some(sae) = self.sae else {
            return Err(EmitError::Request(format!(
                "edit at {hook}: an injection needs an SAE"
            )));
        };
        sae::injection(sae, features, position, self.width()?, &self.loaded.device)
    }
}

#[cfg(since_0_1_24)]
pub fn patch_at(position: usize, value: Tensor) -> Result<Intervention, EmitError> {
    Ok(Intervention::PatchAt { position, value })
}

#[cfg(not(since_0_1_24))]
pub fn patch_at(_position: usize, _value: Tensor) -> Result<Intervention, EmitError> {
    // Not the request's fault: this candle-mi cannot run it, and the ledger may say so.
    Err(EmitError::Forward(format!(
        "candle-mi {} has no PatchAt, which came with 0.1.24",
        env!("PARITY_CANDLE_MI_VERSION")
    )))
}

fn failed(error: MIError) -> EmitError {
    EmitError::Forward(error.to_string())
}

fn refused(hook: &HookPoint, error: &MIError) -> EmitError {
    EmitError::Request(format!("edit at {hook}: {error}"))
}

fn misplaced(kind: &str, wanted: &str, hook: &HookPoint) -> EmitError {
    EmitError::Request(format!("a {kind} works at {wanted}, not at {hook}"))
}

/// A tensor of another shape can pass through candle by broadcasting and give numbers that mean nothing.
pub fn check_shapes(edits: &[Edit], inputs: &Inputs, cache: &HookCache) -> Result<(), EmitError> {
    for edit in edits {
        let (hook, tensor, added) = match edit {
            Edit::Replace { hook, tensor } => (hook, tensor, false),
            Edit::Add { hook, tensor } => (hook, tensor, true),
            _ => continue,
        };
        let given = inputs.get(tensor)?.dims();
        let Some(there) = cache.get(&point(hook)?).map(Tensor::dims) else {
            continue;
        };
        if given != there && !(added && broadcasts(given, there)) {
            return Err(EmitError::Request(format!(
                "edit tensor \"{tensor}\" has shape {given:?}, {hook} has {there:?}"
            )));
        }
    }
    Ok(())
}

/// Whether candle-mi documents that a tensor is added to every row or position of a `[B,T,d]`.
fn broadcasts(given: &[usize], there: &[usize]) -> bool {
    there.len() == 3
        && given.len() <= there.len()
        && given.last() == there.last()
        && given
            .iter()
            .rev()
            .zip(there.iter().rev())
            .all(|(given, there)| *given == 1 || given == there)
}
