//! A device without a driver: PTX text, memory and launches.
#![allow(dead_code, reason = "every test binary uses its own part")]

use cuda::counters::Counters;
use cuda::decode;
use cuda::exec::{self, Fault, Launch, Machine};
use cuda::isa::Kernel;
use cuda::memory::{DeviceMemory, GAP};
use cuda::parse;

pub const GEMM: &str = include_str!("../kernels/gemm.ptx");
pub const GEMM_BF16: &str = include_str!("../kernels/gemm_bf16.ptx");
pub const MIXED: &str = include_str!("../kernels/mixed.ptx");

pub struct Gpu {
    pub memory: DeviceMemory,
    pub kernels: Vec<Kernel>,
    pub machine: Machine,
    launches: u32,
    /// Processor time of the last launch.
    pub seconds: f64,
}

impl Gpu {
    pub fn new(ptx: &str) -> Gpu {
        Gpu::try_new(ptx).unwrap()
    }

    pub fn try_new(ptx: &str) -> Result<Gpu, String> {
        let text = std::sync::Arc::from(ptx);
        let module = parse::parse(&text)?;
        let mut memory = DeviceMemory::new(0, 8 << 30, GAP);
        let mut globals = std::collections::HashMap::new();
        for var in &module.vars {
            if matches!(var.space, parse::Space::Global | parse::Space::Const) {
                let at = memory.allocate(var.size, format!("'{}'", var.name)).unwrap();
                let mut bytes = var.init.clone();
                bytes.resize(var.size as usize, 0);
                memory.write(at, &bytes).unwrap();
                globals.insert(var.name, at);
            }
        }
        let kernels = module
            .functions
            .iter()
            .filter(|f| f.entry)
            .map(|f| decode::link(90, &text, &module, f, &|name| globals.get(name).copied()))
            .collect::<Result<_, _>>()?;
        Ok(Gpu { memory, kernels, machine: Machine::default(), launches: 0, seconds: 0.0 })
    }

    pub fn empty(&mut self, bytes: usize) -> u64 {
        self.memory.allocate(bytes as u64, String::from("the allocation")).unwrap()
    }

    pub fn upload<T: Copy>(&mut self, data: &[T]) -> u64 {
        let len = size_of_val(data);
        let at = self.empty(len);
        // SAFETY: plain numbers are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), len) };
        self.memory.write(at, bytes).unwrap();
        at
    }

    pub fn words(&self, at: u64, n: usize) -> Vec<u32> {
        let bytes = self.memory.read(at, 4 * n as u64).unwrap();
        bytes.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    pub fn floats(&self, at: u64, n: usize) -> Vec<f32> {
        self.words(at, n).into_iter().map(f32::from_bits).collect()
    }

    /// Parameters are given as (bytes, value) in order, aligned to their size.
    pub fn launch(
        &mut self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        params: &[(u32, u64)],
    ) -> Result<Counters, Fault> {
        let mut bytes = Vec::new();
        for &(size, value) in params {
            bytes.resize(bytes.len().next_multiple_of(size as usize), 0);
            bytes.extend(&value.to_le_bytes()[..size as usize]);
        }
        self.launch_bytes(kernel, grid, block, dynamic_shared, &bytes)
    }

    pub fn launch_bytes(
        &mut self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        params: &[u8],
    ) -> Result<Counters, Fault> {
        let kernel = self.kernels.iter().find(|k| k.name == kernel).unwrap();
        assert_eq!(kernel.param_bytes as usize, params.len());
        self.launches += 1;
        let number = self.launches;
        let launch = Launch { kernel, grid, block, dynamic_shared, params, number };
        let begin = cpu_seconds();
        let result = exec::run(&launch, &mut self.memory, self.machine);
        self.seconds = cpu_seconds() - begin;
        result
    }
}

/// Processor time of this thread, which other work on the machine does not disturb much; zero where
/// the kernel does not tell.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let first = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
    first.unwrap_or(0.0) / 1e9
}

/// Counters and seconds of a launch.
pub type Run = Result<(Counters, f64), Fault>;

/// Small integers, so that every sum is exact.
pub fn integers(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = cuda::rng::Rng::new(seed);
    (0..n).map(|_| rng.below(9) as f32 - 4.0).collect()
}

pub fn product(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for x in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + x] * b[x * n + j];
            }
        }
    }
    c
}

/// Runs the f32 matrix product of `ptx` and checks every element.
pub fn gemm(ptx: &str, m: usize, n: usize, k: usize, machine: Machine) -> Run {
    let mut gpu = Gpu::new(ptx);
    gpu.machine = machine;
    let (a, b) = (integers(m * k, 1), integers(k * n, 2));
    let (pa, pb, pc) = (gpu.upload(&a), gpu.upload(&b), gpu.empty(m * n * 4));
    let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
    let params = [(8, pa), (8, pb), (8, pc), (4, m as u64), (4, n as u64), (4, k as u64)];
    let counters = gpu.launch("gemm_f32", grid, [256, 1, 1], 0, &params)?;
    assert_eq!(gpu.floats(pc, m * n), product(&a, &b, m, n, k), "wrong at {m}x{n}x{k}");
    Ok((counters, gpu.seconds))
}

/// Runs the bf16 matrix product of `ptx` and checks every element.
pub fn gemm_bf16(ptx: &str, m: usize, n: usize, k: usize, machine: Machine) -> Run {
    let mut gpu = Gpu::new(ptx);
    gpu.machine = machine;
    let narrow = |x: &[f32]| x.iter().map(|x| (x.to_bits() >> 16) as u16).collect::<Vec<u16>>();
    // Results beyond 256 are not exact in bf16, so the sums are kept small.
    let small =
        |n, seed| integers(n, seed).into_iter().map(|x| (x / 4.0).trunc()).collect::<Vec<f32>>();
    let (a, b) = (small(m * k, 1), small(k * n, 2));
    let (pa, pb) = (gpu.upload(&narrow(&a)), gpu.upload(&narrow(&b)));
    let pc = gpu.empty(m * n * 2);
    let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
    let params = [(8, pa), (8, pb), (8, pc), (4, m as u64), (4, n as u64), (4, k as u64)];
    let shared = 2 * (64 * 40 + 32 * 72) * 2;
    let counters = gpu.launch("gemm_bf16", grid, [128, 1, 1], shared, &params)?;
    let bytes = gpu.memory.read(pc, (m * n * 2) as u64).unwrap();
    let found: Vec<f32> = bytes
        .chunks(2)
        .map(|c| f32::from_bits(u32::from(u16::from_le_bytes(c.try_into().unwrap())) << 16))
        .collect();
    assert_eq!(found, product(&a, &b, m, n, k), "wrong at {m}x{n}x{k}");
    Ok((counters, gpu.seconds))
}
