//! Layers of 8-bit floats: widened to f32 in memory of the call, multiplied by the kernels of f32, and
//! finished in a pass of its own, whose operations round as those of CUDA.

use std::fmt;
use std::ptr::without_provenance_mut;

use float8::{F8E4M3, F8E5M2};
use ndarray::Array2;

use crate::cost::{Cost, Roof};
use crate::cpu::int8::Clip;
use crate::cpu::{self, CpuDevice};
use crate::dtype::{DType, bf16, f16};
use crate::epilogue;
use crate::error::Result;
use crate::layer::Pointwise;
use crate::plan::Candidate;
use crate::prepared::PrepareOptions;
use crate::problem::{DstShape, LayerShape, Operands, Problem, dst_shape};
use crate::quantized::Fp8;
use crate::tensor::{MAX_RANK, Place, TensorMut, TensorRef, strides_like, try_zeros};

/// A layer as either backend takes it.
pub(crate) struct Lowered<'a> {
    pub shape: LayerShape,
    /// Bits, `[c_out, c_in / groups]`, row-major.
    pub weight: &'a [u8],
    pub weight_type: Fp8,
    pub src: Fp8,
    pub residual: Option<Fp8>,
    pub scaling: Scaling,
}

/// How sums become values: `clip(before(sum · scale + shift) + residual · residual_scale)`.
pub(crate) struct Scaling {
    /// One per output channel.
    pub scale: Vec<f32>,
    /// One per output channel.
    pub shift: Vec<f32>,
    /// Before the residual is added.
    pub before: Clip,
    /// At the end.
    pub clip: Clip,
    pub residual_scale: f32,
}

/// A prepared layer.
pub(crate) struct Layer {
    device: CpuDevice,
    /// Of f32, without anything behind its sums.
    sums: cpu::Layer,
    shape: LayerShape,
    src: &'static [f32; 256],
    residual: &'static [f32; 256],
    scaling: Scaling,
}

/// A result's element.
pub(crate) trait Narrow: Copy + Send + Sync {
    /// The nearest, ties to even; of fp8, what is beyond the greatest becomes that.
    fn narrow(x: f32) -> Self;
}

macro_rules! narrow {
    ($($type:ty: $from:expr;)*) => {$(
        impl Narrow for $type {
            #[inline(always)]
            fn narrow(x: f32) -> Self {
                $from(x)
            }
        }
    )*};
}
narrow! {
    F8E4M3: F8E4M3::from_f32;
    F8E5M2: F8E5M2::from_f32;
    f32: std::convert::identity;
    f16: f16::from_f32;
    bf16: bf16::from_f32;
}

impl Layer {
    /// Widens and packs.
    ///
    /// # Errors
    /// As a layer of f32.
    pub(crate) fn new(
        device: &CpuDevice,
        options: &PrepareOptions,
        lowered: Lowered<'_>,
    ) -> Result<Self> {
        let Lowered { shape, weight, weight_type, src, residual, scaling } = lowered;
        let values = weight_type.values();
        let weight = weight.iter().map(|&bits| values[usize::from(bits)]).collect();
        let weight = Array2::from_shape_vec((shape.c_out, shape.k()), weight);
        let weight = weight.expect("as many as the layer's");
        let bare = Pointwise::new(weight).groups(shape.groups).stride(shape.stride);
        let shape = LayerShape { residual: false, ..shape };
        let lowered = epilogue::Lowered::new(&bare, DType::F32);
        let sums = cpu::Layer::new(device, &shape, lowered, DType::F32, options)?;
        let residual = residual.unwrap_or(src).values();
        Ok(Layer { device: device.clone(), sums, shape, src: src.values(), residual, scaling })
    }

    /// The kernel that would run a source of this shape, channels first, and why.
    pub(crate) fn explain(&self, src: &[usize], dst: &DstShape) -> Result<(&'static str, String)> {
        self.with_problem(src, dst, |problem| {
            let (kernel, reason) = self.sums.explain(problem);
            (kernel, format!("widened to f32; {reason}"))
        })
    }

    /// Every kernel, and what it says to such a source; the one that would run first.
    pub(crate) fn plans(&self, src: &[usize], dst: &DstShape) -> Result<Vec<Candidate>> {
        self.with_problem(src, dst, |problem| self.sums.plans(problem))
    }

    /// The kernel that runs sources with many positions.
    pub(crate) fn kernel(&self) -> &'static str {
        let (src, mut dst) = ([1 << 10, self.shape.c_in], std::iter::empty());
        let kernel = dst_shape(&self.shape, &src, &mut dst)
            .and_then(|dst| self.with_problem(&src, &dst, |problem| self.sums.explain(problem).0));
        kernel.expect("it fits the layer")
    }

    pub(crate) fn roof(&self, cost: &Cost) -> Roof {
        self.sums.roof(cost)
    }

    fn with_problem<R>(
        &self,
        src: &[usize],
        dst: &DstShape,
        f: impl FnOnce(&Problem<'_>) -> R,
    ) -> Result<R> {
        let far = |i: usize| without_provenance_mut::<f32>(i << (usize::BITS - 3));
        let dense = |shape: &[usize]| {
            let (mut strides, mut next) = ([0; MAX_RANK], 1);
            for axis in (0..shape.len()).rev() {
                strides[axis] = next;
                next *= shape[axis].max(1) as isize;
            }
            strides
        };
        let (rank, dst) = (src.len(), dst.as_slice());
        // SAFETY: the views are only used for the arithmetic on shapes and addresses.
        unsafe {
            let src = TensorRef::from_raw_parts(far(1), Place::Host, src, &dense(src)[..rank])?;
            let mut dst = TensorMut::from_raw_parts(far(2), Place::Host, dst, &dense(dst)[..rank])?;
            let operands = Operands { src, more: &[], residual: None, gate: None };
            Ok(f(&Problem::new(&self.shape, &operands, &mut dst)?))
        }
    }

    /// Runs a call whose tensors have been checked against the layer and each other.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) if memory does not hold source and sums in f32.
    pub(crate) fn run<T: Narrow>(
        &self,
        shape: &DstShape,
        src: &TensorRef<'_, u8>,
        residual: Option<&TensorRef<'_, u8>>,
        dst: &TensorMut<'_, T>,
    ) -> Result<()> {
        if shape.as_slice().contains(&0) {
            return Ok(());
        }
        let rank = src.shape().len();
        let strides = strides_like(src, src.shape());
        let wide_strides = &strides[..rank];
        let mut wide = try_zeros::<f32>("a source of fp8 in f32", src.shape())?;
        let to = cpu::Disjoint::new(wide.as_mut_ptr());
        let walk = Walk::new(src.shape(), [wide_strides, src.strides()]);
        walk.run(&self.device, |[to_step, from_step], [to_base, from_base], count| {
            for i in 0..count as isize {
                let from = src.as_ptr().wrapping_offset(from_base + i * from_step);
                // SAFETY: the view is readable at every index, the copy has all, each once.
                unsafe {
                    let value = self.src[usize::from(*from)];
                    *to.at((to_base + i * to_step) as usize) = value;
                }
            }
        });

        let strides = strides_like(dst.view(), shape.as_slice());
        let sum_strides = &strides[..rank];
        let mut sums = try_zeros::<f32>("sums of fp8", shape.as_slice())?;
        {
            let src = TensorRef::from_slice(&wide, 0, src.shape(), wide_strides)?;
            let operands = Operands { src, more: &[], residual: None, gate: None };
            let mut sums = TensorMut::from_slice(&mut sums, 0, shape.as_slice(), sum_strides)?;
            let problem = Problem::new(&self.shape, &operands, &mut sums)?;
            cpu::run(&[(&self.sums, &problem)]);
        }

        let Scaling { scale, shift, before, clip, residual_scale } = &self.scaling;
        let to = cpu::Disjoint::new(dst.view().as_ptr().cast_mut());
        let of_channels = [0, 1, 0, 0, 0];
        let beside = residual.map_or(&[0; MAX_RANK][..rank], |residual| residual.strides());
        let walk = Walk::new(
            shape.as_slice(),
            [sum_strides, dst.view().strides(), beside, &of_channels[..rank]],
        );
        walk.run(&self.device, |steps, bases, count| {
            for i in 0..count as isize {
                let [sum, dst, beside, channel] =
                    std::array::from_fn(|tensor| bases[tensor] + i * steps[tensor]);
                let channel = channel as usize;
                let mut x = sums[sum as usize] * scale[channel] + shift[channel];
                if let Some(residual) = residual {
                    // SAFETY: the view is readable at every index.
                    let bits = unsafe { *residual.as_ptr().wrapping_offset(beside) };
                    let value = self.residual[usize::from(bits)];
                    x = before.cut(x) + value * residual_scale;
                }
                // SAFETY: the view is writable at every index, and its positions do not overlap.
                unsafe { *to.at(0).wrapping_offset(dst) = T::narrow(clip.cut(x)) };
            }
        });
        Ok(())
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu::fp8::Layer({:?} on {})", self.shape, self.device)
    }
}

/// The indices of some tensors of one shape, a row at a time: in the order of the first one's memory.
struct Walk<const N: usize> {
    /// Lengths and strides, the innermost axis last.
    axes: [(usize, [isize; N]); MAX_RANK],
}

impl<const N: usize> Walk<N> {
    fn new(shape: &[usize], strides: [&[isize]; N]) -> Self {
        let mut axes = [(1, [0; N]); MAX_RANK];
        for (axis, slot) in axes.iter_mut().enumerate().take(shape.len()) {
            *slot = (shape[axis], strides.map(|strides| strides[axis]));
        }
        // Axes of one element have strides of all kinds.
        let outermost = |&(len, strides): &(usize, [isize; N])| {
            if len == 1 { usize::MAX } else { strides[0].unsigned_abs() }
        };
        axes.sort_by_key(|axis| std::cmp::Reverse(outermost(axis)));
        Walk { axes }
    }

    /// Calls `f` with the steps, the first index's offsets, and the length of each row, on the device's
    /// threads.
    fn run(&self, device: &CpuDevice, f: impl Fn([isize; N], [isize; N], usize) + Sync) {
        let [outer @ .., (count, steps)] = self.axes;
        let rows: usize = outer.iter().map(|&(len, _)| len).product();
        device.for_each(rows, 2 * rows * count, &|mut row| {
            let mut bases = [0; N];
            for (len, strides) in outer.iter().rev() {
                let at = (row % len) as isize;
                row /= len;
                for (base, stride) in bases.iter_mut().zip(strides) {
                    *base += at * stride;
                }
            }
            f(steps, bases, count);
        });
    }
}
