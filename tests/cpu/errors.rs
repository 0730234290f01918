//! Bad input: every kind is refused by its own error, with the values in the message, and nothing
//! panics.

use std::process::Command;

use crate::rng::Rng;
use ndarray::{
    Array, Array1, Array2, Array3, Array4, ArrayD, ArrayView4, ArrayViewMut4, Axis, IxDyn, s,
};
use pointwise::init::{Fan, Init, Nonlinearity};
use pointwise::{
    Activation, AsTensor, AsTensorMut, BatchNorm, Branches, DType, Device, Error, LayerNorm,
    Layout, Place, Pointwise, PrepareOptions, Prepared, Result, Sequence, Source, SourceStage,
    Stage, TensorMut, TensorRef, bf16, f16, init, nhwc, reference,
};
use proptest::prelude::*;

/// A result that must be an error of this variant whose message has all of these parts.
macro_rules! refused {
    ($result:expr, $variant:pat, $($part:expr),+ $(,)?) => {{
        let error = match $result {
            Ok(_) => panic!("{} was accepted", stringify!($result)),
            Err(error) => error,
        };
        assert!(matches!(error, $variant), "{error:?}");
        let message = error.to_string();
        $(assert!(message.contains($part), "{message:?} lacks {:?}", $part);)+
    }};
}

fn weight(c_out: usize, c_in: usize) -> Array2<f32> {
    Array2::ones((c_out, c_in))
}

fn plain(c_out: usize, c_in: usize) -> Pointwise {
    Pointwise::new(weight(c_out, c_in))
}

fn cpu(layer: Pointwise) -> Prepared {
    layer.prepare(&Device::cpu()).unwrap()
}

fn src(n: usize, c: usize, h: usize, w: usize) -> Array4<f32> {
    Array4::ones((n, c, h, w))
}

/// The elements of an array, for calls that cheat the borrow checker as a C caller could.
fn raw(of: &Array4<f32>) -> TensorRef<'static> {
    // SAFETY: each test keeps the array alive, and none of its calls gets as far as writing.
    unsafe {
        TensorRef::from_raw_parts(of.as_ptr(), Place::Host, of.shape(), of.strides()).unwrap()
    }
}

fn raw_mut(of: &mut Array4<f32>) -> TensorMut<'static> {
    // SAFETY: as above.
    unsafe {
        TensorMut::from_raw_parts(of.as_mut_ptr(), Place::Host, of.shape(), of.strides()).unwrap()
    }
}

#[test]
fn channels_that_do_not_match() {
    let layer = cpu(plain(8, 64).groups(2));
    let message = "weight has 64 input channels per group, src has 48 / 2 groups = 24";
    let source = src(1, 48, 3, 3);
    refused!(layer.forward(&source), Error::Channels { weight: 64, src: 48, groups: 2 }, message);
    let mut dst = src(1, 8, 3, 3);
    refused!(layer.forward_into(&source, &mut dst), Error::Channels { .. }, message);
    refused!(layer.dst_shape(&[1, 48, 3, 3]), Error::Channels { .. }, message);
    refused!(layer.cost(&[1, 48, 3, 3]), Error::Channels { .. }, message);
    refused!(layer.explain(&[1, 48, 3, 3]), Error::Channels { .. }, message);
    refused!(layer.plans(&[1, 48, 3, 3]), Error::Channels { .. }, message);
    let inputs =
        reference::Inputs { sources: vec![source.view().into_dyn()], ..Default::default() };
    refused!(reference::forward(&plain(8, 64).groups(2), &inputs), Error::Channels { .. }, message);
    refused!(layer.dst_shape(&[1, 49]), Error::Channels { .. }, "49 / 2 groups = 24 remainder 1");
    refused!(
        layer.call(&source).concat(&src(1, 79, 3, 3)).run(),
        Error::Channels { src: 127, .. },
        "src has 127 / 2 groups = 63 remainder 1"
    );
}

#[test]
fn groups_that_do_not_divide() {
    refused!(plain(6, 4).groups(4).check(), Error::Groups { .. }, "4 groups", "6 output channels");
    refused!(plain(6, 4).groups(0).check(), Error::Groups { .. }, "0 groups", "6 output channels");
    refused!(
        plain(6, 4).groups(usize::MAX).prepare(&Device::cpu()),
        Error::Groups { .. },
        &usize::MAX.to_string(),
        "6"
    );
    for groups in [0, 4, usize::MAX] {
        refused!(
            plain(6, 4).channel_shuffle(groups).check(),
            Error::Groups { channels: 6, .. },
            &format!("{groups} groups do not divide 6 output channels of a channel shuffle")
        );
    }
}

#[test]
fn values_of_eps() {
    for (eps, shown) in [
        (0.0, "0"),
        (-0.0, "-0"),
        (-1e-5, "-0.00001"),
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (f32::NEG_INFINITY, "-inf"),
    ] {
        let norm = |channels: usize| BatchNorm::new(vec![0.0; channels], vec![1.0; channels]);
        let batch_norm = format!("batch_norm's eps is {shown}, expected finite and positive");
        let layer_norm = format!("layer_norm's eps is {shown}, expected finite and positive");
        let after = plain(2, 3).batch_norm(norm(2).eps(eps));
        refused!(after.check(), Error::ParameterValue { .. }, &batch_norm);
        let before = plain(2, 3).source_batch_norm(norm(3).eps(eps));
        refused!(before.check(), Error::ParameterValue { .. }, &batch_norm);
        for layer in [LayerNorm::over_channels(), LayerNorm::over_all()] {
            let layer = plain(2, 3).layer_norm(layer.eps(eps));
            refused!(layer.prepare(&Device::cpu()), Error::ParameterValue { .. }, &layer_norm);
        }
    }
}

#[test]
fn values_of_a_variance() {
    for (var, shown) in [(-1.0, "-1"), (f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let norm = BatchNorm::new(vec![0.0; 3], vec![1.0, 0.0, var]);
        let parts = ("running_var of channel 2", format!("is {shown}"));
        let after = plain(3, 2).batch_norm(norm.clone());
        refused!(after.check(), Error::ParameterValue { .. }, parts.0, &parts.1);
        let before = plain(2, 3).source_batch_norm(norm);
        refused!(before.check(), Error::ParameterValue { .. }, parts.0, &parts.1);
    }
}

#[test]
fn lengths_of_parameters() {
    let two = || Array1::<f32>::zeros(2);
    let three = || Array1::<f32>::ones(3);
    let norm = || BatchNorm::new(three(), three());
    let layer_norm = || LayerNorm::over_channels();
    for (layer, parameter) in [
        (plain(3, 4).bias(two()), "bias"),
        (plain(3, 4).batch_norm(BatchNorm::new(two(), three())), "running_mean"),
        (plain(3, 4).batch_norm(BatchNorm::new(three(), two())), "running_var"),
        (plain(3, 4).batch_norm(norm().affine(two(), three())), "gamma"),
        (plain(3, 4).batch_norm(norm().affine(three(), two())), "beta"),
        (plain(3, 4).prelu(two()), "prelu's slope"),
        (plain(3, 4).layer_norm(layer_norm().affine(two(), three())), "layer_norm's gamma"),
        (plain(3, 4).layer_norm(layer_norm().affine(three(), two())), "layer_norm's beta"),
        (plain(4, 3).source_affine(two(), three()), "src_scale"),
        (plain(4, 3).source_affine(three(), two()), "src_shift"),
        (plain(4, 3).source_batch_norm(BatchNorm::new(two(), three())), "running_mean"),
    ] {
        let message = format!("{parameter} has 2 values, expected 3");
        refused!(layer.check(), Error::ParameterLength { expected: 3, got: 2, .. }, &message);
    }
    let empty: Vec<f32> = Vec::new();
    refused!(plain(3, 4).bias(empty.clone()).check(), Error::ParameterLength { .. }, "0 values");
    refused!(plain(3, 4).prelu(empty).check(), Error::ParameterLength { .. }, "0 values");
}

#[test]
fn ranks_outside_two_to_five() {
    let layer = cpu(plain(2, 3));
    for rank in [0, 1, 6, 7] {
        let shape = vec![3; rank];
        let source = ArrayD::<f32>::ones(IxDyn(&shape));
        let message = format!("rank {rank}, expected 2 ([n, c]) to 5 ([n, c, d, h, w])");
        refused!(source.as_tensor(), Error::Rank { .. }, &message);
        refused!(source.clone().as_tensor_mut(), Error::Rank { .. }, &message);
        refused!(layer.forward(&source), Error::Rank { .. }, &message);
        refused!(layer.forward(&nhwc(source.view())), Error::Rank { .. }, &message);
        refused!(layer.dst_shape(&shape), Error::Rank { .. }, &message);
        refused!(layer.cost(&shape), Error::Rank { .. }, &message);
        refused!(layer.explain_in(&shape, Layout::ChannelsLast), Error::Rank { .. }, &message);
        refused!(layer.plans_in(&shape, Layout::ChannelsLast), Error::Rank { .. }, &message);
        let mut dst = source.clone();
        refused!(layer.forward_into(&src(1, 3, 1, 1), &mut dst), Error::Rank { .. }, &message);
        let sequence = Sequence::new(vec![layer.clone()]).unwrap();
        refused!(sequence.forward(&source), Error::Rank { .. }, &message);
        let branches = Branches::new(vec![layer.clone()]).unwrap();
        refused!(branches.forward(&source), Error::Rank { .. }, &message);
        let inputs = reference::Inputs { sources: vec![source.view()], ..Default::default() };
        refused!(reference::forward(&plain(2, 3), &inputs), Error::Rank { .. }, &message);
        let strides = vec![1; rank];
        let data = [0.0; 100];
        refused!(TensorRef::from_slice(&data, 0, &shape, &strides), Error::Rank { .. }, &message);
    }
    refused!(layer.forward(&Array1::ones(3)), Error::Rank { got: 1, .. }, "rank 1");
    let six = Array::<f32, _>::ones((1, 3, 1, 1, 1, 1));
    refused!(layer.forward(&six), Error::Rank { got: 6, .. }, "rank 6");
    refused!(layer.forward(&six.view()), Error::Rank { got: 6, .. }, "rank 6");

    // The second tensor of a call is as good a reason to refuse it.
    let layer = cpu(plain(2, 3).residual().gate());
    let (source, good) = (src(1, 3, 2, 2), src(1, 2, 2, 2));
    let gate = Array2::ones((1, 3));
    let flat = Array1::<f32>::ones(3);
    refused!(layer.call(&source).residual(&flat).gate(&gate).run(), Error::Rank { .. }, "rank 1");
    refused!(layer.call(&source).residual(&good).gate(&flat).run(), Error::Rank { .. }, "rank 1");
}

#[test]
fn strides_that_are_no_shape_s() {
    let mut data = vec![0.0f32; 8];
    refused!(
        TensorRef::from_slice(&data, 0, &[2, 2], &[1]),
        Error::StrideCount { .. },
        "2 axes (shape [2, 2]) and 1 strides ([1])"
    );
    refused!(
        TensorMut::from_slice(&mut data, 0, &[2, 2], &[4, 2, 1]),
        Error::StrideCount { .. },
        "2 axes (shape [2, 2]) and 3 strides ([4, 2, 1])"
    );
    refused!(
        TensorRef::from_slice(&data, 2, &[2, 3], &[4, 1]),
        Error::OutOfBounds { .. },
        "[2, 3]",
        "[4, 1]",
        "2..=8",
        "holds 8"
    );
    refused!(
        TensorRef::from_slice(&data, 2, &[2, 3], &[1, -2]),
        Error::OutOfBounds { .. },
        "-2..=3"
    );
    refused!(
        TensorMut::from_slice(&mut data, 9, &[1, 1], &[1, 1]),
        Error::OutOfBounds { .. },
        "9..=9"
    );
    refused!(
        TensorRef::from_slice(&data, usize::MAX, &[1, 2], &[1, 1]),
        Error::TooLarge { .. },
        "reach"
    );
    for strides in [[isize::MAX, 1], [isize::MIN, 1], [isize::MAX, isize::MAX]] {
        refused!(
            TensorRef::from_slice(&data, 1, &[3, 3], &strides),
            Error::TooLarge { .. },
            "[3, 3]"
        );
    }
    // SAFETY: nothing is read.
    let bad = unsafe { TensorRef::from_raw_parts(data.as_ptr(), Place::Host, &[2, 2], &[1]) };
    refused!(bad, Error::StrideCount { .. }, "1 strides");
    let huge = [usize::MAX, 1];
    // SAFETY: nothing is read or written.
    unsafe {
        let bad = TensorRef::from_raw_parts(data.as_ptr(), Place::Host, &huge, &[0, 0]);
        refused!(bad, Error::TooLarge { .. }, &usize::MAX.to_string());
        let bad = TensorMut::from_raw_parts(data.as_mut_ptr(), Place::Host, &huge, &[0, 0]);
        refused!(bad, Error::TooLarge { .. }, &usize::MAX.to_string());
    }
    for place in [Place::Host, Place::Cuda(0)] {
        let odd = data.as_mut_ptr().wrapping_byte_add(2);
        let address = format!("{:#x}", odd.addr());
        // SAFETY: nothing is read or written.
        unsafe {
            let bad = TensorRef::from_raw_parts(odd.cast_const(), place, &[1, 1], &[1, 1]);
            refused!(bad, Error::Misaligned { alignment: 4, .. }, &address);
            let bad = TensorMut::from_raw_parts(odd, place, &[1, 1], &[1, 1]);
            refused!(bad, Error::Misaligned { tensor: "dst", .. }, &address);
            assert!(TensorRef::from_raw_parts(odd.cast::<u16>(), place, &[1, 1], &[1, 1]).is_ok());
            assert!(TensorRef::from_raw_parts(odd, place, &[0, 1], &[1, 1]).is_ok());
        }
    }
}

#[test]
fn sizes_that_overflow() {
    let data = [1.0f32; 4];
    let huge = 1 << 40;
    refused!(
        TensorRef::from_slice(&data, 0, &[huge, 1, huge], &[0, 0, 0]),
        Error::TooLarge { .. },
        &huge.to_string()
    );
    // An empty axis does not hide the product of the others.
    refused!(
        TensorRef::from_slice(&data, 0, &[0, huge, huge], &[0, 0, 0]),
        Error::TooLarge { .. },
        &huge.to_string()
    );
    let layer = cpu(plain(4, 1));
    refused!(layer.dst_shape(&[1 << 29, 1, 1 << 30]), Error::TooLarge { .. }, "dst", "536870912");
    refused!(layer.cost(&[0, 1, huge, huge]), Error::TooLarge { .. }, &huge.to_string());
    let layer = cpu(plain(1, 1).partial(0..1));
    refused!(layer.dst_shape(&[1, usize::MAX, 1]), Error::TooLarge { .. }, &usize::MAX.to_string());
    let wide = plain(1, 1 << 20).groups(1);
    assert_eq!(wide.c_in(), 1 << 20);
    assert_eq!(plain(1, 4).groups(usize::MAX).c_in(), usize::MAX);
}

#[test]
fn a_source_too_large_for_a_small_result() {
    let layer = cpu(plain(1, 1).stride(1 << 40));
    let shape = [1, 1, 1 << 50, 1 << 50];
    refused!(layer.dst_shape(&shape), Error::TooLarge { .. }, "src", "1125899906842624");
    refused!(layer.cost(&shape), Error::TooLarge { .. }, "src");
    refused!(layer.explain(&shape), Error::TooLarge { .. }, "src");
    refused!(layer.plans_in(&shape, Layout::ChannelsLast), Error::TooLarge { .. }, "src");
}

/// Elements that no address space of today holds, while their number fits `usize`.
const UNALLOCATABLE: usize = 1 << 50;

#[test]
fn results_that_memory_does_not_hold() {
    let layer = cpu(plain(2, 1));
    let one = Array3::<f32>::ones((1, 1, 1));
    let broadcast = one.broadcast((1, 1, UNALLOCATABLE)).unwrap();
    let size = UNALLOCATABLE.to_string();
    refused!(layer.forward(&broadcast), Error::TooLarge { .. }, "dst", &size);
    let data = [1.0f32];
    let view = TensorRef::from_slice(&data, 0, &[1, 1, UNALLOCATABLE], &[0, 0, 0]).unwrap();
    refused!(layer.forward(&view), Error::TooLarge { .. }, "dst", &size);
    refused!(view.allocate(view.shape()), Error::TooLarge { .. }, &size);
    let branches = Branches::new(vec![layer.clone(), layer.clone()]).unwrap();
    refused!(branches.forward(&broadcast), Error::TooLarge { .. }, &size);
    let sequence = Sequence::new(vec![layer.clone(), cpu(plain(1, 2).stride(1 << 49))]).unwrap();
    refused!(sequence.forward(&broadcast), Error::TooLarge { .. }, &size);
    let init = Init::pytorch_default();
    refused!(init.weight(UNALLOCATABLE, 4, 0), Error::TooLarge { .. }, "weight", &size);
    refused!(init.weight(usize::MAX, 4, 0), Error::TooLarge { .. }, &usize::MAX.to_string());
    refused!(init::bias(UNALLOCATABLE, 4, 0), Error::TooLarge { .. }, "bias", &size);
    refused!(init::bias(usize::MAX, 4, 0), Error::TooLarge { .. }, &usize::MAX.to_string());
}

#[test]
fn empty_channels() {
    for shape in [(0, 4), (4, 0), (0, 0)] {
        let layer = Pointwise::new(Array2::zeros(shape));
        let message = format!("weight has no channels: shape [{}, {}]", shape.0, shape.1);
        refused!(layer.check(), Error::NoChannels { .. }, &message);
        refused!(layer.prepare(&Device::cpu()), Error::NoChannels { .. }, &message);
    }
    let layer = cpu(plain(2, 3));
    let message = "src has no channels: shape [1, 0, 2, 2]";
    refused!(layer.forward(&src(1, 0, 2, 2)), Error::NoChannels { .. }, message);
    refused!(layer.dst_shape(&[1, 0, 2, 2]), Error::NoChannels { .. }, message);
    let none = src(1, 0, 2, 2);
    refused!(layer.call(&none).concat(&none).run(), Error::NoChannels { .. }, message);
    for (c_out, c_in) in [(0, 3), (3, 0)] {
        let shape = format!("[{c_out}, {c_in}]");
        let weight = Init::pytorch_default().weight(c_out, c_in, 1);
        refused!(weight, Error::NoChannels { .. }, "weight", &shape);
        refused!(init::bias(c_out, c_in, 1), Error::NoChannels { .. }, "bias", &shape);
    }
}

#[test]
fn positions_of_dst_that_overlap() {
    let mut data = vec![0.0f32; 100];
    for (shape, strides) in [
        (vec![2, 3, 4], vec![12, 0, 1]),
        (vec![2, 3, 4], vec![0, 4, 1]),
        (vec![2, 3, 4], vec![12, 3, 1]),
        (vec![2, 3, 4], vec![-12, 3, -1]),
        (vec![1, 3, 2, 2], vec![1, 1, 2, 4]),
    ] {
        let shown = (format!("{shape:?}"), format!("{strides:?}"));
        let view = TensorMut::from_slice(&mut data, 50, &shape, &strides);
        refused!(view, Error::Overlap { .. }, "dst", &shown.0, &shown.1);
        // SAFETY: nothing is written.
        let view =
            unsafe { TensorMut::from_raw_parts(data.as_mut_ptr(), Place::Host, &shape, &strides) };
        refused!(view, Error::Overlap { .. }, "dst", &shown.0, &shown.1);
    }
    // Axes of length one have no stride to speak of.
    assert!(TensorMut::from_slice(&mut data, 50, &[1, 3, 1, 4], &[0, 4, 0, 1]).is_ok());
    assert!(TensorMut::from_slice(&mut data, 50, &[0, 3, 4], &[0, 0, 0]).is_ok());
}

#[test]
fn dst_over_a_tensor_that_is_read() {
    let layer = cpu(plain(3, 3).residual().gate());
    let (mut a, b) = (src(2, 3, 4, 4), src(2, 3, 4, 4));
    let gate = Array2::ones((2, 3));
    let dst = &mut raw_mut(&mut a);
    let alias = raw(&a);
    refused!(
        layer.call(&alias).residual(&b).gate(&gate).run_into(dst),
        Error::Aliased { tensor: "src", .. },
        "dst shares memory with src"
    );
    refused!(
        layer.call(&b).residual(&alias).gate(&gate).run_into(dst),
        Error::Aliased { tensor: "residual", .. },
        "dst shares memory with residual"
    );
    // SAFETY: inside `a`, which is not written.
    let gate_in_dst = unsafe {
        TensorRef::from_raw_parts(a.as_ptr().add(90), Place::Host, &[2, 3], &[3, 1]).unwrap()
    };
    refused!(
        layer.call(&b).residual(&b).gate(&gate_in_dst).run_into(dst),
        Error::Aliased { tensor: "gate", .. },
        "dst shares memory with gate"
    );
    let concat = cpu(plain(3, 6));
    refused!(
        concat.call(&b).concat(&alias).run_into(dst),
        Error::Aliased { tensor: "src", .. },
        "src"
    );
    // One shared element is enough.
    let mut whole = vec![0.0f32; 20];
    let ptr = whole.as_mut_ptr();
    let layer = cpu(plain(2, 2));
    // SAFETY: inside `whole`, and nobody else uses it meanwhile.
    unsafe {
        let read = TensorRef::from_raw_parts(ptr, Place::Host, &[1, 2, 5], &[10, 5, 1]).unwrap();
        let mut last =
            TensorMut::from_raw_parts(ptr.add(9), Place::Host, &[1, 2, 5], &[10, 5, 1]).unwrap();
        refused!(layer.forward_into(&read, &mut last), Error::Aliased { .. }, "src");
        let mut beside =
            TensorMut::from_raw_parts(ptr.add(10), Place::Host, &[1, 2, 5], &[10, 5, 1]).unwrap();
        layer.forward_into(&read, &mut beside).unwrap();
    }
    let sequence = Sequence::new(vec![cpu(plain(3, 3)), cpu(plain(3, 3))]).unwrap();
    refused!(sequence.forward_into(&alias, dst), Error::Aliased { tensor: "src", .. }, "src");
}

#[test]
fn dst_over_another_branch_s_tensors() {
    let branches = Branches::new(vec![cpu(plain(3, 3)), cpu(plain(3, 3).residual())]).unwrap();
    let source = src(1, 3, 4, 4);
    let (mut a, mut b, r) = (src(1, 3, 4, 4), src(1, 3, 4, 4), src(1, 3, 4, 4));
    let (mut one, mut same) = (raw_mut(&mut a), raw_mut(&mut a));
    refused!(
        branches.call(&source).residual(1, &r).run_into(&mut [&mut one, &mut same]),
        Error::Aliased { .. },
        "another branch"
    );
    let residual = raw(&a);
    refused!(
        branches.call(&source).residual(1, &residual).run_into(&mut [&mut one, &mut b]),
        Error::Aliased { .. },
        "another branch"
    );
    let alias = raw(&a);
    refused!(
        branches.call(&alias).residual(1, &r).run_into(&mut [&mut one, &mut b]),
        Error::Aliased { tensor: "src", .. },
        "src"
    );
}

#[test]
fn residuals_and_gates_that_do_not_fit() {
    let (bare, added) = (cpu(plain(2, 3)), cpu(plain(2, 3).residual().stride(2)));
    let gated = cpu(plain(2, 3).gate());
    let source = src(2, 3, 5, 4);
    let (fits, gate) = (src(2, 2, 3, 2), Array2::<f32>::ones((2, 3)));
    refused!(
        added.forward(&source),
        Error::MissingInput { input: "residual" },
        "has a residual stage, but the call gave no residual tensor"
    );
    refused!(
        gated.forward(&source),
        Error::MissingInput { input: "gate" },
        "has a gate stage, but the call gave no gate tensor"
    );
    refused!(
        bare.call(&source).residual(&fits).run(),
        Error::UnexpectedInput { input: "residual" },
        "gave a residual tensor, but the layer has no residual stage"
    );
    refused!(
        bare.call(&source).gate(&gate).run(),
        Error::UnexpectedInput { input: "gate" },
        "gave a gate tensor"
    );
    added.call(&source).residual(&fits).run().unwrap();
    for shape in [(2, 2, 5, 4), (1, 2, 3, 2), (2, 1, 3, 2), (2, 2, 2, 3)] {
        let residual = Array4::<f32>::ones(shape);
        let shown = format!("{:?}", residual.shape());
        refused!(
            added.call(&source).residual(&residual).run(),
            Error::Shape { tensor: "residual", .. },
            &shown,
            "expected [2, 2, 3, 2]"
        );
    }
    let flat = Array2::<f32>::ones((2, 2));
    refused!(added.call(&source).residual(&flat).run(), Error::Shape { .. }, "[2, 2]", "residual");
    gated.call(&source).gate(&gate).run().unwrap();
    let pooled = ArrayD::<f32>::ones(IxDyn(&[2, 3, 1, 1]));
    gated.call(&source).gate(&pooled).run().unwrap();
    for shape in [vec![2, 2], vec![1, 3], vec![2, 3, 1, 2], vec![2, 3, 5, 4]] {
        let gate = ArrayD::<f32>::ones(IxDyn(&shape));
        refused!(
            gated.call(&source).gate(&gate).run(),
            Error::Shape { tensor: "gate", .. },
            &format!("{shape:?}"),
            "expected [2, 3]"
        );
    }
    let inputs =
        || reference::Inputs { sources: vec![source.view().into_dyn()], ..Default::default() };
    let residual = plain(2, 3).residual();
    refused!(reference::forward(&residual, &inputs()), Error::MissingInput { .. }, "residual");
    let wrong = reference::Inputs { residual: Some(fits.view().into_dyn()), ..inputs() };
    refused!(reference::forward(&residual, &wrong), Error::Shape { .. }, "[2, 2, 3, 2]");
    refused!(reference::forward(&plain(2, 3), &wrong), Error::UnexpectedInput { .. }, "residual");
    let nothing = reference::Inputs::default();
    refused!(reference::forward(&plain(2, 3), &nothing), Error::MissingInput { .. }, "src");
}

#[test]
fn results_of_another_shape() {
    let layer = cpu(plain(2, 3).stride(2));
    for shape in [(2, 2, 5, 5), (2, 3, 3, 3), (1, 2, 3, 3)] {
        let mut dst = Array4::<f32>::ones(shape);
        let shown = format!("{:?}", dst.shape());
        refused!(
            layer.forward_into(&src(2, 3, 5, 5), &mut dst),
            Error::Shape { tensor: "dst", .. },
            &shown,
            "expected [2, 2, 3, 3]"
        );
    }
    let branches = Branches::new(vec![layer.clone(), layer.clone()]).unwrap();
    let mut one = src(2, 2, 3, 3);
    refused!(
        branches.call(&src(2, 3, 5, 5)).run_into(&mut [&mut one]),
        Error::Shape { .. },
        "list of dsts",
        "[1], expected [2]"
    );
    let sequence = Sequence::new(vec![layer, cpu(plain(4, 2))]).unwrap();
    refused!(
        sequence.forward_into(&src(2, 3, 5, 5), &mut one),
        Error::Shape { .. },
        "[2, 2, 3, 3], expected [2, 4, 3, 3]"
    );
}

#[test]
fn concatenations_that_do_not_fit() {
    let layer = cpu(plain(2, 6));
    let a = src(2, 4, 5, 3);
    for shape in [(1, 2, 5, 3), (2, 2, 4, 3), (2, 2, 5, 4)] {
        let b = Array4::<f32>::ones(shape);
        let shown = format!("{:?}", b.shape());
        refused!(
            layer.call(&a).concat(&b).run(),
            Error::Shape { .. },
            "a further source of the concatenation",
            &shown,
            "expected [2, 2, 5, 3]"
        );
    }
    refused!(
        layer.call(&a).concat(&src(2, 3, 5, 3)).run(),
        Error::Channels { src: 7, .. },
        "src has 7 / 1 groups = 7"
    );
    refused!(layer.forward(&a), Error::Channels { src: 4, .. }, "src has 4");
}

/// A source of fewer axes would be read beyond its end, or along the wrong axes.
#[test]
fn concatenations_of_different_rank() {
    let a = src(2, 4, 5, 3);
    for shape in [vec![2, 4], vec![2, 4, 5], vec![2, 4, 5, 3, 1]] {
        let b = ArrayD::<f32>::ones(IxDyn(&shape));
        let shown = format!("{shape:?}");
        refused!(
            cpu(plain(2, 8)).call(&a).concat(&b).run(),
            Error::Shape { .. },
            "a further source of the concatenation",
            &shown,
            "expected [2, 4, 5, 3]"
        );
        let sources = vec![a.view().into_dyn(), b.view()];
        let inputs = reference::Inputs { sources, ..Default::default() };
        refused!(reference::forward(&plain(2, 8), &inputs), Error::Shape { .. }, &shown);
    }
}

/// What is wrong with a tensor itself is said before what its absence leads to.
#[test]
fn a_bad_second_source_is_named() {
    let (a, flat) = (src(2, 4, 5, 3), Array1::<f32>::ones(4));
    refused!(cpu(plain(2, 8)).call(&a).concat(&flat).run(), Error::Rank { got: 1, .. }, "rank 1");
    let branches = Branches::new(vec![cpu(plain(2, 8).residual())]).unwrap();
    refused!(branches.call(&a).residual(0, &flat).run(), Error::Rank { got: 1, .. }, "rank 1");
    refused!(branches.call(&a).gate(7, &a).run(), Error::ParameterValue { .. }, "7 of 1");
}

#[test]
fn ranges_of_a_partial_convolution() {
    for (range, shown) in
        [(2..4, "2..4"), (3..3, "3..3"), (0..usize::MAX, "0..18446744073709551615")]
    {
        refused!(
            plain(2, 3).partial(range).check(),
            Error::PartialRange { .. },
            shown,
            "3 input channels"
        );
    }
    #[expect(clippy::reversed_empty_ranges, reason = "bad input")]
    let backwards = 5..2;
    refused!(plain(2, 3).partial(backwards).check(), Error::PartialRange { .. }, "5..2");
    let layer = cpu(plain(2, 3).partial(4..7));
    refused!(
        layer.forward(&src(1, 6, 2, 2)),
        Error::PartialRange { start: 4, end: 7, .. },
        "channels 4..7",
        "src has 6 channels"
    );
    let end = usize::MAX;
    let layer = cpu(plain(2, 3).partial(end - 3..end));
    refused!(layer.forward(&src(1, 6, 2, 2)), Error::PartialRange { .. }, &end.to_string());
}

#[test]
fn stages_that_stand_twice() {
    let norm = |c: usize| BatchNorm::new(vec![0.0; c], vec![1.0; c]);
    for (layer, name) in [
        (plain(2, 3).bias(vec![0.0; 2]).relu().bias(vec![1.0; 2]), "bias"),
        (plain(2, 3).batch_norm(norm(2)).batch_norm(norm(2)), "batch_norm"),
        (plain(2, 3).prelu(vec![0.5]).prelu(vec![0.5; 2]), "prelu"),
        (
            plain(2, 3)
                .layer_norm(LayerNorm::over_all())
                .relu()
                .layer_norm(LayerNorm::over_channels()),
            "layer_norm",
        ),
        (plain(2, 3).residual().relu().residual(), "residual"),
        (plain(2, 3).channel_shuffle(2).channel_shuffle(1), "channel_shuffle"),
        (
            plain(2, 3)
                .source_affine(vec![1.0; 3], vec![0.0; 3])
                .source_activation(Activation::Relu)
                .source_affine(vec![1.0; 3], vec![0.0; 3]),
            "affine",
        ),
        (plain(2, 3).source_batch_norm(norm(3)).source_batch_norm(norm(3)), "batch_norm"),
        (plain(2, 3).gate().source_activation(Activation::Relu).gate(), "gate"),
    ] {
        let message = format!("stage {name} stands twice");
        refused!(layer.prepare(&Device::cpu()), Error::RepeatedStage { .. }, &message);
    }
    // Activations have no parameters to address, and the two lists are two.
    let twice = plain(2, 3)
        .source_batch_norm(norm(3))
        .source_activation(Activation::Relu)
        .source_activation(Activation::Relu)
        .batch_norm(norm(2))
        .relu()
        .relu();
    twice.check().unwrap();
}

#[test]
fn bounds_and_slopes_of_activations() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for (lo, hi, shown) in [
        (2.0, 1.5, "lo 2, hi 1.5"),
        (nan, 1.0, "lo NaN, hi 1"),
        (0.0, nan, "lo 0, hi NaN"),
        (inf, -inf, "lo inf, hi -inf"),
    ] {
        let clip = Activation::Clip { lo, hi };
        refused!(plain(2, 3).clip(lo, hi).check(), Error::ParameterValue { .. }, "clip", shown);
        let before = plain(2, 3).source_activation(clip);
        refused!(before.check(), Error::ParameterValue { .. }, "clip", shown);
    }
    plain(2, 3).clip(-inf, inf).check().unwrap();
    plain(2, 3).clip(1.0, 1.0).check().unwrap();
    for (alpha, shown) in [(nan, "is NaN"), (inf, "is inf"), (-inf, "is -inf")] {
        let leaky = plain(2, 3).leaky_relu(alpha);
        refused!(leaky.check(), Error::ParameterValue { .. }, "leaky_relu's alpha", shown);
        let elu = plain(2, 3).source_activation(Activation::Elu { alpha });
        refused!(elu.check(), Error::ParameterValue { .. }, "elu's alpha", shown);
    }
}

#[test]
fn a_stride_of_zero() {
    let layer = plain(2, 3).stride(0);
    refused!(layer.check(), Error::ParameterValue { .. }, "stride is 0, expected at least 1");
    refused!(layer.prepare(&Device::cpu()), Error::ParameterValue { .. }, "stride is 0");
}

#[test]
fn tensors_on_another_device() {
    let layer = cpu(plain(3, 3).residual());
    let data = [1.0f32; 12];
    let host = TensorRef::from_slice(&data, 0, &[1, 3, 4], &[12, 4, 1]).unwrap();
    // SAFETY: nothing is read, since the device is not the layer's.
    let device = unsafe {
        TensorRef::from_raw_parts(data.as_ptr(), Place::Cuda(1), &[1, 3, 4], &[12, 4, 1]).unwrap()
    };
    let mut dst = Array3::<f32>::ones((1, 3, 4));
    refused!(
        layer.call(&host).residual(&device).run_into(&mut dst),
        Error::WrongDevice { tensor: "residual", .. },
        "residual is on cuda:1, expected on the host"
    );
    // SAFETY: as above.
    let mut dst = unsafe {
        TensorMut::from_raw_parts(dst.as_mut_ptr(), Place::Cuda(0), &[1, 3, 4], &[12, 4, 1])
            .unwrap()
    };
    refused!(
        layer.call(&host).residual(&host).run_into(&mut dst),
        Error::WrongDevice { tensor: "dst", .. },
        "dst is on cuda:0, expected on the host"
    );
    refused!(layer.forward(&device), Error::Unsupported { .. }, "cuda:1", "allocating");
    refused!(device.allocate(&[1, 3, 4]), Error::Unsupported { .. }, "cuda:1");
}

#[test]
fn a_source_on_another_device() {
    let data = [1.0f32; 12];
    // SAFETY: nothing is read, since the device is not the layer's.
    let device = unsafe {
        TensorRef::from_raw_parts(data.as_ptr(), Place::Cuda(1), &[1, 3, 4], &[12, 4, 1]).unwrap()
    };
    let layer = cpu(plain(3, 3));
    let message = "src is on cuda:1, expected on the host";
    let mut dst = Array3::<f32>::ones((1, 3, 4));
    refused!(layer.forward_into(&device, &mut dst), Error::WrongDevice { .. }, message);
    let branches = Branches::new(vec![layer.clone()]).unwrap();
    refused!(branches.call(&device).run_into(&mut [&mut dst]), Error::WrongDevice { .. }, message);
    let sequence = Sequence::new(vec![layer.clone(), layer]).unwrap();
    refused!(sequence.forward_into(&device, &mut dst), Error::WrongDevice { .. }, message);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_was_not_built() {
    refused!(Device::cuda(3), Error::NoDevice { .. }, "cuda:3", "without the feature `cuda`");
}

#[test]
fn compositions_of_nothing_or_of_too_much() {
    refused!(Branches::<f32>::new(Vec::new()), Error::NoLayers, "no layers");
    refused!(Sequence::<f32>::new(Vec::new()), Error::NoLayers, "no layers");
    let layers = |layer: Pointwise| vec![cpu(plain(3, 3)), cpu(layer)];
    refused!(
        Sequence::new(layers(plain(3, 3).residual())),
        Error::Unsupported { .. },
        "layer 1",
        "a residual"
    );
    refused!(
        Sequence::new(layers(plain(3, 3).gate())),
        Error::Unsupported { .. },
        "layer 1",
        "gate"
    );
    let source = src(1, 3, 2, 2);
    refused!(
        Sequence::new(layers(plain(2, 7))),
        Error::Channels { weight: 7, src: 3, .. },
        "src has 3"
    );
    let sequence = Sequence::new(layers(plain(2, 3))).unwrap();
    let narrow = src(1, 2, 2, 2);
    refused!(sequence.forward(&narrow), Error::Channels { weight: 3, src: 2, .. }, "src has 2");
    let branches = Branches::new(layers(plain(2, 7))).unwrap();
    refused!(branches.forward(&source), Error::Channels { .. }, "7 input channels");
    let branches = Branches::new(layers(plain(3, 3))).unwrap();
    let (mut a, mut b) = (source.clone(), source.clone());
    refused!(
        branches.call(&source).residual(2, &source).run_into(&mut [&mut a, &mut b]),
        Error::ParameterValue { .. },
        "branch is 2 of 2"
    );
    refused!(
        branches.call(&source).gate(usize::MAX, &source).run_into(&mut [&mut a, &mut b]),
        Error::ParameterValue { .. },
        &usize::MAX.to_string()
    );
}

#[test]
fn kernels_that_are_not_there() {
    let layer = plain(2, 3);
    let prepare = |kernel: &str| {
        let options = PrepareOptions { kernel: Some(kernel.into()), ..Default::default() };
        layer.prepare_with(&Device::cpu(), options)
    };
    for name in ["fprop_f32_sse9_1x1", "FPROP_F32_AVX2_6X16", "portable", "é\0"] {
        refused!(
            prepare(name),
            Error::Kernel { .. },
            &format!("{name:?}"),
            "this device has fprop_f32_"
        );
    }
    // Each kernel of the device runs, or is refused with the reason that `plans` gives.
    for candidate in cpu(layer.clone()).plans(&[1, 3, 4]).unwrap() {
        match candidate.verdict {
            Ok(_) => assert_eq!(
                prepare(candidate.kernel).unwrap().plans(&[1, 3, 4]).unwrap()[0].kernel,
                candidate.kernel
            ),
            Err(reason) => {
                refused!(prepare(candidate.kernel), Error::Kernel { .. }, candidate.kernel, &reason)
            }
        }
    }
}

#[test]
fn weights_and_kernels_of_another_dtype() {
    let mut weight = weight(2, 3);
    weight[[1, 2]] = -65520.0;
    let layer = Pointwise::new(weight);
    let f16 = |layer: &Pointwise| layer.prepare_as::<f16>(&Device::cpu(), Default::default());
    refused!(f16(&layer), Error::ParameterValue { .. }, "weight [1, 2]", "-65520", "overflow");
    assert!(layer.prepare_as::<bf16>(&Device::cpu(), Default::default()).is_ok());
    // What was infinite before stays so.
    assert!(f16(&Pointwise::new(Array2::from_elem((1, 1), f32::INFINITY))).is_ok());

    let kernel = Some("fprop_f32_portable_4x8".into());
    let options = PrepareOptions { kernel, ..Default::default() };
    let prepared = plain(2, 3).prepare_as::<bf16>(&Device::cpu(), options);
    let names = ["fprop_f32_portable_4x8", "fprop_bf16_portable_4x8"];
    refused!(prepared, Error::Kernel { .. }, names[0], names[1]);

    // Pairs of bf16 would round what a source stage gives.
    let kernel = "fprop_bf16_avx512_14x16";
    let options = PrepareOptions { kernel: Some(kernel.into()), ..Default::default() };
    let layer = plain(2, 3).source_activation(Activation::Silu);
    refused!(layer.prepare_as::<bf16>(&Device::cpu(), options), Error::Kernel { .. }, kernel);
    refused!("f8".parse::<DType>(), Error::ParameterValue { .. }, "f8", "f32, f16 or bf16");
}

#[test]
fn gains_of_initial_weights() {
    for (gain, shown) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        let init = Init::XavierNormal { gain };
        refused!(init.weight(2, 3, 0), Error::ParameterValue { .. }, "standard deviation", shown);
    }
    let nonlinearity = Nonlinearity::LeakyRelu { alpha: f64::NAN };
    let init = Init::KaimingUniform { fan: Fan::In, nonlinearity };
    refused!(init.weight(2, 3, 0), Error::ParameterValue { .. }, "NaN");
}

#[test]
fn results_of_another_rank_are_not_allocated() {
    let (four, dynamic) = (src(1, 2, 3, 4), src(1, 2, 3, 4).into_dyn());
    for shape in [vec![], vec![1], vec![1, 2], vec![1, 2, 3, 4, 5], vec![1; 9]] {
        let rank = format!("rank {}", shape.len());
        refused!(four.allocate(&shape), Error::Rank { .. }, "dst", &rank);
        refused!(dynamic.allocate(&shape), Error::Rank { .. }, "dst", &rank);
        refused!(raw(&four).allocate(&shape), Error::Rank { .. }, "dst", &rank);
    }
}

/// A stride beyond every axis keeps the first position, in the specification too.
#[test]
fn strides_beyond_every_axis() {
    let source = Array4::from_shape_fn((1, 2, 3, 4), |(_, c, h, w)| (c * 12 + h * 4 + w) as f32);
    for stride in [5, isize::MAX as usize, isize::MAX as usize + 1, usize::MAX - 1, usize::MAX] {
        let layer = plain(1, 2).stride(stride);
        assert_eq!(
            cpu(layer.clone()).forward(&source).unwrap(),
            Array4::from_elem((1, 1, 1, 1), 12.0)
        );
        let inputs =
            reference::Inputs { sources: vec![source.view().into_dyn()], ..Default::default() };
        let expected = reference::forward(&layer, &inputs).unwrap();
        assert_eq!(expected, ArrayD::from_elem(IxDyn(&[1, 1, 1, 1]), 12.0));
    }
}

/// Nothing passes through where there are no positions, however many samples there are not.
#[test]
fn many_samples_without_positions_are_no_work() {
    let data: [f32; 0] = [];
    let shape = [1 << 40, 3, 0];
    let view = TensorRef::from_slice(&data, 0, &shape, &[0, 0, 0]).unwrap();
    let dst = cpu(plain(2, 2).partial(0..2)).forward(&view).unwrap();
    assert_eq!(dst.shape(), shape);
}

#[cfg(feature = "safetensors")]
#[test]
fn checkpoints_without_what_is_asked_for() {
    use pointwise::checkpoint::{matrix, tensor, vector};
    use pointwise::safetensors::SafeTensors;
    let header = concat!(
        r#"{"c.weight":{"dtype":"I8","shape":[2,2],"data_offsets":[0,4]},"#,
        r#""v":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 8]);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    refused!(vector(&file, "w"), Error::MissingTensor { .. }, "\"w\"");
    refused!(
        matrix(&file, "v"),
        Error::CheckpointTensor { .. },
        "\"v\"",
        "F32 [1]",
        "[c_out, c_in]"
    );
    refused!(
        tensor(&file, "c.weight"),
        Error::CheckpointTensor { .. },
        "\"c.weight\"",
        "I8 [2, 2]"
    );
    let layer = Pointwise::from_safetensors(&file, "c", None);
    refused!(layer, Error::CheckpointTensor { .. }, "I8 [2, 2]", "F32, F16 or BF16");
    let norm = BatchNorm::from_safetensors(&file, "bn");
    refused!(norm, Error::MissingTensor { .. }, "bn.running_mean");
    let truncated = SafeTensors::deserialize(&bytes[..20]).map_err(Error::from);
    refused!(truncated, Error::Checkpoint(_), "checkpoint");
}

/// What the environment steers is read once per process, so that each test of it needs a process
/// of its own: this binary again, running [`in_a_child`] alone.
fn child(job: &str, variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "errors::in_a_child", "--ignored", "--nocapture"]);
    for name in ["POINTWISE_CPU_ISA", "POINTWISE_KERNEL", "POINTWISE_DEVICE"] {
        command.env_remove(name);
    }
    let output =
        command.env("POINTWISE_TEST_JOB", job).envs(variables.iter().copied()).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let begin = stdout.find("answer<").unwrap_or_else(|| panic!("no answer: {stdout}"));
    let end = stdout.find(">answer").unwrap_or_else(|| panic!("no answer: {stdout}"));
    stdout[begin + "answer<".len()..end].to_owned()
}

#[test]
#[ignore = "a helper that the tests of environment variables run in processes of their own"]
fn in_a_child() {
    let Ok(job) = std::env::var("POINTWISE_TEST_JOB") else { return };
    let layer = Pointwise::new(ndarray::array![[1.0, 2.0, 3.0]]).relu();
    let device = match job.as_str() {
        "best" => Device::best(),
        "cpu" => Device::cpu(),
        "quantized" => Device::cpu(),
        other => panic!("no job {other}"),
    };
    let run = || -> Result<String> {
        if job == "quantized" {
            let weight = ndarray::array![[1i8, 2, 3]];
            let layer =
                pointwise::Quantized::new(weight, vec![1.0], pointwise::Quantization::u8(1.0, 0));
            return Ok(format!("ran {}", layer.prepare(&device)?.kernel()));
        }
        let prepared = layer.prepare(&device)?;
        let dst = prepared.forward(&src(1, 3, 2, 2))?;
        assert!(dst.iter().all(|&x| x == 6.0), "{dst}");
        Ok(format!("ran {} on {device}", prepared.plans(&[1, 3, 2, 2])?[0].kernel))
    };
    let answer = run().unwrap_or_else(|error| {
        let variant = format!("{error:?}");
        format!("{} | {error}", variant.split([' ', '(']).next().unwrap_or_default())
    });
    println!("answer<{answer}>answer");
}

#[test]
fn a_forced_instruction_set_is_obeyed_or_refused() {
    for isa in ["portable", "avx2", "avx512"] {
        let answer = child("cpu", &[("POINTWISE_CPU_ISA", isa)]);
        let ran = answer.starts_with(&format!("ran fprop_f32_{isa}_"));
        let refused =
            answer.starts_with("Environment") && answer.contains(isa) && isa != "portable";
        assert!(ran || refused, "{isa}: {answer}");
        assert!(!ran || answer.contains(&format!("cpu ({isa}, ")), "{isa}: {answer}");
    }
    assert!(child("cpu", &[("POINTWISE_CPU_ISA", "")]).starts_with("ran "));
    for bad in ["avx9", "AVX2", " avx2", "é"] {
        let answer = child("cpu", &[("POINTWISE_CPU_ISA", bad)]);
        assert!(answer.starts_with("Environment"), "{answer}");
        for part in ["POINTWISE_CPU_ISA", bad, "portable, avx2, avx512"] {
            assert!(answer.contains(part), "{answer}");
        }
    }
}

#[test]
fn a_refused_variable_is_named_once() {
    let answer = child("cpu", &[("POINTWISE_CPU_ISA", "avx9")]);
    assert_eq!(answer.matches("POINTWISE_CPU_ISA").count(), 1, "{answer}");
}

#[test]
fn a_forced_kernel_is_obeyed_or_refused() {
    let name = "fprop_f32_portable_4x8";
    let answer = child("cpu", &[("POINTWISE_KERNEL", name)]);
    assert!(answer.starts_with(&format!("ran {name}")), "{answer}");
    assert!(child("cpu", &[("POINTWISE_KERNEL", "")]).starts_with("ran "));
    let answer = child("cpu", &[("POINTWISE_KERNEL", "fprop_f32_avx9_1x1")]);
    assert!(answer.starts_with("Kernel"), "{answer}");
    assert!(answer.contains("fprop_f32_avx9_1x1") && answer.contains(name), "{answer}");
    let name = "fprop_i8_portable_4x8";
    assert_eq!(child("quantized", &[("POINTWISE_KERNEL", name)]), format!("ran {name}"));
    assert!(child("quantized", &[("POINTWISE_KERNEL", "fprop_f32_portable_4x8")]).contains(name));
}

#[test]
fn the_best_device_falls_back_but_a_wrong_name_is_refused() {
    assert!(child("best", &[("POINTWISE_DEVICE", "cpu")]).contains(" on cpu ("));
    for bad in ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:99999999999999999999", "CPU", "cpu "] {
        let answer = child("best", &[("POINTWISE_DEVICE", bad)]);
        assert!(answer.starts_with("Environment"), "{answer}");
        for part in ["POINTWISE_DEVICE", bad, "expected cpu, cuda or cuda:N"] {
            assert!(answer.contains(part), "{answer}");
        }
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_the_feature_every_cuda_device_is_the_cpu() {
    for name in ["cuda", "cuda:0", "cuda:7", ""] {
        let answer = child("best", &[("POINTWISE_DEVICE", name)]);
        assert!(answer.starts_with("ran ") && answer.contains(" on cpu ("), "{name}: {answer}");
    }
}

#[cfg(unix)]
#[test]
fn variables_need_not_be_text() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    // The best device may be one that has no instruction set to force.
    for (variable, job) in
        [("POINTWISE_DEVICE", "best"), ("POINTWISE_CPU_ISA", "cpu"), ("POINTWISE_KERNEL", "cpu")]
    {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "errors::in_a_child", "--ignored", "--nocapture"]);
        command.env("POINTWISE_TEST_JOB", job).env(variable, OsStr::from_bytes(b"\xff\xfe"));
        let output = command.output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let refused = ["answer<Environment", "answer<Kernel"].iter().any(|s| stdout.contains(s));
        assert!(output.status.success() && refused, "{variable}: {stdout}");
        assert!(stdout.contains("\u{fffd}\u{fffd}"), "{variable} without its value: {stdout}");
    }
}

impl Rng {
    fn odd_float(&mut self) -> f32 {
        self.pick(&[
            0.0,
            -0.0,
            1.0,
            -1.5,
            1e-5,
            1e38,
            -1e-40,
            f32::NAN,
            f32::INFINITY,
            -f32::INFINITY,
        ])
    }

    /// Mostly `right`, since only what is nearly right gets past the first check.
    fn size(&mut self, right: usize) -> usize {
        if self.chance(90) {
            return right;
        }
        self.pick(&[0, 1, 2, 3, 5, 1 << 50, 1 << 62, usize::MAX - 2, usize::MAX])
    }

    fn odd_vector(&mut self, len: usize) -> Array1<f32> {
        let len = if self.chance(95) { len } else { self.below(6) };
        let wild = self.chance(15);
        Array1::from_shape_fn(len, |_| if wild { self.odd_float() } else { 1.0 })
    }

    fn activation(&mut self) -> Activation {
        let (a, b) =
            if self.chance(70) { (-1.0, 1.0) } else { (self.odd_float(), self.odd_float()) };
        self.pick(&[
            Activation::Relu,
            Activation::Clip { lo: a, hi: b },
            Activation::LeakyRelu { alpha: a },
            Activation::Elu { alpha: b },
            Activation::Gelu,
            Activation::Mish,
        ])
    }

    fn batch_norm(&mut self, channels: usize) -> BatchNorm {
        let norm = BatchNorm::new(self.odd_vector(channels), self.odd_vector(channels));
        let norm = if self.chance(10) { norm.eps(self.odd_float()) } else { norm };
        if self.chance(50) {
            norm
        } else {
            norm.affine(self.odd_vector(channels), self.odd_vector(channels))
        }
    }

    fn layer_norm(&mut self, channels: usize) -> LayerNorm {
        let norm = self.pick(&[LayerNorm::over_channels(), LayerNorm::over_all()]);
        let norm = if self.chance(10) { norm.eps(self.odd_float()) } else { norm };
        if self.chance(50) {
            norm
        } else {
            norm.affine(self.odd_vector(channels), self.odd_vector(channels))
        }
    }

    /// Shape and strides over a small slice: contiguous in some order, or anything.
    fn strides(&mut self, shape: &[usize]) -> (usize, Vec<isize>) {
        let mut strides = vec![0isize; shape.len()];
        if self.chance(80) {
            let mut order: Vec<usize> = (0..shape.len()).collect();
            (1..order.len()).rev().for_each(|i| order.swap(i, self.below(i + 1)));
            let mut next = 1isize;
            for &axis in &order {
                strides[axis] = next;
                next = next.wrapping_mul(shape[axis].max(1) as isize);
            }
        } else {
            let choice = [0, 1, -1, 2, 7, -30, 100, isize::MAX, isize::MIN, isize::MAX / 2];
            strides.fill_with(|| self.pick(&choice));
        }
        let offset = if self.chance(80) { 0 } else { self.pick(&[1, 50, 500, usize::MAX]) };
        (offset, strides)
    }
}

/// A layer and a call of which anything may be wrong: the answer is a result or an error. Says
/// whether it was a result.
fn throw_garbage(seed: u64) -> bool {
    let rng = &mut Rng(seed);
    let (groups, rows, k) =
        (rng.pick(&[1, 1, 2, 3]), rng.pick(&[1, 2, 5, 9]), rng.pick(&[1, 2, 4]));
    let (c_out, c_in) = (rows * groups, k * groups);
    let weight_rows = if rng.chance(97) { c_out } else { rng.below(4) };
    let weight_k = if rng.chance(97) { k } else { 0 };
    let mut layer = Pointwise::new(Array2::from_shape_fn((weight_rows, weight_k), |_| {
        if rng.chance(95) { 1.0 } else { rng.odd_float() }
    }))
    .groups(rng.size(groups));
    let stride = rng.pick(&[1, 1, 1, 2, 3]);
    let stride = rng.size(stride);
    layer = layer.stride(stride);
    let (mut before, mut after) = (0, 0);
    if rng.chance(20) {
        (before, after) = (rng.below(3), rng.below(3));
        let (start, end) = (rng.size(before), rng.size(before + c_in));
        layer = layer.partial(start..end);
    }
    for _ in 0..rng.pick(&[0, 0, 1, 2]) {
        let stage = match rng.below(4) {
            0 => SourceStage::BatchNorm(rng.batch_norm(c_in)),
            1 => SourceStage::Affine { scale: rng.odd_vector(c_in), shift: rng.odd_vector(c_in) },
            2 => SourceStage::Gate,
            _ => SourceStage::Activation(rng.activation()),
        };
        layer = layer.source_stage(stage);
    }
    for _ in 0..rng.pick(&[0, 1, 2, 3]) {
        let stage = match rng.below(7) {
            0 => Stage::Bias(rng.odd_vector(c_out)),
            1 => Stage::BatchNorm(rng.batch_norm(c_out)),
            2 => Stage::PRelu(rng.odd_vector(c_out)),
            3 => Stage::Residual,
            4 => Stage::LayerNorm(rng.layer_norm(c_out)),
            5 => Stage::ChannelShuffle { groups: rng.size(groups) },
            _ => Stage::Activation(rng.activation()),
        };
        layer = layer.stage(stage);
    }

    let rank = rng.pick(&[0, 0, 1, 2, 3]);
    let mut spatial: Vec<usize> = (0..rank).map(|_| rng.pick(&[0, 1, 2, 5, 8])).collect();
    for s in &mut spatial {
        *s = if rng.chance(90) { (*s).max(1) } else { rng.size(*s) };
    }
    let n = rng.pick(&[0, 1, 1, 2, 3]);
    let shape_of = |rng: &mut Rng, channels: usize, stride: usize| {
        let mut shape = vec![rng.size(n), rng.size(channels)];
        shape.extend(spatial.iter().map(|s| s.div_ceil(stride.max(1))));
        if rng.chance(4) {
            shape.truncate(rng.below(4));
        }
        if rng.chance(4) {
            shape.push(rng.below(3));
        }
        shape
    };
    let total = before + c_in + after;
    let concat = rng.chance(20).then(|| rng.below(total));
    let src_shape = shape_of(rng, concat.unwrap_or(total), 1);
    let more_shape = concat.map(|first| shape_of(rng, total - first, 1));
    let dst_shape = shape_of(rng, before + c_out + after, stride);
    let residual_shape = shape_of(rng, before + c_out + after, stride);
    let gate_shape = if rng.chance(90) { vec![n, c_in] } else { shape_of(rng, c_in, 1) };

    let data = vec![if rng.chance(90) { 1.0f32 } else { rng.odd_float() }; 4000];
    let view = |rng: &mut Rng, shape: &[usize]| {
        let (offset, strides) = rng.strides(shape);
        TensorRef::from_slice(&data, offset, shape, &strides).ok()
    };
    let source = view(rng, &src_shape);
    let more = more_shape.and_then(|shape| view(rng, &shape));
    let residual = if rng.chance(70) == layer_has(&layer, "residual") {
        view(rng, &residual_shape)
    } else {
        None
    };
    let gate =
        if rng.chance(70) == layer_has(&layer, "gate") { view(rng, &gate_shape) } else { None };
    let mut written = vec![f32::NAN; 4000];
    let (offset, strides) = rng.strides(&dst_shape);

    let _ = layer.check();
    let device = Device::cpu().threads(rng.below(3));
    let kernel = rng.pick(&[None, None, None, Some("fprop_f32_portable_4x8".to_owned())]);
    let options = PrepareOptions { kernel, ..Default::default() };
    let Ok(prepared) = layer.prepare_with(&device, options) else { return false };
    let _ = prepared.dst_shape(&src_shape);
    let _ = prepared.cost(&src_shape);
    let _ = prepared.plans(&src_shape);
    let _ = prepared.plans_in(&src_shape, Layout::ChannelsLast);
    if rng.chance(5) {
        let _ = prepared.explain(&src_shape).map(|explanation| explanation.to_string());
    }
    let Some(source) = source else { return false };
    macro_rules! call {
        () => {{
            let mut call = prepared.call(&source);
            if let Some(more) = &more {
                call = call.concat(more);
            }
            if let Some(residual) = &residual {
                call = call.residual(residual);
            }
            if let Some(gate) = &gate {
                call = call.gate(gate);
            }
            call
        }};
    }
    let allocated = call!().run();
    if let Ok(mut dst) = TensorMut::from_slice(&mut written, offset, &dst_shape, &strides) {
        let into = call!().run_into(&mut dst);
        // Whatever an allocating call accepts, a call into memory of that shape does, and back.
        if let Ok(allocated) = &allocated
            && allocated.shape() == dst_shape
        {
            assert!(into.is_ok(), "{into:?}");
        }
        assert!(into.is_err() || allocated.is_ok(), "{allocated:?}");
    }
    if let Ok(sequence) = Sequence::new(vec![prepared.clone(), prepared.clone()]) {
        let _ = sequence.forward(&source);
    }
    if let Ok(branches) = Branches::new(vec![prepared.clone(), prepared]) {
        let _ = branches.forward(&source);
    }
    allocated.is_ok()
}

fn layer_has(layer: &Pointwise, name: &str) -> bool {
    layer.stages().iter().any(|stage| stage.name() == name)
        || layer.source_stages().iter().any(|stage| stage.name() == name)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_never_panics(seed: u64) {
        throw_garbage(seed);
    }
}

/// Garbage of which all is refused at the door would test nothing behind it.
#[test]
fn some_garbage_is_accepted() {
    let accepted = (0..5000).filter(|&seed| throw_garbage(seed)).count();
    assert!((500..4500).contains(&accepted), "{accepted} of 5000");
}

/// Views of one array that share no element are no alias, however they interleave.
#[test]
fn what_only_looks_like_an_alias_is_accepted() {
    let mut whole = Array4::<f32>::ones((2, 8, 3, 4));
    let layer = cpu(plain(4, 4));
    let (a, mut b) = whole.view_mut().split_at(Axis(1), 4);
    layer.forward_into(&a, &mut b).unwrap();
    let ptr = whole.as_mut_ptr();
    // SAFETY: even and odd channels of `whole`, which outlives both.
    let (even, mut odd): (ArrayView4<'_, f32>, ArrayViewMut4<'_, f32>) = unsafe {
        use ndarray::ShapeBuilder;
        let shape = (2, 4, 3, 4).strides((96, 24, 4, 1));
        (ArrayView4::from_shape_ptr(shape, ptr), ArrayViewMut4::from_shape_ptr(shape, ptr.add(12)))
    };
    layer.forward_into(&even, &mut odd).unwrap();
    assert!(whole.slice(s![.., 1..;2, .., ..]).iter().all(|&x| x == 10.0));
}
