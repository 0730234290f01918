//! Where a layer runs.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::cost::RoofMeter;
use crate::cpu::{self, CpuDevice};
#[cfg(feature = "cuda")]
use crate::cuda::CudaDevice;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The environment variable that steers [`Device::best`].
const DEVICE_VARIABLE: &str = "POINTWISE_DEVICE";

/// A device that layers are prepared for. Cheap to clone; `Send + Sync`.
#[derive(Clone, Debug)]
pub struct Device {
    kind: Kind,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Cpu(CpuDevice),
    #[cfg(feature = "cuda")]
    Cuda(CudaDevice),
    /// What `POINTWISE_DEVICE` asked for is not a device's name; preparing a layer says so.
    Unknown(Arc<str>),
}

impl Device {
    /// The fastest device that is usable: the first CUDA device if the crate was built with
    /// `cuda` and one is there, else the CPU.
    ///
    /// `POINTWISE_DEVICE=cpu`, `cuda` or `cuda:1` steers the choice, which falls back to the CPU
    /// if that device is not usable ([`Device::cuda`] tells why). A value that names no device is
    /// reported by the first [`prepare`](crate::Pointwise::prepare).
    pub fn best() -> Device {
        let wanted = std::env::var_os(DEVICE_VARIABLE).unwrap_or_default();
        let wanted = wanted.to_string_lossy();
        match if wanted.is_empty() { Some(Name::Cuda(0)) } else { parse(&wanted) } {
            Some(Name::Cpu) => Device::cpu(),
            Some(Name::Cuda(ordinal)) => Device::cuda(ordinal).unwrap_or_else(|_| Device::cpu()),
            None => Device { kind: Kind::Unknown(wanted.as_ref().into()) },
        }
    }

    /// The CPU, with helpers from rayon's current pool (the global one, unless the caller is
    /// itself inside a pool). `POINTWISE_CPU_ISA=avx512|avx2|portable` forces an instruction set.
    pub fn cpu() -> Device {
        Device { kind: Kind::Cpu(CpuDevice::default()) }
    }

    /// The CPU, with helpers from a pool of the caller's.
    pub fn cpu_with_pool(pool: Arc<rayon::ThreadPool>) -> Device {
        Device { kind: Kind::Cpu(CpuDevice::with_pool(pool)) }
    }

    /// At most `threads` threads per call, the caller among them; no effect on a GPU. One keeps
    /// everything on the caller. Results do not depend on it.
    pub fn threads(mut self, threads: usize) -> Device {
        if let Kind::Cpu(cpu) = &mut self.kind {
            cpu.limit_threads(threads);
        }
        self
    }

    /// The CUDA device with this ordinal.
    ///
    /// # Errors
    /// [`Error::NoDevice`] with the reason: the crate was built without the feature `cuda`, there
    /// is no driver, it does not start, it is too old, or the device is missing or unsupported.
    pub fn cuda(ordinal: usize) -> Result<Device> {
        #[cfg(feature = "cuda")]
        {
            Ok(Device { kind: Kind::Cuda(CudaDevice::open(ordinal)?) })
        }
        #[cfg(not(feature = "cuda"))]
        {
            Err(Error::NoDevice {
                device: format!("cuda:{ordinal}"),
                reason: "pointwise was built without the feature `cuda`".into(),
            })
        }
    }

    /// What measures the device's ceilings, with its threads, for a problem that touches `bytes`
    /// bytes ([`Cost::bytes`](crate::Cost::bytes)): the bandwidth is that of the memory level that
    /// holds them. On the CPU it keeps as many bytes allocated, at most 256 MiB.
    ///
    /// # Errors
    /// [`Error::Environment`] if `POINTWISE_DEVICE` names no device.
    pub fn roof_meter(&self, bytes: usize) -> Result<RoofMeter> {
        self.roof_meter_as(DType::F32, bytes)
    }

    /// As [`roof_meter`](Self::roof_meter), for layers whose tensors have this type: in bf16 the
    /// multiply-adds are those of pairs of bf16 where the CPU has them (AVX512-BF16).
    ///
    /// # Errors
    /// As [`roof_meter`](Self::roof_meter).
    pub fn roof_meter_as(&self, dtype: DType, bytes: usize) -> Result<RoofMeter> {
        self.meter(cpu::Products::of(dtype), bytes)
    }

    /// As [`roof_meter`](Self::roof_meter), for layers of 8-bit integers: on the CPU the multiply-adds
    /// are the fastest of bytes that it has, those of AVX512-VNNI or of pairs widened to 16 bits; on CUDA
    /// those of tensor cores.
    ///
    /// # Errors
    /// As [`roof_meter`](Self::roof_meter).
    pub fn roof_meter_int8(&self, bytes: usize) -> Result<RoofMeter> {
        #[cfg(feature = "cuda")]
        if let Kind::Cuda(cuda) = self.kind()? {
            return Ok(RoofMeter::computed(cuda.facts().int8_roof()));
        }
        self.meter(cpu::Products::Int8, bytes)
    }

    fn meter(&self, products: cpu::Products, bytes: usize) -> Result<RoofMeter> {
        Ok(match self.kind()? {
            Kind::Cpu(cpu) => RoofMeter::cpu(cpu::Meter::new(cpu, products, bytes)),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => RoofMeter::computed(cuda.facts().roof),
            Kind::Unknown(_) => unreachable!("Device::kind reports it"),
        })
    }

    pub(crate) fn kind(&self) -> Result<&Kind> {
        match &self.kind {
            Kind::Unknown(value) => Err(Error::Environment {
                variable: DEVICE_VARIABLE,
                value: value.to_string(),
                reason: "expected cpu, cuda or cuda:N".into(),
            }),
            kind => Ok(kind),
        }
    }
}

enum Name {
    Cpu,
    Cuda(usize),
}

fn parse(name: &str) -> Option<Name> {
    match name {
        "cpu" => Some(Name::Cpu),
        "cuda" => Some(Name::Cuda(0)),
        _ => name.strip_prefix("cuda:")?.parse().ok().map(Name::Cuda),
    }
}

/// `cpu`, `cuda` or `cuda:1`: exactly that device, with no falling back.
impl FromStr for Device {
    type Err = Error;

    fn from_str(name: &str) -> Result<Device> {
        match parse(name) {
            Some(Name::Cpu) => Ok(Device::cpu()),
            Some(Name::Cuda(ordinal)) => Device::cuda(ordinal),
            None => Err(Error::NoDevice {
                device: name.into(),
                reason: "devices are called cpu, cuda or cuda:N".into(),
            }),
        }
    }
}

/// Layers prepared for it run on the handle's stream.
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
impl From<CudaDevice> for Device {
    fn from(device: CudaDevice) -> Self {
        Device { kind: Kind::Cuda(device) }
    }
}

/// `cpu (avx512, 2 threads)`, `cuda:0 (NVIDIA H200)`.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Cpu(cpu) => cpu.fmt(f),
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => cuda.fmt(f),
            Kind::Unknown(name) => write!(f, "{name} (unknown)"),
        }
    }
}
