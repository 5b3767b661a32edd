import json

import pytest

from tests.cli.test_demo import table_under
from tprl_hf.cli.main import main
from tprl_hf.evaluation.presets import PRESETS


def run(capsys, *words: str) -> tuple[int, str, str]:
    return main(["flops", *words]), *capsys.readouterr()


def test_the_published_numbers_stand_in_the_tables(capsys):
    code, out, _ = run(capsys, "llava-1.5-7b", "--num-keep", "192,128,64", "--text-tokens", "133")
    assert code == 0
    conventions = out[out.index("kept", out.index("visual KV MB")) :]
    rows = {row[0]: row for row in table_under(conventions, "kept")}
    assert float(rows["576 of 576"][1]) == pytest.approx(9.6, abs=0.05)
    assert float(rows["192 of 576"][1]) == pytest.approx(4.4, abs=0.05) and rows["192 of 576"][2] == "-54.2 %"
    macs = [float(rows[f"{kept} of 576"][3]) for kept in (576, 192, 128, 64)]
    assert macs == pytest.approx([3.817, 1.253, 0.833, 0.416], abs=0.001)
    first = {row[0]: row for row in table_under(out, "kept")}
    row = dict(zip(first["kept"], first["192 of 576"], strict=True))
    assert row["visual KV MB"] == "100.7" and first["576 of 576"][6] == "-"
    # FastV's score in the policy's place
    assert float(row["pruner G"]) * 50 < float(row["early layers G"]) < float(row["prefill G"]) / 10
    assert row["less"] == "-52.5 %" and row["less with them"] == "-48.5 %"
    assert "nothing was run" in out and "Command: tprl flops llava-1.5-7b --num-keep 192,128,64" in out


def test_fractions_a_checkpoints_config_and_json(capsys, base_checkpoint):
    code, out, _ = run(capsys, str(base_checkpoint), "--keep-ratios", "1/4,1/8", "--max-new-tokens", "4", "--json")
    found = json.loads(out)
    assert code == 0 and [row["num_kept"] for row in found["rows"]] == [16, 4, 2]
    assert found["rows"][0]["pruner"] == 0 < found["rows"][1]["pruner"]
    assert all(row["decode"] > 0 for row in found["rows"])


def test_the_old_spelling_of_budgets(capsys):
    _, new, _ = run(capsys, "--keep-ratios", "1/3")
    code, old, err = run(capsys, "--keep", "1/3,192")
    assert code == 0 and table_under(old, "kept") == table_under(new, "kept")
    assert "--keep is deprecated: write --keep-ratios or --num-keep" in err


def test_the_presets_are_listed(capsys):
    code, out, _ = run(capsys, "--list")
    assert code == 0 and all(name in out for name in PRESETS)


def test_what_does_not_fit_is_one_line_and_exit_code_2(capsys):
    code, _, err = run(capsys, "--num-keep", "577")
    assert code == 2 and "Cannot keep 577 of 576" in err and err.count("\n") == 1
    code, _, err = run(capsys, "no-such-model")
    assert code == 2 and "no-such-model" in err and err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main(["flops", "--keep-ratios", "0"])
    assert stop.value.code == 2
