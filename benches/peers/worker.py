"""A worker process: one contender, kept alive, driven by lines on stdin.

    python worker.py CONTENDER THREADS OFFSET DTYPE

It greets with `hello LAYOUT VERSION` and answers each line with one line:

    load LAYER… DIR   ready                  LAYER: n c_in c_out h w stride groups act
    result FILE       done                   runs once, writes dst in the contender's layout
    time SECONDS      times CALLS MEDIAN MIN in nanoseconds

or with `error MESSAGE`. `rust/src/main.rs` speaks the same protocol.
"""

import importlib
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from contenders import CONTENDERS, Files, Loaded
from layer import Layer

# As in rust/src/main.rs, which see.
WARM_UP = 0.1
CALLS = 20
PATIENCE = 4.0


def time(call: Callable[[], object], seconds: float) -> tuple[int, float, int]:
    """How many calls, their median and their minimum in nanoseconds."""
    clock = perf_counter_ns
    begin = clock()
    while clock() - begin < WARM_UP * seconds * 1e9:
        call()
    times: list[int] = []
    begin = clock()
    while True:
        start = clock()
        call()
        end = clock()
        times.append(end - start)
        if end - begin >= (seconds if len(times) >= CALLS else PATIENCE * seconds) * 1e9:
            return len(times), statistics.median(times), min(times)


def serve(hello: str, load: Callable[[str], Loaded]) -> None:
    """Answers requests until stdin ends. `load` gets what follows the word."""
    # Libraries print to stdout as they like; replies have a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(hello, file=replies)
    loaded: Loaded | None = None
    for line in sys.stdin:
        verb, _, rest = line.rstrip("\n").partition(" ")
        try:
            if verb == "load":
                # The previous layer's memory goes first: batches are large.
                loaded = None
                loaded = load(rest)
                reply = "ready"
            elif loaded is None:
                reply = f"error no layer is loaded for {verb!r}"
            elif verb == "result":
                loaded.call()
                np.ascontiguousarray(loaded.dst(), np.float32).tofile(rest)
                reply = "done"
            elif verb == "time":
                reply = "times {} {} {}".format(*time(loaded.call, float(rest)))
            else:
                reply = f"error not a request: {line!r}"
        except Exception as error:  # whatever a library raises is this layer's answer
            reply = f"error {type(error).__name__}: {error}"[:400].replace("\n", " ")
        print(reply, file=replies)


def main() -> None:
    name, threads, offset, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    module_name, argument = CONTENDERS[name]
    module = importlib.import_module(module_name)
    layout, version, load_layer = module.contender(argument, threads, dtype)

    def load(rest: str) -> Loaded:
        *fields, directory = rest.split(" ", 8)
        layer = Layer.from_request(" ".join(fields))
        return load_layer(layer, Files(layer, Path(directory), offset))

    serve(f"hello {layout} {version}", load)


if __name__ == "__main__":
    main()
