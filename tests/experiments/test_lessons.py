"""What a student learns from text."""

import random
from itertools import islice, permutations

import pytest
import tiny
import transformers
from distilling_text import saved_teacher

from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.checkpoint.sentence_modules import EncoderSettings
from kronecker_transformers.compression.activations import calibration_batches
from kronecker_transformers.compression.calibration import check_text
from kronecker_transformers.experiments import lessons
from kronecker_transformers.experiments.lessons import augmented_sentences, calibration_rows, text_lesson
from kronecker_transformers.tasks import augmentation
from kronecker_transformers.tasks.text import WHOLE, Share, TextSource

LINES = [" ".join(words) for words in islice(permutations(sorted(set(tiny.TEXT.split())), 3), 240)]


@pytest.fixture(params=[transformers.BertModel, transformers.BertForSequenceClassification], ids=lambda c: c.__name__)
def taught(request, tmp_path):
    """A lesson on these lines, all of them different, and the tokenizer."""
    model, tokenizer = load_model(saved_teacher(request.param, tmp_path / "teacher"))
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    return text_lesson(model, tokenizer, TextSource((str(path),)), 3), tokenizer


def texts_of(examples, tokenizer):
    return [tokenizer.decode(example["input_ids"], skip_special_tokens=True) for example in examples]


def test_what_is_held_out_is_not_learnt_from(taught):
    lesson, tokenizer = taught
    lesson.memory.keeps = False  # as after an earlier training
    train, held_out = (texts_of(examples, tokenizer) for examples in (lesson.examples(3, WHOLE), lesson.held_out))
    assert 5 < len(held_out) < 60
    assert sorted(train + held_out) == sorted(LINES)
    assert lesson.memory.keeps
    assert not set(lesson.calibration) & set(lesson.sentences)
    assert not set(lesson.counted) & set(lesson.sentences)


@pytest.mark.parametrize(
    "dense_class",
    [transformers.BertForMaskedLM, transformers.BertForTokenClassification, transformers.BertForMultipleChoice,
     transformers.GPT2LMHeadModel],
)  # fmt: skip
def test_with_other_heads_too_what_is_held_out_is_not_learnt_from(dense_class, tmp_path):
    model, tokenizer = load_model(saved_teacher(dense_class, tmp_path / "teacher"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    lesson = text_lesson(model, tokenizer, TextSource((str(path),)), 3)

    def words_of(examples):
        found = []
        for example in examples:
            ids = example["input_ids"]
            rows = ids if isinstance(ids[0], list) else [ids]
            found += [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return " | ".join(found)

    train, held_out = words_of(lesson.examples(3, WHOLE)), words_of(lesson.held_out)
    of_train, of_held_out = ({line for line in LINES if line in text} for text in (train, held_out))
    assert len(of_held_out) > 5
    assert len(of_train) > 150
    if dense_class is transformers.GPT2LMHeadModel:  # a line may also stand in another place, across two others
        assert len(of_train & of_held_out) < 0.1 * len(of_held_out)
    else:
        assert not of_train & of_held_out


def test_a_prompt_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(augmentation, "REPLACED", 1.0)
    model, tokenizer = load_model(saved_teacher(transformers.BertModel, tmp_path / "teacher"))
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    source = TextSource((str(path),))
    examples = augmented_sentences(source, 1.0, 0, LINES, model, tokenizer, 16, "the fox: ")
    for seed in (0, 1):
        found = texts_of(examples(seed, WHOLE), tokenizer)
        prompt = tokenizer.decode(tokenizer("the fox: ").input_ids, skip_special_tokens=True)
        assert all(text.startswith(prompt) for text in found)
        assert (found == [f"{prompt} {line}" for line in LINES]) == (seed == 0)


def test_a_prompt_stands_before_what_is_calibrated_on_and_counted(tmp_path, monkeypatch):
    model, tokenizer = load_model(saved_teacher(transformers.BertModel, tmp_path / "teacher"))
    monkeypatch.setattr(lessons, "encoder_settings", lambda *_: EncoderSettings(prompt="the fox: "))
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    lesson = text_lesson(model, tokenizer, TextSource((str(tmp_path / "lines.txt"),)), 0)
    prompted = {f"the fox: {line}" for line in LINES}
    for texts in (lesson.calibration, lesson.counted):
        assert len(texts) > 100
        assert set(texts) <= prompted


def test_calibration_takes_rows_from_all_over_a_task_that_is_sorted(tmp_path):
    model, tokenizer = load_model(saved_teacher(transformers.BertModel, tmp_path / "teacher"))
    words = sorted(set(tiny.TEXT.split()))
    rows = [(f"{words[i // 1000]} " * 30,) for i in range(4000)]
    found = calibration_rows(rows, model, tokenizer)
    assert len(found) == 512
    assert [found.count(rows[1000 * kind][0]) for kind in range(4)] == pytest.approx([128] * 4, abs=20)


def test_in_each_epoch_but_the_first_half_of_the_sentences_are_augmented(taught):
    lesson, tokenizer = taught
    first, *later = (texts_of(lesson.examples(seed, WHOLE), tokenizer) for seed in (3, 4, 4, 5))
    assert not lesson.memory.keeps  # they do not come again
    assert set(first) < set(LINES)
    assert later[0] == later[1]
    kept = [[one == other for one, other in zip(first, found, strict=True)] for found in later]
    assert all(0.3 < sum(same) / len(first) < 0.7 for same in kept)
    assert kept[0] != kept[2]
    words = set(tiny.TEXT.split())
    assert all(set(text.split()) <= words for text in later[0])
    for seed, alike in ((3, True), (4, False)):
        shares = [texts_of(lesson.examples(seed, Share(index, 2)), tokenizer) for index in range(2)]
        assert sum(map(len, shares)) == len(first)
        assert (sorted(shares[0] + shares[1]) == sorted(first)) == alike


@pytest.mark.parametrize(
    ("dense_class", "changes"),
    [
        (transformers.BertModel, {"intermediate_size": 1024, "num_hidden_layers": 1}),
        (transformers.GPT2ForSequenceClassification, {"n_positions": 128}),
    ],
)
def test_of_short_lines_more_are_calibrated_on(dense_class, changes, tmp_path):
    """Of 512 lines the largest layer would have too few tokens, and a classifier that reads blocks too few blocks."""
    teacher = saved_teacher(dense_class, tmp_path / "teacher", **changes)
    model, tokenizer = load_model(teacher)
    draw = random.Random(0)
    words = sorted(set(tiny.TEXT.split()))
    text = tmp_path / "short.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=2)) for _ in range(4000)))
    lesson = text_lesson(model, tokenizer, TextSource((str(text),)), 0)
    tokens = sum(map(len, tokenizer(list(lesson.calibration)).input_ids))
    assert 4000 * 0.9 >= len(lesson.calibration) > 512
    assert tokens >= 0.98 * max(4096, 8 * changes.get("intermediate_size", 0))  # their number is an estimate
    check_text(model, calibration_batches(lesson.calibration, tokenizer, model), model.base_model.modules())
