"""What a result must say about where it comes from; never the name of the machine."""

import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("transformers", "peft", "galore-torch", "losia", "unsloth", "bitsandbytes")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def provenance(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Device, driver, versions, clocks as found, commit. ``commit`` is for a copy of the tree without its history."""
    found = {
        "device": device_name(device),
        "kind": "GPU" if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in PEERS},
        "commit": commit or _commit(),
        "sources": _sources(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _nvidia_smi("driver_version"),
            "clocks": _nvidia_smi(CLOCKS),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "losia_kernels", "bench/*.py", "bench/methods")
        return git("rev-parse", "HEAD")[:12] + ("-changed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _sources() -> str:
    """A hash of the code that was run, which holds where there is no history too."""
    digest = hashlib.sha256()
    for folder in ("losia_kernels", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
