"""What a result must say about where it comes from; never the name of the machine."""

import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PEERS = "transformers peft galore-torch bitsandbytes liger-kernel cut-cross-entropy".split()
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
# Code that no row depends on: a table may be mended without making the rows stale.
REPORTING = (
    "report tables plots slopes paper quick counts compiled predicted cluster gpu study".split()
)
REPORTING += ["markdown", "pictures"]


def provenance(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Device, driver, versions, clocks as found, commit. ``commit`` is for a copy of the tree without its history."""
    now = datetime.datetime.now(datetime.timezone.utc)
    found = {
        "device": device_name(device),
        "kind": "GPU" if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in PEERS},
        "commit": commit or _commit(),
        "sources": _sources(),
        "started": now.isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda or torch.version.hip}
        found |= {"driver": _nvidia_smi("driver_version", device)}
        found |= {"clocks": _clocks_at_work(device), "memory_bytes": properties.total_memory}
        found |= {"multiprocessors": properties.multi_processor_count}
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks(device: torch.device) -> str | None:
    """Clocks, power limit and temperature at this moment; None where nvidia-smi does not know the device."""
    found = _nvidia_smi(CLOCKS, device)
    if found is None or found.count(",") != CLOCKS.count(","):
        return found
    sm, most, memory, power, celsius = found.split(", ")
    return f"SM {sm} of {most} MHz, memory {memory} MHz, {power} W, {celsius} C"


def _clocks_at_work(device: torch.device) -> str | None:
    """Read while products are queued: an idle GPU shows clocks that nothing is measured at."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    for _ in range(1000):
        torch.mm(a, a)
    found = clocks(device)
    torch.cuda.synchronize(device)
    return found


def _run(*command: str) -> str | None:
    how = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    try:
        return subprocess.run(list(command), timeout=20, **how).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _nvidia_smi(query: str, device: torch.device) -> str | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # numbers may differ
    chosen = f"--id={'0' if uuid is None else f'GPU-{uuid}'}"
    return _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", chosen)


def origin(provenance: dict[str, Any]) -> str:
    """One line under a table: where its figures come from."""
    versions = [f"torch {provenance['torch']}"]
    versions += [f"triton {provenance['triton']}"] if provenance["triton"] else []
    versions += [f"{name} {version}" for name, version in provenance["peers"].items() if version]
    versions += [f"driver {provenance['driver']}"] if provenance.get("driver") else []
    clocks = provenance.get("clocks")
    versions += [f"clocks {clocks}" if clocks else f"{provenance['threads']} threads"]
    where = f"{provenance['kind']}: {provenance['device']}; {', '.join(versions)}"
    return f"{where}; commit {provenance['commit']}; {provenance['started'][:10]}"


def _commit() -> str:
    changed = _run("git", "status", "--porcelain", "--", "losia_kernels", "bench/*.py")
    head = _run("git", "rev-parse", "HEAD")
    if changed is None or head is None:
        return "unknown"
    return head[:12] + ("-changed" if changed else "")


def _sources() -> str:
    """A hash of the code that figures depend on, which holds where there is no history too."""
    digest = hashlib.sha256()
    for folder in ("losia_kernels", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "bench" and (path.stem in REPORTING or "quality" in path.parts):
                continue
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
