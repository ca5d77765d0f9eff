"""Run scripts where triton compiles for a GPU that is not there (see ``compile_kernels``), not
interpreted; also with the oldest triton that is promised, whose code differs."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# made by the Makefile: a folder with that triton and nothing else
OLDEST = Path(sys.prefix) / "triton-3.6"


def run_offline(*words: str, oldest: bool = False) -> str:
    """What ``python *words`` prints; it may import ``tests.kernels`` and ``bench``."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*([str(OLDEST)] if oldest else []), str(HERE.parents[1]), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
