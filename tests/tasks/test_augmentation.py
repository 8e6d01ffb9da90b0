import random

import numpy as np
import pytest
import tiny
import transformers

from kronecker_transformers.tasks import augmentation
from kronecker_transformers.tasks.augmentation import Augmentation, nearest_words, whole_words

WORDS = tiny.TEXT.split()
ROWS = [(" ".join(WORDS[i : i + 5]).capitalize() + ", 7!",) for i in range(len(WORDS) - 5)]
PAIRS = [(one, other) for (one,), (other,) in zip(ROWS, ROWS[3:], strict=False)]
CLASSES = {
    "bert": transformers.BertModel,
    "roberta": transformers.RobertaModel,
    "electra": transformers.ElectraModel,
    "gpt2": transformers.GPT2Model,
}


@pytest.fixture(params=CLASSES)
def family(request, tmp_path):
    """A teacher and its tokenizer."""
    return tiny.teacher(CLASSES[request.param]), tiny.tokenizer_for(request.param, tmp_path)


def changed(monkeypatch, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(augmentation, name, value)


def test_whole_words_are_words_of_one_token(family):
    teacher, tokenizer = family
    words = whole_words(tokenizer)
    assert {"a", "the"} <= set(words)
    for word, number in words.items():
        assert word.isalpha()
        assert tokenizer(f" {word}", add_special_tokens=False).input_ids == [number]
    if not isinstance(teacher, transformers.GPT2Model):  # whose tokens are pieces
        assert set(words) == set(WORDS)


def test_the_nearest_words_have_the_highest_cosines_of_centred_vectors(family, monkeypatch):
    changed(monkeypatch, CANDIDATES=3, _AT_ONCE=2)
    teacher, tokenizer = family
    known = whole_words(tokenizer)
    wanted = list(known)[::2]
    found = nearest_words(wanted, teacher, tokenizer)
    assert list(found) == wanted
    weight = teacher.get_input_embeddings().weight.detach().double().numpy()
    rows = {word: weight[number] for word, number in known.items()}
    mean = np.mean(list(rows.values()), axis=0)
    for word, nearest in found.items():
        own = rows[word] - mean
        cosines = {
            other: own @ (row - mean) / np.linalg.norm(own) / np.linalg.norm(row - mean)
            for other, row in rows.items()
            if other != word
        }
        assert nearest == sorted(cosines, key=cosines.get, reverse=True)[:3]


def test_words_are_replaced_by_near_ones_and_all_else_stays(family, monkeypatch):
    changed(monkeypatch, REPLACED=1.0, BROKEN=0.0, CANDIDATES=2)
    teacher, tokenizer = family
    nearest = nearest_words(WORDS, teacher, tokenizer)
    augmented = Augmentation(ROWS, teacher, tokenizer)
    for (text,) in ROWS:
        (found,) = augmented.row((text,), random.Random(0))
        assert found.endswith(", 7!")
        before, after = text[:-4].split(), found[:-4].split()
        for old, new in zip(before, after, strict=True):
            allowed = nearest.get(old.lower(), [old.lower()])
            assert new.lower() in allowed
            assert new[0].isupper() == old[0].isupper()


def test_a_word_at_the_place_of_a_capitalized_one_keeps_its_other_capitals(monkeypatch, tmp_path):
    changed(monkeypatch, REPLACED=1.0, BROKEN=0.0)
    vocabulary = tmp_path / "cased.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "NATO", "USA", "went"]))
    tokenizer = transformers.BertTokenizer(str(vocabulary), do_lower_case=False)
    augmented = Augmentation([("USA",)], tiny.teacher(transformers.BertModel), tokenizer)
    assert {augmented.text("USA", random.Random(seed)) for seed in range(50)} == {"NATO", "Went"}


def test_broken_texts_have_a_word_dropped_or_two_swapped(family, monkeypatch):
    changed(monkeypatch, REPLACED=0.0, BROKEN=1.0)
    augmented = Augmentation(ROWS, *family)
    text = "one two three four"
    found = {augmented.text(text, random.Random(seed)) for seed in range(200)}
    lost = {"two three four", "one three four", "one two four"}  # the last one has no word after it
    assert found == lost | {"two one three four", "one three two four", "one two four three"}
    assert augmented.text("one two", random.Random(0)) == "one two"


def test_nothing_changes_where_nothing_is_to(family, monkeypatch):
    changed(monkeypatch, REPLACED=0.0, BROKEN=0.0)
    augmented = Augmentation(ROWS, *family)
    assert [augmented.row(row, random.Random(0)) for row in ROWS] == ROWS


@pytest.mark.parametrize("kind", augmentation.KINDS)
def test_pairs(kind, monkeypatch, tmp_path):
    changed(monkeypatch, KINDS={kind: 1}, REPLACED=1.0)
    augmented = Augmentation(PAIRS, tiny.teacher(transformers.BertModel), tiny.bert_tokenizer(tmp_path))
    generator = random.Random(0)
    seconds = {second for _, second in PAIRS}
    for first, second in PAIRS:
        one, other = augmented.row((first, second), generator)
        if kind == "copy":
            assert one in (first, second)
            assert other not in (first, second)
        elif kind == "stranger":
            assert one == first
            assert other in seconds
        else:
            assert (one == first) == (kind == "second")
            assert (other == second) == (kind == "first")


def test_a_seed_gives_the_same_texts(family):
    augmented = [Augmentation(ROWS, *family) for _ in range(2)]
    first, again, other = (
        [one.row(row, generator) for row in ROWS]
        for one, generator in zip((*augmented, augmented[0]), map(random.Random, (0, 0, 1)), strict=True)
    )
    assert first == again != other


@pytest.mark.parametrize(("known", "found"), [("fox", {"fox": 5}), ("7", {})])
def test_a_tokenizer_that_knows_fewer_than_two_words_changes_none(known, found, tmp_path, monkeypatch):
    changed(monkeypatch, REPLACED=1.0, BROKEN=0.0)
    monkeypatch.setattr(tiny, "TEXT", known)
    teacher, tokenizer = tiny.teacher(transformers.BertModel), tiny.bert_tokenizer(tmp_path)
    assert whole_words(tokenizer) == found
    assert Augmentation([("a fox",)], teacher, tokenizer).row(("a fox",), random.Random(0)) == ("a fox",)
