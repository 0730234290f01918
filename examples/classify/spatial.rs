//! What EfficientNet-Lite0 needs beside pointwise convolutions, in plain Rust: the 3x3 stem, the
//! depthwise convolutions (each with its folded batch norm and ReLU6), and the mean over positions.

use pointwise::Layout;
use rayon::prelude::*;

/// Values that the kernels compute at once in channels-first maps: a whole number of vectors.
const BLOCK: usize = 32;

/// Sizes of a convolution over a square map, padded with zeros as TensorFlow's "same":
/// `out = ceil(size / stride)`, the odd one of the padding after the map.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Height and width of src.
    pub size: usize,
    pub kernel: usize,
    /// 1 or 2.
    pub stride: usize,
}

impl Geometry {
    /// Height and width of dst.
    pub fn out(&self) -> usize {
        self.size.div_ceil(self.stride)
    }

    /// Height and width of src with its padding.
    fn padded(&self) -> usize {
        (self.out() - 1) * self.stride + self.kernel
    }

    /// Rows above and columns left of the map.
    fn before(&self) -> usize {
        self.padded().saturating_sub(self.size) / 2
    }

    /// The kernel's rows (or columns) that meet the map at position `o` of dst.
    fn taps(&self, o: usize) -> std::ops::Range<usize> {
        let first = o * self.stride;
        let lo = self.before().saturating_sub(first);
        let hi = (self.size + self.before()).saturating_sub(first).min(self.kernel);
        lo..hi.max(lo)
    }
}

/// A convolution with the per-channel affine folded in, then ReLU6.
pub struct Convolution {
    geometry: Geometry,
    channels: usize,
    body: Body,
}

enum Body {
    Planes(Planes),
    Depthwise(Pixels),
    Full(Pixels),
}

impl Convolution {
    /// One filter per channel: `weight [channels, 1, k, k]` in C order.
    pub fn depthwise(geometry: Geometry, weight: &[f32], shift: Vec<f32>, layout: Layout) -> Self {
        let channels = shift.len();
        let body = match layout {
            Layout::ChannelsFirst => Body::Planes(Planes::new(geometry, 1, weight, shift)),
            Layout::ChannelsLast => {
                let lanes =
                    *LANES.iter().find(|&&lanes| channels.is_multiple_of(lanes)).unwrap_or(&1);
                Body::Depthwise(Pixels::new(geometry, 1, lanes, weight, shift))
            }
        };
        Convolution { geometry, channels, body }
    }

    /// The stem: `weight [32, 3, k, k]` in C order.
    pub fn stem(geometry: Geometry, weight: &[f32], shift: Vec<f32>, layout: Layout) -> Self {
        let channels = shift.len();
        let body = match layout {
            Layout::ChannelsFirst => Body::Planes(Planes::new(geometry, 3, weight, shift)),
            Layout::ChannelsLast => Body::Full(Pixels::new(geometry, 3, STEM, weight, shift)),
        };
        Convolution { geometry, channels, body }
    }

    /// `src [c_in, size, size]` to `dst [channels, out, out]`, or channels last.
    pub fn run(&mut self, src: &[f32], dst: &mut [f32]) {
        let Convolution { geometry, channels, body } = self;
        match body {
            Body::Planes(planes) => planes.run(*geometry, src, dst),
            Body::Depthwise(pixels) => {
                let rows = dst.par_chunks_mut(geometry.out() * *channels).enumerate();
                rows.for_each(|(y, dst)| {
                    let row = Row { geometry: *geometry, channels: *channels, pixels, src, y, dst };
                    match pixels.lanes {
                        48 => dispatch(DepthwiseRow::<48>(row)),
                        16 => dispatch(DepthwiseRow::<16>(row)),
                        _ => dispatch(DepthwiseRow::<1>(row)),
                    }
                });
            }
            Body::Full(pixels) => {
                let rows = dst.par_chunks_mut(geometry.out() * *channels).enumerate();
                rows.for_each(|(y, dst)| {
                    let row = Row { geometry: *geometry, channels: *channels, pixels, src, y, dst };
                    dispatch(StemRow(row));
                });
            }
        }
    }
}

/// Channels first. A padded plane is split into `stride²` planes, one for each remainder of row
/// and column, so that every tap reads contiguously: output `j` of a flat, pitched map is
/// `Σ weight[t] · plane[j + offset[t]]`, a single loop without edges, whatever the map's size.
struct Planes {
    weight: Vec<f32>,
    shift: Vec<f32>,
    /// Where each tap's values start, for one input channel after the other.
    offsets: Vec<usize>,
    /// Elements from one row of a split plane to the next, and of the result.
    pitch: usize,
    /// Elements of the split planes of one input channel.
    plane: usize,
    /// Elements of the pitched result, in whole blocks.
    flat: usize,
    /// Per task: split planes (shared ones come first), then the pitched result. Padding is
    /// written once, here.
    scratch: Vec<f32>,
    c_in: usize,
}

impl Planes {
    fn new(geometry: Geometry, c_in: usize, weight: &[f32], shift: Vec<f32>) -> Self {
        let Geometry { kernel, stride, .. } = geometry;
        let pitch = geometry.padded().div_ceil(stride);
        let plane = stride * stride * pitch * pitch;
        let offset = |c: usize, y: usize, x: usize| {
            let part = (y % stride) * stride + x % stride;
            c * plane + part * pitch * pitch + (y / stride) * pitch + x / stride
        };
        let offsets = (0..c_in * kernel * kernel)
            .map(|t| offset(t / (kernel * kernel), t / kernel % kernel, t % kernel))
            .collect();
        let flat = ((geometry.out() - 1) * pitch + geometry.out()).next_multiple_of(BLOCK);
        // A few per thread even out their speeds; one thread keeps its scratch in cache.
        let tasks = match rayon::current_num_threads() {
            1 => 1,
            threads => (4 * threads).min(shift.len()).max(1),
        };
        let scratch = if c_in == 1 { 0 } else { c_in * plane + BLOCK }
            + tasks * Self::per_task(c_in, plane, flat);
        Planes {
            weight: weight.to_vec(),
            shift,
            offsets,
            pitch,
            plane,
            flat,
            scratch: vec![0.0; scratch],
            c_in,
        }
    }

    /// The last block reads up to a block past the planes.
    fn per_task(c_in: usize, plane: usize, flat: usize) -> usize {
        flat + if c_in == 1 { plane + BLOCK } else { 0 }
    }

    fn run(&mut self, geometry: Geometry, src: &[f32], dst: &mut [f32]) {
        let Planes { weight, shift, offsets, pitch, plane, flat, scratch, c_in } = self;
        let (pitch, plane, flat, c_in) = (*pitch, *plane, *flat, *c_in);
        let (size, out) = (geometry.size, geometry.out());
        let taps = offsets.len();
        let shared = if c_in == 1 { 0 } else { c_in * plane + BLOCK };
        let (shared, scratch) = scratch.split_at_mut(shared);
        if c_in > 1 {
            let planes = shared.par_chunks_exact_mut(plane).zip(src.par_chunks(size * size));
            planes.for_each(|(planes, src)| dispatch(Split { geometry, pitch, src, planes }));
        }
        let shared = &*shared;
        let per_task = Self::per_task(c_in, plane, flat);
        let channels_per_task = shift.len().div_ceil(scratch.len() / per_task);
        scratch
            .par_chunks_mut(per_task)
            .zip(dst.par_chunks_mut(channels_per_task * out * out))
            .enumerate()
            .for_each(|(task, (scratch, dst))| {
                let (result, own) = scratch.split_at_mut(flat);
                for (i, dst) in dst.chunks_exact_mut(out * out).enumerate() {
                    let c = task * channels_per_task + i;
                    let planes = if c_in == 1 {
                        let src = &src[c * size * size..][..size * size];
                        dispatch(Split { geometry, pitch, src, planes: own });
                        &*own
                    } else {
                        shared
                    };
                    let weight = &weight[c * taps..][..taps];
                    dispatch(Flat { planes, offsets, weight, shift: shift[c], dst: result });
                    for (row, dst) in result.chunks(pitch).zip(dst.chunks_exact_mut(out)) {
                        dst.copy_from_slice(&row[..out]);
                    }
                }
            });
    }
}

/// Writes a map into its split planes, whose padding is zero already.
struct Split<'a> {
    geometry: Geometry,
    pitch: usize,
    src: &'a [f32],
    planes: &'a mut [f32],
}

impl Kernel for Split<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Split { geometry, pitch, src, planes } = self;
        let Geometry { size, stride, .. } = geometry;
        for (y, row) in src.chunks_exact(size).enumerate() {
            let y = y + geometry.before();
            let part = pitch * pitch;
            let start = (y % stride) * stride * part + y / stride * pitch;
            if stride == 1 {
                planes[start + geometry.before()..][..size].copy_from_slice(row);
                continue;
            }
            // Even columns of the padded row go to the first part, odd ones to the second.
            let (even, odd) = planes[start..].split_at_mut(part);
            let (mut even, mut odd) = (&mut even[..pitch], &mut odd[..pitch]);
            let mut row = row;
            if geometry.before() % 2 == 1 {
                odd[geometry.before() / 2] = row[0];
                row = &row[1..];
                (even, odd) = (&mut even[1..], &mut odd[1..]);
            }
            let column = geometry.before() / 2;
            let (pairs, last) = row.as_chunks::<2>();
            let columns = even[column..].iter_mut().zip(&mut odd[column..]);
            for ((even, odd), pair) in columns.zip(pairs) {
                (*even, *odd) = (pair[0], pair[1]);
            }
            if let [last] = last {
                even[column + pairs.len()] = *last;
            }
        }
    }
}

/// One output channel over a pitched map.
struct Flat<'a> {
    planes: &'a [f32],
    offsets: &'a [usize],
    weight: &'a [f32],
    shift: f32,
    dst: &'a mut [f32],
}

impl Kernel for Flat<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Flat { planes, offsets, weight, shift, dst } = self;
        for (block, dst) in dst.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let mut sum = [shift; BLOCK];
            for (&offset, &weight) in offsets.iter().zip(weight) {
                let src = planes[offset + block * BLOCK..].first_chunk::<BLOCK>();
                multiply_add::<BLOCK, FMA>(&mut sum, src.expect("planes end in a block"), weight);
            }
            *dst = sum.map(relu6);
        }
    }
}

/// Numbers of channels that the channels-last kernels take at once, by preference.
const LANES: [usize; 2] = [48, 16];
/// Output channels of the stem.
const STEM: usize = 32;

/// Channels last: `lanes` channels of a pixel at once, taps outside the map left out.
struct Pixels {
    lanes: usize,
    /// `[c_out / lanes, k, k, c_in, lanes]`.
    weight: Vec<f32>,
    shift: Vec<f32>,
}

impl Pixels {
    fn new(g: Geometry, c_in: usize, lanes: usize, weight: &[f32], shift: Vec<f32>) -> Self {
        let taps = g.kernel * g.kernel;
        let mut packed = Vec::with_capacity(weight.len());
        for first in (0..shift.len()).step_by(lanes) {
            for tap in 0..taps {
                for c in 0..c_in {
                    let lane = |c_out| weight[(c_out * c_in + c) * taps + tap];
                    packed.extend((first..first + lanes).map(lane));
                }
            }
        }
        Pixels { lanes, weight: packed, shift }
    }
}

/// One row of dst.
struct Row<'a> {
    geometry: Geometry,
    channels: usize,
    pixels: &'a Pixels,
    src: &'a [f32],
    y: usize,
    dst: &'a mut [f32],
}

struct DepthwiseRow<'a, const LANES: usize>(Row<'a>);

impl<const LANES: usize> Kernel for DepthwiseRow<'_, LANES> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Row { geometry, channels, pixels, src, y, dst } = self.0;
        let Geometry { size, kernel, stride } = geometry;
        let rows = geometry.taps(y);
        let weight = pixels.weight.as_chunks::<LANES>().0.chunks_exact(kernel * kernel);
        for (block, weight) in weight.enumerate() {
            let first = block * LANES;
            let shift = pixels.shift[first..].first_chunk::<LANES>().expect("whole blocks");
            for (x, dst) in dst.chunks_exact_mut(channels).enumerate() {
                let columns = geometry.taps(x);
                let left = x * stride + columns.start - geometry.before();
                let mut sum = *shift;
                for ky in rows.clone() {
                    let row = (y * stride + ky - geometry.before()) * size + left;
                    let weight = &weight[ky * kernel + columns.start..][..columns.len()];
                    let src = src[row * channels + first..].chunks(channels);
                    for (weight, src) in weight.iter().zip(src) {
                        let src = src.first_chunk::<LANES>().expect("whole blocks");
                        multiply_add_each::<LANES, FMA>(&mut sum, src, weight);
                    }
                }
                dst[first..][..LANES].copy_from_slice(&sum.map(relu6));
            }
        }
    }
}

struct StemRow<'a>(Row<'a>);

impl Kernel for StemRow<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Row { geometry, channels, pixels, src, y, dst } = self.0;
        let Geometry { size, kernel, stride } = geometry;
        let weight = pixels.weight.as_chunks::<STEM>().0;
        let c_in = src.len() / (size * size);
        let shift = pixels.shift.first_chunk::<STEM>().expect("the stem's channels");
        for (x, dst) in dst.chunks_exact_mut(channels).enumerate() {
            let columns = geometry.taps(x);
            let left = x * stride + columns.start - geometry.before();
            let mut sum = *shift;
            for ky in geometry.taps(y) {
                let row = (y * stride + ky - geometry.before()) * size + left;
                let src = &src[row * c_in..][..columns.len() * c_in];
                let weight = &weight[(ky * kernel + columns.start) * c_in..];
                for (src, weight) in src.iter().zip(weight) {
                    multiply_add::<STEM, FMA>(&mut sum, weight, *src);
                }
            }
            dst.copy_from_slice(&sum.map(relu6));
        }
    }
}

/// The mean over all positions: `src [c, positions]` (or channels last) to `dst [c]`.
pub fn mean(src: &[f32], dst: &mut [f32], layout: Layout) {
    let channels = dst.len();
    let positions = src.len() / channels;
    match layout {
        Layout::ChannelsFirst => {
            for (src, dst) in src.chunks_exact(positions).zip(dst) {
                *dst = src.iter().sum::<f32>() / positions as f32;
            }
        }
        Layout::ChannelsLast => {
            dst.fill(0.0);
            for src in src.chunks_exact(channels) {
                dst.iter_mut().zip(src).for_each(|(dst, src)| *dst += src);
            }
            dst.iter_mut().for_each(|dst| *dst /= positions as f32);
        }
    }
}

/// NaN stays NaN.
fn relu6(x: f32) -> f32 {
    x.clamp(0.0, 6.0)
}

#[inline(always)]
fn fused<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction, mul_add is a call into libm.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn multiply_add<const N: usize, const FMA: bool>(sum: &mut [f32; N], a: &[f32; N], b: f32) {
    for (sum, a) in sum.iter_mut().zip(a) {
        *sum = fused::<FMA>(*a, b, *sum);
    }
}

#[inline(always)]
fn multiply_add_each<const N: usize, const FMA: bool>(
    sum: &mut [f32; N],
    a: &[f32; N],
    b: &[f32; N],
) {
    for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
        *sum = fused::<FMA>(*a, *b, *sum);
    }
}

/// A loop that the compiler vectorises for the instruction set that it is inlined into.
trait Kernel {
    fn run<const FMA: bool>(self);
}

fn dispatch<K: Kernel>(kernel: K) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn wide<K: Kernel>(kernel: K) {
            kernel.run::<true>();
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has just said that it has both features.
            return unsafe { wide(kernel) };
        }
    }
    kernel.run::<{ cfg!(target_arch = "aarch64") }>();
}
