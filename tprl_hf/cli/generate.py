"""Answer a question about an image with part of its visual tokens, and show which ones were kept."""

import argparse

from .arguments import (
    add_budget_arguments,
    add_loading_arguments,
    add_model_argument,
    add_pruner_arguments,
    positive_int,
    question,
)
from .progress import note

NAME = "generate"
HELP = "ask your own question about your own image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, metavar="FILE", help="the image")
    parser.add_argument("--question", type=question, required=True, metavar="TEXT", help="the question")
    add_model_argument(parser)
    add_budget_arguments(parser)
    add_pruner_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="also write kept_tokens.png and kept_tokens.html there")
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from tprl_hf.pictures import open_picture

    image = open_picture(arguments.image)

    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.evaluation.benchmark import measure_prefill
    from tprl_hf.loading import unknown_words_note
    from tprl_hf.modeling.generation_tprl import GREEDY
    from tprl_hf.visualization import Panel

    from .loading import load_named_model, pruner_and_budget, using_pruner
    from .pictures import make_figures, name_of_model, write_pictures

    model, processor = load_named_model(arguments)
    name, pruner, budget = pruner_and_budget(model, arguments)
    inputs = chat_inputs(processor, [{"images": [image], "prompt": arguments.question}], model.device)
    with using_pruner(model, pruner):
        plan = model.prune(**inputs, **budget)
        sequences = model.generate(
            **inputs,
            **budget,
            **GREEDY,
            max_new_tokens=arguments.max_new_tokens,
            tokenizer=processor.tokenizer,
        )
        calls = {
            "unpruned": lambda: model(**inputs, prune=False, logits_to_keep=1),
            "pruned": lambda: model(**inputs, **budget, logits_to_keep=1),
        }
        times = measure_prefill(model.lvlm.get_decoder(), calls, rounds=3, warmup=1)
    unknown = unknown_words_note(processor, arguments.question)
    if unknown is not None:
        note(unknown)
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(answer, flush=True)
    note(
        f"{name}: {int(plan.num_kept)} of {int(plan.num_visual)} visual tokens kept; LLM prefill "
        f"{times['pruned'].llm_ms:.1f} ms, unpruned {times['unpruned'].llm_ms:.1f} ms; with vision tower and pruner "
        f"{times['pruned'].total_ms:.1f} ms, unpruned {times['unpruned'].total_ms:.1f} ms "
        f"(medians of 3, {model.device.type}, {str(model.dtype).removeprefix('torch.')})"
    )
    if arguments.output_dir:
        kept = f"{name}, {int(plan.num_kept)} of {int(plan.num_visual)} kept"
        panels = [Panel("the image"), Panel(kept, "", plan.keep_mask, plan.scores)]
        title = f"{arguments.question}  {answer}"
        figures = make_figures(image, processor, inputs, plan, panels, title)
        lines = [f"model: {name_of_model(model.name_or_path)}"]
        for path in write_pictures(figures, arguments.output_dir, "Kept visual tokens", lines):
            note(str(path))
    return 0
