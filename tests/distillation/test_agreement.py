"""What a student is worth beside its teacher, against plain loops."""

import math

import pytest
import tiny
import torch
from distilling import pair
from transformers import GPT2LMHeadModel

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
