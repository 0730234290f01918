//! A quantised layer that is ready to run.

use std::sync::Arc;

use ndarray::{Array, ArrayD, ArrayRef, Dimension};

use super::{Int8, Quantized, QuantizedElement, QuantizedOutput};
use crate::alias::share_memory;
use crate::cpu::int8::{self, Call, Clip, Lowered, Scaling};
use crate::device::{Device, Kind};
use crate::error::{Error, Result};
use crate::problem::{LayerShape, dst_shape, expect_shape, same_place};
use crate::tensor::{AsTensor, AsTensorMut, Place, TensorMut, TensorRef, allocate_like};

/// A quantised layer on a device, ready to run. Independent of batch and spatial size;
/// `Send + Sync`; a clone shares everything.
#[derive(Clone, Debug)]
pub struct PreparedQuantized {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shape: LayerShape,
    src: Int8,
    dst: Option<Int8>,
    residual: Option<Int8>,
    device: Device,
    layer: int8::Layer,
}

impl Quantized {
    /// Checks the description and packs it, once.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::Unsupported`] for a CUDA device;
    /// [`Error::Environment`] for an instruction set that is forced and unknown, or not there;
    /// [`Error::Kernel`] likewise for `POINTWISE_KERNEL`.
    pub fn prepare(&self, device: &Device) -> Result<PreparedQuantized> {
        self.check()?;
        let cpu = match device.kind()? {
            Kind::Cpu(cpu) => cpu,
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => {
                let what = "layers of 8-bit integers".into();
                return Err(Error::Unsupported { device: device.to_string(), what });
            }
            Kind::Unknown(_) => unreachable!("Device::kind reports it"),
        };
        let weight = self.weight.as_standard_layout();
        let layer = int8::Layer::new(cpu, self.lower(weight.as_slice().unwrap_or_default()))?;
        Ok(PreparedQuantized {
            inner: Arc::new(Inner {
                shape: self.shape(),
                src: self.src.int8,
                dst: self.dst.map(|dst| dst.int8),
                residual: self.residual.map(|residual| residual.int8),
                device: device.clone(),
                layer,
            }),
        })
    }

    /// The layer over unsigned bytes, for weights in row-major order.
    pub(crate) fn lower<'a>(&self, weight: &'a [i8]) -> Lowered<'a> {
        let shape = self.shape();
        let unsigned = |int8: Int8, zero_point: i32| zero_point - int8.min();
        let src_zero_point = i64::from(unsigned(self.src.int8, self.src.zero_point));
        let offset = |(channel, row): (usize, &[i8])| {
            let weights: i64 = row.iter().map(|&w| i64::from(w)).sum();
            // Whatever wraps here wraps back when the sum is added: that fits an i32.
            (i64::from(self.bias_of(channel)) - src_zero_point * weights) as i32
        };
        let scale = self.dst_scale();
        let [mut before, mut clip] =
            self.clips.map(|(lo, hi)| Clip { lo: lo / scale, hi: hi / scale });
        if self.residual.is_none() {
            clip = std::mem::replace(&mut before, clip);
        }
        if let Some(dst) = self.dst {
            let [min, max] = [dst.int8.min(), dst.int8.max()].map(|q| (q - dst.zero_point) as f32);
            clip = Clip { lo: clip.lo.max(min).min(max), hi: clip.hi.max(min).min(max) };
        }
        Lowered {
            offset: weight.chunks_exact(shape.k()).enumerate().map(offset).collect(),
            scale: (0..shape.c_out).map(|channel| self.multiplier(channel)).collect(),
            scaling: Scaling {
                before,
                clip,
                zero_point: self.dst.map_or(0, |dst| dst.zero_point),
                residual_flip: self.residual.map_or(0, |residual| residual.int8.flip()),
                residual_zero_point: self
                    .residual
                    .map_or(0, |residual| unsigned(residual.int8, residual.zero_point)),
                residual_scale: self.residual_multiplier(),
            },
            src_flip: self.src.int8.flip(),
            weight,
            shape,
        }
    }
}

impl PreparedQuantized {
    /// Runs the layer.
    ///
    /// # Shapes
    /// `[n, c_in, …spatial]` to `[n, c_out, …ceil(spatial / stride)]`, in the memory order of
    /// `src`.
    ///
    /// # Errors
    /// Whatever does not fit, with its values; [`Error::ElementType`] unless `src` and the result
    /// have the layer's types; [`Error::MissingInput`] if the layer takes a residual.
    pub fn forward<T: QuantizedElement, O: QuantizedOutput, D: Dimension>(
        &self,
        src: &ArrayRef<T, D>,
    ) -> Result<Array<O, D>> {
        let shape = dst_shape(&self.inner.shape, src.shape(), std::iter::empty())?;
        let mut dst: Array<O, D> = allocate_like(src.as_tensor()?, shape.as_slice())?;
        self.forward_into(src, &mut dst)?;
        Ok(dst)
    }

    /// Runs the layer, into any non-overlapping strides. Allocates nothing once a thread has run a
    /// problem of this size.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Aliased`] if `dst` shares memory with a tensor
    /// that is read.
    pub fn forward_into<T: QuantizedElement, O: QuantizedOutput>(
        &self,
        src: &(impl AsTensor<T> + ?Sized),
        dst: &mut (impl AsTensorMut<O> + ?Sized),
    ) -> Result<()> {
        self.call(src).run_into(dst)
    }

    /// Starts a call that takes a residual too.
    pub fn call<'a, T: QuantizedElement>(
        &'a self,
        src: &'a (impl AsTensor<T> + ?Sized),
    ) -> QuantizedCall<'a> {
        QuantizedCall { layer: self, src: Bytes::of(src), residual: None }
    }

    /// The shape of the result for a source of this shape.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn dst_shape(&self, src: &[usize]) -> Result<Vec<usize>> {
        let shape = dst_shape(&self.inner.shape, src, std::iter::empty())?;
        Ok(shape.as_slice().to_vec())
    }

    /// The device that the layer was prepared for.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The kernel that runs the layer.
    pub fn kernel(&self) -> &'static str {
        self.inner.layer.kernel()
    }
}

/// A call that is being put together.
#[derive(Debug)]
#[must_use = "nothing happens until it is run"]
pub struct QuantizedCall<'a> {
    layer: &'a PreparedQuantized,
    src: Result<Bytes<'a>>,
    residual: Option<Result<Bytes<'a>>>,
}

impl<'a> QuantizedCall<'a> {
    /// What the layer's residual adds: of dst's shape, in any strides.
    pub fn residual<T: QuantizedElement>(
        mut self,
        residual: &'a (impl AsTensor<T> + ?Sized),
    ) -> Self {
        self.residual = Some(Bytes::of(residual));
        self
    }

    /// Runs the call into a new array in the memory order of the source.
    ///
    /// # Errors
    /// As [`PreparedQuantized::forward`], also for the residual.
    pub fn run<O: QuantizedOutput>(self) -> Result<ArrayD<O>> {
        let QuantizedCall { layer, src, residual } = self;
        let src = src?;
        let shape = dst_shape(&layer.inner.shape, src.view.shape(), std::iter::empty())?;
        let mut dst: ArrayD<O> = allocate_like(src.view, shape.as_slice())?;
        QuantizedCall { layer, src: Ok(src), residual }.run_into(&mut dst)?;
        Ok(dst)
    }

    /// Runs the call, into any non-overlapping strides.
    ///
    /// # Errors
    /// As [`PreparedQuantized::forward_into`], also for the residual.
    pub fn run_into<O: QuantizedOutput>(
        self,
        dst: &mut (impl AsTensorMut<O> + ?Sized),
    ) -> Result<()> {
        let inner = &*self.layer.inner;
        let (src, residual, dst) = (self.src?, self.residual.transpose()?, dst.as_tensor_mut()?);
        same_type("src", Some(inner.src), Some(src.int8))?;
        let shape = dst_shape(&inner.shape, src.view.shape(), std::iter::empty())?;
        expect_shape("dst", dst.shape(), shape.as_slice())?;
        same_type("dst", inner.dst, O::OUTPUT)?;
        let mut read = [Some(("src", src.view)), None];
        match (inner.residual, &residual) {
            (Some(_), None) => return Err(Error::MissingInput { input: "residual" }),
            (None, Some(_)) => return Err(Error::UnexpectedInput { input: "residual" }),
            (Some(expected), Some(residual)) => {
                same_type("residual", Some(expected), Some(residual.int8))?;
                expect_shape("residual", residual.view.shape(), shape.as_slice())?;
                read[1] = Some(("residual", residual.view));
            }
            (None, None) => {}
        }
        same_place("dst", Place::Host, dst.place())?;
        for (tensor, view) in read.into_iter().flatten() {
            same_place(tensor, Place::Host, view.place())?;
            if share_memory(&view, dst.view()) {
                return Err(Error::Aliased { tensor });
            }
        }
        let (src, residual) = (src.view, residual.map(|residual| residual.view));
        // SAFETY: u8 and i8 are bytes, and what is neither is f32.
        unsafe {
            match O::OUTPUT {
                Some(_) => inner.layer.run::<u8>(&Call { shape, src, residual, dst: cast(dst)? }),
                None => inner.layer.run::<f32>(&Call { shape, src, residual, dst: cast(dst)? }),
            }
        }
        Ok(())
    }
}

/// The same elements as another type.
///
/// # Safety
/// It has the same size and alignment, and any bits are valid in both.
unsafe fn cast<O, T>(mut dst: TensorMut<'_, O>) -> Result<TensorMut<'_, T>> {
    let (ptr, place) = (dst.as_mut_ptr().cast(), dst.place());
    // SAFETY: the caller's promise; `dst` is given up.
    unsafe { TensorMut::from_raw_parts(ptr, place, dst.shape(), dst.strides()) }
}

fn same_type(tensor: &'static str, expected: Option<Int8>, got: Option<Int8>) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    let name = |int8: Option<Int8>| int8.map_or("f32", Int8::name);
    Err(Error::ElementType { tensor, expected: name(expected), got: name(got) })
}

/// A tensor's bytes, and what they are.
#[derive(Clone, Copy, Debug)]
struct Bytes<'a> {
    int8: Int8,
    view: TensorRef<'a, u8>,
}

impl<'a> Bytes<'a> {
    fn of<T: QuantizedElement>(tensor: &'a (impl AsTensor<T> + ?Sized)) -> Result<Self> {
        let view = tensor.as_tensor()?;
        // SAFETY: the same elements, of a type that is as large, borrowed for as long.
        let view = unsafe {
            let (shape, strides) = (view.shape(), view.strides());
            TensorRef::from_raw_parts(view.as_ptr().cast(), view.place(), shape, strides)?
        };
        Ok(Bytes { int8: T::INT8, view })
    }
}
