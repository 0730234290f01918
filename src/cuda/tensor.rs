//! Tensors in device memory: those that users own, and the staging of host arrays.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array, ArrayD, ArrayView, Dimension, IxDyn, ShapeBuilder};

use super::device::{Buffer, CudaDevice, Plain};
use super::launch::Tensor;
use crate::error::{Error, Result};
use crate::problem::Operand;
use crate::tensor::{
    AsTensor, AsTensorMut, MAX_RANK, MAX_SPATIAL, Place, Source, TensorMut, TensorRef,
    checked_product, strides_like, try_zeros,
};

/// Element types that device tensors hold: `f32`, [`half::f16`], [`half::bf16`].
#[allow(private_bounds)]
pub trait DeviceElement: Plain + Default {}

impl DeviceElement for f32 {}
impl DeviceElement for half::f16 {}
impl DeviceElement for half::bf16 {}

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
        let memory = Buffer::new(device, len * size_of::<T>())?;
        Ok(CudaTensor { memory, shape: shape.to_vec(), strides, element: PhantomData })
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
    /// [`Error::Rank`], and [`Error::Shape`] if there are no such channels.
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
        if range.start <= range.end && self.shape.get(1).is_none_or(|&c| range.end <= c) {
            return Ok(());
        }
        let mut expected = self.shape.clone();
        expected[1] = range.end;
        Err(Error::Shape {
            tensor: "a tensor with these channels",
            expected,
            got: self.shape.clone(),
        })
    }
}

impl<T> fmt::Debug for CudaTensor<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.memory.device();
        write!(f, "CudaTensor({:?}, strides {:?}, {device})", self.shape, self.strides)
    }
}

impl AsTensor for CudaTensor<f32> {
    fn as_tensor(&self) -> Result<TensorRef<'_>> {
        self.view()
    }
}

impl AsTensorMut for CudaTensor<f32> {
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_>> {
        self.view_mut()
    }
}

/// A result on the same device and stream.
impl Source for CudaTensor<f32> {
    type Output = CudaTensor<f32>;

    fn allocate(&self, shape: &[usize]) -> Result<Self::Output> {
        let strides = strides_like(&self.view()?, shape);
        let mut order: Vec<usize> = (0..shape.len()).collect();
        // Axes of length one share their stride with the next, and stay in front of it.
        order.sort_by_key(|&axis| (std::cmp::Reverse(strides[axis]), shape[axis] != 1));
        let mut tensor = CudaTensor::uninitialized(self.device(), shape, &order)?;
        tensor.strides.copy_from_slice(&strides[..shape.len()]);
        Ok(tensor)
    }
}

/// A host operand's stand-in on the device: dense, with the axes in the host's order.
pub(super) struct Staged {
    memory: Buffer,
    layout: Dense,
}

impl Staged {
    /// Copies an operand to the device.
    pub(super) fn upload(device: &CudaDevice, host: &Operand, extents: [u64; 4]) -> Result<Self> {
        let mut staged = Self::empty(device, host, host.channels, extents)?;
        let layout = &staged.layout;
        if layout.is_dense_on_host() {
            // SAFETY: the problem's view vouches for these elements, which have no gaps.
            let values = unsafe { std::slice::from_raw_parts(host.ptr, layout.len) };
            staged.memory.upload(values)?;
        } else {
            let mut values = layout.host_values()?;
            let mut slots = values.iter_mut();
            layout.for_each(|offset| {
                if let Some(slot) = slots.next() {
                    // SAFETY: the problem's view vouches for every element that the strides reach.
                    *slot = unsafe { *host.ptr.wrapping_offset(offset) };
                }
            });
            staged.memory.upload(&values)?;
        }
        Ok(staged)
    }

    /// Room for an operand.
    pub(super) fn empty(
        device: &CudaDevice,
        host: &Operand,
        channels: usize,
        extents: [u64; 4],
    ) -> Result<Self> {
        let layout = Dense::of(host, channels, extents)?;
        Ok(Staged { memory: Buffer::new(device, layout.len * size_of::<f32>())?, layout })
    }

    /// Copies back to the host operand that [`empty`](Self::empty) was made for.
    ///
    /// # Safety
    /// Every element of `host` must be writable, and nobody else's.
    pub(super) unsafe fn download(&self, host: &Operand) -> Result<()> {
        let to = host.ptr.cast_mut();
        if self.layout.is_dense_on_host() {
            // SAFETY: the caller's promise, for elements without gaps.
            let values = unsafe { std::slice::from_raw_parts_mut(to, self.layout.len) };
            return self.memory.download(values);
        }
        let mut values = self.layout.host_values()?;
        self.memory.download(&mut values)?;
        let mut values = values.into_iter();
        self.layout.for_each(|offset| {
            if let Some(value) = values.next() {
                // SAFETY: the caller's promise.
                unsafe { *to.wrapping_offset(offset) = value };
            }
        });
        Ok(())
    }

    pub(super) fn tensor(&self) -> Tensor {
        let [sample, channel, d, h, w] = self.layout.device;
        Tensor { address: self.memory.address(), channel, axes: [sample, d, h, w] }
    }
}

/// How a strided host tensor `[n, c, d, h, w]` is laid out without gaps.
struct Dense {
    /// Outermost first: length and host stride.
    axes: [(usize, isize); MAX_RANK],
    /// Strides of `[n, c, d, h, w]` in the dense form.
    device: [i64; MAX_RANK],
    len: usize,
}

impl Dense {
    fn of(host: &Operand, channels: usize, extents: [u64; 4]) -> Result<Self> {
        let mut lengths = [1; MAX_RANK];
        let mut strides = [0; MAX_RANK];
        (lengths[0], strides[0]) = (extents[0] as usize, host.sample);
        (lengths[1], strides[1]) = (channels, host.channel);
        for axis in 0..MAX_SPATIAL {
            lengths[2 + axis] = extents[1 + axis] as usize;
            strides[2 + axis] = host.spatial[axis];
        }
        let len = checked_product("a tensor's size", &lengths)?;
        let mut order = [0, 1, 2, 3, 4];
        order.sort_by_key(|&axis| std::cmp::Reverse(strides[axis].unsigned_abs()));
        let mut device = [0; MAX_RANK];
        let mut next = 1;
        for &axis in order.iter().rev() {
            device[axis] = next;
            next *= lengths[axis] as i64;
        }
        Ok(Dense { axes: order.map(|axis| (lengths[axis], strides[axis])), device, len })
    }

    /// Whether the host's elements lie in this very order, without gaps.
    fn is_dense_on_host(&self) -> bool {
        let mut next = 1;
        self.axes.iter().rev().filter(|&&(len, _)| len != 1).all(|&(len, stride)| {
            let fits = stride == next;
            next *= len as isize;
            fits
        })
    }

    /// Room on the host for the dense form.
    fn host_values(&self) -> Result<Vec<f32>> {
        try_zeros("a tensor's dense copy", &self.axes.map(|(len, _)| len))
    }

    /// The host's offsets, in the dense order.
    fn for_each(&self, mut visit: impl FnMut(isize)) {
        let [a, b, c, d, e] = self.axes;
        for i in 0..a.0 as isize {
            for j in 0..b.0 as isize {
                for k in 0..c.0 as isize {
                    for l in 0..d.0 as isize {
                        let row = i * a.1 + j * b.1 + k * c.1 + l * d.1;
                        (0..e.0 as isize).for_each(|m| visit(row + m * e.1));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operand(data: &[f32], strides: [isize; 5]) -> Operand {
        let [sample, channel, d, h, w] = strides;
        let spatial = [d, h, w];
        Operand { ptr: data.as_ptr(), sample, channel, channels: 3, spatial, stream: None }
    }

    #[test]
    fn host_tensors_are_staged_in_their_own_order() {
        // Channels last, dense.
        let data = vec![0.0; 2 * 3 * 20];
        let dense = Dense::of(&operand(&data, [60, 1, 60, 15, 3]), 3, [2, 1, 4, 5]).unwrap();
        assert!(dense.is_dense_on_host());
        assert_eq!(dense.device, [60, 1, 60, 15, 3]);
        let mut offsets = Vec::new();
        dense.for_each(|offset| offsets.push(offset));
        assert_eq!(offsets, (0..120).collect::<Vec<_>>());
    }

    #[test]
    fn gaps_and_negative_strides_are_gathered() {
        let data = vec![0.0; 64];
        let dense = Dense::of(&operand(&data, [0, 20, 0, -5, 2]), 3, [1, 1, 3, 2]).unwrap();
        assert!(!dense.is_dense_on_host());
        assert_eq!([dense.device[1], dense.device[3], dense.device[4]], [6, 2, 1]);
        let mut offsets = Vec::new();
        dense.for_each(|offset| offsets.push(offset));
        let expected = (0..18).map(|i| i / 6 * 20 - i % 6 / 2 * 5 + i % 2 * 2);
        assert_eq!(offsets, expected.collect::<Vec<isize>>());
    }
}
