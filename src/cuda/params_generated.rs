pub const PW_MAX_AXES: u32 = 4;
pub const PW_MAX_SOURCES: u32 = 16;
pub const PW_INLINE_STEPS: u32 = 8;
pub const PW_INLINE_SOURCE_STEPS: u32 = 4;
pub const PW_ROW_ALIGN: u32 = 4;
pub const PW_ROW_ALIGN_16BIT: u32 = 8;
pub const PW_MERGED: u32 = 1024;
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
    pub reserved: u32,
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
    ["Offset of field: pw_norm::reserved"][::core::mem::offset_of!(pw_norm, reserved) - 36usize];
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
