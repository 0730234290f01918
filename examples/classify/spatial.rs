//! What EfficientNet-Lite0 needs beside pointwise convolutions, in plain Rust: the 3x3 stem, the
//! depthwise convolutions (each with its folded batch norm and ReLU6), and the mean over positions.

use pointwise::Layout;
use rayon::prelude::*;

/// Values that the kernel computes at once in channels-first maps: a whole number of vectors.
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
    body: Body,
}

enum Body {
    Planes(Planes),
    Depthwise(Pixels<Lanes>),
    Stem(Pixels<f32>),
}

impl Convolution {
    /// One filter per channel: `weight [channels, 1, k, k]` in C order.
    pub fn depthwise(geometry: Geometry, weight: &[f32], shift: Vec<f32>, layout: Layout) -> Self {
        let body = match layout {
            Layout::ChannelsFirst => Body::Planes(Planes::new(geometry, 1, weight, shift)),
            Layout::ChannelsLast => Body::Depthwise(Pixels::new(geometry, 1, weight, &shift)),
        };
        Convolution { geometry, body }
    }

    /// The stem: `weight [32, 3, k, k]` in C order.
    pub fn stem(geometry: Geometry, weight: &[f32], shift: Vec<f32>, layout: Layout) -> Self {
        let body = match layout {
            Layout::ChannelsFirst => Body::Planes(Planes::new(geometry, 3, weight, shift)),
            Layout::ChannelsLast => Body::Stem(Pixels::new(geometry, 3, weight, &shift)),
        };
        Convolution { geometry, body }
    }

    /// `src [c_in, size, size]` to `dst [channels, out, out]`, or channels last.
    pub fn run(&mut self, src: &[f32], dst: &mut [f32]) {
        let Convolution { geometry, ref mut body } = *self;
        match (body, geometry.kernel, geometry.stride) {
            (Body::Planes(planes), ..) => planes.run(geometry, src, dst),
            // Taps of a row, values from one position to the next, values under a tile.
            (Body::Stem(stem), 3, 2) => stem.run::<9, 6, 45>(geometry, src, dst),
            (Body::Depthwise(depthwise), 3, 1) => {
                depthwise.run::<3, 1, 9>(geometry, src, dst);
            }
            (Body::Depthwise(depthwise), 3, 2) => {
                depthwise.run::<3, 2, 15>(geometry, src, dst);
            }
            (Body::Depthwise(depthwise), 5, 1) => {
                depthwise.run::<5, 1, 11>(geometry, src, dst);
            }
            (Body::Depthwise(depthwise), 5, 2) => {
                depthwise.run::<5, 2, 17>(geometry, src, dst);
            }
            _ => unreachable!("the network has no such convolution"),
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

/// Channels that the channels-last kernel computes at once.
const LANES: usize = 16;
/// Positions of a row of dst that it computes at once: every map's size is a multiple of it.
const TILE: usize = 7;
/// Bytes of src that it expects to find in cache again.
const CACHED: usize = 384 << 10;

/// A vector that no load finds on two cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; LANES]);

/// What a tap reads at a position.
trait Value: Copy + Send + Sync {
    const ZERO: Self;

    /// The factor of the lane's weight.
    fn lane(&self, lane: usize) -> f32;

    /// Takes what a block of output channels needs of a row `[size, channels]` of src.
    fn take(row: &mut [Self], src: &[f32], channels: usize, block: usize);
}

/// Depthwise: each output channel reads the channel of its own.
impl Value for Lanes {
    const ZERO: Self = Lanes([0.0; LANES]);

    #[inline(always)]
    fn lane(&self, lane: usize) -> f32 {
        self.0[lane]
    }

    #[inline(always)]
    fn take(row: &mut [Self], src: &[f32], channels: usize, block: usize) {
        let src = src.as_chunks::<LANES>().0[block..].iter().step_by(channels / LANES);
        row.iter_mut().zip(src).for_each(|(row, src)| row.0 = *src);
    }
}

/// Stem: all output channels read all channels.
impl Value for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn lane(&self, _: usize) -> f32 {
        *self
    }

    #[inline(always)]
    fn take(row: &mut [Self], src: &[f32], _: usize, _: usize) {
        row[..src.len()].copy_from_slice(src);
    }
}

/// Channels last. For a block of channels after the other, the rows of src that a row of dst reads
/// are kept, padded, in a ring: they stay in the nearest cache, and there are no edges left.
struct Pixels<V> {
    c_in: usize,
    /// `[c_out / LANES, k, k, c_in]`.
    weight: Vec<Lanes>,
    shift: Vec<Lanes>,
    /// Rows of dst that a task computes.
    band: usize,
    /// Per task `[k, pitch]`. The padding is written once, here.
    rings: Vec<V>,
    pitch: usize,
}

impl<V: Value> Pixels<V> {
    fn new(geometry: Geometry, c_in: usize, weight: &[f32], shift: &[f32]) -> Self {
        let (out, taps) = (geometry.out(), geometry.kernel * geometry.kernel);
        let (blocks, rest) = shift.as_chunks::<LANES>();
        assert!(rest.is_empty(), "the network's numbers of channels are multiples of {LANES}");
        let packed = (0..blocks.len() * taps * c_in).map(|i| {
            let (block, tap, c) = (i / (taps * c_in), i / c_in % taps, i % c_in);
            let lane = |lane| weight[((block * LANES + lane) * c_in + c) * taps + tap];
            Lanes(std::array::from_fn(lane))
        });
        // A few tasks per thread even out their speeds; shorter ones would take more rows in.
        let band = match rayon::current_num_threads() {
            1 => out,
            threads => out.div_ceil(4 * threads).max(out.div_ceil(threads).min(TILE)),
        };
        let pitch = geometry.padded() * c_in;
        Pixels {
            c_in,
            weight: packed.collect(),
            shift: blocks.iter().map(|&block| Lanes(block)).collect(),
            band,
            rings: vec![V::ZERO; out.div_ceil(band) * geometry.kernel * pitch],
            pitch,
        }
    }

    fn run<const TAPS: usize, const STEP: usize, const SPAN: usize>(
        &mut self,
        geometry: Geometry,
        src: &[f32],
        dst: &mut [f32],
    ) {
        let Pixels { c_in, ref weight, ref shift, band, ref mut rings, pitch } = *self;
        let row = geometry.out() * LANES * shift.len();
        let src_channels = src.len() / (geometry.size * geometry.size);
        let bands = dst.par_chunks_mut(band * row);
        let rings = rings.par_chunks_mut(geometry.kernel * pitch);
        // Every block of channels goes through the same rows of src while they are in cache.
        let step = geometry.stride * geometry.size * src_channels;
        let rows = (CACHED / size_of_val(&src[..step])).clamp(1, band);
        bands.zip(rings).enumerate().for_each(|(i, (dst, ring))| {
            for (j, dst) in dst.chunks_mut(rows * row).enumerate() {
                let first = i * band + j * rows;
                dispatch(Band::<_, TAPS, STEP, SPAN> {
                    geometry,
                    c_in,
                    weight,
                    shift,
                    ring,
                    src,
                    first,
                    dst,
                });
            }
        });
    }
}

/// Rows of dst from `first` on.
struct Band<'a, V, const TAPS: usize, const STEP: usize, const SPAN: usize> {
    geometry: Geometry,
    c_in: usize,
    weight: &'a [Lanes],
    shift: &'a [Lanes],
    ring: &'a mut [V],
    src: &'a [f32],
    first: usize,
    dst: &'a mut [f32],
}

impl<V: Value, const TAPS: usize, const STEP: usize, const SPAN: usize> Kernel
    for Band<'_, V, TAPS, STEP, SPAN>
{
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Band { geometry, c_in, weight, shift, ring, src, first, dst } = self;
        let Geometry { size, kernel, stride } = geometry;
        let (blocks, pitch) = (shift.len(), ring.len() / kernel);
        let (channels, before) = (src.len() / (size * size), geometry.before());
        let dst = dst.as_chunks_mut::<LANES>().0;
        let weight = weight.as_chunks::<TAPS>().0.chunks_exact(kernel);
        for (block, (weight, shift)) in weight.zip(shift).enumerate() {
            let mut taken = (first * stride).saturating_sub(before);
            for (y, dst) in dst.chunks_exact_mut(geometry.out() * blocks).enumerate() {
                let top = (first + y) * stride;
                let taps = geometry.taps(first + y);
                while taken < top + taps.end - before {
                    let row = &mut ring[taken % kernel * pitch..][before * c_in..pitch];
                    let src = &src[taken * size * channels..][..size * channels];
                    V::take(row, src, channels, block);
                    taken += 1;
                }
                for (tile, dst) in dst.chunks_exact_mut(TILE * blocks).enumerate() {
                    let mut sums = [*shift; TILE];
                    for ky in taps.clone() {
                        let row = &ring[(top + ky - before) % kernel * pitch..][..pitch];
                        let src = row[tile * TILE * STEP..].first_chunk().expect("a whole tile");
                        add_row::<V, TAPS, STEP, SPAN, FMA>(&mut sums, src, &weight[ky]);
                    }
                    for (dst, sum) in dst[block..].iter_mut().step_by(blocks).zip(&sums) {
                        *dst = sum.0.map(relu6);
                    }
                }
            }
        }
    }
}

/// Adds a row of taps at each position of a tile. This order of the loops is the one from which
/// LLVM makes vectors of lanes, and keeps the sums in registers.
#[inline(always)]
fn add_row<V: Value, const TAPS: usize, const STEP: usize, const SPAN: usize, const FMA: bool>(
    sums: &mut [Lanes; TILE],
    src: &[V; SPAN],
    weight: &[Lanes; TAPS],
) {
    for lane in 0..LANES {
        for tap in 0..TAPS {
            for (i, sum) in sums.iter_mut().enumerate() {
                let value = src[i * STEP + tap].lane(lane);
                sum.0[lane] = fused::<FMA>(value, weight[tap].0[lane], sum.0[lane]);
            }
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

/// A loop that the compiler vectorises for the instruction set that it is inlined into.
trait Kernel {
    fn run<const FMA: bool>(self);
}

fn dispatch<K: Kernel>(kernel: K) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512<K: Kernel>(kernel: K) {
            kernel.run::<true>();
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<K: Kernel>(kernel: K) {
            kernel.run::<true>();
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has just said that it has the feature.
            return unsafe { avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above, for both features.
            return unsafe { avx2(kernel) };
        }
    }
    kernel.run::<{ cfg!(target_arch = "aarch64") }>();
}
