"""Files that appear under their names whole, or not at all."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class CheckpointError(OSError):
    """A checkpoint cannot be written, or none can be read; the message is for the user."""


def make_folder(path: Path) -> None:
    """Makes a folder for what a tool will write, before it computes anything.

    Raises:
        ValueError: if nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"The output folder {str(path)!r} cannot be written: {error.strerror}; choose another."
        ) from error


def make_folder_of(*paths: Path) -> None:
    """The same for the folders of files that a tool will write, for each once.

    Raises:
        ValueError: if nothing can be written there, or a file's name is that of a folder.
    """
    for folder in dict.fromkeys(path.parent for path in paths):
        make_folder(folder)
    for path in paths:
        if path.is_dir():
            raise ValueError(f"The output {str(path)!r} is a folder; choose a name for a file.")


def check_overwriting(inputs: Iterable[str], outputs: Iterable[Path]) -> None:
    """Raises ValueError where an output is a file that is read, by whatever name."""
    read = {_file_of(path) for path in inputs} - {None}
    for path in outputs:
        if _file_of(path) in read:
            raise ValueError(
                f"The output {str(path)!r} is one of the files that are read; choose another."
            )


def _file_of(path: str | Path) -> tuple[int, int] | None:
    """The same for all names of a file; None if there is none."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to, which takes its place once it is on the disk.

    What lies at ``path`` stays, and nothing beside it, if the block raises or the disk is full.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the name, too, outlives a machine that fails
    os.close(folder)


def write_text(text: str, path: Path) -> None:
    """Writes a file whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(text)


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Writes what torch.save makes of it, whole or not at all; what lies there is replaced.

    Raises:
        CheckpointError: if it cannot be written, with the reason.
    """
    try:
        with whole_file(path) as beside, beside.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch puts an error of its own in front of the disk's.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        message = f"The checkpoint {str(path)!r} cannot be written: {reason}"
        raise CheckpointError(message) from error
