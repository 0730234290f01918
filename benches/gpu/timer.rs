//! Times calls on a device's stream.

use std::time::Instant;

use pointwise::cudarc::driver::{CudaEvent, DriverError, result, sys};
use pointwise::init::Init;
use pointwise::{CudaDevice, CudaTensor, DeviceElement, Pointwise};

use crate::Result;

const RUNS: usize = 30;
/// Overwriting this many times L2 leaves nothing of the tensors in it. It also keeps the GPU busy
/// for longer than the host needs to queue the call.
const FLUSH: i32 = 8;

pub struct Timer {
    pub device: CudaDevice,
    flush: CudaTensor<u8>,
}

impl Timer {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let l2 = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let l2 = device.stream().context().attribute(l2).map_err(code)?;
        let flush = CudaTensor::zeros(device, &[(FLUSH * l2) as usize])?;
        Ok(Timer { device: device.clone(), flush })
    }

    /// Fills a tensor with ones, which are no number in any type of floats, so that what a kernel does
    /// not write is found.
    pub fn blank<T: DeviceElement>(&self, tensor: &mut CudaTensor<T>) -> Result<()> {
        self.overwrite(tensor, 0xff)
    }

    fn overwrite<T: DeviceElement>(&self, tensor: &CudaTensor<T>, byte: u8) -> Result<()> {
        let bytes = tensor.shape().iter().product::<usize>() * size_of::<T>();
        let stream = self.device.stream().cu_stream();
        // SAFETY: the whole of a tensor, in the order of its stream; the one that is only borrowed
        // is read by nobody.
        unsafe { result::memset_d8_async(tensor.address(), byte, bytes, stream) }.map_err(code)?;
        Ok(())
    }

    /// Median and minimum in microseconds.
    pub fn time(&self, mut call: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
        let stream = self.device.stream();
        let event = || {
            let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
            stream.context().new_event(Some(timed)).map_err(code)
        };
        (0..3).try_for_each(|_| call())?;
        let mut pairs = Vec::new();
        for _ in 0..RUNS {
            pairs.push((event()?, event()?));
        }
        for (begin, end) in &pairs {
            self.overwrite(&self.flush, 0)?;
            begin.record(stream).map_err(code)?;
            call()?;
            end.record(stream).map_err(code)?;
        }
        let elapsed = |(begin, end): &(_, _)| CudaEvent::elapsed_ms(begin, end).map_err(code);
        let mut times = pairs.iter().map(elapsed).collect::<Result<Vec<f32>, _>>()?;
        times.sort_by(f32::total_cmp);
        Ok((f64::from(times[RUNS / 2]) * 1e3, f64::from(times[0]) * 1e3))
    }
}

/// What a call on device tensors takes of the thread that makes it, in microseconds: queued, not run.
pub fn host_time(device: &CudaDevice) -> Result<f64> {
    /// Fewer than wait in a stream before a call blocks.
    const CALLS: usize = 100;
    let layer = Pointwise::new(Init::pytorch_default().weight(64, 64, 1)?).relu();
    let layer = layer.prepare(&device.clone().into())?;
    let src = CudaTensor::<f32>::zeros(device, &[1, 64, 7, 7])?;
    let mut dst = layer.forward(&src)?;
    let mut times = Vec::new();
    for _ in 0..10 {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            layer.forward_into(&src, &mut dst)?;
        }
        times.push(start.elapsed().as_secs_f64() * 1e6 / CALLS as f64);
    }
    device.synchronize()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn code(error: DriverError) -> String {
    format!("{:?}", error.0)
}
