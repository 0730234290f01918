//! The example `blocks` compares itself with the reference: it has to agree.

use std::process::Command;

#[test]
fn blocks_agree_with_the_reference() {
    let mut path = std::env::current_exe().expect("a test has a path");
    path.pop();
    path.pop();
    path.extend(["examples", &format!("blocks{}", std::env::consts::EXE_SUFFIX)]);
    assert!(path.is_file(), "{} is missing: `cargo build --examples` builds it", path.display());
    let run = Command::new(path).output().expect("the example starts");
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{text}{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(text.matches(": ok").count(), 10, "{text}");
}
