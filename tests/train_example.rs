//! The example `train`: its first steps against PyTorch's, and the command as its users run it.
#![cfg(feature = "safetensors")]

#[path = "../examples/train/adam.rs"]
mod adam;
#[path = "../examples/train/checkpoint.rs"]
#[allow(dead_code, reason = "the command writes, the tests read")]
mod checkpoint;
#[path = "../examples/train/data.rs"]
mod data;
#[path = "../examples/train/loss.rs"]
mod loss;
#[path = "../examples/train/network.rs"]
mod network;
#[path = "../examples/train/pool.rs"]
mod pool;
#[path = "../examples/train/training.rs"]
#[allow(dead_code, reason = "the command trains, the tests run it")]
mod training;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ndarray::{Array3, array, s};
use ndarray_npy::{read_npy, write_npy};
use pointwise::safetensors::tensor::TensorView;
use pointwise::safetensors::{Dtype, SafeTensors, serialize};
use pointwise::{Device, Pointwise};

use adam::Adam;
use data::{CLASSES, Digits, IDENTITY};
use loss::CrossEntropy;
use network::Network;
use pool::Maxima;

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn bundled() -> PathBuf {
    root("examples/train/digits.safetensors")
}

/// Numbers of a dtype that the crate does not read as f32.
fn numbers<const N: usize, T>(
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    number: fn([u8; N]) -> T,
) -> Result<Vec<T>> {
    let tensor = file.tensor(name)?;
    assert_eq!(tensor.dtype(), dtype, "{name}");
    Ok(tensor.data().as_chunks().0.iter().map(|&bytes| number(bytes)).collect())
}

/// How far values are from those that PyTorch computes in f64, at most; NaN is infinitely far.
fn distance(got: impl IntoIterator<Item = f64>, want: &[f64]) -> f64 {
    let far = |(got, want): (f64, &f64)| {
        let far = (got - want).abs();
        if far.is_nan() { f64::INFINITY } else { far }
    };
    got.into_iter().zip(want).map(far).fold(0.0, f64::max)
}

#[test]
fn the_first_steps_are_pytorchs() -> Result {
    let bytes = fs::read(root("tests/fixtures/train_example.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let digits = Digits::read(&bundled())?;
    let chosen = numbers(&file, "digits", Dtype::I64, i64::from_le_bytes)?;
    let maps = numbers(&file, "maps", Dtype::F32, f32::from_le_bytes)?;
    let mut maps = maps.as_chunks().0.iter().map(|rows: &[f32; 6]| {
        let [a, b, c, d, e, f] = *rows;
        [[a, b, c], [d, e, f]]
    });
    let losses = numbers(&file, "losses", Dtype::F64, f64::from_le_bytes)?;
    let naive = numbers(&file, "naive/losses", Dtype::F32, f32::from_le_bytes)?;
    let batch = chosen.len() / losses.len();

    // The settings of reference.py.
    let mut adam = Adam { learning_rate: 3e-3, eps: 1e-4, ..Adam::new() };
    let mut network = Network::read(&file, "before/", &Device::cpu())?;
    let mut got = Vec::new();
    for chosen in chosen.chunks_exact(batch) {
        let chosen: Vec<_> = chosen.iter().map(|&digit| digit as usize).collect();
        let batch = digits.batch(&chosen, || maps.next().expect("a map for each cloud"));
        got.push(network.step(&batch, &mut adam)?.loss);
    }
    assert!(maps.next().is_none());

    // No further from f64 than twice what PyTorch is in f32.
    let allowed = 2.0 * distance(naive.iter().map(|&loss| f64::from(loss)), &losses);
    let off = distance(got.iter().copied(), &losses);
    assert!(
        off <= allowed,
        "the losses {got:?} are {off:.1e} from {losses:?}, {allowed:.1e} allowed"
    );

    let mut seen = Vec::new();
    let mut worst = (0.0, String::new());
    let mut allowed = 0.0f64;
    network.visit(|name, shape, values| {
        let want = numbers(&file, &format!("after/{name}"), Dtype::F64, f64::from_le_bytes);
        let naive = numbers(&file, &format!("naive/{name}"), Dtype::F32, f32::from_le_bytes);
        let (want, naive) = (want.expect(name), naive.expect(name));
        assert_eq!(file.tensor(&format!("before/{name}")).expect(name).shape(), shape, "{name}");
        assert_eq!(want.len(), values.len(), "{name}");
        let off = distance(values.iter().map(|&value| f64::from(value)), &want);
        if off > worst.0 {
            worst = (off, name.to_owned());
        }
        allowed = allowed.max(2.0 * distance(naive.iter().map(|&x| f64::from(x)), &want));
        seen.push(format!("before/{name}"));
    });
    assert!(worst.0 <= allowed, "{} is off by {:.1e}, {allowed:.1e} allowed", worst.1, worst.0);
    for (name, count) in network.batches_tracked() {
        assert_eq!(count, got.len() as u64, "{name}");
        seen.push(format!("before/{name}"));
    }
    let mut names: Vec<_> =
        file.names().into_iter().filter(|name| name.starts_with("before/")).collect();
    names.sort_unstable();
    seen.sort_unstable();
    assert_eq!(seen, names);
    Ok(())
}

#[test]
fn clouds_are_packed_without_padding() -> Result {
    let folder = Folder::new("clouds")?;
    let mut images = vec![0; 5 * 64];
    images[0] = 16; // the first picture: top left,
    images[64 - 8] = 4; // and bottom left
    (1..5).for_each(|i| images[64 * i + 20 + i] = 1);
    folder.digits("five.safetensors", &images, &[3, 1, 4, 1, 5])?;
    let digits = Digits::read(&folder.path("five.safetensors"))?;
    assert_eq!((digits.test(), digits.training()), (vec![0], vec![1, 2, 3, 4]));

    let batch = digits.batch(&[2, 0], || IDENTITY);
    assert_eq!((batch.lengths, batch.labels), (vec![1, 2], vec![4, 3]));
    let (x, y) = ((22 % 8) as f32 / 3.5 - 1.0, (22 / 8) as f32 / 3.5 - 1.0);
    let expected = array![[x, -1.0, -1.0], [y, -1.0, 1.0], [1.0 / 16.0, 1.0, 0.25]];
    let off = (&batch.points.slice(s![0, .., ..]) - &expected).mapv(f32::abs);
    assert!(off.iter().all(|&off| off <= 1e-7), "{}", batch.points);

    let batch = digits.batch(&[0], || [[2.0, 0.0, 0.5], [1.0, -1.0, 0.0]]);
    assert_eq!(batch.points, array![[[-1.5, -1.5], [0.0, -2.0], [1.0, 0.25]]]);
    Ok(())
}

#[test]
fn a_maximum_sends_its_gradient_to_where_it_stands() {
    let src = array![[[1.0, 5.0, -2.0, 5.0, 0.5], [-3.0, -1.0, -7.0, -8.0, -9.0]]];
    let maxima = Maxima::of(&src, &[2, 3]);
    assert_eq!(maxima.values, array![[5.0, -1.0], [5.0, -7.0]]);
    let d_src = maxima.backward(&array![[1.0, 2.0], [3.0, 4.0]]);
    assert_eq!(d_src, array![[[0.0, 1.0, 0.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0, 0.0]]]);

    // Of equal values the first; NaN before all.
    let nan = f32::NAN;
    let src = array![[[1.0, nan, 2.0, nan, 0.0, 0.0]]];
    let maxima = Maxima::of(&src, &[4, 2]);
    assert!(maxima.values[[0, 0]].is_nan());
    assert_eq!(maxima.backward(&array![[1.0], [2.0]]), array![[[0.0, 1.0, 0.0, 0.0, 2.0, 0.0]]]);
}

#[test]
fn cross_entropy_is_its_formula() {
    let logits = array![[0.5, -1.0, 2.0], [300.0, 299.0, -300.0]];
    let outcome = CrossEntropy::of(&logits, &[1, 0]);
    let sums = [0.5f64.exp() + (-1.0f64).exp() + 2.0f64.exp(), 1.0 + (-1.0f64).exp()];
    let expected = (sums[0].ln() + 1.0 + sums[1].ln()) / 2.0;
    assert!((outcome.loss - expected).abs() <= 1e-12, "{} for {expected}", outcome.loss);
    assert_eq!(outcome.right, 1);
    for ((row, column), &d) in outcome.d_logits.indexed_iter() {
        let nudged = |by: f32| {
            let mut logits = logits.clone();
            logits[[row, column]] += by;
            CrossEntropy::of(&logits, &[1, 0]).loss
        };
        let slope = (nudged(0.125) - nudged(-0.125)) / 0.25;
        assert!((f64::from(d) - slope).abs() <= 1e-3, "{d} at {row}, {column}, not {slope}");
    }
    assert!(CrossEntropy::of(&array![[f32::NAN, 0.0]], &[0]).loss.is_nan());
}

/// A fresh folder for the files of one test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("train").join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn tensors(&self, name: &str, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> Result {
        let mut views = BTreeMap::new();
        for (name, dtype, shape, bytes) in tensors {
            views.insert(*name, TensorView::new(*dtype, shape.clone(), bytes)?);
        }
        Ok(fs::write(self.path(name), serialize(views, None)?)?)
    }

    fn digits(&self, name: &str, images: &[u8], labels: &[u8]) -> Result {
        self.tensors(
            name,
            &[
                ("images", Dtype::U8, vec![images.len() / 64, 8, 8], images.to_vec()),
                ("labels", Dtype::U8, vec![labels.len()], labels.to_vec()),
            ],
        )
    }

    /// The first digits of the bundled ones.
    fn few(&self, n: usize) -> Result {
        let bytes = fs::read(bundled())?;
        let file = SafeTensors::deserialize(&bytes)?;
        let (images, labels) = (file.tensor("images")?, file.tensor("labels")?);
        self.digits("few.safetensors", &images.data()[..64 * n], &labels.data()[..n])
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        self.example("train", arguments)
    }

    /// Runs an example, which cargo builds beside the tests.
    fn example(&self, name: &str, arguments: &[&str]) -> Result<Output> {
        let mut path = std::env::current_exe()?;
        path.pop();
        path.pop();
        path.extend(["examples", &format!("{name}{}", std::env::consts::EXE_SUFFIX)]);
        assert!(path.is_file(), "{} is missing: cargo build --examples", path.display());
        Ok(Command::new(path).current_dir(&self.0).args(arguments).output()?)
    }

    /// What a run that succeeds prints, line by line.
    fn train(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let run = self.run(arguments)?;
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        Ok(String::from_utf8(run.stdout)?.lines().map(str::to_owned).collect())
    }
}

/// NN.N of `test accuracy NN.N %`.
fn accuracy(lines: &[String]) -> Result<f64> {
    let last = lines.last().ok_or("no output")?;
    let number = last.strip_prefix("test accuracy ").and_then(|rest| rest.strip_suffix(" %"));
    Ok(number.ok_or_else(|| last.clone())?.parse()?)
}

#[test]
fn a_resumed_run_ends_as_an_uninterrupted_one() -> Result {
    let folder = Folder::new("resume")?;
    folder.few(85)?;
    let data = ["--data", "few.safetensors"];
    let whole = ["--seed", "7", "--epochs", "3", "--out", "whole", "--threads", "1"];
    let first = ["--seed", "7", "--epochs", "1", "--out", "parts"];
    let rest = ["--resume", "parts/resume.safetensors", "--epochs", "3", "--out", "parts"];
    let [whole, _, rest] =
        [&whole[..], &first, &rest].map(|options| folder.train(&[&data, options].concat()));
    assert_eq!(accuracy(&whole?)?, accuracy(&rest?)?);
    for name in ["pointnet.safetensors", "resume.safetensors", "curves.svg"] {
        let [whole, parts] = ["whole", "parts"].map(|out| fs::read(folder.path(out).join(name)));
        assert!(whole? == parts?, "{name} differs");
    }

    let other = ["--seed", "8", "--epochs", "3", "--out", "other"];
    folder.train(&[&data, &other[..]].concat())?;
    let [whole, other] =
        ["whole", "other"].map(|out| fs::read(folder.path(out).join("pointnet.safetensors")));
    assert!(whole? != other?, "the seed makes no difference");
    Ok(())
}

#[test]
fn a_short_run_learns_and_leaves_a_state_dict() -> Result {
    let folder = Folder::new("learns")?;
    // After two halvings of the learning rate, before which it jumps.
    let lines = folder.train(&["--epochs", "18", "--out", "."])?;
    let reached = accuracy(&lines)?;
    assert!(reached >= 95.0, "{lines:?}");
    let epochs = lines.iter().filter(|line| line.starts_with("epoch ")).count();
    assert_eq!(epochs, 18, "{lines:?}");

    // What the file holds is what was tested, under PyTorch's names and in its shapes.
    let bytes = fs::read(folder.path("pointnet.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let fixture = fs::read(root("tests/fixtures/train_example.safetensors"))?;
    let fixture = SafeTensors::deserialize(&fixture)?;
    let mut expected: Vec<_> =
        fixture.names().into_iter().filter_map(|name| name.strip_prefix("before/")).collect();
    let mut names = file.names();
    expected.sort_unstable();
    names.sort_unstable();
    assert_eq!(names, expected);
    for name in names {
        let rank = |file: &SafeTensors<'_>, name: &str| file.tensor(name).map(|t| t.shape().len());
        assert_eq!(rank(&file, name)?, rank(&fixture, &format!("before/{name}"))?, "{name}");
    }
    assert_eq!(file.tensor("conv3.weight")?.shape(), [256, 128, 1]);

    let digits = Digits::read(&bundled())?;
    let batch = digits.batch(&digits.test(), || IDENTITY);
    let logits = Network::read(&file, "", &Device::cpu())?.prepare()?.forward(&batch)?;
    assert_eq!(logits.dim(), (360, CLASSES));
    let right = loss::right(&logits, &batch.labels);
    assert_eq!(format!("{:.1}", right as f64 / 3.6), format!("{reached:.1}"));

    // `apply` runs any of its layers.
    write_npy(folder.path("points.npy"), &batch.points)?;
    let arguments = "--weights pointnet.safetensors --layer conv1 --norm bn1 --stages batch_norm,relu \
                     --input points.npy --output features.npy";
    let run = folder.example("apply", &arguments.split_whitespace().collect::<Vec<_>>())?;
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let layer = Pointwise::from_safetensors(&file, "conv1", Some("bn1"))?.relu();
    let features = layer.prepare(&Device::cpu())?.forward(&batch.points)?;
    assert_eq!(read_npy::<_, Array3<f32>>(folder.path("features.npy"))?, features);
    let head =
        "--weights pointnet.safetensors --layer fc1 --norm bn4 --input points.npy --output y.npy";
    let run = folder.example("apply", &head.split_whitespace().collect::<Vec<_>>())?;
    let error = String::from_utf8(run.stderr)?;
    assert!(!run.status.success() && error.contains("--norm bn4 without"), "{error}");

    let picture = fs::read_to_string(folder.path("curves.svg"))?;
    for word in ["<svg", "</svg>", "loss", "accuracy, %", "held out"] {
        assert!(picture.contains(word), "no {word:?} in the picture");
    }
    Ok(())
}

#[test]
fn bad_input_is_an_error_in_one_line() -> Result {
    let folder = Folder::new("errors")?;
    folder.few(10)?;
    folder.train(&["--data", "few.safetensors", "--epochs", "2", "--out", "."])?;
    let resume = fs::read(folder.path("resume.safetensors"))?;
    fs::write(folder.path("cut.safetensors"), &resume[..resume.len() - 1])?;
    // Another name, of the same length, for a tensor that a training needs.
    let at = resume.windows(10).position(|bytes| bytes == b"adam/steps").ok_or("no adam/steps")?;
    let renamed = [&resume[..at], b"adam/stops", &resume[at + 10..]].concat();
    fs::write(folder.path("renamed.safetensors"), renamed)?;
    folder.digits("label.safetensors", &[1; 5 * 64], &[0, 1, 2, 3, 10])?;
    folder.digits("ink.safetensors", &[&[1; 64][..], &[17; 4 * 64]].concat(), &[0; 5])?;
    folder.digits("blank.safetensors", &[&[0; 64][..], &[1; 4 * 64]].concat(), &[0; 5])?;
    folder.digits("four.safetensors", &[1; 4 * 64], &[0; 4])?;
    folder.digits("labels.safetensors", &[1; 6 * 64], &[0; 5])?;
    folder.tensors("half.safetensors", &[("labels", Dtype::U8, vec![5], vec![0; 5])])?;
    fs::write(folder.path("text"), "no tensors")?;

    let few = ["--data", "few.safetensors", "--epochs", "3"];
    let on = |options: &'static [&str]| [&few, options].concat();
    for (arguments, expected) in [
        (vec!["--data", "absent"], &["absent: "][..]),
        (vec!["--data", "text"], &["text: "]),
        (vec!["--data", "half.safetensors"], &["half.safetensors: ", "images"]),
        (vec!["--data", "labels.safetensors"], &["U8 [6, 8, 8]", "[5, 8, 8]"]),
        (vec!["--data", "label.safetensors"], &["digit 4", "label 10"]),
        (vec!["--data", "ink.safetensors"], &["digit 1", "ink 17"]),
        (vec!["--data", "blank.safetensors"], &["digit 0", "no ink"]),
        (vec!["--data", "four.safetensors"], &["4 digits", "at least 5"]),
        (vec!["--epochs", "0"], &["--epochs", "0"]),
        (vec!["--threads", "0"], &["--threads", "0"]),
        (vec!["--seed", "-1"], &["-1"]),
        (vec!["--bogus"], &["--bogus"]),
        (on(&["--device", "tpu"]), &["tpu"]),
        (on(&["--out", "text"]), &["text: "]),
        (on(&["--resume", "absent"]), &["absent: "]),
        (on(&["--resume", "text"]), &["text: "]),
        (on(&["--resume", "pointnet.safetensors"]), &["pointnet.safetensors: ", "network/conv1"]),
        (on(&["--resume", "few.safetensors"]), &["few.safetensors: ", "network/conv1"]),
        (on(&["--resume", "cut.safetensors"]), &["cut.safetensors: "]),
        (on(&["--resume", "renamed.safetensors"]), &["renamed.safetensors: ", "adam/steps"]),
        (on(&["--resume", "resume.safetensors", "--seed", "1"]), &["--seed", "--resume"]),
        (
            vec!["--data", "few.safetensors", "--resume", "resume.safetensors", "--epochs", "2"],
            &["resume.safetensors has 2 epochs", "--epochs 2"],
        ),
    ] {
        let run = folder.run(&arguments)?;
        let error = String::from_utf8(run.stderr)?;
        assert_eq!(run.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.starts_with("error: ") && error.lines().count() == 1, "{error}");
        for part in expected {
            assert!(error.contains(part), "{arguments:?}: no {part:?} in {error}");
        }
        assert!(!String::from_utf8(run.stdout)?.contains("test accuracy"), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn help_names_what_is_written() -> Result {
    let run = Folder::new("help")?.run(&["--help"])?;
    let text = String::from_utf8(run.stdout)?;
    assert!(run.status.success() && run.stderr.is_empty(), "{text}");
    for word in
        ["--resume", "--seed", "--device", "--threads", "pointnet.safetensors", "curves.svg"]
    {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    Ok(())
}
