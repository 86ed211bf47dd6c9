"""The output folder of a run: locked while it goes on, with a note of what was asked for and checkpoints known to be whole."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .faults import unwritable
from .hub import SAVING
from .report import REPORT_NAME, PlasticityReport, write_whole


logger = logging.getLogger(__name__)

RUN_NAME = "plasticity_run.json"
SELECTION_NAME = "plasticity_selection.json"
RESULTS_NAME = "results.json"
WHOLE_NAME = "whole.json"
TRAINED_NAME = "trained.json"
LOCK_NAME = ".lock"
_IMAGES = "images"
_OF_A_RUN = (REPORT_NAME, SELECTION_NAME, TRAINED_NAME, RESULTS_NAME)


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder until this one ends, in whatever way: the lock goes with the process.

    Raises:
        ValueError: If another run is under way in the folder.
        OSError: If it cannot be written.
    """
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
        # some network file systems have no locks
        with contextlib.suppress(NotImplementedError):
            lock.acquire()
        # what a run that was killed while it saved has left
        for unfinished in folder.glob(f"{SAVING}*"):
            shutil.rmtree(unfinished)
    except Timeout:
        raise ValueError(
            f"Another run is under way in {folder}: wait for it or stop it (processes outlive a launcher that was killed), or "
            "choose another output_dir (--output_dir)."
        ) from None
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def check_run(folder: Path, noted: Mapping[str, Any], report: str | None = None) -> None:
    """Raise a `ValueError` if the folder holds a run with other arguments, or a report of which no run is known.

    Args:
        noted: What decides the result, as of `arguments.as_noted`.
        report: Path of the report that was given.
    """
    if (folder / RUN_NAME).is_file():
        check_note(folder, noted, report)
    elif (folder / REPORT_NAME).is_file() and not _is_own(folder, report):
        raise ValueError(
            f"{folder} holds a report, but no run: select by it with report (--report {folder / REPORT_NAME}), choose another "
            "output_dir, or remove it with start_over (--start_over)."
        )


def open_run(
    folder: Path,
    noted: Mapping[str, Any],
    images: Mapping[str, str],
    report: str | None = None,
    *,
    start_over: bool = False,
) -> None:
    """Note what a run is asked for and on which images, or check that it is what the folder's earlier run was asked for.

    Call it when all that the arguments name has been found: what it removes or notes is not to go with a mistake in them.

    Args:
        noted, report: As for `check_run`.
        images: What tells the images of each split from others, as of `data.digests`.
        start_over: Remove an earlier run first, but not the report that was given.

    Raises:
        ValueError: As `check_run`, or if the earlier run was on other images: those trained on then could be among those
            that are tested on now.
        OSError: If the note cannot be written.
    """
    if start_over:
        kept = [REPORT_NAME] if _is_own(folder, report) else []
        for name in {RUN_NAME, *_OF_A_RUN}.difference(kept):
            (folder / name).unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    check_run(folder, noted, report)
    note = folder / RUN_NAME
    if note.is_file() and _has_begun(folder, report):
        before = json.loads(note.read_text(encoding="utf-8"))
        _check_images(folder, before.get(_IMAGES, images), images)
        if _IMAGES in before:
            return
        noted = before
    try:
        write_whole(note, json.dumps({**noted, _IMAGES: images}, indent=1))
    except OSError as error:
        raise unwritable(folder, error) from None


def check_note(folder: Path, noted: Mapping[str, Any], report: str | None = None) -> None:
    """Raise a `ValueError` if the run in the folder was asked for something else, unless it has left nothing yet."""
    before = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))
    # a release that wrote the note may not have had all arguments
    changed = [f"{key} {before[key]!r} -> {noted[key]!r}" for key in noted if before.get(key, noted[key]) != noted[key]]
    if changed and _has_begun(folder, report):
        raise ValueError(
            f"{folder} holds a run with other arguments ({'; '.join(changed)}): repeat them to resume it, choose another "
            "output_dir, or remove it with start_over (--start_over)."
        )


def _has_begun(folder: Path, report: str | None) -> bool:
    """Has the run left anything but its note? A report that was given is not of its making."""
    made = [name for name in _OF_A_RUN if name != REPORT_NAME or not _is_own(folder, report)]
    return any((folder / name).is_file() for name in made) or any(folder.glob("checkpoint-*"))


def _is_own(folder: Path, report: str | None) -> bool:
    """Is the report that was given the one in the folder?"""
    own = (folder / REPORT_NAME).resolve()
    return report is not None and own in (Path(report).resolve(), (Path(report) / REPORT_NAME).resolve())


def _check_images(folder: Path, before: Mapping[str, str], images: Mapping[str, str]) -> None:
    if before != images:
        splits = [split for split in {**before, **images} if before.get(split) != images.get(split)]
        changed = [f"{split}: {before.get(split)} -> {images.get(split)}" for split in splits]
        raise ValueError(
            f"{folder} holds a run on other images ({'; '.join(changed)}): bring back those that it began with, choose another "
            "output_dir, or remove it with start_over (--start_over)."
        )


def given_report(folder: Path, path: str | None, start_over: bool = False) -> PlasticityReport | None:
    """The report that was given, `None` if there is none, or if it is gone and the folder's run has a copy.

    With `start_over`, the folder's run is about to be removed.

    Raises:
        FileNotFoundError: If there is no such report.
        ValueError: If it is no whole report, or another one than that of the folder's run.
    """
    if path is None:
        return None
    kept = folder / REPORT_NAME
    if not start_over and not Path(path).exists() and kept.is_file():
        return None
    report = PlasticityReport.load(path)
    if not start_over and kept.is_file() and PlasticityReport.load(kept) != report:
        raise ValueError(
            f"{folder} holds a run with another report than {path}: leave report out, choose another output_dir, or remove "
            "the run with start_over (--start_over)."
        )
    return report


def report_of_run(
    folder: Path, given: PlasticityReport | None, measured: Callable[[], PlasticityReport], main: bool
) -> PlasticityReport:
    """The report that the run in the folder selects by: its own if it has one, else the given or a measured one.

    Args:
        main: Whether this process is the one that saves it.
    """
    if (folder / REPORT_NAME).is_file():
        logger.info("Using the report in %s.", folder)
        return PlasticityReport.load(folder)
    report = given or measured()
    if main:
        report.save(folder)
    return report


class WholeCheckpoints(TrainerCallback):
    """Mark a checkpoint once all processes have written it, so that a half-written one is never resumed from."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.distributed_state is not None:
            args.distributed_state.wait_for_everyone()
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_whole(folder / WHOLE_NAME, json.dumps(_sizes(folder)))


def train_once(trainer: Trainer, folder: Path) -> None:
    """Train, from the last whole checkpoint if there is one; where training has ended before, load what it ended with.

    A trainer that resumes at its end may take one more step, and early stopping would start to wait anew.
    """
    note = folder / TRAINED_NAME
    ended = [folder / name for name in json.loads(note.read_text(encoding="utf-8"))] if note.is_file() else []
    if ended and all(map(_is_whole, ended)) and not trainer.args.resume_from_checkpoint:
        weights, state = ended
        logger.info("Training has ended before: loading %s.", weights)
        first = _OnlyLoad()
        trainer.callback_handler.callbacks.insert(0, first)
        with contextlib.suppress(_Loaded):
            trainer.train(resume_from_checkpoint=str(weights))
        trainer.remove_callback(first)
        trainer.is_in_train = False
        trainer.state = TrainerState.load_from_json(str(state / TRAINER_STATE_NAME))
        return
    last = last_whole_checkpoint(folder)
    checkpoint = trainer.args.resume_from_checkpoint or (str(last) if last else None)
    if checkpoint:
        logger.info("Resuming from %s.", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    last_name = f"checkpoint-{trainer.state.global_step}"
    # where the weights are that training ended with, and where the state
    names = [Path(best).name if best else last_name, last_name]
    if trainer.is_world_process_zero() and all(_is_whole(folder / name) for name in names):
        write_whole(note, json.dumps(names))


class _Loaded(Exception):
    """The trainer has loaded its checkpoint."""


class _OnlyLoad(TrainerCallback):
    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Loaded


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads((folder / WHOLE_NAME).read_text()) == _sizes(folder))
    return False


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != WHOLE_NAME)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The latest checkpoint of which every file was written, `None` if there is none."""
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_whole(folder):
            found[int(number)] = folder
    return found[max(found)] if found else None
