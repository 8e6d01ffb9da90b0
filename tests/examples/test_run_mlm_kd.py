import shutil

import pytest
import tiny
import torch
from examples_runner import load_example, run_example
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
)
from transformers.trainer_callback import TrainerState

from kronecker_transformers.tasks.language_modeling import masked_examples
from kronecker_transformers.tasks.text import TextSource

PLAN = "embeddings.word_embeddings: {m1: 64, n1: 8}\nencoder.layer.*.intermediate.dense: {m1: 4, n1: 2}\n"
WORDS = tiny.TEXT.split()
NAMES = ["teacher", "student, undistilled", "student"]


@pytest.fixture
def workplace(tmp_path):
    """A plan, and the same lines as text with documents and without."""
    (tmp_path / "plan.yaml").write_text(PLAN)
    lines = [" ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(3 + i % 7)) for i in range(80)]
    (tmp_path / "documents.txt").write_text("\n\n".join("\n".join(lines[i : i + 8]) for i in range(0, 80, 8)))
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    return tmp_path


def save_teacher(folder, dense_class, **changes):
    folder.mkdir()
    tokenizer = (tiny.gpt2_tokenizer if dense_class is GPT2LMHeadModel else tiny.bert_tokenizer)(folder)
    model = tiny.teacher(dense_class, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def run(workplace, dense_class, text="documents.txt", out="out", **options):
    if not (workplace / "teacher").exists():
        save_teacher(workplace / "teacher", dense_class)
    defaults = {} if "start" in options else {"plan": workplace / "plan.yaml"}
    return run_example(
        "run_mlm_kd", workplace / out, **{"teacher": workplace / "teacher", "train_text": [workplace / text],
        "validation_text": [workplace / text], "max_length": 24, "disable_tqdm": True,
        "per_device_train_batch_size": 4, **defaults, **options},
    )  # fmt: skip


def terms_of(folder):
    newest = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return TrainerState.load_from_json(newest / "trainer_state.json").log_history[0]


INTERMEDIATE = {"embedding_mse", "attention_mse", "hidden_mse"}


def test_with_both_heads_and_documents(workplace, capsys):
    results = run(workplace, BertForPreTraining)
    assert results["models"] == NAMES
    assert results["training"] == {**results["training"], "steps": 3, "samples": 12}
    assert 12 * 10 < results["training"]["tokens"] <= 12 * 24
    rows = results["rows"]
    assert rows["parameters"][1] == rows["parameters"][2] < rows["parameters"][0]
    for name in ("masked words, accuracy", "next sentence, accuracy"):
        assert all(0 <= value <= 1 for value in rows[name])
    assert 2 < rows["masked words, loss"][0] < 6  # log(64) is 4.2
    assert len(set(rows["masked words, loss"])) == 3
    assert results["notes"] == [results["notes"][-1]]
    assert "Judged on" in results["notes"][0]
    assert {*INTERMEDIATE, "supervised"} <= terms_of(workplace / "out").keys()
    student = AutoModelForPreTraining.from_pretrained(workplace / "out" / "student")
    assert type(student).__name__ == "KroneckerBertForPreTraining"
    assert student.num_parameters() == rows["parameters"][2]
    assert "masked words, accuracy" in capsys.readouterr().out


def test_both_heads_without_documents(workplace):
    results = run(workplace, BertForPreTraining, "lines.txt")
    assert results["notes"][0].startswith("no next-sentence prediction: the text has no documents")
    assert "next sentence, accuracy" not in results["rows"]
    assert "masked words, accuracy" in results["rows"]
    before, after = (
        load_file(workplace / folder / "model.safetensors")["cls.seq_relationship.weight"]
        for folder in ("teacher", "out/student")
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # weight decay alone


def test_both_heads_with_documents_of_one_sentence(workplace):
    lines = (workplace / "lines.txt").read_text().splitlines()
    (workplace / "rows.csv").write_text("\n".join(["text", *lines]))
    results = run(workplace, BertForPreTraining, "rows.csv")
    assert results["notes"][0] == "no next-sentence prediction: the documents of the text are single sentences"
    assert "next sentence, accuracy" not in results["rows"]


def test_masked_words_alone_when_asked_or_without_the_head(workplace):
    results = run(workplace, BertForPreTraining, no_next_sentence=True, short_fraction=0.5)
    assert len(results["notes"]) == 1
    assert "next sentence, accuracy" not in results["rows"]
    shutil.rmtree(workplace / "teacher")
    results = run(workplace, BertForMaskedLM, out="out2", logits_weight=1)
    assert results["notes"][0] == "no next-sentence prediction: the teacher is a BertForMaskedLM without a head for it"
    assert "logits" in terms_of(workplace / "out2")
    student = AutoModelForMaskedLM.from_pretrained(workplace / "out2" / "student")
    assert type(student).__name__ == "KroneckerBertForMaskedLM"


def test_validation_has_the_same_masks_every_time(workplace):
    model = save_teacher(workplace / "teacher", BertForMaskedLM)
    script, tokenizer = load_example("run_mlm_kd"), tiny.bert_tokenizer(workplace)
    source = TextSource((str(workplace / "lines.txt"),))
    examples = list(masked_examples(source, tokenizer, 24, False))
    collator = script.collator_for(model, tokenizer)
    first, second = script.fixed_batches(examples, collator), script.fixed_batches(examples, collator)
    assert len(first) == 3  # 80 lines, by 32
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(collator(examples[:32])["labels"], collator(examples[:32])["labels"])


def test_a_teacher_without_heads(workplace):
    results = run(workplace, BertModel)
    assert results["notes"][0].startswith("BertModel has no head to predict words: the student learns")
    assert set(results["rows"]) == {"parameters", "last layer, distance (MSE)"}
    teacher, undistilled, student = results["rows"]["last layer, distance (MSE)"]
    assert teacher == 0 < min(undistilled, student)
    log = terms_of(workplace / "out")
    assert log.keys() >= INTERMEDIATE
    assert not log.keys() & {"supervised", "logits"}
    assert type(AutoModel.from_pretrained(workplace / "out" / "student")).__name__ == "KroneckerBertModel"


@pytest.mark.parametrize(("text", "head"), [("documents.txt", BertForPreTraining), ("lines.txt", BertForMaskedLM)])
def test_heads_that_are_trained_first(text, head, workplace):
    base = save_teacher(workplace / "teacher", BertModel)
    results = run(workplace, BertModel, text, train_heads=30, learning_rate=0.01)
    assert any(note.startswith("the heads of the teacher were trained here, in 30 steps") for note in results["notes"])
    teacher = head.from_pretrained(workplace / "out" / "teacher")
    assert teacher.config.hidden_dropout_prob == base.config.hidden_dropout_prob > 0
    frozen = base.state_dict()
    for name, value in teacher.base_model.state_dict().items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0, msg=name)
    assert teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    assert not torch.equal(teacher.cls.predictions.bias, torch.zeros(64))
    assert results["rows"]["masked words, loss"][0] < 4.1  # of 64 words by chance: 4.2
    assert ("next sentence, accuracy" in results["rows"]) == (head is BertForPreTraining)
    student = AutoModel.from_pretrained(workplace / "out" / "student")
    assert student.config.architectures == [f"Kronecker{head.__name__}"]


@pytest.mark.parametrize("teacher", [BertModel, BertForPreTraining])
def test_a_run_that_stopped_goes_on_bit_for_bit(teacher, workplace):
    """With dropout, and with masks where there is a head."""
    options = {"dropout": 0.1, "max_steps": 4}
    run(workplace, teacher, out="whole", **options)
    run(workplace, teacher, out="stopped", **options)
    stopped = workplace / "stopped"
    shutil.rmtree(stopped / "student")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    (stopped / "results.json").unlink()
    results = run(workplace, teacher, out="stopped", resume_from_checkpoint=True, **options)
    assert results["training"]["steps"] == 4
    expected, found = (load_file(workplace / out / "student" / "model.safetensors") for out in ("whole", "stopped"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(FileExistsError, match="student' already holds something"):
        run(workplace, teacher, out="stopped", resume_from_checkpoint=True, **options)


def test_resuming_keeps_the_heads_that_were_trained(workplace):
    run(workplace, BertModel, train_heads=2)
    out = workplace / "out"
    before = (out / "teacher" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "checkpoints" / "checkpoint-3")
    run(workplace, BertModel, train_heads=2, resume_from_checkpoint=True)
    assert (out / "teacher" / "model.safetensors").read_bytes() == before


def test_epochs_are_counted_in_steps_and_a_student_goes_on(workplace):
    epochs = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8, "no_next_sentence": True}
    results = run(workplace, BertForMaskedLM, "lines.txt", short_fraction=0, **epochs)
    assert results["training"]["steps"] == 20  # 80 lines, twice, by 8
    shutil.rmtree(workplace / "teacher")
    results = run(workplace, BertForPreTraining, out="out2", start=workplace / "out" / "student", fraction=0.7)
    assert results["rows"]["parameters"][2] < results["rows"]["parameters"][0]


def test_what_it_judges_on_is_missed_before_the_training(workplace):
    with pytest.raises(FileNotFoundError, match=r"'missing\.txt' does not exist"):
        run(workplace, BertModel, validation_text=["missing.txt"])
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    ("dense_class", "options", "message"),
    [
        (BertForSequenceClassification, {}, "is a BertForSequenceClassification; this stage needs"),
        (BertForMaskedLM, {"train_heads": 2}, "train_heads=2 is for a teacher without heads, not a BertForMaskedLM"),
        (BertForMaskedLM, {"max_length": 41}, "max_length=41 must be from 2 to the teacher's 40 tokens"),
        (BertModel, {"supervised_weight": 0, "embedding_mse_weight": 0, "attention_mse_weight": 0,
                     "hidden_mse_weight": 0, "logits_weight": 1}, "all weights that are left are 0; give"),
        (BertModel, {"train_heads": 2, "validation_text": ["missing.txt"]}, r"'missing\.txt' does not exist"),
        (BertModel, {"train_heads": 2, "plan": "30y"}, "plan='30y' is neither one of"),
        (BertModel, {"train_heads": 2, "layer_map": [0, 1]}, r"layer_map=\[0, 1\] must give for each of the 3 layers"),
        (GPT2LMHeadModel, {}, "is a GPT2LMHeadModel, whose family predicts no masked words; distil it with run_clm_kd"),
    ],
)  # fmt: skip
def test_clear_refusals(dense_class, options, message, workplace):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(workplace, dense_class, **options)
    assert not (workplace / "out").exists()


def test_refuses_options_that_are_not_its_own(workplace, capsys):
    with pytest.raises(SystemExit):
        load_example("run_mlm_kd").main(
            ["--teacher", "a", "--train_text", "b", "--output_dir", str(workplace / "o"), "--recipe", "kngpt2"]
        )
    assert "choose one of kroneckerbert-21x, kroneckerbert-7.7x" in capsys.readouterr().err
