//! Sums over several workers that train one layer together.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::train::Grads;

/// Sums values over the workers of a group, each of which calls the same methods in the same order
/// with as many values.
///
/// With [`Params::set_all_reduce`](crate::train::Params::set_all_reduce) batch norms take the
/// statistics of all workers' samples, forward and backward; gradients of parameters are summed by
/// [`all_reduce`], when the caller wants it. W workers then do what one does on all their samples together.
pub trait AllReduce: fmt::Debug + Send + Sync {
    /// Replaces the values by their sums over all workers.
    ///
    /// # Errors
    /// [`Error::AllReduce`] if a worker is gone, does not come in time, or brings another number of
    /// values.
    fn sum_f64(&self, values: &mut [f64]) -> Result<()>;

    /// As [`sum_f64`](Self::sum_f64).
    ///
    /// # Errors
    /// As there.
    fn sum_f32(&self, values: &mut [f32]) -> Result<()>;
}

/// Bytes of a bucket for which most connections are fast: 25 MiB, as PyTorch has it.
pub const BUCKET: usize = 25 << 20;

/// Sums the gradients of several layers over all workers, who have the same layers in the same order; a
/// mean is that, [scaled](Grads::scale).
///
/// Values of all tensors are put together in buckets of so many bytes, each of which is one sum. Sums are
/// of the same values whatever the buckets; that they are the same bits too, `workers` must promise
/// ([`ThreadWorker`] does).
///
/// # Errors
/// As [`AllReduce::sum_f32`]; gradients then hold anything.
pub fn all_reduce<'g>(
    grads: impl IntoIterator<Item = &'g mut Grads>,
    workers: &dyn AllReduce,
    bucket: usize,
) -> Result<()> {
    let most = (bucket / size_of::<f32>()).max(1);
    let mut bucket = Bucket::default();
    for mut rest in grads.into_iter().flat_map(Grads::slices_mut) {
        while !rest.is_empty() {
            let room = most - bucket.values.len();
            let (now, later) = rest.split_at_mut(room.min(rest.len()));
            rest = later;
            if now.len() == most {
                // It fills a bucket alone, and stays where it is.
                workers.sum_f32(now)?;
                continue;
            }
            bucket.values.extend_from_slice(now);
            bucket.places.push(now);
            if bucket.values.len() == most {
                bucket.sum(workers)?;
            }
        }
    }
    bucket.sum(workers)
}

/// Values that are summed together, and where they come from.
#[derive(Default)]
struct Bucket<'g> {
    values: Vec<f32>,
    places: Vec<&'g mut [f32]>,
}

impl Bucket<'_> {
    /// Empties it.
    fn sum(&mut self, workers: &dyn AllReduce) -> Result<()> {
        if self.values.is_empty() {
            return Ok(());
        }
        workers.sum_f32(&mut self.values)?;
        let mut values = &self.values[..];
        for place in self.places.drain(..) {
            let (now, later) = values.split_at(place.len());
            place.copy_from_slice(now);
            values = later;
        }
        self.values.clear();
        Ok(())
    }
}

/// What a pass sums over all workers with; nothing where there is one.
pub(crate) type Reduce<'a> = Option<&'a (dyn Fn(&mut [f64]) -> Result<()> + Sync + 'a)>;

/// One of several threads of a process that train together.
///
/// Sums are taken in the order of the workers, so that they are bitwise the same from run to run.
/// When a worker is dropped, a thread's panic included, the others get an error at once. A worker
/// takes part in one sum at a time: threads that share it and sum at once all get an error, since
/// nobody could tell their sums apart.
///
/// ```
/// use std::time::Duration;
/// use pointwise::train::{AllReduce, ThreadWorker};
///
/// let workers = ThreadWorker::group(2, Duration::from_secs(30));
/// std::thread::scope(|scope| {
///     for (rank, worker) in workers.into_iter().enumerate() {
///         scope.spawn(move || {
///             let mut values = [rank as f32, 1.0];
///             worker.sum_f32(&mut values).unwrap();
///             assert_eq!(values, [1.0, 2.0]);
///         });
///     }
/// });
/// ```
#[derive(Debug)]
pub struct ThreadWorker {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What each worker has brought to the sum that is under way.
    given: Vec<Option<Vec<f64>>>,
    /// Sums that are complete, and the last one.
    rounds: u64,
    sum: Arc<Vec<f64>>,
    /// Why there will be no more.
    broken: Option<String>,
}

impl ThreadWorker {
    /// A group of so many workers. One that waits for another longer than `timeout` gets an error,
    /// and so do all others from then on.
    pub fn group(workers: usize, timeout: Duration) -> Vec<ThreadWorker> {
        let state =
            State { given: vec![None; workers], rounds: 0, sum: Arc::default(), broken: None };
        let group = Arc::new(Group { timeout, state: Mutex::new(state), changed: Condvar::new() });
        (0..workers).map(|rank| ThreadWorker { rank, group: group.clone() }).collect()
    }

    /// The number of this worker, from zero.
    pub fn rank(&self) -> usize {
        self.rank
    }

    fn sum(&self, values: Vec<f64>) -> Result<Arc<Vec<f64>>> {
        // None: longer than a clock can tell.
        let deadline = Instant::now().checked_add(self.group.timeout);
        let mut state = self.group.lock();
        let broken = |state: &State| state.broken.clone().map(|reason| Error::AllReduce { reason });
        if let Some(error) = broken(&state) {
            return Err(error);
        }
        let round = state.rounds;
        if state.given[self.rank].is_some() {
            let rank = self.rank;
            let reason = format!("worker {rank} was asked for a sum while it took part in another");
            state.broken = Some(reason.clone());
            self.group.changed.notify_all();
            return Err(Error::AllReduce { reason });
        }
        state.given[self.rank] = Some(values);
        if state.given.iter().all(Option::is_some) {
            state.add_up();
            self.group.changed.notify_all();
        }
        while state.rounds == round {
            if let Some(error) = broken(&state) {
                return Err(error);
            }
            let left = deadline.map_or(Duration::MAX, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                let missing = state.given.iter().position(Option::is_none).unwrap_or(self.rank);
                let timeout = self.group.timeout;
                state.broken = Some(format!("worker {missing} did not come within {timeout:?}"));
                self.group.changed.notify_all();
                continue;
            }
            let waited = self.group.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.sum.clone())
    }
}

impl State {
    /// Completes a round: values are added in the order of the workers.
    fn add_up(&mut self) {
        let mut given = self.given.iter_mut().filter_map(Option::take);
        let mut sum = given.next().unwrap_or_default();
        for (i, values) in given.enumerate() {
            if values.len() != sum.len() {
                let (a, b) = (sum.len(), values.len());
                self.broken =
                    Some(format!("worker 0 brought {a} values to a sum, worker {} {b}", i + 1));
                return;
            }
            sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        }
        self.sum = Arc::new(sum);
        self.rounds += 1;
    }
}

impl Group {
    /// A worker that panics while it holds the lock leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AllReduce for ThreadWorker {
    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        let sum = self.sum(values.to_vec())?;
        values.copy_from_slice(&sum);
        Ok(())
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        let sum = self.sum(values.iter().map(|&x| f64::from(x)).collect())?;
        values.iter_mut().zip(&*sum).for_each(|(to, &x)| *to = x as f32);
        Ok(())
    }
}

impl Drop for ThreadWorker {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        let rank = self.rank;
        state.broken.get_or_insert_with(|| format!("worker {rank} is gone"));
        drop(state);
        self.group.changed.notify_all();
    }
}
