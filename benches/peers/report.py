"""What a comparison says: the CSV, ratios per layer, geometric means, a table, a picture."""

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from layer import Layer

OURS = {"nchw": "pointwise-nchw", "nhwc": "pointwise-nhwc"}

# As a reader knows them; a contender that is not here has its own name.
TITLES = {
    "pointwise-nchw": "pointwise",
    "pointwise-nhwc": "pointwise",
    "litert": "LiteRT (XNNPACK)",
    "openvino-nchw": "OpenVINO",
    "openvino-nhwc": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "torch-onednn": "PyTorch, oneDNN fused",
    "torch-nchw": "PyTorch, eager",
    "torch-nhwc": "PyTorch, eager",
    "torch-addmm": "PyTorch, addmm (MKL)",
    "gemm": "gemm + epilogue pass",
    "faer": "faer + epilogue pass",
}


@dataclass(frozen=True)
class Row:
    """A contender's times on a layer: the median over passes of each pass's median, the least
    time of any call, the largest pass median by the smallest, and how many passes other processes
    disturbed (which count only if all of them were)."""

    layer: Layer
    contender: str
    layout: str
    threads: int
    version: str
    dtype: str
    median_us: float
    min_us: float
    spread: float
    disturbed: int

    @property
    def gflops(self) -> float:
        return self.layer.flops / self.median_us / 1e3


COLUMNS = (
    "model,layer,n,cin,cout,h,w,stride,groups,act,contender,layout,threads,version,"
    "median_us,min_us,spread,disturbed,gflops,dtype"
).split(",")


def write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for row in rows:
            it = row.layer
            sizes = (it.n, it.c_in, it.c_out, it.h, it.w, it.stride, it.groups)
            who = (row.contender, row.layout, row.threads, row.version)
            times = (row.median_us, row.min_us)
            out.writerow(
                [it.model, it.name, *sizes, it.act, *who]
                + [f"{time:.2f}" for time in times]
                + [f"{row.spread:.3f}", row.disturbed, f"{row.gflops:.1f}", row.dtype]
            )


def read(path: Path) -> list[Row]:
    rows = []
    with path.open() as file:
        for line in csv.DictReader(file):
            # Earlier files have no dtype: f32.
            if list({**line, "dtype": None}) != COLUMNS:
                raise SystemExit(f"{path} has columns {list(line)}, expected {COLUMNS}")
            sizes = [int(line[c]) for c in ("n", "cin", "cout", "h", "w", "stride", "groups")]
            times = [float(line[c]) for c in ("median_us", "min_us", "spread")]
            layer = Layer(line["model"], line["layer"], *sizes, line["act"])
            who = (line["contender"], line["layout"], int(line["threads"]), line["version"])
            dtype = line.get("dtype", "f32")
            rows.append(Row(layer, *who, dtype, *times, int(line["disturbed"])))
    return rows


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


class Index:
    """Rows by layer, contender and threads, all in the order in which they were measured."""

    def __init__(self, rows: list[Row]) -> None:
        if len(dtypes := {row.dtype for row in rows}) > 1:
            raise SystemExit(f"rows of {' and '.join(sorted(dtypes))} are not compared")
        self._rows = {(row.layer, row.contender, row.threads): row for row in rows}
        self.layers = list(dict.fromkeys(layer for layer, _, _ in self._rows))
        self.contenders = list(dict.fromkeys(name for _, name, _ in self._rows))
        self.threads = sorted({threads for _, _, threads in self._rows})
        self.layout = {row.contender: row.layout for row in self._rows.values()}

    def get(self, layer: Layer, contender: str, threads: int) -> Row | None:
        return self._rows.get((layer, contender, threads))

    def speedups(self, contender: str, threads: int) -> dict[Layer, float]:
        """Theirs ÷ ours in time, in the contender's layout, where both were measured."""
        return self._speedups(OURS[self.layout[contender]], [contender], threads)

    def speedups_of_best(self, layout: str, threads: int) -> dict[Layer, float]:
        """The same against the fastest other contender of that layout, layer by layer."""
        peers = [c for c in self.contenders if self.layout[c] == layout and c != OURS[layout]]
        return self._speedups(OURS[layout], peers, threads)

    def _speedups(self, ours: str, peers: list[str], threads: int) -> dict[Layer, float]:
        found = {}
        for layer in self.layers:
            mine = self.get(layer, ours, threads)
            theirs = [row for peer in peers if (row := self.get(layer, peer, threads))]
            if mine and theirs:
                found[layer] = min(row.median_us for row in theirs) / mine.median_us
        return found

    def gflops(self, contender: str, threads: int) -> float | None:
        rows = [self.get(layer, contender, threads) for layer in self.layers]
        speeds = [row.gflops for row in rows if row]
        return geomean(speeds) if speeds else None


def print_ratios(rows: list[Row]) -> None:
    """Per layer and as geometric means: how many times as fast as the peers pointwise is."""
    index = Index(rows)
    columns: list[tuple[str, Callable[[int], dict[Layer, float]]]] = []
    if "litert" in index.contenders:
        columns.append(("nhwc/xnnpack", lambda t: index.speedups("litert", t)))
    columns += [
        ("nhwc/best", lambda t: index.speedups_of_best("nhwc", t)),
        ("nchw/best", lambda t: index.speedups_of_best("nchw", t)),
    ]
    if "candle" in index.contenders:
        columns.append(("nchw/candle", lambda t: index.speedups("candle", t)))
    for threads in index.threads:
        values = [(title, column(threads)) for title, column in columns]
        values = [(title, column) for title, column in values if column]
        if not values:
            continue
        print(f"\n{f'pointwise on {count(threads)} is so many times as fast as':48}", end="")
        print("".join(f"{title:>14}" for title, _ in values))
        for layer in index.layers:
            if not any(layer in column for _, column in values):
                continue
            cells = [
                f"{column[layer]:14.2f}" if layer in column else f"{'':14}" for _, column in values
            ]
            print(f"{describe(layer):48}{''.join(cells)}")
        cells = [f"{geomean(column.values()):14.3f}" for _, column in values]
        print(f"{'geometric mean':48}{''.join(cells)}")
        cells = [f"{min(column.values()):14.2f}" for _, column in values]
        print(f"{'worst layer':48}{''.join(cells)}")


def count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def describe(layer: Layer) -> str:
    notes = [f"n {layer.n}"] if layer.n != 1 else []
    notes += [f"stride {layer.stride}"] if layer.stride != 1 else []
    notes += [f"groups {layer.groups}"] if layer.groups != 1 else []
    shape = f"{layer.c_in}->{layer.c_out} {layer.h}x{layer.w}"
    return " ".join([layer.model, layer.name, shape, *notes])


def title(contender: str) -> str:
    return TITLES.get(contender, contender)


def table(rows: list[Row]) -> str:
    """Markdown: each contender's geometric means, fastest first, and how ours compares."""
    index = Index(rows)
    first = index.threads[0]
    order = sorted(
        index.contenders,
        key=lambda c: -(index.gflops(c, first) or index.gflops(c, index.threads[-1]) or 0),
    )
    head = ["library", "layout"]
    head += [f"GFLOP/s, {count(threads)}" for threads in index.threads]
    head += [f"pointwise ÷ it, {count(threads)}" for threads in index.threads]
    lines = [head, ["---", "---"] + ["---:"] * (2 * len(index.threads))]
    for contender in order:
        ours = contender in OURS.values()
        bold = "**" if ours else ""
        cells = [f"{bold}{title(contender)}{bold}", index.layout[contender].upper()]
        speeds = [index.gflops(contender, threads) for threads in index.threads]
        cells += ["" if speed is None else f"{speed:.0f}" for speed in speeds]
        for threads in index.threads:
            speedups = {} if ours else index.speedups(contender, threads)
            cells.append(f"{geomean(speedups.values()):.2f}" if speedups else "")
        lines.append(cells)
    for layout in OURS:
        best = [index.speedups_of_best(layout, threads) for threads in index.threads]
        if any(best):
            cells = ["*the fastest of them, layer by layer*", layout.upper()]
            cells += [""] * len(index.threads)
            cells += [f"{geomean(b.values()):.2f}" if b else "" for b in best]
            lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(path: Path, rows: list[Row]) -> None:
    """Speedups over each contender in its layout: a dot per layer, a bar at the geometric mean."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    # Text as paths looks the same everywhere; a fixed salt gives the same file for the same data.
    matplotlib.rcParams.update({"svg.hashsalt": "pointwise", "font.size": 11})
    index = Index(rows)
    peers = [
        c
        for c in index.contenders
        if c not in OURS.values() and any(index.speedups(c, t) for t in index.threads)
    ]
    if not peers:
        raise SystemExit("nothing to draw: no layer was measured in pointwise and in a peer")
    peers.sort(
        key=lambda c: geomean(
            next(s for t in index.threads if (s := index.speedups(c, t))).values()
        )
    )
    labels = [f"{title(c)}, {index.layout[c].upper()}" for c in peers]
    figure, axes = pyplot.subplots(
        1,
        len(index.threads),
        figsize=(3.2 + 3.4 * len(index.threads), 1.8 + 0.42 * len(peers)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, threads in zip(axes[0], index.threads):
        axis.axvline(1, color="#444444", linewidth=1)
        for y, contender in enumerate(peers):
            ratios = list(index.speedups(contender, threads).values())
            if not ratios:
                continue
            colour = "#1f6f8b" if index.layout[contender] == "nhwc" else "#c8553d"
            axis.scatter(ratios, [y] * len(ratios), s=16, color=colour, alpha=0.35, linewidths=0)
            mean = geomean(ratios)
            axis.plot([mean, mean], [y - 0.32, y + 0.32], color=colour, linewidth=3)
            axis.annotate(
                f"{mean:.2f}×",
                (1, y),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
            )
        axis.set_title(count(threads))
        axis.set_xscale("log")
        axis.set_xlabel("time of the library ÷ time of pointwise")
        axis.grid(axis="x", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axis.set_yticks(range(len(peers)), labels)
    axis.invert_yaxis()
    # Room on the right for the geometric means.
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.22)
    axis.xaxis.set_major_locator(ticker.FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32]))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    figure.suptitle(
        "How many times as fast pointwise is\n"
        f"{len(index.layers)} layers (dots), geometric mean (bars); colours: layouts",
        fontsize=12,
    )
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    pyplot.close(figure)
