//! The gradients of a layer's parameters.

use crate::error::{Error, Result};
use crate::train::{Accumulate, AllReduce, BUCKET, all_reduce};

/// One gradient per parameter of a layer, by [`name`](crate::train::name), of the parameter's
/// shape, row-major, in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads {
    tensors: Vec<Tensor>,
}

#[derive(Clone, Debug, PartialEq)]
struct Tensor {
    name: &'static str,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Grads {
    pub(crate) fn new(shapes: impl Iterator<Item = (&'static str, Vec<usize>)>) -> Self {
        let zeros = |(name, shape): (_, Vec<usize>)| Tensor {
            name,
            values: vec![0.0; shape.iter().product()],
            shape,
        };
        Grads { tensors: shapes.map(zeros).collect() }
    }

    /// The gradient of a parameter, if the layer has it.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.tensors.iter().find(|tensor| tensor.name == name).map(|tensor| &tensor.values[..])
    }

    /// The gradient of a parameter, to change: to clip it, to sum it over processes.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        let tensor = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        tensor.map(|tensor| &mut tensor.values[..])
    }

    /// Calls `f(name, shape, values)` for every gradient.
    pub fn visit(&self, mut f: impl FnMut(&'static str, &[usize], &[f32])) {
        self.tensors.iter().for_each(|tensor| f(tensor.name, &tensor.shape, &tensor.values));
    }

    /// As [`visit`](Self::visit), with values to change.
    pub fn visit_mut(&mut self, mut f: impl FnMut(&'static str, &[usize], &mut [f32])) {
        let tensors = self.tensors.iter_mut();
        tensors.for_each(|tensor| f(tensor.name, &tensor.shape, &mut tensor.values));
    }

    /// Sets every gradient to zero.
    pub fn zero(&mut self) {
        self.visit_mut(|_, _, values| values.fill(0.0));
    }

    /// Multiplies every gradient: by `1 / loss scale`, by `1 / workers`.
    pub fn scale(&mut self, factor: f32) {
        self.visit_mut(|_, _, values| values.iter_mut().for_each(|x| *x *= factor));
    }

    /// Sums every gradient over all workers; a mean is that, [scaled](Self::scale). Several layers at a
    /// time: [`all_reduce`].
    ///
    /// # Errors
    /// As [`AllReduce::sum_f32`].
    pub fn all_reduce(&mut self, workers: &dyn AllReduce) -> Result<()> {
        all_reduce([self], workers, BUCKET)
    }

    pub(super) fn slices_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.tensors.iter_mut().map(|tensor| &mut tensor.values[..])
    }

    /// Whether no gradient is infinite or NaN: with a loss scale, whether the step may be taken.
    pub fn is_finite(&self) -> bool {
        self.tensors.iter().all(|tensor| tensor.values.iter().all(|x| x.is_finite()))
    }

    /// Puts a new gradient in its place, if the layer has the parameter.
    pub(crate) fn put(
        &mut self,
        name: &str,
        values: impl IntoIterator<Item = f32>,
        accumulate: Accumulate,
    ) {
        let Some(old) = self.get_mut(name) else { return };
        for (old, new) in old.iter_mut().zip(values) {
            *old = match accumulate {
                Accumulate::Set => new,
                Accumulate::Add => *old + new,
            };
        }
    }

    /// Checks that these are gradients of parameters of these names and shapes.
    pub(crate) fn check(
        &self,
        shapes: impl ExactSizeIterator<Item = (&'static str, Vec<usize>)>,
    ) -> Result<()> {
        let tensor = "the list of gradients";
        if self.tensors.len() != shapes.len() {
            let (expected, got) = (vec![shapes.len()], vec![self.tensors.len()]);
            return Err(Error::Shape { tensor, expected, got });
        }
        for (mine, (name, shape)) in self.tensors.iter().zip(shapes) {
            if mine.name != name || mine.shape != shape {
                let got = mine.shape.clone();
                return Err(Error::Shape { tensor: name, expected: shape, got });
            }
        }
        Ok(())
    }
}
