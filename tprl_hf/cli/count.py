"""Say what pictures and a question will cost, before a model is asked: their tokens, and how many are kept."""

import argparse
import json
from typing import Any

from .arguments import DEFAULT_KEEP_RATIO, add_budget_arguments, add_model_argument, budget_of

NAME = "count"
HELP = "say how many tokens pictures cost; loads no weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, action="append", metavar="FILE", help="a picture; can be repeated")
    parser.add_argument("--question", default="", metavar="TEXT", help="the question (default: none)")
    add_model_argument(parser)
    add_budget_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from tprl_hf.pictures import open_picture

    images = [open_picture(file) for file in arguments.image]

    import tprl_hf
    from tprl_hf.costs import budget_in_use, own_budget, placeholder_ids, prompt_cost
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.loading import config_of
    from tprl_hf.missing_packages import load_processor

    path = arguments.model or tprl_hf.embedded_checkpoint()
    config = config_of(path)
    if not isinstance(config, tprl_hf.TPRLConfig):
        config = tprl_hf.TPRLConfig(base_config=config)
    given: dict[str, Any] = {"prune": False} if arguments.no_prune else budget_of(arguments)
    budget = budget_in_use(given, own_budget(config), config)
    if budget is None and not arguments.no_prune:  # as the commands that ask the model
        budget = budget_in_use({"keep_ratio": DEFAULT_KEEP_RATIO}, None, config)
    ids, processor = placeholder_ids(config.base_config), load_processor(path)

    def cost_of(pictures: list[Any], question: str) -> dict[str, Any]:
        inputs = chat_inputs(processor, [{"images": pictures, "prompt": question}])
        cost = prompt_cost(inputs["input_ids"], ids, budget)
        return {**vars(cost), "llm_tokens": cost.llm_tokens}

    each = [
        {"image": file, "width": image.width, "height": image.height, **cost_of([image], "")}
        for file, image in zip(arguments.image, images, strict=True)
    ]
    whole = cost_of(images, arguments.question)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if arguments.json:
        print(json.dumps({"images": each, "prompt": {**whole, "max_positions": positions}}, indent=2))
        return 0
    for row in each:
        print(f"{row['image']}: {row['width']} x {row['height']} pixels, {tokens(row)}")
    more = "" if positions is None else f"; the model has {positions:,} positions"
    reach = "" if whole["llm_tokens"] is None else f"; the LLM reads {whole['llm_tokens']:,}"
    print(f"The prompt: {whole['prompt_tokens']:,} tokens, {tokens(whole)}{reach}{more}")
    return 0


def tokens(cost: dict[str, Any]) -> str:
    kept = "those above the threshold" if cost["kept_tokens"] is None else f"{cost['kept_tokens']:,}"
    return f"{cost['visual_tokens']:,} visual tokens, {kept} kept"
