//! How a direct call of one of candle-mi's functions ended, and the numbers that it gave.

use std::borrow::Cow;

use candle_core::{DType, Tensor};
use candle_mi::MIError;
use serde::Serialize;
use serde_json::Value;

use crate::error::EmitError;
use crate::protocol::Precision;

/// How one call ended. A refusal of candle-mi is an outcome of that call alone.
pub enum Outcome {
    Results(Vec<Answer>),
    Refused(MIError),
    /// The release has no such function.
    #[cfg_attr(since_0_1_24, allow(dead_code))]
    Absent,
}

impl Outcome {
    pub fn scalar(value: Result<f32, MIError>) -> Self {
        match value {
            Ok(value) => Self::Results(vec![Answer::scalar("value", f64::from(value))]),
            Err(error) => Self::Refused(error),
        }
    }

    pub fn tensor(value: Result<Tensor, MIError>) -> Result<Self, EmitError> {
        Ok(match value {
            Ok(value) => Self::Results(vec![Answer::of("value", &value)?]),
            Err(error) => Self::Refused(error),
        })
    }

    /// A tensor; where a precision was asked for, the name of its own too.
    pub fn tensor_of(
        value: Result<Tensor, MIError>,
        dtype: Option<Precision>,
    ) -> Result<Self, EmitError> {
        let named = value
            .as_ref()
            .ok()
            .zip(dtype)
            .map(|(tensor, _)| tensor.dtype().as_str());
        let mut outcome = Self::tensor(value)?;
        if let (Self::Results(results), Some(name)) = (&mut outcome, named) {
            results.push(Answer::texts("text", [name]));
        }
        Ok(outcome)
    }
}

/// One small tensor; an infinity or NaN is a string, which JSON has no number for.
#[derive(Serialize)]
pub struct Answer {
    pub name: Cow<'static, str>,
    pub shape: Vec<usize>,
    pub values: Vec<Value>,
}

impl Answer {
    pub fn of(name: impl Into<Cow<'static, str>>, tensor: &Tensor) -> Result<Self, EmitError> {
        let name = name.into();
        let values = tensor
            .to_dtype(DType::F64)
            .and_then(|wide| wide.flatten_all()?.to_vec1::<f64>())
            .map_err(|error| EmitError::Forward(format!("{name} cannot be read out: {error}")))?;
        Ok(Self {
            name,
            shape: tensor.dims().to_vec(),
            values: values.into_iter().map(number).collect(),
        })
    }

    pub fn scalar(name: &'static str, value: f64) -> Self {
        Self {
            name: name.into(),
            shape: Vec::new(),
            values: vec![number(value)],
        }
    }

    /// Texts as the list of their bytes, each ended by 0.
    pub fn texts(name: &'static str, texts: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let bytes: Vec<f64> = texts
            .into_iter()
            .flat_map(|text| {
                let bytes: Vec<u8> = text.as_ref().bytes().chain([0]).collect();
                bytes
            })
            .map(f64::from)
            .collect();
        Self::list(name, bytes)
    }

    pub fn list(name: &'static str, values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<Value> = values.into_iter().map(number).collect();
        Self {
            name: name.into(),
            shape: vec![values.len()],
            values,
        }
    }

    pub fn shaped(
        name: &'static str,
        shape: Vec<usize>,
        values: impl IntoIterator<Item = f64>,
    ) -> Self {
        Self {
            shape,
            ..Self::list(name, values)
        }
    }
}

fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or_else(
        || {
            let word = match (value.is_nan(), value > 0.0) {
                (true, _) => "nan",
                (false, true) => "inf",
                (false, false) => "-inf",
            };
            Value::String(word.to_owned())
        },
        Value::Number,
    )
}
