"""What the trainer promises about processes, precision, checkpoints, the teacher and the log."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from distilling import (
    ALL_TERMS,
    KeepGradients,
    assert_same_step,
    collate,
    examples,
    make_trainer,
    one_step,
    pair,
)
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, GPT2LMHeadModel, TrainerCallback

from kronecker_transformers.distillation import DistillationArguments, DistillationTrainer, contexts
from kronecker_transformers.distillation.checkpoints import is_complete, newest_checkpoint

_NAME = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(DistillationArguments, name)
)
CHECKPOINTING = ({_NAME: True}, f"{_NAME}_kwargs")
SCRIPT = Path(__file__).parents[1] / "distilling.py"


def script(folder, arguments, *die_at, launcher=()):
    """Run the tiny distillation in processes of its own."""
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), json.dumps(arguments), *map(str, die_at)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("model", [pytest.param("BertForMaskedLM", marks=pytest.mark.slow), "BertModel"])
def test_two_processes_equal_one(tmp_path, model):
    """A `BertModel` has a pooler that no term reaches."""
    arguments = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "model": model, "weight_decay": 0.1,
                 "balanced": model == "BertModel"}  # fmt: skip
    one = script(tmp_path / "one", {**arguments, "per_device_train_batch_size": 8})
    assert one.returncode == 0, one.stderr[-3000:]
    # accelerate launch --cpu starts a single process where there is no MPI
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    two = script(
        tmp_path / "two", {**arguments, "per_device_train_batch_size": 4, "ddp_backend": "gloo"}, launcher=launcher
    )
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("threads at exit: ") == 2
    assert "gloo" not in two.stdout  # such a thread may abort its process when Python has ended
    one, two = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for mine, other in zip(one["log"][:3], two["log"][:3], strict=True):
        terms = {term.removesuffix("_weight") for term in ALL_TERMS} & mine.keys()
        assert len(terms) == (8 if model == "BertForMaskedLM" else 6)
        for key in ("loss", *terms):
            assert other[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-6), key
    for mine, other in zip(one["gradients"], two["gradients"], strict=True):
        for name, gradient in mine.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)
        assert mine.keys() == other.keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-4)


def test_resumed_after_kill_9_it_ends_bit_for_bit_the_same(tmp_path):
    arguments = {
        "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dropout": None,
        "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1.0, "weight_decay": 0.1, "balanced": True,
    }  # fmt: skip
    assert script(tmp_path / "whole", arguments).returncode == 0
    killed = script(tmp_path / "killed", arguments, "die=6")
    assert killed.returncode == -9
    assert not (tmp_path / "killed" / "result.pt").exists()
    # it died while it wrote a checkpoint, too
    (tmp_path / "killed" / "run" / "checkpoint-5").mkdir()
    (tmp_path / "killed" / "run" / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    resumed = script(tmp_path / "killed", arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole, resumed = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("whole", "killed"))
    assert len(whole["gradients"]) == 8
    assert len(resumed["gradients"]) == 5
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    for mine, other in zip(whole["log"], resumed["log"], strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("train_")} == {
            k: v for k, v in other.items() if not k.startswith("train_")
        }


def test_a_training_that_had_come_to_its_end_is_not_gone_on_with(tmp_path):
    arguments = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    teacher, student = pair(BertForSequenceClassification)
    make_trainer(student, teacher, tmp_path, **arguments).train()
    _, fresh = pair(BertForSequenceClassification)
    trainer = make_trainer(fresh, teacher, tmp_path, **arguments)
    assert trainer.train(resume_from_checkpoint=True).global_step == trainer.state.global_step == 3
    for name, weight in student.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], weight), name


def test_what_makes_no_whole_step_at_the_end_of_a_stream_is_left_out(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    rows = examples(student, 5)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    keep = KeepGradients()
    trainer = make_trainer(
        student, teacher, tmp_path, rows=Stream(), callbacks=[keep], max_steps=3, learning_rate=0.0,
        per_device_train_batch_size=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    first, second, third = keep.steps  # the third begins the stream again
    assert any(not torch.equal(second[name], gradient) for name, gradient in first.items())
    for name, gradient in first.items():
        torch.testing.assert_close(third[name], gradient)


def test_only_complete_checkpoints_are_resumed_from(tmp_path):
    teacher, student = pair(BertModel)
    trainer = make_trainer(student, teacher, tmp_path)
    with pytest.raises(ValueError, match=r"output_dir=.* holds no complete checkpoint to resume from; start anew"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*checkpoint-7' is not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_a_checkpoint_is_complete_only_when_all_processes_have_written_theirs(tmp_path, monkeypatch):
    teacher, student = pair(BertModel)
    trainer = make_trainer(student, teacher, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint, waited = tmp_path / "checkpoint-1", []
    monkeypatch.setattr(
        trainer.accelerator, "wait_for_everyone",
        lambda: waited.append(((checkpoint / "rng_state.pth").exists(), is_complete(checkpoint))),
    )  # fmt: skip
    trainer.train()
    assert (True, False) in waited
    assert is_complete(checkpoint)


def test_parameters_that_no_term_reaches_stay_as_they_are(tmp_path):
    teacher, student = pair(BertModel)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = make_trainer(student, teacher, tmp_path, weight_decay=0.5)
    trainer.train()
    same = {name for name, value in student.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith("pooler.")}
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dense_class", [BertForMaskedLM, GPT2LMHeadModel])
def test_gradient_checkpointing_changes_nothing(dense_class, bf16, tmp_path):
    checkpointed = one_step(dense_class, tmp_path, bf16=bf16, **CHECKPOINTING[0])
    assert_same_step(checkpointed, one_step(dense_class, tmp_path, bf16=bf16))


def test_a_config_that_asks_for_tuples_changes_nothing(tmp_path):
    def changed(student):
        student.config.return_dict = False

    steps = [one_step(BertForSequenceClassification, tmp_path, change) for change in (changed, None)]
    assert_same_step(*steps)


def test_checkpointing_that_would_lose_the_gradient_is_refused(tmp_path):
    arguments = {**CHECKPOINTING[0], CHECKPOINTING[1]: {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match=r"carries no gradient.*use_reentrant=False"):
        one_step(BertForMaskedLM, tmp_path, **arguments)


@pytest.mark.parametrize("dense_class", [BertForSequenceClassification, GPT2LMHeadModel])
def test_compiled_student_trains_the_same(dense_class, tmp_path):
    torch._dynamo.reset()
    compiled = one_step(dense_class, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_step(compiled, one_step(dense_class, tmp_path), rtol=1e-4, atol=1e-5)


def test_bf16_autocast_of_student_and_teacher(tmp_path):
    exact = one_step(BertForSequenceClassification, tmp_path)
    seen = []

    def watch(student):
        student.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda m, i, o: seen.append(o.dtype))

    mixed = one_step(BertForSequenceClassification, tmp_path, student_changes=watch, bf16=True)
    assert seen == [torch.bfloat16]
    for term in (key.removesuffix("_weight") for key in ALL_TERMS):
        assert mixed[0][term] == pytest.approx(exact[0][term], rel=0.1, abs=2e-3), term
        if term != "embedding_mse":  # look-ups and norms keep their precision
            assert mixed[0][term] != exact[0][term], term
    for name, gradient in exact[1].items():
        assert mixed[1][name].dtype == torch.float32
        error = (mixed[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-2)
        assert error < 0.2, name


def test_autocast_of_the_training_does_not_outlast_it(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    batch, seen = collate(examples(student)), []
    query = student.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    for _ in range(2):  # it can be trained again
        make_trainer(student, teacher, tmp_path, max_steps=1, bf16=True).train()
        untouched = type(student)(student.config)
        untouched.load_state_dict(student.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(student.eval()(**batch).logits, untouched.eval()(**batch).logits)
        assert student.forward.__func__ is type(student).forward
    assert seen == [torch.bfloat16, torch.float32] * 2


@pytest.mark.parametrize(("bf16", "short", "flash"), [(True, 12, False), (True, 11, True), (False, 12, True)])
def test_short_sequences_in_bf16_on_a_cpu_train_without_flash_attention(tmp_path, monkeypatch, bf16, short, flash):
    """The batch has 12 tokens; `short` is the longest sequence that counts as short. The teacher is not trained."""
    monkeypatch.setattr(contexts, "_SHORT", short)
    teacher, student = pair(BertForSequenceClassification)
    backends, seen = torch.backends.cuda, []
    teacher.register_forward_hook(lambda *_: seen.append(backends.flash_sdp_enabled()))
    student.register_forward_hook(
        lambda *_: seen.append((backends.flash_sdp_enabled(), backends.fp16_bf16_reduction_math_sdp_allowed()))
    )
    make_trainer(student, teacher, tmp_path, max_steps=1, bf16=bf16).train()
    assert seen == [True, (flash, not flash)]
    assert (backends.flash_sdp_enabled(), backends.fp16_bf16_reduction_math_sdp_allowed()) == (True, False)


def test_a_copy_of_the_teacher_has_no_distance_from_it_in_bf16(tmp_path):
    """Both run in the same precision."""
    teacher, _ = pair(BertForSequenceClassification)
    student = copy.deepcopy(teacher)
    trainer = make_trainer(student, teacher, tmp_path, max_steps=1, bf16=True)
    trainer.train()
    log = trainer.state.log_history[0]
    for term in (key.removesuffix("_weight") for key in ALL_TERMS if key != "supervised_weight"):
        assert log[term] == pytest.approx(0, abs=1e-6), term
    assert log["supervised"] > 0.1


@pytest.mark.gpu
def test_teacher_comes_to_the_device_of_the_training(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path, max_steps=1, use_cpu=False, bf16=True)
    assert {p.device.type for p in (*teacher.parameters(), *student.parameters())} == {trainer.args.device.type}
    assert trainer.args.device.type != "cpu"
    trainer.train()
    exact = one_step(BertForSequenceClassification, tmp_path)
    assert trainer.state.log_history[0]["hidden_mse"] == pytest.approx(exact[0]["hidden_mse"], rel=0.1)


class Spy(TrainerCallback):
    """Looks at the teacher during the training."""

    def __init__(self, teacher):
        self.teacher, self.training = teacher, []
        self.hook = teacher.register_forward_hook(lambda *_: self.training.append(teacher.training))

    def on_step_begin(self, args, state, control, **kwargs):
        self.teacher.train()  # somebody's mistake


def test_teacher_is_not_trained_not_saved_and_always_in_evaluation_mode(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    spy = Spy(teacher)
    trainer = make_trainer(
        student, teacher, tmp_path, max_steps=2, save_strategy="steps", save_steps=1, callbacks=[spy], weight_decay=0.1
    )
    trainer.train()
    assert spy.training == [False, False]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & set(map(id, teacher.parameters()))
    assert trained == set(map(id, student.parameters()))
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(student.state_dict())
    assert not [name for name in trainer.accelerator._models if name is teacher]


def test_models_come_back_without_hooks(tmp_path):
    teacher, student = pair(BertModel)
    make_trainer(student, teacher, tmp_path, max_steps=1).train()
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))
    with torch.no_grad():
        teacher.encoder.layer[2].output.dense.bias[0] = float("nan")
    with pytest.raises(FloatingPointError):
        make_trainer(student, teacher, tmp_path, max_steps=1).train()
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))


def test_dropout_of_the_training_does_not_outlast_it(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    seen = []
    student.dropout.register_forward_hook(lambda module, *_: seen.append(module.p))
    make_trainer(student, teacher, tmp_path, max_steps=1, dropout=0.3).train()
    make_trainer(student, teacher, tmp_path, max_steps=1, dropout=None).train()
    assert seen == [0.3, 0.1]
    assert student.dropout.p == 0.1


def test_the_students_config_keeps_its_cache(tmp_path):
    teacher, student = pair(GPT2LMHeadModel)
    make_trainer(student, teacher, tmp_path, max_steps=1).train()
    assert student.config.use_cache
    assert teacher.config.use_cache


def test_evaluation_gives_logits_only_and_the_stock_loss(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    student.config.output_hidden_states = True
    rows = examples(student)
    trainer = make_trainer(student, teacher, tmp_path, per_device_eval_batch_size=8)
    result = trainer.predict(rows)
    assert result.predictions.shape == (8, 3)
    with torch.no_grad():
        stock = student.eval()(**collate(rows))
    torch.testing.assert_close(torch.from_numpy(result.predictions), stock.logits)
    assert result.metrics["test_loss"] == pytest.approx(float(stock.loss), rel=1e-5)
    trainer.train()
    asked = []
    student.register_forward_pre_hook(lambda m, a, k: asked.append(k.get("output_hidden_states")), with_kwargs=True)
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher runs in evaluation"))
    assert trainer.evaluate(rows)["eval_loss"] < result.metrics["test_loss"]
    assert asked == [None]


def test_label_smoothing_is_that_of_transformers(tmp_path):
    log, _ = one_step(BertForSequenceClassification, tmp_path, label_smoothing_factor=0.3)
    _, student = pair(BertForSequenceClassification)
    batch = collate(examples(student))
    with torch.no_grad():
        output = student.eval()(**batch)
    expected = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.3)(output, batch["labels"])
    assert log["supervised"] == pytest.approx(float(expected), rel=1e-5)


def test_terms_are_logged_as_means_over_the_window_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logs = []
    for steps, report_to in ((1, []), (2, "tensorboard")):
        teacher, student = pair(BertForSequenceClassification)
        trainer = make_trainer(
            student, teacher, tmp_path / str(steps), max_steps=4, logging_steps=steps, report_to=report_to,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    every, second = logs
    assert len(every) == 4
    assert len(second) == 2
    for key in ("loss", *(term.removesuffix("_weight") for term in ALL_TERMS)):
        for window in range(2):
            expected = (every[2 * window][key] + every[2 * window + 1][key]) / 2
            assert second[window][key] == pytest.approx(expected, rel=1e-5), key
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in (term.removesuffix("_weight") for term in ALL_TERMS):
        recorded = [event.value for event in events.Scalars(f"train/{name}")]
        assert recorded == pytest.approx([entry[name] for entry in second], rel=1e-5)


def test_a_checkpoint_of_the_middle_opens_without_this_package(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    saved = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            saved[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    trainer.add_callback(Keep())
    trainer.train()
    batch = {key: value for key, value in collate(examples(student)).items() if key != "labels"}
    torch.save(batch, tmp_path / "batch.pt")
    code = """
        import sys
        sys.modules["kronecker_transformers"] = None
        import torch
        from transformers import AutoModelForSequenceClassification
        folder, batch, output = sys.argv[1:]
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            torch.save(model(**torch.load(batch, weights_only=True)).logits, output)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "checkpoint-2", "batch.pt", "out.pt"], cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    student.load_state_dict(saved[2])
    with torch.no_grad():
        expected = student.eval()(**batch).logits
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True), expected)


def best_of_four(folder, teacher, student):
    """A trainer whose evaluation is best after the second of four steps."""
    scores = iter([0.5, 0.9, 0.7, 0.6])
    return make_trainer(
        student, teacher, folder, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score",
        trainer={"eval_dataset": examples(student, 4), "compute_metrics": lambda _: {"score": next(scores)}},
    )  # fmt: skip


def test_the_best_model_at_the_end_is_that_of_the_record_and_of_a_resume(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    trainer = best_of_four(tmp_path, teacher, student)
    trainer.train()
    assert trainer.record()["rows"]["score"] == [0.9]
    second = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    _, fresh = pair(BertForSequenceClassification)
    resumed = best_of_four(tmp_path, teacher, fresh)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.record()["rows"]["score"] == [0.9]
    for name, weight in second.items():
        assert torch.equal(student.state_dict()[name], weight), name
        assert torch.equal(fresh.state_dict()[name], weight), name


def test_the_record_has_no_score_of_an_earlier_step(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    found = {}

    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found[state.global_step] = trainer.record().get("rows")

    trainer = make_trainer(
        student, teacher, tmp_path, callbacks=[Note()], max_steps=4, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=2, trainer={"eval_dataset": examples(student, 4)},
    )  # fmt: skip
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert found == {1: None, 2: {"loss": [losses[0]]}, 3: None, 4: {"loss": [losses[1]]}}


def test_the_record_says_what_was_done(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    own = torch.optim.SGD(student.parameters(), lr=0.5)
    trainer = make_trainer(student.bfloat16(), teacher, tmp_path, trainer={"optimizers": (own, None)})
    trainer.train()
    found = trainer.training_summary()
    assert (found["optimizer"], found["learning_rate"]) == ("SGD", 0.5)
    assert found["precision"] == "bfloat16"
    assert found["tokens"] is None
    given = torch.optim.Adam, {"lr": 0.25}
    trainer = make_trainer(student, teacher, tmp_path, trainer={"optimizer_cls_and_kwargs": given})
    trainer.train()
    found = trainer.training_summary()
    assert (found["optimizer"], found["learning_rate"]) == ("Adam", 0.25)
    for own_optimizer in ({"optimizers": (own, None)}, {"optimizer_cls_and_kwargs": given}):
        with pytest.raises(ValueError, match="muon=True and an optimizer of your own were given; leave one of them"):
            make_trainer(student, teacher, tmp_path, muon=True, trainer=own_optimizer)


def test_the_record_has_the_precision_of_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` sets it
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path)
    dtypes = set()
    student.classifier.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert trainer.training_summary()["precision"] == "bfloat16"


def test_the_record_has_the_scores_of_all_evaluation_sets(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    sets = {name: examples(student, 4, seed) for seed, name in enumerate(("matched", "mismatched"))}
    trainer = make_trainer(
        student, teacher, tmp_path, eval_strategy="steps", eval_steps=1, trainer={"eval_dataset": sets}
    )
    trainer.train()
    for name, rows in sets.items():
        loss = trainer.evaluate(rows)["eval_loss"]
        assert trainer.record()["rows"][f"{name}_loss"] == [pytest.approx(loss)], name


def test_batches_that_were_too_large_are_not_counted(tmp_path, monkeypatch):
    teacher, student = pair(BertForSequenceClassification)
    tried = []
    whole = DistillationTrainer.training_step

    def training_step(self, model, inputs, *args):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 4 and len(tried) > 1:  # after a step that went well
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, model, inputs, *args)

    monkeypatch.setattr(DistillationTrainer, "training_step", training_step)
    trainer = make_trainer(student, teacher, tmp_path, max_steps=3, auto_find_batch_size=True)
    trainer.train()
    found = trainer.training_summary()
    assert tried[-3:] == [4, 4, 4]
    assert (found["steps"], found["batch"], found["samples"]) == (3, 4, 12)


def test_folders_that_are_no_checkpoints_of_a_step_are_passed_over(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    make_trainer(student, teacher, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
