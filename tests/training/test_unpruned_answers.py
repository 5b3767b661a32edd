"""The LVLM's own unpruned answers as references: their scores, and that each is generated once and kept."""

import json
from pathlib import Path

import pytest
import torch

import tprl_hf
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.data import mosaic_vqa
from tprl_hf.missing_packages import load_processor
from tprl_hf.training.answer_batches import SampleEncoder, undecoded
from tprl_hf.training.answer_ids import answer_lengths
from tprl_hf.training.answer_scores import answer_logits, answered_prompts, score_answers
from tprl_hf.training.divergence import UnprunedAnswer, grouped_logprobs, mean_divergence, top_tokens
from tprl_hf.training.unpruned_answers import UnprunedAnswers


def unlabelled(dataset):
    return undecoded(dataset.remove_columns("answer"))


def rows_of(dataset):
    return [dataset[i] for i in range(len(dataset))]


def random_masks(count, generator=0):
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(generator)) < 0.4


def test_answers_are_what_generate_gives_unpruned(make_model, processor, dataset):
    model, rows = make_model(), rows_of(unlabelled(dataset))
    encoder = SampleEncoder(model, processor)
    answers = UnprunedAnswers(model, processor, max_answer_length=12, batch_size=3).answers(encoder(rows))
    for row, answer in zip(rows, answers, strict=True):
        batch = encoder([row])
        prompt = batch.prompts([0])
        ids = model.generate(**prompt, prune=False, max_new_tokens=12, do_sample=False)
        length = prompt["input_ids"].shape[1]
        assert ids[0, length : length + answer_lengths(ids, length, [2])[0]].tolist() == answer.ids.tolist()
        assert answer.text == processor.decode(answer.ids, skip_special_tokens=True).strip()


def test_with_all_tokens_agreement_is_the_unpruned_logprob_and_the_divergence_is_zero(make_model, processor, dataset):
    model = make_model()
    batch = UnprunedAnswers(model, processor, max_answer_length=12)(
        SampleEncoder(model, processor)(rows_of(unlabelled(dataset)))
    )
    everyone = list(range(len(batch)))
    whole = score_answers(model, batch, batch.inputs.valid, everyone, batch_size=3)
    assert whole.correct.all() and whole.divergence.abs().max() < 1e-6
    for row, sample in enumerate(batch.samples):
        ids = torch.cat([sample.prompt_ids, sample.answer_ids])[None]
        with torch.no_grad():
            logits = model(ids, attention_mask=ids * 0 + 1, visual_features=sample.features, prune=False).logits
        logprobs = logits[0, -len(sample.answer_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, sample.answer_ids[:, None]).mean()
        torch.testing.assert_close(whole.logprobs[row], expected, atol=1e-5, rtol=1e-4)
    pruned = score_answers(model, batch, random_masks(len(batch)), everyone)
    assert (pruned.divergence > 1e-5).all()


def test_the_divergence_is_that_of_plain_distributions_and_bounded_by_them(make_model, processor, dataset):
    """With k = vocab - 1 it is exact; with fewer tokens it is smaller, and grows with k."""
    model, rows = make_model(), rows_of(unlabelled(dataset))[:3]
    masks, found = random_masks(3), {}
    for top_k in (1, 4, 16, 10_000):
        batch = UnprunedAnswers(model, processor, max_answer_length=6, top_k=top_k)(
            SampleEncoder(model, processor)(rows)
        )
        found[top_k] = score_answers(model, batch, masks, [0, 1, 2]).divergence
    inputs, labels = answered_prompts(model, batch, [0, 1, 2])
    logits = [
        answer_logits(model, inputs, labels, keep[keep | True]) for keep in (torch.ones(48).bool(), masks.view(-1))
    ]
    (unpruned, labels), (pruned, _) = logits
    kl = (unpruned.softmax(-1) * (unpruned.log_softmax(-1) - pruned.log_softmax(-1))).sum(-1)
    full = torch.stack([of_sample[places].mean() for of_sample, places in zip(kl, labels != -100, strict=True)])
    torch.testing.assert_close(found[10_000], full, atol=1e-6, rtol=1e-4)
    for fewer, more in zip([1, 4, 16], [4, 16, 10_000], strict=True):
        assert (found[fewer] <= found[more] + 1e-7).all() and (found[fewer] >= -1e-7).all()


def test_any_distributions_have_a_divergence_of_at_least_zero_and_at_most_the_whole_one():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 30.0):
        p, q = (torch.randn(5, 7, 50, generator=generator) * scale for _ in range(2))
        label_mask = torch.ones(5, 7, dtype=torch.bool)
        label_mask[1, :4] = False
        kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        full = (kl * label_mask).sum(1) / label_mask.sum(1)
        for top_k in (1, 8, 49):
            found = mean_divergence(q, label_mask, *top_tokens(p, top_k))
            assert (found >= -1e-6).all() and (found <= full * (1 + 1e-5) + 1e-6).all()
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grouped_logprobs(q, p.topk(8).indices).exp().sum(-1), torch.ones(5, 7))


def test_the_divergence_has_the_gradient_of_a_distribution_that_is_matched():
    logits = torch.randn(2, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = logits + torch.randn(2, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target, mask = top_tokens(logits, 5), torch.ones(2, 3, dtype=torch.bool)
    for point, is_zero in ((logits, True), (other, False)):
        point = point.clone().requires_grad_()
        mean_divergence(point, mask, *target).sum().backward()
        assert (point.grad.abs().max() < 1e-12) == is_zero
    assert torch.autograd.gradcheck(lambda x: mean_divergence(x, mask, *target), other.requires_grad_())


def test_answers_are_kept_on_disk_and_generated_once(make_model, processor, dataset, tmp_path, monkeypatch):
    model, rows = make_model(), rows_of(unlabelled(dataset))
    encoder = SampleEncoder(model, processor)
    first = UnprunedAnswers(model, processor, tmp_path, max_answer_length=8)
    made = first.answers(encoder(rows[:5]))
    assert first.num_generated == 5 and first.answers(encoder(rows[:5]))[0].text == made[0].text

    # another process, which knows nothing but the directory; a line that is cut off, and files of others
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "0.jsonl").write_text('{"weights": "of another LVLM"}\n' + "0" * 64 + " {}\n")
    second = UnprunedAnswers(make_model(), processor, tmp_path, max_answer_length=8)
    again = second.answers(encoder(rows))
    assert second.num_generated == 4
    for one, other in zip(made, again, strict=False):
        assert one.text == other.text and one.ids.equal(other.ids) and one.top_ids.equal(other.top_ids)
        torch.testing.assert_close(one.top_logprobs, other.top_logprobs)
    assert len(again[0].top_ids[0]) == 32 and again[0].top_logprobs.shape == (len(again[0].ids), 33)

    third, fourth = (UnprunedAnswers(model, processor, tmp_path, max_answer_length=8) for _ in range(2))
    assert len(third.answers(encoder(rows[:7]))) == 7 and third.num_generated == 0
    for one_of_two in (fourth, third):  # the third one finds what the fourth one wrote meanwhile
        one_of_two.answers(encoder([{**rows[7], "prompt": "word6"}]))
    assert (fourth.num_generated, third.num_generated) == (1, 0)
    other_length = UnprunedAnswers(model, processor, tmp_path, max_answer_length=4)
    assert (
        all(len(answer.ids) <= 4 for answer in other_length.answers(encoder(rows))) and other_length.num_generated == 8
    )


def test_another_picture_of_the_same_id_gets_an_answer_of_its_own(make_model, processor, dataset, tmp_path):
    model, rows = make_model(), rows_of(unlabelled(dataset))
    keys = []
    for number in (0, 2):
        row = {**rows[0], "images": rows[number]["images"], "image_id": "one"}
        unpruned_answers = UnprunedAnswers(model, processor)
        keys.append(unpruned_answers.key(row))
        path = tmp_path / f"{number}.png"
        path.write_bytes(row["images"][0]["bytes"])
        of_path = {**row, "images": [{"bytes": None, "path": str(path)}]}
        assert unpruned_answers.key(of_path) == keys[-1]
    assert keys[0] != keys[1]


def test_an_answer_survives_json():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    answer = UnprunedAnswer("ä b", torch.tensor([3, 4, 2]), *top_tokens(logits, 6))
    again = UnprunedAnswer.from_json(json.loads(json.dumps(answer.to_json())))
    assert again.text == answer.text and again.ids.equal(answer.ids)
    assert again.top_ids.equal(answer.top_ids) and again.top_logprobs.equal(answer.top_logprobs)


@pytest.mark.parametrize("length", [2, 100])
def test_the_embedded_model_agrees_with_itself(length, tmp_path):
    """A real checkpoint: answers of a hundred tokens too, where it never says what ends them."""
    path = tprl_hf.embedded_checkpoint()
    model, processor = TPRLForConditionalGeneration.from_pretrained(path), load_processor(path)
    if length == 100:
        model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids("teal")
    rows = rows_of(unlabelled(mosaic_vqa("validation", num_samples=6)))
    batch = UnprunedAnswers(model, processor, tmp_path, max_answer_length=length)(
        SampleEncoder(model, processor)(rows)
    )
    assert {len(sample.answer_ids) for sample in batch.samples} == {length}
    everyone = list(range(6))
    whole = score_answers(model, batch, batch.inputs.valid, everyone)
    assert whole.divergence.abs().max() < 1e-5
    few = batch.inputs.valid & (torch.arange(batch.inputs.valid.shape[1]) % 8 == 0)
    pruned = score_answers(model, batch, few, everyone)
    assert (pruned.divergence > whole.divergence).all() and pruned.logprobs.mean() < whole.logprobs.mean()


def test_long_prompts_are_answered_in_parts(make_model, processor, dataset):
    model, rows, sizes = make_model(), rows_of(dataset), []
    batch = SampleEncoder(model, processor)(rows)
    answers = UnprunedAnswers(model, processor, max_answer_length=4)
    expected = [answer.ids.tolist() for answer in answers.answers(batch)]
    hook = model.lvlm.get_decoder().register_forward_pre_hook(
        lambda module, given, named: sizes.append(named["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    answers = UnprunedAnswers(model, processor, max_answer_length=4, max_tokens=60)
    assert [answer.ids.tolist() for answer in answers.answers(batch)] == expected
    hook.remove()
    assert 30 < max(sizes) <= 60


def test_a_half_line_costs_no_other_answer(make_model, processor, dataset, tmp_path, monkeypatch):
    """As a full disk leaves one in the middle of a run, which goes on when there is room."""
    model, rows = make_model(), rows_of(dataset)
    encoder = SampleEncoder(model, processor)
    answers = UnprunedAnswers(model, processor, tmp_path, 4)
    answers.answers(encoder(rows[:1]))
    (first,) = tmp_path.glob("*.jsonl")
    half = (answers.key(rows[1]) + ' {"text": "word').encode()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(Path, "open", lambda path, *given, **named: only_half(path, half, *given, **named))
        answers.answers(encoder(rows[1:2]))
    assert first.read_bytes().endswith(half)
    expected = [answer.text for answer in answers.answers(encoder(rows[1:4]))]
    again = UnprunedAnswers(model, processor, tmp_path, 4)
    assert [answer.text for answer in again.answers(encoder(rows[1:4]))] == expected and again.num_generated == 0


def only_half(path, half, mode="r", *arguments, **named):
    """A disk that is full after the bytes `half`."""
    if mode != "a":
        return open(path, mode, *arguments, **named)
    with open(path, "ab") as file:
        file.write(half)
    raise OSError(28, "No space left on device")


def test_a_line_that_is_no_answer_is_made_anew(make_model, processor, dataset, tmp_path):
    model, rows = make_model(), rows_of(dataset)
    encoder = SampleEncoder(model, processor)
    expected = UnprunedAnswers(model, processor, tmp_path, 4).answers(encoder(rows[:2]))
    (path,) = tmp_path.glob("*.jsonl")
    head, one, other = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + one[:80] + other)
    again = UnprunedAnswers(model, processor, tmp_path, 4)
    assert [answer.text for answer in again.answers(encoder(rows[:2]))] == [answer.text for answer in expected]
    assert again.num_generated == 2
