//! Whether two tensors share memory: what is written must not be read.

use crate::tensor::{MAX_RANK, TensorRef};

/// Whether two strided views share an element.
///
/// Exact for views of one tensor (channel ranges of a concatenation interleave without sharing);
/// an answer that would take too long to find is `true`.
pub(crate) fn share_memory<T>(a: &TensorRef<'_, T>, b: &TensorRef<'_, T>) -> bool {
    if a.place() != b.place() || a.is_empty() || b.is_empty() {
        return false;
    }
    let (Some((a0, a1)), Some((b0, b1))) = (a.reach(), b.reach()) else {
        return true;
    };
    let size = size_of::<T>() as i128;
    let distance = b.as_ptr() as usize as i128 - a.as_ptr() as usize as i128;
    if distance + i128::from(b1 as i64) * size + size <= i128::from(a0 as i64) * size
        || distance + i128::from(b0 as i64) * size >= i128::from(a1 as i64) * size + size
    {
        return false;
    }
    if distance % size != 0 {
        return true;
    }
    // a + Σ i·s = b + Σ j·t  ⇔  Σ i·s − Σ j·t = distance, each index within its axis. An index
    // that counts down is counted up instead, so that every stride is positive, and terms of equal
    // stride are one: views of one tensor leave one term per axis.
    let mut target = distance / size;
    let mut terms = [(0i128, 0i128); 2 * MAX_RANK];
    let mut count = 0;
    let axes = a.shape().iter().zip(a.strides()).map(|(&n, &s)| (n, s as i128));
    let others = b.shape().iter().zip(b.strides()).map(|(&n, &s)| (n, -(s as i128)));
    for (len, stride) in axes.chain(others).filter(|&(len, stride)| len > 1 && stride != 0) {
        let (step, max) = (stride.abs(), len as i128 - 1);
        if stride < 0 {
            target += step * max;
        }
        match terms[..count].iter_mut().find(|(other, _)| *other == step) {
            Some((_, sum)) => *sum += max,
            None => {
                terms[count] = (step, max);
                count += 1;
            }
        }
    }
    let terms = &mut terms[..count];
    terms.sort_unstable_by_key(|&(stride, _)| std::cmp::Reverse(stride));
    let mut budget = 10_000u32;
    solvable(terms, target, &mut budget)
}

/// Whether `Σ x_k · stride_k = target` has a solution with `0 <= x_k <= max_k`; strides are
/// positive.
fn solvable(terms: &[(i128, i128)], target: i128, budget: &mut u32) -> bool {
    let Some((&(stride, max), rest)) = terms.split_first() else {
        return target == 0;
    };
    let reach: i128 = rest.iter().map(|&(s, m)| s * m).sum();
    // x·stride must lie in [target − reach, target].
    let first = ((target - reach + stride - 1).div_euclid(stride)).max(0);
    let last = target.div_euclid(stride).min(max);
    let mut x = first;
    while x <= last {
        if *budget == 0 {
            return true;
        }
        *budget -= 1;
        if solvable(rest, target - x * stride, budget) {
            return true;
        }
        x += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use ndarray::{Array4, s};

    use super::*;
    use crate::tensor::{AsTensor, AsTensorMut, nhwc};

    #[test]
    fn channel_ranges_of_one_tensor_do_not_alias() {
        let mut whole = Array4::<f32>::zeros((3, 10, 4, 5));
        let (a, mut b) = whole.view_mut().split_at(ndarray::Axis(1), 6);
        assert!(!share_memory(&a.as_tensor().unwrap(), b.as_tensor_mut().unwrap().view()));
        let last = Array4::<f32>::zeros((3, 4, 5, 10));
        let last = nhwc(last.view());
        let (a, b) = (last.slice(s![.., ..6, .., ..]), last.slice(s![.., 5.., .., ..]));
        assert!(share_memory(&a.as_tensor().unwrap(), &b.as_tensor().unwrap()));
        let b = last.slice(s![.., 6.., .., ..]);
        assert!(!share_memory(&a.as_tensor().unwrap(), &b.as_tensor().unwrap()));
        let (even, odd) = (last.slice(s![.., .., ..;2, ..]), last.slice(s![.., .., 1..;2, ..;-1]));
        assert!(!share_memory(&even.as_tensor().unwrap(), &odd.as_tensor().unwrap()));
    }
}
