"""What is released: one version, a wheel that installs, an sdist that can be tested; documents
whose links hold."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import losia_kernels

ROOT = Path(__file__).parent.parent
NOT_RELEASED = (
    ".git",
    ".venv",
    ".*cache*",
    "__pycache__",
    "runs",
    ".hypothesis",
    "*.egg-info",
    "build",
    "dist",
)


def run(*command: str | Path, **options) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pyproject() -> dict:
    return pytest.importorskip("tomllib", reason="of Python 3.11").loads(
        (ROOT / "pyproject.toml").read_text()
    )


def test_the_version_is_said_once_and_the_changelog_begins_with_it():
    project = pyproject()
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "losia_kernels.__version__"
    }
    newest = re.search(
        r"^## (\S+)( \((unreleased|\d{4}-\d\d-\d\d)\))?$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert newest and newest[1] == losia_kernels.__version__


def test_every_extra_is_installable_beside_the_pinned_versions():
    """The ranges admit what requirements-dev.txt pins: what the tests have seen."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = pyproject()["project"]
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(pin.name): pin
        for pin in (Requirement(line) for line in lines if line[:1] not in "#")
    }
    extras = project["optional-dependencies"]
    assert {"triton", "hf", "peft", "trl", "eval", "bench", "demo", "dev"} <= set(extras)
    for extra, requirements in {"": project["dependencies"], **extras}.items():
        for requirement in map(Requirement, requirements):
            if requirement.name == "losia-kernels":
                assert requirement.extras <= set(extras), extra
            elif pin := pinned.get(canonicalize_name(requirement.name)):
                version = next(iter(pin.specifier)).version
                assert requirement.specifier.contains(version), (
                    f"{extra}: {requirement} does not admit {version}"
                )


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it, of a copy of this tree with files beside it that
    nobody should get."""
    source, output = tmp_path_factory.mktemp("source") / "losia", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_RELEASED))
    for stray in (
        ".cache/model.bin",
        "runs/first/log.jsonl",
        "tests/__pycache__/stray.cpython-311.pyc",
    ):
        (source / stray).parent.mkdir(parents=True)
        (source / stray).write_bytes(b"stray")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source)
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def files_below(*folders: str) -> set[str]:
    files = (file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}


@pytest.mark.slow
def test_the_sdist_holds_what_the_tests_need(release):
    with tarfile.open(release[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = files_below("losia_kernels", "csrc_ref", "tests", "bench", "examples", "docs")
    needed |= {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "pyproject.toml",
        "requirements-dev.txt",
        ".ci/run",
    }
    assert not needed - names
    assert not [
        name
        for name in names
        if name.startswith((".cache", "runs", ".git/")) or name.endswith(".pyc")
    ]


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(release):
    with zipfile.ZipFile(release[1]) as archive:
        names = set(archive.namelist())
        metadata = archive.read(
            f"losia_kernels-{losia_kernels.__version__}.dist-info/METADATA"
        ).decode()
    assert {name.split("/")[0] for name in names} == {
        "losia_kernels",
        release[1].name.split("-py3")[0] + ".dist-info",
    }
    assert {name for name in names if name.startswith("losia_kernels/")} == files_below(
        "losia_kernels"
    )
    assert "losia_kernels/py.typed" in names
    assert f"\nVersion: {losia_kernels.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata and "License ::" not in metadata


@pytest.mark.slow
def test_the_wheel_installs_into_a_fresh_environment(release, tmp_path):
    """Its torch is the one of this environment: nothing is downloaded."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        binaries / "python",
        "install",
        "--no-deps",
        "--no-index",
        release[1],
    )
    site = Path(
        run(
            binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
        ).strip()
    )
    (site / "tests_environment.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("-packages"))
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = run(
        binaries / "python",
        "-c",
        "import losia_kernels; print(losia_kernels.__file__)",
        cwd=tmp_path,
        env=clean,
    )
    assert Path(said.strip()).is_relative_to(site)
    assert "finetune" in run(binaries / "losia-kernels", "--help", cwd=tmp_path, env=clean)
