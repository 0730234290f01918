//! The example `apply` as its users run it: against PyTorch's results, and with bad input.

mod common;
#[path = "common/trials.rs"]
mod trials;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use common::{Case, Described, Fixtures, difference, to_nhwc};
use half::{bf16, f16};
use libtest_mimic::{Arguments, Failed, Trial};
use ndarray::{ArrayD, IxDyn, ShapeBuilder};
use ndarray_npy::{ReadNpyExt, WriteNpyExt};
use pointwise::quantized::{
    DynamicQuantized, F8E4M3, F8E5M2, Fp8, Fp8Element, Fp8Quantization, Int8, Per, QuantizedFp8,
};
use pointwise::{Quantization, Quantized, reference};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use trials::{cuda, trial};

fn main() -> ExitCode {
    let anywhere: [(_, fn()); 13] = [
        ("results_are_pytorchs", || results_are_pytorchs("cpu", 1)),
        ("half_precision_checkpoints_are_read_exactly", half_precision_checkpoints),
        ("a_dtype_of_16_bits_rounds_the_result", || sixteen_bits("cpu")),
        ("quantized_layers_are_applied", || quantized_layers("cpu")),
        ("quantized_layers_take_and_give_real_numbers", || real_numbers("cpu")),
        ("trailing_ones_of_weight_and_gate_are_accepted", trailing_ones),
        ("results_do_not_depend_on_threads", threads),
        ("an_older_result_is_replaced_and_a_pipe_is_not", replaced),
        ("help_names_everything", help),
        ("output_folder_missing", output_folder_missing),
        ("damaged_npy_headers_do_not_crash", damaged_headers),
        ("training_writes_every_gradient_of_the_reference", training),
        ("training_in_16_bits_rounds_tensors_and_no_parameters", training_in_16_bits),
    ];
    let on_device: [(_, fn()); 4] = [
        // A process takes a second, most of it the driver's.
        ("results_are_pytorchs_cuda", || results_are_pytorchs("cuda:0", 41)),
        ("a_dtype_of_16_bits_rounds_the_result_cuda", || sixteen_bits("cuda:0")),
        ("quantized_layers_are_applied_cuda", || quantized_layers("cuda:0")),
        ("quantized_layers_take_and_give_real_numbers_cuda", || real_numbers("cuda:0")),
    ];
    let anywhere = anywhere.map(|(name, run)| {
        Trial::test(name, move || {
            run();
            Ok(())
        })
    });
    let on_device = on_device.map(|(name, run)| {
        trial(name, cuda, move |_| {
            run();
            Ok(())
        })
    });
    let refused = REFUSED.iter().map(|row| Trial::test(row.name, || row.run()));
    let trials = anywhere.into_iter().chain(on_device).chain(refused).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// The example's binary, which cargo builds beside the tests.
fn binary() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test has a path");
    path.pop();
    path.pop();
    path.extend(["examples", &format!("apply{}", std::env::consts::EXE_SUFFIX)]);
    assert!(path.is_file(), "{} is missing: `cargo build --examples` builds it", path.display());
    path
}

/// A fresh folder with the files of one test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("apply").join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder for the test");
        Folder(path)
    }

    fn bytes(&self, name: &str, bytes: &[u8]) {
        fs::write(self.0.join(name), bytes).expect(name);
    }

    fn npy<T: ndarray_npy::WritableElement>(&self, name: &str, array: &ArrayD<T>) {
        let mut bytes = Vec::new();
        array.write_npy(&mut bytes).expect(name);
        self.bytes(name, &bytes);
    }

    fn read(&self, name: &str) -> ArrayD<f32> {
        let bytes = fs::read(self.0.join(name)).expect(name);
        ArrayD::read_npy(bytes.as_slice()).expect("NumPy's format")
    }

    fn checkpoint(&self, name: &str, tensors: &Tensors) {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect(name))
        });
        self.bytes(name, &safetensors::serialize(views, None).expect("a checkpoint"));
    }

    /// Runs in this folder.
    fn apply(&self, arguments: &[impl AsRef<std::ffi::OsStr>]) -> Output {
        let mut command = Command::new(binary());
        command.current_dir(&self.0).env_remove("POINTWISE_KERNEL");
        command.args(arguments).output().expect("the example starts")
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).expect("the folder");
        let names = entries.map(|e| e.expect("an entry").file_name().into_string().expect("text"));
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

type Tensor = (Dtype, Vec<usize>, Vec<u8>);
type Tensors = BTreeMap<String, Tensor>;

fn f32s(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Tensor {
    (Dtype::F32, shape.to_vec(), values.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// A case's list as the command line has it, with the tensors under the names of `apply`; `None`
/// where it cannot say it.
fn command_line(case: &Case) -> Option<(Vec<String>, Tensors)> {
    let mut tensors = Tensors::new();
    let mut keep = |name: &str, tensor: &ArrayD<f32>| {
        tensors.insert(name.to_owned(), f32s(tensor.shape(), tensor.iter().copied()));
    };
    keep("weight", &case.weight.clone().into_dyn());
    let mut operands = BTreeMap::<&str, String>::new();
    let mut operand = |name, value: String| {
        operands.insert(name, value.clone()).is_none_or(|before| before == value)
    };
    let mut of_stage = |stage: &Described, names: &[(&str, &str)]| {
        for (theirs, ours) in names {
            if let Some(tensor) = stage.tensor(theirs) {
                keep(ours, tensor);
            }
        }
        let bounds = (stage.number("lo"), stage.number("hi"));
        let clip = format!(
            "{},{}",
            bounds.0.unwrap_or(f32::NEG_INFINITY),
            bounds.1.unwrap_or(f32::INFINITY)
        );
        (stage.name != "clip" || operand("--clip", clip))
            && stage.number("eps").is_none_or(|eps| operand("--eps", eps.to_string()))
            && stage.number("alpha").is_none_or(|alpha| operand("--alpha", alpha.to_string()))
    };

    let mut source_stages = Vec::new();
    for stage in &case.source_stages {
        let names = [("scale", "src_scale"), ("shift", "src_shift"), ("gate", "gate")];
        if stage.name == "batch_norm" || !of_stage(stage, &names) {
            return None;
        }
        source_stages.push(stage.name.clone());
    }
    let (mut stages, mut shuffle) = (Vec::new(), None);
    for stage in &case.stages {
        let names: &[_] = match stage.name.as_str() {
            "batch_norm" => &[
                ("mean", "running_mean"),
                ("var", "running_var"),
                ("gamma", "gamma"),
                ("beta", "beta"),
            ],
            "layer_norm" | "layer_norm_all" => &[("gamma", "ln_gamma"), ("beta", "ln_beta")],
            _ => &[("bias", "bias"), ("slope", "slope")],
        };
        // The command line shuffles last.
        if shuffle.is_some() || !of_stage(stage, names) {
            return None;
        }
        match stage.name.as_str() {
            "channel_shuffle" => shuffle = stage.number("groups"),
            name => stages.push(name.to_owned()),
        }
    }

    let mut arguments = Vec::new();
    let mut argument = |name: &str, value: String| {
        arguments.extend([name.to_owned(), value]);
    };
    argument("--stages", stages.join(","));
    argument("--source-stages", source_stages.join(","));
    argument("--groups", case.groups.to_string());
    argument("--stride", case.stride.to_string());
    operands.into_iter().for_each(|(name, value)| argument(name, value));
    if let Some(groups) = shuffle {
        argument("--shuffle", groups.to_string());
    }
    if let Some(range) = &case.partial {
        argument("--partial", format!("{}:{}", range.start, range.end));
    }
    if case.residual().is_some() {
        argument("--residual", "residual.npy".into());
    }
    for i in 0..case.sources.len() {
        argument("--input", format!("src{i}.npy"));
    }
    argument("--weights", "w.safetensors".into());
    argument("--output", "dst.npy".into());
    Some((arguments, tensors))
}

/// An array of the same elements, of which a npy file is in Fortran order.
fn fortran(array: &ArrayD<f32>) -> ArrayD<f32> {
    let mut copy = ArrayD::zeros(IxDyn(array.shape()).f());
    copy.assign(array);
    copy
}

/// On the device, every so many of the runs: of a case in a layout, from files in an order.
fn results_are_pytorchs(device: &str, every: usize) {
    let (mut said, mut runs, mut failures) = (0, 0, Vec::new());
    let folder = Folder::new(&format!("fixtures_{device}"));
    for case in &Fixtures::load().cases() {
        let Some((arguments, tensors)) = command_line(case) else { continue };
        said += 1;
        folder.checkpoint("w.safetensors", &tensors);
        if let Some(stage) = case.repeated_stage() {
            refused(&folder, &arguments, &[stage, "twice"]);
            continue;
        }
        let arguments = [&arguments[..], &["--device".into(), device.into()]].concat();
        let tolerance = case.tolerance();
        for (layout, order) in [("nchw", 'C'), ("nchw", 'F'), ("nhwc", 'C'), ("nhwc", 'F')] {
            runs += 1;
            if runs % every != 0 {
                continue;
            }
            let file = |name: &str, array: &ArrayD<f32>| {
                let array = if layout == "nhwc" { to_nhwc(array) } else { array.clone() };
                folder.npy(name, &if order == 'F' { fortran(&array) } else { array });
            };
            for (i, source) in case.sources.iter().enumerate() {
                file(&format!("src{i}.npy"), source);
            }
            case.residual().into_iter().for_each(|residual| file("residual.npy", residual));
            let run = folder.apply(&[&arguments[..], &["--layout".into(), layout.into()]].concat());
            let text = String::from_utf8_lossy(&run.stdout).into_owned();
            let error = String::from_utf8_lossy(&run.stderr).into_owned();
            let found = if run.status.success() && error.is_empty() && text.lines().count() == 1 {
                let mut got = folder.read("dst.npy");
                assert!(got.is_standard_layout());
                let shape = format!("-> {:?}, fprop_f32_", got.shape());
                if layout == "nhwc" {
                    (2..got.ndim()).rev().for_each(|axis| got.swap_axes(axis, axis - 1));
                }
                let told = text.contains(&shape) && text.contains(&format!(" on {device} ("));
                difference(got.view(), &case.dst, |_, _| tolerance)
                    .or_else(|| (!told).then(|| format!("no {shape:?} on {device}: {text}")))
            } else {
                Some(format!("{} {text:?} {error:?}", run.status))
            };
            failures.extend(found.map(|what| format!("{} {layout} {order}: {what}", case.name)));
        }
    }
    assert!(said > 100, "only {said} cases are expressible");
    assert!(runs > 10 * every, "only {runs} runs, of which one in {every}");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(folder.files().iter().all(|name| !name.ends_with(".tmp")), "{:?}", folder.files());
}

/// 16-bit tensors give the very result of the f32 numbers that they stand for.
fn half_precision_checkpoints() {
    let folder = Folder::new("half");
    folder.npy("x.npy", &source(&[2, 3, 5, 4]));
    let weights = standard();
    type Round = fn(f32) -> (f32, [u8; 2]);
    let narrow: [(Dtype, Round); 2] = [
        (Dtype::F16, |x| (f16::from_f32(x).to_f32(), f16::from_f32(x).to_le_bytes())),
        (Dtype::BF16, |x| (bf16::from_f32(x).to_f32(), bf16::from_f32(x).to_le_bytes())),
    ];
    let arguments = ["--weights", "w.safetensors", "--input", "x.npy", "--output", "y.npy"];
    let stages = ["--stages", "bias,batch_norm,prelu,layer_norm", "--source-stages", "affine,gate"];
    for (dtype, round) in narrow {
        let mut results = Vec::new();
        for keep in [true, false] {
            let tensors = weights.iter().map(|(name, (_, shape, bytes))| {
                let values =
                    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                let tensor = match keep {
                    true => (dtype, shape.clone(), values.flat_map(|x| round(x).1).collect()),
                    false => f32s(shape, values.map(|x| round(x).0)),
                };
                (name.clone(), tensor)
            });
            let mut tensors: Tensors = tensors.collect();
            tensors.insert("num_batches_tracked".into(), (Dtype::I64, vec![], vec![1; 8]));
            folder.checkpoint("w.safetensors", &tensors);
            let run = folder.apply(&[&arguments[..], &stages].concat());
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            results.push(folder.read("y.npy"));
        }
        assert!(results[0].iter().all(|x| x.is_finite()) && results[0].len() == 2 * 4 * 5 * 4);
        assert_eq!(results[0], results[1], "{dtype:?}");
    }
}

/// Every value of the result is one of the type, and as near to f32's as its rounding allows.
fn sixteen_bits(device: &str) {
    let folder = Folder::new(&format!("dtypes_{device}"));
    folder.npy("nchw.npy", &source(&[2, 3, 5, 4]));
    folder.npy("nhwc.npy", &to_nhwc(&source(&[2, 3, 5, 4])));
    folder.checkpoint("w.safetensors", &standard());
    let arguments = ["--weights", "w.safetensors", "--output", "y.npy", "--device", device];
    let stages = ["--stages", "bias,batch_norm,prelu", "--source-stages", "affine,gate"];
    let run = |dtype: &str, layout: &str| {
        let input = format!("{layout}.npy");
        let rest = ["--dtype", dtype, "--layout", layout, "--input", &input];
        let run = folder.apply(&[&arguments[..], &stages, &rest].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let told = String::from_utf8(run.stdout).expect("text");
        assert!(told.contains(&format!("fprop_{dtype}_")), "{told}");
        assert!(told.contains(&format!(" on {device} (")), "{told}");
        let got = folder.read("y.npy");
        if layout == "nhwc" { got.permuted_axes(IxDyn(&[0, 3, 1, 2])) } else { got }
    };
    let exact = run("f32", "nchw");
    let largest = exact.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    type Round = fn(f32) -> f32;
    let f16s: Round = |x| f16::from_f32(x).to_f32();
    let bf16s: Round = |x| bf16::from_f32(x).to_f32();
    for (dtype, layout, unit, round) in [
        ("f16", "nchw", 2f32.powi(-11), f16s),
        ("f16", "nhwc", 2f32.powi(-11), f16s),
        ("bf16", "nhwc", 2f32.powi(-8), bf16s),
    ] {
        let got = run(dtype, layout);
        assert!(got.iter().all(|&x| round(x) == x), "{dtype}: {got}");
        assert_ne!(got, exact, "{dtype}");
        assert_eq!(got.shape(), exact.shape());
        for (got, exact) in got.iter().zip(&exact) {
            // Source, weight and gate are rounded too, and sums have a few terms.
            let error = (got - exact).abs();
            assert!(error <= 16.0 * unit * largest.max(1.0), "{dtype}: {got} for {exact}");
        }
    }
    let bad = folder.apply(&[&arguments[..], &["--input", "nchw.npy", "--dtype", "f8"]].concat());
    assert_eq!(bad.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&bad.stderr).contains("f8"));
}

fn trailing_ones() {
    let folder = Folder::new("trailing_ones");
    folder.npy("x.npy", &source(&[2, 3, 5, 4]));
    let arguments = ["--weights", "w.safetensors", "--input", "x.npy", "--output", "y.npy"];
    let stages = ["--stages", "bias", "--source-stages", "gate"];
    let mut tensors = standard();
    let results = [false, true].map(|more| {
        for name in ["weight", "gate", "bias"] {
            let shape = &mut tensors.get_mut(name).unwrap().1;
            shape.extend(more.then_some([1, 1]).into_iter().flatten());
        }
        folder.checkpoint("w.safetensors", &tensors);
        let run = folder.apply(&[&arguments[..], &stages].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        folder.read("y.npy")
    });
    assert_eq!(results[0], results[1]);
}

fn threads() {
    let folder = Folder::new("threads");
    folder.npy("x.npy", &source(&[3, 3, 50, 40]));
    folder.checkpoint("w.safetensors", &standard());
    let arguments = ["--weights", "w.safetensors", "--input", "x.npy", "--output", "y.npy"];
    let results = ["1", "2", "5"].map(|threads| {
        let stages = ["--stages", "batch_norm,silu,layer_norm_all", "--threads", threads];
        let run = folder.apply(&[&arguments[..], &stages].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        folder.read("y.npy")
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}

fn replaced() {
    let folder = Folder::new("replace");
    folder.npy("x.npy", &source(&[2, 3, 5, 4]));
    folder.checkpoint("w.safetensors", &standard());
    folder.bytes("y.npy", &[7; 100_000]);
    let run = |output| {
        folder.apply(&["--weights", "w.safetensors", "--input", "x.npy", "--output", output])
    };
    assert!(run("y.npy").status.success());
    assert_eq!(folder.read("y.npy").shape(), [2, 4, 5, 4]);
    if cfg!(unix) {
        assert!(run("/dev/null").status.success());
        assert!(!fs::metadata("/dev/null").expect("/dev/null").is_file());
    }
    assert_eq!(folder.files(), ["w.safetensors", "x.npy", "y.npy"]);
}

fn help() {
    let folder = Folder::new("help");
    let run = folder.apply(&["--help"]);
    let text = String::from_utf8(run.stdout).expect("text");
    assert!(run.status.success());
    let words = "--partial layer_norm_all gelu_tanh running_var src_shift gate --quantized --per \
                 --activations weight_scale dst_zero_point F8_E4M3";
    for word in words.split(' ') {
        assert!(text.contains(word), "{word} in {text}");
    }
}

/// Numbers without a pattern.
fn source(shape: &[usize]) -> ArrayD<f32> {
    let mut state = 1u32;
    ArrayD::from_shape_simple_fn(shape, || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// A checkpoint with every tensor, for 3 input and 4 output channels and 2 samples.
fn standard() -> Tensors {
    let shapes: [(&str, &[usize]); 12] = [
        ("weight", &[4, 3]),
        ("bias", &[4]),
        ("running_mean", &[4]),
        ("running_var", &[4]),
        ("gamma", &[4]),
        ("beta", &[4]),
        ("slope", &[4]),
        ("ln_gamma", &[4]),
        ("ln_beta", &[4]),
        ("src_scale", &[3]),
        ("src_shift", &[3]),
        ("gate", &[2, 3]),
    ];
    let tensor = |(name, shape): (&str, &[usize])| {
        let values =
            source(shape).into_iter().map(|x| if name == "running_var" { x * x } else { x });
        (name.to_owned(), f32s(shape, values))
    };
    shapes.into_iter().map(tensor).collect()
}

/// Asserts exit code 1, one line on stderr with all of `expected`, and no file more than before.
fn refused(folder: &Folder, arguments: &[impl AsRef<std::ffi::OsStr>], expected: &[&str]) {
    let before = folder.files();
    let run = folder.apply(arguments);
    let error = String::from_utf8(run.stderr).expect("text");
    assert_eq!(run.status.code(), Some(1), "{error}");
    assert!(error.lines().count() == 1 && error.ends_with('\n'), "{error:?}");
    assert!(error.starts_with("error: ") && run.stdout.is_empty(), "{error:?}");
    for word in expected {
        assert!(error.contains(word), "no {word:?} in {error:?}");
    }
    assert_eq!(folder.files(), before, "{error}");
}

/// Input that is refused: the files beside the standard ones (a checkpoint's and a source's), the
/// arguments after the standard ones, and what the error must name.
struct Refused {
    name: &'static str,
    prepare: fn(&Folder, &mut Tensors),
    arguments: &'static [&'static str],
    words: &'static [&'static str],
}

impl Refused {
    fn run(&self) -> Result<(), Failed> {
        let folder = Folder::new(self.name);
        folder.npy("x.npy", &source(&[2, 3, 5, 4]));
        folder.npy("r.npy", &source(&[2, 4, 5, 4]));
        let mut tensors = standard();
        (self.prepare)(&folder, &mut tensors);
        if !folder.0.join("w.safetensors").exists() {
            folder.checkpoint("w.safetensors", &tensors);
        }
        let mut arguments = vec!["--output", "y.npy"];
        arguments.extend(self.arguments);
        if !self.arguments.contains(&"--weights") {
            arguments.extend(["--weights", "w.safetensors"]);
        }
        if !self.arguments.contains(&"--input") {
            arguments.extend(["--input", "x.npy"]);
        }
        refused(&folder, &arguments, self.words);
        Ok(())
    }
}

macro_rules! refused {
    ($($name:ident: $prepare:expr, [$($argument:expr),*] => [$($word:expr),*];)*) => {
        const REFUSED: &[Refused] = &[$(Refused {
            name: stringify!($name),
            prepare: $prepare,
            arguments: &[$($argument),*],
            words: &[$($word),*],
        }),*];
    };
}

fn nothing(_: &Folder, _: &mut Tensors) {}

refused! {
    stage_unknown: nothing, ["--stages", "relu,bogus"] => ["bogus"];
    stage_empty: nothing, ["--stages", "relu,,bias"] => ["\"\""];
    source_stage_unknown: nothing, ["--source-stages", "bogus"] => ["bogus", "--source-stages"];
    source_stage_prelu: nothing, ["--source-stages", "prelu"] => ["prelu", "--source-stages"];
    repeated_bias: nothing, ["--stages", "bias,relu,bias"] => ["bias", "twice"];
    repeated_batch_norm: nothing, ["--stages", "batch_norm,batch_norm"] => ["batch_norm", "twice"];
    repeated_prelu: nothing, ["--stages", "prelu,prelu"] => ["prelu", "twice"];
    repeated_residual: nothing,
        ["--stages", "residual,relu,residual", "--residual", "r.npy"] => ["residual", "twice"];
    repeated_layer_norm: nothing,
        ["--stages", "layer_norm,layer_norm_all"] => ["layer_norm", "twice"];
    repeated_affine: nothing, ["--source-stages", "affine,relu,affine"] => ["affine", "twice"];
    repeated_gate: nothing, ["--source-stages", "gate,gate"] => ["gate", "twice"];

    missing_weight: |_, t| { t.remove("weight"); }, [] => ["weight"];
    missing_bias: |_, t| { t.remove("bias"); }, ["--stages", "bias"] => ["bias"];
    missing_var: |_, t| { t.remove("running_var"); },
        ["--stages", "batch_norm"] => ["batch_norm", "running_var"];
    missing_slope: |_, t| { t.remove("slope"); }, ["--stages", "prelu"] => ["prelu", "slope"];
    missing_shift: |_, t| { t.remove("src_shift"); },
        ["--source-stages", "affine"] => ["affine", "src_shift"];
    missing_gate: |_, t| { t.remove("gate"); }, ["--source-stages", "gate"] => ["gate"];
    missing_beta: |_, t| { t.remove("beta"); }, ["--stages", "batch_norm"] => ["gamma", "beta"];
    missing_ln_gamma: |_, t| { t.remove("ln_gamma"); },
        ["--stages", "layer_norm"] => ["ln_gamma", "ln_beta"];
    missing_residual: nothing, ["--stages", "residual"] => ["--residual"];
    missing_clip: nothing, ["--stages", "clip"] => ["--clip"];
    unused_residual: nothing, ["--residual", "r.npy"] => ["r.npy", "residual"];
    unused_clip: nothing, ["--stages", "relu", "--clip", "0,1"] => ["0,1", "clip"];
    unused_alpha: nothing, ["--stages", "relu", "--alpha", "0.25"] => ["0.25", "leaky_relu"];

    weight_of_a_3x3: |_, t| { t.insert("weight".into(), f32s(&[4, 3, 3, 3], vec![0.0; 108])); },
        [] => ["weight", "[4, 3, 3, 3]"];
    weight_without_channels: |_, t| { t.insert("weight".into(), f32s(&[0, 3], [])); },
        [] => ["weight", "[0, 3]"];
    weight_of_f64: |_, t| { t.insert("weight".into(), (Dtype::F64, vec![1, 3], vec![0; 24])); },
        [] => ["weight", "F64"];
    weight_of_integers: |_, t| { t.insert("weight".into(), (Dtype::I32, vec![1, 3], vec![0; 12])); },
        [] => ["weight", "I32"];
    bias_too_long: |_, t| { t.insert("bias".into(), f32s(&[5], vec![0.0; 5])); },
        ["--stages", "bias"] => ["bias", "5", "4"];
    bias_of_rank_2: |_, t| { t.insert("bias".into(), f32s(&[2, 2], vec![0.0; 4])); },
        ["--stages", "bias"] => ["bias", "[2, 2]"];
    scale_too_short: |_, t| { t.insert("src_scale".into(), f32s(&[2], vec![1.0; 2])); },
        ["--source-stages", "affine"] => ["src_scale", "2", "3"];
    gate_of_one_sample: |_, t| { t.insert("gate".into(), f32s(&[1, 3], vec![1.0; 3])); },
        ["--source-stages", "gate"] => ["gate", "[1, 3]", "[2, 3]"];
    gate_per_position: |_, t| { t.insert("gate".into(), f32s(&[2, 3, 2], vec![1.0; 12])); },
        ["--source-stages", "gate"] => ["gate", "[2, 3, 2]"];
    variance_negative: |_, t| {
        t.insert("running_var".into(), f32s(&[4], [1.0, -0.5, 1.0, 1.0]));
    }, ["--stages", "batch_norm"] => ["running_var", "channel 1", "-0.5"];
    variance_nan: |_, t| {
        t.insert("running_var".into(), f32s(&[4], [1.0, 1.0, 1.0, f32::NAN]));
    }, ["--stages", "batch_norm"] => ["running_var", "channel 3", "NaN"];

    channels_mismatched: |f, _| f.npy("x.npy", &source(&[2, 5, 5, 4])), [] => ["3", "5"];
    channels_of_the_other_layout: nothing, ["--layout", "nhwc"] => ["3", "4"];
    channels_none: |f, _| f.npy("x.npy", &source(&[2, 0, 5, 4])), [] => ["[2, 0, 5, 4]"];
    groups_do_not_divide: nothing, ["--groups", "3"] => ["3 groups", "4"];
    groups_of_other_channels: nothing, ["--groups", "2"] => ["2", "3"];
    groups_zero: nothing, ["--groups", "0"] => ["0 groups"];
    groups_overflow: nothing, ["--groups", "18446744073709551615"] => ["18446744073709551615"];
    stride_zero: nothing, ["--stride", "0"] => ["stride", "0"];
    shuffle_does_not_divide: nothing, ["--shuffle", "3"] => ["3 groups", "4"];
    shuffle_zero: nothing, ["--shuffle", "0"] => ["0 groups", "4"];
    partial_reversed: nothing, ["--partial", "3:1"] => ["3:1"];
    partial_of_other_channels: nothing, ["--partial", "0:2"] => ["0..2", "3"];
    partial_beyond_the_source: nothing, ["--partial", "1:4"] => ["1..4", "3"];
    residual_of_other_shape: nothing,
        ["--stages", "residual", "--residual", "x.npy"] => ["residual", "[2, 3, 5, 4]", "[2, 4, 5, 4]"];
    residual_of_other_rank: |f, _| f.npy("r.npy", &source(&[2, 4, 20])),
        ["--stages", "residual", "--residual", "r.npy"] => ["residual", "[2, 4, 20]"];
    concat_of_other_sizes: |f, t| {
        t.insert("weight".into(), f32s(&[1, 6], vec![1.0; 6]));
        f.npy("x2.npy", &source(&[2, 3, 5, 5]));
    }, ["--input", "x.npy", "--input", "x2.npy"] => ["[2, 3, 5, 5]"];
    concat_of_lower_rank: |f, t| {
        t.insert("weight".into(), f32s(&[1, 6], vec![1.0; 6]));
        f.npy("x2.npy", &source(&[2, 3, 5]));
    }, ["--input", "x.npy", "--input", "x2.npy"] => ["[2, 3, 5]"];
    concat_of_higher_rank: |f, t| {
        t.insert("weight".into(), f32s(&[1, 6], vec![1.0; 6]));
        f.npy("x2.npy", &source(&[2, 3, 5, 4, 1]));
    }, ["--input", "x.npy", "--input", "x2.npy"] => ["[2, 3, 5, 4, 1]"];
    concat_of_too_many_channels: nothing, ["--input", "x.npy", "--input", "x.npy"] => ["3", "6"];

    eps_zero: nothing, ["--stages", "batch_norm", "--eps", "0"] => ["--eps", "'0'"];
    eps_negative: nothing, ["--stages", "layer_norm", "--eps", "-0.5"] => ["--eps", "-0.5"];
    eps_nan: nothing, ["--eps", "nan"] => ["--eps", "nan"];
    eps_infinite: nothing, ["--eps", "inf"] => ["--eps", "inf"];
    eps_too_small_for_f32: nothing, ["--eps", "1e-60"] => ["--eps", "1e-60"];
    eps_given_twice: nothing, ["--eps", "1e-5", "--eps", "1e-3"] => ["--eps"];
    alpha_nan: nothing, ["--stages", "elu", "--alpha", "nan"] => ["alpha", "NaN"];
    clip_reversed: nothing, ["--stages", "clip", "--clip", "3,-1"] => ["--clip", "3,-1"];
    clip_nan: nothing, ["--stages", "clip", "--clip", "nan,1"] => ["--clip", "nan,1"];
    clip_of_one_bound: nothing, ["--stages", "clip", "--clip", "3"] => ["--clip", "3"];
    threads_zero: nothing, ["--threads", "0"] => ["--threads", "0"];
    layout_unknown: nothing, ["--layout", "chwn"] => ["chwn"];
    device_unknown: nothing, ["--device", "tpu"] => ["tpu"];
    option_unknown: nothing, ["--bogus"] => ["--bogus"];

    npy_missing: nothing, ["--input", "absent.npy"] => ["absent.npy"];
    npy_is_a_folder: nothing, ["--input", "."] => ["."];
    npy_empty: |f, _| f.bytes("x.npy", b""), [] => ["x.npy", "truncated"];
    npy_of_something_else: |f, _| f.bytes("x.npy", &[b'x'; 300]), [] => ["x.npy"];
    npy_of_f64: |f, _| f.npy("x.npy", &source(&[2, 3]).mapv(f64::from)), [] => ["x.npy", "<f8"];
    npy_of_integers: |f, _| f.npy("x.npy", &source(&[2, 3]).mapv(|x| x as i32)),
        [] => ["x.npy", "<i4"];
    npy_of_rank_1: |f, _| f.npy("x.npy", &source(&[3])), [] => ["x.npy", "[3]", "rank 1"];
    npy_of_rank_6: |f, _| f.npy("x.npy", &source(&[2, 3, 1, 1, 1, 1])), [] => ["x.npy", "rank 6"];
    npy_truncated: |f, _| {
        let bytes = fs::read(f.0.join("x.npy")).expect("x.npy");
        f.bytes("x.npy", &bytes[..bytes.len() - 3]);
    }, [] => ["x.npy", "[2, 3, 5, 4]", "480", "477"];
    npy_too_long: |f, _| {
        let bytes = fs::read(f.0.join("x.npy")).expect("x.npy");
        f.bytes("x.npy", &[bytes, vec![0; 4]].concat());
    }, [] => ["x.npy", "[2, 3, 5, 4]", "480"];
    npy_header_truncated: |f, _| {
        let bytes = fs::read(f.0.join("x.npy")).expect("x.npy");
        f.bytes("x.npy", &bytes[..50]);
    }, [] => ["x.npy", "truncated"];
    npy_shape_beyond_the_file: |f, _| f.bytes("x.npy", &header("(3, 1000000000000)", 1)),
        [] => ["x.npy", "1000000000000"];
    npy_shape_overflows: |f, _| f.bytes("x.npy", &header("(4294967296, 3, 4294967296)", 1)),
        [] => ["x.npy", "4294967296", "overflows"];
    npy_shape_overflows_beside_zero: |f, _| {
        f.bytes("x.npy", &header("(0, 3, 9223372036854775807, 9223372036854775807)", 1));
    }, [] => ["x.npy", "9223372036854775807", "overflows"];
    npy_axis_beyond_u64: |f, _| f.bytes("x.npy", &header("(3, 99999999999999999999999)", 1)),
        [] => ["x.npy", "99999999999999999999999"];
    npy_axis_negative: |f, _| f.bytes("x.npy", &header("(3, -1)", 1)), [] => ["x.npy", "-1"];
    npy_nested: |f, _| f.bytes("x.npy", &header(&"(".repeat(60_000), 1)), [] => ["x.npy"];
    npy_version_9: |f, _| f.bytes("x.npy", &header("(2, 3)", 9)), [] => ["x.npy", "version 9"];
    npy_header_of_4_gib: |f, _| f.bytes("x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr'"),
        [] => ["x.npy", "4294967295"];
    residual_of_f64: |f, _| f.npy("r.npy", &source(&[2, 4, 5, 4]).mapv(f64::from)),
        ["--stages", "residual", "--residual", "r.npy"] => ["r.npy", "<f8"];

    checkpoint_missing: nothing, ["--weights", "absent.safetensors"] => ["absent.safetensors"];
    checkpoint_empty: |f, _| f.bytes("w.safetensors", b""), [] => ["w.safetensors"];
    checkpoint_truncated: |f, t| {
        f.checkpoint("w.safetensors", t);
        let bytes = fs::read(f.0.join("w.safetensors")).expect("w.safetensors");
        f.bytes("w.safetensors", &bytes[..bytes.len() - 1]);
    }, [] => ["w.safetensors"];
    checkpoint_with_a_huge_header: |f, _| f.bytes("w.safetensors", &[0xff; 64]),
        [] => ["w.safetensors"];
    checkpoint_nested: |f, _| {
        let header = "[".repeat(100_000);
        let len = (header.len() as u64).to_le_bytes();
        f.bytes("w.safetensors", &[&len[..], header.as_bytes()].concat());
    }, [] => ["w.safetensors"];
    checkpoint_shape_overflows: |f, _| {
        let shape = "[4294967296,4294967296]";
        let header = format!(r#"{{"weight":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
        let len = (header.len() as u64).to_le_bytes();
        f.bytes("w.safetensors", &[&len[..], header.as_bytes()].concat());
    }, [] => ["w.safetensors"];
    output_given_twice: nothing, ["--output", "absent/z.npy"] => ["--output"];
}

fn output_folder_missing() {
    let folder = Folder::new("output_folder_missing");
    folder.npy("x.npy", &source(&[2, 3, 5, 4]));
    folder.checkpoint("w.safetensors", &standard());
    let run = ["--weights", "w.safetensors", "--input", "x.npy", "--output"];
    refused(&folder, &[&run[..], &["absent/y.npy"]].concat(), &["absent/y.npy"]);
    refused(&folder, &[&run[..], &[".."]].concat(), &[".."]);
    refused(&folder, &run, &["--output"]);
    refused(&folder, &run[2..4], &["--weights", "--output"]);
    #[cfg(not(feature = "cuda"))]
    refused(
        &folder,
        &[&run[..], &["y.npy", "--device", "cuda:3"]].concat(),
        &["cuda:3", "feature"],
    );
}

/// A npy file with this shape, and 24 bytes of data.
fn header(shape: &str, version: u8) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY".to_vec();
    bytes.extend([version, 0]);
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.extend([0; 24]);
    bytes
}

/// A flipped bit gives an error or another result, never a crash.
fn damaged_headers() {
    let folder = Folder::new("damaged");
    folder.checkpoint("w.safetensors", &standard());
    let sound = header("(2, 3)", 1);
    let arguments = ["--weights", "w.safetensors", "--input", "x.npy", "--output", "y.npy"];
    for position in 0..sound.len() - 24 {
        for flip in [0x01, 0x10, 0x80] {
            let mut bytes = sound.clone();
            bytes[position] ^= flip;
            folder.bytes("x.npy", &bytes);
            let run = folder.apply(&arguments);
            let error = String::from_utf8_lossy(&run.stderr).into_owned();
            let told = match run.status.code() {
                Some(0) => error.is_empty(),
                Some(1) => error.lines().count() == 1,
                _ => false,
            };
            assert!(told, "bit {flip:#x} of byte {position}: {} {error:?}", run.status);
        }
    }
}

fn training() {
    use pointwise::reference::{self, Gradients};
    use pointwise::train::{Statistics, name};

    let folder = Folder::new("train");
    let mut run = 0;
    for case in Fixtures::load().cases_and_embedded() {
        let Some((arguments, tensors)) = command_line(&case) else { continue };
        let trains = case.repeated_stage().is_none() && !case.name.contains("not_finite");
        if !trains || case.dst.is_empty() || run == 40 {
            continue;
        }
        run += 1;
        for last in [false, true] {
            let file = |t: &ArrayD<f32>| if last { to_nhwc(t) } else { t.clone() };
            let d_dst = case.dst.mapv(|y| (y * 7.0).sin() as f32);
            folder.npy("dy.npy", &file(&d_dst));
            folder.checkpoint("w.safetensors", &tensors);
            for (i, source) in case.sources.iter().enumerate() {
                folder.npy(&format!("src{i}.npy"), &file(source));
            }
            case.residual().into_iter().for_each(|r| folder.npy("residual.npy", &file(r)));
            let mut arguments = arguments.clone();
            let rest =
                "--train --d-output dy.npy --gradients g.safetensors --momentum 1".split(' ');
            arguments.extend(rest.map(str::to_owned));
            if last {
                arguments.extend(["--layout".into(), "nhwc".into()]);
            }
            let output = folder.apply(&arguments);
            let stderr = String::from_utf8_lossy(&output.stderr);
            let batch_norm = case.stages.iter().any(|stage| stage.name == "batch_norm");
            let single = case.dst.len() == case.dst.shape()[1];
            if batch_norm && single {
                assert!(stderr.contains("more than one value per channel"), "{stderr}");
                continue;
            }
            assert!(output.status.success(), "{}: {stderr}", case.name);

            let layer = case.layer();
            let want: Gradients =
                reference::backward(&layer, &case.inputs(), Statistics::Batch, d_dst.view())
                    .unwrap();
            let bytes = fs::read(folder.0.join("g.safetensors")).unwrap();
            let file_of = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let mut names = 0;
            let mut check = |name: &str, want: Vec<f64>| {
                let tensor = file_of.tensor(name).unwrap_or_else(|_| panic!("{name} is written"));
                let got = tensor.data().chunks_exact(4);
                let got: Vec<f32> =
                    got.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
                let scale = want.iter().fold(1.0f64, |a, b| a.max(b.abs()));
                assert_eq!(got.len(), want.len(), "{name}");
                for (got, want) in got.iter().zip(&want) {
                    let err = (f64::from(*got) - want).abs();
                    assert!(err <= 1e-4 * scale, "{} {name}: {got}, {want}", case.name);
                }
                names += 1;
            };
            let values = |t: &ArrayD<f64>| -> Vec<f64> {
                let t = t.mapv(|x| x as f32);
                file(&t).iter().map(|&x| f64::from(x)).collect()
            };
            for (i, d) in want.d_sources.iter().enumerate() {
                let several = want.d_sources.len() > 1;
                check(&if several { format!("d_src{i}") } else { "d_src".into() }, values(d));
            }
            if let Some(d) = &want.d_residual {
                check("d_residual", values(d));
            }
            if let Some(d) = &want.d_gate {
                check("d_gate", d.iter().copied().collect());
            }
            for (parameter, d) in &want.parameters {
                let called = match *parameter {
                    name::GAMMA => "d_gamma",
                    name::BETA => "d_beta",
                    name::SLOPE => "d_slope",
                    name::LN_GAMMA => "d_ln_gamma",
                    name::LN_BETA => "d_ln_beta",
                    name::SRC_SCALE => "d_src_scale",
                    name::SRC_SHIFT => "d_src_shift",
                    other => &format!("d_{other}"),
                };
                check(called, d.clone());
            }
            // With momentum 1 the new statistics are the batch's.
            let count = (case.dst.len() / case.dst.shape()[1]) as f64;
            if let Some(mean) = want.statistic(name::RUNNING_MEAN) {
                check("running_mean", mean.to_vec());
                let var = want.statistic(name::RUNNING_VAR).unwrap();
                check("running_var", var.iter().map(|v| v * count / (count - 1.0)).collect());
            }
            assert_eq!(names, file_of.len(), "{}: {:?}", case.name, file_of.names());
        }
    }
    assert_eq!(run, 40);
}

/// What is of a tensor is a value of the type; everything is as near to f32's as rounding allows.
fn training_in_16_bits() {
    let folder = Folder::new("train_dtypes");
    folder.npy("x.npy", &source(&[2, 3, 5, 4]));
    folder.npy("dy.npy", &source(&[2, 4, 5, 4]));
    folder.checkpoint("w.safetensors", &standard());
    let run = |dtype: &str| {
        let arguments = ["--weights", "w.safetensors", "--input", "x.npy", "--output", "y.npy"];
        let stages = ["--stages", "batch_norm,bias,prelu", "--source-stages", "affine,gate"];
        let train = ["--train", "--d-output", "dy.npy", "--gradients", "g.safetensors"];
        let run = folder.apply(&[&arguments[..], &stages, &train, &["--dtype", dtype]].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let bytes = fs::read(folder.0.join("g.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all = BTreeMap::from([("y".to_owned(), Vec::from_iter(folder.read("y.npy")))]);
        for (name, tensor) in file.tensors() {
            let values = tensor.data().chunks_exact(4);
            let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            all.insert(name, values);
        }
        all
    };
    let exact = run("f32");
    type Round = fn(f32) -> f32;
    let f16s: Round = |x| f16::from_f32(x).to_f32();
    let bf16s: Round = |x| bf16::from_f32(x).to_f32();
    for (dtype, unit, round) in [("f16", 2f32.powi(-11), f16s), ("bf16", 2f32.powi(-8), bf16s)] {
        let got = run(dtype);
        assert!(got.keys().eq(exact.keys()), "{dtype}: {:?}", got.keys());
        for (name, got) in &got {
            let held = got.iter().all(|&x| round(x) == x);
            assert_eq!(held, ["y", "d_src", "d_gate"].contains(&&name[..]), "{dtype} {name}");
            let largest = exact[name].iter().fold(1.0f32, |m, x| m.max(x.abs()));
            for (got, exact) in got.iter().zip(&exact[name]) {
                // Source, gate and the gradient by the result are rounded, and sums have 40 terms.
                let error = (got - exact).abs();
                assert!(error <= 64.0 * unit * largest, "{dtype} {name}: {got} for {exact}");
            }
        }
    }
}

/// A layer of 8-bit integers, in every combination of types and layouts.
fn quantized_layers(device: &str) {
    let folder = Folder::new(&format!("quantized_{device}"));
    let (c_out, groups, stride) = (4usize, 2usize, 2usize);
    let weight: Vec<i8> = (0..12i32).map(|i| (i * 37 % 251 - 120) as i8).collect();
    let scales: Vec<f32> = (0..c_out).map(|c| 0.01 * (c + 1) as f32).collect();
    let bias: Vec<i32> = vec![100, -200, 300, -4000];
    let one = |x: f32| f32s(&[1], [x]);
    let ints = |values: &[i32]| {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        (Dtype::I32, vec![values.len()], bytes)
    };
    let point = |int8: Int8, x: i32| match int8 {
        Int8::U8 => (Dtype::U8, vec![], vec![x as u8]),
        Int8::I8 => (Dtype::I8, vec![1], vec![x as i8 as u8]),
    };
    let arguments = |rest: &[&str]| {
        let mut arguments = vec!["--quantized", "q.safetensors", "--input", "x.npy"];
        arguments.extend(["--output", "y.npy", "--groups", "2", "--device", device]);
        arguments.extend(rest);
        arguments.into_iter().map(String::from).collect::<Vec<_>>()
    };
    let shape = [2, 6, 5, 4];
    for (src_type, dst_type, plain) in [
        (Int8::U8, Int8::U8, false),
        (Int8::U8, Int8::U8, true),
        (Int8::U8, Int8::I8, false),
        (Int8::I8, Int8::U8, false),
        (Int8::I8, Int8::I8, true),
    ] {
        let src = ArrayD::from_shape_fn(IxDyn(&shape), |at| {
            (at[0] * 71 + at[1] * 37 + at[2] * 113 + at[3] * 29) as i32 % 256 + src_type.min()
        });
        let quantization =
            |int8: Int8, scale, above| Quantization { int8, scale, zero_point: int8.min() + above };
        let (from, to) = (quantization(src_type, 0.05, 131), quantization(dst_type, 0.25, 120));
        let weights = ndarray::Array2::from_shape_vec((c_out, 3), weight.clone()).unwrap();
        let layer = Quantized::new(weights, scales.clone(), from).bias(bias.clone()).dst(to);
        let layer = layer.groups(groups).stride(stride);
        let want = reference::forward_quantized(&layer, src.view(), None).unwrap();

        let zero = |q: Quantization| match plain {
            true => ints(&[q.zero_point]),
            false => point(q.int8, q.zero_point),
        };
        let weight_bytes = weight.iter().map(|&w| w as u8).collect();
        folder.checkpoint(
            "q.safetensors",
            &Tensors::from([
                ("weight".into(), (Dtype::I8, vec![4, 3, 1, 1], weight_bytes)),
                ("weight_scale".into(), f32s(&[4], scales.iter().copied())),
                ("bias".into(), ints(&bias)),
                ("src_scale".into(), one(from.scale)),
                ("dst_scale".into(), one(to.scale)),
                ("src_zero_point".into(), zero(from)),
                ("dst_zero_point".into(), zero(to)),
            ]),
        );
        for layout in ["nchw", "nhwc"] {
            let src = match layout {
                "nhwc" => src.view().permuted_axes(IxDyn(&[0, 2, 3, 1])),
                _ => src.view(),
            };
            match src_type {
                Int8::U8 => folder.npy("x.npy", &src.mapv(|q| q as u8)),
                Int8::I8 => folder.npy("x.npy", &src.mapv(|q| q as i8)),
            }
            let run = folder.apply(&arguments(&["--stride", "2", "--layout", layout]));
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            let text = String::from_utf8_lossy(&run.stdout).into_owned();
            assert!(text.contains("fprop_i8_") && text.lines().count() == 1, "{text}");
            assert!(text.contains(&format!(" on {device} (")), "{text}");
            let bytes = fs::read(folder.0.join("y.npy")).unwrap();
            let got = match dst_type {
                Int8::U8 => ArrayD::<u8>::read_npy(bytes.as_slice()).unwrap().mapv(i32::from),
                Int8::I8 => ArrayD::<i8>::read_npy(bytes.as_slice()).unwrap().mapv(i32::from),
            };
            let got = match layout {
                "nhwc" => got.permuted_axes(IxDyn(&[0, 3, 1, 2])),
                _ => got,
            };
            assert_eq!(got.shape(), want.shape());
            let differ = got.iter().zip(&want).filter(|&(&got, &want)| f64::from(got) != want);
            assert_eq!(differ.count(), 0, "{src_type} -> {dst_type} {layout}");
        }
        let wrong = match src_type {
            Int8::U8 if !plain => {
                folder.npy("x.npy", &src.mapv(|q| q as i8));
                "src has elements of type i8, the layer has u8"
            }
            _ => {
                folder.npy("x.npy", &src.mapv(|q| q as f32));
                "dtype <f4, expected |u1 (u8) or |i1 (i8)"
            }
        };
        refused(&folder, &arguments(&[]), &[wrong]);
    }
    folder.npy("x.npy", &ArrayD::<u8>::zeros(IxDyn(&shape)));
    refused(&folder, &arguments(&["--stages", "relu"]), &["--stages", "cannot be used with"]);
    refused(&folder, &arguments(&["--input", "x.npy"]), &["2 inputs"]);
    folder.checkpoint("q.safetensors", &Tensors::new());
    refused(&folder, &arguments(&[]), &["weight"]);
}

/// Layers of 8-bit weights with files of f32, against the specification, in both layouts.
fn real_numbers(device: &str) {
    let folder = Folder::new(&format!("real_numbers_{device}"));
    let weight: Vec<f32> = (0..12).map(|i| (i * 37 % 17) as f32 - 8.0).collect();
    let weight = ndarray::Array2::from_shape_vec((4, 3), weight).unwrap();
    let scales = vec![0.25, 0.5, 0.125, 0.25];
    let bias = vec![1.0, -0.5, 0.25, -3.0];
    // Numbers that most types round.
    let x = source(&[2, 6, 5, 4]).mapv(|x| (x * 40.0).round() / 16.0 + 0.5);
    let arguments = |rest: &[&str]| {
        let mut arguments = vec!["--quantized", "q.safetensors", "--input", "x.npy"];
        arguments.extend(["--output", "y.npy", "--groups", "2", "--stride", "2"]);
        arguments.extend(["--device", device]);
        arguments.extend(rest);
        arguments.into_iter().map(String::from).collect::<Vec<_>>()
    };
    let check = |rest: &[&str], kernel: &str, want: &ArrayD<f64>, tolerance: f64| {
        for layout in ["nchw", "nhwc"] {
            folder.npy("x.npy", &if layout == "nhwc" { to_nhwc(&x) } else { x.clone() });
            let run = folder.apply(&arguments(&[rest, &["--layout", layout]].concat()));
            let text = String::from_utf8_lossy(&run.stdout).into_owned();
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            assert!(text.contains(kernel) && text.contains(&format!(" on {device} (")), "{text}");
            let got = folder.read("y.npy");
            let got = if layout == "nhwc" { got.permuted_axes(IxDyn(&[0, 3, 1, 2])) } else { got };
            let differ = difference(got.view(), want, |_, _| tolerance);
            assert_eq!(differ, None, "{rest:?} {layout}");
        }
    };
    let write = |tensors: &[(&str, Tensor)]| {
        let tensors = tensors.iter().map(|(name, tensor)| ((*name).into(), tensor.clone()));
        folder.checkpoint("q.safetensors", &tensors.collect());
    };
    let one = |x: f32| f32s(&[], [x]);
    let integers = weight.mapv(|w| w as i8);
    let of_weight = |dtype, bytes: Vec<u8>| ("weight", (dtype, vec![4, 3, 1], bytes));
    let i8s = of_weight(Dtype::I8, integers.iter().map(|&w| w as u8).collect());
    let of_scales = ("weight_scale", f32s(&[4], scales.iter().copied()));
    let of_bias = ("bias", f32s(&[4], bias.iter().copied()));

    // Sources that the call quantises: whatever shares a scale, results are others.
    write(&[i8s.clone(), of_scales.clone(), of_bias.clone()]);
    let mut results = Vec::new();
    for (rest, per) in [
        (&[][..], Per::Position),
        (&["--per", "position"], Per::Position),
        (&["--per", "sample"], Per::Sample),
        (&["--per", "tensor"], Per::Tensor),
    ] {
        let layer = DynamicQuantized::new(integers.clone(), scales.clone(), per).bias(bias.clone());
        let layer = layer.groups(2).stride(2);
        let want = reference::forward_dynamic(&layer, x.view(), None).unwrap();
        check(rest, "fprop_i8_", &want, 1e-5);
        results.push(want);
    }
    let apart =
        |a: &ArrayD<f64>, b: &ArrayD<f64>| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-3);
    assert!(apart(&results[1], &results[2]) && apart(&results[2], &results[3]));
    folder.npy("x.npy", &x.mapv(|x| x as u8));
    refused(&folder, &arguments(&[]), &["dtype |u1, expected <f4 (f32)"]);

    // Integers as they are, to real numbers.
    let scale = ("src_scale", one(0.5));
    let zero_point = ("src_zero_point", (Dtype::U8, vec![1], vec![3]));
    write(&[i8s.clone(), of_scales.clone(), scale.clone(), zero_point.clone()]);
    let layer = Quantized::new(integers, scales.clone(), Quantization::u8(0.5, 3));
    let bytes = x.mapv(|x| (x * 16.0 + 100.0) as u8);
    let layer = layer.groups(2).stride(2);
    let want = reference::forward_quantized(&layer, bytes.mapv(i32::from).view(), None).unwrap();
    folder.npy("x.npy", &bytes);
    let run = folder.apply(&arguments(&[]));
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(difference(folder.read("y.npy").view(), &want, |_, _| 0.0), None);
    refused(&folder, &arguments(&["--per", "sample"]), &["--per", "src_scale"]);
    refused(&folder, &arguments(&["--activations", "e4m3"]), &["--activations e4m3", "F8_E4M3"]);

    // Floats of either type: all scales are powers of two, and sums are exact.
    type OfBits = fn(u8) -> f32;
    let e4m3: (_, fn(f32) -> u8, OfBits) =
        (Fp8::E4M3, |x| F8E4M3::from_f32(x).bits(), |bits| F8E4M3::from_bits(bits).to_f32());
    let e5m2: (_, fn(f32) -> u8, OfBits) =
        (Fp8::E5M2, |x| F8E5M2::from_f32(x).bits(), |bits| F8E5M2::from_bits(bits).to_f32());
    let capable = device == "cpu" || has_fp8();
    let kernel = if device == "cpu" { "fprop_f32_" } else { "fprop_fp8_" };
    for (weight_type, (activations, bits, of_bits), dst_scale, rest) in [
        (Fp8::E4M3, e4m3, Some(0.5), &[][..]),
        (Fp8::E4M3, e5m2, Some(2.0), &["--activations", "e5m2"]),
        (Fp8::E5M2, e4m3, None, &["--activations", "e4m3"]),
    ] {
        let quantization = |scale| Fp8Quantization { fp8: activations, scale };
        let (dtype, layer, weight) = match weight_type {
            Fp8::E4M3 => {
                let weight = weight.mapv(F8E4M3::from_f32);
                let layer = QuantizedFp8::new(weight.clone(), vec![0.25], quantization(0.25));
                (Dtype::F8_E4M3, layer, weight.mapv(|w| w.to_bits()))
            }
            Fp8::E5M2 => {
                let weight = weight.mapv(F8E5M2::from_f32);
                let layer = QuantizedFp8::new(weight.clone(), scales.clone(), quantization(0.25));
                (Dtype::F8_E5M2, layer, weight.mapv(|w| w.to_bits()))
            }
        };
        let mut layer = layer.bias(bias.clone()).groups(2).stride(2);
        let weight_scale = match weight_type {
            Fp8::E4M3 => ("weight_scale", one(0.25)),
            Fp8::E5M2 => of_scales.clone(),
        };
        let weight = of_weight(dtype, weight.iter().copied().collect());
        let mut tensors = vec![weight, weight_scale, of_bias.clone(), ("src_scale", one(0.25))];
        if let Some(scale) = dst_scale {
            tensors.push(("dst_scale", one(scale)));
            layer = layer.dst(quantization(scale));
        }
        write(&tensors);
        if !capable {
            folder.npy("x.npy", &x);
            refused(&folder, &arguments(rest), &["tensor cores multiply fp8 from 8.9 on"]);
            continue;
        }
        let rounded = x.mapv(|x| f64::from(of_bits(bits(x / 0.25))));
        let mut want = reference::forward_fp8(&layer, rounded.view(), None).unwrap();
        if let Some(scale) = dst_scale {
            want.mapv_inplace(|y| f64::from(scale * of_bits(bits(y as f32))));
        }
        check(rest, kernel, &want, 0.0);
    }
    folder.npy("x.npy", &x);
    refused(&folder, &arguments(&["--per", "sample"]), &["--per", "src_scale"]);

    // What fits no kind of layer.
    let fp8 = of_weight(Dtype::F8_E4M3, vec![0; 12]);
    let i32s = ("bias", (Dtype::I32, vec![4], vec![0; 16]));
    let of_dst = ("dst_scale", one(1.0));
    folder.npy("x.npy", &x.mapv(|x| x as u8));
    for (tensors, words) in [
        (vec![of_scales.clone()], "no tensor \"weight\""),
        (
            vec![("weight", f32s(&[4, 3], [0.0; 12]))],
            "weight is F32, expected I8, F8_E4M3 or F8_E5M2",
        ),
        (vec![i8s.clone(), scale.clone(), zero_point.clone()], "no tensor \"weight_scale\""),
        (vec![i8s.clone(), of_scales.clone(), scale.clone()], "no tensor \"src_zero_point\""),
        (vec![i8s.clone(), of_scales.clone(), of_dst.clone()], "no tensor \"src_scale\""),
        (vec![i8s.clone(), of_scales.clone(), i32s.clone()], "no tensor \"src_scale\""),
        (
            vec![i8s.clone(), of_scales.clone(), scale.clone(), zero_point, of_dst],
            "no tensor \"dst_zero_point\"",
        ),
        (vec![i8s], "no tensor \"weight_scale\""),
        (vec![fp8.clone(), of_scales.clone()], "no tensor \"src_scale\""),
        (vec![fp8.clone(), of_scales.clone(), scale.clone(), i32s], "\"bias\" is I32 [4]"),
        (vec![fp8, scale], "no tensor \"weight_scale\""),
    ] {
        write(&tensors);
        refused(&folder, &arguments(&[]), &[words]);
    }
    refused(&folder, &arguments(&["--per", "channel"]), &["--per", "position, sample or tensor"]);
    refused(&folder, &arguments(&["--activations", "f8"]), &["--activations", "e4m3 or e5m2"]);
}

/// Whether the first CUDA device multiplies 8-bit floats.
#[cfg(feature = "cuda")]
fn has_fp8() -> bool {
    pointwise::CudaDevice::open(0).unwrap().compute_capability() >= (8, 9)
}

#[cfg(not(feature = "cuda"))]
fn has_fp8() -> bool {
    false
}
