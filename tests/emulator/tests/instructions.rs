//! Meaning of single instructions, against values computed in other ways.

mod common;

use common::Gpu;

/// Runs `body` on one thread per input. It finds its inputs in a0…a3 (b64), r0…r3 (low words),
/// h0…h3 (low halves), f0…f3 (low words as f32), d0…d3 (f64) and leaves its result in `out`
/// (b64), `outr` (b32), `outf` (f32), `outh` (b16) or `outp`; the kinds that it does not write are
/// zero and the result is their sum.
fn eval(target: u32, body: &str, inputs: &[[u64; 4]]) -> Vec<u64> {
    let mut text = format!(
        ".version 9.0\n.target sm_{target}\n.address_size 64\n\
         .visible .entry k(.param .u64 src, .param .u64 dst)\n{{\n\
         .reg .b64 a<4>, out, at, from, to, sum; .reg .b32 r<4>, outr, t, x<8>; .reg .b16 h<4>, outh, y<8>;\n\
         .reg .f32 f<4>, outf, g<8>; .reg .f64 d<4>, e<4>; .reg .pred outp, p<4>; .reg .b64 z<8>;\n\
         mov.b64 out, 0; mov.b32 outr, 0; mov.b16 outh, 0; mov.f32 outf, 0f00000000;\n\
         mov.pred outp, 0; mov.u32 t, %tid.x; ld.param.u64 from, [src]; ld.param.u64 to, [dst];\n\
         mad.wide.u32 at, t, 32, from; ld.global.v2.b64 {{a0, a1}}, [at]; ld.global.v2.b64 {{a2, a3}}, [at+16];\n"
    );
    for i in 0..4 {
        text += &format!(
            "cvt.u32.u64 r{i}, a{i}; cvt.u16.u64 h{i}, a{i}; mov.b32 f{i}, r{i}; mov.b64 d{i}, a{i};\n"
        );
    }
    text += body;
    text += "\ncvt.u64.u32 sum, outr; add.u64 out, out, sum; mov.b32 outr, outf; cvt.u64.u32 sum, outr;\n\
             add.u64 out, out, sum; cvt.u64.u16 sum, outh; add.u64 out, out, sum; selp.b64 sum, 1, 0, outp;\n\
             add.u64 out, out, sum; mad.wide.u32 at, t, 8, to; st.global.b64 [at], out; ret;\n}\n";
    let mut gpu = Gpu::try_new(&text).unwrap_or_else(|e| panic!("{e}"));
    let src = gpu.upload(inputs);
    let dst = gpu.empty(inputs.len() * 8);
    let run = gpu.launch("k", [1; 3], [inputs.len() as u32, 1, 1], 0, &[(8, src), (8, dst)]);
    run.unwrap_or_else(|f| panic!("{}", f.text));
    let words = gpu.words(dst, inputs.len() * 2);
    words.chunks(2).map(|w| u64::from(w[0]) | u64::from(w[1]) << 32).collect()
}

/// Interesting and random words.
fn words() -> Vec<[u64; 4]> {
    let edge = [
        0,
        1,
        2,
        31,
        32,
        33,
        63,
        64,
        0x7f,
        0x80,
        0xffff,
        0x8000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
    ];
    let mut rng = cuda::rng::Rng::new(7);
    let mut out: Vec<[u64; 4]> = Vec::new();
    for &a in &edge {
        for &b in &edge {
            out.push([a, b, rng.bits() & 0x3f, rng.bits()]);
        }
    }
    for _ in 0..200 {
        out.push([rng.bits(), rng.bits(), rng.bits(), rng.bits()]);
    }
    out
}

fn check(target: u32, body: &str, inputs: &[[u64; 4]], want: impl Fn([u64; 4]) -> u64) {
    for (part, found) in inputs.chunks(512).map(|part| (part, eval(target, body, part))) {
        for (&input, found) in part.iter().zip(found) {
            assert_eq!(found, want(input), "{body} of {input:x?}");
        }
    }
}

fn word(body: &str, want: impl Fn(u32, u32, u32) -> u32) {
    check(80, body, &words(), |[a, b, c, _]| want(a as u32, b as u32, c as u32).into());
}

fn long(body: &str, want: impl Fn(u64, u64, u64) -> u64) {
    check(80, body, &words(), |[a, b, c, _]| want(a, b, c));
}

#[test]
fn integers_add_and_multiply() {
    word("add.s32 outr, r0, r1;", |a, b, _| (i64::from(a) + i64::from(b)) as u32);
    word("sub.u32 outr, r0, r1;", |a, b, _| (i64::from(a) - i64::from(b)) as u32);
    word("add.sat.s32 outr, r0, r1;", |a, b, _| {
        (i64::from(a as i32) + i64::from(b as i32)).clamp(-(1 << 31), (1 << 31) - 1) as u32
    });
    word("mul.hi.u32 outr, r0, r1;", |a, b, _| ((u64::from(a) * u64::from(b)) >> 32) as u32);
    word("mul.hi.s32 outr, r0, r1;", |a, b, _| {
        ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32
    });
    word("mad.lo.s32 outr, r0, r1, r2;", |a, b, c| {
        (u64::from(a) * u64::from(b) + u64::from(c)) as u32
    });
    word("mad.hi.u32 outr, r0, r1, r2;", |a, b, c| {
        (((u64::from(a) * u64::from(b)) >> 32) + u64::from(c)) as u32
    });
    word("min.s32 outr, r0, r1;", |a, b, _| (a as i32).min(b as i32) as u32);
    word("max.u32 outr, r0, r1;", u32_max);
    word("abs.s32 outr, r0;", |a, _, _| (a as i32).unsigned_abs());
    word("neg.s32 outr, r0;", |a, _, _| 0_u32.wrapping_sub(a));
    word("div.s32 outr, r0, r1;", |a, b, _| match b {
        0 => u32::MAX,
        _ => (i64::from(a as i32) / i64::from(b as i32)) as u32,
    });
    word("rem.u32 outr, r0, r1;", |a, b, _| if b == 0 { a } else { a % b });
    word("sad.u32 outr, r0, r1, r2;", |a, b, c| {
        (i64::from(a) - i64::from(b)).unsigned_abs().wrapping_add(c.into()) as u32
    });
    long("mul.wide.s32 out, r0, r1;", |a, b, _| {
        (i128::from(a as i32) * i128::from(b as i32)) as u64
    });
    long("mad.wide.u32 out, r0, r1, a2;", |a, b, c| {
        (u128::from(a as u32) * u128::from(b as u32) + u128::from(c)) as u64
    });
    long("mul.hi.u64 out, a0, a1;", |a, b, _| ((u128::from(a) * u128::from(b)) >> 64) as u64);
    long("mul.hi.s64 out, a0, a1;", |a, b, _| {
        ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64
    });
    long("mul.lo.s64 out, a0, a1;", |a, b, _| (u128::from(a) * u128::from(b)) as u64);
    long("mul.wide.s16 outr, h0, h1;", |a, b, _| {
        u64::from((i32::from(a as i16) * i32::from(b as i16)) as u32)
    });
    long("add.s16 outh, h0, h1;", |a, b, _| (a + (b & 0xffff)) & 0xffff);
    long("shr.s16 outh, h0, r2;", |a, _, c| {
        u64::from((i32::from(a as i16) >> (c as u32).min(15)) as u16)
    });
    // A 64-bit sum out of two halves with a carry.
    long(
        "mov.b64 {x0, x1}, a0; mov.b64 {x2, x3}, a1; add.cc.u32 x4, x0, x2; addc.u32 x5, x1, x3;\n\
         mov.b64 out, {x4, x5};",
        |a, b, _| (u128::from(a) + u128::from(b)) as u64,
    );
    long(
        "mov.b64 {x0, x1}, a0; mov.b64 {x2, x3}, a1; sub.cc.u32 x4, x0, x2; subc.u32 x5, x1, x3;\n\
         mov.b64 out, {x4, x5};",
        |a, b, _| (i128::from(a) - i128::from(b)) as u64,
    );
}

fn u32_max(a: u32, b: u32, _: u32) -> u32 {
    if a > b { a } else { b }
}

#[test]
fn bits_move() {
    word("shl.b32 outr, r0, r1;", |a, b, _| if b > 31 { 0 } else { (u64::from(a) << b) as u32 });
    word("shr.u32 outr, r0, r1;", |a, b, _| if b > 31 { 0 } else { a >> b });
    word("shr.s32 outr, r0, r1;", |a, b, _| (i64::from(a as i32) >> b.min(63)) as u32);
    long("shl.b64 out, a0, r1;", |a, b, _| {
        if b as u32 > 63 { 0 } else { (u128::from(a) << b as u32) as u64 }
    });
    long("shr.s64 out, a0, r1;", |a, b, _| (i128::from(a as i64) >> (b as u32).min(127)) as u64);
    word("shf.l.wrap.b32 outr, r0, r1, r2;", |a, b, c| {
        ((u64::from(b) << 32 | u64::from(a)) << (c % 32) >> 32) as u32
    });
    word("shf.r.clamp.b32 outr, r0, r1, r2;", |a, b, c| {
        (u64::from(b) << 32 | u64::from(a)).checked_shr(c.min(32)).unwrap_or(0) as u32
    });
    word("and.b32 outr, r0, r1;", |a, b, _| !(!a | !b));
    word("lop3.b32 outr, r0, r1, r2, 0x96;", |a, b, c| a ^ b ^ c);
    word("lop3.b32 outr, r0, r1, r2, 0xE8;", |a, b, c| (a & b) | (a & c) | (b & c));
    word("lop3.b32 outr, r0, r1, r2, 0x2A;", |a, b, c| !(a & b) & c);
    word("brev.b32 outr, r0;", |a, _, _| (0..32).fold(0, |out, i| out | (a >> i & 1) << (31 - i)));
    word("clz.b32 outr, r0;", |a, _, _| {
        (0..32).take_while(|i| a >> (31 - i) & 1 == 0).count() as u32
    });
    long("popc.b64 outr, a0;", |a, _, _| (0..64).filter(|i| a >> i & 1 == 1).count() as u64);
    long("clz.b64 outr, a0;", |a, _, _| {
        (0..64).take_while(|i| a >> (63 - i) & 1 == 0).count() as u64
    });
    word("bfind.u32 outr, r0;", |a, _, _| {
        (0..32).rev().find(|i| a >> i & 1 == 1).unwrap_or(u32::MAX)
    });
    word("bfe.u32 outr, r0, 5, 9;", |a, _, _| a >> 5 & 0x1ff);
    word("bfe.s32 outr, r0, 28, 9;", |a, _, _| (a as i32 >> 28) as u32);
    word("bfe.s32 outr, r0, 3, 4;", |a, _, _| ((a << 25) as i32 >> 28) as u32);
    word("bfi.b32 outr, r0, r1, 8, 4;", |a, b, _| b & !0xf00 | (a & 0xf) << 8);
    word("prmt.b32 outr, r0, r1, 0x5410;", |a, b, _| a & 0xffff | b << 16);
    word("prmt.b32 outr, r0, r1, 0x9b62;", |a, b, _| {
        let byte = |x: u32, i: u32| x >> (8 * i) & 0xff;
        let sign = |x: u32| if x & 0x80 != 0 { 0xff } else { 0 };
        byte(a, 2) | byte(b, 2) << 8 | sign(byte(a, 3)) << 16 | sign(byte(a, 1)) << 24
    });
    word("dp4a.s32.u32 outr, r0, r1, r2;", |a, b, c| {
        a.to_le_bytes()
            .iter()
            .zip(b.to_le_bytes())
            .fold(c, |s, (&a, b)| s.wrapping_add((i32::from(a as i8) * i32::from(b)) as u32))
    });
    word("setp.lt.s32 p0, r0, r1; setp.hs.or.u32 outp, r0, r2, p0;", |a, b, c| {
        u32::from((a as i32) < b as i32 || a >= c)
    });
    word(
        "setp.eq.s32 p0|p1, r0, r1; selp.b32 outr, 3, 5, p1;",
        |a, b, _| if a == b { 5 } else { 3 },
    );
    word("setp.ne.b32 p0, r0, 0; not.pred p1, p0; and.pred outp, p1, !p0;", |a, _, _| {
        u32::from(a == 0)
    });
    word("slct.b32.s32 outr, r0, r1, r2;", |a, b, c| if (c as i32) < 0 { b } else { a });
    word(
        "setp.eq.b32 p0, r0, r0; @!p0 bra skip; mov.b32 {y0, y1}, r0; mov.b32 outr, {y1, y0}; skip:",
        |a, _, _| a.rotate_left(16),
    );
}

fn floats() -> Vec<[u64; 4]> {
    let edge = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        3.0,
        1e-40,
        -1e-40,
        1e38,
        -1e38,
        1e-20,
        16777217.0,
        65504.0,
        65520.0,
        2147483648.0,
        255.5,
        -300.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    let mut rng = cuda::rng::Rng::new(11);
    let mut out = Vec::new();
    for a in edge {
        for b in edge {
            let c = edge[rng.below(edge.len())];
            out.push([a, b, c, 0.0].map(|x: f32| x.to_bits().into()));
        }
    }
    for _ in 0..400 {
        out.push([0; 4].map(|_: i32| u64::from((rng.bits() as f32 / 1e18 - 9.0).to_bits())));
    }
    out
}

fn float(body: &str, want: impl Fn(f32, f32, f32) -> f32) {
    check(90, body, &floats(), |input| {
        let [a, b, c, _] = input.map(|x| f32::from_bits(x as u32));
        let want = want(a, b, c);
        if want.is_nan() { 0x7fff_ffff } else { want.to_bits().into() }
    });
}

fn flush(x: f32) -> f32 {
    if x != 0.0 && x.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(x) } else { x }
}

#[test]
fn floats_round_once() {
    float("add.f32 outf, f0, f1;", |a, b, _| a + b);
    float("sub.rn.f32 outf, f0, f1;", |a, b, _| a - b);
    float("mul.f32 outf, f0, f1;", |a, b, _| a * b);
    float("div.rn.f32 outf, f0, f1;", |a, b, _| a / b);
    float("fma.rn.f32 outf, f0, f1, f2;", |a, b, c| a.mul_add(b, c));
    float("add.ftz.f32 outf, f0, f1;", |a, b, _| flush(flush(a) + flush(b)));
    float("fma.rn.ftz.f32 outf, f0, f1, f2;", |a, b, c| {
        flush(flush(a).mul_add(flush(b), flush(c)))
    });
    float("sqrt.rn.f32 outf, f0;", |a, _, _| a.sqrt());
    float("rcp.rn.f32 outf, f0;", |a, _, _| 1.0 / a);
    float("mul.sat.f32 outf, f0, f1;", |a, b, _| {
        let x = a * b;
        if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) + 0.0 }
    });
    float("neg.f32 outf, f0; add.f32 outf, outf, f1;", |a, b, _| b - a);
    float("cvt.rzi.f32.f32 outf, f0;", |a, _, _| a.trunc());
    float("cvt.rni.f32.f32 outf, f0;", |a, _, _| a.round_ties_even());
    float("cvt.rmi.f32.f32 outf, f0;", |a, _, _| a.floor());
    // Directed: in f64 the sum is exact enough to see on which side of the result it lies.
    float("add.rz.f32 outf, f0, f1;", |a, b, _| {
        let exact = f64::from(a) + f64::from(b);
        let near = a + b;
        if !near.is_finite() && exact.is_finite() && a.is_finite() && b.is_finite() {
            return f32::MAX.copysign(near);
        }
        // What the f64 sum lost, if anything, decides when it equals the f32 one.
        let (big, small) = if a.abs() > b.abs() { (a, b) } else { (b, a) };
        let lost = f64::from(small) - (exact - f64::from(big));
        let beyond = f64::from(near).abs() > exact.abs()
            || f64::from(near) == exact && lost * exact.signum() < 0.0;
        if near.is_finite() && beyond { f32::from_bits(near.to_bits() - 1) } else { near }
    });
}

#[test]
fn minima_and_nans() {
    let smaller = |a: f32, b: f32, _: f32| match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == 0.0 && b == 0.0 => {
            if a.is_sign_negative() {
                a
            } else {
                b
            }
        }
        _ => {
            if a < b {
                a
            } else {
                b
            }
        }
    };
    float("min.f32 outf, f0, f1;", smaller);
    float("max.f32 outf, f0, f1;", |a, b, _| -smaller(-a, -b, 0.0));
    float("max.NaN.f32 outf, f0, f1;", |a, b, _| {
        if a.is_nan() || b.is_nan() { f32::NAN } else { -smaller(-a, -b, 0.0) }
    });
    let predicate = |op: &str, want: fn(f32, f32) -> bool| {
        check(80, &format!("setp.{op}.f32 outp, f0, f1;"), &floats(), |[a, b, ..]| {
            u64::from(want(f32::from_bits(a as u32), f32::from_bits(b as u32)))
        });
    };
    predicate("lt", |a, b| a < b);
    predicate("ne", |a, b| a != b && !a.is_nan() && !b.is_nan());
    predicate("neu", |a, b| a != b);
    predicate("geu", |a, b| a >= b || a.is_nan() || b.is_nan());
    predicate("num", |a, b| !a.is_nan() && !b.is_nan());
    predicate("nan", |a, b| a.is_nan() || b.is_nan());
    // Subnormal operands are zeros.
    predicate("eq.ftz", |a, b| flush(a) == flush(b));
    predicate("gt.ftz", |a, b| flush(a) > flush(b));
    predicate("leu.ftz", |a, b| flush(a) <= flush(b) || a.is_nan() || b.is_nan());
}

#[test]
fn comparisons_flush_subnormals_when_asked() {
    let tiny = [1, 0x8000_0001, 0x0080_0000, 0x8080_0000].map(|a| [a, 0, 7, 9]);
    assert_eq!(eval(80, "setp.ne.f32 outp, f0, f1;", &tiny), [1, 1, 1, 1]);
    assert_eq!(eval(80, "setp.ne.ftz.f32 outp, f0, f1;", &tiny), [0, 0, 1, 1]);
    assert_eq!(eval(80, "slct.f32.f32 outf, f2, f3, f0;", &tiny), [7, 9, 7, 9]);
    assert_eq!(eval(80, "slct.ftz.f32.f32 outf, f2, f3, f0;", &tiny), [7, 7, 7, 9]);
    let tiny = [1, 0x83ff, 0x0400, 0x8400].map(|a| [a, 0, 0, 0]);
    assert_eq!(eval(80, "setp.ne.f16 outp, h0, h1;", &tiny), [1, 1, 1, 1]);
    assert_eq!(eval(80, "setp.ne.ftz.f16 outp, h0, h1;", &tiny), [0, 0, 1, 1]);
}

#[test]
fn comparisons_that_give_numbers() {
    check(80, "set.gt.u32.f32 outr, f0, f1;", &floats(), |[a, b, ..]| {
        if f32::from_bits(a as u32) > f32::from_bits(b as u32) { 0xffff_ffff } else { 0 }
    });
    word(
        "set.lt.f32.s32 outf, r0, r1;",
        |a, b, _| if (a as i32) < b as i32 { 0x3f80_0000 } else { 0 },
    );
    // Halves of a pair: the low ones are equal, the high ones are not.
    let pair = [0x3c00_4000, 0x3d00_4000, 0, 0];
    assert_eq!(eval(80, "set.eq.f16x2.f16x2 outr, r0, r1;", &[pair]), [0x3c00]);
    assert_eq!(eval(90, "set.ltu.u32.bf16x2 outr, r0, r1;", &[pair]), [0xffff_0000]);
}

#[test]
fn approximate_functions_are_close() {
    for (op, f) in [
        ("ex2.approx.f32", f64::exp2 as fn(f64) -> f64),
        ("lg2.approx.f32", f64::log2),
        ("sin.approx.f32", f64::sin),
        ("tanh.approx.f32", f64::tanh),
        ("rsqrt.approx.f32", |x| 1.0 / x.sqrt()),
        ("sqrt.approx.f32", f64::sqrt),
    ] {
        let inputs = floats();
        for part in inputs.chunks(512) {
            let found = eval(80, &format!("{op} outf, f0;"), part);
            for (input, found) in part.iter().zip(found) {
                let x = f64::from(f32::from_bits(input[0] as u32));
                let (found, want) = (f64::from(f32::from_bits(found as u32)), f(x));
                let close = (found - want).abs() <= 1e-6 * want.abs().min(3e38) + 1e-44;
                let both = want.is_nan() && found.is_nan() || found == want as f32 as f64;
                assert!(close || both, "{op} of {x:e}: {found:e}, not {want:e}");
            }
        }
    }
}

#[test]
fn conversions() {
    let from_float = |body: &str, want: fn(f64) -> u64| {
        check(90, body, &floats(), |[a, ..]| want(f32::from_bits(a as u32).into()));
    };
    from_float("cvt.rzi.s32.f32 outr, f0;", |x| u64::from(x.trunc() as i32 as u32));
    from_float("cvt.rni.u32.f32 outr, f0;", |x| u64::from(x.round_ties_even() as u32));
    from_float("cvt.rmi.s64.f32 out, f0;", |x| {
        if x.is_nan() { 1 << 63 } else { x.floor() as i64 as u64 }
    });
    from_float("cvt.rzi.u8.f32 outr, f0;", |x| u64::from(x as u8));
    from_float("cvt.rpi.s16.f32 outh, f0;", |x| u64::from(x.ceil() as i16 as u16));
    long("cvt.rn.f32.s32 outf, r0;", |a, _, _| u64::from((a as i32 as f32).to_bits()));
    long("cvt.rn.f32.u64 outf, a0;", |a, _, _| u64::from((a as f32).to_bits()));
    long("cvt.rn.f64.s64 d0, a0; mov.b64 out, d0;", |a, _, _| (a as i64 as f64).to_bits());
    long("cvt.s64.s32 out, r0;", |a, _, _| a as i32 as i64 as u64);
    long("cvt.s32.s8 outr, r0;", |a, _, _| u64::from(a as i8 as i32 as u32));
    long("cvt.u32.u16 outr, h0;", |a, _, _| a & 0xffff);
    long("cvt.sat.u8.s32 outr, r0;", |a, _, _| (a as i32).clamp(0, 255) as u64);
    long("cvt.sat.s16.s64 outh, a0;", |a, _, _| {
        u64::from((a as i64).clamp(-32768, 32767) as i16 as u16)
    });
    // The payload of a NaN is open.
    from_float(
        "cvt.f64.f32 d1, f0; mov.b64 out, d1; setp.nan.f64 p0, d1, d1; selp.b64 out, 7, out, p0;",
        |x| {
            if x.is_nan() { 7 } else { x.to_bits() }
        },
    );
}

/// PTX ISA, `cvt`: zero if the source is not `.f64` and the destination has not 64 bits, else
/// `1 << (bits - 1)`.
#[test]
fn conversions_of_nan_to_integers() {
    let nans = [[0x7fff_ffff, 0, 0, 0], [0xffc0_1234, 0, 0, 0], [0x7f80_0001, 0, 0, 0]];
    let wide = [[0x7fff_ffff_ffff_ffff, 0, 0, 0], [0xfff8_0000_0000_0001, 0, 0, 0]];
    for sign in ["u", "s"] {
        for (bits, register, zero) in
            [(8, "outh", true), (16, "outh", true), (32, "outr", true), (64, "out", false)]
        {
            let top = 1_u64 << (bits - 1);
            for from in ["f16.h0", "bf16.h0", "f32.f0"].map(|f| f.split_once('.').unwrap()) {
                let body = format!("cvt.rzi.{sign}{bits}.{} {register}, {};", from.0, from.1);
                for mut nan in nans {
                    if from.0 != "f32" {
                        nan[0] = nan[0] >> 16 | 0x7c01;
                        nan[0] |= if from.0 == "bf16" { 0x7f81 } else { 0 };
                    }
                    let want = if zero { 0 } else { top };
                    assert_eq!(eval(90, &body, &[nan]), [want], "{body} of {nan:x?}");
                }
            }
            // A signed byte fills its 16-bit register.
            let want = if (sign, bits) == ("s", 8) { 0xff80 } else { top };
            let body = format!("cvt.rni.{sign}{bits}.f64 {register}, d0;");
            assert_eq!(eval(90, &body, &wide), [want; 2], "{body}");
        }
    }
}

/// Rounds to a short mantissa the slow way: by asking which of two neighbours is closer.
fn nearest(x: f32, neighbour: impl Fn(u32) -> f64, infinity: u32) -> u32 {
    let sign = if x.is_sign_negative() { (infinity >> 1).next_power_of_two() * 2 } else { 0 };
    let magnitude = f64::from(x.abs());
    // The largest pattern whose value does not exceed the input.
    let (mut low, mut high) = (0, infinity);
    while high - low > 1 {
        let middle = (low + high) / 2;
        if neighbour(middle) <= magnitude { low = middle } else { high = middle }
    }
    let top = 2.0 * neighbour(infinity - 1) - neighbour(infinity - 2);
    let above = if high == infinity { top } else { neighbour(high) };
    let (down, up) = (magnitude - neighbour(low), above - magnitude);
    let chosen = if up < down || up == down && low & 1 == 1 { high } else { low };
    sign | chosen
}

#[test]
fn short_floats() {
    let half = |bits: u32| {
        let (e, m) = (bits >> 10 & 31, f64::from(bits & 0x3ff));
        if e == 0 { m * 2_f64.powi(-24) } else { (1024.0 + m) * 2_f64.powi(e as i32 - 25) }
    };
    let brain = |bits: u32| f64::from(f32::from_bits(bits << 16));
    let to_half = |x: f32| if x.is_nan() { 0x7fff } else { nearest(x, half, 0x7c00) };
    let to_brain = |x: f32| if x.is_nan() { 0x7fff } else { nearest(x, brain, 0x7f80) };
    let narrow = |body: &str, want: &dyn Fn(f32, f32) -> u64| {
        check(90, body, &floats(), |[a, b, ..]| {
            want(f32::from_bits(a as u32), f32::from_bits(b as u32))
        });
    };
    narrow("cvt.rn.f16.f32 outh, f0;", &|a, _| to_half(a).into());
    narrow("cvt.rn.bf16.f32 outh, f0;", &|a, _| to_brain(a).into());
    narrow("cvt.rn.bf16x2.f32 outr, f0, f1;", &|a, b| {
        u64::from(to_brain(a)) << 16 | u64::from(to_brain(b))
    });
    narrow("cvt.rn.f16x2.f32 outr, f0, f1;", &|a, b| {
        u64::from(to_half(a)) << 16 | u64::from(to_half(b))
    });
    narrow("cvt.rn.relu.bf16.f32 outh, f0;", &|a, _| if a < 0.0 { 0 } else { to_brain(a).into() });
    narrow("cvt.rna.tf32.f32 outr, f0;", &|a, _| {
        // Half of the last kept bit is added to the magnitude, the rest is cut.
        // Of a NaN nothing is added: an H100's has the bits that are kept.
        if a.is_nan() {
            u64::from(a.to_bits() & !0x1fff)
        } else if a.is_infinite() {
            a.to_bits().into()
        } else {
            u64::from((a.to_bits() + 0x1000) & !0x1fff)
        }
    });
    // Arithmetic in halves: exact in f64, then rounded.
    let values = |x: u64| half(x as u32 & 0x7fff) * if x & 0x8000 != 0 { -1.0 } else { 1.0 };
    let finite: Vec<[u64; 4]> = words().into_iter().map(|w| w.map(|x| x & 0xbbff)).collect();
    check(80, "fma.rn.f16 outh, h0, h1, h2;", &finite, |[a, b, c, _]| {
        let sum = values(a) * values(b) + values(c);
        if sum == 0.0 { u64::from(sum.is_sign_negative()) << 15 } else { direct(sum, half) }
    });
    check(
        80,
        "add.f16x2 outr, r0, r1;",
        &finite.iter().map(|w| w.map(|x| x | x << 16)).collect::<Vec<_>>(),
        |[a, b, ..]| {
            let sum = values(a) + values(b);
            let one = if sum == 0.0 {
                u64::from(sum.is_sign_negative()) << 15
            } else {
                direct(sum, half)
            };
            one | one << 16
        },
    );
}

/// The nearest half of an f64, by search.
fn direct(x: f64, half: impl Fn(u32) -> f64) -> u64 {
    let magnitude = x.abs();
    let low = (0..0x7c00).rev().find(|&b| half(b) <= magnitude).unwrap_or(0);
    let above = if low == 0x7bff { 65536.0 } else { half(low + 1) };
    let (down, up) = (magnitude - half(low), above - magnitude);
    let chosen = if up < down || up == down && low & 1 == 1 { low + 1 } else { low };
    u64::from(chosen) | u64::from(x < 0.0) << 15
}

#[test]
fn floats_of_eight_bits() {
    // Every value from its neighbour: steps double where the exponent grows.
    let magnitudes = |name: &str| {
        let (each, least, count) = if name == "e4m3" { (8, -9, 0x7f) } else { (4, -16, 0x7c) };
        let (mut values, mut step) = (vec![0.0_f64], 2_f64.powi(least));
        for bits in 1..count {
            values.push(values[bits - 1] + step);
            // Subnormal numbers and the first normal ones are as far apart.
            if bits > each && bits % each == 0 {
                step *= 2.0;
            }
        }
        values
    };
    for (name, greatest) in [("e4m3", 448.0), ("e5m2", 57344.0)] {
        let values = magnitudes(name);
        assert_eq!(values.last(), Some(&greatest));
        let nearest = |x: f64| {
            if x.is_nan() {
                return 0x7f;
            }
            let distance = |bits: &usize| (values[*bits] - x.abs().min(greatest)).abs();
            let tie = |a: &usize, b: &usize| (a & 1).cmp(&(b & 1));
            let best = (0..values.len())
                .min_by(|a, b| distance(a).total_cmp(&distance(b)).then(tie(a, b)));
            best.unwrap() as u64 | u64::from(x.is_sign_negative()) << 7
        };
        // Values, the middles between them, and what lies beside these; what is beyond the ends.
        let mut inputs =
            vec![f32::NAN, f32::INFINITY, f32::MAX, 1e-30, 1e-45, 464.0, 480.0, 61440.0];
        for pair in values.windows(2) {
            let middle = ((pair[0] + pair[1]) / 2.0) as f32;
            inputs.extend([pair[0] as f32, middle, middle.next_down(), middle.next_up()]);
        }
        let inputs: Vec<f32> = inputs.iter().flat_map(|&x| [x, -x]).collect();
        let at = |i: usize| u64::from(inputs[i % inputs.len()].to_bits());
        let pairs: Vec<[u64; 4]> =
            (0..inputs.len()).map(|i| [at(i), at(7 * i + 3), 0, 0]).collect();
        let real = |bits: u64| f64::from(f32::from_bits(bits as u32));
        // The first is the upper one.
        check(89, &format!("cvt.rn.satfinite.{name}x2.f32 outh, f0, f1;"), &pairs, |[a, b, ..]| {
            nearest(real(a)) << 8 | nearest(real(b))
        });
        // Minus zero is not below zero, which an optimised comparison and choice in one may forget.
        let cut = |x: f64| if std::hint::black_box(x) < 0.0 { 0.0 } else { x };
        let body = format!("cvt.rn.satfinite.relu.{name}x2.f32 outh, f0, f1;");
        check(90, &body, &pairs, |[a, b, ..]| nearest(cut(real(a))) << 8 | nearest(cut(real(b))));

        let half = |bits: u64| {
            let (e, m) = (bits >> 10 & 31, (bits & 0x3ff) as f64);
            let magnitude = match e {
                0 => m * 2_f64.powi(-24),
                31 if m == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1024.0 + m) * 2_f64.powi(e as i32 - 25),
            };
            if bits >> 15 & 1 == 1 { -magnitude } else { magnitude }
        };
        let halves: Vec<[u64; 4]> =
            (0..0x10000).step_by(5).map(|i| [i << 16 | (i * 77 + 1) & 0xffff, 0, 0, 0]).collect();
        check(89, &format!("cvt.rn.satfinite.{name}x2.f16x2 outh, r0;"), &halves, |[a, ..]| {
            nearest(half(a >> 16)) << 8 | nearest(half(a & 0xffff))
        });
        let to_half = |byte: u64| {
            let x = values.get((byte & 0x7f) as usize).copied();
            let infinite = name == "e5m2" && byte & 0x7f == 0x7c;
            let Some(x) = x.or(infinite.then_some(f64::INFINITY)) else { return 0x7fff };
            let bits = (0..=0x7c00).find(|&bits| half(bits) == x).unwrap();
            bits | (byte & 0x80) << 8
        };
        let bytes: Vec<[u64; 4]> =
            (0..256).map(|i| [i << 8 | (i * 91 + 5) & 0xff, 0, 0, 0]).collect();
        check(89, &format!("cvt.rn.f16x2.{name}x2 outr, h0;"), &bytes, |[a, ..]| {
            to_half(a >> 8 & 0xff) << 16 | to_half(a & 0xff)
        });
        let body = format!("cvt.rn.relu.f16x2.{name}x2 outr, h0;");
        check(89, &body, &bytes, |[a, ..]| {
            // As a number, minus zero is not below zero.
            let cut = |half: u64| if half > 0x8000 { 0 } else { half };
            cut(to_half(a >> 8 & 0xff)) << 16 | cut(to_half(a & 0xff))
        });
    }
}
