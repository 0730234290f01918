//! What [`Prepared::tune`](crate::Prepared::tune) measured: plain data, kept as text.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The columns of a tuning's text, separated by tabs.
const HEADER: &str = "device\tproblem\tkernel\torder\tns\tplanned_ns";

/// The kernels that were the fastest when [`Prepared::tune`](crate::Prepared::tune) measured them,
/// of any number of layers, shapes and devices.
///
/// [`Display`](fmt::Display) writes it as text, a line of tab-separated columns per shape, and
/// [`FromStr`] reads it back; texts may be concatenated. [`collect`](Iterator::collect) puts
/// several together. Where two entries are about the same device and problem, the later one counts.
///
/// An entry counts on the kind of device that it was measured on (CPU model, instruction set and
/// number of threads; GPU model and multiprocessors) and while the crate has its kernel; elsewhere it
/// is passed over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Tuning {
    entries: Vec<Entry>,
}

/// One shape. The words are those of the backend that wrote them, which alone knows whether it
/// still understands them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Entry {
    pub device: String,
    pub problem: String,
    pub kernel: String,
    pub order: String,
    /// Nanoseconds of a call.
    pub ns: u64,
    /// Those of what runs without a tuning.
    pub planned_ns: u64,
}

impl Tuning {
    /// The number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds the entries of another tuning.
    pub fn merge(&mut self, later: Tuning) {
        later.entries.into_iter().for_each(|entry| self.add(entry));
    }

    pub(crate) fn add(&mut self, entry: Entry) {
        let same = |old: &&mut Entry| old.device == entry.device && old.problem == entry.problem;
        match self.entries.iter_mut().find(same) {
            Some(old) => *old = entry,
            None => self.entries.push(entry),
        }
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

impl FromIterator<Tuning> for Tuning {
    fn from_iter<I: IntoIterator<Item = Tuning>>(tunings: I) -> Self {
        let mut all = Tuning::default();
        tunings.into_iter().for_each(|tuning| all.merge(tuning));
        all
    }
}

impl fmt::Display for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}")?;
        for Entry { device, problem, kernel, order, ns, planned_ns } in &self.entries {
            writeln!(f, "{device}\t{problem}\t{kernel}\t{order}\t{ns}\t{planned_ns}")?;
        }
        Ok(())
    }
}

impl FromStr for Tuning {
    type Err = Error;

    /// # Errors
    /// [`Error::Tuning`] for the first line that is no entry. Names of devices and kernels are not
    /// checked.
    fn from_str(text: &str) -> Result<Self> {
        let mut tuning = Tuning::default();
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() || line == HEADER {
                continue;
            }
            let wrong = |expected| Error::Tuning { line: index + 1, text: line.into(), expected };
            let columns: Vec<&str> = line.split('\t').collect();
            let [device, problem, kernel, order, ns, planned_ns] = columns[..] else {
                return Err(wrong("six columns, separated by tabs"));
            };
            let time = |column: &str| column.parse().map_err(|_| wrong("whole nanoseconds"));
            tuning.add(Entry {
                device: device.into(),
                problem: problem.into(),
                kernel: kernel.into(),
                order: order.into(),
                ns: time(ns)?,
                planned_ns: time(planned_ns)?,
            });
        }
        Ok(tuning)
    }
}
