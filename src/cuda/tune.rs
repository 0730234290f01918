//! Measures what the planner only estimates: which kernel, and in how many splits, runs a problem
//! fastest.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;

use super::call::Call;
use super::device::CudaDevice;
use super::facts::Facts;
use super::layer::Layer;
use super::memory::Buffer;
use super::plan::{self, Choice, KERNELS, Letters};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::problem::{LayerShape, Problem};
use crate::tuning::{Entry, Tuning};

/// How long the contenders of a problem are timed, all together.
const TIME: Duration = Duration::from_millis(20);
/// How long the calls last on the device that are timed as one, in seconds: many times what an event
/// can tell.
const TURN: f64 = 50e-6;
/// The most calls of a turn: fewer than wait in a stream before a call blocks.
const MOST_CALLS: f64 = 100.0;
/// What has taken this many times as long as the fastest at first is out.
const HOPELESS: f64 = 1.5;
/// What is faster by less may be so by chance; the planner's choice then stays.
const GAIN: f64 = 0.02;

/// A problem as the choice sees it, and how many samples its positions are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    dtype: DType,
    tf32: bool,
    samples: u64,
    letters: Letters,
}

/// What differs between the problems of one layer.
type LeftOpen = (u64, u64, bool);

impl Key {
    fn of(call: &Call, dtype: DType, tf32: bool) -> Self {
        Key { dtype, tf32, samples: call.extents[0], letters: call.letters() }
    }

    fn left_open(&self) -> LeftOpen {
        (self.letters.positions, self.samples, self.letters.channels_fast)
    }
}

/// The choices of one layer, sorted by what its weight leaves open.
#[derive(Clone, Debug, Default)]
pub(super) struct Choices(Arc<[(LeftOpen, Choice)]>);

impl Choices {
    /// Those that were made for the layer's device and weight, with kernels that run it.
    pub(super) fn of(layer: &Layer, shape: &LayerShape, tuning: &Tuning) -> Self {
        let device = device_name(layer.device());
        let (groups, depth, rows) = (shape.groups, shape.k(), shape.c_out / shape.groups);
        let choice = |entry: &Entry| {
            let key: Key = entry.problem.parse().ok()?;
            let letters = key.letters;
            let fits = entry.device == device
                && (key.dtype, key.tf32) == (layer.terms().dtype, layer.terms().tf32)
                && [letters.groups, letters.depth, letters.rows].map(|n| n as usize)
                    == [groups, depth, rows];
            if !fits {
                return None;
            }
            let splits = entry.order.strip_prefix("splits=")?.parse::<u32>().ok()?;
            let choice = allowed(layer, &letters)
                .find(|c| KERNELS[c.kernel].name == entry.kernel && c.splits == splits)?;
            Some((key.left_open(), choice))
        };
        let mut choices: Vec<_> = tuning.entries().iter().filter_map(choice).collect();
        choices.sort_unstable_by_key(|&(open, _)| open);
        Choices(choices.into())
    }

    /// The choice for a call, if there is one.
    pub(super) fn find(&self, call: &Call) -> Option<Choice> {
        if self.0.is_empty() {
            return None;
        }
        let letters = call.letters();
        let open = (letters.positions, call.extents[0], letters.channels_fast);
        let index = self.0.binary_search_by_key(&open, |&(open, _)| open).ok()?;
        Some(self.0[index].1)
    }
}

/// Every way in which a layer may run a problem.
fn allowed(layer: &Layer, letters: &Letters) -> impl Iterator<Item = Choice> {
    plan::allowed(letters, layer.device().facts(), layer.terms()).into_iter()
}

/// Times every kernel and number of splits on a problem that may be run any number of times.
///
/// # Errors
/// Those of a call.
pub(crate) fn tune<T: Element>(layer: &Layer, problem: &Problem<'_, T>) -> Result<Entry> {
    struct Contender {
        choice: Choice,
        layer: Layer,
        seconds: f64,
    }
    let device = layer.device();
    // Events leave the context current that they are of.
    let _bound = device.bind()?;
    let plain = layer.with_choices(Choices::default());
    let call = plain.call(problem);
    let key = Key::of(&call, T::DTYPE, plain.terms().tf32);
    let planned = plain.choose(&call);
    let mut contenders: Vec<Contender> = allowed(&plain, &key.letters)
        .map(|choice| {
            let layer = plain.with_choices(Choices([(key.left_open(), choice)].into()));
            Contender { choice, layer, seconds: f64::INFINITY }
        })
        .collect();
    let failed = |call| move |error| device.failed(call)(error);
    let event = || {
        let events = device.stream().context();
        events.new_event(Some(CU_EVENT_DEFAULT)).map_err(failed("cuEventCreate"))
    };
    let (begin, end) = (event()?, event()?);
    let time = |layer: &Layer, calls: u32| -> Result<f64> {
        begin.record(device.stream()).map_err(failed("cuEventRecord"))?;
        (0..calls).try_for_each(|_| layer.run(problem, None))?;
        end.record(device.stream()).map_err(failed("cuEventRecord"))?;
        let ms = begin.elapsed_ms(&end).map_err(failed("cuEventElapsedTime"))?;
        Ok(f64::from(ms) * 1e-3 / f64::from(calls))
    };
    // What a stream allocates, it allocates now; the better call says who is in the running.
    for forth in [true, false] {
        for i in 0..contenders.len() {
            let i = if forth { i } else { contenders.len() - 1 - i };
            let seconds = time(&contenders[i].layer, 1)?;
            contenders[i].seconds = contenders[i].seconds.min(seconds);
        }
    }
    let fastest = contenders.iter().map(|c| c.seconds).fold(f64::INFINITY, f64::min);
    contenders.retain(|c| c.choice == planned || c.seconds <= HOPELESS * fastest);
    let calls = (TURN / fastest.max(1e-9)).ceil().clamp(1.0, MOST_CALLS) as u32;
    contenders.iter_mut().for_each(|contender| contender.seconds = f64::INFINITY);
    let (start, mut round) = (Instant::now(), 0);
    while round < 2 || start.elapsed() < TIME {
        // Forth and back, so that nobody always follows the same neighbour.
        for i in 0..contenders.len() {
            let i = if round % 2 == 0 { i } else { contenders.len() - 1 - i };
            let seconds = time(&contenders[i].layer, calls)?;
            contenders[i].seconds = contenders[i].seconds.min(seconds);
        }
        round += 1;
    }
    let of_planned = contenders.iter().find(|c| c.choice == planned);
    let of_planned = of_planned.map_or(f64::INFINITY, |c| c.seconds);
    let best = contenders.iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let (choice, seconds) = match best {
        Some(best) if best.seconds < of_planned * (1.0 - GAIN) => (best.choice, best.seconds),
        _ => (planned, of_planned),
    };
    let ns = |seconds: f64| (seconds * 1e9).round() as u64;
    Ok(Entry {
        device: device_name(device),
        problem: key.to_string(),
        kernel: KERNELS[choice.kernel].name.into(),
        order: format!("splits={}", choice.splits),
        ns: ns(seconds),
        planned_ns: ns(of_planned),
    })
}

/// Memory for the tensors of a problem that is tuned.
pub(crate) struct Room([Buffer; 4]);

impl Room {
    /// So many bytes each.
    ///
    /// # Errors
    /// [`Error::Unsupported`] while the layer's stream is captured, where nothing runs that could be
    /// timed; [`Error::DeviceMemory`], [`Error::Cuda`].
    pub(crate) fn new(layer: &Layer, bytes: [usize; 4]) -> Result<Self> {
        let device = layer.device();
        if device.is_capturing()? {
            return Err(Error::Unsupported {
                device: device.to_string(),
                what: "tune on a stream that is being captured".into(),
            });
        }
        let buffer = |bytes| -> Result<Buffer> {
            let mut buffer = Buffer::new(device, "a tensor to tune with", bytes)?;
            // Small numbers in every dtype: products with zeros take less power, and clocks are then
            // higher.
            buffer.fill(0x3c)?;
            Ok(buffer)
        };
        let [a, b, c, d] = bytes.map(buffer);
        Ok(Room([a?, b?, c?, d?]))
    }

    pub(crate) fn addresses(&self) -> [usize; 4] {
        self.0.each_ref().map(|buffer| buffer.address() as usize)
    }
}

/// What times depend on beside the problem.
fn device_name(device: &CudaDevice) -> String {
    let Facts { name, compute_capability: (major, minor), multiprocessors, .. } = device.facts();
    let name = name.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("cuda {name} sm_{major}{minor} multiprocessors={multiprocessors}")
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { dtype, tf32, samples, letters } = *self;
        let Letters { groups, rows, depth, positions, channels_fast } = letters;
        let along = if channels_fast { "channels" } else { "positions" };
        let math = if tf32 { "tf32" } else { "full" };
        write!(
            f,
            "groups={groups} k={depth} rows={rows} samples={samples} positions={} along={along} \
             dtype={dtype} math={math}",
            positions / samples.max(1)
        )
    }
}

impl FromStr for Key {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split(' ');
        let mut next = |name: &str| {
            let (key, value) = words.next().and_then(|word| word.split_once('=')).ok_or(())?;
            if key == name { Ok(value) } else { Err(()) }
        };
        let number = |text: &str| text.parse::<u32>().map_err(|_| ());
        let groups = number(next("groups")?)?;
        let depth = number(next("k")?)?;
        let rows = number(next("rows")?)?;
        let samples: u64 = next("samples")?.parse().map_err(|_| ())?;
        let positions: u64 = next("positions")?.parse().map_err(|_| ())?;
        let channels_fast = match next("along")? {
            "channels" => true,
            "positions" => false,
            _ => return Err(()),
        };
        let dtype = next("dtype")?.parse().map_err(|_| ())?;
        let tf32 = match next("math")? {
            "tf32" => true,
            "full" => false,
            _ => return Err(()),
        };
        if words.next().is_some() {
            return Err(());
        }
        let positions = positions.checked_mul(samples).ok_or(())?;
        let letters = Letters { groups, rows, depth, positions, channels_fast };
        Ok(Key { dtype, tf32, samples, letters })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_being_written() {
        for &dtype in DType::ALL {
            for (tf32, channels_fast) in [(false, false), (false, true), (true, false)] {
                let letters =
                    Letters { groups: 2, rows: 5, depth: 3, positions: 7 * 11, channels_fast };
                let key = Key { dtype, tf32, samples: 7, letters };
                assert_eq!(key.to_string().parse(), Ok(key));
            }
        }
        for text in ["", "groups=1", "groups=1 k=x rows=1 samples=1 positions=1 along=positions"] {
            assert_eq!(text.parse::<Key>(), Err(()));
        }
    }
}
