#!/usr/bin/env python
"""Time and peak memory of local attention beside the convolution it replaces, and beside others.

    python tools/benchmark.py                                # everything, on the CPU
    python tools/benchmark.py --suite layer model            # one layer, the whole detectors
    python tools/benchmark.py --device cuda --dtype bfloat16 --batch 16

Suites: "layer", one layer by every implementation; "shapes", every attention layer of RetinaNet;
"scaling", against the size of the map and of the window, with charts; "model", RetinaNet's
inference and training step. Tables appear here; benchmark.md, benchmark.json and the charts are
written to the output folder.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

import sasa_det  # noqa: F401  (registers the models; before detectron2, see compat.py)

# isort: split
from detectron2.config import CfgNode

from sasa_det import env
from sasa_det.analysis import charts, comparison, memory, report
from sasa_det.analysis.comparison import Comparison
from sasa_det.analysis.detector_workloads import model_contestants
from sasa_det.analysis.peers import PEERS, available_peers
from sasa_det.analysis.timing import SLOW, SLOW_ROUNDS
from sasa_det.analysis.workloads import (
    CONVOLUTION,
    MEMORY_FORMATS,
    OURS,
    Contestant,
    LayerShape,
    Setting,
    attention_shapes,
    layer_contestants,
    stem_contestants,
)
from sasa_det.config import load_config
from sasa_det.ops.checks import check_heads, check_kernel_size
from sasa_det.whole_files import make_folder

# Of detectron2 0.5's anchors, once in every process that measures memory.
warnings.filterwarnings("ignore", message="torch.meshgrid")

CONFIGS = Path(__file__).parent.parent / "configs"
DTYPES = ("float32", "bfloat16", "float16")
LAYER_MODES = {"forward": False, "forward+backward": True}
MODEL_MODES = {"inference": False, "training step": True}

HOW = f"""\
- Every contestant runs once in each round, in turn, after a warm-up. Times are medians, in
  brackets the quartiles. Ratios are medians of the ratios within a round. Who is {SLOW} times
  slower than the fastest takes part in the first {SLOW_ROUNDS} rounds only.
- Layers include their projections; forward+backward takes the gradients of input and weights from
  a gradient of the output that is there before.
  Where a convolution has a stride, attention is followed by the average pooling in its place.
- Both memory formats are tried. A layer's faster one counts, the baseline's, too. Detectors show
  both; ratios refer to the baseline's faster one in time, to its smaller one in memory. Scaling is
  measured in channels_last.
- Peak memory is that of a step, above model and input: on the CPU the resident memory of a process
  of its own, whose C library gives back at once what is freed; on CUDA what torch's allocator
  handed out. "whole process" is its peak with everything (on CUDA: with model and input). 1 MiB is
  2^20 bytes.
- Detectors have random weights and find no boxes. A training step is forward, backward and SGD.
  "compiled" are backbone and head, by torch.compile."""


def main() -> None:
    args = parse_args()
    check_args(args)
    torch.backends.cudnn.benchmark = True  # the convolution at its best
    if args.device == "cpu":
        memory.limit_memory()
    benchmark = Benchmark(args)
    benchmark.say(f"# Benchmark\n\n{as_list(benchmark.environment)}\n\n{benchmark.notes()}")
    for suite in args.suite:
        SUITES[suite](benchmark)
        benchmark.write()  # after each: what was measured is not lost
    print(f"\nWritten to {args.output}.", file=sys.stderr)


class Benchmark:
    """The settings of a run, and what it has measured and said so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.setting = Setting(args.device, args.dtype, args.batch)
        self.environment = env.describe(args.device)
        self.left_out = {name: why for name, why in available_peers().items() if why is not None}
        self.peers = [name for name in PEERS if name not in self.left_out]
        if args.without_peers:
            self.peers = []
        self.comparisons: list[Comparison] = []
        self.text: list[str] = []

    def compare(
        self,
        suite: str,
        title: str,
        mode: str,
        case: dict,
        contestants: list[Contestant],
        *,
        baseline: str = CONVOLUTION,
        ours: str | None = OURS,
    ) -> Comparison:
        """Measures one case."""
        print(f"{suite}: {title}, {mode} ...", file=sys.stderr)
        case = {**case, **self.setting._asdict()}
        result = Comparison(suite, title, mode, case, baseline, ours, every_row=suite == "model")
        comparison.run(result, contestants, self.args.rounds, self.args.device)
        self.comparisons.append(result)
        return result

    def compare_layer(
        self,
        suite: str,
        shape: LayerShape,
        mode: str,
        memory_formats: Sequence[str] = tuple(MEMORY_FORMATS),
    ) -> Comparison:
        contestants = layer_contestants(
            shape, self.setting, LAYER_MODES[mode], self.peers, memory_formats
        )
        return self.compare(suite, str(shape), mode, shape._asdict(), contestants)

    def say(self, text: str) -> None:
        self.text.append(text)
        print(f"\n{text}", flush=True)

    def grids(
        self,
        title: str,
        cases: list[Comparison],
        labels: list[str],
        first: str,
        figures: dict[str, tuple[report.Figure, bool]],
    ) -> None:
        """A table for each figure; with True, how much it grows."""
        for name, (figure, growth) in figures.items():
            table = report.grid_table(cases, labels, figure, first=first, growth=growth)
            self.say(f"## {title}: {name}\n\n{table}")
        self._say_failures(cases, labels)

    def _say_failures(self, cases: list[Comparison], labels: list[str]) -> None:
        why: dict[str, list[str]] = {}
        for case, label in zip(cases, labels):
            for row in case.shown_rows():
                reason = row.failure or row.memory_failure
                if reason is not None:
                    why.setdefault(f"{row.implementation}: {reason}", []).append(label)
        if why:
            lines = (f"- {reason} ({'; '.join(labels)})" for reason, labels in why.items())
            self.say("Not measured:\n\n" + "\n".join(lines))

    def notes(self) -> str:
        differences = (f"- {name}: {PEERS[name].differs}" for name in self.peers)
        left_out = (f"- {name} is left out: {why}." for name, why in self.left_out.items())
        return "\n".join([HOW, *differences, *left_out])

    def write(self) -> None:
        data = {
            "environment": self.environment,
            "settings": {**self.setting._asdict(), "rounds": self.args.rounds},
            "differences": {name: PEERS[name].differs for name in self.peers},
            "left_out": self.left_out,
            "comparisons": [report.as_data(c) for c in self.comparisons],
        }
        (self.args.output / "benchmark.json").write_text(json.dumps(data, indent=1) + "\n")
        (self.args.output / "benchmark.md").write_text("\n\n".join(self.text) + "\n")


def run_layer(benchmark: Benchmark) -> None:
    args = benchmark.args
    shape = LayerShape(
        args.channels, args.channels, args.size, args.size, args.kernel_size, args.heads
    )
    for mode in LAYER_MODES:
        table = report.comparison_table(benchmark.compare_layer("layer", shape, mode))
        benchmark.say(f"## Layer, {mode}: {shape}\n\n{table}")


def run_shapes(benchmark: Benchmark) -> None:
    size = benchmark.args.image_size
    configs = read_configs([CONFIGS / "retinanet_conv.yaml", CONFIGS / "retinanet_full_attn.yaml"])
    convolutional, attentive = configs.values()
    shapes = attention_shapes(attentive, size)
    stems = {CONVOLUTION: convolutional, OURS: attentive}
    for mode, training in LAYER_MODES.items():
        contestants = stem_contestants(stems, size, benchmark.setting, training)
        case = {"image_size": size, "layers": ["backbone.bottom_up.stem"]}
        cases = [benchmark.compare("shapes", "stem", mode, case, contestants)]
        labels = [f"stem (7x7 convolution), {size}x{size}"]
        for shape, names in shapes.items():
            cases.append(benchmark.compare_layer("shapes", shape, mode))
            cases[-1].case["layers"] = names
            labels.append(f"{shape}; {len(names)} layer{'s' * (len(names) > 1)}")
        figures: dict[str, tuple[report.Figure, bool]] = {
            f"time ÷ {CONVOLUTION}": (report.time_ratio, False),
            f"memory ÷ {CONVOLUTION}": (report.memory_ratio, False),
            "time (ms)": (report.milliseconds, False),
            "peak memory (MiB)": (report.mebibytes, False),
        }
        title = f"Shapes of RetinaNet at {size}x{size}, {mode}"
        benchmark.grids(title, cases, labels, "shape", figures)


def run_scaling(benchmark: Benchmark) -> None:
    args = benchmark.args
    for mode in LAYER_MODES:

        def compare(size: int, kernel_size: int, mode: str = mode) -> Comparison:
            shape = LayerShape(args.channels, args.channels, size, size, kernel_size, args.heads)
            # One format, so that a curve does not jump where the other one is faster.
            return benchmark.compare_layer("scaling", shape, mode, ["channels_last"])

        by_size = [compare(size, args.kernel_size) for size in args.sizes]
        figures: dict[str, tuple[report.Figure, bool]] = {
            f"time ÷ {CONVOLUTION}": (report.time_ratio, False),
            "time a position (ns)": (report.nanoseconds_a_position, True),
            "peak memory (MiB)": (report.mebibytes, False),
        }
        shared = f"{args.channels} channels, {args.heads} heads, batch {args.batch}, {args.dtype}"
        title = f"Scaling with the map, {mode}: k = {args.kernel_size}, {shared}"
        benchmark.grids(title, by_size, [f"{x}x{x}" for x in args.sizes], "map", figures)

        by_window = [compare(args.size, k) for k in args.kernel_sizes]
        figures = {
            f"time ÷ {CONVOLUTION}": (report.time_ratio, False),
            "time (ms)": (report.milliseconds, True),
            "peak memory (MiB)": (report.mebibytes, True),
        }
        title = f"Scaling with the window, {mode}: {args.size}x{args.size}, {shared}"
        benchmark.grids(title, by_window, [str(k) for k in args.kernel_sizes], "k", figures)

        if importlib.util.find_spec("matplotlib") is None:
            benchmark.say("No chart: matplotlib is not installed.")
            continue
        name = f"scaling_{mode.replace('+', '_')}.png"
        fixed = f"left k = {args.kernel_size}, right {args.size}x{args.size}"
        title = f"One layer, {mode}: {shared}; {fixed}"
        charts.draw_scaling(by_size, by_window, title, args.output / name)
        benchmark.say(f"![{title}]({name})")


def run_model(benchmark: Benchmark) -> None:
    configs = read_configs(benchmark.args.configs)
    baseline, size = next(iter(configs)), benchmark.args.image_size
    title = f"{size}x{size}, batch {benchmark.args.batch}"
    for mode, training in MODEL_MODES.items():
        contestants = model_contestants(configs, size, benchmark.setting, training, benchmark.peers)
        case = {"image_size": size}
        result = benchmark.compare(
            "model", title, mode, case, contestants, baseline=baseline, ours=None
        )
        benchmark.say(f"## Model, {mode}: {title}\n\n{report.comparison_table(result)}")


SUITES: dict[str, Callable[[Benchmark], None]] = {
    "layer": run_layer,
    "shapes": run_shapes,
    "scaling": run_scaling,
    "model": run_model,
}


def read_configs(files: Iterable[Path]) -> dict[str, CfgNode]:
    # Built on the CPU, whatever the machine has, and moved to the device afterwards.
    return {file.stem: load_config(str(file), ["MODEL.DEVICE", "cpu"]) for file in files}


def as_list(items: dict) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in items.items())


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag: str, default: object, help: str, **options: object) -> None:
        parser.add_argument(flag, default=default, help=f"{help} (default: {default})", **options)

    add("--suite", list(SUITES), "what to run", nargs="+", metavar="NAME")
    add("--device", "cpu", "cpu or cuda")
    add("--dtype", "float32", f"one of {', '.join(DTYPES)}; detectors run it under autocast")
    add("--batch", 1, "images or maps at once", type=int)
    add("--rounds", 11, "how often each contestant is timed", type=int)
    add("--output", Path("output/benchmark"), "the folder to write to", type=Path)
    add("--channels", 256, "of the layer", type=int)
    add("--size", 80, "side of the layer's map", type=int)
    add("--kernel-size", 7, "side of the layer's window", type=int)
    add("--heads", 8, "of the layer", type=int)
    add("--sizes", [40, 80, 160, 320], "sides of the maps of scaling", type=int, nargs="+")
    add("--kernel-sizes", [3, 5, 7, 9, 11], "windows of scaling", type=int, nargs="+")
    add("--image-size", 640, "side of the images of shapes and model, in pixels", type=int)
    names = [CONFIGS / "retinanet_conv.yaml", CONFIGS / "retinanet_full_attn.yaml"]
    add("--configs", names, "of model; ratios refer to the first", type=Path, nargs="+")
    parser.add_argument(
        "--without-peers", action="store_true", help="leave out the other implementations"
    )
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError with one sentence for the user."""
    for suite in args.suite:
        if suite not in SUITES:
            raise ValueError(f"There is no suite {suite!r}; choose from {', '.join(SUITES)}.")
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"The device must be cpu or cuda, but is {args.device!r}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here; use --device cpu.")
    if args.dtype not in DTYPES:
        raise ValueError(f"The dtype must be one of {', '.join(DTYPES)}, but is {args.dtype!r}.")
    numbers = [args.batch, args.rounds, args.channels, args.size, args.image_size, *args.sizes]
    if min(numbers) < 1:
        raise ValueError("Sizes, channels, batch and rounds must be at least 1.")
    for kernel_size in (args.kernel_size, *args.kernel_sizes):
        check_kernel_size(kernel_size)
    check_heads(args.channels, args.heads)
    read_configs(args.configs)
    make_folder(args.output)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
