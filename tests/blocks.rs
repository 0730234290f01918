//! The example `blocks` compares itself with the reference: it has to agree.

#[path = "common/trials.rs"]
mod trials;

use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let trials = vec![
        Trial::test("blocks_agree_with_the_reference", || agree("cpu")),
        trials::trial("blocks_agree_with_the_reference_cuda", trials::cuda, |_| agree("cuda:0")),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn agree(device: &str) -> Result<(), Failed> {
    let mut path = std::env::current_exe()?;
    path.pop();
    path.pop();
    path.extend(["examples", &format!("blocks{}", std::env::consts::EXE_SUFFIX)]);
    assert!(path.is_file(), "{} is missing: `cargo build --examples` builds it", path.display());
    let run = Command::new(path).args(["--device", device]).output()?;
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{text}{}", String::from_utf8_lossy(&run.stderr));
    assert!(text.starts_with(&format!("on {device} (")), "{text}");
    assert_eq!(text.matches(": ok").count(), 10, "{text}");
    Ok(())
}
