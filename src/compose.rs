//! Prepared layers put together: several on one source, or one after another.

use std::cell::RefCell;

use crate::alias::share_memory;
use crate::dtype::{Element, bf16, f16};
use crate::error::{Error, Result};
use crate::prepared::{Extra, Prepared};
use crate::problem::{Operands, expect_shape};
#[cfg(feature = "cuda")]
use crate::tensor::Place;
use crate::tensor::{
    AsTensor, AsTensorMut, MAX_RANK, Source, TensorMut, TensorRef, checked_product, strides_like,
};

/// Several layers that read the same source and run as one pass over it, each with its stages and
/// its own dst: the 1x1 branches of an Inception module, the heads of a detector.
///
/// ```
/// # use ndarray::{Array2, Array4, Axis};
/// # use pointwise::{Branches, Device, Pointwise};
/// # let device = Device::cpu();
/// let branch = |c_out: usize| Pointwise::new(Array2::ones((c_out, 8))).relu().prepare(&device);
/// let branches = Branches::new(vec![branch(16)?, branch(4)?])?;
/// let src = Array4::ones((1, 8, 7, 7));
/// // Both outputs are written in place into one concatenated tensor.
/// let mut dst = Array4::zeros((1, 20, 7, 7));
/// let (mut a, mut b) = dst.view_mut().split_at(Axis(1), 16);
/// branches.call(&src).run_into(&mut [&mut a, &mut b])?;
/// assert!(dst.iter().all(|&x| x == 8.0));
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Branches<T = f32> {
    layers: Vec<Prepared<T>>,
}

impl<T: Element> Branches<T> {
    /// Puts layers of one device together.
    ///
    /// On CUDA they are launched one after another, each on its own stream.
    ///
    /// # Errors
    /// [`Error::NoLayers`] for an empty list; [`Error::WrongDevice`] if they were
    /// prepared for different devices.
    pub fn new(layers: Vec<Prepared<T>>) -> Result<Self> {
        composable(&layers)?;
        Ok(Branches { layers })
    }

    /// The layers, in order.
    pub fn layers(&self) -> &[Prepared<T>] {
        &self.layers
    }

    /// All layers on another stream of the CUDA device; weights are shared, as by
    /// [`Prepared::on`].
    ///
    /// # Errors
    /// [`Error::WrongDevice`] if the layers were prepared for another device.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn on(&self, device: &crate::CudaDevice) -> Result<Self> {
        let layers = self.layers.iter().map(|layer| layer.on(device)).collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// Runs every layer on `src`; results in the layers' order, each as
    /// [`Prepared::forward`](Prepared::forward) gives it.
    ///
    /// # Errors
    /// As [`Prepared::forward`](Prepared::forward).
    pub fn forward<S: Source<T> + ?Sized>(&self, src: &S) -> Result<Vec<S::Output>> {
        self.call(src).run()
    }

    /// Starts a call that takes residuals or gates, or writes to given tensors.
    pub fn call<'a, S: AsTensor<T> + ?Sized>(&'a self, src: &'a S) -> BranchesCall<'a, S, T> {
        let extras = Extras::of(self.layers.len());
        BranchesCall { branches: self, src, extras }
    }
}

/// Whether layers can run together.
fn composable<T: Element>(layers: &[Prepared<T>]) -> Result<()> {
    let Some(first) = layers.first() else {
        return Err(Error::NoLayers);
    };
    for layer in layers {
        if layer.place() != first.place() {
            return Err(Error::WrongDevice {
                tensor: "a layer",
                expected: first.device().to_string(),
                got: layer.device().to_string(),
            });
        }
    }
    Ok(())
}

/// What each of several layers takes beside the source.
pub(crate) struct Extras<'a, T = f32>(Vec<Extra<'a, T>>);

impl<'a, T> Extras<'a, T> {
    pub(crate) fn of(layers: usize) -> Self {
        Extras((0..layers).map(|_| Extra::default()).collect())
    }

    /// A layer's; the first one's, which then has an error, for a number that is no layer's.
    pub(crate) fn at(&mut self, branch: usize) -> &mut Extra<'a, T> {
        let layers = self.0.len();
        if branch < layers {
            return &mut self.0[branch];
        }
        self.0[0].error.get_or_insert(Error::ParameterValue {
            parameter: "branch".into(),
            value: format!("{branch} of {layers}"),
            expected: "the number of a layer",
        });
        &mut self.0[0]
    }

    /// The first error, if there is one.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.0.iter_mut().find_map(|extra| extra.error.take()).map_or(Ok(()), Err)
    }

    /// What the layers read.
    pub(crate) fn operands(self, src: TensorRef<'a, T>) -> Result<Vec<Operands<'a, T>>> {
        let of_layer = |Extra { residual, gate, error, .. }: Extra<'a, T>| {
            error.map_or(Ok(Operands { src, more: &[], residual, gate }), Err)
        };
        self.0.into_iter().map(of_layer).collect()
    }
}

/// One call of [`Branches`].
#[must_use = "a call does nothing until it is run"]
pub struct BranchesCall<'a, S: ?Sized, T = f32> {
    branches: &'a Branches<T>,
    src: &'a S,
    extras: Extras<'a, T>,
}

impl<'a, T: Element, S: AsTensor<T> + ?Sized> BranchesCall<'a, S, T> {
    /// The tensor that the residual stage of layer `branch` adds; its dst's shape. A number that
    /// is no layer's is reported when the call runs.
    pub fn residual(mut self, branch: usize, residual: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extras.at(branch).set_residual(residual);
        self
    }

    /// The tensor that the gate of layer `branch` multiplies by; `[n, c_in]`. A number that is no
    /// layer's is reported when the call runs.
    pub fn gate(mut self, branch: usize, gate: &'a (impl AsTensor<T> + ?Sized)) -> Self {
        self.extras.at(branch).set_gate(gate);
        self
    }

    /// Runs into one tensor per layer, in the layers' order; they must not share memory.
    ///
    /// # Errors
    /// As [`Prepared::forward_into`](Prepared::forward_into), and [`Error::Shape`] if there are
    /// not as many tensors as layers.
    pub fn run_into(self, dsts: &mut [&mut dyn AsTensorMut<T>]) -> Result<()> {
        let layers = &self.branches.layers;
        expect_shape("the list of dsts", &[dsts.len()], &[layers.len()])?;
        let mut dsts =
            dsts.iter_mut().map(|dst| dst.as_tensor_mut()).collect::<Result<Vec<_>>>()?;
        let src = self.src.as_tensor()?;
        let operands = self.extras.operands(src)?;
        // Each call is checked by itself; here, that no branch writes what another one uses.
        for (i, dst) in dsts.iter().enumerate() {
            for (j, other) in dsts.iter().enumerate() {
                let read = [operands[j].residual, operands[j].gate];
                let shared = read.iter().flatten().any(|tensor| share_memory(tensor, dst.view()));
                if i != j && (shared || share_memory(dst.view(), other.view())) {
                    let (written, tensor) = ("a branch's dst", "another branch's tensors");
                    return Err(Error::Aliased { written, tensor });
                }
            }
        }
        T::run_together(layers, &operands, &mut dsts)
    }

    /// Runs into new tensors, each in the memory order of the source.
    ///
    /// # Errors
    /// As [`Prepared::forward`](Prepared::forward).
    pub fn run(mut self) -> Result<Vec<S::Output>>
    where
        S: Source<T>,
    {
        let shape = self.src.as_tensor()?.shape().to_vec();
        self.extras.check()?;
        let mut dsts = self
            .branches
            .layers
            .iter()
            .map(|layer| self.src.allocate(&layer.dst_shape(&shape)?))
            .collect::<Result<Vec<_>>>()?;
        let mut views: Vec<&mut dyn AsTensorMut<T>> =
            dsts.iter_mut().map(|dst| dst as &mut dyn AsTensorMut<T>).collect();
        self.run_into(&mut views)?;
        Ok(dsts)
    }
}

/// Prepared layers that run one after another, each on the result of the one before.
///
/// ```
/// # use ndarray::{Array2, Array3};
/// # use pointwise::{Device, Pointwise, Sequence};
/// # let device = Device::cpu();
/// let layer = |c_out, c_in| Pointwise::new(Array2::ones((c_out, c_in))).relu().prepare(&device);
/// let points = Sequence::new(vec![layer(64, 3)?, layer(128, 64)?])?;
/// let dst = points.forward(&Array3::ones((2, 3, 1000)))?; // [n, c, points]
/// assert_eq!(dst.shape(), [2, 128, 1000]);
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sequence<T = f32> {
    layers: Vec<Prepared<T>>,
}

/// The two tensors that a sequence alternates between, kept per thread.
pub(crate) trait Between: Sized + 'static {
    fn with<R>(f: impl FnOnce(&RefCell<[Vec<Self>; 2]>) -> R) -> R;
}

macro_rules! between {
    ($($element:ty),*) => {$(
        impl Between for $element {
            fn with<R>(f: impl FnOnce(&RefCell<[Vec<Self>; 2]>) -> R) -> R {
                thread_local! {
                    static BETWEEN: RefCell<[Vec<$element>; 2]> =
                        const { RefCell::new([Vec::new(), Vec::new()]) };
                }
                BETWEEN.with(f)
            }
        }
    )*};
}

between!(f32, f16, bf16);

impl<T: Element> Sequence<T> {
    /// Chains layers of one device, none of which takes a residual or a gate. On CUDA all of them
    /// run on the first one's stream.
    ///
    /// # Errors
    /// [`Error::NoLayers`] for an empty list; [`Error::Unsupported`] if a layer takes a second tensor;
    /// [`Error::Channels`] if a layer does not take the channels of the one before;
    /// [`Error::WrongDevice`] if they were prepared for different devices.
    pub fn new(layers: Vec<Prepared<T>>) -> Result<Self> {
        composable(&layers)?;
        for (i, layer) in layers.iter().enumerate() {
            if let Some(input) = layer.second_input() {
                return Err(Error::Unsupported {
                    device: layer.device().to_string(),
                    what: format!(
                        "a sequence whose layer {i} takes a {input}: it passes on one tensor only"
                    ),
                });
            }
        }
        // The channels between the layers, known from the first one on that convolves all of them.
        let mut channels = None;
        for layer in &layers {
            if let Some(known) = channels.or(layer.src_channels()) {
                channels = Some(layer.dst_shape_of(&[1, known])?[1]);
            }
        }
        let layers = layers.iter().map(|layer| layer.beside(&layers[0])).collect::<Result<_>>()?;
        Ok(Sequence { layers })
    }

    /// The layers, in order.
    pub fn layers(&self) -> &[Prepared<T>] {
        &self.layers
    }

    /// This chain on another stream of the CUDA device; weights are shared, as by
    /// [`Prepared::on`].
    ///
    /// # Errors
    /// [`Error::WrongDevice`] if the layers were prepared for another device.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    pub fn on(&self, device: &crate::CudaDevice) -> Result<Self> {
        let layers = self.layers.iter().map(|layer| layer.on(device)).collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// Runs the chain; the result has the memory order of `src`.
    ///
    /// # Errors
    /// As [`Prepared::forward`](Prepared::forward).
    pub fn forward<S: Source<T> + ?Sized>(&self, src: &S) -> Result<S::Output> {
        let mut shape = src.as_tensor()?.shape().to_vec();
        for layer in &self.layers {
            shape = layer.dst_shape(&shape)?;
        }
        let mut dst = src.allocate(&shape)?;
        self.forward_into(src, &mut dst)?;
        Ok(dst)
    }

    /// Runs the chain into any non-overlapping strides. On the CPU, what lies between the layers is
    /// kept per thread; nothing is allocated once a thread has run a problem of this size.
    ///
    /// On CUDA it stays on the device: host tensors go through in slices, and for device tensors it
    /// comes from the device's memory pool in stream order. So a sequence can be captured as one
    /// graph, which then owns that memory.
    ///
    /// # Errors
    /// As [`Prepared::forward_into`](Prepared::forward_into).
    pub fn forward_into<S: AsTensor<T> + ?Sized>(
        &self,
        src: &S,
        dst: &mut (impl AsTensorMut<T> + ?Sized),
    ) -> Result<()> {
        let mut dst = dst.as_tensor_mut()?;
        let src = src.as_tensor()?;
        if share_memory(&src, dst.view()) {
            return Err(Error::Aliased { written: "dst", tensor: "src" });
        }
        #[cfg(feature = "cuda")]
        if self.layers[0].place() != Place::Host && T::run_chain(&self.layers, &src, &dst)? {
            return Ok(());
        }
        T::with(|between| match between.try_borrow_mut() {
            Ok(mut between) => self.run(src, &mut dst, &mut between),
            Err(_) => self.run(src, &mut dst, &mut Default::default()),
        })
    }

    fn run(
        &self,
        src: TensorRef<'_, T>,
        dst: &mut TensorMut<'_, T>,
        between: &mut [Vec<T>; 2],
    ) -> Result<()> {
        let Some((last, layers)) = self.layers.split_last() else { return Ok(()) };
        let [ping, pong] = between;
        let (mut from, mut to) = (ping, pong);
        let rank = src.rank();
        // Where the input of the next layer lies: in src, then in `from`.
        let mut current: Option<([usize; MAX_RANK], [isize; MAX_RANK])> = None;
        for layer in layers {
            let input = match &current {
                Some((shape, strides)) => {
                    TensorRef::from_slice(from, 0, &shape[..rank], &strides[..rank])?
                }
                None => src,
            };
            let shape = layer.dst_shape_of(input.shape())?;
            let len = checked_product("a layer's result", &shape[..rank])?;
            let strides = strides_like(&input, &shape[..rank]);
            if to.len() < len {
                to.try_reserve_exact(len - to.len()).map_err(|_| Error::TooLarge {
                    what: "a layer's result",
                    sizes: shape[..rank].to_vec(),
                })?;
                to.resize(len, T::default());
            }
            let mut output = TensorMut::from_slice(to, 0, &shape[..rank], &strides[..rank])?;
            layer.forward_into(&input, &mut output)?;
            current = Some((shape, strides));
            std::mem::swap(&mut from, &mut to);
        }
        let input = match &current {
            Some((shape, strides)) => {
                TensorRef::from_slice(from, 0, &shape[..rank], &strides[..rank])?
            }
            None => src,
        };
        last.forward_into(&input, dst)
    }
}
