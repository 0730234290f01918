//! Layers and tensors out of safetensors files, under PyTorch's names.
//!
//! Parse a file with [`SafeTensors`] (re-exported as [`pointwise::safetensors`](crate::safetensors),
//! so that versions agree), then read whole layers with [`Pointwise::from_safetensors`] or single
//! tensors with [`vector`], [`matrix`] and [`tensor`]. F32, F16 and BF16 are read, each value
//! converted to f32 exactly. Layers of 8-bit numbers are read by [`Quantized::from_safetensors`],
//! [`DynamicQuantized::from_safetensors`] and [`QuantizedFp8::from_safetensors`].
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
use crate::quantized::{
    DynamicQuantized, Fp8, Fp8Quantization, Int8, Per, Quantization, Quantized, QuantizedFp8,
};
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
    /// Reads a layer of 8-bit integers:
    ///
    /// - `weight`: I8 `[c_out, c_in / groups]`, any trailing axes of length 1;
    /// - `weight_scale`: F32 `[c_out]`; `bias`, if there: I32 `[c_out]`;
    /// - `src_scale`: F32, one element;
    /// - `src_zero_point`: one element; U8 or I8 is also the tensor's type, which is `otherwise` where it
    ///   is I32 or I64;
    /// - `dst_scale` and `dst_zero_point`, likewise; without both, the result is real numbers.
    ///
    /// Groups, stride, a clip and a residual are not in the file: the caller adds them.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::CheckpointTensor`] for another shape or dtype.
    pub fn from_safetensors(file: &SafeTensors<'_>, otherwise: Int8) -> Result<Quantized> {
        let quantization = |tensor: &str| -> Result<_> {
            let scale = number(file, &format!("{tensor}_scale"))?;
            let name = format!("{tensor}_zero_point");
            let view = find(file, &name)?;
            let zero_point = match *view.data() {
                _ if !is_one(&view) => None,
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
        let (weight, scales) = (i8_weight(file)?, vector(file, "weight_scale")?);
        let mut layer = Quantized::new(weight, scales, quantization("src")?);
        let has = |name| -> Result<_> { Ok(optional(find(file, name))?.is_some()) };
        // Half a quantisation: reading both reports the half that is missing.
        if has("dst_scale")? || has("dst_zero_point")? {
            layer = layer.dst(quantization("dst")?);
        }
        match optional(find(file, "bias"))? {
            None => Ok(layer),
            Some(view) if view.dtype() == Dtype::I32 && view.shape().len() == 1 => {
                let bias = view.data().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b));
                Ok(layer.bias(bias.collect::<Array1<_>>()))
            }
            Some(view) => Err(unfit("bias", &view, "I32 [c_out]")),
        }
    }
}

impl DynamicQuantized {
    /// Reads a layer whose sources are quantised in each call, as `per` says:
    ///
    /// - `weight`: I8 `[c_out, c_in / groups]`, any trailing axes of length 1;
    /// - `weight_scale`: `[c_out]`; `bias`, if there: `[c_out]`; F32, F16 or BF16.
    ///
    /// Groups, stride, a clip and a residual are not in the file: the caller adds them.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::CheckpointTensor`] for another shape or dtype.
    pub fn from_safetensors(file: &SafeTensors<'_>, per: Per) -> Result<DynamicQuantized> {
        let (weight, scales) = (i8_weight(file)?, vector(file, "weight_scale")?);
        let layer = DynamicQuantized::new(weight, scales, per);
        Ok(match optional(vector(file, "bias"))? {
            Some(bias) => layer.bias(bias),
            None => layer,
        })
    }
}

impl QuantizedFp8 {
    /// Reads a layer of 8-bit floats, whose sources and, where it is quantised, result are of the type
    /// `activations`, which is not in the file:
    ///
    /// - `weight`: F8_E4M3 or F8_E5M2 `[c_out, c_in / groups]`, any trailing axes of length 1;
    /// - `weight_scale`: `[c_out]`, or one element for all; `bias`, if there: `[c_out]`;
    /// - `src_scale`: one element;
    /// - `dst_scale`, if there: one element; without it, the result is real numbers.
    ///
    /// All but the weight are F32, F16 or BF16. Groups, stride, a clip and a residual are not in the file:
    /// the caller adds them.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::CheckpointTensor`] for another shape or dtype.
    pub fn from_safetensors(file: &SafeTensors<'_>, activations: Fp8) -> Result<QuantizedFp8> {
        let expected = "F8_E4M3 or F8_E5M2 [c_out, c_in] or [c_out, c_in, 1, …]";
        let (dtype, bits) = bytes(file, &[Dtype::F8_E4M3, Dtype::F8_E5M2], expected)?;
        let fp8 = if dtype == Dtype::F8_E4M3 { Fp8::E4M3 } else { Fp8::E5M2 };
        let scales = match find(file, "weight_scale")? {
            view if is_one(&view) => Array1::from_elem(1, number(file, "weight_scale")?),
            _ => vector(file, "weight_scale")?,
        };
        let quantization =
            |name| Ok(Fp8Quantization { fp8: activations, scale: number(file, name)? });
        let mut layer = QuantizedFp8::of_bits(fp8, bits, scales, quantization("src_scale")?);
        if let Some(dst) = optional(quantization("dst_scale"))? {
            layer = layer.dst(dst);
        }
        if let Some(bias) = optional(vector(file, "bias"))? {
            layer = layer.bias(bias);
        }
        Ok(layer)
    }
}

fn i8_weight(file: &SafeTensors<'_>) -> Result<Array2<i8>> {
    let (_, bytes) = bytes(file, &[Dtype::I8], "I8 [c_out, c_in] or [c_out, c_in, 1, …]")?;
    Ok(bytes.mapv(|byte| byte as i8))
}

/// The weight of 8-bit numbers `[c_out, c_in / groups]`, any trailing axes of length 1, and its dtype, one
/// of these.
fn bytes(
    file: &SafeTensors<'_>,
    dtypes: &[Dtype],
    expected: &'static str,
) -> Result<(Dtype, Array2<u8>)> {
    let view = find(file, "weight")?;
    let bytes = match *view.shape() {
        [rows, columns, ref ones @ ..]
            if dtypes.contains(&view.dtype()) && ones.iter().all(|&len| len == 1) =>
        {
            Array2::from_shape_vec((rows, columns), view.data().to_vec()).ok()
        }
        _ => None,
    };
    Ok((view.dtype(), bytes.ok_or_else(|| unfit("weight", &view, expected))?))
}

fn is_one(view: &TensorView<'_>) -> bool {
    view.shape().iter().all(|&len| len == 1)
}

/// The only element of a tensor, as f32.
fn number(file: &SafeTensors<'_>, name: &str) -> Result<f32> {
    let view = find(file, name)?;
    match values(name, &view)?[..] {
        [number] => Ok(number),
        _ => Err(unfit(name, &view, "one element")),
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

    /// A layer of 8-bit numbers with all its tensors but one.
    fn eight_bits(weight: Dtype, tensors: &[(&'static str, Tensor)], left_out: &str) -> Vec<u8> {
        let mut all = vec![("weight", (weight, vec![2, 3], vec![1, 2, 3, 4, 5, 6]))];
        all.extend(tensors.iter().cloned());
        all.retain(|(name, _)| *name != left_out);
        file(&all)
    }

    #[test]
    fn layers_of_integers_are_read() {
        let tensors = [
            ("weight_scale", f32s(&[2], &[0.5, 0.25])),
            ("src_scale", f32s(&[], &[0.1])),
            ("src_zero_point", (Dtype::I8, vec![], vec![0xfb])),
            ("dst_scale", f32s(&[1, 1], &[0.2])),
            ("dst_zero_point", (Dtype::I64, vec![1], 7i64.to_le_bytes().to_vec())),
        ];
        let read = |left_out: &[&str]| {
            let tensors: Vec<_> =
                tensors.iter().filter(|(name, _)| !left_out.contains(name)).cloned().collect();
            let bytes = eight_bits(Dtype::I8, &tensors, "");
            Quantized::from_safetensors(&SafeTensors::deserialize(&bytes)?, Int8::U8)
        };
        let layer = Quantized::new(
            array![[1i8, 2, 3], [4, 5, 6]],
            vec![0.5, 0.25],
            Quantization::i8(0.1, -5),
        );
        assert_eq!(read(&["dst_scale", "dst_zero_point"]).unwrap(), layer);
        assert_eq!(read(&[]).unwrap(), layer.dst(Quantization::u8(0.2, 7)));
        for (name, _) in &tensors {
            let error = read(&[name]).unwrap_err();
            assert!(matches!(&error, Error::MissingTensor { name: missing } if missing == name));
        }
    }

    #[test]
    fn layers_of_real_sources_and_of_floats_are_read() {
        let tensors = [
            ("weight_scale", f32s(&[2, 1], &[0.5, 0.25])),
            ("bias", (Dtype::BF16, vec![2], vec![0x80, 0x3f, 0, 0xc0])),
            ("src_scale", f32s(&[1], &[0.1])),
            ("dst_scale", f32s(&[], &[0.2])),
        ];
        let bytes = eight_bits(Dtype::I8, &tensors, "");
        let read = DynamicQuantized::from_safetensors;
        let layer = read(&SafeTensors::deserialize(&bytes).unwrap(), Per::Sample).unwrap();
        let weight = array![[1i8, 2, 3], [4, 5, 6]];
        let expected = DynamicQuantized::new(weight, vec![0.5, 0.25], Per::Sample);
        assert_eq!(layer, expected.bias(vec![1.0, -2.0]));

        let read = |weight, tensors: &[_], left_out| {
            let bytes = eight_bits(weight, tensors, left_out);
            QuantizedFp8::from_safetensors(&SafeTensors::deserialize(&bytes)?, Fp8::E5M2)
        };
        let weight = array![[1, 2, 3], [4, 5, 6]];
        let src = Fp8Quantization::e5m2(0.1);
        let bare = QuantizedFp8::of_bits(Fp8::E4M3, weight.clone(), vec![0.5, 0.25], src);
        let biased = bare.clone().bias(vec![1.0, -2.0]);
        let dst = Fp8Quantization::e5m2(0.2);
        assert_eq!(read(Dtype::F8_E4M3, &tensors, "").unwrap(), biased.clone().dst(dst));
        assert_eq!(read(Dtype::F8_E4M3, &tensors, "dst_scale").unwrap(), biased);
        assert_eq!(read(Dtype::F8_E4M3, &tensors, "bias").unwrap(), bare.dst(dst));
        let for_all = [("weight_scale", f32s(&[], &[0.5])), tensors[2].clone()];
        let layer = read(Dtype::F8_E5M2, &for_all, "").unwrap();
        assert_eq!(layer, QuantizedFp8::of_bits(Fp8::E5M2, weight, vec![0.5; 2], src));

        for missing in ["weight", "weight_scale", "src_scale"] {
            let error = read(Dtype::F8_E4M3, &tensors, missing).unwrap_err();
            assert!(matches!(&error, Error::MissingTensor { name } if name == missing), "{error}");
        }
        let error = read(Dtype::U8, &tensors, "").unwrap_err().to_string();
        assert!(error.contains("U8 [2, 3], expected F8_E4M3 or F8_E5M2"), "{error}");
        let two = [("src_scale", f32s(&[2], &[1.0, 2.0])), tensors[0].clone()];
        let error = read(Dtype::F8_E4M3, &two, "").unwrap_err().to_string();
        assert!(error.contains("\"src_scale\" is F32 [2], expected one element"), "{error}");
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
