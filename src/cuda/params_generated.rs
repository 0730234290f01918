pub const PW_MAX_AXES: u32 = 4;
pub const PW_INLINE_STEPS: u32 = 8;
pub const PW_ROW_ALIGN: u32 = 4;
impl pw_op {
    pub const PW_OP_AFFINE: pw_op = pw_op(0);
    pub const PW_OP_PRELU: pw_op = pw_op(1);
    pub const PW_OP_RESIDUAL: pw_op = pw_op(2);
    pub const PW_OP_CLIP: pw_op = pw_op(3);
    pub const PW_OP_LEAKY_RELU: pw_op = pw_op(4);
    pub const PW_OP_ELU: pw_op = pw_op(5);
    pub const PW_OP_SIGMOID: pw_op = pw_op(6);
    pub const PW_OP_TANH: pw_op = pw_op(7);
    pub const PW_OP_SILU: pw_op = pw_op(8);
    pub const PW_OP_GELU: pw_op = pw_op(9);
    pub const PW_OP_GELU_TANH: pw_op = pw_op(10);
    pub const PW_OP_HARD_SIGMOID: pw_op = pw_op(11);
    pub const PW_OP_HARD_SWISH: pw_op = pw_op(12);
    pub const PW_OP_SOFTPLUS: pw_op = pw_op(13);
    pub const PW_OP_MISH: pw_op = pw_op(14);
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
}
#[repr(transparent)]
#[derive(Debug, Copy, Clone, Hash, PartialEq, Eq)]
pub struct pw_flags(pub ::core::ffi::c_uint);
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct pw_axis {
    pub extent: i64,
    pub src: i64,
    pub dst: i64,
    pub residual: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_axis"][::core::mem::size_of::<pw_axis>() - 32usize];
    ["Alignment of pw_axis"][::core::mem::align_of::<pw_axis>() - 8usize];
    ["Offset of field: pw_axis::extent"][::core::mem::offset_of!(pw_axis, extent) - 0usize];
    ["Offset of field: pw_axis::src"][::core::mem::offset_of!(pw_axis, src) - 8usize];
    ["Offset of field: pw_axis::dst"][::core::mem::offset_of!(pw_axis, dst) - 16usize];
    ["Offset of field: pw_axis::residual"][::core::mem::offset_of!(pw_axis, residual) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct pw_fprop {
    pub axes: [pw_axis; 4usize],
    pub positions: i64,
    pub src_channel: i64,
    pub dst_channel: i64,
    pub residual_channel: i64,
    pub src: *const f32,
    pub weight: *const f32,
    pub bias: *const f32,
    pub dst: *mut f32,
    pub residual: *const f32,
    pub dst_map: *const u32,
    pub residual_map: *const u32,
    pub more_steps: *const pw_step,
    pub partial: *mut f32,
    pub arrived: *mut u32,
    pub groups: u32,
    pub rows: u32,
    pub depth: u32,
    pub row_pitch: u32,
    pub axis_count: u32,
    pub step_count: u32,
    pub read: pw_read,
    pub epilogue: pw_epilogue,
    pub flags: u32,
    pub clip_lo: f32,
    pub clip_hi: f32,
    pub splits: u32,
    pub steps: [pw_step; 8usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of pw_fprop"][::core::mem::size_of::<pw_fprop>() - 544usize];
    ["Alignment of pw_fprop"][::core::mem::align_of::<pw_fprop>() - 8usize];
    ["Offset of field: pw_fprop::axes"][::core::mem::offset_of!(pw_fprop, axes) - 0usize];
    ["Offset of field: pw_fprop::positions"]
        [::core::mem::offset_of!(pw_fprop, positions) - 128usize];
    ["Offset of field: pw_fprop::src_channel"]
        [::core::mem::offset_of!(pw_fprop, src_channel) - 136usize];
    ["Offset of field: pw_fprop::dst_channel"]
        [::core::mem::offset_of!(pw_fprop, dst_channel) - 144usize];
    ["Offset of field: pw_fprop::residual_channel"]
        [::core::mem::offset_of!(pw_fprop, residual_channel) - 152usize];
    ["Offset of field: pw_fprop::src"][::core::mem::offset_of!(pw_fprop, src) - 160usize];
    ["Offset of field: pw_fprop::weight"][::core::mem::offset_of!(pw_fprop, weight) - 168usize];
    ["Offset of field: pw_fprop::bias"][::core::mem::offset_of!(pw_fprop, bias) - 176usize];
    ["Offset of field: pw_fprop::dst"][::core::mem::offset_of!(pw_fprop, dst) - 184usize];
    ["Offset of field: pw_fprop::residual"][::core::mem::offset_of!(pw_fprop, residual) - 192usize];
    ["Offset of field: pw_fprop::dst_map"][::core::mem::offset_of!(pw_fprop, dst_map) - 200usize];
    ["Offset of field: pw_fprop::residual_map"]
        [::core::mem::offset_of!(pw_fprop, residual_map) - 208usize];
    ["Offset of field: pw_fprop::more_steps"]
        [::core::mem::offset_of!(pw_fprop, more_steps) - 216usize];
    ["Offset of field: pw_fprop::partial"][::core::mem::offset_of!(pw_fprop, partial) - 224usize];
    ["Offset of field: pw_fprop::arrived"][::core::mem::offset_of!(pw_fprop, arrived) - 232usize];
    ["Offset of field: pw_fprop::groups"][::core::mem::offset_of!(pw_fprop, groups) - 240usize];
    ["Offset of field: pw_fprop::rows"][::core::mem::offset_of!(pw_fprop, rows) - 244usize];
    ["Offset of field: pw_fprop::depth"][::core::mem::offset_of!(pw_fprop, depth) - 248usize];
    ["Offset of field: pw_fprop::row_pitch"]
        [::core::mem::offset_of!(pw_fprop, row_pitch) - 252usize];
    ["Offset of field: pw_fprop::axis_count"]
        [::core::mem::offset_of!(pw_fprop, axis_count) - 256usize];
    ["Offset of field: pw_fprop::step_count"]
        [::core::mem::offset_of!(pw_fprop, step_count) - 260usize];
    ["Offset of field: pw_fprop::read"][::core::mem::offset_of!(pw_fprop, read) - 264usize];
    ["Offset of field: pw_fprop::epilogue"][::core::mem::offset_of!(pw_fprop, epilogue) - 268usize];
    ["Offset of field: pw_fprop::flags"][::core::mem::offset_of!(pw_fprop, flags) - 272usize];
    ["Offset of field: pw_fprop::clip_lo"][::core::mem::offset_of!(pw_fprop, clip_lo) - 276usize];
    ["Offset of field: pw_fprop::clip_hi"][::core::mem::offset_of!(pw_fprop, clip_hi) - 280usize];
    ["Offset of field: pw_fprop::splits"][::core::mem::offset_of!(pw_fprop, splits) - 284usize];
    ["Offset of field: pw_fprop::steps"][::core::mem::offset_of!(pw_fprop, steps) - 288usize];
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
