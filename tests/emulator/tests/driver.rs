//! The driver's calls. Each test runs in a process of its own, as contexts stay broken and the
//! environment is read once.

use std::ffi::{CStr, c_void};
use std::process::Command;
use std::ptr::null_mut;

use cuda::driver::api::*;

/// Runs `body` in a child process with these variables; the test fails if the child does.
/// Gives what the child wrote to stderr, in the child itself nothing.
fn alone(name: &str, vars: &[(&str, &str)], body: fn()) -> Option<String> {
    if std::env::var_os("PW_EMULATOR_CHILD").is_some() {
        body();
        return None;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", name, "--nocapture", "--test-threads=1"]);
    child.env("PW_EMULATOR_CHILD", "1").envs(vars.iter().copied());
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    // A test that was filtered out would succeed too.
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("1 passed"), "{out}");
    Some(text.into_owned())
}

macro_rules! alone {
    ($(#[vars($($name:literal = $value:literal),*)] fn $test:ident() $body:block)*) => {$(
        #[test]
        fn $test() {
            alone(stringify!($test), &[$(($name, $value)),*], || $body);
        }
    )*};
}

#[test]
fn missing_checks_are_announced() {
    for (value, times) in [("0", 1), ("1", 0)] {
        let vars = [("PW_EMULATOR_CHECKS", value)];
        let text = alone("missing_checks_are_announced", &vars, || {
            assert_eq!(cuInit(0), 0);
            assert_eq!(cuInit(0), 0);
        });
        let Some(text) = text else { return };
        assert_eq!(text.matches("PW_EMULATOR_CHECKS=0").count(), times, "{text}");
    }
}

/// A kernel that adds `k` to `n` words, and one that stores out of bounds.
const PTX: &CStr = c".version 9.0
.target sm_75
.address_size 64
.global .align 4 .u32 counter = 5;
.visible .entry add(.param .u64 p, .param .u32 n, .param .u32 k) .maxntid 128, 1, 1
{
.reg .b32 t, x, y, z; .reg .b64 a; .reg .pred q;
mov.u32 t, %tid.x; mov.u32 x, %ctaid.x; mov.u32 y, %ntid.x; mad.lo.u32 t, x, y, t;
ld.param.u32 x, [n]; setp.ge.u32 q, t, x; @q ret;
ld.param.u64 a, [p]; ld.param.u32 z, [k]; mad.wide.u32 a, t, 4, a;
ld.global.u32 x, [a]; add.u32 x, x, z; st.global.u32 [a], x; ret;
}
.extern .shared .align 16 .b8 dynamic[];
.visible .entry big() { st.shared.u8 [dynamic], 1; ret; }
";

fn context() -> usize {
    assert_eq!(cuInit(0), 0);
    let mut context = 0;
    assert_eq!(cuDevicePrimaryCtxRetain((&mut context).into(), 0), 0);
    assert_eq!(cuCtxSetCurrent(context), 0);
    context
}

fn function(name: &CStr) -> usize {
    function_of(PTX, name)
}

fn function_of(ptx: &CStr, name: &CStr) -> usize {
    let (mut module, mut function) = (0, 0);
    assert_eq!(cuModuleLoadData((&mut module).into(), ptx.as_ptr().cast()), 0);
    assert_eq!(cuModuleGetFunction((&mut function).into(), module, name.into()), 0);
    function
}

fn allocate(words: usize) -> u64 {
    let mut at = 0;
    assert_eq!(cuMemAlloc_v2((&mut at).into(), words * 4), 0);
    at
}

fn stream(flags: u32) -> usize {
    let mut stream = 0;
    assert_eq!(cuStreamCreate((&mut stream).into(), flags), 0);
    stream
}

fn event() -> usize {
    let mut event = 0;
    assert_eq!(cuEventCreate((&mut event).into(), 0), 0);
    event
}

fn add(function: usize, mut at: u64, mut n: u32, mut k: u32, stream: usize) -> u32 {
    let mut args: [*mut c_void; 3] =
        [(&raw mut at).cast(), (&raw mut n).cast(), (&raw mut k).cast()];
    let code =
        cuLaunchKernel(function, 1, 1, 1, 128, 1, 1, 0, stream, args.as_mut_ptr(), null_mut());
    // A launch takes its parameters by copy.
    (at, n, k) = (1, 2, 3);
    std::hint::black_box((at, n, k));
    code
}

/// Pinned memory, so that copies to it are asynchronous.
fn pinned(words: usize) -> &'static mut [u32] {
    let mut at = 0;
    assert_eq!(cuMemHostAlloc((&mut at).into(), words * 4, 0), 0);
    // SAFETY: the words were just allocated and are never freed.
    unsafe { std::slice::from_raw_parts_mut(at as *mut u32, words) }
}

fn read(at: u64, words: usize) -> Vec<u32> {
    let mut out = vec![0; words];
    assert_eq!(cuMemcpyDtoH_v2(out.as_mut_ptr() as usize, at, words * 4), 0);
    out
}

/// A graph that allocates ten words, fills them with sevens and ends with `last`, and their address.
fn graph_of(stream: usize, flags: u64, last: impl Fn(u64)) -> (usize, u64) {
    let (mut graph, mut exec, mut own) = (0, 0, 0);
    assert_eq!(cuStreamBeginCapture_v2(stream, 1), 0);
    assert_eq!(cuMemAllocAsync((&mut own).into(), 40, stream), 0);
    assert_eq!(cuMemsetD32Async(own, 7, 10, stream), 0);
    last(own);
    assert_eq!(cuStreamEndCapture(stream, (&mut graph).into()), 0);
    assert_eq!(cuGraphInstantiateWithFlags((&mut exec).into(), graph, flags), 0);
    assert_eq!(cuGraphDestroy(graph), 0);
    (exec, own)
}

fn last_fault() -> String {
    // SAFETY: the pointer is valid until the next fault.
    unsafe { CStr::from_ptr(pw_emulator_last_fault()) }.to_string_lossy().into_owned()
}

/// As [`alone`], with a file of this PTX for `PW_EMULATOR_PTX_FROM`.
fn with_edited(name: &str, ptx: &str, body: fn()) -> Option<String> {
    let path = std::env::temp_dir().join(format!("emulator-{name}-{}.ptx", std::process::id()));
    std::fs::write(&path, ptx).unwrap();
    let text = alone(name, &[("PW_EMULATOR_PTX_FROM", path.to_str().unwrap())], body);
    std::fs::remove_file(&path).unwrap();
    text
}

#[test]
fn an_edited_copy_runs_in_place_of_its_module() {
    let edited = PTX.to_str().unwrap().replace("add.u32 x, x, z", "sub.u32 x, x, z");
    with_edited("an_edited_copy_runs_in_place_of_its_module", &edited, || {
        context();
        let (f, at) = (function(c"add"), allocate(4));
        assert_eq!(cuMemsetD32_v2(at, 7, 4), 0);
        assert_eq!(add(f, at, 4, 5, 0), 0);
        assert_eq!(read(at, 4), [2; 4]);
    });
}

#[test]
fn nothing_runs_before_the_module_of_an_edited_copy_is_loaded() {
    const NAME: &str = "nothing_runs_before_the_module_of_an_edited_copy_is_loaded";
    const OTHER: &CStr = c".version 9.0
.target sm_75
.address_size 64
.visible .entry other() { ret; }
.visible .entry another() { ret; }
";
    let text = with_edited(NAME, OTHER.to_str().unwrap(), || {
        context();
        let (f, at) = (function(c"add"), allocate(4));
        assert_eq!(cuMemsetD32_v2(at, 7, 4), 0);
        assert_eq!(add(f, at, 4, 5, 0), 999);
        let path = std::env::var("PW_EMULATOR_PTX_FROM").unwrap();
        for part in [&path, "[other, another]"] {
            assert!(last_fault().contains(part), "{}", last_fault());
        }
        function_of(OTHER, c"other");
        assert_eq!(add(f, at, 4, 5, 0), 0);
        assert_eq!(read(at, 4), [12; 4]);
    });
    let Some(text) = text else { return };
    assert_eq!(text.matches("is no copy of a loaded module").count(), 1, "{text}");
}

alone! {
    #[vars()]
    fn work_waits_for_a_synchronisation() {
        context();
        let (f, at, s) = (function(c"add"), allocate(100), stream(1));
        let host = pinned(100);
        assert_eq!(cuMemsetD32Async(at, 7, 100, s), 0);
        assert_eq!(add(f, at, 100, 5, s), 0);
        assert_eq!(cuMemcpyDtoHAsync_v2(host.as_mut_ptr() as usize, at, 400, s), 0);
        host[3] = 1234;
        // Nothing has run yet: not even a copy to the host.
        assert_eq!(host[3], 1234);
        assert_eq!(cuStreamSynchronize(s), 0);
        assert!(host.iter().all(|&x| x == 12));
        // A copy to pageable memory returns when it is complete.
        let mut page = [0_u32; 100];
        assert_eq!(add(f, at, 100, 1, s), 0);
        assert_eq!(cuMemcpyDtoHAsync_v2(page.as_mut_ptr() as usize, at, 400, s), 0);
        assert_eq!(page[99], 13);
        // From pageable memory it is staged, from pinned memory read late.
        page[0] = 1;
        host[0] = 1;
        let other = allocate(1);
        assert_eq!(cuMemcpyHtoDAsync_v2(at, page.as_ptr() as usize, 4, s), 0);
        assert_eq!(cuMemcpyHtoDAsync_v2(other, host.as_ptr() as usize, 4, s), 0);
        (page[0], host[0]) = (2, 2);
        std::hint::black_box(&page);
        assert_eq!(cuStreamSynchronize(s), 0);
        assert_eq!((read(at, 1)[0], read(other, 1)[0]), (1, 2));
    }

    #[vars()]
    fn streams_need_events_and_the_legacy_stream_does_not() {
        context();
        let (f, at) = (function(c"add"), allocate(10));
        let (a, b, legacy_friend) = (stream(1), stream(1), stream(0));
        assert_eq!(cuMemsetD32Async(at, 1, 10, a), 0);
        let e = event();
        assert_eq!(cuEventRecord(e, a), 0);
        assert_eq!(cuEventQuery(e), 600);
        assert_eq!(cuStreamWaitEvent(b, e, 0), 0);
        assert_eq!(add(f, at, 10, 1, b), 0);
        assert_eq!(cuStreamSynchronize(b), 0);
        assert_eq!(cuEventQuery(e), 0);
        assert_eq!(read(at, 10), [2; 10]);
        // A blocking stream and the legacy stream are ordered without one, both ways.
        assert_eq!(add(f, at, 10, 1, legacy_friend), 0);
        assert_eq!(cuMemsetD32Async(at, 40, 1, 0), 0);
        assert_eq!(add(f, at, 10, 2, legacy_friend), 0);
        assert_eq!(cuStreamSynchronize(legacy_friend), 0);
        assert_eq!(read(at, 2), [42, 5]);
        // A stream that forgets to wait sees memory that nothing wrote.
        let fresh = allocate(10);
        assert_eq!(cuMemsetD32Async(fresh, 1, 10, a), 0);
        assert_eq!(add(f, fresh, 10, 1, b), 0);
        assert_eq!(cuStreamSynchronize(b), 719);
        assert!(last_fault().contains("nothing has written byte 0"), "{}", last_fault());
    }

    #[vars()]
    fn errors_stick() {
        context();
        let (f, at) = (function(c"add"), allocate(10));
        assert_eq!(cuMemsetD32_v2(at, 0, 10), 0);
        assert_eq!(add(f, at, 11, 1, 0), 0);
        assert_eq!(cuCtxSynchronize(), 700);
        let text = last_fault();
        assert!(text.contains("'add'") && text.contains("thread (10, 0, 0)"), "{text}");
        assert!(text.contains("offset 40 of an allocation of 40 bytes"), "{text}");
        let mut more = 0;
        assert_eq!(cuMemAlloc_v2((&mut more).into(), 4), 700);
        assert_eq!(cuStreamSynchronize(0), 700);
        assert_eq!(add(f, at, 1, 1, 0), 700);
        let mut name: *const std::ffi::c_char = std::ptr::null();
        assert_eq!(cuGetErrorName(700, (&mut name).into()), 0);
        // SAFETY: names live for ever.
        assert_eq!(unsafe { CStr::from_ptr(name) }, c"CUDA_ERROR_ILLEGAL_ADDRESS");
    }

    #[vars()]
    fn graphs_replay() {
        context();
        let (f, at, s) = (function(c"add"), allocate(10), stream(1));
        let (mut graph, mut exec, mut status) = (0, 0, 9);
        assert_eq!(cuStreamBeginCapture_v2(s, 1), 0);
        assert_eq!(cuMemsetD32Async(at, 1, 10, s), 0);
        assert_eq!(add(f, at, 10, 1, s), 0);
        // Another stream joins and comes back.
        let (t, e1, e2) = (stream(1), event(), event());
        assert_eq!(cuEventRecord(e1, s), 0);
        assert_eq!(cuStreamWaitEvent(t, e1, 0), 0);
        assert_eq!(add(f, at, 5, 10, t), 0);
        assert_eq!(cuEventRecord(e2, t), 0);
        assert_eq!(cuStreamIsCapturing(t, (&mut status).into()), 0);
        assert_eq!(status, 1);
        assert_eq!(cuStreamWaitEvent(s, e2, 0), 0);
        assert_eq!(add(f, at, 10, 100, s), 0);
        assert_eq!(cuStreamEndCapture(s, (&mut graph).into()), 0);
        assert_eq!(cuGraphInstantiateWithFlags((&mut exec).into(), graph, 0), 0);
        assert_eq!(cuGraphDestroy(graph), 0);
        for _ in 0..3 {
            assert_eq!(cuGraphLaunch(exec, s), 0);
        }
        assert_eq!(cuStreamSynchronize(s), 0);
        assert_eq!(read(at, 10), [[112_u32; 5], [102; 5]].concat());
        assert_eq!(cuGraphExecDestroy(exec), 0);
        assert_eq!(cuGraphLaunch(exec, s), 400);
    }

    #[vars()]
    fn graphs_own_what_they_allocate() {
        context();
        let (f, at, s) = (function(c"add"), allocate(10), stream(1));
        assert_eq!(cuMemsetD32Async(at, 1, 10, s), 0);
        let (mut graph, mut exec, mut again, mut own) = (0, 0, 0, 0);
        assert_eq!(cuStreamBeginCapture_v2(s, 1), 0);
        assert_eq!(cuMemAllocAsync((&mut own).into(), 40, s), 0);
        assert_eq!(cuMemcpyDtoDAsync_v2(own, at, 40, s), 0);
        assert_eq!(add(f, own, 10, 5, s), 0);
        assert_eq!(cuMemcpyDtoDAsync_v2(at, own, 40, s), 0);
        assert_eq!(cuMemFreeAsync(own, s), 0);
        assert_eq!(cuStreamEndCapture(s, (&mut graph).into()), 0);
        assert_eq!(cuGraphInstantiateWithFlags((&mut exec).into(), graph, 0), 0);
        assert_eq!(cuGraphInstantiateWithFlags((&mut again).into(), graph, 0), 801);
        for _ in 0..2 {
            assert_eq!(cuGraphLaunch(exec, s), 0);
        }
        assert_eq!(cuStreamSynchronize(s), 0);
        assert_eq!(read(at, 10), [11_u32; 10]);
        assert_eq!(cuMemFreeAsync(own, s), 1);
        assert_eq!(cuMemFree_v2(own), 1);
        assert_eq!(cuGraphDestroy(graph), 0);
        assert_eq!(cuGraphExecDestroy(exec), 0);
        assert_eq!(cuMemFreeAsync(own, s), 1);
    }

    #[vars()]
    fn memory_of_a_graph_ends_with_it() {
        context();
        let s = stream(1);
        let own = graph_of(s, 0, |own| assert_eq!(cuMemFreeAsync(own, s), 0)).1;
        // Also before the first launch.
        assert_eq!(cuMemsetD32Async(own, 1, 10, s), 0);
        assert_eq!(cuStreamSynchronize(s), 700);
        assert!(last_fault().contains("byte 0 of memory of a graph, 40 bytes"), "{}", last_fault());
    }

    #[vars()]
    fn memory_of_a_graph_ends_at_its_free_node() {
        context();
        let (f, s) = (function(c"add"), stream(1));
        let (exec, _) = graph_of(s, 0, |own| {
            assert_eq!(cuMemFreeAsync(own, s), 0);
            assert_eq!(add(f, own, 10, 1, s), 0);
        });
        assert_eq!(cuGraphLaunch(exec, s), 0);
        assert_eq!(cuStreamSynchronize(s), 700);
        let text = last_fault();
        assert!(text.contains("'add'") && text.contains("of memory of a graph, 40 bytes"), "{text}");
    }

    #[vars()]
    fn what_a_graph_leaves_is_freed_before_it_runs_again() {
        context();
        let s = stream(1);
        let (exec, own) = graph_of(s, 0, |_| {});
        // Nothing has allocated it yet.
        assert_eq!(cuMemFreeAsync(own, s), 1);
        for _ in 0..2 {
            assert_eq!(cuGraphLaunch(exec, s), 0);
            assert_eq!(cuGraphLaunch(exec, s), 1);
            assert!(last_fault().contains("cannot be launched again before"), "{}", last_fault());
            assert_eq!(cuStreamSynchronize(s), 0);
            assert_eq!(read(own, 10), [7; 10]);
            assert_eq!(cuMemFreeAsync(own, s), 0);
            assert_eq!(cuMemFreeAsync(own, s), 1);
        }
        assert_eq!(cuGraphLaunch(exec, s), 0);
        assert_eq!(cuStreamSynchronize(s), 0);
        assert_eq!(cuGraphExecDestroy(exec), 0);
        // It outlives the graph.
        assert_eq!(read(own, 10), [7; 10]);
        assert_eq!(cuMemFree_v2(own), 0);
        assert_eq!(cuMemFree_v2(own), 1);

        let (exec, own) = graph_of(s, 1, |_| {});
        for _ in 0..3 {
            assert_eq!(cuGraphLaunch(exec, s), 0);
        }
        assert_eq!(cuStreamSynchronize(s), 0);
        assert_eq!(read(own, 10), [7; 10]);
        assert_eq!(cuMemFreeAsync(own, s), 0);
        // The queue frees it after the graph is gone.
        assert_eq!(cuGraphExecDestroy(exec), 0);
        assert_eq!(cuStreamSynchronize(s), 0);
    }

    #[vars()]
    fn capture_rules() {
        context();
        let (f, at, s, blocking) = (function(c"add"), allocate(10), stream(1), stream(0));
        let mut graph = 0;
        let begin = |s: usize, mode: u32| assert_eq!(cuStreamBeginCapture_v2(s, mode), 0);
        let broken = |s: usize, graph: &mut usize| {
            assert_eq!(add(f, at, 1, 1, s), 901);
            assert_eq!(cuStreamEndCapture(s, graph.into()), 901);
            assert_eq!(*graph, 0);
        };
        // Waiting for a capturing stream, and unsafe calls.
        begin(s, 1);
        assert_eq!(cuStreamSynchronize(s), 900);
        broken(s, &mut graph);
        begin(s, 0);
        let mut more = 0;
        assert_eq!(cuMemAlloc_v2((&mut more).into(), 4), 900);
        broken(s, &mut graph);
        begin(s, 2);
        assert_eq!(cuMemAlloc_v2((&mut more).into(), 4), 0);
        assert_eq!(cuStreamEndCapture(s, (&mut graph).into()), 0);
        // Memory that another thread frees is the capture's matter in the global mode only; waiting for
        // all streams conflicts with it in every mode.
        let elsewhere = |call: fn(u64) -> u32, memory: u64| {
            let thread = std::thread::spawn(move || { context(); call(memory) });
            thread.join().unwrap()
        };
        let frees: [fn(u64) -> u32; 2] =
            [|memory| cuMemFree_v2(memory), |memory| cuMemFreeHost(memory as usize)];
        for mode in 0..3 {
            let memory = [allocate(4), pinned(4).as_mut_ptr() as u64];
            for (free, memory) in frees.into_iter().zip(memory) {
                begin(s, mode);
                assert_eq!(add(f, at, 1, 1, s), 0);
                if mode == 0 {
                    assert_eq!(elsewhere(free, memory), 900);
                    broken(s, &mut graph);
                } else {
                    assert_eq!(elsewhere(free, memory), 0);
                    assert_eq!(cuStreamEndCapture(s, (&mut graph).into()), 0);
                    graph = 0;
                }
            }
            begin(s, mode);
            assert_eq!(elsewhere(|_| cuCtxSynchronize(), 0), 900);
            broken(s, &mut graph);
        }
        // What the capture did not allocate; and from a pool of the program's.
        let kept = allocate(4);
        let mut pool = 0;
        assert_eq!(cuDeviceGetDefaultMemPool((&mut pool).into(), 0), 0);
        for mode in 0..3 {
            begin(s, mode);
            assert_eq!(cuMemFreeAsync(kept, s), 900);
            broken(s, &mut graph);
            begin(s, mode);
            assert_eq!(cuMemAllocFromPoolAsync((&mut more).into(), 4, pool, s), 900);
            broken(s, &mut graph);
        }
        assert_eq!(cuMemAllocFromPoolAsync((&mut more).into(), 4, pool, s), 0);
        // An event from outside.
        let e = event();
        assert_eq!(cuEventRecord(e, blocking), 0);
        begin(s, 1);
        assert_eq!(cuStreamWaitEvent(s, e, 0), 905);
        broken(s, &mut graph);
        // The legacy stream, while a blocking stream captures.
        begin(blocking, 1);
        assert_eq!(add(f, at, 1, 1, 0), 906);
        broken(blocking, &mut graph);
        // A fork that is not joined, and another stream's end.
        begin(s, 1);
        assert_eq!(cuEventRecord(e, s), 0);
        assert_eq!(cuStreamWaitEvent(blocking, e, 0), 0);
        assert_eq!(add(f, at, 1, 1, blocking), 0);
        assert_eq!(cuEventQuery(e), 907);
        assert_eq!(cuStreamEndCapture(s, (&mut graph).into()), 901);
        begin(s, 1);
        assert_eq!(cuEventRecord(e, s), 0);
        assert_eq!(cuStreamWaitEvent(blocking, e, 0), 0);
        assert_eq!(add(f, at, 1, 1, blocking), 0);
        assert_eq!(cuStreamEndCapture(s, (&mut graph).into()), 904);
        assert_eq!(cuStreamBeginCapture_v2(0, 1), 900);
        begin(s, 1);
        let other = std::thread::spawn(move || { context(); let mut g = 0; cuStreamEndCapture(s, (&mut g).into()) });
        assert_eq!(other.join().unwrap_or(0), 908);
    }

    #[vars("PW_EMULATOR_MEMORY" = "64K", "PW_EMULATOR_DEVICES" = "2")]
    fn memory_runs_out() {
        context();
        let (mut at, mut free, mut total, mut count) = (0, 0, 0, 0);
        assert_eq!(cuDeviceGetCount((&mut count).into()), 0);
        assert_eq!(count, 2);
        assert_eq!(cuMemAlloc_v2((&mut at).into(), 65537), 2);
        let first = allocate(10_000);
        assert_eq!(cuMemGetInfo_v2((&mut free).into(), (&mut total).into()), 0);
        assert_eq!((free, total), (65536 - 40448, 65536));
        assert_eq!(cuMemAlloc_v2((&mut at).into(), 40_000), 2);
        assert_eq!(cuMemFree_v2(first + 4), 1);
        assert_eq!(cuMemFree_v2(first), 0);
        assert_eq!(cuMemAlloc_v2((&mut at).into(), 40_000), 0);
        // Freed in stream order: only when the stream gets there.
        let s = stream(1);
        assert_eq!(cuMemFreeAsync(at, s), 0);
        let mut later = 0;
        assert_eq!(cuMemAlloc_v2((&mut later).into(), 40_000), 2);
        assert_eq!(cuStreamSynchronize(s), 0);
        assert_eq!(cuMemAlloc_v2((&mut at).into(), 40_000), 0);
    }

    #[vars("PW_EMULATOR_DEVICES" = "2", "PW_EMULATOR_GAP" = "16G")]
    fn streams_of_another_context() {
        context();
        let mine = stream(1);
        let (mut first, mut second, mut found) = (0, 0, 0);
        assert_eq!(cuCtxGetCurrent((&mut first).into()), 0);
        assert_eq!(cuDevicePrimaryCtxRetain((&mut second).into(), 1), 0);
        assert_eq!(cuCtxSetCurrent(second), 0);
        assert_eq!(cuStreamGetCtx(mine, (&mut found).into()), 0);
        assert_eq!(found, first);
        assert_eq!(cuStreamSynchronize(mine), 400);
        assert_eq!(cuStreamGetCtx(mine + 1, (&mut found).into()), 400);
        let (a, b) = (allocate(4), allocate(4));
        assert!(b - a >= 16 << 30);
    }

    #[vars("PW_EMULATOR_INIT" = "804")]
    fn a_driver_that_fails() {
        assert_eq!(cuInit(0), 804);
        let mut count = 0;
        assert_eq!(cuDeviceGetCount((&mut count).into()), 3);
    }

    #[vars("PW_EMULATOR_ARCH" = "sm_75", "PW_EMULATOR_DRIVER" = "12040")]
    fn an_old_driver() {
        let (mut version, mut module, mut major, mut memory) = (0, 0, 0, 0);
        context();
        assert_eq!(cuDriverGetVersion((&mut version).into()), 0);
        assert_eq!(version, 12040);
        assert_eq!(cuModuleLoadData((&mut module).into(), PTX.as_ptr().cast()), 222);
        assert_eq!(cuDeviceGetAttribute((&mut major).into(), 75, 0), 0);
        assert_eq!(major, 7);
        assert_eq!(cuDeviceGetAttribute((&mut memory).into(), 97, 0), 0);
        assert_eq!(memory, 65536);
    }

    #[vars("PW_EMULATOR_ARCH" = "sm_61")]
    fn an_unsupported_device() {
        context();
        let mut module = 0;
        assert_eq!(cuModuleLoadData((&mut module).into(), PTX.as_ptr().cast()), 209);
        assert!(last_fault().contains("sm_61"));
    }

    #[vars("PW_EMULATOR_SEED" = "x")]
    fn a_setting_that_is_no_number() {
        assert_eq!(cuInit(0), 999);
        assert!(last_fault().contains("PW_EMULATOR_SEED=x"));
    }

    #[vars()]
    fn launches_are_validated() {
        context();
        let f = function(c"add");
        let launch = |f, grid: u32, block: u32, shared: u32| {
            let mut arg = 0_u64;
            let mut args: [*mut c_void; 3] = [(&raw mut arg).cast(); 3];
            cuLaunchKernel(f, grid, 1, 1, block, 1, 1, shared, 0, args.as_mut_ptr(), null_mut())
        };
        assert_eq!(launch(f, 0, 32, 0), 1);
        assert_eq!(launch(f, 1, 1025, 0), 1);
        assert_eq!(launch(f, 1, 129, 0), 701);
        assert_eq!(launch(f, 1, 128, 49153), 1);
        let big = function(c"big");
        assert_eq!(cuFuncSetAttribute(big, 8, 228 << 10), 1);
        assert_eq!(cuFuncSetAttribute(big, 8, 227 << 10), 0);
        assert_eq!(launch(big, 1, 32, 227 << 10), 0);
        // All threads of that kernel store to one byte.
        assert_eq!(cuCtxSynchronize(), 719);
        assert!(last_fault().contains("race"));
    }

    #[vars()]
    fn clusters_and_unknown_things_are_refused() {
        context();
        let f = function(c"big");
        let mut attribute = LaunchAttribute { id: 4, pad: 0, value: [0; 16] };
        attribute.value[..3].copy_from_slice(&[2, 1, 1]);
        let config = |attribute: &LaunchAttribute| LaunchConfig {
            grid: [2, 1, 1],
            block: [1; 3],
            shared: 16,
            stream: 0,
            attributes: attribute,
            count: 1,
        };
        assert_eq!(cuLaunchKernelEx(&config(&attribute), f, null_mut(), null_mut()), 801);
        attribute.value[0] = 1;
        assert_eq!(cuLaunchKernelEx(&config(&attribute), f, null_mut(), null_mut()), 0);
        attribute.id = 12;
        assert_eq!(cuLaunchKernelEx(&config(&attribute), f, null_mut(), null_mut()), 801);
        assert_eq!(cuCtxSynchronize(), 0);
        assert_eq!(cuMemAllocManaged(), 801);
        let mut value = 0;
        assert_eq!(cuDeviceGetAttribute((&mut value).into(), 999, 0), 1);
        assert_eq!(cuStreamSynchronize(0xdead_beef), 400);
    }

    #[vars()]
    fn symbols_and_pointers_are_found() {
        context();
        let (mut module, mut function, mut at, mut size) = (0, 0, 0, 0);
        assert_eq!(cuModuleLoadData((&mut module).into(), PTX.as_ptr().cast()), 0);
        assert_eq!(cuModuleGetFunction((&mut function).into(), module, c"nothing".into()), 500);
        assert_eq!(cuModuleGetGlobal_v2((&mut at).into(), (&mut size).into(), module, c"counter".into()), 0);
        assert_eq!((size, read(at, 1)[0]), (4, 5));
        let (mut kind, mut base) = (0_u32, 0_u64);
        let at = allocate(100);
        assert_eq!(cuPointerGetAttribute((&raw mut kind).cast(), 2, at + 40), 0);
        assert_eq!(cuPointerGetAttribute((&raw mut base).cast(), 11, at + 40), 0);
        assert_eq!((kind, base), (2, at));
        assert_eq!(cuPointerGetAttribute((&raw mut kind).cast(), 2, 4096), 1);
        assert_eq!(cuModuleUnload(module), 0);
        assert_eq!(cuModuleUnload(module), 400);
    }
}
