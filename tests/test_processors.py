"""Processors of popular families: what they need, that they work where it is there, and one line where it is not."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, ProcessorMixin

from tests.families.processor_needs import PAGE, of_model, of_processor, section, types
from tests.families.stock_processors import STOCK, save
from tests.families.tiny_models import IMAGE, build
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.missing_packages import PACKAGES, load_processor
from tprl_hf.modeling import TPRLForConditionalGeneration, processing_tprl
from tprl_hf.pruners import DivPrune

ROOT = Path(__file__).parents[1]
SAMPLE = {"images": [Image.new("RGB", (40, 30), "red")], "prompt": "what colour is the cat ?"}


def absent(family: str) -> list[str]:
    return [PACKAGES[name] for name in sorted(of_processor(family)) if find_spec(name) is None]


HIDE = """
import sys
from importlib.machinery import PathFinder


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.split(".")[0] in {modules!r} else super().find_spec(name, *where)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_without(code: str, *modules: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that does not find these modules, as if they were not installed."""
    hidden = HIDE.replace("{modules!r}", repr(set(modules)))
    return subprocess.run([sys.executable, "-c", hidden + code], cwd=ROOT, capture_output=True, text=True)


class TestTable:
    def test_the_page_has_what_the_command_prints(self):
        assert "\n".join(section()) in PAGE.read_text(encoding="utf-8")

    def test_the_extra_brings_what_the_table_names(self):
        extra = re.search(r'"processors": \[(.*?)\]', (ROOT / "setup.py").read_text(), re.S)[1]
        brought = set(re.findall(r'"([\w-]+)>=', extra))
        assert brought == {*PACKAGES.values(), "protobuf"}  # protobuf is what sentencepiece's files are read by
        for family in types():
            assert (of_processor(family) or set()) | of_model(family) <= PACKAGES.keys(), family


@pytest.mark.parametrize("family", STOCK)
@torch.no_grad()
def test_a_stock_processor_is_loaded_and_reads_an_image_and_a_chat(family, tmp_path):
    if names := absent(family):
        pytest.skip(f"its processor needs {', '.join(names)}: pip install 'tprl_hf[processors]'")
    save(family, tmp_path)
    processor = load_processor(tmp_path)
    assert isinstance(processor, ProcessorMixin) and type(processor).__name__ == STOCK[family].processor
    inputs = chat_inputs(processor, [SAMPLE, {"images": [], "prompt": "where is the dog ?"}])
    rows = zip(inputs["input_ids"], inputs["query_mask"], strict=True)
    asked = [" ".join(processor.tokenizer.convert_ids_to_tokens(ids[mask])) for ids, mask in rows]
    assert asked == ["what colour is the cat ?", "where is the dog ?"]

    model = TPRLForConditionalGeneration.from_base_model(build(family), latent_dim=8).eval()
    with model.using(DivPrune(keep_ratio=0.5)):
        plan = model.prune(**inputs)
        made = model.generate(**inputs, max_new_tokens=3)
    assert 0 < plan.num_kept[0] < plan.num_visual[0] and plan.num_visual[1] == 0
    assert plan.num_visual[0] == (inputs["input_ids"][0] == IMAGE).sum()
    assert made.shape == (2, inputs["input_ids"].shape[1] + 3)


LOAD_ALL = """
import json, tempfile, transformers
from tests.families.stock_processors import STOCK, save
from tprl_hf.missing_packages import load_processor
transformers.logging.set_verbosity_error()
said = {}
for family in STOCK:
    with tempfile.TemporaryDirectory() as directory:
        save(family, directory)
        try:
            said[family] = type(load_processor(directory)).__name__
        except ValueError as error:
            said[family] = str(error)
print(json.dumps(said))
"""


class TestMissingPackages:
    def test_without_them_the_families_fail_that_the_table_says_and_each_names_what_it_misses(self):
        done = run_without(LOAD_ALL, *PACKAGES)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        for family in STOCK:
            if not of_processor(family):
                assert said[family] == STOCK[family].processor
                continue
            # transformers names the first that it misses, which is torchvision everywhere
            assert re.search(
                r"cannot be loaded: torchvision missing \(.*\): pip install 'tprl_hf\[processors\]', with",
                said[family],
            )

    def test_num2words_is_missed_where_torchvision_is_there(self):
        if find_spec("torchvision") is None:
            pytest.skip("torchvision, which SmolVLM's processor asks for first, is not installed")
        said = json.loads(run_without(LOAD_ALL, "num2words").stdout)
        assert "num2words missing (Package `num2words` is required" in said.pop("smolvlm")
        assert said == {family: stock.processor for family, stock in STOCK.items() if family != "smolvlm"}

    def test_commands_say_it_in_one_line(self, tmp_path):
        build("qwen2_vl").save_pretrained(tmp_path / "qwen")
        save("qwen2_vl", tmp_path / "qwen")
        AutoConfig.for_model("perception_lm").save_pretrained(tmp_path / "tower")  # its tower is one of timm's
        save_file({}, tmp_path / "tower" / "model.safetensors", {"format": "pt"})
        SAMPLE["images"][0].save(tmp_path / "red.png")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"output_dir: {tmp_path / 'out'}\nbase_model: {tmp_path / 'qwen'}\nautoencoder: {{}}\n")
        image = ["--image", str(tmp_path / "red.png"), "--question", "what ?"]
        qwen = str(tmp_path / "qwen")
        calls = [
            (["generate", qwen, *image], "torchvision"),
            (["evaluate", qwen, "--output-dir", str(tmp_path / "results")], "torchvision"),
            (["benchmark", qwen], "torchvision"),
            (["serve", qwen, "--port", "0"], "torchvision"),
            (["train", "autoencoder", "--config", str(recipe)], "torchvision"),
            (["generate", str(tmp_path / "tower"), *image], "timm"),
        ]
        code = (
            "from tprl_hf.cli.main import main\n"
            f"for words in {[words for words, _ in calls]!r}:\n"
            "    print('called', file=sys.stderr)\n"
            "    assert main(words) == 2"
        )
        done = run_without(code, *PACKAGES)
        assert done.returncode == 0, done.stderr
        said = [part.strip().splitlines() for part in done.stderr.split("called\n")[1:]]
        for (words, package), lines in zip(calls, said, strict=True):
            assert lines[-1].startswith(f"tprl {words[0]}: error: "), lines
            assert f"{package} missing (" in lines[-1] and "pip install 'tprl_hf[processors]'" in lines[-1]
            assert "Traceback" not in "\n".join(lines)

    def test_an_extra_that_is_missing_is_named_before_anything_long_begins(self, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"output_dir: {tmp_path / 'out'}\ndata: {{train: {{source: easy-vqa}}}}\nautoencoder: {{}}\n"
        )
        calls = {  # without these packages, and the extras that bring them
            f"['train', 'all', '--config', {str(recipe)!r}, '--dry-run']": ("easy_vqa", "train"),
            "['evaluate', '--data', 'easy-vqa']": ("easy_vqa", "train"),
            "['train', 'all', '--config', 'mosaic_llava_tuned', '--dry-run']": ("peft", "train"),
            "['completion', 'bash']": ("shtab", "completion"),
        }
        for words, (module, extra) in calls.items():
            done = run_without(f"from tprl_hf.cli.main import main; sys.exit(main({words}))", module)
            said = done.stderr.splitlines()[-1]
            assert done.returncode == 2, done.stderr
            assert said.startswith("tprl ") and said.endswith(f": pip install 'tprl_hf[{extra}]'."), said

    def test_without_matplotlib_an_evaluation_has_no_plot_and_all_else(self, tmp_path):
        words = ["evaluate", "--pruners", "uniform", "--num-samples", "4", "--max-new-tokens", "2"]
        code = f"from tprl_hf.cli.main import main; sys.exit(main({[*words, '--output-dir', str(tmp_path)]!r}))"
        with_it = run_without(code)
        assert with_it.returncode == 0 and ", .png and" in with_it.stdout, with_it.stderr
        files = {path.name for path in tmp_path.iterdir()}
        done = run_without(code, "matplotlib")
        assert done.returncode == 0 and ".png" not in done.stdout, done.stderr
        assert "No results.png, which needs matplotlib: pip install 'tprl_hf[eval]'" in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == files - {"results.png"}

    def test_a_torchvision_of_another_build_is_named(self, tmp_path):
        """What a torchvision for CUDA does beside a torch for the CPU: its operators are not there."""
        info = tmp_path / "torchvision-0.28.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(
            "import torch\ntorch.library.register_fake('torchvision::nms')(lambda dets, scores, threshold: None)\n"
        )
        SAMPLE["images"][0].save(tmp_path / "red.png")
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom tprl_hf.cli.main import main\n"
            f"main(['generate', '--image', {str(tmp_path / 'red.png')!r}, '--question', 'what ?'])\n"
            "sys.exit(main(['serve', '--port', '0']))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]  # what it does meanwhile
        assert done.returncode == 2 and len(lines) == 2, done.stderr
        for line in lines:
            assert f": error: torchvision 0.28.0 does not go with torch {torch.__version__}" in line
            assert "install both from the same index" in line

    def test_a_type_error_of_transformers_is_no_traceback(self, tmp_path):
        save("idefics3", tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "CTRLTokenizer"}))
        with pytest.raises(ValueError, match=r"not NoneType\. .*The checkpoint may also lack a file") as raised:
            load_processor(tmp_path)
        assert isinstance(raised.value.__cause__, TypeError) and "\n" not in str(raised.value)
        for module, package in PACKAGES.items():
            assert (f"{package}," in str(raised.value) or f"{package};" in str(raised.value)) == (
                not find_spec(module)
            )

    def test_other_errors_stay_what_they_are(self, tmp_path, monkeypatch):
        with pytest.raises(OSError, match="timm"):
            load_processor(tmp_path / "timm")
        unknown = tmp_path / "install-timm"
        unknown.mkdir()
        (unknown / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"^Unrecognized processing class in .*install-timm"):
            load_processor(unknown)

        TPRLForConditionalGeneration.from_base_model(build("llava"), latent_dim=8).save_pretrained(tmp_path / "ours")
        monkeypatch.setattr(processing_tprl.TPRLConfig, "from_pretrained", None)
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # a bug of ours
            load_processor(tmp_path / "ours")
