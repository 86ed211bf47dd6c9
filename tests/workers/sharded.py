"""Run by `accelerate launch`: a script or `plastic-peft`, sharded by FSDP on CPUs, which accelerate does on GPUs only."""

import runpy
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def shard_on_cpus() -> None:
    """Where FSDP is configured, set the state that accelerate itself sets on GPUs; the rest of its code is the same."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_cpus()
    sys.argv.pop(0)
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        from plastic_peft.cli import main

        sys.exit(main(sys.argv))
