"""Which rows the processes of a training see; a script for torchrun.

python sampled_rows.py FOLDER writes FOLDER/<name>.json for every case below: per process the ids of its micro-batches.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from distilling import make_trainer, pair
from transformers import BertModel, TrainerCallback

from kronecker_transformers.tasks.text import TextStream, length_group

ROWS, BATCH, EPOCHS = 32, 2, 2
STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")


def rows(count):
    return [
        {"input_ids": [2 + i % 60] * (2 + i * 7 % 11), "attention_mask": [1] * (2 + i * 7 % 11), "row": i}
        for i in range(count)
    ]


class StopAt(TrainerCallback):
    """As a job that ends early does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def seen_rows(folder, data, stop=None, resume=False, **arguments):
    """The ids of the micro-batches that this process was given, and how many samples the trainer counted in all."""
    teacher, student = pair(BertModel, num_hidden_layers=2)
    seen = []

    trainer = make_trainer(
        student, teacher, folder, data, [StopAt(stop)] if stop else [], per_device_train_batch_size=BATCH,
        objective="sentence_encoder", save_strategy="steps" if stop else "no", save_steps=stop or 500, **arguments,
    )  # fmt: skip
    compute_loss = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        seen.append(inputs.pop("row").tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train(resume_from_checkpoint=resume)
    return seen, trainer.training_summary()["samples"]


def everywhere(found):
    """What all processes have found."""
    if not torch.distributed.is_initialized():
        return [found]
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    return gathered


def main():
    folder = Path(sys.argv[1])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    cases = {name: {"train_sampling_strategy": name} for name in STRATEGIES}
    cases["drop_last"] = {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}
    cases["accumulated"] = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}
    steps = ROWS * EPOCHS // (BATCH * processes)
    for name, options in cases.items():
        count = ROWS - 1 if name == "drop_last" else ROWS
        epochs = {"num_train_epochs": EPOCHS, "max_steps": -1}
        whole = seen_rows(folder / name, rows(count), **epochs, **options)
        stop = steps // 2 // options.get("gradient_accumulation_steps", 1)
        first = seen_rows(folder / f"{name}-2", rows(count), stop=stop, **epochs, **options)
        rest = seen_rows(folder / f"{name}-2", rows(count), resume=True, **epochs, **options)
        save(folder / f"{name}.json", everywhere([whole, first, rest]))
    for workers in (0, 2):
        arguments: dict = {
            "max_steps": steps, "dataloader_num_workers": workers, "train_sampling_strategy": "group_by_length",
            "accelerator_config": {"dispatch_batches": False},
        }  # fmt: skip
        trainer = make_trainer(
            *pair(BertModel)[::-1], folder / "unused", per_device_train_batch_size=BATCH, **arguments
        )
        stream = TextStream(lambda seed, share: share.of(rows(ROWS)), seed=0, group=length_group(trainer.args))
        found = seen_rows(folder / f"stream-{workers}", stream, **arguments)
        save(folder / f"stream-{workers}.json", everywhere([found]))


def save(path, found):
    if os.environ.get("RANK", "0") == "0":
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
