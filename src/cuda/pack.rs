//! A layer as the kernels read it: its weight packed, its stages as steps, all of it uploaded once.

use super::device::CudaDevice;
use super::launch::Program;
use super::layer::count_of;
use super::memory::Buffer;
use super::params::{
    PW_INLINE_SOURCE_STEPS, PW_INLINE_STEPS, PW_ROW_ALIGN, PW_ROW_ALIGN_16BIT, pw_epilogue,
    pw_fprop, pw_norm, pw_op, pw_step,
};
use crate::dtype::{DType, bf16, f16};
use crate::epilogue::{Lowered, SourceStep, Step};
use crate::error::Result;
use crate::problem::LayerShape;
use crate::stages::{Activation, NormOver};

/// What a layer keeps on the device, shared by all its streams.
pub(super) struct Weights {
    /// Holds everything that `params` points to.
    pub(super) memory: Buffer,
    /// The launches' parameters, the call's part still empty.
    pub(super) program: Program,
    /// How source stages and normalisation run, for `explain`.
    pub(super) words: String,
    pub(super) groups: u32,
    pub(super) rows: u32,
    pub(super) depth: u32,
}

// SAFETY: the pointers in `program` are device addresses; nothing is dereferenced on the host.
unsafe impl Send for Weights {}
// SAFETY: as above, and nothing is changed after the upload.
unsafe impl Sync for Weights {}
impl Weights {
    pub(super) fn upload(
        device: &CudaDevice,
        shape: &LayerShape,
        mut lowered: Lowered,
        dtype: DType,
        tf32: bool,
    ) -> Result<Self> {
        let groups = count_of("groups", shape.groups)?;
        let rows = count_of("output channels per group", shape.c_out / shape.groups)?;
        let depth = count_of("input channels per group", shape.k())?;
        // A channel of all groups is a number of 32 bits, too.
        count_of("output channels", shape.c_out)?;
        count_of("input channels", shape.c_in)?;
        let mut packer = Packer::new(dtype, shape.groups, rows as usize, depth as usize);
        let weight = match dtype {
            // Once, here, instead of each time that a kernel reads them.
            DType::F32 if tf32 && device.facts().sm80 => {
                packer.weight(&lowered.weight, |x| to_tf32(x).to_ne_bytes())
            }
            DType::F32 => packer.weight(&lowered.weight, f32::to_ne_bytes),
            DType::F16 => packer.weight(&lowered.weight, |x| f16::from_f32(x).to_ne_bytes()),
            DType::Bf16 => packer.weight(&lowered.weight, |x| bf16::from_f32(x).to_ne_bytes()),
        };
        let scale = match dtype {
            DType::F32 => None,
            DType::F16 | DType::Bf16 => Some(packer.rows(&take_scale(&mut lowered))),
        };
        let bias = packer.rows(&lowered.bias);
        let steps = packer.steps(&lowered.steps, PW_INLINE_STEPS);
        let source_steps: Vec<PackedStep> =
            lowered.source_steps.iter().map(|step| packer.source_step(step)).collect();
        let source_steps = packer.behind(source_steps, PW_INLINE_SOURCE_STEPS);
        let mut map = |map: &Option<Vec<u32>>| map.as_ref().map(|map| packer.map(map));
        let (dst_map, residual_map) = (map(&lowered.dst_map), map(&lowered.residual_map));
        let pitch = packer.pitch as u32;
        // The normalisation knows no groups.
        (packer.groups, packer.rows) = (1, shape.c_out);
        packer.pitch = shape.c_out.next_multiple_of(row_align(dtype));
        let norm = lowered.norm.as_ref().map(|norm| {
            let arrays = [packer.rows(&norm.gamma), packer.rows(&norm.beta)];
            (norm, arrays, packer.steps(&lowered.after_norm, PW_INLINE_STEPS))
        });

        // Addresses are known once the memory is.
        let mut memory = Buffer::new(device, "a layer's weights", packer.bytes.len())?;
        let base = memory.address();
        let lists = [Some(&steps), Some(&source_steps), norm.as_ref().map(|(_, _, steps)| steps)];
        for list in lists.into_iter().flatten() {
            list.write(base, &mut packer.bytes);
        }
        memory.upload(&packer.bytes)?;

        let at = |offset: usize| (base + offset as u64) as *const f32;
        let shared = pw_fprop {
            dst_map: dst_map.map_or(std::ptr::null(), at).cast(),
            residual_map: residual_map.map_or(std::ptr::null(), at).cast(),
            ..pw_fprop::default()
        };
        let mut params = pw_fprop {
            weight: at(weight).cast(),
            bias: at(bias),
            scale: scale.map_or(std::ptr::null(), at),
            more_steps: at(steps.more).cast(),
            more_source_steps: at(source_steps.more).cast(),
            row_pitch: pitch,
            step_count: count_of("steps", steps.list.len())?,
            source_step_count: count_of("source steps", source_steps.list.len())?,
            ..shared
        };
        steps.inline(base, &mut params.steps);
        source_steps.inline(base, &mut params.source_steps);
        let ops: Vec<pw_step> = steps.list.iter().map(|(step, _)| *step).collect();
        (params.epilogue, params.clip_lo, params.clip_hi) = short_cut(&ops);
        let norm = match norm {
            None => None,
            Some((norm, [gamma, beta], steps)) => {
                let (gamma, beta, eps) = (at(gamma), at(beta), norm.eps);
                let mut params = pw_fprop {
                    norm: pw_norm { gamma, beta, eps, ..pw_norm::default() },
                    more_steps: at(steps.more).cast(),
                    row_pitch: packer.pitch as u32,
                    step_count: count_of("steps", steps.list.len())?,
                    ..shared
                };
                steps.inline(base, &mut params.steps);
                Some((norm.over, params))
            }
        };
        let program = Program { dtype, dst_dtype: dtype, fprop: params, norm };
        Ok(Weights { memory, program, words: words(&lowered, dtype), groups, rows, depth })
    }
}

/// What rows of packed arrays are padded to a multiple of.
fn row_align(dtype: DType) -> usize {
    match dtype {
        DType::F32 => PW_ROW_ALIGN as usize,
        DType::F16 | DType::Bf16 => PW_ROW_ALIGN_16BIT as usize,
    }
}

/// What multiplies the sums of a layer whose weight has 16 bits before the bias is added: that of the
/// affine step that it begins with, whose shift then is the bias.
fn take_scale(lowered: &mut Lowered) -> Vec<f32> {
    let leading = lowered.bias.iter().all(|&bias| bias == 0.0);
    match lowered.steps.first() {
        Some(Step::Affine { .. }) if leading => {}
        _ => return vec![1.0; lowered.bias.len()],
    }
    match lowered.steps.remove(0) {
        Step::Affine { scale, shift } => {
            lowered.bias = shift;
            scale
        }
        _ => unreachable!("looked at above"),
    }
}

/// What runs beside the convolution and its steps.
fn words(lowered: &Lowered, dtype: DType) -> String {
    let source = match lowered.source_steps.len() {
        0 => "",
        _ => "; source stages on each slab of src in shared memory",
    };
    let reads = if dtype == DType::F32 { "in place" } else { "from f32 values beside dst" };
    let norm = lowered.norm.as_ref().map_or(String::new(), |norm| match norm.over {
        NormOver::Channels => format!("; layer norm in a launch of its own, {reads}"),
        NormOver::All => {
            format!("; layer norm in launches of its own, {reads}: moments, then the values")
        }
    });
    format!("{source}{norm}")
}

/// The nearest TF32, ties away from zero: as the device's instruction rounds.
fn to_tf32(x: f32) -> f32 {
    match x {
        x if x.is_finite() => f32::from_bits((x.to_bits() + 0x1000) & !0x1FFF),
        x if x.is_nan() => f32::NAN,
        infinite => infinite,
    }
}

/// The compiled short cut that does what the steps say, if there is one, and its bounds.
fn short_cut(steps: &[pw_step]) -> (pw_epilogue, f32, f32) {
    let (with, rest) = match steps {
        [first, rest @ ..] if first.op == pw_op::PW_OP_RESIDUAL => {
            (pw_epilogue::PW_EPILOGUE_RESIDUAL_CLIP, rest)
        }
        rest => (pw_epilogue::PW_EPILOGUE_CLIP, rest),
    };
    match rest {
        [] => (with, f32::NEG_INFINITY, f32::INFINITY),
        [clip] if clip.op == pw_op::PW_OP_CLIP => (with, clip.a, clip.b),
        _ => (pw_epilogue::PW_EPILOGUE_STEPS, 0.0, 0.0),
    }
}

/// Lays out what a layer keeps on the device; every array starts at a multiple of 256 bytes.
struct Packer {
    bytes: Vec<u8>,
    groups: usize,
    rows: usize,
    depth: usize,
    /// `rows`, padded so that vectors of four neither straddle a group nor leave the array.
    pitch: usize,
}

/// A step, and where its arrays are.
type PackedStep = (pw_step, [Option<usize>; 2]);

/// A list of steps; those that do not fit into the launch's parameters lie at `more`.
struct PackedSteps {
    list: Vec<PackedStep>,
    inline: usize,
    more: usize,
}

impl PackedSteps {
    /// The steps, with the addresses that their arrays have behind `base`.
    fn placed(&self, base: u64) -> impl Iterator<Item = pw_step> + '_ {
        let at = move |offset: usize| (base + offset as u64) as *const f32;
        self.list.iter().map(move |(step, [first, second])| pw_step {
            first: first.map_or(std::ptr::null(), at),
            second: second.map_or(std::ptr::null(), at),
            ..*step
        })
    }

    fn inline(&self, base: u64, to: &mut [pw_step]) {
        for (slot, step) in to.iter_mut().zip(self.placed(base)) {
            *slot = step;
        }
    }

    fn write(&self, base: u64, to: &mut [u8]) {
        let rest = self.placed(base).skip(self.inline);
        for (slot, step) in to[self.more..].chunks_exact_mut(size_of::<pw_step>()).zip(rest) {
            slot.copy_from_slice(&step_bytes(&step));
        }
    }
}

impl Packer {
    fn new(dtype: DType, groups: usize, rows: usize, depth: usize) -> Self {
        let pitch = rows.next_multiple_of(row_align(dtype));
        Packer { bytes: Vec::new(), groups, rows, depth, pitch }
    }

    /// A list with room for what does not fit inline.
    fn behind(&mut self, list: Vec<PackedStep>, inline: u32) -> PackedSteps {
        let (inline, more) = (inline as usize, self.align());
        let rest = list.len().saturating_sub(inline);
        self.bytes.resize(more + rest * size_of::<pw_step>(), 0);
        PackedSteps { list, inline, more }
    }

    fn steps(&mut self, steps: &[Step], inline: u32) -> PackedSteps {
        let list = steps.iter().map(|step| self.step(step)).collect();
        self.behind(list, inline)
    }

    fn align(&mut self) -> usize {
        self.bytes.resize(self.bytes.len().next_multiple_of(256), 0);
        self.bytes.len()
    }

    fn extend(&mut self, values: impl Iterator<Item = f32>) {
        self.bytes.extend(values.flat_map(f32::to_ne_bytes));
    }

    /// `[groups * rows, depth]` as `[groups][depth][pitch]` of elements of so many bytes.
    fn weight<const SIZE: usize>(
        &mut self,
        weight: &[f32],
        bytes: impl Fn(f32) -> [u8; SIZE],
    ) -> usize {
        let start = self.align();
        let end = start + self.groups * self.depth * self.pitch * SIZE;
        self.bytes.resize(end, 0);
        let columns = self.bytes[start..].chunks_exact_mut(self.pitch * SIZE);
        let groups = weight.chunks_exact(self.rows * self.depth);
        let columns_of = groups.flat_map(|group| (0..self.depth).map(move |k| (group, k)));
        for (to, (group, k)) in columns.zip(columns_of) {
            let column = group.iter().skip(k).step_by(self.depth);
            for (slot, &value) in to.chunks_exact_mut(SIZE).zip(column) {
                slot.copy_from_slice(&bytes(value));
            }
        }
        start
    }

    /// `[groups * rows]` as `[groups][pitch]`.
    fn rows(&mut self, values: &[f32]) -> usize {
        let start = self.align();
        for group in values.chunks_exact(self.rows) {
            self.extend(group.iter().copied());
            self.extend(std::iter::repeat_n(0.0, self.pitch - self.rows));
        }
        debug_assert_eq!(values.len(), self.groups * self.rows);
        start
    }

    fn map(&mut self, map: &[u32]) -> usize {
        let start = self.align();
        self.bytes.extend(map.iter().flat_map(|channel| channel.to_ne_bytes()));
        start
    }

    /// `[groups * depth]` as it is.
    fn inputs(&mut self, values: &[f32]) -> usize {
        let start = self.align();
        self.extend(values.iter().copied());
        start
    }

    fn source_step(&mut self, step: &SourceStep) -> PackedStep {
        match step {
            SourceStep::Affine { scale, shift } => {
                let arrays = [Some(self.inputs(scale)), Some(self.inputs(shift))];
                (plain(pw_op::PW_OP_AFFINE, 0.0, 0.0), arrays)
            }
            SourceStep::Gate => (plain(pw_op::PW_OP_GATE, 0.0, 0.0), [None; 2]),
            SourceStep::Activation(activation) => {
                let (op, a, b) = activation_op(*activation);
                (plain(op, a, b), [None; 2])
            }
        }
    }

    fn step(&mut self, step: &Step) -> PackedStep {
        match step {
            Step::Affine { scale, shift } => {
                let arrays = [Some(self.rows(scale)), Some(self.rows(shift))];
                (plain(pw_op::PW_OP_AFFINE, 0.0, 0.0), arrays)
            }
            Step::PRelu { slope } => {
                (plain(pw_op::PW_OP_PRELU, 0.0, 0.0), [Some(self.rows(slope)), None])
            }
            Step::Residual => (plain(pw_op::PW_OP_RESIDUAL, 0.0, 0.0), [None; 2]),
            Step::Activation(activation) => {
                let (op, a, b) = activation_op(*activation);
                (plain(op, a, b), [None; 2])
            }
        }
    }
}

fn plain(op: pw_op, a: f32, b: f32) -> pw_step {
    pw_step { op, a, b, ..pw_step::default() }
}

pub(super) fn activation_op(activation: Activation) -> (pw_op, f32, f32) {
    match activation {
        Activation::Relu => (pw_op::PW_OP_CLIP, 0.0, f32::INFINITY),
        Activation::Relu6 => (pw_op::PW_OP_CLIP, 0.0, 6.0),
        Activation::Clip { lo, hi } => (pw_op::PW_OP_CLIP, lo, hi),
        Activation::LeakyRelu { alpha } => (pw_op::PW_OP_LEAKY_RELU, alpha, 0.0),
        Activation::Elu { alpha } => (pw_op::PW_OP_ELU, alpha, 0.0),
        Activation::Sigmoid => (pw_op::PW_OP_SIGMOID, 0.0, 0.0),
        Activation::Tanh => (pw_op::PW_OP_TANH, 0.0, 0.0),
        Activation::Silu => (pw_op::PW_OP_SILU, 0.0, 0.0),
        Activation::Gelu => (pw_op::PW_OP_GELU, 0.0, 0.0),
        Activation::GeluTanh => (pw_op::PW_OP_GELU_TANH, 0.0, 0.0),
        Activation::HardSigmoid => (pw_op::PW_OP_HARD_SIGMOID, 0.0, 0.0),
        Activation::HardSwish => (pw_op::PW_OP_HARD_SWISH, 0.0, 0.0),
        Activation::Softplus => (pw_op::PW_OP_SOFTPLUS, 0.0, 0.0),
        Activation::Mish => (pw_op::PW_OP_MISH, 0.0, 0.0),
    }
}

/// A step as the device reads it.
fn step_bytes(step: &pw_step) -> [u8; size_of::<pw_step>()] {
    let mut bytes = [0; size_of::<pw_step>()];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(std::mem::offset_of!(pw_step, op), &step.op.0.to_ne_bytes());
    put(std::mem::offset_of!(pw_step, a), &step.a.to_ne_bytes());
    put(std::mem::offset_of!(pw_step, b), &step.b.to_ne_bytes());
    put(std::mem::offset_of!(pw_step, first), &(step.first.addr() as u64).to_ne_bytes());
    put(std::mem::offset_of!(pw_step, second), &(step.second.addr() as u64).to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(packer: &Packer, start: usize, len: usize) -> Vec<f32> {
        let bytes = packer.bytes[start..start + 4 * len].chunks_exact(4);
        bytes.map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn weights_are_packed_by_group_and_depth_with_padded_rows() {
        // weight[row][k] = 10 * row + k, two groups of 3 rows, depth 2.
        let weight: Vec<f32> =
            (0..6).flat_map(|row| [row as f32 * 10.0, row as f32 * 10.0 + 1.0]).collect();
        let mut packer = Packer::new(DType::F32, 2, 3, 2);
        let start = packer.weight(&weight, f32::to_ne_bytes);
        assert_eq!(
            floats(&packer, start, 16),
            [0., 10., 20., 0., 1., 11., 21., 0., 30., 40., 50., 0., 31., 41., 51., 0.]
        );
        let start = packer.rows(&[1., 2., 3., 4., 5., 6.]);
        assert_eq!(start % 256, 0);
        assert_eq!(floats(&packer, start, 8), [1., 2., 3., 0., 4., 5., 6., 0.]);
    }

    #[test]
    fn rounding_to_tf32_goes_to_the_nearest() {
        let one = 1.0f32;
        let step = 2f32.powi(-10);
        for (x, rounded) in [
            (one, one),
            (one + 0.49 * step, one),
            (one + 0.5 * step, one + step),
            (-one - 0.5 * step, -one - step),
            (2.0f32.next_down(), 2.0),
            (f32::MAX, f32::INFINITY),
            (-f32::INFINITY, -f32::INFINITY),
            (-0.0, -0.0),
        ] {
            assert_eq!(to_tf32(x).to_bits(), rounded.to_bits(), "{x}");
        }
        // Payloads in the bits that do not count must not turn a NaN into an infinity.
        assert!(f32::from_bits(to_tf32(f32::from_bits(0x7F80_0001)).to_bits() & !0x1FFF).is_nan());
    }

    #[test]
    fn the_usual_lists_have_a_short_cut() {
        let mut packer = Packer::new(DType::F32, 1, 4, 1);
        let mut cut = |steps: &[Step]| {
            let steps: Vec<pw_step> = steps.iter().map(|step| packer.step(step).0).collect();
            short_cut(&steps)
        };
        let relu6 = Step::Activation(Activation::Relu6);
        let inf = f32::INFINITY;
        assert_eq!(cut(&[]), (pw_epilogue::PW_EPILOGUE_CLIP, -inf, inf));
        assert_eq!(cut(std::slice::from_ref(&relu6)), (pw_epilogue::PW_EPILOGUE_CLIP, 0.0, 6.0));
        let residual = pw_epilogue::PW_EPILOGUE_RESIDUAL_CLIP;
        assert_eq!(cut(&[Step::Residual]), (residual, -inf, inf));
        assert_eq!(cut(&[Step::Residual, relu6.clone()]), (residual, 0.0, 6.0));
        let none = pw_epilogue::PW_EPILOGUE_STEPS;
        assert_eq!(cut(&[relu6.clone(), Step::Residual]).0, none);
        assert_eq!(cut(&[relu6, Step::Activation(Activation::Tanh)]).0, none);
    }

    #[test]
    fn a_step_in_memory_is_the_struct_that_the_kernel_reads() {
        let step = pw_step {
            op: pw_op::PW_OP_MISH,
            a: 1.5,
            b: -2.0,
            reserved: 0,
            first: std::ptr::without_provenance(0x1234_5678_9ABC),
            second: std::ptr::without_provenance(16),
        };
        let bytes = step_bytes(&step);
        // SAFETY: as many bytes as a pw_step has, and any bits are one.
        let back = unsafe { bytes.as_ptr().cast::<pw_step>().read_unaligned() };
        assert_eq!((back.op, back.a, back.b), (step.op, step.a, step.b));
        assert_eq!((back.first.addr(), back.second.addr()), (step.first.addr(), 16));
    }
}
