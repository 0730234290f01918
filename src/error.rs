use std::fmt;

/// Everything that can go wrong; each variant carries the values that explain it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor's rank is outside `[n, c]` to `[n, c, d, h, w]`, or differs from its source's.
    #[error("{tensor} has rank {got}, expected {expected}")]
    Rank {
        /// Which tensor.
        tensor: &'static str,
        /// What was allowed.
        expected: &'static str,
        /// The rank that was given.
        got: usize,
    },
    /// A tensor has not as many strides as axes.
    #[error("{tensor} has {} axes (shape {shape:?}) and {} strides ({strides:?})", shape.len(), strides.len())]
    StrideCount {
        /// Which tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// The strides that were given.
        strides: Vec<isize>,
    },
    /// A tensor has no such channels.
    #[error("channels {start}..{end} of a tensor of {channels}")]
    ChannelRange {
        /// The first of them.
        start: usize,
        /// The one behind the last.
        end: usize,
        /// The tensor's channels.
        channels: usize,
    },
    /// A tensor's shape is not the one that the layer and its source call for.
    #[error("{tensor} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Which tensor.
        tensor: &'static str,
        /// The shape that was expected.
        expected: Vec<usize>,
        /// The shape that was given.
        got: Vec<usize>,
    },
    /// The source's channels do not fit the weight's.
    #[error(
        "weight has {weight} input channels per group, src has {src} / {groups} groups = {}",
        Quotient(*src, *groups)
    )]
    Channels {
        /// Input channels per group that the weight was built for.
        weight: usize,
        /// Channels of the source (of all sources together, if several stand for a
        /// concatenation).
        src: usize,
        /// Groups of the layer.
        groups: usize,
    },
    /// The number of groups does not divide a number of channels.
    #[error("{groups} groups do not divide {channels} {what}")]
    Groups {
        /// The groups that were asked for.
        groups: usize,
        /// The channels to be divided.
        channels: usize,
        /// Which channels these are.
        what: &'static str,
    },
    /// A tensor has no channels.
    #[error("{tensor} has no channels: shape {shape:?}")]
    NoChannels {
        /// Which tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A per-channel parameter has the wrong length.
    #[error("{parameter} has {got} values, expected {expected}")]
    ParameterLength {
        /// Which parameter.
        parameter: &'static str,
        /// One value per channel of this many channels.
        expected: usize,
        /// The length that was given.
        got: usize,
    },
    /// A parameter has a value that makes no sense.
    #[error("{parameter} is {value}, expected {expected}")]
    ParameterValue {
        /// Which parameter, and where.
        parameter: String,
        /// The value, as it was given.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A tensor's elements are of another type than the layer was built for.
    #[error("{tensor} has elements of type {got}, the layer has {expected}")]
    ElementType {
        /// Which tensor.
        tensor: &'static str,
        /// The layer's type.
        expected: &'static str,
        /// The tensor's type.
        got: &'static str,
    },
    /// A sum of products of 8-bit integers may not fit an i32.
    #[error(
        "sums of output channel {channel} may reach {sum}, beyond an i32: {terms} input channels, \
         bias {bias}"
    )]
    SumOverflow {
        /// The output channel.
        channel: usize,
        /// The sum that is farthest from zero, with or without the bias.
        sum: i64,
        /// Input channels per group.
        terms: usize,
        /// The channel's bias.
        bias: i32,
    },
    /// A stage that may stand once in a layer stands twice.
    #[error("stage {stage} stands twice in the list; a layer takes it once")]
    RepeatedStage {
        /// The stage, in snake case.
        stage: &'static str,
    },
    /// A size product does not fit the address space, or memory.
    #[error("{what} is too large: {sizes:?} does not fit memory")]
    TooLarge {
        /// What was to be computed.
        what: &'static str,
        /// The factors.
        sizes: Vec<usize>,
    },
    /// A slice is too short for the shape and strides that were to be laid over it.
    #[error(
        "{tensor}: shape {shape:?} with strides {strides:?} reaches elements {first}..={last}, \
         the slice holds {len}"
    )]
    OutOfBounds {
        /// Which tensor.
        tensor: &'static str,
        /// The shape.
        shape: Vec<usize>,
        /// The strides, in elements.
        strides: Vec<isize>,
        /// The lowest element that is reached.
        first: isize,
        /// The highest element that is reached.
        last: isize,
        /// Elements in the slice.
        len: usize,
    },
    /// Two positions of a tensor that is written to share an element.
    #[error("{tensor}'s positions overlap: shape {shape:?} with strides {strides:?}")]
    Overlap {
        /// Which tensor.
        tensor: &'static str,
        /// The shape.
        shape: Vec<usize>,
        /// The strides, in elements.
        strides: Vec<isize>,
    },
    /// The result would be written over a tensor that is still to be read.
    #[error("{written} shares memory with {tensor}; in-place operation is not possible")]
    Aliased {
        /// The tensor that is written: dst, or the gradient by an input.
        written: &'static str,
        /// The tensor that is read, or written as well.
        tensor: &'static str,
    },
    /// The layer's description calls for a tensor that the call did not give.
    #[error("the layer has a {input} stage, but the call gave no {input} tensor")]
    MissingInput {
        /// Which tensor.
        input: &'static str,
    },
    /// A sequence or a set of branches without a layer in it.
    #[error("there are no layers to put together")]
    NoLayers,
    /// The call gave a tensor that the layer's description has no use for.
    #[error("the call gave a {input} tensor, but the layer has no {input} stage")]
    UnexpectedInput {
        /// Which tensor.
        input: &'static str,
    },
    /// A range of channels does not fit.
    #[error("channels {start}..{end} of a partial convolution do not fit: {reason}")]
    PartialRange {
        /// First channel that is convolved.
        start: usize,
        /// One past the last.
        end: usize,
        /// What it does not fit.
        reason: String,
    },
    /// A tensor lives on another device than the layer.
    #[error("{tensor} is on {got}, expected on {expected}")]
    WrongDevice {
        /// Which tensor, or what else lives on a device.
        tensor: &'static str,
        /// The device of the layer, or the one that was asked for.
        expected: String,
        /// The device that it is on.
        got: String,
    },
    /// A device cannot do this (yet).
    #[error("{device} does not support {what}")]
    Unsupported {
        /// The device.
        device: String,
        /// What was asked for.
        what: String,
    },
    /// No kernel of this name accepts the problem.
    #[error("kernel {kernel:?} cannot run this problem: {reason}")]
    Kernel {
        /// The name that was forced.
        kernel: String,
        /// Why it was refused.
        reason: String,
    },
    /// An environment variable has a value that is not understood, or not possible here.
    #[error("{variable}={value}: {reason}")]
    Environment {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A device was asked for that is not there.
    #[error("no device {device}: {reason}")]
    NoDevice {
        /// The device, as `cuda:0`.
        device: String,
        /// Why not.
        reason: String,
    },
    /// A call of the CUDA driver failed. A device's fault shows at a later call than the one that
    /// caused it; what follows it is [`DeviceLost`](Self::DeviceLost).
    #[error("{call} failed: {name} ({code})")]
    Cuda {
        /// The driver's function.
        call: &'static str,
        /// The driver's code.
        code: u32,
        /// The driver's name for the code.
        name: &'static str,
    },
    /// A fault has ended everything on a device for this process: an address that is not there, a
    /// kernel that did not end, an error of the hardware. Other devices and the CPU go on.
    #[error(
        "{device} is lost to this process since {call} failed: {name} ({code}); a new process can \
         use it again"
    )]
    DeviceLost {
        /// The device, as `cuda:0 (NVIDIA H200)`.
        device: String,
        /// The driver's function that reported the fault first.
        call: &'static str,
        /// The driver's code.
        code: u32,
        /// The driver's name for the code.
        name: &'static str,
    },
    /// A device's memory, or the host memory that it can copy from, is used up. What is in it stays
    /// as it is, and smaller calls go on.
    #[error("{device} is out of memory: no {bytes} bytes for {what}")]
    DeviceMemory {
        /// The device, as `cuda:0 (NVIDIA H200)`.
        device: String,
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    /// A pointer that no element of the tensor's type can have.
    #[error("{tensor} begins at {address:#x}, which is no multiple of {alignment} bytes")]
    Misaligned {
        /// Which tensor.
        tensor: &'static str,
        /// Its first element.
        address: usize,
        /// What the address must be a multiple of, in bytes.
        alignment: usize,
    },
    /// The text of a [`Tuning`](crate::Tuning) has a line that is no entry.
    #[error("line {line} of a tuning is {text:?}, expected {expected}")]
    Tuning {
        /// The line, counted from one.
        line: usize,
        /// What stands there.
        text: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A workspace does not fit the backward pass that it was given to.
    #[error("the workspace does not fit this backward pass: {reason}")]
    Workspace {
        /// Why not.
        reason: String,
    },
    /// Batch statistics of a single value per channel, whose variance would be zero.
    #[error("batch statistics need more than one value per channel, src has shape {shape:?}")]
    BatchTooSmall {
        /// src's shape.
        shape: Vec<usize>,
    },
    /// A mean or a variance of a batch is infinite or NaN: src or the weight has such values, or
    /// values too large to be squared.
    #[error("{what} is {value} in channel {channel}")]
    NonFinite {
        /// Which statistic.
        what: String,
        /// The first channel that has it.
        channel: usize,
        /// Its value.
        value: f32,
    },
    /// A sum over several workers is not possible any more.
    #[error("all-reduce: {reason}")]
    AllReduce {
        /// Why not.
        reason: String,
    },
    /// A checkpoint could not be read.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// A checkpoint has no tensor of this name.
    #[error("the checkpoint has no tensor {name:?}")]
    MissingTensor {
        /// The name.
        name: String,
    },
    /// A checkpoint's tensor has a shape or a dtype that cannot be used for what it is.
    #[error("the checkpoint's tensor {name:?} is {dtype} {shape:?}, expected {expected}")]
    CheckpointTensor {
        /// Its name.
        name: String,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What would have been accepted.
        expected: &'static str,
    },
}

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

struct Quotient(usize, usize);

impl fmt::Display for Quotient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Quotient(_, 0) => f.write_str("undefined"),
            Quotient(a, b) if a % b == 0 => write!(f, "{}", a / b),
            Quotient(a, b) => write!(f, "{} remainder {}", a / b, a % b),
        }
    }
}
