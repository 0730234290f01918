//! Measures what the planner only estimates: which kernel and order run a problem fastest.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::cpu::epilogue::ChannelAxis;
use crate::cpu::gemm::{Layer, run};
use crate::cpu::microkernel::Kernel;
use crate::cpu::pack::Read;
use crate::cpu::plan::{Order, Plan};
use crate::dtype::{DType, Element};
use crate::problem::{LayerShape, Problem};
use crate::tuning::{Entry, Tuning};

/// How long the contenders of a problem are timed, all together.
const TIME: Duration = Duration::from_millis(20);
/// How long the calls last that are timed as one, so that the clock's own time does not count.
const TURN: Duration = Duration::from_micros(10);
/// What is faster by less may be so by chance; the planner's choice then stays.
const GAIN: f64 = 0.02;

/// A problem as the choice of kernel and order sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub dtype: DType,
    pub groups: usize,
    /// Input channels of a group.
    pub k: usize,
    /// Output channels of a group.
    pub rows: usize,
    pub samples: usize,
    pub positions: usize,
    pub axis: ChannelAxis,
    pub read: Read,
}

/// What differs between the problems of one layer: positions, samples, and how they are read.
type LeftOpen = (usize, usize, ChannelAxis, Read);

/// What choices are sorted by.
fn order((positions, samples, axis, read): LeftOpen) -> (usize, usize, u8, u8) {
    (positions, samples, axis as u8, read as u8)
}

/// A kernel and an order for one problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub key: Key,
    pub kernel: &'static Kernel,
    pub order: Order,
}

/// The choices of one layer, which differ in what its weight leaves open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choices(Vec<Choice>);

impl Choices {
    /// Those that were made for the layer's device, instruction set and weight, with kernels that
    /// there are.
    pub(crate) fn of(layer: &Layer, shape: &LayerShape, tuning: &Tuning) -> Self {
        let device = device(layer);
        let (groups, k, rows) = (shape.groups, shape.k(), shape.c_out / shape.groups);
        let choice = |entry: &Entry| {
            let key: Key = entry.problem.parse().ok()?;
            let kernel = layer.kernels().find(|kernel| kernel.name == entry.kernel)?;
            let order = ORDERS.into_iter().find(|order| order.word() == entry.order)?;
            let fits = entry.device == device
                && key.dtype == layer.dtype()
                && (key.groups, key.k, key.rows) == (groups, k, rows);
            fits.then_some(Choice { key, kernel, order })
        };
        let mut choices: Vec<_> = tuning.entries().iter().filter_map(choice).collect();
        choices.sort_unstable_by_key(|choice| order(choice.key.left_open()));
        Choices(choices)
    }

    /// The choice for a problem, if there is one.
    pub(crate) fn find(&self, open: LeftOpen) -> Option<&Choice> {
        let key = |choice: &Choice| order(choice.key.left_open());
        let index = self.0.binary_search_by_key(&order(open), key).ok()?;
        Some(&self.0[index])
    }
}

const ORDERS: [Order; 2] = [Order::ChannelsOuter, Order::PositionsOuter];

impl Order {
    fn word(self) -> &'static str {
        match self {
            Order::ChannelsOuter => "channels_outer",
            Order::PositionsOuter => "positions_outer",
        }
    }
}

/// Times every kernel and order on a problem that may be run any number of times.
pub(crate) fn tune<T: Element>(layer: &Layer, problem: &Problem<'_, T>) -> Entry {
    let plain = layer.with(None, Choices::default());
    let plan = plain.plan(problem, None);
    let key = Key::of(&plan, problem);
    struct Contender {
        choice: Choice,
        layer: Layer,
        seconds: f64,
    }
    let mut contenders: Vec<Contender> = layer
        .kernels()
        .flat_map(|kernel| ORDERS.map(|order| Choice { key, kernel, order }))
        .map(|choice| {
            let layer = plain.with(None, Choices(vec![choice]));
            Contender { choice, layer, seconds: f64::INFINITY }
        })
        .collect();
    let time = |contender: &Contender, calls: u32| {
        let start = Instant::now();
        (0..calls).for_each(|_| run(&[(&contender.layer, problem)]));
        start.elapsed()
    };
    // What a layer allocates, it allocates now; the second call says how many are a turn.
    let mut calls = 1;
    for contender in &contenders {
        time(contender, 1);
        let once = time(contender, 1).max(Duration::from_nanos(20));
        calls = calls.max(TURN.as_nanos().div_ceil(once.as_nanos()) as u32);
    }
    let start = Instant::now();
    let mut round = 0;
    while round < 2 || start.elapsed() < TIME {
        // Forth and back, so that nobody always follows the same neighbour.
        for i in 0..contenders.len() {
            let i = if round % 2 == 0 { i } else { contenders.len() - 1 - i };
            let seconds = time(&contenders[i], calls).as_secs_f64() / f64::from(calls);
            contenders[i].seconds = contenders[i].seconds.min(seconds);
        }
        round += 1;
    }
    let is_planned = |contender: &&Contender| {
        let Choice { kernel, order, .. } = contender.choice;
        std::ptr::eq(kernel, plan.kernel) && order == plan.order
    };
    let planned = contenders.iter().find(is_planned);
    let planned = planned.expect("the planner chooses among the same kernels and orders");
    let best = contenders.iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let best = best.filter(|best| best.seconds < planned.seconds * (1.0 - GAIN)).unwrap_or(planned);
    let ns = |contender: &Contender| (contender.seconds * 1e9).round() as u64;
    Entry {
        device: device(layer),
        problem: key.to_string(),
        kernel: best.choice.kernel.name.into(),
        order: best.choice.order.word().into(),
        ns: ns(best),
        planned_ns: ns(planned),
    }
}

/// What times depend on beside the problem.
fn device(layer: &Layer) -> String {
    format!("cpu {} {} threads={}", model(), layer.isa().name(), layer.threads())
}

/// The CPU's name, as far as it tells.
#[cfg(target_arch = "x86_64")]
fn model() -> String {
    use std::arch::x86_64::__cpuid;
    #[allow(unused_unsafe, reason = "the minimum supported Rust has it unsafe")]
    let leaf = |leaf: u32| {
        // SAFETY: every x86-64 CPU has the instruction, and leaf 0x8000_0000 says what there is.
        let words = unsafe { __cpuid(leaf) };
        [words.eax, words.ebx, words.ecx, words.edx]
    };
    if leaf(0x8000_0000)[0] < 0x8000_0004 {
        return std::env::consts::ARCH.into();
    }
    let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .flat_map(leaf)
        .flat_map(u32::to_le_bytes)
        .take_while(|&byte| byte != 0)
        .collect();
    let name = String::from_utf8_lossy(&bytes);
    name.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(not(target_arch = "x86_64"))]
fn model() -> String {
    std::env::consts::ARCH.into()
}

impl Key {
    /// The problem that a plan was made for.
    fn of<T: Element>(plan: &Plan, problem: &Problem<'_, T>) -> Self {
        Key {
            dtype: T::DTYPE,
            groups: problem.groups,
            k: problem.k(),
            rows: problem.c_out / problem.groups,
            samples: plan.samples,
            positions: plan.positions,
            axis: plan.axis,
            read: plan.read,
        }
    }

    fn left_open(&self) -> LeftOpen {
        (self.positions, self.samples, self.axis, self.read)
    }
}

const AXES: [(ChannelAxis, &str); 2] =
    [(ChannelAxis::Rows, "positions"), (ChannelAxis::Lanes, "channels")];
const READS: [(Read, &str); 3] = [
    (Read::InPlace, "in_place"),
    (Read::ByChannel, "by_channel"),
    (Read::ByPosition, "by_position"),
];

fn word<T: PartialEq>(words: &[(T, &'static str)], of: T) -> &'static str {
    words.iter().find(|(value, _)| *value == of).map_or("", |(_, word)| word)
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { dtype, groups, k, rows, samples, positions, axis, read } = *self;
        let (lanes, src) = (word(&AXES, axis), word(&READS, read));
        write!(
            f,
            "groups={groups} k={k} rows={rows} samples={samples} positions={positions} \
             lanes={lanes} src={src}"
        )?;
        match dtype {
            DType::F32 => Ok(()),
            _ => write!(f, " dtype={dtype}"),
        }
    }
}

impl FromStr for Key {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split(' ');
        let mut next = |name: &str| {
            let (key, value) = words.next()?.split_once('=')?;
            (key == name).then_some(value)
        };
        let mut key = || {
            let mut number = |name| next(name)?.parse().ok();
            let mut key = Key {
                dtype: DType::F32,
                groups: number("groups")?,
                k: number("k")?,
                rows: number("rows")?,
                samples: number("samples")?,
                positions: number("positions")?,
                axis: next("lanes").and_then(|lanes| named(&AXES, lanes))?,
                read: next("src").and_then(|src| named(&READS, src))?,
            };
            if let Some(dtype) = next("dtype") {
                key.dtype = dtype.parse().ok()?;
            }
            Some(key)
        };
        key().ok_or(())
    }
}

fn named<T: Copy>(words: &[(T, &'static str)], name: &str) -> Option<T> {
    words.iter().find(|(_, word)| *word == name).map(|(value, _)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_being_written() {
        for ((axis, _), dtype) in
            AXES.into_iter().flat_map(|a| DType::ALL.iter().map(move |&dtype| (a, dtype)))
        {
            for (read, _) in READS {
                let (groups, k, rows, samples, positions) = (2, 3, 5, 7, 11);
                let key = Key { dtype, groups, k, rows, samples, positions, axis, read };
                assert_eq!(key.to_string().parse(), Ok(key));
            }
        }
        for text in ["", "groups=1", "groups=1 k=x rows=1 samples=1 positions=1 lanes=a src=b"] {
            assert_eq!(text.parse::<Key>(), Err(()));
        }
    }
}
