//! Where a launcher has put this process among those that train together.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::cuda::CudaDevice;
use crate::error::{Error, Result};

/// What a launcher calls things.
struct Variables {
    /// A process's number, and how many there are.
    rank: &'static str,
    size: &'static str,
    /// Its number on its machine.
    local: &'static str,
    /// Those that are the same to all of a job's processes, and together to no other's.
    job: &'static [&'static str],
}

/// torchrun, Open MPI, MPICH and its kin, Slurm.
const LAUNCHERS: [Variables; 4] = [
    Variables {
        rank: "RANK",
        size: "WORLD_SIZE",
        local: "LOCAL_RANK",
        job: &["TORCHELASTIC_RUN_ID"],
    },
    Variables {
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local: "OMPI_COMM_WORLD_LOCAL_RANK",
        job: &["PMIX_NAMESPACE"],
    },
    Variables { rank: "PMI_RANK", size: "PMI_SIZE", local: "MPI_LOCALRANKID", job: &[] },
    Variables {
        rank: "SLURM_PROCID",
        size: "SLURM_NTASKS",
        local: "SLURM_LOCALID",
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
    },
];
/// Set in heterogeneous jobs of Slurm's, whose parts have ids of their own.
const HETEROGENEOUS: &str = "SLURM_HET_SIZE";
const ADDR: &str = "MASTER_ADDR";
const PORT: &str = "MASTER_PORT";

/// A worker begins with this, its number and how many there are (u32, little endian), and its job: a
/// length, and so many bytes. It is answered with what it asks for, and ends with [`THANKS`].
const HELLO: &[u8; 8] = b"pwlaunch";
const THANKS: u8 = b'.';
/// The bytes before those of the job.
const HEAD: usize = HELLO.len() + 4 + 4 + 1;
/// How long a connection may take for all of that.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections at a time; more are left to wait.
const CALLERS: usize = 256;

/// One process of several that train together, as a launcher numbers them.
///
/// # Launching
///
/// | | |
/// | --- | --- |
/// | one machine, 4 GPUs | `torchrun --no-python --nproc-per-node 4 ./program`, or `mpirun -n 4 ./program` |
/// | 2 machines of 8 | on each: `torchrun --no-python --nnodes 2 --node-rank 0\|1 --nproc-per-node 8 --master-addr HOST --master-port 29500 ./program` |
/// | | `mpirun -n 16 -H host0:8,host1:8 -x MASTER_ADDR=host0 -x MASTER_PORT=29500 ./program` |
/// | | `MASTER_ADDR=HOST MASTER_PORT=29500 srun --nodes 2 --ntasks-per-node 8 ./program`, in which `HOST` is that of task 0 |
///
/// Read are the first of `RANK` and `WORLD_SIZE`, `OMPI_COMM_WORLD_RANK` and `…_SIZE`, `PMI_RANK` and
/// `PMI_SIZE`, `SLURM_PROCID` and `SLURM_NTASKS` that are set, the number on the machine beside them
/// (`LOCAL_RANK`, `OMPI_COMM_WORLD_LOCAL_RANK`, `MPI_LOCALRANKID`, `SLURM_LOCALID`; another launcher's
/// if that is not set), and `MASTER_ADDR` and `MASTER_PORT`, which are `127.0.0.1` and 29500 unless set.
///
/// Jobs whose worker 0 are on one host need ports of their own. A worker of another job is not answered
/// where the launcher tells jobs apart: by `TORCHELASTIC_RUN_ID` (torchrun's `--rdzv-id`),
/// `PMIX_NAMESPACE` (Open MPI), or `SLURM_JOB_ID` and `SLURM_STEP_ID`. Otherwise worker 0 answers whoever
/// reaches its port and asks as a worker would: as NCCL itself, this is for networks whose machines trust
/// one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// This process's number, from zero.
    pub rank: usize,
    /// How many there are.
    pub workers: usize,
    /// Its number on its machine, if the launcher tells.
    pub local_rank: Option<usize>,
    /// The host of worker 0.
    pub host: String,
    /// The TCP port at which worker 0 hands out what all of them must know: one above `MASTER_PORT`,
    /// at which a launcher may listen itself.
    pub port: u16,
    /// What tells this job from others, if the launcher does: the same to all of its processes.
    pub job: Option<String>,
}

impl Launch {
    /// What this process's environment says.
    ///
    /// # Errors
    /// [`Error::Environment`] if no launcher's variables are set, or one makes no sense.
    pub fn from_env() -> Result<Launch> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Launch> {
        let refuse = |variable: &'static str, value: &str, reason: String| Error::Environment {
            variable,
            value: value.into(),
            reason,
        };
        let number = |name: &'static str| match variable(name).as_deref().map(str::parse::<usize>) {
            None => Ok(None),
            Some(Ok(number)) => Ok(Some(number)),
            Some(Err(_)) => {
                let value = variable(name).unwrap_or_default();
                Err(refuse(name, &value, "it is no number".into()))
            }
        };
        for Variables { rank, size, local, job } in LAUNCHERS {
            let (Some(number_of), Some(workers)) = (number(rank)?, number(size)?) else { continue };
            if number_of >= workers {
                let reason = format!("there are {workers} workers");
                return Err(refuse(rank, &number_of.to_string(), reason));
            }
            // Slurm's PMI-2 tells MPICH's first two, and its own number on the machine.
            let others = LAUNCHERS.iter().map(|launcher| launcher.local);
            let local = [local].into_iter().chain(others).find(|name| variable(name).is_some());
            let values = job.iter().map(|name| variable(name).filter(|value| !value.is_empty()));
            let job = match variable(HETEROGENEOUS) {
                None if !job.is_empty() => values.collect::<Option<Vec<_>>>(),
                _ => None,
            };
            let port = match variable(PORT) {
                None => 29500,
                Some(port) => match port.parse::<u16>() {
                    Ok(port) if port < u16::MAX => port,
                    _ => return Err(refuse(PORT, &port, "it is no port below 65535".into())),
                },
            };
            return Ok(Launch {
                rank: number_of,
                workers,
                local_rank: local.map_or(Ok(None), number)?,
                host: variable(ADDR).unwrap_or_else(|| "127.0.0.1".into()),
                port: port + 1,
                job: job.map(|values| values.join(".")),
            });
        }
        let names: Vec<_> =
            LAUNCHERS.iter().map(|of| format!("{} and {}", of.rank, of.size)).collect();
        Err(refuse("RANK", "", format!("no launcher has set {}", names.join(", or "))))
    }

    /// The GPU with this process's number on its machine.
    ///
    /// # Errors
    /// [`Error::Environment`] if the launcher has not told the number; as [`CudaDevice::open`].
    pub fn device(&self) -> Result<CudaDevice> {
        match self.local_rank {
            Some(ordinal) => CudaDevice::open(ordinal),
            None => Err(Error::Environment {
                variable: LAUNCHERS[0].local,
                value: String::new(),
                reason: "the launcher has not said which of its machine's GPUs this process has"
                    .into(),
            }),
        }
    }

    /// Brings what worker 0 has to all others; each calls it once.
    ///
    /// # Errors
    /// [`Error::AllReduce`] if not all of them meet in time.
    pub(crate) fn share(&self, own: Option<[u8; 128]>, timeout: Duration) -> Result<[u8; 128]> {
        let deadline = Instant::now().checked_add(timeout);
        let left = || match deadline {
            // Longer than a clock can tell.
            None => Duration::from_secs(u32::MAX.into()),
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
        };
        let Launch { rank, workers, host, port, .. } = self;
        let failed = |reason: String| Err(Error::AllReduce { reason });
        match own {
            // There is nobody to meet.
            Some(bytes) if *workers == 1 => Ok(bytes),
            Some(bytes) => {
                let listener = match TcpListener::bind(("::", *port))
                    .or_else(|_| TcpListener::bind(("0.0.0.0", *port)))
                {
                    Ok(listener) => listener,
                    Err(error) => {
                        return failed(format!("worker 0 cannot listen at port {port}: {error}"));
                    }
                };
                self.hand_out(&listener, &bytes, &left)?;
                Ok(bytes)
            }
            None => loop {
                let error = match self.ask(left().min(PATIENCE)) {
                    Ok(bytes) => return Ok(bytes),
                    Err(error) => error,
                };
                if left().is_zero() {
                    return failed(format!(
                        "worker {rank} of {workers} did not reach worker 0 at {host}:{port} within \
                         {timeout:?}: {error}"
                    ));
                }
                std::thread::sleep(Duration::from_millis(20).min(left()));
            },
        }
    }

    fn hand_out(
        &self,
        listener: &TcpListener,
        bytes: &[u8; 128],
        left: &dyn Fn() -> Duration,
    ) -> Result<()> {
        let broken = |error: io::Error| Error::AllReduce {
            reason: format!("worker 0 cannot listen at port {}: {error}", self.port),
        };
        listener.set_nonblocking(true).map_err(broken)?;
        let mut missing: BTreeSet<u32> = (1..self.workers as u32).collect();
        let mut callers: Vec<Caller> = Vec::new();
        while let Some(&first) = missing.first() {
            while callers.len() < CALLERS {
                match listener.accept() {
                    Ok((stream, _)) => callers.extend(Caller::new(stream)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Who is gone already is no reason to give up.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(broken(error)),
                }
            }
            let mut refused = None;
            callers.retain_mut(|caller| match caller.talk(self, bytes) {
                Ok(Talk::Goes) => true,
                Ok(Talk::Served(rank)) => {
                    missing.remove(&rank);
                    false
                }
                Ok(Talk::OfOthers(rank, workers)) => {
                    refused = Some((rank, workers));
                    false
                }
                // No worker, or it goes away, and comes again.
                Err(_) => false,
            });
            if let Some((rank, workers)) = refused {
                let reason = format!(
                    "worker {rank} was launched as one of {workers}, worker 0 as one of {}",
                    self.workers
                );
                return Err(Error::AllReduce { reason });
            }
            if left().is_zero() && missing.contains(&first) {
                let reason = format!(
                    "{} of {} workers did not come to worker 0 in time, worker {first} among them",
                    missing.len(),
                    self.workers
                );
                return Err(Error::AllReduce { reason });
            }
            if !missing.is_empty() {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// The job as it is sent.
    fn job(&self) -> &[u8] {
        let job = self.job.as_deref().unwrap_or_default().as_bytes();
        &job[..job.len().min(u8::MAX.into())]
    }

    fn ask(&self, patience: Duration) -> io::Result<[u8; 128]> {
        let patience = patience.max(Duration::from_millis(1));
        let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in (self.host.as_str(), self.port).to_socket_addrs()? {
            let mut stream = match TcpStream::connect_timeout(&address, patience) {
                Ok(stream) => stream,
                Err(refused) => {
                    error = refused;
                    continue;
                }
            };
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            let job = self.job();
            let [rank, workers] = [self.rank, self.workers].map(|n| (n as u32).to_le_bytes());
            let hello = [&HELLO[..], &rank, &workers, &[job.len() as u8], job].concat();
            stream.write_all(&hello)?;
            let mut bytes = [0; 128];
            stream.read_exact(&mut bytes)?;
            stream.write_all(&[THANKS])?;
            return Ok(bytes);
        }
        Err(error)
    }
}

/// A connection to worker 0, which never waits for one: the other side of [`ask`](Launch::ask).
struct Caller {
    stream: TcpStream,
    since: Instant,
    heard: Vec<u8>,
    answered: bool,
}

/// Where a conversation is.
enum Talk {
    Goes,
    /// The worker with this number has what it asked for.
    Served(u32),
    /// It has this number among so many, who are not as many as here.
    OfOthers(u32, u32),
}

impl Caller {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Caller { stream, since: Instant::now(), heard: Vec::new(), answered: false })
    }

    /// Goes on as far as the other side has come.
    ///
    /// # Errors
    /// The connection's, or if this is no worker of the launch.
    fn talk(&mut self, launch: &Launch, bytes: &[u8; 128]) -> io::Result<Talk> {
        let stranger = || Err(io::ErrorKind::InvalidData.into());
        loop {
            let known = self.heard.len().min(HELLO.len());
            if self.heard[..known] != HELLO[..known] {
                return stranger();
            }
            let hello = HEAD + self.heard.get(HEAD - 1).map_or(0, |&length| length.into());
            if self.heard.len() >= HEAD && self.heard.len() >= hello {
                let number = |at: usize| {
                    u32::from_le_bytes([0, 1, 2, 3].map(|i| self.heard[HELLO.len() + at + i]))
                };
                let (rank, workers) = (number(0), number(4));
                if self.heard[HEAD..hello] != *launch.job() {
                    return stranger();
                }
                if workers as usize != launch.workers {
                    return Ok(Talk::OfOthers(rank, workers));
                }
                if !self.answered {
                    // An answer fits what a connection holds.
                    self.stream.write_all(bytes)?;
                    self.answered = true;
                }
                match self.heard.get(hello) {
                    None => {}
                    Some(&THANKS) => return Ok(Talk::Served(rank)),
                    Some(_) => return stranger(),
                }
            }
            let mut more = [0; 64];
            match self.stream.read(&mut more) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.heard.extend_from_slice(&more[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return match self.since.elapsed() < PATIENCE {
                        true => Ok(Talk::Goes),
                        false => Err(io::ErrorKind::TimedOut.into()),
                    };
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Launch> {
        Launch::from_variables(|name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn launchers_say_who_a_process_is() {
        let local = Launch {
            rank: 3,
            workers: 8,
            local_rank: Some(1),
            host: "127.0.0.1".into(),
            port: 29501,
            job: None,
        };
        for Variables { rank, size, local: number, .. } in LAUNCHERS {
            let variables = [(rank, "3"), (size, "8"), (number, "1")];
            assert_eq!(of(&variables).unwrap(), local);
            assert_eq!(of(&variables[..2]).unwrap().local_rank, None);
            let there = [(ADDR, "node7"), (PORT, "1234")];
            let got = of(&[&variables[..], &there].concat()).unwrap();
            assert_eq!(got, Launch { host: "node7".into(), port: 1235, ..local.clone() });
        }
        // mpirun inside of an allocation of Slurm's: the inner one counts.
        let both = [
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "1"),
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
        ];
        assert_eq!(of(&both).unwrap().rank, 2);
    }

    #[test]
    fn the_number_on_a_machine_may_be_another_launchers() {
        // srun --mpi=pmi2.
        let pmi2 = [("PMI_RANK", "5"), ("PMI_SIZE", "8"), ("SLURM_LOCALID", "1")];
        assert_eq!(of(&pmi2).unwrap().local_rank, Some(1));
        let both = [&pmi2[..], &[("MPI_LOCALRANKID", "3")]].concat();
        assert_eq!(of(&both).unwrap().local_rank, Some(3), "its own first");
        let error = of(&[pmi2[0], pmi2[1], ("SLURM_LOCALID", "x")]).unwrap_err();
        assert!(error.to_string().contains("SLURM_LOCALID=x"), "{error}");
    }

    #[test]
    fn launchers_say_which_job_a_process_is_of() {
        let job = |variables: &[(&str, &str)]| of(variables).unwrap().job;
        let torch = [("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "a7")];
        assert_eq!(job(&torch).as_deref(), Some("a7"));
        let slurm = [
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "2"),
            ("SLURM_JOB_ID", "17"),
            ("SLURM_STEP_ID", "3"),
        ];
        assert_eq!(job(&slurm).as_deref(), Some("17.3"));
        assert_eq!(job(&slurm[..3]), None, "half of a name");
        assert_eq!(job(&[&slurm[..], &[("SLURM_HET_SIZE", "2")]].concat()), None);
        // Another launcher within one of Slurm's jobs.
        let ranks = [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let open_mpi = [&slurm[..], &ranks].concat();
        assert_eq!(job(&open_mpi), None);
        let named = [&open_mpi[..], &[("PMIX_NAMESPACE", "ns1")]].concat();
        assert_eq!(job(&named).as_deref(), Some("ns1"));
    }

    #[test]
    fn variables_that_make_no_sense_are_named() {
        let refused = |variables: &[(&str, &str)], says: &str| {
            let error = of(variables).unwrap_err();
            assert!(matches!(error, Error::Environment { .. }), "{error:?}");
            assert!(error.to_string().contains(says), "{error}");
        };
        refused(&[], "no launcher has set RANK and WORLD_SIZE");
        refused(&[("RANK", "3")], "SLURM_NTASKS");
        refused(&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK=x");
        refused(&[("PMI_RANK", "2"), ("PMI_SIZE", "2")], "PMI_RANK=2: there are 2 workers");
        let one = [("RANK", "0"), ("WORLD_SIZE", "1")];
        for port in ["65535", "-1", "http"] {
            refused(&[one[0], one[1], (PORT, port)], "MASTER_PORT=");
        }
        refused(&[one[0], one[1], ("LOCAL_RANK", "all")], "LOCAL_RANK=all");
        let error = of(&one).unwrap().device().unwrap_err();
        assert!(error.to_string().contains("which of its machine's GPUs"), "{error}");
    }

    /// A port that nobody listens at, most likely for as long as a test runs.
    fn free_port() -> u16 {
        TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
    }

    fn worker(rank: usize, workers: usize, port: u16) -> Launch {
        Launch { rank, workers, local_rank: None, host: "127.0.0.1".into(), port, job: None }
    }

    /// A connection as soon as there is a listener.
    fn connect(port: u16) -> TcpStream {
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => return stream,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn what_worker_0_has_reaches_all_others() {
        let port = free_port();
        let bytes: [u8; 128] = std::array::from_fn(|i| i as u8 + 1);
        let minute = Duration::from_secs(60);
        std::thread::scope(|scope| {
            // Some are there before worker 0, and a stranger comes by.
            let others: Vec<_> = (1..4)
                .map(|rank| scope.spawn(move || worker(rank, 4, port).share(None, minute)))
                .collect();
            let first = scope.spawn(move || worker(0, 4, port).share(Some(bytes), minute));
            scope.spawn(move || {
                if let Ok(mut stranger) = TcpStream::connect(("127.0.0.1", port)) {
                    let _ = stranger.write_all(b"GET / HTTP/1.1\r\n\r\n");
                }
            });
            assert_eq!(first.join().unwrap().unwrap(), bytes);
            others.into_iter().for_each(|o| assert_eq!(o.join().unwrap().unwrap(), bytes));
        });
    }

    #[test]
    fn strangers_hold_up_no_worker() {
        let (port, bytes) = (free_port(), [7; 128]);
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let first = scope.spawn(move || worker(0, 2, port).share(Some(bytes), PATIENCE));
            let silent: Vec<_> = (0..3).map(|_| connect(port)).collect();
            // One begins as worker 1 would, and goes before it has the answer.
            let mut gone = connect(port);
            let hello = [&HELLO[..], &[1, 0, 0, 0, 2, 0, 0, 0, 0]].concat();
            gone.write_all(&hello[..5]).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            gone.write_all(&hello[5..]).unwrap();
            gone.read_exact(&mut [0; 128]).unwrap();
            drop(gone);
            std::thread::sleep(Duration::from_millis(50));
            assert!(!first.is_finished(), "it is not taken for served");
            assert_eq!(worker(1, 2, port).share(None, PATIENCE).unwrap(), bytes);
            assert_eq!(first.join().unwrap().unwrap(), bytes);
            drop(silent);
        });
        assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    }

    #[test]
    fn a_worker_of_another_job_is_a_stranger() {
        let (port, bytes) = (free_port(), [7; 128]);
        let of_job = |rank, workers, job: &str| Launch {
            job: Some(job.into()),
            ..worker(rank, workers, port)
        };
        std::thread::scope(|scope| {
            let first = scope.spawn(|| of_job(0, 2, "a").share(Some(bytes), PATIENCE));
            drop(connect(port));
            for (other, workers) in [("b", 2), ("b", 3), ("", 2), ("aa", 2)] {
                assert!(of_job(1, workers, other).ask(PATIENCE).is_err(), "{other} {workers}");
            }
            assert!(!first.is_finished());
            assert_eq!(of_job(1, 2, "a").share(None, PATIENCE).unwrap(), bytes);
            assert_eq!(first.join().unwrap().unwrap(), bytes);
        });
    }

    #[test]
    fn one_worker_meets_nobody() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_eq!(worker(0, 1, port).share(Some([3; 128]), Duration::ZERO).unwrap(), [3; 128]);
    }

    #[test]
    fn who_does_not_come_is_an_error_in_time() {
        let says = |result: Result<[u8; 128]>, says: &str| {
            let error = result.unwrap_err();
            assert!(
                matches!(error, Error::AllReduce { .. }) && error.to_string().contains(says),
                "{error}"
            );
        };
        let (port, short) = (free_port(), Duration::from_millis(200));
        let begin = Instant::now();
        says(worker(0, 3, port).share(Some([0; 128]), short), "2 of 3 workers did not come");
        says(
            worker(2, 3, port).share(None, short),
            "worker 2 of 3 did not reach worker 0 at 127.0.0.1",
        );
        assert!(begin.elapsed() < Duration::from_secs(20));
        // Launched with different numbers of workers.
        let port = free_port();
        std::thread::scope(|scope| {
            let first = scope
                .spawn(move || worker(0, 3, port).share(Some([0; 128]), Duration::from_secs(60)));
            let other = scope.spawn(move || worker(1, 2, port).share(None, Duration::from_secs(3)));
            says(first.join().unwrap(), "worker 1 was launched as one of 2, worker 0 as one of 3");
            assert!(other.join().unwrap().is_err());
        });
    }
}
