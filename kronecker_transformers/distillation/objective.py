"""The objective of a distillation: runs student and teacher on a batch and gives the value of every loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.pooling import MEAN, Pooling
from ..models.kronecker_family import FAMILIES, family_of, pooler_of
from . import losses
from .heads import Output, outputs_of, real_positions
from .memory import TeacherMemory
from .recorder import Projections, Recorder, Recording

_HIDDEN = ("embeddings", "layers", "sentences")
"""What losses read that hidden states show."""
_SMALLEST = 1e-4
"""Norm of a gradient, of the largest, below which a loss is as good as 0."""
_SMOOTHED_KINDS = ("classes", "tokens", "next_token")


class Objective:
    """The losses of a distillation for one teacher and one student; see `losses` for the losses themselves.

    Args:
        student, teacher: dense or factored models of one family.
        weights: weight above 0 of each loss that is wanted, by its name in `losses.LOSSES`.
        temperature: of the logits, above 0.
        layer_map: the teacher's layer, from 0, for each layer of the student; None for models of equal depth.
        label_smoothing: of the supervised loss on classes, 0 <= label_smoothing < 1.
        autocast: makes the context in which the teacher runs.
        pooling: makes sentence embeddings of the last hidden states, for the losses that compare them.
        memory: keeps the teacher's embeddings, where the losses need nothing else of it; None to read each batch.

    Raises:
        ValueError: the two do not fit together, or lack what a loss needs.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        weights: Mapping[str, float],
        temperature: float = 1.0,
        layer_map: Sequence[int] | None = None,
        label_smoothing: float = 0.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        pooling: Pooling = MEAN,
        memory: TeacherMemory | None = None,
    ) -> None:
        self.weights = dict(weights)
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.pooling = pooling
        self._memory = memory if set(self.weights) == set(self._losses("sentences")) else None
        self.heads = outputs_of(student)
        self.causal = family_of(student).causal
        modules = student.base_model.modules()  # not every family heeds the config
        self._looks_back = self.causal or any(getattr(module, "is_decoder", False) for module in modules)
        _check_family(student, teacher)
        depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        self.layer_map = _checked_layer_map(*depths, layer_map)
        self._check_sizes(student, teacher)
        self._check_heads(student, teacher)
        self._autocast = autocast
        self.teacher = teacher.eval()
        self._student_recorder, self._teacher_recorder = (
            Recorder(self._has_hidden, self._has_attention) for _ in range(2)
        )

    @property
    def _has_attention(self) -> bool:
        return bool(self._losses("attention", "relations"))

    @property
    def _has_hidden(self) -> bool:
        return bool(self._losses(*_HIDDEN))

    def _losses(self, *reads: str) -> list[str]:
        """Names of those that are wanted and read one of these."""
        return [name for name in self.weights if losses.LOSSES[name].reads in reads]

    def attach(self, student: PreTrainedModel) -> None:
        """Get ready for training: both models are read from now on, until `detach`."""
        self._student_recorder.attach(student)
        self._teacher_recorder.attach(self.teacher)

    def detach(self) -> None:
        """Leave both models without hooks."""
        self._student_recorder.detach()
        self._teacher_recorder.detach()

    def idle_parameters(self, student: PreTrainedModel) -> list[nn.Parameter]:
        """The student's parameters that no loss reaches: its head, and the pooler, where nothing needs its logits."""
        if self.weights.keys() & {"logits", "supervised"}:
            return []
        base = student.base_model
        pooler = pooler_of(base)
        reached = {id(p) for module in base.children() if module is not pooler for p in module.parameters()}
        return [parameter for parameter in student.parameters() if id(parameter) not in reached]

    def count(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """What a batch adds to the counts of its step.

        Raises:
            ValueError: the batch lacks its input ids, or labels that the supervised loss needs; a sequence is empty; or
                it is padded on the left for a causal model, which counts positions from there.
        """
        if "input_ids" not in inputs:
            raise ValueError(f"batch with {sorted(inputs)} must hold 'input_ids'; tokenize it first")
        ids = inputs["input_ids"]
        real = real_positions(inputs)
        if not real.any(-1).all():
            raise ValueError("attention_mask of a sequence is all 0: its text gives no token; leave such texts out")
        if self.causal and not real[..., 0].all():
            raise ValueError(
                "attention_mask has padding on the left, where a causal model begins to count positions; set the "
                "tokenizer's padding_side='right'"
            )
        counts = {"sequences": ids.numel() // ids.shape[-1], "examples": len(ids)}
        if "supervised" in self.weights:
            for head in self.heads:
                if inputs.get(head.labels) is None:
                    raise ValueError(
                        f"batch with {sorted(inputs)} must hold {head.labels!r} for the supervised loss; "
                        "add the labels, or set supervised_weight=0"
                    )
                counts[head.labels] = head.count(inputs)
        return counts

    def values(self, student: nn.Module, inputs: Mapping[str, Tensor], counts: Mapping[str, Any]) -> dict[str, Tensor]:
        """What this batch adds to each loss of the step: scalars with gradient, weights not applied.

        Args:
            student: the student, possibly wrapped, in training mode.
            inputs: a batch with its labels.
            counts: sums over all batches of the step.

        Raises:
            RuntimeError: a model did not give what a loss needs.
        """
        label_names = {head.labels for head in self.heads}
        features: dict[str, Any] = {key: value for key, value in inputs.items() if key not in label_names}
        features["return_dict"] = True
        mask = real_positions(inputs).flatten(0, -2)  # (S, L)
        if self.causal:
            features["use_cache"] = False
        teacher, theirs, sentences = self._read_teacher(features, mask)
        with self._student_recorder.recording() as mine:
            output = student(**features)
        found: dict[str, Tensor] = {}
        if self._losses("embeddings", "layers"):
            found |= self._hidden_losses(mine, theirs, mask)
        if sentences is not None:
            found |= self._sentence_losses(self._pooled(mine, mask), sentences)
        if self._has_attention:
            found |= self._attention_losses(mine.attention, theirs.attention, mask)
        values = {name: value.sum() / counts["sequences"] for name, value in found.items()}
        if "logits" in self.weights:
            values["logits"] = sum(self._logit_loss(h, output, teacher, mask) for h in self.heads) / counts["examples"]
        if "supervised" in self.weights:
            values["supervised"] = self.supervised(output, inputs, counts)
        return values

    def _read_teacher(self, features: Mapping[str, Any], mask: Tensor) -> tuple[Any, Recording, Tensor | None]:
        """Output of the teacher, what its layers showed, and sentence embeddings; it runs only as far as is needed."""
        if not (self._has_hidden or self._has_attention or "logits" in self.weights):
            return None, Recording(), None
        several = features["input_ids"].ndim > 2  # choices, which the head puts side by side
        if self._memory is not None and not several:
            return None, Recording(), self._memory.embeddings(features, mask, self._embedded)
        output, recording = self._run_teacher(features, whole=several or "logits" in self.weights)
        return output, recording, self._pooled(recording, mask) if self._losses("sentences") else None

    def _embedded(self, features: Mapping[str, Any], mask: Tensor) -> Tensor:
        return self._pooled(self._run_teacher(features, whole=False)[1], mask)

    def _pooled(self, recording: Recording, mask: Tensor) -> Tensor:
        return self.pooling(losses.wide(recording.last), mask)

    def _run_teacher(self, features: Mapping[str, Any], whole: bool) -> tuple[Any, Recording]:
        """With or without its head."""
        self.teacher.eval()
        module = self.teacher if whole else self.teacher.base_model
        with torch.no_grad(), self._autocast(), self._teacher_recorder.recording() as recording:
            output = module(**features)
        return output, recording

    def supervised(
        self, output: Mapping[str, Tensor], inputs: Mapping[str, Tensor], counts: Mapping[str, Any]
    ) -> Tensor:
        """The loss on the labels: for each head the sum over its labels, divided by their number in the step."""
        shares = [
            head.share
            * head.supervised(output[head.logits], inputs, self.label_smoothing)
            / max(counts[head.labels], 1)  # a step without any label adds 0
            for head in self.heads
        ]
        return torch.stack(shares).sum()

    def _hidden_losses(self, student: Recording, teacher: Recording, mask: Tensor) -> dict[str, Tensor]:
        ends = len(student.layers) - 1, len(teacher.layers) - 1
        layers = [  # the last states are compared after a last norm, others before it
            (student.last, teacher.last) if pair == ends else (student.layers[pair[0]], teacher.layers[pair[1]])
            for pair in enumerate(self.layer_map)
        ]
        values = {}
        for name in self._losses("embeddings", "layers"):
            loss: Any = losses.LOSSES[name]
            pairs = layers if loss.reads == "layers" else [(student.embeddings, teacher.embeddings)]
            values[name] = _total(loss.function(*pair, mask) for pair in pairs)
        return values

    def _sentence_losses(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        found: dict[str, Any] = {name: losses.LOSSES[name].function for name in self._losses("sentences")}
        return {name: function(student, teacher) for name, function in found.items()}

    def _attention_losses(
        self, student: list[Projections], teacher: list[Projections], mask: Tensor
    ) -> dict[str, Tensor]:
        totals: dict[str, list[Tensor]] = defaultdict(list)
        for pair in zip(student, (teacher[layer] for layer in self.layer_map), strict=True):
            for reads, scores_of in (("attention", Projections.scores), ("relations", Projections.relations)):
                if names := self._losses(reads):
                    scores = [scores_of(each) for each in pair]
                for name in names:
                    loss: Any = losses.LOSSES[name]
                    totals[name].append(loss.function(*scores, mask, self._looks_back))
        return {name: _total(layers) for name, layers in totals.items()}

    def _logit_loss(self, head: Output, student: Any, teacher: Any, mask: Tensor) -> Tensor:
        distance = head.distance(student[head.logits], teacher[head.logits], mask, self.temperature)
        return head.share * distance.sum()

    def _check_sizes(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        wanted = {"vocab_size": True, "hidden_size": self._has_hidden, "num_attention_heads": self._has_attention}
        for name, needed in wanted.items():
            mine, theirs = getattr(student.config, name), getattr(teacher.config, name)
            if needed and mine != theirs:
                raise ValueError(
                    f"{name}={mine} of the student must be that of the teacher, {theirs}; "
                    "compress this teacher, or leave out the losses that compare them"
                )

    def _check_heads(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        for name in ("logits", "supervised"):
            if name in self.weights and not self.heads:
                raise ValueError(
                    f"{name}_weight={self.weights[name]} needs a student with a head, not {type(student).__name__}; "
                    f"set {name}_weight=0 or give it a head"
                )
        if self.label_smoothing and (len(self.heads) != 1 or self.heads[0].kind not in _SMOOTHED_KINDS):
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing} is not defined for the labels of "
                f"{type(student).__name__} (it needs one head of classes); set it to 0"
            )
        if "logits" not in self.weights:
            return
        if outputs_of(teacher) != self.heads:
            raise ValueError(
                f"logits_weight={self.weights['logits']} needs a teacher with the head of the student, "
                f"{type(student).__name__}, not {type(teacher).__name__}; load it with that head or set logits_weight=0"
            )
        labels = [dict(model.config.id2label or {}) for model in (student, teacher)]
        if len(labels[0]) != len(labels[1]):
            raise ValueError(
                f"num_labels={len(labels[0])} of the student must be that of the teacher, {len(labels[1])}; "
                "make the student from this teacher"
            )
        if labels[0] != labels[1] and not any(set(names.values()) & {"LABEL_0"} for names in labels):
            raise ValueError(
                f"id2label={labels[0]} of the student must be that of the teacher, {labels[1]}; "
                "use one order of labels for both"
            )


def balanced_weights(weights: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    """Weights with which each loss has a gradient of the norm that its weight says.

    Losses have units of their own: the attention scores of one teacher are ten times as large as those of another, and
    logits that are sure of themselves say little. A loss that is almost 0 already, as that of an embedding which is not
    factored, would get a weight without limit; it counts as the one with the largest gradient.

    Args:
        weights: of the losses, in proportion to one another.
        norms: of their gradients, each before its weight.
    """
    largest = max(norms.values())
    if not largest:
        return dict(weights)
    least = _SMALLEST * largest
    return {name: weight / (norms[name] if norms[name] > least else largest) for name, weight in weights.items()}


def _check_family(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    outputs_of(teacher)  # refuses what is not known
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "student has no parameter that requires a gradient, as it is when its teacher was frozen first; "
            "call student.requires_grad_(True)"
        )
    families = [FAMILIES[model.config.model_type].dense_config_class.model_type for model in (student, teacher)]
    if families[0] != families[1]:
        raise ValueError(
            f"teacher of the family {families[1]!r} must be of the student's, {families[0]!r}; take another"
        )
    if set(map(id, student.parameters())) & set(map(id, teacher.parameters())):
        raise ValueError("teacher shares parameters with the student, so it would be trained; load it a second time")


def _checked_layer_map(depth: int, teacher_depth: int, layer_map: Sequence[int] | None) -> tuple[int, ...]:
    if layer_map is None:
        if depth != teacher_depth:
            raise ValueError(
                f"num_hidden_layers={depth} of the student must be that of the teacher, {teacher_depth}; "
                "give a layer_map, the teacher's layer for each layer of the student"
            )
        return tuple(range(depth))
    if len(layer_map) != depth or not all(0 <= layer < teacher_depth for layer in layer_map):
        raise ValueError(
            f"layer_map={list(layer_map)} must give for each of the {depth} layers of the student a layer of the "
            f"teacher from 0 to {teacher_depth - 1}; correct it"
        )
    return tuple(layer_map)


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse tokenizers that give other ids to the same text; both or one may be None.

    Raises:
        ValueError: their vocabularies or special tokens differ.
    """
    if student is None or teacher is None or student is teacher:
        return
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        word = min(word for word, _ in mine.items() ^ theirs.items())
        raise ValueError(
            f"tokenizer of the teacher gives {word!r} the id {theirs.get(word)}, that of the student {mine.get(word)}; "
            "both must be the same: use the teacher's tokenizer for the student"
        )
    if sorted(student.all_special_tokens) != sorted(teacher.all_special_tokens):
        raise ValueError(
            f"tokenizer of the teacher has the special tokens {sorted(teacher.all_special_tokens)}, that of the "
            f"student {sorted(student.all_special_tokens)}; use the teacher's tokenizer for the student"
        )


def _total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
