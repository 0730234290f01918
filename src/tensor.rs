//! Borrowed, strided views: what every call is made of.
//!
//! Logical axes are always `[n, c, …spatial]`; layout is strides, in elements. ndarray arrays and
//! views convert by themselves; other containers (candle, ort, a C caller) go through
//! [`TensorRef::from_slice`] or [`TensorRef::from_raw_parts`].

use std::fmt;
use std::marker::PhantomData;

use ndarray::{
    Array, ArrayBase, ArrayRef, ArrayView, Data, DataMut, Dimension, IxDyn, ShapeBuilder,
};

use crate::dtype::Element;
use crate::error::{Error, Result};

/// The largest rank: `[n, c, d, h, w]`.
pub(crate) const MAX_RANK: usize = 5;
/// The largest spatial rank.
pub(crate) const MAX_SPATIAL: usize = MAX_RANK - 2;

/// Where a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// Ordinary memory.
    Host,
    /// Memory of the CUDA device with this ordinal.
    Cuda(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Host => f.write_str("the host"),
            Place::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Shape and strides of rank 2 to 5, held inline so that a view allocates nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Extents {
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [isize; MAX_RANK],
}

impl Extents {
    fn new(tensor: &'static str, shape: &[usize], strides: &[isize]) -> Result<Self> {
        let rank = shape.len();
        if !(2..=MAX_RANK).contains(&rank) {
            return Err(Error::Rank {
                tensor,
                expected: "2 ([n, c]) to 5 ([n, c, d, h, w])",
                got: rank,
            });
        }
        if strides.len() != rank {
            return Err(Error::StrideCount {
                tensor,
                shape: shape.to_vec(),
                strides: strides.to_vec(),
            });
        }
        checked_product("a tensor's size", shape)?;
        // Not slice by slice, which is a call for a few words.
        let shape = std::array::from_fn(|axis| shape.get(axis).copied().unwrap_or(1));
        let strides = std::array::from_fn(|axis| strides.get(axis).copied().unwrap_or(0));
        Ok(Extents { rank, shape, strides })
    }

    fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    fn strides(&self) -> &[isize] {
        &self.strides[..self.rank]
    }

    fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }

    /// The lowest and highest element offset that is reached, `None` when it overflows.
    fn reach(&self) -> Option<(isize, isize)> {
        if self.is_empty() {
            return Some((0, 0));
        }
        let (mut first, mut last) = (0isize, 0isize);
        for (&len, &stride) in self.shape().iter().zip(self.strides()) {
            let span = isize::try_from(len - 1).ok()?.checked_mul(stride)?;
            if span < 0 {
                first = first.checked_add(span)?;
            } else {
                last = last.checked_add(span)?;
            }
        }
        Some((first, last))
    }

    fn check_bounds(&self, tensor: &'static str, len: usize, offset: usize) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let (first, last) = self
            .reach()
            .and_then(|(first, last)| {
                let offset = isize::try_from(offset).ok()?;
                Some((first.checked_add(offset)?, last.checked_add(offset)?))
            })
            .ok_or_else(|| Error::TooLarge {
                what: "a tensor's reach",
                sizes: self.shape().to_vec(),
            })?;
        if first < 0 || last as usize >= len {
            return Err(Error::OutOfBounds {
                tensor,
                shape: self.shape().to_vec(),
                strides: self.strides().to_vec(),
                first,
                last,
                len,
            });
        }
        Ok(())
    }

    /// Whether two positions may share an element. Strides that nest (each at least the reach of
    /// all smaller ones) do not; any others are taken to overlap.
    fn overlaps(&self) -> bool {
        if self.is_empty() {
            return false;
        }
        // The axes that count, the smallest stride first.
        let mut axes = [(0usize, 1usize); MAX_RANK];
        let mut count = 0;
        for (&len, stride) in self.shape().iter().zip(self.strides()).filter(|(len, _)| **len > 1) {
            let stride = stride.unsigned_abs();
            let mut at = count;
            while at > 0 && axes[at - 1].0 > stride {
                axes[at] = axes[at - 1];
                at -= 1;
            }
            axes[at] = (stride, len);
            count += 1;
        }
        let mut reach = 0usize;
        for &(stride, len) in &axes[..count] {
            if stride <= reach {
                return true;
            }
            reach = reach.saturating_add(stride.saturating_mul(len - 1));
        }
        false
    }
}

/// A borrowed tensor `[n, c, …spatial]` to read: pointer, shape and strides in elements, on the
/// host or on a CUDA device.
pub struct TensorRef<'a, T = f32> {
    ptr: *const T,
    place: Place,
    extents: Extents,
    /// The CUDA stream in whose order the elements are used, as a raw handle, where it is known.
    stream: Option<usize>,
    lifetime: PhantomData<&'a T>,
}

impl<T> Clone for TensorRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for TensorRef<'_, T> {}

// SAFETY: a shared borrow of plain elements, as `&[T]` is.
unsafe impl<T: Sync> Send for TensorRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for TensorRef<'_, T> {}

impl<'a, T> TensorRef<'a, T> {
    /// Lays a shape and strides (in elements, any sign) over a host slice; element `[0, …, 0]` is
    /// `data[offset]`.
    ///
    /// # Errors
    /// [`Error::Rank`] unless there are 2 to 5 axes and as many strides, [`Error::TooLarge`] if
    /// the size overflows, [`Error::OutOfBounds`] if an element lies outside `data`.
    pub fn from_slice(
        data: &'a [T],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        // SAFETY: a slice that is borrowed for `'a`.
        unsafe { Self::within(data.as_ptr(), data.len(), offset, Place::Host, shape, strides) }
    }

    /// A view within `len` elements from `first` on.
    ///
    /// # Safety
    /// As [`from_raw_parts`](Self::from_raw_parts), for these elements.
    ///
    /// # Errors
    /// As [`from_slice`](Self::from_slice).
    pub(crate) unsafe fn within(
        first: *const T,
        len: usize,
        offset: usize,
        place: Place,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let extents = Extents::new("tensor", shape, strides)?;
        extents.check_bounds("tensor", len, offset)?;
        let ptr = first.wrapping_add(offset);
        Ok(Self { ptr, place, extents, stream: None, lifetime: PhantomData })
    }

    /// A view from a pointer to element `[0, …, 0]`.
    ///
    /// # Safety
    /// Every element that shape and strides reach must be readable at `place` for `'a`, and
    /// nobody may write to it during that time (on a device: in stream order).
    ///
    /// # Errors
    /// [`Error::Rank`] unless there are 2 to 5 axes and as many strides, [`Error::TooLarge`] if
    /// the size overflows, [`Error::Misaligned`] if `ptr` is no multiple of an element's alignment.
    pub unsafe fn from_raw_parts(
        ptr: *const T,
        place: Place,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let extents = Extents::new("tensor", shape, strides)?;
        check_alignment("tensor", ptr, &extents)?;
        Ok(Self { ptr, place, extents, stream: None, lifetime: PhantomData })
    }

    /// The length of each axis, `[n, c, …spatial]`.
    pub fn shape(&self) -> &[usize] {
        self.extents.shape()
    }

    /// The stride of each axis, in elements.
    pub fn strides(&self) -> &[isize] {
        self.extents.strides()
    }

    /// Where the elements are.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The address of element `[0, …, 0]`; a device address where [`place`](Self::place) says so.
    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    /// This view of memory that is used in the order of a CUDA stream.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_stream(mut self, stream: usize) -> Self {
        self.stream = Some(stream);
        self
    }

    pub(crate) fn stream(&self) -> Option<usize> {
        self.stream
    }

    /// The same elements as another type.
    ///
    /// # Safety
    /// It has the same size and alignment, and any bits are valid in it.
    pub(crate) unsafe fn cast<B>(&self) -> TensorRef<'a, B> {
        let TensorRef { ptr, place, extents, stream, .. } = *self;
        TensorRef { ptr: ptr.cast(), place, extents, stream, lifetime: PhantomData }
    }

    pub(crate) fn rank(&self) -> usize {
        self.extents.rank
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// The lowest and highest element offset that is reached, `None` when it overflows.
    pub(crate) fn reach(&self) -> Option<(isize, isize)> {
        self.extents.reach()
    }

    /// This view with its channel axis cut down to `start..end`.
    pub(crate) fn channels(mut self, start: usize, end: usize) -> Self {
        debug_assert!(start <= end && end <= self.extents.shape[1]);
        self.ptr = self.ptr.wrapping_offset(self.extents.strides[1].wrapping_mul(start as isize));
        self.extents.shape[1] = end - start;
        self
    }
}

impl<T> fmt::Debug for TensorRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorRef({:?}, strides {:?}, {})", self.shape(), self.strides(), self.place)
    }
}

/// A borrowed tensor `[n, c, …spatial]` to write: as [`TensorRef`], with positions that do not
/// overlap.
pub struct TensorMut<'a, T = f32> {
    view: TensorRef<'a, T>,
    exclusive: PhantomData<&'a mut T>,
}

// SAFETY: an exclusive borrow of plain elements, as `&mut [T]` is.
unsafe impl<T: Send> Send for TensorMut<'_, T> {}

impl<'a, T> TensorMut<'a, T> {
    /// Lays a shape and strides (in elements, any sign) over a host slice; element `[0, …, 0]` is
    /// `data[offset]`.
    ///
    /// # Errors
    /// As [`TensorRef::from_slice`], and [`Error::Overlap`] if two positions share an element.
    pub fn from_slice(
        data: &'a mut [T],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let len = data.len();
        // SAFETY: a slice that is exclusively borrowed for `'a`.
        unsafe { Self::within(data.as_mut_ptr(), len, offset, Place::Host, shape, strides) }
    }

    /// A view within `len` elements from `first` on.
    ///
    /// # Safety
    /// As [`from_raw_parts`](Self::from_raw_parts), for these elements.
    ///
    /// # Errors
    /// As [`from_slice`](Self::from_slice).
    pub(crate) unsafe fn within(
        first: *mut T,
        len: usize,
        offset: usize,
        place: Place,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let extents = Extents::new("dst", shape, strides)?;
        extents.check_bounds("dst", len, offset)?;
        // SAFETY: in bounds of what the caller vouches for.
        unsafe { Self::from_raw_parts(first.wrapping_add(offset), place, shape, strides) }
    }

    /// A view from a pointer to element `[0, …, 0]`.
    ///
    /// # Safety
    /// Every element that shape and strides reach must be writable at `place` for `'a`, and
    /// nobody else may use it during that time (on a device: in stream order).
    ///
    /// # Errors
    /// As [`TensorRef::from_raw_parts`], and [`Error::Overlap`] if two positions share an element.
    pub unsafe fn from_raw_parts(
        ptr: *mut T,
        place: Place,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let extents = Extents::new("dst", shape, strides)?;
        check_alignment("dst", ptr, &extents)?;
        if extents.overlaps() {
            return Err(Error::Overlap {
                tensor: "dst",
                shape: shape.to_vec(),
                strides: strides.to_vec(),
            });
        }
        let view = TensorRef {
            ptr: ptr.cast_const(),
            place,
            extents,
            stream: None,
            lifetime: PhantomData,
        };
        Ok(Self { view, exclusive: PhantomData })
    }

    /// The length of each axis, `[n, c, …spatial]`.
    pub fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    /// The stride of each axis, in elements.
    pub fn strides(&self) -> &[isize] {
        self.view.strides()
    }

    /// Where the elements are.
    pub fn place(&self) -> Place {
        self.view.place()
    }

    /// The address of element `[0, …, 0]`; a device address where [`place`](Self::place) says so.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.view.ptr.cast_mut()
    }

    /// As [`TensorRef::cast`].
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn cast<B>(self) -> TensorMut<'a, B> {
        // SAFETY: the caller's promise.
        TensorMut { view: unsafe { self.view.cast() }, exclusive: PhantomData }
    }

    /// This tensor for a shorter time.
    pub fn reborrow(&mut self) -> TensorMut<'_, T> {
        TensorMut { view: self.view, exclusive: PhantomData }
    }

    /// As [`TensorRef::on_stream`].
    #[cfg(feature = "cuda")]
    pub(crate) fn on_stream(mut self, stream: usize) -> Self {
        self.view = self.view.on_stream(stream);
        self
    }

    /// This view with its channel axis cut down to `start..end`.
    #[cfg(feature = "cuda")]
    pub(crate) fn channels(mut self, start: usize, end: usize) -> Self {
        self.view = self.view.channels(start, end);
        self
    }

    /// The same elements as a view to read, for the arithmetic on shapes and addresses.
    pub(crate) fn view(&self) -> &TensorRef<'a, T> {
        &self.view
    }
}

impl<T> fmt::Debug for TensorMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorMut({:?}, strides {:?}, {})", self.shape(), self.strides(), self.place())
    }
}

/// No more than the type asks for: kernels take vectors only where a tensor's address allows them.
fn check_alignment<T>(tensor: &'static str, ptr: *const T, extents: &Extents) -> Result<()> {
    let (address, alignment) = (ptr.addr(), align_of::<T>());
    if address.is_multiple_of(alignment) || extents.is_empty() {
        return Ok(());
    }
    Err(Error::Misaligned { tensor, address, alignment })
}

/// A tensor that a layer can read.
pub trait AsTensor<T = f32> {
    /// The elements as a borrowed view with axes `[n, c, …spatial]`.
    ///
    /// # Errors
    /// [`Error::Rank`] unless there are 2 to 5 axes.
    fn as_tensor(&self) -> Result<TensorRef<'_, T>>;
}

/// A tensor that a layer can write.
pub trait AsTensorMut<T = f32> {
    /// The elements as an exclusively borrowed view with axes `[n, c, …spatial]`.
    ///
    /// # Errors
    /// [`Error::Rank`] unless there are 2 to 5 axes, [`Error::Overlap`] if positions overlap.
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_, T>>;
}

/// A tensor that also says what a result computed from it is: `Array4` in, `Array4` out.
pub trait Source<T = f32>: AsTensor<T> {
    /// The result's type.
    type Output: AsTensorMut<T>;

    /// A result of this shape in the memory order of `self`; its contents are unspecified.
    ///
    /// The order is that of the strides. Where they cannot tell (one channel, one position), a
    /// channel stride of 1 is taken for channels last.
    ///
    /// # Errors
    /// [`Error::Rank`] unless `shape` has as many axes as `self`, [`Error::TooLarge`] if the size
    /// overflows or memory does not hold it; a device's own errors.
    fn allocate(&self, shape: &[usize]) -> Result<Self::Output>;
}

impl<T, D: Dimension> AsTensor<T> for ArrayRef<T, D> {
    fn as_tensor(&self) -> Result<TensorRef<'_, T>> {
        // SAFETY: an array's own pointer, shape and strides, borrowed with it.
        unsafe {
            TensorRef::from_raw_parts(self.as_ptr(), Place::Host, self.shape(), self.strides())
        }
    }
}

impl<T, D: Dimension> AsTensorMut<T> for ArrayRef<T, D> {
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_, T>> {
        let ptr = self.as_mut_ptr();
        // SAFETY: as above, exclusively.
        unsafe { TensorMut::from_raw_parts(ptr, Place::Host, self.shape(), self.strides()) }
    }
}

impl<T: Element, D: Dimension> Source<T> for ArrayRef<T, D> {
    type Output = Array<T, D>;

    fn allocate(&self, shape: &[usize]) -> Result<Self::Output> {
        allocate_like(self.as_tensor()?, shape)
    }
}

impl<T, S: Data<Elem = T>, D: Dimension> AsTensor<T> for ArrayBase<S, D> {
    fn as_tensor(&self) -> Result<TensorRef<'_, T>> {
        (**self).as_tensor()
    }
}

impl<T, S: DataMut<Elem = T>, D: Dimension> AsTensorMut<T> for ArrayBase<S, D> {
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_, T>> {
        (**self).as_tensor_mut()
    }
}

impl<T: Element, S: Data<Elem = T>, D: Dimension> Source<T> for ArrayBase<S, D> {
    type Output = Array<T, D>;

    fn allocate(&self, shape: &[usize]) -> Result<Self::Output> {
        (**self).allocate(shape)
    }
}

impl<T> AsTensor<T> for TensorRef<'_, T> {
    fn as_tensor(&self) -> Result<TensorRef<'_, T>> {
        Ok(*self)
    }
}

impl<T> AsTensorMut<T> for TensorMut<'_, T> {
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_, T>> {
        Ok(self.reborrow())
    }
}

/// A host view gives an array of dynamic rank; a device view has no owner to allocate for it.
impl<T: Element> Source<T> for TensorRef<'_, T> {
    type Output = Array<T, IxDyn>;

    fn allocate(&self, shape: &[usize]) -> Result<Self::Output> {
        if let Place::Cuda(_) = self.place {
            return Err(Error::Unsupported {
                device: self.place.to_string(),
                what: "allocating a result for a raw view; use forward_into".into(),
            });
        }
        allocate_like(*self, shape)
    }
}

impl<T, S: AsTensor<T> + ?Sized> AsTensor<T> for &S {
    fn as_tensor(&self) -> Result<TensorRef<'_, T>> {
        (**self).as_tensor()
    }
}

impl<T, S: Source<T> + ?Sized> Source<T> for &S {
    type Output = S::Output;

    fn allocate(&self, shape: &[usize]) -> Result<Self::Output> {
        (**self).allocate(shape)
    }
}

impl<T, S: AsTensorMut<T> + ?Sized> AsTensorMut<T> for &mut S {
    fn as_tensor_mut(&mut self) -> Result<TensorMut<'_, T>> {
        (**self).as_tensor_mut()
    }
}

/// Views `[n, …spatial, c]` (channels last) in the logical order `[n, c, …spatial]`, at no cost.
///
/// # Shapes
/// Rank 2 to 5 in the caller's array; anything else is reported by the call that uses the view.
///
/// ```
/// use ndarray::Array4;
/// let image = Array4::<f32>::zeros((1, 224, 160, 3));
/// assert_eq!(pointwise::nhwc(image.view()).shape(), [1, 3, 224, 160]);
/// ```
pub fn nhwc<A, D: Dimension>(view: ArrayView<'_, A, D>) -> ArrayView<'_, A, D> {
    let mut view = view;
    for axis in (2..view.ndim()).rev() {
        view.swap_axes(axis, axis - 1);
    }
    view
}

/// As [`nhwc`], for a view to write to.
pub fn nhwc_mut<A, D: Dimension>(
    view: ndarray::ArrayViewMut<'_, A, D>,
) -> ndarray::ArrayViewMut<'_, A, D> {
    let mut view = view;
    for axis in (2..view.ndim()).rev() {
        view.swap_axes(axis, axis - 1);
    }
    view
}

/// The product of sizes, or [`Error::TooLarge`]; what fits is also addressable in bytes of f64.
pub(crate) fn checked_product(what: &'static str, sizes: &[usize]) -> Result<usize> {
    let nonzero = sizes.iter().filter(|&&s| s > 0).try_fold(1usize, |a, &b| a.checked_mul(b));
    match nonzero {
        Some(product) if product <= isize::MAX as usize / 8 => {
            Ok(if sizes.contains(&0) { 0 } else { product })
        }
        _ => Err(Error::TooLarge { what, sizes: sizes.to_vec() }),
    }
}

/// Contiguous strides for `shape`, in the memory order of `like`.
///
/// Axes are ordered by falling stride; a broadcast axis (stride 0) has none and counts as outer.
/// Where two strides tie, the axis of length one is the inner one: that tells `[n, h, w, 1]`
/// (channels last) from `[n, c, 1, 1]` (channels first).
pub(crate) fn strides_like<T>(like: &TensorRef<'_, T>, shape: &[usize]) -> [isize; MAX_RANK] {
    let rank = like.rank();
    let mut order = [0usize; MAX_RANK];
    for (axis, slot) in order.iter_mut().enumerate() {
        *slot = axis;
    }
    order[..rank].sort_by_key(|&axis| {
        let (stride, len) = (like.strides()[axis].unsigned_abs(), like.shape()[axis]);
        let stride = if stride == 0 && len > 1 { usize::MAX } else { stride };
        (std::cmp::Reverse(stride), len == 1)
    });
    let mut strides = [0isize; MAX_RANK];
    let mut next = 1isize;
    for &axis in order[..rank].iter().rev() {
        strides[axis] = next;
        next *= shape[axis].max(1) as isize;
    }
    strides
}

/// As many zeros as the product of `sizes`, or [`Error::TooLarge`] if memory does not hold them.
pub(crate) fn try_zeros<T: Clone + Default>(what: &'static str, sizes: &[usize]) -> Result<Vec<T>> {
    let len = checked_product(what, sizes)?;
    // `vec!` aborts where memory does not suffice. It also takes pages that are zero already,
    // which is why a large size is tried beforehand, not filled afterwards.
    if len >= 1 << 24 {
        Vec::<T>::new()
            .try_reserve_exact(len)
            .map_err(|_| Error::TooLarge { what, sizes: sizes.to_vec() })?;
    }
    Ok(vec![T::default(); len])
}

/// An array of zeros of this shape, in the memory order of `like`.
pub(crate) fn allocate_like<T, O: Clone + Default, D: Dimension>(
    like: TensorRef<'_, T>,
    shape: &[usize],
) -> Result<Array<O, D>> {
    if shape.len() != like.rank() {
        let expected = "the rank of the source";
        return Err(Error::Rank { tensor: "dst", expected, got: shape.len() });
    }
    let values = try_zeros("dst", shape)?;
    let strides = strides_like(&like, shape);
    let mut dim = D::zeros(shape.len());
    let mut dim_strides = D::zeros(shape.len());
    for axis in 0..shape.len() {
        dim[axis] = shape[axis];
        dim_strides[axis] = strides[axis] as usize;
    }
    // An empty array has no memory order, and ndarray refuses one.
    let shaped = if values.is_empty() { dim.into() } else { dim.strides(dim_strides) };
    Array::from_shape_vec(shaped, values)
        .map_err(|_| Error::TooLarge { what: "dst", sizes: shape.to_vec() })
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;

    #[test]
    fn results_keep_the_memory_order_of_their_source() {
        let order = |shape: [usize; 4], last: bool| {
            let array = Array4::<f32>::zeros(if last {
                (shape[0], shape[2], shape[3], shape[1])
            } else {
                shape.into()
            });
            let view = if last { nhwc(array.view()) } else { array.view() };
            let out = view.allocate(&[2, 6, 3, 4]).unwrap();
            out.strides().to_vec()
        };
        for shape in [[2, 5, 3, 4], [1, 1, 3, 4], [1, 5, 1, 1], [2, 5, 1, 1], [2, 1, 3, 1]] {
            assert_eq!(order(shape, false), [72, 12, 4, 1], "{shape:?} channels first");
            if shape[1..] != [1, 3, 1] && shape[2..] != [1, 1] {
                assert_eq!(order(shape, true), [72, 1, 24, 6], "{shape:?} channels last");
            }
        }
    }

    #[test]
    fn what_memory_does_not_hold_is_an_error() {
        assert_eq!(try_zeros::<f32>("values", &[2, 3]).unwrap(), [0.0; 6]);
        let sizes = [1 << 30, 1 << 29];
        let error = try_zeros::<f32>("values", &sizes).unwrap_err();
        assert!(matches!(error, Error::TooLarge { what: "values", .. }), "{error}");
    }

    #[test]
    fn a_broadcast_batch_stays_outermost() {
        let one = Array4::<f32>::zeros((1, 5, 3, 4));
        let out = one.broadcast((2, 5, 3, 4)).unwrap().allocate(&[2, 6, 3, 4]).unwrap();
        assert_eq!(out.strides(), [72, 12, 4, 1]);
    }

    #[test]
    fn overlapping_and_oversized_views_are_refused() {
        let mut data = vec![0.0f32; 24];
        assert!(matches!(
            TensorMut::from_slice(&mut data, 0, &[2, 3, 4], &[4, 4, 1]),
            Err(Error::Overlap { .. })
        ));
        assert!(matches!(
            TensorMut::from_slice(&mut data, 0, &[2, 3, 4], &[12, 4, 0]),
            Err(Error::Overlap { .. })
        ));
        assert!(matches!(
            TensorRef::from_slice(&data, 1, &[2, 3, 4], &[12, 4, 1]),
            Err(Error::OutOfBounds { last: 24, len: 24, .. })
        ));
        assert!(matches!(
            TensorRef::from_slice(&data, 0, &[2, 3, 4], &[12, 4, -1]),
            Err(Error::OutOfBounds { first: -3, .. })
        ));
        assert!(TensorRef::from_slice(&data, 3, &[2, 3, 4], &[12, 4, -1]).is_ok());
        assert!(matches!(
            TensorRef::from_slice(&data, 0, &[usize::MAX, 3], &[0, 0]),
            Err(Error::TooLarge { .. })
        ));
        assert!(matches!(
            TensorRef::from_slice(&data, 0, &[24], &[1]),
            Err(Error::Rank { got: 1, .. })
        ));
    }
}
