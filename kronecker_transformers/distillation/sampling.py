"""In which order a training sees the rows of its dataset: each once in an epoch, alike in all processes and resumes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class LengthGroups(Sampler[int]):
    """Rows in random order, those of similar length together; the order follows from the seed and the epoch alone.

    The sampler of transformers draws from the global random numbers, which differ from process to process, so that some
    rows of an epoch are seen several times and others never.

    Args:
        lengths: tokens of each row.
        size: rows of similar length, a batch of all processes.
        seed: of the order.
    """

    def __init__(self, lengths: list[int], size: int, seed: int) -> None:
        self._lengths, self._size, self._seed, self._epoch = lengths, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._size, generator=generator))


class SamplingTrainer(Trainer):
    """The Trainer of transformers, whose every `train_sampling_strategy` is safe with several processes and resumes.

    A stream that has a method `share` makes in each process the share of it alone; of others each process makes all of
    the examples and leaves out those that are not its own.

    An evaluation and `predict` keep the order of the dataset. Both samplers are chosen by private methods of the base
    class; there is no public place for it (`tests/distillation/test_sampling.py` says when it is needed no more).
    """

    train_sampler: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_TellEpoch(self))

    def get_train_dataloader(self) -> DataLoader:
        """As in the base class, but for streams that divide themselves."""
        loader = super().get_train_dataloader()
        whole = loader.dataset
        if isinstance(whole, IterableDatasetShard) and hasattr(whole.dataset, "share"):
            whole.dataset = whole.dataset.share(whole.process_index, whole.num_processes)
            whole.process_index, whole.num_processes = 0, 1
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = LengthGroups(sampler.lengths, sampler.batch_size * self.args.world_size, seed)
        self.train_sampler = sampler
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class _TellEpoch(TrainerCallback):
    """Tells the sampler its epoch; after a resume with several processes the base class does not reach it."""

    def __init__(self, trainer: SamplingTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(sampler := self._trainer.train_sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))
