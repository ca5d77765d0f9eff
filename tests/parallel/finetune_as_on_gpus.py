"""``finetune`` under accelerate's FSDP2 on CPUs, where accelerate does not offer it though
``fully_shard`` works."""

import os
import sys

from accelerate.state import DistributedType, PartialState

from losia_kernels.cli import main

make_state = PartialState.__init__


def as_on_gpus(self, *args, **kwargs):
    make_state(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_on_gpus
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # all is written; gloo's threads may abort a process that is torn down
