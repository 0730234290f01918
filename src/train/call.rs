//! One forward and one backward pass: what the user hands over, checked.

use crate::alias::share_memory;
use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::device::Kind;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::moments::Moments;
use crate::prepared::{Extra, on_host};
use crate::problem::{DstShape, Operands, Problem, dst_shape, expect_shape, same_place};
use crate::tensor::{AsTensor, AsTensorMut, Place, Source, TensorMut, TensorRef};
use crate::trace::{self, Told};
use crate::train::chain::BatchStatistics;
use crate::train::params::{get, get_mut};
use crate::train::{Accumulate, Grads, Params, Statistics, name};

/// What a backward pass needs of its forward pass beside what the caller has anyway. It fits one
/// backward pass, of the same parameters and tensors of the same type.
#[derive(Debug)]
#[must_use = "a workspace is what the backward pass begins with"]
pub struct Workspace {
    params: u64,
    generation: u64,
    dtype: DType,
    sources: Vec<Vec<usize>>,
    state: State,
}

/// What a device's forward pass keeps.
#[derive(Debug)]
enum State {
    Cpu(cpu::train::State),
    #[cfg(feature = "cuda")]
    Cuda(cuda::train::State),
}

impl State {
    fn bytes(&self) -> usize {
        match self {
            State::Cpu(state) => state.bytes(),
            #[cfg(feature = "cuda")]
            State::Cuda(state) => state.bytes(),
        }
    }

    fn statistics(&self) -> &[Option<BatchStatistics>; 2] {
        match self {
            State::Cpu(state) => &state.statistics,
            #[cfg(feature = "cuda")]
            State::Cuda(state) => &state.statistics,
        }
    }
}

/// A device's passes.
enum Training<'a> {
    Cpu(cpu::train::Training<'a>),
    #[cfg(feature = "cuda")]
    Cuda(cuda::train::Training<'a>),
}

impl Training<'_> {
    /// Bytes that the state of a forward pass will hold, beside some per channel.
    fn bytes(&self, n: usize, positions: usize) -> usize {
        match self {
            Training::Cpu(training) => training.bytes(n, positions),
            #[cfg(feature = "cuda")]
            Training::Cuda(training) => training.bytes(n, positions),
        }
    }
}

impl Workspace {
    /// Bytes that it holds, beside some per channel.
    pub fn bytes(&self) -> usize {
        self.state.bytes()
    }
}

impl Params {
    /// The forward pass of a batch, with one source.
    ///
    /// # Shapes
    /// As [`Prepared::forward`](crate::Prepared::forward). All tensors of a pass hold elements of one
    /// type, which is src's; what is computed between them is f32.
    ///
    /// # Errors
    /// As there; [`Error::BatchTooSmall`] for batch statistics of one value per channel;
    /// [`Error::NonFinite`] for statistics that are not finite. On CUDA also [`Error::Unsupported`]
    /// for more than 16 sources, and [`Error::TooLarge`] for 2³¹ positions or more, all samples'
    /// together; [`Error::ParameterValue`] for a weight that overflows f16. Running statistics then
    /// stay as they were, and dst holds anything.
    pub fn forward<T: Element, S: Source<T> + ?Sized>(
        &mut self,
        src: &S,
    ) -> Result<(S::Output, Workspace)> {
        self.call(src).run()
    }

    /// Starts a forward pass that takes more than one tensor: a concatenation (on CUDA of at most 16
    /// sources, or [`Error::Unsupported`]), a residual, a gate.
    pub fn call<'a, T: Element, S: AsTensor<T> + ?Sized>(
        &'a mut self,
        src: &'a S,
    ) -> Call<'a, S, T> {
        Call { params: self, src, extra: Extra::default() }
    }

    /// The backward pass of a batch with one source: returns the gradient by src, in the memory
    /// order of `src`, and puts those by the parameters into `grads`.
    ///
    /// `src` is what the forward pass was given, `d_dst` the gradient of the loss by its result.
    ///
    /// # Errors
    /// [`Error::Workspace`] if the workspace is of other parameters, of other shapes, of another type
    /// of elements, or if the parameters have changed since; whatever does not fit, with its values; on CUDA
    /// [`Error::Unsupported`] and [`Error::TooLarge`] as in [`forward`](Self::forward).
    pub fn backward<T: Element, S: Source<T> + ?Sized>(
        &self,
        src: &S,
        workspace: Workspace,
        d_dst: &(impl AsTensor<T> + ?Sized),
        grads: &mut Grads,
        accumulate: Accumulate,
    ) -> Result<S::Output> {
        let mut d_src = src.allocate(src.as_tensor()?.shape())?;
        let call = self.backward_call(src, workspace, d_dst).accumulate(accumulate);
        call.d_src(&mut d_src).run(grads)?;
        Ok(d_src)
    }

    /// Starts a backward pass of more than one tensor, or one that leaves gradients out: only those
    /// are computed for which it is given a tensor.
    ///
    /// ```
    /// # use ndarray::{Array2, Array3};
    /// # use pointwise::{Device, Pointwise, train::Params};
    /// let layer = Pointwise::new(Array2::ones((4, 5))).residual().relu();
    /// let mut params = Params::new(&layer, &Device::cpu())?;
    /// let mut grads = params.grads();
    /// let (a, b, residual) =
    ///     (Array3::<f32>::ones((1, 2, 7)), Array3::ones((1, 3, 7)), Array3::ones((1, 4, 7)));
    /// let (dst, workspace) = params.call(&a).concat(&b).residual(&residual).run()?;
    /// let (mut d_a, mut d_b) = (Array3::zeros(a.dim()), Array3::zeros(b.dim()));
    /// params
    ///     .backward_call(&a, workspace, &dst)
    ///     .concat(&b)
    ///     .residual(&residual)
    ///     .d_src(&mut d_a) // of the first source, then of each further one
    ///     .d_src(&mut d_b)
    ///     .run(&mut grads)?;
    /// assert!(d_b.iter().all(|&d| d == 24.0));
    /// # Ok::<(), pointwise::Error>(())
    /// ```
    pub fn backward_call<'a, T: Element>(
        &'a self,
        src: &'a (impl AsTensor<T> + ?Sized),
        workspace: Workspace,
        d_dst: &'a (impl AsTensor<T> + ?Sized),
    ) -> BackwardCall<'a, T> {
        BackwardCall {
            params: self,
            src: src.as_tensor(),
            extra: Extra::default(),
            workspace,
            d_dst: d_dst.as_tensor(),
            d_sources: Vec::new(),
            d_residual: None,
            d_gate: None,
            accumulate: Accumulate::Set,
            accumulate_inputs: Accumulate::Set,
        }
    }

    /// Bytes that the workspace of a forward pass on a source of this shape holds, of elements of any
    /// type: what a workspace keeps is f32 or bits.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn workspace_bytes(&self, src: &[usize]) -> Result<usize> {
        let shape = dst_shape(&self.shape, src, std::iter::empty())?;
        let positions = shape.as_slice()[2..].iter().product();
        self.with_training(|training| Ok(training.bytes(src[0], positions)))
    }
}

/// A forward pass, put together from its tensors.
#[must_use = "a call does nothing until it is run"]
pub struct Call<'a, S: ?Sized, T = f32> {
    params: &'a mut Params,
    src: &'a S,
    extra: Extra<'a, T>,
}

impl<'a, T: Element, S: AsTensor<T> + ?Sized> Call<'a, S, T> {
    /// A further source: all of them stand for their concatenation along the channels.
    pub fn concat(mut self, src: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.add_source(src);
        self
    }

    /// The tensor that a residual stage adds; dst's shape.
    pub fn residual(mut self, residual: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.set_residual(residual);
        self
    }

    /// The tensor that a gate source stage multiplies by; `[n, c_in]`.
    pub fn gate(mut self, gate: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.set_gate(gate);
        self
    }

    /// Runs into any non-overlapping strides.
    ///
    /// # Errors
    /// As [`Params::forward`], and [`Error::Aliased`] if `dst` shares memory with a tensor that is
    /// read.
    pub fn run_into(self, dst: &mut (impl AsTensorMut<T> + ?Sized)) -> Result<Workspace> {
        let Extra { more, residual, gate, error } = self.extra;
        if let Some(error) = error {
            return Err(error);
        }
        let operands = Operands { src: self.src.as_tensor()?, more: &more, residual, gate };
        let workspace = T::run_forward(self.params, &operands, &mut dst.as_tensor_mut()?)?;
        self.params.follow(&workspace);
        Ok(workspace)
    }

    /// Runs into a new tensor in the memory order of the first source.
    ///
    /// # Errors
    /// As [`Params::forward`].
    pub fn run(self) -> Result<(S::Output, Workspace)>
    where
        S: Source<T>,
    {
        let src = self.src.as_tensor()?;
        if let Some(error) = self.extra.error {
            return Err(error);
        }
        let more = self.extra.more.iter().map(TensorRef::shape);
        let shape = dst_shape(&self.params.shape, src.shape(), more)?;
        let mut dst = self.src.allocate(shape.as_slice())?;
        let workspace = self.run_into(&mut dst)?;
        Ok((dst, workspace))
    }
}

/// A backward pass, put together from its tensors.
#[must_use = "a call does nothing until it is run"]
pub struct BackwardCall<'a, T = f32> {
    params: &'a Params,
    src: Result<TensorRef<'a, T>>,
    extra: Extra<'a, T>,
    workspace: Workspace,
    d_dst: Result<TensorRef<'a, T>>,
    d_sources: Vec<TensorMut<'a, T>>,
    d_residual: Option<TensorMut<'a, T>>,
    d_gate: Option<TensorMut<'a, T>>,
    accumulate: Accumulate,
    accumulate_inputs: Accumulate,
}

impl<'a, T: Element> BackwardCall<'a, T> {
    /// A further source, as in the forward pass.
    pub fn concat(mut self, src: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.add_source(src);
        self
    }

    /// The residual, as in the forward pass.
    pub fn residual(mut self, residual: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.set_residual(residual);
        self
    }

    /// The gate, as in the forward pass.
    pub fn gate(mut self, gate: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.set_gate(gate);
        self
    }

    /// Where the gradient by the first source goes, then by each further one; of the source's
    /// shape. Either all sources get one, or none does.
    pub fn d_src(mut self, d_src: &'a mut (impl AsTensorMut<T> + ?Sized)) -> Self {
        let d_src = self.extra.view_mut(d_src);
        self.d_sources.extend(d_src);
        self
    }

    /// Where the gradient by the residual goes; dst's shape. It is zero in the channels that a
    /// partial convolution passes through.
    pub fn d_residual(mut self, d_residual: &'a mut (impl AsTensorMut<T> + ?Sized)) -> Self {
        self.d_residual = self.extra.view_mut(d_residual);
        self
    }

    /// Where the gradient by the gate goes; the gate's shape.
    pub fn d_gate(mut self, d_gate: &'a mut (impl AsTensorMut<T> + ?Sized)) -> Self {
        self.d_gate = self.extra.view_mut(d_gate);
        self
    }

    /// Whether the parameters' gradients replace what `grads` holds, as they do unless told
    /// otherwise, or are added to it.
    pub fn accumulate(mut self, accumulate: Accumulate) -> Self {
        self.accumulate = accumulate;
        self
    }

    /// The same for the gradients by sources, residual and gate: a tensor that several layers read has
    /// one gradient, to which each of them adds.
    pub fn accumulate_inputs(mut self, accumulate: Accumulate) -> Self {
        self.accumulate_inputs = accumulate;
        self
    }

    /// Runs the pass.
    ///
    /// # Errors
    /// As [`Params::backward`], and [`Error::Aliased`] if a gradient shares memory with another
    /// tensor.
    pub fn run(self, grads: &mut Grads) -> Result<()> {
        let BackwardCall { params, extra, workspace, accumulate, accumulate_inputs, .. } = self;
        let Extra { more, residual, gate, error } = extra;
        if let Some(error) = error {
            return Err(error);
        }
        let operands = Operands { src: self.src?, more: &more, residual, gate };
        let mut outputs = Outputs {
            d_sources: self.d_sources,
            d_residual: self.d_residual,
            d_gate: self.d_gate,
            accumulate_sources: accumulate_inputs,
            accumulate: accumulate_inputs,
        };
        let d_dst = self.d_dst?;
        T::check_backward(params, &operands, &workspace, &d_dst, &outputs, grads)?;
        T::run_backward(params, &operands, workspace, &d_dst, &mut outputs, grads, accumulate)
    }
}

/// Where the gradients by a call's tensors go; those that are not wanted have none.
pub(crate) struct Outputs<'a, T = f32> {
    pub d_sources: Vec<TensorMut<'a, T>>,
    pub d_residual: Option<TensorMut<'a, T>>,
    pub d_gate: Option<TensorMut<'a, T>>,
    /// What happens to what is in `d_sources`.
    pub accumulate_sources: Accumulate,
    /// And in the others.
    pub accumulate: Accumulate,
}

impl<T> Outputs<'_, T> {
    pub(super) fn all(&self) -> impl Iterator<Item = (&'static str, &TensorMut<'_, T>)> {
        let sources = self.d_sources.iter().map(|d| ("d_src", d));
        let residual = self.d_residual.iter().map(|d| ("d_residual", d));
        sources.chain(residual).chain(self.d_gate.iter().map(|d| ("d_gate", d)))
    }
}

fn shapes<T>(operands: &Operands<'_, T>) -> Vec<Vec<usize>> {
    let more = operands.more.iter().map(|t| t.shape().to_vec());
    std::iter::once(operands.src.shape().to_vec()).chain(more).collect()
}

impl Params {
    fn dst_shape<T>(&self, operands: &Operands<'_, T>) -> Result<DstShape> {
        let more = operands.more.iter().map(TensorRef::shape);
        dst_shape(&self.shape, operands.src.shape(), more)
    }

    /// A forward pass that leaves the running statistics to [`follow`](Self::follow).
    pub(crate) fn run_forward<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        dst: &mut TensorMut<'_, T>,
    ) -> Result<Workspace> {
        self.check_place(&operands.src)?;
        self.check_batch(operands)?;
        let problem = Problem::new(&self.shape, operands, dst)?;
        let _span = trace::enter(|| {
            let kept =
                self.with_training(|training| Ok(training.bytes(problem.n, problem.positions())));
            let mut told = Told::of("forward", &problem.work(), size_of::<T>());
            told.bytes = told.bytes.saturating_add(kept.unwrap_or(0));
            told
        });
        let state = self.with_training(|training| {
            Ok(match training {
                Training::Cpu(training) => State::Cpu(training.forward(operands, dst)?),
                #[cfg(feature = "cuda")]
                Training::Cuda(training) => State::Cuda(training.forward(operands, dst)?),
            })
        })?;
        let (params, generation, sources) = (self.id, self.generation, shapes(operands));
        Ok(Workspace { params, generation, dtype: T::DTYPE, sources, state })
    }

    /// Moves the running statistics by those of a forward pass.
    pub(super) fn follow(&mut self, workspace: &Workspace) {
        let mut counted = false;
        for statistics in workspace.state.statistics().iter().flatten() {
            if !counted {
                self.num_batches_tracked = self.num_batches_tracked.saturating_add(1);
                counted = true;
            }
            let momentum = self.options.momentum.unwrap_or(1.0 / self.num_batches_tracked as f64);
            let [mean, var] = statistics.names;
            for (name, value) in [
                (mean, (|m| m.mean) as fn(&Moments) -> f64),
                (var, |m| m.deviations / (m.count - 1.0)),
            ] {
                let running = get_mut(&mut self.layer, name).expect("a batch norm has it");
                for (moments, &channel) in statistics.moments.iter().zip(&statistics.channels) {
                    let old = f64::from(running[channel]);
                    running[channel] = (old + momentum * (value(moments) - old)) as f32;
                }
            }
        }
    }

    /// The layer as its device's passes see it.
    fn with_training<R>(&self, f: impl FnOnce(Training<'_>) -> Result<R>) -> Result<R> {
        let reduce = self.all_reduce.as_deref();
        let reduce = reduce.map(|workers| |values: &mut [f64]| workers.sum_f64(values));
        let reduce = reduce.as_ref().map(|reduce| reduce as _);
        let wants: &dyn Fn(&str) -> bool = &|name| self.wants(name);
        let (layer, shape, statistics) = (&self.layer, &self.shape, self.options.statistics);
        f(match self.device.kind()? {
            Kind::Cpu(device) => {
                let pool = &self.pool;
                let training =
                    cpu::train::Training { device, layer, shape, statistics, wants, reduce, pool };
                Training::Cpu(training)
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(device) => {
                let math = self.options.math;
                let training =
                    cuda::train::Training { device, layer, shape, statistics, math, wants, reduce };
                Training::Cuda(training)
            }
            Kind::Unknown(_) => unreachable!("Device::kind reports it"),
        })
    }

    /// Where the layer's device has its tensors.
    pub(super) fn place(&self) -> Result<Place> {
        Ok(match self.device.kind()? {
            #[cfg(feature = "cuda")]
            Kind::Cuda(device) => Place::Cuda(device.ordinal()),
            _ => Place::Host,
        })
    }

    /// Whether a call's tensors are where they may be: on the host, or on the layer's device.
    fn check_place<T>(&self, src: &TensorRef<'_, T>) -> Result<()> {
        match (self.place()?, src.place()) {
            (Place::Host, _) => on_host(src),
            (_, Place::Host) => Ok(()),
            (expected, got) => same_place("src", expected, got),
        }
    }

    /// Values that a batch norm takes a mean of.
    fn values_per_channel<T>(&self, operands: &Operands<'_, T>) -> Result<usize> {
        let shape = self.dst_shape(operands)?;
        let [n, _, spatial @ ..] = shape.as_slice() else { return Ok(0) };
        Ok(spatial.iter().product::<usize>() * n)
    }

    fn check_batch<T>(&self, operands: &Operands<'_, T>) -> Result<()> {
        let normalises = self.options.statistics == Statistics::Batch
            && [name::RUNNING_MEAN, name::SRC_RUNNING_MEAN]
                .iter()
                .any(|name| get(&self.layer, name).is_some());
        if normalises && self.all_reduce.is_none() && self.values_per_channel(operands)? == 1 {
            return Err(Error::BatchTooSmall { shape: operands.src.shape().to_vec() });
        }
        Ok(())
    }

    pub(crate) fn check_backward<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        workspace: &Workspace,
        d_dst: &TensorRef<'_, T>,
        outputs: &Outputs<'_, T>,
        grads: &Grads,
    ) -> Result<()> {
        let refuse = |reason: String| Err(Error::Workspace { reason });
        if workspace.params != self.id {
            return refuse("it was made by another layer's forward pass".into());
        }
        if workspace.generation != self.generation {
            return refuse("the layer's parameters or options have changed since".into());
        }
        if workspace.dtype != T::DTYPE {
            return refuse(format!(
                "it was made for tensors of {}, not {}",
                workspace.dtype,
                T::DTYPE
            ));
        }
        let given = shapes(operands);
        if workspace.sources != given {
            return refuse(format!(
                "it was made for sources of shapes {:?}, not {given:?}",
                workspace.sources
            ));
        }
        grads.check(self.shapes().into_iter())?;
        self.check_place(&operands.src)?;
        let shape = self.dst_shape(operands)?;
        Problem::reading(&self.shape, operands, "d_dst", d_dst)?;
        if !outputs.d_sources.is_empty() && outputs.d_sources.len() != given.len() {
            return Err(Error::Shape {
                tensor: "the list of d_src",
                expected: vec![given.len()],
                got: vec![outputs.d_sources.len()],
            });
        }
        for (d_src, shape) in outputs.d_sources.iter().zip(&given) {
            expect_shape("d_src", d_src.shape(), shape)?;
        }
        if let Some(d_residual) = &outputs.d_residual {
            if !self.shape.residual {
                return Err(Error::UnexpectedInput { input: "residual" });
            }
            expect_shape("d_residual", d_residual.shape(), shape.as_slice())?;
        }
        if let Some(d_gate) = &outputs.d_gate {
            let Some(gate) = &operands.gate else {
                return Err(Error::UnexpectedInput { input: "gate" });
            };
            expect_shape("d_gate", d_gate.shape(), gate.shape())?;
        }
        let sources = std::iter::once(&operands.src).chain(operands.more).map(|src| ("src", src));
        let optional = [("residual", &operands.residual), ("gate", &operands.gate)];
        let optional = optional.into_iter().filter_map(|(name, t)| Some((name, t.as_ref()?)));
        let read: Vec<_> = sources.chain([("d_dst", d_dst)]).chain(optional).collect();
        let outputs: Vec<_> = outputs.all().collect();
        for (i, &(written, d)) in outputs.iter().enumerate() {
            same_place(written, operands.src.place(), d.place())?;
            let before = outputs[..i].iter().map(|(name, other)| (*name, other.view()));
            let mut others = read.iter().copied().chain(before);
            if let Some((tensor, _)) = others.find(|(_, other)| share_memory(other, d.view())) {
                return Err(Error::Aliased { written, tensor });
            }
        }
        Ok(())
    }

    pub(crate) fn run_backward<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        workspace: Workspace,
        d_dst: &TensorRef<'_, T>,
        outputs: &mut Outputs<'_, T>,
        grads: &mut Grads,
        accumulate: Accumulate,
    ) -> Result<()> {
        let problem = Problem::reading(&self.shape, operands, "d_dst", d_dst)?;
        let _span = trace::enter(|| self.told_of_backward(&problem, &workspace, outputs));
        let frozen: Vec<_> = self.frozen_values(grads);
        self.with_training(|training| match (training, workspace.state) {
            (Training::Cpu(training), State::Cpu(state)) => {
                training.backward(operands, state, d_dst, outputs, grads, accumulate)
            }
            #[cfg(feature = "cuda")]
            (Training::Cuda(training), State::Cuda(state)) => {
                training.backward(operands, state, d_dst, outputs, grads, accumulate)
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("a workspace is of one layer, and the layer of one device"),
        })?;
        let weight = grads.get_mut(name::WEIGHT).expect("every layer has one");
        for (first, values) in frozen {
            match accumulate {
                Accumulate::Set => weight[first..first + values.len()].fill(0.0),
                Accumulate::Add => weight[first..first + values.len()].copy_from_slice(&values),
            }
        }
        Ok(())
    }

    /// A product for the gradient by the weight, one for that by src; every tensor that is read or
    /// written, once.
    fn told_of_backward<T: Element>(
        &self,
        problem: &Problem<'_, T>,
        workspace: &Workspace,
        outputs: &Outputs<'_, T>,
    ) -> Told {
        let mut told = Told::of("backward", &problem.work(), size_of::<T>());
        let of_source = |name: &str| name.starts_with("src_") && self.wants(name);
        let d_src = !outputs.d_sources.is_empty()
            || outputs.d_gate.is_some()
            || self.shapes().iter().any(|(name, _)| of_source(name));
        let d_weight = self.wants(name::WEIGHT);
        told.macs = told.macs.saturating_mul(usize::from(d_src) + usize::from(d_weight));
        let written =
            outputs.all().map(|(_, tensor)| tensor.view().shape().iter().product::<usize>());
        let written = written.map(|len| len.saturating_mul(size_of::<T>()));
        let weight = (self.shape.c_out * self.shape.k()).saturating_mul(size_of::<f32>());
        let written = written.chain(d_weight.then_some(weight));
        told.bytes = written.chain([workspace.bytes()]).fold(told.bytes, usize::saturating_add);
        told
    }

    /// The gradients of frozen rows of the weight: where they begin, what they hold.
    fn frozen_values(&self, grads: &Grads) -> Vec<(usize, Vec<f32>)> {
        let k = self.layer.weight.ncols();
        let weight = grads.get(name::WEIGHT).unwrap_or(&[]);
        let rows = self.options.frozen_rows.iter();
        rows.map(|rows| (rows.start * k, weight[rows.start * k..rows.end * k].to_vec())).collect()
    }
}
