//! Several layers that read one source, trained together.

use crate::alias::share_memory;
use crate::compose::{self, Extras};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::problem::{dst_shape, expect_shape};
use crate::tensor::{AsTensor, AsTensorMut, Source, TensorMut, TensorRef};
use crate::train::{Accumulate, Grads, Outputs, Params, Workspace};

/// Several layers in training that read the same source: each has its own parameters, statistics,
/// dst and workspace, and there is one `d_src`, the sum of theirs.
///
/// ```
/// # use ndarray::{Array2, Array4, Axis};
/// # use pointwise::train::{Accumulate, Branches, Params};
/// # use pointwise::{Device, Pointwise};
/// # let device = Device::cpu();
/// let branch = |c_out: usize| Params::new(&Pointwise::new(Array2::ones((c_out, 8))).relu(), &device);
/// let mut branches = Branches::new(vec![branch(16)?, branch(4)?])?;
/// let mut grads = branches.grads();
/// let src = Array4::<f32>::ones((1, 8, 7, 7));
/// let (dsts, workspaces) = branches.forward(&src)?;
/// // The gradient by a concatenation of both results is taken apart where it is.
/// let d_dst = Array4::ones((1, 20, 7, 7));
/// let (a, b) = d_dst.view().split_at(Axis(1), 16);
/// let d_src = branches.backward(&src, workspaces, &[&a, &b], &mut grads, Accumulate::Set)?;
/// assert!(d_src.iter().all(|&d| d == 20.0));
/// # assert_eq!(dsts[1].shape(), [1, 4, 7, 7]);
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Debug)]
pub struct Branches {
    layers: Vec<Params>,
}

impl Branches {
    /// Puts layers of one device together.
    ///
    /// # Errors
    /// [`Error::NoLayers`] for an empty list; [`Error::WrongDevice`] if they train on different
    /// devices.
    pub fn new(layers: Vec<Params>) -> Result<Self> {
        let Some(first) = layers.first() else { return Err(Error::NoLayers) };
        for layer in &layers {
            if layer.place()? != first.place()? {
                let (expected, got) = (first.device.to_string(), layer.device.to_string());
                return Err(Error::WrongDevice { tensor: "a layer", expected, got });
            }
        }
        Ok(Branches { layers })
    }

    /// The layers, in order.
    pub fn layers(&self) -> &[Params] {
        &self.layers
    }

    /// The layers, to change: to [update](Params::update) their parameters.
    pub fn layers_mut(&mut self) -> &mut [Params] {
        &mut self.layers
    }

    /// Takes them apart.
    pub fn into_layers(self) -> Vec<Params> {
        self.layers
    }

    /// Gradients for the parameters of each layer, zero.
    pub fn grads(&self) -> Vec<Grads> {
        self.layers.iter().map(Params::grads).collect()
    }

    /// The layers as they are now, ready for inference on their device.
    ///
    /// # Errors
    /// As [`Params::prepare`].
    pub fn prepare(&self) -> Result<compose::Branches> {
        compose::Branches::new(self.layers.iter().map(Params::prepare).collect::<Result<_>>()?)
    }

    /// Bytes that the workspaces of a forward pass on a source of this shape hold together.
    ///
    /// # Errors
    /// As [`Params::workspace_bytes`].
    pub fn workspace_bytes(&self, src: &[usize]) -> Result<usize> {
        let mut bytes = self.layers.iter().map(|layer| layer.workspace_bytes(src));
        bytes.try_fold(0usize, |sum, bytes| Ok(sum.saturating_add(bytes?)))
    }

    /// The forward pass of every layer on `src`; results and workspaces in the layers' order, each as
    /// [`Params::forward`] gives it.
    ///
    /// # Errors
    /// As [`Params::forward`]; the running statistics of all layers then stay as they were.
    pub fn forward<T: Element, S: Source<T> + ?Sized>(
        &mut self,
        src: &S,
    ) -> Result<(Vec<S::Output>, Vec<Workspace>)> {
        self.call(src).run()
    }

    /// Starts a forward pass that takes residuals or gates, or writes to given tensors.
    pub fn call<'a, T: Element, S: AsTensor<T> + ?Sized>(
        &'a mut self,
        src: &'a S,
    ) -> BranchesCall<'a, S, T> {
        let extras = Extras::of(self.layers.len());
        BranchesCall { branches: self, src, extras }
    }

    /// The backward pass of every layer: returns the gradient by src, in the memory order of `src`,
    /// and puts those by the parameters into `grads`, one per layer.
    ///
    /// The gradient by src is the sum of the layers', taken in their order, and in 16 bits rounded
    /// after each: bitwise the same from run to run.
    ///
    /// # Errors
    /// As [`Params::backward`], and [`Error::Shape`] if there are not as many workspaces, `d_dsts` or
    /// `grads` as layers. What does not fit is found before anything is written.
    pub fn backward<T: Element, S: Source<T> + ?Sized>(
        &self,
        src: &S,
        workspaces: Vec<Workspace>,
        d_dsts: &[&dyn AsTensor<T>],
        grads: &mut [Grads],
        accumulate: Accumulate,
    ) -> Result<S::Output> {
        let mut d_src = src.allocate(src.as_tensor()?.shape())?;
        let call = self.backward_call(src, workspaces, d_dsts).accumulate(accumulate);
        call.d_src(&mut d_src).run(grads)?;
        Ok(d_src)
    }

    /// Starts a backward pass of more tensors, or one that leaves gradients out: only those are
    /// computed for which it is given a tensor.
    pub fn backward_call<'a, T: Element>(
        &'a self,
        src: &'a (impl AsTensor<T> + ?Sized),
        workspaces: Vec<Workspace>,
        d_dsts: &[&'a dyn AsTensor<T>],
    ) -> BranchesBackwardCall<'a, T> {
        BranchesBackwardCall {
            branches: self,
            src: src.as_tensor(),
            extras: Extras::of(self.layers.len()),
            workspaces,
            d_dsts: d_dsts.iter().map(|d| (**d).as_tensor()).collect(),
            d_src: None,
            d_seconds: self.layers.iter().map(|_| [None, None]).collect(),
            accumulate: Accumulate::Set,
            accumulate_inputs: Accumulate::Set,
        }
    }
}

/// The forward pass of [`Branches`], put together from its tensors.
#[must_use = "a call does nothing until it is run"]
pub struct BranchesCall<'a, S: ?Sized, T = f32> {
    branches: &'a mut Branches,
    src: &'a S,
    extras: Extras<'a, T>,
}

impl<'a, T: Element, S: AsTensor<T> + ?Sized> BranchesCall<'a, S, T> {
    /// The tensor that the residual stage of layer `branch` adds; its dst's shape. A number that is
    /// no layer's is reported when the call runs.
    pub fn residual(mut self, branch: usize, residual: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extras.at(branch).set_residual(residual);
        self
    }

    /// The tensor that the gate of layer `branch` multiplies by; `[n, c_in]`. A number that is no
    /// layer's is reported when the call runs.
    pub fn gate(mut self, branch: usize, gate: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extras.at(branch).set_gate(gate);
        self
    }

    /// Runs into one tensor per layer, in the layers' order; they must not share memory.
    ///
    /// # Errors
    /// As [`Branches::forward`]; [`Error::Shape`] if there are not as many tensors as layers;
    /// [`Error::Aliased`] if a `dst` shares memory with another tensor of the call.
    pub fn run_into(self, dsts: &mut [&mut dyn AsTensorMut<T>]) -> Result<Vec<Workspace>> {
        let layers = &mut self.branches.layers;
        expect_shape("the list of dsts", &[dsts.len()], &[layers.len()])?;
        let dsts = dsts.iter_mut().map(|dst| dst.as_tensor_mut());
        let mut dsts = dsts.collect::<Result<Vec<_>>>()?;
        let operands = self.extras.operands(self.src.as_tensor()?)?;
        let written: Vec<Vec<_>> = dsts.iter().map(|dst| vec![*dst.view()]).collect();
        let read: Vec<Vec<_>> =
            operands.iter().map(|o| o.residual.into_iter().chain(o.gate).collect()).collect();
        check_apart(&written, &read)?;
        let passes = layers.iter().zip(&operands).zip(&mut dsts);
        let workspaces = passes
            .map(|((layer, operands), dst)| T::run_forward(layer, operands, dst))
            .collect::<Result<Vec<_>>>()?;
        // All of them have gone well.
        for (layer, workspace) in layers.iter_mut().zip(&workspaces) {
            layer.follow(workspace);
        }
        Ok(workspaces)
    }

    /// Runs into new tensors, each in the memory order of the source.
    ///
    /// # Errors
    /// As [`Branches::forward`].
    pub fn run(mut self) -> Result<(Vec<S::Output>, Vec<Workspace>)>
    where
        S: Source<T>,
    {
        let shape = self.src.as_tensor()?.shape().to_vec();
        self.extras.check()?;
        let layers = self.branches.layers.iter();
        let shapes = layers.map(|layer| dst_shape(&layer.shape, &shape, std::iter::empty()));
        let dsts = shapes.map(|shape| self.src.allocate(shape?.as_slice()));
        let mut dsts = dsts.collect::<Result<Vec<_>>>()?;
        let mut views: Vec<_> = dsts.iter_mut().map(|dst| dst as &mut dyn AsTensorMut<T>).collect();
        let workspaces = self.run_into(&mut views)?;
        Ok((dsts, workspaces))
    }
}

/// The backward pass of [`Branches`], put together from its tensors.
#[must_use = "a call does nothing until it is run"]
pub struct BranchesBackwardCall<'a, T = f32> {
    branches: &'a Branches,
    src: Result<TensorRef<'a, T>>,
    extras: Extras<'a, T>,
    workspaces: Vec<Workspace>,
    d_dsts: Result<Vec<TensorRef<'a, T>>>,
    d_src: Option<TensorMut<'a, T>>,
    /// Of each layer: by the residual, by the gate.
    d_seconds: Vec<[Option<TensorMut<'a, T>>; 2]>,
    accumulate: Accumulate,
    accumulate_inputs: Accumulate,
}

impl<'a, T: Element> BranchesBackwardCall<'a, T> {
    /// The residual of layer `branch`, as in the forward pass.
    pub fn residual(mut self, branch: usize, residual: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extras.at(branch).set_residual(residual);
        self
    }

    /// The gate of layer `branch`, as in the forward pass.
    pub fn gate(mut self, branch: usize, gate: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extras.at(branch).set_gate(gate);
        self
    }

    /// Where the sum of the layers' gradients by the source goes; the source's shape.
    pub fn d_src(mut self, d_src: &'a mut (impl AsTensorMut<T> + ?Sized)) -> Self {
        self.d_src = self.extras.at(0).view_mut(d_src);
        self
    }

    /// Where the gradient by the residual of layer `branch` goes; its dst's shape.
    pub fn d_residual(self, branch: usize, to: &'a mut (impl AsTensorMut<T> + ?Sized)) -> Self {
        self.d_second(branch, 0, to)
    }

    /// Where the gradient by the gate of layer `branch` goes; the gate's shape.
    pub fn d_gate(self, branch: usize, to: &'a mut (impl AsTensorMut<T> + ?Sized)) -> Self {
        self.d_second(branch, 1, to)
    }

    fn d_second(
        mut self,
        branch: usize,
        which: usize,
        to: &'a mut (impl AsTensorMut<T> + ?Sized),
    ) -> Self {
        let view = self.extras.at(branch).view_mut(to);
        if let Some(of_layer) = self.d_seconds.get_mut(branch) {
            of_layer[which] = view;
        }
        self
    }

    /// Whether the parameters' gradients replace what `grads` hold, as they do unless told
    /// otherwise, or are added to it.
    pub fn accumulate(mut self, accumulate: Accumulate) -> Self {
        self.accumulate = accumulate;
        self
    }

    /// The same for the gradients by the source, residuals and gates. The source's is the sum of all
    /// layers' in any case.
    pub fn accumulate_inputs(mut self, accumulate: Accumulate) -> Self {
        self.accumulate_inputs = accumulate;
        self
    }

    /// Runs the pass.
    ///
    /// # Errors
    /// As [`Branches::backward`], and [`Error::Aliased`] if a gradient shares memory with another
    /// tensor. If a device fails, gradients hold anything.
    pub fn run(mut self, grads: &mut [Grads]) -> Result<()> {
        let layers = &self.branches.layers;
        let d_dsts = self.d_dsts?;
        expect_shape("the list of workspaces", &[self.workspaces.len()], &[layers.len()])?;
        expect_shape("the list of d_dsts", &[d_dsts.len()], &[layers.len()])?;
        expect_shape("the list of grads", &[grads.len()], &[layers.len()])?;
        let operands = self.extras.operands(self.src?)?;

        let written = self.d_seconds.iter().map(|d| d.iter().flatten().map(|d| *d.view()));
        let written: Vec<Vec<_>> = written.map(Iterator::collect).collect();
        let read = operands.iter().zip(&d_dsts);
        let read: Vec<Vec<_>> = read
            .map(|(o, d_dst)| [Some(*d_dst), o.residual, o.gate].into_iter().flatten().collect())
            .collect();
        check_apart(&written, &read)?;

        let accumulate = self.accumulate_inputs;
        let (d_src, d_seconds) = (&mut self.d_src, &mut self.d_seconds);
        for (i, layer) in layers.iter().enumerate() {
            let to = outputs(i, d_src, &mut d_seconds[i], accumulate);
            let (workspace, grads) = (&self.workspaces[i], &grads[i]);
            T::check_backward(layer, &operands[i], workspace, &d_dsts[i], &to, grads)?;
        }
        let passes = layers.iter().zip(&operands).zip(self.workspaces).zip(&d_dsts).zip(grads);
        for (i, ((((layer, operands), workspace), d_dst), grads)) in passes.enumerate() {
            let mut to = outputs(i, d_src, &mut d_seconds[i], accumulate);
            T::run_backward(layer, operands, workspace, d_dst, &mut to, grads, self.accumulate)?;
        }
        Ok(())
    }
}

/// Where the gradients by the tensors of layer `i` go; the source's is a sum from the first one on.
fn outputs<'o, T>(
    i: usize,
    d_src: &'o mut Option<TensorMut<'_, T>>,
    d_seconds: &'o mut [Option<TensorMut<'_, T>>; 2],
    accumulate: Accumulate,
) -> Outputs<'o, T> {
    let [d_residual, d_gate] = d_seconds.each_mut().map(|d| d.as_mut().map(TensorMut::reborrow));
    Outputs {
        d_sources: d_src.iter_mut().map(TensorMut::reborrow).collect(),
        d_residual,
        d_gate,
        accumulate_sources: if i == 0 { accumulate } else { Accumulate::Add },
        accumulate,
    }
}

/// Each layer's call is checked by itself; here, that none writes what another one uses.
fn check_apart<T>(written: &[Vec<TensorRef<'_, T>>], read: &[Vec<TensorRef<'_, T>>]) -> Result<()> {
    for (i, of_layer) in written.iter().enumerate() {
        for j in (0..written.len()).filter(|&j| j != i) {
            let mut others = written[j].iter().chain(&read[j]);
            if others.any(|other| of_layer.iter().any(|tensor| share_memory(tensor, other))) {
                let (written, tensor) = ("a branch's result", "another branch's tensors");
                return Err(Error::Aliased { written, tensor });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::{BatchNorm, Device, Pointwise};

    #[test]
    fn bytes_beyond_what_a_number_holds_are_the_largest_number() {
        let layer =
            Pointwise::new(Array2::ones((1, 1))).batch_norm(BatchNorm::new(vec![0.0], vec![1.0]));
        let layers = (0..8).map(|_| Params::new(&layer, &Device::cpu()));
        let branches = Branches::new(layers.collect::<Result<_>>().unwrap()).unwrap();
        let src = [1 << 59, 1];
        let one = branches.layers()[0].workspace_bytes(&src).unwrap();
        assert!(one < usize::MAX && one.checked_mul(8).is_none(), "{one}");
        assert_eq!(branches.workspace_bytes(&src).unwrap(), usize::MAX);
    }
}
