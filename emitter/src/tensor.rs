//! A captured tensor, and the bytes that a trace stores of it.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use crate::digest;
use crate::error::EmitError;

/// Tensors of at most this many elements are written into the JSON itself.
const INLINE: usize = 64;

pub struct Named {
    pub name: String,
    pub tensor: Tensor,
}

impl Named {
    pub fn new(name: &str, tensor: Tensor) -> Self {
        Self {
            name: name.to_owned(),
            tensor,
        }
    }
}

/// A tensor as it is stored: row-major little-endian bytes in candle's own dtype.
pub struct Encoded {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: safetensors::Dtype,
    pub bytes: Vec<u8>,
    pub sha256: String,
    pub nonfinite: usize,
    /// The values widened to f64, which is exact, where they go into the JSON. Never with a non-finite one among
    /// them: JSON has no word for it.
    pub inline: Option<Vec<f64>>,
}

impl Encoded {
    pub fn of(named: &Named) -> Result<Self, EmitError> {
        let failed = |error: candle_core::Error| {
            EmitError::Forward(format!("{} cannot be read out: {error}", named.name))
        };
        let tensor = &named.tensor;
        // Views are common among captures (transposed heads): `flatten_all` gives them in row-major order.
        let flat = tensor
            .to_device(&Device::Cpu)
            .and_then(|tensor| tensor.flatten_all())
            .map_err(failed)?;
        let (dtype, bytes, wide): (_, Vec<u8>, Vec<f64>) = match tensor.dtype() {
            DType::F32 => {
                let values = flat.to_vec1::<f32>().map_err(failed)?;
                (
                    safetensors::Dtype::F32,
                    values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    values.into_iter().map(f64::from).collect(),
                )
            }
            DType::BF16 => {
                let values = flat.to_vec1::<bf16>().map_err(failed)?;
                (
                    safetensors::Dtype::BF16,
                    values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    values.into_iter().map(f64::from).collect(),
                )
            }
            DType::F16 => {
                let values = flat.to_vec1::<f16>().map_err(failed)?;
                (
                    safetensors::Dtype::F16,
                    values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    values.into_iter().map(f64::from).collect(),
                )
            }
            other => {
                return Err(EmitError::Forward(format!(
                    "{} has dtype {other:?}, which a trace cannot hold",
                    named.name
                )))
            }
        };
        let nonfinite = wide.iter().filter(|value| !value.is_finite()).count();
        Ok(Self {
            name: named.name.clone(),
            shape: tensor.dims().to_vec(),
            dtype,
            sha256: digest::sha256(&bytes),
            bytes,
            nonfinite,
            inline: (wide.len() <= INLINE && nonfinite == 0).then_some(wide),
        })
    }

    /// The dtype by the name that requests and headers use.
    pub fn dtype_name(&self) -> &'static str {
        match self.dtype {
            safetensors::Dtype::BF16 => "bfloat16",
            safetensors::Dtype::F16 => "float16",
            _ => "float32",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Encoded, Named};
    use candle_core::{DType, Device, Tensor};

    fn encoded(tensor: Tensor) -> Encoded {
        Encoded::of(&Named::new("t", tensor)).expect("a CPU tensor can be read out")
    }

    #[test]
    fn a_transposed_view_is_stored_row_major() {
        let tensor = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).expect("a tensor");
        let got = encoded(tensor.t().expect("a matrix"));
        assert_eq!(got.inline, Some(vec![1.0, 3.0, 2.0, 4.0]));
        assert_eq!(got.bytes.get(4..8), Some(&3f32.to_le_bytes()[..]));
    }

    #[test]
    fn a_non_finite_value_is_counted_and_never_inline() {
        let got =
            encoded(Tensor::new(&[1f32, f32::NAN, f32::INFINITY], &Device::Cpu).expect("a tensor"));
        assert_eq!((got.nonfinite, got.inline), (2, None));
    }

    #[test]
    fn bfloat16_keeps_its_bytes() {
        let tensor = Tensor::new(&[1.5f32], &Device::Cpu).expect("a tensor");
        let got = encoded(tensor.to_dtype(DType::BF16).expect("a cast"));
        assert_eq!((got.bytes, got.inline), (vec![0xc0, 0x3f], Some(vec![1.5])));
    }
}
