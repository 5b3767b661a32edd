import shutil

import pytest
import torch

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.evaluation.answers import chat_inputs, generate_answers

pytestmark = pytest.mark.short

QUESTION = "word7 word8"


@pytest.fixture(scope="module")
def trained_checkpoint(tmp_path_factory):
    """A TPRL checkpoint that names a budget, as one with a trained policy does."""
    path = tmp_path_factory.mktemp("trained")
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), keep_ratio=0.5, policy_training={"stage": "lfd"}, policy_num_heads=2
    )
    model.save_pretrained(path, save_base_model=True)
    make_processor().save_pretrained(path)
    return path


@pytest.fixture
def generate(capsys, base_checkpoint, image_file):
    """Runs `tprl generate` and returns exit code, stdout and stderr."""

    def run(*words: str, model=base_checkpoint, image=image_file):
        required = ["--image", str(image), "--question", QUESTION, str(model), "--max-new-tokens", "4"]
        code = main(["generate", *required, *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_the_answer_is_what_the_model_says(generate, base_checkpoint, image_file):
    from PIL import Image

    code, out, _ = generate("--pruner", "uniform", "--num-keep", "4")
    model = TPRLForConditionalGeneration.from_base_model(base_checkpoint)
    from tprl_hf.pruners import UniformPruner

    sample = {"images": [Image.open(image_file).convert("RGB")], "prompt": QUESTION}
    with model.using(UniformPruner(num_keep=4)):
        (answer,) = generate_answers(model, make_processor(), [sample], max_new_tokens=4)
    assert (code, out) == (0, answer + "\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "divprune: 5 of 16 visual tokens kept"),
        (["--keep-ratio", "1/4", "--pruner", "random"], "random: 4 of 16 visual tokens kept"),
        (["--num-keep", "7", "--pruner", "uniform"], "uniform: 7 of 16 visual tokens kept"),
        (["--num-keep", "7", "--pruner", "fastv"], "fastv: 7 of 16 visual tokens kept"),
        (["--no-prune"], "none: 16 of 16 visual tokens kept"),
        (["--pruner", "none"], "none: 16 of 16 visual tokens kept"),
    ],
)
def test_it_keeps_what_was_asked_for_and_times_both(generate, words, message):
    code, out, err = generate(*words)
    assert code == 0 and out.strip()
    assert message in err and "LLM prefill" in err and "unpruned" in err and "cpu, float32" in err


def test_a_trained_checkpoint_uses_its_policy_and_its_own_budget(generate, trained_checkpoint):
    assert "learned: 8 of 16 visual tokens kept" in generate(model=trained_checkpoint)[2]
    assert "learned: 4 of 16 visual tokens kept" in generate("--num-keep", 4, model=trained_checkpoint)[2]
    assert "learned: 16 of 16" in generate("--threshold", "1e-6", model=trained_checkpoint)[2]


def test_unpruned_answers_are_the_base_models(generate, base_checkpoint, image_file):
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    processor = make_processor()
    base = AutoModelForImageTextToText.from_pretrained(base_checkpoint, dtype=torch.float32)
    inputs = chat_inputs(processor, [{"images": [Image.open(image_file).convert("RGB")], "prompt": QUESTION}])
    del inputs["query_mask"]  # ours alone
    sequence = base.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert generate("--no-prune")[1] == processor.decode(sequence, skip_special_tokens=True).strip() + "\n"


def test_pictures_are_written_where_asked(generate, tmp_path):
    code, _, err = generate("--output-dir", tmp_path / "new" / "folder")
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert code == 0 and written == ["kept_tokens.html", "kept_tokens.png"]
    assert str(tmp_path / "new" / "folder" / "kept_tokens.png") in err
    assert (tmp_path / "new" / "folder" / "kept_tokens.html").read_text().count('class="patch kept"') == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pruner", "learned"], "policy has not been trained: it would keep random tokens. Choose a pruner"),
        (["--pruner", "none", "--keep-ratio", "0.5"], "--pruner none keeps all tokens: leave out --keep-ratio"),
        (["--threshold", "0.5"], "threshold=0.5"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_exit_code_2(generate, words, message):
    code, out, err = generate(*words, "--quiet")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_files_that_are_missing_or_broken_are_one_line_and_exit_code_2(generate, tmp_path):
    code, _, err = generate(image=tmp_path / "none.png")
    missing = f"There is no image file {tmp_path / 'none.png'}: pass the path of one."
    assert code == 2 and err == f"tprl generate: error: {missing}\n"

    (tmp_path / "text.png").write_text("no image")
    code, _, err = generate(image=tmp_path / "text.png")
    assert code == 2 and "text.png is not an image that Pillow can read" in err and err.count("\n") == 1

    code, _, err = generate(model=tmp_path / "no-model")
    assert code == 2 and str(tmp_path / "no-model") in err and err.count("\n") == 1


def test_a_photo_is_turned_upright(tmp_path, image_file):
    from PIL import Image

    from tprl_hf.pictures import open_picture

    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: the camera lay on its side
    Image.open(image_file).save(tmp_path / "photo.png", exif=turned)
    assert open_picture(str(tmp_path / "photo.png")).size == (30, 40)
    assert open_picture(str(image_file)).size == (40, 30)


def test_damaged_checkpoints_are_one_line_and_exit_code_2(generate, base_checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base_checkpoint, broken)
    config, weights = broken / "config.json", broken / "model.safetensors"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 50'))
    code, _, err = generate("--quiet", model=broken)
    assert code == 2 and f"The weights in {broken} do not fit its config.json" in err and err.count("\n") == 1

    weights.write_bytes(weights.read_bytes()[:20_000])
    code, _, err = generate("--quiet", model=broken)
    assert code == 2 and f"The weights in {broken} are truncated or damaged" in err and err.count("\n") == 1

    weights.unlink()
    code, _, err = generate("--quiet", model=broken)
    assert code == 2 and "model.safetensors" in err and err.count("\n") == 1

    config.write_text("{")
    code, _, err = generate("--quiet", model=broken)
    assert code == 2 and str(config) in err and err.count("\n") == 1


def test_a_processor_without_chat_template_is_refused(base_checkpoint, image_file):
    from PIL import Image

    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        chat_inputs(processor, [{"images": [Image.open(image_file)], "prompt": QUESTION}])


def test_answers_do_not_depend_on_the_batch_size(base_checkpoint):
    import numpy as np
    from PIL import Image

    model = TPRLForConditionalGeneration.from_base_model(
        base_checkpoint, keep_ratio=0.5, policy_training={"stage": "lfd"}
    )
    noise = np.random.default_rng(1).integers(0, 255, (5, 24, 24, 3), dtype=np.uint8)
    samples = [
        {"images": [Image.fromarray(pixels)], "prompt": " ".join(f"word{number}" for number in range(7, 9 + length))}
        for length, pixels in enumerate(noise)
    ]
    answers = [generate_answers(model, make_processor(), samples, size, max_new_tokens=3) for size in (1, 2, 5)]
    assert len(set(answers[0])) > 1 and answers[0] == answers[1] == answers[2]


def test_words_outside_of_the_vocabulary_are_told(capsys, image_file):
    """The embedded model reads each word that it does not know as the same unknown one."""
    for question, unknown in (("is there a red elephant ?", True), ("is there a red circle ?", False)):
        assert main(["generate", "--image", str(image_file), "--question", question, "--max-new-tokens", "1"]) == 0
        err = capsys.readouterr().err
        assert ("does not know 'elephant'" in err) == unknown and ("does not know" in err) == unknown
