"""`python -m tests.stand_ins.on_another_device PART`: the package on a device other than the CPU, in a new process.

On a GPU where there is one, else on a pretended device.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import accelerate
import torch
from transformers import TrainingArguments

import tprl_hf.training
from tests.families.more import OTHERS
from tests.families.tiny_models import FAMILIES, build, collate, entry, sample
from tests.families.tiny_processor import make_processor
from tests.training.conftest import POLICY, make_dataset
from tprl_hf import Escalation, TPRLForConditionalGeneration, embedded_checkpoint
from tprl_hf.app.asking import Asker
from tprl_hf.cli.arguments import method_names
from tprl_hf.cli.main import main
from tprl_hf.cli.training_device import training_arguments, training_device
from tprl_hf.data import mosaic_vqa
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.evaluation.benchmark import benchmark_calls
from tprl_hf.evaluation.policy_runs import main as run_policies
from tprl_hf.loading import load_model
from tprl_hf.pruners import RandomPruner, ToMePruner, VisionZip, VisPruner
from tprl_hf.training import (
    AutoencoderConfig,
    AutoencoderTrainer,
    CounterfactualConfig,
    CounterfactualTrainer,
    GradientTeacher,
    LeaveOutTeacher,
    LfDConfig,
    LfDTrainer,
    NoiseGateConfig,
    NoiseGateTrainer,
    TPRLGRPOConfig,
    TPRLGRPOTrainer,
    TPRLMAPOConfig,
    TPRLMAPOTrainer,
    TPRLPPOConfig,
    TPRLPPOTrainer,
    calibrate_threshold,
    generate_demonstrations,
)
from tprl_hf.training.rollout_trainer import RolloutTrainer

if torch.cuda.is_available():
    from tests.stand_ins.real_device import DEVICE, PretendMode, inner_of, launches, on_device, waits
else:
    from tests.stand_ins.device import (  # type: ignore[assignment]
        DEVICE,
        PretendMode,
        inner_of,
        launches,
        on_device,
        waits,
    )


def control() -> None:
    """The device does notice."""
    layer = on_device(torch.nn.Linear(4, 2))
    with PretendMode():
        assert layer(torch.zeros(1, 4, device=DEVICE)).device == DEVICE
        try:
            layer(torch.zeros(1, 4))
        except RuntimeError as error:
            assert "same device" in str(error)
        else:
            raise AssertionError("A layer there took a tensor from here.")
        # a base model that `device_map` or quantisation has placed there
        model = TPRLForConditionalGeneration.from_base_model(on_device(build("llava")), latent_dim=8)
        weights = [*model.policy.parameters(), *model.autoencoder.parameters()]
        assert {weight.device for weight in weights} == {DEVICE}


@torch.no_grad()
def families() -> None:
    """Logits and answers are those of the CPU."""
    for family in (*FAMILIES, *OTHERS):
        numbering = "contiguous" if entry(family).own_positions else "original"
        model = TPRLForConditionalGeneration.from_base_model(
            build(family), latent_dim=8, policy_training={"stage": "lfd"}, position_ids=numbering
        )
        batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
        choice = {"keep_ratio": 0.5, "max_new_tokens": 2, "do_sample": False}
        logits, sequences = model.eval()(**batch, keep_ratio=0.5).logits, model.generate(**batch, **choice)
        on_device(model)
        batch = {name: on_device(value) for name, value in batch.items()}
        with PretendMode():
            output = model(**batch, keep_ratio=0.5)
            assert output.logits.device == output.num_kept.device == DEVICE, family
            torch.testing.assert_close(inner_of(output.logits), logits, atol=1e-4, rtol=1e-4)
            assert inner_of(model.generate(**batch, **choice)).equal(sequences), family


@torch.no_grad()
def projector_elsewhere() -> None:
    """Tower and projector there, the rest here, as a `device_map` places them: the policy is beside the embeddings."""

    def moved(move):
        def hook(module, arguments, named):
            return tuple(map(move, arguments)), {name: move(value) for name, value in named.items()}

        return hook

    def there(value):
        return on_device(value) if isinstance(value, torch.Tensor) and value.device != DEVICE else value

    batch = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2), sample("llava", 0, 3)])
    settings = {"latent_dim": 8, "policy_training": {"stage": "lfd"}, "policy_similarity": True, "keep_ratio": 0.5}
    for pruner in (None, "query-similarity", "vispruner", "prumerge"):
        expected = TPRLForConditionalGeneration.from_base_model(build("llava"), **settings, pruner=pruner).eval()
        base = build("llava").eval()
        for part in (base.model.vision_tower, base.model.multi_modal_projector):
            on_device(part).register_forward_pre_hook(moved(there), with_kwargs=True)
        base.get_input_embeddings().register_forward_pre_hook(moved(inner_of), with_kwargs=True)
        model = TPRLForConditionalGeneration.from_base_model(base, **settings, pruner=pruner).eval()
        for name in ("policy", "autoencoder"):
            model.get_submodule(name).load_state_dict(expected.get_submodule(name).state_dict())
        with PretendMode():
            found = model(**batch)
        assert found.keep_mask.equal(expected(**batch).keep_mask), pruner
        torch.testing.assert_close(found.logits, expected(**batch).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def default_device() -> None:
    """A program may make all its tensors on the device by default; what is worked out on the CPU stays there."""
    for family in ("llava", "qwen2_5_vl", "llava_next"):
        model = TPRLForConditionalGeneration.from_base_model(
            build(family), latent_dim=8, policy_training={"stage": "lfd"}
        ).eval()
        batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
        pruners = (model.pruner, RandomPruner(), ToMePruner(), VisionZip())
        expected = []
        for pruner in pruners:
            with model.using(pruner):
                expected.append(model.generate(**batch, keep_ratio=0.5, max_new_tokens=2, do_sample=False))
        features = model.encode_images(**batch).take([1, 0]).modalities["image"].rows
        logits = [model(**batch, keep_ratio=ratio).logits for ratio in (0.5, 1.0)]
        on_device(model)
        batch = {name: on_device(value) for name, value in batch.items()}
        with PretendMode():
            torch.set_default_device(DEVICE)
            for pruner, sequences in zip(pruners, expected, strict=True):
                with model.using(pruner):
                    made = model.generate(**batch, keep_ratio=0.5, max_new_tokens=2, do_sample=False)
                    assert inner_of(made).equal(sequences), (family, pruner)
            taken = model.encode_images(**batch).take([1, 0]).modalities["image"].rows
            torch.testing.assert_close(inner_of(taken), features, atol=1e-4, rtol=1e-4)
            for ratio, expected in zip((0.5, 1.0), logits, strict=True):
                found = inner_of(model(**batch, keep_ratio=ratio).logits)
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            torch.set_default_device(None)


@torch.no_grad()
def steps() -> None:
    """What pruning gives a GPU to do: few launches, and hardly anything to wait for, whatever the batch."""
    for family in ("llava", "qwen2_5_vl"):
        model = on_device(
            TPRLForConditionalGeneration.from_base_model(
                build(family), latent_dim=8, policy_training={"stage": "lfd"}
            ).eval()
        )
        for samples in ([sample(family, 1, 1)], [sample(family, number, 1 + number) for number in range(3)]):
            batch = {name: on_device(value) for name, value in collate(family, samples).items()}
            with PretendMode():
                took = {}
                for name, call in benchmark_calls(model, batch, num_keep=3, new_tokens=2).items():
                    launches.clear()
                    waits.clear()
                    call()
                    took[name] = launches.total(), waits.total()
            print(family, len(samples), took)
            if DEVICE.type == "cuda":
                continue  # whose launches nobody counts here
            # the ids, their mask and the choice come to the CPU
            assert took["pruner"][0] <= 80 and took["pruner"][1] <= 3, (family, took, waits)
            more = [a - b for a, b in zip(took["prefill pruned"], took["prefill floor"], strict=True)]
            assert more[0] <= 45 and more[1] <= 8, (family, took)
            more = [a - b for a, b in zip(took["answer pruned"], took["answer unpruned"], strict=True)]
            assert more[0] <= 90 and more[1] <= 6, (family, took)


def commands() -> None:
    """The embedded model, by the command line, which takes the accelerator there is; every pruner."""
    with tempfile.TemporaryDirectory() as folder, PretendMode():
        pruners = ",".join(method_names())
        sizes = ["--num-samples", "6", "--keep-ratios", "1/3"]
        assert main(["evaluate", "--pruners", pruners, *sizes, "--output-dir", folder]) == 0
        assert main(["benchmark", "--rounds", "2", "--max-new-tokens", "2", "--load", "1,2"]) == 0
        assert main(["demo", "--num-shown", "1", "--num-samples", "6", "--output-dir", folder]) == 0


def more_commands() -> None:
    """Those that ask about a picture; the app's answers; a policy's runs; a second look."""
    with tempfile.TemporaryDirectory() as folder, PretendMode():
        row = mosaic_vqa("test", num_samples=6)[0]
        row["images"][0].save(f"{folder}/picture.png")
        asked = [f"{folder}/picture.png", row["prompt"]]
        short = ["--max-new-tokens", "2", "--output-dir", folder]
        assert main(["generate", "--image", asked[0], "--question", asked[1], "--keep-ratio", "1/9"]) == 0
        assert main(["compare", *asked, "--keep-ratio", "1/9", *short]) == 0
        assert main(["trajectory", *asked, "--steps", "2", *short]) == 0

        model, processor = load_model()
        assert model.device == DEVICE
        asker = Asker(model, processor, "embedded", max_new_tokens=2)
        replies = asker.ask(row["images"][0], row["prompt"], ["divprune", "learned", "vispruner"], 16).replies
        assert [reply.num_kept for reply in replies] == [144, 16, 16, 16]
        assert asker.steps(row["images"][0], row["prompt"], 16, 2)
        chat = asker.say(row["images"][0], [("is there a cat ?", "yes", "no")], row["prompt"], "learned", 16)
        assert chat is not None

        inputs = chat_inputs(processor, [row]).to(DEVICE)
        ask = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        first = model.generate(**inputs, keep_ratio=1 / 9, escalate=Escalation(1 / 3, below=1.0), **ask)
        cached = model.generate(**inputs, keep_ratio=1 / 9, **ask)
        assert first.sequences.device == DEVICE and cached.past_key_values is not None
        longer = torch.cat([cached.sequences, inputs["input_ids"][:, -4:]], 1)
        more = {"pixel_values": inputs["pixel_values"], "past_key_values": cached.past_key_values}
        assert model.generate(input_ids=longer, attention_mask=torch.ones_like(longer), **more, **ask) is not None

        arguments = ["--num-samples", "6", "--num-validation", "6", "--keep-ratios", "1/9", "--adaptive", ""]
        run_policies([f"{folder}/out.json", f"learned={embedded_checkpoint()}", *arguments])


def more_training() -> None:
    """Algorithms and scores that `training` leaves out."""
    train_there()
    processor, dataset = make_processor(), make_dataset()
    common = {"disable_tqdm": True, "save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 2}
    budgets = {"rollout_keep_ratios": [0.5, 0.25], "min_logprob": -100.0, "max_answer_length": 3}
    with tempfile.TemporaryDirectory() as folder, PretendMode():
        for trainer_class, config_class, settings in (
            (TPRLMAPOTrainer, TPRLMAPOConfig, {"num_generations": 2}),
            (NoiseGateTrainer, NoiseGateConfig, {}),
            (CounterfactualTrainer, CounterfactualConfig, {"score": "kl", **budgets}),
            (
                TPRLGRPOTrainer,
                TPRLGRPOConfig,
                {"score": "agreement", "num_generations": 2, **budgets, "draw": "sets", "lambda_disc": 1.0},
            ),
        ):
            base = build("llava")
            base.generation_config.eos_token_id = 2
            model = TPRLForConditionalGeneration.from_base_model(base, **POLICY, policy_budget=True)
            config = config_class(folder, **{**common, **settings})
            trainer = trainer_class(
                model, config, processing_class=processor, train_dataset=dataset, eval_dataset=dataset
            )
            trainer.train()
            assert all(weight.device == DEVICE for weight in trainer.model.parameters())


def train_there() -> None:
    """Lets transformers and accelerate take the device."""
    if DEVICE.type == "cuda":
        return
    accelerate.Accelerator.device = property(lambda self: DEVICE)
    TrainingArguments.device = property(lambda self: (self._setup_devices, DEVICE)[1])
    stream = RolloutTrainer.generator
    RolloutTrainer.generator = lambda self, *numbers, device="cpu": stream(self, *numbers)  # type: ignore[method-assign]


def training() -> None:
    """Each stage, its loss, gradients and measurements; checkpoints and random streams stay on the CPU."""
    train_there()
    processor, dataset = make_processor(), make_dataset()
    common = {"disable_tqdm": True, "save_strategy": "no", "max_steps": 3, "per_device_train_batch_size": 2}

    def model() -> TPRLForConditionalGeneration:
        base = build("llava")
        base.generation_config.eos_token_id = 2
        return TPRLForConditionalGeneration.from_base_model(base, **POLICY, policy_budget=True, policy_positions=True)

    def run(trainer_class, config_class, data, reward_funcs=None, **settings) -> None:
        config = config_class(folder, **{**common, **settings})
        extra = {} if reward_funcs is None else {"reward_funcs": reward_funcs}
        trainer = trainer_class(
            model(), config, processing_class=processor, train_dataset=data, eval_dataset=dataset, **extra
        )
        trainer.train()
        assert trainer.evaluate()
        assert all(weight.device == DEVICE for weight in trainer.model.parameters())

    def length(prompts, completions, **columns):
        return [float(len(completion)) for completion in completions]

    with tempfile.TemporaryDirectory() as folder, PretendMode():
        run(AutoencoderTrainer, AutoencoderConfig, dataset)
        for teacher in (VisPruner(), GradientTeacher(), LeaveOutTeacher()):
            demonstrations = generate_demonstrations(teacher, on_device(model()), processor, dataset)
        run(LfDTrainer, LfDConfig, demonstrations, keep_ratio=0.5)
        run(TPRLPPOTrainer, TPRLPPOConfig, dataset, num_mini_batches=2, num_ppo_epochs=1)
        small = {"num_mini_batches": 2, "num_iterations": 1, "beta": 0.1}
        run(TPRLGRPOTrainer, TPRLGRPOConfig, dataset, length, num_generations=2, **small)
        budgets = {"rollout_keep_ratios": [0.5, 0.25], "shared_budget": 0.5}
        run(CounterfactualTrainer, CounterfactualConfig, dataset, **budgets, **small)
        assert 0 < calibrate_threshold(on_device(model()), processor, dataset, keep_ratio=0.5) < 1


def train_command() -> None:
    """Every stage of `tprl train` computes on the accelerator, the demonstrations and the first measurements too."""
    train_there()
    made, places = tprl_hf.training.generate_demonstrations, []

    def watched(teacher, model, *arguments, **settings):
        places.append(model.device)
        return made(teacher, model, *arguments, **settings)

    tprl_hf.training.generate_demonstrations = watched
    short = {"max_steps": 1, "per_device_train_batch_size": 2}
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "output_dir": f"{folder}/run",
            "policy": {"latent_dim": 24, "policy_dim": 24},
            "data": {"train": {"source": "mosaic", "seed": 100, "num_samples": 6}},
            "autoencoder": short,
            "demonstrations": {"teacher": "gradient", "keep_ratios": [0.5]},
            "lfd": short,
        }
        Path(folder, "recipe.yaml").write_text(json.dumps(recipe))
        with PretendMode():
            assert main(["train", "all", "--config", f"{folder}/recipe.yaml"]) == 0
    assert places == [DEVICE]
    assert training_device({"device": None}) == DEVICE and training_device({"device": "cpu"}).type == "cpu"
    os.environ["LOCAL_RANK"] = "3"
    assert training_device({"device": None}) == torch.device(DEVICE.type, 3)
    assert training_arguments({"device": "cpu"}) == {"use_cpu": True} and training_arguments({"device": None}) == {}


PARTS = (
    control, families, projector_elsewhere, default_device, steps, commands, more_commands, training, more_training,
    train_command,
)  # fmt: skip

if __name__ == "__main__":
    {part.__name__: part for part in PARTS}[sys.argv[1]]()
