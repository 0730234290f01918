//! One pass of a chain of stages over its values: parameters of the launches, and what they sum.

mod norm;

use std::ffi::c_void;

use crate::cuda::call::Tensor;
use crate::cuda::device::CudaDevice;
use crate::cuda::launch::{self, start_training};
use crate::cuda::layer::on_device;
use crate::cuda::memory::Buffer;
use crate::cuda::pack::activation_op;
use crate::cuda::params::{
    PW_MAX_AXES, PW_MAX_PARTS, PW_MAX_STAGES, PW_MAX_SUMMED, PW_MERGED, PW_NOT_SUMMED,
    PW_SUM_LANES, PW_SWEEP_NARROW, PW_SWEEP_THREADS, PW_SWEEP_WIDE, pw_element, pw_merge, pw_op,
    pw_part, pw_stage, pw_sum, pw_sweep, pw_sweep_flags,
};
use crate::cuda::plan::Training as Kernel;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::moments::Moments;
use crate::problem::Operand;
use crate::tensor::checked_product;
use crate::train::Accumulate;
use crate::train::chain::{BatchStatistics, Chain, Op, checked, reduce_moments};
use crate::train::reduce::Reduce;

pub(super) use norm::norm_bytes;

const MAX_AXES: usize = PW_MAX_AXES as usize;
/// Tensors that rows may come from.
pub(super) const MAX_PARTS: usize = PW_MAX_PARTS as usize;
/// Stages before or after the convolution.
pub(super) const MAX_STAGES: usize = PW_MAX_STAGES as usize;
/// Chunks of a group whose moments one launch merges.
const MAX_CHUNKS: usize = PW_MERGED as usize;
/// Positions of a chunk: fewer are not worth a block, more would sum too long in f32.
const CHUNK: std::ops::RangeInclusive<usize> = 256..=4096;

/// A tensor and what it holds.
#[derive(Clone, Copy, Default)]
pub(super) struct Typed {
    pub at: Tensor,
    pub dtype: DType,
}

impl Typed {
    pub(super) fn of<T: Element>(operand: &Operand<T>) -> Typed {
        Typed { at: on_device(operand), dtype: T::DTYPE }
    }

    fn element(self) -> pw_element {
        match self.dtype {
            DType::F32 => pw_element::PW_F32,
            DType::F16 => pw_element::PW_F16,
            DType::Bf16 => pw_element::PW_BF16,
        }
    }
}

/// Tensors that rows are the concatenation of, and the rows of each.
pub(super) type Parts = Vec<(Typed, usize)>;

/// The axes of the positions, innermost first and in their logical order, so that chunks are of one
/// sample where they must be; merged where all tensors allow it.
pub(super) struct Axes {
    pub extents: [u32; MAX_AXES],
    pub count: u32,
    pub strides: Vec<[i64; MAX_AXES]>,
}

impl Axes {
    /// # Errors
    /// [`Error::TooLarge`] for 2³¹ positions or more.
    pub(super) fn new(extents: [usize; MAX_AXES], tensors: &[[i64; MAX_AXES]]) -> Result<Self> {
        positions_of(&extents)?;
        let strides = vec![[0; MAX_AXES]; tensors.len()];
        let mut axes = Axes { extents: [1; MAX_AXES], count: 0, strides };
        for axis in (0..MAX_AXES).rev().filter(|&axis| extents[axis] != 1) {
            let last = (axes.count as usize).wrapping_sub(1);
            let merges = axes.count > 0
                && axes.strides.iter().zip(tensors).all(|(merged, strides)| {
                    merged[last].checked_mul(i64::from(axes.extents[last])) == Some(strides[axis])
                });
            if merges {
                axes.extents[last] *= extents[axis] as u32;
                continue;
            }
            let slot = axes.count as usize;
            axes.extents[slot] = extents[axis] as u32;
            axes.strides.iter_mut().zip(tensors).for_each(|(to, from)| to[slot] = from[axis]);
            axes.count += 1;
        }
        Ok(axes)
    }

    /// A tensor, the one with this number among those that the axes are of.
    pub(super) fn part(&self, index: usize, tensor: &Typed, begin: usize, end: usize) -> pw_part {
        pw_part {
            data: tensor.at.address as *mut c_void,
            channel: tensor.at.channel,
            axes: self.strides[index],
            begin: begin as u32,
            end: end as u32,
            element: tensor.element(),
            reserved: 0,
        }
    }
}

/// Positions of all samples.
///
/// # Errors
/// [`Error::TooLarge`].
pub(super) fn positions_of(extents: &[usize; MAX_AXES]) -> Result<usize> {
    let positions = checked_product("positions of a batch in training", extents)?;
    match positions <= i32::MAX as usize {
        true => Ok(positions),
        false => {
            let what = "positions of a batch in training on CUDA";
            Err(Error::TooLarge { what, sizes: extents.to_vec() })
        }
    }
}

/// A chain and its tensors.
pub(super) struct Sweep<'a> {
    pub device: &'a CudaDevice,
    pub chain: Chain,
    /// Whether neighbouring threads take neighbouring rows.
    pub channels_fast: bool,
    /// Batch and spatial axes.
    pub extents: [usize; MAX_AXES],
    /// What the chain begins with; nothing where no stage asks for it.
    pub input: Parts,
    /// The residual or the gate.
    pub second: Option<Typed>,
    /// A layer norm's statistics, once they are known: three numbers for the positions that share them.
    pub norm: Option<Buffer>,
    pub reduce: Reduce<'a>,
}

/// What a normalisation subtracts from its gradient, a constant and a share of the deviation: of a
/// batch norm by row, and which op it is; of a layer norm as the kernels take it.
#[derive(Default)]
struct Coefficients {
    batch: Option<(usize, [Vec<f32>; 2])>,
    norm: Option<Buffer>,
}

/// What a backward pass reads and writes beside the input.
pub(super) struct Backward {
    /// The gradient by the chain's result.
    pub d: Typed,
    /// Where the gradient by the input goes; may be where the input is.
    pub outputs: Parts,
    pub d_second: Option<Typed>,
    /// What happens to the outputs and to `d_second`.
    pub accumulate: [Accumulate; 2],
    /// Bits of the last activation in place of the input, and its slope where they are clear.
    pub bits: Option<(u64, f32)>,
}

/// What a backward pass sums.
pub(super) struct Sums {
    /// Of each op, by row: of d, and of d by what the op's parameter multiplies.
    pub ops: Vec<[Vec<f64>; 2]>,
    /// The gradient by the gate `[rows, n]`, and the memory that it is in.
    pub gate: Option<(Typed, Buffer)>,
}

/// A chain's arrays on the device.
struct Arrays {
    stages: Vec<pw_stage>,
    /// The ops that have sums.
    summed: Vec<usize>,
    map: u64,
    second_map: u64,
    /// Holds what the addresses point to.
    _memory: Buffer,
}

/// How positions are cut.
struct Cut {
    group: usize,
    chunk: usize,
    groups: usize,
    /// Of a group.
    chunks: usize,
    blocks: u32,
}

impl Sweep<'_> {
    fn rows(&self) -> usize {
        self.chain.rows
    }

    fn positions(&self) -> usize {
        self.extents.iter().product()
    }

    /// The ops that need sums over more than a value, in order.
    fn normalisations(&self) -> Vec<usize> {
        let sums = |op: &Op| match op {
            Op::Linear(linear) => linear.batch.is_some(),
            Op::LayerNorm { .. } => true,
            _ => false,
        };
        (0..self.chain.ops.len()).filter(|&i| sums(&self.chain.ops[i])).collect()
    }

    /// A pure function of the problem and the device.
    fn cut(&self, by_sample: bool) -> Result<Cut> {
        let positions = positions_of(&self.extents)?;
        let (groups, group) = match by_sample {
            true => (self.extents[0], positions / self.extents[0]),
            false => (1, positions),
        };
        let height = if self.channels_fast { PW_SWEEP_WIDE } else { PW_SWEEP_NARROW };
        let row_tiles = self.rows().div_ceil(height as usize);
        let wanted = 8 * self.device.facts().multiprocessors as usize;
        let wanted = wanted.div_ceil(row_tiles * groups).max(1);
        let chunk = group.div_ceil(wanted).clamp(*CHUNK.start(), *CHUNK.end());
        let chunk = chunk.max(group.div_ceil(MAX_CHUNKS)).min(group);
        let chunks = group.div_ceil(chunk);
        let blocks = checked_product("the grid of a launch", &[row_tiles, groups, chunks])?;
        let blocks = grid(blocks, || vec![row_tiles, groups, chunks])?;
        Ok(Cut { group, chunk, groups, chunks, blocks })
    }

    /// Uploads what the stages know per row.
    fn arrays(&self, coefficients: &Coefficients) -> Result<Arrays> {
        let mut bytes: Vec<u8> = Vec::new();
        let mut array = |values: &[f32]| {
            let at = bytes.len() as u64;
            bytes.extend(values.iter().flat_map(|x| x.to_ne_bytes()));
            at
        };
        // Addresses are known once the memory is: until then they are offsets.
        let mut placed: Vec<[Option<u64>; 5]> = Vec::new();
        let (mut stages, mut summed) = (Vec::new(), Vec::new());
        for (i, op) in self.chain.ops.iter().enumerate() {
            let mut at = [None; 5];
            let mut sums = false;
            let (op, a, b) = match op {
                Op::Linear(linear) => {
                    at[0] = Some(array(&linear.hi));
                    at[1] = Some(array(&linear.scale));
                    at[2] = Some(array(&linear.shift));
                    sums = linear.batch.is_some() || linear.names.iter().any(Option::is_some);
                    if let Some((of, [mean_d, along])) = &coefficients.batch
                        && *of == i
                    {
                        at[3] = Some(array(mean_d));
                        at[4] = Some(array(along));
                    }
                    (pw_op::PW_OP_AFFINE, 0.0, 0.0)
                }
                Op::PRelu { slope } => {
                    at[1] = Some(array(slope));
                    sums = true;
                    (pw_op::PW_OP_PRELU, 0.0, 0.0)
                }
                Op::Activation(activation) => activation_op(*activation),
                Op::Residual => (pw_op::PW_OP_RESIDUAL, 0.0, 0.0),
                Op::Gate => {
                    sums = true;
                    (pw_op::PW_OP_GATE, 0.0, 0.0)
                }
                Op::LayerNorm { affine, eps, .. } => {
                    if let Some((gamma, beta)) = affine {
                        at[1] = Some(array(gamma));
                        at[2] = Some(array(beta));
                    }
                    sums = affine.is_some();
                    (pw_op::PW_OP_LAYER_NORM, *eps, 0.0)
                }
            };
            let slot = if sums { summed.len() as u32 } else { PW_NOT_SUMMED };
            if sums {
                summed.push(i);
            }
            stages.push(pw_stage { op, a, b, sums: slot, ..pw_stage::default() });
            placed.push(at);
        }
        debug_assert!(stages.len() <= MAX_STAGES && summed.len() <= PW_MAX_SUMMED as usize);
        let mut map = |map: &Option<Vec<u32>>| {
            map.as_ref().map(|map| {
                let at = bytes.len() as u64;
                bytes.extend(map.iter().flat_map(|channel| channel.to_ne_bytes()));
                at
            })
        };
        let maps = [map(&self.chain.dst_map), map(&self.chain.residual_map)];
        let mut memory =
            Buffer::new(self.device, "the stages of a layer in training", bytes.len())?;
        memory.upload(&bytes)?;
        let address = |at: Option<u64>| at.map_or(0, |at| memory.address() + at);
        for (stage, at) in stages.iter_mut().zip(placed) {
            let [first, second, third, mean_d, along] = at.map(|at| address(at) as *const f32);
            *stage = pw_stage { first, second, third, mean_d, along, ..*stage };
            if stage.op == pw_op::PW_OP_LAYER_NORM {
                let address = |of: &Option<Buffer>| of.as_ref().map_or(0, Buffer::address);
                stage.first = address(&self.norm) as *const f32;
                stage.mean_d = address(&coefficients.norm) as *const f32;
            }
        }
        let [map, second_map] = maps.map(address);
        Ok(Arrays { stages, summed, map, second_map, _memory: memory })
    }

    /// The parameters that every pass has, of its tensors beside input and `second`.
    fn params(
        &self,
        arrays: &Arrays,
        cut: &Cut,
        outputs: &Parts,
        d: Option<Typed>,
        d_second: Option<Typed>,
    ) -> Result<pw_sweep> {
        let single = [self.second, d, d_second].map(Option::unwrap_or_default);
        let all = self.input.iter().chain(outputs).map(|(tensor, _)| tensor);
        let tensors: Vec<Typed> = all.copied().chain(single).collect();
        let strides: Vec<_> = tensors.iter().map(|tensor| tensor.at.axes).collect();
        let axes = Axes::new(self.extents, &strides)?;
        let mut params = pw_sweep {
            extents: axes.extents,
            axis_count: axes.count,
            map: arrays.map as *const u32,
            second_map: arrays.second_map as *const u32,
            flags: if self.channels_fast {
                flag(pw_sweep_flags::PW_SWEEP_CHANNELS_FAST)
            } else {
                0
            },
            positions: self.positions() as u32,
            group: cut.group as u32,
            chunk: cut.chunk as u32,
            rows: self.rows() as u32,
            input_count: self.input.len() as u32,
            output_count: outputs.len() as u32,
            stage_count: arrays.stages.len() as u32,
            norm_unit: self.norm_unit() as u32,
            ..pw_sweep::default()
        };
        let mut index = 0;
        for (parts, slots) in [(&self.input, &mut params.inputs), (outputs, &mut params.outputs)] {
            let mut begin = 0;
            for ((tensor, rows), slot) in parts.iter().zip(slots) {
                *slot = axes.part(index, tensor, begin, begin + rows);
                begin += rows;
                index += 1;
            }
        }
        let of = |i: usize| axes.part(index + i, &tensors[index + i], 0, self.rows());
        (params.second, params.d, params.d_second) = (of(0), of(1), of(2));
        params.stages[..arrays.stages.len()].copy_from_slice(&arrays.stages);
        Ok(params)
    }

    /// The statistics of the batch at the batch norm, over all processes, and those of a layer norm; the
    /// chain has them from then on. `src` is the shape that an error tells.
    ///
    /// # Errors
    /// [`Error::Cuda`], [`Error::DeviceMemory`], [`Error::TooLarge`]; those of the reduction, and of
    /// [`checked`].
    pub(super) fn settle(&mut self, src: &[usize]) -> Result<Option<BatchStatistics>> {
        let mut of_batch = None;
        for op in self.normalisations() {
            match self.chain.ops[op] {
                Op::LayerNorm { over, eps, .. } => {
                    self.norm = self.norm_statistics(op, over, eps)?
                }
                _ => of_batch = self.settle_moments(src)?,
            }
        }
        Ok(of_batch)
    }

    fn settle_moments(&mut self, src: &[usize]) -> Result<Option<BatchStatistics>> {
        let Some((barrier, batch)) = self.chain.batch_norm() else { return Ok(None) };
        let rows = self.rows();
        let nothing = Moments { count: 0.0, mean: 0.0, deviations: 0.0 };
        let mut moments = match self.positions() {
            0 => vec![nothing; rows],
            _ => self.moments(barrier)?,
        };
        if let Some(reduce) = self.reduce {
            reduce_moments(&mut moments, reduce)?;
        }
        let channels = &self.chain.channels[barrier];
        let statistics = checked(moments, channels, [batch.mean, batch.var], src)?;
        self.chain.settle(&statistics);
        Ok(statistics)
    }

    fn moments(&self, barrier: usize) -> Result<Vec<Moments>> {
        let (rows, positions) = (self.rows(), self.positions());
        let (arrays, cut) = (self.arrays(&Coefficients::default())?, self.cut(false)?);
        let mut params = self.params(&arrays, &cut, &Parts::new(), None, None)?;
        params.stage_count = barrier as u32;
        let what = "the moments of a batch";
        let bytes = checked_product(what, &[rows, cut.chunks, 16])?;
        let of_chunks = Buffer::new(self.device, what, bytes)?;
        let of_rows = Buffer::new(self.device, what, rows * 16)?;
        params.sums = of_chunks.address() as *mut f64;
        let mut merge = pw_merge {
            from: params.sums,
            to: of_rows.address() as *mut f64,
            items: cut.chunks as i64,
            unit: cut.chunk as i64,
            values: positions as i64,
        };
        // SAFETY: the tensors are those of the call, the rest is memory of the sizes above, freed in
        // stream order.
        unsafe {
            start_training(self.device, Kernel::Moments, cut.blocks, &mut params)?;
            launch::start_merge(self.device, rows as u32, &mut merge)?;
        }
        let mut pairs = vec![0.0f64; 2 * rows];
        of_rows.download(&mut pairs)?;
        let count = positions as f64;
        let pairs = pairs.chunks_exact(2);
        Ok(pairs.map(|m| Moments { count, mean: m[0], deviations: m[1] }).collect())
    }

    /// Runs the chain into `outputs`; without an input it begins with zeros.
    ///
    /// # Errors
    /// [`Error::Cuda`], [`Error::DeviceMemory`], [`Error::TooLarge`].
    pub(super) fn forward(&self, outputs: &Parts, accumulate: Accumulate) -> Result<()> {
        if self.positions() == 0 || self.rows() == 0 {
            return Ok(());
        }
        let (arrays, cut) = (self.arrays(&Coefficients::default())?, self.cut(false)?);
        let mut params = self.params(&arrays, &cut, outputs, None, None)?;
        params.flags |= adds(accumulate, pw_sweep_flags::PW_SWEEP_ADD);
        // SAFETY: the tensors are those of the call, the arrays are freed in stream order.
        unsafe { start_training(self.device, Kernel::Forward, cut.blocks, &mut params) }
    }

    /// Keeps which values of the input lie inside bounds, in the order of the fast axis.
    ///
    /// # Errors
    /// [`Error::Cuda`], [`Error::DeviceMemory`], [`Error::TooLarge`].
    pub(super) fn keep_bits(&self, [lo, hi]: [f32; 2]) -> Result<Buffer> {
        let (arrays, cut) = (self.arrays(&Coefficients::default())?, self.cut(false)?);
        let bits = checked_product("the workspace", &[self.rows(), self.positions()])?;
        let memory = Buffer::new(self.device, "the workspace", bits_bytes(bits))?;
        let mut params = self.params(&arrays, &cut, &Parts::new(), None, None)?;
        (params.lo, params.hi, params.bits) = (lo, hi, memory.address() as *mut u32);
        let blocks =
            grid(bits.div_ceil(PW_SWEEP_THREADS as usize), || vec![self.rows(), self.positions()])?;
        // SAFETY: the tensors are those of the call, the bits have room for all values.
        unsafe { start_training(self.device, Kernel::Bits, blocks, &mut params)? };
        Ok(memory)
    }

    /// Runs backward; statistics of the batch have been settled.
    ///
    /// # Errors
    /// [`Error::Cuda`], [`Error::DeviceMemory`], [`Error::TooLarge`]; those of the reduction.
    pub(super) fn backward(&self, tensors: &Backward) -> Result<Sums> {
        let zeros = || std::array::from_fn(|_| vec![0.0; self.rows()]);
        let mut sums = Sums { ops: self.chain.ops.iter().map(|_| zeros()).collect(), gate: None };
        let mut coefficients = Coefficients::default();
        for op in self.normalisations().into_iter().rev() {
            match self.chain.ops[op] {
                Op::LayerNorm { over, .. } => {
                    coefficients.norm = self.norm_coefficients(tensors, op, over, &coefficients)?;
                }
                _ => {
                    self.pass(tensors, Kernel::Sums, op, &coefficients, &mut sums)?;
                    coefficients.batch = Some((op, self.combined(op, &sums)?));
                }
            }
        }
        self.pass(tensors, Kernel::Backward, 0, &coefficients, &mut sums)?;
        Ok(sums)
    }

    /// What a batch norm subtracts from its gradient: a constant, and a share of the deviation.
    fn combined(&self, barrier: usize, sums: &Sums) -> Result<[Vec<f32>; 2]> {
        let Op::Linear(linear) = &self.chain.ops[barrier] else { unreachable!("a batch norm") };
        let rows = self.rows();
        let mut all: Vec<f64> = sums.ops[barrier].concat();
        let mut count = [self.positions() as f64];
        if let Some(reduce) = self.reduce {
            reduce(&mut all)?;
            reduce(&mut count)?;
        }
        let mut both = [Vec::with_capacity(rows), Vec::with_capacity(rows)];
        for row in 0..rows {
            let [lo, inv] = [&linear.lo, &linear.inv].map(|values| f64::from(values[row]));
            let mean = all[row] / count[0];
            let along = (all[rows + row] / count[0] - lo * mean) * inv * inv;
            both[0].push((mean - lo * along) as f32);
            both[1].push(along as f32);
        }
        Ok(both)
    }

    fn pass(
        &self,
        tensors: &Backward,
        kernel: Kernel,
        first: usize,
        coefficients: &Coefficients,
        sums: &mut Sums,
    ) -> Result<()> {
        let rows = self.rows();
        if self.positions() == 0 || rows == 0 {
            return Ok(());
        }
        let by_sample = self.chain.ops.iter().any(|op| matches!(op, Op::Gate));
        let (arrays, cut) = (self.arrays(coefficients)?, self.cut(by_sample)?);
        let Backward { d, outputs, d_second, accumulate, bits } = tensors;
        let mut params = self.params(&arrays, &cut, outputs, Some(*d), *d_second)?;
        let (flag, second) = (pw_sweep_flags::PW_SWEEP_ADD, pw_sweep_flags::PW_SWEEP_ADD_SECOND);
        params.flags |= adds(accumulate[0], flag) | adds(accumulate[1], second);
        if let Some((address, outside)) = bits {
            (params.bits, params.outside) = (*address as *mut u32, *outside);
        }
        params.first_stage = first as u32;
        params.summed = arrays.summed.len() as u32;
        let (what, pairs) = ("sums of a backward pass", 2 * arrays.summed.len());
        let of_groups = checked_product(what, &[pairs, rows, cut.groups, 8])?;
        let of_chunks =
            Buffer::new(self.device, what, checked_product(what, &[of_groups, cut.chunks])?)?;
        params.sums = of_chunks.address() as *mut f64;
        // SAFETY: the tensors are those of the call, the sums have room for all chunks.
        unsafe { start_training(self.device, kernel, cut.blocks, &mut params)? };
        if pairs == 0 {
            return Ok(());
        }
        let by_group = Buffer::new(self.device, what, of_groups)?;
        let in_f32 = Buffer::new(self.device, what, of_groups / 2)?;
        let groups = pairs * rows * cut.groups;
        self.add_up(&of_chunks, cut.chunks, groups, &by_group, in_f32.address())?;
        let by_row;
        let result = match by_sample {
            true => {
                by_row = Buffer::new(self.device, what, 8 * pairs * rows)?;
                self.add_up(&by_group, cut.groups, pairs * rows, &by_row, 0)?;
                &by_row
            }
            false => &by_group,
        };
        let mut values = vec![0.0f64; pairs * rows];
        result.download(&mut values)?;
        let mut gate = None;
        for (slot, &op) in arrays.summed.iter().enumerate().filter(|&(_, &op)| op >= first) {
            for (j, to) in sums.ops[op].iter_mut().enumerate() {
                to.copy_from_slice(&values[(2 * slot + j) * rows..][..rows]);
            }
            if matches!(self.chain.ops[op], Op::Gate) {
                gate = Some(4 * ((2 * slot + 1) * rows * cut.groups) as u64);
            }
        }
        if let Some(offset) = gate {
            let address = in_f32.address() + offset;
            let samples = cut.groups as i64;
            let at = Tensor { address, channel: samples, axes: [1, 0, 0, 0] };
            sums.gate = Some((Typed { at, dtype: DType::F32 }, in_f32));
        }
        Ok(())
    }

    fn add_up(
        &self,
        from: &Buffer,
        items: usize,
        outputs: usize,
        to: &Buffer,
        to_f32: u64,
    ) -> Result<()> {
        let mut params = pw_sum {
            from: from.address() as *const f64,
            to: to.address() as *mut f64,
            to_f32: to_f32 as *mut f32,
            outputs: outputs as i64,
            items: items as i64,
        };
        let of_block = (PW_SWEEP_THREADS / PW_SUM_LANES) as usize;
        let blocks = grid(outputs.div_ceil(of_block), || vec![outputs, items])?;
        // SAFETY: memory of these sizes, freed in stream order.
        unsafe { start_training(self.device, Kernel::Sum, blocks, &mut params) }
    }
}

/// So many blocks, along the one axis of a grid.
///
/// # Errors
/// [`Error::TooLarge`], with these sizes.
pub(super) fn grid(blocks: usize, sizes: impl FnOnce() -> Vec<usize>) -> Result<u32> {
    let too_large = |_| Error::TooLarge { what: "the grid of a launch", sizes: sizes() };
    i32::try_from(blocks).map(|blocks| blocks as u32).map_err(too_large)
}

/// Bytes of so many bits, in whole words.
pub(super) fn bits_bytes(bits: usize) -> usize {
    bits.div_ceil(32) * 4
}

fn flag(flag: pw_sweep_flags) -> u32 {
    flag.0
}

fn adds(accumulate: Accumulate, add: pw_sweep_flags) -> u32 {
    match accumulate {
        Accumulate::Set => 0,
        Accumulate::Add => flag(add),
    }
}
