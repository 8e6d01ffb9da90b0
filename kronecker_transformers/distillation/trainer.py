"""Distillation with the Trainer of transformers."""

from __future__ import annotations

import atexit
import gc
import logging
import math
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from ..checkpoint.load import source_name
from ..checkpoint.pooling import MEAN, Pooling
from ..checkpoint.sentence_modules import modules_of
from ..hub.trainer import STATE_FILE, PublishingTrainer
from .arguments import DistillationArguments
from .checkpoints import is_complete, newest_checkpoint
from .contexts import is_bf16_on_cpu, training_attention, unchanged_cache, unchanged_forward
from .memory import TeacherMemory
from .objective import Objective, balanced_weights, check_tokenizers
from .optimizer import MuonAdamW, muon_factors, scale_learning_rates
from .progress import Progress, follow_time
from .sampling import SamplingTrainer

logger = logging.getLogger(__name__)


def teacher_pooling(teacher: PreTrainedModel, weights: Mapping[str, float]) -> Pooling:
    """How the teacher pools, by its settings for sentence-transformers; the mean if it has none, or no loss asks."""
    modules = modules_of(teacher) if weights.keys() & {"pooled", "similarity_kl"} else None
    return modules.pooling() if modules else MEAN


class DistillationTrainer(PublishingTrainer, SamplingTrainer):
    """Trains a student on a teacher's hidden states, attention and outputs, and on labels where there are any.

    The objective is that of `args`; its losses are means over all sequences of a step, or over all its labels, so it
    does not depend on padding, on gradient accumulation or on the number of processes. Each loss is logged beside the
    loss, before its weight. Evaluation is that of the student alone: its supervised loss and what `compute_metrics`
    gives.

    Args:
        model: the student.
        teacher: a model of the student's family; it is put into evaluation mode, on the device of the training, and is
            never trained or saved.
        args: the arguments of the training and of its objective.
        teacher_processing_class: the teacher's tokenizer; if given it must agree with `processing_class`.
        pooling: makes the embeddings that the losses `pooled` and `similarity_kl` compare; default: that of the
            teacher's own settings for sentence-transformers, without a prompt, else the mean.
        memory: keeps the teacher's embeddings where these two losses are all, so that it reads each sentence once;
            default: it reads each batch.
        **trainer: anything else that `transformers.Trainer` takes, but no `model_init` and no `compute_loss_func`.

    Raises:
        ValueError: teacher and student do not fit together, or lack what a loss needs; or weights in float16.
    """

    args: DistillationArguments
    model: PreTrainedModel
    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        *,
        teacher_processing_class: Any = None,
        pooling: Pooling | None = None,
        memory: TeacherMemory | None = None,
        **trainer: Any,
    ) -> None:
        for name in ("model_init", "compute_loss_func"):
            if trainer.get(name) is not None:
                raise ValueError(f"{name} cannot be used in a distillation, which has its own; leave it out")
        own = (trainer.get("optimizers") or (None,))[0] is not None or trainer.get("optimizer_cls_and_kwargs")
        if args.muon and own:
            raise ValueError("muon=True and an optimizer of your own were given; leave one of them out")
        if half := [str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype == torch.float16]:
            raise ValueError(
                f"{len(half)} of the student's parameters are in {half[0]}, as its teacher was saved, in which no step "
                "is exact enough; call model.float(), and compute in half precision by bf16=True or fp16=True"
            )
        check_tokenizers(trainer.get("processing_class"), teacher_processing_class)
        self.objective = Objective(
            model,
            teacher,
            args.weights(),
            args.temperature,
            args.layer_map,
            args.label_smoothing_factor,
            autocast=self._teacher_context,
            pooling=pooling or teacher_pooling(teacher, args.weights()),
            memory=memory,
        )
        with unchanged_cache(model.config):  # the forward passes of training say themselves that they need none
            super().__init__(model=model, args=args, **trainer)
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={args.n_gpu} in one process is not supported; start one process per GPU with torchrun"
            )
        args.check_whole(not (self.is_fsdp_enabled or self.is_deepspeed_enabled))  # accelerate's own config may say so
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            atexit.unregister(_leave_process_group)
            atexit.register(_leave_process_group)
        teacher.to(args.device)  # type: ignore[arg-type]  # of transformers' own wrapper
        # so that the loss comes back as it is: it is divided by the counts of the whole step already
        self.model_accepts_loss_kwargs = True
        self._own_optimizer: Any = self.optimizer
        self._has_best = self._skips = False
        self._window: dict[str, Tensor] = {}
        self._window_start = 0
        self.add_callback(Progress(args.max_minutes))
        self.add_callback(_Watch(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base class; `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end.

        Parameters that no loss reaches, such as a pooler that is not compared, are left as they are. After a training
        in half precision the student computes in its own precision again.

        Raises:
            FloatingPointError: the loss is no longer finite.
            ValueError: no complete checkpoint to resume from, or no training data (left).
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_checkpoint(self.args.output_dir or ""))
        elif resume_from_checkpoint and not is_complete(Path(resume_from_checkpoint)):
            raise ValueError(
                f"resume_from_checkpoint={str(resume_from_checkpoint)!r} is not a complete checkpoint (no readable "
                "trainer_state.json); give another, or True for the newest complete one"
            )
        if resume_from_checkpoint and (done := self._finished(str(resume_from_checkpoint))):
            return done
        self._has_best = False
        state = TrainerState()
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_FILE))
        self.progress.restore(state)
        self._skips = bool(resume_from_checkpoint)
        dropouts = {module: module.p for module in self.model.modules() if isinstance(module, nn.Dropout)}
        idle = [parameter for parameter in self.objective.idle_parameters(self.model) if parameter.requires_grad]
        try:
            for parameter in idle:  # several processes would wait for their gradients
                parameter.requires_grad_(False)
            if self.args.dropout is not None:
                for module in dropouts:
                    module.p = self.args.dropout
            with unchanged_forward(self.model):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.objective.detach()
            for module, p in dropouts.items():
                module.p = p
            for parameter in idle:
                parameter.requires_grad_(True)

    def _finished(self, checkpoint: str) -> TrainOutput | None:
        """The end of a training of which this is the last checkpoint; the base class would do one step more."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
        self.progress.restore(state)
        if not (0 < self.args.max_steps <= state.global_step or self.progress.is_over()):
            return None
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {"train_runtime": 0.0})

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._has_best = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the base class; then every factor gets the learning rate that suits it (see `optimizer`)."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.optimizer_cls_and_kwargs:
            self._own_optimizer = optimizer
        if fresh and self.args.factor_learning_rates:
            kind = type(optimizer).__name__
            if any(name in kind.lower() for name in ("adam", "lion")):
                scale_learning_rates(optimizer, self.model)
            else:
                logger.warning("factor_learning_rates is for Adam; with %s all learn at one rate", kind)
        if fresh and self.args.muon:
            optimizer = self.optimizer = MuonAdamW(optimizer.param_groups, self.model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the base class; with `max_minutes` the schedule goes on by time where steps are slower than planned."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.args.max_minutes is not None:
            follow_time(scheduler, num_training_steps, lambda: self.progress)
        return scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of one step, and what its losses are averaged over, summed over all processes."""
        clock = self.progress.paused() if self._skips else nullcontext()  # while what was seen before goes by
        self._skips = False
        try:
            with clock:
                samples = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        except ValueError as error:
            raise self._out_of_data(f" ({error})") from error
        if len(samples) < num_batches and not isinstance(self.train_dataset, Sized):
            samples = []  # the end of a stream: what makes no whole step is left out
        if not samples:
            return [], None
        counts = [self.objective.count(batch) for batch in samples]
        names = list(counts[0])
        # the time that has passed goes along: decisions by time must be those of all processes
        sums = [sum(c[name] for c in counts) for name in names]
        totals = torch.tensor([*sums, self.progress.seconds()], dtype=torch.float64)
        if device.type == "mps":
            totals = totals.float()
        *totals, elapsed = self.accelerator.reduce(totals.to(device), "sum").unbind()
        self.progress.elapsed = float(elapsed) / self.accelerator.num_processes
        self.progress.samples += int(totals[names.index("examples")])
        step = dict(zip(names, totals, strict=True))
        changed = self.progress.asked not in (None, self.args.weights())  # since the checkpoint
        if self.args.balanced and (self.progress.weights is None or changed):
            self._balance(samples, step)
        return samples, step

    def _save_rng_state(self, output_dir: str) -> None:
        """As the base class; then wait for all processes: the file that ends a checkpoint is to be the last of all."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses; in evaluation the supervised loss of the batch.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not model.training:
            labels = {head.labels for head in self.objective.heads}
            output = model(**{key: value for key, value in inputs.items() if key not in labels}, return_dict=True)
            counts = {head.labels: head.count(inputs) for head in self.objective.heads}
            loss = self.objective.supervised(output, inputs, counts)
            logits = {head.logits: output[head.logits] for head in self.objective.heads}  # no hidden states
            return (loss, logits) if return_outputs else loss
        values = self.objective.values(model, inputs, num_items_in_batch)
        self._check_finite(values)
        # the gradients of all processes will be averaged, where the losses are shares of one sum
        values = {name: value * self.accelerator.num_processes for name, value in values.items()}
        for name, value in values.items():
            self._window[name] = self._window.get(name, 0) + value.detach()
        weights = self.loss_weights
        return torch.stack([weights[name] * value for name, value in values.items()]).sum()

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss: that of the arguments, or what the first step made of it where they are balanced."""
        return (self.progress.weights if self.args.balanced else None) or self.args.weights()

    def _balance(self, samples: list[dict[str, Any]], counts: Mapping[str, Any]) -> None:
        """Divide the weights by the norms of the gradients in this step, that of all processes."""
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        weights = self.args.weights()
        size = sum(parameter.numel() for parameter in trained)
        sums = {name: torch.zeros(size, device=self.args.device) for name in weights}
        for inputs in map(self._prepare_inputs, samples):
            with training_attention(self.accelerator, inputs["input_ids"].shape[-1]):
                values = self.objective.values(self.model, inputs, counts)
                self._check_finite(values)
                for name, value in values.items():
                    if value.requires_grad:  # else it reads only what is not trained
                        found = torch.autograd.grad(value, trained, retain_graph=True, materialize_grads=True)
                        sums[name] += torch.cat([gradient.flatten().float() for gradient in found])
        norms = {name: float(self.accelerator.reduce(gradient, "sum").norm()) for name, gradient in sums.items()}
        for name, norm in norms.items():
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient of the loss {name} is {norm} in the first step, so it cannot be balanced; set "
                    "balanced to False, or train in float32"
                )
        self.progress.weights, self.progress.asked = balanced_weights(weights, norms), weights

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the base class, with the attention that is the faster one, in the backward pass too."""
        with training_attention(self.accelerator, inputs["input_ids"].shape[-1]):
            return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def _teacher_context(self) -> Iterator[None]:
        """The precision of the training; in bf16 on a CPU flash attention, which without gradients is mostly faster."""
        flash = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
        attention = flash if is_bf16_on_cpu(self.accelerator) else nullcontext()
        with self.accelerator.autocast(), attention:
            yield

    def _check_finite(self, values: dict[str, Tensor]) -> None:
        if torch.stack([value.detach() for value in values.values()]).isfinite().all():
            return
        shown = ", ".join(f"{name}={float(value.detach()):g}" for name, value in values.items())
        raise FloatingPointError(
            f"loss at step {self.state.global_step + 1} is not finite ({shown}); lower the learning rate or use more "
            "warm-up steps, train in bf16 instead of fp16, and look at the data of this step"
        )

    def _out_of_data(self, reason: str = "") -> ValueError:
        return ValueError(
            f"train_dataset gave no batch after step {self.state.global_step} of {self.state.max_steps}{reason}; if it "
            "has come to its end, give one that can be read again from its start (to resume, a stream without end), or "
            "set max_steps to what it holds"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the base class; beside the training loss stand its parts, means over the window since the last log."""
        steps = self.state.global_step - self._window_start
        if "loss" in logs and steps and self._window:
            means = self.accelerator.reduce(torch.stack(list(self._window.values())) / steps, "mean")
            logs |= dict(zip(self._window, means.tolist(), strict=True))
            self._open_window()
        super().log(logs, *args, **kwargs)

    def training_summary(self) -> dict[str, Any]:
        """What the training was so far, of a resumed one the earlier runs too.

        Samples are counted as they were seen, those included that several processes see twice to end an epoch together;
        tokens are counted where the arguments ask for it.
        """
        args, whole = self.args, str(self.model.dtype).removeprefix("torch.")
        precisions = {"no": whole, "bf16": "bfloat16", "fp16": "float16"}
        return {
            "steps": self.state.global_step,
            "samples": self.progress.samples,
            "tokens": self.state.num_input_tokens_seen if self._counts_tokens() else None,
            "seconds": round(self.progress.seconds(), 1),
            "batch": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": getattr(self._own_optimizer, "defaults", {}).get("lr", args.learning_rate),
            "optimizer": self._optimizer_name(),
            "precision": precisions.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
            "objective": self.loss_weights,
            "seed": args.seed,
        }

    def _counts_tokens(self) -> bool:
        return self.args.include_num_input_tokens_seen not in ("no", False)

    def _optimizer_name(self) -> str:
        if self._own_optimizer is not None:
            return type(self._own_optimizer).__name__
        if self.args.muon and muon_factors(self.model):
            return "Muon and AdamW"
        return str(getattr(self.args.optim, "value", self.args.optim))

    def record(self) -> dict[str, Any]:
        """As the base class: the teacher, the training, and the evaluation of the model as it is, if there was one."""
        step = self.state.best_global_step if self._has_best else self.state.global_step
        evaluations = [log for log in self.state.log_history if any(name.startswith("eval_") for name in log)]
        scores = {name: value for log in evaluations if log["step"] == step for name, value in log.items()}
        unscored = ("_runtime", "_per_second")
        rows = {
            name.removeprefix("eval_"): [value] for name, value in scores.items()
            if name.startswith("eval_") and not name.endswith(unscored)
        }  # fmt: skip
        return {
            "options": {"teacher": source_name(self.objective.teacher.config.name_or_path)},
            "training": self.training_summary(),
            **({"models": ["student"], "rows": rows, "protocol": "evaluation set of the training"} if rows else {}),
        }

    @property
    def progress(self) -> Progress:
        """What the training has seen, and its clock."""
        return next(found for found in self.callback_handler.callbacks if isinstance(found, Progress))

    def _open_window(self) -> None:
        self._window, self._window_start = {}, self.state.global_step


class _Watch(TrainerCallback):
    """Gets the objective ready, and tells when the data has come to its end before the training."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer
        self._epoch_start = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.objective.attach(self._trainer.model)
        self._trainer._open_window()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._epoch_start = state.global_step

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._epoch_start and state.global_step < state.max_steps:
            raise self._trainer._out_of_data()


def _leave_process_group() -> None:
    """At exit, while Python still runs: threads of gloo that outlive it can abort the process, and so all others.

    The collection breaks the reference cycles of trainers, which hold the group too; not of one that a module holds.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
