//! Planted faults: each is found and reported with kernel, thread, address and source line.

mod common;

use common::{GEMM, GEMM_BF16, Gpu, gemm, gemm_bf16};
use cuda::exec::{Fault, Machine};

/// `text` with its n-th (from 0) `from` replaced.
fn patch(text: &str, from: &str, n: usize, to: &str) -> String {
    let (at, _) = text.match_indices(from).nth(n).unwrap_or_else(|| panic!("no '{from}' #{n}"));
    format!("{}{to}{}", &text[..at], &text[at + from.len()..])
}

fn expect(fault: Result<impl Sized, Fault>, code: u32, parts: &[&str]) {
    let Err(fault) = fault else { panic!("no fault, expected {parts:?}") };
    for part in parts {
        assert!(fault.text.contains(part), "'{part}' is not in:\n{}", fault.text);
    }
    assert_eq!(fault.code, code, "{}", fault.text);
}

fn machines() -> impl Iterator<Item = Machine> {
    (1..=5).map(|seed| Machine { seed, ..Machine::default() })
}

#[test]
fn a_dropped_barrier_is_a_race_whatever_the_values() {
    for machine in machines() {
        // After the tiles are filled: read too early. At the end of the loop: overwritten too early.
        for n in 0..2 {
            let broken = patch(GEMM, "bar.sync \t0;", n, "");
            let fault = gemm(&broken, 70, 70, 40, machine);
            expect(
                fault,
                719,
                &["'gemm_f32'", "thread (", "gemm.cu:", "address 0x", "shared memory: byte"],
            );
        }
        let broken = patch(GEMM_BF16, "bar.sync \t0;", 1, "");
        let fault = gemm_bf16(&broken, 64, 64, 96, machine);
        expect(fault, 719, &["'gemm_bf16'", "thread (", "gemm_bf16.cu:", "race: read by thread"]);
    }
}

#[test]
fn an_index_off_by_one_is_out_of_bounds() {
    let broken = patch(GEMM, "[%rd64];", 0, "[%rd64+4];");
    let fault = gemm(&broken, 64, 64, 16, Machine::default());
    expect(
        fault,
        700,
        &["'gemm_f32'", "thread (", "gemm.cu:18", "4 bytes at offset 4096", "of 4096 bytes"],
    );
}

#[test]
fn a_store_out_of_bounds_names_offset_and_size() {
    let mut gpu = Gpu::new(GEMM);
    let (a, b, c) =
        (gpu.upload(&[1_f32; 64 * 16]), gpu.upload(&[1_f32; 64 * 16]), gpu.empty(63 * 64 * 4));
    let params = [(8, a), (8, b), (8, c), (4, 64), (4, 64), (4, 16)];
    let fault = gpu.launch("gemm_f32", [1; 3], [256, 1, 1], 0, &params);
    expect(fault, 700, &["'gemm_f32'", "gemm.cu:41", "of 16128 bytes"]);
}

#[test]
fn misaligned_vectors_are_found() {
    // An array that is only as aligned as its element type.
    let broken = patch(GEMM, ".shared .align 16", 0, ".shared .align 4");
    let fault = gemm(&broken, 64, 64, 16, Machine::default());
    expect(fault, 716, &["'gemm_f32'", "thread (", "gemm.cu:28", "16 bytes must be aligned to 16"]);
    let broken = patch(GEMM, "[%rd64];", 0, "[%rd64+2];");
    let fault = gemm(&broken, 64, 64, 16, Machine::default());
    expect(fault, 716, &["gemm.cu:18", "4 bytes must be aligned to 4"]);
}

#[test]
fn shared_memory_that_nothing_wrote_is_found() {
    for machine in machines() {
        let broken = patch(GEMM, "st.shared.f32 \t[%r186], %f641;", 0, "");
        let fault = gemm(&broken, 64, 64, 16, machine);
        expect(fault, 719, &["'gemm_f32'", "thread (", "gemm.cu:28", "tile_a", "uninitialised"]);
    }
}

#[test]
fn device_memory_that_nothing_wrote_is_found() {
    let mut gpu = Gpu::new(GEMM);
    let (a, b, c) = (gpu.empty(64 * 16 * 4), gpu.upload(&[1_f32; 64 * 16]), gpu.empty(64 * 64 * 4));
    gpu.memory.write(a, &[0; 64 * 16 * 4 - 4]).unwrap();
    let params = [(8, a), (8, b), (8, c), (4, 64), (4, 64), (4, 16)];
    let fault = gpu.launch("gemm_f32", [1; 3], [256, 1, 1], 0, &params);
    expect(fault, 719, &["'gemm_f32'", "gemm.cu:18", "nothing has written byte 4092 of"]);
}

#[test]
fn two_threads_that_write_one_word_race() {
    // Every row of the tile goes to the same column.
    let broken = patch(GEMM, "shl.b32 \t%r185, %r32, 2;", 0, "mov.u32 %r185, 0;");
    let fault = gemm(&broken, 64, 64, 16, Machine::default());
    expect(fault, 719, &["'gemm_f32'", "thread (", "gemm.cu:18", "race: also written by thread"]);
    // Two blocks that write one word of the result.
    let mut gpu = Gpu::new(GEMM);
    let (a, b, c) =
        (gpu.upload(&[1_f32; 64 * 16]), gpu.upload(&[1_f32; 64 * 16]), gpu.empty(64 * 64 * 4));
    let params = [(8, a), (8, b), (8, c), (4, 64), (4, 64), (4, 16)];
    let fault = gpu.launch("gemm_f32", [1, 1, 2], [256, 1, 1], 0, &params);
    expect(
        fault,
        719,
        &["'gemm_f32'", "gemm.cu:41", "race: also written in this launch by block #"],
    );
}

#[test]
fn a_neighbour_that_is_overwritten_in_place_is_a_race() {
    let at = "mul.wide.u32 %e, %t, 4; add.u64 %d, %d, %e;";
    // x[i] += x[i - 1], though each thread reads x[i] last.
    let body = |bar: &str| {
        format!(
            "{at} setp.ne.u32 %p, %t, 0; mov.u32 %a, 0; @%p ld.global.u32 %a, [%d+-4];\n\
             ld.global.u32 %b, [%d]; add.u32 %a, %a, %b; {bar} st.global.u32 [%d], %a;"
        )
    };
    expect(small(&body("")), 719, &["'k'", "small.cu:33", "race: read in this launch by block #0"]);
    small(&body("bar.sync 0;")).unwrap();
    // Halves of a word that two threads read and write are no race.
    small(
        ".reg .b16 %h; mul.wide.u32 %e, %t, 2; add.u64 %d, %d, %e;\n\
         ld.global.u16 %h, [%d]; add.u16 %h, %h, 1; st.global.u16 [%d], %h;",
    )
    .unwrap();
}

#[test]
fn a_wrong_wait_for_copies_is_found() {
    for machine in machines() {
        for (from, to) in [("wait_group 1", "wait_group 2"), ("wait_group 0", "wait_group 1")] {
            let broken = patch(GEMM_BF16, from, 0, to);
            let fault = gemm_bf16(&broken, 64, 64, 96, machine);
            expect(fault, 719, &["'gemm_bf16'", "gemm_bf16.cu:5", "in flight", "ldmatrix"]);
        }
        let broken = patch(GEMM_BF16, "bar.sync \t0;", 0, "");
        let fault = gemm_bf16(&broken, 64, 64, 96, machine);
        expect(fault, 719, &["'gemm_bf16'", "thread (", "gemm_bf16.cu:"]);
    }
}

#[test]
fn fragments_in_each_others_place_give_wrong_products() {
    let at = |begin: &str| {
        let line = GEMM_BF16.lines().find(|line| line.trim_start().starts_with(begin)).unwrap();
        let mut parts = line.split('{');
        (line, parts.nth(1).unwrap().split('}').next().unwrap(), parts.next())
    };
    // Four blocks of the left operand, of which two are exchanged, and a right one not transposed.
    let (load, list, _) = at("ldmatrix.sync.aligned.m8n8.x4.shared");
    let [a, b, c, d] = list.split(", ").collect::<Vec<_>>()[..] else { panic!("{load}") };
    let blocks = load.replace(list, &[a, c, b, d].join(", "));
    let (transposed, _, _) = at("ldmatrix.sync.aligned.m8n8.x4.trans");
    let (product, _, Some(left)) = at("mma.sync") else { panic!("no operands") };
    let left = left.split('}').next().unwrap();
    let [a, b, c, d] = left.split(", ").collect::<Vec<_>>()[..] else { panic!("{product}") };
    let rows = product.replace(left, &[b, a, d, c].join(", "));
    for (from, to) in
        [(load, blocks), (transposed, transposed.replace(".trans", "")), (product, rows)]
    {
        let broken = patch(GEMM_BF16, from, 0, &to);
        let run = || gemm_bf16(&broken, 64, 64, 96, Machine::default()).map(|_| ()).unwrap();
        let panic = std::panic::catch_unwind(run).expect_err(&to);
        let text = panic.downcast_ref::<String>().expect("a message");
        assert!(text.contains("wrong at 64x64x96"), "{to}: {text}");
    }
}

/// A kernel of 64 threads around `body`, which has `%t` = tid.x, shared `s[256]` and `dst`.
fn small(body: &str) -> Result<(), Fault> {
    small_grid(body, 1)
}

fn small_grid(body: &str, blocks: u32) -> Result<(), Fault> {
    small_blocks(body, blocks, 64)
}

fn small_blocks(body: &str, blocks: u32, threads: u32) -> Result<(), Fault> {
    small_seeded(body, blocks, threads, 1)
}

fn small_seeded(body: &str, blocks: u32, threads: u32, seed: u64) -> Result<(), Fault> {
    let text = format!(
        ".version 9.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 dst)\n{{\n\
         .shared .align 16 .b8 s[256];\n.reg .b32 %t, %a, %b; .reg .b64 %d, %e; .reg .pred %p, %q;\n\
         mov.u32 %t, %tid.x; ld.param.u64 %d, [dst]; shl.b32 %a, %t, 2; mov.u32 %b, s; add.u32 %a, %a, %b;\n\
         .loc 1 33 0\n{body}\nret;\n}}\n.file 1 \"small.cu\"\n"
    );
    let mut gpu = Gpu::try_new(&text).unwrap_or_else(|e| panic!("{e}"));
    gpu.machine.seed = seed;
    let dst = gpu.upload(&[0_u32; 64]);
    gpu.launch("k", [blocks, 1, 1], [threads, 1, 1], 0, &[(8, dst)]).map(|_| ())
}

#[test]
fn the_frame_of_the_small_kernels_is_clean() {
    small("st.shared.u32 [%a], %t; bar.sync 0; xor.b32 %t, %t, 32; mad.lo.u32 %a, %t, 4, %b; ld.shared.u32 %b, [%a];").unwrap();
    small("st.shared.u32 [%a], %t; bar.warp.sync -1; xor.b32 %t, %t, 1; mad.lo.u32 %a, %t, 4, %b; ld.shared.u32 %b, [%a];").unwrap();
}

#[test]
fn lanes_of_a_warp_need_an_order_too() {
    let fault = small(
        "st.shared.u32 [%a], %t; xor.b32 %t, %t, 1; mad.lo.u32 %a, %t, 4, %b; ld.shared.u32 %b, [%a];",
    );
    expect(fault, 719, &["'k'", "small.cu:33", "race: written by thread"]);
}

#[test]
fn divergent_barriers_and_deadlocks_list_the_warps() {
    let fault = small("setp.lt.u32 %p, %t, 16; @%p bar.sync 0;");
    // The other lanes leave, so nobody is left to wait for; a barrier may be reached by the rest.
    assert!(fault.is_ok(), "exited lanes do not count");
    let fault = small("setp.lt.u32 %p, %t, 16; @%p bar.sync 0; @!%p bar.sync 0;");
    expect(
        fault,
        719,
        &["'k'", "lanes wait for lanes that never come", "bar.sync 0", "small.cu:33"],
    );
    let fault =
        small("setp.lt.u32 %p, %t, 32; @%p bra one; bar.sync 0; bra done; one: bar.sync 0; done:");
    expect(fault, 719, &["'k'", "barrier divergence", "bar.sync"]);
    let fault = small(
        "setp.lt.u32 %p, %t, 32; @%p bra one; bar.sync 1, 64; bra done; one: bar.sync 2, 64; done:",
    );
    expect(
        fault,
        719,
        &["deadlock", "warp 0", "warp 1", "bar.sync 1, 64", "bar.sync 2, 64", "small.cu:33"],
    );
    let fault = small(
        "setp.lt.u32 %p, %t, 16; @%p bra one; shfl.sync.idx.b32 %b, %t, 0, 31, -1; bra done; one: activemask.b32 %b; done: bar.sync 1, 64;",
    );
    expect(fault, 719, &["lanes wait for lanes that never come", "shfl.sync"]);
}

#[test]
fn collectives_check_their_masks() {
    let fault = small("shfl.sync.idx.b32 %b, %t, 0, 31, 0xffff;");
    expect(fault, 719, &["lane 16", "not in its own member mask 0x0000ffff"]);
    small("setp.lt.u32 %p, %t, 8; @%p shfl.sync.idx.b32 %b, %t, 0, 31, 0xff;").unwrap();
}

#[test]
fn matrix_instructions_need_all_lanes_of_the_warp() {
    let product = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f, %g, %h, %i}, {%t, %t}, {%t}, {%f, %g, %h, %i};";
    let load = "and.b32 %a, %t, 7; mad.lo.u32 %b, %a, 16, %b; and.b32 %a, %t, 32;\n\
                mad.lo.u32 %a, %a, 4, %b; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%b}, [%a];";
    let store = load.replace("ldmatrix", "stmatrix").replace("{%b}, [%a]", "[%a], {%t}");
    for (name, body) in [("mma.sync", product), ("ldmatrix", load), ("stmatrix", &store)] {
        let run = |before: &str, threads: u32| {
            let fill = match name {
                "ldmatrix" => "st.shared.u32 [%a], %t; bar.sync 0;",
                _ => "",
            };
            small_blocks(
                &format!(
                    ".reg .f32 %f, %g, %h, %i; mov.f32 %f, 0f00000000; mov.f32 %g, %f; mov.f32 %h, %f;\n\
                     mov.f32 %i, %f; {fill} {before}\n{body} OUT:"
                ),
                1,
                threads,
            )
        };
        let of_all = "an instruction of all 32 lanes of a warp, of which lane";
        // Bounds of a matrix that lanes check each for itself.
        let fault = run("setp.ge.u32 %p, %t, 61; @%p exit;", 64);
        expect(fault, 719, &["'k'", "warp 1", "small.cu:33", name, of_all, "lane 29 has exited"]);
        // The others leave while the first half waits for them.
        let fault = run("setp.ge.u32 %p, %t, 48; @%p bra OUT;", 64);
        expect(fault, 719, &["warp 1", name, "lane 16 has exited"]);
        let fault = run("", 48);
        expect(
            fault,
            719,
            &["warp 1", name, of_all, "lane 16 does not exist in a block of 48 threads"],
        );
        run("", 64).unwrap();
        // A whole warp may leave, and lanes may come one after the other.
        run("setp.ge.u32 %p, %t, 32; @%p exit;", 64).unwrap();
        run("setp.ge.u32 %p, %t, 40; @%p bra TO; mov.u32 %b, s; TO:", 64).unwrap();
    }
}

#[test]
fn copies_must_be_waited_for_before_the_exit() {
    let body = "shl.b32 %a, %t, 2; and.b32 %a, %a, 252; cvt.u64.u32 %e, %a; add.u64 %e, %e, %d; mov.u32 %b, s;\n\
                add.u32 %a, %a, %b; cp.async.ca.shared.global [%a], [%e], 4; cp.async.commit_group;";
    expect(small(body), 719, &["'k'", "never waited for", "small.cu:33"]);
    small(&format!("{body} cp.async.wait_group 0;")).unwrap();
}

#[test]
fn copies_of_nothing_still_need_an_aligned_address() {
    let copy = |offset: u32| {
        small(&format!(
            "setp.eq.u32 %p, %t, 0; mov.u32 %a, 0; add.u64 %e, %d, {offset}; mov.u32 %b, s;\n\
             @%p cp.async.cg.shared.global [%b], [%e], 16, %a; cp.async.wait_all;"
        ))
    };
    copy(0).unwrap();
    // Far beyond the allocation, but nothing is read there.
    copy(1 << 20).unwrap();
    expect(copy(4), 716, &["'k'", "small.cu:33", "16 bytes must be aligned to 16"]);
}

#[test]
fn loops_that_never_end_are_stopped() {
    let text = ".version 9.0\n.target sm_80\n.visible .entry k() { L: bra L; }";
    let mut gpu = Gpu::new(text);
    gpu.machine.watchdog = 10_000_000;
    expect(
        gpu.launch("k", [2, 1, 1], [32, 1, 1], 0, &[]),
        702,
        &["'k'", "no block of kernel", "bra L"],
    );
}

#[test]
fn registers_that_nothing_set_are_poison_in_every_block() {
    // Each block stores what its registers hold and then sets them.
    let text = ".version 9.0\n.target sm_80\n.visible .entry k(.param .u64 dst) {\n\
        .reg .b32 %w, %b, %n, %v; .reg .b16 %h; .reg .b64 %d, %l; .reg .f32 %f; .reg .pred %p;\n\
        ld.param.u64 %d, [dst]; mov.u32 %b, %ctaid.x; mad.lo.u32 %b, %b, 32, %tid.x;\n\
        mad.wide.u32 %d, %b, 32, %d; selp.b32 %n, 1, 0, %p; add.f32 %f, %f, 0f3F800000;\n\
        cvt.u32.u16 %v, %h; st.global.b64 [%d], %l; st.global.b32 [%d+8], %w;\n\
        st.global.b32 [%d+12], %n; st.global.f32 [%d+16], %f; st.global.b32 [%d+20], %v;\n\
        mov.b32 %w, 0; mov.b64 %l, 5; setp.eq.u32 %p, %w, 0; mov.f32 %f, 0f00000000; mov.b16 %h, 3;\n\
        ret; }";
    let mut gpu = Gpu::new(text);
    let dst = gpu.empty(4 * 32 * 32);
    gpu.launch("k", [4, 1, 1], [32, 1, 1], 0, &[(8, dst)]).unwrap();
    for (i, words) in gpu.words(dst, 4 * 32 * 8).chunks(8).enumerate() {
        let predicate = u32::from(i % 2 == 0);
        assert_eq!(words[..3], [0x7fff_7fff; 3], "thread {i}");
        assert_eq!(words[3..6], [predicate, 0x7fff_ffff, 0x7fff], "thread {i}");
    }
}

#[test]
fn registers_that_some_path_does_not_set_are_poison_in_every_block() {
    // Set under a guard; on one side of a branch; in a loop, after it is read there first.
    let text = ".version 9.0\n.target sm_80\n.visible .entry k(.param .u64 dst) {\n\
        .reg .b32 %g, %s, %o, %b, %t, %i; .reg .b64 %d; .reg .pred %p, %q;\n\
        ld.param.u64 %d, [dst]; mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x;\n\
        mad.lo.u32 %i, %b, 32, %t; mad.wide.u32 %d, %i, 16, %d; setp.lt.u32 %p, %t, 16;\n\
        @%p mov.b32 %g, 1; @!%p bra OTHER; mov.b32 %s, 2; OTHER: mov.b32 %i, 0;\n\
        LOOP: setp.ne.u32 %q, %i, 0; @%q bra SET; st.global.b32 [%d+8], %o; SET: mov.b32 %o, 3;\n\
        add.u32 %i, %i, 1; setp.lt.u32 %q, %i, 2; @%q bra LOOP;\n\
        st.global.b32 [%d], %g; st.global.b32 [%d+4], %s; st.global.b32 [%d+12], %o; ret; }";
    let mut gpu = Gpu::new(text);
    let dst = gpu.empty(3 * 32 * 16);
    gpu.launch("k", [3, 1, 1], [32, 1, 1], 0, &[(8, dst)]).unwrap();
    for (i, words) in gpu.words(dst, 3 * 32 * 4).chunks(4).enumerate() {
        let [g, s] = if i % 32 < 16 { [1, 2] } else { [0x7fff_7fff; 2] };
        assert_eq!(words, [g, s, 0x7fff_7fff, 3], "thread {i}");
    }
}

#[test]
fn the_read_only_path_does_not_see_stores_of_the_launch() {
    let at =
        "mul.wide.u32 %e, %t, 4; add.u64 %d, %d, %e; mov.u32 %b, %ctaid.x; setp.eq.u32 %p, %b, 0;";
    // Ordered, even in one thread: an ordinary load is right and one of .nc is not.
    let body = |nc: &str| {
        format!("{at} @%p st.global.u32 [%d], %t; bar.sync 0; @%p ld.global{nc}.u32 %b, [%d];")
    };
    let frame = |body: &str| small_grid(body, 3);
    frame(&body("")).unwrap();
    let parts = [
        "'k'",
        "block (0, 0, 0) thread (",
        "small.cu:33",
        "address 0x",
        "ld.global.nc of bytes that this launch has written",
        "by block #0 thread",
        "st.global.u32 [%d], %t",
    ];
    expect(frame(&body(".nc")), 719, &parts);
    // What the host wrote is fine, and so is a store by the same thread after the load.
    frame(&format!("{at} @%p ld.global.nc.u32 %b, [%d]; @%p st.global.u32 [%d], %b;")).unwrap();
    // What an earlier launch wrote is fine, too.
    let text = ".version 9.0\n.target sm_80\n.visible .entry k(.param .u64 dst) {\n\
        .reg .b64 %d; .reg .b32 %a; ld.param.u64 %d, [dst]; ld.global.nc.u32 %a, [%d];\n\
        add.u32 %a, %a, 1; st.global.u32 [%d], %a; ret; }";
    let mut gpu = Gpu::new(text);
    let dst = gpu.upload(&[40_u32]);
    for _ in 0..2 {
        gpu.launch("k", [1; 3], [1; 3], 0, &[(8, dst)]).unwrap();
    }
    assert_eq!(gpu.words(dst, 1), [42]);
}

#[test]
fn a_missing_fence_between_blocks_is_found() {
    // Each block stores a word and counts itself; the last to arrive reads what all have stored.
    let body = |fence: &str| {
        format!(
            "setp.eq.u32 %p, %t, 0; mov.u32 %b, %ctaid.x; mul.wide.u32 %e, %b, 4; add.u64 %e, %d, %e;\n\
             @%p st.global.u32 [%e+4], %t; {fence} @%p atom.global.inc.u32 %a, [%d], 2; membar.gl;\n\
             setp.eq.u32 %q, %a, 2; and.pred %q, %q, %p; @%q ld.global.u32 %b, [%d+4];\n\
             @%q ld.global.u32 %b, [%d+8]; @%q ld.global.u32 %b, [%d+12];"
        )
    };
    small_grid(&body("membar.gl;"), 3).unwrap();
    let fault = small_grid(&body(""), 3);
    expect(fault, 719, &["'k'", "small.cu:33", "race: written in this launch by block #"]);
}

#[test]
fn a_fence_of_one_lane_covers_others_up_to_the_last_sync() {
    // 16 lanes store, lane 0 counts the block, and that of the last block reads what lane 5 of each has
    // stored.
    let body = |before: &str, fence: &str| {
        format!(
            "setp.lt.u32 %p, %t, 16; mov.u32 %b, %ctaid.x; mad.lo.u32 %b, %b, 16, %t;\n\
             mul.wide.u32 %e, %b, 4; add.u64 %e, %d, %e; @%p st.global.u32 [%e+64], %t;\n\
             setp.eq.u32 %p, %t, 0; {before} {fence} @%p atom.global.inc.u32 %a, [%d], 2; membar.gl;\n\
             setp.eq.u32 %q, %a, 2; and.pred %q, %q, %p; @%q ld.global.u32 %b, [%d+84];\n\
             @%q ld.global.u32 %b, [%d+148]; @%q ld.global.u32 %b, [%d+212];"
        )
    };
    let missing = ["'k'", "small.cu:33", "race: written in this launch by block #", "thread 5 "];
    let sync = "bar.warp.sync -1;";
    for seed in 1..=3 {
        let run = |before: &str, fence: &str| small_seeded(&body(before, fence), 3, 64, seed);
        for fence in ["@%p membar.gl;", "@%p fence.acq_rel.gpu;", "membar.gl;"] {
            expect(run("", fence), 719, &missing);
            run(sync, fence).unwrap();
            run("bar.sync 0;", fence).unwrap();
        }
        // Lanes that fence each for itself and are synchronised then.
        run("membar.gl; bar.warp.sync -1;", "").unwrap();
        // The fence came before the stores were ordered.
        expect(run("@%p membar.gl; bar.warp.sync -1;", ""), 719, &missing);
    }
    // The same between two warps of a block.
    let body = |thread: u32, sync: &str| {
        format!(
            "setp.eq.u32 %p, %t, {thread}; @%p st.global.u32 [%d+4], %t; setp.ge.u32 %p, %t, 32;\n\
             @%p bra WAIT; {sync} setp.eq.u32 %p, %t, 0; @%p membar.gl; @%p st.volatile.global.u32 [%d], 1;\n\
             bra OUT; WAIT: ld.volatile.global.u32 %b, [%d]; setp.eq.u32 %q, %b, 0; @%q bra WAIT;\n\
             membar.gl; ld.global.u32 %b, [%d+4]; OUT:"
        )
    };
    small(&body(0, "")).unwrap();
    small(&body(1, sync)).unwrap();
    expect(
        small(&body(1, "")),
        719,
        &["race: written in this launch by block #0 thread 1 ", "warp 1"],
    );
}

#[test]
fn what_one_warp_has_learnt_others_do_not_know() {
    // Thread 0 counts its block and tells the others whether it is the last, which read what all have
    // stored.
    let body = |between: &str, learn: &str| {
        format!(
            ".reg .b32 %f; setp.eq.u32 %p, %t, 0; mov.u32 %f, %b; @%p st.volatile.shared.u32 [%f], 0;\n\
             bar.sync 0; mov.u32 %b, %ctaid.x; mul.wide.u32 %e, %b, 4; add.u64 %e, %d, %e;\n\
             @%p st.global.u32 [%e+4], %t; @%p membar.gl; @%p atom.global.inc.u32 %a, [%d], 2;\n\
             @%p membar.gl; setp.eq.u32 %q, %a, 2; selp.u32 %a, 2, 1, %q;\n\
             @%p st.volatile.shared.u32 [%f], %a; {between}\n\
             WAIT: ld.volatile.shared.u32 %b, [%f]; setp.eq.u32 %q, %b, 0; @%q bra WAIT;\n\
             setp.ne.u32 %q, %b, 2; @%q bra OUT; {learn} bar.warp.sync -1; ld.global.u32 %b, [%d+4];\n\
             ld.global.u32 %b, [%d+8]; ld.global.u32 %b, [%d+12]; OUT:"
        )
    };
    for seed in 1..=3 {
        let run = |between: &str, learn: &str| small_seeded(&body(between, learn), 3, 64, seed);
        let missing = [
            "'k'",
            "warp 1",
            "small.cu:33",
            "race: written in this launch by block #",
            "thread 0 ",
        ];
        expect(run("", ""), 719, &missing);
        run("bar.sync 0;", "").unwrap();
        // Whoever looks for itself needs no barrier.
        run("", "ld.volatile.global.u32 %b, [%d]; membar.gl;").unwrap();
    }
}

#[test]
fn other_wild_accesses() {
    expect(small("ld.shared.u32 %b, [%a+256];"), 700, &["of 's', which has 256 bytes"]);
    expect(small("ld.global.u32 %b, [0];"), 700, &["address 0x0", "near no allocation"]);
    expect(
        small(".local .align 4 .b8 l[8]; mov.u32 %a, l; ld.local.u32 %b, [%a];"),
        719,
        &["local memory"],
    );
    expect(small("trap;"), 719, &["trap"]);
    // Dynamic shared memory that the launch did not ask for.
    let text = ".version 9.0\n.target sm_80\n.extern .shared .align 16 .b8 m[];\n.visible .entry k() { st.shared.u8 [m+15], 1; ret; }";
    let mut gpu = Gpu::new(text);
    gpu.launch("k", [1; 3], [1, 1, 1], 16, &[]).unwrap();
    expect(gpu.launch("k", [1; 3], [1, 1, 1], 15, &[]), 700, &["'m'"]);
}

#[test]
fn what_is_not_understood_is_refused_at_load() {
    for (from, to, why) in [
        (".trans", ".tranz", "unknown modifier '.tranz'"),
        ("cp.async.commit_group", "cp.async.bulk.commit_group", "unknown modifier '.bulk'"),
        ("cvt.rn.bf16x2.f32", "cvt.rn.satfinite.bf16x2.f32", "satfinite"),
        ("bar.sync", "bar.synk", "bar needs an action"),
        ("mov.u32", "mov.u33", "type"),
        (".target sm_80", ".target sm_75", "needs .target sm_80"),
        ("m16n8k16", "m16n8k17", "unknown shape"),
        ("mul.wide.s32", "frobnicate.s32", "unknown instruction 'frobnicate'"),
    ] {
        let error = Gpu::try_new(&patch(GEMM_BF16, from, 0, to)).err().unwrap_or_default();
        assert!(error.contains(why) && error.contains("PTX line"), "{to}: {error}");
    }
}

#[test]
fn what_the_target_lacks_is_refused_at_load() {
    for (least, body) in [
        (90, "add.rn.bf16 h, h, h;"),
        (90, "mul.rn.bf16x2 r, r, r;"),
        (80, "fma.rn.bf16x2 r, r, r, r;"),
        (80, "fma.rn.relu.f16 h, h, h, h;"),
        (80, "max.bf16 h, h, h;"),
        (80, "min.f16x2 r, r, r;"),
        (80, "max.NaN.f32 f, f, f;"),
        (80, "abs.bf16 h, h;"),
        (90, "tanh.approx.bf16 h, h;"),
        (90, "ex2.approx.ftz.bf16x2 r, r;"),
        (90, "setp.lt.bf16 p, h, h;"),
        (90, "set.lt.u32.bf16x2 r, r, r;"),
        (80, "cvt.rn.bf16.f32 h, f;"),
        (80, "cvt.rn.bf16x2.f32 r, f, f;"),
        (80, "cvt.rn.f16x2.f32 r, f, f;"),
        (80, "cvt.rn.relu.f16.f32 h, f;"),
        (80, "cvt.rna.tf32.f32 r, f;"),
        (90, "cvt.rn.tf32.f32 r, f;"),
        (80, "cvt.f32.bf16 f, h;"),
        (90, "cvt.ftz.f32.bf16 f, h;"),
        (90, "cvt.rn.bf16.s32 h, r;"),
        (90, "cvt.rzi.s32.bf16 r, h;"),
        (89, "cvt.rn.satfinite.e4m3x2.f32 h, f, f;"),
        (89, "cvt.rn.satfinite.e5m2x2.f16x2 h, r;"),
        (89, "cvt.rn.f16x2.e4m3x2 r, h;"),
        (
            89,
            "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32 {f, f, f, f}, {r, r, r, r}, {r, r}, {f, f, f, f};",
        ),
        (90, "atom.global.add.noftz.bf16 h, [a], h;"),
    ] {
        let load = |target: u32| {
            Gpu::try_new(&format!(
                ".version 9.0\n.target sm_{target}\n.visible .entry k() {{ .reg .b16 h; .reg .b32 r;\n\
                 .reg .b64 a; .reg .f32 f; .reg .pred p; {body} ret; }}"
            ))
            .err()
        };
        assert_eq!(load(least), None, "{body}");
        let below = if least > 80 { 80 } else { 75 };
        let error = load(below).unwrap_or_default();
        assert!(error.contains(&format!("needs .target sm_{least}")), "{body}: {error}");
    }
}

#[test]
fn without_checks_wrong_kernels_run() {
    let machine = Machine { checks: false, ..Machine::default() };
    gemm(GEMM, 70, 70, 40, machine).unwrap();
    let broken = patch(GEMM, "[%rd64];", 0, "[%rd64+4];");
    expect(gemm(&broken, 64, 64, 16, machine), 700, &["gemm.cu:18"]);
}
