//! Tensors of a layer where its device has them.

use ndarray::{Array4, ArrayView4, Axis, CowArray, IxDyn};
use pointwise::{AsTensor, AsTensorMut, Element, TensorMut, TensorRef};
#[cfg(feature = "cuda")]
use pointwise::{CudaDevice, CudaTensor, DeviceElement};

use crate::Result;
use crate::options::Order;

/// What tensors of every device hold.
#[cfg(feature = "cuda")]
pub trait Value: Element + DeviceElement {}
#[cfg(feature = "cuda")]
impl<T: Element + DeviceElement> Value for T {}
#[cfg(not(feature = "cuda"))]
pub trait Value: Element {}
#[cfg(not(feature = "cuda"))]
impl<T: Element> Value for T {}

pub enum Tensor<T> {
    Host(Array4<T>),
    #[cfg(feature = "cuda")]
    Cuda(CudaTensor<T>),
}

impl<T: Value> Tensor<T> {
    /// On the host.
    pub fn new(host: Array4<T>) -> Self {
        Tensor::Host(host)
    }

    /// The same on a GPU, in the same memory order.
    #[cfg(feature = "cuda")]
    pub fn on(self, device: &CudaDevice) -> Result<Self> {
        Ok(match self {
            Tensor::Host(host) => Tensor::Cuda(CudaTensor::from_host(device, host.view())?),
            there => there,
        })
    }

    /// Fills it with what is no right value anywhere.
    pub fn blank(&mut self) -> Result<()> {
        let nan = T::from_f32(f32::NAN);
        match self {
            Tensor::Host(host) => host.fill(nan),
            #[cfg(feature = "cuda")]
            Tensor::Cuda(tensor) => {
                let mut blank = tensor.to_host()?;
                blank.fill(nan);
                *tensor = CudaTensor::from_host(tensor.device(), blank.view())?;
            }
        }
        Ok(())
    }

    /// Waits until nobody writes it any more.
    pub fn wait(&self) -> Result<()> {
        match self {
            Tensor::Host(_) => {}
            #[cfg(feature = "cuda")]
            Tensor::Cuda(tensor) => tensor.device().synchronize()?,
        }
        Ok(())
    }

    pub fn values(&self) -> Result<CowArray<'_, T, IxDyn>> {
        Ok(match self {
            Tensor::Host(host) => host.view().into_dyn().into(),
            #[cfg(feature = "cuda")]
            Tensor::Cuda(tensor) => tensor.to_host()?.into(),
        })
    }
}

impl<T: Value> AsTensor<T> for Tensor<T> {
    fn as_tensor(&self) -> pointwise::Result<TensorRef<'_, T>> {
        match self {
            Tensor::Host(host) => host.as_tensor(),
            #[cfg(feature = "cuda")]
            Tensor::Cuda(tensor) => tensor.as_tensor(),
        }
    }
}

impl<T: Value> AsTensorMut<T> for Tensor<T> {
    fn as_tensor_mut(&mut self) -> pointwise::Result<TensorMut<'_, T>> {
        match self {
            Tensor::Host(host) => host.as_tensor_mut(),
            #[cfg(feature = "cuda")]
            Tensor::Cuda(tensor) => tensor.as_tensor_mut(),
        }
    }
}

/// A tensor in a memory order.
pub fn zeros<T: Copy + Default>(order: Order, [n, c, h, w]: [usize; 4]) -> Array4<T> {
    match order {
        Order::Nchw => Array4::from_elem((n, c, h, w), T::default()),
        Order::Nhwc => Array4::from_elem((n, h, w, c), T::default()).permuted_axes([0, 3, 1, 2]),
    }
}

/// The samples over and over, `n` in all, in a memory order.
pub fn repeated<T: Copy + Default>(order: Order, few: ArrayView4<'_, T>, n: usize) -> Array4<T> {
    let (distinct, c, h, w) = few.dim();
    let mut all = zeros(order, [n, c, h, w]);
    for (i, mut sample) in all.axis_iter_mut(Axis(0)).enumerate() {
        sample.assign(&few.index_axis(Axis(0), i % distinct));
    }
    all
}

/// Values in -1..1 without a pattern, always the same.
pub fn values(n: usize, c: usize, h: usize, w: usize) -> Array4<f32> {
    // Marsaglia's xorshift, "Xorshift RNGs" (2003).
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    Array4::from_shape_simple_fn((n, c, h, w), || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
}
