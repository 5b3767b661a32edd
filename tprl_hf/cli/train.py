"""Train a pruning policy by a recipe, stage by stage. Each stage is a directory; a finished one is left as it is, and
an interrupted one resumes, with the same data only, from its newest whole checkpoint. Ctrl-C and SIGTERM save the step
first where that takes seconds. Under `torchrun` all processes train, the first one writes."""

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_hf.json_files import read_json
from tprl_hf.pruners import PRUNERS
from tprl_hf.training.stages import STAGES
from tprl_hf.whole_files import write

from . import tune_stage
from .arguments import add_loading_arguments, loading_options
from .begun_from import claim_sources, refuse_stale, start_of
from .dry_run import describe, duration
from .old_recipes import renewed
from .processes import is_first_process, say, signs_of_life, wait_for
from .progress import is_quiet, note
from .recipe_file import NAMED_SOURCES, check_names, check_places, model_of, read_recipe, sources_in
from .same_data import claim_data
from .start_over import delete_stages, refuse_several_processes
from .train_plan import expected_seconds
from .training_device import training_arguments, training_device
from .tune_stage import tune

if TYPE_CHECKING:
    from datasets import Dataset

    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

    from .stop_signals import StopSignals

NAME = "train"
HELP = "train a pruning policy by a recipe"
LABELS = ("answer", "boxes", "objects")  # columns that `labels: false` of a source leaves out
TAKEN_FROM = "taken_from.json"  # which TPRL checkpoint the base model in a run's folder was part of
TEACHERS = {"boxes": "BoxTeacher", "gradient": "GradientTeacher", "leave-out": "LeaveOutTeacher"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=(*STAGES, "all"), help="all: those that the recipe has, one after the other")
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a YAML file, or one of ours by name: paper")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.SETTING=VALUE",
        help="settings that replace the recipe's, such as lfd.learning_rate=1e-4 or base_model=PATH",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe, print stages, steps and disk, and train nothing"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete what an earlier run left of these stages, and start over"
    )
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    recipe = read_recipe(arguments.config, arguments.set)
    training_device(loading_options(arguments))  # refuses what there is not
    all_stages = [stage for stage in STAGES if stage in recipe]
    stages = all_stages if arguments.stage == "all" else [arguments.stage]
    if arguments.stage != "all" and arguments.stage not in recipe:
        raise ValueError(f"{arguments.config} has no section {arguments.stage}.")
    check_places(recipe)
    if arguments.overwrite:
        refuse_several_processes(recipe)
    for stage in all_stages:  # before the first one runs, which may take hours
        check_stage(stage, recipe)
    if arguments.dry_run:
        refuse_stale([] if arguments.overwrite else stages, recipe)
        print(describe(stages, recipe))
        return 0

    if arguments.overwrite:
        delete_stages(stages, recipe)

    from .stop_signals import Stopped, StopSignals

    try:
        with StopSignals() as signals, signs_of_life(Path(recipe["output_dir"])):
            run_stages(stages, recipe, Path(arguments.config).stem, signals, loading_options(arguments))
    except Stopped as stopped:
        saved = stopped.saved or "no new checkpoint was saved"
        print(
            f"tprl train: stopped by {signal.Signals(stopped.signum).name}; {saved}. The same command resumes.",
            file=sys.stderr,
        )
        return 128 + stopped.signum
    return 0


def run_stages(
    stages: list[str], recipe: dict[str, Any], name: str, signals: "StopSignals", loading: dict[str, Any]
) -> None:
    """One after the other, those that are not finished. `name` is the recipe's, `loading` how its model is loaded."""
    refuse_stale(stages, recipe)
    folder, loading = Path(recipe["output_dir"]), with_dtype(loading, recipe)
    expected: dict[str, float] | None = None
    for number, stage in enumerate(stages, start=1):
        directory = Path(recipe["output_dir"]) / stage
        claim(directory, settings_of(stage, recipe) | precision_of(loading))
        if (directory / "training.json").exists():
            say(f"{stage}: {directory} is finished")
            continue
        started = time.perf_counter()
        model, processor = starting_model(stage, recipe, loading)
        begun_from = claim_sources(stage, recipe)
        if not hasattr(model, "hf_device_map"):  # else it is in its places
            model.to(training_device(loading))
        if expected is None:
            expected = expected_seconds(stages[number - 1 :], recipe, model, processor) if is_first_process() else {}
            tell(describe(stages, recipe, expected))
        about = f", about {duration(expected[stage])}" if stage in expected else ""
        tell(f"{stage}: stage {number} of {len(stages)}{about}")
        if stage == "demonstrations":
            result = make_demonstrations(stage, recipe, model, processor, directory)
        elif stage == "tune":
            data = training_data(stage, recipe)
            dataset = load_data(recipe, data, recipe[stage].get("num_samples"))
            claim_data(directory, {data: dataset})
            result = tune(recipe, model, processor, dataset, directory, signals, training_arguments(loading))
        else:
            config = make_config(stage, recipe, **training_arguments(loading))
            result = train_stage(stage, recipe, config, model, processor, directory, name, signals)
        seconds, ended = round(time.perf_counter() - started, 1), round(time.time(), 3)
        result = {"stage": stage, "begun_from": begun_from, "seconds": seconds, "ended": ended, **result}
        if is_first_process():
            write(directory / "training.json", json.dumps(result, indent=2) + "\n")
        wait_for(directory / "training.json", folder)  # which says that the model beside it is whole
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.get("metrics", {}).items())
        say(f"{stage}: {directory} in {result['seconds']:.0f} s. {numbers}")


def tell(text: str) -> None:
    """What is not a result, said once."""
    if is_first_process():
        note(text)


def check_stage(stage: str, recipe: dict[str, Any]) -> None:
    """Raises `ValueError` for settings of a stage, its data or the policy that cannot be."""
    from tprl_hf import TPRLConfig

    from .recipe_checks import DEMONSTRATION_CHECKS, check_section

    check_names(recipe.get("policy", {}), TPRLConfig().to_dict(), "policy")
    try:
        TPRLConfig(**recipe.get("policy", {}))
    except ValueError as error:
        raise ValueError(f"policy: {error}") from error
    for name in {training_data(stage, recipe), "validation"} & recipe.get("data", {}).keys():
        sources_of(recipe, name)
    if stage == "demonstrations":
        check_section(recipe[stage], DEMONSTRATION_CHECKS, stage)
        name = recipe[stage].get("teacher", "vispruner")
        names = [*TEACHERS, *(method for method in PRUNERS if method != "none")]
        if name not in names:
            raise ValueError(f"There is no teacher {name!r}; choose from {', '.join(names)}.")
    elif stage == "tune":
        tune_stage.make_config(recipe)
    else:
        make_config(stage, recipe)
        reward_functions(stage, recipe)


def make_config(stage: str, recipe: dict[str, Any], **others: Any) -> Any:
    """The config of a stage's trainer; `others` are fields that are not of the recipe."""
    from dataclasses import fields

    from transformers import TrainingArguments

    from .recipe_checks import check_types, restore_names

    config_class, _ = STAGES[stage].classes()
    restore_names(recipe[stage], config_class, stage)
    not_of_config = ("reward_funcs",) if STAGES[stage].takes_rewards else ()
    settings = {name: value for name, value in recipe[stage].items() if name not in not_of_config}
    names = [field.name for field in fields(config_class)]
    ours = [name for name in names if name not in {field.name for field in fields(TrainingArguments)}]
    check_names(settings, [*names, *not_of_config], stage, [*not_of_config, *ours])
    others_own = {name: value for name, value in settings.items() if name not in ours}
    check_types(others_own, TrainingArguments, stage)
    settings |= others_own
    if "unpruned_answers_dir" in names:  # what one stage has generated, the next one reads
        settings = {"unpruned_answers_dir": answers_folder(recipe), **settings}
    try:
        return config_class(output_dir=str(Path(recipe["output_dir"]) / stage), **{**settings, **others})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{stage}: {error}") from error


def answers_folder(recipe: dict[str, Any]) -> str:
    """Where the LVLM's own unpruned answers are kept, for all stages."""
    return str(Path(recipe["output_dir"]) / "unpruned_answers")


def reward_functions(stage: str, recipe: dict[str, Any]) -> list[Any]:
    """The functions that a stage's `reward_funcs` name."""
    names = recipe[stage].get("reward_funcs")
    if not STAGES[stage].takes_rewards or names is None:
        return []
    from tprl_hf.training.rewards import check_rewards, load_reward

    if not isinstance(names, list):
        raise ValueError(f"{stage}.reward_funcs is a list of names such as module:function; got {names!r}.")
    functions = [load_reward(name) for name in names]
    check_rewards(functions, recipe[stage].get("reward_weights"))
    return functions


def settings_of(stage: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the result of a stage depends on, besides the stages before it and [`precision_of`]."""
    # a teacher reads the frozen LVLM, whatever policy will learn from it
    names = ("base_model", "start_from", *(() if stage == "demonstrations" else ("policy",)), stage)
    data = recipe.get("data", {})
    used = {name: data[name] for name in (training_data(stage, recipe), "validation") if name in data}
    return {name: recipe[name] for name in names if name in recipe} | ({"data": used} if "data" in recipe else {})


def precision_of(loading: dict[str, Any]) -> dict[str, Any]:
    """Of the options by which the model is loaded, those that results depend on, as settings."""
    names = ("dtype", "attn_implementation", "load_in_4bit")
    given = {name: loading[name] for name in names if loading.get(name)}
    if given.get("dtype") == "float32":  # earlier versions, in which it was the default, did not note it
        del given["dtype"]
    return {"loading": given} if given else {}


def with_dtype(loading: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """The options by which the model is loaded, with the dtype of the recipe, or one that suits model and machine."""
    from tprl_hf.loading import chosen_dtype

    if loading.get("dtype"):
        return loading
    if recipe.get("dtype"):
        return {**loading, "dtype": recipe["dtype"]}
    dtype, why = chosen_dtype(model_of(recipe), loading.get("device"))
    tell(f"The LVLM computes in {dtype} ({why}); `dtype` in the recipe or --dtype asks for another one.")
    return {**loading, "dtype": dtype}


def training_data(stage: str, recipe: dict[str, Any]) -> str:
    """Which section of `data` a stage learns from: its own, or `train`."""
    return stage if stage in recipe.get("data", {}) else "train"


def claim(directory: Path, settings: dict[str, Any]) -> None:
    """Notes the settings in `directory`. Raises `ValueError` when others were used there before."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "settings.json"
    if path.exists():
        try:
            noted = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete {directory} to run this stage again.") from error
        before, _ = renewed(noted)
        if "policy" not in settings:
            before.pop("policy", None)  # earlier versions noted it
        asked = json.loads(json.dumps(settings))
        for one in (before, asked):
            if directory.name == "demonstrations":  # which read no validation data
                one.get("data", {}).pop("validation", None)
            for _, section in sources_in(one):  # files are compared by what they hold, wherever they lie
                section["source"] = section["source"] if section["source"] in NAMED_SOURCES else "a file"
        if before != asked:
            raise ValueError(
                f"{directory} was made with other settings ({', '.join(differing(before, asked)[:3])}), see {path}: "
                f"pass --set output_dir=ANOTHER, or delete {directory} to train this stage again."
            )
    write(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def differing(before: Any, asked: Any, name: str = "") -> list[str]:
    """The names of settings that two files do not share."""
    if not (isinstance(before, dict) and isinstance(asked, dict)):
        return [] if before == asked else [name.removesuffix(".")]
    names = sorted({*before, *asked})
    return [found for one in names for found in differing(before.get(one), asked.get(one), f"{name}{one}.")]


def load_data(recipe: dict[str, Any], name: str, num_samples: int | None = None) -> "Dataset":
    """The samples of `data.NAME`, the first `num_samples` of them; of several sources, shuffled together."""
    sources = sources_of(recipe, name)
    if len(sources) == 1:
        return load_source(sources[0], name, num_samples)
    mixture = as_one([load_source(source, name) for source in sources]).shuffle(seed=0)
    return mixture if num_samples is None else mixture.select(range(min(num_samples, len(mixture))))


def sources_of(recipe: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The sections of `data.NAME`, each a source."""
    from .recipe_checks import DATA_CHECKS, check_section

    check_names(recipe.get("data", {}), ("train", "validation", *STAGES), "data")
    sources = recipe.get("data", {}).get(name)
    sources = sources if isinstance(sources, list) and sources else [sources]
    for source in sources:
        if not isinstance(source, dict):
            raise ValueError(f"The recipe must say where its samples come from: data.{name}.source.")
        check_section(source, DATA_CHECKS, f"data.{name}")
    return sources


def load_source(section: dict[str, Any], name: str, num_samples: int | None = None) -> "Dataset":
    """Of the first `num_samples` samples of one source, those of the question types that the recipe wants."""
    dataset = read_source(section, name, section.get("num_samples") if num_samples is None else num_samples)
    labelled = section.get("labels", True)
    if "question_types" not in section:
        return dataset if labelled else without_labels(dataset)
    from tprl_hf.data.own_rows import column_of, kind_of

    has_types = "question_type" in dataset.column_names
    kinds = [kind_of(kind) for kind in (column_of(dataset, "question_type") if has_types else [None] * len(dataset))]
    known, given = sorted(set(kinds)), section["question_types"]
    wanted = [kind_of(kind) for kind in given] if isinstance(given, list) else given
    if not isinstance(wanted, list) or not wanted or not set(wanted) <= set(known):
        raise ValueError(
            f"data.{name} has no questions of types {wanted}, but of {', '.join(known)}: list some of them."
        )
    dataset = dataset.select([i for i, kind in enumerate(kinds) if kind in wanted])
    return dataset if labelled else without_labels(dataset)


def without_labels(dataset: "Dataset") -> "Dataset":
    """The samples without what is known of their answers."""
    return dataset.remove_columns([name for name in LABELS if name in dataset.column_names])


def as_one(parts: list["Dataset"]) -> "Dataset":
    """The samples of several sources; where one has lists of answers, all get lists."""
    from datasets import List, Value, concatenate_datasets

    lists = List(Value("string"))
    if any(part.features.get("answer") == lists for part in parts):
        for number, part in enumerate(parts):
            if part.features.get("answer") == Value("string"):
                answers = [[one] for one in part["answer"]]
                parts[number] = part.remove_columns("answer").add_column("answer", answers, feature=lists)
    return concatenate_datasets(parts)


def read_source(section: dict[str, Any], name: str, count: int | None) -> "Dataset":
    """The first `count` samples of one source."""
    from tprl_hf.data import sources

    source = section.get("source", "mosaic")
    split = section.get("split", "validation" if name == "validation" else "train")
    if not sources.is_source(source):
        raise ValueError(f"There are no data {source!r}: data.{name}.source is {sources.KINDS}.")
    return sources.read_source(source, split, section.get("seed", 0), count)


def starting_model(
    stage: str, recipe: dict[str, Any], loading: dict[str, Any]
) -> tuple["TPRLForConditionalGeneration", Any]:
    """The model that a stage begins with, and its processor."""
    from transformers import set_seed

    from tprl_hf import TPRLForConditionalGeneration
    from tprl_hf.loading import pretrained_arguments
    from tprl_hf.missing_packages import load_processor

    how = pretrained_arguments(**{**loading, "device": training_device(loading)})
    before = start_of(stage, recipe)
    if before is not None:
        path = Path(recipe["output_dir"]) / before
        if not (path / "training.json").exists():
            raise ValueError(f"{stage} begins with what {before} left in {path}: run `tprl train {before}` first.")
        return TPRLForConditionalGeneration.from_pretrained(path, **how), load_processor(path)

    if recipe.get("start_from") or stage == "tune":  # of a checkpoint that has its policy
        name = model_of(recipe)
        model = TPRLForConditionalGeneration.from_pretrained(name, **how)
        check_policy(model, recipe)
        return model, load_processor(name)
    base = base_directory(recipe)
    set_seed(recipe.get(stage, {}).get("seed", 42))  # the start of the new policy
    model = TPRLForConditionalGeneration.from_base_model(base, **how, **recipe.get("policy", {}))
    return model, load_processor(base)


def check_policy(model: "TPRLForConditionalGeneration", recipe: dict[str, Any]) -> None:
    """Raises `ValueError` where a recipe wants another network than the policy that it continues has."""
    has = model.config.to_dict()
    for name, value in recipe.get("policy", {}).items():
        if has[name] != value:
            raise ValueError(
                f"policy.{name} is {value!r}, but {model_of(recipe)} has {has[name]!r}: a policy that is trained on "
                "stays as it is; leave the section out with --set policy=null."
            )


def base_directory(recipe: dict[str, Any]) -> str:
    """The frozen LVLM as a directory or name; that of a TPRL checkpoint is taken out of it."""
    import tprl_hf
    from tprl_hf.loading import config_of
    from tprl_hf.missing_packages import load_processor
    from tprl_hf.modeling.saved_files import made_whole

    base = recipe.get("base_model") or tprl_hf.embedded_checkpoint()
    if config_of(base).model_type != tprl_hf.TPRLConfig.model_type:
        return str(base)
    directory = Path(recipe["output_dir"]) / "base"
    named = recipe.get("base_model")  # none for the embedded one, which lies elsewhere on each machine
    if (directory / TAKEN_FROM).is_file():
        before = read_json(directory / TAKEN_FROM, (str, None), f"delete {directory}.")
        if before != named:
            raise ValueError(f"{directory} is part of {before}, but the recipe names {named}: delete {directory}.")
    elif is_first_process() and directory.exists():
        raise ValueError(
            f"{directory} is where the frozen LVLM of a run lies, and `tprl train` did not make it: move it, or pass "
            "--set output_dir=ANOTHER."
        )
    if is_first_process() and not directory.exists():
        model = tprl_hf.TPRLForConditionalGeneration.from_pretrained(base)
        with made_whole(directory) as unfinished:
            load_processor(base).save_pretrained(unfinished)
            model.lvlm.save_pretrained(unfinished)
            (unfinished / TAKEN_FROM).write_text(json.dumps(named))
    wait_for(directory, directory.parent)
    return str(directory)


def make_demonstrations(stage, recipe, model, processor, directory: Path) -> dict[str, Any]:
    from transformers import set_seed

    from tprl_hf import training
    from tprl_hf.pruners.by_name import make_pruner

    settings = dict(recipe[stage])
    name, seed = settings.pop("teacher", "vispruner"), settings.pop("seed", 0)
    set_seed(seed)
    teacher = getattr(training, TEACHERS[name])() if name in TEACHERS else make_pruner(model, name, seed)
    assert teacher is not None
    data = training_data(stage, recipe)
    dataset = load_data(recipe, data, settings.pop("num_samples", None))
    claim_data(directory, {data: dataset})
    settings |= {"output_dir": str(directory / "dataset"), "unpruned_answers_dir": answers_folder(recipe)}
    made = training.generate_demonstrations(teacher, model, processor, dataset, **settings)
    return {"teacher": name, "num_samples": len(made)}


def train_stage(
    stage, recipe, config, model, processor, directory: Path, recipe_name: str, signals: "StopSignals"
) -> dict[str, Any]:
    from datasets import load_from_disk
    from transformers import PrinterCallback, ProgressCallback

    from tprl_hf.training.whole_checkpoints import MANIFEST, damage_of, newest_whole

    from .stop_signals import SaveAndStop

    _, trainer_class = STAGES[stage].classes()
    source = STAGES[stage].learns_from
    if source is not None:
        path = directory.parent / source
        if not (path / "training.json").exists():
            raise ValueError(f"{stage} learns from {path}, which is not there: run `tprl train {source}` first.")
        if (path / "dataset" / MANIFEST).exists() and (damage := damage_of(path / "dataset")) is not None:
            raise ValueError(f"{path}/dataset is damaged: {damage}. Delete {path}, and run the command again.")
        dataset = load_from_disk(str(path / "dataset"))
    else:
        dataset = load_data(recipe, training_data(stage, recipe))
    validation = load_data(recipe, "validation") if "validation" in recipe.get("data", {}) else None
    claim_data(directory, {source or training_data(stage, recipe): dataset, "validation": validation})
    rewards = reward_functions(stage, recipe)
    extra = {"reward_funcs": rewards} if rewards else {}
    data = {"train_dataset": dataset, "eval_dataset": validation}
    trainer = trainer_class(model, config, processing_class=processor, **data, **extra)
    trainer.recipe = recipe_name
    if is_quiet():
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    trainer.add_callback(SaveAndStop(signals, trainer))
    checkpoint, passed_over = newest_whole(directory)
    for line in passed_over:
        say(f"{stage}: {line}")
    if checkpoint is not None or passed_over:
        say(f"{stage}: {'starts again' if checkpoint is None else f'resumes from {checkpoint}'}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = {} if validation is None else trainer.evaluate()
    if config.save_base_model and Path(model.config.base_model_name_or_path or "").is_dir():
        model.config.base_model_name_or_path = None  # the checkpoint holds it, and the path is of this machine only
    trainer.save_model()
    best = trainer.state.best_global_step
    return {
        **({} if best is None else {"best_step": best}),
        "metrics": {k.removeprefix("eval_"): v for k, v in metrics.items()},
        "log_history": trainer.state.log_history,
    }
