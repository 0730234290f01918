//! What EfficientNet-Lite0 needs beside pointwise convolutions, in plain Rust: the 3x3 stem, the
//! depthwise convolutions (each with its folded batch norm and ReLU6), and the mean over positions.

use pointwise::Layout;
use rayon::prelude::*;

/// Values of a vector: channels of a position or, channels first, positions of a row.
const LANES: usize = 16;
/// Vectors that a kernel computes at once: positions of a row or, channels first, rows. Every map
/// of the network is a multiple of it high and wide.
const TILE: usize = 7;

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
        // Each pair is compiled on its own: taps, steps and spans are constants of the inner loop.
        match (body, geometry.kernel, geometry.stride) {
            (Body::Planes(planes), 3, 2) if planes.c_in == 3 => {
                planes.stem::<3, 2, 15>(geometry, src, dst);
            }
            (Body::Planes(planes), 3, 1) => planes.depthwise::<3, 1, 9>(geometry, src, dst),
            (Body::Planes(planes), 3, 2) => planes.depthwise::<3, 2, 15>(geometry, src, dst),
            (Body::Planes(planes), 5, 1) => planes.depthwise::<5, 1, 11>(geometry, src, dst),
            (Body::Planes(planes), 5, 2) => planes.depthwise::<5, 2, 17>(geometry, src, dst),
            (Body::Stem(pixels), 3, 2) => pixels.run::<9, 6, 45>(geometry, src, dst),
            (Body::Depthwise(pixels), 3, 1) => pixels.run::<3, 1, 9>(geometry, src, dst),
            (Body::Depthwise(pixels), 3, 2) => pixels.run::<3, 2, 15>(geometry, src, dst),
            (Body::Depthwise(pixels), 5, 1) => pixels.run::<5, 1, 11>(geometry, src, dst),
            (Body::Depthwise(pixels), 5, 2) => pixels.run::<5, 2, 17>(geometry, src, dst),
            _ => unreachable!("the network has no such convolution"),
        }
    }
}

/// A vector that no load finds on two cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; LANES]);

/// A factor of every lane's product.
trait Factor {
    fn lane(&self, lane: usize) -> f32;
}

impl Factor for Lanes {
    #[inline(always)]
    fn lane(&self, lane: usize) -> f32 {
        self.0[lane]
    }
}

/// The first values of a row.
impl<const N: usize> Factor for [f32; N] {
    #[inline(always)]
    fn lane(&self, lane: usize) -> f32 {
        self[lane]
    }
}

/// The same for all lanes.
impl Factor for f32 {
    #[inline(always)]
    fn lane(&self, _: usize) -> f32 {
        *self
    }
}

/// Adds `TAPS` products to each sum; the first factors of one sum and the next are `STEP` apart,
/// which makes `SPAN = (TILE - 1) * STEP + TAPS`.
/// LLVM makes vectors of the outer loop, and keeps the sums in registers.
#[inline(always)]
fn add_taps<
    A: Factor,
    B: Factor,
    const TAPS: usize,
    const STEP: usize,
    const SPAN: usize,
    const FMA: bool,
>(
    sums: &mut [Lanes; TILE],
    src: &[A; SPAN],
    weight: &[B; TAPS],
) {
    for lane in 0..LANES {
        for tap in 0..TAPS {
            for (i, sum) in sums.iter_mut().enumerate() {
                let (a, b) = (src[i * STEP + tap].lane(lane), weight[tap].lane(lane));
                sum.0[lane] = fused::<FMA>(a, b, sum.0[lane]);
            }
        }
    }
}

/// Values of a padded row of a map, channels first: 112 positions and what a vector reads after
/// the last one, in an odd number of cache lines, lest rows displace one another. The stem's map
/// is twice as wide.
const WIDTH: usize = 9 * LANES;
const STEM_WIDTH: usize = 17 * LANES;

/// Channels first. Lanes are positions of a row, a tile is as many rows. With stride 2, the even
/// columns of a padded row come before the odd ones, so that every tap reads contiguously.
struct Planes {
    c_in: usize,
    /// `[c_out, c_in, column, row]`.
    weight: Vec<f32>,
    shift: Vec<f32>,
    /// Output channels that a task computes.
    channels: usize,
    /// Per task, or once for the stem: `[c_in, rows, width]`. The padding is written once, here.
    padded: Vec<f32>,
    /// Elements of one padded map.
    plane: usize,
}

impl Planes {
    fn new(geometry: Geometry, c_in: usize, weight: &[f32], shift: Vec<f32>) -> Self {
        let k = geometry.kernel;
        let tap = |i| weight[i / (k * k) * (k * k) + i % k * k + i / k % k];
        // A few tasks per thread even out their speeds; one thread keeps its map in cache.
        let tasks = match rayon::current_num_threads() {
            1 => 1,
            threads => (4 * threads).min(shift.len()),
        };
        let width = if c_in == 1 { WIDTH } else { STEM_WIDTH };
        // The last tap begins behind the first column, and reads whole rows.
        let plane = (geometry.padded() + 1) * width;
        Planes {
            c_in,
            weight: (0..weight.len()).map(tap).collect(),
            channels: shift.len().div_ceil(tasks),
            padded: vec![0.0; plane * if c_in == 1 { tasks } else { c_in }],
            shift,
            plane,
        }
    }

    /// One filter per channel.
    fn depthwise<const K: usize, const S: usize, const SPAN: usize>(
        &mut self,
        geometry: Geometry,
        src: &[f32],
        dst: &mut [f32],
    ) {
        let Planes { ref weight, ref shift, channels, ref mut padded, plane, .. } = *self;
        let (map, out) = (geometry.size * geometry.size, geometry.out() * geometry.out());
        let tasks = padded.par_chunks_mut(plane).zip(dst.par_chunks_mut(channels * out));
        tasks.enumerate().for_each(|(task, (padded, dst))| {
            for (i, dst) in dst.chunks_exact_mut(out).enumerate() {
                let c = task * channels + i;
                dispatch(Pad::<S, WIDTH> { geometry, src: &src[c * map..][..map], padded });
                let (weight, shift) = (&weight[c * K * K..][..K * K], shift[c]);
                dispatch(Map::<K, S, SPAN, WIDTH> { geometry, padded, plane, weight, shift, dst });
            }
        });
    }

    /// All channels of src for each of dst.
    fn stem<const K: usize, const S: usize, const SPAN: usize>(
        &mut self,
        geometry: Geometry,
        src: &[f32],
        dst: &mut [f32],
    ) {
        let Planes { c_in, ref weight, ref shift, ref mut padded, plane, .. } = *self;
        let (map, out) = (geometry.size * geometry.size, geometry.out() * geometry.out());
        padded.par_chunks_mut(plane).zip(src.par_chunks(map)).for_each(|(padded, src)| {
            dispatch(Pad::<S, STEM_WIDTH> { geometry, src, padded });
        });
        let padded = &*padded;
        dst.par_chunks_mut(out).zip(shift).enumerate().for_each(|(c, (dst, &shift))| {
            let weight = &weight[c * c_in * K * K..][..c_in * K * K];
            dispatch(Map::<K, S, SPAN, STEM_WIDTH> { geometry, padded, plane, weight, shift, dst });
        });
    }
}

/// Writes a map between its padding, which is zero already.
struct Pad<'a, const S: usize, const WIDTH: usize> {
    geometry: Geometry,
    src: &'a [f32],
    padded: &'a mut [f32],
}

impl<const S: usize, const WIDTH: usize> Kernel for Pad<'_, S, WIDTH> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Pad { geometry, src, padded } = self;
        let (size, before) = (geometry.size, geometry.before());
        let rows = padded.as_chunks_mut::<WIDTH>().0[before..].iter_mut();
        for (padded, src) in rows.zip(src.chunks_exact(size)) {
            if S == 1 {
                padded[before..][..size].copy_from_slice(src);
                continue;
            }
            let (even, odd) = padded.split_at_mut(WIDTH / 2);
            // The first column of src that is an even one of the padded row.
            let (first, rest) = src.split_at(before % 2);
            odd[before / 2..][..first.len()].copy_from_slice(first);
            let even = &mut even[before.div_ceil(2)..];
            let odd = &mut odd[before.div_ceil(2)..];
            let (pairs, last) = rest.as_chunks::<2>();
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(pairs) {
                (*even, *odd) = (pair[0], pair[1]);
            }
            even[pairs.len()..][..last.len()].copy_from_slice(last);
        }
    }
}

/// One map of dst.
struct Map<'a, const K: usize, const S: usize, const SPAN: usize, const WIDTH: usize> {
    geometry: Geometry,
    padded: &'a [f32],
    plane: usize,
    /// `[c_in, column, row]`.
    weight: &'a [f32],
    shift: f32,
    dst: &'a mut [f32],
}

impl<const K: usize, const S: usize, const SPAN: usize, const WIDTH: usize> Kernel
    for Map<'_, K, S, SPAN, WIDTH>
{
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Map { geometry, padded, plane, weight, shift, dst } = self;
        let out = geometry.out();
        let weight = weight.as_chunks::<K>().0;
        for y in (0..out).step_by(TILE) {
            for x in (0..out).step_by(LANES) {
                // The last vector of a row ends with it, or goes on into rows that come later.
                let x = x.min(out.saturating_sub(LANES));
                let mut sums = [Lanes([shift; LANES]); TILE];
                for (i, weight) in weight.iter().enumerate() {
                    let (c, column) = (i / K, i % K);
                    let column = column % S * (WIDTH / S) + column / S + x;
                    let rows = &padded[c * plane + y * S * WIDTH + column..];
                    let rows = rows.as_chunks::<WIDTH>().0.first_chunk().expect("a whole tile");
                    add_taps::<[f32; WIDTH], f32, K, S, SPAN, FMA>(&mut sums, rows, weight);
                }
                for (i, sum) in sums.iter().enumerate() {
                    let sum = sum.0.map(relu6);
                    let dst = &mut dst[(y + i) * out + x..];
                    match dst.first_chunk_mut() {
                        Some(dst) => *dst = sum,
                        None => dst.copy_from_slice(&sum[..dst.len()]),
                    }
                }
            }
        }
    }
}

/// Bytes of src that the channels-last kernel expects to find in cache again.
const CACHED: usize = 384 << 10;

/// What a tap reads at a position, channels last.
trait Value: Factor + Copy + Send + Sync {
    const ZERO: Self;

    /// Takes what a block of output channels needs of a row `[size, channels]` of src.
    fn take(row: &mut [Self], src: &[f32], channels: usize, block: usize);
}

/// Depthwise: each output channel reads the channel of its own.
impl Value for Lanes {
    const ZERO: Self = Lanes([0.0; LANES]);

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
                        add_taps::<V, Lanes, TAPS, STEP, SPAN, FMA>(&mut sums, src, &weight[ky]);
                    }
                    for (dst, sum) in dst[block..].iter_mut().step_by(blocks).zip(&sums) {
                        *dst = sum.0.map(relu6);
                    }
                }
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
