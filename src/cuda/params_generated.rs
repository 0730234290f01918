pub const PW_MAX_AXES: u32 = 4;
pub const PW_MAX_SOURCES: u32 = 16;
pub const PW_INLINE_STEPS: u32 = 8;
pub const PW_INLINE_SOURCE_STEPS: u32 = 4;
pub const PW_ROW_ALIGN: u32 = 4;
pub const PW_ROW_ALIGN_16BIT: u32 = 8;
pub const PW_NORM_TURN: u32 = 32;
pub const PW_NORM_TURN_BYTES: u32 = 4096;
pub const PW_NORM_SHARED_BYTES: u32 = 2176;
pub const PW_MERGED: u32 = 1024;
pub const PW_MAX_PARTS: u32 = 16;
pub const PW_MAX_STAGES: u32 = 16;
pub const PW_MAX_SUMMED: u32 = 4;
pub const PW_NOT_SUMMED: u32 = 255;
pub const PW_SWEEP_THREADS: u32 = 256;
pub const PW_SWEEP_WIDE: u32 = 32;
pub const PW_SWEEP_NARROW: u32 = 8;
pub const PW_SWEEP_POSITIONS: u32 = 32;
pub const PW_SUM_LANES: u32 = 32;
pub const PW_WGRAD_THREADS: u32 = 256;
pub const PW_WGRAD_TILE: u32 = 64;
pub const PW_WGRAD_SLAB: u32 = 16;
impl pw_op {
    pub const PW_OP_AFFINE: pw_op = pw_op(0);
    pub const PW_OP_PRELU: pw_op = pw_op(1);
    pub const PW_OP_RESIDUAL: pw_op = pw_op(2);
    pub const PW_OP_GATE: pw_op = pw_op(3);
    pub const PW_OP_CLIP: pw_op = pw_op(4);
    pub const PW_OP_LEAKY_RELU: pw_op = pw_op(5);
    pub const PW_OP_ELU: pw_op = pw_op(6);
    pub const PW_OP_SIGMOID: pw_op = pw_op(7);
    pub const PW_OP_TANH: pw_op = pw_op(8);
    pub const PW_OP_SILU: pw_op = pw_op(9);
    pub const PW_OP_GELU: pw_op = pw_op(10);
    pub const PW_OP_GELU_TANH: pw_op = pw_op(11);
    pub const PW_OP_HARD_SIGMOID: pw_op = pw_op(12);
    pub const PW_OP_HARD_SWISH: pw_op = pw_op(13);
    pub const PW_OP_SOFTPLUS: pw_op = pw_op(14);
    pub const PW_OP_MISH: pw_op = pw_op(15);
    pub const PW_OP_LAYER_NORM: pw_op = pw_op(16);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_op(pub ::core::ffi::c_uint);
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_step {
    pub op: pw_op,
    pub a: f32,
    pub b: f32,
    pub reserved: u32,
    pub first: *const f32,
    pub second: *const f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_step"][::core::mem::size_of::<pw_step>() - 32usize];
    ["Alignment of pw_step"][::core::mem::align_of::<pw_step>() - 8usize];
    ["Offset of field: pw_step::op"][::core::mem::offset_of!(pw_step, op) - 0usize];
    ["Offset of field: pw_step::a"][::core::mem::offset_of!(pw_step, a) - 4usize];
    ["Offset of field: pw_step::b"][::core::mem::offset_of!(pw_step, b) - 8usize];
    ["Offset of field: pw_step::reserved"][::core::mem::offset_of!(pw_step, reserved) - 12usize];
    ["Offset of field: pw_step::first"][::core::mem::offset_of!(pw_step, first) - 16usize];
    ["Offset of field: pw_step::second"][::core::mem::offset_of!(pw_step, second) - 24usize];
};
impl Default for pw_step {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
impl pw_read {
    pub const PW_READ_POSITIONS: pw_read = pw_read(0);
    pub const PW_READ_CHANNELS: pw_read = pw_read(1);
    pub const PW_READ_POSITIONS_VEC4: pw_read = pw_read(2);
    pub const PW_READ_CHANNELS_VEC4: pw_read = pw_read(3);
    pub const PW_READ_POSITIONS_VEC8: pw_read = pw_read(4);
    pub const PW_READ_CHANNELS_VEC8: pw_read = pw_read(5);
    pub const PW_READ_POSITIONS_VEC16: pw_read = pw_read(6);
    pub const PW_READ_CHANNELS_VEC16: pw_read = pw_read(7);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_read(pub ::core::ffi::c_uint);
impl pw_epilogue {
    pub const PW_EPILOGUE_STEPS: pw_epilogue = pw_epilogue(0);
    pub const PW_EPILOGUE_CLIP: pw_epilogue = pw_epilogue(1);
    pub const PW_EPILOGUE_RESIDUAL_CLIP: pw_epilogue = pw_epilogue(2);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_epilogue(pub ::core::ffi::c_uint);
impl pw_flags {
    pub const PW_FLAG_DST_VEC4: pw_flags = pw_flags(1);
    pub const PW_FLAG_RESIDUAL_VEC4: pw_flags = pw_flags(2);
    pub const PW_FLAG_CHANNELS_FAST: pw_flags = pw_flags(4);
    pub const PW_FLAG_DST_VEC8: pw_flags = pw_flags(8);
    pub const PW_FLAG_RESIDUAL_VEC8: pw_flags = pw_flags(16);
    pub const PW_FLAG_DST_F32: pw_flags = pw_flags(32);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_flags(pub ::core::ffi::c_uint);
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct pw_axis {
    pub extent: i64,
    pub dst: i64,
    pub residual: i64,
    pub gate: i64,
    pub moments: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_axis"][::core::mem::size_of::<pw_axis>() - 40usize];
    ["Alignment of pw_axis"][::core::mem::align_of::<pw_axis>() - 8usize];
    ["Offset of field: pw_axis::extent"][::core::mem::offset_of!(pw_axis, extent) - 0usize];
    ["Offset of field: pw_axis::dst"][::core::mem::offset_of!(pw_axis, dst) - 8usize];
    ["Offset of field: pw_axis::residual"][::core::mem::offset_of!(pw_axis, residual) - 16usize];
    ["Offset of field: pw_axis::gate"][::core::mem::offset_of!(pw_axis, gate) - 24usize];
    ["Offset of field: pw_axis::moments"][::core::mem::offset_of!(pw_axis, moments) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_source {
    pub data: *const ::core::ffi::c_void,
    pub channel: i64,
    pub axes: [i64; 4usize],
    pub begin: u32,
    pub end: u32,
    pub read: pw_read,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_source"][::core::mem::size_of::<pw_source>() - 64usize];
    ["Alignment of pw_source"][::core::mem::align_of::<pw_source>() - 8usize];
    ["Offset of field: pw_source::data"][::core::mem::offset_of!(pw_source, data) - 0usize];
    ["Offset of field: pw_source::channel"][::core::mem::offset_of!(pw_source, channel) - 8usize];
    ["Offset of field: pw_source::axes"][::core::mem::offset_of!(pw_source, axes) - 16usize];
    ["Offset of field: pw_source::begin"][::core::mem::offset_of!(pw_source, begin) - 48usize];
    ["Offset of field: pw_source::end"][::core::mem::offset_of!(pw_source, end) - 52usize];
    ["Offset of field: pw_source::read"][::core::mem::offset_of!(pw_source, read) - 56usize];
    ["Offset of field: pw_source::reserved"]
        [::core::mem::offset_of!(pw_source, reserved) - 60usize];
};
impl Default for pw_source {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_norm {
    pub gamma: *const f32,
    pub beta: *const f32,
    pub moments: *mut f64,
    pub values: f64,
    pub eps: f32,
    pub held: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_norm"][::core::mem::size_of::<pw_norm>() - 40usize];
    ["Alignment of pw_norm"][::core::mem::align_of::<pw_norm>() - 8usize];
    ["Offset of field: pw_norm::gamma"][::core::mem::offset_of!(pw_norm, gamma) - 0usize];
    ["Offset of field: pw_norm::beta"][::core::mem::offset_of!(pw_norm, beta) - 8usize];
    ["Offset of field: pw_norm::moments"][::core::mem::offset_of!(pw_norm, moments) - 16usize];
    ["Offset of field: pw_norm::values"][::core::mem::offset_of!(pw_norm, values) - 24usize];
    ["Offset of field: pw_norm::eps"][::core::mem::offset_of!(pw_norm, eps) - 32usize];
    ["Offset of field: pw_norm::held"][::core::mem::offset_of!(pw_norm, held) - 36usize];
};
impl Default for pw_norm {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
impl pw_norm_job {
    pub const PW_NORM_CHANNELS: pw_norm_job = pw_norm_job(0);
    pub const PW_NORM_MOMENTS: pw_norm_job = pw_norm_job(1);
    pub const PW_NORM_APPLY: pw_norm_job = pw_norm_job(2);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_norm_job(pub ::core::ffi::c_uint);
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_fprop {
    pub axes: [pw_axis; 4usize],
    pub sources: [pw_source; 16usize],
    pub positions: i64,
    pub dst_channel: i64,
    pub residual_channel: i64,
    pub gate_channel: i64,
    pub weight: *const ::core::ffi::c_void,
    pub bias: *const f32,
    pub scale: *const f32,
    pub dst: *mut ::core::ffi::c_void,
    pub residual: *const ::core::ffi::c_void,
    pub gate: *const ::core::ffi::c_void,
    pub dst_map: *const u32,
    pub residual_map: *const u32,
    pub more_steps: *const pw_step,
    pub more_source_steps: *const pw_step,
    pub partial: *mut f32,
    pub arrived: *mut u32,
    pub groups: u32,
    pub rows: u32,
    pub depth: u32,
    pub row_pitch: u32,
    pub axis_count: u32,
    pub source_count: u32,
    pub step_count: u32,
    pub source_step_count: u32,
    pub epilogue: pw_epilogue,
    pub flags: u32,
    pub clip_lo: f32,
    pub clip_hi: f32,
    pub splits: u32,
    pub norm_job: pw_norm_job,
    pub norm: pw_norm,
    pub steps: [pw_step; 8usize],
    pub source_steps: [pw_step; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_fprop"][::core::mem::size_of::<pw_fprop>() - 1792usize];
    ["Alignment of pw_fprop"][::core::mem::align_of::<pw_fprop>() - 8usize];
    ["Offset of field: pw_fprop::axes"][::core::mem::offset_of!(pw_fprop, axes) - 0usize];
    ["Offset of field: pw_fprop::sources"][::core::mem::offset_of!(pw_fprop, sources) - 160usize];
    ["Offset of field: pw_fprop::positions"]
        [::core::mem::offset_of!(pw_fprop, positions) - 1184usize];
    ["Offset of field: pw_fprop::dst_channel"]
        [::core::mem::offset_of!(pw_fprop, dst_channel) - 1192usize];
    ["Offset of field: pw_fprop::residual_channel"]
        [::core::mem::offset_of!(pw_fprop, residual_channel) - 1200usize];
    ["Offset of field: pw_fprop::gate_channel"]
        [::core::mem::offset_of!(pw_fprop, gate_channel) - 1208usize];
    ["Offset of field: pw_fprop::weight"][::core::mem::offset_of!(pw_fprop, weight) - 1216usize];
    ["Offset of field: pw_fprop::bias"][::core::mem::offset_of!(pw_fprop, bias) - 1224usize];
    ["Offset of field: pw_fprop::scale"][::core::mem::offset_of!(pw_fprop, scale) - 1232usize];
    ["Offset of field: pw_fprop::dst"][::core::mem::offset_of!(pw_fprop, dst) - 1240usize];
    ["Offset of field: pw_fprop::residual"]
        [::core::mem::offset_of!(pw_fprop, residual) - 1248usize];
    ["Offset of field: pw_fprop::gate"][::core::mem::offset_of!(pw_fprop, gate) - 1256usize];
    ["Offset of field: pw_fprop::dst_map"][::core::mem::offset_of!(pw_fprop, dst_map) - 1264usize];
    ["Offset of field: pw_fprop::residual_map"]
        [::core::mem::offset_of!(pw_fprop, residual_map) - 1272usize];
    ["Offset of field: pw_fprop::more_steps"]
        [::core::mem::offset_of!(pw_fprop, more_steps) - 1280usize];
    ["Offset of field: pw_fprop::more_source_steps"]
        [::core::mem::offset_of!(pw_fprop, more_source_steps) - 1288usize];
    ["Offset of field: pw_fprop::partial"][::core::mem::offset_of!(pw_fprop, partial) - 1296usize];
    ["Offset of field: pw_fprop::arrived"][::core::mem::offset_of!(pw_fprop, arrived) - 1304usize];
    ["Offset of field: pw_fprop::groups"][::core::mem::offset_of!(pw_fprop, groups) - 1312usize];
    ["Offset of field: pw_fprop::rows"][::core::mem::offset_of!(pw_fprop, rows) - 1316usize];
    ["Offset of field: pw_fprop::depth"][::core::mem::offset_of!(pw_fprop, depth) - 1320usize];
    ["Offset of field: pw_fprop::row_pitch"]
        [::core::mem::offset_of!(pw_fprop, row_pitch) - 1324usize];
    ["Offset of field: pw_fprop::axis_count"]
        [::core::mem::offset_of!(pw_fprop, axis_count) - 1328usize];
    ["Offset of field: pw_fprop::source_count"]
        [::core::mem::offset_of!(pw_fprop, source_count) - 1332usize];
    ["Offset of field: pw_fprop::step_count"]
        [::core::mem::offset_of!(pw_fprop, step_count) - 1336usize];
    ["Offset of field: pw_fprop::source_step_count"]
        [::core::mem::offset_of!(pw_fprop, source_step_count) - 1340usize];
    ["Offset of field: pw_fprop::epilogue"]
        [::core::mem::offset_of!(pw_fprop, epilogue) - 1344usize];
    ["Offset of field: pw_fprop::flags"][::core::mem::offset_of!(pw_fprop, flags) - 1348usize];
    ["Offset of field: pw_fprop::clip_lo"][::core::mem::offset_of!(pw_fprop, clip_lo) - 1352usize];
    ["Offset of field: pw_fprop::clip_hi"][::core::mem::offset_of!(pw_fprop, clip_hi) - 1356usize];
    ["Offset of field: pw_fprop::splits"][::core::mem::offset_of!(pw_fprop, splits) - 1360usize];
    ["Offset of field: pw_fprop::norm_job"]
        [::core::mem::offset_of!(pw_fprop, norm_job) - 1364usize];
    ["Offset of field: pw_fprop::norm"][::core::mem::offset_of!(pw_fprop, norm) - 1368usize];
    ["Offset of field: pw_fprop::steps"][::core::mem::offset_of!(pw_fprop, steps) - 1408usize];
    ["Offset of field: pw_fprop::source_steps"]
        [::core::mem::offset_of!(pw_fprop, source_steps) - 1664usize];
};
impl Default for pw_fprop {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_merge {
    pub from: *const f64,
    pub to: *mut f64,
    pub items: i64,
    pub unit: i64,
    pub values: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_merge"][::core::mem::size_of::<pw_merge>() - 40usize];
    ["Alignment of pw_merge"][::core::mem::align_of::<pw_merge>() - 8usize];
    ["Offset of field: pw_merge::from"][::core::mem::offset_of!(pw_merge, from) - 0usize];
    ["Offset of field: pw_merge::to"][::core::mem::offset_of!(pw_merge, to) - 8usize];
    ["Offset of field: pw_merge::items"][::core::mem::offset_of!(pw_merge, items) - 16usize];
    ["Offset of field: pw_merge::unit"][::core::mem::offset_of!(pw_merge, unit) - 24usize];
    ["Offset of field: pw_merge::values"][::core::mem::offset_of!(pw_merge, values) - 32usize];
};
impl Default for pw_merge {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
impl pw_element {
    pub const PW_BYTES: pw_element = pw_element(0);
    pub const PW_F32: pw_element = pw_element(1);
    pub const PW_F16: pw_element = pw_element(2);
    pub const PW_BF16: pw_element = pw_element(3);
    pub const PW_E4M3: pw_element = pw_element(4);
    pub const PW_E5M2: pw_element = pw_element(5);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_element(pub ::core::ffi::c_uint);
impl pw_operands {
    pub const PW_I8_U8: pw_operands = pw_operands(0);
    pub const PW_I8_I8: pw_operands = pw_operands(1);
    pub const PW_E4M3_E4M3: pw_operands = pw_operands(2);
    pub const PW_E4M3_E5M2: pw_operands = pw_operands(3);
    pub const PW_E5M2_E4M3: pw_operands = pw_operands(4);
    pub const PW_E5M2_E5M2: pw_operands = pw_operands(5);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_operands(pub ::core::ffi::c_uint);
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct pw_quantization {
    pub scale: f32,
    pub zero_point: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_quantization"][::core::mem::size_of::<pw_quantization>() - 8usize];
    ["Alignment of pw_quantization"][::core::mem::align_of::<pw_quantization>() - 4usize];
    ["Offset of field: pw_quantization::scale"]
        [::core::mem::offset_of!(pw_quantization, scale) - 0usize];
    ["Offset of field: pw_quantization::zero_point"]
        [::core::mem::offset_of!(pw_quantization, zero_point) - 4usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_bytes {
    pub fprop: pw_fprop,
    pub offset: *const i32,
    pub scale: *const f32,
    pub shift: *const f32,
    pub dst_type: pw_element,
    pub residual_type: pw_element,
    pub depth_pitch: u32,
    pub operands: pw_operands,
    pub before_lo: f32,
    pub before_hi: f32,
    pub lo: f32,
    pub hi: f32,
    pub zero_point: i32,
    pub residual_flip: u32,
    pub residual_zero_point: i32,
    pub residual_scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_bytes"][::core::mem::size_of::<pw_bytes>() - 1864usize];
    ["Alignment of pw_bytes"][::core::mem::align_of::<pw_bytes>() - 8usize];
    ["Offset of field: pw_bytes::fprop"][::core::mem::offset_of!(pw_bytes, fprop) - 0usize];
    ["Offset of field: pw_bytes::offset"][::core::mem::offset_of!(pw_bytes, offset) - 1792usize];
    ["Offset of field: pw_bytes::scale"][::core::mem::offset_of!(pw_bytes, scale) - 1800usize];
    ["Offset of field: pw_bytes::shift"][::core::mem::offset_of!(pw_bytes, shift) - 1808usize];
    ["Offset of field: pw_bytes::dst_type"]
        [::core::mem::offset_of!(pw_bytes, dst_type) - 1816usize];
    ["Offset of field: pw_bytes::residual_type"]
        [::core::mem::offset_of!(pw_bytes, residual_type) - 1820usize];
    ["Offset of field: pw_bytes::depth_pitch"]
        [::core::mem::offset_of!(pw_bytes, depth_pitch) - 1824usize];
    ["Offset of field: pw_bytes::operands"]
        [::core::mem::offset_of!(pw_bytes, operands) - 1828usize];
    ["Offset of field: pw_bytes::before_lo"]
        [::core::mem::offset_of!(pw_bytes, before_lo) - 1832usize];
    ["Offset of field: pw_bytes::before_hi"]
        [::core::mem::offset_of!(pw_bytes, before_hi) - 1836usize];
    ["Offset of field: pw_bytes::lo"][::core::mem::offset_of!(pw_bytes, lo) - 1840usize];
    ["Offset of field: pw_bytes::hi"][::core::mem::offset_of!(pw_bytes, hi) - 1844usize];
    ["Offset of field: pw_bytes::zero_point"]
        [::core::mem::offset_of!(pw_bytes, zero_point) - 1848usize];
    ["Offset of field: pw_bytes::residual_flip"]
        [::core::mem::offset_of!(pw_bytes, residual_flip) - 1852usize];
    ["Offset of field: pw_bytes::residual_zero_point"]
        [::core::mem::offset_of!(pw_bytes, residual_zero_point) - 1856usize];
    ["Offset of field: pw_bytes::residual_scale"]
        [::core::mem::offset_of!(pw_bytes, residual_scale) - 1860usize];
};
impl Default for pw_bytes {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_part {
    pub data: *mut ::core::ffi::c_void,
    pub channel: i64,
    pub axes: [i64; 4usize],
    pub begin: u32,
    pub end: u32,
    pub element: pw_element,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_part"][::core::mem::size_of::<pw_part>() - 64usize];
    ["Alignment of pw_part"][::core::mem::align_of::<pw_part>() - 8usize];
    ["Offset of field: pw_part::data"][::core::mem::offset_of!(pw_part, data) - 0usize];
    ["Offset of field: pw_part::channel"][::core::mem::offset_of!(pw_part, channel) - 8usize];
    ["Offset of field: pw_part::axes"][::core::mem::offset_of!(pw_part, axes) - 16usize];
    ["Offset of field: pw_part::begin"][::core::mem::offset_of!(pw_part, begin) - 48usize];
    ["Offset of field: pw_part::end"][::core::mem::offset_of!(pw_part, end) - 52usize];
    ["Offset of field: pw_part::element"][::core::mem::offset_of!(pw_part, element) - 56usize];
    ["Offset of field: pw_part::reserved"][::core::mem::offset_of!(pw_part, reserved) - 60usize];
};
impl Default for pw_part {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_stage {
    pub op: pw_op,
    pub a: f32,
    pub b: f32,
    pub sums: u32,
    pub first: *const f32,
    pub second: *const f32,
    pub third: *const f32,
    pub mean_d: *const f32,
    pub along: *const f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_stage"][::core::mem::size_of::<pw_stage>() - 56usize];
    ["Alignment of pw_stage"][::core::mem::align_of::<pw_stage>() - 8usize];
    ["Offset of field: pw_stage::op"][::core::mem::offset_of!(pw_stage, op) - 0usize];
    ["Offset of field: pw_stage::a"][::core::mem::offset_of!(pw_stage, a) - 4usize];
    ["Offset of field: pw_stage::b"][::core::mem::offset_of!(pw_stage, b) - 8usize];
    ["Offset of field: pw_stage::sums"][::core::mem::offset_of!(pw_stage, sums) - 12usize];
    ["Offset of field: pw_stage::first"][::core::mem::offset_of!(pw_stage, first) - 16usize];
    ["Offset of field: pw_stage::second"][::core::mem::offset_of!(pw_stage, second) - 24usize];
    ["Offset of field: pw_stage::third"][::core::mem::offset_of!(pw_stage, third) - 32usize];
    ["Offset of field: pw_stage::mean_d"][::core::mem::offset_of!(pw_stage, mean_d) - 40usize];
    ["Offset of field: pw_stage::along"][::core::mem::offset_of!(pw_stage, along) - 48usize];
};
impl Default for pw_stage {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
impl pw_sweep_flags {
    pub const PW_SWEEP_CHANNELS_FAST: pw_sweep_flags = pw_sweep_flags(1);
    pub const PW_SWEEP_ADD: pw_sweep_flags = pw_sweep_flags(2);
    pub const PW_SWEEP_ADD_SECOND: pw_sweep_flags = pw_sweep_flags(4);
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_sweep_flags(pub ::core::ffi::c_uint);
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_sweep {
    pub extents: [u32; 4usize],
    pub inputs: [pw_part; 16usize],
    pub outputs: [pw_part; 16usize],
    pub second: pw_part,
    pub d: pw_part,
    pub d_second: pw_part,
    pub map: *const u32,
    pub second_map: *const u32,
    pub bits: *mut u32,
    pub outside: f32,
    pub lo: f32,
    pub hi: f32,
    pub flags: u32,
    pub sums: *mut f64,
    pub of_norm: *mut f32,
    pub positions: u32,
    pub group: u32,
    pub chunk: u32,
    pub rows: u32,
    pub axis_count: u32,
    pub input_count: u32,
    pub output_count: u32,
    pub stage_count: u32,
    pub first_stage: u32,
    pub summed: u32,
    pub norm_unit: u32,
    pub reserved: u32,
    pub stages: [pw_stage; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_sweep"][::core::mem::size_of::<pw_sweep>() - 3256usize];
    ["Alignment of pw_sweep"][::core::mem::align_of::<pw_sweep>() - 8usize];
    ["Offset of field: pw_sweep::extents"][::core::mem::offset_of!(pw_sweep, extents) - 0usize];
    ["Offset of field: pw_sweep::inputs"][::core::mem::offset_of!(pw_sweep, inputs) - 16usize];
    ["Offset of field: pw_sweep::outputs"][::core::mem::offset_of!(pw_sweep, outputs) - 1040usize];
    ["Offset of field: pw_sweep::second"][::core::mem::offset_of!(pw_sweep, second) - 2064usize];
    ["Offset of field: pw_sweep::d"][::core::mem::offset_of!(pw_sweep, d) - 2128usize];
    ["Offset of field: pw_sweep::d_second"]
        [::core::mem::offset_of!(pw_sweep, d_second) - 2192usize];
    ["Offset of field: pw_sweep::map"][::core::mem::offset_of!(pw_sweep, map) - 2256usize];
    ["Offset of field: pw_sweep::second_map"]
        [::core::mem::offset_of!(pw_sweep, second_map) - 2264usize];
    ["Offset of field: pw_sweep::bits"][::core::mem::offset_of!(pw_sweep, bits) - 2272usize];
    ["Offset of field: pw_sweep::outside"][::core::mem::offset_of!(pw_sweep, outside) - 2280usize];
    ["Offset of field: pw_sweep::lo"][::core::mem::offset_of!(pw_sweep, lo) - 2284usize];
    ["Offset of field: pw_sweep::hi"][::core::mem::offset_of!(pw_sweep, hi) - 2288usize];
    ["Offset of field: pw_sweep::flags"][::core::mem::offset_of!(pw_sweep, flags) - 2292usize];
    ["Offset of field: pw_sweep::sums"][::core::mem::offset_of!(pw_sweep, sums) - 2296usize];
    ["Offset of field: pw_sweep::of_norm"][::core::mem::offset_of!(pw_sweep, of_norm) - 2304usize];
    ["Offset of field: pw_sweep::positions"]
        [::core::mem::offset_of!(pw_sweep, positions) - 2312usize];
    ["Offset of field: pw_sweep::group"][::core::mem::offset_of!(pw_sweep, group) - 2316usize];
    ["Offset of field: pw_sweep::chunk"][::core::mem::offset_of!(pw_sweep, chunk) - 2320usize];
    ["Offset of field: pw_sweep::rows"][::core::mem::offset_of!(pw_sweep, rows) - 2324usize];
    ["Offset of field: pw_sweep::axis_count"]
        [::core::mem::offset_of!(pw_sweep, axis_count) - 2328usize];
    ["Offset of field: pw_sweep::input_count"]
        [::core::mem::offset_of!(pw_sweep, input_count) - 2332usize];
    ["Offset of field: pw_sweep::output_count"]
        [::core::mem::offset_of!(pw_sweep, output_count) - 2336usize];
    ["Offset of field: pw_sweep::stage_count"]
        [::core::mem::offset_of!(pw_sweep, stage_count) - 2340usize];
    ["Offset of field: pw_sweep::first_stage"]
        [::core::mem::offset_of!(pw_sweep, first_stage) - 2344usize];
    ["Offset of field: pw_sweep::summed"][::core::mem::offset_of!(pw_sweep, summed) - 2348usize];
    ["Offset of field: pw_sweep::norm_unit"]
        [::core::mem::offset_of!(pw_sweep, norm_unit) - 2352usize];
    ["Offset of field: pw_sweep::reserved"]
        [::core::mem::offset_of!(pw_sweep, reserved) - 2356usize];
    ["Offset of field: pw_sweep::stages"][::core::mem::offset_of!(pw_sweep, stages) - 2360usize];
};
impl Default for pw_sweep {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_sum {
    pub from: *const f64,
    pub to: *mut f64,
    pub to_f32: *mut f32,
    pub outputs: i64,
    pub items: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_sum"][::core::mem::size_of::<pw_sum>() - 40usize];
    ["Alignment of pw_sum"][::core::mem::align_of::<pw_sum>() - 8usize];
    ["Offset of field: pw_sum::from"][::core::mem::offset_of!(pw_sum, from) - 0usize];
    ["Offset of field: pw_sum::to"][::core::mem::offset_of!(pw_sum, to) - 8usize];
    ["Offset of field: pw_sum::to_f32"][::core::mem::offset_of!(pw_sum, to_f32) - 16usize];
    ["Offset of field: pw_sum::outputs"][::core::mem::offset_of!(pw_sum, outputs) - 24usize];
    ["Offset of field: pw_sum::items"][::core::mem::offset_of!(pw_sum, items) - 32usize];
};
impl Default for pw_sum {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_wgrad {
    pub extents: [u32; 4usize],
    pub d: pw_part,
    pub src: pw_part,
    pub to: *mut f32,
    pub positions: u32,
    pub chunk: u32,
    pub axis_count: u32,
    pub groups: u32,
    pub rows: u32,
    pub depth: u32,
    pub splits: u32,
    pub d_read: pw_read,
    pub src_read: pw_read,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_wgrad"][::core::mem::size_of::<pw_wgrad>() - 192usize];
    ["Alignment of pw_wgrad"][::core::mem::align_of::<pw_wgrad>() - 8usize];
    ["Offset of field: pw_wgrad::extents"][::core::mem::offset_of!(pw_wgrad, extents) - 0usize];
    ["Offset of field: pw_wgrad::d"][::core::mem::offset_of!(pw_wgrad, d) - 16usize];
    ["Offset of field: pw_wgrad::src"][::core::mem::offset_of!(pw_wgrad, src) - 80usize];
    ["Offset of field: pw_wgrad::to"][::core::mem::offset_of!(pw_wgrad, to) - 144usize];
    ["Offset of field: pw_wgrad::positions"]
        [::core::mem::offset_of!(pw_wgrad, positions) - 152usize];
    ["Offset of field: pw_wgrad::chunk"][::core::mem::offset_of!(pw_wgrad, chunk) - 156usize];
    ["Offset of field: pw_wgrad::axis_count"]
        [::core::mem::offset_of!(pw_wgrad, axis_count) - 160usize];
    ["Offset of field: pw_wgrad::groups"][::core::mem::offset_of!(pw_wgrad, groups) - 164usize];
    ["Offset of field: pw_wgrad::rows"][::core::mem::offset_of!(pw_wgrad, rows) - 168usize];
    ["Offset of field: pw_wgrad::depth"][::core::mem::offset_of!(pw_wgrad, depth) - 172usize];
    ["Offset of field: pw_wgrad::splits"][::core::mem::offset_of!(pw_wgrad, splits) - 176usize];
    ["Offset of field: pw_wgrad::d_read"][::core::mem::offset_of!(pw_wgrad, d_read) - 180usize];
    ["Offset of field: pw_wgrad::src_read"][::core::mem::offset_of!(pw_wgrad, src_read) - 184usize];
    ["Offset of field: pw_wgrad::reserved"][::core::mem::offset_of!(pw_wgrad, reserved) - 188usize];
};
impl Default for pw_wgrad {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_wgrad_sum {
    pub from: *const f32,
    pub to: *mut f32,
    pub values: i64,
    pub splits: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_wgrad_sum"][::core::mem::size_of::<pw_wgrad_sum>() - 32usize];
    ["Alignment of pw_wgrad_sum"][::core::mem::align_of::<pw_wgrad_sum>() - 8usize];
    ["Offset of field: pw_wgrad_sum::from"][::core::mem::offset_of!(pw_wgrad_sum, from) - 0usize];
    ["Offset of field: pw_wgrad_sum::to"][::core::mem::offset_of!(pw_wgrad_sum, to) - 8usize];
    ["Offset of field: pw_wgrad_sum::values"]
        [::core::mem::offset_of!(pw_wgrad_sum, values) - 16usize];
    ["Offset of field: pw_wgrad_sum::splits"]
        [::core::mem::offset_of!(pw_wgrad_sum, splits) - 24usize];
    ["Offset of field: pw_wgrad_sum::reserved"]
        [::core::mem::offset_of!(pw_wgrad_sum, reserved) - 28usize];
};
impl Default for pw_wgrad_sum {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
