//! Layers of 8-bit integers: u8 in and out, a scale per output channel.

use std::hint::black_box;
use std::rc::Rc;

use ndarray::{Array2, Array4, ArrayD, Axis};
use pointwise::quantized::PreparedQuantized;
use pointwise::{PrepareOptions, reference};

use crate::Result;
use crate::layers::Layer;
use crate::measure::{Bench, Contender, DISTINCT, Timed};
use crate::tensor::{repeated, values};
use crate::verify::{self, Errors};

impl Bench {
    pub fn contenders_of_integers(&self, layer: &Layer) -> Result<(Vec<Contender>, Vec<String>)> {
        if self.device().to_string().starts_with("cuda") {
            // Its tensors are on the host, and would be timed on their way.
            Err("int8 is timed on the CPU only")?;
        }
        let Layer { n, c_in, c_out, h, w, groups, .. } = *layer;
        let k = c_in / groups;
        let bytes = |x: f32| (x * 128.0).floor() as i8;
        let weight =
            Array2::from_shape_vec((c_out, k), values(1, 1, c_out, k).into_raw_vec_and_offset().0)?;
        let description = layer.quantized(weight.mapv(bytes))?;
        let distinct = values(n.min(DISTINCT), c_in, h, w).mapv(|x| bytes(x) as u8 ^ 0x80);
        let integers = distinct.mapv(i32::from).into_dyn();
        let expected = Rc::new(reference::forward_quantized(&description, integers.view(), None)?);

        let mut contenders = Vec::new();
        for kernel in self.kernels() {
            let options = PrepareOptions { kernel: kernel.clone(), ..PrepareOptions::default() };
            let prepared = description.prepare_with(self.device(), options)?;
            for &order in self.orders() {
                let src = repeated(order, distinct.view(), n);
                let dst: Array4<u8> = prepared.forward(&src)?;
                let (prepared, expected) = (prepared.clone(), Rc::clone(&expected));
                contenders.push(Contender {
                    order,
                    kernel: prepared.kernel(),
                    forced: kernel.is_some(),
                    cost: prepared.cost(src.shape())?,
                    layer: Box::new(Integers { prepared, src, dst, expected }),
                    errors: Errors::default(),
                });
            }
        }
        Ok((contenders, Vec::new()))
    }
}

struct Integers {
    prepared: PreparedQuantized,
    src: Array4<u8>,
    dst: Array4<u8>,
    expected: Rc<ArrayD<f64>>,
}

impl Timed for Integers {
    fn blank(&mut self) -> Result<()> {
        let distinct = self.expected.len_of(Axis(0));
        for (i, mut sample) in self.dst.axis_iter_mut(Axis(0)).enumerate() {
            let expected = self.expected.index_axis(Axis(0), i % distinct);
            sample.iter_mut().zip(expected).for_each(|(x, &want)| *x = want as u8 ^ 0x80);
        }
        Ok(())
    }

    fn run(&mut self, calls: usize) -> Result<()> {
        for _ in 0..calls {
            self.prepared.forward_into(black_box(&self.src), &mut self.dst)?;
        }
        black_box(&self.dst);
        Ok(())
    }

    fn errors(&self) -> Result<Errors> {
        Ok(verify::errors_of_integers(self.expected.view(), self.dst.view().into_dyn()))
    }
}
