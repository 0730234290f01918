//! Layers of `benches/layers.csv` as layers of 8-bit integers, on one thread and on two, against
//! the machine's roof, where the CPU has AVX512-VNNI:
//!
//! ```sh
//! cargo bench --bench int8 -- s2.c1a s3.c3 s4.c1b b4.exp s3.c1b
//! ```
//!
//! The roof is that of multiply-adds of bytes, measured in the same run around each layer, the best
//! of the samples; operands of these layers stay in the caches. The first result of each layer is
//! compared with the specification before anything is timed.

use std::hint::black_box;
use std::time::{Duration, Instant};

use ndarray::{Array2, Array4};
use pointwise::{Device, Quantization, Quantized, nhwc, nhwc_mut, reference};

fn main() {
    let names: Vec<String> =
        std::env::args().skip(1).filter(|name| !name.starts_with("--")).collect();
    let table = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/layers.csv");
    let table = std::fs::read_to_string(table).expect("benches/layers.csv");
    let all = Device::cpu().to_string();
    println!("{all}; GOP/s: two per multiply-add; fractions of the roof");
    println!("model,layer,layout,threads,kernel,median_us,gops,roof_gops,fraction");
    for row in table.lines().skip(1) {
        let row: Vec<&str> = row.split(',').collect();
        if !names.is_empty() && !names.iter().any(|name| name == row[1]) {
            continue;
        }
        let number = |i: usize| row[i].parse::<usize>().expect("a number");
        let [n, c_in, c_out, h, w, stride, groups] = std::array::from_fn(|i| number(i + 2));
        let mut seed = 1u64;
        let mut noise = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 56) as u8
        };
        let k = c_in / groups;
        let weight = Array2::from_shape_simple_fn((c_out, k), || noise() as i8);
        let mut layer = Quantized::new(weight, vec![0.01; c_out], Quantization::u8(0.02, 128))
            .bias(vec![100; c_out])
            .dst(Quantization::u8(0.03 * (k as f32).sqrt(), 30))
            .groups(groups)
            .stride(stride);
        if row[9] == "relu" {
            layer = layer.relu();
        }
        let src = Array4::from_shape_simple_fn((n, c_in, h, w), noise);
        let want =
            reference::forward_quantized(&layer, src.mapv(i32::from).view().into_dyn(), None)
                .expect("a valid layer");
        let last = src.view().permuted_axes([0, 2, 3, 1]).as_standard_layout().to_owned();
        let shape: [usize; 4] = want.shape().try_into().expect("rank 4");
        let macs = shape.iter().product::<usize>() * k;
        for threads in [1, 2] {
            let device = Device::cpu().threads(threads);
            let prepared = layer.prepare(&device).expect("a valid layer");
            let mut dst_first = Array4::<u8>::zeros(shape);
            let mut dst_last = Array4::<u8>::zeros([shape[0], shape[2], shape[3], shape[1]]);
            for src in [src.view(), nhwc(last.view())] {
                let got: Array4<u8> = prepared.forward(&src).expect("it fits");
                for (&got, want) in got.iter().zip(&want) {
                    assert!((f64::from(got) - want).abs() <= 1.0, "{}", row[1]);
                }
            }
            for layout in ["nchw", "nhwc"] {
                let mut run = || match layout {
                    "nchw" => prepared.forward_into(&src, &mut dst_first).expect("it fits"),
                    _ => {
                        let dst = &mut nhwc_mut(dst_last.view_mut());
                        prepared.forward_into(&nhwc(last.view()), dst).expect("it fits");
                    }
                };
                let mut times = Vec::new();
                let mut roof = 0.0f64;
                let begin = Instant::now();
                while begin.elapsed() < Duration::from_millis(300) {
                    roof = roof.max(peak(threads));
                    for _ in 0..20 {
                        let start = Instant::now();
                        run();
                        times.push(start.elapsed().as_secs_f64());
                    }
                }
                times.sort_by(f64::total_cmp);
                let median = times[times.len() / 2];
                let gops = 2.0 * macs as f64 / median / 1e9;
                let kernel = prepared.kernel();
                let (model, name, us) = (row[0], row[1], median * 1e6);
                print!("{model},{name},{layout},{threads},{kernel},{us:.1},{gops:.0},");
                match gops * 1e9 / roof {
                    fraction if roof > 0.0 => {
                        println!("{:.0},{fraction:.2}", roof / 1e9);
                        assert!(fraction <= 1.02, "the roof is wrong");
                    }
                    _ => println!(","),
                }
            }
        }
    }
}

/// Multiply-adds of bytes that so many threads do in a second, times two; 0 if it is not known.
fn peak(threads: usize) -> f64 {
    const ROUNDS: usize = 20_000;
    let sample = || {
        let start = Instant::now();
        let operations = rounds(black_box(ROUNDS));
        operations as f64 / start.elapsed().as_secs_f64()
    };
    if threads == 1 {
        return sample();
    }
    std::thread::scope(|scope| {
        let helpers: Vec<_> =
            (1..threads).map(|_| scope.spawn(|| sample().max(sample()))).collect();
        let own = sample().max(sample());
        helpers.into_iter().map(|helper| helper.join().expect("no panic")).sum::<f64>() + own
    })
}

/// Independent chains of multiply-adds of bytes; gives their number, times two.
fn rounds(rounds: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512vnni") {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn chains(rounds: usize) -> usize {
            let ones = _mm512_set1_epi32(black_box(0x0101_0101));
            let mut sums = [_mm512_setzero_si512(); 12];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbusd_epi32(*sum, ones, ones);
                }
            }
            black_box(sums.map(|sum| _mm512_reduce_add_epi32(sum)));
            rounds * sums.len() * 64 * 2
        }
        // SAFETY: the CPU has the instructions.
        return unsafe { chains(rounds) };
    }
    let _ = rounds;
    0
}
