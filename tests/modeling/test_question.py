"""The question ends where the answer begins: generating and scoring see the same tokens.

Chat templates of five families, as their models have them, with a small tokenizer that merges characters, and a policy
and a rule that read the question.
"""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.families.tiny_models import IMAGE, build
from tests.families.tiny_models import square as pixels_of
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.modeling.text_query import default_query_mask, question_mask, template_ids
from tprl_hf.pruners import QuerySimilarityPruner

MARKERS = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "[INST]", "[/INST]"]


def content(behind_image: str = "") -> str:
    """The loop over the parts of a message."""
    return (
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        + behind_image
        + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    )


TEMPLATES = {
    "qwen": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    + content()
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llava": "{% for m in messages %}{% if m['role'] == 'user' %}user: {% else %}assistant: {% endif %}"
    + content("\n")
    + "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "gemma": "<s>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    + content("\n")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "smolvlm": "<|im_start|>{% for m in messages %}{{ m['role'] }}: "
    + content()
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "mistral": "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    + content()
    + "[/INST]{% else %}"
    + content()
    + "</s>{% endif %}{% endfor %}",
}
ANSWERS = ["yes", "it is a red square beside a tall tree, and the sky is blue. you are right to ask."]
CORPUS = [
    "you are a helpful assistant. user: what is left of the red square? assistant: it is a tall tree. model",
    "is it red? 7 how many blue circles are there in all? yes no what hello beside sky and right to ask system",
    "What Is Hello Yes",
] * 4


@pytest.fixture(scope="module")
def make_tokenizer():
    def make(name: str) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        trainer = trainers.BpeTrainer(vocab_size=88, special_tokens=["<pad>", "<s>", "</s>", "<unk>", *MARKERS])
        core.train_from_iterator([*CORPUS, "\n"], trainer)
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=MARKERS, **names)
        tokenizer.add_tokens(["<fill1>"] * max(0, 90 - len(tokenizer)))
        tokenizer.chat_template = TEMPLATES[name]
        assert len(tokenizer) <= IMAGE
        return tokenizer

    return make


@pytest.fixture(scope="module")
def model():
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, keep_ratio=1 / 3, policy_training={"stage": "lfd"}
    )
    torch.manual_seed(0)
    for weight in (*model.policy.parameters(), *model.autoencoder.parameters()):
        torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def user(text, image=False):
    content = [{"type": "text", "text": text}]
    return {"role": "user", "content": [{"type": "image"}, *content] if image else content}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CHATS = {
    "one turn": [user("what is left of the red square?", image=True)],
    "two turns": [user("is it red?", image=True), assistant("yes"), user("how many blue circles are there in all?")],
}


def encode(tokenizer, text: str) -> list[int]:
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split("<image>")]
    ids = list(parts[0])
    for part in parts[1:]:
        ids += [IMAGE] * 16 + part
    return ids


def prompt_of(tokenizer, chat) -> list[int]:
    return encode(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def batch_of(rows, seed=0):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # padded on the right
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    pixels = [pixels_of(torch.Generator().manual_seed(seed), 0)["pixel_values"]] * len(rows)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels)}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_of_the_template_bound_the_last_question(make_tokenizer, name, chat):
    """As the question that the processor tells exactly, but for what the template puts behind an image."""
    tokenizer = make_tokenizer(name)
    ids = torch.tensor([prompt_of(tokenizer, CHATS[chat])])
    found = default_query_mask(
        ids, torch.ones_like(ids), ids == IMAGE, tokenizer.all_special_ids, *template_ids(tokenizer)
    )
    exact = question_mask(tokenizer, [CHATS[chat]], ids)
    more = found & ~exact
    assert found[exact].all()
    assert not tokenizer.decode(ids[more]).strip(), (tokenizer.decode(ids[found]), tokenizer.decode(ids[exact]))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@torch.no_grad()
def test_scoring_sees_what_generating_sees(model, make_tokenizer, name, chat):
    tokenizer = make_tokenizer(name)
    model.read_chat_template(tokenizer)
    prompt = prompt_of(tokenizer, CHATS[chat])
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    for pruner in (model.pruner, QuerySimilarityPruner(keep_ratio=1 / 3)):
        with model.using(pruner):
            masks = [model.prune(**batch_of([prompt])).keep_mask]
            answered = batch_of([prompt + answer for answer in answers])
            masks += model.prune(**answered).keep_mask.split(16)
            output = model(**answered)
            masks += output.keep_mask.split(16)
        assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("name", TEMPLATES)
@torch.no_grad()
def test_importance_ratios_are_one(model, make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    model.read_chat_template(tokenizer)
    prompt = prompt_of(tokenizer, CHATS["one turn"])
    count = 24
    torch.manual_seed(3)
    made = model.generate(
        **batch_of([prompt]),
        do_sample=True,
        temperature=2.0,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    completion = made.sequences[:, -count:]
    sampled = torch.stack(made.logits, 1).log_softmax(-1).gather(-1, completion[..., None])
    scored = model(**batch_of([made.sequences[0].tolist()]), logits_to_keep=count + 1)
    assert torch.equal(scored.keep_mask, made.keep_mask)
    replayed = scored.logits[:, :-1].log_softmax(-1).gather(-1, completion[..., None])
    assert ((replayed - sampled).exp() - 1).abs().max() <= 1e-5


@torch.no_grad()
def test_labels_tell_the_answer_where_nobody_read_a_template(model):
    model.config.question_start_ids = model.config.question_end_ids = None
    prompt, answer = [1, 5, 6, *[IMAGE] * 16, 30, 31, 32], [40, 41, 42, 43]
    inputs = batch_of([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    expected = model.prune(**batch_of([prompt])).keep_mask
    assert torch.equal(model(**inputs, labels=labels).keep_mask, expected)
    # a language-modelling loss over everything leaves the question as it is
    everything = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    assert torch.equal(model(**inputs, labels=everything).keep_mask, model(**inputs).keep_mask)
