# SPDX-License-Identifier: Apache-2.0
"""The versions that fit together, what of them is installed, and the commands that bring an environment back to them."""

import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "gpu"]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ((3, 11), (3, 14))
# The distribution without code that provides the name fbgemm-gpu on a CPU (vendor/fbgemm-gpu).
SHIM = "+cpu.shim"


@dataclass(frozen=True)
class Library:
    """One library of the supported set: its import name, its version, and the distributions that bring it on a CPU and on a GPU."""

    name: str
    module: str
    version: str
    cpu: str
    gpu: str
    needed_on: tuple[Device, ...] = ("cpu", "gpu")

    def distribution(self, device: Device) -> str:
        """The distribution for a device."""
        return self.cpu if device == "cpu" else self.gpu

    def is_supported(self, version: str) -> bool:
        """Whether a version is the supported one; a local part such as ``+cpu`` does not count."""
        return version.split("+")[0] == self.version

    def installed(self) -> dict[str, str]:
        """The versions of those of its distributions that are here. Two of them share one import folder and break each other."""
        found = {name: installed_version(name) for name in (self.cpu, self.gpu)}
        return {name: version for name, version in found.items() if version is not None and not version.endswith(SHIM)}


# FBGEMM is compiled against one torch, TorchRec is released with one FBGEMM, and torch requires one Triton.
SUPPORTED = (
    Library("torch", "torch", "2.13.0", "torch", "torch"),
    Library("fbgemm", "fbgemm_gpu", "1.8.0", "fbgemm-gpu-cpu", "fbgemm-gpu"),
    Library("torchrec", "torchrec", "1.8.0", "torchrec", "torchrec"),
    Library("faiss", "faiss", "1.15.1", "faiss-cpu", "faiss-gpu"),
    Library("triton", "triton", "3.7.1", "triton", "triton", needed_on=("gpu",)),
)


def installed_version(distribution: str) -> str | None:
    """The version in a distribution's metadata, which is read without importing anything; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def environment_device() -> Device:
    """The device that this environment was made for; where it holds builds for both, or none, the one that the machine has."""
    installed = {name for library in SUPPORTED if library.cpu != library.gpu for name in library.installed()}
    cpu = any(library.cpu in installed for library in SUPPORTED)
    gpu = any(library.gpu in installed for library in SUPPORTED)
    if cpu != gpu:
        return "cpu" if cpu else "gpu"
    return "gpu" if nvidia_driver() else "cpu"


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def install(library: Library, device: Device) -> str:
    """The command that brings a library, and all that must fit it, to the supported versions."""
    if device not in library.needed_on:  # the device's requirements do not name it
        return _pip("install", f"{library.distribution(device)}=={library.version}")
    requirements = _pip("install", "-c", f"requirements/constraints-{device}.txt", "-r", f"requirements/{device}.txt")
    return f"cd {shlex.quote(str(ROOT))} && {requirements}"  # requirement files name paths below the root


def reinstall(library: Library, device: Device) -> str:
    """The command that installs one library anew, and nothing else."""
    return _pip("install", "--force-reinstall", "--no-deps", f"{library.distribution(device)}=={library.version}")


def uninstall(*distributions: str) -> str:
    """The command that removes distributions."""
    return _pip("uninstall", "--yes", *distributions)
