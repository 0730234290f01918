//! A layer that is ready to run: checked, folded, packed and uploaded, once.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock};

use crate::cost::Cost;
use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::device::{Device, Kind};
use crate::dtype::{DType, Element};
use crate::epilogue::Lowered;
use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::plan::{Candidate, Explanation};
use crate::problem::{LayerShape, Operands, Problem, dst_shape};
use crate::tensor::{
    AsTensor, AsTensorMut, MAX_RANK, Place, Source, TensorMut, TensorRef, checked_product,
    strides_like,
};
use crate::trace::{self, Told};
use crate::tuning::Tuning;

/// The arithmetic that f32 layers may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Math {
    /// f32 products, f32 sums.
    #[default]
    F32,
    /// Products of operands rounded to TF32 (10 bits of mantissa, to the nearest) are allowed where
    /// the device has them, CUDA from compute capability 8.0 on; sums stay f32. A permission, not a
    /// demand: `explain` says what runs. Weights may be rounded wherever the device has TF32.
    Tf32,
}

/// How a layer is prepared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrepareOptions {
    /// What the arithmetic may round.
    pub math: Math,
    /// Demands that a sample's result does not depend, in its last bits, on the batch that it is
    /// in. On the CPU it never does; on CUDA it may, where several blocks share the channels of a
    /// sum because the batch gives the chip too little to do, and this option forgoes that.
    pub batch_invariant: bool,
    /// Forces a kernel by its name; `None` leaves the choice to `POINTWISE_KERNEL`, then to the
    /// planner. On CUDA, `name/4` also forces that four blocks share each sum, or as many as the
    /// channels allow; `name/1` that none do.
    pub kernel: Option<String>,
    /// The most bytes that a call on host tensors may take on a CUDA device per slice; `None` is
    /// 16 MiB. Such a call is cut over batch and positions, into one slice or many, and keeps
    /// memory for two. Results do not depend on it. No effect on the CPU.
    pub slice_bytes: Option<usize>,
}

/// The order of a source's axes in memory, where only its shape is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// `[n, c, …spatial]`, NCHW.
    #[default]
    ChannelsFirst,
    /// `[n, …spatial, c]`, NHWC.
    ChannelsLast,
}

/// A layer on a device, ready to run. Independent of batch and spatial size; `Send + Sync`; a
/// clone shares everything.
///
/// `T` is what its tensors hold, all of them: f32 unless
/// [`prepare_as`](Pointwise::prepare_as) has made it. Tensors that hold anything else do not compile:
///
/// ```compile_fail,E0271
/// # use ndarray::{Array2, Array4};
/// # use pointwise::{Device, Pointwise, bf16};
/// let layer = Pointwise::new(Array2::ones((4, 6))).prepare(&Device::cpu())?;
/// let dst = layer.forward(&Array4::from_elem((1, 6, 5, 5), bf16::ONE))?;
/// # Ok::<(), pointwise::Error>(())
/// ```
pub struct Prepared<T = f32> {
    inner: Arc<Inner>,
    element: PhantomData<fn(T) -> T>,
}

impl<T> Clone for Prepared<T> {
    fn clone(&self) -> Self {
        Prepared { inner: self.inner.clone(), element: PhantomData }
    }
}

impl<T> fmt::Debug for Prepared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared").field("inner", &self.inner).finish()
    }
}

#[derive(Debug)]
struct Inner {
    shape: LayerShape,
    /// Values per channel of what the folded layer uses, and of its weight.
    parameters: usize,
    device: Device,
    options: PrepareOptions,
    backend: Backend,
}

/// A layer that [`Prepared::update`] may replace while calls run: each ends with the one that it
/// began with.
#[derive(Debug)]
struct Current<L>(RwLock<Arc<L>>);

impl<L> Current<L> {
    fn new(layer: L) -> Self {
        Current(RwLock::new(Arc::new(layer)))
    }

    fn get(&self) -> Arc<L> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, layer: L) {
        let layer = Arc::new(layer);
        let old =
            std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), layer);
        // Not while calls wait for the lock.
        drop(old);
    }
}

#[derive(Debug)]
enum Backend {
    Cpu(Current<cpu::Layer>),
    #[cfg(feature = "cuda")]
    Cuda(Current<cuda::Layer>),
}

impl Pointwise {
    /// Checks the description, folds, packs and uploads it: once.
    ///
    /// # Errors
    /// The first thing in the description that does not fit, with its values; the device's errors.
    pub fn prepare(&self, device: &Device) -> Result<Prepared> {
        self.prepare_with(device, PrepareOptions::default())
    }

    /// As [`prepare`](Self::prepare), with options.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare), and [`Error::Kernel`] for a forced kernel that the device
    /// does not have.
    pub fn prepare_with(&self, device: &Device, options: PrepareOptions) -> Result<Prepared> {
        self.prepare_as(device, options)
    }

    /// As [`prepare_with`](Self::prepare_with), for tensors of `T`: f32, [`f16`](struct@crate::f16) or
    /// [`bf16`](crate::bf16).
    ///
    /// Sources, residual, gate and dst hold `T`, and so does the weight, rounded to the nearest; all
    /// else per channel stays f32. Affine stages are not folded into such a weight. Sums and stages
    /// are f32; a result is rounded once.
    ///
    /// ```
    /// use ndarray::{Array2, Array4};
    /// use pointwise::{Device, Pointwise, bf16};
    ///
    /// let layer = Pointwise::new(Array2::from_elem((16, 8), 0.5)).relu();
    /// let layer = layer.prepare_as::<bf16>(&Device::cpu(), Default::default())?;
    /// let src = Array4::from_elem((1, 8, 14, 14), bf16::from_f32(0.25));
    /// let dst: Array4<bf16> = layer.forward(&src)?;
    /// assert!(dst.iter().all(|&x| x == bf16::from_f32(1.0)));
    /// # Ok::<(), pointwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`prepare_with`](Self::prepare_with); [`Error::ParameterValue`] for a finite weight that
    /// `T` has no finite value for.
    pub fn prepare_as<T: Element>(
        &self,
        device: &Device,
        options: PrepareOptions,
    ) -> Result<Prepared<T>> {
        self.check()?;
        self.check_weight(T::DTYPE)?;
        let shape = LayerShape::new(self);
        let lowered = Lowered::new(self, T::DTYPE);
        let parameters = lowered.parameters();
        let backend = match device.kind()? {
            Kind::Cpu(cpu) => {
                let layer = cpu::Layer::new(cpu, &shape, lowered, T::DTYPE, &options)?;
                Backend::Cpu(Current::new(layer))
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(cuda) => {
                let layer = cuda::Layer::new(cuda, &shape, lowered, T::DTYPE, &options)?;
                Backend::Cuda(Current::new(layer))
            }
            Kind::Unknown(_) => unreachable!("Device::kind reports it"),
        };
        Ok(Prepared::new(Inner { shape, parameters, device: device.clone(), options, backend }))
    }
}

impl<T> Prepared<T> {
    fn new(inner: Inner) -> Self {
        Prepared { inner: Arc::new(inner), element: PhantomData }
    }
}

impl<T: Element> Prepared<T> {
    /// Runs the layer on one source.
    ///
    /// # Shapes
    /// `[n, c_in, …spatial]` to `[n, c_out, …ceil(spatial / stride)]`, in the memory order of
    /// `src`.
    ///
    /// # Errors
    /// Whatever does not fit, with its values; a device's own errors. A run never falls back to
    /// another device.
    pub fn forward<S: Source<T> + ?Sized>(&self, src: &S) -> Result<S::Output> {
        self.call(src).run()
    }

    /// Runs the layer on one source, into any non-overlapping strides. Allocates nothing once a
    /// thread has run a problem of this size.
    ///
    #[cfg_attr(
        feature = "cuda",
        doc = "On CUDA a layer norm of 16-bit tensors, and more than 16 sources, take memory from the",
        doc = "device's pool in every call. On device tensors it can be captured: see",
        doc = "[CUDA graphs](crate::CudaDevice#cuda-graphs).",
        doc = ""
    )]
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Aliased`] if `dst` shares memory with a tensor
    /// that is read.
    pub fn forward_into<S: AsTensor<T> + ?Sized>(
        &self,
        src: &S,
        dst: &mut (impl AsTensorMut<T> + ?Sized),
    ) -> Result<()> {
        self.call(src).run_into(dst)
    }

    /// Starts a call that takes more than one tensor: a concatenation, a residual, a gate.
    ///
    /// ```
    /// # use ndarray::{Array2, Array4};
    /// # use pointwise::{Device, Pointwise};
    /// let layer = Pointwise::new(Array2::ones((4, 6))).residual().relu().prepare(&Device::cpu())?;
    /// let (a, b) = (Array4::ones((1, 2, 5, 5)), Array4::ones((1, 4, 5, 5)));
    /// let residual = Array4::ones((1, 4, 5, 5));
    /// let dst = layer.call(&a).concat(&b).residual(&residual).run()?;
    /// assert!(dst.iter().all(|&x| x == 7.0));
    /// # Ok::<(), pointwise::Error>(())
    /// ```
    pub fn call<'a, S: AsTensor<T> + ?Sized>(&'a self, src: &'a S) -> Call<'a, S, T> {
        Call {
            layer: self,
            src,
            extra: Extra::default(),
            #[cfg(feature = "cuda")]
            scratch: None,
        }
    }

    /// Bytes of device memory that a call on a source of this shape, channels first, needs for what
    /// its blocks leave for one another: for [`Call::scratch`](Call#method.scratch). 0 on the CPU,
    /// and for most calls on CUDA.
    ///
    /// # Errors
    /// If the shape does not fit the layer, or no memory holds so much.
    pub fn scratch_bytes(&self, src: &[usize]) -> Result<usize> {
        self.scratch_bytes_in(src, Layout::default())
    }

    /// As [`scratch_bytes`](Self::scratch_bytes), for a source and a result in the given memory
    /// order.
    ///
    /// # Errors
    /// As [`scratch_bytes`](Self::scratch_bytes).
    pub fn scratch_bytes_in(&self, src: &[usize], layout: Layout) -> Result<usize> {
        self.with_problem(src, layout, |problem| match &self.inner.backend {
            Backend::Cpu(_) => {
                let _ = problem;
                Ok(0)
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.get().scratch_bytes(problem),
        })
    }

    /// What its tensors hold.
    pub fn dtype(&self) -> DType {
        T::DTYPE
    }

    /// The device that the layer was prepared for.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// This layer on another stream of its CUDA device. The weights are shared, so it costs next
    /// to nothing: a service with a stream per request keeps one layer.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] if the layer was prepared for another device.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn on(&self, device: &cuda::CudaDevice) -> Result<Self> {
        let Inner { shape, parameters, options, backend, .. } = &*self.inner;
        let Backend::Cuda(layer) = backend else {
            return Err(Error::WrongDevice {
                tensor: "the layer's weight",
                expected: device.to_string(),
                got: self.inner.device.to_string(),
            });
        };
        let layer = layer.get();
        if layer.is_on(device) {
            return Ok(self.clone());
        }
        let backend = Backend::Cuda(Current::new(layer.on(device)?));
        let (shape, parameters, device) = (shape.clone(), *parameters, device.clone().into());
        let options = options.clone();
        Ok(Self::new(Inner { shape, parameters, device, options, backend }))
    }

    /// This layer on the stream of another one of the same device.
    pub(crate) fn beside(&self, other: &Self) -> Result<Self> {
        match &other.inner.backend {
            Backend::Cpu(_) => Ok(self.clone()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => self.on(layer.get().device()),
        }
    }

    /// Takes the parameters and running statistics of a layer in training as they are now: in this
    /// handle and its clones, [`Branches`](crate::Branches) and [`Sequence`](crate::Sequence)s that
    /// hold one, not in handles from [`with_tuning`](Self::with_tuning) or for another stream. Calls
    /// in flight end with the parameters that they began with; later ones take the new ones. A CUDA
    /// graph has those that it was captured with, and an update frees them: capture it anew.
    ///
    /// # Errors
    /// [`Error::Shape`] if the weights differ in shape, [`Error::ParameterValue`] for a layer that
    /// differs otherwise in what a call needs, or whose variance has become NaN; the device's.
    pub fn update(&self, params: &crate::train::Params) -> Result<()> {
        let (Inner { shape, device, options, backend, .. }, layer) = (&*self.inner, params.layer());
        layer.check()?;
        layer.check_weight(T::DTYPE)?;
        let new = LayerShape::new(layer);
        if (new.c_out, new.k(), new.groups) != (shape.c_out, shape.k(), shape.groups) {
            let (expected, got) = (vec![shape.c_out, shape.k()], vec![new.c_out, new.k()]);
            return Err(Error::Shape { tensor: "weight", expected, got });
        }
        if new != *shape {
            return Err(Error::ParameterValue {
                parameter: "the layer to update from".into(),
                value: "another layer".into(),
                expected: "the stride, range, residual, gate and norm of the prepared layer",
            });
        }
        let lowered = Lowered::new(layer, T::DTYPE);
        match backend {
            Backend::Cpu(current) => {
                let Kind::Cpu(cpu) = device.kind()? else { unreachable!("prepared for the CPU") };
                let tuned = current.get();
                let new = cpu::Layer::new(cpu, shape, lowered, T::DTYPE, options)?;
                current.set(tuned.choices_for(new));
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(current) => {
                let old = current.get();
                let new = cuda::Layer::new(old.device(), shape, lowered, T::DTYPE, options)?;
                current.set(old.choices_for(new));
            }
        }
        Ok(())
    }

    /// The shape of the result for a source of this shape.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn dst_shape(&self, src: &[usize]) -> Result<Vec<usize>> {
        Ok(dst_shape(&self.inner.shape, src, std::iter::empty())?.as_slice().to_vec())
    }

    /// Parameters, work and traffic of a call on a source of this shape.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn cost(&self, src: &[usize]) -> Result<Cost> {
        self.with_problem(src, Layout::default(), |problem| Ok(self.cost_of(problem)))
    }

    /// How a call on a source of this shape, channels first, would run: kernel, reason, cost and
    /// roofline. Its ceilings are measured on the CPU (up to a fifth of a second, once per size) and
    /// computed from clocks and widths on CUDA.
    ///
    /// # Errors
    /// If the shape does not fit the layer, or a forced kernel refuses it.
    pub fn explain(&self, src: &[usize]) -> Result<Explanation> {
        self.explain_in(src, Layout::default())
    }

    /// As [`explain`](Self::explain), for a source in the given memory order.
    ///
    /// # Errors
    /// As [`explain`](Self::explain).
    pub fn explain_in(&self, src: &[usize], layout: Layout) -> Result<Explanation> {
        T::explain(self, src, layout)
    }

    pub(crate) fn explain_on_backend(&self, src: &[usize], layout: Layout) -> Result<Explanation> {
        self.with_problem(src, layout, |problem| {
            let (kernel, reason) = match &self.inner.backend {
                Backend::Cpu(layer) => layer.get().explain(problem),
                #[cfg(feature = "cuda")]
                Backend::Cuda(layer) => layer.get().explain(problem),
            };
            let cost = self.cost_of(problem);
            let roof = match &self.inner.backend {
                Backend::Cpu(layer) => layer.get().roof(&cost),
                #[cfg(feature = "cuda")]
                Backend::Cuda(layer) => layer.get().roof(),
            };
            let device = self.inner.device.to_string();
            Ok(Explanation {
                device,
                problem: problem.work().to_string(),
                kernel,
                reason,
                cost,
                roof,
            })
        })
    }

    /// Every kernel of the device, and what it says to a source of this shape; the one that would
    /// run comes first.
    ///
    /// # Errors
    /// If the shape does not fit the layer.
    pub fn plans(&self, src: &[usize]) -> Result<Vec<Candidate>> {
        self.plans_in(src, Layout::default())
    }

    /// As [`plans`](Self::plans), for a source in the given memory order.
    ///
    /// # Errors
    /// As [`plans`](Self::plans).
    pub fn plans_in(&self, src: &[usize], layout: Layout) -> Result<Vec<Candidate>> {
        T::plans(self, src, layout)
    }

    pub(crate) fn plans_on_backend(&self, src: &[usize], layout: Layout) -> Result<Vec<Candidate>> {
        self.with_problem(src, layout, |problem| {
            Ok(match &self.inner.backend {
                Backend::Cpu(layer) => layer.get().plans(problem),
                #[cfg(feature = "cuda")]
                Backend::Cuda(layer) => layer.get().plans(problem),
            })
        })
    }

    /// Times every kernel that the device has, in every order of its loops (CUDA: with every number of
    /// blocks that may share a sum), on sources of these shapes and memory orders, and says which were
    /// the fastest: for [`with_tuning`](Self::with_tuning), now or, saved as text, in another process.
    /// Without a tuning a model chooses.
    ///
    /// It runs on the device's threads or stream, on tensors of its own, for some 20 ms a shape, or two
    /// calls of each candidate and two more of the better ones where they take longer. Times are those of tensors that the caches
    /// hold as far as they can; a busy machine spoils them. Shapes without any positions are left
    /// out.
    ///
    /// ```
    /// # use ndarray::Array2;
    /// # use pointwise::{Device, Layout, Pointwise, Tuning};
    /// let layer = Pointwise::new(Array2::ones((32, 16))).relu().prepare(&Device::cpu())?;
    /// let tuning = layer.tune(&[(&[1, 16, 14, 14], Layout::ChannelsFirst)])?;
    /// let saved = tuning.to_string();
    ///
    /// let tuned = layer.with_tuning(&saved.parse::<Tuning>()?);
    /// println!("{}", tuned.explain(&[1, 16, 14, 14])?);
    /// # assert!(tuned.explain(&[1, 16, 14, 14])?.reason.ends_with("; tuned"));
    /// # Ok::<(), pointwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// The first shape that does not fit the layer; [`Error::TooLarge`] if its tensors do not fit
    /// memory; on CUDA [`Error::DeviceMemory`] for that, [`Error::Cuda`], and [`Error::Unsupported`]
    /// while the layer's stream is captured.
    pub fn tune(&self, shapes: &[(&[usize], Layout)]) -> Result<Tuning> {
        T::tune(self, shapes)
    }

    pub(crate) fn tune_on_backend(&self, shapes: &[(&[usize], Layout)]) -> Result<Tuning> {
        let LayerShape { c_in, residual, gate, .. } = self.inner.shape;
        let mut tuning = Tuning::default();
        for &(src, layout) in shapes {
            let dst = self.dst_shape(src)?;
            if dst.contains(&0) {
                continue;
            }
            let of_residual = if residual { dst.as_slice() } else { &[0] };
            let of_gate = [src[0], if gate { c_in } else { 0 }];
            let shapes = [src, of_residual, &of_gate, &dst];
            tuning.add(match &self.inner.backend {
                Backend::Cpu(layer) => {
                    let [src_values, residual_values, gate_values, dst_values] = shapes.map(ones);
                    let mut values = [src_values?, residual_values?, gate_values?, dst_values?];
                    let memory = values.each_mut().map(|values| values.as_mut_ptr());
                    self.with_problem_at(memory, src, layout, |problem| {
                        Ok(cpu::tune(&layer.get(), problem))
                    })?
                }
                #[cfg(feature = "cuda")]
                Backend::Cuda(layer) => {
                    let layer = layer.get();
                    let mut bytes = [0; 4];
                    for (bytes, shape) in bytes.iter_mut().zip(shapes) {
                        let len = checked_product("a tensor to tune with", shape)?;
                        *bytes = checked_product("a tensor to tune with", &[len, size_of::<T>()])?;
                    }
                    let room = cuda::Room::new(&layer, bytes)?;
                    let memory = room.addresses().map(std::ptr::without_provenance_mut);
                    self.with_problem_at(memory, src, layout, |problem| {
                        cuda::tune(&layer, problem)
                    })?
                }
            });
        }
        Ok(tuning)
    }

    /// This layer, with the kernels that were measured to be the fastest; entries about other
    /// devices, instruction sets, numbers of threads, layers and kernels are passed over. It replaces
    /// the tuning that the layer had. Weights are shared, so it costs next to nothing. On the CPU
    /// results are bitwise the same with any tuning; on CUDA they are where
    /// [`PrepareOptions::batch_invariant`] is set, else blocks may share a sum in other parts, and
    /// tensor cores round other than FMA units.
    ///
    /// A kernel that is forced by [`PrepareOptions::kernel`] or `POINTWISE_KERNEL` goes first.
    #[must_use = "the layer itself stays as it is"]
    pub fn with_tuning(&self, tuning: &Tuning) -> Self {
        let Inner { shape, parameters, device, options, backend } = &*self.inner;
        let backend = match backend {
            Backend::Cpu(layer) => {
                Backend::Cpu(Current::new(layer.get().with_tuning(shape, tuning)))
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => {
                Backend::Cuda(Current::new(layer.get().with_tuning(shape, tuning)))
            }
        };
        let (shape, parameters, device) = (shape.clone(), *parameters, device.clone());
        let options = options.clone();
        Self::new(Inner { shape, parameters, device, options, backend })
    }

    fn cost_of(&self, problem: &Problem<'_, T>) -> Cost {
        problem.cost(self.inner.parameters)
    }

    /// A problem with contiguous tensors that nobody reads.
    fn with_problem<R>(
        &self,
        src: &[usize],
        layout: Layout,
        f: impl FnOnce(&Problem<'_, T>) -> Result<R>,
    ) -> Result<R> {
        // Distinct addresses, so that nothing seems to alias; nothing is read or written.
        let far = |i: usize| std::ptr::without_provenance_mut::<T>(i << (usize::BITS - 3));
        self.with_problem_at([1, 2, 3, 4].map(far), src, layout, f)
    }

    /// A problem with contiguous src, residual, gate and dst at these addresses. It may only be
    /// run if there is as much memory.
    fn with_problem_at<R>(
        &self,
        [at_src, at_residual, at_gate, at_dst]: [*mut T; 4],
        src: &[usize],
        layout: Layout,
        f: impl FnOnce(&Problem<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let shape = &self.inner.shape;
        let place = self.place();
        let dst = dst_shape(shape, src, std::iter::empty())?;
        let rank = src.len();
        let mut strides = [0; MAX_RANK];
        let order = |axis: usize| match layout {
            Layout::ChannelsFirst => axis,
            Layout::ChannelsLast if axis == 0 => 0,
            Layout::ChannelsLast => 1 + axis % (rank - 1),
        };
        let mut next = 1;
        for axis in (0..rank).rev() {
            strides[order(axis)] = next;
            next *= src[order(axis)].max(1) as isize;
        }
        // SAFETY: unless the problem is run, the views are only used for the arithmetic on shapes
        // and addresses; who runs it has the memory.
        unsafe {
            let src = TensorRef::from_raw_parts(at_src, place, src, &strides[..rank])?;
            let like = strides_like(&src, dst.as_slice());
            let residual =
                TensorRef::from_raw_parts(at_residual, place, dst.as_slice(), &like[..rank])?;
            let gate = TensorRef::from_raw_parts(
                at_gate,
                place,
                &[src.shape()[0], shape.c_in],
                &[shape.c_in as isize, 1],
            )?;
            let mut dst = TensorMut::from_raw_parts(at_dst, place, dst.as_slice(), &like[..rank])?;
            let operands = Operands {
                src,
                more: &[],
                residual: shape.residual.then_some(residual),
                gate: shape.gate.then_some(gate),
            };
            f(&Problem::new(shape, &operands, &mut dst)?)
        }
    }

    /// Where the layer's tensors are.
    pub(crate) fn place(&self) -> Place {
        match &self.inner.backend {
            Backend::Cpu(_) => Place::Host,
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.get().place(),
        }
    }

    /// The first tensor that a call needs beside its source.
    pub(crate) fn second_input(&self) -> Option<&'static str> {
        let LayerShape { residual, gate, .. } = self.inner.shape;
        if residual { Some("residual") } else { gate.then_some("gate") }
    }

    /// Channels that a source must have; a partial convolution takes any from its range's end on.
    pub(crate) fn src_channels(&self) -> Option<usize> {
        self.inner.shape.partial.is_none().then_some(self.inner.shape.c_in)
    }

    /// As [`dst_shape`](Self::dst_shape), without allocating; ones beyond the rank.
    pub(crate) fn dst_shape_of(&self, src: &[usize]) -> Result<[usize; MAX_RANK]> {
        Ok(dst_shape(&self.inner.shape, src, std::iter::empty())?.padded())
    }

    pub(crate) fn run_on_backend(
        &self,
        operands: &Operands<'_, T>,
        dst: &mut TensorMut<'_, T>,
        scratch: Option<&TensorMut<'_>>,
    ) -> Result<()> {
        if self.place() == Place::Host {
            on_host(&operands.src)?;
        }
        let problem = Problem::new(&self.inner.shape, operands, dst)?;
        let _span = self.span(&problem);
        match &self.inner.backend {
            Backend::Cpu(layer) => {
                let _ = scratch;
                cpu::run(&[(&layer.get(), &problem)])
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.get().run(&problem, scratch)?,
        }
        Ok(())
    }

    fn span(&self, problem: &Problem<'_, T>) -> Option<trace::Watched> {
        trace::enter(|| {
            let kernel = match &self.inner.backend {
                Backend::Cpu(layer) => layer.get().explain(problem).0,
                #[cfg(feature = "cuda")]
                Backend::Cuda(layer) => layer.get().explain(problem).0,
            };
            Told::of(kernel, &problem.work(), size_of::<T>())
        })
    }
}

/// Runs layers that share a source as one pass over it. Their dsts do not share memory.
pub(crate) fn run_together<T: Element>(
    layers: &[Prepared<T>],
    operands: &[Operands<'_, T>],
    dsts: &mut [TensorMut<'_, T>],
) -> Result<()> {
    let mut problems = Vec::with_capacity(layers.len());
    for ((layer, operands), dst) in layers.iter().zip(operands).zip(dsts) {
        if layer.place() == Place::Host {
            on_host(&operands.src)?;
        }
        problems.push(Problem::new(&layer.inner.shape, operands, dst)?);
    }
    let mut held = Vec::with_capacity(layers.len());
    for (layer, problem) in layers.iter().zip(&problems) {
        let span = layer.span(problem);
        match &layer.inner.backend {
            // They run as one pass: a span in a span.
            Backend::Cpu(cpu) => held.push((cpu.get(), problem, span)),
            // One after another; the second level cache has what it holds of the source.
            #[cfg(feature = "cuda")]
            Backend::Cuda(layer) => layer.get().run(problem, None)?,
        }
    }
    let calls: Vec<_> = held.iter().map(|(layer, problem, _)| (&**layer, *problem)).collect();
    cpu::run(&calls);
    Ok(())
}

/// Runs layers of one CUDA device and stream one after another; false if host tensors have to go
/// through them one by one.
#[cfg(feature = "cuda")]
pub(crate) fn run_chain<T: Element>(
    layers: &[Prepared<T>],
    src: &TensorRef<'_, T>,
    dst: &TensorMut<'_, T>,
) -> Result<bool> {
    let layers = layers.iter().filter_map(|layer| match &layer.inner.backend {
        Backend::Cpu(_) => None,
        Backend::Cuda(cuda) => Some((cuda.get(), &layer.inner.shape)),
    });
    let held: Vec<_> = layers.collect();
    let layers = held.iter().map(|(layer, shape)| (&**layer, *shape));
    cuda::chain::run(layers, src, dst)
}

/// The values of a contiguous tensor. Ones, since pages of zeros may all be the same page.
fn ones<T: Element>(shape: &[usize]) -> Result<Vec<T>> {
    let len = checked_product("a tensor to tune with", shape)?;
    let mut values = Vec::new();
    values
        .try_reserve_exact(len)
        .map_err(|_| Error::TooLarge { what: "a tensor to tune with", sizes: shape.to_vec() })?;
    values.resize(len, T::from_f32(1.0));
    Ok(values)
}

pub(crate) fn on_host<T>(src: &TensorRef<'_, T>) -> Result<()> {
    match src.place() {
        Place::Host => Ok(()),
        place => Err(Error::WrongDevice {
            tensor: "src",
            expected: Place::Host.to_string(),
            got: place.to_string(),
        }),
    }
}

/// The tensors of a call beside its first source. What cannot be viewed is reported when it runs.
pub(crate) struct Extra<'a, T = f32> {
    pub more: Vec<TensorRef<'a, T>>,
    pub residual: Option<TensorRef<'a, T>>,
    pub gate: Option<TensorRef<'a, T>>,
    pub error: Option<Error>,
}

impl<T> Default for Extra<'_, T> {
    fn default() -> Self {
        Extra { more: Vec::new(), residual: None, gate: None, error: None }
    }
}

impl<'a, T> Extra<'a, T> {
    fn view(&mut self, tensor: &'a (impl AsTensor<T> + ?Sized)) -> Option<TensorRef<'a, T>> {
        tensor.as_tensor().map_err(|error| self.error.get_or_insert(error)).ok()
    }

    pub(crate) fn view_mut<'d>(
        &mut self,
        tensor: &'d mut (impl AsTensorMut<T> + ?Sized),
    ) -> Option<TensorMut<'d, T>> {
        tensor.as_tensor_mut().map_err(|error| self.error.get_or_insert(error)).ok()
    }

    pub(crate) fn add_source(&mut self, src: &'a (impl AsTensor<T> + ?Sized)) {
        let view = self.view(src);
        self.more.extend(view);
    }

    pub(crate) fn set_residual(&mut self, residual: &'a (impl AsTensor<T> + ?Sized)) {
        self.residual = self.view(residual);
    }

    pub(crate) fn set_gate(&mut self, gate: &'a (impl AsTensor<T> + ?Sized)) {
        self.gate = self.view(gate);
    }
}

/// One call of a layer, put together from its tensors.
#[must_use = "a call does nothing until it is run"]
pub struct Call<'a, S: ?Sized, T = f32> {
    layer: &'a Prepared<T>,
    src: &'a S,
    extra: Extra<'a, T>,
    #[cfg(feature = "cuda")]
    scratch: Option<TensorMut<'a>>,
}

impl<'a, T: Element, S: AsTensor<T> + ?Sized> Call<'a, S, T> {
    /// A further source: all of them stand for their concatenation along the channels, in the
    /// order in which they are given, and are read in place. On CUDA, host tensors, and what is beyond
    /// 16 device tensors, are put together first.
    pub fn concat(mut self, src: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.add_source(src);
        self
    }

    /// The tensor that a residual stage adds; dst's shape.
    pub fn residual(mut self, residual: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.set_residual(residual);
        self
    }

    /// The tensor that a gate source stage multiplies by; `[n, c_in]`, or with further axes of
    /// length 1.
    pub fn gate(mut self, gate: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extra.set_gate(gate);
        self
    }

    /// Device memory for what the blocks of the call leave for one another, in place of that which
    /// the stream keeps, and which a graph that captures the call would own: a dense tensor of
    /// [`scratch_bytes`](Prepared::scratch_bytes) or more, whatever it holds, in nobody else's use
    /// until the call has run. The call is ordered behind its stream's work, and that behind the
    /// call. A CPU's call takes none.
    ///
    /// More than 16 sources of a concatenation also need memory to be put together, and a layer norm
    /// of 16-bit tensors some for its f32 values, which comes from the device's memory pool all the
    /// same.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn scratch(mut self, memory: &'a mut (impl AsTensorMut + ?Sized)) -> Self {
        match memory.as_tensor_mut() {
            Ok(memory) => self.scratch = Some(memory),
            Err(error) => _ = self.extra.error.get_or_insert(error),
        }
        self
    }

    /// Runs into any non-overlapping strides.
    ///
    /// # Errors
    /// As [`Prepared::forward_into`].
    #[cfg_attr(
        feature = "cuda",
        doc = "Of a [`scratch`](Self::scratch) that is too small or has gaps [`Error::Shape`], that is",
        doc = "elsewhere [`Error::WrongDevice`], that is not aligned to 16 bytes [`Error::Misaligned`]."
    )]
    pub fn run_into(self, dst: &mut (impl AsTensorMut<T> + ?Sized)) -> Result<()> {
        let Extra { more, residual, gate, error } = self.extra;
        if let Some(error) = error {
            return Err(error);
        }
        let operands = Operands { src: self.src.as_tensor()?, more: &more, residual, gate };
        #[cfg(feature = "cuda")]
        let scratch = self.scratch.as_ref();
        #[cfg(not(feature = "cuda"))]
        let scratch = None;
        T::run(self.layer, &operands, &mut dst.as_tensor_mut()?, scratch)
    }

    /// Runs into a new tensor in the memory order of the first source.
    ///
    /// # Errors
    /// As [`Prepared::forward`].
    pub fn run(self) -> Result<S::Output>
    where
        S: Source<T>,
    {
        let src = self.src.as_tensor()?;
        if let Some(error) = self.extra.error {
            return Err(error);
        }
        let shape = dst_shape(
            &self.layer.inner.shape,
            src.shape(),
            self.extra.more.iter().map(TensorRef::shape),
        )?;
        let mut dst = self.src.allocate(shape.as_slice())?;
        self.run_into(&mut dst)?;
        Ok(dst)
    }
}
