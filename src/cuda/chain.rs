//! Layers one after another on one stream: what lies between them stays on the device.
//!
//! A kernel computes each position by itself, so the positions that a later layer's stride leaves
//! out are left out from the start.

use super::device::Buffer;
use super::launch::Tensor;
use super::layer::{Layer, on_device};
use super::staging::{self, HostCall, Slice};
use crate::error::{Error, Result};
use crate::problem::{DstShape, LayerShape, Operand, dst_shape, expect_shape, same_place};
use crate::tensor::{MAX_RANK, MAX_SPATIAL, Place, TensorMut, TensorRef, checked_product};

/// Where a chain runs: on whole tensors, or on a slice of them.
struct At {
    extents: [u64; 1 + MAX_SPATIAL],
    src: Tensor,
    dst: Tensor,
    /// Two pieces of memory that the layers alternate between.
    between: [u64; 2],
}

/// Runs layers of one device and stream, none of which takes a second tensor, as
/// [`Layer::run`] runs one.
///
/// # Errors
/// As [`Layer::run`]; [`Error::DeviceMemory`] if what lies between the layers does not fit;
/// [`Error::Unsupported`] while the stream is captured on a device without memory pools.
pub(crate) fn run<'l>(
    layers: impl Iterator<Item = (&'l Layer, &'l LayerShape)> + Clone,
    src: &TensorRef<'_>,
    dst: &TensorMut<'_>,
) -> Result<()> {
    let mut shape = None::<DstShape>;
    let (mut stride, mut widest) = (1usize, 0);
    for (_, layer) in layers.clone() {
        if shape.is_some() {
            // What goes into a layer that is not the first lies between two.
            widest = layer.c_in.max(widest);
        }
        let from = shape.as_ref().map_or(src.shape(), DstShape::as_slice);
        shape = Some(dst_shape(layer, from, std::iter::empty())?);
        stride = stride.saturating_mul(layer.stride);
    }
    let (Some((first, _)), Some(shape)) = (layers.clone().next(), shape) else { return Ok(()) };
    let device = first.device();
    expect_shape("dst", dst.shape(), shape.as_slice())?;
    if src.place() != Place::Host {
        same_place("src", first.place(), src.place())?;
    }
    same_place("dst", src.place(), dst.place())?;
    if dst.view().is_empty() {
        return Ok(());
    }

    let (source, target) = (Operand::new(src).subsampled(stride), Operand::new(dst.view()));
    let [d, h, w] = shape.spatial();
    let extents = [shape.as_slice()[0], d, h, w];
    let part = |slice: &Slice| At {
        extents: slice.extents,
        src: slice.src,
        dst: slice.dst,
        between: slice.between,
    };
    match src.place() {
        Place::Host => {
            let host = HostCall {
                src: &source,
                residual: None,
                dst: &target,
                between: widest,
                extents,
                slice_bytes: first.slice_bytes(),
            };
            let whole = part(&host.undivided());
            // SAFETY: the views vouch for the host tensors.
            unsafe {
                staging::run(device, &host, |slice| queue(layers.clone(), &whole, &part(slice)))
            }
        }
        Place::Cuda(_) => {
            let positions = checked_product("positions", &extents)?;
            let half = checked_product("what lies between two layers", &[positions, widest, 4])?;
            let half = half.next_multiple_of(staging::ALIGNMENT);
            if half > 0 && device.is_capturing()? && !device.has_pools() {
                return Err(Error::Unsupported {
                    device: device.to_string(),
                    what: "capturing a sequence in a graph: the device has no memory pools, from \
                           which the graph would take what lies between the layers"
                        .into(),
                });
            }
            // Given back in stream order; in a capture both are part of the graph.
            let memory = Buffer::new(device, "what lies between a sequence's layers", 2 * half)?;
            let at = At {
                extents: extents.map(|extent| extent as u64),
                src: on_device(&source),
                dst: on_device(&target),
                between: [memory.address(), memory.address() + half as u64],
            };
            first.ordered(&[source.stream, target.stream], || queue(layers, &at, &at))
        }
    }
}

/// Queues every layer at `at`, each as it would run on the whole.
fn queue<'l>(
    layers: impl Iterator<Item = (&'l Layer, &'l LayerShape)>,
    whole: &At,
    at: &At,
) -> Result<()> {
    let mut layers = layers.enumerate().peekable();
    let (mut whole_src, mut src) = (whole.src, at.src);
    while let Some((i, (layer, shape))) = layers.next() {
        let last = layers.peek().is_none();
        let next = |at: &At| match last {
            true => at.dst,
            false => between(at, shape.c_out, at.between[i % 2]),
        };
        let (whole_dst, dst) = (next(whole), next(at));
        let choice = layer.choose(&layer.part(whole.extents, whole_src, whole_dst));
        layer.launch(choice, &layer.part(at.extents, src, dst))?;
        (whole_src, src) = (whole_dst, dst);
    }
    Ok(())
}

/// A dense tensor with the axes in the order that they have in src.
fn between(at: &At, channels: usize, address: u64) -> Tensor {
    let [n, d, h, w] = at.extents.map(|extent| extent as i64);
    let [sample, along_d, along_h, along_w] = at.src.axes;
    // An axis that src has no stride for is the outermost, but for the channels, of which there is
    // one.
    let outer = |stride: i64| if stride == 0 { u64::MAX } else { stride.unsigned_abs() };
    let mut axes = [
        (outer(sample), n, 0),
        (at.src.channel.unsigned_abs(), channels as i64, 1),
        (outer(along_d), d, 2),
        (outer(along_h), h, 3),
        (outer(along_w), w, 4),
    ];
    axes.sort_by_key(|&(stride, ..)| stride);
    let (mut strides, mut next) = ([0; MAX_RANK], 1);
    for (_, len, axis) in axes {
        strides[axis] = next;
        next *= len;
    }
    let [sample, channel, d, h, w] = strides;
    Tensor { address, channel, axes: [sample, d, h, w] }
}
