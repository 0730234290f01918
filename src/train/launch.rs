//! Where a launcher has put this process among those that train together.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::cuda::CudaDevice;
use crate::error::{Error, Result};

/// What launchers call a process's number, how many there are, and its number on its machine:
/// torchrun, Open MPI, MPICH and its kin, Slurm.
const LAUNCHERS: [[&str; 3]; 4] = [
    ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
    ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
];
const ADDR: &str = "MASTER_ADDR";
const PORT: &str = "MASTER_PORT";

/// A worker says this before it asks for anything.
const HELLO: &[u8; 8] = b"pwlaunch";
/// How long a connection may take to say it.
const PATIENCE: Duration = Duration::from_secs(5);

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
/// (`LOCAL_RANK`, `OMPI_COMM_WORLD_LOCAL_RANK`, `MPI_LOCALRANKID`, `SLURM_LOCALID`), and `MASTER_ADDR`
/// and `MASTER_PORT`, which are `127.0.0.1` and 29500 unless set.
///
/// Worker 0 answers whoever reaches its port and asks as a worker would: as NCCL itself, this is for
/// networks whose machines trust one another.
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
        for [rank, size, local] in LAUNCHERS {
            let (Some(number_of), Some(workers)) = (number(rank)?, number(size)?) else { continue };
            if number_of >= workers {
                let reason = format!("there are {workers} workers");
                return Err(refuse(rank, &number_of.to_string(), reason));
            }
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
                local_rank: number(local)?,
                host: variable(ADDR).unwrap_or_else(|| "127.0.0.1".into()),
                port: port + 1,
            });
        }
        let names: Vec<_> =
            LAUNCHERS.iter().map(|[rank, size, _]| format!("{rank} and {size}")).collect();
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
                variable: LAUNCHERS[0][2],
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
        while let Some(&first) = missing.first() {
            match listener.accept() {
                // Whoever is no worker, or goes away, is no reason to give up.
                Ok((stream, _)) => match self.answer(stream, bytes, left().min(PATIENCE)) {
                    Ok((rank, workers)) if workers as usize == self.workers => {
                        missing.remove(&rank);
                    }
                    Ok((rank, workers)) => {
                        let reason = format!(
                            "worker {rank} was launched as one of {workers}, worker 0 as one of {}",
                            self.workers
                        );
                        return Err(Error::AllReduce { reason });
                    }
                    Err(_) => {}
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(broken(error)),
            }
            if left().is_zero() && missing.contains(&first) {
                let reason = format!(
                    "{} of {} workers did not come to worker 0 in time, worker {first} among them",
                    missing.len(),
                    self.workers
                );
                return Err(Error::AllReduce { reason });
            }
        }
        Ok(())
    }

    /// The other side of [`ask`](Self::ask); the number of who asks, and how many there are to it.
    fn answer(
        &self,
        mut stream: TcpStream,
        bytes: &[u8; 128],
        patience: Duration,
    ) -> io::Result<(u32, u32)> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let mut hello = [0; 16];
        stream.read_exact(&mut hello)?;
        let (magic, numbers) = hello.split_at(8);
        if magic != HELLO {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let number = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|j| numbers[4 * i + j]));
        if number(1) as usize == self.workers {
            stream.write_all(bytes)?;
        }
        Ok((number(0), number(1)))
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
            let mut hello = [0; 16];
            hello[..8].copy_from_slice(HELLO);
            hello[8..12].copy_from_slice(&(self.rank as u32).to_le_bytes());
            hello[12..].copy_from_slice(&(self.workers as u32).to_le_bytes());
            stream.write_all(&hello)?;
            let mut bytes = [0; 128];
            stream.read_exact(&mut bytes)?;
            return Ok(bytes);
        }
        Err(error)
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
        };
        for [rank, size, number] in LAUNCHERS {
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
        Launch { rank, workers, local_rank: None, host: "127.0.0.1".into(), port }
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
