"""What the machine does to a program, in words that say what to do about it: full disks and memories, lost processes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch report failed writes without an error number
_UNWRITTEN = (*map(os.strerror, _FULL), "inline_container", "PytorchStreamWriter", "iostream error")
_UNREACHED = ("gloo", "NCCL", "TCPStore", "Timed out waiting", "process group")
_NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory")


class DiskFullError(OSError):
    """A file could not be written whole, for want of space."""


class MemoryFullError(OSError):
    """The memory of the GPU, or of the machine, is too small for what was asked of it."""


class LostProcessError(RuntimeError):
    """Another process of the same run did not answer."""


@contextlib.contextmanager
def explained(folder: str | os.PathLike[str] | None = None, process: int = 0) -> Iterator[None]:
    """Raise errors of full disks and memories, networks and lost processes as errors that say what to do; others pass.

    Args:
        folder: The output folder of a run, which the same command resumes.
        process: Index of this process.

    Raises:
        DiskFullError: If a file could not be written whole for want of space.
        MemoryFullError: If the memory of the GPU or of the machine is full.
        OSError: If the port is in use on which the processes were to meet, or torch lacks the library to do so.
        LostProcessError: If another process did not answer.
    """
    resuming = "" if folder is None else " The same command resumes from the last whole checkpoint."
    try:
        yield
    except (DiskFullError, MemoryFullError, LostProcessError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        if getattr(error, "errno", None) in _FULL or any(words in message for words in _UNWRITTEN):
            raise DiskFullError(
                f"A file could not be written whole ({message}){_free(folder)}: make room, or write elsewhere.{resuming}"
            ) from error
        if full := _out_of_memory(error):
            raise MemoryFullError(
                f"Memory is full ({full}): when training, lower --per_device_train_batch_size (--gradient_accumulation_steps makes "
                "up for it) or pass --gradient_checkpointing or --bf16; when measuring, lower --measure_batch_size; when "
                f"predicting or evaluating, --batch_size.{resuming}"
            ) from error
        if "EADDRINUSE" in message:
            raise OSError(
                f"The port on which the processes of this run meet is taken ({message}): choose another one with accelerate's "
                "--main_process_port, torchrun's --master_port or MASTER_PORT."
            ) from error
        if "built in" in message and "NCCL" in message:
            raise OSError(
                f"This PyTorch cannot connect GPUs ({message}): pass --ddp_backend gloo, train on CPUs with --use_cpu, or "
                "install a build of PyTorch with NCCL."
            ) from error
        if isinstance(error, RuntimeError) and any(words in message for words in _UNREACHED):
            raise LostProcessError(
                f"Process {process} got no answer from another one, which has ended or hangs ({message}): see the first error "
                f"among their logs.{resuming}"
            ) from error
        raise


def unwritable(folder: Path, reason: object, flag: str = "--output_dir") -> OSError:
    """The error of a folder in which nothing can be written, with the flag that names another."""
    return OSError(f"{folder} cannot be written ({reason}): choose another place with {flag}.")


def check_writable(folder: Path, flag: str = "--output_dir") -> None:
    """Fail before hours of work, not after them, where a folder, which need not exist, cannot be written.

    Raises:
        OSError: That says so and names `flag`.
    """
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise unwritable(folder, f"{existing} is no folder", flag)
    if not os.access(existing, os.W_OK):
        raise unwritable(folder, f"{existing} is read-only", flag)


def _out_of_memory(error: BaseException | None) -> str:
    """What it was that found no memory, also where an error about something else was made of it."""
    while error is not None:
        line = " ".join(str(error).split())[:200]
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if known or (isinstance(error, RuntimeError) and any(words in line for words in _NO_ROOM)):
            return line or type(error).__name__
        error = error.__cause__
    return ""


def _free(folder: str | os.PathLike[str] | None) -> str:
    if folder is None or not Path(folder).is_dir():
        return ""
    return f"; the disk of {folder} has {shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
