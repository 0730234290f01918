//! What lanes do together: shuffles, votes, barriers that reduce, atomics, matrix fragments.

mod common;

use common::Gpu;

/// Runs `body` in one block of `threads`; it finds `t` = tid.x, `l` = lane, words r0…r9, shared
/// `s[1024]`, `in` (a row of 16 words per thread) and leaves 16 words per thread at `out`.
fn run(target: u32, body: &str, threads: u32, input: &dyn Fn(u32, u32) -> u32) -> Vec<Vec<u32>> {
    let text = format!(
        ".version 9.0\n.target sm_{target}\n.address_size 64\n\
         .visible .entry k(.param .u64 src, .param .u64 dst)\n{{\n\
         .reg .b32 t, l, s0, r<16>; .reg .b64 in, out, d<4>; .reg .pred p<4>; .reg .f32 f<4>;\n\
         .shared .align 16 .b8 s[1024];\n\
         mov.u32 t, %tid.x; mov.u32 l, %laneid; mov.u32 s0, s; ld.param.u64 in, [src];\n\
         ld.param.u64 out, [dst]; mad.wide.u32 in, t, 64, in; mad.wide.u32 out, t, 64, out;\n\
         {body}\nret;\n}}\n"
    );
    let mut gpu = Gpu::try_new(&text).unwrap_or_else(|e| panic!("{e}"));
    let words: Vec<u32> = (0..threads).flat_map(|t| (0..16).map(move |i| input(t, i))).collect();
    let (src, dst) = (gpu.upload(&words), gpu.upload(&vec![0_u32; words.len()]));
    let done = gpu.launch("k", [1; 3], [threads, 1, 1], 0, &[(8, src), (8, dst)]);
    done.unwrap_or_else(|f| panic!("{}", f.text));
    gpu.words(dst, words.len()).chunks(16).map(<[u32]>::to_vec).collect()
}

fn nothing(_: u32, _: u32) -> u32 {
    0
}

#[test]
fn shuffles_stay_in_their_segments() {
    let body = "shfl.sync.down.b32 r0|p0, t, 3, 31, -1; selp.b32 r1, 1, 0, p0;\n\
                shfl.sync.up.b32 r2|p1, t, 2, 0x1800, -1; selp.b32 r3, 1, 0, p1;\n\
                shfl.sync.bfly.b32 r4, t, 5, 31, -1; and.b32 r8, l, 7;\n\
                shfl.sync.idx.b32 r5, t, 9, 0x181f, -1;\n\
                st.global.v4.b32 [out], {r0, r1, r2, r3}; st.global.v2.b32 [out+16], {r4, r5};";
    for (lane, row) in (0..32_u32).zip(run(80, body, 32, &nothing)) {
        let down = if lane + 3 < 32 { lane + 3 } else { lane };
        // Segments of eight: up stops at the segment's first lane.
        let up = if lane % 8 >= 2 { lane - 2 } else { lane };
        let index = lane / 8 * 8 + 1;
        let want = [down, u32::from(lane + 3 < 32), up, u32::from(lane % 8 >= 2), lane ^ 5, index];
        assert_eq!(row[..6], want, "lane {lane}");
    }
}

#[test]
fn votes_matches_and_reductions() {
    let body = "setp.lt.u32 p0, l, 5; vote.sync.ballot.b32 r0, p0, -1; vote.sync.any.pred p1, p0, -1;\n\
                selp.b32 r1, 1, 0, p1; vote.sync.all.pred p1, !p0, -1; selp.b32 r2, 1, 0, p1;\n\
                shr.u32 r8, l, 3; match.any.sync.b32 r3, r8, -1; redux.sync.add.s32 r4, l, -1;\n\
                redux.sync.max.u32 r5, r8, -1; mov.u32 r6, %lanemask_lt;\n\
                @p0 activemask.b32 r7; bar.warp.sync -1;\n\
                st.global.v4.b32 [out], {r0, r1, r2, r3}; st.global.v4.b32 [out+16], {r4, r5, r6, r7};";
    for (lane, row) in (0..32_u32).zip(run(80, body, 32, &nothing)) {
        let want = [31, 1, 0, 0xff << (lane / 8 * 8), 496, 3, (1 << lane) - 1];
        assert_eq!(row[..7], want, "lane {lane}");
        assert_eq!(row[7], if lane < 5 { 31 } else { row[7] });
    }
}

#[test]
fn lanes_meet_again_after_loops_and_tables() {
    // Each lane loops lane times, then takes one of three ways, then all vote together.
    let body = "mov.u32 r0, 0; mov.u32 r1, 0;\n\
                loop: setp.ge.u32 p0, r0, l; @p0 bra over; add.u32 r0, r0, 1; add.u32 r1, r1, 2; bra loop;\n\
                over: rem.u32 r2, l, 3;\n\
                table: .branchtargets way0, way1, way2;\n\
                brx.idx r2, table;\n\
                way2: mov.u32 r3, 300; bra.uni meet;\n\
                way1: mov.u32 r3, 200; bra.uni meet;\n\
                way0: mov.u32 r3, 100;\n\
                meet: activemask.b32 r4; vote.sync.ballot.b32 r5, 1, -1; bar.sync 0; activemask.b32 r4;\n\
                st.global.v4.b32 [out], {r1, r3, r4, r5};";
    for (lane, row) in (0..32_u32).zip(run(75, body, 32, &nothing)) {
        assert_eq!(row[..4], [2 * lane, 100 * (lane % 3 + 1), u32::MAX, u32::MAX], "lane {lane}");
    }
}

#[test]
fn barriers_count_and_reduce() {
    let body = "and.b32 r0, t, 1; setp.eq.u32 p0, r0, 1; bar.red.popc.u32 r1, 0, p0;\n\
                setp.lt.u32 p1, t, 70; bar.red.and.pred p2, 0, p1; selp.b32 r2, 1, 0, p2;\n\
                bar.red.or.pred p2, 0, !p1; selp.b32 r3, 1, 0, p2;\n\
                setp.ge.u32 p3, t, 32; @p3 bra consumer;\n\
                mad.lo.u32 r4, t, 4, s0; st.shared.u32 [r4], t; bar.arrive 3, 96; bra done;\n\
                consumer: bar.sync 3, 96; and.b32 r5, t, 31; mad.lo.u32 r4, r5, 4, s0; ld.shared.u32 r0, [r4];\n\
                done: st.global.v4.b32 [out], {r0, r1, r2, r3};";
    for (t, row) in (0..96_u32).zip(run(75, body, 96, &nothing)) {
        assert_eq!(row[1..4], [48, 0, 1], "thread {t}");
        assert_eq!(row[0], if t < 32 { t & 1 } else { t & 31 });
    }
}

#[test]
fn atomics_return_what_was_there() {
    let body = "setp.eq.u32 p0, t, 0; @p0 st.shared.v4.u32 [s0], {r0, r0, r0, r0};\n\
                mov.u32 r0, 0; @p0 st.shared.v4.u32 [s0], {r0, r0, r0, r0}; bar.sync 0;\n\
                atom.shared.add.u32 r1, [s0], 1; atom.shared.max.s32 r2, [s0+4], t;\n\
                red.shared.or.b32 [s0+8], 6; atom.shared.inc.u32 r3, [s0+12], 9; bar.sync 0;\n\
                ld.shared.v4.u32 {r4, r5, r6, r7}, [s0];\n\
                st.global.v4.b32 [out], {r4, r5, r6, r7}; st.global.b32 [out+16], r1;";
    let rows = run(75, body, 64, &nothing);
    assert!(rows.iter().all(|row| row[..4] == [64, 63, 6, 4]), "{:?}", rows[0]);
    let mut olds: Vec<u32> = rows.iter().map(|row| row[4]).collect();
    olds.sort_unstable();
    assert_eq!(olds, (0..64).collect::<Vec<u32>>());
}

/// Small signed elements, by matrix, row and column.
fn element(matrix: u32, row: usize, column: usize) -> i32 {
    ((row * 7 + column * 3 + matrix as usize * 5 + row * column) % 11) as i32 - 5
}

/// Runs one `mma` whose fragments are packed by `pack` (elements of one register, first lowest),
/// and compares all elements of D. Layouts are those of the ISA's figures, written down per
/// element: the group is the lane's upper three bits.
fn mma(name: &str, depth: usize, each: usize, pack: &dyn Fn(&[i32]) -> u32, c_ty: &str) {
    let (na, nb) = (depth / (2 * each), depth / (4 * each));
    let input = |lane: u32, i: u32| {
        let (group, inner, i) = ((lane / 4) as usize, (lane % 4) as usize, i as usize);
        let items = |f: &dyn Fn(usize) -> i32| pack(&(0..each).map(f).collect::<Vec<i32>>());
        if i < na {
            // Odd registers hold the lower eight rows, later pairs the next columns.
            let row = if i % 2 == 1 { group + 8 } else { group };
            let column = i / 2 * 4 * each + inner * each;
            items(&|e| element(0, row, column + e))
        } else if i < na + nb {
            let row = (i - na) * 4 * each + inner * each;
            items(&|e| element(1, row + e, group))
        } else if i < na + nb + 4 {
            let i = i - na - nb;
            let c = element(2, group + i / 2 * 8, inner * 2 + i % 2);
            if c_ty == "s32" { c as u32 } else { (c as f32).to_bits() }
        } else {
            0
        }
    };
    let list = |from: usize, n: usize| {
        (from..from + n).map(|i| format!("r{i}")).collect::<Vec<String>>().join(", ")
    };
    let loads: String =
        (0..na + nb + 4).map(|i| format!("ld.global.b32 r{i}, [in+{}];\n", i * 4)).collect();
    let d = na + nb + 4;
    let body = format!(
        "{loads}{{ .reg .b32 q<4>; {name} {{q0, q1, q2, q3}}, {{{}}}, {{{}}}, {{{}}};\n\
         st.global.v4.b32 [out], {{q0, q1, q2, q3}}; }}",
        list(0, na),
        list(na, nb),
        list(na + nb, 4)
    );
    assert!(d <= 16);
    for (lane, row) in run(80, &body, 32, &input).into_iter().enumerate() {
        for i in 0..4 {
            let (r, c) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            let want = (0..depth).map(|k| element(0, r, k) * element(1, k, c)).sum::<i32>()
                + element(2, r, c);
            let found = if c_ty == "s32" { row[i] as i32 } else { f32::from_bits(row[i]) as i32 };
            assert_eq!(found, want, "{name}: row {r}, column {c}");
        }
    }
}

#[test]
fn matrix_products_of_every_type() {
    let half = |x: i32| -> u32 {
        // Exact for small integers: sign, exponent, mantissa by hand.
        if x == 0 {
            return 0;
        }
        let magnitude = x.unsigned_abs();
        let e = 31 - magnitude.leading_zeros();
        u32::from(x < 0) << 15 | (e + 15) << 10 | ((magnitude << (10 - e)) & 0x3ff)
    };
    let brain = |x: i32| (x as f32).to_bits() >> 16;
    let pair = |f: &dyn Fn(i32) -> u32, x: &[i32]| f(x[0]) | f(x[1]) << 16;
    let bytes = |x: &[i32]| u32::from_le_bytes([x[0], x[1], x[2], x[3]].map(|x| x as i8 as u8));
    let f16 = |x: &[i32]| pair(&half, x);
    let bf16 = |x: &[i32]| pair(&brain, x);
    // The low bits of a tf32 operand must not matter.
    let tf32 = |x: &[i32]| (x[0] as f32).to_bits() | 0x1abc;
    let name = |shape: &str, types: &str| format!("mma.sync.aligned.{shape}.row.col.{types}");
    mma(&name("m16n8k16", "f32.f16.f16.f32"), 16, 2, &f16, "f32");
    mma(&name("m16n8k8", "f32.f16.f16.f32"), 8, 2, &f16, "f32");
    mma(&name("m16n8k16", "f32.bf16.bf16.f32"), 16, 2, &bf16, "f32");
    mma(&name("m16n8k8", "f32.bf16.bf16.f32"), 8, 2, &bf16, "f32");
    mma(&name("m16n8k8", "f32.tf32.tf32.f32"), 8, 1, &tf32, "f32");
    mma(&name("m16n8k4", "f32.tf32.tf32.f32"), 4, 1, &tf32, "f32");
    mma(&name("m16n8k32", "s32.s8.s8.s32"), 32, 4, &bytes, "s32");
    mma(&name("m16n8k16", "s32.s8.s8.s32"), 16, 4, &bytes, "s32");
}

/// Products of bytes whose signs are those of the types, with sums that leave an i32. The fragments are
/// those of the ISA's figures, written down per element: registers of A hold 8 rows of 16 columns, those
/// of B 16 rows, of C and D 8 rows in pairs of columns.
fn mma_of_bytes(target: u32, (rows, depth): (usize, usize), types: &str, saturate: bool) {
    let [_, a_ty, b_ty, _] = types.split('.').collect::<Vec<_>>()[..] else { panic!("{types}") };
    let byte = |matrix: usize, row: usize, column: usize| {
        (matrix * 101 + row * 83 + column * 59 + row * column * 7) as u8
    };
    let value = |ty: &str, byte: u8| match ty {
        "s8" => i64::from(byte as i8),
        _ => i64::from(byte),
    };
    let start = |row: usize, column: usize| match (row + column) % 3 {
        0 => i32::MAX - 1000,
        1 => i32::MIN + 1000,
        _ => (row * 8 + column) as i32,
    };
    let (na, nb, nc) = (rows / 8 * (depth / 16), depth / 16, rows / 4);
    let input = |lane: u32, i: u32| {
        let (group, inner, i) = ((lane / 4) as usize, (lane % 4) as usize, i as usize);
        let word = |f: &dyn Fn(usize) -> u8| u32::from_le_bytes([0, 1, 2, 3].map(f));
        if i < na {
            let (row, column) = (group + i % (rows / 8) * 8, i / (rows / 8) * 16 + inner * 4);
            word(&|e| byte(0, row, column + e))
        } else if i < na + nb {
            word(&|e| byte(1, (i - na) * 16 + inner * 4 + e, group))
        } else if i < na + nb + nc {
            let i = i - na - nb;
            start(group + i / 2 * 8, inner * 2 + i % 2) as u32
        } else {
            0
        }
    };
    let list = |name: &str, from: usize, n: usize| {
        (from..from + n).map(|i| format!("{name}{i}")).collect::<Vec<_>>().join(", ")
    };
    let loads: String =
        (0..na + nb + nc).map(|i| format!("ld.global.b32 r{i}, [in+{}];\n", i * 4)).collect();
    let stores: String =
        (0..nc).map(|i| format!("st.global.b32 [out+{}], q{i};\n", i * 4)).collect();
    let satfinite = if saturate { ".satfinite" } else { "" };
    let name = format!("mma.sync.aligned.m{rows}n8k{depth}.row.col{satfinite}.{types}");
    let body = format!(
        "{loads}{{ .reg .b32 q<4>; {name} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n{stores} }}",
        list("q", 0, nc),
        list("r", 0, na),
        list("r", na, nb),
        list("r", na + nb, nc)
    );
    for (lane, row) in run(target, &body, 32, &input).into_iter().enumerate() {
        for (i, &found) in row[..nc].iter().enumerate() {
            let (r, c) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            let product = |k| value(a_ty, byte(0, r, k)) * value(b_ty, byte(1, k, c));
            let sum = (0..depth).map(product).sum::<i64>() + i64::from(start(r, c));
            let ends = (i64::from(i32::MIN), i64::from(i32::MAX));
            let want = if saturate { sum.clamp(ends.0, ends.1) as i32 } else { sum as i32 };
            assert_eq!(found as i32, want, "{name}: row {r}, column {c}");
        }
    }
}

#[test]
fn products_of_bytes_have_the_signs_of_their_types_and_wrap() {
    for types in ["s32.s8.s8.s32", "s32.s8.u8.s32", "s32.u8.s8.s32", "s32.u8.u8.s32"] {
        for saturate in [false, true] {
            mma_of_bytes(75, (8, 16), types, saturate);
            mma_of_bytes(80, (16, 16), types, saturate);
            mma_of_bytes(80, (16, 32), types, saturate);
        }
    }
}

/// Products of floats of eight bits, both types of each operand; their fragments are those of bytes.
#[test]
fn products_of_floats_of_eight_bits() {
    // Powers of two times -3 to 3: sign, exponent and mantissa, and the value.
    let element = |ty: &str, matrix: usize, row: usize, column: usize| {
        let seed = matrix * 5 + row * 7 + column * 3 + row * column;
        let (negative, e, odd) = (seed % 2, seed / 2 % 4, seed / 8 % 2);
        let value = (1.0 + odd as f64 / 2.0) * 2_f64.powi(e as i32 - 1);
        let byte = match ty {
            "e4m3" => negative << 7 | (e + 6) << 3 | odd << 2,
            _ => negative << 7 | (e + 14) << 2 | odd << 1,
        };
        (byte as u8, if negative == 1 { -value } else { value })
    };
    for (a_ty, b_ty) in [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2")] {
        let start = |row: usize, column: usize| (row * 8 + column) as f32 * 0.25 - 7.0;
        let input = |lane: u32, i: u32| {
            let (group, inner, i) = ((lane / 4) as usize, (lane % 4) as usize, i as usize);
            let word = |f: &dyn Fn(usize) -> u8| u32::from_le_bytes([0, 1, 2, 3].map(f));
            match i {
                0..4 => {
                    word(&|e| element(a_ty, 0, group + i % 2 * 8, i / 2 * 16 + inner * 4 + e).0)
                }
                4..6 => word(&|e| element(b_ty, 1, (i - 4) * 16 + inner * 4 + e, group).0),
                6..10 => start(group + (i - 6) / 2 * 8, inner * 2 + i % 2).to_bits(),
                _ => 0,
            }
        };
        let loads: String =
            (0..10).map(|i| format!("ld.global.b32 r{i}, [in+{}];\n", i * 4)).collect();
        let name = format!("mma.sync.aligned.m16n8k32.row.col.f32.{a_ty}.{b_ty}.f32");
        let body = format!(
            "{loads}{{ .reg .b32 q<4>; {name} {{q0, q1, q2, q3}}, {{r0, r1, r2, r3}}, {{r4, r5}}, \
             {{r6, r7, r8, r9}};\nst.global.v4.b32 [out], {{q0, q1, q2, q3}}; }}"
        );
        for (lane, row) in run(89, &body, 32, &input).into_iter().enumerate() {
            for i in 0..4 {
                let (r, c) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
                let product = |k| element(a_ty, 0, r, k).1 * element(b_ty, 1, k, c).1;
                let want = (0..32).map(product).sum::<f64>() + f64::from(start(r, c));
                assert_eq!(f64::from(f32::from_bits(row[i])), want, "{name}: row {r}, column {c}");
            }
        }
    }
    // Not a number, and infinities, where they are.
    let one = |byte: u32| {
        let body = "mov.b32 r0, 0; mov.b32 r5, 0x00000038; setp.eq.u32 p0, l, 0;\n\
                    ld.global.b32 r1, [in]; mov.f32 f0, 0f00000000;\n\
                    mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e4m3.f32 {f0, f1, f2, f3}, \
                    {r1, r0, r0, r0}, {r5, r0}, {f0, f0, f0, f0};\nst.global.f32 [out], f0;";
        f32::from_bits(run(89, body, 32, &|lane, _| if lane == 0 { byte } else { 0 })[0][0])
    };
    assert_eq!([0x3c, 0x7b, 0x7c, 0xfc].map(one), [1.0, 57344.0, f32::INFINITY, f32::NEG_INFINITY]);
    assert!(one(0x7d).is_nan() && one(0xff).is_nan());
}

#[test]
fn ldmatrix_spreads_rows_over_lanes() {
    // Sixteen rows of eight 16-bit numbers: row * 16 + column.
    let body = "mad.lo.u32 r0, l, 16, s0; shl.b32 r1, l, 4; mad.lo.u32 r2, l, 0, 0x00010000;\n\
                mad.lo.u32 r3, r1, 0x00010001, r2; add.u32 r4, r3, 0x00020002; add.u32 r5, r4, 0x00020002;\n\
                add.u32 r6, r5, 0x00020002; st.shared.v4.b32 [r0], {r3, r4, r5, r6}; bar.sync 0;\n\
                ldmatrix.sync.aligned.m8n8.x2.shared.b16 {r8, r9}, [r0];\n\
                ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {r10, r11}, [r0];\n\
                st.global.v4.b32 [out], {r8, r9, r10, r11};";
    for (lane, row) in (0..32_u32).zip(run(75, body, 32, &nothing)) {
        let plain = (lane / 4 * 16 + lane % 4 * 2) * 0x0001_0001 + 0x0001_0000;
        // Transposed: the lane's rows are consecutive, its column is the group.
        let trans = (lane % 4 * 2 * 16 + lane / 4) * 0x0001_0001 + 0x0010_0000;
        let second = 128 * 0x0001_0001;
        assert_eq!(row[..4], [plain, plain + second, trans, trans + second], "lane {lane}");
    }
}
