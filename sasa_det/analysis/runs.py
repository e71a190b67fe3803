"""Training runs as ``tools/train_net.py`` leaves them: what was trained, how, how well it did."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from sasa_det.config import load_config
from sasa_det.engine import RESULTS_FILE

CONFIG_FILE = "config.yaml"  # as detectron2's default_setup calls it
METRICS_FILE = "metrics.json"
MAX_DEPTH = 3

# Two runs may differ in these and still be compared; all of MODEL.SASA is compared by itself.
_FREE = (
    *("OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK", "MODEL.DEVICE"),
    *("DATASETS.TEST", "DATALOADER.", "TEST.", "SOLVER.CHECKPOINT_PERIOD", "MODEL.SASA."),
)


class Architecture(NamedTuple):
    """What the rows of the paper's tables differ in, at whatever width, depth and resolution.

    What has no effect is None: the mixture without an attention stem, the window where nothing but
    the stem attends, the position where nothing attends.
    """

    stem: str
    stem_mixed_values: bool | None
    attention_stages: tuple[str, ...]
    head_attention: bool
    fpn_attention: bool
    kernel_size: int | None
    position: str | None


class Run(NamedTuple):
    """One training run.

    Attributes:
        folder (Path): its OUTPUT_DIR.
        cfg (CfgNode): its config, checked and frozen.
        results: {dataset: {"bbox": {"AP": ..., "AP50": ..., ...}}}, None where COCO has no figure;
            empty before the first evaluation.
        iterations (int): after how many its figures were taken, by its log; where that knows of no
            evaluation, how many there were.
    """

    folder: Path
    cfg: CfgNode
    results: dict[str, dict[str, dict[str, float | None]]]
    iterations: int

    @property
    def unfinished(self) -> str | None:
        """One sentence why its figures are not those of the finished training, or None.

        An evaluation.json alone does not tell: TEST.EVAL_PERIOD writes one in the midst of it.
        """
        if self.iterations < self.cfg.SOLVER.MAX_ITER:
            return (
                f"The run {str(self.folder)!r} is not finished: by {METRICS_FILE}, its figures are "
                f"those after {self.iterations} of {self.cfg.SOLVER.MAX_ITER} iterations; "
                "go on with tools/train_net.py --resume."
            )
        if not self.results:
            return (
                f"The run {str(self.folder)!r} has no {RESULTS_FILE}; "
                "evaluate it with tools/train_net.py --eval-only."
            )
        return None

    def figures(self, dataset: str) -> dict[str, float | None]:
        """The figures of the boxes on ``dataset``.

        Raises:
            ValueError: if it was evaluated on others only, naming the file, those and the remedy.
        """
        if dataset not in self.results:
            others = ", ".join(self.results)
            raise ValueError(
                f"{str(self.folder / RESULTS_FILE)!r} has figures of {others}, not of {dataset}, "
                f"and figures of different datasets cannot be compared; give --dataset "
                f"{next(iter(self.results), '')} or leave this run out."
            )
        return self.results[dataset].get("bbox", {})


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders that hold a run: these themselves, and those up to three levels below.

    Raises:
        FileNotFoundError: for a folder that does not exist or that holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"The folder of runs {str(folder)!r} does not exist.")
        levels = ["*/" * depth + CONFIG_FILE for depth in range(MAX_DEPTH + 1)]
        inside = sorted(path.parent for level in levels for path in folder.glob(level))
        if not inside:
            raise FileNotFoundError(
                f"There is no {CONFIG_FILE} in {str(folder)!r} or up to {MAX_DEPTH} levels below; "
                "name output folders of tools/train_net.py, or a folder of such folders."
            )
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(folder: Path) -> Run:
    """Reads a run, finished or not.

    Raises:
        FileNotFoundError, ValueError: for a file that is missing or makes no sense, naming it.
    """
    cfg = load_config(str(folder / CONFIG_FILE))
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}; evaluate the run anew.") from error
    shape_is_right = isinstance(results, dict) and all(
        isinstance(task, dict)
        for tasks in results.values()
        for task in (tasks.values() if isinstance(tasks, dict) else [tasks])
    )
    if not shape_is_right:
        raise ValueError(f"{str(path)!r} is not {{dataset: {{task: {{name: figure}}}}}}.")
    # After the last step detectron2 counts one more.
    iterations = min(_iterations(folder / METRICS_FILE), cfg.SOLVER.MAX_ITER)
    return Run(folder, cfg, results, iterations)


def architecture(cfg: CfgNode) -> Architecture:
    """By what is attention in a config, whatever its file or folder is called."""
    sasa = cfg.MODEL.SASA
    stages = tuple(sorted(sasa.ATTENTION_STAGES))
    head = sasa.HEAD_ATTENTION and cfg.MODEL.META_ARCHITECTURE == "SASARetinaNet"
    windows = bool(stages or head or sasa.FPN_ATTENTION)
    stem = sasa.STEM == "attention"
    return Architecture(
        stem=sasa.STEM,
        stem_mixed_values=sasa.STEM_MIXED_VALUES if stem else None,
        attention_stages=stages,
        head_attention=head,
        fpn_attention=sasa.FPN_ATTENTION,
        kernel_size=sasa.KERNEL_SIZE if windows else None,
        position=sasa.POSITION if windows or stem else None,
    )


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """What should be equal in a fair comparison, and is not: {config key: its values}.

    The seed, the folder and what only concerns the machine are free to differ, and of MODEL.SASA
    all that makes an :class:`Architecture`.
    """
    values: dict[str, list[Any]] = {}
    for run in runs:
        for key, value in _settings(run.cfg).items():
            known = values.setdefault(key, [])
            if value not in known:
                known.append(value)
    return {key: known for key, known in values.items() if len(known) > 1}


def _settings(cfg: CfgNode) -> dict[str, Any]:
    settings = {key: value for key, value in _flat(cfg) if not key.startswith(_FREE)}
    # Evaluating a run's own checkpoint writes its path into the run's config.
    if Path(cfg.MODEL.WEIGHTS).parent == Path(cfg.OUTPUT_DIR):
        settings["MODEL.WEIGHTS"] = ""
    if architecture(cfg).position is not None:  # where something attends
        settings["MODEL.SASA.NUM_HEADS"] = cfg.MODEL.SASA.NUM_HEADS
    return settings


def _flat(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _iterations(path: Path) -> int:
    """A last line that was cut off is no error."""
    seen = evaluated = 0
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            seen = max(seen, entry["iteration"] + 1)
        except (ValueError, KeyError, TypeError):
            continue
        if any(key.endswith("bbox/AP") for key in entry):
            evaluated = seen
    return evaluated or seen
