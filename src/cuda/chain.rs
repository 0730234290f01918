//! Layers one after another on one stream: what lies between them stays on the device.
//!
//! A kernel computes each position by itself, so the positions that a later layer's stride leaves
//! out are left out from the start, or from behind the last normalisation over all positions on.

use super::call::Tensor;
use super::launch;
use super::layer::{Layer, count_of, on_device};
use super::memory::Buffer;
use super::plan::KERNELS;
use super::staging::{self, HostCall, Slice};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::problem::{
    DstShape, LayerShape, Operand, Work, dst_shape, expect_shape, same_place, spatial,
};
use crate::tensor::{MAX_SPATIAL, Place, TensorMut, TensorRef, checked_product};
use crate::trace::{self, Told};

/// Where a chain runs: on whole tensors, or on a slice of them.
struct At {
    /// Of the positions that the first layers compute.
    extents: [u64; 1 + MAX_SPATIAL],
    /// Without the positions that they leave out.
    src: Tensor,
    channels: usize,
    dst: Tensor,
    /// Two pieces of memory that the layers alternate between.
    between: [u64; 2],
}

/// Runs layers of one device and stream, none of which takes a second tensor, as
/// [`Layer::run`] runs one. False if host tensors have to go through the layers one by one, since no
/// slice of them goes through all.
///
/// # Errors
/// As [`Layer::run`]; [`Error::DeviceMemory`] if what lies between the layers does not fit;
/// [`Error::Unsupported`] while the stream is captured on a device without memory pools.
pub(crate) fn run<'l, T: Element>(
    layers: impl Iterator<Item = (&'l Layer, &'l LayerShape)> + Clone,
    src: &TensorRef<'_, T>,
    dst: &TensorMut<'_, T>,
) -> Result<bool> {
    let mut shape = None::<DstShape>;
    let mut widest = 0;
    for (_, layer) in layers.clone() {
        if let Some(shape) = &shape {
            // What goes into a layer that is not the first lies between two.
            widest = shape.as_slice()[1].max(widest);
        }
        let from = shape.as_ref().map_or(src.shape(), DstShape::as_slice);
        shape = Some(dst_shape(layer, from, std::iter::empty())?);
    }
    let (Some((first, _)), Some(shape)) = (layers.clone().next(), shape) else { return Ok(true) };
    let device = first.device();
    expect_shape("dst", dst.shape(), shape.as_slice())?;
    if src.place() != Place::Host {
        same_place("src", first.place(), src.place())?;
    }
    same_place("dst", src.place(), dst.place())?;
    if dst.view().is_empty() {
        return Ok(true);
    }

    let stride = stride_of(layers.clone());
    let (source, target) = (Operand::new(src).subsampled(stride), Operand::new(dst.view()));
    let [d, h, w] = spatial(src.shape(), 1).map(|len| len.div_ceil(stride));
    let extents = [shape.as_slice()[0], d, h, w];
    let whole_samples = layers.clone().any(|(layer, _)| layer.over_samples());
    let part = |slice: &Slice| At {
        extents: slice.extents,
        src: slice.src,
        channels: source.channels,
        dst: slice.dst,
        between: slice.between,
    };
    match src.place() {
        Place::Host => {
            if [d, h, w] != shape.spatial() {
                return Ok(false);
            }
            // Of one layer at a time.
            let bytes_beside = layers.clone().map(|(layer, _)| layer.bytes_beside()).max();
            let bytes_beside = bytes_beside.unwrap_or(0);
            let host = HostCall::<T> {
                sources: &[source],
                residual: None,
                gate: None,
                dst: &target,
                discard: false,
                between: widest,
                bytes_beside,
                extents,
                slice_bytes: first.slice_bytes(),
                whole_samples,
            };
            let whole = part(&host.undivided());
            // SAFETY: the views vouch for the host tensors.
            let done = unsafe {
                staging::run(device, &host, |slice| {
                    queue(layers.clone(), T::DTYPE, &whole, &part(slice))
                })
            };
            match done {
                Err(Error::DeviceMemory { .. }) if whole_samples => Ok(false),
                done => done.map(|()| true),
            }
        }
        Place::Cuda(_) => {
            let positions = checked_product("positions", &extents)?;
            let sizes = [positions, widest, size_of::<T>()];
            let half = checked_product("what lies between two layers", &sizes)?;
            let half = half.next_multiple_of(staging::ALIGNMENT);
            if half > 0 {
                device.check_capture("a sequence", "what lies between the layers")?;
            }
            // Given back in stream order; in a capture both are part of the graph.
            let memory = Buffer::new(device, "what lies between a sequence's layers", 2 * half)?;
            let at = At {
                extents: extents.map(|extent| extent as u64),
                src: on_device(&source),
                channels: source.channels,
                dst: on_device(&target),
                between: [memory.address(), memory.address() + half as u64],
            };
            let streams = [source.stream, target.stream].into_iter().flatten();
            first.ordered(streams, || queue(layers, T::DTYPE, &at, &at))?;
            Ok(true)
        }
    }
}

/// Of how many positions of a spatial axis one is computed, by all layers up to the first that needs
/// those of its source's neighbours, too: one that normalises over all of its own.
fn stride_of<'l>(layers: impl Iterator<Item = (&'l Layer, &'l LayerShape)>) -> usize {
    let mut stride = 1usize;
    for (layer, shape) in layers {
        stride = stride.saturating_mul(shape.stride);
        if layer.over_samples() {
            break;
        }
    }
    stride
}

/// Queues every layer at `at`, each as it would run on the whole.
fn queue<'l>(
    mut layers: impl Iterator<Item = (&'l Layer, &'l LayerShape)> + Clone,
    dtype: DType,
    whole: &At,
    at: &At,
) -> Result<()> {
    let (mut whole_src, mut src, mut channels) = (whole.src, at.src, at.channels);
    let (mut whole_extents, mut extents) = (whole.extents, at.extents);
    let mut between = [0, 1].into_iter().cycle();
    while let Some((layer, shape)) = layers.next() {
        let last = layers.clone().next().is_none();
        let (range, passed) = match &shape.partial {
            Some(range) => (range.clone(), channels - range.len()),
            None => (0..channels, 0),
        };
        let c_dst = passed + shape.c_out;
        let slot = between.next().unwrap_or(0);
        let next = |at: &At, extents: &[u64; 1 + MAX_SPATIAL]| match last {
            true => at.dst,
            false => at.src.dense_like(extents, c_dst as u64, at.between[slot]),
        };
        let (whole_dst, dst) = (next(whole, &whole_extents), next(at, &extents));
        let part = |extents, src: Tensor, dst: Tensor| {
            let skip = |tensor: Tensor| tensor.skip_channels(range.start, dtype);
            layer.part(extents, skip(src), skip(dst))
        };
        let choice = layer.choose(&part(whole_extents, whole_src, whole_dst));
        let _span = trace::enter(|| {
            let [n, spatial @ ..] = extents.map(|extent| extent as usize);
            let work = Work::new(shape, n, channels, spatial);
            Told::of(KERNELS[choice.kernel].name, &work, dtype.size())
        });
        layer.launch(choice, &part(extents, src, dst))?;
        for (from, count, to) in
            [(0, range.start, 0), (range.end, channels - range.end, range.start + shape.c_out)]
        {
            let source = (src.skip_channels(from, dtype), count_of("channels", count)?);
            let to = dst.skip_channels(to, dtype);
            // SAFETY: the caller's tensors, and memory for what lies between the layers.
            unsafe { launch::copy(layer.device(), dtype, &extents, source, to)? };
        }
        (whole_src, src, channels) = (whole_dst, dst, c_dst);
        if layer.over_samples() {
            let stride = stride_of(layers.clone());
            (whole_src, src) = (whole_src.subsampled(stride), src.subsampled(stride));
            for extents in [&mut whole_extents, &mut extents] {
                for extent in &mut extents[1..] {
                    *extent = extent.div_ceil(stride as u64);
                }
            }
        }
    }
    Ok(())
}
