"""Photo-LLaVA ready to use: the parts that other packages ship, and the weights that this one does.

`python -m tprl_hf.test_bed.photo_checkpoint` builds it once and prints its directory. [`photo_policy_checkpoint`] is
the same model with its policy, for `embedded_checkpoint("photo")`; `--policy` prints its directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import AutoProcessor

from tprl_hf.data.photo import photo_directory
from tprl_hf.modeling.saved_files import made_whole

from .photo_model import put_together
from .photo_parts import PartMissingError, build_untrained

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "photo-llava"
TRAINED, POLICY = SHIPPED / "trained.safetensors", SHIPPED / "policy"


def photo_checkpoint(log: Callable[[str], object] = print, trained: Path = TRAINED) -> Path:
    """
    Build Photo-LLaVA where it has not been built yet: about 280 MB are fetched, and 700 MB of disk are used.

    Args:
        log (`Callable`, *optional*, defaults to `print`):
            Told in a line what takes long.
        trained (`Path`, *optional*):
            The weights that `photo_train` made; those of this package by default.

    Returns:
        `Path`: The directory of a plain LLaVA, bfloat16, with its processor. Other weights get another directory.

    Raises:
        `PartMissingError`: If a part cannot be had, in one line that names it.
    """
    if not trained.is_file():
        raise PartMissingError(
            f"The trained weights of Photo-LLaVA are not here: there is no {trained}. Train them with "
            "`python -m tprl_hf.test_bed.photo_train --output-dir DIR`."
        )
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()[:8]
    finished = photo_directory() / f"photo-llava-{digest}"
    if not finished.is_dir():
        log("Photo-LLaVA is built once: its parts are fetched (280 MB) and joined; this takes a minute or two.")
        untrained = build_untrained(photo_directory())
        with made_whole(finished) as unfinished:
            put_together(untrained, trained, unfinished)
    return finished


def photo_policy_checkpoint(
    log: Callable[[str], object] = print, trained: Path = TRAINED, policy: Path = POLICY
) -> Path:
    """
    Build Photo-LLaVA, and beside it a checkpoint of its policy that says where the base model lies on this machine.

    Args:
        log, trained:
            See [`photo_checkpoint`].
        policy (`Path`, *optional*):
            The checkpoint of the policy alone; that of this package by default.

    Returns:
        `Path`: The directory of a TPRL checkpoint with its processor, or of the plain LLaVA where there is no policy.

    Raises:
        `PartMissingError`: If a part cannot be had, in one line that names it.
    """
    base = photo_checkpoint(log, trained)
    weights = policy / "model.safetensors"
    if not weights.is_file():
        return base
    digest = hashlib.sha256(weights.read_bytes() + (policy / "config.json").read_bytes()).hexdigest()[:8]
    finished = base.with_name(f"{base.name}-policy-{digest}")
    if not finished.is_dir():
        config = {**json.loads((policy / "config.json").read_text()), "base_model_name_or_path": str(base)}
        with made_whole(finished) as unfinished:
            AutoProcessor.from_pretrained(base).save_pretrained(unfinished)
            shutil.copytree(policy, unfinished, dirs_exist_ok=True)
            (unfinished / "config.json").write_text(json.dumps(config, indent=2))
    return finished


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", action="store_true", help="the model with its policy (default: the plain LLaVA)")
    parser.add_argument(
        "--trained",
        type=Path,
        default=TRAINED,
        metavar="FILE",
        help="weights of your own photo_train, trained.safetensors (default: those of this package)",
    )
    arguments = parser.parse_args(words)
    make = photo_policy_checkpoint if arguments.policy else photo_checkpoint
    try:
        print(make(lambda line: print(line, file=sys.stderr), arguments.trained))
    except PartMissingError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
