"""Training runs as ``tools/train_net.py`` leaves them: what was trained, how, how well it did."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from sasa_det.config import load_config
from sasa_det.evaluation import RESULTS_FILE

CONFIG_FILE = "config.yaml"  # as detectron2's default_setup calls it
METRICS_FILE = "metrics.json"
MAX_DEPTH = 3

# Two runs may differ in these and still be compared; MODEL.SASA is compared by itself.
_FREE = (
    *("OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK", "MODEL.DEVICE"),
    *("DATASETS.TEST", "DATALOADER.", "TEST.", "SOLVER.CHECKPOINT_PERIOD", "MODEL.SASA."),
)


class Architecture(NamedTuple):
    """What the rows of the paper's tables differ in, at whatever width, depth and resolution.

    What has no effect is None: the mixture without an attention stem, the residual where no stage
    attends, the window where nothing but the stem does, the position where nothing attends.
    """

    stem: str
    stem_mixed_values: bool | None
    attention_stages: tuple[str, ...]
    residual: bool | None
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
        return on_dataset(self.folder, self.results, dataset).get("bbox", {})


def on_dataset(folder: Path, results: Mapping[str, dict], dataset: str) -> dict[str, Any]:
    """``results[dataset]``, or a ValueError that names the file, its datasets and the remedy."""
    if dataset not in results:
        raise ValueError(
            f"{str(folder / RESULTS_FILE)!r} has figures of {', '.join(results)}, not of "
            f"{dataset}, and different datasets cannot stand in one table; give --dataset "
            f"{next(iter(results), '')} or leave this run out."
        )
    return results[dataset]


def find_runs(folders: Sequence[Path], file: str = CONFIG_FILE) -> list[Path]:
    """The folders that hold ``file``: these themselves, and those up to three levels below.

    Raises:
        FileNotFoundError: for a folder that does not exist or that holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"The folder of runs {str(folder)!r} does not exist.")
        levels = ["*/" * depth + file for depth in range(MAX_DEPTH + 1)]
        inside = sorted(path.parent for level in levels for path in folder.glob(level))
        if not inside:
            raise FileNotFoundError(
                f"There is no {file} in {str(folder)!r} or up to {MAX_DEPTH} levels below; "
                "name output folders of the training, or a folder of such folders."
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
    results = _read_results(folder / RESULTS_FILE)
    # After the last step detectron2 counts one more.
    iterations = min(_iterations(folder / METRICS_FILE), cfg.SOLVER.MAX_ITER)
    return Run(folder, cfg, results, iterations)


def architecture(cfg: CfgNode) -> Architecture:
    """By what is attention in a config, whatever its file or folder is called."""
    sasa = cfg.MODEL.SASA
    ours = "sasa" in cfg.MODEL.BACKBONE.NAME  # detectron2's backbones do not read MODEL.SASA
    stages = tuple(sorted(sasa.ATTENTION_STAGES)) if ours else ()
    fpn = ours and sasa.FPN_ATTENTION
    head = sasa.HEAD_ATTENTION and cfg.MODEL.META_ARCHITECTURE == "SASARetinaNet"
    windows = bool(stages or head or fpn)
    stem = ours and sasa.STEM == "attention"
    return Architecture(
        stem="attention" if stem else "conv",
        stem_mixed_values=sasa.STEM_MIXED_VALUES if stem else None,
        attention_stages=stages,
        residual=sasa.BOTTLENECK_RESIDUAL if stages else None,
        head_attention=head,
        fpn_attention=fpn,
        kernel_size=sasa.KERNEL_SIZE if windows else None,
        position=sasa.POSITION if windows or stem else None,
    )


def settings(cfg: CfgNode, row_fields: Sequence[str]) -> dict[str, Any]:
    """What must be equal for a fair comparison, by config key.

    That is all but the seed, the folder, what only concerns the machine, and ``row_fields``: the
    fields of :class:`Architecture` that make the rows of the table.
    """
    found = {key: value for key, value in _flat(cfg) if not key.startswith(_FREE)}
    # Each row has a backbone of its own to start from, so whether there is one is what counts; and
    # evaluating a run's own checkpoint writes that into its config.
    weights = cfg.MODEL.WEIGHTS
    pretrained = bool(weights) and Path(weights).parent != Path(cfg.OUTPUT_DIR)
    found["MODEL.WEIGHTS"] = "pretrained" if pretrained else "from scratch"
    model = architecture(cfg)
    for field, value in model._asdict().items():
        if field not in row_fields and value is not None:
            found[f"MODEL.SASA.{field.upper()}"] = value
    if model.position is not None:  # something attends
        found["MODEL.SASA.NUM_HEADS"] = cfg.MODEL.SASA.NUM_HEADS
    return found


def differences(several: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings whose values differ among those that have them: {name: values}."""
    values: dict[str, list[Any]] = {}
    for one in several:
        for name, value in one.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    return {name: known for name, known in values.items() if len(known) > 1}


class ClassifierRun(NamedTuple):
    """A folder of tools/train_classifier.py.

    Attributes:
        folder (Path): its output folder.
        model: what its evaluation.json says of the model: depth, stem, attention_stages, ...
        results: {dataset: {"top1": ..., "top5": ...}}, in percent.
    """

    folder: Path
    model: dict[str, Any]
    results: dict[str, dict[str, float | None]]

    @property
    def unfinished(self) -> str | None:
        """One sentence why its figures are not those of the finished training, or None.

        They are taken after each epoch; files of older trainings do not say after which.
        """
        epochs = self.model.get("epochs")
        trained = self.model.get("epochs_trained", epochs)
        if trained != epochs:
            reason = f"has figures after {trained} of {epochs} epochs"
        elif not (self.folder / "model_final.pth").is_file():
            reason = "has no model_final.pth"
        else:
            return None
        return (
            f"The run {str(self.folder)!r} {reason}, so it is not finished; go on with "
            "tools/train_classifier.py --resume."
        )


def read_classifier(folder: Path) -> ClassifierRun | None:
    """None for a run that is no classifier's.

    Raises:
        ValueError: for a file that makes no sense, naming it.
    """
    found = _read_results(folder / RESULTS_FILE)
    results = {
        name: tasks["classification"] for name, tasks in found.items() if "classification" in tasks
    }
    described = [tasks["model"] for tasks in found.values() if "model" in tasks]
    return ClassifierRun(folder, described[0] if described else {}, results) if results else None


def _read_results(path: Path) -> dict[str, dict[str, dict]]:
    try:
        results = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}; evaluate the run anew.") from error
    if not isinstance(results, dict) or not all(
        isinstance(tasks, dict) and all(isinstance(figures, dict) for figures in tasks.values())
        for tasks in results.values()
    ):
        raise ValueError(
            f"{str(path)!r} is not {{dataset: {{task: {{name: figure}}}}}}; evaluate the run anew."
        )
    return results


def _flat(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _iterations(path: Path) -> int:
    """A last line that was cut off is no error; a second training in the folder begins anew."""
    seen = evaluated = 0
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            number = entry["iteration"] + 1
        except (ValueError, KeyError, TypeError):
            continue
        if number < seen:
            evaluated = min(evaluated, number)
        seen = number
        if any(key.endswith("bbox/AP") for key in entry):
            evaluated = seen
    return evaluated or seen
