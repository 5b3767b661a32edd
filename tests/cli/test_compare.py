import re

import pytest

from tests.cli.test_demo import table_under
from tprl_hf.cli.main import main
from tprl_hf.evaluation.answers import chat_inputs, generate_answers
from tprl_hf.loading import load_model
from tprl_hf.pictures import open_picture
from tprl_hf.pruners import PRUNERS, DivPrune


@pytest.fixture
def compare(capsys, base_checkpoint, image_file, tmp_path):
    """Runs `tprl compare` on one image and returns exit code, stdout and stderr."""

    def run(*words: str, model=base_checkpoint):
        required = [str(image_file), "word7 word8", "--model", str(model), "--max-new-tokens", "3"]
        return main(["compare", *required, "--output-dir", str(tmp_path / "out"), *words]), *capsys.readouterr()

    return run


def test_every_pruner_answers_and_shows_what_it_keeps(compare, base_checkpoint, image_file, tmp_path):
    code, out, err = compare("--keep-ratio", "1/4")
    assert code == 0 and re.search(r"^Without learned: .*has not been trained", err, re.M)
    header, *rows = table_under(out, "pruner")
    assert header == ["pruner", "tokens kept", "answer"]
    assert [row[0] for row in rows] == list(PRUNERS)
    assert [row[1] for row in rows] == ["16 of 16"] + ["4 of 16"] * (len(PRUNERS) - 1)
    model, processor = load_model(str(base_checkpoint))
    sample = {"images": [open_picture(image_file)], "prompt": "word7 word8"}
    assert chat_inputs(processor, [sample])["query_mask"].sum() == 2
    with model.using(DivPrune(keep_ratio=0.25)):
        answers = generate_answers(model, processor, [sample], max_new_tokens=3)
    assert {row[0]: row[2] for row in rows}["divprune"] == answers[0]
    page = (tmp_path / "out" / "kept_tokens.html").read_text()
    assert page.count("<figure>") == len(PRUNERS) and str(tmp_path) not in page
    assert page.count('class="patch kept"') == 4 * (len(PRUNERS) - 1)


def test_answers_are_marked_where_the_reference_is_known(compare, tmp_path):
    code, out, err = compare("--pruners", "uniform", "--answer", "surely not this", "--num-keep", "2")
    assert code == 0 and [row[1] for row in table_under(out, "pruner")[1:]] == ["16 of 16", "2 of 16"]
    assert out.count("  x\n") == 2 and "x: other than the reference 'surely not this'" in err
    assert (tmp_path / "out" / "kept_tokens.html").read_text().count('class="wrong"') == 2
    code, _, err = compare("--pruners", "learned")
    assert code == 2 and "has not been trained" in err


def test_the_unpruned_model_needs_no_policy(compare):
    code, out, err = compare("--pruners", "none,uniform", "--num-keep", "2")
    assert code == 0 and "has not been trained" not in err
    assert [row[0] for row in table_under(out, "pruner")[1:]] == ["none", "uniform"]
    assert "Without none" not in compare("--num-keep", "2")[2]
