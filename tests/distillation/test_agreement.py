"""What a student is worth beside its teacher, against plain loops."""

import math

import pytest
import tiny
import torch
from distilling import collate, examples, pair
from scipy.stats import spearmanr
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ElectraForPreTraining,
    GPT2LMHeadModel,
)

from kronecker_transformers.distillation.agreement import judge_for


@torch.no_grad()
def test_next_words_and_perplexity_are_those_of_a_loop_over_the_words_that_count(tmp_path):
    teacher, student = pair(GPT2LMHeadModel)
    ids = torch.randint(0, 70, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": x, "labels": x.clone(), "attention_mask": torch.ones_like(x)} for x in ids]
    batches[0]["labels"][0, 5:] = -100
    same, losses = [], []
    for batch in batches:
        theirs, ours = (model.eval()(input_ids=batch["input_ids"]).logits for model in (teacher, student))
        for row, labels in enumerate(batch["labels"].tolist()):
            for place, word in enumerate(labels[1:]):
                if word != -100:
                    same.append(int(theirs[row, place].argmax()) == int(ours[row, place].argmax()))
                    losses.append(-float(ours[row, place].log_softmax(-1)[word]))
    judge = judge_for(teacher, tiny.gpt2_tokenizer(tmp_path), [], batches, 9)
    expected = {"perplexity": math.exp(sum(losses) / len(losses)), "next words as the teacher's": sum(same) / len(same)}
    assert 0 < expected["next words as the teacher's"] < 1
    assert judge(student) == pytest.approx(expected, rel=1e-5)
    assert judge(teacher)["next words as the teacher's"] == 1


def decided(model, row, name, problem):
    """What a model decides of one example, alone and so without padding."""
    found = model(**{key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask")})
    if "QuestionAnswering" in name:
        return [(int(found.start_logits.argmax()), int(found.end_logits.argmax()))]
    logits = found.logits[0]
    if "Token" in name:
        return logits.argmax(-1).tolist()
    if "Masked" in name:
        return [int(logits[place].argmax()) for place, label in enumerate(row["labels"]) if label != -100]
    if "Electra" in name or problem == "multi_label_classification":
        return (logits > 0).tolist()
    return logits.tolist() if problem == "regression" else [int(logits.argmax())]


@torch.no_grad()
@pytest.mark.parametrize(
    ("dense_class", "changes", "told"),
    [
        (BertForQuestionAnswering, {}, "answers as the teacher's"),
        (BertForTokenClassification, {}, "labels of tokens as the teacher's"),
        (BertForMaskedLM, {}, "masked words as the teacher's"),
        (BertForSequenceClassification, {}, "labels as the teacher's"),
        (BertForMultipleChoice, {}, "choices as the teacher's"),
        (BertForSequenceClassification, {"problem_type": "multi_label_classification"}, "labels as the teacher's"),
        (BertForSequenceClassification, {"problem_type": "regression", "num_labels": 1},
         "scores (Spearman with the teacher's)"),
        (ElectraForPreTraining, {}, "words as the teacher's"),
    ],
)  # fmt: skip
def test_decisions_are_those_of_each_example_alone(dense_class, changes, told, tmp_path):
    teacher, student = (model.eval() for model in pair(dense_class, **changes))
    rows = [
        row for row in examples(teacher, count=40) if row["input_ids"][0] != row["input_ids"][1]
    ]  # of equal choices
    batches = [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]
    judge = judge_for(teacher, tiny.tokenizer_for(teacher.config.model_type, tmp_path), [], batches, 16)
    problem = changes.get("problem_type")
    theirs, ours = (
        [decided(model, row, dense_class.__name__, problem) for row in rows] for model in (teacher, student)
    )
    flat = [(a, b) for one, other in zip(theirs, ours, strict=True) for a, b in zip(one, other, strict=True)]
    expected = sum(a == b for a, b in flat) / len(flat)
    if problem == "regression":
        expected = spearmanr(*zip(*flat, strict=True)).statistic
    assert 0 < expected < 1
    assert judge(student)[told] == pytest.approx(expected, abs=1e-6)
    assert judge(teacher)[told] == 1
