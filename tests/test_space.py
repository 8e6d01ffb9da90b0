"""The Space in a real browser: what a visitor types is answered by both models. Needs what `browser.py` says."""

import shutil

import pytest
import torch
from browser import ask, chromium, served
from tiny import bert_tokenizer, gpt2_tokenizer, perturb, teacher
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    RobertaForMaskedLM,
    pipeline,
)

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import save_folder

pytestmark = pytest.mark.slow


def best(task, **settings):
    def answer(model, tokenizer, text):
        found = pipeline(task, model=model, tokenizer=tokenizer, **settings)(text)[0]
        return found.get("label") or found.get("token_str") or found["generated_text"]

    return answer


def similarity(model, tokenizer, *texts):
    one, other = (model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in texts)
    return f"{torch.cosine_similarity(one, other).item():.3f}"


@pytest.mark.parametrize(
    ("dense_class", "texts", "expected"),
    [
        (BertForSequenceClassification, ["the quick fox"], best("text-classification")),
        (BertForMaskedLM, ["the quick [MASK] fox"], best("fill-mask")),
        (RobertaForMaskedLM, ["the quick <mask> fox"], best("fill-mask")),
        (GPT2LMHeadModel, ["the"], best("text-generation", max_new_tokens=40, do_sample=False)),
        (BertModel, ["the quick fox", "a lazy dog"], similarity),
    ],
)
@torch.no_grad()
def test_both_models_answer(dense_class, texts, expected, tmp_path):
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver")
    pytest.importorskip("gradio")
    pytest.importorskip("selenium")
    is_bert = dense_class is not GPT2LMHeadModel
    dense = teacher(dense_class, **({"max_position_embeddings" if is_bert else "n_positions": 64}))
    if dense_class is RobertaForMaskedLM:
        tokenizer = bert_tokenizer(tmp_path, ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "<mask>"))
    else:
        tokenizer = (bert_tokenizer if is_bert else gpt2_tokenizer)(tmp_path)
    student = perturb(compress(dense, "7.7x" if is_bert else "kngpt2").model, seed=3)
    folders = [
        save_folder(tmp_path / name, model, tokenizer) for name, model in (("student", student), ("bert", dense))
    ]
    with served(*folders) as address, chromium() as driver:
        sides = ask(driver, address, texts)
    assert [side.name for side in sides] == ["student", "bert"]
    for side, model in zip(sides, (student, dense), strict=True):
        assert side.answer == expected(model, tokenizer, *texts)
        assert side.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert side.milliseconds < 60_000
