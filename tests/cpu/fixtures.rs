//! The operator against PyTorch: the f64 specification, then the layer on the CPU.

use crate::common::{Case, Fixtures, activation, channels_last, close, difference};
use ndarray::ArrayD;
use pointwise::init::{Fan, Init, Nonlinearity};
use pointwise::{Device, Error, Prepared, reference};
use serde_json::Value;

/// Fails with all that went wrong, not with the first only.
fn report(failures: &[String]) {
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn reference_is_pytorch() {
    let mut failures = Vec::new();
    let cases = Fixtures::load().cases_and_embedded();
    assert!(cases.len() > 200, "only {} cases", cases.len());
    for case in &cases {
        let got = reference::forward(&case.layer(), &case.inputs());
        match (case.repeated_stage(), got) {
            (Some(_), Err(Error::RepeatedStage { .. })) => {}
            (Some(stage), got) => {
                failures.push(format!("{}: takes {stage} twice: {got:?}", case.name));
            }
            (None, Err(error)) => failures.push(format!("{}: {error}", case.name)),
            (None, Ok(got)) => {
                let found =
                    difference(got.view(), &case.dst, |_, want| 1e-12 * want.abs().max(1.0));
                failures.extend(found.map(|what| format!("{}: {what}", case.name)));
            }
        }
    }
    report(&failures);
}

#[test]
fn activations_are_pytorchs() {
    let fixtures = Fixtures::load();
    let mut failures = Vec::new();
    for row in fixtures.rows("/activations") {
        let table = row["table"].as_str().expect("a row names its table");
        if row["stage"] == "prelu" {
            continue;
        }
        let activation = activation(row);
        let (x, y) = fixtures.activation_table(table);
        for (&x, &want) in x.iter().zip(&y) {
            let got = reference::activate(activation, f64::from(x));
            if !close(got, want, 1e-12 * want.abs().max(1.0)) {
                failures.push(format!("{table}({x:?}) = {got:?} instead of {want:?}"));
            }
        }
    }
    report(&failures);
}

#[test]
fn initial_weights_are_pytorchs() {
    let fixtures = Fixtures::load();
    let mut failures = Vec::new();
    // Some are computed in another order than PyTorch's.
    let mut expect = |what: String, got: Option<f64>, want: Option<f64>| {
        let same = match (got, want) {
            (Some(got), Some(want)) => close(got, want, 1e-14 * want),
            (got, want) => got == want,
        };
        if !same {
            failures.push(format!("{what}: {got:?} instead of {want:?}"));
        }
    };
    let nonlinearity = |row: &Value, alpha: &str| match row["nonlinearity"].as_str() {
        Some("linear") => Nonlinearity::Linear,
        Some("sigmoid") => Nonlinearity::Sigmoid,
        Some("tanh") => Nonlinearity::Tanh,
        Some("relu") => Nonlinearity::Relu,
        Some("leaky_relu") => {
            Nonlinearity::LeakyRelu { alpha: row[alpha].as_f64().expect("a slope") }
        }
        Some("selu") => Nonlinearity::Selu,
        other => panic!("unknown nonlinearity {other:?}"),
    };
    for row in fixtures.rows("/init/gains") {
        let got = nonlinearity(row, "param").gain();
        expect(format!("gain of {row}"), Some(got), row["gain"].as_f64());
    }
    for row in fixtures.rows("/init/rows") {
        let uniform = row["distribution"] == "uniform";
        let init = if row["scheme"] == "xavier" {
            let gain = row["gain"].as_f64().expect("gain");
            if uniform { Init::XavierUniform { gain } } else { Init::XavierNormal { gain } }
        } else {
            let fan = if row["mode"] == "fan_in" { Fan::In } else { Fan::Out };
            let nonlinearity = nonlinearity(row, "a");
            match uniform {
                true => Init::KaimingUniform { fan, nonlinearity },
                false => Init::KaimingNormal { fan, nonlinearity },
            }
        };
        let size = |key: &str| row[key].as_u64().expect(key) as usize;
        let (c_out, c_in) = (size("c_out"), size("c_in") / size("groups"));
        expect(format!("std of {row}"), Some(init.std(c_out, c_in)), row["std"].as_f64());
        expect(format!("bound of {row}"), init.bound(c_out, c_in), row["bound"].as_f64());
    }
    report(&failures);
}

/// The call of a case with all its tensors in channels-first or channels-last memory order.
fn run(layer: &Prepared, case: &Case, last: bool) -> pointwise::Result<ArrayD<f32>> {
    let order = |t: &ArrayD<f32>| if last { channels_last(t) } else { t.clone() };
    let sources: Vec<_> = case.sources.iter().map(order).collect();
    let (residual, gate) = (case.residual().map(order), case.gate());
    let mut call = layer.call(&sources[0]);
    for more in &sources[1..] {
        call = call.concat(more);
    }
    if let Some(residual) = &residual {
        call = call.residual(residual);
    }
    if let Some(gate) = gate {
        call = call.gate(gate);
    }
    call.run()
}

#[test]
fn cpu_layer_is_pytorch() {
    let mut failures = Vec::new();
    for case in &Fixtures::load().cases_and_embedded() {
        let layer = match (case.repeated_stage(), case.layer().prepare(&Device::cpu())) {
            (None, Ok(layer)) => layer,
            (Some(_), Err(Error::RepeatedStage { .. })) => continue,
            (repeated, got) => {
                failures.push(format!("{}: {repeated:?} stands twice: {got:?}", case.name));
                continue;
            }
        };
        let tolerance = case.tolerance();
        // What passes by a partial convolution is copied.
        let tolerance =
            |index: &[usize], _| if case.passes_through(index[1]) { 0.0 } else { tolerance };
        for last in [false, true] {
            let found = match run(&layer, case, last) {
                Ok(got) => difference(got.view(), &case.dst, tolerance),
                Err(error) => Some(error.to_string()),
            };
            let order = if last { "channels last" } else { "channels first" };
            failures.extend(found.map(|what| format!("{}, {order}: {what}", case.name)));
        }
    }
    report(&failures);
}

/// A tolerance that is far above what the arithmetic needs would hide faults.
#[test]
fn tolerances_are_tight() {
    for case in Fixtures::load().cases().iter().filter(|case| case.repeated_stage().is_none()) {
        let largest = case
            .dst
            .iter()
            .copied()
            .filter(|x| x.is_finite())
            .fold(1.0, |a: f64, x| a.max(x.abs()));
        let tolerance = case.tolerance() / largest;
        assert!(tolerance <= 1e-3, "{}: {tolerance:e} of the largest value", case.name);
    }
}
