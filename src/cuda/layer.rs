//! A prepared layer on a CUDA device, and its calls.

use std::sync::Arc;

use super::call::{Call, MAX_SOURCES, Moments, Sources, Tensor};
use super::device::CudaDevice;
use super::launch::{self, launch};
use super::memory::Buffer;
use super::pack::Weights;
use super::plan::{self, Choice, Family, Forced, KERNELS, Terms};
use super::scratch::Given;
use super::staging::{self, HostCall, Slice};
use super::tune::Choices;
use crate::cost::Roof;
use crate::dtype::{DType, Element};
use crate::epilogue::Lowered;
use crate::error::{Error, Result};
use crate::plan::{Candidate, wanted_kernel};
use crate::prepared::{Math, PrepareOptions};
use crate::problem::{LayerShape, Operand, Problem};
use crate::stages::NormOver;
use crate::tensor::{MAX_SPATIAL, Place, TensorMut, checked_product};
use crate::tuning::Tuning;

/// A layer on one stream of a device.
#[derive(Clone)]
pub(crate) struct Layer {
    device: CudaDevice,
    weights: Arc<Weights>,
    terms: Terms,
    /// What [`tune`](super::tune) has measured, if anything.
    choices: Choices,
    /// The most that a slice of a call on host tensors may take on the device.
    slice_bytes: usize,
}

impl Layer {
    /// Packs and uploads; the device is ready to run when this returns.
    ///
    /// # Errors
    /// [`Error::Kernel`] for a forced kernel that does not exist or refuses the layer,
    /// [`Error::TooLarge`], [`Error::Cuda`].
    pub(crate) fn new(
        device: &CudaDevice,
        shape: &LayerShape,
        lowered: Lowered,
        dtype: DType,
        options: &PrepareOptions,
    ) -> Result<Self> {
        let forced = match wanted_kernel(options.kernel.as_deref()) {
            Some(kernel) => {
                let names: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
                Some(
                    Forced::parse(&kernel, &names)
                        .map_err(|reason| Error::Kernel { kernel, reason })?,
                )
            }
            None => None,
        };
        let terms = Terms {
            batch_invariant: options.batch_invariant,
            dtype,
            tf32: dtype == DType::F32 && options.math == Math::Tf32,
            forced,
        };
        let wanted = KERNELS.iter().find(|kernel| forced.is_some_and(|f| f.kernel == kernel.name));
        if let Some(kernel) = wanted
            && let Some(reason) = kernel.refusal(device.facts(), &terms)
        {
            let (kernel, reason) = (kernel.name.into(), reason(device.facts()));
            return Err(Error::Kernel { kernel, reason });
        }
        let weights = Arc::new(Weights::upload(device, shape, lowered, dtype, terms.tf32)?);
        let slice_bytes = options.slice_bytes.unwrap_or(staging::SLICE_BYTES);
        let choices = Choices::default();
        Ok(Layer { device: device.clone(), weights, terms, choices, slice_bytes })
    }

    /// A layer without a normalisation, just made, whose results stay f32: the memory of a
    /// problem's dst holds them, whatever its type says.
    pub(super) fn with_results_of_f32(mut self) -> Self {
        let weights = Arc::get_mut(&mut self.weights).expect("just made, and nobody else's");
        assert!(weights.program.norm.is_none(), "it has its own memory of f32");
        weights.program.dst_dtype = DType::F32;
        self
    }

    /// The same layer on another stream of the same device.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] if it is another device.
    pub(crate) fn on(&self, device: &CudaDevice) -> Result<Self> {
        if device.ordinal() != self.device.ordinal() {
            return Err(Error::WrongDevice {
                tensor: "the layer's weight",
                expected: Place::Cuda(device.ordinal()).to_string(),
                got: self.place().to_string(),
            });
        }
        let mut layer = self.clone();
        layer.device = device.clone();
        Ok(layer)
    }

    /// The same layer with the kernels that a tuning names for its problems.
    pub(crate) fn with_tuning(&self, shape: &LayerShape, tuning: &Tuning) -> Self {
        let mut layer = self.clone();
        layer.choices = Choices::of(self, shape, tuning);
        layer
    }

    /// Another layer of the same shape with the choices of this one.
    pub(crate) fn choices_for(&self, mut other: Layer) -> Self {
        other.choices = self.choices.clone();
        other
    }

    /// The same layer with these choices, and no kernel forced.
    pub(super) fn with_choices(&self, choices: Choices) -> Self {
        let mut layer = self.clone();
        (layer.terms.forced, layer.choices) = (None, choices);
        layer
    }

    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Whether its calls run on this handle's stream.
    pub(crate) fn is_on(&self, device: &CudaDevice) -> bool {
        let stream = |device: &CudaDevice| device.stream().cu_stream();
        device.ordinal() == self.device.ordinal() && stream(device) == stream(&self.device)
    }

    pub(crate) fn device(&self) -> &CudaDevice {
        &self.device
    }

    pub(super) fn slice_bytes(&self) -> usize {
        self.slice_bytes
    }

    /// Bytes that a call takes for each position beside its tensors and scratch.
    pub(super) fn bytes_beside(&self) -> usize {
        let channels = self.weights.groups as usize * self.weights.rows as usize;
        if self.weights.program.has_sums_beside() { channels * size_of::<f32>() } else { 0 }
    }

    pub(crate) fn place(&self) -> Place {
        Place::Cuda(self.device.ordinal())
    }

    pub(crate) fn roof(&self) -> Roof {
        self.device.facts().roof
    }

    /// The kernel that would run a problem, and why.
    pub(crate) fn explain<T: Element>(&self, problem: &Problem<'_, T>) -> (&'static str, String) {
        let call = self.call(problem);
        let (letters, choice) = (call.letters(), self.choose(&call));
        let forced = if self.terms.forced.is_some() { "forced; " } else { "" };
        let tuned = if self.tuned(&call).is_some() { "; tuned" } else { "" };
        let facts = self.device.facts();
        let words = plan::describe(choice, &letters, facts);
        let products = match (self.terms.tf32, KERNELS[choice.kernel].family) {
            (true, Family::Simt) if facts.sm80 => "; products in f32 cost no more here".into(),
            (true, Family::Simt) => format!("; {}", plan::no_tf32(facts)),
            _ => String::new(),
        };
        let stages = &self.weights.words;
        (KERNELS[choice.kernel].name, format!("{forced}{words}{stages}{products}{tuned}"))
    }

    /// Every kernel and what it says to a problem, the one that would run first.
    pub(crate) fn plans<T: Element>(&self, problem: &Problem<'_, T>) -> Vec<Candidate> {
        let (call, facts) = (self.call(problem), self.device.facts());
        let (letters, first) = (call.letters(), self.choose(&call));
        let mut order = plan::ranked(&letters, facts, &self.terms);
        order.retain(|choice| choice.kernel != first.kernel);
        order.insert(0, first);
        let candidate = |choice: plan::Choice| Candidate {
            kernel: KERNELS[choice.kernel].name,
            verdict: match KERNELS[choice.kernel].refusal(facts, &self.terms) {
                Some(reason) => Err(reason(facts)),
                None => Ok(plan::describe(choice, &letters, facts)),
            },
        };
        order.into_iter().map(candidate).collect()
    }

    /// Runs a call: on device tensors it is queued, on host tensors it is done when this returns.
    ///
    /// # Errors
    /// [`Error::WrongDevice`], [`Error::DeviceMemory`], [`Error::Unsupported`] for what cannot be
    /// captured, [`Error::Cuda`]; those of scratch that does not do.
    pub(crate) fn run<T: Element>(
        &self,
        problem: &Problem<'_, T>,
        scratch: Option<&TensorMut<'_>>,
    ) -> Result<()> {
        if problem.place != Place::Host && problem.place != self.place() {
            return Err(Error::WrongDevice {
                tensor: "src",
                expected: self.place().to_string(),
                got: problem.place.to_string(),
            });
        }
        let given = scratch.map(|memory| Given::new(memory, problem.place)).transpose()?;
        if problem.n == 0 || problem.positions() == 0 {
            return Ok(());
        }
        if problem.place == Place::Host {
            return self.run_on_host_tensors(problem);
        }
        let mut call = Call { scratch: given, ..self.call(problem) };
        // Before anything is queued.
        self.check_capture(problem, &call)?;
        let scratch = scratch.and_then(|memory| memory.view().stream());
        self.ordered(problem.streams().chain(scratch), || {
            // Freed in stream order.
            let _together = self.put_together(problem, &mut call)?;
            for (from, to) in problem.passed_through() {
                // SAFETY: the problem's views vouch for its tensors.
                unsafe {
                    let source = (on_device(&from), count_of("channels", from.channels)?);
                    launch::copy(&self.device, T::DTYPE, &call.extents, source, on_device(&to))?;
                }
            }
            self.launch(self.choose(&call), &call)
        })
    }

    /// What [`run`](Self::run) takes of the caller's scratch.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub(crate) fn scratch_bytes<T: Element>(&self, problem: &Problem<'_, T>) -> Result<usize> {
        let call = self.call(problem);
        launch::scratch_bytes(self.choose(&call), &call, &self.weights.program)
    }

    /// In slices; what passes through is copied on the host.
    fn run_on_host_tensors<T: Element>(&self, problem: &Problem<'_, T>) -> Result<()> {
        let [d, h, w] = problem.spatial;
        let extents = [problem.n, d, h, w];
        let mut sources = problem.sources();
        let (first, more): (_, Vec<Operand<T>>) = (sources.next(), sources.collect());
        let Some(first) = first else { return Ok(()) };
        let several: Vec<Operand<T>>;
        let sources = match more.is_empty() {
            true => std::slice::from_ref(&first),
            false => {
                several = std::iter::once(first).chain(more).collect();
                &several
            }
        };
        let host = HostCall {
            sources,
            residual: problem.residual.as_ref(),
            gate: problem.gate.as_ref(),
            dst: &problem.dst,
            discard: false,
            between: 0,
            bytes_beside: self.bytes_beside(),
            extents,
            slice_bytes: self.slice_bytes,
            whole_samples: self.over_samples(),
        };
        let choice = self.choose(&self.slice(&host.undivided()));
        let fits = !host.whole_samples || host.fits();
        let compute = |slice: &Slice| self.launch(choice, &self.slice(slice));
        // SAFETY: the problem's views vouch for the host tensors.
        let done = fits.then(|| unsafe { staging::run(&self.device, &host, compute) });
        match done {
            // The device has no room for a whole sample.
            Some(Err(Error::DeviceMemory { .. })) if host.whole_samples => {
                self.sample_by_sample(&host, choice)?;
            }
            None => self.sample_by_sample(&host, choice)?,
            Some(done) => done?,
        }
        for (from, to) in problem.passed_through() {
            // SAFETY: the problem's views vouch for the host tensors.
            unsafe { staging::copy_on_host(extents, &from, &to) };
        }
        Ok(())
    }

    /// A call that normalises over samples that are too large for a slice: each goes through twice,
    /// for its moments and for its result.
    fn sample_by_sample<T: Element>(&self, host: &HostCall<'_, T>, choice: Choice) -> Result<()> {
        let [n, spatial @ ..] = host.extents;
        let positions = checked_product("positions", &spatial)? as u64;
        let too_large = || Error::TooLarge { what: "moments", sizes: spatial.to_vec() };
        let bytes = launch::moments_bytes(1, positions).ok_or_else(too_large)?;
        let bytes = usize::try_from(bytes).map_err(|_| too_large())?;
        let moments = Buffer::new(&self.device, "the moments of a layer norm", bytes)?;
        let mut extents = host.extents.map(|extent| extent as u64);
        extents[0] = 1;
        let of_positions = launch::moments_at(moments.address(), &extents);
        let values = u64::from(self.weights.groups) * u64::from(self.weights.rows);
        for i in 0..n {
            let sample = |operand: &Operand<T>| Operand {
                ptr: operand.ptr.wrapping_offset(operand.sample.wrapping_mul(i as isize)),
                ..*operand
            };
            let sources: Vec<Operand<T>> = host.sources.iter().map(sample).collect();
            let (residual, gate) = (host.residual.map(sample), host.gate.map(sample));
            let part = HostCall {
                sources: &sources,
                residual: residual.as_ref(),
                gate: gate.as_ref(),
                dst: &sample(host.dst),
                discard: true,
                extents: [1, spatial[0], spatial[1], spatial[2]],
                whole_samples: false,
                ..*host
            };
            let leave = |slice: &Slice| {
                let offset: i64 =
                    slice.start.iter().zip(of_positions.axes).map(|(&at, s)| at as i64 * s).sum();
                // Pairs of f64.
                let address = of_positions.address.wrapping_add_signed(16 * offset);
                let moments = Moments::Leave(Tensor { address, ..of_positions });
                self.launch(choice, &Call { moments, ..self.slice(slice) })
            };
            // SAFETY: the caller's views vouch for the host tensors; every position's moments are
            // left before they are merged.
            let sample = unsafe {
                staging::run(&self.device, &part, leave)?;
                let bound = self.device.bind()?;
                let sample =
                    launch::merge(&self.device, moments.address(), (1, positions), values)?;
                drop(bound);
                sample
            };
            let part = HostCall { discard: false, ..part };
            let finish = |slice: &Slice| {
                let moments = Moments::At(sample, positions);
                self.launch(choice, &Call { moments, ..self.slice(slice) })
            };
            // SAFETY: as above.
            unsafe { staging::run(&self.device, &part, finish)? };
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::Unsupported`] while a graph is captured that cannot take the call.
    fn check_capture<T: Element>(&self, problem: &Problem<'_, T>, call: &Call) -> Result<()> {
        let count = problem.sources().count();
        if count > MAX_SOURCES {
            self.device.check_capture(
                format_args!("a concatenation of {count} sources (a launch takes {MAX_SOURCES})"),
                "the room to put the others together",
            )?;
        }
        launch::check_capture(&self.device, call, &self.weights.program)
    }

    /// Copies the sources beyond those that a launch takes into one, the call's last.
    fn put_together<T: Element>(
        &self,
        problem: &Problem<'_, T>,
        call: &mut Call,
    ) -> Result<Option<Buffer>> {
        if problem.sources().count() <= MAX_SOURCES {
            return Ok(None);
        }
        let rest = || problem.sources().skip(MAX_SOURCES - 1);
        let channels = rest().map(|source| source.channels).sum();
        let sizes = call.extents.map(|extent| extent as usize);
        let positions = checked_product("positions", &sizes)?;
        let bytes =
            checked_product("sources put together", &[positions, channels, size_of::<T>()])?;
        let memory = Buffer::new(&self.device, "sources put together", bytes)?;
        let Some(first) = rest().next() else { return Ok(None) };
        let together =
            on_device(&first).dense_like(&call.extents, channels as u64, memory.address());
        let mut channel = 0;
        for source in rest() {
            let part = (on_device(&source), count_of("channels", source.channels)?);
            // SAFETY: the problem's views vouch for its tensors; the memory is for all of them.
            unsafe {
                let to = together.skip_channels(channel, T::DTYPE);
                launch::copy(&self.device, T::DTYPE, &call.extents, part, to)?;
            }
            channel += source.channels;
        }
        let mut sources = Sources::new();
        for source in problem.sources().take(MAX_SOURCES - 1) {
            sources.push(on_device(&source), source.channels as u32);
        }
        sources.push(together, channels as u32);
        call.sources = sources;
        Ok(Some(memory))
    }

    /// Queues work behind that of its tensors' streams, and theirs behind it.
    pub(super) fn ordered(
        &self,
        streams: impl Iterator<Item = usize> + Clone,
        queue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.device.ordered(streams, queue)
    }

    /// A call of one source without residual and gate.
    pub(super) fn part(&self, extents: [u64; 4], src: Tensor, dst: Tensor) -> Call {
        let Weights { groups, rows, depth, .. } = *self.weights;
        let sources = Sources::one(src, groups * depth);
        Call {
            groups,
            rows,
            depth,
            extents,
            sources,
            dst,
            residual: None,
            gate: None,
            moments: Moments::Scratch,
            scratch: None,
        }
    }

    fn slice(&self, slice: &Slice) -> Call {
        let Slice { extents, src, residual, gate, dst, .. } = *slice;
        Call { residual, gate, ..self.part(extents, src, dst) }
    }

    /// Whether it normalises over all positions of a sample.
    pub(super) fn over_samples(&self) -> bool {
        matches!(self.weights.program.norm, Some((NormOver::All, _)))
    }

    pub(super) fn choose(&self, call: &Call) -> Choice {
        let planned = || plan::choose(&call.letters(), self.device.facts(), &self.terms);
        self.tuned(call).unwrap_or_else(planned)
    }

    /// What a tuning says of a call.
    fn tuned(&self, call: &Call) -> Option<Choice> {
        match self.terms.forced {
            Some(_) => None,
            None => self.choices.find(call),
        }
    }

    pub(super) fn launch(&self, choice: Choice, call: &Call) -> Result<()> {
        // SAFETY: the problem's views vouch for its tensors, `Weights` for what the parameters
        // point to, and both live until the launch is queued; what frees them is queued later.
        unsafe { launch(&self.device, choice, call, &self.weights.program) }
    }

    /// A problem in the kernels' terms, of the sources as many as a launch takes.
    pub(super) fn call<T: Element>(&self, problem: &Problem<'_, T>) -> Call {
        let mut extents = [1; 1 + MAX_SPATIAL];
        extents[0] = problem.n as u64;
        for (extent, &n) in extents[1..].iter_mut().zip(&problem.spatial) {
            *extent = n as u64;
        }
        let mut sources = Sources::new();
        for source in problem.sources() {
            sources.push(on_device(&source), source.channels as u32);
        }
        Call {
            sources,
            residual: problem.residual.as_ref().map(on_device),
            gate: problem.gate.as_ref().map(on_device),
            ..self.part(extents, Tensor::default(), on_device(&problem.dst))
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.weights.memory.outlive(&self.device);
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Weights { groups, rows, depth, .. } = *self.weights;
        let dtype = self.terms.dtype;
        write!(f, "cuda::Layer({groups} x [{rows}, {depth}], {dtype}, on {:?})", self.device)
    }
}

/// Groups or channels as the kernels count them: with a tile's padding they stay within 31 bits.
///
/// # Errors
/// [`Error::TooLarge`].
pub(super) fn count_of(what: &'static str, count: usize) -> Result<u32> {
    let fits = u32::try_from(count).ok().filter(|&n| n <= i32::MAX as u32 - 1024);
    fits.ok_or_else(|| Error::TooLarge { what, sizes: vec![count] })
}

pub(super) fn on_device<T>(operand: &Operand<T>) -> Tensor {
    let [d, h, w] = operand.spatial;
    Tensor {
        address: operand.ptr.addr() as u64,
        channel: operand.channel as i64,
        axes: [operand.sample as i64, d as i64, h as i64, w as i64],
    }
}
