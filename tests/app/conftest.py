from pathlib import Path

import pytest

from tprl_hf.app.asking import Asker
from tprl_hf.app.examples import Example, example_scenes
from tprl_hf.loading import load_model


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return example_scenes()


@pytest.fixture(scope="session")
def asker() -> Asker:
    """The embedded model."""
    model, processor = load_model()
    return Asker(model, processor, "The embedded model", max_new_tokens=8)


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory) -> Path:
    """A tiny random LLaVA without a policy, with its processor, as a directory."""
    from tests.families.tiny_models import build
    from tests.families.tiny_processor import make_processor

    path = tmp_path_factory.mktemp("models") / "tiny"
    build("llava").save_pretrained(path)
    make_processor().save_pretrained(path)
    return path
