//! Sums that several blocks share: exact, in a fixed order, on any stream and in graphs.

use ndarray::{Array2, Array3, Array5, s};
use pointwise::cudarc::driver::sys;
use pointwise::{CudaDevice, CudaTensor, Device, Pointwise, PrepareOptions};

use super::cases::{Case, LAYOUTS, Layout, Placed, chain, force, kernels, same_bits};
use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("shared_sums_are_chains_added_in_order", chains_in_order),
    ("shared_sums_run_every_kind_of_step", steps),
    ("the_planner_shares_deep_sums_of_few_positions", planner),
    ("batch_invariant_layers_share_no_sums", batch_invariant),
    ("shared_sums_in_graphs_beside_other_work", graphs),
    ("threads_and_streams_share_sums_of_their_own", threads),
];

/// Input channels of one slab of a kernel, from its name.
fn slab(kernel: &str) -> usize {
    let tile = kernel.split('_').find(|part| part.matches('x').count() == 2).unwrap();
    tile.rsplit('x').next().unwrap().parse().unwrap()
}

/// What `splits` blocks compute: each its chain over its slabs, then these sums in order.
fn chains(
    case: &Case,
    kernel: &str,
    splits: usize,
    weight: &[f32],
    bias: &[f32],
    src: &Array5<f32>,
) -> Array5<f32> {
    let k = case.c_in / case.groups;
    let (rows, slab) = (case.c_out / case.groups, slab(kernel));
    let slabs = k.div_ceil(slab);
    let splits = splits.min(slabs);
    let first = |split: usize| (slabs * split / splits * slab).min(k);
    let mut sums = Array5::<f32>::zeros(case.dst_shape());
    for split in 0..splits {
        let range = first(split)..first(split + 1);
        // One group at a time is an ordinary convolution of these channels.
        for group in 0..case.groups {
            let part = Case { groups: 1, c_in: range.len(), c_out: rows, ..case.clone() };
            let from = group * k;
            let weight: Vec<f32> = (group * rows..(group + 1) * rows)
                .flat_map(|row| weight[row * k..][range.clone()].iter().copied())
                .collect();
            let src = src.slice(s![.., from + range.start..from + range.end, .., .., ..]);
            let part = chain(&part, &weight, &vec![0.0; rows], &src.to_owned());
            let mut sums = sums.slice_mut(s![.., group * rows..(group + 1) * rows, .., .., ..]);
            sums += &part;
        }
    }
    for (index, sum) in sums.indexed_iter_mut() {
        *sum += bias[index.1];
    }
    sums
}

fn chains_in_order(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(31);
    let cases = [
        Case::new(1, 40, 33, [1, 1, 31]),
        Case::new(2, 65, 20, [1, 5, 13]),
        Case { groups: 3, ..Case::new(1, 3 * 48, 3 * 36, [1, 4, 4]) },
        Case { stride: 2, ..Case::new(1, 100, 130, [1, 9, 16]) },
    ];
    for (i, case) in cases.iter().enumerate() {
        let weight = random.normal(case.c_out * case.c_in / case.groups);
        let bias = random.normal(case.c_out);
        let src = random.tensor(case.src_shape());
        let layer = case.layer(weight.clone()).bias(bias.clone());
        for (j, kernel) in kernels(device).into_iter().enumerate() {
            for splits in [2, 3 + (i + j) % 4, 1000] {
                let expected = chains(case, kernel, splits, &weight, &bias, &src);
                let forced = force(&format!("{kernel}/{splits}"));
                let prepared = layer.prepare_with(&device.clone().into(), forced)?;
                for layout in [Layout::First, Layout::Last, LAYOUTS[(i + j + splits) % 8]] {
                    let src = Placed::filled(device, src.view(), layout);
                    let mut dst = Placed::blank(device, case.dst_shape(), layout);
                    prepared.forward_into(&src.view(), &mut dst.view_mut())?;
                    let what = format!("{kernel}/{splits}, {case:?}, {layout:?}");
                    same_bits(&dst.read(), &expected, &what)?;
                }
            }
        }
    }
    Ok(())
}

fn steps(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(32);
    let case = Case::new(2, 70, 40, [1, 4, 9]);
    let slope = random.integers(case.c_out);
    let layer = case.layer(random.integers(case.c_out * case.c_in)).bias(random.integers(40));
    let layer = layer.residual().prelu(slope).clip(-40.0, 50.0);
    let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
    let residual = Array5::from_shape_fn(case.dst_shape(), |_| random.integer());
    let expected = layer.prepare(&Device::cpu())?.call(&src).residual(&residual).run()?;
    for kernel in kernels(device) {
        let prepared = layer.prepare_with(&device.clone().into(), force(&format!("{kernel}/4")))?;
        for layout in [Layout::First, Layout::PartOfLast] {
            let src = Placed::filled(device, src.view(), layout);
            let residual = Placed::filled(device, residual.view(), layout);
            let mut dst = Placed::blank(device, case.dst_shape(), layout);
            let (src, residual) = (src.view(), residual.view());
            prepared.call(&src).residual(&residual).run_into(&mut dst.view_mut())?;
            same_bits(&dst.read(), &expected, &format!("{kernel}, {layout:?}"))?;
        }
    }
    Ok(())
}

/// A layer whose few outputs leave most of any chip idle.
fn deep(random: &mut Random) -> (Pointwise, Array3<f32>) {
    let weight = Array2::from_shape_vec((48, 1024), random.integers(48 * 1024)).unwrap();
    let layer = Pointwise::new(weight).bias(random.integers(48)).relu();
    let src = Array3::from_shape_vec((2, 1024, 21), random.integers(2 * 1024 * 21)).unwrap();
    (layer, src)
}

fn planner(device: &CudaDevice) -> Outcome {
    let (layer, src) = deep(&mut Random::new(33));
    let prepared = layer.prepare(&device.clone().into())?;
    let words = prepared.explain(src.shape())?.to_string();
    assert!(words.contains("each shared by"), "{words}");
    assert_eq!(prepared.forward(&src)?, layer.prepare(&Device::cpu())?.forward(&src)?);
    let error = layer.prepare_with(&device.clone().into(), force("fprop_f32_simt_32x32x16_nchw/x"));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("how many blocks share"), "{error}");
    Ok(())
}

fn batch_invariant(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(34);
    let weight = Array2::from_shape_vec((40, 600), random.normal(40 * 600)).unwrap();
    let layer = Pointwise::new(weight.clone()).silu();
    let options = PrepareOptions { batch_invariant: true, ..PrepareOptions::default() };
    let prepared = layer.prepare_with(&device.clone().into(), options)?;
    let words = prepared.explain(&[1, 600, 9])?.to_string();
    assert!(!words.contains("shared by"), "{words}");
    let src = Array3::from_shape_vec((6, 600, 9), random.normal(6 * 600 * 9)).unwrap();
    let together = prepared.forward(&src)?;
    for sample in 0..6 {
        let alone = prepared.forward(&src.slice(s![sample..sample + 1, .., ..]))?;
        let same = together.slice(s![sample..sample + 1, .., ..]);
        assert!(alone.iter().zip(same).all(|(a, b)| a.to_bits() == b.to_bits()), "{sample}");
    }
    Ok(())
}

fn graphs(device: &CudaDevice) -> Outcome {
    let (layer, src) = deep(&mut Random::new(35));
    let expected = layer.prepare(&Device::cpu())?.forward(&src)?.into_dyn();
    let own = device.with_new_stream()?;
    let prepared =
        layer.prepare_with(&own.clone().into(), force("fprop_f32_simt_32x32x16_nchw/7"))?;
    let other = device.with_new_stream()?;
    let src = CudaTensor::from_host(&own, src.view())?;
    let mut dst = CudaTensor::<f32>::zeros(&own, &[2, 48, 21])?;
    let mut beside = CudaTensor::<f32>::zeros(&own, &[2, 48, 21])?;
    // Scratch of the stream is there, and must not be that of the graph.
    prepared.forward_into(&src, &mut beside)?;
    own.synchronize()?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).map_err(code)?;
    prepared.forward_into(&src, &mut dst)?;
    prepared.forward_into(&src, &mut dst)?;
    let flags = sys::CUgraphInstantiate_flags(0);
    let graph = own.stream().end_capture(flags).map_err(code)?.ok_or("nothing was captured")?;
    for _ in 0..2 {
        // On another stream than what runs beside it.
        // SAFETY: graph, stream, layer and tensors live to the end of the function.
        unsafe {
            sys::cuGraphLaunch(graph.cu_graph_exec(), other.stream().cu_stream())
                .result()
                .map_err(code)?;
        }
        prepared.forward_into(&src, &mut beside)?;
        other.synchronize()?;
        assert_eq!(dst.to_host()?, expected);
        assert_eq!(beside.to_host()?, expected);
    }
    Ok(())
}

fn threads(device: &CudaDevice) -> Outcome {
    let (layer, src) = deep(&mut Random::new(36));
    let expected = layer.prepare(&Device::cpu())?.forward(&src)?;
    let prepared =
        layer.prepare_with(&device.clone().into(), force("fprop_f32_simt_32x32x16_nhwc/9"))?;
    std::thread::scope(|scope| {
        for i in 0..3 {
            let (prepared, device, src, expected) = (&prepared, &device, &src, &expected);
            scope.spawn(move || {
                let own = device.with_new_stream().unwrap();
                let mine = if i == 0 { prepared.clone() } else { prepared.on(&own).unwrap() };
                // Fewer samples first, so that scratch has to grow between calls in flight.
                let half = src.slice(s![..1, .., ..]);
                let of_half = expected.slice(s![..1, .., ..]);
                assert_eq!(mine.forward(&half).unwrap(), of_half);
                assert_eq!(mine.forward(src).unwrap(), *expected);
                assert_eq!(mine.forward(&half).unwrap(), of_half);
            });
        }
    });
    Ok(())
}
