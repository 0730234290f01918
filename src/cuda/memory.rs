//! Memory of a device, allocated and freed in stream order, and what is copied there as bytes.

use cudarc::driver::{CudaContext, CudaStream, result};

use super::device::CudaDevice;
use crate::error::Result;

/// An allocation on a device, freed in stream order.
pub(super) struct Buffer {
    address: u64,
    bytes: usize,
    device: CudaDevice,
}

impl Buffer {
    /// Fresh memory, its contents unspecified; no bytes are no allocation. `what` it is for, an
    /// error says.
    pub(super) fn new(device: &CudaDevice, what: &'static str, bytes: usize) -> Result<Self> {
        let mut buffer = Buffer { address: 0, bytes, device: device.clone() };
        if bytes > 0 {
            let _bound = device.bind()?;
            buffer.address = allocate(device, what, bytes)?;
        }
        Ok(buffer)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Puts what frees it, on the stream that it is of, behind what `user`'s stream still runs.
    pub(super) fn outlive(&self, user: &CudaDevice) {
        let home = self.device.stream().cu_stream().addr();
        // SAFETY: this handle keeps its stream alive.
        if unsafe { user.make_wait(home) }.is_err() {
            // Nothing orders the two, so the user's stream must be done. An error of this, too, is the
            // echo of an earlier one.
            let _ = user.synchronize();
        }
    }

    /// Copies from the host and waits for it, so that `from` may go at once.
    pub(super) fn upload<T: Plain>(&mut self, from: &[T]) -> Result<()> {
        assert!(size_of_val(from) <= self.bytes, "a copy stays within its allocation");
        if from.is_empty() {
            return Ok(());
        }
        let _bound = self.device.bind()?;
        let stream = self.device.stream().cu_stream();
        // SAFETY: within the allocation; `from` lives until the copy is done, two lines below.
        unsafe { result::memcpy_htod_async(self.address, from, stream) }
            .map_err(self.device.failed("cuMemcpyHtoDAsync"))?;
        self.device.synchronize()
    }

    /// Copies to the host, after what is queued on the stream, and waits for it.
    pub(super) fn download<T: Plain>(&self, to: &mut [T]) -> Result<()> {
        self.download_from(0, to)
    }

    /// The same from so many bytes behind the first one on.
    pub(super) fn download_from<T: Plain>(&self, first: u64, to: &mut [T]) -> Result<()> {
        let end = first.saturating_add(size_of_val(to) as u64);
        assert!(end <= self.bytes as u64, "a copy stays within its allocation");
        if to.is_empty() {
            return Ok(());
        }
        let _bound = self.device.bind()?;
        let stream = self.device.stream().cu_stream();
        // SAFETY: within the allocation; `to` is borrowed until the copy is done, two lines below,
        // and any bits are a value of a plain type.
        unsafe { result::memcpy_dtoh_async(to, self.address + first, stream) }
            .map_err(self.device.failed("cuMemcpyDtoHAsync"))?;
        self.device.synchronize()
    }

    /// Sets every byte, in stream order.
    pub(super) fn fill(&mut self, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let _bound = self.device.bind()?;
        let stream = self.device.stream().cu_stream();
        // SAFETY: the whole allocation and no more.
        unsafe { result::memset_d8_async(self.address, byte, self.bytes, stream) }
            .map_err(self.device.failed("cuMemsetD8Async"))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        // A failure here is the echo of an earlier one, and there is nobody to tell: the next call
        // on the context reports it again.
        let Ok(_bound) = self.device.bind() else {
            return;
        };
        // SAFETY: allocated in `new`, and not used by anyone after work that is already queued.
        unsafe { free(self.device.context(), self.device.stream(), self.address) };
    }
}

/// Fresh memory in the order of the handle's stream; `what` it is for, an error says. The context is
/// bound.
pub(super) fn allocate(device: &CudaDevice, what: &'static str, bytes: usize) -> Result<u64> {
    // SAFETY: a plain allocation, which only `free` frees.
    unsafe {
        if device.has_pools() {
            result::malloc_async(device.stream().cu_stream(), bytes).map_err(device.no_memory(
                "cuMemAllocAsync",
                what,
                bytes,
            ))
        } else {
            result::malloc_sync(bytes).map_err(device.no_memory("cuMemAlloc", what, bytes))
        }
    }
}

/// Frees after what is queued on the stream. The context is bound. A failure is the echo of an
/// earlier one, and there is nobody to tell: the next call on the context reports it again.
///
/// # Safety
/// The address is one that [`allocate`] gave, and nobody uses it after work that is queued already.
pub(super) unsafe fn free(context: &CudaContext, stream: &CudaStream, address: u64) {
    let stream = stream.cu_stream();
    // SAFETY: the caller's promise.
    let _ = unsafe {
        if context.has_async_alloc() {
            result::free_async(address, stream)
        } else {
            result::stream::synchronize(stream).and_then(|()| result::free_sync(address))
        }
    };
}

/// Types whose every bit pattern is a value and that hold no references: safe to copy as bytes.
///
/// # Safety
/// As said.
pub(super) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: plain numbers.
unsafe impl Plain for i8 {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
// SAFETY: plain numbers.
unsafe impl Plain for f64 {}
// SAFETY: plain numbers.
unsafe impl Plain for u64 {}
// SAFETY: plain numbers.
unsafe impl Plain for half::f16 {}
// SAFETY: plain numbers.
unsafe impl Plain for half::bf16 {}
// SAFETY: plain numbers.
unsafe impl Plain for float8::F8E4M3 {}
// SAFETY: plain numbers.
unsafe impl Plain for float8::F8E5M2 {}
