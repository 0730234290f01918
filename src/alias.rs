//! Whether two tensors share memory: what is written must not be read.

use crate::tensor::{MAX_RANK, TensorRef};

/// Whether two strided views share an element.
///
/// Exact for views of one tensor (channel ranges of a concatenation interleave without sharing);
/// an answer that would take too long to find is `true`.
pub(crate) fn share_memory<A, B>(a: &TensorRef<'_, A>, b: &TensorRef<'_, B>) -> bool {
    if a.place() != b.place() || a.is_empty() || b.is_empty() {
        return false;
    }
    let (Some((a0, a1)), Some((b0, b1))) = (a.reach(), b.reach()) else {
        return true;
    };
    let (size_a, size_b) = (size_of::<A>() as i128, size_of::<B>() as i128);
    let distance = b.as_ptr() as usize as i128 - a.as_ptr() as usize as i128;
    if distance + (b1 as i128 + 1) * size_b <= a0 as i128 * size_a
        || distance + b0 as i128 * size_b >= (a1 as i128 + 1) * size_a
    {
        return false;
    }
    // a + Σ i·s = b + Σ j·t  ⇔  Σ i·s − Σ j·t = distance, each index within its axis. An index
    // that counts down is counted up instead, so that every stride is positive, and terms of equal
    // stride are one: views of one tensor leave one term per axis. Elements that do not lie on one
    // grid are counted in bytes, of which an element is one more axis.
    let unit = if size_a == size_b && distance % size_a == 0 { size_a } else { 1 };
    let mut target = distance / unit;
    let mut terms = [(0i128, 0i128); 2 * MAX_RANK + 2];
    let mut count = 0;
    let axes = a.shape().iter().zip(a.strides()).map(|(&n, &s)| (n, s as i128 * size_a / unit));
    let others =
        b.shape().iter().zip(b.strides()).map(|(&n, &s)| (n, -(s as i128) * size_b / unit));
    let within = [(size_of::<A>(), 1), (size_of::<B>(), -1)];
    let within = within.into_iter().filter(|_| unit == 1);
    let axes = axes.chain(others).chain(within);
    for (len, stride) in axes.filter(|&(len, stride)| len > 1 && stride != 0) {
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

    #[test]
    fn elements_of_different_sizes_share_bytes() {
        let words = [0u32; 24];
        // SAFETY: the bytes of the array, of which any are valid.
        let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), 96) };
        // Two of every four words, and two of every four bytes from a byte on.
        let a = TensorRef::from_slice(&words, 0, &[6, 2], &[4, 1]).unwrap();
        let b =
            |offset, stride| TensorRef::from_slice(bytes, offset, &[3, 2], &[stride, 1]).unwrap();
        assert!(!share_memory(&a, &b(8, 16)) && !share_memory(&b(8, 16), &a));
        assert!(!share_memory(&a, &b(14, 16)) && !share_memory(&b(14, 16), &a));
        assert!(share_memory(&a, &b(7, 16)) && share_memory(&b(7, 16), &a));
        assert!(share_memory(&a, &b(15, 16)) && share_memory(&b(15, 16), &a));
        assert!(share_memory(&a, &b(8, 40)));
    }
}
