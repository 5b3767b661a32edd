"""Demonstrations that were cut off: what is there is not made again, and what is made is the same."""

import json

import pytest
import torch

from tprl_hf.pruners import UniformPruner
from tprl_hf.training import GradientTeacher, LeaveOutTeacher, generate_demonstrations
from tprl_hf.training.demonstrations import MADE_FROM, demonstrate, in_turns
from tprl_hf.training.saved_masks import SavedMasks, description
from tprl_hf.training.whole_checkpoints import damage_of


class CutOff(Exception):
    pass


@pytest.fixture
def make(make_model, processor, dataset, tmp_path, monkeypatch):
    """Makes demonstrations in one folder, with the batches that were demonstrated; cut off before batch `stop`."""

    def make(teacher=None, stop=None, model=None, **settings):
        batches = []

        def watched(teacher, model, batch, schedules):
            if len(batches) == stop:
                raise CutOff
            batches.append([row["prompt"] for row in batch.rows])
            return demonstrate(teacher, model, batch, schedules)

        monkeypatch.setattr("tprl_hf.training.demonstrations.demonstrate", watched)
        settings = {"dataset": dataset, "batch_size": 2, "output_dir": str(tmp_path / "shown"), **settings}
        try:
            made = generate_demonstrations(
                teacher or GradientTeacher(), model or make_model(), processor, settings.pop("dataset"), **settings
            )
        except CutOff:
            return None, batches
        return made["keep_masks"][:], batches

    return make


def test_what_is_there_is_not_made_again(make, tmp_path):
    undisturbed, all_batches = make(output_dir=None)
    assert len(all_batches) == 4
    _, before = make(stop=3)
    found, after = make()
    assert found == undisturbed and before + after == all_batches and len(after) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shown"]


def test_any_torn_line_is_made_again(make, tmp_path):
    undisturbed, _ = make(output_dir=None)
    path = tmp_path / "shown.unfinished.jsonl"
    make(stop=3)
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    assert len(lines) == 8 and lines[-1] == b""
    for spoiled in (
        whole[:-20],  # within the last sample
        whole[: -len(lines[-2]) - 1],  # before it
        whole[:-1].replace(lines[-2], b"\0" * len(lines[-2])),
        whole.replace(b"0", b"2", 3),
        whole + b'{"sample": 6, "keep_masks": ["01',
        lines[0],
        lines[0][:-3],
        b"[]\n",
        b"",
    ):
        path.write_bytes(spoiled)
        found, after = make()
        assert found == undisturbed and 1 <= len(after) <= 4
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("what", ["data", "teacher", "keep_ratios", "batch_size", "weights"])
def test_masks_of_something_else_are_not_taken(make, make_model, dataset, what, tmp_path, monkeypatch):
    make(stop=2)
    model = make_model()
    others = {
        "data": {"dataset": dataset.map(lambda row: {"answer": f"not {row['answer']}"})},
        "teacher": {"teacher": UniformPruner()},
        "keep_ratios": {"keep_ratios": [0.5, 0.25]},
        "batch_size": {"batch_size": 4},
        "weights": {"model": model},
    }
    if what == "weights":
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(2)
    told = []
    monkeypatch.setattr("tprl_hf.training.saved_masks.logger.warning", told.append)
    undisturbed, batches = make(output_dir=None, **others[what])
    found, after = make(**others[what])
    assert found == undisturbed and after == batches
    assert len(told) == 1 and f"is of another run ({what})" in told[0]


def test_a_teacher_is_described_by_its_settings(make_model):
    assert description(LeaveOutTeacher(4)) == description(LeaveOutTeacher(4)) != description(LeaveOutTeacher(5))
    assert description(UniformPruner()) != description(GradientTeacher())
    model = make_model()
    before = description(model.learned_pruner())
    assert before == description(model.learned_pruner())
    with torch.no_grad():
        model.policy.policy_head.weight.mul_(2)
    assert before != description(model.learned_pruner())


def test_masks_are_read_as_they_were_written(tmp_path):
    path, masks = tmp_path / "masks.jsonl", [[[True, False], [False, False]], [[], []]]
    SavedMasks(path, {"seed": 1}).add(3, masks)
    again = SavedMasks(path, {"seed": 1})
    assert again.of(range(3, 5)) == masks and again.of(range(2, 4)) is None
    assert json.loads(path.read_text().splitlines()[1]) == {"sample": 3, "keep_masks": ["10", "00"]}


def test_processes_read_what_the_others_have_made(tmp_path):
    path, masks = tmp_path / "masks.jsonl", [[[True]], [[False]]]
    first, second = (SavedMasks(path, {"seed": 1}, process) for process in (0, 1))
    first.add(0, masks)
    assert second.of(range(2)) is None
    second.add(2, masks)
    for one in (first, second):
        one.read_others()
        assert one.of(range(4)) == masks + masks
    with second.path.open("ab") as file:  # a line on its way
        file.write(b'{"sample": 4, "keep_masks"')
        file.flush()
        first.read_others()
        assert first.of(range(4, 5)) is None
        file.write(b': ["1"]}\n')
    first.read_others()
    assert first.of(range(4, 5)) == [[[True]]]
    assert SavedMasks(path, {"seed": 1}).of(range(5)) is not None  # fewer processes resume

    told_otherwise = SavedMasks(path, {"seed": 2}, 1)
    told_otherwise.add(5, masks)
    first.read_others()
    assert first.of(range(5, 6)) is None and told_otherwise.of(range(1)) is None

    assert not second.is_over
    first.remove()
    assert second.is_over
    second.add(6, masks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_each_process_looks_at_all_batches_its_own_first(num_processes):
    batches = [range(start, start + 2) for start in range(0, 10, 2)]
    orders = [in_turns(batches, process, num_processes) for process in range(num_processes)]
    for process, order in enumerate(orders):
        assert sorted(order, key=batches.index) == batches
        own = batches[process::num_processes]
        assert order[: len(own)] == own
    assert num_processes != 2 or orders[0][-1] == orders[1][0]  # where the next one begins


def test_a_process_whose_work_is_done_by_the_first_takes_its_dataset(make, tmp_path, monkeypatch):
    undisturbed, _ = make()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    read = SavedMasks.read_others

    def over(self):  # when the second process has begun
        read(self)
        self.remove()

    monkeypatch.setattr(SavedMasks, "read_others", over)
    (tmp_path / "shown" / MADE_FROM).unlink()  # as the first one does at its start
    assert make() == (undisturbed, [])


def test_a_process_that_begins_when_the_first_is_done_takes_its_dataset(make, tmp_path, monkeypatch):
    undisturbed, _ = make()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make() == (undisturbed, [])
    assert [path.name for path in tmp_path.iterdir()] == ["shown"]
    other, batches = make(keep_ratios=[0.5, 0.25])  # that dataset has other masks
    assert len(batches) == 4 and other != undisturbed


def test_the_first_process_makes_a_dataset_anew(make, tmp_path):
    make()
    assert make(stop=2)[0] is None and not (tmp_path / "shown" / MADE_FROM).exists()
    assert damage_of(tmp_path / "shown") is None
