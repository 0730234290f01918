//! Training on the CPU against the f64 reference, and the reference against finite differences.

mod common;

use common::{Case, Fixtures, channels_last};
use ndarray::{ArrayD, IxDyn};
use pointwise::reference::{self, Gradients};
use pointwise::train::{Accumulate, Grads, Options, Params, Statistics};
use pointwise::{Device, Pointwise};

/// A gradient that looks like nothing else: no two channels or positions alike.
fn d_dst(shape: &[usize]) -> ArrayD<f32> {
    let mut next = 0u32;
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (next >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// Everything that a run on the CPU gives.
struct Got {
    dst: ArrayD<f32>,
    d_sources: Vec<ArrayD<f32>>,
    d_residual: Option<ArrayD<f32>>,
    d_gate: Option<ArrayD<f32>>,
    grads: Grads,
    params: Params,
}

struct Tensors {
    sources: Vec<ArrayD<f32>>,
    residual: Option<ArrayD<f32>>,
    gate: Option<ArrayD<f32>>,
}

impl Tensors {
    fn of(case: &Case, last: bool) -> Self {
        let order = |t: &ArrayD<f32>| if last { channels_last(t) } else { t.clone() };
        Tensors {
            sources: case.sources.iter().map(order).collect(),
            residual: case.residual().map(order),
            gate: case.gate().cloned(),
        }
    }
}

fn run(
    layer: &Pointwise,
    tensors: &Tensors,
    options: Options,
    device: &Device,
) -> pointwise::Result<Got> {
    let mut params = Params::with_options(layer, device, options)?;
    let mut grads = params.grads();
    let (first, more) = tensors.sources.split_first().unwrap();
    let mut call = params.call(first);
    for source in more {
        call = call.concat(source);
    }
    if let Some(residual) = &tensors.residual {
        call = call.residual(residual);
    }
    if let Some(gate) = &tensors.gate {
        call = call.gate(gate);
    }
    let (dst, workspace) = call.run()?;
    let d_dst = d_dst(dst.shape());
    let nans = |t: &ArrayD<f32>| t.mapv(|_| f32::NAN);
    let mut d_sources: Vec<_> = tensors.sources.iter().map(nans).collect();
    let mut d_residual = tensors.residual.as_ref().map(nans);
    let mut d_gate = tensors.gate.as_ref().map(nans);
    grads.visit_mut(|_, _, values| values.fill(f32::NAN));
    let mut call = params.backward_call(first, workspace, &d_dst);
    for source in more {
        call = call.concat(source);
    }
    for d in &mut d_sources {
        call = call.d_src(d);
    }
    if let (Some(residual), Some(d)) = (&tensors.residual, &mut d_residual) {
        call = call.residual(residual).d_residual(d);
    }
    if let (Some(gate), Some(d)) = (&tensors.gate, &mut d_gate) {
        call = call.gate(gate).d_gate(d);
    }
    call.run(&mut grads)?;
    Ok(Got { dst, d_sources, d_residual, d_gate, grads, params })
}

fn largest<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    values.into_iter().fold(0.0, |a, b| a.max(b.abs()))
}

/// The largest error relative to the largest value, and what has it.
fn worst(got: &Got, want: &Gradients) -> (f64, String) {
    let mut all: Vec<(String, Vec<f64>, Vec<f64>)> = Vec::new();
    let wide = |t: &ArrayD<f32>| t.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let flat = |t: &ArrayD<f64>| t.iter().copied().collect::<Vec<_>>();
    all.push(("dst".into(), wide(&got.dst), flat(&want.dst)));
    for (i, (d, want)) in got.d_sources.iter().zip(&want.d_sources).enumerate() {
        all.push((format!("d_src{i}"), wide(d), flat(want)));
    }
    if let (Some(d), Some(want)) = (&got.d_residual, &want.d_residual) {
        all.push(("d_residual".into(), wide(d), flat(want)));
    }
    if let (Some(d), Some(want)) = (&got.d_gate, &want.d_gate) {
        all.push(("d_gate".into(), wide(d), want.iter().copied().collect()));
    }
    got.grads.visit(|name, _, values| {
        let want = want.parameter(name).expect("the reference has every parameter");
        let values = values.iter().map(|&x| f64::from(x)).collect();
        all.push((name.into(), values, want.to_vec()));
    });
    let mut worst = (0.0, String::new());
    for (name, got, want) in all {
        assert_eq!(got.len(), want.len(), "{name}");
        let scale = largest(&want).max(1e-3);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let err = (got - want).abs() / scale;
            if !(err <= worst.0) {
                worst = (err, format!("{name}[{i}] = {got} instead of {want}"));
            }
        }
    }
    worst
}

fn trainable(case: &Case) -> bool {
    case.repeated_stage().is_none() && !case.name.starts_with("not_finite")
}

#[test]
fn every_case_of_the_fixtures_has_the_references_gradients() {
    let device = Device::cpu();
    let mut failures = Vec::new();
    let mut seen = 0;
    for case in Fixtures::load().cases_and_embedded().iter().filter(|case| trainable(case)) {
        let layer = case.layer();
        for statistics in [Statistics::Batch, Statistics::Frozen] {
            for last in [false, true] {
                let tensors = Tensors::of(case, last);
                let options = Options { statistics, ..Options::default() };
                let got = run(&layer, &tensors, options, &device);
                let what = format!("{}, {statistics:?}, last {last}", case.name);
                let got = match got {
                    Ok(got) => got,
                    Err(error) => {
                        failures.push(format!("{what}: {error}"));
                        continue;
                    }
                };
                let d_dst = d_dst(got.dst.shape());
                let want =
                    reference::backward(&layer, &case.inputs(), statistics, d_dst.view()).unwrap();
                let (err, at) = worst(&got, &want);
                seen += 1;
                println!("{err:.2e} {what} {at}");
                if !(err <= 1e-4) {
                    failures.push(format!("{what}: {err:.1e}: {at}"));
                }
                let _ = got.params.num_batches_tracked();
            }
        }
    }
    assert!(seen > 400, "only {seen} runs");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    let _ = Accumulate::Set;
}
