//! EfficientNet-Lite0 against PyTorch, and the command `classify` on input that it cannot use.

#[path = "../examples/classify/network.rs"]
#[allow(dead_code, reason = "the command times layers one by one, the tests do not")]
mod network;
#[path = "../examples/classify/picture.rs"]
mod picture;
#[path = "../examples/classify/spatial.rs"]
mod spatial;
#[path = "common/trials.rs"]
mod trials;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use libtest_mimic::{Arguments, Failed};
use network::{CLASSES, Network, SIZE};
use pointwise::safetensors::SafeTensors;
use pointwise::{DType, Device, Error, Layout, checkpoint};
use trials::{Missing, cuda, trial};

type Result<T = (), E = Failed> = std::result::Result<T, E>;

const NCHW: Layout = Layout::ChannelsFirst;
const NHWC: Layout = Layout::ChannelsLast;
/// PyTorch's first five for the bundled pictures, and what it gives the first.
const CAT: ([&str; 5], f32) =
    (["tiger cat", "Egyptian cat", "tabby", "lynx", "window screen"], 0.4120);
const COFFEE: ([&str; 5], f32) =
    (["espresso", "cup", "consomme", "chocolate sauce", "coffee mug"], 0.9508);

fn main() -> ExitCode {
    let trials = vec![
        trial("logits_nchw", data, |_| logits(&Device::cpu(), NCHW)),
        trial("logits_nhwc", data, |_| logits(&Device::cpu(), NHWC)),
        trial("logits_cuda_nchw", || data().and(cuda()), |device| logits(&device, NCHW)),
        trial("logits_cuda_nhwc", || data().and(cuda()), |device| logits(&device, NHWC)),
        trial("logits_do_not_depend_on_threads", data, |_| threads()),
        trial("cat", data, |_| top_5("chelsea.png", CAT)),
        trial("coffee", data, |_| top_5("coffee.png", COFFEE)),
        trial("f16", data, |_| fewer_bits(Some(DType::F16), 0.03)),
        trial("bf16", data, |_| fewer_bits(Some(DType::Bf16), 0.25)),
        trial("int8", data, |_| fewer_bits(None, 0.5)),
        trial("another_network_is_refused", data, |_| another_network()),
        trial(
            "command_prints_classes_time_and_layers",
            || data().and(command()),
            |command| {
                [("nchw", "f32"), ("nhwc", "f32")]
                    .iter()
                    .try_for_each(|&(layout, dtype)| report(&command, "cpu", layout, dtype))
            },
        ),
        trial("command_cuda_nchw", on_device, |command| report(&command, "cuda:0", "nchw", "f32")),
        trial("command_cuda_nhwc", on_device, |command| report(&command, "cuda:0", "nhwc", "f16")),
        trial("command_has_help", command, help),
        trial("command_reports_bad_input_in_one_line", command, bad_input),
        trial("command_reports_bad_weights_in_one_line", || data().and(command()), bad_weights),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn data() -> Result<(), Missing> {
    let weights = root("examples/data/efficientnet_lite0.safetensors");
    match std::fs::metadata(&weights) {
        Ok(_) => Ok(()),
        Err(error) => Err(Missing("data", format!("{}: {error}", weights.display()))),
    }
}

/// The example, which `cargo test` builds beside the tests.
fn command() -> Result<PathBuf, Missing> {
    let test = std::env::current_exe().map_err(|error| Missing("examples", error.to_string()))?;
    let name = format!("classify{}", std::env::consts::EXE_SUFFIX);
    let path = test.ancestors().nth(2).unwrap_or(&test).join("examples").join(name);
    if path.exists() {
        return Ok(path);
    }
    let path = path.display();
    Err(Missing("examples", format!("{path} is not built: cargo test does, without --test")))
}

fn on_device() -> Result<PathBuf, Missing> {
    data().and(cuda()).and(command())
}

fn weights() -> Result<Vec<u8>> {
    Ok(std::fs::read(root("examples/data/efficientnet_lite0.safetensors"))?)
}

fn network(device: &Device, layout: Layout) -> Result<Network> {
    network_in(DType::F32, device, layout)
}

fn network_in(dtype: DType, device: &Device, layout: Layout) -> Result<Network> {
    Ok(Network::new(&SafeTensors::deserialize(&weights()?)?, device, layout, dtype)?)
}

/// The stored picture, and PyTorch's logits for it.
fn stored() -> Result<(Vec<u8>, Vec<f32>)> {
    let bytes = std::fs::read(root("tests/fixtures/efficientnet_lite0_chelsea.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let pixels = file.tensor("pixels")?.data().to_vec();
    let logits = checkpoint::tensor(&file, "logits")?.into_iter().collect::<Vec<_>>();
    assert_eq!((pixels.len(), logits.len()), (SIZE * SIZE * 3, CLASSES));
    Ok((pixels, logits))
}

fn logits(device: &Device, layout: Layout) -> Result {
    let (pixels, expected) = stored()?;
    let mut network = network(device, layout)?;
    let picture = picture::normalise(&pixels, layout);
    // Twice: nothing may be left over from the first pass.
    for _ in 0..2 {
        let got = network.forward(&picture)?;
        for (class, (got, expected)) in got.iter().zip(&expected).enumerate() {
            // NaN is not close to anything.
            let close = (got - expected).abs() <= 1e-3;
            if !close {
                return Err(format!("class {class}: {got}, PyTorch has {expected}").into());
            }
        }
    }
    Ok(())
}

fn threads() -> Result {
    let (pixels, _) = stored()?;
    for layout in [NCHW, NHWC] {
        let picture = picture::normalise(&pixels, layout);
        let with = |threads: usize| -> Result<Vec<u32>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let logits = pool.install(|| {
                let mut network = network(&Device::cpu(), layout).map_err(|e| text(&e))?;
                network.forward(&picture).map(<[f32]>::to_vec).map_err(|e| e.to_string())
            })?;
            Ok(logits.iter().map(|x| x.to_bits()).collect())
        };
        let one = with(1)?;
        for threads in [2, 3, 7] {
            assert_eq!(with(threads)?, one, "{threads} threads, {layout:?}");
        }
    }
    Ok(())
}

fn text(failed: &Failed) -> String {
    failed.message().unwrap_or_default().to_owned()
}

fn top_5(name: &str, (labels, probability): ([&str; 5], f32)) -> Result {
    let pixels = picture::read(&root("examples/data").join(name)).map_err(|e| e.to_string())?;
    let text = std::fs::read_to_string(root("examples/data/imagenet_classes.txt"))?;
    let names: Vec<_> = text.lines().map(str::to_owned).collect();
    let mut network = network(&Device::cpu(), NHWC)?;
    let top = picture::top(network.forward(&picture::normalise(&pixels, NHWC))?, &names, 5);
    let got: Vec<_> = top.iter().map(|(label, _)| *label).collect();
    assert_eq!(got, labels);
    // PIL resizes a little differently.
    let error = (top[0].1 - probability).abs();
    assert!(error <= 0.01, "{} for {}, PyTorch has {probability}", top[0].1, labels[0]);
    Ok(())
}

/// The first of the classes is the same, and the logits are near those of f32, which are up to 9. Without
/// a type, they are of 8-bit integers.
fn fewer_bits(dtype: Option<DType>, tolerance: f32) -> Result {
    for layout in [NCHW, NHWC] {
        let pictures = ["chelsea.png", "coffee.png"].map(|name| {
            let pixels = picture::read(&root("examples/data").join(name)).expect(name);
            picture::normalise(&pixels, layout)
        });
        let mut exact = network(&Device::cpu(), layout)?;
        let mut rounded = match dtype {
            Some(dtype) => network_in(dtype, &Device::cpu(), layout)?,
            None => network(&Device::cpu(), layout)?.quantized(&pictures, &Device::cpu())?,
        };
        for (i, picture) in pictures.iter().enumerate() {
            let (exact, got) = (exact.forward(picture)?, rounded.forward(picture)?);
            let first = |x: &[f32]| (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b]));
            assert_eq!(first(got), first(exact), "{i}, {layout:?}");
            for (class, (got, exact)) in got.iter().zip(exact).enumerate() {
                let error = (got - exact).abs();
                assert!(error <= tolerance, "{i}, {layout:?}, {class}: {got} for {exact}");
            }
            assert!(got.iter().zip(exact).any(|(got, exact)| got != exact), "it was not used");
        }
    }
    Ok(())
}

/// A checkpoint in which one tensor's shape is another's.
fn another_network() -> Result {
    let bytes = weights()?;
    let file = SafeTensors::deserialize(&bytes)?;
    for (name, instead) in [
        ("_conv_stem.weight", "_conv_head.weight"),
        ("_bn0.bias", "_bn1.bias"),
        ("_blocks.3._depthwise_conv.weight", "_blocks.1._depthwise_conv.weight"),
        ("_blocks.9._bn1.running_var", "_bn0.running_var"),
        ("_blocks.9._bn2.running_var", "_bn0.running_var"),
        ("_blocks.9._expand_conv.weight", "_blocks.9._project_conv.weight"),
        ("_fc.weight", "_conv_head.weight"),
        ("_fc.bias", "_bn0.bias"),
    ] {
        let tensors = file.iter().map(|(this, view)| {
            (this, if this == name { file.tensor(instead).expect("it is there") } else { view })
        });
        let bytes = pointwise::safetensors::serialize(tensors, None)?;
        let changed = SafeTensors::deserialize(&bytes)?;
        match Network::new(&changed, &Device::cpu(), NCHW, DType::F32) {
            Err(Error::Checkpoint(_) | Error::ParameterLength { .. }) => {}
            Err(error) => return Err(format!("{name}: {error}").into()),
            Ok(_) => return Err(format!("{name} has the shape of {instead}: accepted").into()),
        }
        let tensors = file.iter().filter(|(this, _)| *this != name);
        let bytes = pointwise::safetensors::serialize(tensors, None)?;
        let changed = SafeTensors::deserialize(&bytes)?;
        let result = Network::new(&changed, &Device::cpu(), NCHW, DType::F32);
        match result {
            Err(Error::MissingTensor { .. } | Error::Checkpoint(_)) => {}
            Err(error) => return Err(format!("no {name}: {error}").into()),
            Ok(_) => return Err(format!("no {name}: accepted").into()),
        }
    }
    Ok(())
}

fn run(command: &Path, args: &[&str]) -> Result<Output> {
    Ok(Command::new(command).args(args).env_remove("POINTWISE_DEVICE").output()?)
}

/// What the command prints of the cat: classes, beside f32 what rounding does, time, layers.
fn report(command: &Path, device: &str, layout: &str, dtype: &str) -> Result {
    let args = ["--device", device, "--layout", layout, "--dtype", dtype];
    let output = run(command, &[&args[..], &["--runs", "1", "--threads", "2"]].concat())?;
    let stdout = String::from_utf8(output.stdout)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut lines = stdout.lines();
    for (i, label) in CAT.0.into_iter().enumerate() {
        let line = lines.next().unwrap_or_default();
        let mut fields = line.splitn(3, ' ');
        assert_eq!(fields.next(), Some(&*(i + 1).to_string()), "{line}");
        let probability = fields.next().unwrap_or_default();
        assert_eq!(probability.len(), "0.1234".len(), "{line}");
        let probability: f32 = probability.parse()?;
        assert!((0.0..=1.0).contains(&probability), "{line}");
        assert!(i > 0 || (probability - CAT.1).abs() <= 0.01, "{line}, PyTorch has {}", CAT.1);
        assert_eq!(fields.next(), Some(label), "{line}");
    }
    if dtype != "f32" {
        let line = lines.next().unwrap_or_default();
        assert!(line.starts_with(&format!("logits in {dtype} beside f32")), "{line}");
    }
    assert_eq!(lines.next(), Some(""));
    let line = lines.next().unwrap_or_default();
    assert!(line.contains("ms per picture") && line.contains(&format!(" on {device} (")), "{line}");
    let layers: Vec<_> = lines.filter(|line| line.contains("->")).collect();
    assert_eq!(layers.len(), 33, "{stdout}");
    for line in layers {
        assert!(line.contains(&format!(" fprop_{dtype}_")), "{line}");
    }
    Ok(())
}

fn help(command: PathBuf) -> Result {
    for (flag, expected) in [("--help", "--image"), ("--version", "classify")] {
        let output = run(&command, &[flag])?;
        assert!(output.status.success() && output.stderr.is_empty());
        let stdout = String::from_utf8(output.stdout)?;
        assert!(stdout.contains(expected), "{stdout}");
    }
    Ok(())
}

/// Exit code 1, nothing on stdout, one line on stderr that contains `expected`.
fn fails(command: &Path, args: &[&str], expected: &str) -> Result {
    one_line(run(command, args)?, expected).map_err(|e| format!("{args:?}: {}", text(&e)).into())
}

fn one_line(output: Output, expected: &str) -> Result {
    let stderr = String::from_utf8(output.stderr)?;
    let stdout = String::from_utf8(output.stdout)?;
    let line = stderr.strip_suffix('\n').unwrap_or_default();
    let good = output.status.code() == Some(1)
        && stdout.is_empty()
        && !line.is_empty()
        && !line.contains('\n')
        && line.contains(expected);
    if good {
        return Ok(());
    }
    Err(format!("{}, expected {expected:?}, stdout {stdout:?}, stderr {stderr:?}", output.status)
        .into())
}

/// Writes a file for a command to read.
fn file(name: &str, bytes: &[u8]) -> Result<String> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("classify_{name}"));
    std::fs::write(&path, bytes)?;
    Ok(path.into_os_string().into_string().map_err(|path| format!("{path:?} is not UTF-8"))?)
}

fn bad_input(command: PathBuf) -> Result {
    let mut png = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_fn(64, 48, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]))
        .write_to(&mut png, image::ImageFormat::Png)?;
    let png = png.into_inner();
    let truncated = file("truncated.png", &png[..png.len() / 2])?;
    let header = file("header.png", &png[..20])?;
    let empty = file("empty.png", b"")?;
    let words = file("words.png", b"This is\nno picture.\n")?;
    let mut huge = png.clone();
    huge[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    let huge = file("huge.png", &huge)?;
    let folder = env!("CARGO_TARGET_TMPDIR");
    for (args, expected) in [
        (&["--image", "no/such/file.png"][..], "no/such/file.png"),
        (&["--image", &truncated], "truncated.png"),
        (&["--image", &header], "header.png"),
        (&["--image", &empty], "empty.png"),
        (&["--image", &words], "words.png"),
        (&["--image", &huge], "huge.png"),
        (&["--image", folder], folder),
        (&["--image"], "--image"),
        (&["--device", "tpu"], "tpu"),
        (&["--device", "cuda:x"], "cuda:x"),
        (&["--threads", "0"], "--threads"),
        (&["--threads", "-1"], "-1"),
        (&["--threads", "many"], "many"),
        (&["--layout", "nhcw"], "nhcw"),
        (&["--runs", "1.5"], "1.5"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["stray"], "stray"),
    ] {
        fails(&command, args, expected)?;
    }
    Ok(())
}

fn bad_weights(command: PathBuf) -> Result {
    let bytes = weights()?;
    let half = file("half.safetensors", &bytes[..bytes.len() / 2])?;
    let empty = file("empty.safetensors", b"")?;
    let bare = file("bare.safetensors", b"\x02\0\0\0\0\0\0\0{}")?;
    for (args, expected) in [
        (&["--weights", "no/such.safetensors"][..], "no/such.safetensors"),
        (&["--weights", &half], "half.safetensors"),
        (&["--weights", &empty], "empty.safetensors"),
        (&["--weights", &bare], "_conv_stem.weight"),
        // There is no machine with so many.
        (&["--device", "cuda:4000"], "cuda:4000"),
    ] {
        fails(&command, args, expected)?;
    }
    let mut unknown = Command::new(&command);
    one_line(unknown.env("POINTWISE_DEVICE", "tpu").output()?, "POINTWISE_DEVICE=tpu")
}
