//! NCCL by a stand-in: a library of two workers, on the host.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};

use cudarc::nccl::sys::ncclComm_t;

use super::library::{Config, IN_PROGRESS, SUCCESS};
use super::*;

thread_local! {
    /// How often NCCL is asked before it is done, and the code with which it is.
    static BUSY: Cell<(u32, c_int)> = const { Cell::new((0, SUCCESS)) };
    static ABORTED: Cell<u32> = const { Cell::new(0) };
    static DESTROYED: Cell<u32> = const { Cell::new(0) };
    /// What the other worker of a group of two brings, if not the same as this one.
    static OTHER: Cell<Option<Brought>> = const { Cell::new(None) };
    /// The type and the number of values of every reduction.
    static REDUCED: RefCell<Vec<(c_int, usize)>> = const { RefCell::new(Vec::new()) };
}

/// An NCCL of two workers with the same values, done after a while.
const STAND_IN: Functions = Functions {
    get_unique_id: {
        unsafe extern "C" fn get(id: *mut ncclUniqueId) -> c_int {
            // SAFETY: as NCCL's.
            unsafe { (*id).internal = [-3; 128] };
            SUCCESS
        }
        get
    },
    init: {
        unsafe extern "C" fn init(
            comm: *mut ncclComm_t,
            _: c_int,
            _: ncclUniqueId,
            _: c_int,
            config: *mut Config,
        ) -> c_int {
            // SAFETY: as NCCL's; nobody looks into the communicator.
            unsafe {
                assert_eq!(((*config).size, (*config).blocking), (24, 0));
                *comm = std::ptr::without_provenance_mut(64);
            }
            IN_PROGRESS
        }
        init
    },
    async_error: {
        unsafe extern "C" fn ask(_: ncclComm_t, state: *mut c_int) -> c_int {
            let (left, end) = BUSY.get();
            BUSY.set((left.saturating_sub(1), end));
            // SAFETY: as NCCL's.
            unsafe { *state = if left == 0 { end } else { IN_PROGRESS } };
            SUCCESS
        }
        ask
    },
    all_reduce: {
        unsafe extern "C" fn reduce(
            _: *const c_void,
            values: *mut c_void,
            count: usize,
            dtype: c_int,
            op: c_int,
            _: ncclComm_t,
            _: CUstream,
        ) -> c_int {
            REDUCED.with_borrow_mut(|reduced| reduced.push((dtype, count)));
            if values.is_null() {
                return IN_PROGRESS;
            }
            let values: *mut c_void = std::ptr::with_exposed_provenance_mut(values.addr());
            // nccl.h's numbers of types, of sums (0) and of maxima (2).
            // SAFETY: so many values of the type, as for NCCL.
            unsafe {
                match (dtype, op) {
                    (7, 0) => std::slice::from_raw_parts_mut(values.cast::<f32>(), count)
                        .iter_mut()
                        .for_each(|x| *x *= 2.0),
                    (8, 0) => std::slice::from_raw_parts_mut(values.cast::<f64>(), count)
                        .iter_mut()
                        .for_each(|x| *x *= 2.0),
                    (5, 2) => {
                        let own = std::slice::from_raw_parts_mut(values.cast::<u64>(), count);
                        let other = OTHER.get().map_or(own[0], Brought::number);
                        own[0] = own[0].max(other);
                        own[1] = own[1].max(!other);
                    }
                    other => panic!("{other:?} is none of this crate's reductions"),
                }
            }
            IN_PROGRESS
        }
        reduce
    },
    finalize: {
        unsafe extern "C" fn finalize(_: ncclComm_t) -> c_int {
            IN_PROGRESS
        }
        finalize
    },
    destroy: {
        unsafe extern "C" fn destroy(_: ncclComm_t) -> c_int {
            DESTROYED.set(DESTROYED.get() + 1);
            SUCCESS
        }
        destroy
    },
    abort: {
        unsafe extern "C" fn abort(_: ncclComm_t) -> c_int {
            ABORTED.set(ABORTED.get() + 1);
            SUCCESS
        }
        abort
    },
};

/// Tests may run on one thread.
fn reset(busy: u32) {
    BUSY.set((busy, SUCCESS));
    ABORTED.set(0);
    DESTROYED.set(0);
    OTHER.set(None);
    REDUCED.take();
}

/// Values where they are, and the step that fails, if one does, when it is its turn.
#[derive(Default)]
struct OnHost {
    memory: Vec<u64>,
    fails: Option<(&'static str, u32)>,
    steps: RefCell<Vec<&'static str>>,
}

impl OnHost {
    fn step(&self, step: &'static str) -> Result<()> {
        let mut steps = self.steps.borrow_mut();
        steps.push(step);
        let times = steps.iter().filter(|&&s| s == step).count() as u32;
        match self.fails == Some((step, times)) {
            true => Err(Error::NoDevice { device: "cuda:9".into(), reason: step.into() }),
            false => Ok(()),
        }
    }
}

impl Values for OnHost {
    fn upload<T: Plain>(&mut self, values: &[T]) -> Result<u64> {
        self.step("upload")?;
        self.memory = vec![0; size_of_val(values).div_ceil(8).max(1)];
        // SAFETY: as many bytes, which any type may be copied to.
        unsafe {
            let to = self.memory.as_mut_ptr().cast();
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
        Ok(self.memory.as_mut_ptr().expose_provenance() as u64)
    }

    fn bind(&self) -> Result<impl Sized> {
        self.step("bind")
    }

    fn stream(&self) -> CUstream {
        std::ptr::null_mut()
    }

    fn done(&self) -> Result<bool> {
        self.step("done").map(|()| true)
    }

    fn download<T: Plain>(&self, values: &mut [T]) -> Result<()> {
        self.step("download")?;
        // SAFETY: as many values were uploaded, of which any bits are one.
        unsafe {
            let from = self.memory.as_ptr().cast();
            std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), values.len());
        }
        Ok(())
    }
}

fn group(fails: Option<(&'static str, u32)>) -> Group<OnHost> {
    reset(0);
    let communicator = open(Duration::from_secs(60)).unwrap();
    Group { communicator, values: OnHost { fails, ..OnHost::default() } }
}

fn open(timeout: Duration) -> Result<Communicator> {
    let id = NcclId::by(&STAND_IN).unwrap();
    assert_eq!(id.to_bytes(), [253; 128]);
    Communicator::new(STAND_IN, id, 1, 2, timeout)
}

fn sum(communicator: &mut Communicator, done: impl FnMut() -> Result<bool>) -> Result<()> {
    let of = (4, ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
    communicator.all_reduce(0, of, std::ptr::null_mut(), done)
}

fn says(result: Result<impl fmt::Debug>, says: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::AllReduce { .. }), "{error:?}");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn a_missing_library_is_an_error_that_says_what_to_do() {
    says(
        Functions::load(&["libpointwise_has_no_such.so"])
            .map(|_| ())
            .map_err(|reason| Error::AllReduce { reason }),
        "no NCCL",
    );
    // This machine may have one: an answer in any case, and no panic.
    match NcclId::new() {
        Ok(_) => {}
        Err(error) => says(Err::<(), _>(error), "LD_LIBRARY_PATH"),
    }
    // Another library is no NCCL.
    if cfg!(target_os = "linux") {
        let error = Functions::load(&["libc.so.6"]).map(|_| ()).unwrap_err();
        assert!(error.contains("lacks ncclGetUniqueId"), "{error}");
    }
}

#[test]
fn a_group_that_is_complete_sums() {
    reset(3);
    let mut communicator = open(Duration::from_secs(60)).unwrap();
    assert_eq!(BUSY.get().0, 0, "the group is waited for");
    BUSY.set((3, SUCCESS));
    let mut asked = 0;
    sum(&mut communicator, || {
        asked += 1;
        Ok(asked == 5)
    })
    .unwrap();
    assert_eq!((asked, BUSY.get().0), (5, 0), "NCCL and the stream are waited for");
    BUSY.set((3, SUCCESS));
    drop(communicator);
    assert_eq!((BUSY.get().0, DESTROYED.get(), ABORTED.get()), (0, 1, 0));
}

#[test]
fn workers_that_bring_the_same_sum_it_in_pieces() {
    const F32: ncclDataType_t = ncclDataType_t::ncclFloat32;
    let mut group = group(None);
    let most = PIECE / 4;
    let mut values: Vec<f32> = (0..most + 3).map(|i| i as f32).collect();
    group.sum(&mut values, F32).unwrap();
    assert!(values.iter().enumerate().all(|(i, &x)| x == 2.0 * i as f32));
    assert_eq!(REDUCED.take(), [(5, 2), (7, most), (7, 3)]);
    let mut values = [1.5, -0.25];
    group.sum(&mut values, ncclDataType_t::ncclFloat64).unwrap();
    assert_eq!(values, [3.0, -0.5]);
    assert_eq!(REDUCED.take(), [(5, 2), (8, 2)]);
    // Nothing is something that workers may differ in.
    group.sum::<f32>(&mut [], F32).unwrap();
    assert_eq!(REDUCED.take(), [(5, 2)]);
    drop(group);
    assert_eq!((ABORTED.get(), DESTROYED.get()), (0, 1));
}

#[test]
fn workers_that_bring_different_values_are_told_and_sum_no_more() {
    const F32: ncclDataType_t = ncclDataType_t::ncclFloat32;
    for (count, double, range) in [
        (3, false, "from 3 of f32 to 4 of f32"),
        (5, false, "from 4 of f32 to 5 of f32"),
        (0, false, "from 0 of f32 to 4 of f32"),
        (4, true, "from 4 of f32 to 4 of f64"),
        (usize::MAX / 8, true, "from 4 of f32 to 2305843009213693951 of f64"),
    ] {
        let mut group = group(None);
        OTHER.set(Some(Brought { count, double }));
        let mut values = [1.0f32, 2.0, 3.0, 4.0];
        let says_so = format!("this one 4 of f32, all of them {range}");
        says(group.sum(&mut values, F32), &says_so);
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(REDUCED.take(), [(5, 2)], "nothing more is begun");
        OTHER.set(None);
        says(group.sum(&mut values, F32), &says_so);
        assert_eq!(REDUCED.take(), []);
        drop(group);
        assert_eq!((ABORTED.get(), DESTROYED.get()), (0, 1), "the others may still read");
    }
}

#[test]
fn after_any_failure_of_the_device_there_are_no_more_sums() {
    for step in ["upload", "bind", "done", "download"] {
        for turn in 1..3 {
            let mut group = group(Some((step, turn)));
            let mut sum = || group.sum(&mut [1.0f32], ncclDataType_t::ncclFloat32);
            let error = sum().unwrap_err();
            assert!(matches!(error, Error::NoDevice { .. }), "{step} {turn}: {error:?}");
            assert_eq!(ABORTED.get(), 1, "{step} {turn}");
            REDUCED.take();
            says(sum(), step);
            assert_eq!(REDUCED.take(), [], "{step} {turn}");
            drop(group);
            assert_eq!((ABORTED.get(), DESTROYED.get()), (1, 0), "{step} {turn}");
        }
    }
}

#[test]
fn a_worker_that_stays_away_is_an_error_in_time() {
    let short = Duration::from_millis(30);
    reset(u32::MAX);
    says(open(short), "ncclCommInitRankConfig: a worker did not come within 30ms");
    assert_eq!(ABORTED.get(), 1);
    // It came, and then did not take part in a sum.
    BUSY.set((0, SUCCESS));
    let mut communicator = open(short).unwrap();
    says(sum(&mut communicator, || Ok(false)), "ncclAllReduce: a worker did not come");
    assert_eq!(ABORTED.get(), 2);
    says(sum(&mut communicator, || Ok(true)), "ncclAllReduce: a worker did not come");
    drop(communicator);
    assert_eq!((ABORTED.get(), DESTROYED.get()), (2, 0), "aborted once");
}

#[test]
fn errors_of_nccl_are_named() {
    BUSY.set((2, 6));
    says(open(Duration::from_secs(60)), "ncclRemoteError: a worker is gone (6)");
    BUSY.set((0, SUCCESS));
    let mut communicator = open(Duration::from_secs(60)).unwrap();
    BUSY.set((1, 77));
    says(sum(&mut communicator, || Ok(true)), "an error without a name here (77)");
    let lost = || Err(Error::NoDevice { device: "cuda:9".into(), reason: "lost".into() });
    BUSY.set((0, SUCCESS));
    let mut communicator = open(Duration::from_secs(60)).unwrap();
    assert!(matches!(sum(&mut communicator, lost), Err(Error::NoDevice { .. })));
    says(sum(&mut communicator, || Ok(true)), "cuda:9");
    let id = NcclId::from_bytes([1; 128]);
    let error = Communicator::new(STAND_IN, id, 2, 2, Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("2 of 2 workers"), "{error}");
}
