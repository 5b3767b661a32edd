import re

import pytest

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.demo import pick_shown
from tprl_hf.cli.main import main
from tprl_hf.cli.tables import format_table

pytestmark = pytest.mark.short
RATIOS = ("1/3", "1/9")


@pytest.fixture
def demo(capsys, base_checkpoint, tmp_path):
    """Runs `tprl demo` on 8 questions and returns exit code, stdout and stderr."""

    def run(*words: str, model=base_checkpoint):
        options = [str(model), "--num-samples", "8", "--num-shown", "3", "--output-dir", str(tmp_path)]
        return main(["demo", *options, *words]), *capsys.readouterr()

    return run


def table_under(out: str, first_header: str) -> list[list[str]]:
    """The rows of the table whose header begins with that word, header included."""
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(first_header))
    end = lines.index("", start)
    return [re.split(r"\s{2,}", line) for line in [lines[start], *lines[start + 2 : end]]]


def test_it_shows_questions_counts_right_answers_and_times_each_pruner(demo):
    code, out, err = demo()
    assert code == 0
    questions = table_under(out, "type")
    assert questions[0] == ["type", "question", "reference", "none", "random", "uniform", "vispruner"]
    assert len(questions) == 1 + 3
    assert len(table_under(out[out.index("at keep ratio 1/9") :], "type")) == 1 + 3
    header, *rows = table_under(out, "pruner")
    assert header == ["pruner", *(f"{what} at {ratio}" for what in ("correct", "LLM", "whole") for ratio in RATIOS)]
    assert [row[0] for row in rows] == ["none", "random", "uniform", "vispruner"]
    for row in rows:
        assert all(re.fullmatch(r"\d of 8 \(\d+\.\d %\)", cell) for cell in row[1:3])
        llm, whole = ([float(cell.removesuffix(" ms")) for cell in cells] for cells in (row[3:5], row[5:7]))
        assert all(part < all_of_it for part, all_of_it in zip(llm, whole, strict=True))
    assert "Visual tokens kept: at 1/3 5 of 16, at 1/9 2 of 16." in out
    assert "seed=7" in out and "median" in out and "cpu, float32" in out
    assert err.index("Loading") < err.index("Answering") and "56/56" in err


def test_right_answers_are_counted_for_each_pruner_and_budget(demo, monkeypatch):
    def answer(model, processor, samples, prune=True, keep_ratio=1.0, **kwargs):
        right = len(samples) if not prune else round(9 * keep_ratio)
        return [sample["answer"] if number < right else "?" for number, sample in enumerate(samples)]

    monkeypatch.setattr("tprl_hf.evaluation.answers.generate_answers", answer)
    _, out, _ = demo()
    counts = {row[0]: row[1:3] for row in table_under(out, "pruner")[1:]}
    assert counts == {
        "none": ["8 of 8 (100.0 %)"] * 2,
        **{name: ["3 of 8 (37.5 %)", "1 of 8 (12.5 %)"] for name in ("random", "uniform", "vispruner")},
    }


def test_the_same_seed_gives_the_same_answers(demo):
    ratio = ["--keep-ratios", "1/3"]
    first, again, other = (demo(*ratio, *words)[1] for words in ([], [], ["--seed", "8"]))
    assert table_under(first, "type") == table_under(again, "type") != table_under(other, "type")


def test_pictures_show_each_question_with_each_pruner_and_budget(demo, tmp_path, base_checkpoint):
    demo("--keep-ratios", "1/4,1/2")
    page = (tmp_path / "kept_tokens.html").read_text()
    assert page.count("<section>") == 3 * 2 and page.count("<figure>") == 3 * 2 * 4
    assert page.count('class="patch kept"') == 3 * 3 * (4 + 8)
    assert "--num-samples 8 --num-shown 3 --seed 7 --keep-ratios 1/4,1/2" in page
    # others see the page: it names no place of this disk
    assert str(base_checkpoint.parent) not in page and f"tprl demo {base_checkpoint.name} --num-samples" in page
    assert (tmp_path / "kept_tokens.png").stat().st_size > 0


def test_a_trained_policy_has_a_column_of_its_own(demo, tmp_path):
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), keep_ratio=0.5, policy_training={"stage": "lfd"}, policy_num_heads=2
    )
    model.save_pretrained(tmp_path / "model", save_base_model=True)
    make_processor().save_pretrained(tmp_path / "model")
    _, out, _ = demo(model=tmp_path / "model")
    assert table_under(out, "type")[0][-1] == "learned"
    assert table_under(out, "pruner")[-1][0] == "learned"


def test_the_embedded_model_answers_with_and_without_its_tokens(capsys, tmp_path):
    assert main(["demo", "--num-samples", "24", "--num-shown", "2", "--output-dir", str(tmp_path)]) == 0
    rows = table_under(capsys.readouterr().out, "pruner")[1:]
    correct = {row[0]: [int(cell.split()[0]) for cell in row[1:3]] for row in rows}
    assert correct["none"][0] >= 16 and correct["vispruner"][0] >= 14
    assert correct["learned"][1] > correct["uniform"][1]  # at 1/9 learning is seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept_tokens.html", "kept_tokens.png"]


def test_types_take_turns_and_images_are_new_while_there_are_any():
    kinds, images = "aabbcab", "1112134"
    samples = [{"question_type": kind, "image_id": image} for kind, image in zip(kinds, images, strict=True)]
    assert pick_shown(samples, 2) == [0, 3]
    assert pick_shown(samples, 5) == [0, 3, 4, 5, 6]
    assert sorted(pick_shown(samples, 99)) == [0, 1, 2, 3, 4, 5, 6]


def test_format_table():
    assert format_table([["a", "bb"], ["long", "c"]]) == "a     bb\n----  --\nlong  c\n"
