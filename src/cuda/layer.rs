//! A prepared layer on a CUDA device: packed, uploaded, and its calls.

use std::sync::Arc;

use super::device::{Buffer, CudaDevice};
use super::launch::{self, Call, MAX_SOURCES, Moments, Program, Sources, Tensor, launch};
use super::params::{
    PW_INLINE_SOURCE_STEPS, PW_INLINE_STEPS, PW_ROW_ALIGN, pw_epilogue, pw_fprop, pw_norm, pw_op,
    pw_step,
};
use super::plan::{self, Choice, Family, Forced, KERNELS, Terms};
use super::scratch::Given;
use super::staging::{self, HostCall, Slice};
use crate::cost::Roof;
use crate::epilogue::{Lowered, SourceStep, Step};
use crate::error::{Error, Result};
use crate::plan::{Candidate, wanted_kernel};
use crate::prepared::{Math, PrepareOptions};
use crate::problem::{LayerShape, Operand, Problem};
use crate::stages::{Activation, NormOver};
use crate::tensor::{MAX_SPATIAL, Place, TensorMut, checked_product};

/// A layer on one stream of a device.
#[derive(Clone)]
pub(crate) struct Layer {
    device: CudaDevice,
    weights: Arc<Weights>,
    terms: Terms,
    /// The most that a slice of a call on host tensors may take on the device.
    slice_bytes: usize,
}

/// What a layer keeps on the device, shared by all its streams.
struct Weights {
    /// Holds everything that `params` points to.
    memory: Buffer,
    /// The launches' parameters, the call's part still empty.
    program: Program,
    /// How source stages and normalisation run, for `explain`.
    words: String,
    groups: u32,
    rows: u32,
    depth: u32,
}

// SAFETY: the pointers in `program` are device addresses; nothing is dereferenced on the host.
unsafe impl Send for Weights {}
// SAFETY: as above, and nothing is changed after the upload.
unsafe impl Sync for Weights {}

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
        options: &PrepareOptions,
    ) -> Result<Self> {
        let forced = match wanted_kernel(options.kernel.as_deref()) {
            Some(kernel) => {
                Some(Forced::parse(&kernel).map_err(|reason| Error::Kernel { kernel, reason })?)
            }
            None => None,
        };
        let terms = Terms {
            batch_invariant: options.batch_invariant,
            tf32: options.math == Math::Tf32,
            forced,
        };
        let wanted = KERNELS.iter().find(|kernel| forced.is_some_and(|f| f.kernel == kernel.name));
        if let Some(kernel) = wanted
            && let Some(reason) = kernel.refusal(device.facts(), &terms)
        {
            let (kernel, reason) = (kernel.name.into(), reason(device.facts()));
            return Err(Error::Kernel { kernel, reason });
        }
        let weights = Arc::new(Weights::upload(device, shape, &lowered, terms.tf32)?);
        let slice_bytes = options.slice_bytes.unwrap_or(staging::SLICE_BYTES);
        Ok(Layer { device: device.clone(), weights, terms, slice_bytes })
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
        let weights = self.weights.clone();
        Ok(Layer { device: device.clone(), weights, ..*self })
    }

    pub(crate) fn device(&self) -> &CudaDevice {
        &self.device
    }

    pub(super) fn slice_bytes(&self) -> usize {
        self.slice_bytes
    }

    pub(crate) fn place(&self) -> Place {
        Place::Cuda(self.device.ordinal())
    }

    pub(crate) fn roof(&self) -> Roof {
        self.device.facts().roof
    }

    /// The kernel that would run a problem, and why.
    pub(crate) fn explain(&self, problem: &Problem<'_>) -> (&'static str, String) {
        let letters = self.call(problem).letters();
        let choice = plan::choose(&letters, self.device.facts(), &self.terms);
        let forced = if self.terms.forced.is_some() { "forced; " } else { "" };
        let facts = self.device.facts();
        let words = plan::describe(choice, &letters, facts);
        let products = match (self.terms.tf32, KERNELS[choice.kernel].family) {
            (false, _) | (_, Family::Tf32 | Family::Tf32x3) => String::new(),
            (true, Family::Simt) if facts.tf32 => "; products in f32 cost no more here".into(),
            (true, Family::Simt) => format!("; {}", plan::no_tf32(facts)),
        };
        let stages = &self.weights.words;
        (KERNELS[choice.kernel].name, format!("{forced}{words}{stages}{products}"))
    }

    /// Every kernel and what it says to a problem, the one that would run first.
    pub(crate) fn plans(&self, problem: &Problem<'_>) -> Vec<Candidate> {
        let (letters, facts) = (self.call(problem).letters(), self.device.facts());
        let first = plan::choose(&letters, facts, &self.terms);
        let mut order = plan::ranked(&letters, facts, &self.terms);
        order.sort_by_key(|&choice| choice != first);
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
    pub(crate) fn run(&self, problem: &Problem<'_>, scratch: Option<&TensorMut<'_>>) -> Result<()> {
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
        let scratch = scratch.and_then(|memory| memory.view().stream());
        self.ordered(problem.streams().chain(scratch), || {
            // Freed in stream order.
            let _together = self.put_together(problem, &mut call)?;
            for (from, to) in problem.passed_through() {
                // SAFETY: the problem's views vouch for its tensors.
                unsafe {
                    let source = (on_device(&from), channels_of(from.channels)?);
                    launch::copy(&self.device, &call.extents, source, on_device(&to))?;
                }
            }
            self.launch(self.choose(&call), &call)
        })
    }

    /// What [`run`](Self::run) takes of the caller's scratch.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub(crate) fn scratch_bytes(&self, problem: &Problem<'_>) -> Result<usize> {
        let call = self.call(problem);
        launch::scratch_bytes(self.choose(&call), &call, &self.weights.program)
    }

    /// In slices; what passes through is copied on the host.
    fn run_on_host_tensors(&self, problem: &Problem<'_>) -> Result<()> {
        let [d, h, w] = problem.spatial;
        let extents = [problem.n, d, h, w];
        let mut sources = problem.sources();
        let (first, more): (_, Vec<Operand>) = (sources.next(), sources.collect());
        let Some(first) = first else { return Ok(()) };
        let several: Vec<Operand>;
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
    fn sample_by_sample(&self, host: &HostCall<'_>, choice: Choice) -> Result<()> {
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
            let sample = |operand: &Operand| Operand {
                ptr: operand.ptr.wrapping_offset(operand.sample.wrapping_mul(i as isize)),
                ..*operand
            };
            let sources: Vec<Operand> = host.sources.iter().map(sample).collect();
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

    /// Copies the sources beyond those that a launch takes into one, the call's last.
    fn put_together(&self, problem: &Problem<'_>, call: &mut Call) -> Result<Option<Buffer>> {
        let count = problem.sources().count();
        if count <= MAX_SOURCES {
            return Ok(None);
        }
        if self.device.is_capturing()? && !self.device.has_pools() {
            return Err(Error::Unsupported {
                device: self.device.to_string(),
                what: format!(
                    "capturing a concatenation of {count} sources in a graph: a launch takes \
                     {MAX_SOURCES}, and the device has no memory pools, from which the graph would \
                     take the room to put the others together"
                ),
            });
        }
        let rest = || problem.sources().skip(MAX_SOURCES - 1);
        let channels = rest().map(|source| source.channels).sum();
        let sizes = call.extents.map(|extent| extent as usize);
        let positions = checked_product("positions", &sizes)?;
        let bytes = checked_product("sources put together", &[positions, channels, 4])?;
        let memory = Buffer::new(&self.device, "sources put together", bytes)?;
        let Some(first) = rest().next() else { return Ok(None) };
        let together =
            on_device(&first).dense_like(&call.extents, channels as u64, memory.address());
        let mut channel = 0;
        for source in rest() {
            let part = (on_device(&source), channels_of(source.channels)?);
            // SAFETY: the problem's views vouch for its tensors; the memory is for all of them.
            unsafe {
                let to = together.skip_channels(channel);
                launch::copy(&self.device, &call.extents, part, to)?;
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
        // SAFETY: the tensors that named these streams are borrowed for the call, and keep them
        // alive.
        streams.clone().try_for_each(|stream| unsafe { self.device.wait_for(stream) })?;
        queue()?;
        // SAFETY: as above.
        let ordered = { streams }.try_for_each(|stream| unsafe { self.device.make_wait(stream) });
        if ordered.is_err() {
            // The caller may free the tensors on streams that do not wait for this one.
            let _ = self.device.synchronize();
        }
        ordered
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
        plan::choose(&call.letters(), self.device.facts(), &self.terms)
    }

    pub(super) fn launch(&self, choice: Choice, call: &Call) -> Result<()> {
        // SAFETY: the problem's views vouch for its tensors, `Weights` for what the parameters
        // point to, and both live until the launch is queued; what frees them is queued later.
        unsafe { launch(&self.device, choice, call, &self.weights.program) }
    }

    /// A problem in the kernels' terms, of the sources as many as a launch takes.
    fn call(&self, problem: &Problem<'_>) -> Call {
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
        // The weights are freed on the stream that uploaded them, after what this one still runs.
        let home = self.weights.memory.device().stream().cu_stream().addr();
        // SAFETY: the weights keep their stream alive.
        if unsafe { self.device.make_wait(home) }.is_err() {
            // Nothing orders the two, so this stream must be done. An error of this, too, is the
            // echo of an earlier one.
            let _ = self.device.synchronize();
        }
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Weights { groups, rows, depth, .. } = *self.weights;
        write!(f, "cuda::Layer({groups} x [{rows}, {depth}] on {:?})", self.device)
    }
}

/// Channels as the kernels count them.
///
/// # Errors
/// [`Error::TooLarge`].
pub(super) fn channels_of(count: usize) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::TooLarge { what: "channels", sizes: vec![count] })
}

pub(super) fn on_device(operand: &Operand) -> Tensor {
    let [d, h, w] = operand.spatial;
    Tensor {
        address: operand.ptr.addr() as u64,
        channel: operand.channel as i64,
        axes: [operand.sample as i64, d as i64, h as i64, w as i64],
    }
}

impl Weights {
    fn upload(
        device: &CudaDevice,
        shape: &LayerShape,
        lowered: &Lowered,
        tf32: bool,
    ) -> Result<Self> {
        let count = |what: &'static str, n: usize| {
            // Sums of a tile and its padding stay within 31 bits too.
            let fits = u32::try_from(n).ok().filter(|&n| n <= i32::MAX as u32 - 1024);
            fits.ok_or(Error::TooLarge { what, sizes: vec![n] })
        };
        let groups = count("groups", shape.groups)?;
        let rows = count("output channels per group", shape.c_out / shape.groups)?;
        let depth = count("input channels per group", shape.k())?;
        // A channel of all groups is a number of 32 bits, too.
        count("output channels", shape.c_out)?;
        count("input channels", shape.c_in)?;
        let mut packer = Packer::new(shape.groups, rows as usize, depth as usize);
        let weight = match tf32 && device.facts().tf32 {
            // Once, here, instead of each time that a kernel reads them.
            true => packer.weight(&lowered.weight.iter().copied().map(to_tf32).collect::<Vec<_>>()),
            false => packer.weight(&lowered.weight),
        };
        let bias = packer.rows(&lowered.bias);
        let steps = packer.steps(&lowered.steps, PW_INLINE_STEPS);
        let source_steps: Vec<PackedStep> =
            lowered.source_steps.iter().map(|step| packer.source_step(step)).collect();
        let source_steps = packer.behind(source_steps, PW_INLINE_SOURCE_STEPS);
        let mut map = |map: &Option<Vec<u32>>| map.as_ref().map(|map| packer.map(map));
        let (dst_map, residual_map) = (map(&lowered.dst_map), map(&lowered.residual_map));
        let pitch = packer.pitch as u32;
        // The normalisation knows no groups.
        (packer.groups, packer.rows) = (1, shape.c_out);
        packer.pitch = shape.c_out.next_multiple_of(PW_ROW_ALIGN as usize);
        let norm = lowered.norm.as_ref().map(|norm| {
            let arrays = [packer.rows(&norm.gamma), packer.rows(&norm.beta)];
            (norm, arrays, packer.steps(&lowered.after_norm, PW_INLINE_STEPS))
        });

        // Addresses are known once the memory is.
        let mut memory = Buffer::new(device, "a layer's weights", packer.bytes.len())?;
        let base = memory.address();
        let lists = [Some(&steps), Some(&source_steps), norm.as_ref().map(|(_, _, steps)| steps)];
        for list in lists.into_iter().flatten() {
            list.write(base, &mut packer.bytes);
        }
        memory.upload(&packer.bytes)?;

        let at = |offset: usize| (base + offset as u64) as *const f32;
        let shared = pw_fprop {
            dst_map: dst_map.map_or(std::ptr::null(), at).cast(),
            residual_map: residual_map.map_or(std::ptr::null(), at).cast(),
            ..pw_fprop::default()
        };
        let mut params = pw_fprop {
            weight: at(weight),
            bias: at(bias),
            more_steps: at(steps.more).cast(),
            more_source_steps: at(source_steps.more).cast(),
            row_pitch: pitch,
            step_count: count("steps", steps.list.len())?,
            source_step_count: count("source steps", source_steps.list.len())?,
            ..shared
        };
        steps.inline(base, &mut params.steps);
        source_steps.inline(base, &mut params.source_steps);
        let ops: Vec<pw_step> = steps.list.iter().map(|(step, _)| *step).collect();
        (params.epilogue, params.clip_lo, params.clip_hi) = short_cut(&ops);
        let norm = match norm {
            None => None,
            Some((norm, [gamma, beta], steps)) => {
                let (gamma, beta, eps) = (at(gamma), at(beta), norm.eps);
                let mut params = pw_fprop {
                    norm: pw_norm { gamma, beta, eps, ..pw_norm::default() },
                    more_steps: at(steps.more).cast(),
                    row_pitch: packer.pitch as u32,
                    step_count: count("steps", steps.list.len())?,
                    ..shared
                };
                steps.inline(base, &mut params.steps);
                Some((norm.over, params))
            }
        };
        let program = Program { fprop: params, norm };
        Ok(Weights { memory, program, words: words(lowered), groups, rows, depth })
    }
}

/// What runs beside the convolution and its steps.
fn words(lowered: &Lowered) -> String {
    let source = match lowered.source_steps.len() {
        0 => "",
        _ => "; source stages on each slab of src in shared memory",
    };
    let norm = lowered.norm.as_ref().map_or("", |norm| match norm.over {
        NormOver::Channels => "; layer norm in a launch of its own, in place",
        NormOver::All => "; layer norm in launches of its own, in place: moments, then the values",
    });
    format!("{source}{norm}")
}

/// The nearest TF32, ties away from zero: as the device's instruction rounds.
fn to_tf32(x: f32) -> f32 {
    match x {
        x if x.is_finite() => f32::from_bits((x.to_bits() + 0x1000) & !0x1FFF),
        x if x.is_nan() => f32::NAN,
        infinite => infinite,
    }
}

/// The compiled short cut that does what the steps say, if there is one, and its bounds.
fn short_cut(steps: &[pw_step]) -> (pw_epilogue, f32, f32) {
    let (with, rest) = match steps {
        [first, rest @ ..] if first.op == pw_op::PW_OP_RESIDUAL => {
            (pw_epilogue::PW_EPILOGUE_RESIDUAL_CLIP, rest)
        }
        rest => (pw_epilogue::PW_EPILOGUE_CLIP, rest),
    };
    match rest {
        [] => (with, f32::NEG_INFINITY, f32::INFINITY),
        [clip] if clip.op == pw_op::PW_OP_CLIP => (with, clip.a, clip.b),
        _ => (pw_epilogue::PW_EPILOGUE_STEPS, 0.0, 0.0),
    }
}

/// Lays out what a layer keeps on the device; every array starts at a multiple of 256 bytes.
struct Packer {
    bytes: Vec<u8>,
    groups: usize,
    rows: usize,
    depth: usize,
    /// `rows`, padded so that vectors of four neither straddle a group nor leave the array.
    pitch: usize,
}

/// A step, and where its arrays are.
type PackedStep = (pw_step, [Option<usize>; 2]);

/// A list of steps; those that do not fit into the launch's parameters lie at `more`.
struct PackedSteps {
    list: Vec<PackedStep>,
    inline: usize,
    more: usize,
}

impl PackedSteps {
    /// The steps, with the addresses that their arrays have behind `base`.
    fn placed(&self, base: u64) -> impl Iterator<Item = pw_step> + '_ {
        let at = move |offset: usize| (base + offset as u64) as *const f32;
        self.list.iter().map(move |(step, [first, second])| pw_step {
            first: first.map_or(std::ptr::null(), at),
            second: second.map_or(std::ptr::null(), at),
            ..*step
        })
    }

    fn inline(&self, base: u64, to: &mut [pw_step]) {
        for (slot, step) in to.iter_mut().zip(self.placed(base)) {
            *slot = step;
        }
    }

    fn write(&self, base: u64, to: &mut [u8]) {
        let rest = self.placed(base).skip(self.inline);
        for (slot, step) in to[self.more..].chunks_exact_mut(size_of::<pw_step>()).zip(rest) {
            slot.copy_from_slice(&step_bytes(&step));
        }
    }
}

impl Packer {
    fn new(groups: usize, rows: usize, depth: usize) -> Self {
        let pitch = rows.next_multiple_of(PW_ROW_ALIGN as usize);
        Packer { bytes: Vec::new(), groups, rows, depth, pitch }
    }

    /// A list with room for what does not fit inline.
    fn behind(&mut self, list: Vec<PackedStep>, inline: u32) -> PackedSteps {
        let (inline, more) = (inline as usize, self.align());
        let rest = list.len().saturating_sub(inline);
        self.bytes.resize(more + rest * size_of::<pw_step>(), 0);
        PackedSteps { list, inline, more }
    }

    fn steps(&mut self, steps: &[Step], inline: u32) -> PackedSteps {
        let list = steps.iter().map(|step| self.step(step)).collect();
        self.behind(list, inline)
    }

    fn align(&mut self) -> usize {
        self.bytes.resize(self.bytes.len().next_multiple_of(256), 0);
        self.bytes.len()
    }

    fn extend(&mut self, values: impl Iterator<Item = f32>) {
        self.bytes.extend(values.flat_map(f32::to_ne_bytes));
    }

    /// `[groups * rows, depth]` as `[groups][depth][pitch]`.
    fn weight(&mut self, weight: &[f32]) -> usize {
        let start = self.align();
        let padding = self.pitch - self.rows;
        for group in weight.chunks_exact(self.rows * self.depth) {
            for k in 0..self.depth {
                let column = group.iter().skip(k).step_by(self.depth).copied();
                self.bytes.extend(column.flat_map(f32::to_ne_bytes));
                self.extend(std::iter::repeat_n(0.0, padding));
            }
        }
        start
    }

    /// `[groups * rows]` as `[groups][pitch]`.
    fn rows(&mut self, values: &[f32]) -> usize {
        let start = self.align();
        for group in values.chunks_exact(self.rows) {
            self.extend(group.iter().copied());
            self.extend(std::iter::repeat_n(0.0, self.pitch - self.rows));
        }
        debug_assert_eq!(values.len(), self.groups * self.rows);
        start
    }

    fn map(&mut self, map: &[u32]) -> usize {
        let start = self.align();
        self.bytes.extend(map.iter().flat_map(|channel| channel.to_ne_bytes()));
        start
    }

    /// `[groups * depth]` as it is.
    fn inputs(&mut self, values: &[f32]) -> usize {
        let start = self.align();
        self.extend(values.iter().copied());
        start
    }

    fn source_step(&mut self, step: &SourceStep) -> PackedStep {
        match step {
            SourceStep::Affine { scale, shift } => {
                let arrays = [Some(self.inputs(scale)), Some(self.inputs(shift))];
                (plain(pw_op::PW_OP_AFFINE, 0.0, 0.0), arrays)
            }
            SourceStep::Gate => (plain(pw_op::PW_OP_GATE, 0.0, 0.0), [None; 2]),
            SourceStep::Activation(activation) => {
                let (op, a, b) = activation_op(*activation);
                (plain(op, a, b), [None; 2])
            }
        }
    }

    fn step(&mut self, step: &Step) -> PackedStep {
        match step {
            Step::Affine { scale, shift } => {
                let arrays = [Some(self.rows(scale)), Some(self.rows(shift))];
                (plain(pw_op::PW_OP_AFFINE, 0.0, 0.0), arrays)
            }
            Step::PRelu { slope } => {
                (plain(pw_op::PW_OP_PRELU, 0.0, 0.0), [Some(self.rows(slope)), None])
            }
            Step::Residual => (plain(pw_op::PW_OP_RESIDUAL, 0.0, 0.0), [None; 2]),
            Step::Activation(activation) => {
                let (op, a, b) = activation_op(*activation);
                (plain(op, a, b), [None; 2])
            }
        }
    }
}

fn plain(op: pw_op, a: f32, b: f32) -> pw_step {
    pw_step { op, a, b, ..pw_step::default() }
}

fn activation_op(activation: Activation) -> (pw_op, f32, f32) {
    match activation {
        Activation::Relu => (pw_op::PW_OP_CLIP, 0.0, f32::INFINITY),
        Activation::Relu6 => (pw_op::PW_OP_CLIP, 0.0, 6.0),
        Activation::Clip { lo, hi } => (pw_op::PW_OP_CLIP, lo, hi),
        Activation::LeakyRelu { alpha } => (pw_op::PW_OP_LEAKY_RELU, alpha, 0.0),
        Activation::Elu { alpha } => (pw_op::PW_OP_ELU, alpha, 0.0),
        Activation::Sigmoid => (pw_op::PW_OP_SIGMOID, 0.0, 0.0),
        Activation::Tanh => (pw_op::PW_OP_TANH, 0.0, 0.0),
        Activation::Silu => (pw_op::PW_OP_SILU, 0.0, 0.0),
        Activation::Gelu => (pw_op::PW_OP_GELU, 0.0, 0.0),
        Activation::GeluTanh => (pw_op::PW_OP_GELU_TANH, 0.0, 0.0),
        Activation::HardSigmoid => (pw_op::PW_OP_HARD_SIGMOID, 0.0, 0.0),
        Activation::HardSwish => (pw_op::PW_OP_HARD_SWISH, 0.0, 0.0),
        Activation::Softplus => (pw_op::PW_OP_SOFTPLUS, 0.0, 0.0),
        Activation::Mish => (pw_op::PW_OP_MISH, 0.0, 0.0),
    }
}

/// A step as the device reads it.
fn step_bytes(step: &pw_step) -> [u8; size_of::<pw_step>()] {
    let mut bytes = [0; size_of::<pw_step>()];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(std::mem::offset_of!(pw_step, op), &step.op.0.to_ne_bytes());
    put(std::mem::offset_of!(pw_step, a), &step.a.to_ne_bytes());
    put(std::mem::offset_of!(pw_step, b), &step.b.to_ne_bytes());
    put(std::mem::offset_of!(pw_step, first), &(step.first.addr() as u64).to_ne_bytes());
    put(std::mem::offset_of!(pw_step, second), &(step.second.addr() as u64).to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(packer: &Packer, start: usize, len: usize) -> Vec<f32> {
        let bytes = packer.bytes[start..start + 4 * len].chunks_exact(4);
        bytes.map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn weights_are_packed_by_group_and_depth_with_padded_rows() {
        // weight[row][k] = 10 * row + k, two groups of 3 rows, depth 2.
        let weight: Vec<f32> =
            (0..6).flat_map(|row| [row as f32 * 10.0, row as f32 * 10.0 + 1.0]).collect();
        let mut packer = Packer::new(2, 3, 2);
        let start = packer.weight(&weight);
        assert_eq!(
            floats(&packer, start, 16),
            [0., 10., 20., 0., 1., 11., 21., 0., 30., 40., 50., 0., 31., 41., 51., 0.]
        );
        let start = packer.rows(&[1., 2., 3., 4., 5., 6.]);
        assert_eq!(start % 256, 0);
        assert_eq!(floats(&packer, start, 8), [1., 2., 3., 0., 4., 5., 6., 0.]);
    }

    #[test]
    fn rounding_to_tf32_goes_to_the_nearest() {
        let one = 1.0f32;
        let step = 2f32.powi(-10);
        for (x, rounded) in [
            (one, one),
            (one + 0.49 * step, one),
            (one + 0.5 * step, one + step),
            (-one - 0.5 * step, -one - step),
            (2.0f32.next_down(), 2.0),
            (f32::MAX, f32::INFINITY),
            (-f32::INFINITY, -f32::INFINITY),
            (-0.0, -0.0),
        ] {
            assert_eq!(to_tf32(x).to_bits(), rounded.to_bits(), "{x}");
        }
        // Payloads in the bits that do not count must not turn a NaN into an infinity.
        assert!(f32::from_bits(to_tf32(f32::from_bits(0x7F80_0001)).to_bits() & !0x1FFF).is_nan());
    }

    #[test]
    fn the_usual_lists_have_a_short_cut() {
        let mut packer = Packer::new(1, 4, 1);
        let mut cut = |steps: &[Step]| {
            let steps: Vec<pw_step> = steps.iter().map(|step| packer.step(step).0).collect();
            short_cut(&steps)
        };
        let relu6 = Step::Activation(Activation::Relu6);
        let inf = f32::INFINITY;
        assert_eq!(cut(&[]), (pw_epilogue::PW_EPILOGUE_CLIP, -inf, inf));
        assert_eq!(cut(std::slice::from_ref(&relu6)), (pw_epilogue::PW_EPILOGUE_CLIP, 0.0, 6.0));
        let residual = pw_epilogue::PW_EPILOGUE_RESIDUAL_CLIP;
        assert_eq!(cut(&[Step::Residual]), (residual, -inf, inf));
        assert_eq!(cut(&[Step::Residual, relu6.clone()]), (residual, 0.0, 6.0));
        let none = pw_epilogue::PW_EPILOGUE_STEPS;
        assert_eq!(cut(&[relu6.clone(), Step::Residual]).0, none);
        assert_eq!(cut(&[relu6, Step::Activation(Activation::Tanh)]).0, none);
    }

    #[test]
    fn a_step_in_memory_is_the_struct_that_the_kernel_reads() {
        let step = pw_step {
            op: pw_op::PW_OP_MISH,
            a: 1.5,
            b: -2.0,
            reserved: 0,
            first: std::ptr::without_provenance(0x1234_5678_9ABC),
            second: std::ptr::without_provenance(16),
        };
        let bytes = step_bytes(&step);
        // SAFETY: as many bytes as a pw_step has, and any bits are one.
        let back = unsafe { bytes.as_ptr().cast::<pw_step>().read_unaligned() };
        assert_eq!((back.op, back.a, back.b), (step.op, step.a, step.b));
        assert_eq!((back.first.addr(), back.second.addr()), (step.first.addr(), 16));
    }
}
