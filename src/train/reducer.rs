//! Sums of gradients that run while other backward passes do.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;

use crate::error::{Error, Result};
use crate::train::{AllReduce, Grads, all_reduce};

/// Sums the gradients of layers over all workers, on a thread of its own, while the backward passes of the
/// layers before them still run.
///
/// Every worker hands over the same layers in the same order: in that of the backward pass, the last
/// layer first. As soon as they fill a bucket, its sum begins. What is summed is what
/// [`all_reduce`] makes of the same gradients.
///
/// Its group of workers must be its own: a backward pass with batch statistics sums as well
/// ([`Params::set_all_reduce`](crate::train::Params::set_all_reduce)), and workers of one group must do
/// so in one order. NCCL does not promise that two groups of a process may be at work at once: where batch
/// norms sum through it, [`all_reduce`] behind the backward passes is the safe way.
///
/// When it is dropped, no further sum begins, and nobody waits for one that has.
///
/// ```
/// # use ndarray::Array2;
/// # use pointwise::{Device, Pointwise};
/// use std::sync::Arc;
/// use std::time::Duration;
/// use pointwise::train::{Accumulate, BUCKET, Params, Reducer, ThreadWorker};
///
/// # let layer = |c_in| Pointwise::new(Array2::from_elem((4, c_in), 0.5)).relu();
/// # let mut first = Params::new(&layer(3), &Device::cpu())?;
/// # let mut second = Params::new(&layer(4), &Device::cpu())?;
/// # let src = Array2::<f32>::ones((2, 3));
/// # let worker = ThreadWorker::group(1, Duration::from_secs(30)).remove(0);
/// let reducer = Reducer::new(Arc::new(worker), BUCKET)?;
/// # let (mut grads, mut more) = (first.grads(), second.grads());
/// // Of each step:
/// let (between, kept) = first.forward(&src)?;
/// let (dst, kept_more) = second.forward(&between)?;
/// let d = second.backward(&between, kept_more, &dst, &mut more, Accumulate::Set)?;
/// reducer.push(more);
/// let _ = first.backward(&src, kept, &d, &mut grads, Accumulate::Set)?; // meanwhile
/// reducer.push(grads);
/// let sums = reducer.finish()?;
/// assert_eq!(sums.len(), 2);
/// # Ok::<(), pointwise::Error>(())
/// ```
pub struct Reducer {
    jobs: Sender<Job>,
    dropped: Arc<AtomicBool>,
}

/// Workers until the reducer is dropped.
#[derive(Debug)]
struct Workers {
    workers: Arc<dyn AllReduce>,
    dropped: Arc<AtomicBool>,
}

impl AllReduce for Workers {
    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.workers.sum_f64(values)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        match self.dropped.load(Ordering::Relaxed) {
            true => Err(Error::AllReduce { reason: "the reducer is gone".into() }),
            false => self.workers.sum_f32(values),
        }
    }
}

enum Job {
    Sum(Grads),
    /// Whoever asks is sent everything since the last time, or what went wrong.
    Finish(Sender<Result<Vec<Grads>>>),
}

impl Reducer {
    /// Starts its thread. `bucket` is in bytes, as [`all_reduce`] has it.
    ///
    /// # Errors
    /// [`Error::AllReduce`] if the system gives no thread.
    pub fn new(workers: Arc<dyn AllReduce>, bucket: usize) -> Result<Self> {
        let ((jobs, from), dropped) = (channel(), Arc::default());
        let workers = Workers { workers, dropped: Arc::clone(&dropped) };
        let thread = Builder::new().name("pointwise gradients".into());
        thread.spawn(move || run(&from, &workers, bucket)).map_err(|error| Error::AllReduce {
            reason: format!("there is no thread to sum on: {error}"),
        })?;
        Ok(Reducer { jobs, dropped })
    }

    /// Hands over the gradients of a layer, whose backward pass is over.
    pub fn push(&self, grads: Grads) {
        self.send(Job::Sum(grads));
    }

    /// Waits for the sums of all gradients since the last call of this, and returns them in the order in
    /// which they were handed over; a mean is that, [scaled](Grads::scale).
    ///
    /// # Errors
    /// The first of [`AllReduce::sum_f32`]; these gradients are then lost.
    pub fn finish(&self) -> Result<Vec<Grads>> {
        let (to, sums) = channel();
        self.send(Job::Finish(to));
        let gone = || Error::AllReduce { reason: "the thread that sums is gone".into() };
        sums.recv().unwrap_or_else(|_| Err(gone()))
    }

    fn send(&self, job: Job) {
        // The thread ends after this end of the channel only.
        let _ = self.jobs.send(job);
    }
}

fn run(jobs: &Receiver<Job>, workers: &dyn AllReduce, bucket: usize) {
    let (mut done, mut waiting, mut bytes) = (Vec::new(), Vec::new(), 0);
    let mut outcome = Ok(());
    let sum = |waiting: &mut Vec<Grads>, outcome: &mut Result<()>| {
        if outcome.is_ok() && !waiting.is_empty() {
            // Theirs is code that we do not know.
            let sum = AssertUnwindSafe(|| all_reduce(&mut *waiting, workers, bucket));
            *outcome = catch_unwind(sum).unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<&str>().copied();
                let text = text.or_else(|| panic.downcast_ref::<String>().map(|text| &text[..]));
                let text = text.unwrap_or("no message");
                Err(Error::AllReduce { reason: format!("a worker panicked in a sum: {text}") })
            });
        }
    };
    for job in jobs {
        match job {
            Job::Sum(mut grads) => {
                bytes += grads.slices_mut().map(|values| size_of_val(values)).sum::<usize>();
                waiting.push(grads);
                if bytes >= bucket {
                    sum(&mut waiting, &mut outcome);
                    done.append(&mut waiting);
                    bytes = 0;
                }
            }
            Job::Finish(to) => {
                sum(&mut waiting, &mut outcome);
                done.append(&mut waiting);
                bytes = 0;
                let done = std::mem::take(&mut done);
                // Who asked may have given up.
                let _ = to.send(std::mem::replace(&mut outcome, Ok(())).map(|()| done));
            }
        }
    }
}

impl fmt::Debug for Reducer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reducer").finish_non_exhaustive()
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // A sum under way may wait for a worker that waits for what this thread holds.
        self.dropped.store(true, Ordering::Relaxed);
    }
}
