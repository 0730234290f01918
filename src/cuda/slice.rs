//! Device memory that cudarc owns, borrowed as tensors.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceSlice, SyncOnDrop};

use super::device::{Bound, CudaDevice, expect_primary};
use super::tensor::{CudaTensor, DeviceElement};
use crate::error::Result;
use crate::tensor::{AsTensor, AsTensorMut, Place, Source, TensorMut, TensorRef};

/// Memory of cudarc's (`CudaView`, `CudaSlice::as_view`), borrowed to read as a tensor
/// `[n, c, …spatial]`.
///
/// Layers wait for the slice's stream and make it wait for them, and cudarc's own tracking of reads
/// and writes sees the access. A slice of the per-thread default stream belongs to the stream of
/// the thread that makes the call.
///
/// ```no_run
/// use ndarray::Array2;
/// use pointwise::cudarc::driver::CudaContext;
/// use pointwise::{CudaDevice, CudaSliceMut, CudaSliceRef, Pointwise};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let src = stream.clone_htod(&vec![1.0f32; 2 * 3 * 100])?;
/// let mut dst = stream.alloc_zeros::<f32>(2 * 8 * 100)?;
/// let gpu = CudaDevice::from_stream(stream.clone())?;
/// let layer = Pointwise::new(Array2::ones((8, 3))).relu().prepare(&gpu.into())?;
/// layer.forward_into(
///     &CudaSliceRef::new(src.as_view(), 0, &[2, 3, 100], &[300, 100, 1])?,
///     &mut CudaSliceMut::new(dst.as_view_mut(), 0, &[2, 8, 100], &[800, 100, 1])?,
/// )?;
/// assert_eq!(stream.clone_dtoh(&dst)?, [3.0; 1600]);
/// # Ok(())
/// # }
/// ```
pub struct CudaSliceRef<'a, T = f32> {
    view: TensorRef<'a, T>,
    /// Goes before the stream that it uses.
    _read: Access<'a>,
    stream: Arc<CudaStream>,
}

impl<'a, T: DeviceElement> CudaSliceRef<'a, T> {
    /// Lays a shape and strides (in elements, any sign) over a slice; element `[0, …, 0]` is its
    /// element `offset`.
    ///
    /// # Errors
    /// As [`TensorRef::from_slice`]; [`Error::Unsupported`](crate::Error::Unsupported) for a slice
    /// of a context other than the device's primary one.
    pub fn new(
        slice: CudaView<'a, T>,
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let place = primary(&slice)?;
        let (len, stream) = (slice.len(), slice.stream().clone());
        // SAFETY: kept by what keeps the access, and longer.
        let lent: &'a CudaStream = unsafe { &*Arc::as_ptr(&stream) };
        let read = Access::begin(|| slice.view_ptr(lent))?;
        let first = read.first();
        // SAFETY: the slice's own memory, borrowed with it.
        let view = unsafe { TensorRef::within(first, len, offset, place, shape, strides)? };
        Ok(CudaSliceRef { view: view.on_stream(handle(&stream)), _read: read, stream })
    }
}

/// As [`CudaSliceRef`], borrowed to write (`CudaViewMut`, `CudaSlice::as_view_mut`).
pub struct CudaSliceMut<'a, T = f32> {
    view: TensorMut<'a, T>,
    /// Goes before the stream that it uses.
    _write: Access<'a>,
    _stream: Arc<CudaStream>,
}

impl<'a, T: DeviceElement> CudaSliceMut<'a, T> {
    /// Lays a shape and strides (in elements, any sign) over a slice; element `[0, …, 0]` is its
    /// element `offset`.
    ///
    /// # Errors
    /// As [`CudaSliceRef::new`], and [`Error::Overlap`](crate::Error::Overlap) if two positions
    /// share an element.
    pub fn new(
        slice: CudaViewMut<'a, T>,
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let place = primary(&slice)?;
        let (len, stream) = (slice.len(), slice.stream().clone());
        // SAFETY: kept by what keeps the access, and longer.
        let lent: &'a CudaStream = unsafe { &*Arc::as_ptr(&stream) };
        let write = Access::begin(|| slice.view_ptr_mut(lent))?;
        let first = write.first::<T>().cast_mut();
        // SAFETY: the slice's own memory, exclusively borrowed with it.
        let view = unsafe { TensorMut::within(first, len, offset, place, shape, strides)? };
        Ok(CudaSliceMut { view: view.on_stream(handle(&stream)), _write: write, _stream: stream })
    }
}

fn handle(stream: &CudaStream) -> usize {
    stream.cu_stream().addr()
}

fn primary<T>(slice: &impl DeviceSlice<T>) -> Result<Place> {
    let context = slice.stream().context();
    expect_primary(context, "memory")?;
    Ok(Place::Cuda(context.ordinal()))
}

/// An access that cudarc is told the beginning and the end of. It binds the slice's context for
/// that, which is not left so.
struct Access<'a> {
    address: u64,
    end: ManuallyDrop<SyncOnDrop<'a>>,
}

impl<'a> Access<'a> {
    fn begin(begin: impl FnOnce() -> (u64, SyncOnDrop<'a>)) -> Result<Self> {
        let _kept = Bound::keep()?;
        let (address, end) = begin();
        Ok(Access { address, end: ManuallyDrop::new(end) })
    }

    fn first<T>(&self) -> *const T {
        std::ptr::without_provenance(self.address as usize)
    }
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        let _kept = Bound::keep();
        // SAFETY: nobody uses it after this.
        unsafe { ManuallyDrop::drop(&mut self.end) };
    }
}

impl<T: DeviceElement> AsTensor<T> for CudaSliceRef<'_, T> {
    fn as_tensor(&self) -> Result<TensorRef<'_, T>> {
        Ok(self.view)
    }
}

impl<T: DeviceElement> AsTensorMut<T> for CudaSliceMut<'_, T> {
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_, T>> {
        Ok(self.view.reborrow())
    }
}

/// A result on the slice's stream; none for the per-thread default stream.
impl<T: DeviceElement> Source<T> for CudaSliceRef<'_, T> {
    type Output = CudaTensor<T>;

    fn allocate(&self, shape: &[usize]) -> Result<Self::Output> {
        CudaTensor::like(&CudaDevice::from_stream(self.stream.clone())?, &self.view, shape)
    }
}

impl<T> fmt::Debug for CudaSliceRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaSliceRef({:?})", self.view)
    }
}

impl<T> fmt::Debug for CudaSliceMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaSliceMut({:?})", self.view)
    }
}
