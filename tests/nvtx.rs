//! Feature `nvtx`: a range per call, as a tool that is linked into the process sees it.

#[path = "common/trials.rs"]
mod trials;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::process::ExitCode;
use std::sync::Mutex;

use libtest_mimic::{Arguments, Failed};
use ndarray::{Array2, Array3};
use nvtx_sys::ffi;
use pointwise::{Branches, Device, Pointwise, Sequence};
use trials::{cuda, trial};

/// What the tool has been told: `(message` of a range that begins, `)` of its end.
static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn told(text: String) {
    TOLD.lock().unwrap().push(text);
}

type Table = *const *mut *const c_void;
type ExportTable = extern "C" fn(u32) -> *const Callbacks;

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    size: usize,
    functions_of: extern "C" fn(c_int, *mut Table, *mut c_uint) -> c_int,
}

/// NVTX looks for a tool under this name.
#[allow(non_upper_case_globals, reason = "NVTX chose it")]
#[unsafe(no_mangle)]
static InitializeInjectionNvtx2_fnptr: extern "C" fn(ExportTable) -> c_int = attach;

extern "C" fn attach(export_table: ExportTable) -> c_int {
    const CALLBACKS: u32 = 1;
    const CORE2: c_int = 5;
    let (mut table, mut len) = (std::ptr::null(), 0);
    // SAFETY: the table of this number is the one with the callbacks, whose functions are those of
    // NVTX's version 3, of the types that these have.
    unsafe {
        ((*export_table(CALLBACKS)).functions_of)(CORE2, &mut table, &mut len);
        assert!(len > 12, "{len} functions");
        **table.add(4) = push as *const c_void;
        **table.add(5) = pop as *const c_void;
        **table.add(12) = create as *const c_void;
    }
    1
}

extern "C" fn create(name: *const c_char) -> *const c_void {
    // SAFETY: names end with a zero.
    assert_eq!(unsafe { CStr::from_ptr(name) }, c"pointwise");
    (&raw const TOLD).cast()
}

extern "C" fn push(domain: *const c_void, attributes: *const ffi::nvtxEventAttributes_t) -> c_int {
    assert_eq!(domain, (&raw const TOLD).cast());
    // SAFETY: attributes are read while they are lent, and their message as what they say it is.
    let message = unsafe {
        let attributes = &*attributes;
        assert_eq!(u32::from(attributes.version), ffi::NVTX_VERSION as u32);
        assert_eq!(usize::from(attributes.size), size_of_val(attributes));
        assert_eq!(attributes.messageType, ffi::nvtxMessageType_t::NVTX_MESSAGE_TYPE_ASCII as i32);
        CStr::from_ptr(attributes.message.ascii)
    };
    told(format!("({}", message.to_str().unwrap()));
    0
}

extern "C" fn pop(domain: *const c_void) -> c_int {
    assert_eq!(domain, (&raw const TOLD).cast());
    told(")".into());
    0
}

fn main() -> ExitCode {
    let cpu = || Ok(Device::cpu().threads(1));
    // They have one tool.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trials = vec![
        trial("a_call_is_a_range_with_kernel_and_cost", cpu, |device| ranges(&device, true)),
        trial("a_call_is_a_range_with_kernel_and_cost_cuda", cuda, |device| ranges(&device, false)),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Takes what the tool has been told of ranges.
fn take() -> Vec<String> {
    std::mem::take(&mut *TOLD.lock().unwrap())
}

/// Whether branches run as one pass.
fn ranges(device: &Device, one_pass: bool) -> Result<(), Failed> {
    let layer = Pointwise::new(Array2::<f32>::ones((8, 8))).relu().prepare(device)?;
    let src = Array3::<f32>::ones((2, 8, 10));
    layer.forward(&src)?;
    let explained = layer.explain(&[2, 8, 10])?;
    let (kernel, problem, bytes) = (explained.kernel, explained.problem, explained.cost.bytes());
    let begin = format!("({kernel}: {problem}, {} MACs, {bytes} bytes", 2 * 10 * 8 * 8);
    assert_eq!(take(), [&*begin, ")"]);

    Branches::new(vec![layer.clone(), layer.clone()])?.forward(&src)?;
    match one_pass {
        true => assert_eq!(take(), [&*begin, &begin, ")", ")"]),
        false => assert_eq!(take(), [&*begin, ")", &begin, ")"]),
    }
    Sequence::new(vec![layer.clone(), layer])?.forward(&src)?;
    assert_eq!(take(), [&*begin, ")", &begin, ")"]);
    Ok(())
}
