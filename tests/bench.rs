//! The example `bench` as its users run it, on layers that take no time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ndarray::{ArrayD, Axis, IxDyn, array};
use pointwise::{Activation, DType, Pointwise};

#[path = "../examples/bench/verify.rs"]
mod verify;

const RESULTS: &str = "model,layer,n,cin,cout,h,w,stride,groups,act,dtype,layout,threads,device,\
                       kernel,median_us,min_us,gflops,gbps,fma_peak,roof_bw,peak_fraction,max_err";
const LAYERS: &str = "model,layer,n,cin,cout,h,w,stride,groups,act\n";

/// The example's binary, which cargo builds beside the tests.
fn binary() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test has a path");
    path.pop();
    path.pop();
    path.extend(["examples", &format!("bench{}", std::env::consts::EXE_SUFFIX)]);
    assert!(path.is_file(), "{} is missing: `cargo build --examples` builds it", path.display());
    path
}

/// A fresh folder with a table of layers.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, layers: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench").join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder for the test");
        fs::write(path.join("layers.csv"), layers).expect("layers.csv");
        Folder(path)
    }

    fn bench(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary());
        command.current_dir(&self.0).env_remove("POINTWISE_KERNEL");
        command.args(["--layers", "layers.csv"]).args(arguments).output().expect("it starts")
    }

    /// Runs it, and gives the rows of its CSV.
    fn results(&self, arguments: &[&str]) -> Vec<Vec<String>> {
        let run = self.bench(arguments);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        rows(&String::from_utf8(run.stdout).expect("text"))
    }
}

fn rows(text: &str) -> Vec<Vec<String>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header: Vec<_> = reader.headers().expect("a header").iter().map(str::to_owned).collect();
    assert_eq!(header.join(","), RESULTS);
    let record = |record: csv::Result<csv::StringRecord>| {
        record.expect("a line").iter().map(str::to_owned).collect()
    };
    reader.records().map(record).collect()
}

#[test]
fn each_layer_is_a_row_per_layout() {
    let layers = "act,groups,stride,w,h,cout,cin,n,note,layer,model\n\
                  relu, 1,1,5,4,20,7,1,\"a, b\",first,tiny\n\
                  gelu_tanh,3,2,5,4,6,9,5,,second,\"tiny, too\"\n";
    let folder = Folder::new("rows", layers);
    let results = folder.results(&["--threads", "2"]);
    let names: Vec<_> = results.iter().map(|row| row[..12].join("|")).collect();
    let expected = [
        "tiny|first|1|7|20|4|5|1|1|relu|f32|nchw",
        "tiny|first|1|7|20|4|5|1|1|relu|f32|nhwc",
        "tiny, too|second|5|9|6|4|5|2|3|gelu_tanh|f32|nchw",
        "tiny, too|second|5|9|6|4|5|2|3|gelu_tanh|f32|nhwc",
    ];
    assert_eq!(names, expected);
    for row in &results {
        assert_eq!(row[12..14], ["2", "cpu"]);
        assert!(row[14].starts_with("fprop_f32_"), "{row:?}");
        let numbers: Vec<f64> = row[15..].iter().map(|x| x.parse().expect("a number")).collect();
        let [median, min, gflops, gbps, fma_peak, roof_bw, fraction, max_err] = numbers[..] else {
            panic!("{row:?}");
        };
        assert!(0.0 < min && min <= median && gflops > 0.0 && gbps > 0.0, "{row:?}");
        assert!(fma_peak > 0.0 && roof_bw > 0.0 && 0.0 < fraction && fraction <= 1.02, "{row:?}");
        assert!((0.0..=1.0).contains(&max_err), "{row:?}");
        // Printed with two digits.
        let intensity = gflops / gbps;
        let roof = fma_peak.min(roof_bw * intensity);
        assert!((fraction / (gflops / roof) - 1.0).abs() < 0.1, "{row:?}");
    }
}

#[test]
fn integers_are_rows_too() {
    let layers = format!("{LAYERS}tiny,a,5,12,20,4,5,2,1,relu\ntiny,b,1,9,6,4,5,1,3,none\n");
    let folder = Folder::new("int8", &layers);
    let results = folder.results(&["--dtype", "int8", "--kernel", "fprop_i8_portable_4x8"]);
    assert_eq!(results.len(), 4);
    for row in &results {
        assert_eq!((&*row[10], &*row[14]), ("int8", "fprop_i8_portable_4x8"));
        let numbers: Vec<f64> = row[15..].iter().map(|x| x.parse().expect("a number")).collect();
        assert!(numbers[..7].iter().all(|&x| x > 0.0) && numbers[6] <= 1.02, "{row:?}");
        assert!((0.0..=1.0).contains(&numbers[7]), "{row:?}");
    }
    let verified = folder.bench(&["--dtype", "int8", "--verify"]);
    let told = String::from_utf8(verified.stdout).expect("text");
    let lines: Vec<_> = told.lines().collect();
    let [a, b, all] = lines[..] else { panic!("{told}") };
    assert!(a.starts_with("tiny a: largest error ") && b.starts_with("tiny b: "), "{told}");
    // Both layouts of 5 x 20 channels at 2 x 3 positions, and of 6 at 4 x 5.
    assert!(a.contains(" of 1200 values") && b.contains(" of 240 values"), "{told}");
    assert!(all.starts_with("2 layers: ") && all.contains(" of 1440 values"), "{told}");
    let smooth = format!("{LAYERS}tiny,a,1,8,8,3,3,1,1,gelu\n");
    refused("int8_gelu", &smooth, &["--dtype", "int8"], &["tiny a", "gelu"]);
}

#[test]
fn steps_of_training_are_rows_in_every_type() {
    let layers = format!("{LAYERS}tiny,a,4,12,20,4,5,2,1,relu6\ntiny,b,3,9,6,4,5,1,3,none\n");
    let folder = Folder::new("train", &layers);
    for dtype in ["f32", "f16", "bf16"] {
        let results = folder.results(&["--pass", "train", "--dtype", dtype]);
        assert_eq!(results.len(), 4);
        for row in &results {
            assert_eq!((&*row[10], &*row[14]), (dtype, "train"));
            let numbers: Vec<f64> =
                row[15..].iter().map(|x| x.parse().expect("a number")).collect();
            assert!(numbers[4..6].iter().all(|&x| x > 0.0) && numbers[6] <= 1.02, "{row:?}");
            // Of 16 bits, what is rounded shows.
            let least = if dtype == "f32" { 0.0 } else { 0.2 };
            assert!((least..=1.0).contains(&numbers[7]), "{row:?}");
        }
    }
    let int8 = ["--pass", "train", "--dtype", "int8"];
    refused("train_int8", &layers, &int8, &["--pass train", "f32, f16 and bf16", "int8"]);
    let kernel = ["--pass", "train", "--kernel", "fprop_f32_portable_4x8"];
    refused("train_kernel", &layers, &kernel, &["--pass train", "--kernel"]);
}

#[test]
fn verification_says_how_large_errors_are() {
    let layers = format!("{LAYERS}tiny,a,1,300,20,4,5,1,1,none\n");
    let folder = Folder::new("verify", &layers);
    for dtype in ["f32", "bf16"] {
        let run = folder.bench(&["--verify", "--dtype", dtype]);
        let told = String::from_utf8(run.stdout).expect("text");
        let all = told.lines().last().unwrap_or_default();
        let number = |before: &str| -> f64 {
            let (_, rest) = all.split_once(before).unwrap_or_else(|| panic!("{told}"));
            rest.split([' ', ',']).next().unwrap_or_default().parse().expect("a number")
        };
        assert!(all.starts_with("1 layers: ") && all.ends_with(", 800 values"), "{told}");
        let (largest, mean) = (number("largest error "), number("mean "));
        assert!(0.0 < mean && mean < largest && largest <= 1.0, "{told}");
    }
    refused("verify_csv", &layers, &["--verify", "--csv", "out.csv"], &["--verify", "--csv"]);
    refused("verify_train", &layers, &["--verify", "--pass", "train"], &["--verify"]);
}

#[test]
fn options_choose_layout_batch_kernels_and_files() {
    let folder = Folder::new("options", &format!("{LAYERS}tiny,a,1,8,8,3,3,1,1,none\n"));
    let kernel = ["--kernel", "fprop_f32_portable_4x8"];
    let files = ["--csv", "out.csv", "--plot", "out.svg"];
    let run = folder.bench(&[&["--batch", "4", "--layout", "nhwc"], &kernel[..], &files].concat());
    let told = String::from_utf8(run.stderr).expect("text");
    assert!(run.status.success() && run.stdout.is_empty(), "{told}");
    assert!(told.contains("geomean") && told.contains(kernel[1]), "{told}");
    let results = rows(&fs::read_to_string(folder.0.join("out.csv")).expect("out.csv"));
    let [row] = results.as_slice() else { panic!("{results:?}") };
    assert_eq!((&*row[2], &*row[11], &*row[14]), ("4", "nhwc", kernel[1]));

    let picture = fs::read_to_string(folder.0.join("out.svg")).expect("out.svg");
    well_formed(&picture);
    for word in ["layers.csv", "GFLOP/s, FMA peak", "GB/s", "NHWC, 1 results", "flop/byte"] {
        assert!(picture.contains(word), "no {word:?} in the picture");
    }

    let both = [&kernel[..], &kernel, &["--layout", "nchw", "--csv", "-"]].concat();
    assert_eq!(folder.results(&both).len(), 2);
}

/// Asserts that every element of an XML document ends where it should.
fn well_formed(xml: &str) {
    let mut open = Vec::new();
    let mut rest = xml;
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains('>'), "{}", &rest[..start]);
        let len = rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..start + len];
        rest = &rest[start + len + 1..];
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name)),
            None if tag.ends_with('/') || tag.starts_with(['?', '!']) => {}
            None => open.push(tag.split_whitespace().next().expect("a name")),
        }
    }
    assert!(open.is_empty() && xml.contains("<svg"), "{open:?} left open");
}

/// Asserts exit code 1, no results, and one line on stderr with all of `expected`.
fn refused(name: &str, layers: &str, arguments: &[&str], expected: &[&str]) {
    let run = Folder::new(name, layers).bench(arguments);
    let error = String::from_utf8(run.stderr).expect("text");
    let error = error.lines().filter(|line| !line.starts_with("note: ")).collect::<Vec<_>>();
    assert_eq!((run.status.code(), error.len()), (Some(1), 1), "{name}: {error:?}");
    assert!(error[0].starts_with("error: "), "{name}: {error:?}");
    for word in expected {
        assert!(error[0].contains(word), "{name}: no {word:?} in {error:?}");
    }
}

#[test]
fn bad_tables_are_refused_with_file_line_and_values() {
    let sound = "tiny,a,1,8,8,3,3,1,1,relu\n";
    let second = |line: &str| format!("{LAYERS}{sound}{line}\n");
    for (name, layers, expected) in [
        ("empty", String::new(), &["layers.csv:1", "no column model"][..]),
        ("no_layers", LAYERS.into(), &["layers.csv", "no layers"]),
        ("no_column", LAYERS.replace("cout,", "") + sound, &["layers.csv:1", "cout", "cin,h"]),
        ("two_columns", LAYERS.replace("cout", "cin") + sound, &["layers.csv:1", "two", "cin"]),
        ("word", second("tiny,b,1,8,many,3,3,1,1,relu"), &["layers.csv:3", "cout", "\"many\""]),
        ("zero", second("tiny,b,0,8,8,3,3,1,1,relu"), &["layers.csv:3", "n is \"0\"", "tiny,b,0"]),
        ("negative", second("tiny,b,1,8,8,-3,3,1,1,relu"), &["layers.csv:3", "h", "\"-3\""]),
        ("fraction", second("tiny,b,1,8,8,3,3,1.5,1,relu"), &["layers.csv:3", "stride", "1.5"]),
        ("act", second("tiny,b,1,8,8,3,3,1,1,swoosh"), &["layers.csv:3", "\"swoosh\"", "relu6"]),
        ("prelu", second("tiny,b,1,8,8,3,3,1,1,prelu"), &["layers.csv:3", "\"prelu\""]),
        ("short", second("tiny,b,1,8"), &["layers.csv:3", "4 fields", "10", "tiny,b,1,8"]),
        ("long", second("tiny,b,1,8,8,3,3,1,1,relu,x"), &["layers.csv:3", "11 fields"]),
        ("groups", second("tiny,b,1,8,9,3,3,1,2,relu"), &["layers.csv:3", "2 groups", "cout 9"]),
        (
            "huge",
            second("tiny,b,4294967296,8,8,4294967296,3,1,1,relu"),
            &["layers.csv:3", "too large", "4294967296"],
        ),
    ] {
        refused(name, &layers, &[], expected);
    }
}

#[test]
fn bad_options_are_refused_with_their_values() {
    let layers = format!("{LAYERS}tiny,a,1,8,8,3,3,1,1,relu\n");
    for (name, arguments, expected) in [
        (
            "kernel",
            &["--kernel", "bogus"][..],
            &["bogus", "fprop_f32_portable_4x8", ":2: tiny a"][..],
        ),
        ("device", &["--device", "tpu"], &["tpu"]),
        ("missing_device", &["--device", "cuda:77"], &["cuda:77"]),
        ("dtype", &["--dtype", "f8"], &["f8", "bf16", "int8"]),
        ("layout", &["--layout", "chwn"], &["chwn"]),
        ("threads", &["--threads", "0"], &["--threads", "0"]),
        ("batch", &["--batch", "0"], &["--batch", "0"]),
        ("csv", &["--csv", "absent/out.csv"], &["absent/out.csv"]),
        ("plot", &["--plot", "absent/out.svg"], &["absent/out.svg"]),
        ("option", &["--bogus"], &["--bogus"]),
    ] {
        refused(name, &layers, arguments, expected);
    }
    let absent = Command::new(binary()).args(["--layers", "absent.csv"]).output();
    let absent = absent.expect("it starts");
    assert_eq!(absent.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("error: absent.csv: "));
}

#[test]
fn a_wrong_value_anywhere_is_an_error() {
    let layer = Pointwise::new(array![[0.5, -1.0], [0.25, 0.0]]).activation(Activation::Relu);
    let src = ArrayD::from_elem(IxDyn(&[1, 2, 1, 1]), 2.0f32);
    let expected = ArrayD::from_shape_vec(vec![2, 2, 1, 1], vec![1.0, 2.0, 3.0, -4.0]).unwrap();
    let tolerance = verify::tolerance(&layer, src.view(), expected.view(), DType::F32);
    assert_eq!(tolerance, (1.0 * 2.0 * 2.0 + 4.0) * f64::from(f32::EPSILON));
    let smooth = Pointwise::new(layer.weight().clone()).activation(Activation::Gelu);
    let smooth = verify::tolerance(&smooth, src.view(), expected.view(), DType::F32);
    let bf16 = verify::tolerance(&layer, src.view(), expected.view(), DType::Bf16);
    assert_eq!(bf16, 4.0 * f64::from(f32::EPSILON) + 4.0 / 128.0);
    assert_eq!(smooth, (4.0 + 4.0 * 4.0) * f64::from(f32::EPSILON));

    // Five samples that repeat two.
    let right =
        ArrayD::from_shape_fn(IxDyn(&[5, 2, 1, 1]), |i| expected[[i[0] % 2, i[1], 0, 0]] as f32);
    assert_eq!(verify::errors(expected.view(), right.view(), |_| tolerance).max, 0.0);
    assert_eq!(verify::errors(expected.view(), right.view(), |_| 0.0).max, 0.0);
    for sample in 0..5 {
        for (value, least) in
            [(f32::NAN, f64::INFINITY), (f32::INFINITY, f64::INFINITY), (9.0, 1e5)]
        {
            let mut wrong = right.clone();
            wrong.index_axis_mut(Axis(0), sample)[[1, 0, 0]] = value;
            let errors = |most| verify::errors(expected.view(), wrong.view(), |_| most);
            let found = errors(tolerance);
            assert!(found.max >= least, "{found:?} for {value} in sample {sample}");
            assert_eq!((found.unequal, found.values), (1, 10));
            // Alone among values that are right; a sum with NaN is NaN.
            assert!(value.is_nan() && found.sum.is_nan() || found.sum == found.max, "{found:?}");
            assert!(errors(0.0).max == f64::INFINITY && errors(f64::NAN).max == f64::INFINITY);
        }
    }
}

#[test]
fn a_wrong_integer_anywhere_is_an_error() {
    let expected = ArrayD::from_shape_fn(IxDyn(&[2, 1000]), |i| (i[1] % 256) as f64);
    let right = ArrayD::from_shape_fn(IxDyn(&[3, 1000]), |i| (i[1] % 256) as u8);
    let errors = |result: &ArrayD<u8>| verify::errors_of_integers(expected.view(), result.view());
    let error = |result: &ArrayD<u8>| errors(result).max;
    assert_eq!(error(&right), 0.0);
    for sample in 0..3 {
        let mut off = right.clone();
        off[[sample, 7]] = 8;
        assert_eq!(error(&off), 1.0);
        off[[sample, 7]] = 9;
        assert_eq!(error(&off), 2.0);
        let mut off = right.clone();
        for i in 0..4 {
            off[[sample, 10 + i]] += 1;
        }
        // Three of 3000 may be a step off, not four.
        assert!(error(&off) > 1.0);
        let found = errors(&off);
        assert_eq!((found.unequal, found.values, found.sum), (4, 3000, 4.0));
        let both = verify::Errors::of_all([found, errors(&right)].into_iter());
        assert_eq!((both.max, both.unequal, both.values), (found.max, 4, 6000));
    }
}
