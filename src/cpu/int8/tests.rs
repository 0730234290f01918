use ndarray::{Array2, Array4, ArrayView4, s};

use super::kernels::KERNELS;
use super::*;
use crate::problem::dst_shape;
use crate::quantized::{DynamicQuantized, Quantization, Quantized};
use crate::reference;
use crate::tensor::{AsTensor, AsTensorMut, nhwc, nhwc_mut};

/// A sequence that looks random, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 56) as u8
    }

    fn array(&mut self, shape: [usize; 4]) -> Array4<u8> {
        Array4::from_shape_simple_fn(shape, || self.next())
    }
}

fn run<T: Output<u8>>(
    kernel: &'static Kernel,
    threads: usize,
    layer: &Quantized,
    src: ArrayView4<'_, u8>,
    residual: Option<ArrayView4<'_, u8>>,
    dst: &mut ndarray::ArrayViewMut4<'_, T>,
) {
    layer.check().unwrap();
    let weight = layer.weight().as_standard_layout();
    let lowered = layer.lower(weight.as_slice().unwrap());
    run_lowered(kernel, threads, lowered, src, residual, dst);
}

/// As [`run`], of real numbers.
fn run_real<T: Output<T> + Added<Source = f32>>(
    kernel: &'static Kernel,
    threads: usize,
    layer: &DynamicQuantized,
    src: ArrayView4<'_, f32>,
    residual: ArrayView4<'_, T>,
    dst: &mut ndarray::ArrayViewMut4<'_, T>,
) {
    layer.check().unwrap();
    let weight = layer.weight().as_standard_layout();
    let lowered = layer.lower(weight.as_slice().unwrap());
    run_lowered(kernel, threads, lowered, src, Some(residual), dst);
}

fn run_lowered<T: Output<R>, R: Added>(
    kernel: &'static Kernel,
    threads: usize,
    lowered: Lowered<'_>,
    src: ArrayView4<'_, R::Source>,
    residual: Option<ArrayView4<'_, R>>,
    dst: &mut ndarray::ArrayViewMut4<'_, T>,
) {
    let mut device = CpuDevice::default();
    device.limit_threads(threads);
    let shape = dst_shape(&lowered.shape, src.shape(), std::iter::empty()).unwrap();
    assert_eq!(dst.shape(), shape.as_slice());
    let layer = Layer::with_kernel(&device, kernel, lowered);
    let call = Call {
        shape,
        src: src.as_tensor().unwrap(),
        residual: residual.as_ref().map(|residual| residual.as_tensor().unwrap()),
        dst: dst.as_tensor_mut().unwrap(),
    };
    layer.run(&call);
}

/// Input channels, output channels, groups, samples, height, width, stride.
const SHAPES: &[[usize; 7]] = &[
    [1, 1, 1, 1, 1, 1, 1],
    [1, 17, 1, 1, 3, 5, 1],
    [2, 3, 1, 2, 4, 4, 1],
    [3, 16, 1, 1, 7, 7, 1],
    [4, 15, 1, 1, 4, 4, 1],
    [5, 65, 1, 1, 1, 67, 1],
    [7, 64, 1, 3, 5, 3, 1],
    [8, 63, 1, 1, 8, 8, 1],
    [16, 24, 1, 1, 13, 13, 1],
    [12, 129, 1, 1, 6, 11, 1],
    [64, 48, 1, 1, 9, 11, 1],
    [33, 96, 1, 2, 7, 7, 1],
    [97, 31, 1, 1, 10, 10, 2],
    [24, 40, 2, 1, 7, 9, 1],
    [15, 21, 3, 2, 6, 6, 1],
    [20, 12, 4, 1, 9, 7, 3],
    [36, 130, 1, 97, 1, 1, 1],
    [260, 80, 1, 1, 14, 14, 1],
    [64, 64, 1, 0, 3, 3, 1],
    [64, 64, 1, 2, 0, 3, 1],
    [2048, 70, 1, 1, 13, 13, 1],
];

/// How a test's tensors lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    First,
    Last,
    /// Every second channel and position of a larger tensor, rows backwards.
    Sparse,
}

fn in_order<T: Copy>(values: ArrayView4<'_, T>, order: Order, f: impl FnOnce(ArrayView4<'_, T>)) {
    match order {
        Order::First => f(values.as_standard_layout().view()),
        Order::Last => {
            let last = values.permuted_axes([0, 2, 3, 1]);
            f(nhwc(last.as_standard_layout().view()));
        }
        Order::Sparse => {
            let (n, c, h, w) = values.dim();
            let larger = Array4::from_shape_fn((n, 2 * c, h, 2 * w), |(i, j, y, x)| {
                values[[i, j / 2, h - 1 - y, x / 2]]
            });
            f(larger.slice(s![.., ..;2, ..;-1, ..;2]));
        }
    }
}

/// Runs into memory of some order that is filled with `canary`, and gives the result; what lies
/// around it must stay as it is.
fn into_order<T: Copy + PartialEq + std::fmt::Debug>(
    shape: [usize; 4],
    order: Order,
    canary: T,
    f: impl FnOnce(&mut ndarray::ArrayViewMut4<'_, T>),
) -> Array4<T> {
    let [n, c, h, w] = shape;
    match order {
        Order::First => {
            let mut fenced = Array4::from_elem((n, c + 2, h, w), canary);
            f(&mut fenced.slice_mut(s![.., 1..c + 1, .., ..]));
            assert!(fenced.slice(s![.., 0, .., ..]).iter().all(|&x| x == canary));
            assert!(fenced.slice(s![.., c + 1, .., ..]).iter().all(|&x| x == canary));
            fenced.slice(s![.., 1..c + 1, .., ..]).to_owned()
        }
        Order::Last => {
            let mut fenced = Array4::from_elem((n, h, w, c + 2), canary);
            f(&mut nhwc_mut(fenced.slice_mut(s![.., .., .., 1..c + 1])));
            assert!(fenced.slice(s![.., .., .., 0]).iter().all(|&x| x == canary));
            assert!(fenced.slice(s![.., .., .., c + 1]).iter().all(|&x| x == canary));
            nhwc(fenced.slice(s![.., .., .., 1..c + 1])).to_owned()
        }
        Order::Sparse => {
            let mut fenced = Array4::from_elem((n, 2 * c, h, 2 * w), canary);
            f(&mut fenced.slice_mut(s![.., ..;2, ..;-1, ..;2]));
            assert!(fenced.slice(s![.., 1..;2, .., ..]).iter().all(|&x| x == canary));
            assert!(fenced.slice(s![.., .., .., 1..;2]).iter().all(|&x| x == canary));
            fenced.slice(s![.., ..;2, ..;-1, ..;2]).to_owned()
        }
    }
}

fn kernels() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().copied().filter(|kernel| kernel.supported())
}

const ORDERS: [Order; 3] = [Order::First, Order::Last, Order::Sparse];

/// The sums of every shape, and what becomes of them, computed one at a time in the arithmetic that
/// the specification names.
struct Case {
    layer: Quantized,
    src: Array4<u8>,
    residual: Array4<u8>,
    sums: Array4<f32>,
    bytes: Array4<u8>,
    /// The layer without its residual, into bytes that are not those of src, and its results.
    plain: Quantized,
    plain_bytes: Array4<u8>,
}

impl Case {
    fn new(
        noise: &mut Noise,
        [c_in, c_out, groups, n, h, w, stride]: [usize; 7],
        i8: bool,
    ) -> Case {
        let k = c_in / groups;
        let weight = Array2::from_shape_simple_fn((c_out, k), || noise.next() as i8);
        let bias: Vec<i32> = (0..c_out).map(|_| i32::from(noise.next() as i8) * 77).collect();
        let zero_point = if i8 { -7 } else { 130 };
        let src = noise.array([n, c_in, h, w]);
        let (h, w) = (h.div_ceil(stride), w.div_ceil(stride));
        let residual = noise.array([n, c_out, h, w]);
        let value = |byte: u8| i64::from(if i8 { i32::from(byte as i8) } else { i32::from(byte) });
        let sums = Array4::from_shape_fn((n, c_out, h, w), |(i, c, y, x)| {
            let products = (0..k).map(|j| {
                let at = [i, c / (c_out / groups) * k + j, y * stride, x * stride];
                i64::from(weight[[c, j]]) * (value(src[at]) - zero_point)
            });
            let sum = products.sum::<i64>() + i64::from(bias[c]);
            i32::try_from(sum).unwrap() as f32
        });
        // Powers of two: no product is rounded, and halves are frequent.
        let src_quantization = match i8 {
            true => Quantization::i8(1.0, zero_point as i32),
            false => Quantization::u8(1.0, zero_point as i32),
        };
        let layer = Quantized::new(weight, vec![1.0; c_out], src_quantization)
            .bias(bias)
            .groups(groups)
            .stride(stride);
        let range = sums.iter().fold(0.0f32, |range, sum| range.max(sum.abs()));
        let scale = (range / 256.0).max(1.0).log2().ceil().exp2();
        let bytes = Array4::from_shape_fn(sums.dim(), |at| {
            let residual = (f32::from(residual[at] as i8) + 3.0) * 0.5;
            let steps = (sums[at] / scale).max(-20.0) + residual;
            (steps.min(100.0).round_ties_even() + 50.0).clamp(0.0, 255.0) as u8
        });
        // Both ends of the range lie between two steps.
        let (lo, hi) = (-60.5, 27.5);
        let quantization = match i8 {
            true => Quantization::u8(2.0 * scale, 90),
            false => Quantization::i8(2.0 * scale, -40),
        };
        let (zero_point, least) = if i8 { (90.0, 0.0) } else { (-40.0, -128.0) };
        let plain_bytes = sums.mapv(|sum| {
            let steps = (sum / (2.0 * scale)).clamp(lo, hi).round_ties_even() + zero_point;
            steps.clamp(least, least + 255.0) as i32 as u8
        });
        let plain = layer.clone().clip(lo * 2.0 * scale, hi * 2.0 * scale).dst(quantization);
        let layer = layer.clip(-20.0 * scale, f32::INFINITY);
        let layer = layer.residual(Quantization::i8(scale / 2.0, -3));
        let layer = layer.clip(f32::NEG_INFINITY, 100.0 * scale).dst(Quantization::u8(scale, 50));
        Case { layer, src, residual, sums, bytes, plain, plain_bytes }
    }

    /// The layer with f32 results: exact, since every factor is a power of two.
    fn real(&self) -> (Quantized, Array4<f32>) {
        let layer = Quantized { dst: None, ..self.layer.clone() };
        let scale = layer.residual.unwrap().scale;
        let [(lo, _), (_, hi)] = layer.clips;
        let values = Array4::from_shape_fn(self.sums.dim(), |at| {
            let residual = (f32::from(self.residual[at] as i8) + 3.0) * scale;
            (self.sums[at].max(lo) + residual).min(hi)
        });
        (layer, values)
    }

    /// The bare sums as f32.
    fn bare(&self) -> Quantized {
        Quantized { dst: None, residual: None, clips: BARE, ..self.layer.clone() }
    }
}

const BARE: [(f32, f32); 2] = [(f32::NEG_INFINITY, f32::INFINITY); 2];

#[test]
fn every_kernel_is_exact_on_every_shape_and_order() {
    let mut noise = Noise(1);
    for &shape in SHAPES {
        for signed in [false, true] {
            let case = Case::new(&mut noise, shape, signed);
            let dst_shape: [usize; 4] = case.sums.shape().try_into().unwrap();
            let (real, values) = case.real();
            for kernel in kernels() {
                for (src_order, dst_order) in
                    ORDERS.iter().flat_map(|&a| ORDERS.iter().map(move |&b| (a, b)))
                {
                    for threads in [1, 2] {
                        let what = format!(
                            "{} {shape:?} {src_order:?} -> {dst_order:?} signed {signed}",
                            kernel.name
                        );
                        in_order(case.src.view(), src_order, |src| {
                            let got = into_order(dst_shape, dst_order, f32::MAX, |dst| {
                                run(kernel, threads, &case.bare(), src, None, dst);
                            });
                            assert_eq!(got, case.sums, "{what}");
                            let got = into_order(dst_shape, dst_order, 99, |dst| {
                                run(kernel, threads, &case.plain, src, None, dst);
                            });
                            assert_eq!(got, case.plain_bytes, "{what}, bytes alone");
                            in_order(case.residual.view(), src_order, |residual| {
                                let got = into_order(dst_shape, dst_order, 99, |dst| {
                                    run(kernel, threads, &case.layer, src, Some(residual), dst);
                                });
                                assert_eq!(got, case.bytes, "{what}, bytes");
                                let got = into_order(dst_shape, dst_order, f32::MAX, |dst| {
                                    run(kernel, threads, &real, src, Some(residual), dst);
                                });
                                assert_eq!(got, values, "{what}, f32 beside a residual");
                            });
                        });
                    }
                }
            }
        }
    }
}

/// Every kernel, order and number of threads gives the same bits on sources of f32, and they are what the
/// specification says.
fn real_sources(shapes: &[[usize; 7]]) {
    let mut noise = Noise(3);
    for (i, &[c_in, c_out, groups, n, h, w, stride]) in shapes.iter().enumerate() {
        let mut real = |scale: f32| (f32::from(noise.next()) - 117.3) * scale;
        let bias: Vec<f32> = (0..c_out).map(|_| real(0.1)).collect();
        let src = Array4::from_shape_simple_fn((n, c_in, h, w), || real(0.01));
        let shape = [n, c_out, h.div_ceil(stride), w.div_ceil(stride)];
        let residual = Array4::from_shape_simple_fn(shape, || real(0.01));
        let weight = Array2::from_shape_simple_fn((c_out, c_in / groups), || noise.next() as i8);
        let per = [Per::Tensor, Per::Sample, Per::Position][i % 3];
        let layer = DynamicQuantized::new(weight, vec![0.01; c_out], per)
            .bias(bias)
            .groups(groups)
            .stride(stride)
            .residual()
            .relu();
        let (src, residual) = (src.into_dyn(), residual.into_dyn());
        let want = reference::forward_dynamic(&layer, src.view(), Some(residual.view())).unwrap();
        // Of a fixed rank: LLVM reads ahead in iterators of any rank, which valgrind reports.
        let want = want.into_dimensionality::<ndarray::Ix4>().unwrap();
        let (src, residual) = (
            src.into_dimensionality::<ndarray::Ix4>().unwrap(),
            residual.into_dimensionality::<ndarray::Ix4>().unwrap(),
        );
        let mut first = None;
        for kernel in kernels() {
            for (src_order, dst_order) in
                ORDERS.iter().flat_map(|&a| ORDERS.iter().map(move |&b| (a, b)))
            {
                for threads in [1, 2] {
                    let mut got = Array4::zeros(shape);
                    in_order(src.view(), src_order, |src| {
                        in_order(residual.view(), src_order, |residual| {
                            got = into_order(shape, dst_order, f32::MAX, |dst| {
                                run_real(kernel, threads, &layer, src, residual, dst);
                            });
                        });
                    });
                    let what = format!("{} {shape:?} {src_order:?} {dst_order:?}", kernel.name);
                    for (&got, want) in got.iter().zip(&want) {
                        let err = (f64::from(got) - want).abs();
                        assert!(err <= 1e-6 * want.abs().max(10.0), "{what}: {got}, {want}");
                    }
                    assert_eq!(*first.get_or_insert_with(|| got.clone()), got, "{what}");
                }
            }
        }
    }
}

#[test]
fn every_kernel_quantises_alike() {
    real_sources(&SHAPES[..SHAPES.len() - 1]);
}

/// Results of a kernel in 16 bits are those in f32 beside the same residual, rounded.
fn rounded_results<T: Output<T> + Added<Source = f32> + crate::dtype::Element + PartialEq>() {
    let mut noise = Noise(5);
    for &[c_in, c_out, groups, n, h, w, stride] in &SHAPES[1..16] {
        let mut real = |scale: f32| (f32::from(noise.next()) - 117.3) * scale;
        let src = Array4::from_shape_simple_fn((n, c_in, h, w), || real(0.01));
        let shape = [n, c_out, h.div_ceil(stride), w.div_ceil(stride)];
        let narrow = Array4::from_shape_simple_fn(shape, || T::from_f32(real(0.01)));
        let wide = narrow.mapv(|x| x.to_f32());
        let weight = Array2::from_shape_simple_fn((c_out, c_in / groups), || noise.next() as i8);
        let layer = DynamicQuantized::new(weight, vec![0.01; c_out], Per::Position)
            .groups(groups)
            .stride(stride)
            .residual();
        for kernel in kernels() {
            for (src_order, dst_order) in
                ORDERS.iter().flat_map(|&a| ORDERS.iter().map(move |&b| (a, b)))
            {
                in_order(src.view(), src_order, |src| {
                    let real = into_order(shape, dst_order, f32::MAX, |dst| {
                        run_real(kernel, 1, &layer, src, wide.view(), dst);
                    });
                    in_order(narrow.view(), src_order, |residual| {
                        let got = into_order(shape, dst_order, T::from_f32(99.0), |dst| {
                            run_real(kernel, 1, &layer, src, residual, dst);
                        });
                        let bits = |x: &T| x.to_f32().to_bits();
                        let want = real.mapv(T::from_f32);
                        let same = got.iter().map(bits).eq(want.iter().map(bits));
                        assert!(same, "{} {shape:?} {src_order:?} {dst_order:?}", kernel.name);
                    });
                });
            }
        }
    }
}

#[test]
fn every_kernel_rounds_to_f16_once() {
    rounded_results::<f16>();
}

#[test]
fn every_kernel_rounds_to_bf16_once() {
    rounded_results::<bf16>();
}

/// For valgrind, which finds what is read beyond a tensor, and sums of values that nobody wrote.
#[test]
#[ignore = "slow; under valgrind"]
fn every_size_on_the_heap() {
    let shapes = &SHAPES[..16];
    real_sources(shapes);
    let mut noise = Noise(4);
    for &shape in shapes {
        let case = Case::new(&mut noise, shape, true);
        for kernel in kernels() {
            for order in ORDERS {
                in_order(case.src.view(), order, |src| {
                    let mut got = case.bytes.clone();
                    run(kernel, 1, &case.plain, src, None, &mut got.view_mut());
                    assert_eq!(got, case.plain_bytes);
                    in_order(case.residual.view(), order, |residual| {
                        let mut got = case.bytes.clone();
                        run(kernel, 1, &case.layer, src, Some(residual), &mut got.view_mut());
                        assert_eq!(got, case.bytes);
                    });
                });
            }
        }
    }
}

#[test]
fn required_kernels_are_there() {
    let required = std::env::var("POINTWISE_REQUIRE").unwrap_or_default();
    if required.split([',', '|', ' ']).any(|required| required == "avx512vnni") {
        assert!(kernels().any(|kernel| kernel.name.contains("avx512vnni")), "{required}");
    }
}

#[test]
fn the_longest_sums_are_exact() {
    // The most channels whose sums fit, all at their greatest: 66 311 · 127 · 255 < 2^31.
    let k = 66_311;
    for kernel in kernels() {
        for (w, x, zero_point) in [(127i8, 255u8, 0), (-127, 255, 0), (127, 0, 255), (-127, 0, 255)]
        {
            let sum = k as i64 * i64::from(w) * (i64::from(x) - zero_point);
            // What is left shows the lowest bit.
            let bias = i32::try_from(5 - sum).unwrap();
            let quantization = Quantization::u8(1.0, zero_point as i32);
            let layer = Quantized::new(Array2::from_elem((3, k), w), vec![1.0; 3], quantization)
                .bias(vec![bias; 3]);
            let src = Array4::from_elem((1, k, 1, 2), x);
            for order in ORDERS {
                in_order(src.view(), order, |src| {
                    let got = into_order([1, 3, 1, 2], order, f32::MAX, |dst| {
                        run(kernel, 1, &layer, src, None, dst);
                    });
                    assert!(got.iter().all(|&x| x == 5.0), "{}: {got}", kernel.name);
                });
            }
        }
    }
}

#[test]
fn pairs_in_plain_code_are_those_of_the_instructions() {
    use super::sums::{Dot, Pairs8};
    let mut noise = Noise(7);
    for _ in 0..100 {
        let mut word = || u32::from(noise.next()) | u32::from(noise.next()) << 16;
        let unsigned: [u32; 8] = std::array::from_fn(|_| word());
        let signed: [u32; 8] = std::array::from_fn(|_| {
            let (a, b) = (noise.next() as i8, noise.next() as i8);
            u32::from(i16::from(a) as u16) | u32::from(i16::from(b) as u16) << 16
        });
        let mut got = [0i32; 8];
        // SAFETY: plain code, and eight elements each.
        unsafe {
            let [a, b] = [&unsigned, &signed].map(|words| Pairs8::load(words.as_ptr()));
            Pairs8::zero().dot(a, b).dot(a, b).store(got.as_mut_ptr());
        }
        for lane in 0..8 {
            let half = |word: u32, i: u32| i32::from((word >> (16 * i)) as u16 as i16);
            let product = |i| half(unsigned[lane], i) * half(signed[lane], i);
            assert_eq!(got[lane], 2 * (product(0) + product(1)));
        }
    }
}
