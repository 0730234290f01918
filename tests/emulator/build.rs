//! Gives the library the name under which programs look for the driver.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // A probe that opens and closes the driver must not unload its state.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
