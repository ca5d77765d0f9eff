"""Make or apply a delta in a process that kills itself with SIGKILL in the middle of writing.

python doomed_conversion.py ACTION COUNT FOLDER...    it dies after hashing or writing COUNT tensors
since the first file was begun
"""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

from torch import Tensor

from losia_kernels.checkpoint import delta, folder
from losia_kernels.checkpoint.writing import beside_of


def convert(action: str, dies_at: int, *folders: str) -> None:
    raw_bytes, beside, count = folder.raw_bytes, beside_of(Path(folders[-1])), iter(range(dies_at))

    def raw_bytes_or_die(tensor: Tensor) -> memoryview:
        if any(beside.rglob("*.safetensors")) and next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return raw_bytes(tensor)

    with mock.patch.object(folder, "raw_bytes", raw_bytes_or_die):
        {"make": delta.make_delta, "apply": delta.apply_delta}[action](*folders)


if __name__ == "__main__":
    convert(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
