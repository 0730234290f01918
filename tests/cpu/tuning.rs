//! A tuning changes which kernel runs, never a result; what it does not know it passes over.

use std::sync::Arc;

use ndarray::{Array2, Array4};
use pointwise::{
    Activation, Device, Error, LayerNorm, Layout, Pointwise, PrepareOptions, Prepared, Tuning, nhwc,
};

/// Values without a pattern, always the same.
fn values(shape: (usize, usize, usize, usize)) -> Array4<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    Array4::from_shape_simple_fn(shape, || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
}

fn weight(c_out: usize, k: usize) -> Array2<f32> {
    values((1, 1, c_out, k)).into_shape_with_order((c_out, k)).unwrap()
}

const C_IN: usize = 24;

/// Layers of each kind, from `C_IN` channels.
fn layers() -> Vec<Pointwise> {
    vec![
        Pointwise::new(weight(37, C_IN)).bias(vec![0.5; 37]).relu(),
        Pointwise::new(weight(144, C_IN)).silu(),
        Pointwise::new(weight(129, C_IN)).residual().relu(),
        Pointwise::new(weight(60, C_IN / 3)).groups(3).channel_shuffle(3),
        Pointwise::new(weight(70, C_IN)).source_activation(Activation::HardSwish).gate(),
        Pointwise::new(weight(65, C_IN)).stride(2).gelu(),
        Pointwise::new(weight(96, C_IN)).layer_norm(LayerNorm::over_channels()),
        Pointwise::new(weight(40, C_IN / 2)).groups(2).layer_norm(LayerNorm::over_all()).silu(),
        Pointwise::new(weight(72, C_IN - 6)).partial(2..C_IN - 4),
    ]
}

const LAYOUTS: [Layout; 2] = [Layout::ChannelsFirst, Layout::ChannelsLast];

/// The bits of a layer's result, on the same values in either memory order.
fn run(
    description: &Pointwise,
    layer: &Prepared,
    shape: (usize, usize, usize, usize),
    layout: Layout,
) -> Vec<u32> {
    let first = values(shape);
    let last = first.view().permuted_axes([0, 2, 3, 1]).as_standard_layout().into_owned();
    let src = match layout {
        Layout::ChannelsFirst => first.view(),
        Layout::ChannelsLast => nhwc(last.view()),
    };
    let dst = layer.dst_shape(src.shape()).unwrap();
    let residual = values((dst[0], dst[1], dst[2], dst[3]));
    let gate = values((shape.0, description.c_in(), 1, 1));
    let mut call = layer.call(&src);
    if description.stages().iter().any(|stage| stage.name() == "residual") {
        call = call.residual(&residual);
    }
    if description.source_stages().iter().any(|stage| stage.name() == "gate") {
        call = call.gate(&gate);
    }
    call.run().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// The columns of a tuning's text.
const COLUMNS: [&str; 6] = ["device", "problem", "kernel", "order", "ns", "planned_ns"];

/// A tuning with a column of each entry replaced.
fn replaced(tuning: &Tuning, column: &str, value: &str) -> Tuning {
    let index = COLUMNS.iter().position(|name| *name == column).unwrap();
    let text = tuning.to_string();
    let line = |line: &str| {
        let mut columns: Vec<_> = line.split('\t').collect();
        columns[index] = value;
        columns.join("\t") + "\n"
    };
    text.lines().skip(1).map(line).collect::<String>().parse().unwrap()
}

#[test]
fn every_choice_gives_the_same_bits() {
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
    for (i, description) in layers().iter().enumerate() {
        let device = [Device::cpu().threads(1), Device::cpu_with_pool(pool.clone())][i % 2].clone();
        let layer = description.prepare(&device).unwrap();
        for (n, c, h, w) in [(1, C_IN, 14, 14), (3, C_IN, 7, 7), (2, C_IN, 41, 30)] {
            for layout in LAYOUTS {
                let shape = [n, c, h, w];
                let want = run(description, &layer, (n, c, h, w), layout);
                let tuning = layer.tune(&[(&shape, layout)]).unwrap();
                assert_eq!(tuning.len(), 1);
                let mut tuned = 0;
                for candidate in layer.plans_in(&shape, layout).unwrap() {
                    for (order, words) in [
                        ("channels_outer", "channels outside positions"),
                        ("positions_outer", "positions outside channels"),
                    ] {
                        let choice = replaced(&tuning, "kernel", candidate.kernel);
                        let choice = layer.with_tuning(&replaced(&choice, "order", order));
                        let explanation = choice.explain_in(&shape, layout).unwrap();
                        // Kernels of another instruction set are passed over.
                        if explanation.reason.ends_with("; tuned") {
                            tuned += 1;
                            assert_eq!(explanation.kernel, candidate.kernel);
                            assert!(explanation.reason.contains(words), "{explanation}");
                            let plans = choice.plans_in(&shape, layout).unwrap();
                            assert_eq!(plans[0].kernel, candidate.kernel);
                            let verdict = plans[0].verdict.as_ref().unwrap();
                            assert!(explanation.reason.starts_with(verdict), "{explanation}");
                        }
                        let got = run(description, &choice, (n, c, h, w), layout);
                        assert!(want == got, "{explanation}");
                    }
                }
                assert!(tuned >= 2, "{tuning}");
            }
        }
    }
}

fn layer() -> Prepared {
    Pointwise::new(weight(96, C_IN)).relu().prepare(&Device::cpu().threads(1)).unwrap()
}

fn is_tuned(layer: &Prepared, shape: &[usize]) -> bool {
    layer.explain(shape).unwrap().reason.ends_with("; tuned")
}

#[test]
fn what_is_saved_is_what_is_read() {
    let layer = layer();
    let shapes: [&[usize]; 4] = [&[1, C_IN, 9, 9], &[4, C_IN, 30], &[5, C_IN], &[1, C_IN, 2, 3, 4]];
    let shapes: Vec<_> =
        shapes.iter().flat_map(|shape| LAYOUTS.map(|layout| (*shape, layout))).collect();
    let tuning = layer.tune(&shapes).unwrap();
    let text = tuning.to_string();
    assert_eq!(text.lines().next().unwrap(), COLUMNS.join("\t"));
    assert_eq!(text.parse::<Tuning>().unwrap(), tuning);
    // Texts may be put together, with either line ends, and then say the same twice.
    let twice = format!("{text}\n\n{text}").replace('\n', "\r\n");
    assert_eq!(twice.parse::<Tuning>().unwrap(), tuning);
    let collected: Tuning =
        [Tuning::default(), tuning.clone(), tuning.clone()].into_iter().collect();
    assert_eq!(collected, tuning);
    let tuned = layer.with_tuning(&tuning);
    for (shape, layout) in shapes {
        let reason = tuned.explain_in(shape, layout).unwrap().reason;
        assert!(reason.ends_with("; tuned"), "{shape:?}: {reason}");
    }
    assert!(!is_tuned(&tuned, &[1, C_IN, 9, 8]));
    assert!(!is_tuned(&tuned.with_tuning(&Tuning::default()), &[1, C_IN, 9, 9]));
    assert!(!is_tuned(&layer, &[1, C_IN, 9, 9]));
}

#[cfg(feature = "serde")]
#[test]
fn a_tuning_survives_serialisation() {
    let tuning = layer().tune(&[(&[1, C_IN, 9, 9], Layout::ChannelsFirst)]).unwrap();
    let json = serde_json::to_string(&tuning).unwrap();
    assert_eq!(serde_json::from_str::<Tuning>(&json).unwrap(), tuning);
}

#[test]
fn what_does_not_apply_is_passed_over() {
    let shape: &[usize] = &[1, C_IN, 13, 11];
    let layer = layer();
    let tuning = layer.tune(&[(shape, Layout::ChannelsFirst)]).unwrap();
    assert!(is_tuned(&layer.with_tuning(&tuning), shape));
    for (column, value) in [
        ("device", "cpu of another make"),
        ("kernel", "fprop_f32_avx1024_99x99"),
        ("order", "sideways"),
        ("problem", "groups=1 k=24"),
        ("problem", "colour=blue"),
        ("problem", ""),
    ] {
        let other = replaced(&tuning, column, value);
        assert_eq!(other.len(), 1);
        assert!(!is_tuned(&layer.with_tuning(&other), shape), "{column} {value}");
        // It is kept, beside what does apply.
        let both: Tuning = [other, tuning.clone()].into_iter().collect();
        assert!(is_tuned(&layer.with_tuning(&both), shape), "{column} {value}");
    }
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
    let description = Pointwise::new(weight(96, C_IN)).relu();
    let threads = description.prepare(&Device::cpu_with_pool(pool)).unwrap();
    assert!(!is_tuned(&threads.with_tuning(&tuning), shape));
    let wider = Pointwise::new(weight(97, C_IN)).prepare(&Device::cpu().threads(1)).unwrap();
    assert!(!is_tuned(&wider.with_tuning(&tuning), shape));
}

#[test]
fn a_forced_kernel_goes_first() {
    let shape: &[usize] = &[1, C_IN, 13, 11];
    let (device, description) = (Device::cpu().threads(1), Pointwise::new(weight(96, C_IN)));
    let tuning = layer().tune(&[(shape, Layout::ChannelsFirst)]).unwrap();
    for candidate in layer().plans(shape).unwrap() {
        if candidate.verdict.is_err() {
            continue;
        }
        let options =
            PrepareOptions { kernel: Some(candidate.kernel.into()), ..Default::default() };
        let forced = description.prepare_with(&device, options).unwrap().with_tuning(&tuning);
        let explanation = forced.explain(shape).unwrap();
        assert_eq!(explanation.kernel, candidate.kernel);
        assert!(explanation.reason.ends_with("; forced"), "{explanation}");
        // It may be tuned nevertheless: for the layer without it.
        assert_eq!(forced.tune(&[(shape, Layout::ChannelsLast)]).unwrap().len(), 1);
    }
}

#[test]
fn nothing_to_run_is_left_out() {
    for shape in [&[0, C_IN, 9, 9][..], &[2, C_IN, 0, 9], &[0, C_IN]] {
        let tuning = layer().tune(&[(shape, Layout::ChannelsFirst)]).unwrap();
        assert!(tuning.is_empty());
        assert_eq!(tuning.to_string().parse::<Tuning>().unwrap(), tuning);
    }
    assert!(layer().tune(&[]).unwrap().is_empty());
}

#[test]
fn bad_input_is_an_error() {
    let tune = |shape: &[usize]| layer().tune(&[(shape, Layout::ChannelsLast)]).unwrap_err();
    assert!(matches!(tune(&[1, C_IN + 1, 9, 9]), Error::Channels { .. }));
    assert!(matches!(tune(&[C_IN]), Error::Rank { got: 1, .. }));
    assert!(matches!(tune(&[1 << 20, C_IN, 1 << 20, 1 << 10]), Error::TooLarge { .. }));

    let parse = |text: &str| text.parse::<Tuning>().unwrap_err();
    let header = COLUMNS.join("\t");
    let error = parse(&format!("{header}\ncpu\tproblem\tkernel\torder\t1\n"));
    assert!(matches!(&error, Error::Tuning { line: 2, .. }), "{error}");
    assert!(error.to_string().contains("six columns"), "{error}");
    let error = parse("a\tb\tc\td\t1\t-2");
    assert!(error.to_string().contains("line 1") && error.to_string().contains("nanoseconds"));
    assert!("".parse::<Tuning>().unwrap().is_empty());
}
