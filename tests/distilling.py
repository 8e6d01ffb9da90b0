"""Tiny distillations on sequences of unequal length; also a script, for the tests that need processes of their own.

    python distilling.py FOLDER '{"max_steps": 6, ...}' [die=STEP] [cut=STEP]

trains in FOLDER/run, goes on from its last complete checkpoint if there is one, and writes FOLDER/result.pt. In the
middle of a step it may die, or find its machine cut off from the network for ten seconds (`machines`).
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from transformers import TrainerCallback

from kronecker_transformers import compress
from kronecker_transformers.distillation import DistillationArguments, DistillationTrainer

# Every kind of layer is factored, with shapes that are not symmetric; GPT-2's head is tied.
BERT_PLAN = {
    "embeddings.word_embeddings": (64, 8, 2),
    "encoder.layer.*.attention.self.*": (16, 8, 1),
    "encoder.layer.*.intermediate.dense": (4, 2, 1),
    "encoder.layer.1.output.dense": (32, 1, 6),
}
GPT2_PLAN = {"wte": (72, 16, 1), "h.1.attn.c_attn": (24, 16, 2), "h.1.mlp.c_proj": (16, 96, 1)}
LENGTHS = (3, 12, 7, 5, 9, 2, 11, 4)


def pair(dense_class, **changes):
    """A dense teacher and a student of it."""
    teacher = tiny.teacher(dense_class, **changes)
    name = teacher.config.model_type
    student = compress(teacher, GPT2_PLAN if name == "gpt2" else tiny.as_family(BERT_PLAN, name)).model
    return teacher, student


def examples(model, count=8, seed=3):
    """Tokenized examples of unequal length with the labels of the model's head; some labels are missing."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).tolist()

    name, vocabulary = type(model).__name__, model.config.vocab_size
    rows = []
    for index in range(count):
        length = LENGTHS[index % len(LENGTHS)]
        row = {"input_ids": integers(3, vocabulary, length), "attention_mask": [1] * length}
        if "MultipleChoice" in name:
            row = {key: [value, value[::-1]] for key, value in row.items()} | {"labels": index % 2}
        elif "SequenceClassification" in name:
            row["labels"] = {
                "regression": index / 3,
                "multi_label_classification": [float(b) for b in integers(0, 2, 3)],
            }.get(model.config.problem_type, index % 3)
        elif "TokenClassification" in name:
            row["labels"] = integers(0, 3, length)
        elif "QuestionAnswering" in name:
            row |= {"start_positions": index % length, "end_positions": length - 1 if index else 40}
        elif "LMHead" in name:
            row["labels"] = row["input_ids"]
        elif name.endswith("ElectraForPreTraining"):
            row["labels"] = integers(0, 2, length)
        elif "MaskedLM" in name or "PreTraining" in name:
            row["labels"] = [i if p % 3 == index % 3 else -100 for p, i in enumerate(row["input_ids"])]
            if "PreTraining" in name:
                row["next_sentence_label"] = index % 2 if index % 3 else -100
        rows.append(row)
    return rows


def collate(rows):
    """Pad on the right to the longest of the batch, labels with -100."""
    longest = max(len(torch.tensor(row["input_ids"]).flatten(0, -2)[0]) if isinstance(row["input_ids"][0], list)
                  else len(row["input_ids"]) for row in rows)  # fmt: skip
    batch = {}
    for key in rows[0]:
        values = [torch.tensor(row[key]) for row in rows]
        if values[0].ndim and not values[0].is_floating_point():
            filler = -100 if key == "labels" else 0
            values = [torch.nn.functional.pad(v, (0, longest - v.shape[-1]), value=filler) for v in values]
        batch[key] = torch.stack(values)
    return batch


def make_trainer(student, teacher, folder, rows=None, callbacks=(), trainer=None, **arguments):
    """A trainer on the CPU that logs every step and keeps quiet."""
    defaults = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "max_grad_norm": 0.0, "remove_unused_columns": False, "dropout": 0.0,
    }  # fmt: skip
    weights = {} if any(key.endswith("_weight") or key == "objective" for key in arguments) else ALL_TERMS
    if not any(key in type(student).__name__ for key in ("For", "LMHead")):
        weights = {**weights, "logits_weight": 0.0, "supervised_weight": 0.0}
    return DistillationTrainer(
        student, teacher, DistillationArguments(**{**defaults, **weights, **arguments}),
        train_dataset=rows or examples(student), data_collator=collate, callbacks=list(callbacks), **(trainer or {}),
    )  # fmt: skip


ALL_TERMS = {
    "embedding_mse_weight": 0.5,
    "attention_mse_weight": 0.7,
    "attention_kl_weight": 1.3,
    "relation_kl_weight": 0.6,
    "hidden_mse_weight": 0.9,
    "pooled_weight": 1.1,
    "logits_weight": 0.8,
    "supervised_weight": 1.0,
}


class KeepGradients(TrainerCallback):
    """Copies the gradients of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def one_step(dense_class, folder, student_changes=None, **arguments):
    """Log and gradients of the first step."""
    teacher, student = pair(dense_class)
    if student_changes:
        student_changes(student)
    keep = KeepGradients()
    trainer = make_trainer(student, teacher, folder, callbacks=[keep], **{"max_steps": 1, **arguments})
    trainer.train()
    return trainer.state.log_history[0], keep.steps[0]


def assert_same_step(found, expected, rtol=1e-5, atol=1e-6):
    terms = [key for key in expected[0] if key not in ("epoch", "step", "learning_rate", "grad_norm")]
    assert "loss" in terms
    for term in terms:
        assert found[0][term] == pytest.approx(expected[0][term], rel=rtol, abs=1e-6), term
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class InTheMiddleOf(TrainerCallback):
    """Something happens when the gradients of a step are there, and the weights still are what they were."""

    def __init__(self, step, event):
        self.step, self.event = step, event

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.event()


def die():
    """kill -9; with the launcher of this machine, if there is one."""
    if "LOCAL_RANK" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def cut():
    """Ten seconds without a network."""
    link = ["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"]]
    subprocess.run([*link, "down"], check=True)
    subprocess.Popen(["sh", "-c", f"sleep 10; {' '.join(link)} up"])


def main():
    folder, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    dense_class = getattr(transformers, arguments.pop("model", "BertForSequenceClassification"))
    teacher, student = (model.to(getattr(torch, arguments.pop("dtype", "float32"))) for model in pair(dense_class))
    keep = KeepGradients()
    events = dict(event.split("=") for event in sys.argv[3:])
    callbacks = [keep, *(InTheMiddleOf(int(step), globals()[name]) for name, step in events.items())]
    trainer = make_trainer(student, teacher, folder / "run", examples(student, 16), callbacks, **arguments)
    trainer.train(resume_from_checkpoint=any(folder.glob("run/checkpoint-*")))
    weights = student.state_dict()
    if trainer.is_deepspeed_enabled:  # which may have divided them
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        torch.save(
            {
                "weights": weights,
                "gradients": keep.steps,
                "log": trainer.state.log_history,
                "processes": trainer.args.world_size,
            },
            folder / "result.pt",
        )


def print_threads():
    """The names of the threads that the operating system sees (Linux), in one write: other processes print too."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    sys.stdout.write(f"threads at exit: {' '.join(names)}\n")


if __name__ == "__main__":
    atexit.register(print_threads)
    main()
