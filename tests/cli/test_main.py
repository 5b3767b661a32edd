import subprocess
import sys

import pytest

import tprl_hf
from tprl_hf.cli import main as cli
from tprl_hf.cli.arguments import keep_ratio, positive_int


def run_expecting_exit(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    return stop.value.code, *capsys.readouterr()


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from tprl_hf.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in cli.COMMANDS:
        assert f"    {command.NAME}" in done.stdout


def test_version(capsys):
    assert run_expecting_exit(capsys, "--version")[:2] == (0, f"tprl_hf {tprl_hf.__version__}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["prune"], "invalid choice: 'prune'"),
        (["generate", "--question", "q"], "the following arguments are required: --image"),
        (["generate", "--keep-ratio", "0"], "0 is not in (0, 1]: it is the fraction of visual tokens that is KEPT"),
        (["generate", "--keep-ratio", "third"], "'third' is not a fraction"),
        (["generate", "--keep-ratio", "1/0"], "'1/0' is not a fraction"),
        (["generate", "--num-keep", "0"], "'0' is not a whole number of at least 1"),
        (["generate", "--keep-ratio", "0.5", "--num-keep", "3"], "--num-keep: not allowed with argument --keep-ratio"),
        (["generate", "--pruner", "magic"], "invalid choice: 'magic'"),
        (["demo", "--num-samples", "-3"], "'-3' is not a whole number"),
        (["generate", "--threshold", "5"], "'5' is not between 0 and 1: it is the keep probability"),
        (["generate", "--question", "  "], "the question is empty"),
        (["benchmark", "--pruners", "divprun"], "there is no pruner 'divprun'; did you mean divprune?"),
        (["evaluate", "--pruners", "x"], "there is no pruner 'x'; choose from none, random"),
        (["benchmark", "--rounds", "1"], "at least 2 rounds are needed"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(capsys, words, message):
    code, out, err = run_expecting_exit(capsys, *words)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("demo --model DIR", "demo DIR"),
        ("generate --model DIR --image a --question b", "generate DIR --image a --question b"),
        ("evaluate --model DIR --num-samples 2", "evaluate --num-samples 2 DIR"),
        ("demo --keep-ratio 1/9", "demo --keep-ratios 1/9"),
        ("benchmark DIR --keep 1/4", "benchmark DIR --keep-ratio 1/4"),
        ("benchmark --batch 2", "benchmark --batch-size 2"),
        ("benchmark --new-tokens 4", "benchmark --max-new-tokens 4"),
        ("flops --new-tokens 4", "flops --max-new-tokens 4"),
    ],
)
def test_old_spellings_mean_the_same_and_say_so(capsys, old, new):
    parser = cli.make_parser()
    expected = parser.parse_args(new.split())
    assert capsys.readouterr().err == ""
    assert parser.parse_args(old.split()) == expected
    option = next(word for word in old.split() if word.startswith("--") and word not in new.split())
    assert f"{option} is deprecated: write " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args([new.split()[0], "--help"])
    assert f"  {option} " not in capsys.readouterr().out


@pytest.mark.parametrize(("text", "value"), [("1/3", 1 / 3), ("0.25", 0.25), ("1", 1.0), ("2/4", 0.5)])
def test_keep_ratio_reads_decimals_and_fractions(text, value):
    assert keep_ratio(text) == value


def test_positive_int():
    assert positive_int("12") == 12


def test_traceback_shows_where_an_error_comes_from(tmp_path):
    words = ["generate", "--image", str(tmp_path / "none.png"), "--question", "q"]
    assert cli.main(words) == 2
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", *words])


def test_a_bug_is_not_taken_for_a_users_mistake(monkeypatch):
    def run(arguments):
        raise KeyError("bug")

    monkeypatch.setattr(cli.COMMANDS[0], "run", run)
    with pytest.raises(KeyError):
        cli.main([cli.COMMANDS[0].NAME])


def test_a_name_of_ours_that_cannot_be_imported_is_a_bug_too(monkeypatch):
    def run(arguments):
        from tprl_hf.cli import no_such_module  # noqa: F401

    monkeypatch.setattr(cli.COMMANDS[0], "run", run)
    with pytest.raises(ImportError, match="no_such_module"):
        cli.main([cli.COMMANDS[0].NAME])


def test_a_package_that_is_missing_is_one_line(monkeypatch, capsys):
    def run(arguments):
        import no_such_package  # noqa: F401

    monkeypatch.setattr(cli.COMMANDS[0], "run", run)
    assert cli.main([cli.COMMANDS[0].NAME]) == 2
    assert capsys.readouterr().err.endswith(
        "error: No module named 'no_such_package'. Install what is missing or too old.\n"
    )
    with pytest.raises(ImportError):
        cli.main(["--traceback", cli.COMMANDS[0].NAME])


def test_ctrl_c_ends_with_130_and_without_a_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tprl_hf.cli.flops.run", interrupted)
    assert cli.main(["flops", "llava-1.5-7b"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `tprl flops | head -1`."""
    code = "import sys; from tprl_hf.cli.main import main; sys.exit(main(['flops', '--list']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(120) == 0
        assert b"Error" not in process.stderr.read()
