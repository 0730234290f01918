//! Small integers, so that every sum is exact: each kernel must agree bitwise with integer
//! arithmetic, rounded once to what tensors hold, on every shape of the tables, in every layout and
//! dtype.

use std::sync::{Arc, LazyLock};

use ndarray::Array2;
use pointwise::{
    DType, Device, Element, Pointwise, PrepareOptions, Prepared, TensorMut, TensorRef, bf16, f16,
};

/// What a source and a result hold beside their own elements: a value that would show in any sum,
/// and one that nothing computes.
const POISON: f32 = f32::NAN;
const CANARY: f32 = 12345.678;
const FENCE: usize = 67;

/// Ends every array of numbers at a page that nobody may touch, so that a kernel that reads beyond
/// a tensor, a packed weight or a parameter stops the test.
#[cfg(target_os = "linux")]
mod guard {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::ffi::{c_int, c_long, c_void};
    use std::ptr::null_mut;
    use std::sync::{Mutex, PoisonError};

    unsafe extern "C" {
        fn mmap(
            at: *mut c_void,
            len: usize,
            prot: c_int,
            flags: c_int,
            fd: c_int,
            offset: c_long,
        ) -> *mut c_void;
        fn mprotect(at: *mut c_void, len: usize, prot: c_int) -> c_int;
        fn munmap(at: *mut c_void, len: usize) -> c_int;
    }

    /// At least a page of any Linux.
    const PAGE: usize = 64 << 10;
    const READ_WRITE: c_int = 3;
    const PRIVATE_ANONYMOUS: c_int = 0x22;

    struct Guarded;

    /// f32, u32 and i32 have an alignment of 4, f16 and bf16 one of 2, cache lines of f32 one of 64.
    fn holds_numbers(layout: &Layout) -> bool {
        matches!(layout.align(), 2 | 4 | 64) && layout.size().is_multiple_of(layout.align())
    }

    fn pages(layout: &Layout) -> usize {
        layout.size().next_multiple_of(PAGE)
    }

    /// Mappings to be used again, guard and all, by their number of pages: each begins with the
    /// address of the next one. (To map takes longer than to run most of these layers.)
    static FREE: [Mutex<usize>; 8] = [const { Mutex::new(0) }; 8];

    fn free(pages: usize) -> Option<&'static Mutex<usize>> {
        FREE.get(pages / PAGE)
    }

    /// The first byte of so many bytes of pages that end at a guard.
    fn map(pages: usize) -> *mut u8 {
        if let Some(list) = free(pages) {
            let mut head = list.lock().unwrap_or_else(PoisonError::into_inner);
            if *head != 0 {
                let base = std::ptr::with_exposed_provenance_mut::<usize>(*head);
                // SAFETY: a mapping of the list.
                *head = unsafe { base.read() };
                return base.cast();
            }
        }
        // SAFETY: a new mapping; the guard is its last page.
        unsafe {
            let base = mmap(null_mut(), pages + PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
            if base as isize == -1 {
                return null_mut();
            }
            if mprotect(base.byte_add(pages), PAGE, 0) != 0 {
                munmap(base, pages + PAGE);
                return null_mut();
            }
            base.cast()
        }
    }

    // SAFETY: each block is a mapping of its own that ends with the block, rounded to its
    // alignment by the sizes that `holds_numbers` lets through; the others are the system's.
    unsafe impl GlobalAlloc for Guarded {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            if !holds_numbers(&layout) {
                // SAFETY: the caller's promises.
                return unsafe { System.alloc(layout) };
            }
            let pages = pages(&layout);
            match map(pages) {
                base if base.is_null() => base,
                // SAFETY: the mapping has so many pages.
                base => unsafe { base.add(pages - layout.size()) },
            }
        }

        unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
            if !holds_numbers(&layout) {
                // SAFETY: the caller's promises.
                return unsafe { System.dealloc(ptr, layout) };
            }
            let pages = pages(&layout);
            // SAFETY: the mapping of `alloc`, nobody's any more.
            unsafe {
                let base = ptr.add(layout.size()).sub(pages).cast::<usize>();
                match free(pages) {
                    Some(list) => {
                        // Who reads it now, or does not write it later, finds NaN.
                        ptr.write_bytes(0xFF, layout.size());
                        let mut head = list.lock().unwrap_or_else(PoisonError::into_inner);
                        base.write(std::mem::replace(&mut *head, base.expose_provenance()));
                    }
                    None => {
                        munmap(base.cast(), pages + PAGE);
                    }
                }
            }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Guarded = Guarded;
}

/// The order of axes in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Nchw,
    Nhwc,
}

const ORDERS: [(Order, Order); 4] = [
    (Order::Nchw, Order::Nchw),
    (Order::Nhwc, Order::Nhwc),
    (Order::Nhwc, Order::Nchw),
    (Order::Nchw, Order::Nhwc),
];

/// A logical `[n, c, p]` tensor inside a fenced buffer, alone or as a range of the channels of a
/// larger tensor.
struct Placed<T> {
    data: Vec<T>,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<isize>,
    /// Of neighbouring positions, across axes.
    position_stride: usize,
}

impl<T: Element> Placed<T> {
    fn new(order: Order, beside: usize, n: usize, c: usize, spatial: &[usize], fill: f32) -> Self {
        // What is alone in memory ends where its memory does.
        let (fence_before, fence_after) = (FENCE, if beside == 0 { 0 } else { FENCE });
        let p: usize = spatial.iter().product();
        let total = c + beside;
        let (sample, channel, position) = match order {
            Order::Nchw => (total * p, p, 1),
            Order::Nhwc => (total * p, 1, total),
        };
        let mut strides = vec![position as isize; spatial.len() + 2];
        for axis in (0..spatial.len().saturating_sub(1)).rev() {
            strides[axis + 2] = strides[axis + 3] * spatial[axis + 1] as isize;
        }
        (strides[0], strides[1]) = (sample as isize, channel as isize);
        Placed {
            data: vec![T::from_f32(fill); n * total * p + fence_before + fence_after],
            offset: fence_before + beside / 2 * channel,
            shape: [n, c].iter().chain(spatial).copied().collect(),
            strides,
            position_stride: position,
        }
    }

    /// The index of channel `c` at position `p` of sample `n`.
    fn at(&self, n: usize, c: usize, p: usize) -> usize {
        self.offset
            + n * self.strides[0] as usize
            + c * self.strides[1] as usize
            + p * self.position_stride
    }

    fn positions(&self) -> usize {
        self.shape[2..].iter().product()
    }

    /// Writes `values[n][c][p]`.
    fn set(&mut self, values: impl Fn(usize, usize, usize) -> f32) {
        for n in 0..self.shape[0] {
            for c in 0..self.shape[1] {
                for p in 0..self.positions() {
                    let at = self.at(n, c, p);
                    self.data[at] = T::from_f32(values(n, c, p));
                }
            }
        }
    }

    fn view(&self) -> TensorRef<'_, T> {
        TensorRef::from_slice(&self.data, self.offset, &self.shape, &self.strides).unwrap()
    }

    fn view_mut(&mut self) -> TensorMut<'_, T> {
        TensorMut::from_slice(&mut self.data, self.offset, &self.shape, &self.strides).unwrap()
    }
}

/// A layer and its call; `c_out` and `k` are those of one group.
#[derive(Clone, Debug)]
struct Case {
    n: usize,
    groups: usize,
    k: usize,
    c_out: usize,
    spatial: Vec<usize>,
    stride: usize,
    /// Channels of src that pass through, in front and behind.
    partial: Option<(usize, usize)>,
    /// Channels of the sources that stand for a concatenation.
    concat: Option<Vec<usize>>,
    bias: bool,
    residual: bool,
    relu: bool,
    shuffle: usize,
}

impl Case {
    fn plain(n: usize, k: usize, c_out: usize, spatial: &[usize]) -> Self {
        Case {
            n,
            groups: 1,
            k,
            c_out,
            spatial: spatial.to_vec(),
            stride: 1,
            partial: None,
            concat: None,
            bias: false,
            residual: false,
            relu: false,
            shuffle: 1,
        }
    }

    fn sources(&self) -> Vec<usize> {
        let (before, after) = self.partial.unwrap_or_default();
        self.concat.clone().unwrap_or(vec![before + self.k * self.groups + after])
    }

    fn dst_spatial(&self) -> Vec<usize> {
        self.spatial.iter().map(|s| s.div_ceil(self.stride)).collect()
    }

    fn dst_channels(&self) -> usize {
        let (before, after) = self.partial.unwrap_or_default();
        before + self.c_out * self.groups + after
    }

    /// Multiply-accumulates.
    fn macs(&self) -> usize {
        let positions: usize = self.dst_spatial().iter().product();
        self.n * positions * self.groups * self.c_out * self.k
    }
}

/// Integers that look random, the same in every run.
fn integer(salt: usize, a: usize, b: usize, c: usize, half: i32) -> i32 {
    let mut x = (salt as u64) << 48 ^ (a as u64) << 40 ^ (b as u64) << 20 ^ c as u64;
    x = (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((x >> 33) % (2 * half + 1) as u64) as i32 - half
}

const WEIGHT: (usize, i32) = (1, 3);
const SRC: (usize, i32) = (2, 15);
const BIAS: (usize, i32) = (3, 99);
const RESIDUAL: usize = 4;

/// Integers that every type holds exactly.
fn residual_half(dtype: DType) -> i32 {
    if dtype == DType::Bf16 { 127 } else { 999 }
}

/// `dst[n][c][p]`, in integers. `src[c][p]` counts the channels of all sources together.
fn expected(case: &Case, dtype: DType) -> Vec<i32> {
    let (before, after) = case.partial.unwrap_or_default();
    let (rows, c_in) = (case.c_out * case.groups, case.k * case.groups);
    let dst_spatial = case.dst_spatial();
    let positions: usize = dst_spatial.iter().product();
    // The position of src that each position of dst comes from.
    let from: Vec<usize> = (0..positions)
        .map(|p| {
            let (mut rest, mut index, mut step) = (p, 0, 1);
            for (&len, &kept) in case.spatial.iter().zip(&dst_spatial).rev() {
                index += rest % kept * case.stride * step;
                rest /= kept;
                step *= len;
            }
            index
        })
        .collect();
    let mut dst = vec![0; case.n * case.dst_channels() * positions];
    for (n, sample) in dst.chunks_exact_mut((case.dst_channels() * positions).max(1)).enumerate() {
        let src: Vec<Vec<i32>> = (0..before + c_in + after)
            .map(|c| from.iter().map(|&p| integer(SRC.0, n, c, p, SRC.1)).collect())
            .collect();
        for (c, out) in sample.chunks_exact_mut(positions).enumerate() {
            if c < before || c >= before + rows {
                let c = if c < before { c } else { c - rows + c_in };
                out.copy_from_slice(&src[c]);
                continue;
            }
            // PyTorch's shuffle: channel `i * groups + g` is what was channel `g * per_group + i`.
            let per_group = rows / case.shuffle;
            let row = (c - before) % case.shuffle * per_group + (c - before) / case.shuffle;
            for i in 0..case.k {
                let w = integer(WEIGHT.0, 0, row, i, WEIGHT.1);
                let src = &src[before + row / case.c_out * case.k + i];
                out.iter_mut().zip(src).for_each(|(sum, x)| *sum += w * x);
            }
            let bias = if case.bias { integer(BIAS.0, 0, 0, row, BIAS.1) } else { 0 };
            for (p, x) in out.iter_mut().enumerate() {
                *x += bias;
                if case.residual {
                    *x += integer(RESIDUAL, n, c, p, residual_half(dtype));
                }
                if case.relu {
                    *x = (*x).max(0);
                }
            }
        }
    }
    dst
}

fn layer(case: &Case) -> Pointwise {
    let rows = case.c_out * case.groups;
    let weight = Array2::from_shape_fn((rows, case.k), |(row, i)| {
        integer(WEIGHT.0, 0, row, i, WEIGHT.1) as f32
    });
    let mut layer = Pointwise::new(weight).groups(case.groups).stride(case.stride);
    if let Some((before, _)) = case.partial {
        layer = layer.partial(before..before + case.k * case.groups);
    }
    if case.bias {
        let bias: Vec<f32> =
            (0..rows).map(|row| integer(BIAS.0, 0, 0, row, BIAS.1) as f32).collect();
        layer = layer.bias(bias);
    }
    if case.shuffle > 1 {
        layer = layer.channel_shuffle(case.shuffle);
    }
    if case.residual {
        layer = layer.residual();
    }
    if case.relu {
        layer = layer.relu();
    }
    layer
}

/// One thread, and several on any machine: how a problem is cut depends on it.
static DEVICES: LazyLock<[Device; 2]> = LazyLock::new(|| {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    [Device::cpu().threads(1), Device::cpu_with_pool(Arc::new(pool))]
});

/// More is worth several threads, and runs on both devices.
const SMALL_MACS: usize = 500_000;

/// The layer, once per kernel that accepts its problem.
fn prepare<T: Element>(case: &Case, device: &Device) -> Vec<(&'static str, Prepared<T>)> {
    let layer = layer(case);
    let src: Vec<usize> = [case.n, case.sources().iter().sum()]
        .into_iter()
        .chain(case.spatial.iter().copied())
        .collect();
    let any = layer.prepare_as::<T>(device, PrepareOptions::default()).unwrap();
    let plans = any.plans(&src).unwrap();
    let accepted = plans.into_iter().filter(|candidate| candidate.verdict.is_ok());
    let prepared = accepted.map(|candidate| {
        let options =
            PrepareOptions { kernel: Some(candidate.kernel.into()), ..Default::default() };
        (candidate.kernel, layer.prepare_as(device, options).unwrap())
    });
    prepared.collect()
}

/// Runs every kernel in every layout; says what is wrong.
fn check<T: Element>(case: &Case, round: usize, failures: &mut Vec<String>) {
    let expected = expected(case, T::DTYPE);
    let devices = match case.macs() {
        ..SMALL_MACS => std::slice::from_ref(&DEVICES[round % 2]),
        _ => &DEVICES[..],
    };
    let layers: Vec<_> = devices.iter().flat_map(|device| prepare::<T>(case, device)).collect();
    assert!(!layers.is_empty(), "no kernel accepts {case:?}");
    for (i, (src_order, dst_order)) in ORDERS.into_iter().enumerate() {
        // Alone in memory or in a range of channels, in turns.
        let beside = if (round + i).is_multiple_of(3) { 0 } else { 3 };
        let mut first = 0;
        let mut sources = Vec::new();
        for (j, channels) in case.sources().into_iter().enumerate() {
            let order = if j == 1 { dst_order } else { src_order };
            let beside = if j % 2 == 0 { beside } else { 0 };
            let mut source =
                Placed::<T>::new(order, beside, case.n, channels, &case.spatial, POISON);
            source.set(|n, c, p| integer(SRC.0, n, first + c, p, SRC.1) as f32);
            first += channels;
            sources.push(source);
        }
        let views: Vec<_> = sources.iter().map(Placed::view).collect();
        let dst_spatial = case.dst_spatial();
        let residual = case.residual.then(|| {
            let order = if round.is_multiple_of(2) { dst_order } else { src_order };
            let channels = case.dst_channels();
            let mut residual =
                Placed::<T>::new(order, beside, case.n, channels, &dst_spatial, POISON);
            residual.set(|n, c, p| integer(RESIDUAL, n, c, p, residual_half(T::DTYPE)) as f32);
            residual
        });
        let residual = residual.as_ref().map(Placed::view);
        for (kernel, layer) in &layers {
            let channels = case.dst_channels();
            let mut dst =
                Placed::<T>::new(dst_order, 3 - beside, case.n, channels, &dst_spatial, CANARY);
            dst.set(|_, _, _| f32::NAN);
            let mut call = layer.call(&views[0]);
            for more in &views[1..] {
                call = call.concat(more);
            }
            if let Some(residual) = &residual {
                call = call.residual(residual);
            }
            if let Err(error) = call.run_into(&mut dst.view_mut()) {
                failures.push(format!("{kernel} {src_order:?} -> {dst_order:?} {case:?}: {error}"));
                continue;
            }
            let canary = T::from_f32(CANARY);
            let positions = dst.positions();
            let mut wrong = 0;
            let mut example = String::new();
            let mut values = expected.iter();
            for n in 0..case.n {
                for c in 0..channels {
                    for p in 0..positions {
                        let at = dst.at(n, c, p);
                        let want = T::from_f32(*values.next().unwrap() as f32).to_f32();
                        let got = std::mem::replace(&mut dst.data[at], canary).to_f32();
                        if got.to_bits() != want.to_bits() {
                            if wrong == 0 {
                                example = format!("[{n}, {c}, {p}] is {got}, not {want}");
                            }
                            wrong += 1;
                        }
                    }
                }
            }
            let same = canary.to_f32().to_bits();
            let outside = dst.data.iter().filter(|x| x.to_f32().to_bits() != same).count();
            if wrong > 0 || outside > 0 {
                failures.push(format!(
                    "{kernel} {src_order:?} -> {dst_order:?} {case:?}: {wrong} values wrong, \
                     {outside} written outside; {example}"
                ));
            }
        }
    }
}

fn check_all(cases: impl IntoIterator<Item = Case>) {
    let mut failures = Vec::new();
    let mut count = 0;
    for (round, case) in cases.into_iter().enumerate() {
        check::<f32>(&case, round, &mut failures);
        check::<f16>(&case, round, &mut failures);
        check::<bf16>(&case, round, &mut failures);
        count = round + 1;
    }
    assert!(count > 0);
    if !failures.is_empty() {
        const SHOWN: usize = 60;
        let shown = failures[..failures.len().min(SHOWN)].join("\n");
        panic!("{} runs of {count} cases failed:\n{shown}", failures.len());
    }
}

/// The guard of [`guard`], tried on a read that is wrong for certain.
#[cfg(target_os = "linux")]
#[test]
fn a_read_beyond_an_array_stops_the_process() {
    use std::os::unix::process::ExitStatusExt;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "reads_beyond_an_array", "--ignored"]);
    let status = command.env("POINTWISE_TEST_JOB", "read").output().unwrap().status;
    assert_eq!(status.signal(), Some(11), "{status}");
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "stops its process, for the test of the guard"]
fn reads_beyond_an_array() {
    if std::env::var_os("POINTWISE_TEST_JOB").is_none() {
        return;
    }
    let array = std::hint::black_box(vec![1.0f32; 5]);
    // SAFETY: none, which is what the guard is for.
    let x = unsafe { std::ptr::read_volatile(array.as_ptr().add(5)) };
    println!("{x}");
}

/// Rows and lanes of each kernel's tile, which end its name.
fn tiles() -> Vec<usize> {
    let layer = Pointwise::new(Array2::zeros((1, 1))).prepare(&Device::cpu()).unwrap();
    let mut sizes = Vec::new();
    for candidate in layer.plans(&[1, 1]).unwrap() {
        let (_, tile) = candidate.kernel.rsplit_once('_').unwrap();
        sizes.extend(tile.split('x').map(|size| size.parse::<usize>().unwrap()));
    }
    sizes
}

/// Sizes at which tiles begin and end, and some that they do not know.
fn edges() -> Vec<usize> {
    let mut sizes: Vec<usize> = tiles().iter().flat_map(|&t| [t - 1, t, t + 1]).collect();
    sizes.extend([1, 2, 37, 61]);
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// A number of positions as a spatial shape, of every rank in turn.
fn spatial(positions: usize, round: usize) -> Vec<usize> {
    let factor = (2..positions).find(|f| positions.is_multiple_of(*f)).unwrap_or(1);
    match round % 4 {
        0 => vec![positions],
        1 => vec![positions / factor, factor],
        2 => vec![factor, 1, positions / factor],
        _ if positions == 1 => vec![],
        _ => vec![factor, positions / factor],
    }
}

#[test]
fn tile_edges() {
    let sizes = edges();
    let mut cases = Vec::new();
    for &positions in sizes.iter().chain([&0, &49]) {
        for &c_out in &sizes {
            for k in [1, 2, 3, 16] {
                let round = cases.len();
                let mut case = Case::plain(1 + round % 3, k, c_out, &spatial(positions, round));
                case.bias = round % 2 == 0;
                cases.push(case);
            }
        }
    }
    check_all(cases);
}

/// Panels hold 64 or 48 output channels of a group, the last one what is left of them; positions
/// fill vectors, or leave some over; samples of a whole tensor fold into one run of positions,
/// those of a range of channels do not.
#[test]
fn panel_edges() {
    let widths = [20, 24, 40, 48, 64, 65, 72, 80, 84, 88, 96, 104, 112, 128, 129, 144];
    let mut cases = Vec::new();
    for positions in (1..=70).chain([196]) {
        for c_out in widths {
            let round = cases.len();
            let groups = [1, 1, 3][round % 3];
            let k = [1, 2, 5, 24][round / 3 % 4];
            let mut case = Case {
                groups,
                bias: round % 5 > 1,
                residual: round % 4 == 1,
                relu: round % 7 > 3,
                ..Case::plain(1 + round / 2 % 3, k, c_out, &spatial(positions, round))
            };
            if round % 11 == 3 && c_out % 4 == 0 {
                case.shuffle = 4;
            }
            if round % 6 == 4 {
                case.concat = Some(vec![0, 1, k * groups - 1]);
            }
            if round % 13 == 5 {
                case.stride = 2;
            }
            cases.push(case);
        }
    }
    check_all(cases);
}

#[test]
fn long_sums() {
    let mut cases = Vec::new();
    for positions in [1, 2, 31, 33, 49, 64] {
        for c_out in [1, 5, 17, 32, 61] {
            for k in [257, 1031] {
                let round = cases.len();
                cases.push(Case::plain(1 + round % 3, k, c_out, &spatial(positions, round)));
            }
        }
    }
    check_all(cases);
}

/// Rows of a fully connected layer are positions.
#[test]
fn no_spatial_axes() {
    let mut cases = Vec::new();
    for n in edges().into_iter().chain([0, 100]) {
        for (k, c_out) in [(1, 1), (3, 17), (16, 33), (257, 8)] {
            cases.push(Case { bias: true, relu: true, ..Case::plain(n, k, c_out, &[]) });
        }
    }
    check_all(cases);
}

#[test]
fn nothing_to_compute() {
    for n in 0..3 {
        for spatial in [vec![0], vec![0, 7], vec![7, 0], vec![5, 0, 3], vec![0, 0, 0]] {
            check_all([Case::plain(n, 3, 5, &spatial)]);
        }
    }
    check_all([Case::plain(0, 16, 33, &[7, 7]), Case::plain(0, 1, 1, &[])]);
}

/// Layers of ResNet-50, MobileNetV2, EfficientNet, DenseNet-121 and ShuffleNet.
#[test]
fn layers_of_real_networks() {
    let plain = |k, c_out, side| Case::plain(1, k, c_out, &[side, side]);
    check_all([
        plain(64, 64, 56),
        Case { bias: true, residual: true, relu: true, ..plain(64, 256, 56) },
        Case { stride: 2, bias: true, ..plain(256, 128, 56) },
        Case { bias: true, relu: true, ..plain(1024, 256, 14) },
        Case { bias: true, residual: true, relu: true, ..plain(512, 1024, 7) },
        Case { bias: true, ..plain(16, 96, 56) },
        Case { bias: true, residual: true, ..plain(144, 24, 56) },
        Case { bias: true, relu: true, ..plain(320, 1280, 7) },
        Case { bias: true, ..Case::plain(1, 1280, 1000, &[]) },
        Case { concat: Some(vec![64, 32, 32, 32]), relu: true, ..plain(160, 128, 28) },
        Case { groups: 3, shuffle: 3, relu: true, ..plain(80, 20, 28) },
        Case { groups: 4, n: 3, bias: true, ..plain(32, 32, 14) },
        Case { partial: Some((16, 48)), ..plain(64, 64, 14) },
        Case { n: 2, ..plain(192, 64, 7) },
    ]);
}

#[test]
fn every_option_together() {
    let mut cases = Vec::new();
    let shapes: [(usize, usize, &[usize]); 8] = [
        (3, 5, &[1]),
        (16, 16, &[7, 7]),
        (5, 33, &[49]),
        (33, 8, &[6, 5]),
        (2, 3, &[3, 4, 5]),
        (17, 20, &[14, 14]),
        (8, 65, &[33]),
        (4, 14, &[]),
    ];
    for (k, c_out, spatial) in shapes {
        for options in 0..96 {
            let round = cases.len();
            let groups = options % 3 + 1;
            let flag = |bit: usize| (options / 3) >> bit & 1 == 1;
            let mut case = Case {
                groups,
                stride: if flag(0) { 2 } else { 1 },
                partial: flag(1).then_some((round % 4, round / 4 % 3)),
                bias: flag(2),
                residual: flag(3),
                relu: flag(3),
                ..Case::plain(1 + round % 3, k, c_out, spatial)
            };
            if flag(4) {
                let total = case.sources()[0];
                let first = 1 + round % total;
                let second = (total - first) / 2;
                case.concat = Some(vec![first, second, total - first - second]);
            }
            let rows = c_out * groups;
            case.shuffle = [2, 3, 5].into_iter().find(|s| rows % s == 0 && flag(2)).unwrap_or(1);
            cases.push(case);
        }
    }
    check_all(cases);
}

/// Blocks, units and threads only show on problems that are larger than a block.
#[test]
fn more_than_a_block() {
    check_all([
        Case { relu: true, bias: true, ..Case::plain(2, 96, 40, &[101, 67]) },
        Case { groups: 2, ..Case::plain(1, 257, 33, &[61, 19]) },
        Case { groups: 3, shuffle: 3, residual: true, ..Case::plain(2, 80, 20, &[41, 43]) },
        Case { residual: true, relu: true, ..Case::plain(4, 64, 200, &[14, 14]) },
        Case { stride: 2, ..Case::plain(3, 40, 144, &[28, 28]) },
        Case { stride: 2, bias: true, ..Case::plain(2, 128, 600, &[7, 7]) },
        Case { stride: 2, groups: 2, ..Case::plain(2, 96, 300, &[9, 11]) },
        Case { n: 5, bias: true, ..Case::plain(1, 200, 168, &[7, 7]) },
        Case { stride: 2, residual: true, ..Case::plain(3, 61, 70, &[53, 41]) },
        Case { concat: Some(vec![1, 30, 69]), ..Case::plain(1, 100, 17, &[9001]) },
        Case { n: 700, bias: true, ..Case::plain(1, 300, 130, &[]) },
    ]);
}
