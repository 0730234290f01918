//! NCCL: sums over the GPUs of several processes.

mod library;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{CUstream, cuStreamQuery, cudaError_enum};
use cudarc::nccl::sys::{ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use library::{Communicator, Functions, check};

use crate::cuda::device::CudaDevice;
use crate::cuda::memory::{Buffer, Plain};
use crate::error::{Error, Result};
use crate::train::{AllReduce, Launch};

/// The most bytes that lie on the device at a time.
const PIECE: usize = 32 << 20;

/// What the workers of one group must all have: made by one of them, and brought to the others by
/// whatever connects them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NcclId([u8; 128]);

impl NcclId {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::AllReduce`] without an NCCL that can be used.
    pub fn new() -> Result<Self> {
        Self::by(&Functions::get()?)
    }

    fn by(functions: &Functions) -> Result<Self> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: it writes an id.
        check("ncclGetUniqueId", unsafe { (functions.get_unique_id)(&mut id) })?;
        Ok(NcclId(id.internal.map(|c| c as u8)))
    }

    /// As bytes, to bring it to others.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0
    }

    /// Of the bytes that another worker's has.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        NcclId(bytes)
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NcclId")
    }
}

/// One of several processes, each with a GPU of its own, that train together: [`AllReduce`] by NCCL, which
/// is looked for on the loader's path when the first one is made.
///
/// Values come from the host and go back there, in pieces through memory of the device. Sums are taken in
/// NCCL's order, which depends on the group and its machines, and are the same on every worker.
///
/// Before each sum the workers compare, by a small one of its own, how many values of which type they
/// bring. A worker that is gone, brings others, fails on its device, or does not come within the timeout
/// is an error to all, and so is every sum after that.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::Duration;
/// use pointwise::train::{self, Launch, NcclWorker, Params};
/// # use pointwise::Pointwise;
/// # let layer = Pointwise::new(ndarray::Array2::<f32>::ones((4, 4)));
///
/// let launch = Launch::from_env()?; // of torchrun, mpirun or srun
/// let device = launch.device()?;
/// let worker = Arc::new(NcclWorker::launched(&launch, &device, Duration::from_secs(60))?);
/// let mut params = Params::new(&layer, &device.into())?;
/// params.set_all_reduce(Some(worker.clone())); // statistics of all workers' samples
/// let mut grads = params.grads();
/// // … forward, backward …
/// train::all_reduce([&mut grads], &*worker, train::BUCKET)?;
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Debug)]
pub struct NcclWorker {
    rank: usize,
    workers: usize,
    group: Mutex<Group<OnDevice>>,
}

impl NcclWorker {
    /// Joins a group of `workers`, as the one with the number `rank`; returns when all are there. Sums run
    /// on a stream of their own of the device.
    ///
    /// # Errors
    /// [`Error::AllReduce`] without an NCCL that can be used, or if not all of them come within
    /// `timeout`; [`Error::ParameterValue`] for a number that is none of the group; a device's own.
    pub fn new(
        device: &CudaDevice,
        id: NcclId,
        rank: usize,
        workers: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let functions = Functions::get()?;
        let device = device.with_new_stream()?;
        let communicator = {
            // A communicator belongs to the device that is current.
            let _bound = device.bind()?;
            Communicator::new(functions, id, rank, workers, timeout)?
        };
        let group = Group { communicator, values: OnDevice { memory: None, device } };
        Ok(NcclWorker { rank, workers, group: Mutex::new(group) })
    }

    /// Joins the group of all processes of a launch, whose worker 0 hands out the id. Both may take as long
    /// as `timeout`.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::AllReduce`] if worker 0 is not reached within `timeout`.
    pub fn launched(launch: &Launch, device: &CudaDevice, timeout: Duration) -> Result<Self> {
        // Also found missing where the id is not made.
        Functions::get()?;
        let own = if launch.rank == 0 { Some(NcclId::new()?.to_bytes()) } else { None };
        let id = NcclId::from_bytes(launch.share(own, timeout)?);
        Self::new(device, id, launch.rank, launch.workers, timeout)
    }

    /// The number of this worker, from zero.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers
    }

    fn group(&self) -> MutexGuard<'_, Group<OnDevice>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where NCCL finds values.
trait Values {
    /// Copies values there; their address.
    fn upload<T: Plain>(&mut self, values: &[T]) -> Result<u64>;
    /// Makes the device current that they are on, until the result is dropped.
    fn bind(&self) -> Result<impl Sized>;
    /// The stream on which NCCL reads and writes them.
    fn stream(&self) -> CUstream;
    /// Whether all is done that was queued on the stream.
    fn done(&self) -> Result<bool>;
    /// Copies back what was uploaded last.
    fn download<T: Plain>(&self, values: &mut [T]) -> Result<()>;
}

struct OnDevice {
    memory: Option<Buffer>,
    device: CudaDevice,
}

impl fmt::Debug for OnDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.device)
    }
}

impl Values for OnDevice {
    fn upload<T: Plain>(&mut self, values: &[T]) -> Result<u64> {
        let OnDevice { memory, device } = self;
        let bytes = size_of_val(values);
        let buffer = match memory {
            Some(buffer) if buffer.bytes() >= bytes => buffer,
            _ => {
                memory.insert(Buffer::new(device, "sums over workers", bytes.next_power_of_two())?)
            }
        };
        buffer.upload(values)?;
        Ok(buffer.address())
    }

    fn bind(&self) -> Result<impl Sized> {
        self.device.bind()
    }

    fn stream(&self) -> CUstream {
        self.device.stream().cu_stream()
    }

    fn done(&self) -> Result<bool> {
        // SAFETY: the device keeps its stream alive.
        match unsafe { cuStreamQuery(self.stream()) } {
            cudaError_enum::CUDA_SUCCESS => Ok(true),
            cudaError_enum::CUDA_ERROR_NOT_READY => Ok(false),
            code => Err(self.device.failed("cuStreamQuery")(cudarc::driver::DriverError(code))),
        }
    }

    fn download<T: Plain>(&self, values: &mut [T]) -> Result<()> {
        self.memory.as_ref().map_or(Ok(()), |buffer| buffer.download(values))
    }
}

/// A worker's part of a group.
#[derive(Debug)]
struct Group<V> {
    /// Dropped first: it uses what follows.
    communicator: Communicator,
    values: V,
}

impl<V: Values> Group<V> {
    /// Replaces values of `dtype` by their sums over the group. After an error there are no more: the next
    /// sum would meet what the others have begun.
    fn sum<T: Plain>(&mut self, values: &mut [T], dtype: ncclDataType_t) -> Result<()> {
        self.communicator.usable()?;
        let double = dtype == ncclDataType_t::ncclFloat64;
        self.agree(Brought { count: values.len(), double })?;
        let mut pieces = values.chunks_mut(PIECE / size_of::<T>());
        pieces.try_for_each(|piece| self.reduce(piece, dtype, ncclRedOp_t::ncclSum))
    }

    /// That all workers bring the same: of the least and the most, each knows both.
    fn agree(&mut self, own: Brought) -> Result<()> {
        let number = own.number();
        // The complement of the largest complement is the least.
        let mut numbers = [number, !number];
        self.reduce(&mut numbers, ncclDataType_t::ncclUint64, ncclRedOp_t::ncclMax)?;
        let (least, most) = (!numbers[1], numbers[0]);
        if (least, most) == (number, number) {
            return Ok(());
        }
        let [least, most] = [least, most].map(Brought::of_number);
        let reason = format!(
            "workers bring different values to a sum: this one {own}, all of them from {least} to {most}"
        );
        // Not aborted: all of them are to read the numbers, and begin nothing more.
        self.communicator.broken = Some(reason.clone());
        Err(Error::AllReduce { reason })
    }

    /// Replaces values by what they are reduced to over the group; aborts if that fails.
    fn reduce<T: Plain>(
        &mut self,
        values: &mut [T],
        dtype: ncclDataType_t,
        op: ncclRedOp_t,
    ) -> Result<()> {
        let Group { communicator, values: on } = self;
        let mut reduce = || {
            let address = on.upload(values)?;
            let _bound = on.bind()?;
            let of = (values.len(), dtype, op);
            communicator.all_reduce(address, of, on.stream(), || on.done())?;
            on.download(values)
        };
        reduce().inspect_err(|error| communicator.give_up(error))
    }
}

/// What a worker brings to a sum.
#[derive(Clone, Copy)]
struct Brought {
    count: usize,
    /// Values of f64, not f32.
    double: bool,
}

impl Brought {
    /// No slice has so many values that this overflows.
    fn number(self) -> u64 {
        2 * self.count as u64 + u64::from(self.double)
    }

    fn of_number(number: u64) -> Self {
        Brought { count: (number / 2) as usize, double: number % 2 == 1 }
    }
}

impl fmt::Display for Brought {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.count, if self.double { "f64" } else { "f32" })
    }
}

impl AllReduce for NcclWorker {
    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.group().sum(values, ncclDataType_t::ncclFloat64)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.group().sum(values, ncclDataType_t::ncclFloat32)
    }
}

#[cfg(test)]
mod tests;
