//! Tensors in device memory that users own.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array, ArrayD, ArrayView, Dimension, IxDyn, ShapeBuilder};

use super::device::CudaDevice;
use super::memory::{Buffer, Plain};
use crate::error::{Error, Result};
use crate::tensor::{
    AsTensor, AsTensorMut, Place, Source, TensorMut, TensorRef, checked_product, strides_like,
    try_zeros,
};

/// Element types that device tensors hold: `f32`, [`half::f16`], [`half::bf16`], and `u8`, `i8`,
/// [`float8::F8E4M3`] and [`float8::F8E5M2`] of [quantised layers](crate::quantized).
#[allow(private_bounds)]
pub trait DeviceElement: Plain + Default {}

impl DeviceElement for u8 {}
impl DeviceElement for i8 {}
impl DeviceElement for f32 {}
impl DeviceElement for half::f16 {}
impl DeviceElement for half::bf16 {}
impl DeviceElement for float8::F8E4M3 {}
impl DeviceElement for float8::F8E5M2 {}

/// A tensor in the memory of a CUDA device, owned; `Send + Sync`.
///
/// It belongs to the stream of the [`CudaDevice`] that it was made with: allocated, filled and
/// freed in that stream's order. Layers on other streams of the device wait for that stream and
/// make it wait for them, so a tensor may be used and dropped without thought of streams.
///
/// ```no_run
/// use ndarray::{Array2, Array4};
/// use pointwise::{CudaDevice, CudaTensor, Pointwise};
///
/// let gpu = CudaDevice::open(0)?;
/// let layer = Pointwise::new(Array2::ones((64, 32))).relu().prepare(&gpu.clone().into())?;
/// let src = CudaTensor::from_host(&gpu, Array4::<f32>::ones((8, 32, 56, 56)).view())?;
/// let dst = layer.forward(&src)?; // queued; nothing waits
/// let dst = dst.to_host()?; // waits
/// assert_eq!(dst.shape(), [8, 64, 56, 56]);
/// # Ok::<(), pointwise::Error>(())
/// ```
pub struct CudaTensor<T = f32> {
    memory: Buffer,
    shape: Vec<usize>,
    strides: Vec<isize>,
    element: PhantomData<T>,
}

impl<T: DeviceElement> CudaTensor<T> {
    /// Copies a host array, in its own order of axes in memory; waits until it is copied.
    ///
    /// `nhwc(view)` of an `[n, h, w, c]` array gives a channels-last tensor `[n, c, h, w]`.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Cuda`].
    pub fn from_host<D: Dimension>(device: &CudaDevice, host: ArrayView<'_, T, D>) -> Result<Self> {
        let host = host.into_dyn();
        let mut order: Vec<usize> = (0..host.ndim()).collect();
        order.sort_by_key(|&axis| {
            (std::cmp::Reverse(host.strides()[axis].unsigned_abs()), host.shape()[axis] == 1)
        });
        let mut tensor = Self::uninitialized(device, host.shape(), &order)?;
        let dense = host.permuted_axes(order);
        let dense = dense.as_standard_layout();
        if let Some(values) = dense.as_slice() {
            tensor.memory.upload(values)?;
        }
        Ok(tensor)
    }

    /// A tensor of zeros `[n, c, …spatial]`, the last axis contiguous.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Cuda`].
    pub fn zeros(device: &CudaDevice, shape: &[usize]) -> Result<Self> {
        let order: Vec<usize> = (0..shape.len()).collect();
        let mut tensor = Self::uninitialized(device, shape, &order)?;
        tensor.memory.fill(0)?;
        Ok(tensor)
    }

    /// `order` lists the axes from the outermost in memory to the innermost.
    fn uninitialized(device: &CudaDevice, shape: &[usize], order: &[usize]) -> Result<Self> {
        let len = checked_product("a tensor's size", shape)?;
        let mut strides = vec![0isize; shape.len()];
        let mut next = 1;
        for &axis in order.iter().rev() {
            strides[axis] = next;
            next *= shape[axis].max(1) as isize;
        }
        let memory = Buffer::new(device, "a tensor", len * size_of::<T>())?;
        Ok(CudaTensor { memory, shape: shape.to_vec(), strides, element: PhantomData })
    }

    /// A tensor of this shape in the memory order of `like`; its contents are unspecified.
    pub(crate) fn like<L>(
        device: &CudaDevice,
        like: &TensorRef<'_, L>,
        shape: &[usize],
    ) -> Result<Self> {
        if shape.len() != like.rank() {
            let expected = "the rank of the source";
            return Err(Error::Rank { tensor: "dst", expected, got: shape.len() });
        }
        let strides = strides_like(like, shape);
        let mut order: Vec<usize> = (0..shape.len()).collect();
        // Axes of length one share their stride with the next, and stay in front of it.
        order.sort_by_key(|&axis| (std::cmp::Reverse(strides[axis]), shape[axis] != 1));
        let mut tensor = Self::uninitialized(device, shape, &order)?;
        tensor.strides.copy_from_slice(&strides[..shape.len()]);
        Ok(tensor)
    }

    /// Fills the memory from that of the host, in its order.
    pub(super) fn upload(&mut self, values: &[T]) -> Result<()> {
        self.memory.upload(values)
    }

    /// As [`upload`](Self::upload), the other way.
    pub(super) fn download(&self, values: &mut [T]) -> Result<()> {
        self.memory.download(values)
    }

    /// Copies to a host array with the same order of axes in memory; waits for the tensor's stream
    /// and for the copy.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for what failed on the stream before; [`Error::TooLarge`] if the
    /// host's memory does not hold it.
    pub fn to_host(&self) -> Result<ArrayD<T>> {
        let mut values = try_zeros::<T>("a tensor", &self.shape)?;
        self.memory.download(&mut values)?;
        if values.is_empty() {
            return Ok(ArrayD::from_elem(IxDyn(&self.shape), T::default()));
        }
        let strides: Vec<usize> = self.strides.iter().map(|&stride| stride as usize).collect();
        Array::from_shape_vec(IxDyn(&self.shape).strides(IxDyn(&strides)), values)
            .map_err(|_| Error::TooLarge { what: "a tensor", sizes: self.shape.clone() })
    }

    /// The length of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The stride of each axis, in elements.
    pub fn strides(&self) -> &[isize] {
        &self.strides
    }

    /// The device and stream that the tensor belongs to.
    pub fn device(&self) -> &CudaDevice {
        self.memory.device()
    }

    /// The device address of the first element.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    fn place(&self) -> Place {
        Place::Cuda(self.device().ordinal())
    }

    fn stream(&self) -> usize {
        self.device().stream().cu_stream().addr()
    }

    /// A view of all elements, for 2 to 5 axes `[n, c, …spatial]`.
    ///
    /// # Errors
    /// [`Error::Rank`].
    pub fn view(&self) -> Result<TensorRef<'_, T>> {
        let ptr = std::ptr::without_provenance(self.address() as usize);
        // SAFETY: the tensor's own memory, borrowed with it.
        let view =
            unsafe { TensorRef::from_raw_parts(ptr, self.place(), &self.shape, &self.strides)? };
        Ok(view.on_stream(self.stream()))
    }

    /// As [`view`](Self::view), to be written to.
    ///
    /// # Errors
    /// [`Error::Rank`].
    pub fn view_mut(&mut self) -> Result<TensorMut<'_, T>> {
        let ptr = std::ptr::without_provenance_mut(self.address() as usize);
        // SAFETY: the tensor's own memory, exclusively borrowed with it.
        let view =
            unsafe { TensorMut::from_raw_parts(ptr, self.place(), &self.shape, &self.strides)? };
        Ok(view.on_stream(self.stream()))
    }

    /// A view of some channels, so that a part of a concatenated tensor is read in place.
    ///
    /// # Errors
    /// [`Error::Rank`], and [`Error::ChannelRange`] if there are no such channels.
    pub fn channels(&self, range: Range<usize>) -> Result<TensorRef<'_, T>> {
        self.check_channels(&range)?;
        Ok(self.view()?.channels(range.start, range.end))
    }

    /// A view of some channels, so that layers write the parts of a concatenated tensor in place.
    ///
    /// # Errors
    /// As [`channels`](Self::channels).
    pub fn channels_mut(&mut self, range: Range<usize>) -> Result<TensorMut<'_, T>> {
        self.check_channels(&range)?;
        Ok(self.view_mut()?.channels(range.start, range.end))
    }

    fn check_channels(&self, range: &Range<usize>) -> Result<()> {
        let channels = self.view()?.shape()[1];
        if range.start <= range.end && range.end <= channels {
            return Ok(());
        }
        let Range { start, end } = *range;
        Err(Error::ChannelRange { start, end, channels })
    }
}

impl<T> fmt::Debug for CudaTensor<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.memory.device();
        write!(f, "CudaTensor({:?}, strides {:?}, {device})", self.shape, self.strides)
    }
}

impl<T: DeviceElement> AsTensor<T> for CudaTensor<T> {
    fn as_tensor(&self) -> Result<TensorRef<'_, T>> {
        self.view()
    }
}

impl<T: DeviceElement> AsTensorMut<T> for CudaTensor<T> {
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_, T>> {
        self.view_mut()
    }
}

/// A result on the same device and stream.
impl<T: DeviceElement> Source<T> for CudaTensor<T> {
    type Output = CudaTensor<T>;

    fn allocate(&self, shape: &[usize]) -> Result<Self::Output> {
        CudaTensor::like(self.device(), &self.view()?, shape)
    }
}
