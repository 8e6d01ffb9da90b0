import random
import string

import evaluate
import pytest

from kronecker_transformers.tasks.squad_metric import SquadMetric, score_answer

BOTH = ("v1.1", "v2.0")
# prediction, gold answers, versions, exact, F1
CASES = [
    ("The Cat", ["cat"], BOTH, 1, 1),
    ("a cat and an owl", ["cat and owl"], BOTH, 1, 1),
    ("theory another", ["ory nother"], BOTH, 0, 0),  # articles are whole words
    ("\u00a0a\u00a0cat \n sat ", ["cat sat"], BOTH, 1, 1),
    ("don't", ["dont"], BOTH, 1, 1),
    ("$1,000.50", ["100050"], BOTH, 1, 1),
    ("the-cat", ["thecat"], BOTH, 1, 1),  # punctuation goes first, and no article is left
    ("(A) cat", ["cat"], BOTH, 1, 1),
    ("CAFÉ", ["café"], BOTH, 1, 1),
    ("cafe", ["café"], BOTH, 0, 0),
    ("“cat”", ["cat"], BOTH, 0, 0),  # only ASCII punctuation is removed
    ("1\u20132", ["12"], BOTH, 0, 0),
    ("x x y", ["x y y"], BOTH, 0, 2 / 3),
    ("x x", ["x"], BOTH, 0, 2 / 3),
    ("cat sat", ["sat cat"], BOTH, 0, 1),
    ("new york", ["york", "new york city"], BOTH, 0, 0.8),
    ("york city", ["york", "new", "york city"], BOTH, 1, 1),
    ("york", ["york city", "new york city"], BOTH, 0, 2 / 3),
    ("", ["cat"], BOTH, 0, 0),
    ("the", ["cat"], BOTH, 0, 0),
    ("", ["The"], ("v1.1",), 1, 0),
    ("", ["The"], ("v2.0",), 1, 1),
    ("an", ["The"], ("v2.0",), 1, 1),
    ("cat", ["The"], ("v2.0",), 0, 0),
    ("", ["the", "cat"], ("v1.1",), 1, 0),
    ("", ["the", "cat"], ("v2.0",), 0, 0),  # "the" is dropped
    ("cat", ["the", "cat"], BOTH, 1, 1),
    ("", [], ("v2.0",), 1, 1),
    ("the!", [], ("v2.0",), 1, 1),
    ("cat", [], ("v2.0",), 0, 0),
]


@pytest.mark.parametrize(
    ("prediction", "golds", "version", "exact", "f1"), [(*c[:2], version, *c[3:]) for c in CASES for version in c[2]]
)
def test_official_rules(prediction, golds, version, exact, f1):
    assert score_answer(prediction, golds, version) == (exact, pytest.approx(f1))


def plain_score(prediction, gold):
    """Exact match and F1 by their definitions, word by word."""
    predicted, wanted = (
        [w for w in text.lower().split() if w not in ("a", "an", "the")] for text in (prediction, gold)
    )
    rest, common = list(wanted), 0
    for word in predicted:
        if word in rest:
            rest.remove(word)
            common += 1
    if not common:
        return predicted == wanted, 0
    precision, recall = common / len(predicted), common / len(wanted)
    return predicted == wanted, 2 * precision * recall / (precision + recall)


def test_random_answers_score_as_by_definition():
    generator = random.Random(0)
    for _ in range(300):
        prediction, *golds = (
            " ".join(generator.choices(["the", "An", "x", "Y", "zz"], k=generator.randint(1, 6))) + " end"
            for _ in range(generator.randint(2, 4))
        )
        exact, f1 = (max(column) for column in zip(*(plain_score(prediction, gold) for gold in golds), strict=True))
        noisy = "".join(c + generator.choice(["", "", generator.choice(string.punctuation)]) for c in prediction)
        for version in BOTH:
            assert score_answer(noisy, golds, version) == (exact, pytest.approx(f1))


def rows(answers):
    predictions = [{"id": name, "prediction_text": prediction} for name, (prediction, _) in answers.items()]
    references = [
        {"id": name, "answers": {"text": golds, "answer_start": [0] * len(golds)}}
        for name, (_, golds) in reversed(answers.items())
    ]
    return predictions, references


def test_v1_in_per_cent():
    predictions, references = rows(
        {"q1": ("the cat", ["cat"]), "q2": ("x x y", ["no", "x y y"]), "q3": ("dog", ["cat"]), "q4": ("", ["An"])}
    )
    expected = {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 4)}
    assert SquadMetric("v1.1").compute(predictions=predictions, references=references) == expected


def test_v2_in_per_cent_with_both_kinds_of_questions():
    predictions, references = rows(
        {
            "exact": ("the cat", ["cat"]),
            "partial": ("x x y", ["x y y"]),
            "false negative": ("", ["cat"]),
            "article only": ("", ["The"]),
            "true negative": ("", []),
            "false positive": ("cat", []),
        }
    )
    metric = SquadMetric("v2.0")
    for prediction, reference in zip(predictions, references, strict=True):  # in pieces, and not by pairs
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute() == {
        "exact": 50.0,
        "f1": pytest.approx(100 * (3 + 2 / 3) / 6),
        "total": 6,
        "HasAns_exact": 50.0,
        "HasAns_f1": pytest.approx(100 * (2 + 2 / 3) / 4),
        "HasAns_total": 4,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
    }


@pytest.mark.parametrize(("golds", "absent"), [(["cat"], "NoAns"), ([], "HasAns")])
def test_v2_says_nothing_of_questions_that_are_not_there(golds, absent):
    predictions, references = rows({"q": ("cat", golds)})
    results = SquadMetric("v2.0").compute(predictions=predictions, references=references)
    assert len(results) == 6
    assert not any(name.startswith(absent) for name in results)


def test_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    predictions, references = rows({"q": ("cat", ["cat"])})
    for version in BOTH:
        metric = SquadMetric(version)
        for _ in range(2):
            assert metric.compute(predictions=predictions, references=references)["f1"] == 100
    assert not list(tmp_path.iterdir())


def test_questions_and_predictions_must_be_the_same():
    predictions, references = rows({"q1": ("cat", ["cat"]), "q2": ("dog", ["cat"])})
    other = [predictions[0], {"id": "q3", "prediction_text": ""}]
    bad = [
        (predictions[:1], references, "1 of 2 questions have no prediction, 'q2' first"),
        (other, references, "1 of 2 questions have no prediction, 'q2' first"),
        (predictions, references[1:], "1 of 2 questions have no reference, 'q2' first"),
        (
            predictions + predictions[:1],
            references,
            "3 predictions 2; there must be one or more, each with an id of its",
        ),
        (predictions, references + references[:1], "3 references have 2 ids"),
        ([], [], "0 references have 0 ids"),
    ]
    metric = SquadMetric("v1.1")
    for some_predictions, some_references, message in bad:
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=some_predictions, references=some_references)
    assert metric.compute(predictions=predictions, references=references)["exact_match"] == 50  # nothing was kept


def test_v1_has_no_questions_without_answers():
    with pytest.raises(ValueError, match=r"gold_answers is empty; a question of v1.1 has at least one"):
        score_answer("", [], "v1.1")


@pytest.mark.parametrize("version", ["2.0", "v3.0", None])
def test_unknown_version(version):
    with pytest.raises(ValueError, match=f"config_name is {version!r}; SQuAD has the versions 'v1.1' and 'v2.0'"):
        SquadMetric(version)
