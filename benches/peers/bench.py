"""Times the layers of a file in every library, alternating, and prints how pointwise compares.

Started by `run`, which makes the environment; README.md says what is compared and how.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import layer as layers
import report
from contenders import CONTENDERS, OF_DTYPE
from layer import DTYPES, Layer
from process import Failure, Pass, Worker, busy, is_disturbed, numbers
from report import Row

HERE = Path(__file__).resolve().parent
RUST = ("pointwise-nchw", "pointwise-nhwc", "gemm", "faer", "candle")
NAMES = (*RUST, *CONTENDERS)
OURS = ("pointwise-nchw", "pointwise-nhwc")

# What idle workers may use of a CPU while another is timed.
IDLE = 0.02
# A pass that was disturbed is repeated, so often at most: by other processes, or by a sagging peak,
# as when a host gives two virtual CPUs one core, which no counter of the guest shows.
RETAKES = 3
# Of the highest FMA peak seen, what it must reach before and after a pass, and how many seconds to
# wait until it does.
SAGGING, PATIENCE = 0.9, 10.0


@dataclass
class Tally:
    """How quiet the machine was."""

    passes: int = 0
    retaken: int = 0
    disturbed: int = 0
    # FMA flop/s on all threads, the highest so far.
    peak: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)


def verify(worker: Worker, layer: Layer, want: np.ndarray, dtype: str, directory: Path) -> float:
    """The error of the worker's result; raises if it is wrong."""
    got = worker.result(layer, directory / "dst.f32")
    error = layers.error(got, worker.layout, want, dtype)
    if not error <= layers.TOLERANCE[dtype]:
        raise Failure(
            f"{worker.name}, {layer.model} {layer.name}: wrong result, off by {error:.2e} of "
            f"{unit(dtype)} (at most {layers.TOLERANCE[dtype]:.0e})"
        )
    return error


def unit(dtype: str) -> str:
    return "a step" if dtype == "int8" else "the largest value"


def sags(meter: Worker, tally: Tally, patience: float = 0.0) -> bool:
    """Whether the machine's peak stays below what it was, for that many seconds."""
    deadline = time.monotonic() + patience
    while True:
        peak = max(meter.peak() for _ in range(3))
        tally.peak = max(tally.peak, peak)
        if peak >= SAGGING * tally.peak:
            return False
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.05)


def timed_pass(
    worker: Worker, workers: list[Worker], meter: Worker, seconds: float, tally: Tally
) -> Pass:
    """Times one contender while the others sleep, which is checked, and other processes do.

    A pass that was disturbed is repeated; the last try is marked if it was, too.
    """
    others = [other for other in workers if other is not worker]
    tally.passes += 1
    for _ in range(RETAKES + 1):
        sagging = sags(meter, tally, PATIENCE)
        idle = sum(other.usage() for other in others)
        ran, ran_all = worker.usage(), busy(worker.cpus)
        begin = time.monotonic()
        result = worker.time(seconds)
        wall = time.monotonic() - begin
        foreign = busy(worker.cpus) - ran_all - (worker.usage() - ran)
        worker.settle()
        idle = sum(other.usage() for other in others) - idle
        if idle > IDLE * wall:
            raise Failure(
                f"idle workers ran {idle:.3f} s of {wall:.3f} s while {worker.name} was timed"
            )
        if not (is_disturbed(foreign, wall) or sagging or sags(meter, tally)):
            return result
        tally.retaken += 1
    tally.retaken -= 1
    tally.disturbed += 1
    return replace(result, disturbed=True)


def measure(
    layer: Layer,
    workers: list[Worker],
    meter: Worker,
    args: argparse.Namespace,
    tally: Tally,
    directory: Path,
) -> list[Row]:
    """One layer in all contenders: verified, then timed pass by pass in changing order."""
    given = layers.inputs(layer, args.dtype)
    layers.write_inputs(layer, given, directory)
    want = layers.expected(layer, given)
    for worker in workers:
        worker.ask(f"load {layer.request()} {directory}", "ready")
        error = verify(worker, layer, want, args.dtype, directory)
        tally.errors[worker.name] = max(error, tally.errors.get(worker.name, 0.0))
        worker.settle()
    passes: dict[str, list[Pass]] = {worker.name: [] for worker in workers}
    order = random.Random(f"{layer.model} {layer.name}")
    for _ in range(args.passes):
        for worker in order.sample(workers, len(workers)):
            passes[worker.name].append(timed_pass(worker, workers, meter, args.seconds, tally))
    rows = []
    for worker in workers:
        done = passes[worker.name]
        # Disturbed passes count only where there is no other.
        quiet = [p for p in done if not p.disturbed] or done
        medians = [p.median for p in quiet]
        rows.append(
            Row(
                layer,
                worker.name,
                worker.layout,
                worker.threads,
                worker.version,
                args.dtype,
                median_us=statistics.median(medians) * 1e6,
                min_us=min(p.min for p in done) * 1e6,
                spread=max(medians) / min(medians),
                disturbed=sum(p.disturbed for p in done),
            )
        )
    return rows


def run(args: argparse.Namespace, threads: int, rows: list[Row]) -> None:
    """All layers on that many threads; appends to `rows` as they are done."""
    cpus = os.sched_getaffinity(0)
    if threads > len(cpus):
        raise Failure(f"--threads {threads}, but this process may use CPUs {sorted(cpus)} only")
    todo = layers.read(args.layers, args.only, args.batch)
    tally = Tally()
    workers: list[Worker] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pointwise-peers-") as name:
        meter = Worker([str(args.binary)], "peak", threads)
        try:
            for contender in args.contenders:
                python = [sys.executable, str(HERE / "worker.py")]
                command = [str(args.binary)] if contender in RUST else python
                worker = Worker(command, contender, threads, args.offset, args.dtype)
                workers.append(worker)
            for i, layer in enumerate(todo):
                new = measure(layer, workers, meter, args, tally, Path(name))
                rows += new
                best = max(new, key=lambda row: row.gflops)
                print(
                    f"{time.monotonic() - begin:5.0f} s  {i + 1}/{len(todo)}  "
                    f"{report.count(threads)}  {layer.model} {layer.name}: {best.contender} "
                    f"{best.gflops:.1f} GFLOP/s",
                    file=sys.stderr,
                )
        finally:
            for worker in (meter, *workers):
                worker.close()
    worst = max(tally.errors, key=lambda name: tally.errors[name])
    print(
        f"{report.count(threads)}: largest error {tally.errors[worst]:.1e} of {unit(args.dtype)} "
        f"({worst}); {tally.passes} passes, {tally.retaken} retaken because other processes ran or the "
        f"peak sagged, {tally.disturbed} disturbed all the same; peak {tally.peak / 1e9:.0f} GFLOP/s",
        file=sys.stderr,
    )


def names(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"no contender {name!r}, there are {','.join(NAMES)}")
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches/peers/run", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--layers", type=Path, default=HERE.parent / "layers.csv", metavar="FILE")
    add("--only", default="", metavar="TEXT", help="only layers whose line contains it")
    add("--batch", type=int, metavar="N", help="instead of the file's n")
    add("--threads", type=numbers, default=[1, 2], metavar="1,2", help="one run after the other")
    add("--passes", type=int, default=5, help="alternating passes per contender and layer [5]")
    add("--seconds", type=float, default=0.1, help="length of a pass, 20 calls or more [0.1]")
    add("--dtype", choices=DTYPES, default="f32", help="what tensors and weights hold [f32]")
    add("--contenders", type=names, metavar="A,B", help=",".join(NAMES) + " [those with the dtype]")
    add(
        "--offset",
        type=int,
        choices=range(64),
        default=0,
        metavar="BYTES",
        help="where src and dst start, past a boundary of 64 bytes [0]; malloc gives 16",
    )
    add("--csv", type=Path, metavar="OUT")
    add("--plot", type=Path, metavar="OUT.svg")
    add("--md", type=Path, metavar="OUT", help="the table for a README, else printed")
    add(
        "--from",
        dest="sources",
        type=lambda text: [Path(part) for part in text.split(",")],
        metavar="CSV,CSV",
        help="report on earlier runs instead of measuring",
    )
    add("--binary", type=Path, required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    there = NAMES if args.dtype == "f32" else (*OURS, *OF_DTYPE[args.dtype])
    args.contenders = args.contenders or list(there)
    if without := [name for name in args.contenders if name not in there]:
        parser.error(f"no {args.dtype} in {','.join(without)}, only in {','.join(there)}")
    return args


def main() -> None:
    args = parse()
    if args.sources:
        rows = [row for path in args.sources for row in report.read(path)]
        if not rows:
            raise SystemExit(f"no layer in {', '.join(map(str, args.sources))}")
        if args.csv:
            report.write(args.csv, rows)
    else:
        rows = []
        try:
            for threads in args.threads:
                run(args, threads, rows)
        except Failure as failure:
            raise SystemExit(f"error: {failure}") from failure
        finally:
            # What was measured before a failure is not lost.
            if args.csv:
                report.write(args.csv, rows)
    report.print_ratios(rows)
    table = report.table(rows)
    if args.md:
        args.md.write_text(table)
    else:
        print(f"\n{table}", end="")
    if args.plot:
        report.plot(args.plot, rows)


if __name__ == "__main__":
    main()
