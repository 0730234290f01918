//! A quantised layer that is ready to run.

use std::sync::Arc;

use ndarray::{Array, ArrayD, ArrayRef, Dimension};

use super::{
    DynamicQuantized, ElementType, F8E4M3, F8E5M2, Fp8, Int8, Per, Quantized, QuantizedElement,
    QuantizedFp8,
};
use crate::alias::share_memory;
use crate::cost::Cost;
use crate::cpu::fp8;
use crate::cpu::int8::{self, Added, Call, Clip, Lowered, Output, Scaling};
#[cfg(feature = "cuda")]
use crate::cuda::{self, CudaTensor, DeviceElement};
use crate::device::{Device, Kind};
use crate::dtype::{DType, bf16, f16};
use crate::error::{Error, Result};
use crate::plan::{Candidate, Explanation};
use crate::prepared::PrepareOptions;
use crate::problem::{DstShape, LayerShape, dst_shape, expect_shape, same_place};
use crate::tensor::{AsTensor, AsTensorMut, Place, TensorMut, TensorRef, allocate_like};
use crate::trace::{self, Told};

/// The same of whichever view it is.
macro_rules! each {
    ($erased:expr, $view:ident => $of:expr) => {
        match $erased {
            Erased::Int8(_, $view) => $of,
            Erased::Fp8(_, $view) => $of,
            Erased::F32($view) => $of,
            Erased::F16($view) => $of,
            Erased::Bf16($view) => $of,
        }
    };
}

/// A quantised layer on a device, ready to run. Independent of batch and spatial size;
/// `Send + Sync`; a clone shares everything.
#[derive(Clone, Debug)]
pub struct PreparedQuantized {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shape: LayerShape,
    src: ElementType,
    /// Of 8 bits; real numbers are those of the call.
    dst: Option<ElementType>,
    /// Of 8 bits; real numbers are of dst's type.
    residual: Option<ElementType>,
    device: Device,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Cpu(int8::Layer),
    CpuFp8(fp8::Layer),
    #[cfg(feature = "cuda")]
    Cuda(cuda::bytes::Layer),
}

impl Quantized {
    /// Checks the description and packs it, once.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::Environment`] for an instruction set that is forced and
    /// unknown, or not there; [`Error::Kernel`] likewise for `POINTWISE_KERNEL`; on CUDA
    /// [`Error::TooLarge`] and those of the device.
    pub fn prepare(&self, device: &Device) -> Result<PreparedQuantized> {
        self.prepare_with(device, PrepareOptions::default())
    }

    /// As [`prepare`](Self::prepare); of the options, `kernel` matters, and on CUDA `slice_bytes`.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare), and [`Error::Kernel`] for the option too.
    pub fn prepare_with(
        &self,
        device: &Device,
        options: PrepareOptions,
    ) -> Result<PreparedQuantized> {
        self.check()?;
        let weight = self.weight.as_standard_layout();
        let lowered = self.lower(weight.as_slice().unwrap_or_default());
        let types = [Some(self.src), self.dst, self.residual]
            .map(|quantization| Some(ElementType::Int8(quantization?.int8)));
        PreparedQuantized::of_integers(device, &options, lowered, types)
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
            shift: Vec::new(),
            per: None,
            scaling: Scaling {
                before,
                clip,
                zero_point: self.dst.map_or(0, |dst| dst.zero_point),
                flip: self.dst.map_or(0, |dst| dst.int8.flip()),
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

impl DynamicQuantized {
    /// Checks the description and packs it, once.
    ///
    /// # Errors
    /// As [`Quantized::prepare`].
    pub fn prepare(&self, device: &Device) -> Result<PreparedQuantized> {
        self.prepare_with(device, PrepareOptions::default())
    }

    /// As [`Quantized::prepare_with`].
    ///
    /// # Errors
    /// As [`Quantized::prepare_with`].
    pub fn prepare_with(
        &self,
        device: &Device,
        options: PrepareOptions,
    ) -> Result<PreparedQuantized> {
        self.check()?;
        let weight = self.weight.as_standard_layout();
        let lowered = self.lower(weight.as_slice().unwrap_or_default());
        let types = [Some(ElementType::Real(DType::F32)), None, None];
        PreparedQuantized::of_integers(device, &options, lowered, types)
    }
}

impl QuantizedFp8 {
    /// Checks the description and packs it, once.
    ///
    /// # Errors
    /// As [`prepare_with`](Self::prepare_with).
    pub fn prepare(&self, device: &Device) -> Result<PreparedQuantized> {
        self.prepare_with(device, PrepareOptions::default())
    }

    /// As [`prepare`](Self::prepare); of the options, `kernel` matters (on the CPU one of f32), and on
    /// CUDA `slice_bytes` and `batch_invariant`, without which blocks may share a sum.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::Environment`] and [`Error::Kernel`] as
    /// [`Quantized::prepare_with`]; [`Error::Unsupported`] on a CUDA device that has no kernels for fp8,
    /// with the reason; [`Error::TooLarge`] and those of the device.
    pub fn prepare_with(
        &self,
        device: &Device,
        options: PrepareOptions,
    ) -> Result<PreparedQuantized> {
        self.check()?;
        let weight = self.weight.as_standard_layout();
        let lowered = self.lower(weight.as_slice().unwrap_or_default());
        let shape = lowered.shape.clone();
        let backend = match device.kind()? {
            Kind::Cpu(cpu) => Backend::CpuFp8(fp8::Layer::new(cpu, &options, lowered)?),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => {
                Backend::Cuda(cuda::bytes::Layer::of_floats(cuda, &options, lowered)?)
            }
            Kind::Unknown(_) => unreachable!("Device::kind reports it"),
        };
        let types = [Some(self.src), self.dst, self.residual]
            .map(|quantization| Some(ElementType::Fp8(quantization?.fp8)));
        Ok(PreparedQuantized::new(device, shape, backend, types))
    }
}

impl PreparedQuantized {
    /// Packs a layer on a device; its types are those of src, dst and residual.
    fn of_integers(
        device: &Device,
        options: &PrepareOptions,
        lowered: Lowered<'_>,
        types: [Option<ElementType>; 3],
    ) -> Result<Self> {
        let shape = lowered.shape.clone();
        let backend = match device.kind()? {
            Kind::Cpu(cpu) => {
                Backend::Cpu(int8::Layer::new(cpu, options.kernel.as_deref(), lowered)?)
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => {
                Backend::Cuda(cuda::bytes::Layer::of_integers(cuda, options, lowered)?)
            }
            Kind::Unknown(_) => unreachable!("Device::kind reports it"),
        };
        Ok(PreparedQuantized::new(device, shape, backend, types))
    }

    fn new(
        device: &Device,
        shape: LayerShape,
        backend: Backend,
        [src, dst, residual]: [Option<ElementType>; 3],
    ) -> Self {
        let (src, device) = (src.expect("every layer has a source"), device.clone());
        let inner = Inner { shape, src, dst, residual, device, backend };
        PreparedQuantized { inner: Arc::new(inner) }
    }

    /// Runs the layer.
    ///
    /// # Shapes
    /// `[n, c_in, …spatial]` to `[n, c_out, …ceil(spatial / stride)]`, in the memory order of
    /// `src`.
    ///
    /// # Errors
    /// Whatever does not fit, with its values; [`Error::ElementType`] unless `src` and the result
    /// have the layer's types (a result that is not quantised is f32, f16 or bf16);
    /// [`Error::MissingInput`] if the layer takes a residual.
    pub fn forward<T: QuantizedElement, O: QuantizedElement, D: Dimension>(
        &self,
        src: &ArrayRef<T, D>,
    ) -> Result<Array<O, D>> {
        let shape = dst_shape(&self.inner.shape, src.shape(), std::iter::empty())?;
        let mut dst: Array<O, D> = allocate_like(src.as_tensor()?, shape.as_slice())?;
        self.forward_into(src, &mut dst)?;
        Ok(dst)
    }

    /// Runs the layer on a device tensor: the result is on the same device and stream, and nothing
    /// waits for it.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::WrongDevice`] if the layer is not on the tensor's
    /// device.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn forward_cuda<
        T: QuantizedElement + DeviceElement,
        O: QuantizedElement + DeviceElement,
    >(
        &self,
        src: &CudaTensor<T>,
    ) -> Result<CudaTensor<O>> {
        let shape = dst_shape(&self.inner.shape, src.shape(), std::iter::empty())?;
        let mut dst = CudaTensor::like(src.device(), &src.view()?, shape.as_slice())?;
        self.forward_into(src, &mut dst)?;
        Ok(dst)
    }

    /// Runs the layer, into any non-overlapping strides. Allocates nothing once a thread has run a
    /// problem of this size, except on CUDA where a [`DynamicQuantized`](super::DynamicQuantized)
    /// quantises its source, into memory of the device's pool, given back in stream order; and on the CPU
    /// where a [`QuantizedFp8`](super::QuantizedFp8) takes memory for source and result in f32.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Aliased`] if `dst` shares memory with a tensor
    /// that is read.
    pub fn forward_into<T: QuantizedElement, O: QuantizedElement>(
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
        QuantizedCall { layer: self, src: Erased::of(src), residual: None }
    }

    /// The shape of the result for a source of this shape.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn dst_shape(&self, src: &[usize]) -> Result<Vec<usize>> {
        let shape = dst_shape(&self.inner.shape, src, std::iter::empty())?;
        Ok(shape.as_slice().to_vec())
    }

    /// Parameters, work and traffic of a call on a source of this shape. A result that is not
    /// quantised counts as f32, and so does the residual of a
    /// [`DynamicQuantized`](super::DynamicQuantized). A source that is quantised in the call counts
    /// once, though a range of more than a position is looked for before it is read.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn cost(&self, src: &[usize]) -> Result<Cost> {
        let dst = dst_shape(&self.inner.shape, src, std::iter::empty())?;
        Ok(self.cost_of(src, &dst))
    }

    fn cost_of(&self, src: &[usize], dst_shape: &DstShape) -> Cost {
        let Inner { shape, src: element, dst, residual, backend, .. } = &*self.inner;
        let all = |shape: &[usize]| shape[2..].iter().fold(shape[0], |n, &s| n.saturating_mul(s));
        let positions = all(dst_shape.as_slice());
        let of = |positions: usize, channels: usize, size: usize| {
            positions.saturating_mul(channels).saturating_mul(size)
        };
        let size =
            |element: &Option<ElementType>| element.map_or(size_of::<f32>(), ElementType::size);
        // A range of a sample or a tensor is that of its positions which the stride skips, too.
        let per = match backend {
            Backend::Cpu(layer) => layer.per(),
            Backend::CpuFp8(_) => None,
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.per(),
        };
        let read = match per {
            Some(Per::Tensor | Per::Sample) => all(src),
            Some(Per::Position) | None => positions,
        };
        // Per channel, a scale and an offset, and a bias beside real sources.
        let vectors = if let ElementType::Real(_) = element { 3 } else { 2 };
        let (c_out, weights) = (shape.c_out, shape.c_out * shape.k());
        Cost {
            parameters: weights + 2 * c_out,
            macs: of(positions, c_out, shape.k()),
            src_bytes: of(read, shape.c_in, element.size()),
            weight_bytes: weights + vectors * size_of::<f32>() * c_out,
            dst_bytes: of(positions, c_out, size(dst)),
            residual_bytes: if shape.residual { of(positions, c_out, size(residual)) } else { 0 },
        }
    }

    /// The kernel of a call, why it is that one, and the call in words.
    fn describe(&self, src: &[usize], dst: &DstShape) -> Result<(&'static str, String, String)> {
        let Inner { shape, backend, .. } = &*self.inner;
        let (kernel, reason) = match backend {
            Backend::Cpu(layer) => {
                (layer.kernel(), "the strongest instruction set, or the forced one".into())
            }
            Backend::CpuFp8(layer) => layer.explain(src, dst)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.explain(dst),
        };
        let words = |shape: &[usize]| {
            let lengths: Vec<_> = shape.iter().map(usize::to_string).collect();
            lengths.join("x")
        };
        let groups =
            if shape.groups > 1 { format!(", {} groups", shape.groups) } else { "".into() };
        Ok((kernel, reason, format!("{} -> {}{groups}", words(src), words(dst.as_slice()))))
    }

    /// The kernel that would run a source of this shape, what that costs, and the ceilings that
    /// [`Device::roof_meter_int8`] gives, on the CPU measured; there those of f32 for fp8.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn explain(&self, src: &[usize]) -> Result<Explanation> {
        let Inner { shape, device, backend, .. } = &*self.inner;
        let dst = dst_shape(shape, src, std::iter::empty())?;
        let cost = self.cost_of(src, &dst);
        let roof = match backend {
            Backend::CpuFp8(layer) => layer.roof(&cost),
            _ => device.roof_meter_int8(cost.bytes())?.sample(),
        };
        let (kernel, reason, problem) = self.describe(src, &dst)?;
        Ok(Explanation { device: device.to_string(), problem, kernel, reason, cost, roof })
    }

    /// Every kernel of the device, and what it says to a source of this shape; the one that would run
    /// comes first.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn plans(&self, src: &[usize]) -> Result<Vec<Candidate>> {
        let dst = dst_shape(&self.inner.shape, src, std::iter::empty())?;
        Ok(match &self.inner.backend {
            Backend::Cpu(layer) => layer.plans(),
            Backend::CpuFp8(layer) => layer.plans(src, &dst)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.plans(&dst),
        })
    }

    /// The device that the layer was prepared for.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// This layer on another stream of its CUDA device, its weights shared: as
    /// [`Prepared::on`](crate::Prepared::on).
    ///
    /// # Errors
    /// [`Error::WrongDevice`] if the layer was prepared for another device.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn on(&self, device: &cuda::CudaDevice) -> Result<Self> {
        let Inner { shape, src, dst, residual, device: own, backend } = &*self.inner;
        let Backend::Cuda(layer) = backend else {
            return Err(Error::WrongDevice {
                tensor: "the layer's weight",
                expected: device.to_string(),
                got: own.to_string(),
            });
        };
        let backend = Backend::Cuda(layer.on(device)?);
        let (shape, device) = (shape.clone(), device.clone().into());
        let inner = Inner { shape, src: *src, dst: *dst, residual: *residual, device, backend };
        Ok(PreparedQuantized { inner: Arc::new(inner) })
    }

    /// The kernel that runs the layer; on CUDA, and of fp8, that of sources with many positions, as it
    /// depends on them ([`explain`](Self::explain)).
    pub fn kernel(&self) -> &'static str {
        match &self.inner.backend {
            Backend::Cpu(layer) => layer.kernel(),
            Backend::CpuFp8(layer) => layer.kernel(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.kernel_for(u64::MAX >> 16),
        }
    }
}

/// A call that is being put together.
#[derive(Debug)]
#[must_use = "nothing happens until it is run"]
pub struct QuantizedCall<'a> {
    layer: &'a PreparedQuantized,
    src: Result<Erased<'a>>,
    residual: Option<Result<Erased<'a>>>,
}

impl<'a> QuantizedCall<'a> {
    /// What the layer's residual adds: of dst's shape, in any strides.
    pub fn residual<T: QuantizedElement>(
        mut self,
        residual: &'a (impl AsTensor<T> + ?Sized),
    ) -> Self {
        self.residual = Some(Erased::of(residual));
        self
    }

    /// Runs the call into a new array in the memory order of the source.
    ///
    /// # Errors
    /// As [`PreparedQuantized::forward`], also for the residual.
    pub fn run<O: QuantizedElement>(self) -> Result<ArrayD<O>> {
        let QuantizedCall { layer, src, residual } = self;
        let src = src?;
        let shape = dst_shape(&layer.inner.shape, src.shape(), std::iter::empty())?;
        let mut dst: ArrayD<O> = each!(&src, view => allocate_like(*view, shape.as_slice())?);
        QuantizedCall { layer, src: Ok(src), residual }.run_into(&mut dst)?;
        Ok(dst)
    }

    /// Runs the call, into any non-overlapping strides.
    ///
    /// # Errors
    /// As [`PreparedQuantized::forward_into`], also for the residual.
    pub fn run_into<O: QuantizedElement>(
        self,
        dst: &mut (impl AsTensorMut<O> + ?Sized),
    ) -> Result<()> {
        let inner = &*self.layer.inner;
        let (src, residual, dst) = (self.src?, self.residual.transpose()?, dst.as_tensor_mut()?);
        same_type("src", inner.src, src.element())?;
        let shape = dst_shape(&inner.shape, src.shape(), std::iter::empty())?;
        expect_shape("dst", dst.shape(), shape.as_slice())?;
        match (inner.dst, O::TYPE) {
            (None, ElementType::Real(_)) => {}
            (Some(expected), got) => same_type("dst", expected, got)?,
            (None, got) => same_type("dst", ElementType::Real(DType::F32), got)?,
        }
        match (inner.shape.residual, &residual) {
            (true, None) => return Err(Error::MissingInput { input: "residual" }),
            (false, Some(_)) => return Err(Error::UnexpectedInput { input: "residual" }),
            (true, Some(residual)) => {
                let expected = inner.residual.unwrap_or(O::TYPE);
                same_type("residual", expected, residual.element())?;
                expect_shape("residual", residual.shape(), shape.as_slice())?;
            }
            (false, None) => {}
        }
        let place = match &inner.backend {
            Backend::Cpu(_) | Backend::CpuFp8(_) => Place::Host,
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => src.place(),
        };
        let read = || {
            let read = [("src", Some(&src)), ("residual", residual.as_ref())];
            read.into_iter().filter_map(|(tensor, read)| Some((tensor, read?)))
        };
        for (tensor, read) in read() {
            same_place(tensor, place, read.place())?;
        }
        same_place("dst", place, dst.place())?;
        for (tensor, read) in read() {
            if read.shares_memory(dst.view()) {
                return Err(Error::Aliased { written: "dst", tensor });
            }
        }
        let _span = trace::enter(|| {
            // The shapes have been checked.
            let described = self.layer.describe(src.shape(), &shape).unwrap_or_default();
            let (kernel, _, problem) = described;
            let cost = self.layer.cost_of(src.shape(), &shape);
            Told { kernel, problem, macs: cost.macs, bytes: cost.bytes() }
        });
        let layer = &inner.backend;
        // SAFETY: src and residual are as they were erased, and integers and floats of 8 bits are bytes.
        unsafe {
            match (inner.src, O::TYPE) {
                (ElementType::Int8(_), ElementType::Int8(_)) => {
                    run::<O, u8, u8>(layer, shape, &src, &residual, dst)
                }
                (ElementType::Int8(_), ElementType::Real(dtype)) => match dtype {
                    DType::F32 => run::<O, f32, u8>(layer, shape, &src, &residual, dst),
                    DType::F16 => run::<O, f16, u8>(layer, shape, &src, &residual, dst),
                    DType::Bf16 => run::<O, bf16, u8>(layer, shape, &src, &residual, dst),
                },
                (ElementType::Real(_), ElementType::Real(dtype)) => match dtype {
                    DType::F32 => run::<O, f32, f32>(layer, shape, &src, &residual, dst),
                    DType::F16 => run::<O, f16, f16>(layer, shape, &src, &residual, dst),
                    DType::Bf16 => run::<O, bf16, bf16>(layer, shape, &src, &residual, dst),
                },
                (ElementType::Fp8(_), out) => match out {
                    ElementType::Fp8(Fp8::E4M3) => {
                        run_fp8::<O, F8E4M3>(layer, shape, &src, &residual, dst)
                    }
                    ElementType::Fp8(Fp8::E5M2) => {
                        run_fp8::<O, F8E5M2>(layer, shape, &src, &residual, dst)
                    }
                    ElementType::Real(DType::F32) => {
                        run_fp8::<O, f32>(layer, shape, &src, &residual, dst)
                    }
                    ElementType::Real(DType::F16) => {
                        run_fp8::<O, f16>(layer, shape, &src, &residual, dst)
                    }
                    ElementType::Real(DType::Bf16) => {
                        run_fp8::<O, bf16>(layer, shape, &src, &residual, dst)
                    }
                    ElementType::Int8(_) => unreachable!("dst is a float where src is"),
                },
                (ElementType::Int8(_) | ElementType::Real(_), ElementType::Fp8(_))
                | (ElementType::Real(_), ElementType::Int8(_)) => {
                    unreachable!("dst's type has been checked")
                }
            }
        }
    }
}

/// Runs a call whose elements are known.
///
/// # Safety
/// `O` is as large and aligned as `T`, the residual's elements as `R`, those of src as `R::Source`; any
/// bits are valid in each.
unsafe fn run<O, T: Output<R> + QuantizedElement, R: Added + QuantizedElement>(
    backend: &Backend,
    shape: DstShape,
    src: &Erased<'_>,
    residual: &Option<Erased<'_>>,
    dst: TensorMut<'_, O>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let call: Call<'_, T, R> = unsafe {
        let residual = residual.as_ref().map(|residual| residual.typed());
        Call { shape, src: src.typed(), residual, dst: dst.cast() }
    };
    match backend {
        Backend::Cpu(layer) => layer.run::<T, R>(&call),
        Backend::CpuFp8(_) => unreachable!("its sources are floats of 8 bits"),
        #[cfg(feature = "cuda")]
        Backend::Cuda(layer) => layer.run(&cuda::bytes::Tensors {
            shape: &call.shape,
            src: &call.src,
            residual: call.residual.as_ref(),
            dst: &call.dst,
            types: (T::TYPE, R::TYPE),
        })?,
    }
    Ok(())
}

/// The same of floats of 8 bits.
///
/// # Safety
/// `O` is as large and aligned as `T`; src and residual are bytes; any bits are valid in each.
unsafe fn run_fp8<O, T: fp8::Narrow + QuantizedElement>(
    backend: &Backend,
    shape: DstShape,
    src: &Erased<'_>,
    residual: &Option<Erased<'_>>,
    dst: TensorMut<'_, O>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let (src, bytes, dst) = unsafe {
        let bytes = residual.as_ref().map(|residual| residual.typed::<u8>());
        (src.typed::<u8>(), bytes, dst.cast::<T>())
    };
    match backend {
        Backend::CpuFp8(layer) => layer.run(&shape, &src, bytes.as_ref(), &dst),
        Backend::Cpu(_) => unreachable!("its sources are not"),
        #[cfg(feature = "cuda")]
        Backend::Cuda(layer) => layer.run(&cuda::bytes::Tensors {
            shape: &shape,
            src: &src,
            residual: bytes.as_ref(),
            dst: &dst,
            types: (T::TYPE, residual.as_ref().map_or(T::TYPE, Erased::element)),
        }),
    }
}

fn same_type(tensor: &'static str, expected: ElementType, got: ElementType) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::ElementType { tensor, expected: expected.name(), got: got.name() })
}

/// A tensor that is read, whatever it holds: as bytes, or as what it is.
#[derive(Clone, Copy, Debug)]
enum Erased<'a> {
    Int8(Int8, TensorRef<'a, u8>),
    Fp8(Fp8, TensorRef<'a, u8>),
    F32(TensorRef<'a, f32>),
    F16(TensorRef<'a, f16>),
    Bf16(TensorRef<'a, bf16>),
}

impl<'a> Erased<'a> {
    fn of<T: QuantizedElement>(tensor: &'a (impl AsTensor<T> + ?Sized)) -> Result<Self> {
        let view = tensor.as_tensor()?;
        // SAFETY: only one type has each `TYPE`, and i8 and floats of 8 bits are bytes as well.
        unsafe {
            Ok(match T::TYPE {
                ElementType::Int8(int8) => Erased::Int8(int8, view.cast()),
                ElementType::Fp8(fp8) => Erased::Fp8(fp8, view.cast()),
                ElementType::Real(DType::F32) => Erased::F32(view.cast()),
                ElementType::Real(DType::F16) => Erased::F16(view.cast()),
                ElementType::Real(DType::Bf16) => Erased::Bf16(view.cast()),
            })
        }
    }

    fn element(&self) -> ElementType {
        match self {
            Erased::Int8(int8, _) => ElementType::Int8(*int8),
            Erased::Fp8(fp8, _) => ElementType::Fp8(*fp8),
            Erased::F32(_) => ElementType::Real(DType::F32),
            Erased::F16(_) => ElementType::Real(DType::F16),
            Erased::Bf16(_) => ElementType::Real(DType::Bf16),
        }
    }

    fn shape(&self) -> &[usize] {
        each!(self, view => view.shape())
    }

    fn place(&self) -> Place {
        each!(self, view => view.place())
    }

    fn shares_memory<O>(&self, dst: &TensorRef<'_, O>) -> bool {
        each!(self, view => share_memory(view, dst))
    }

    /// # Safety
    /// It holds `T`.
    unsafe fn typed<T>(&self) -> TensorRef<'a, T> {
        // SAFETY: the caller's promise.
        each!(self, view => unsafe { view.cast() })
    }
}
