//! The operator's fixtures, computed by PyTorch, as layers and inputs of this crate.
//! `tests/fixtures/make.py` describes the files.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::ops::Range;
use std::path::Path;

use ndarray::{Array1, Array2, ArrayD, ArrayViewD, Axis, Dimension, IxDyn, Slice, concatenate};
use pointwise::reference::{self, Inputs};
use pointwise::{Activation, BatchNorm, LayerNorm, Pointwise, SourceStage, Stage};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// `operator.json` and `operator.safetensors`.
pub struct Fixtures {
    json: Value,
    tensors: Vec<u8>,
}

impl Fixtures {
    pub fn load() -> Self {
        Self::named("operator")
    }

    /// The gradients: `training.json` and `training.safetensors`.
    pub fn training() -> Self {
        Self::named("training")
    }

    fn named(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let read = |end: &str| std::fs::read(folder.join(format!("{name}.{end}"))).expect(name);
        Fixtures {
            json: serde_json::from_slice(&read("json")).expect("JSON"),
            tensors: read("safetensors"),
        }
    }

    /// A F64 tensor of a case, if there is one.
    pub fn wide(&self, case: &str, tensor: &str) -> Option<ArrayD<f64>> {
        let tensors = self.tensors();
        let name = format!("{case}/{tensor}");
        tensors.tensor(&name).is_ok().then(|| read_f64(&tensors, &name))
    }

    /// The gradient by a case's dst.
    pub fn d_dst(&self, case: &str) -> ArrayD<f32> {
        read_f32(&self.tensors(), &format!("{case}/d_dst"))
    }

    /// A row list of the JSON: `activations`, `init/gains`.
    pub fn rows(&self, pointer: &str) -> &[Value] {
        self.json.pointer(pointer).and_then(Value::as_array).expect(pointer)
    }

    pub fn cases(&self) -> Vec<Case> {
        let tensors = self.tensors();
        self.rows("/cases").iter().map(|row| Case::new(row, &tensors)).collect()
    }

    /// [`cases`](Self::cases), and most of them again as partial convolutions.
    pub fn cases_and_embedded(&self) -> Vec<Case> {
        let cases = self.cases();
        let embedded: Vec<_> = cases.iter().filter_map(Case::embedded).collect();
        cases.into_iter().chain(embedded).collect()
    }

    /// `activation/x` and `activation/{table}`.
    pub fn activation_table(&self, table: &str) -> (Vec<f32>, Vec<f64>) {
        let tensors = self.tensors();
        let x = read_f32(&tensors, "activation/x").into_raw_vec_and_offset().0;
        let y = read_f64(&tensors, &format!("activation/{table}")).into_raw_vec_and_offset().0;
        (x, y)
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.tensors).expect("operator.safetensors")
    }
}

fn read_f32(tensors: &SafeTensors<'_>, name: &str) -> ArrayD<f32> {
    let view = tensors.tensor(name).expect(name);
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    ArrayD::from_shape_vec(view.shape(), values.collect()).expect(name)
}

fn read_f64(tensors: &SafeTensors<'_>, name: &str) -> ArrayD<f64> {
    let view = tensors.tensor(name).expect(name);
    assert_eq!(view.dtype(), Dtype::F64, "{name}");
    let values = view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()));
    ArrayD::from_shape_vec(view.shape(), values.collect()).expect(name)
}

/// A stage as the JSON describes it, with the tensors that it names.
#[derive(Clone)]
pub struct Described {
    pub name: String,
    operands: Value,
    tensors: Vec<(String, ArrayD<f32>)>,
}

impl Described {
    fn new(row: &Value, case: &str, tensors: &SafeTensors<'_>) -> Self {
        let operands = row.as_object().expect("a stage is an object");
        let named =
            operands.iter().filter(|(key, _)| *key != "stage").filter_map(|(key, value)| {
                let name = format!("{case}/{}", value.as_str()?);
                Some((key.clone(), read_f32(tensors, &name)))
            });
        Described {
            name: row["stage"].as_str().expect("a stage has a name").to_owned(),
            tensors: named.collect(),
            operands: row.clone(),
        }
    }

    /// A number of the stage.
    pub fn number(&self, operand: &str) -> Option<f32> {
        self.operands[operand].as_f64().map(|x| x as f32)
    }

    /// What a tensor of the stage is called in its case.
    pub fn name_of(&self, operand: &str) -> Option<&str> {
        self.operands[operand].as_str()
    }

    /// A tensor of the stage.
    pub fn tensor(&self, operand: &str) -> Option<&ArrayD<f32>> {
        self.tensors.iter().find(|(name, _)| name == operand).map(|(_, tensor)| tensor)
    }

    fn vector(&self, operand: &str) -> Option<Array1<f32>> {
        self.tensor(operand).map(|t| Array1::from_iter(t.iter().copied()))
    }

    fn affine(&self) -> Option<(Array1<f32>, Array1<f32>)> {
        self.vector("gamma").zip(self.vector("beta"))
    }

    fn batch_norm(&self) -> BatchNorm {
        let [mean, var] = ["mean", "var"].map(|name| self.vector(name).expect(name));
        let norm = BatchNorm::new(mean, var).eps(self.number("eps").expect("eps"));
        match self.affine() {
            Some((gamma, beta)) => norm.affine(gamma, beta),
            None => norm,
        }
    }

    fn layer_norm(&self, norm: LayerNorm) -> LayerNorm {
        let norm = norm.eps(self.number("eps").expect("eps"));
        match self.affine() {
            Some((gamma, beta)) => norm.affine(gamma, beta),
            None => norm,
        }
    }

    fn stage(&self) -> Stage {
        match self.name.as_str() {
            "bias" => Stage::Bias(self.vector("bias").expect("bias")),
            "batch_norm" => Stage::BatchNorm(self.batch_norm()),
            "prelu" => Stage::PRelu(self.vector("slope").expect("slope")),
            "residual" => Stage::Residual,
            "layer_norm" => Stage::LayerNorm(self.layer_norm(LayerNorm::over_channels())),
            "layer_norm_all" => Stage::LayerNorm(self.layer_norm(LayerNorm::over_all())),
            "channel_shuffle" => {
                Stage::ChannelShuffle { groups: self.number("groups").expect("groups") as usize }
            }
            _ => Stage::Activation(activation(&self.operands)),
        }
    }

    fn source_stage(&self) -> SourceStage {
        match self.name.as_str() {
            "affine" => {
                let [scale, shift] = ["scale", "shift"].map(|n| self.vector(n).expect(n));
                SourceStage::Affine { scale, shift }
            }
            "batch_norm" => SourceStage::BatchNorm(self.batch_norm()),
            "gate" => SourceStage::Gate,
            _ => SourceStage::Activation(activation(&self.operands)),
        }
    }
}

/// The activation that a row of the JSON describes; not PReLU, which is a stage of its own.
pub fn activation(row: &Value) -> Activation {
    let number = |key: &str| row[key].as_f64().map(|x| x as f32);
    let alpha = || number("alpha").expect("alpha");
    match row["stage"].as_str().expect("a stage has a name") {
        "relu" => Activation::Relu,
        "relu6" => Activation::Relu6,
        "clip" => Activation::Clip {
            lo: number("lo").unwrap_or(f32::NEG_INFINITY),
            hi: number("hi").unwrap_or(f32::INFINITY),
        },
        "leaky_relu" => Activation::LeakyRelu { alpha: alpha() },
        "elu" => Activation::Elu { alpha: alpha() },
        "sigmoid" => Activation::Sigmoid,
        "tanh" => Activation::Tanh,
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        "hard_sigmoid" => Activation::HardSigmoid,
        "hard_swish" => Activation::HardSwish,
        "softplus" => Activation::Softplus,
        "mish" => Activation::Mish,
        name => panic!("unknown stage {name}"),
    }
}

/// A layer with the inputs and the result of one call.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub weight: Array2<f32>,
    pub groups: usize,
    pub stride: usize,
    pub partial: Option<Range<usize>>,
    pub source_stages: Vec<Described>,
    pub stages: Vec<Described>,
    pub sources: Vec<ArrayD<f32>>,
    pub dst: ArrayD<f64>,
}

impl Case {
    fn new(row: &Value, tensors: &SafeTensors<'_>) -> Self {
        let name = row["name"].as_str().expect("a case has a name").to_owned();
        let size = |value: &Value| value.as_u64().expect("a size") as usize;
        let described = |list: &str| {
            let list = row[list].as_array().expect(list);
            list.iter().map(|stage| Described::new(stage, &name, tensors)).collect()
        };
        let weight = read_f32(tensors, &format!("{name}/weight"));
        Case {
            weight: weight.into_dimensionality().expect("weight is [c_out, c_in / groups]"),
            groups: size(&row["groups"]),
            stride: size(&row["stride"]),
            partial: row.get("partial").map(|range| size(&range[0])..size(&range[1])),
            source_stages: described("source_stages"),
            stages: described("stages"),
            sources: (0..size(&row["sources"]))
                .map(|i| read_f32(tensors, &format!("{name}/src{i}")))
                .collect(),
            dst: read_f64(tensors, &format!("{name}/dst")),
            name,
        }
    }

    pub fn layer(&self) -> Pointwise {
        self.layer_of_first(self.stages.len())
    }

    /// The layer with its first stages only.
    fn layer_of_first(&self, stages: usize) -> Pointwise {
        let mut layer = Pointwise::new(self.weight.clone()).groups(self.groups).stride(self.stride);
        if let Some(range) = &self.partial {
            layer = layer.partial(range.clone());
        }
        for stage in &self.source_stages {
            layer = layer.source_stage(stage.source_stage());
        }
        for stage in &self.stages[..stages] {
            layer = layer.stage(stage.stage());
        }
        layer
    }

    pub fn residual(&self) -> Option<&ArrayD<f32>> {
        self.stages.iter().find_map(|stage| stage.tensor("residual"))
    }

    pub fn gate(&self) -> Option<&ArrayD<f32>> {
        self.source_stages.iter().find_map(|stage| stage.tensor("gate"))
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            sources: self.sources.iter().map(|t| t.view()).collect(),
            residual: self.residual().map(|t| t.view()),
            gate: self.gate().map(|t| t.view()),
        }
    }

    /// The same layer as a partial convolution: two channels before the case's, one behind them.
    /// `None` for a case that is one.
    pub fn embedded(&self) -> Option<Case> {
        const BEFORE: usize = 2;
        if self.partial.is_some() {
            return None;
        }
        let mut case = self.clone();
        case.name = format!("{}, embedded", self.name);
        let channels: usize = self.sources.iter().map(|source| source.shape()[1]).sum();
        case.partial = Some(BEFORE..BEFORE + channels);

        let beside = |like: &ArrayD<f32>, channels: usize| {
            let mut shape = like.raw_dim();
            shape[1] = channels;
            let mut next = 0.0;
            ArrayD::from_shape_simple_fn(shape, || {
                next += 0.25;
                next
            })
        };
        let join = |parts: &[ArrayViewD<'_, f32>]| concatenate(Axis(1), parts).expect("they fit");
        let last = self.sources.len() - 1;
        let (before, behind) = (beside(&self.sources[0], BEFORE), beside(&self.sources[last], 1));
        case.sources[0] = join(&[before.view(), self.sources[0].view()]);
        case.sources[last] = join(&[case.sources[last].view(), behind.view()]);

        let strided = |mut array: ArrayD<f32>| {
            for axis in 2..array.ndim() {
                array.slice_axis_inplace(Axis(axis), Slice::new(0, None, self.stride as isize));
            }
            array
        };
        let (before, behind) = (strided(before), strided(behind));
        let parts = [before.mapv(f64::from), self.dst.clone(), behind.mapv(f64::from)];
        case.dst = concatenate(Axis(1), &parts.each_ref().map(|t| t.view())).expect("they fit");
        // A residual's channels beside the convolved ones are not read.
        let unread = [before, behind].map(|t| t.mapv(|_| f32::NAN));
        let named = case.stages.iter_mut().flat_map(|stage| &mut stage.tensors);
        for (_, residual) in named.filter(|(name, _)| name == "residual") {
            *residual = join(&[unread[0].view(), residual.view(), unread[1].view()]);
        }
        Some(case)
    }

    /// The stage that stands twice in a list although it has parameters or takes a tensor.
    pub fn repeated_stage(&self) -> Option<&str> {
        fn repeated(stages: &[Described]) -> Option<&str> {
            let kind = |name: &'static str, stage: &Described| stage.name.starts_with(name);
            let once = ["bias", "batch_norm", "prelu", "residual", "layer_norm", "channel_shuffle"];
            let once = once.into_iter().chain(["affine", "gate"]);
            once.into_iter().find(|name| stages.iter().filter(|s| kind(name, s)).count() > 1)
        }
        repeated(&self.stages).or_else(|| repeated(&self.source_stages))
    }

    /// Whether a channel of dst is copied from src by a partial convolution.
    pub fn passes_through(&self, channel: usize) -> bool {
        let start = self.partial.as_ref().map_or(0, |range| range.start);
        !(start..start + self.weight.nrows()).contains(&channel)
    }

    /// How far an f32 result may be from the exact one: a bound on the rounding errors, followed
    /// through the list of stages.
    ///
    /// The convolution contributes `K · ε · max Σ|w·x|` (a bound for every order of summation)
    /// plus the error of its operand times the largest row sum of `|w|`. Every stage then
    /// multiplies what came before by the largest slope of its function and adds some ε of the
    /// largest values that it adds or produces: an activation 4 ulp; a normalisation the rounding
    /// of values, mean and variance divided by the smallest deviation. Maxima are over finite
    /// elements.
    pub fn tolerance(&self) -> f64 {
        let src: Vec<_> = self.sources.iter().map(|t| t.view()).collect();
        let src = concatenate(Axis(1), &src).expect("sources fit");
        let range = self.partial.clone().unwrap_or(0..src.shape()[1]);
        let src = src.slice_axis(Axis(1), Slice::from(range.clone()));

        let (mut error, mut x) = (0.0, src.mapv(f64::from));
        for (i, stage) in self.source_stages.iter().enumerate() {
            let y = self.first_source_stages(i + 1, src.view());
            error = error_through(stage, error, &x, &y);
            x = y;
        }

        let absolute = Pointwise::new(self.weight.mapv(f32::abs));
        let absolute = absolute.groups(self.groups).stride(self.stride);
        let sum = run(&absolute, x.mapv(|x| x.abs() as f32).view(), None);
        let row_sum = self.weight.rows().into_iter().map(|row| row.fold(0.0, |a, w| a + w.abs()));
        let row_sum = f64::from(row_sum.fold(0.0, f32::max));
        error = error * row_sum + self.weight.ncols() as f64 * EPS * max_abs(&sum);

        let convolved = |dst: ArrayD<f64>| {
            let channels = Slice::from(range.start..range.start + self.weight.nrows());
            dst.slice_axis(Axis(1), channels).to_owned()
        };
        let mut x = convolved(self.first_stages(0));
        for (i, stage) in self.stages.iter().enumerate() {
            let y = convolved(self.first_stages(i + 1));
            error = error_through(stage, error, &x, &y);
            x = y;
        }
        error + EPS * max_abs(&x)
    }

    fn first_source_stages(&self, count: usize, src: ArrayViewD<'_, f32>) -> ArrayD<f64> {
        let channels = src.shape()[1];
        let mut layer = Pointwise::new(Array2::ones((channels, 1))).groups(channels);
        for stage in &self.source_stages[..count] {
            layer = layer.source_stage(stage.source_stage());
        }
        let gated = self.source_stages[..count].iter().any(|stage| stage.name == "gate");
        run(&layer, src, self.gate().filter(|_| gated))
    }

    fn first_stages(&self, count: usize) -> ArrayD<f64> {
        let added = self.stages[..count].iter().any(|stage| stage.name == "residual");
        let mut inputs = self.inputs();
        inputs.residual = inputs.residual.filter(|_| added);
        reference::forward(&self.layer_of_first(count), &inputs).expect(&self.name)
    }
}

fn run(layer: &Pointwise, src: ArrayViewD<'_, f32>, gate: Option<&ArrayD<f32>>) -> ArrayD<f64> {
    let inputs = Inputs { sources: vec![src], residual: None, gate: gate.map(|gate| gate.view()) };
    reference::forward(layer, &inputs).expect("a layer of a fixture")
}

const EPS: f64 = f32::EPSILON as f64;

/// The largest finite magnitude.
fn max_abs<'a, T: Copy + Into<f64> + 'a>(values: impl IntoIterator<Item = &'a T>) -> f64 {
    let magnitudes = values.into_iter().map(|&x| x.into().abs());
    magnitudes.filter(|x| x.is_finite()).fold(0.0, f64::max)
}

/// The error of `y = stage(x)` when `x` has the given one.
fn error_through(stage: &Described, error: f64, x: &ArrayD<f64>, y: &ArrayD<f64>) -> f64 {
    let largest = |operand: &str| stage.tensor(operand).map_or(0.0, max_abs);
    let eps = f64::from(stage.number("eps").unwrap_or(0.0));
    let (max_x, max_y) = (max_abs(x), max_abs(y));
    match stage.name.as_str() {
        "channel_shuffle" => error,
        "bias" => error + EPS * (max_x + largest("bias")),
        "residual" => error + EPS * (max_x + largest("residual")),
        "gate" => largest("gate") * error + EPS * max_y,
        "affine" => largest("scale") * (error + 2.0 * EPS * max_x) + EPS * largest("shift"),
        "batch_norm" => {
            let var = stage.tensor("var").expect("var").fold(f32::INFINITY, |a, &v| a.min(v));
            let gamma = if stage.tensor("gamma").is_some() { largest("gamma") } else { 1.0 };
            let scale = gamma / (f64::from(var) + eps).sqrt();
            let shift = largest("beta") + largest("mean") * scale;
            scale * (error + 2.0 * EPS * max_x) + 2.0 * EPS * shift
        }
        "layer_norm" | "layer_norm_all" => {
            let over_all = stage.name == "layer_norm_all";
            let deviation = |values: ArrayViewD<'_, f64>| (values.var(0.0) + eps).sqrt();
            let mut smallest = f64::INFINITY;
            for sample in x.outer_iter() {
                if over_all {
                    smallest = smallest.min(deviation(sample));
                } else {
                    for position in sample.lanes(Axis(0)) {
                        smallest = smallest.min(deviation(position.into_dyn()));
                    }
                }
            }
            let count: usize = x.shape()[1..if over_all { x.ndim() } else { 2 }].iter().product();
            let gamma = if stage.tensor("gamma").is_some() { largest("gamma") } else { 1.0 };
            // A normalised value is at most √count.
            let slope = (2.0 + (count as f64).sqrt()) / smallest;
            gamma * slope * (error + 4.0 * EPS * max_x) + 4.0 * EPS * (max_y + largest("beta"))
        }
        _ => {
            // The steepest activation without operands, hard-swish, has slope 1.5.
            let alpha = f64::from(stage.number("alpha").unwrap_or(0.0)).abs();
            1.5f64.max(alpha).max(largest("slope")) * error + 4.0 * EPS * max_y
        }
    }
}

/// Whether `got` is `want` within a tolerance: NaN and infinities only match themselves.
pub fn close(got: f64, want: f64, tolerance: f64) -> bool {
    if want.is_nan() {
        got.is_nan()
    } else if want.is_infinite() {
        got == want
    } else {
        (got - want).abs() <= tolerance
    }
}

/// The first element that is not close, as text.
pub fn difference<'a, G>(
    got: impl Into<ArrayViewD<'a, G>>,
    want: &ArrayD<f64>,
    tolerance: impl Fn(&[usize], f64) -> f64,
) -> Option<String>
where
    G: Copy + Into<f64> + 'a,
{
    let got = got.into();
    if got.shape() != want.shape() {
        return Some(format!("shape {:?} instead of {:?}", got.shape(), want.shape()));
    }
    want.indexed_iter().find_map(|(index, &want)| {
        let got = got[&index].into();
        let tolerance = tolerance(index.slice(), want);
        (!close(got, want, tolerance)).then(|| {
            format!("{got} instead of {want} (tolerance {tolerance:.1e}) at {:?}", index.slice())
        })
    })
}

/// The same array with its logical axes `[n, c, …spatial]` in channels-last memory order.
pub fn channels_last(array: &ArrayD<f32>) -> ArrayD<f32> {
    let mut file = to_nhwc(array);
    for axis in (2..file.ndim()).rev() {
        file.swap_axes(axis, axis - 1);
    }
    file
}

/// `[n, c, …spatial]` as a row-major array `[n, …spatial, c]`.
pub fn to_nhwc(array: &ArrayD<f32>) -> ArrayD<f32> {
    let mut view = array.view();
    for axis in 2..view.ndim() {
        view.swap_axes(axis - 1, axis);
    }
    let shape = IxDyn(view.shape());
    ArrayD::from_shape_vec(shape, view.iter().copied().collect()).expect("the same elements")
}
