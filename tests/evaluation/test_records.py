"""Records of a comparison outlive whatever a model answers."""

import pytest

from tprl_hf.evaluation.compare_pruners import Record, append_records, read_records


@pytest.mark.parametrize("answer", ["yes", "a\u2028b", "a\u2029", "\u0085", "a\nb", "\x1c", ""])
def test_any_answer_comes_back(tmp_path, answer):
    records = [Record("none", "1", number, answer, 1.0, 3, 4) for number in range(3)]
    append_records(tmp_path / "answers.jsonl", records[:2])
    append_records(tmp_path / "answers.jsonl", records[2:])
    assert read_records(tmp_path / "answers.jsonl") == (records, 0)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"cut')
    assert read_records(tmp_path / "answers.jsonl") == (records, 1)  # one line was removed
