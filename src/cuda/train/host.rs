//! Passes on host tensors: each is copied to the device whole, and what is written back to the host.

use super::{State, Training};
use crate::cuda::staging::copy_on_host;
use crate::cuda::tensor::CudaTensor;
use crate::dtype::Element;
use crate::error::Result;
use crate::problem::{Operand, Operands, spatial};
use crate::tensor::{TensorMut, TensorRef, try_zeros};
use crate::train::{Accumulate, Grads, Outputs};

/// A host tensor's copy on the device, in the same order of axes.
struct Copied<T>(CudaTensor<T>);

impl<T: Element> Copied<T> {
    fn blank(training: &Training<'_>, like: &TensorRef<'_, T>) -> Result<Self> {
        CudaTensor::like(training.device, like, like.shape()).map(Copied)
    }

    fn of(training: &Training<'_>, tensor: &TensorRef<'_, T>) -> Result<Self> {
        let mut copied = Copied::blank(training, tensor)?;
        let mut values = copied.values()?;
        // SAFETY: the view vouches for the tensor, and the values are as many as its shape says.
        unsafe {
            let to = copied.on_host(&mut values);
            copy_on_host(copied.extents(), &Operand::new(tensor), &to);
        }
        copied.0.upload(&values)?;
        Ok(copied)
    }

    fn back(&self, tensor: &mut TensorMut<'_, T>) -> Result<()> {
        let mut values = self.values()?;
        self.0.download(&mut values)?;
        let from = self.on_host(&mut values);
        // SAFETY: as in `of`.
        unsafe { copy_on_host(self.extents(), &from, &Operand::new(tensor.view())) };
        Ok(())
    }

    fn values(&self) -> Result<Vec<T>> {
        try_zeros("a tensor's copy", self.0.shape())
    }

    fn extents(&self) -> [usize; 4] {
        let [d, h, w] = spatial(self.0.shape(), 1);
        [self.0.shape()[0], d, h, w]
    }

    fn on_host(&self, values: &mut [T]) -> Operand<T> {
        let strides = self.0.strides();
        Operand {
            ptr: values.as_mut_ptr(),
            sample: strides[0],
            channel: strides[1],
            channels: self.0.shape()[1],
            spatial: spatial(strides, 0),
            stream: None,
        }
    }
}

/// The copies of what a pass reads.
struct Reading<T> {
    sources: Vec<Copied<T>>,
    residual: Option<Copied<T>>,
    gate: Option<Copied<T>>,
}

impl<T: Element> Reading<T> {
    fn of(training: &Training<'_>, operands: &Operands<'_, T>) -> Result<Self> {
        let copy = |tensor: &TensorRef<'_, T>| Copied::of(training, tensor);
        let sources = std::iter::once(&operands.src).chain(operands.more);
        Ok(Reading {
            sources: sources.map(copy).collect::<Result<_>>()?,
            residual: operands.residual.as_ref().map(copy).transpose()?,
            gate: operands.gate.as_ref().map(copy).transpose()?,
        })
    }

    fn with<R>(&self, f: impl FnOnce(&Operands<'_, T>) -> Result<R>) -> Result<R> {
        let sources = self.sources.iter().map(|source| source.0.view());
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let residual = self.residual.as_ref().map(|copied| copied.0.view()).transpose()?;
        let gate = self.gate.as_ref().map(|copied| copied.0.view()).transpose()?;
        f(&Operands { src: sources[0], more: &sources[1..], residual, gate })
    }
}

pub(super) fn forward<T: Element>(
    training: &Training<'_>,
    operands: &Operands<'_, T>,
    dst: &mut TensorMut<'_, T>,
) -> Result<State> {
    let reading = Reading::of(training, operands)?;
    let mut copied = Copied::blank(training, dst.view())?;
    let state = reading.with(|operands| training.forward(operands, &mut copied.0.view_mut()?))?;
    copied.back(dst)?;
    Ok(state)
}

pub(super) fn backward<T: Element>(
    training: &Training<'_>,
    operands: &Operands<'_, T>,
    state: State,
    d_dst: &TensorRef<'_, T>,
    outputs: &mut Outputs<'_, T>,
    grads: &mut Grads,
    accumulate: Accumulate,
) -> Result<()> {
    let Outputs { d_sources, d_residual, d_gate, accumulate_sources, accumulate: add } = outputs;
    let reading = Reading::of(training, operands)?;
    let d_dst = Copied::of(training, d_dst)?;
    let written = |tensor: &TensorMut<'_, T>, accumulate: Accumulate| match accumulate {
        Accumulate::Set => Copied::blank(training, tensor.view()),
        Accumulate::Add => Copied::of(training, tensor.view()),
    };
    let sources = d_sources.iter().map(|d| written(d, *accumulate_sources));
    let mut sources = sources.collect::<Result<Vec<_>>>()?;
    let mut residual = d_residual.as_ref().map(|d| written(d, *add)).transpose()?;
    let mut gate = d_gate.as_ref().map(|d| written(d, *add)).transpose()?;
    reading.with(|operands| {
        let views = sources.iter_mut().map(|copied| copied.0.view_mut());
        let mut outputs = Outputs {
            d_sources: views.collect::<Result<_>>()?,
            d_residual: residual.as_mut().map(|copied| copied.0.view_mut()).transpose()?,
            d_gate: gate.as_mut().map(|copied| copied.0.view_mut()).transpose()?,
            accumulate_sources: *accumulate_sources,
            accumulate: *add,
        };
        let d_dst = d_dst.0.view()?;
        training.backward(operands, state, &d_dst, &mut outputs, grads, accumulate)
    })?;
    for (copied, tensor) in sources.iter().zip(d_sources) {
        copied.back(tensor)?;
    }
    for (copied, tensor) in [(&residual, d_residual), (&gate, d_gate)] {
        if let (Some(copied), Some(tensor)) = (copied, tensor) {
            copied.back(tensor)?;
        }
    }
    Ok(())
}
