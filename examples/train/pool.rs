//! The maximum over the points of each cloud.

use ndarray::{Array2, Array3, s};

/// The largest values of each channel.
pub struct Maxima {
    /// `[clouds, c]`; NaN where a cloud has one.
    pub values: Array2<f32>,
    /// Where along the points each value stands; the first of equal ones.
    winners: Array2<usize>,
    /// Of what was searched.
    shape: (usize, usize, usize),
}

impl Maxima {
    /// Of `src [1, c, all points]`, cloud after cloud, with `lengths` points each, at least one.
    pub fn of(src: &Array3<f32>, lengths: &[usize]) -> Maxima {
        let shape = (lengths.len(), src.dim().1);
        let (mut values, mut winners) = (Array2::zeros(shape), Array2::zeros(shape));
        for (c, channel) in src.slice(s![0, .., ..]).outer_iter().enumerate() {
            let mut start = 0;
            for (cloud, len) in lengths.iter().enumerate() {
                let mut best = (start, channel[start]);
                for point in start + 1..start + len {
                    let value = channel[point];
                    if value > best.1 || value.is_nan() && !best.1.is_nan() {
                        best = (point, value);
                    }
                }
                (winners[[cloud, c]], values[[cloud, c]]) = best;
                start += len;
            }
        }
        Maxima { values, winners, shape: src.dim() }
    }

    /// The gradient by `src`: that of each value goes to where it stands, all others are zero.
    pub fn backward(&self, d_values: &Array2<f32>) -> Array3<f32> {
        let mut d_src = Array3::zeros(self.shape);
        for (((_, c), &winner), d) in self.winners.indexed_iter().zip(d_values) {
            d_src[[0, c, winner]] = *d;
        }
        d_src
    }
}
