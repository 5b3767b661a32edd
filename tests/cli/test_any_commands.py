"""Whatever is written after a command of `tprl`: one line that names it, or as far as a valid one comes.

`test_any_words.py` does so for recipes and `tprl generate`, `test_any_files.py` for what lies in files.
"""

import itertools
import json
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.any_values import assert_good, assert_reaches, judge, several
from tprl_hf.cli.arguments import DEVICE_MAPS, DTYPES, method_names
from tprl_hf.cli.evaluate import METRICS, OTHERS
from tprl_hf.cli.serve import bind
from tprl_hf.loading import device_named

from .test_any_words import WORDS, is_count_text, is_fraction_text, is_threshold_text, said

# No command comes farther than this directory, which is not there.
MODEL = "./no/model"
NO_MODEL = "There is no directory ./no/model"


def is_whole_text(text: str, most: int, least: int = 0) -> bool:
    return bool(re.fullmatch("[0-9]+", text, re.A)) and least <= int(text) <= most


def is_seed_text(text: str) -> bool:
    return is_whole_text(text, 2**32 - 1)


def is_list_of(check):
    return lambda text: all(check(part.strip()) for part in text.split(","))


def is_pruners_text(*others: str):
    known = {*method_names(), *others}

    def check(text: str) -> bool:
        names = [name.strip() for name in text.split(",") if name.strip()]
        whole = [re.fullmatch(r"([\w+-]+)((:\w+=[^:]+)*)", name) for name in names]
        return bool(names) and all(one is not None and one[1] in known for one in whole)

    return check


def among(*choices: str):
    return lambda text: text in choices


def is_text(text: str) -> bool:
    return bool(text.strip())


LOADING = {
    "--dtype": among(*DTYPES),
    "--device": is_text,
    "--device-map": among(*DEVICE_MAPS),
    "--attn-implementation": is_text,
}
BUDGETS = {"--keep-ratio": is_fraction_text, "--num-keep": is_count_text, "--threshold": is_threshold_text}
ASKED = {"--max-new-tokens": is_count_text, "--output-dir": is_text, **LOADING}
PRUNER = {"--pruner": among(*method_names()), "--seed": is_seed_text}
IMAGE = ["no.png", "what ?"]
COMMANDS = {
    "demo": (
        ["demo", MODEL],
        {
            **LOADING,
            **dict.fromkeys(("--num-samples", "--num-shown"), is_count_text),
            "--seed": is_seed_text,
            "--keep-ratios": is_list_of(is_fraction_text),
            "--output-dir": is_text,
        },
    ),
    "app": (
        ["app", MODEL],
        {
            **LOADING,
            "--host": is_text,
            "--port": lambda text: is_whole_text(text, 65535),
            "--max-new-tokens": is_count_text,
            "--space": is_text,
        },
    ),
    "generate": (["generate", MODEL, "--image", "no.png", "--question", "what ?"], {**ASKED, **BUDGETS, **PRUNER}),
    "compare": (
        ["compare", *IMAGE, "--model", MODEL],
        {
            **ASKED,
            **{name: BUDGETS[name] for name in ("--keep-ratio", "--num-keep")},
            "--pruners": is_pruners_text(),
            "--answer": is_text,
            "--seed": is_seed_text,
        },
    ),
    "count": (["count", MODEL, "--image", "no.png"], {**BUDGETS, "--question": lambda text: True}),
    "trajectory": (["trajectory", *IMAGE, MODEL], {**ASKED, **BUDGETS, "--steps": is_count_text, "--answer": is_text}),
    "evaluate": (
        ["evaluate", MODEL],
        {
            **ASKED,
            **dict.fromkeys(("--num-samples", "--random-seeds", "--batch-size"), is_count_text),
            "--time-rounds": lambda text: is_count_text(text) and int(text) > 1,
            "--data": is_text,
            "--include-path": is_text,
            "--split": is_text,
            "--pruners": is_pruners_text(*OTHERS),
            "--keep-ratios": is_list_of(is_fraction_text),
            "--seed": lambda text: (
                is_list_of(is_seed_text)(text) and len({*map(str.strip, text.split(","))}) == text.count(",") + 1
            ),
            "--metric": among(*METRICS),
        },
    ),
    "flops": (
        ["flops", MODEL],
        {
            "--keep-ratios": is_list_of(is_fraction_text),
            "--num-keep": is_list_of(is_count_text),
            **dict.fromkeys(("--text-tokens", "--max-new-tokens", "--tiles", "--image-size"), is_count_text),
        },
    ),
    "benchmark": (
        ["benchmark", MODEL],
        {
            **LOADING,
            "--keep-ratio": is_fraction_text,
            **dict.fromkeys(("--batch-size", "--max-new-tokens", "--text-tokens"), is_count_text),
            "--load": is_list_of(is_count_text),
            "--rounds": lambda text: is_count_text(text) and int(text) > 1,
            "--pruner": among(*(name for name in method_names() if name != "none")),
            "--pruners": lambda text: text == "all" or is_pruners_text()(text),
            "--seed": is_seed_text,
        },
    ),
    "serve": (
        ["serve", MODEL],
        {
            **LOADING,
            **BUDGETS,
            **PRUNER,
            **dict.fromkeys(
                (
                    *("--max-request-mb", "--max-images", "--max-tokens"),
                    *("--max-image-tokens", "--max-batch", "--max-waiting"),
                ),
                is_count_text,
            ),
            "--host": is_text,
            "--name": is_text,
            "--allow-host": is_text,
            "--port": lambda text: is_whole_text(text, 65535),
        },
    ),
}
MORE_WORDS = st.one_of(
    WORDS,
    WORDS,
    st.sampled_from(
        [
            *(
                "1/3,1/9",
                "1/3,",
                ",",
                "1/3,2",
                "1,2",
                "7,7",
                "7,8",
                "1/",
                "/3",
                "1/3/3",
                "65535",
                "65536",
                "4294967296",
            ),
            *("float32", "auto", "cpu", "none", "random", "learned", "uniform,random", "fastv:layer=3", "fastv:layer"),
            *("fastv:", ":layer=3", "exact", "vqa", "oracle", "resize+uniform", "all", "uniform,,random", "Uniform"),
        ]
    ),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_is_described_here(command):
    """A new option is checked, and this file says what it may be."""
    from tprl_hf.cli.main import make_parser

    (subparsers,) = [action.choices for action in make_parser()._actions if isinstance(action.choices, dict)]
    options = {
        action.option_strings[-1]
        for action in subparsers[command]._actions
        if action.option_strings and action.nargs != 0 and action.help != "==SUPPRESS=="
    }
    words, described = COMMANDS[command]
    assert options - {"--image", "--model"} - {word for word in words if word.startswith("--")} == described.keys()


OPTIONS = [(command, option) for command in COMMANDS for option in COMMANDS[command][1]]


@several(700)
@given(which=st.sampled_from(OPTIONS), word=MORE_WORDS)
def test_an_option_of_a_command(which, word, capsys):
    command, option = which
    words, described = COMMANDS[command]
    plain = option.strip("-")
    named = {option: word, plain: word, plain.replace("-", "_"): word, "pruner": word.split(",")[0]}
    verdict = judge(lambda: said([*words, f"{option}={word}"], capsys), named, False)
    if described[option](word):
        assert_reaches(verdict, NO_MODEL)
    else:
        assert_good(verdict, "is empty", "invalid choice", "is not in (0, 1]", "is not a fraction")


CONTRADICTIONS = [
    (["generate", "--image", "no.png", "--question", "what ?"], ["--pruner=none", "--keep-ratio=1/3"]),
    (["serve"], ["--pruner=none", "--num-keep=3"]),
    (["serve"], ["--device=cpu", "--device-map=auto"]),
    (["count", "--image", "no.png"], ["--num-keep=3", "--no-prune"]),
    (["compare", *IMAGE], ["--num-keep=3", "--keep-ratio=1/3"]),
    (["flops"], ["--num-keep=3", "--keep-ratios=1/3"]),
    (["trajectory", *IMAGE], ["--no-prune"]),
    (["evaluate"], ["--data=easy-vqa", "--seed=7,8"]),
    (["evaluate"], ["--data=./no.jsonl", "--split=test"]),
    (["evaluate"], ["--split=no-such"]),
    (["evaluate"], ["--data=easy-vqas"]),
    (["flops", "llava-1.5-7b"], ["--num-keep=577"]),
]


@pytest.mark.parametrize(("words", "options"), CONTRADICTIONS)
def test_options_that_contradict_each_other(words, options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {}
    for option in options:
        name, _, value = option.partition("=")
        named |= {name: value or name, name.strip("-"): value}
    verdict = judge(lambda: said([*words, *options], capsys), named, False)
    assert_good(verdict, "not allowed with argument", "Tasks of lmms-eval need it", "/no.jsonl")


HOSTS = st.sampled_from(
    [
        *(
            "127.0.0.1",
            "localhost",
            "::1",
            "x",
            "256.0.0.1",
            "::",
            "::x",
            "a b",
            ".",
            "..",
            "a" * 300,
            "\u2028",
            "\0",
            "ü.x",
        )
    ]
)


@several(60)
@given(host=HOSTS, port=st.sampled_from([0, 1, 65535]))
def test_an_address_to_listen_at(host, port):
    """Valid ones get their socket; port 1 needs rights."""

    def differs(listener):
        with listener:
            address = listener.getsockname()
            return None if address[1] == port or not port else f"{address}"

    found = judge(lambda: bind(host, port), {"host": host, "port": port}, None, differs)
    assert_good(found)
    assert found[0] == "correct" or (host, port) not in [("127.0.0.1", 0), ("localhost", 0)]


@several(60)
@given(word=MORE_WORDS)
def test_a_device(word):
    device = word if word.strip() else None  # an empty one is refused before
    verdict = judge(
        lambda: device_named(device), {"device": device}, device in (None, "cpu", "auto") and device != "auto"
    )
    assert_good(verdict)


@several(120)
@given(
    ratios=st.lists(st.sampled_from(["1/3", "0.5", "1", "1e-9", "2/576", "1/2"]), min_size=1, max_size=3),
    counts=st.one_of(st.none(), st.lists(st.sampled_from([1, 64, 576, 577, 10**30]), min_size=1, max_size=3)),
    text_tokens=st.sampled_from([1, 133, 10**6]),
)
def test_operations_are_of_the_tokens_that_are_asked_for(ratios, counts, text_tokens, capsys):
    budget = f"--keep-ratios={','.join(ratios)}" if counts is None else f"--num-keep={','.join(map(str, counts))}"
    kept = [max(1, round(Fraction(one) * 576)) for one in ratios] if counts is None else counts
    is_valid = all(one <= 576 for one in kept)

    def call():
        capsys.readouterr()
        words = ["flops", "llava-1.5-7b", budget, f"--text-tokens={text_tokens}", "--json"]
        from tprl_hf.cli.main import main

        code, (out, err) = main(words), capsys.readouterr()
        if code:
            raise ValueError(err)
        return json.loads(out)

    def differs(found):
        prefill = [row["prefill"] for row in found["rows"]]
        order = sorted({576, *kept})
        same = [row["num_kept"] for row in found["rows"]] == list(dict.fromkeys([576, *kept]))
        by_kept = dict(zip([row["num_kept"] for row in found["rows"]], prefill, strict=True))
        grows = all(by_kept[less] < by_kept[more] for less, more in itertools.pairwise(order))
        return None if same and grows and found["text_tokens"] == text_tokens else f"{found}"

    named = {"--num-keep": next((one for one in kept if one > 576), 0)}
    assert_good(judge(call, named, is_valid, differs))
