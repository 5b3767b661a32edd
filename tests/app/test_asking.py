"""What the page computes is what the model itself gives, for one person and for two at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from tprl_hf.app.asking import MAX_QUESTION, Asker, Refusal, conversation, fewest
from tprl_hf.evaluation.answers import chat_inputs, generate_answers
from tprl_hf.loading import load_model
from tprl_hf.pictures import PictureError
from tprl_hf.pruners import PRUNERS, DivPrune, UniformPruner


@pytest.fixture(scope="module")
def sample(examples):
    return {"images": [examples[0].image], "prompt": examples[0].question}


def plan_of(asker, sample, **budget):
    return asker.model.prune(**chat_inputs(asker.processor, [sample]), **budget)


@pytest.mark.short
def test_answers_masks_and_counts_are_the_models_own(asker, sample):
    answered = asker.ask(sample["images"][0], sample["prompt"], ["learned", "divprune", "fastv"], 16)
    assert [reply.pruner for reply in answered.replies] == ["none", "learned", "divprune", "fastv"]
    full, learned, diverse, early = answered.replies
    model, processor = asker.model, asker.processor
    length = chat_inputs(processor, [sample])["input_ids"].shape[1]
    assert (full.num_kept, full.num_visual, full.num_read) == (144, 144, length)
    assert (learned.num_kept, learned.num_visual, learned.num_read) == (16, 144, length - 128)
    assert full.answer == generate_answers(model, processor, [sample], prune=False, max_new_tokens=8)[0]
    assert learned.answer == generate_answers(model, processor, [sample], num_keep=16, max_new_tokens=8)[0]
    assert torch.equal(learned.kept, plan_of(asker, sample, num_keep=16).keep_mask)
    with model.using(DivPrune()):
        assert torch.equal(diverse.kept, plan_of(asker, sample, num_keep=16).keep_mask)
    assert [reply.meaning for reply in answered.replies] == ["", "probability", "", "score"]
    assert early.num_kept == 16 and answered.note is None
    for reply in answered.replies:
        assert 0 < reply.time.llm_ms < reply.time.total_ms


def test_the_heat_map_shows_what_the_choice_followed(asker, sample):
    reply = asker.ask(sample["images"][0], sample["prompt"], ["learned"], 16).replies[1]
    panel = reply.figures[0].panels[0]
    assert torch.equal(panel.scores, plan_of(asker, sample, num_keep=16).scores)
    assert panel.scores[panel.keep_mask].min() >= panel.scores[~panel.keep_mask].max()


def test_with_several_steps_each_token_has_the_probability_it_was_last_given(asker, sample):
    asker.model.config.num_steps = 3
    try:
        panel = asker.ask(sample["images"][0], sample["prompt"], ["learned"], 16).replies[1].figures[0].panels[0]
        plan = plan_of(asker, sample, num_keep=16)
    finally:
        asker.model.config.num_steps = 1
    assert torch.equal(panel.keep_mask, plan.keep_mask) and plan.scores.max() > 1
    assert panel.scores.min() >= 0 and panel.scores.max() <= 1
    # a score is the number of steps survived and the last probability
    for survived in range(3):
        group = (plan.scores >= survived) & (plan.scores < survived + 1)
        assert group.any() and torch.allclose(panel.scores[group], plan.scores[group] - survived)


def test_two_questions_share_some_tokens(asker, examples):
    questions = examples[0].question, examples[0].other_question
    found, num_both = asker.two_questions(examples[0].image, questions, "learned", 48)
    assert [one.question for one in found] == list(questions)
    masks = [one.replies[1].kept for one in found]
    assert not torch.equal(*masks) and 0 < num_both < 48 and num_both == int((masks[0] & masks[1]).sum())


def test_a_conversation_reads_what_was_said_before(asker, examples):
    image, first, then = examples[0].image, examples[0].question, examples[0].other_question
    said = []
    for question in (first, then, first):
        full, pruned = asker.say(image, said, question, "learned", 48)
        alone = {"images": [image], "prompt": conversation(image, [(q, a) for q, _, a in said], question)}
        expected = generate_answers(asker.model, asker.processor, [alone], num_keep=48, max_new_tokens=8)[0]
        assert pruned.answer == expected and pruned.num_read == full.num_read - 96
        said.append((question, full.answer, pruned.answer))
    assert full.num_read > asker.ask(image, first, ["learned"], 48).replies[0].num_read
    with pytest.raises(
        Refusal, match=r"the model reads [\d,]+\. Shorten the question, shrink what is shown, or begin"
    ):
        asker.say(image, said * 60, first, "learned", 48)


def test_the_steps_end_at_the_budget(asker, sample):
    steps, figures = asker.steps(sample["images"][0], sample["prompt"], 16, 3)
    counts = [step.num_kept for step in steps]
    assert counts[0] == 144 and counts[-1] == 16 and counts == sorted(counts, reverse=True) and len(counts) == 4
    assert [len(figure.panels) for figure in figures] == [4]
    assert asker.model.config.num_steps == 1


def test_two_people_at_once_get_what_each_gets_alone(asker, examples):
    def ask(person):
        example, pruner, number = examples[person], ("learned", "divprune", "random", "uniform")[person], 16 + person
        answered = asker.ask(example.image, example.question, [pruner], number)
        return [(reply.answer, reply.num_kept, reply.kept.tolist()) for reply in answered.replies]

    alone = [ask(person) for person in range(4)]
    with ThreadPoolExecutor(4) as people:
        assert list(people.map(ask, range(4))) == alone


def test_the_vision_tower_runs_once_for_all_pruners_that_do_not_read_its_attention(asker, sample):
    runs = []
    tower = asker.model.lvlm.base_model.vision_tower
    handle = tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        image, question = sample["images"][0], sample["prompt"]
        asker.two_questions(image, (question, question), "learned", 16)
        assert len(runs) == 2  # a question, unpruned and pruned
        runs.clear()
        asker.say(image, [], question, "vispruner", 16)
        assert len(runs) == 2  # vispruner reads the attention, for which the tower runs in another way
    finally:
        handle.remove()


def test_the_pruners_are_those_that_work_with_the_model(asker, base_checkpoint):
    assert asker.pruners == ["learned", *(name for name in PRUNERS if name != "none")]
    assert asker.default_pruner() == "learned" and asker.has_policy()
    model, processor = load_model(str(base_checkpoint))
    plain = Asker(model, processor, str(base_checkpoint), max_new_tokens=3)
    assert "learned" not in plain.pruners and plain.default_pruner() == "divprune" in plain.pruners
    assert plain.name == "tiny" and not plain.has_policy() and "parameters, float32, on cpu" in plain.describe()
    image = Image.new("RGB", (40, 30), "red")
    assert plain.count_visual(image) == 16 and fewest(16) == 1 and fewest(144) == 8
    assert asker.default_keep(144) == 48 and plain.default_keep(16) == 5
    with plain.model.using(UniformPruner(keep_ratio=0.5, max_keep=7)):  # as a checkpoint with a pruner of its own
        assert plain.default_keep(10) == 5 and plain.default_keep(16) == 7
    assert plain.ask(image, "word7", ["uniform"], 99).replies[1].num_kept == 16  # more than there are is all
    with pytest.raises(Refusal, match="no trained policy, so there are no steps"):
        plain.steps(image, "word7", 4, 2)


def test_what_cannot_be_asked_is_said_in_a_sentence(asker, sample, tmp_path):
    image = sample["images"][0]
    for question, why in [
        ("  ", "Write a question first"),
        ("a" * (MAX_QUESTION + 1), "has 1,001 characters; at most"),
    ]:
        with pytest.raises(Refusal, match=why):
            asker.ask(image, question, ["learned"], 8)
    with pytest.raises(Refusal, match="Choose at least one pruner"):
        asker.ask(image, "Is there a ring?", [], 8)
    with pytest.raises(Refusal, match=r"no pruner 'magic'; choose from learned, random"):
        asker.ask(image, "Is there a ring?", ["magic"], 8)
    assert "does not know 'dinosaur'" in asker.ask(image, "Is there a dinosaur?", ["learned"], 8).note
    with pytest.raises(Refusal, match="upload one, or take an example"):
        asker.read(None)
    (tmp_path / "words.png").write_text("not a picture")
    with pytest.raises(PictureError, match="The picture is not an image that Pillow can read: it is none of PNG, "):
        asker.read(tmp_path / "words.png")
