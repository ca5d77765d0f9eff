"""Run a script where triton compiles for a GPU that is not there (see ``compile_kernels``), not
interpreted."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_offline(script: str) -> str:
    """What ``script`` prints; it may import ``tests.kernels`` and ``bench``."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
