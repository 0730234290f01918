//! Layers of 8-bit integers and of fp8 on a CUDA device: the weight as it is packed, and calls.
//!
//! What becomes of sums is rounded as on the CPU. Those of integers are exact: results are the same bits.

use std::sync::Arc;

use super::call::{Call, Moments, Sources, Tensor};
use super::device::CudaDevice;
use super::launch::{Bytes, start_bytes, start_quantization};
use super::layer::{count_of, on_device};
use super::memory::Buffer;
use super::params::{pw_bytes, pw_element, pw_operands, pw_quantization};
use super::plan::{ByteKernel, Choice, Forced, Helper, Letters, choose_bytes};
use super::staging::{self, HostCall, Moved, Slice};
use crate::cpu::{fp8, int8};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::plan::{Candidate, wanted_kernel};
use crate::prepared::PrepareOptions;
use crate::problem::{DstShape, LayerShape, Operand, same_place};
use crate::quantized::{ElementType, Fp8, Per};
use crate::tensor::{Place, TensorMut, TensorRef, checked_product};

/// The weight's rows begin at multiples of so many bytes: the kernels copy as many at once.
const DEPTH_ALIGN: usize = 16;

/// A layer on one stream of a device.
pub(crate) struct Layer {
    device: CudaDevice,
    weights: Arc<Weights>,
    /// One of the [`Bytes`]' kernels.
    forced: Option<Forced>,
    /// Whether blocks may share sums where that is not asked for: sums of integers are exact, others
    /// would then depend on the batch.
    shares: bool,
    /// The most that a slice of a call on host tensors may take on the device.
    slice_bytes: usize,
}

/// What a layer keeps on the device.
struct Weights {
    /// Holds everything that `params` points to.
    memory: Buffer,
    /// The launches' parameters, the call's part still empty.
    params: pw_bytes,
    bytes: Bytes,
    groups: u32,
    rows: u32,
    depth: u32,
    stride: usize,
    /// What shares a quantisation, where src is f32.
    per: Option<Per>,
}

// SAFETY: the pointers in `params` are device addresses; nothing is dereferenced on the host.
unsafe impl Send for Weights {}
// SAFETY: as above, and nothing is changed after the upload.
unsafe impl Sync for Weights {}

/// A layer as either backend takes it, without its weight.
struct Parts {
    shape: LayerShape,
    bytes: Bytes,
    /// One per output channel each, or none.
    offset: Vec<i32>,
    scale: Vec<f32>,
    shift: Vec<f32>,
    per: Option<Per>,
    params: pw_bytes,
}

impl Weights {
    fn of_integers(device: &CudaDevice, lowered: int8::Lowered<'_>) -> Result<Self> {
        let int8::Lowered { shape, weight, offset, scale, shift, per, scaling, src_flip } = lowered;
        // The kernels multiply bytes of either sign as they are, where the offset is for those that
        // were made unsigned: all of them by so much larger.
        let unsigned = |(row, offset): (&[i8], i32)| {
            let sum: i64 = row.iter().map(|&w| i64::from(w)).sum();
            (i64::from(offset) + i64::from(src_flip) * sum) as i32
        };
        let offset = weight.chunks_exact(shape.k()).zip(offset).map(unsigned).collect();
        let int8::Scaling { before, clip, zero_point, residual_flip, .. } = scaling;
        let params = pw_bytes {
            operands: match src_flip {
                0 => pw_operands::PW_I8_U8,
                _ => pw_operands::PW_I8_I8,
            },
            before_lo: before.lo,
            before_hi: before.hi,
            lo: clip.lo,
            hi: clip.hi,
            zero_point,
            residual_flip: residual_flip.into(),
            residual_zero_point: scaling.residual_zero_point,
            residual_scale: scaling.residual_scale,
            ..pw_bytes::default()
        };
        let bytes = Bytes::Integers;
        let parts = Parts { shape, bytes, offset, scale, shift, per, params };
        Weights::upload(device, weight, |w| w as u8, parts)
    }

    fn of_floats(device: &CudaDevice, lowered: fp8::Lowered<'_>) -> Result<Self> {
        let fp8::Lowered { shape, weight, weight_type, src, scaling, .. } = lowered;
        let fp8::Scaling { scale, shift, before, clip, residual_scale } = scaling;
        let params = pw_bytes {
            operands: match (weight_type, src) {
                (Fp8::E4M3, Fp8::E4M3) => pw_operands::PW_E4M3_E4M3,
                (Fp8::E4M3, Fp8::E5M2) => pw_operands::PW_E4M3_E5M2,
                (Fp8::E5M2, Fp8::E4M3) => pw_operands::PW_E5M2_E4M3,
                (Fp8::E5M2, Fp8::E5M2) => pw_operands::PW_E5M2_E5M2,
            },
            before_lo: before.lo,
            before_hi: before.hi,
            lo: clip.lo,
            hi: clip.hi,
            residual_scale,
            ..pw_bytes::default()
        };
        let (bytes, offset, per) = (Bytes::Floats, Vec::new(), None);
        let parts = Parts { shape, bytes, offset, scale, shift, per, params };
        Weights::upload(device, weight, |w| w, parts)
    }

    fn upload<W: Copy>(
        device: &CudaDevice,
        weight: &[W],
        byte: impl Fn(W) -> u8,
        parts: Parts,
    ) -> Result<Self> {
        let Parts { shape, bytes: kind, offset, scale, shift, per, mut params } = parts;
        let k = shape.k();
        let pitch = k.next_multiple_of(DEPTH_ALIGN);
        let what = "a layer's weights";
        let mut bytes = vec![0u8; checked_product(what, &[shape.c_out, pitch])?];
        for (row, packed) in weight.chunks_exact(k).zip(bytes.chunks_exact_mut(pitch)) {
            packed.iter_mut().zip(row).for_each(|(packed, &w)| *packed = byte(w));
        }
        let offset_at = behind(&mut bytes, offset.into_iter().map(i32::to_ne_bytes));
        let scale_at = behind(&mut bytes, scale.into_iter().map(f32::to_ne_bytes));
        let shift_at = behind(&mut bytes, shift.into_iter().map(f32::to_ne_bytes));

        let mut memory = Buffer::new(device, what, bytes.len())?;
        memory.upload(&bytes)?;
        let at = |offset: usize| memory.address() + offset as u64;
        params.fprop.weight = at(0) as *const _;
        params.offset = at(offset_at) as *const i32;
        params.scale = at(scale_at) as *const f32;
        params.shift = at(shift_at) as *const f32;
        params.depth_pitch = count_of("input channels per group", pitch)?;
        count_of("output channels", shape.c_out)?;
        count_of("input channels", shape.c_in)?;
        Ok(Weights {
            groups: count_of("groups", shape.groups)?,
            rows: count_of("output channels per group", shape.c_out / shape.groups)?,
            depth: count_of("input channels per group", k)?,
            stride: shape.stride,
            bytes: kind,
            per,
            memory,
            params,
        })
    }
}

/// The kernel that options or the environment force.
fn forced(options: &PrepareOptions, bytes: Bytes) -> Result<Option<Forced>> {
    let names: Vec<_> = bytes.kernels().iter().map(|kernel| kernel.name).collect();
    let parse = |kernel: String| {
        Forced::parse(&kernel, &names).map_err(|reason| Error::Kernel { kernel, reason })
    };
    wanted_kernel(options.kernel.as_deref()).map(parse).transpose()
}

/// Appends words, from a multiple of 16 bytes on, and gives where.
fn behind(bytes: &mut Vec<u8>, words: impl Iterator<Item = [u8; 4]>) -> usize {
    let at = bytes.len().next_multiple_of(16);
    bytes.resize(at, 0);
    bytes.extend(words.flatten());
    at
}

/// The tensors of one call, which have been checked against the layer and each other.
pub(crate) struct Tensors<'a, S, R, T> {
    pub shape: &'a DstShape,
    pub src: &'a TensorRef<'a, S>,
    pub residual: Option<&'a TensorRef<'a, R>>,
    pub dst: &'a TensorMut<'a, T>,
    /// Of dst and residual.
    pub types: (ElementType, ElementType),
}

impl Layer {
    /// Packs and uploads a layer of integers; the device is ready to run when this returns.
    ///
    /// # Errors
    /// [`Error::Kernel`] for a forced kernel that does not exist, [`Error::TooLarge`],
    /// [`Error::Cuda`].
    pub(crate) fn of_integers(
        device: &CudaDevice,
        options: &PrepareOptions,
        lowered: int8::Lowered<'_>,
    ) -> Result<Self> {
        let forced = forced(options, Bytes::Integers)?;
        Ok(Layer::new(device, options, forced, Weights::of_integers(device, lowered)?))
    }

    /// The same of fp8.
    ///
    /// # Errors
    /// As [`of_integers`](Self::of_integers), and [`Error::Unsupported`] where the device has no kernels.
    pub(crate) fn of_floats(
        device: &CudaDevice,
        options: &PrepareOptions,
        lowered: fp8::Lowered<'_>,
    ) -> Result<Self> {
        device.load_fp8()?;
        let forced = forced(options, Bytes::Floats)?;
        Ok(Layer::new(device, options, forced, Weights::of_floats(device, lowered)?))
    }

    fn new(
        device: &CudaDevice,
        options: &PrepareOptions,
        forced: Option<Forced>,
        weights: Weights,
    ) -> Self {
        let slice_bytes = options.slice_bytes.unwrap_or(staging::SLICE_BYTES);
        let shares = weights.bytes == Bytes::Integers || !options.batch_invariant;
        Layer { device: device.clone(), weights: Arc::new(weights), forced, shares, slice_bytes }
    }

    fn kernels(&self) -> &'static [ByteKernel] {
        self.weights.bytes.kernels()
    }

    /// The same layer on another stream of the same device.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] if it is another device.
    pub(crate) fn on(&self, device: &CudaDevice) -> Result<Self> {
        let place = |device: &CudaDevice| Place::Cuda(device.ordinal());
        same_place("the layer's weight", place(device), place(&self.device))?;
        Ok(Layer { device: device.clone(), weights: self.weights.clone(), ..*self })
    }

    /// Which values of a source share a quantisation that a call finds, if one does.
    pub(crate) fn per(&self) -> Option<Per> {
        self.weights.per
    }

    /// The kernel that runs calls of so many positions.
    pub(crate) fn kernel_for(&self, positions: u64) -> &'static str {
        self.kernels()[self.choose(positions, self.forced).kernel].name
    }

    /// The kernel that would run a call with a dst of this shape, and how.
    pub(crate) fn explain(&self, dst: &DstShape) -> (&'static str, String) {
        let choice = self.choose(positions(dst), self.forced);
        let forced = if self.forced.is_some() { "forced; " } else { "" };
        (self.kernels()[choice.kernel].name, format!("{forced}{}", self.describe(choice, dst)))
    }

    /// Every kernel and what it says to such a call, the one that would run first.
    pub(crate) fn plans(&self, dst: &DstShape) -> Vec<Candidate> {
        let first = self.choose(positions(dst), self.forced);
        let others = self.kernels().iter().enumerate().filter(|&(index, _)| index != first.kernel);
        let others = others.map(|(_, kernel)| {
            self.choose(positions(dst), Some(Forced { kernel: kernel.name, splits: None }))
        });
        let candidate = |choice: Choice| Candidate {
            kernel: self.kernels()[choice.kernel].name,
            verdict: Ok(self.describe(choice, dst)),
        };
        std::iter::once(first).chain(others).map(candidate).collect()
    }

    fn describe(&self, choice: Choice, dst: &DstShape) -> String {
        let tile = &self.kernels()[choice.kernel].tile;
        tile.describe(&self.letters(positions(dst)), choice.splits, self.device.facts())
    }

    fn letters(&self, positions: u64) -> Letters {
        let Weights { groups, rows, depth, .. } = *self.weights;
        Letters { groups, rows, depth, positions, channels_fast: false }
    }

    /// One of [`kernels`](Self::kernels).
    fn choose(&self, positions: u64, forced: Option<Forced>) -> Choice {
        let (letters, facts) = (self.letters(positions), self.device.facts());
        choose_bytes(self.kernels(), &letters, facts, forced, self.shares)
    }

    /// Runs a call whose tensors have been checked against the layer and each other: on device
    /// tensors it is queued, on host tensors it is done when this returns.
    ///
    /// # Errors
    /// [`Error::WrongDevice`], [`Error::DeviceMemory`], [`Error::Unsupported`] for what cannot be
    /// captured, [`Error::Cuda`].
    pub(crate) fn run<S: Moved, R: Moved, T: Moved>(
        &self,
        tensors: &Tensors<'_, S, R, T>,
    ) -> Result<()> {
        let &Tensors { shape, src, residual, dst, types } = tensors;
        let (place, here) = (src.place(), Place::Cuda(self.device.ordinal()));
        if place != Place::Host && place != here {
            let (expected, got) = (here.to_string(), place.to_string());
            return Err(Error::WrongDevice { tensor: "src", expected, got });
        }
        let [d, h, w] = shape.spatial();
        let extents = [shape.as_slice()[0], d, h, w];
        if extents.contains(&0) {
            return Ok(());
        }
        let whole = Operand::new(src);
        let all = extents_of(src.shape());
        let streams = [src.stream(), dst.view().stream(), residual.and_then(TensorRef::stream)];
        let (src, dst) = (whole.subsampled(self.weights.stride), Operand::new(dst.view()));
        let residual = residual.map(Operand::new);
        // Slices run as the whole would. All kernels give the same sums, exact ones, or those of the same
        // slabs in the same order; but those of floats depend on how many blocks share them.
        let choice = self.choose(positions(shape), self.forced);
        // Before anything is queued.
        match place {
            Place::Host => staging::check_capture(&self.device)?,
            _ if self.weights.per.is_some() => self
                .device
                .check_capture("a layer that quantises its source", "the bytes of the source")?,
            _ => {}
        }
        if place != Place::Host {
            return self.device.ordered(streams.into_iter().flatten(), || {
                let reaches = self.reaches(extents[0])?;
                if let Some(reaches) = &reaches {
                    let call =
                        self.call(all.map(|n| n as u64), on_device(&whole), Tensor::default());
                    self.find_reaches(&call, reaches.pairs)?;
                }
                let call = Call {
                    residual: residual.as_ref().map(on_device),
                    ..self.call(extents.map(|n| n as u64), on_device(&src), on_device(&dst))
                };
                let reaches = reaches.as_ref().map(|reaches| reaches.pairs);
                self.launch(choice, &call, types, reaches)
            });
        }
        let host = HostCall {
            sources: std::slice::from_ref(&src),
            residual: residual.as_ref(),
            gate: None,
            dst: &dst,
            discard: false,
            between: 0,
            bytes_beside: self.weights.per.map_or(0, |_| self.quantized_bytes()),
            extents,
            slice_bytes: self.slice_bytes,
            whole_samples: false,
        };
        let reaches = self.reaches(extents[0])?;
        // Those that a slice's samples belong to.
        let of = |slice: &Slice| {
            let pairs = reaches.as_ref()?.pairs;
            let first = slice.start[0] as i64 * pairs.axes[0];
            Some(Tensor { address: pairs.address.wrapping_add_signed(PAIR * first), ..pairs })
        };
        if reaches.is_some() {
            // The same memory, of no channels.
            let nothing = Operand { channels: 0, ..dst };
            let host = HostCall {
                sources: std::slice::from_ref(&whole),
                residual: None,
                dst: &nothing,
                discard: true,
                bytes_beside: 0,
                extents: all,
                ..host
            };
            let find = |slice: &Slice| {
                let call = self.call(slice.extents, slice.src, Tensor::default());
                self.find_reaches(&call, of(slice).unwrap_or_default())
            };
            // SAFETY: the call's views vouch for the host tensors.
            unsafe { staging::run(&self.device, &host, find)? };
        }
        let compute = |slice: &Slice| {
            let &Slice { extents, src, residual, dst, .. } = slice;
            let call = Call { residual, ..self.call(extents, src, dst) };
            self.launch(choice, &call, types, of(slice))
        };
        // SAFETY: as above.
        unsafe { staging::run(&self.device, &host, compute) }
    }

    /// Bytes of a position that are quantised in a call, and of their quantisation.
    fn quantized_bytes(&self) -> usize {
        self.pitch() + size_of::<pw_quantization>()
    }

    /// From position to position of bytes that a call makes.
    fn pitch(&self) -> usize {
        let Weights { groups, depth, .. } = *self.weights;
        (groups as usize * depth as usize).next_multiple_of(DEPTH_ALIGN)
    }

    /// Room for the reaches of a call of so many samples, all zero, where more than a position's
    /// values share a quantisation.
    fn reaches(&self, samples: usize) -> Result<Option<Reaches>> {
        let (count, stride) = match self.weights.per {
            Some(Per::Tensor) => (1, 0),
            Some(Per::Sample) => (samples, 1),
            Some(Per::Position) | None => return Ok(None),
        };
        let bytes = checked_product("ranges of a source", &[count, PAIR as usize])?;
        let mut memory = Buffer::new(&self.device, "the ranges of a source", bytes)?;
        memory.fill(0)?;
        let pairs = Tensor { address: memory.address(), channel: 0, axes: [stride, 0, 0, 0] };
        Ok(Some(Reaches { pairs, _memory: memory }))
    }

    /// Widens reaches by those of a source.
    fn find_reaches(&self, call: &Call, reaches: Tensor) -> Result<()> {
        let rows = call.groups * call.depth;
        let call = Call { rows, residual: Some(reaches), ..*call };
        // SAFETY: the call's views vouch for src, `reaches` for its memory.
        unsafe { start_quantization(&self.device, Helper::Reach, &call) }
    }

    /// A call without residual.
    fn call(&self, extents: [u64; 4], src: Tensor, dst: Tensor) -> Call {
        let Weights { groups, rows, depth, .. } = *self.weights;
        Call {
            groups,
            rows,
            depth,
            extents,
            sources: Sources::one(src, groups * depth),
            dst,
            residual: None,
            gate: None,
            moments: Moments::Scratch,
            scratch: None,
        }
    }

    /// Queues a call, after the quantisation of its source if that is f32.
    fn launch(
        &self,
        choice: Choice,
        call: &Call,
        types: (ElementType, ElementType),
        reaches: Option<Tensor>,
    ) -> Result<()> {
        if self.weights.per.is_none() {
            return self.multiply(choice, call, types);
        }
        let Call { groups, depth, extents: [n, d, h, w], .. } = *call;
        let what = "bytes of a source";
        let sizes = [n, d, h, w].map(|len| len as usize);
        let positions = checked_product(what, &sizes)?;
        let bytes = checked_product(what, &[positions, self.quantized_bytes()])?;
        // Freed in stream order.
        let memory = Buffer::new(&self.device, "the bytes of a source", bytes)?;
        let [d, h, w] = [d, h, w].map(|len| len as i64);
        let axes = [d * h * w, h * w, w, 1];
        let pitch = self.pitch();
        let src = Tensor {
            address: memory.address(),
            channel: 1,
            axes: axes.map(|stride| stride * pitch as i64),
        };
        let address = memory.address() + (positions * pitch) as u64;
        let gate = Some(Tensor { address, channel: 0, axes });
        let rows = groups * depth;
        let quantize = Call { rows, dst: src, residual: reaches, gate, ..*call };
        // SAFETY: the call's views vouch for its tensors; the memory is for all bytes and quantisations.
        unsafe { start_quantization(&self.device, Helper::Quantize, &quantize)? };
        let call = Call { sources: Sources::one(src, rows), gate, ..*call };
        self.multiply(choice, &call, types)
    }

    fn multiply(
        &self,
        choice: Choice,
        call: &Call,
        (dst, residual): (ElementType, ElementType),
    ) -> Result<()> {
        let mut params = self.weights.params;
        (params.dst_type, params.residual_type) = (element(dst), element(residual));
        call.convolution_of_bytes((dst.size(), residual.size()), &mut params.fprop);
        // SAFETY: the call's views vouch for its tensors, `Weights` for what the parameters point to,
        // and both live until the launch is queued; what frees them is queued later.
        unsafe { start_bytes(&self.device, (self.weights.bytes, choice), call, &mut params) }
    }
}

/// Where the reaches of a source are: pairs of i32, of the whole of it or of each sample.
struct Reaches {
    pairs: Tensor,
    /// Freed in stream order.
    _memory: Buffer,
}

/// Bytes of one.
const PAIR: i64 = 8;

/// Batch and the three spatial axes of a tensor.
fn extents_of(shape: &[usize]) -> [usize; 4] {
    let mut extents = [1; 4];
    extents[0] = shape[0];
    let spatial = &shape[2..];
    extents[4 - spatial.len()..].copy_from_slice(spatial);
    extents
}

/// Of all samples.
fn positions(dst: &DstShape) -> u64 {
    let [n, _, spatial @ ..] = dst.padded();
    spatial.iter().fold(n as u64, |all, &len| all.saturating_mul(len as u64))
}

fn element(element: ElementType) -> pw_element {
    match element {
        ElementType::Int8(_) => pw_element::PW_BYTES,
        ElementType::Fp8(Fp8::E4M3) => pw_element::PW_E4M3,
        ElementType::Fp8(Fp8::E5M2) => pw_element::PW_E5M2,
        ElementType::Real(DType::F32) => pw_element::PW_F32,
        ElementType::Real(DType::F16) => pw_element::PW_F16,
        ElementType::Real(DType::Bf16) => pw_element::PW_BF16,
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
        write!(f, "cuda::bytes::Layer({groups} x [{rows}, {depth}], on {:?})", self.device)
    }
}
