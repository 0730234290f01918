//! One call of one layer, validated once: shapes checked, strides resolved to GEMM letters.
//!
//! Below this module a call is, per sample and group, `dst[row, p] = steps(Σ_k W[row, k] ·
//! src[k, p])` with `p` running over positions. How a tensor walks its positions is a
//! [`Positions`] per tensor.

use std::fmt;
use std::ops::Range;

use crate::alias::share_memory;
use crate::cost::Cost;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::stages::{NormOver, Stage};
use crate::tensor::{MAX_RANK, MAX_SPATIAL, Place, TensorMut, TensorRef, checked_product};

/// What a call needs to know of its layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerShape {
    /// Input channels of the convolution, over all groups.
    pub c_in: usize,
    /// Output channels of the convolution.
    pub c_out: usize,
    pub groups: usize,
    pub stride: usize,
    /// The channels of src that are convolved; the others pass through.
    pub partial: Option<Range<usize>>,
    pub residual: bool,
    pub gate: bool,
    /// Whether a normalisation mixes the positions of a sample.
    pub norm_over_all: bool,
}

impl LayerShape {
    /// The shape of a description that has been checked.
    pub(crate) fn new(layer: &Pointwise) -> Self {
        LayerShape {
            c_in: layer.c_in(),
            c_out: layer.c_out(),
            groups: layer.groups,
            stride: layer.stride,
            partial: layer.partial.clone(),
            residual: layer.has_residual(),
            gate: layer.has_gate(),
            norm_over_all: layer
                .stages
                .iter()
                .any(|stage| matches!(stage, Stage::LayerNorm(norm) if norm.over == NormOver::All)),
        }
    }

    /// Input channels per group.
    pub(crate) fn k(&self) -> usize {
        self.c_in / self.groups
    }
}

/// What a call computes, wherever its tensors lie.
pub(crate) struct Work {
    n: usize,
    c_in: usize,
    c_out: usize,
    groups: usize,
    spatial: [usize; MAX_SPATIAL],
    /// Channels that a partial convolution passes through.
    passed: usize,
    residual: bool,
    gate: bool,
}

impl Work {
    /// Of a call on a source of that many channels, whose result has these positions.
    #[cfg(feature = "cuda")]
    pub(crate) fn new(
        layer: &LayerShape,
        n: usize,
        src_channels: usize,
        spatial: [usize; MAX_SPATIAL],
    ) -> Self {
        let &LayerShape { c_in, c_out, groups, residual, gate, .. } = layer;
        let passed = match &layer.partial {
            Some(range) => src_channels - range.len(),
            None => 0,
        };
        Work { n, c_in, c_out, groups, spatial, passed, residual, gate }
    }

    fn k(&self) -> usize {
        self.c_in / self.groups
    }

    /// Multiply-accumulates of the convolution.
    pub(crate) fn macs(&self) -> usize {
        let sizes = self.spatial.iter().chain([&self.c_out]);
        sizes.fold(self.n.saturating_mul(self.k()), |product, &size| product.saturating_mul(size))
    }

    /// What must be done and moved, for a layer with that many parameters, of elements of this size.
    pub(crate) fn cost(&self, parameters: usize, size: usize) -> Cost {
        let outputs = self.spatial.iter().fold(self.n, |n, &len| n.saturating_mul(len));
        let bytes = |channels: usize| outputs.saturating_mul(channels).saturating_mul(size);
        let gated = if self.gate { self.c_in } else { 0 };
        let gate = self.n.saturating_mul(gated).saturating_mul(size);
        Cost {
            parameters,
            macs: self.macs(),
            src_bytes: bytes(self.c_in + self.passed).saturating_add(gate),
            weight_bytes: self.c_out * (self.k() * size + size_of::<f32>()),
            dst_bytes: bytes(self.c_out + self.passed),
            residual_bytes: if self.residual { bytes(self.c_out) } else { 0 },
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [d, h, w] = self.spatial;
        write!(f, "n {}, {} -> {} channels, ", self.n, self.c_in, self.c_out)?;
        match (d, h) {
            (1, 1) => write!(f, "{w} positions")?,
            (1, _) => write!(f, "{h}x{w} positions")?,
            _ => write!(f, "{d}x{h}x{w} positions")?,
        }
        if self.groups > 1 {
            write!(f, ", {} groups", self.groups)?;
        }
        Ok(())
    }
}

/// The tensors of one call.
pub(crate) struct Operands<'a, T = f32> {
    pub src: TensorRef<'a, T>,
    /// Further sources of a concatenation.
    pub more: &'a [TensorRef<'a, T>],
    pub residual: Option<TensorRef<'a, T>>,
    pub gate: Option<TensorRef<'a, T>>,
}

/// The shape of a result, inline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DstShape {
    rank: usize,
    shape: [usize; MAX_RANK],
}

impl DstShape {
    pub(crate) fn as_slice(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// With ones beyond the rank.
    pub(crate) fn padded(&self) -> [usize; MAX_RANK] {
        self.shape
    }

    /// The spatial axes, padded in front with 1.
    pub(crate) fn spatial(&self) -> [usize; MAX_SPATIAL] {
        spatial(self.as_slice(), 1)
    }
}

/// One tensor of a call as the kernels see it: element strides, spatial axes padded in front.
#[derive(Debug)]
pub(crate) struct Operand<T = f32> {
    pub ptr: *const T,
    pub sample: isize,
    pub channel: isize,
    pub channels: usize,
    pub spatial: [isize; MAX_SPATIAL],
    /// The CUDA stream in whose order the elements are used, where it is known.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub stream: Option<usize>,
}

impl<T> Clone for Operand<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Operand<T> {}

impl<T> Operand<T> {
    pub(crate) fn new(tensor: &TensorRef<'_, T>) -> Self {
        let strides = tensor.strides();
        Operand {
            ptr: tensor.as_ptr(),
            sample: strides[0],
            channel: strides[1],
            channels: tensor.shape()[1],
            spatial: spatial(strides, 0),
            stream: tensor.stream(),
        }
    }

    /// Some of its channels.
    fn cut(self, channels: Range<usize>) -> Self {
        let first = self.channel.wrapping_mul(channels.start as isize);
        Operand { ptr: self.ptr.wrapping_offset(first), channels: channels.len(), ..self }
    }

    /// Every `s`-th position of each spatial axis.
    pub(crate) fn subsampled(self, s: usize) -> Self {
        Operand { spatial: self.spatial.map(|stride| stride.wrapping_mul(s as isize)), ..self }
    }
}

/// What `[n, c, …spatial]` has of each spatial axis, padded in front.
pub(crate) fn spatial<T: Copy>(axes: &[T], padding: T) -> [T; MAX_SPATIAL] {
    let missing = MAX_RANK - axes.len();
    std::array::from_fn(|i| if i < missing { padding } else { axes[2 + i - missing] })
}

/// A validated call.
#[derive(Clone)]
pub(crate) struct Problem<'a, T = f32> {
    pub n: usize,
    pub c_in: usize,
    pub c_out: usize,
    pub groups: usize,
    /// Positions of dst along each spatial axis, padded in front with 1.
    pub spatial: [usize; MAX_SPATIAL],
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the CPU has one place"))]
    pub place: Place,
    /// The convolved sources, subsampled by the stride: see [`sources`](Self::sources).
    src: TensorRef<'a, T>,
    more: &'a [TensorRef<'a, T>],
    stride: usize,
    partial: Option<Range<usize>>,
    /// `ptr` is written through; its channels are the convolution's rows after the map.
    pub dst: Operand<T>,
    /// Its channels are aligned with dst's.
    pub residual: Option<Operand<T>>,
    /// `[n, c_in]`, and any further axes of length 1.
    pub gate: Option<Operand<T>>,
}

impl<'a, T: Element> Problem<'a, T> {
    /// Checks a call against its layer.
    ///
    /// # Errors
    /// Whatever does not fit: ranks, shapes, channels, missing or superfluous tensors, places,
    /// aliasing.
    pub(crate) fn new(
        layer: &LayerShape,
        operands: &Operands<'a, T>,
        dst: &mut TensorMut<'_, T>,
    ) -> Result<Self> {
        let problem = Self::reading(layer, operands, "dst", dst.view())?;
        let optional = [("residual", &operands.residual), ("gate", &operands.gate)];
        let optional = optional.into_iter().filter_map(|(name, t)| Some((name, t.as_ref()?)));
        let sources = std::iter::once(&operands.src).chain(operands.more);
        for (tensor, view) in sources.map(|source| ("src", source)).chain(optional) {
            if share_memory(view, dst.view()) {
                return Err(Error::Aliased { written: "dst", tensor });
            }
        }
        Ok(problem)
    }

    /// As [`new`](Self::new), for a tensor of dst's shape that is read too: the gradient by it.
    ///
    /// # Errors
    /// As there, but for aliasing.
    pub(crate) fn reading(
        layer: &LayerShape,
        operands: &Operands<'a, T>,
        name: &'static str,
        dst: &TensorRef<'_, T>,
    ) -> Result<Self> {
        let expected =
            dst_shape(layer, operands.src.shape(), operands.more.iter().map(TensorRef::shape))?;
        expect_shape(name, dst.shape(), expected.as_slice())?;
        let place = operands.src.place();
        let rest = operands.more.iter().map(|t| ("src", t));
        let residual = present("residual", layer.residual, &operands.residual)?;
        let gate = present("gate", layer.gate, &operands.gate)?;
        let optional =
            residual.map(|t| ("residual", t)).into_iter().chain(gate.map(|t| ("gate", t)));
        let read = std::iter::once(("src", &operands.src)).chain(rest).chain(optional);
        for (tensor, view) in read {
            same_place(tensor, place, view.place())?;
        }
        same_place(name, place, dst.place())?;
        if let Some(residual) = residual {
            expect_shape("residual", residual.shape(), expected.as_slice())?;
        }
        let n = expected.shape[0];
        if let Some(gate) = gate {
            expect_shape("gate", without_trailing_ones(gate.shape()), &[n, layer.c_in])?;
        }

        let convolved = layer.partial.as_ref().map_or(0, |range| range.start);
        let cut = |t: &TensorRef<'_, T>| Operand::new(t).cut(convolved..convolved + layer.c_out);
        Ok(Problem {
            n,
            c_in: layer.c_in,
            c_out: layer.c_out,
            groups: layer.groups,
            spatial: expected.spatial(),
            place,
            src: operands.src,
            more: operands.more,
            stride: layer.stride,
            partial: layer.partial.clone(),
            dst: cut(dst),
            residual: residual.map(cut),
            // Axes of length 1 may have any stride.
            gate: gate.map(|t| Operand { spatial: [0; MAX_SPATIAL], ..Operand::new(t) }),
        })
    }

    /// Of every how many positions of a spatial axis of src one is kept.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// The CUDA streams of its tensors, as far as they are known.
    #[cfg(feature = "cuda")]
    pub(crate) fn streams(&self) -> impl Iterator<Item = usize> + Clone + '_ {
        let beside = [self.dst.stream].into_iter();
        let optional = [&self.residual, &self.gate].into_iter().flatten();
        let beside = beside.chain(optional.map(|operand| operand.stream));
        self.all_sources().map(|source| source.stream()).chain(beside).flatten()
    }

    /// Positions of one sample.
    pub(crate) fn positions(&self) -> usize {
        self.spatial.iter().product()
    }

    /// Input channels per group.
    pub(crate) fn k(&self) -> usize {
        self.c_in / self.groups
    }

    /// Multiply-accumulates of the convolution.
    pub(crate) fn macs(&self) -> usize {
        self.work().macs()
    }

    pub(crate) fn work(&self) -> Work {
        Work {
            n: self.n,
            c_in: self.c_in,
            c_out: self.c_out,
            groups: self.groups,
            spatial: self.spatial,
            passed: self.passed_channels(),
            residual: self.residual.is_some(),
            gate: self.gate.is_some(),
        }
    }

    /// What the call must do and move, for a layer with that many parameters.
    pub(crate) fn cost(&self, parameters: usize) -> Cost {
        self.work().cost(parameters, size_of::<T>())
    }

    /// The sources, subsampled; of a partial convolution only the channels that are convolved.
    /// Empty ones are left out.
    pub(crate) fn sources(&self) -> impl Iterator<Item = Operand<T>> + '_ {
        let (start, end) = match &self.partial {
            Some(range) => (range.start, range.end),
            None => (0, self.c_in),
        };
        self.source_ranges(start, end)
    }

    /// How many channels of a partial convolution pass through.
    pub(crate) fn passed_channels(&self) -> usize {
        match &self.partial {
            Some(range) => self.src_channels() - range.len(),
            None => 0,
        }
    }

    fn src_channels(&self) -> usize {
        self.all_sources().map(|t| t.shape()[1]).sum()
    }

    /// The parts of a partial convolution that pass through: pairs of a source range and the dst
    /// operand that receives it.
    pub(crate) fn passed_through(&self) -> impl Iterator<Item = (Operand<T>, Operand<T>)> + '_ {
        let total = self.src_channels();
        let (start, end) =
            self.partial.as_ref().map_or((0, total), |range| (range.start, range.end));
        // dst's channels move by what the convolution adds or takes away.
        let ranges = [(0, start, -(start as isize)), (end, total, self.c_out as isize)];
        ranges.into_iter().flat_map(move |(from, to, first)| {
            let mut channel = first;
            self.source_ranges(from, to).map(move |src| {
                let ptr = self.dst.ptr.wrapping_offset(channel.wrapping_mul(self.dst.channel));
                channel += src.channels as isize;
                (src, Operand { ptr, channels: src.channels, ..self.dst })
            })
        })
    }

    fn all_sources(&self) -> impl Iterator<Item = &TensorRef<'a, T>> + Clone {
        std::iter::once(&self.src).chain(self.more)
    }

    fn source_ranges(&self, start: usize, end: usize) -> impl Iterator<Item = Operand<T>> + '_ {
        let mut first = 0;
        self.all_sources().filter_map(move |tensor| {
            let channels = tensor.shape()[1];
            let (lo, hi) = (start.max(first), end.min(first + channels));
            let range = lo.saturating_sub(first)..hi.saturating_sub(first);
            first += channels;
            (lo < hi).then(|| Operand::new(tensor).cut(range).subsampled(self.stride))
        })
    }

    /// How an operand walks the positions of one sample, or of all samples at once.
    pub(crate) fn walk(&self, operand: &Operand<T>, with_batch: bool) -> Positions {
        let mut axes = [(self.n, operand.sample); 1 + MAX_SPATIAL];
        for (axis, slot) in axes[1..].iter_mut().enumerate() {
            *slot = (self.spatial[axis], operand.spatial[axis]);
        }
        Positions::new(if with_batch { &axes } else { &axes[1..] })
    }
}

/// `n 1, 64 -> 256 channels, 56x56 positions`, with groups where there are any.
/// `[n, c]` of `[n, c, 1, …]`, the shape that a pooled map has in PyTorch.
pub(crate) fn without_trailing_ones(shape: &[usize]) -> &[usize] {
    match shape.split_at_checked(2) {
        Some((shape, rest)) if rest.iter().all(|&len| len == 1) => shape,
        _ => shape,
    }
}

fn present<'t, 'a, T>(
    input: &'static str,
    wanted: bool,
    tensor: &'t Option<TensorRef<'a, T>>,
) -> Result<Option<&'t TensorRef<'a, T>>> {
    match (wanted, tensor) {
        (true, None) => Err(Error::MissingInput { input }),
        (false, Some(_)) => Err(Error::UnexpectedInput { input }),
        (_, tensor) => Ok(tensor.as_ref()),
    }
}

pub(crate) fn same_place(tensor: &'static str, expected: Place, got: Place) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::WrongDevice { tensor, expected: expected.to_string(), got: got.to_string() })
    }
}

pub(crate) fn expect_shape(tensor: &'static str, got: &[usize], expected: &[usize]) -> Result<()> {
    if got == expected {
        Ok(())
    } else {
        Err(Error::Shape { tensor, expected: expected.to_vec(), got: got.to_vec() })
    }
}

/// The shape of the result for sources of these shapes.
///
/// # Errors
/// If the shapes do not agree with each other or with the layer, or a size overflows.
pub(crate) fn dst_shape<'s>(
    layer: &LayerShape,
    src: &[usize],
    more: impl Iterator<Item = &'s [usize]>,
) -> Result<DstShape> {
    let rank = src.len();
    if !(2..=MAX_RANK).contains(&rank) {
        return Err(Error::Rank {
            tensor: "src",
            expected: "2 ([n, c]) to 5 ([n, c, d, h, w])",
            got: rank,
        });
    }
    checked_product("src", src)?;
    let mut channels = src[1];
    for other in more {
        if other.len() != rank || other[0] != src[0] || other[2..] != src[2..] {
            let mut expected = src.to_vec();
            if other.len() == rank {
                expected[1] = other[1];
            }
            let tensor = "a further source of the concatenation";
            return Err(Error::Shape { tensor, expected, got: other.to_vec() });
        }
        channels = channels.checked_add(other[1]).ok_or_else(|| Error::TooLarge {
            what: "the concatenation's channels",
            sizes: vec![channels, other[1]],
        })?;
    }
    if channels == 0 {
        return Err(Error::NoChannels { tensor: "src", shape: src.to_vec() });
    }
    let passed = match &layer.partial {
        Some(range) if range.end > channels => {
            return Err(Error::PartialRange {
                start: range.start,
                end: range.end,
                reason: format!("src has {channels} channels"),
            });
        }
        Some(range) => channels - (range.end - range.start),
        None if channels != layer.c_in => {
            return Err(Error::Channels { weight: layer.k(), src: channels, groups: layer.groups });
        }
        None => 0,
    };
    let mut shape = [1; MAX_RANK];
    shape[0] = src[0];
    shape[1] = passed.checked_add(layer.c_out).ok_or_else(|| Error::TooLarge {
        what: "dst's channels",
        sizes: vec![passed, layer.c_out],
    })?;
    for axis in 2..rank {
        shape[axis] = src[axis].div_ceil(layer.stride);
    }
    checked_product("dst", &shape[..rank])?;
    Ok(DstShape { rank, shape })
}

/// The element offset of each position of a tensor, axes that lie behind one another merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Positions {
    rank: usize,
    /// Outermost first; `(1, 0)` beyond `rank`.
    axes: [(usize, isize); 1 + MAX_SPATIAL],
}

impl Positions {
    pub(crate) fn new(axes: &[(usize, isize)]) -> Self {
        let mut merged = Positions { rank: 0, axes: [(1, 0); 1 + MAX_SPATIAL] };
        for &(len, stride) in axes.iter().filter(|&&(len, _)| len != 1) {
            match merged.axes[..merged.rank].last_mut() {
                Some((outer, step)) if *step == stride.wrapping_mul(len as isize) => {
                    *outer *= len;
                    *step = stride;
                }
                _ => {
                    merged.axes[merged.rank] = (len, stride);
                    merged.rank += 1;
                }
            }
        }
        merged
    }

    /// The stride between neighbouring positions, if it is the same everywhere.
    pub(crate) fn uniform(&self) -> Option<isize> {
        match self.rank {
            0 => Some(1),
            1 => Some(self.axes[0].1),
            _ => None,
        }
    }

    /// The offset of position `p`.
    pub(crate) fn offset(&self, mut p: usize) -> isize {
        let mut offset = 0;
        for &(len, stride) in self.axes[..self.rank].iter().rev() {
            offset += (p % len) as isize * stride;
            p /= len;
        }
        offset
    }

    /// Positions `first..first + count` as runs of evenly spaced ones: offset of the first,
    /// distance, number.
    pub(crate) fn runs(
        &self,
        first: usize,
        count: usize,
    ) -> impl Iterator<Item = (isize, isize, usize)> {
        let (inner, stride) = match self.rank {
            0 => (count.max(1), 0),
            rank => {
                // Of an empty axis no run is asked for.
                let (len, stride) = self.axes[rank - 1];
                (len.max(1), stride)
            }
        };
        let outer = Positions { rank: self.rank.saturating_sub(1), axes: self.axes };
        let mut next = first;
        std::iter::from_fn(move || {
            let (row, column) = (next / inner, next % inner);
            let len = (first + count - next).min(inner - column);
            next += len;
            (len > 0).then(|| (outer.offset(row) + column as isize * stride, stride, len))
        })
    }

    /// The offsets of positions `first..`, one per element of `offsets`, relative to `base`.
    pub(crate) fn fill(&self, first: usize, base: isize, offsets: &mut [isize]) {
        let Some((&(inner, stride), outer)) = self.axes[..self.rank].split_last() else {
            offsets.fill(-base);
            return;
        };
        let outer = Positions { rank: outer.len(), axes: self.axes };
        let (mut row, mut column) = (first / inner, first % inner);
        let mut rest = offsets;
        while !rest.is_empty() {
            let run = rest.len().min(inner - column);
            let (now, later) = rest.split_at_mut(run);
            let start = outer.offset(row) + column as isize * stride - base;
            for (i, offset) in now.iter_mut().enumerate() {
                *offset = start + i as isize * stride;
            }
            rest = later;
            row += 1;
            column = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_behind_one_another_merge() {
        assert_eq!(Positions::new(&[(4, 30), (5, 6), (6, 1)]).uniform(), Some(1));
        assert_eq!(Positions::new(&[(4, 30), (1, 999), (5, 6)]).uniform(), Some(6));
        assert_eq!(Positions::new(&[(5, 7), (6, 1)]).uniform(), None);
        assert_eq!(Positions::new(&[(3, -4), (4, -1)]).uniform(), Some(-1));
        assert_eq!(Positions::new(&[(1, 5), (1, 7)]).uniform(), Some(1));
    }

    #[test]
    fn offsets_follow_the_strides() {
        let positions = Positions::new(&[(2, 100), (3, 20), (4, 2)]);
        let expected: Vec<isize> =
            (0..24).map(|p| (p / 12 * 100 + p / 4 % 3 * 20 + p % 4 * 2) as isize).collect();
        assert!((0..24).all(|p| positions.offset(p) == expected[p]));
        for first in 0..24 {
            let mut offsets = vec![0; 24 - first];
            positions.fill(first, 7, &mut offsets);
            let runs = positions.runs(first, 24 - first).flat_map(|(offset, stride, len)| {
                (0..len as isize).map(move |i| offset + i * stride)
            });
            assert_eq!(runs.collect::<Vec<_>>(), expected[first..], "from {first}");
            let shifted: Vec<isize> = expected[first..].iter().map(|o| o - 7).collect();
            assert_eq!(offsets, shifted, "from {first}");
        }
    }
}
