"""The main job in one go, for every head, on tiny teachers."""

import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from distilling_text import saved_teacher, text_file
from safetensors.torch import load_file
from students import LONG_TESTS

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.cli import main
from kronecker_transformers.distillation import TeacherMemory
from kronecker_transformers.evaluation.cost import describe
from kronecker_transformers.experiments.distill import _command, distill
from kronecker_transformers.experiments.lessons import text_lesson
from kronecker_transformers.models import FACTORED_CLASSES
from kronecker_transformers.tasks.text import TextSource

pytestmark = pytest.mark.usefixtures("full_precision")

QUALITY = {
    "Model": ["similarity fidelity (Spearman)", "nearest 10 neighbours in common"],
    "ForPreTraining": ["perplexity at masked words", "masked words as the teacher's"],
    "ForMaskedLM": ["perplexity at masked words", "masked words as the teacher's"],
    "ForSequenceClassification": ["labels as the teacher's"],
    "ForTokenClassification": ["labels of tokens as the teacher's"],
    "ForQuestionAnswering": ["answers as the teacher's"],
    "ForMultipleChoice": ["choices as the teacher's"],
    "LMHeadModel": ["perplexity", "next words as the teacher's"],
    "ElectraForPreTraining": ["words as the teacher's"],
}


@pytest.mark.parametrize("dense_class", LONG_TESTS, ids=lambda cls: cls.__name__)
def test_every_head(dense_class, tmp_path):
    teacher = saved_teacher(dense_class, tmp_path / "teacher")
    lines = []
    found = distill(
        teacher, text_file(tmp_path), tmp_path / "student", ratio=2.5, steps=24, learning_rate=5e-3, show=lines.append
    )
    ending = max((key for key in QUALITY if dense_class.__name__.endswith(key)), key=len)
    assert list(found.rows)[3:] == QUALITY[ending]
    assert found.training["steps"] == 24
    parameters = found.rows["parameters"]
    assert 2 < parameters[0] / parameters[2] < 3
    weights = load_file(tmp_path / "student" / "model.safetensors")
    assert sum(value.numel() for value in weights.values()) == parameters[2]
    saved = FACTORED_CLASSES[dense_class].from_pretrained(tmp_path / "student")
    torch.testing.assert_close(saved.state_dict(), found.model.state_dict(), rtol=0, atol=0)
    assert "searched for a ratio of 2.5" in lines[0]
    assert "step     0 of 24" in lines[2]
    for name in ("plan.yaml", "results.json", "training.png", "README.md"):
        assert (tmp_path / "student" / name).stat().st_size > 0
    record = json.loads((tmp_path / "student" / "results.json").read_text())
    assert record["options"]["teacher"] == str(teacher)
    assert record["factors_sha256"] == describe(saved).factors_sha256
    first, _, last = found.rows[QUALITY[ending][0]]
    if "perplexity" in QUALITY[ending][0]:
        assert last < 10 * first
    else:
        assert first == pytest.approx(1, abs=1e-4)
    assert all(found.rows[name][0] == 1 for name in QUALITY[ending] if name.endswith("as the teacher's"))


@torch.no_grad()
def distance(model, teacher, tokenizer, lines):
    """Mean squared difference of the last hidden states, without padding."""
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    ours, theirs = (each.eval()(**batch, output_hidden_states=True) for each in (model, teacher))
    words = batch["attention_mask"] == 1
    return float((ours.hidden_states[-1] - theirs.hidden_states[-1])[words].square().mean())


def test_a_student_learns(tmp_path):
    folder = saved_teacher(transformers.BertForSequenceClassification, tmp_path / "teacher")
    teacher, tokenizer = load_model(folder)
    text = text_file(tmp_path)
    lines = text.read_text().splitlines()[:32]
    found = [
        distill(folder, text, tmp_path / f"student-{steps}", ratio=6, steps=steps, learning_rate=5e-3)
        for steps in (1, 150)
    ]
    weights = [each.training["objective"] for each in found]
    assert weights[0] == weights[1]  # balanced in the first step
    assert set(weights[0]) == {"embedding_mse", "attention_mse", "hidden_mse", "logits"}
    log = json.loads((tmp_path / "student-150" / "results.json").read_text())
    assert log["models"] == ["teacher", "not distilled", "student"]
    early, late = (distance(one.model, teacher, tokenizer, lines) for one in found)
    assert late < 0.75 * early


def test_the_command(tmp_path, capsys):
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    command = ["distill", teacher, "--text", text_file(tmp_path), "--output", tmp_path / "student", "--steps", "12"]
    assert main([*map(str, command), "--ratio", "3"]) == 0
    shown = capsys.readouterr().out
    assert "plan searched for a ratio of 3" in shown
    assert "similarity fidelity" in shown
    assert "Saved in" in shown
    assert main([*map(str, command)]) == 1
    assert "already holds something" in capsys.readouterr().err


@pytest.mark.parametrize("given", [True, False])
def test_frequent_words_may_be_left_out(given, tmp_path, monkeypatch):
    asked = []
    module = sys.modules[distill.__module__]
    monkeypatch.setattr(module, "compress", lambda *a, **k: asked.append(k["counted"]) or compress(*a, **k))
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    arguments = ["distill", teacher, "--text", text_file(tmp_path), "--output", tmp_path / "student", "--steps", "1"]
    arguments += ["--ratio", "3", *([] if given else ["--no-frequent-words"])]
    assert main(list(map(str, arguments))) == 0
    assert bool(asked[0]) == given
    command = json.loads((tmp_path / "student" / "results.json").read_text())["options"]["command"]
    assert ("--no-frequent-words" in command) == (not given)


def test_a_student_is_not_lost_because_it_cannot_be_drawn(tmp_path, monkeypatch, caplog):
    teacher = saved_teacher(transformers.BertForSequenceClassification, tmp_path / "teacher")
    monkeypatch.setattr("kronecker_transformers.experiments.distill.training_picture", lambda *_, **__: 1 / 0)
    distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, steps=2)
    assert "the student is saved, but could not be judged or drawn: ZeroDivisionError" in caplog.text
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert type(student).__name__ == "KroneckerBertForSequenceClassification"
    record = json.loads((tmp_path / "student" / "results.json").read_text())
    assert record["evaluation_failed"].startswith("ZeroDivisionError")
    assert record["rows"]["labels as the teacher's"][0] == 1


def test_a_student_is_not_lost_because_nobody_waits_for_its_comparison(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    teacher, said = saved_teacher(transformers.BertModel, tmp_path / "teacher"), []
    monkeypatch.setattr("kronecker_transformers.experiments.distill._speeds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, steps=2, show=said.append)
    assert said[-1] == "Comparison on held-out text"
    assert type(load_model(tmp_path / "student")[0]).__name__ == "KroneckerBertModel"
    record = json.loads((tmp_path / "student" / "results.json").read_text())
    assert record["evaluation_failed"].startswith("KeyboardInterrupt")
    assert record["training"]["steps"] == 2
    assert (tmp_path / "student" / "README.md").exists()


def test_a_student_is_not_lost_because_of_the_card_of_its_teacher(tmp_path, monkeypatch, caplog):
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: mit\nnote: a: b\n---\n")
    distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, steps=2)
    assert "teacher/README.md are not read" in caplog.text
    assert (tmp_path / "student" / "README.md").exists()
    monkeypatch.setattr("kronecker_transformers.experiments.distill.model_card", lambda *_, **__: 1 / 0)
    distill(teacher, text_file(tmp_path), tmp_path / "second", ratio=3, steps=2)
    assert "the student is saved, but without a card: ZeroDivisionError" in caplog.text
    assert (tmp_path / "second" / "results.json").exists()


@pytest.mark.parametrize("known", [None, 5])
def test_gpt2_pads_with_a_token_that_its_config_knows(known, tmp_path):
    """Else its classifier would read a padding position, or refuse the batch."""
    teacher = saved_teacher(transformers.GPT2ForSequenceClassification, tmp_path / "teacher", pad_token_id=known)
    tokenizer = tiny.gpt2_tokenizer(tmp_path)
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    tokenizer.save_pretrained(teacher)
    found = distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=2, steps=2)
    assert found.tokenizer.pad_token_id == found.model.config.pad_token_id == (known or found.tokenizer.eos_token_id)
    assert found.tokenizer.padding_side == "right"
    texts = ["the fox", "the quick brown fox jumps over the lazy dog"]
    batch = found.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = found.model(**found.tokenizer(texts[:1], return_tensors="pt")).logits
        torch.testing.assert_close(found.model(**batch).logits[:1], alone, rtol=1e-4, atol=1e-5)


def test_text_of_few_documents_is_held_out_by_line(tmp_path):
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    text = text_file(tmp_path)
    text.write_text("A title\n\n" + text.read_text())
    found = distill(teacher, text, tmp_path / "student", ratio=3, steps=2)
    assert found.training["steps"] == 2


def test_a_loaded_teacher_stays_as_it_is(tmp_path):
    teacher = tiny.teacher(transformers.BertForSequenceClassification, dtype=torch.bfloat16).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    found = distill(
        teacher, text_file(tmp_path), tmp_path / "student", ratio=3, steps=2, tokenizer=tiny.bert_tokenizer(tmp_path)
    )
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert found.model.dtype == torch.float32


def test_a_tokenizer_that_was_given_stays_as_it_is(tmp_path):
    teacher = saved_teacher(transformers.GPT2LMHeadModel, tmp_path / "teacher")
    tokenizer = tiny.gpt2_tokenizer(tmp_path)
    tokenizer.padding_side, tokenizer.pad_token = "left", None
    found = distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=1.4, steps=1, tokenizer=tokenizer)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)
    assert found.tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 1, "steps": 2}, "give one of both"),
        ({"minutes": -1}, "minutes=-1 must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"seed": -1}, r"seed=-1 must be from 0 to 2\*\*32 - 1"),
        ({"data_dir": "glue"}, "data_dir='glue' is of a task, and text was given; leave it out"),
        ({"text": None, "task": "sst2", "column": "a"}, "column='a' is of a text, and a task was given; leave it out"),
        ({"ratio": 3, "plan": "7.7x"}, "leave one of them out"),
        ({"plan": {"nowhere": (1, 1)}}, "matches no module"),
        ({"text": "little.txt"}, "is too little"),
        ({"text": None}, "give one of both"),
        ({"task": "sst2"}, "give one of both"),
        ({"text": "nothing.txt"}, "does not exist"),
    ],
)
def test_bad_input_leaves_nothing_behind(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    (tmp_path / "little.txt").write_text("one line\nanother line\n")
    text_file(tmp_path)
    before = set(tmp_path.iterdir())
    arguments = {"text": "text.txt", "steps": 1, **changes}
    if "minutes" in changes and "steps" not in changes:
        del arguments["steps"]
    with pytest.raises((ValueError, OSError), match=message):
        distill(teacher, arguments.pop("text"), tmp_path / "student", **arguments)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"intermediate_size": 4096}, {"ratio": 3}, "too little: the largest layer has 4,096 inputs"),
        ({}, {"ratio": 500}, "cannot be met: "),
        (
            {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4},
            {"ratio": 52, "layers": 2},
            r"with layers=\[1, 3\] a ratio of [\d.]+ is left to the factors: .*cannot be met",
        ),
    ],
)
def test_what_the_second_half_refuses_is_refused_before_the_first(changes, options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[distill.__module__], "shallow", lambda *a: pytest.fail("training began"))
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher", **changes)
    with pytest.raises(ValueError, match=message):
        distill(teacher, text_file(tmp_path), tmp_path / "student", **{"layers": 1, "steps": 2, **options})
    assert not (tmp_path / "student").exists()


def test_both_trainings_read_a_sentence_once_with_the_teacher(tmp_path, monkeypatch):
    read, given = [], []
    embeddings = TeacherMemory.embeddings

    def counted(self, features, mask, compute):
        def counting(some, real):
            read.append(len(real))
            return compute(some, real)

        given.append(len(mask))
        return embeddings(self, features, mask, counting)

    monkeypatch.setattr(TeacherMemory, "embeddings", counted)
    monkeypatch.setattr("kronecker_transformers.experiments.lessons.AUGMENTED", 0)
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    text = text_file(tmp_path)
    found = distill(teacher, text, tmp_path / "student", ratio=3, layers=2, steps=20)
    record = json.loads((tmp_path / "student" / "results.json").read_text())
    assert (record["dense_training"]["batch"], found.training["batch"]) == (32, 64)
    assert sum(given) == 8 * 32 + 12 * 64
    assert sum(read) <= len(set(text.read_text().splitlines())) < sum(given)


@pytest.mark.parametrize(
    ("capable", "asked", "precision"),
    [(True, None, "bfloat16"), (False, None, "float32"), (True, False, "float32"), (False, True, "bfloat16")],
)
def test_bfloat16_where_the_processor_multiplies_in_it(capable, asked, precision, tmp_path, monkeypatch):
    monkeypatch.setattr("kronecker_transformers.experiments.distill.multiplies_bfloat16", lambda: capable)
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    found = distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, steps=1, bf16=asked)
    assert found.training["precision"] == precision
    command = json.loads((tmp_path / "student" / "results.json").read_text())["options"]["command"]
    assert command[-1] == {None: "1", True: "--bf16", False: "--no-bf16"}[asked]


def test_a_student_trained_in_bfloat16_computes_in_float32(tmp_path, monkeypatch):
    seen = []

    def watched(model, *args, **options):
        seen.append(model)
        return compress(model, *args, **options)

    monkeypatch.setattr("kronecker_transformers.experiments.distill.compress", watched)
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    found = distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, layers=2, steps=4, bf16=True)
    batch = found.tokenizer(["a sentence", "another one"], padding=True, return_tensors="pt")
    saved = FACTORED_CLASSES[transformers.BertModel].from_pretrained(tmp_path / "student")
    dense = transformers.BertModel(seen[0].config).eval()
    dense.load_state_dict(seen[0].state_dict())
    with torch.no_grad():  # of the student, and of the dense one that it is calibrated from
        for trained, fresh in ((found.model, saved.eval()), (seen[0], dense)):
            expected = fresh(**batch).last_hidden_state
            torch.testing.assert_close(trained(**batch).last_hidden_state, expected, rtol=0, atol=1e-6)


def test_instructions_for_bfloat16_are_those_of_a_cpu(monkeypatch):
    from kronecker_transformers.experiments.watch import multiplies_bfloat16

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    found = []
    for names in ({"amx_bf16": True}, {"avx512_bf16": True, "amx_bf16": False}, {"avx512_f": True}, None):
        if names is None:  # an old version of torch
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        else:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda names=names: names, raising=False)
        found.append(multiplies_bfloat16())
    assert found == [True, True, False, False]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not multiplies_bfloat16()


def test_minutes_end_a_training_and_its_looks_tell_the_time(tmp_path):
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    lines = []
    found = distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, minutes=0.02, show=lines.append)
    assert found.training["steps"] > 0
    assert found.training["seconds"] >= 1.2
    curve = found.training["curve"]
    assert curve["quality"] in found.rows
    assert len(curve["values"]) == len(curve["steps"]) == len(curve["minutes"])
    assert (curve["steps"][0], curve["minutes"][0]) == (0, 0)
    assert curve["steps"][-1] == found.training["steps"]
    assert curve["minutes"] == sorted(curve["minutes"])
    assert 60 * curve["minutes"][-1] <= found.training["seconds"] + 0.05  # which are rounded
    assert "Distillation: 0.02 minutes, 64 examples each" in lines
    assert "step     0 after 0.0 of 0.02 minutes: similarity" in lines[2]


def test_looks_take_none_of_the_time_of_a_training(monkeypatch):
    from kronecker_transformers.distillation import progress
    from kronecker_transformers.experiments.watch import Watch

    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def judge(model):
        now[0] += 600
        return {"fidelity": 0.5}

    watch = Watch(judge, lambda line: None)
    arguments = SimpleNamespace(max_minutes=3.0)
    watch.progress.on_train_begin(arguments, transformers.TrainerState(), None)
    now[0] += 60
    watch.look(torch.nn.Linear(1, 1), 5, 100)
    now[0] += 30
    watch.look(torch.nn.Linear(1, 1), 9, 100)
    assert watch.minutes == [1.0, 1.5]
    assert watch.progress.seconds() == 90


@pytest.mark.parametrize(
    ("size", "factored", "rate"), [(32, True, 1e-3), (768, True, 2.5e-4), (32, False, 3e-4), (768, False, 7.5e-5)]
)
@pytest.mark.parametrize("minutes", [None, 0.5])
def test_how_a_student_is_trained(size, factored, rate, minutes, tmp_path, monkeypatch):
    from kronecker_transformers.experiments import training

    given = {}

    class StoppedError(Exception):
        pass

    def stop(**arguments):
        given.update(arguments)
        raise StoppedError

    dense, tokenizer = load_model(saved_teacher(transformers.BertForSequenceClassification, tmp_path / "teacher"))
    lesson = text_lesson(dense, tokenizer, TextSource((str(text_file(tmp_path)),)), 0)
    student = compress(dense, "7.7x").model if factored else dense
    student.config.hidden_size = size
    monkeypatch.setattr(training, "DistillationArguments", stop)
    schedule = training.Schedule(minutes, None if minutes else 40, None, False, 7)
    with pytest.raises(StoppedError):
        training.train(student, dense, lesson, schedule, None, lambda line: None)
    assert given["learning_rate"] == pytest.approx(rate)
    assert (given["muon"], given["dropout"], given["warmup_steps"], given["seed"]) == (factored, 0.0, 0.1, 7)
    assert (given["max_steps"], given["max_minutes"]) == ((1_000_000, 0.5) if minutes else (40, None))
    assert given.get("balanced", False) == factored
    assert given["supervised_weight"] == 0


def test_the_recorded_command_writes_whole_numbers_plainly_and_names_as_they_are():
    command = _command("teacher-1.0", text="corpus-2.0", ratio=8.0, minutes=4.5, learning_rate=1.25e-4)
    assert command[2:] == [
        "teacher-1.0", "--text", "corpus-2.0", "--ratio", "8", "--minutes", "4.5", "--learning-rate", "0.000125",
    ]  # fmt: skip


@pytest.mark.parametrize(("minutes", "steps"), [(2, 10_000), (2, 60), (None, 120), (None, 5)])
def test_looks_are_spread_over_the_time_or_the_steps_whichever_ends_first(minutes, steps):
    """A step takes a second here."""
    from kronecker_transformers.experiments.watch import Watch

    watch = Watch(lambda model: {}, lambda line: None)
    watch.progress.max_minutes = minutes
    found = []
    for step in range(1, min(steps, 60 * (minutes or 1000)) + 1):
        watch.progress.elapsed = step
        control = transformers.TrainerControl()
        watch.on_step_end(None, transformers.TrainerState(global_step=step, max_steps=steps), control)
        found += [step] * control.should_log
    end = {10_000: 120}.get(steps, steps)
    assert found == [step for step in range(1, end + 1) if 12 * step // end > 12 * (step - 1) // end]
    assert len(found) == min(12, steps)
    assert found[-1] == end
