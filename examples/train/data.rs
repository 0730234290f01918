//! The digits as clouds of their inked pixels, and batches of clouds.

use std::path::Path;

use ndarray::{Array2, Array3, Axis, array};
use pointwise::safetensors::tensor::TensorView;
use pointwise::safetensors::{Dtype, SafeTensors};

use crate::Result;

/// Sides of a picture.
const SIDE: usize = 8;
/// A pixel's ink at most.
const INK: u8 = 16;
/// Digits, 0 to 9.
pub const CLASSES: usize = 10;

/// Maps a point `(x, y, 1)` to `(x, y)`.
pub type Affine = [[f32; 3]; 2];
/// Leaves points where they are.
pub const IDENTITY: Affine = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]];

/// Handwritten digits.
pub struct Digits {
    /// `[3, points]` each: x to the right and y down, from -1 to 1, and the ink, up to 1.
    clouds: Vec<Array2<f32>>,
    labels: Vec<usize>,
}

impl Digits {
    /// Reads `images` U8 `[n, 8, 8]` and `labels` U8 `[n]` from a safetensors file.
    pub fn read(path: &Path) -> Result<Digits> {
        let digits = std::fs::read(path).map_err(Into::into).and_then(|bytes| Self::parse(&bytes));
        Ok(digits.map_err(|error| format!("{}: {error}", path.display()))?)
    }

    fn parse(bytes: &[u8]) -> Result<Digits> {
        let file = SafeTensors::deserialize(bytes)?;
        let (images, labels) = (file.tensor("images")?, file.tensor("labels")?);
        let n = labels.data().len();
        expect("images", &images, &[n, SIDE, SIDE])?;
        expect("labels", &labels, &[n])?;
        if n < 5 {
            Err(format!("{n} digits, of which a fifth is held out: at least 5 are needed"))?;
        }
        let labels: Vec<_> = labels.data().iter().map(|&label| usize::from(label)).collect();
        if let Some(i) = labels.iter().position(|&label| label >= CLASSES) {
            Err(format!("digit {i} has the label {}, expected 0 to 9", labels[i]))?;
        }
        let images = images.data().chunks_exact(SIDE * SIDE).enumerate();
        let clouds = images.map(|(i, image)| {
            let cloud = cloud(image);
            match image.iter().max() {
                Some(&ink) if ink > INK => {
                    Err(format!("digit {i} has ink {ink}, expected 0 to 16"))
                }
                _ if cloud.is_empty() => Err(format!("digit {i} has no ink, hence no points")),
                _ => Ok(cloud),
            }
        });
        Ok(Digits { clouds: clouds.collect::<Result<_, _>>()?, labels })
    }

    /// Every fifth digit is held out.
    pub fn test(&self) -> Vec<usize> {
        (0..self.labels.len()).filter(|i| i % 5 == 0).collect()
    }

    /// The digits to train on.
    pub fn training(&self) -> Vec<usize> {
        (0..self.labels.len()).filter(|i| i % 5 != 0).collect()
    }

    /// The clouds of these digits, each mapped by what `map` gives for it.
    pub fn batch(&self, digits: &[usize], mut map: impl FnMut() -> Affine) -> Batch {
        let lengths: Vec<_> = digits.iter().map(|&i| self.clouds[i].ncols()).collect();
        let mut points = Array3::zeros((1, 3, lengths.iter().sum()));
        let mut place = points.axis_iter_mut(Axis(2));
        for &i in digits {
            let map = map();
            for (from, mut to) in self.clouds[i].axis_iter(Axis(1)).zip(&mut place) {
                let (x, y, ink) = (from[0], from[1], from[2]);
                let [x, y] = map.map(|[by_x, by_y, shift]| by_x * x + by_y * y + shift);
                to.assign(&array![[x, y, ink]]);
            }
        }
        Batch { points, lengths, labels: digits.iter().map(|&i| self.labels[i]).collect() }
    }
}

fn expect(name: &str, tensor: &TensorView<'_>, shape: &[usize]) -> Result<()> {
    if tensor.dtype() != Dtype::U8 || tensor.shape() != shape {
        let (dtype, got) = (tensor.dtype(), tensor.shape());
        Err(format!("{name} is {dtype} {got:?}, expected U8 {shape:?} (one label per image)"))?;
    }
    Ok(())
}

fn cloud(image: &[u8]) -> Array2<f32> {
    let inked: Vec<_> = (0..image.len()).filter(|&i| image[i] > 0).collect();
    let middle = (SIDE - 1) as f32 / 2.0;
    let place = |pixel: usize| (pixel as f32 - middle) / middle;
    Array2::from_shape_fn((3, inked.len()), |(coordinate, point)| {
        let pixel = inked[point];
        match coordinate {
            0 => place(pixel % SIDE),
            1 => place(pixel / SIDE),
            _ => f32::from(image[pixel]) / f32::from(INK),
        }
    })
}

/// Clouds of different sizes, packed as one sample: padding would enter the statistics of batch
/// norm.
pub struct Batch {
    /// `[1, 3, all points]`, cloud after cloud.
    pub points: Array3<f32>,
    /// Points of each cloud, at least one.
    pub lengths: Vec<usize>,
    /// What each cloud shows.
    pub labels: Vec<usize>,
}
