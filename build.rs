//! With the feature `cuda`: makes the parameter structs of `kernels/params.h`, the planner's table
//! of `kernels/kernels.def`, and a fatbin of each of `kernels/*.cu`. Without it: nothing.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `NVCC` | the CUDA compiler; else `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda` are searched |
//! | `POINTWISE_CUDA_ARCHS` | chips, as `80,90+ptx`; `+ptx` adds PTX for later chips, `compute_90` is PTX alone, which takes a fraction of the time |
//! | `CUDA_COMPUTE_CAP` | one chip, as other crates read it |
//! | `POINTWISE_FATBIN` | a fatbin made elsewhere, taken in place of nvcc's; with fp8's beside it, `-fp8` behind its name, if there is one |
//! | `POINTWISE_STRICT_PTXAS` | `1`: spilled registers are an error |

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::build();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::{Command, exit};

    /// What runs on every supported chip: machine code of sm_80 on 8.6 and 8.9 too, PTX on later ones.
    const DEFAULT_ARCHS: &str = "75+ptx,80+ptx,90";
    const OUR_ARCHS: &str = "POINTWISE_CUDA_ARCHS";
    /// Another crate's variable, of one chip.
    const THEIR_ARCH: &str = "CUDA_COMPUTE_CAP";
    const CHECKED_IN_PARAMS: &str = "src/cuda/params_generated.rs";
    const OLDEST_NVCC: (u32, u32) = (12, 0);
    /// The first that knows products of fp8 (PTX 8.4), and the first chip that has them.
    const FP8_NVCC: (u32, u32) = (12, 4);
    const FP8_ARCH: u32 = 89;
    const HELP: &str = "scripts/cuda-toolchain.sh installs nvcc and prints the variables to \
                        export; or set NVCC or CUDA_HOME, or POINTWISE_FATBIN to a prebuilt image";

    pub fn build() {
        println!("cargo::rerun-if-changed=kernels");
        println!("cargo::rerun-if-changed={CHECKED_IN_PARAMS}");
        for variable in [
            "NVCC",
            "CUDA_HOME",
            "CUDA_PATH",
            "CXX",
            "NVCC_PREPEND_FLAGS",
            "NVCC_APPEND_FLAGS",
            OUR_ARCHS,
            THEIR_ARCH,
            "POINTWISE_FATBIN",
            "POINTWISE_STRICT_PTXAS",
            "LIBCLANG_PATH",
            "BINDGEN_EXTRA_CLANG_ARGS",
            "DOCS_RS",
        ] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        write(&out.join("kernels.rs"), kernel_table().as_bytes());

        let [fatbin, fp8] = ["pointwise.fatbin", "pointwise-fp8.fatbin"].map(|name| out.join(name));
        if env::var_os("DOCS_RS").is_some() {
            // The documentation host has neither compiler nor network.
            copy(Path::new(CHECKED_IN_PARAMS), &out.join("params.rs"));
            write(&fatbin, b"");
            write(&fp8, b"");
            describe("none", "none");
            return;
        }
        params(&out.join("params.rs"));
        if let Some(prebuilt) = env::var_os("POINTWISE_FATBIN").filter(|path| !path.is_empty()) {
            let prebuilt = Path::new(&prebuilt);
            println!("cargo::rerun-if-changed={}", prebuilt.display());
            copy(prebuilt, &fatbin);
            let stem = prebuilt.file_stem().unwrap_or_default().to_string_lossy();
            let beside = prebuilt.with_file_name(format!("{stem}-fp8.fatbin"));
            println!("cargo::rerun-if-changed={}", beside.display());
            if beside.is_file() {
                copy(&beside, &fp8)
            } else {
                write(&fp8, b"")
            }
            return describe("unknown", "those of POINTWISE_FATBIN");
        }
        match find_nvcc() {
            Some(nvcc) => compile(&nvcc, &fatbin, &fp8),
            None => fail(&format!("the feature `cuda` needs nvcc, and none was found\n{HELP}")),
        }
    }

    /// Rust's side of `kernels/params.h`: by bindgen, or the checked-in copy where libclang is
    /// missing.
    fn params(to: &Path) {
        let builder = bindgen::Builder::default()
            .header("kernels/params.h")
            .allowlist_type("pw_.*")
            .allowlist_var("PW_.*")
            .use_core()
            .derive_default(true)
            .default_enum_style(bindgen::EnumVariation::NewType {
                is_bitfield: false,
                is_global: false,
            })
            .prepend_enum_name(false)
            .generate_comments(false)
            .disable_header_comment();
        // bindgen has no error for a missing libclang: it panics, at some length.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let generated =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| builder.generate()));
        std::panic::set_hook(hook);
        match generated {
            Ok(Ok(bindings)) => write(to, bindings.to_string().as_bytes()),
            Ok(Err(error)) => {
                checked_in_params(to, &format!("bindgen on kernels/params.h: {error}"), "");
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                let text = text.unwrap_or("no message");
                if text.contains("Unable to find libclang") {
                    let hint = " (set LIBCLANG_PATH to have it generated)";
                    checked_in_params(to, "libclang not found", hint);
                } else {
                    checked_in_params(to, &format!("bindgen panicked: {text}"), "");
                }
            }
        }
    }

    fn checked_in_params(to: &Path, reason: &str, hint: &str) {
        // A warning is one line.
        let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
        println!("cargo::warning={reason}: using {CHECKED_IN_PARAMS} as it is{hint}");
        copy(Path::new(CHECKED_IN_PARAMS), to);
    }

    /// The rows of `kernels/kernels.def` as Rust.
    fn kernel_table() -> String {
        let text = read("kernels/kernels.def");
        let (mut rows, mut int8, mut fp8) = (String::new(), String::new(), String::new());
        let tile = |c, positions, depth, blocks, shared| {
            format!(
                "tile: Tile {{ rows: {c}, positions: {positions}, depth: {depth}, \
                 blocks_per_sm: {blocks}, shared_bytes: {shared} }}"
            )
        };
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with("//") {
                continue;
            }
            let row = line.strip_suffix(')').and_then(|row| row.split_once('('));
            let (family, list) = row.unwrap_or((line, ""));
            let numbers: Option<Vec<u32>> =
                list.split(',').map(|number| number.trim().parse().ok()).collect();
            let numbers = numbers.unwrap_or_default();
            let bytes = match family {
                "PW_INT8" => Some(("i8_mma", &mut int8)),
                "PW_FP8" => Some(("fp8_sm89", &mut fp8)),
                _ => None,
            };
            if let (
                Some((name, table)),
                &[c, positions, depth, warp_c, warp_positions, _, blocks, shared],
            ) = (bytes, numbers.as_slice())
            {
                let threads = 32 * (c / warp_c) * (positions / warp_positions);
                let tile = tile(c, positions, depth, blocks, shared);
                *table += &format!(
                    "    ByteKernel {{ name: \"fprop_{name}_{c}x{positions}x{depth}\", {tile}, \
                     threads: {threads} }},\n"
                );
                continue;
            }
            // What a name begins with, its family and dtype.
            let simt = |dtype: &str| format!("{}_simt", dtype.to_lowercase());
            let kinds: Vec<(String, &str, &str)> = match family {
                "PW_FPROP_F32_SIMT" => vec![(simt("F32"), "Simt", "F32")],
                "PW_FPROP_16BIT_SIMT" => ["F16", "Bf16"].map(|d| (simt(d), "Simt", d)).into(),
                "PW_FPROP_TF32_MMA" => vec![("tf32_sm80".into(), "Tf32", "F32")],
                "PW_FPROP_F32_MMA" => vec![("f32_sm80".into(), "Tf32x3", "F32")],
                "PW_FPROP_16BIT_MMA" => {
                    vec![("f16_sm80".into(), "Pairs", "F16"), ("bf16_sm80".into(), "Pairs", "Bf16")]
                }
                "PW_FPROP_F16_MMA_SM75" => vec![("f16_sm75".into(), "PairsSm75", "F16")],
                _ => fail(&format!("kernels/kernels.def: not understood: {line}")),
            };
            for ((isa, family, dtype), (layout, channels_fast)) in kinds
                .iter()
                .flat_map(|kind| [("nchw", false), ("nhwc", true)].map(|layout| (kind, layout)))
            {
                let (c, positions, depth, slow, fast, vector, blocks, shared) =
                    match (*family, numbers.as_slice()) {
                        ("Simt", &[c, positions, depth, slow, fast, blocks, shared]) => {
                            (c, positions, depth, slow, fast, 4, blocks, shared)
                        }
                        (mma, &[c, positions, depth, first, second, _, blocks, shared])
                            if mma != "Simt" =>
                        {
                            // A warp's part: of 16-bit kernels along the slow and the fast axis,
                            // of others along rows and positions.
                            let half = *dtype != "F32";
                            let (warp_slow, warp_fast) = match channels_fast && !half {
                                true => (second, first),
                                false => (first, second),
                            };
                            // Its 32 lanes are 8 along the channels and 4 along the positions.
                            let (slow, fast) = match channels_fast {
                                true => (warp_slow / 4, warp_fast / 8),
                                false => (warp_slow / 8, warp_fast / 4),
                            };
                            let vector = if half { (warp_fast / 8).min(8) } else { 4 };
                            (c, positions, depth, slow, fast, vector, blocks, shared)
                        }
                        _ => fail(&format!("kernels/kernels.def: not understood: {line}")),
                    };
                let threads = c * positions / (slow * fast);
                let tile = tile(c, positions, depth, blocks, shared);
                rows += &format!(
                    "    Kernel {{ name: \"fprop_{isa}_{c}x{positions}x{depth}_{layout}\", \
                     family: Family::{family}, dtype: DType::{dtype}, {tile}, slow: {slow}, \
                     fast: {fast}, vector: {vector}, threads: {threads}, \
                     channels_fast: {channels_fast} }},\n"
                );
            }
        }
        format!(
            "pub(crate) const KERNELS: &[Kernel] = &[\n{rows}];\n\
             pub(crate) const INT8_KERNELS: &[ByteKernel] = &[\n{int8}];\n\
             pub(crate) const FP8_KERNELS: &[ByteKernel] = &[\n{fp8}];\n"
        )
    }

    /// The newest of the places where people keep it: what `NVCC` names, the toolkit's home, PATH.
    fn find_nvcc() -> Option<PathBuf> {
        let exe = format!("nvcc{}", env::consts::EXE_SUFFIX);
        if let Some(nvcc) = env::var_os("NVCC").filter(|v| !v.is_empty()) {
            let nvcc = PathBuf::from(nvcc);
            if !nvcc.is_file() && nvcc.components().count() > 1 {
                fail(&format!("NVCC={}: no such file\n{HELP}", nvcc.display()));
            }
            return Some(nvcc);
        }
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
        let homes = homes.map(|home| PathBuf::from(home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let path: Vec<PathBuf> = env::split_paths(&path).collect();
        homes
            .chain(path)
            .chain([PathBuf::from("/usr/local/cuda/bin"), PathBuf::from("/opt/cuda/bin")])
            .map(|folder| folder.join(&exe))
            .find(|nvcc| nvcc.is_file())
    }

    /// Compiles the kernels, those of fp8 into an image of their own: the others gain nothing from being
    /// compiled for their chips again.
    fn compile(nvcc: &Path, fatbin: &Path, fp8: &Path) {
        let version = nvcc_version(nvcc);
        if version < OLDEST_NVCC {
            fail(&format!(
                "{} is version {}.{}; pointwise needs {}.{} or later\n{HELP}",
                nvcc.display(),
                version.0,
                version.1,
                OLDEST_NVCC.0,
                OLDEST_NVCC.1
            ));
        }
        let (variable, list) = [OUR_ARCHS, THEIR_ARCH]
            .into_iter()
            .find_map(|v| Some((v, env::var(v).ok().filter(|list| !list.is_empty())?)))
            .unwrap_or_else(|| (OUR_ARCHS, DEFAULT_ARCHS.into()));
        if variable == THEIR_ARCH {
            println!(
                "cargo::warning={THEIR_ARCH}={list} decides for which chip kernels are compiled; \
                 {OUR_ARCHS} goes before it"
            );
        }
        let archs: Vec<Arch> = list.split(',').map(|arch| Arch::parse(variable, arch)).collect();

        // SAFETY: the build script has one thread. `cc` takes its CUDA compiler from here.
        unsafe { env::set_var("NVCC", nvcc) };
        let compiler = cc::Build::new()
            .cuda(true)
            .cudart("none")
            .cargo_metadata(false)
            .cargo_warnings(false)
            // The default flags would turn the optimiser off in the dev profile.
            .no_default_flags(true)
            .warnings(false)
            .try_get_compiler()
            .unwrap_or_else(|error| fail(&format!("no C++ compiler for nvcc: {error}")));
        let run = |source: &str, gencode: Vec<String>, to: &Path| {
            let mut command = compiler.to_command();
            command.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--threads=0"]);
            command.args(["-Xptxas", "-v", "-Ikernels"]);
            command.args(gencode);
            command.arg("-o").arg(to).arg(source);
            let output = command
                .output()
                .unwrap_or_else(|error| fail(&format!("{} does not run: {error}", nvcc.display())));
            let log = String::from_utf8_lossy(&output.stderr).into_owned()
                + &String::from_utf8_lossy(&output.stdout);
            write(&to.with_extension("ptxas.log"), log.as_bytes());
            if !output.status.success() {
                let no_cxx = ["host compiler", "c++: No such file"].iter().any(|t| log.contains(t));
                let hint =
                    if no_cxx { "\nnvcc needs a C++ compiler (g++), or set CXX" } else { "" };
                fail(&format!("nvcc failed ({}):\n{}{hint}", output.status, log.trim_end()));
            }
            log
        };
        let mut log = run("kernels/fprop.cu", gencode(&archs, Arch::front_end), fatbin);
        let archs: Vec<Arch> = archs.into_iter().filter_map(Arch::with_fp8).collect();
        if archs.is_empty() || version < FP8_NVCC {
            write(fp8, b"");
        } else {
            log += &run("kernels/fp8.cu", gencode(&archs, Arch::fp8_front_end), fp8);
        }
        if env::var_os("POINTWISE_STRICT_PTXAS").is_some_and(|v| v == "1") {
            let complaints = ptxas_complaints(&log);
            if !complaints.is_empty() {
                fail(&format!("POINTWISE_STRICT_PTXAS=1:\n{}", complaints.join("\n")));
            }
        }
        describe(&format!("{}.{}", version.0, version.1), &list);
    }

    /// A chip to compile for.
    struct Arch {
        /// As `80` or `90a`.
        name: String,
        number: u32,
        /// Machine code, PTX, or both.
        code: bool,
        ptx: bool,
    }

    impl Arch {
        /// `80`, `8.0`, `sm_80`, `90a`, `80+ptx`, `compute_80`.
        fn parse(variable: &str, text: &str) -> Arch {
            let text = text.trim().to_ascii_lowercase();
            let (chip, code, ptx) = match (text.strip_suffix("+ptx"), text.strip_prefix("compute_"))
            {
                (Some(chip), _) => (chip, true, true),
                (None, Some(chip)) => (chip, false, true),
                (None, None) => (text.as_str(), true, false),
            };
            let name = chip.trim_start_matches("sm_").replace('.', "");
            let digits = name.trim_end_matches(['a', 'f']);
            match digits.parse() {
                Ok(number) if number >= 75 => Arch { number, code, ptx, name },
                _ => fail(&format!(
                    "{variable}: {text:?} is not a chip from 75 on, as in `{DEFAULT_ARCHS}`"
                )),
            }
        }

        /// The instruction set that the front end compiles for. Chips share one where our kernels
        /// have nothing to gain from another: each costs a third of the build.
        fn front_end(&self) -> String {
            match self.number {
                _ if self.name.ends_with(['a', 'f']) => self.name.clone(),
                80.. => "80".into(),
                _ => self.name.clone(),
            }
        }

        /// The chip that stands for this one in the image of fp8: 8.9 for 8.0, whose code it runs
        /// otherwise.
        fn with_fp8(self) -> Option<Arch> {
            match self.number {
                FP8_ARCH.. => Some(self),
                80.. => Some(Arch { name: FP8_ARCH.to_string(), number: FP8_ARCH, ..self }),
                _ => None,
            }
        }

        fn fp8_front_end(&self) -> String {
            if self.name.ends_with(['a', 'f']) { self.name.clone() } else { FP8_ARCH.to_string() }
        }
    }

    fn gencode(archs: &[Arch], front_end: fn(&Arch) -> String) -> Vec<String> {
        let mut front_ends: Vec<(String, Vec<String>)> = Vec::new();
        // Without PTX nothing would run on later chips, so the newest portable one gives some.
        let implied = (!archs.iter().any(|arch| arch.ptx))
            .then(|| {
                let portable = archs.iter().filter(|arch| !arch.name.ends_with(['a', 'f']));
                portable.max_by_key(|arch| arch.number).map(|arch| arch.number)
            })
            .flatten();
        for arch in archs {
            let front_end = front_end(arch);
            let mut codes: Vec<_> =
                arch.code.then(|| format!("sm_{}", arch.name)).into_iter().collect();
            if arch.ptx || implied == Some(arch.number) {
                codes.push(format!("compute_{front_end}"));
            }
            match front_ends.iter_mut().find(|(name, _)| *name == front_end) {
                Some((_, all)) => all.extend(codes),
                None => front_ends.push((front_end, codes)),
            }
        }
        front_ends
            .into_iter()
            .map(|(front_end, mut codes)| {
                codes.sort();
                codes.dedup();
                format!("-gencode=arch=compute_{front_end},code=[{}]", codes.join(","))
            })
            .collect()
    }

    fn nvcc_version(nvcc: &Path) -> (u32, u32) {
        let output = Command::new(nvcc).arg("--version").output().unwrap_or_else(|error| {
            fail(&format!("{} does not run: {error}\n{HELP}", nvcc.display()))
        });
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let parsed = text.split("release ").nth(1).and_then(|rest| {
            let (major, rest) = rest.split_once('.')?;
            let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        parsed.unwrap_or_else(|| fail(&format!("{} --version says: {text}", nvcc.display())))
    }

    /// What costs speed without an error: registers spilled to memory, wgmma made serial.
    fn ptxas_complaints(log: &str) -> Vec<String> {
        let mut function = "";
        let mut complaints = Vec::new();
        for line in log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function") {
                function = rest.trim();
            }
            let spills = line.contains("bytes spill stores")
                && !line.contains(" 0 bytes spill stores, 0 bytes spill loads");
            if spills || line.contains("serialized") {
                complaints.push(format!("{function}: {}", line.trim()));
            }
        }
        complaints
    }

    /// Tells the crate what it was built with, for its errors.
    fn describe(nvcc: &str, archs: &str) {
        println!("cargo::rustc-env=POINTWISE_BUILT_NVCC={nvcc}");
        println!("cargo::rustc-env=POINTWISE_BUILT_ARCHS={archs}");
    }

    fn read(path: &str) -> String {
        fs::read_to_string(path).unwrap_or_else(|error| fail(&format!("{path}: {error}")))
    }

    fn write(path: &Path, bytes: &[u8]) {
        fs::write(path, bytes)
            .unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())));
    }

    fn copy(from: &Path, to: &Path) {
        let bytes =
            fs::read(from).unwrap_or_else(|error| fail(&format!("{}: {error}", from.display())));
        write(to, &bytes);
    }

    /// Stops the build with a message, one line each, and no backtrace.
    fn fail(message: &str) -> ! {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        exit(1)
    }
}
