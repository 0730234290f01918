//! Times a training step of a layer: forward with a batch norm's batch statistics, and backward for
//! everything.

use std::hint::black_box;
use std::time::{Duration, Instant};

use ndarray::{Array4, ArrayView4, Axis};
use pointwise::Cost;
use pointwise::reference::{self, Gradients, Inputs};
use pointwise::train::{Accumulate, Grads, Params, Statistics, name};

use crate::Result;
use crate::layers::Layer;
use crate::measure::{Bench, Outcome, Row, SAMPLES, TURN, in_order, values};
use crate::options::Order;
use crate::verify;

/// One layer in one layout.
struct Contender {
    order: Order,
    params: Params,
    grads: Grads,
    src: Array4<f32>,
    dst: Array4<f32>,
    d_dst: Array4<f32>,
    d_src: Array4<f32>,
    err: f64,
}

impl Bench {
    /// As [`measure`](Self::measure), for a training step.
    pub fn measure_step(&self, layer: &Layer) -> Result<Outcome> {
        let Layer { n, c_in, c_out, h, w, stride, .. } = *layer;
        let description = layer.trained(vec![0.1; c_out])?;
        // Samples repeat, as often each, so that the batch's statistics are those of a few.
        let distinct = if n.is_multiple_of(2) { 2 } else { n };
        let few = values(distinct, c_in, h, w);
        let (out_h, out_w) = (h.div_ceil(stride), w.div_ceil(stride));
        let few_d = values(distinct, c_out, out_h, out_w);
        let inputs = Inputs { sources: vec![few.view().into_dyn()], ..Inputs::default() };
        let statistics = Statistics::Batch;
        let want = reference::backward(&description, &inputs, statistics, few_d.view().into_dyn())?;

        let mut contenders = Vec::new();
        for &order in self.orders() {
            let params = Params::new(&description, self.device())?;
            let dst = in_order(order, Array4::zeros((n, c_out, out_h, out_w)).view());
            contenders.push(Contender {
                order,
                grads: params.grads(),
                params,
                src: in_order(order, repeated(few.view(), n).view()),
                d_dst: in_order(order, repeated(few_d.view(), n).view()),
                d_src: in_order(order, Array4::zeros((n, c_in, h, w)).view()),
                dst,
                err: 0.0,
            });
        }
        let prepared = description.prepare(self.device())?;
        let mut cost: Cost = prepared.cost(&[n, c_in, h, w])?;
        // Three products. Src is read twice and its gradient written; dst, its gradient and the
        // convolution's result are each touched once; the weight is read twice and its gradient
        // written.
        cost.macs *= 3;
        cost.src_bytes *= 3;
        cost.dst_bytes *= 3;
        cost.weight_bytes *= 3;

        let mut rows = Vec::new();
        for _ in 0..2 {
            contenders.iter_mut().try_for_each(|c| c.verify(&want, n / distinct))?;
            rows = self.time_steps(&mut contenders, cost)?;
            for (contender, row) in contenders.iter_mut().zip(&mut rows) {
                contender.verify(&want, n / distinct)?;
                row.errors.max = contender.err;
            }
            if rows.iter().all(|row| row.wrong_roof().is_none()) {
                break;
            }
        }
        Ok(Outcome { rows, notes: Vec::new() })
    }

    fn time_steps(&self, contenders: &mut [Contender], cost: Cost) -> Result<Vec<Row>> {
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
        let row = |(contender, times): (&Contender, &mut Vec<f64>)| {
            times.sort_by(f64::total_cmp);
            Row::new(contender.order, "train", times[times.len() / 2], times[0], cost, roof, self)
        };
        Ok(contenders.iter().zip(&mut times).map(row).collect())
    }
}

fn repeated(few: ArrayView4<'_, f32>, n: usize) -> Array4<f32> {
    let (d, c, h, w) = few.dim();
    let mut all = Array4::zeros((n, c, h, w));
    for (i, mut sample) in all.axis_iter_mut(Axis(0)).enumerate() {
        sample.assign(&few.index_axis(Axis(0), i % d));
    }
    all
}

impl Contender {
    fn step(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let workspace = self.params.call(black_box(&self.src)).run_into(&mut self.dst)?;
        self.params
            .backward_call(&self.src, workspace, &self.d_dst)
            .accumulate(Accumulate::Set)
            .d_src(&mut self.d_src)
            .run(&mut self.grads)?;
        black_box(&mut self.d_src);
        Ok(start.elapsed())
    }

    /// Runs a step over values that are not numbers, and compares everything that it gives.
    fn verify(&mut self, want: &Gradients, times: usize) -> Result<()> {
        self.dst.fill(f32::NAN);
        self.d_src.fill(f32::NAN);
        self.grads.visit_mut(|_, _, values| values.fill(f32::NAN));
        self.step()?;
        let shape = want.dst.shape();
        let positions: usize = shape[0] * shape[2..].iter().product::<usize>() * times;
        let terms = positions + shape[1] + self.src.shape()[1];
        let as_array = |values: &mut dyn Iterator<Item = f64>| {
            values.collect::<ndarray::Array1<_>>().insert_axis(Axis(0)).into_dyn()
        };
        let (dst, d_src) = (self.dst.view().into_dyn(), self.d_src.view().into_dyn());
        let mut all = vec![
            ("dst", dst.to_owned(), want.dst.clone()),
            ("d_src", d_src.to_owned(), want.d_sources[0].clone()),
        ];
        for name in [name::WEIGHT, name::GAMMA, name::BETA] {
            let got = self.grads.get(name).ok_or("a gradient")?;
            let want = want.parameter(name).ok_or("a gradient")?;
            let got = as_array(&mut got.iter().map(|&x| f64::from(x))).mapv(|x| x as f32);
            all.push((name, got, as_array(&mut want.iter().map(|x| x * times as f64))));
        }
        for (name, got, want) in all {
            let largest = want.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            let tolerance = f64::from(f32::EPSILON) * terms as f64 * largest.max(1.0);
            let err = verify::errors(want.view(), got.view(), tolerance).max;
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
