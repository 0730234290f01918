//! Times a training step of a layer: forward with a batch norm's batch statistics, and backward for
//! everything.

use std::hint::black_box;
use std::time::{Duration, Instant};

use ndarray::{ArrayView1, ArrayViewD, Axis, Zip};
use pointwise::reference::{self, Gradients, Inputs};
use pointwise::train::{Accumulate, Grads, Params, Statistics, name};
use pointwise::{Cost, DType, Element, bf16, f16};

use crate::Result;
use crate::layers::Layer;
use crate::measure::{Bench, Outcome, Row, SAMPLES, TURN};
use crate::options::{Numbers, Order};
use crate::tensor::{Tensor, Value, repeated, values, zeros};
use crate::verify;

/// One layer in one layout.
struct Contender<T> {
    order: Order,
    params: Params,
    grads: Grads,
    src: Tensor<T>,
    dst: Tensor<T>,
    d_dst: Tensor<T>,
    d_src: Tensor<T>,
    /// Whether the gradient by the convolution's result is rounded to T before it is multiplied.
    rounds_between: bool,
    err: f64,
}

impl Bench {
    /// As [`measure`](Self::measure), for a training step.
    pub fn measure_step(&self, layer: &Layer) -> Result<Outcome> {
        match self.numbers {
            Numbers::Real(DType::F16) => self.measure_step_as::<f16>(layer),
            Numbers::Real(DType::Bf16) => self.measure_step_as::<bf16>(layer),
            Numbers::Real(_) => self.measure_step_as::<f32>(layer),
            Numbers::Int8 => Err("8-bit integers are not trained")?,
        }
    }

    fn measure_step_as<T: Value>(&self, layer: &Layer) -> Result<Outcome> {
        let Layer { n, c_in, c_out, h, w, stride, .. } = *layer;
        let beta = || vec![0.1; c_out];
        let description = layer.trained::<T>(beta())?;
        // Samples repeat, as often each, so that the batch's statistics are those of a few.
        let distinct = if n.is_multiple_of(2) { 2 } else { n };
        let few = values(distinct, c_in, h, w).mapv(T::from_f32);
        let (out_h, out_w) = (h.div_ceil(stride), w.div_ceil(stride));
        let held = few.mapv(T::to_f32);
        let mut d = values(distinct, c_out, out_h, out_w);
        // Where a slope jumps, a last bit decides which it is: no gradient passes there.
        if let Some(activation) = layer.activation {
            let straight = Layer { activation: None, ..layer.clone() }.trained::<T>(beta())?;
            let (reached, _) = Params::new(&straight, self.device())?.forward(&held)?;
            let slope = |x: f32| reference::slope(activation, f64::from(x));
            Zip::from(&mut d).and(&reached).for_each(|d, &x| {
                if (slope(x + 1e-3) - slope(x - 1e-3)).abs() > 0.1 {
                    *d = 0.0;
                }
            });
        }
        let few_d = d.mapv(T::from_f32);
        let (src, d_dst) = (held.view().into_dyn(), few_d.mapv(T::to_f32).into_dyn());
        let inputs = Inputs { sources: vec![src], ..Inputs::default() };
        let want = reference::backward(&description, &inputs, Statistics::Batch, d_dst.view())?;

        let mut contenders = Vec::new();
        for &order in self.orders() {
            let params = Params::new(&description, self.device())?;
            contenders.push(Contender {
                order,
                grads: params.grads(),
                params,
                src: self.tensor(repeated(order, few.view(), n))?,
                dst: self.tensor(zeros(order, [n, c_out, out_h, out_w]))?,
                d_dst: self.tensor(repeated(order, few_d.view(), n))?,
                d_src: self.tensor(zeros(order, [n, c_in, h, w]))?,
                rounds_between: T::DTYPE != DType::F32 && self.device_name != "cpu",
                err: 0.0,
            });
        }
        let prepared = description.prepare(self.device())?;
        let mut cost: Cost = prepared.cost(&[n, c_in, h, w])?;
        // Three products. Src is read twice and its gradient written; dst, its gradient and the
        // convolution's result, which is f32, are each touched once; the weight is read twice and its
        // gradient written, in f32.
        let bytes = |values: usize| values * size_of::<T>();
        let (src, dst) = (cost.src_bytes / 4, cost.dst_bytes / 4);
        cost.macs *= 3;
        cost.src_bytes = 3 * bytes(src);
        cost.dst_bytes = 2 * bytes(dst) + 4 * dst;
        cost.weight_bytes *= 3;

        let mut rows = Vec::new();
        for _ in 0..2 {
            contenders.iter_mut().try_for_each(|c| c.verify(&want, n / distinct))?;
            rows = self.time_steps(&mut contenders, cost)?;
            for (contender, row) in contenders.iter_mut().zip(&mut rows) {
                contender.check(&want, n / distinct)?;
                row.errors.max = contender.err;
            }
            if rows.iter().all(|row| row.wrong_roof().is_none()) {
                break;
            }
        }
        Ok(Outcome { rows, notes: Vec::new() })
    }

    fn time_steps<T: Value>(
        &self,
        contenders: &mut [Contender<T>],
        cost: Cost,
    ) -> Result<Vec<Row>> {
        // Products of training are f32's on the CPU, whatever tensors hold.
        let meter = self.device().roof_meter(cost.bytes())?;
        let mut roof = meter.sample();
        let mut times = vec![Vec::new(); contenders.len()];
        for sample in 0..SAMPLES {
            if sample > 0 {
                roof = roof.max(meter.sample());
            }
            let forth = 0..contenders.len();
            for i in forth.clone().chain(forth.rev()) {
                contenders[i].step()?;
                let start = Instant::now();
                while start.elapsed() < TURN {
                    times[i].push(contenders[i].step()?.as_secs_f64());
                }
            }
        }
        let row = |(contender, times): (&Contender<T>, &mut Vec<f64>)| {
            times.sort_by(f64::total_cmp);
            Row::new(contender.order, "train", times[times.len() / 2], times[0], cost, roof, self)
        };
        Ok(contenders.iter().zip(&mut times).map(row).collect())
    }
}

impl<T: Value> Contender<T> {
    fn step(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let workspace = self.params.call(black_box(&self.src)).run_into(&mut self.dst)?;
        self.params
            .backward_call(&self.src, workspace, &self.d_dst)
            .accumulate(Accumulate::Set)
            .d_src(&mut self.d_src)
            .run(&mut self.grads)?;
        black_box(&mut self.d_src).wait()?;
        Ok(start.elapsed())
    }

    /// Runs a step over values that are not numbers, and compares everything that it gives.
    fn verify(&mut self, want: &Gradients, times: usize) -> Result<()> {
        self.dst.blank()?;
        self.d_src.blank()?;
        self.grads.visit_mut(|_, _, values| values.fill(f32::NAN));
        self.step()?;
        self.check(want, times)
    }

    /// Compares everything that the last step gave.
    fn check(&mut self, want: &Gradients, times: usize) -> Result<()> {
        let shape = want.dst.shape();
        let positions: usize = shape[0] * shape[2..].iter().product::<usize>() * times;
        let terms = (positions + shape[1] + want.d_sources[0].shape()[1]) as f64;
        let between = if self.rounds_between { rounding::<T>() } else { 0.0 };
        let mut errors = vec![
            ("dst", error(want.dst.view(), self.dst.values()?.view(), terms, 0.0)),
            ("d_src", error(want.d_sources[0].view(), self.d_src.values()?.view(), terms, between)),
        ];
        for (name, between) in [(name::WEIGHT, between), (name::GAMMA, 0.0), (name::BETA, 0.0)] {
            let got = self.grads.get(name).ok_or("a gradient")?;
            let want = want.parameter(name).ok_or("a gradient")?;
            let want = ArrayView1::from(want).mapv(|x| x * times as f64).insert_axis(Axis(0));
            let got = ArrayView1::from(got).insert_axis(Axis(0));
            let (want, got) = (want.view().into_dyn(), got.into_dyn());
            errors.push((name, error::<f32>(want, got, terms, between)));
        }
        for (name, err) in errors {
            self.err = self.err.max(err);
            // Infinite where a value is not a number.
            if err > 1.0 {
                let order = self.order.name();
                Err(format!("{order}: {name} is off by {err:.1} times the tolerance"))?;
            }
        }
        Ok(())
    }
}

/// The largest relative error of a rounding to T, where it is not part of what sums are allowed.
fn rounding<T: Element>() -> f64 {
    match T::DTYPE {
        DType::F16 => 2f64.powi(-11),
        DType::Bf16 => 2f64.powi(-8),
        _ => 0.0,
    }
}

/// The largest error of values that are sums of `terms` products in f32, as a multiple of what is
/// allowed: a bit of the largest value for each term, `between` of the largest for a rounding of the
/// terms, and the rounding of the value itself.
fn error<T: Element>(
    want: ArrayViewD<'_, f64>,
    got: ArrayViewD<'_, T>,
    terms: f64,
    between: f64,
) -> f64 {
    let largest = want.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    let of_terms = f64::from(f32::EPSILON) * terms * largest.max(1.0) + between * largest;
    let tolerance = |want: f64| of_terms + rounding::<T>() * (want.abs() + of_terms);
    verify::errors(want, got, tolerance).max
}
