"""What Photo-VQA's questions give away without the picture: `python -m tprl_hf.test_bed.photo_baseline`.

The guess for a question is the most frequent answer to it in the training split. For a question that was never asked
there, it is the most frequent answer to its type, of those that the question names where it names any.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice

from tprl_hf.data.photo import QUESTION_TYPES, PhotoQuestion, photo_scenes, pictures_root


def guess_from_text(training: Iterable[PhotoQuestion], test: Iterable[PhotoQuestion]) -> dict[str, tuple[int, int]]:
    """By question type: how many of the questions in `test` are guessed correctly, and how many there are."""
    by_prompt: dict[str, Counter] = defaultdict(Counter)
    by_type: dict[str, Counter] = defaultdict(Counter)
    for question in training:
        by_prompt[question.prompt][question.answer] += 1
        by_type[question.question_type][question.answer] += 1
    scores = {}
    found: dict[str, list[bool]] = defaultdict(list)
    for question in test:
        words = question.prompt.replace("?", "").replace(",", "").split()
        usual = by_type[question.question_type]
        known = (
            by_prompt.get(question.prompt) or Counter({word: usual[word] for word in words if word in usual}) or usual
        )
        found[question.question_type].append(known.most_common(1)[0][0] == question.answer)
    for name in QUESTION_TYPES:
        scores[name] = (sum(found[name]), len(found[name]))
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--training-scenes", type=int, default=20_000, help="default: %(default)s, seven questions each"
    )
    parser.add_argument("--test-scenes", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=7, help="of the test scenes (default: %(default)s)")
    arguments = parser.parse_args()

    def questions(split: str, seed: int, number: int) -> list[PhotoQuestion]:
        scenes = islice(photo_scenes(split, seed, pictures_root()), number)
        return [question for _, _, asked in scenes for question in asked]

    scores = guess_from_text(
        questions("train", 0, arguments.training_scenes), questions("test", arguments.seed, arguments.test_scenes)
    )
    print("| questions | correct from the text alone, % | n |\n|---|---|---|")
    for name, (correct, number) in scores.items():
        print(f"| {name} | {100 * correct / number:.1f} | {number} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
