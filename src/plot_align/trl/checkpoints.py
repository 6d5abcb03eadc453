"""Checkpoints that a run goes on from: the newest whole one, and whether it is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from plot_align.errors import InputError
from plot_align.io import file_digest, json_or_none, write_json

DIGESTS = "plot_align_digests.json"


class SealCheckpoints(TrainerCallback):
    """Writes the digests of a checkpoint's files beside them, once all processes have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            seal_folder(folder)


def seal_folder(folder: Path) -> None:
    """Write the digests of all files below ``folder`` into it, without those of checkpoints in it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.name != DIGESTS and not name.parts[0].startswith("checkpoint-"):
            digests[name.as_posix()] = file_digest(path)
    write_json(folder / DIGESTS, digests)


def check_folder(folder: Path) -> None:
    """Checks a folder by the digests in it; one without them was written by another program, or an earlier version.

    Raises:
        InputError: a file is missing or altered.
    """
    path = folder / DIGESTS
    if not path.exists():
        return
    digests = json_or_none(path)
    if not isinstance(digests, dict):
        raise InputError(f"{path} is damaged, and {folder} with it, perhaps; delete {folder}, and run the same again")
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file() or file_digest(file) != expected:
            raise InputError(
                f"{file} is not as it was written, by its digest in {path.name}; delete {folder}, and run the same "
                "again"
            )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole: the trainer writes its state last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
