//! `--train`: a forward pass with batch statistics, a backward pass, and all gradients.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::{Array2, ArrayD, ArrayViewD};
use pointwise::safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use pointwise::train::{Grads, Options as TrainOptions, Params, name};
use pointwise::{Device, Element, Pointwise, nhwc_mut};

use crate::Result;
use crate::npy;

/// The tensors of a call with the logical axes `[n, c, …spatial]`, and how the files have them.
pub struct Tensors<'a, T> {
    pub sources: Vec<ArrayViewD<'a, T>>,
    pub residual: Option<ArrayViewD<'a, T>>,
    pub gate: Option<Array2<T>>,
    pub d_dst: ArrayViewD<'a, T>,
    /// Whether files are `[n, …spatial, c]`.
    pub last: bool,
}

/// What a checkpoint of `apply` calls a parameter.
fn file_name(name: &str) -> &str {
    match name {
        name::GAMMA => "gamma",
        name::BETA => "beta",
        name::RUNNING_MEAN => "running_mean",
        name::RUNNING_VAR => "running_var",
        name::SLOPE => "slope",
        name::LN_GAMMA => "ln_gamma",
        name::LN_BETA => "ln_beta",
        name::SRC_SCALE => "src_scale",
        name::SRC_SHIFT => "src_shift",
        name => name,
    }
}

/// Runs both passes: writes the result into `dst`, everything else into `gradients`.
pub fn run<T: Element>(
    layer: &Pointwise,
    device: &Device,
    momentum: f64,
    tensors: &Tensors<'_, T>,
    dst: &mut ArrayD<T>,
    gradients: &Path,
) -> Result<()> {
    let options = TrainOptions { momentum: Some(momentum), ..TrainOptions::default() };
    let mut params = Params::with_options(layer, device, options)?;
    let (first, more) = tensors.sources.split_first().ok_or("no --input")?;
    let last = tensors.last;

    let mut call = params.call(first);
    for source in more {
        call = call.concat(source);
    }
    if let Some(residual) = &tensors.residual {
        call = call.residual(residual);
    }
    if let Some(gate) = &tensors.gate {
        call = call.gate(gate);
    }
    let workspace = match last {
        true => call.run_into(&mut nhwc_mut(dst.view_mut()))?,
        false => call.run_into(dst)?,
    };

    let mut grads: Grads = params.grads();
    // In the order of the files' axes.
    let like = |tensor: &ArrayViewD<'_, T>| -> Result<ArrayD<T>> {
        let mut shape = tensor.shape().to_vec();
        if last {
            shape[1..].rotate_left(1);
        }
        Ok(npy::zeros(&shape)?.mapv(T::from_f32))
    };
    let mut d_sources = tensors.sources.iter().map(like).collect::<Result<Vec<_>>>()?;
    let mut d_residual = tensors.residual.as_ref().map(like).transpose()?;
    let mut d_gate = tensors.gate.as_ref().map(|gate| Array2::<T>::default(gate.dim()));
    let mut views: Vec<_> = d_sources
        .iter_mut()
        .chain(&mut d_residual)
        .map(|d| if last { nhwc_mut(d.view_mut()) } else { d.view_mut() })
        .collect();
    let (d_src, of_residual) = views.split_at_mut(tensors.sources.len());

    let mut call = params.backward_call(first, workspace, &tensors.d_dst);
    for source in more {
        call = call.concat(source);
    }
    for d in d_src {
        call = call.d_src(d);
    }
    if let (Some(residual), [d]) = (&tensors.residual, of_residual) {
        call = call.residual(residual).d_residual(d);
    }
    if let (Some(gate), Some(d)) = (&tensors.gate, &mut d_gate) {
        call = call.gate(gate).d_gate(d);
    }
    call.run(&mut grads)?;

    let mut out = BTreeMap::new();
    match d_sources.as_slice() {
        [d] => {
            out.insert("d_src".to_owned(), bytes(d.shape(), d));
        }
        all => out.extend(
            all.iter().enumerate().map(|(i, d)| (format!("d_src{i}"), bytes(d.shape(), d))),
        ),
    }
    out.extend(d_residual.iter().map(|d| ("d_residual".to_owned(), bytes(d.shape(), d))));
    out.extend(d_gate.iter().map(|d| ("d_gate".to_owned(), bytes(d.shape(), d))));
    grads.visit(|name, shape, values| {
        out.insert(format!("d_{}", file_name(name)), bytes(shape, values));
    });
    for name in [name::RUNNING_MEAN, name::RUNNING_VAR] {
        if let Some(values) = params.get(name) {
            out.insert(file_name(name).to_owned(), bytes(&[values.len()], values));
        }
    }
    let views = out
        .iter()
        .map(|(name, (shape, bytes))| {
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>>>()?;
    serialize_to_file(views, None, gradients)
        .map_err(|error| format!("{}: {error}", gradients.display()))?;
    Ok(())
}

/// A tensor of a file, whose values are f32.
fn bytes<'v, T: Element>(
    shape: &[usize],
    values: impl IntoIterator<Item = &'v T>,
) -> (Vec<usize>, Vec<u8>) {
    (shape.to_vec(), values.into_iter().flat_map(|x| x.to_f32().to_le_bytes()).collect())
}
