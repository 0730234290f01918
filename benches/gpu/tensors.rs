//! Host tensors, made and compared on all cores: a GPU waits for them.

use std::fmt::Debug;

use ndarray::{Array4, ArrayViewD};
use pointwise::Layout;
use rayon::prelude::*;

/// Values in -1..1 without a pattern, the same in both layouts, as `value` makes them.
pub fn random<T: Send>(
    layout: Layout,
    [n, c, h, w]: [usize; 4],
    seed: u64,
    value: impl Fn(f32) -> T + Sync,
) -> Array4<T> {
    let positions = h * w;
    let index = |i: usize| match layout {
        Layout::ChannelsFirst => i,
        Layout::ChannelsLast => {
            let (position, channel) = (i / c, i % c);
            (position / positions * c + channel) * positions + position % positions
        }
    };
    let values = (0..n * c * positions).into_par_iter();
    let values = values.map(|i| value(uniform(seed, index(i) as u64))).collect();
    match layout {
        Layout::ChannelsFirst => Array4::from_shape_vec((n, c, h, w), values),
        Layout::ChannelsLast => Array4::from_shape_vec((n, h, w, c), values)
            .map(|values| values.permuted_axes([0, 3, 1, 2])),
    }
    .expect("as many values as the shape says")
}

/// SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014), which
/// finds any of its numbers without those before it.
fn uniform(seed: u64, index: u64) -> f32 {
    let mut x = (seed << 40).wrapping_add(index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// That two tensors lie in memory alike, and that each value is close to the other's.
pub fn compare<A: Copy + Debug + Sync, B: Copy + Debug + Sync>(
    got: ArrayViewD<'_, A>,
    expected: ArrayViewD<'_, B>,
    close: impl Fn(A, B) -> bool + Sync,
) -> Result<(), String> {
    const CHUNK: usize = 1 << 14;
    if (got.shape(), got.strides()) != (expected.shape(), expected.strides()) {
        let layout = (got.shape(), got.strides(), expected.shape(), expected.strides());
        return Err(format!("shape and strides {layout:?}, expected the latter"));
    }
    let (Some(values), Some(right)) =
        (got.as_slice_memory_order(), expected.as_slice_memory_order())
    else {
        return Err("the result has gaps".into());
    };
    let pairs = values.par_chunks(CHUNK).zip(right.par_chunks(CHUNK));
    let wrong = pairs.find_map_any(|(values, right)| {
        values.iter().zip(right).find(|&(&value, &right)| !close(value, right))
    });
    match wrong {
        Some((value, right)) => Err(format!("{value:?}, expected {right:?}")),
        None => Ok(()),
    }
}
