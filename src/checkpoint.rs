//! Layers and tensors out of safetensors files, under PyTorch's names.
//!
//! Parse a file with [`SafeTensors`] (re-exported as [`pointwise::safetensors`](crate::safetensors),
//! so that versions agree), then read whole layers with [`Pointwise::from_safetensors`] or single
//! tensors with [`vector`], [`matrix`] and [`tensor`]. F32, F16 and BF16 are read, each value
//! converted to f32 exactly.
//!
//! ```no_run
//! use pointwise::safetensors::SafeTensors;
//! use pointwise::{Device, Pointwise};
//!
//! let bytes = std::fs::read("resnet50.safetensors")?;
//! let file = SafeTensors::deserialize(&bytes)?;
//! let layer = Pointwise::from_safetensors(&file, "layer1.0.conv1", Some("layer1.0.bn1"))?
//!     .relu()
//!     .prepare(&Device::best())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use half::{bf16, f16};
use ndarray::{Array1, Array2, ArrayD, IxDyn};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::quantized::{Int8, Quantization, Quantized};
use crate::stages::BatchNorm;

impl Pointwise {
    /// Reads a 1x1 convolution or a linear layer, and the batch norm that follows it, from a
    /// PyTorch checkpoint.
    ///
    /// - `{conv}.weight`: `[c_out, c_in / groups]`, any trailing axes of length 1;
    /// - `{conv}.bias`, if there: `[c_out]`, becomes the stage `bias`;
    /// - with `batch_norm`, what [`BatchNorm::from_safetensors`] reads, becomes the stage
    ///   `batch_norm` with `eps` 1e-5.
    ///
    /// Groups, stride and further stages are not in the file: the caller adds them. For another
    /// `eps`, pass `None` and add the norm:
    ///
    /// ```
    /// # use pointwise::{BatchNorm, Pointwise, Result, safetensors::SafeTensors};
    /// # fn layer(file: &SafeTensors<'_>) -> Result<Pointwise> {
    /// Ok(Pointwise::from_safetensors(file, "head.conv", None)?
    ///     .batch_norm(BatchNorm::from_safetensors(file, "head.bn")?.eps(1e-3))
    ///     .relu6())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::CheckpointTensor`] for a shape that is not a 1x1
    /// convolution's or a dtype other than F32, F16 and BF16.
    pub fn from_safetensors(
        file: &SafeTensors<'_>,
        conv: &str,
        batch_norm: Option<&str>,
    ) -> Result<Pointwise> {
        let mut layer = Pointwise::new(matrix(file, &format!("{conv}.weight"))?);
        if let Some(bias) = optional(vector(file, &format!("{conv}.bias")))? {
            layer = layer.bias(bias);
        }
        if let Some(name) = batch_norm {
            layer = layer.batch_norm(BatchNorm::from_safetensors(file, name)?);
        }
        Ok(layer)
    }
}

impl BatchNorm {
    /// Reads a batch norm from a PyTorch checkpoint: `{name}.running_mean` and
    /// `{name}.running_var`, and as its affine `{name}.weight` and `{name}.bias`, which are both
    /// there or both missing; each `[c]`. `eps` is not in the file: 1e-5 until
    /// [`eps`](BatchNorm::eps) sets it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::CheckpointTensor`] for a tensor that is no vector or
    /// of a dtype other than F32, F16 and BF16.
    pub fn from_safetensors(file: &SafeTensors<'_>, name: &str) -> Result<BatchNorm> {
        let read = |part: &str| vector(file, &format!("{name}.{part}"));
        let norm = BatchNorm::new(read("running_mean")?, read("running_var")?);
        match (optional(read("weight"))?, optional(read("bias"))?) {
            (None, None) => Ok(norm),
            // Half an affine: reading both reports the half that is missing.
            _ => Ok(norm.affine(read("weight")?, read("bias")?)),
        }
    }
}

impl Quantized {
    /// Reads a layer of 8-bit integers with a quantised result:
    ///
    /// - `weight`: I8 `[c_out, c_in / groups]`, any trailing axes of length 1;
    /// - `weight_scale`: F32 `[c_out]`; `bias`, if there: I32 `[c_out]`;
    /// - `src_scale`, `dst_scale`: F32, one element;
    /// - `src_zero_point`, `dst_zero_point`: one element; U8 or I8 is also the tensor's type, which
    ///   is `otherwise` where they are I32 or I64.
    ///
    /// Groups, stride, a clip and a residual are not in the file: the caller adds them.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::CheckpointTensor`] for another shape or dtype.
    pub fn from_safetensors(file: &SafeTensors<'_>, otherwise: Int8) -> Result<Quantized> {
        let one = |view: &TensorView<'_>| view.shape().iter().all(|&len| len == 1);
        let quantization = |tensor: &str| {
            let name = format!("{tensor}_scale");
            let view = find(file, &name)?;
            let scale = match values(&name, &view)?[..] {
                [scale] if one(&view) => scale,
                _ => return Err(unfit(&name, &view, "one element")),
            };
            let name = format!("{tensor}_zero_point");
            let view = find(file, &name)?;
            let zero_point = match *view.data() {
                _ if !one(&view) => None,
                [byte] if view.dtype() == Dtype::U8 => Some((Int8::U8, i32::from(byte))),
                [byte] if view.dtype() == Dtype::I8 => Some((Int8::I8, i32::from(byte as i8))),
                _ if view.dtype() == Dtype::I32 => {
                    view.data().try_into().ok().map(|b| (otherwise, i32::from_le_bytes(b)))
                }
                // What does not fit an i32 is as wrong as its ends.
                _ if view.dtype() == Dtype::I64 => view.data().try_into().ok().map(|b| {
                    let (min, max) = (i32::MIN.into(), i32::MAX.into());
                    (otherwise, i64::from_le_bytes(b).clamp(min, max) as i32)
                }),
                _ => None,
            };
            let (int8, zero_point) =
                zero_point.ok_or_else(|| unfit(&name, &view, "one U8, I8, I32 or I64"))?;
            Ok(Quantization { int8, scale, zero_point })
        };
        let view = find(file, "weight")?;
        let bytes = view.data().iter().map(|&byte| byte as i8).collect();
        let weight = match *view.shape() {
            [rows, columns, ref ones @ ..]
                if view.dtype() == Dtype::I8 && ones.iter().all(|&len| len == 1) =>
            {
                Array2::from_shape_vec((rows, columns), bytes).ok()
            }
            _ => None,
        };
        let weight = weight
            .ok_or_else(|| unfit("weight", &view, "I8 [c_out, c_in] or [c_out, c_in, 1, …]"))?;
        let scales = vector(file, "weight_scale")?;
        let layer = Quantized::new(weight, scales, quantization("src")?).dst(quantization("dst")?);
        match find(file, "bias") {
            Err(Error::MissingTensor { .. }) => Ok(layer),
            Err(error) => Err(error),
            Ok(view) if view.dtype() == Dtype::I32 && view.shape().len() == 1 => {
                let bias = view.data().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b));
                Ok(layer.bias(bias.collect::<Array1<_>>()))
            }
            Ok(view) => Err(unfit("bias", &view, "I32 [c_out]")),
        }
    }
}

/// Reads `[c]`, any trailing axes of length 1, as f32.
///
/// # Errors
/// [`Error::MissingTensor`]; [`Error::CheckpointTensor`] for another shape or a dtype other than
/// F32, F16 and BF16.
pub fn vector(file: &SafeTensors<'_>, name: &str) -> Result<Array1<f32>> {
    let view = find(file, name)?;
    match view.shape() {
        [_, ones @ ..] if ones.iter().all(|&len| len == 1) => Ok(values(name, &view)?.into()),
        _ => Err(unfit(name, &view, "[c]")),
    }
}

/// Reads `[rows, columns]`, any trailing axes of length 1, as f32.
///
/// # Errors
/// [`Error::MissingTensor`]; [`Error::CheckpointTensor`] for another shape or a dtype other than
/// F32, F16 and BF16.
pub fn matrix(file: &SafeTensors<'_>, name: &str) -> Result<Array2<f32>> {
    const EXPECTED: &str = "[c_out, c_in] or [c_out, c_in, 1, …]";
    let view = find(file, name)?;
    match *view.shape() {
        [rows, columns, ref ones @ ..] if ones.iter().all(|&len| len == 1) => {
            Array2::from_shape_vec((rows, columns), values(name, &view)?)
                .map_err(|_| unfit(name, &view, EXPECTED))
        }
        _ => Err(unfit(name, &view, EXPECTED)),
    }
}

/// Reads a tensor of any shape as f32.
///
/// # Errors
/// [`Error::MissingTensor`]; [`Error::CheckpointTensor`] for a dtype other than F32, F16 and BF16.
pub fn tensor(file: &SafeTensors<'_>, name: &str) -> Result<ArrayD<f32>> {
    let view = find(file, name)?;
    ArrayD::from_shape_vec(IxDyn(view.shape()), values(name, &view)?)
        .map_err(|_| unfit(name, &view, "a shape that fits the address space"))
}

/// `None` for a tensor that the checkpoint does not have.
///
/// ```
/// # use pointwise::{checkpoint, safetensors::SafeTensors};
/// # let bytes = b"\x02\0\0\0\0\0\0\0{}";
/// # let file = SafeTensors::deserialize(bytes)?;
/// assert!(checkpoint::optional(checkpoint::vector(&file, "bias"))?.is_none());
/// # Ok::<(), pointwise::Error>(())
/// ```
///
/// # Errors
/// Every error but [`Error::MissingTensor`].
pub fn optional<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(Error::MissingTensor { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl From<SafeTensorError> for Error {
    fn from(error: SafeTensorError) -> Self {
        match error {
            SafeTensorError::TensorNotFound(name) => Error::MissingTensor { name },
            error => Error::Checkpoint(error.to_string()),
        }
    }
}

fn find<'a>(file: &SafeTensors<'a>, name: &str) -> Result<TensorView<'a>> {
    Ok(file.tensor(name)?)
}

fn unfit(name: &str, view: &TensorView<'_>, expected: &'static str) -> Error {
    Error::CheckpointTensor {
        name: name.to_owned(),
        dtype: view.dtype().to_string(),
        shape: view.shape().to_vec(),
        expected,
    }
}

/// The values in C order. A file's bytes are little-endian and have no alignment.
fn values(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    fn decode<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|&bytes| value(bytes)).collect()
    }
    match view.dtype() {
        Dtype::F32 => Ok(decode(view.data(), f32::from_le_bytes)),
        Dtype::F16 => Ok(decode(view.data(), |bytes| f16::from_le_bytes(bytes).to_f32())),
        Dtype::BF16 => Ok(decode(view.data(), |bytes| bf16::from_le_bytes(bytes).to_f32())),
        _ => Err(unfit(name, view, "F32, F16 or BF16")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ndarray::array;
    use safetensors::serialize;

    use super::*;
    use crate::stages::Stage;

    type Tensor = (Dtype, Vec<usize>, Vec<u8>);

    fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
        (Dtype::F32, shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn file(tensors: &[(&str, Tensor)]) -> Vec<u8> {
        let views: BTreeMap<_, _> = tensors
            .iter()
            .map(|(name, (dtype, shape, bytes))| {
                (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
            })
            .collect();
        serialize(views, None).unwrap()
    }

    /// `conv` with a bias and `bn` with an affine, in all three dtypes.
    fn small() -> Vec<u8> {
        let halves = |values: [f32; 2]| {
            let bytes = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
            (Dtype::F16, vec![2], bytes)
        };
        let brains = [1.0f32, -2.0].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        file(&[
            ("conv.weight", f32s(&[2, 3, 1, 1], &[1., 2., 3., 4., 5., 6.])),
            ("conv.bias", (Dtype::BF16, vec![2], brains)),
            ("bn.weight", halves([0.5, 6e-8])),
            ("bn.bias", halves([3.0, -0.25])),
            ("bn.running_mean", f32s(&[2], &[0.1, 0.2])),
            ("bn.running_var", f32s(&[2], &[0.0, 2.0])),
            ("bn.num_batches_tracked", (Dtype::I64, vec![], vec![0; 8])),
        ])
    }

    fn read(bytes: &[u8], conv: &str, batch_norm: Option<&str>) -> Result<Pointwise> {
        Pointwise::from_safetensors(&SafeTensors::deserialize(bytes)?, conv, batch_norm)
    }

    #[test]
    fn reads_a_convolution_its_bias_and_its_batch_norm() {
        let bytes = small();
        let layer = read(&bytes, "conv", Some("bn")).unwrap();
        assert_eq!(layer.weight(), array![[1., 2., 3.], [4., 5., 6.]]);
        let norm = BatchNorm::new(array![0.1, 0.2], array![0.0, 2.0])
            .affine(array![0.5, f16::from_f32(6e-8).to_f32()], array![3.0, -0.25]);
        let expected = [Stage::Bias(array![1.0, -2.0]), Stage::BatchNorm(norm)];
        assert_eq!(layer.stages(), expected);
        layer.check().unwrap();

        assert_eq!(read(&bytes, "conv", None).unwrap().stages(), &expected[..1]);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensor(&file, "conv.weight").unwrap().shape(), [2, 3, 1, 1]);
    }

    #[test]
    fn bias_and_affine_are_optional_but_half_an_affine_is_an_error() {
        let weight = ("c.weight", f32s(&[1, 1], &[2.0]));
        let mean = ("n.running_mean", f32s(&[1], &[0.0]));
        let var = ("n.running_var", f32s(&[1], &[1.0]));
        let bare = [weight, mean, var];
        let layer = read(&file(&bare), "c", Some("n")).unwrap();
        assert_eq!(layer.stages(), [Stage::BatchNorm(BatchNorm::new(array![0.0], array![1.0]))]);

        for (there, missing) in [("n.weight", "n.bias"), ("n.bias", "n.weight")] {
            let mut half = bare.to_vec();
            half.push((there, f32s(&[1], &[1.0])));
            match read(&file(&half), "c", Some("n")) {
                Err(Error::MissingTensor { name }) => assert_eq!(name, missing),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error_with_name_dtype_and_shape() {
        let message = |tensor: Tensor| {
            read(&file(&[("c.weight", tensor)]), "c", None).unwrap_err().to_string()
        };
        for shape in [&[4][..], &[2, 2, 3], &[2, 2, 1, 3], &[2, 2, 0], &[]] {
            let text = message(f32s(shape, &vec![0.0; shape.iter().product()]));
            assert!(text.contains(&format!("\"c.weight\" is F32 {shape:?}")), "{text}");
        }
        let text = message((Dtype::I8, vec![2, 2], vec![0; 4]));
        assert!(text.contains("I8 [2, 2]") && text.contains("F32, F16 or BF16"), "{text}");
        let text = read(&small(), "missing", None).unwrap_err().to_string();
        assert!(text.contains("\"missing.weight\""), "{text}");
        let text = read(&small(), "conv", Some("conv")).unwrap_err().to_string();
        assert!(text.contains("\"conv.running_mean\""), "{text}");

        // No elements, but axes whose product overflows.
        let text = message((Dtype::F32, vec![0, usize::MAX], vec![]));
        assert!(text.contains(&usize::MAX.to_string()), "{text}");
        let empty = read(&file(&[("c.weight", f32s(&[0, 4], &[]))]), "c", None).unwrap();
        assert!(matches!(empty.check(), Err(Error::NoChannels { .. })));
    }

    #[test]
    fn truncated_files_are_errors() {
        let bytes = small();
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len], "conv", Some("bn")).is_err(), "{len} bytes");
        }
    }

    /// A flipped byte gives an error or another number, never a panic.
    #[test]
    fn damaged_files_do_not_panic() {
        let bytes = small();
        for position in 0..bytes.len() {
            for flip in [0x01, 0x08, 0x10, 0x20, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[position] ^= flip;
                if let Ok(layer) = read(&bytes, "conv", Some("bn")) {
                    let _ = layer.check();
                }
            }
        }
    }

    #[test]
    fn data_need_not_be_aligned() {
        let bytes = small();
        for offset in 0..4 {
            let mut shifted = vec![0; offset];
            shifted.extend(&bytes);
            assert_eq!(
                read(&shifted[offset..], "conv", Some("bn")).unwrap(),
                read(&bytes, "conv", Some("bn")).unwrap()
            );
        }
    }
}
