"""`plastic-peft` in processes of its own, one or several of a run, started from a server that has imported everything."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import socket
import sys
import time
from pathlib import Path


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["plastic_peft.cli", "plastic_peft.train", "plastic_peft.runs", "sklearn.datasets"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Ranks:
    """The processes of one command, each with its log in `<log>.<rank>`.

    Args:
        arguments: Arguments of `plastic-peft`.
        log: Path of the logs, which are appended to.
        world: How many processes.
        port: Where they meet, by default a port that is free.
        hub: URL of the Hub in the place of the real one; without it the processes are offline.
        largest_file: Bytes above which no file can grow.
        mortal: Take root's right to write where permissions forbid it.
        start: Start them at once.
    """

    def __init__(self, arguments, log, world=1, *, port=None, hub=None, largest_file=None, mortal=False, start=True):
        self.logs = [Path(f"{log}.{rank}") for rank in range(world)]
        port = port or free_port()
        options = [str(argument) for argument in arguments], hub, largest_file, mortal
        self.processes = [
            _context.Process(target=_rank, args=(rank, world, port, str(self.logs[rank]), *options))
            for rank in range(world)
        ]
        if start:
            self.start()

    def start(self):
        for process in self.processes:
            process.start()

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def kill(self, sign, rank=None):
        """Send a signal to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, sign)

    def wait_for(self, condition):
        """Wait until `condition()` holds or a process has ended; says whether it holds."""
        while not condition():
            if not all(process.is_alive() for process in self.processes):
                return condition()
            time.sleep(0.001)
        return True

    def codes(self, timeout=90):
        """Exit codes; a process that does not end in time fails the test."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, self.said()
        return [process.exitcode for process in self.processes]

    def said(self, rank=None):
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text()[-3000:] for log in logs if log.exists())


def _rank(rank, world, port, log, arguments, hub, largest_file, mortal):
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - open as long as the process lives
    os.dup2(sys.stderr.fileno(), 2)
    if world > 1:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        # launchers set the number of threads as well, and accelerate warns where nobody has
        os.environ.update(
            {key: str(value) for key, value in where.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1"
        )
    if hub:
        from huggingface_hub import constants

        # the server that this process comes from read its environment long ago
        constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub, False, True
        os.environ["NO_PROXY"] = "127.0.0.1"
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if mortal and os.geteuid() == 0:
        _give_up_override()
    import torch

    from plastic_peft.cli import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


def _give_up_override():
    """Drop CAP_DAC_OVERRIDE, so that permissions hold for root as for anybody."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    # the effective set, and the permitted one, by which access(2) judges root
    sets[0] &= ~(1 << 1)
    sets[1] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0
