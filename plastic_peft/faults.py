"""What the machine does to a program, in words that say what to do about it: a full disk, a lost process."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch report failed writes without an error number
_UNWRITTEN = (*map(os.strerror, _FULL), "inline_container", "PytorchStreamWriter")
_UNREACHED = ("gloo", "NCCL", "TCPStore", "Timed out waiting", "process group")


class DiskFullError(OSError):
    """A file could not be written whole, for want of space."""


class LostProcessError(RuntimeError):
    """Another process of the same run did not answer."""


@contextlib.contextmanager
def explained(folder: str | os.PathLike[str] | None = None, process: int = 0) -> Iterator[None]:
    """Raise errors of a full disk, a port in use and a lost process as errors that say what to do; others pass.

    Args:
        folder: The output folder of a run, which the same command resumes.
        process: Index of this process.

    Raises:
        DiskFullError: If a file could not be written whole for want of space.
        OSError: If the port is in use on which the processes were to meet.
        LostProcessError: If another process did not answer.
    """
    resuming = "" if folder is None else " The same command resumes from the last whole checkpoint."
    try:
        yield
    except (DiskFullError, LostProcessError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        if getattr(error, "errno", None) in _FULL or any(words in told for words in _UNWRITTEN):
            raise DiskFullError(
                f"A file could not be written whole ({told}){_free(folder)}: make room, or write elsewhere.{resuming}"
            ) from error
        if "EADDRINUSE" in told:
            raise OSError(
                f"The port on which the processes of this run meet is taken ({told}): choose another one with accelerate's "
                "--main_process_port, torchrun's --master_port or MASTER_PORT."
            ) from error
        if isinstance(error, RuntimeError) and any(words in told for words in _UNREACHED):
            raise LostProcessError(
                f"Process {process} got no answer from another one, which has ended or hangs ({told}): see the first error "
                f"among their logs.{resuming}"
            ) from error
        raise


def _free(folder: str | os.PathLike[str] | None) -> str:
    if folder is None or not Path(folder).is_dir():
        return ""
    return f"; the disk of {folder} has {shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
