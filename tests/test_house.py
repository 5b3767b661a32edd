"""What README, setup.py and dev.py promise, held against what is there."""

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import dev
import tprl_hf

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docs/trainers/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)


def run_python(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def requirements(path: str = "setup.py") -> dict[str, Requirement]:
    if path == "constraints.txt":
        lines = [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]
    else:
        lines = re.findall(r'"([\w\-\[\]]+[<>=]=[^"]+)"', (ROOT / path).read_text())
    return {Requirement(line).name.lower(): Requirement(line) for line in lines}


class TestImport:
    def test_it_imports_neither_torch_nor_transformers(self):
        code = "import sys, tprl_hf; print(sorted({'torch', 'transformers', 'datasets', 'PIL'} & set(sys.modules)))"
        assert run_python(code) == "[]"

    @pytest.mark.parametrize(
        "modules",
        [
            "cli.evaluate, tprl_hf.evaluation.broken",
            "cli.generate",
            "cli.compare",
            "cli.demo",
            "modeling.modeling_tprl",
        ],
    )
    def test_what_does_not_train_loads_no_trainer(self, modules):
        names = {"transformers.trainer", "peft", "trl", "bitsandbytes", "matplotlib.pyplot", "scipy"}
        assert run_python(f"import sys, tprl_hf.{modules}; print(sorted({names} & set(sys.modules)))") == "[]"

    @pytest.mark.parametrize("name", tprl_hf.__all__)
    def test_every_public_name_is_there(self, name):
        assert getattr(tprl_hf, name) is not None
        assert name in dir(tprl_hf)

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'TPRLConfik'"):
            tprl_hf.TPRLConfik  # noqa: B018

    @pytest.mark.parametrize(
        "imports",
        [
            "import tprl_hf; from transformers import AutoModelForImageTextToText",
            "import tprl_hf; from transformers import AutoConfig",
            "import tprl_hf; from transformers import GenerationMixin, Trainer, pipeline",
            "from transformers import AutoModelForImageTextToText; import tprl_hf",
            "from transformers import AutoConfig; import tprl_hf",
            "import tprl_hf.modeling.modeling_tprl",
            "from tprl_hf import TPRLConfig",
        ],
    )
    def test_the_auto_classes_know_us_whatever_is_imported_first(self, imports):
        code = f"""{imports}
import sys
import tprl_hf
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.for_model("tprl")
assert type(config) is tprl_hf.TPRLConfig, type(config)
for auto_class in (AutoModel, AutoModelForImageTextToText):
    assert auto_class._model_mapping[tprl_hf.TPRLConfig] is tprl_hf.TPRLForConditionalGeneration
assert PROCESSOR_MAPPING[tprl_hf.TPRLConfig].__name__ == "TPRLProcessor"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("tprl_hf")]
print("known")"""
        assert run_python(code) == "known"


class TestMetadata:
    def test_one_version_everywhere(self):
        assert f"## {tprl_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()
        assert f'version: "{tprl_hf.__version__}"' in (ROOT / "CITATION.cff").read_text()

    def test_the_tested_pins_lie_within_the_ranges_of_setup_py(self):
        wanted, pinned = requirements(), requirements("constraints.txt")
        assert {"torch", "transformers", "datasets", "trl", "pytest", "ruff"} <= wanted.keys() & pinned.keys()
        for name in wanted.keys() & pinned.keys():
            (pin,) = pinned[name].specifier
            assert pin.operator == "==" and wanted[name].specifier.contains(pin.version), name

    def test_the_extras_are_those_the_docs_name(self):
        extras = re.findall(r'^    "(\w+)": \[|^EXTRAS\["(\w+)"\]', (ROOT / "setup.py").read_text(), re.M)
        assert {a or b for a, b in extras} == {
            *("train", "eval", "processors", "quantized", "lmms", "serve", "completion", "demo", "photo", "docs"),
            "dev",
        }

    def test_the_oldest_python_is_the_same_everywhere(self):
        oldest = ".".join(map(str, dev.OLDEST_PYTHON))
        assert f'python_requires=">={oldest}"' in (ROOT / "setup.py").read_text()
        assert f'python_version = "{oldest}"' in (ROOT / "pyproject.toml").read_text()


class TestCheckout:
    @pytest.mark.parametrize("name", ["modeling", "training", "recipes"])
    def test_the_links_at_the_top_are_relative(self, name):
        if not (ROOT / ".git").exists():
            pytest.skip("the links are the checkout's")
        link = ROOT / name
        assert link.is_symlink() and link.readlink() == Path("tprl_hf") / name and link.is_dir()

    def test_no_file_names_a_place_of_one_machine_or_a_token(self):
        # written in pieces, so that this file does not find itself
        private = re.compile("|".join(["/ho" + r"me/\w", "/ro" + "ot/", "/wo" + "rk/", "hf" + r"_[A-Za-z]{30,}"]))
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if tracked.returncode:
            pytest.skip("not a git checkout")
        for name in filter(None, tracked.stdout.split("\0")):
            path = ROOT / name
            if not path.is_file() or path.suffix in {".gif", ".png", ".safetensors"}:
                continue
            assert not private.search(path.read_text(encoding="utf-8")), name

    def test_makefile_and_readme_call_commands_that_dev_py_has(self):
        targets = re.search(r"^([\w ]+):\n\tpython3 dev.py \$@$", (ROOT / "Makefile").read_text(), re.M)
        assert targets is not None and set(targets[1].split()) <= dev.COMMANDS.keys()
        called = re.findall(r"python3 dev\.py ([\w-]+)", (ROOT / "README.md").read_text())
        assert {"demo", "test"} <= set(called) <= dev.COMMANDS.keys()

    def test_make_clean_removes_every_environment(self):
        (removed,) = re.findall(r"^clean:\n\trm -rf (.*)$", (ROOT / "Makefile").read_text(), re.M)
        made = re.findall(r"^(\.venv[\w-]*)/$", (ROOT / ".gitignore").read_text(), re.M)
        assert made and set(made) <= set(removed.split())


class TestDevPy:
    @pytest.fixture
    def checkout(self, tmp_path, monkeypatch):
        """A checkout of three files whose pip commands are recorded instead of run; its result is settable."""
        (tmp_path / "setup.py").write_text('["torch>=2.6", "peft[x]>=0.21,<1"]')
        (tmp_path / "constraints.txt").write_text("# why\ntorch==2.13.0\npeft==0.30\n")
        monkeypatch.setattr(dev, "ROOT", tmp_path)
        self.installed, self.made, self.code = [], [], 0

        class FastBuilder:
            def __init__(builder, clear, with_pip):
                assert clear and with_pip

            def create(builder, path):
                self.made.append(path.name)
                subprocess.run(["rm", "-rf", path], check=True)
                (path / "bin").mkdir(parents=True)
                (path / "bin" / "python").symlink_to(sys.executable)
                (path / "pyvenv.cfg").touch()

        monkeypatch.setattr(dev.venv, "EnvBuilder", FastBuilder)
        monkeypatch.setattr(dev.Environment, "python_works", lambda environment: environment.python.exists())
        monkeypatch.setattr(dev, "run", lambda *command, **_: self.installed.append(command) or self.code)
        return tmp_path

    def test_it_installs_once_and_again_when_the_pins_change(self, checkout):
        dev.set_up(extra="dev")
        dev.set_up(extra="dev")
        dev.set_up()  # dev holds all that the base holds
        assert (self.made, len(self.installed)) == ([".venv"], 1) and ".[dev]" in self.installed[0]
        (checkout / "constraints.txt").write_text("torch==2.14.0\n")
        dev.set_up()
        assert (self.made, len(self.installed)) == ([".venv"], 2) and "." in self.installed[1]
        assert not dev.is_installed(dev.PINNED, "dev") and dev.is_installed(dev.PINNED, "")

    @pytest.mark.parametrize(
        ("environment", "releases"),
        [
            (dev.PINNED, "torch==2.13.0\npeft==0.30\n"),
            (dev.NEWEST, "torch==2.13.0\n"),
            (dev.FLOORS, "torch==2.13.0\npeft==0.21\n"),
        ],
        ids=lambda value: getattr(value, "folder", ""),
    )
    def test_each_environment_has_its_releases(self, checkout, environment, releases):
        dev.set_up(environment, "dev")
        assert self.made == [environment.folder] and self.installed[0][-1].read_text() == releases

    def test_the_newest_releases_are_looked_for_again_after_a_day(self, checkout):
        for environment in (dev.NEWEST, dev.FLOORS):
            dev.set_up(environment, "dev")
            made = environment.path / "pyvenv.cfg"
            os.utime(made, (made.stat().st_mtime - 2 * dev.DAY,) * 2)
            dev.set_up(environment, "dev")
        assert self.made == [".venv-newest", ".venv-newest", ".venv-floors"]

    def test_an_install_that_was_cut_off_starts_over(self, checkout):
        self.code = 1
        with pytest.raises(SystemExit, match="pip failed with exit code 1"):
            dev.set_up()
        self.code = 0
        dev.set_up()
        assert (len(self.made), len(self.installed)) == (2, 2) and dev.is_installed(dev.PINNED, "")

    def test_an_environment_without_a_working_python_is_made_anew(self, checkout):
        dev.PINNED.bin.mkdir(parents=True)
        dev.set_up()
        assert self.made == [".venv"] and dev.is_installed(dev.PINNED, "")

    def test_an_old_python_is_told_what_it_lacks(self, monkeypatch):
        monkeypatch.setattr(dev, "OLDEST_PYTHON", (9, 9))
        with pytest.raises(SystemExit, match=r"Python 9\.9 or newer is needed, this is 3\."):
            dev.set_up()

    def test_pytests_exit_code_is_kept_and_every_check_is_run(self, monkeypatch):
        codes = {"ruff": 1, "mypy": 0, "bandit": 0, "pytest": 3}
        called = []

        def run(*command, **_):
            called.append(command[2])
            return codes[command[2]]

        monkeypatch.setattr(dev, "set_up", lambda extra: None)
        monkeypatch.setattr(dev, "run", run)
        assert dev.test([]) == 3 and called == ["ruff", "ruff", "mypy", "bandit", "pytest"]
        codes["pytest"] = 0
        assert dev.test([]) == 1  # ruff's
        codes["ruff"] = 0
        assert dev.test([]) == 0
        codes["bandit"] = 1
        assert dev.test([]) == 1

    def test_the_floors_are_those_of_the_packages_metadata(self):
        wanted = [Requirement(line) for line in metadata.requires("tprl_hf")]
        lowest = {each.name: spec.version for each in wanted for spec in each.specifier if spec.operator == ">="}
        assert dev.floors() == {**lowest, "torch": dev.pins()["torch"]}

    def test_ci_runs_every_suite_with_the_pinned_one_last_and_fails_when_one_does(self, tmp_path):
        """Its closing line is what is read; the real script, with another dev.py."""
        (tmp_path / ".ci").mkdir()
        (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
        for failing in ("none", "test-newest", "test-floors", "test"):
            (tmp_path / "dev.py").write_text(f"import sys\nprint(*sys.argv[1:])\nsys.exit(sys.argv[1] == {failing!r})")
            done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True)
            assert done.stdout.splitlines() == ["test-newest", "test-floors", "test"]
            assert (done.returncode != 0) == (failing != "none") and (failing in done.stderr) == (failing != "none")


@pytest.mark.short
def test_the_running_versions_are_within_the_ranges():
    for name, requirement in requirements().items():
        if name in {"torch", "transformers", "huggingface_hub", "datasets", "pillow"}:
            assert requirement.specifier.contains(Version(metadata.version(name)).base_version), name


class TestDocs:
    @pytest.mark.short
    @pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
    def test_the_python_of_a_page_runs_from_top_to_bottom(self, page, tmp_path, monkeypatch):
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
        assert blocks
        monkeypatch.chdir(tmp_path)
        exec(compile("\n".join(blocks), page, "exec"), {})

    def test_every_tprl_command_of_the_pages_is_understood(self):
        from tprl_hf.cli.main import make_parser

        for page in ("README.md", "docs/quickstart.md"):
            for line in re.findall(r"^tprl (\w.*?)(?:  +#.*)?$", (ROOT / page).read_text(), re.M):
                make_parser().parse_args(shlex.split(line))

    @pytest.mark.parametrize("page", PAGES)
    def test_installs_of_a_page_take_the_pins(self, page):
        """Else pip takes releases that nobody has tried together; vLLM has pins of its own."""
        for line in (ROOT / page).read_text().splitlines():
            if "pip install -e " in line and ".venv-vllm" not in line:
                assert "constraints.txt" in line, line

    @pytest.mark.parametrize("page", PAGES)
    def test_links_lead_somewhere(self, page):
        path = ROOT / page
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), target
