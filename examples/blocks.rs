//! The blocks of well-known networks, each a dozen lines to copy, each checked against the crate's
//! f64 reference: `cargo run --release --example blocks`.

use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};

use clap::Parser;
use ndarray::{Array, Array2, Array3, Array4, Array5, Axis, Dimension, ShapeBuilder, s};
use pointwise::init::{Fan, Init, Nonlinearity};
use pointwise::reference::{self, Inputs};
use pointwise::{
    Activation, BatchNorm, Branches, Device, Error, LayerNorm, Pointwise, Result, Sequence, nhwc,
};

/// ResNet: reduce, 3x3 with stride 2, expand; the projection of the source is the residual.
fn resnet_bottleneck(device: &Device, check: &mut Check) -> Result<()> {
    let reduce = Pointwise::new(weight(32, 64)).batch_norm(norm(32)).relu();
    let project = Pointwise::new(weight(128, 64)).stride(2).batch_norm(norm(128));
    let expand = Pointwise::new(weight(128, 32)).batch_norm(norm(128)).residual().relu();

    let src: Array4<f32> = tensor([2, 64, 15, 14]);
    let reduced = reduce.prepare(device)?.forward(&src)?;
    let inner = conv3x3(&reduced, 2);
    let shortcut = project.prepare(device)?.forward(&src)?;
    let dst = expand.prepare(device)?.call(&inner).residual(&shortcut).run()?;

    check.layer(&reduce, inputs(&[&src]), &reduced)?;
    check.layer(&project, inputs(&[&src]), &shortcut)?;
    let residual = Some(shortcut.view().into_dyn());
    check.layer(&expand, Inputs { residual, ..inputs(&[&inner]) }, &dst)
}

/// Inception: all 1x1 branches in one pass over the source, and every result written in place into
/// its channels of the concatenation.
fn inception(device: &Device, check: &mut Check) -> Result<()> {
    let branch = |c_out| Pointwise::new(weight(c_out, 48)).batch_norm(norm(c_out)).relu();
    let (direct, reduce, pooled) = (branch(24), branch(16), branch(8));
    let branches = Branches::new(vec![direct.prepare(device)?, reduce.prepare(device)?])?;

    let src: Array4<f32> = tensor([2, 48, 9, 11]);
    let mut dst = Array4::zeros((2, 24 + 16 + 8, 9, 11));
    let (mut first, rest) = dst.view_mut().split_at(Axis(1), 24);
    let (mut second, mut third) = rest.split_at(Axis(1), 16);
    let mut reduced = Array4::zeros((2, 16, 9, 11));
    branches.call(&src).run_into(&mut [&mut first, &mut reduced])?;
    second.assign(&conv3x3(&reduced, 1));
    let pool = max_pool3x3(&src);
    pooled.prepare(device)?.forward_into(&pool, &mut third)?;

    check.layer(&reduce, inputs(&[&src]), &reduced)?;
    check.layer(&direct, inputs(&[&src]), &dst.slice(s![.., ..24, .., ..]))?;
    check.layer(&pooled, inputs(&[&pool]), &dst.slice(s![.., 40.., .., ..]))
}

/// DenseNet: BN → ReLU → 1x1 over all earlier results, which are never copied together.
fn densenet(device: &Device, check: &mut Check) -> Result<()> {
    let layer = Pointwise::new(weight(48, 64 + 12 + 12))
        .source_batch_norm(norm(64 + 12 + 12))
        .source_activation(Activation::Relu);

    let (a, b, c) = (tensor([2, 64, 7, 7]), tensor([2, 12, 7, 7]), tensor([2, 12, 7, 7]));
    let dst: Array4<f32> = layer.prepare(device)?.call(&a).concat(&b).concat(&c).run()?;

    check.layer(&layer, inputs(&[&a, &b, &c]), &dst)
}

/// MobileNet's depthwise separable block: depthwise 3x3, then pointwise.
fn depthwise_separable(device: &Device, check: &mut Check) -> Result<()> {
    let layer = Pointwise::new(weight(64, 32)).batch_norm(norm(64)).relu6();

    let src: Array4<f32> = tensor([2, 32, 13, 12]);
    let filtered = depthwise3x3(&src, 2);
    let dst = layer.prepare(device)?.forward(&filtered)?;

    check.layer(&layer, inputs(&[&filtered]), &dst)
}

/// The other order (blueprint separable, the front of an inverted residual): pointwise first.
fn separable_pointwise_first(device: &Device, check: &mut Check) -> Result<()> {
    let layer = Pointwise::new(weight(96, 24)).batch_norm(norm(96)).silu();

    let src: Array4<f32> = tensor([2, 24, 13, 12]);
    let expanded = layer.prepare(device)?.forward(&src)?;
    let dst = depthwise3x3(&expanded, 1);

    assert_eq!(dst.shape(), [2, 96, 13, 12]);
    check.layer(&layer, inputs(&[&src]), &expanded)
}

/// A segmentation head: coarse features, resized by the caller, beside fine ones.
fn segmentation_head(device: &Device, check: &mut Check) -> Result<()> {
    let fuse = Pointwise::new(weight(32, 64 + 24)).batch_norm(norm(32)).relu();
    let classify = Pointwise::new(weight(21, 32)).bias(vec![0.1; 21]);

    let (coarse, fine) = (tensor([1, 64, 8, 10]), tensor([1, 24, 16, 20]));
    let resized =
        Array4::from_shape_fn((1, 64, 16, 20), |(n, c, y, x)| coarse[[n, c, y / 2, x / 2]]);
    let fused: Array4<f32> = fuse.prepare(device)?.call(&resized).concat(&fine).run()?;
    let logits = classify.prepare(device)?.forward(&fused)?;

    check.layer(&fuse, inputs(&[&resized, &fine]), &fused)?;
    check.layer(&classify, inputs(&[&fused]), &logits)
}

/// ShuffleNet: grouped 1x1 with the shuffle folded into it, depthwise, grouped 1x1 and residual.
fn shufflenet(device: &Device, check: &mut Check) -> Result<()> {
    let first = Pointwise::new(weight(24, 48 / 4)).groups(4).batch_norm(norm(24)).relu();
    let first = first.channel_shuffle(4);
    let last = Pointwise::new(weight(48, 24 / 4)).groups(4).batch_norm(norm(48)).residual().relu();

    let src: Array4<f32> = tensor([2, 48, 10, 10]);
    let shuffled = first.prepare(device)?.forward(&src)?;
    let inner = depthwise3x3(&shuffled, 1);
    let dst = last.prepare(device)?.call(&inner).residual(&src).run()?;

    check.layer(&first, inputs(&[&src]), &shuffled)?;
    let residual = Some(src.view().into_dyn());
    check.layer(&last, Inputs { residual, ..inputs(&[&inner]) }, &dst)
}

/// MobileNetV3: squeeze and excitation, whose two fully connected layers are pointwise layers of
/// spatial rank 0, gates the source of the projection while it is read.
fn mobilenet_v3(device: &Device, check: &mut Check) -> Result<()> {
    let squeeze = Pointwise::new(weight(18, 72)).bias(vec![0.0; 18]).relu();
    let excite = Pointwise::new(weight(72, 18)).bias(vec![0.5; 72]).hard_sigmoid();
    let project = Pointwise::new(weight(40, 72)).gate().batch_norm(norm(40)).residual();

    let (src, shortcut): (Array4<f32>, _) = (tensor([2, 72, 14, 14]), tensor([2, 40, 14, 14]));
    let pooled = src.mean_axis(Axis(3)).and_then(|rows| rows.mean_axis(Axis(2)));
    let pooled: Array2<f32> = pooled.expect("the map is not empty");
    let squeezed = squeeze.prepare(device)?.forward(&pooled)?;
    let gate = excite.prepare(device)?.forward(&squeezed)?;
    let dst = project.prepare(device)?.call(&src).gate(&gate).residual(&shortcut).run()?;

    check.layer(&squeeze, inputs(&[&pooled]), &squeezed)?;
    check.layer(&excite, inputs(&[&squeezed]), &gate)?;
    let (residual, gate) = (Some(shortcut.view().into_dyn()), Some(gate.view().into_dyn()));
    check.layer(&project, Inputs { residual, gate, ..inputs(&[&src]) }, &dst)
}

/// PointNet: one small network for every point of a cloud, `[n, c, points]`.
fn pointnet(device: &Device, check: &mut Check) -> Result<()> {
    let layer = |c_out, c_in| Pointwise::new(weight(c_out, c_in)).batch_norm(norm(c_out)).relu();
    let layers = [layer(32, 3), layer(64, 32), layer(128, 64)];
    let prepared = layers.iter().map(|layer| layer.prepare(device)).collect::<Result<_>>()?;
    let network = Sequence::new(prepared)?;

    let points: Array3<f32> = tensor([2, 3, 500]);
    let features = network.forward(&points)?;
    let global: Array2<f32> = features.fold_axis(Axis(2), 0.0, |a: &f32, b: &f32| a.max(*b));

    assert_eq!(global.dim(), (2, 128));
    let mut src = points;
    for layer in &layers[..2] {
        src = reference::forward(layer, &inputs(&[&src]))?
            .mapv(|x| x as f32)
            .into_dimensionality()
            .expect("the rank stays");
    }
    check.layer(&layers[2], inputs(&[&src]), &features)
}

/// A 3-D volume, channels last, as medical images often come: `[n, d, h, w, c]`.
fn volume(device: &Device, check: &mut Check) -> Result<()> {
    let layer = Pointwise::new(weight(32, 16))
        .bias(vec![0.25; 32])
        .layer_norm(LayerNorm::over_channels().affine(vec![1.5; 32], vec![-0.5; 32]))
        .gelu();

    let voxels: Array5<f32> = tensor([1, 6, 7, 8, 16]);
    let src = nhwc(voxels.view()); // [n, c, d, h, w], nothing is moved
    let dst = layer.prepare(device)?.forward(&src)?;

    assert_eq!(dst.strides()[1], 1, "the result is channels last, too");
    let inputs = Inputs { sources: vec![src.into_dyn()], ..Default::default() };
    check.layer(&layer, inputs, &dst)
}

type Block = fn(&Device, &mut Check) -> Result<()>;

const BLOCKS: &[(&str, Block)] = &[
    ("ResNet bottleneck, stride 2 and projection", resnet_bottleneck),
    ("Inception module", inception),
    ("DenseNet's BN, ReLU, 1x1 over a concat", densenet),
    ("depthwise separable", depthwise_separable),
    ("separable, pointwise first", separable_pointwise_first),
    ("segmentation head over two scales", segmentation_head),
    ("ShuffleNet unit", shufflenet),
    ("MobileNetV3's gated projection", mobilenet_v3),
    ("PointNet's stack of 1-D layers", pointnet),
    ("3-D volume, channels last", volume),
];

/// Runs the blocks of well-known networks and compares each with the f64 reference.
#[derive(Parser)]
struct Options {
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => {
            return error.print().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
        }
        Err(error) => {
            let text = error.to_string();
            let words: Vec<_> =
                text.split("\n\n").take(1).flat_map(str::split_whitespace).collect();
            return fail(&words.join(" "));
        }
    };
    match run(&options.device) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => fail(&format!("error: {failed} of {} blocks failed", BLOCKS.len())),
        Err(error) => fail(&format!("error: {error}")),
    }
}

fn fail(message: &str) -> ExitCode {
    // Nobody is left to hear that stderr is closed.
    let _ = writeln!(std::io::stderr(), "{message}");
    ExitCode::FAILURE
}

/// How many blocks failed.
fn run(device: &str) -> Result<usize, Box<dyn std::error::Error>> {
    let device: Device = device.parse()?;
    let mut out = std::io::stdout();
    writeln!(out, "on {device}")?;
    let mut failed = 0;
    for (name, block) in BLOCKS {
        let mut check = Check::default();
        let verdict = match block(&device, &mut check) {
            Ok(()) if check.passed() => "ok".to_owned(),
            Ok(()) => "WRONG".to_owned(),
            Err(Error::Unsupported { what, .. }) => {
                writeln!(out, "{name:44} not on this device: {what}")?;
                continue;
            }
            Err(error) => error.to_string(),
        };
        failed += usize::from(verdict != "ok");
        let Check { error, tolerance } = check;
        writeln!(out, "{name:44} error {error:.1e}, tolerance {tolerance:.1e}: {verdict}")?;
    }
    Ok(failed)
}

/// The layer of a block that comes closest to its tolerance, or misses it.
#[derive(Default)]
struct Check {
    error: f64,
    tolerance: f64,
}

impl Check {
    /// Whether there was something to check, and all of it was right.
    fn passed(&self) -> bool {
        self.tolerance > 0.0 && self.error <= self.tolerance
    }

    /// Compares a result with the reference. A sum of `K` products is good for `K` roundings, the
    /// stages for some more.
    fn layer<S: ndarray::Data<Elem = f32>, D: Dimension>(
        &mut self,
        layer: &Pointwise,
        inputs: Inputs<'_>,
        dst: &ndarray::ArrayBase<S, D>,
    ) -> Result<()> {
        let expected = reference::forward(layer, &inputs)?;
        assert_eq!(dst.shape(), expected.shape());
        let largest = expected.iter().fold(1.0f64, |a, x| a.max(x.abs()));
        let tolerance = (layer.weight().ncols() + 16) as f64 * f64::from(f32::EPSILON) * largest;
        let differences = dst.iter().zip(&expected).map(|(&x, y)| (f64::from(x) - y).abs());
        // `f64::max` would lose a NaN.
        let error = differences.fold(0.0, |a: f64, x| if x <= a { a } else { x });
        let better = error * self.tolerance <= self.error * tolerance;
        if self.tolerance == 0.0 || (self.passed() && !better) {
            *self = Check { error, tolerance };
        }
        Ok(())
    }
}

fn inputs<'a, D: Dimension>(sources: &[&'a Array<f32, D>]) -> Inputs<'a> {
    let sources = sources.iter().map(|source| source.view().into_dyn()).collect();
    Inputs { sources, ..Default::default() }
}

fn weight(c_out: usize, c_in_per_group: usize) -> Array2<f32> {
    let init = Init::KaimingNormal { fan: Fan::In, nonlinearity: Nonlinearity::Relu };
    init.weight(c_out, c_in_per_group, 7).expect("channels are not 0")
}

/// A batch norm as training might have left it.
fn norm(channels: usize) -> BatchNorm {
    let wave = |scale: f32, offset: f32| -> Vec<f32> {
        (0..channels).map(|c| offset + scale * (c as f32 * 1.7).sin()).collect()
    };
    BatchNorm::new(wave(0.2, 0.0), wave(0.4, 1.0)).affine(wave(0.3, 1.0), wave(0.5, 0.1))
}

/// Other numbers in `[-1, 1)` at every call.
fn tensor<Sh: ShapeBuilder>(shape: Sh) -> Array<f32, Sh::Dim> {
    static STATE: AtomicU32 = AtomicU32::new(1);
    let step = |state: u32| state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    Array::from_shape_simple_fn(shape, || {
        let state = STATE.load(Ordering::Relaxed);
        STATE.store(step(state), Ordering::Relaxed);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Combines the 3x3 neighbourhood of every position that the stride keeps; zeros beyond the edge.
fn neighbourhoods(
    src: &Array4<f32>,
    stride: usize,
    start: f32,
    f: impl Fn(f32, f32, usize) -> f32,
) -> Array4<f32> {
    let (n, c, h, w) = src.dim();
    Array4::from_shape_fn((n, c, h.div_ceil(stride), w.div_ceil(stride)), |(n, c, y, x)| {
        (0..9).fold(start, |sum, i| {
            let (y, x) =
                ((y * stride + i / 3).wrapping_sub(1), (x * stride + i % 3).wrapping_sub(1));
            f(sum, src.get((n, c, y, x)).copied().unwrap_or(0.0), i)
        })
    })
}

/// A depthwise 3x3 with some fixed filter.
fn depthwise3x3(src: &Array4<f32>, stride: usize) -> Array4<f32> {
    const FILTER: [f32; 9] = [0.1, -0.2, 0.1, 0.3, 0.6, 0.3, -0.1, 0.2, -0.1];
    neighbourhoods(src, stride, 0.0, |sum, x, i| sum + FILTER[i] * x)
}

/// A 3x3 convolution that keeps the number of channels: a filter, then a mix of neighbours.
fn conv3x3(src: &Array4<f32>, stride: usize) -> Array4<f32> {
    let filtered = depthwise3x3(src, stride);
    let channels = src.len_of(Axis(1));
    Array4::from_shape_fn(filtered.dim(), |(n, c, y, x)| {
        filtered[[n, c, y, x]] - 0.5 * filtered[[n, (c + 1) % channels, y, x]]
    })
}

fn max_pool3x3(src: &Array4<f32>) -> Array4<f32> {
    neighbourhoods(src, 1, f32::NEG_INFINITY, |max, x, _| max.max(x))
}
