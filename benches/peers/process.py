"""Contenders as processes: started alike, asked line by line, watched while they are idle."""

import argparse
import os
import select
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layer import Layer

# Longest wait for one answer, in seconds; models of large batches take a while to compile.
TIMEOUT = 120.0
# After a call, threads of some pools look for more work before they sleep. The next contender
# starts when they do; one that never does would falsify everybody else's times.
SETTLED, SETTLE_TIMEOUT = 0.002, 2.0
# What other processes may take of a CPU while something is timed there. The kernel counts in
# ticks, mostly of 10 ms: a smaller part of a short time would be noise.
FOREIGN, TICK = 0.25, 1 / os.sysconf("SC_CLK_TCK")


class Failure(Exception):
    """Something that makes the comparison meaningless, with the contender and the values."""


@dataclass
class Pass:
    """One pass of one contender over one layer; times of a call in seconds."""

    median: float
    min: float
    # Other processes took part of the contender's CPUs meanwhile.
    disturbed: bool = False


class Worker:
    """A contender's process."""

    def __init__(
        self, command: list[str], name: str, threads: int, offset: int = 0, dtype: str = "f32"
    ) -> None:
        self.name, self.threads = name, threads
        self.cpus = sorted(os.sched_getaffinity(0))[-threads:]
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*command, name, str(threads), str(offset), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(threads),
            preexec_fn=lambda: os.sched_setaffinity(0, self.cpus),
        )
        _, self.layout, self.version = self._answer("hello").split(" ", 2)

    def ask(self, request: str, expected: str) -> str:
        assert self._process.stdin
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: there is no answer, and its log says why
        return self._answer(expected)

    def time(self, seconds: float) -> "Pass":
        """Calls the loaded layer for that long."""
        _, _, median, least = self.ask(f"time {seconds}", "times").split()
        return Pass(float(median) / 1e9, float(least) / 1e9)

    def result(self, layer: Layer, file: Path) -> np.ndarray:
        """The loaded layer's dst, in the contender's layout."""
        self.ask(f"result {file}", "done")
        return np.fromfile(file, np.float32).reshape(layer.dst_shape(self.layout))

    def usage(self) -> float:
        """Seconds that its threads ran since it started."""
        return sum(int(text.split()[0]) for text in self._tasks("schedstat")) / 1e9

    def settle(self) -> None:
        """Waits until its threads sleep."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        before = self.usage()
        while True:
            time.sleep(SETTLED)
            now = self.usage()
            # The state follows the command's name, which is in parentheses.
            states = [text.rpartition(")")[2].split()[0] for text in self._tasks("stat")]
            if now == before and "R" not in states:
                return
            if time.monotonic() > deadline:
                raise Failure(f"{self.name} still runs {SETTLE_TIMEOUT} s after its call")
            before = now

    def _tasks(self, name: str) -> list[str]:
        """That file of each thread."""
        texts = []
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            try:
                texts.append((task / name).read_text())
            except (FileNotFoundError, ProcessLookupError):
                pass  # the thread ended between the two looks
        return texts

    def peak(self) -> float:
        """The machine's FMA peak now, from the worker that measures it."""
        return float(self.ask("peak", "peak").split()[1])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, expected: str) -> str:
        out = self._process.stdout
        assert out
        ready, _, _ = select.select([out], [], [], TIMEOUT)
        line = out.readline().rstrip("\n") if ready else f"no answer in {TIMEOUT} s"
        if line.split(" ")[0] == expected:
            return line
        self._log.seek(0)
        log = self._log.read()[-2000:]
        problem = line.removeprefix("error ") or "ended"
        raise Failure(f"{self.name}: {problem}" + (f"\n{log}" if log else ""))


def environment(threads: int) -> dict[str, str]:
    """The same for all contenders: threads, and a malloc that keeps what it has.

    Without the latter a library that allocates its result pays for fresh pages in every call.
    """
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    return {
        **os.environ,
        **{pool: str(threads) for pool in pools},
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 26),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def busy(cpus: list[int]) -> float:
    """Seconds for which these CPUs ran anything since the machine started."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in {f"cpu{cpu}" for cpu in cpus}:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks * TICK


def is_disturbed(foreign: float, wall: float) -> bool:
    """Whether other processes ran for too many of these seconds."""
    return foreign > FOREIGN * wall + TICK


def numbers(text: str) -> list[int]:
    """`1,2`: numbers of threads, for argparse."""
    values = [int(number) for number in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: threads start at 1")
    return values
