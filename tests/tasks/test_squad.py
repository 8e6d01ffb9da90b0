import json
import math
import re
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertForQuestionAnswering,
    GPT2ForQuestionAnswering,
    GPT2Tokenizer,
    Trainer,
    TrainingArguments,
)

from kronecker_transformers.tasks import squad
from kronecker_transformers.tasks.squad import (
    WindowCollator,
    evaluation_features,
    load_squad,
    read_squad_file,
    training_features,
)
from kronecker_transformers.tasks.squad_answers import Candidate, answers_from_logits, best_threshold
from kronecker_transformers.tasks.squad_metric import SquadMetric

CONTEXT = (
    "  The quick brown foxa, in 1912,\njumps over the lazy doga — and a small  model learns what a large café knows "
)
SHORT = "over the lazy dog"


def gpt2_tokenizer(folder):
    """Unlike `tiny.gpt2_tokenizer`, of all bytes: also of the line break between question and context."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny.TEXT], trainer)
    tokenizer.model.save(str(folder))
    return GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<pad>")


@pytest.fixture(params=["bert", "gpt2"])
def tokenizer(request, tmp_path):
    return (tiny.bert_tokenizer if request.param == "bert" else gpt2_tokenizer)(tmp_path)


def example(answer, context=CONTEXT, question=" what  the fox\n", name="q"):
    """A question with its answer; None for an impossible one."""
    answers = (
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"id": name, "title": "", "context": context, "question": question, "answers": answers}


def columns(*examples):
    return {name: [row[name] for row in examples] for name in examples[0]}


# Reading


def squad_json(version, *, context=SHORT, answer="lazy", start=9, **question):
    qa = {"id": "q1", "question": "Which dog?", "answers": [{"text": answer, "answer_start": start}], **question}
    more = {"id": "q2", "question": "Where?", "answers": [{"text": "dog", "answer_start": 14}] * 2}
    if version == "v2.0":
        plausible = [{"text": "dog", "answer_start": 14}]
        more = {"id": "q2", "question": "Whose?", "answers": [], "plausible_answers": plausible, "is_impossible": True}
    return {
        "version": version,
        "data": [
            {"title": "Dogs", "paragraphs": [{"context": context, "qas": [qa, more]}, {"context": "", "qas": []}]},
            {"title": "Nothing", "paragraphs": []},
        ],
    }


@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_official_files(tmp_path, version):
    for split in ("train", "dev"):
        content = squad_json("1.1" if version == "v1.1" else version)
        content["data"][0]["title"] = split
        (tmp_path / f"{split}-{version}.json").write_text(json.dumps(content), encoding="utf-8")
    loaded = load_squad(version, tmp_path)
    assert {split: rows["title"][:] for split, rows in loaded.items()} == {
        "train": ["train", "train"],
        "validation": ["dev", "dev"],
    }
    first, second = loaded["train"]
    assert first == {
        "id": "q1",
        "title": "train",
        "context": SHORT,
        "question": "Which dog?",
        "answers": {"text": ["lazy"], "answer_start": [9]},
    }
    texts, starts = (["dog", "dog"], [14, 14]) if version == "v1.1" else ([], [])
    assert second["answers"] == {"text": texts, "answer_start": starts}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        ("{}", "field 'data' is missing"),
        (json.dumps({"data": [{"paragraphs": [{"qas": []}, {"qas": [{}]}]}]}), "field 'context' is missing"),
        (json.dumps(squad_json("1.1", answers=[])), "question 'q1' has no answers; only impossible ones may have none"),
        (json.dumps(squad_json("1.1", answers={"text": ["lazy"], "answer_start": [9]})), "must be a list of objects"),
        (json.dumps(squad_json("2.0", is_impossible="false")), "is_impossible of question 'q1' is 'false', not true"),
        (json.dumps(squad_json("1.1", question=None)), "question 'q1' or its context is not a text"),
    ],
)
def test_malformed_file(tmp_path, content, message):
    path = tmp_path / "train-v1.1.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_squad_file(path)
    assert str(caught.value).startswith(f"file {str(path)!r} is not in the format of SQuAD 1.1 or 2.0")
    assert str(caught.value).endswith("download or correct it")


@pytest.mark.parametrize("version", ["1.0", "2.0", 2.0, "v1.1", "KorQuAD_v1.0_train", None])
def test_files_of_other_versions_and_with_a_byte_order_mark(tmp_path, version):
    content = squad_json(version)
    if version is None:
        del content["version"]
    path = tmp_path / "mine.json"
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert read_squad_file(path)["id"][:] == ["q1", "q2"]


@pytest.mark.parametrize("wrong", [{"start": 8}, {"start": -3}, {"start": "9"}, {"answer": None}, {"answer": "cat"}])
def test_answers_that_are_elsewhere_are_dropped_and_counted(tmp_path, caplog, wrong):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad_json("1.1", **wrong)))
    assert read_squad_file(path).to_list() == [
        {"id": "q2", "title": "Dogs", "context": SHORT, "question": "Where?",
         "answers": {"text": ["dog"] * 2, "answer_start": [14] * 2}}
    ]  # fmt: skip
    assert (
        "1 of 3 answers are not where answer_start says and are dropped, the first in question 'q1'; 1 questions"
        in (caplog.text)
    )


def test_a_file_whose_answers_are_mostly_elsewhere_is_refused(tmp_path):
    path = tmp_path / "train.json"
    content = squad_json("1.1", start=8)
    content["data"][0]["paragraphs"][0]["qas"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has 0 questions to use, and 1 of 1 answers are not where answer_start says"):
        read_squad_file(path)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_question_that_is_longer_than_the_window_is_cut_and_named(family, tmp_path, caplog):
    tokenizer = (tiny.bert_tokenizer if family == "bert" else tiny.gpt2_tokenizer)(tmp_path)
    long = example("lazy", question="what the fox knows " * 40, name="much too long")
    features = training_features(columns(long, example("lazy", name="short")), tokenizer, max_length=96, stride=8)
    assert max(map(len, features["input_ids"])) <= 96
    assert "question 'much too long' has " in caplog.text
    assert "tokens and is cut to 64" in caplog.text
    assert "'short'" not in caplog.text
    first = features["input_ids"][0]
    if family == "bert":
        assert first.index(tokenizer.sep_token_id) == 1 + 64
    text = tokenizer.decode(first, skip_special_tokens=True)
    assert text.startswith("what the fox knows what the fox")


def test_missing_file_and_unknown_version(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-v2\.0\.json' does not exist; data_dir must hold the official"):
        load_squad("v2.0", tmp_path)
    with pytest.raises(ValueError, match=r"version is '2\.0'; SQuAD has the versions 'v1.1' and 'v2.0'; name one"):
        load_squad("2.0", tmp_path)


@pytest.mark.parametrize(("version", "name"), [("v1.1", "rajpurkar/squad"), ("v2.0", "rajpurkar/squad_v2")])
def test_hub(monkeypatch, version, name):
    monkeypatch.setattr(squad.datasets, "load_dataset", lambda asked: {"asked": asked})
    assert load_squad(version) == {"asked": name}

    def fail(asked):
        raise ConnectionError("no network")

    monkeypatch.setattr(squad.datasets, "load_dataset", fail)
    with pytest.raises(OSError, match=rf"'{name}' cannot be loaded from the Hub \(no network\); connect, or give"):
        load_squad(version)


# Windows


def plain_windows(tokenizer, row, max_length, stride):
    """Every window as (ids, label, characters of each token), by plain loops over the context's own tokens."""
    question = row["question"].strip() + ("" if tokenizer.sep_token else "\n")
    question = tokenizer(question, add_special_tokens=False)["input_ids"]
    context = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = context["input_ids"], context["offset_mapping"]
    before = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id] if tokenizer.cls_token else question
    after = [tokenizer.sep_token_id] if tokenizer.cls_token else []
    hit = []
    if row["answers"]["text"]:
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        wanted = {start + i for i, character in enumerate(text) if not character.isspace()}
        hit = [t for t, (low, high) in enumerate(offsets) if wanted & set(range(low, high))]
    room = max_length - len(before) - len(after)
    windows, begin = [], 0
    while True:
        part = range(begin, min(begin + room, len(ids)))
        label = (0, 0)
        if hit and hit[0] in part and hit[-1] in part:
            label = (len(before) + hit[0] - begin, len(before) + hit[-1] - begin)
        pairs = [None] * len(before) + [list(offsets[t]) for t in part] + [None] * len(after)
        windows.append(([*before, *(ids[t] for t in part), *after], label, pairs))
        if begin + room >= len(ids):
            return windows
        begin += room - stride


ANSWERS = [
    "The",
    "knows",
    "foxa, in 1912",
    "foxa",
    "  The quick",
    " doga ",
    "1912,\njumps over",
    "café",
    "—",
    CONTEXT,
    " ",
    None,
]


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(("max_length", "stride"), [(20, 3), (24, 10), (20, 0), (400, 128)])
def test_windows_equal_those_of_plain_loops(tokenizer, padding_side, max_length, stride):
    tokenizer.padding_side = padding_side
    rows = [example(answer, name=f"q{i}") for i, answer in enumerate(ANSWERS)]
    rows.append(example("lazy", SHORT, "over?", "short"))
    rows[2]["answers"]["text"].append("quick")  # only the first answer counts
    rows[2]["answers"]["answer_start"].append(6)
    expected = [(row, *window) for row in rows for window in plain_windows(tokenizer, row, max_length, stride)]
    assert (len(expected) == len(rows)) == (max_length == 400)

    training = training_features(columns(*rows), tokenizer, max_length, stride)
    evaluation = evaluation_features(columns(*rows), tokenizer, max_length, stride)
    assert training["input_ids"] == evaluation["input_ids"] == [ids for _, ids, _, _ in expected]
    labels = list(zip(training["start_positions"], training["end_positions"], strict=True))
    assert labels == [label for _, _, label, _ in expected]
    assert evaluation["example_id"] == [row["id"] for row, *_ in expected]
    offsets = [[pair and list(pair) for pair in pairs] for pairs in evaluation["offset_mapping"]]
    assert offsets == [pairs for *_, pairs in expected]
    assert {*training} == {*tokenizer.model_input_names, "start_positions", "end_positions"}
    assert {*evaluation} == {*tokenizer.model_input_names, "example_id", "offset_mapping"}


def test_labels_give_the_answer_and_windows_miss_nothing(tokenizer):
    rows = [example(answer, name=answer) for answer in ("The", "brown", "lazy doga", "a small  model", "knows")]
    training = training_features(columns(*rows), tokenizer, 27, 8)
    evaluation = evaluation_features(columns(*rows), tokenizer, 27, 8)
    found, seen = set(), {row["id"]: set() for row in rows}
    for i, pairs in enumerate(evaluation["offset_mapping"]):
        answer = evaluation["example_id"][i]
        seen[answer] |= {character for pair in pairs if pair for character in range(*pair)}
        first, last = training["start_positions"][i], training["end_positions"][i]
        if (first, last) != (0, 0):
            found.add(answer)
            assert CONTEXT[pairs[first][0] : pairs[last][1]].strip() == answer
            ids = training["input_ids"][i][first : last + 1]
            assert "".join(tokenizer.decode(ids).split()) == "".join(
                (answer.lower() if tokenizer.cls_token else answer).split()
            )
    assert found == set(seen)
    visible = {i for i, character in enumerate(CONTEXT) if not character.isspace()}
    assert all(visible <= characters for characters in seen.values())


def test_gpt2_question_ends_with_a_line_break(tmp_path):
    tokenizer = gpt2_tokenizer(tmp_path)
    features = training_features(columns(example("lazy", SHORT, "  who?  ")), tokenizer)
    assert tokenizer.decode(features["input_ids"][0]) == "who?\nover the lazy dog"


def test_empty_context(tokenizer):
    rows = columns(example(None, ""), example(None, "  \n", name="q2"))
    assert training_features(rows, tokenizer, 40, 3)["start_positions"] == [0, 0]
    features = evaluation_features(rows, tokenizer, 40, 3)
    features = [dict(zip(features, row, strict=True)) for row in zip(*features.values(), strict=True)]
    logits = np.ones((2, 40))
    examples = [example(None, ""), example(None, "  \n", name="q2")]
    answers = answers_from_logits(examples, features, logits, logits)
    assert answers.predictions == {"q": "", "q2": ""}
    assert answers.n_best == {name: [Candidate("", 2.0, 1.0)] for name in ("q", "q2")}
    assert answers.null_odds == {"q": math.inf, "q2": math.inf}
    answers = answers_from_logits(examples, features, logits, logits, no_answer_threshold=None)
    assert (answers.predictions, answers.n_best) == ({"q": "", "q2": ""}, {"q": [], "q2": []})


@pytest.mark.parametrize(
    ("question", "max_length", "stride", "message"),
    [
        ("the fox", 25, 20, "stride is 20, and a question of 2 tokens leaves 20 of max_length 25 to its context"),
        ("the fox", 25, -1, "stride is -1"),
        ("the " * 30, 25, 3, "a question of 30 tokens leaves -8 of max_length 25"),
    ],
)
def test_no_room_for_context(tmp_path, question, max_length, stride, message):
    rows = columns(example("lazy", SHORT, question))
    with pytest.raises(ValueError, match=f"{message}.*lower stride or raise max_length"):
        training_features(rows, tiny.bert_tokenizer(tmp_path), max_length, stride)


def test_slow_tokenizer():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(TypeError, match="tokenizer SlowTokenizer is slow; windows need a fast one"):
        evaluation_features(columns(example("lazy", SHORT)), SlowTokenizer())


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_collator_pads_on_the_right(tokenizer, padding_side):
    tokenizer.padding_side = padding_side
    rows = columns(example("lazy doga"), example("dog", SHORT))
    for features in (training_features(rows, tokenizer, 60, 9), evaluation_features(rows, tokenizer, 60, 9)):
        windows = [dict(zip(features, row, strict=True)) for row in zip(*features.values(), strict=True)]
        batch = WindowCollator(tokenizer)(windows)
        assert {*batch} == {*features} - {"example_id", "offset_mapping"}
        for i, window in enumerate(windows):
            length = len(window["input_ids"])
            assert batch["input_ids"][i, :length].tolist() == window["input_ids"]
            assert (batch["input_ids"][i, length:] == tokenizer.pad_token_id).all()
            assert batch["attention_mask"][i].sum() == batch["attention_mask"][i, :length].sum() == length
        if "start_positions" in features:
            assert batch["start_positions"].tolist() == features["start_positions"]
            assert batch["end_positions"].dtype == torch.long


# Answers


def plain_answers(examples, features, start, end, n_best, longest):
    """For each question its texts with their scores, best first, and the null score, by a loop over all spans."""
    result = {}
    for row in examples:
        texts, null = {}, math.inf
        for k, feature in enumerate(features):
            if feature["example_id"] != row["id"]:
                continue
            pairs, spans = feature["offset_mapping"], []
            null = min(null, start[k][0] + end[k][0])
            for i in range(len(pairs)):
                for j in range(i, min(len(pairs), i + longest)):
                    if pairs[i] and pairs[j]:
                        text = row["context"][pairs[i][0] : pairs[j][1]].strip()
                        spans.append((start[k][i] + end[k][j], text))
            for score, text in sorted(spans, reverse=True)[:n_best]:
                if text:
                    texts[text] = max(score, texts.get(text, -math.inf))
        result[row["id"]] = sorted(texts.items(), key=lambda item: -item[1])[:n_best], null
    return result


def questions_with_logits(tokenizer, as_dataset, fill=-100.0, seed=0):
    """Three questions of several windows, of unequal lengths, and random logits padded with `fill`."""
    examples = [
        example("The", name="many"),
        example(None, SHORT, name="one"),
        example("doga", CONTEXT[:70], "?", "two"),
    ]
    features = evaluation_features(columns(*examples), tokenizer, 30, 7)
    features = [dict(zip(features, row, strict=True)) for row in zip(*features.values(), strict=True)]
    assert len({len(feature["input_ids"]) for feature in features}) > 2
    logits = np.full((2, len(features), 37), fill, dtype=np.float32)
    generator = np.random.default_rng(seed)
    for k, feature in enumerate(features):
        length = len(feature["input_ids"])
        logits[:, k, :length] = generator.normal(scale=3, size=(2, length))
    if as_dataset:
        return Dataset.from_list(examples), Dataset.from_list(features), *logits
    return examples, features, *logits


@pytest.mark.parametrize("fill", [-100.0, 1e9, math.nan])
@pytest.mark.parametrize(("n_best", "longest"), [(20, 30), (1, 4), (5, 1), (1000, 1000)])
def test_answers_equal_those_of_a_loop_over_all_spans(tokenizer, fill, n_best, longest):
    examples, features, start, end = questions_with_logits(tokenizer, fill == 1e9, fill)
    expected = plain_answers(examples, features, start, end, n_best, longest)
    for threshold in (None, 0.0, -2.5, math.inf):
        answers = answers_from_logits(examples, features, start, end, n_best, longest, threshold)
        assert list(answers.predictions) == list(answers.n_best) == list(answers.null_odds) == list(expected)
        for name, (texts, null) in expected.items():
            candidates = texts if threshold is None else sorted([*texts, ("", null)], key=lambda item: -item[1])
            assert [candidate.text for candidate in answers.n_best[name]] == [text for text, _ in candidates]
            scores = np.array([score for _, score in candidates], dtype=np.float64)
            assert [c.score for c in answers.n_best[name]] == pytest.approx(scores)
            probabilities = np.exp(scores) / np.exp(scores).sum()
            assert [c.probability for c in answers.n_best[name]] == pytest.approx(probabilities)
            odds = null - texts[0][1]
            assert answers.null_odds[name] == pytest.approx(odds)
            is_empty = threshold is not None and odds > threshold
            assert answers.predictions[name] == ("" if is_empty else texts[0][0])


def test_threshold_itself_still_answers(tokenizer):
    inputs = questions_with_logits(tokenizer, as_dataset=False)
    odds = answers_from_logits(*inputs).null_odds
    for name, value in odds.items():
        assert answers_from_logits(*inputs, no_answer_threshold=value).predictions[name]
        assert not answers_from_logits(*inputs, no_answer_threshold=np.nextafter(value, -np.inf)).predictions[name]


def test_logits_may_be_lists_of_the_windows_own_lengths(tokenizer):
    examples, features, start, end = questions_with_logits(tokenizer, as_dataset=False)
    cut = [
        [row[: len(feature["input_ids"])].tolist() for row, feature in zip(rows, features, strict=True)]
        for rows in (start, end)
    ]
    assert answers_from_logits(examples, features, *cut) == answers_from_logits(examples, features, start, end)


def test_inputs_that_do_not_fit_together(tmp_path):
    examples, features, start, end = questions_with_logits(tiny.bert_tokenizer(tmp_path), as_dataset=False)
    broken = start.copy()
    broken[0, 1] = np.nan
    bad = [
        (
            (examples, features, start[1:], end),
            {},
            f"features has {len(features)} windows, start_logits {len(end) - 1}",
        ),
        ((examples[1:], features, start, end), {}, "example_id 'many' of features is not in examples"),
        ((examples, features[:1], start[:1], end[:1]), {}, "2 of 3 questions have no window in features, 'one' first"),
        ((examples + examples[:1], features, start, end), {}, "4 examples have 3 ids; ids must be unique"),
        ((examples, features, start[:, :9], end), {}, "logits of question 'many' are 9 and 30 for 30 tokens"),
        ((examples, features, broken, end), {}, "are not finite"),
        ((examples, features, start, end), {"n_best": 0}, "n_best is 0; it must be at least 1"),
        ((examples, features, start, end), {"max_answer_length": -1}, "max_answer_length is -1"),
    ]
    for arguments, options, message in bad:
        with pytest.raises(ValueError, match=message):
            answers_from_logits(*arguments, **options)


@pytest.mark.parametrize("seed", range(4))
def test_best_threshold_beats_all_others(seed):
    generator = np.random.default_rng(seed)
    words = ["cat", "dog", "the", "owl"]
    examples, n_best, odds = [], {}, {}
    for i in range(25):
        gold = [" ".join(generator.choice(words, 2))] if generator.random() < 0.6 else []
        examples.append({"id": f"q{i}", "answers": {"text": gold, "answer_start": [0] * len(gold)}})
        best = Candidate(" ".join(generator.choice(words, 2)), 1.0, 0.5)
        null = float(generator.integers(-6, 6)) / 2  # many ties
        n_best[f"q{i}"] = sorted([best, Candidate("", 1 + null, 0.5)], key=lambda candidate: -candidate.score)
        odds[f"q{i}"] = null
    n_best["q3"], odds["q3"] = [Candidate("", 1.0, 1.0)], math.inf

    def results(threshold):
        texts = {name: next((c.text for c in candidates if c.text), "") for name, candidates in n_best.items()}
        predictions = [
            {"id": name, "prediction_text": "" if odds[name] > threshold else text} for name, text in texts.items()
        ]
        return SquadMetric("v2.0").compute(predictions=predictions, references=examples)

    tried = {threshold: results(threshold) for threshold in [-math.inf, *sorted(set(odds.values()))]}
    best = best_threshold(n_best, odds, Dataset.from_list(examples) if seed else examples)
    for name, score, threshold in (("exact", *best[:2]), ("f1", *best[2:])):
        assert score == pytest.approx(max(result[name] for result in tried.values()))
        assert tried[threshold][name] == pytest.approx(score)


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [([], "cat", (100, -math.inf, 100, -math.inf)), (["cat"], "cat", (100, 2.5, 100, 2.5))],
)
def test_threshold_of_one_question(gold, prediction, expected):
    examples = [{"id": "q", "answers": {"text": gold, "answer_start": [0] * len(gold)}}]
    n_best = {"q": [Candidate("", 3.5, 0.9), Candidate(prediction, 1.0, 0.1)]}
    assert best_threshold(n_best, {"q": 2.5}, examples) == expected


# All together


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_from_features_to_scores_with_a_trainer(tmp_path, family):
    if family == "bert":
        tokenizer, model = tiny.bert_tokenizer(tmp_path), tiny.teacher(BertForQuestionAnswering)
    else:
        tokenizer, model = gpt2_tokenizer(tmp_path), tiny.teacher(GPT2ForQuestionAnswering, vocab_size=300)
        tokenizer.padding_side = "left"
    examples = Dataset.from_list(
        [example("dog", SHORT, name="short"), example("lazy doga", name="long"), example(None, name="impossible")]
    )
    make = partial(evaluation_features, tokenizer=tokenizer, max_length=24, stride=9)
    features = examples.map(make, batched=True, remove_columns=examples.column_names)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, data_collator=WindowCollator(tokenizer))
    start, end = trainer.predict(features).predictions
    assert start.shape == (len(features), 24)
    with torch.no_grad():
        single = [model(**WindowCollator(tokenizer)([feature])) for feature in features]
    expected = answers_from_logits(
        examples, features, [output.start_logits[0] for output in single], [output.end_logits[0] for output in single]
    )
    answers = answers_from_logits(examples, features, start, end)
    assert answers.predictions == expected.predictions
    assert answers.null_odds == pytest.approx(expected.null_odds, abs=1e-4)
    threshold = best_threshold(answers.n_best, answers.null_odds, examples)
    answers = answers_from_logits(examples, features, start, end, no_answer_threshold=threshold.f1_threshold)
    results = SquadMetric("v2.0").compute(
        predictions=[{"id": name, "prediction_text": text} for name, text in answers.predictions.items()],
        references=[{"id": row["id"], "answers": row["answers"]} for row in examples],
    )
    assert results["f1"] == pytest.approx(threshold.f1)
