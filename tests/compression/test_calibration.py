import copy
import re
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import TEXT, as_family, bert_tokenizer, gpt2_tokenizer, teacher, texts, tokenizer_for
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertJapaneseTokenizer,
    BertModel,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    ElectraForPreTraining,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    MPNetModel,
    RobertaForTokenClassification,
    XLMRobertaForQuestionAnswering,
)
from transformers.pytorch_utils import Conv1D

from kronecker_transformers import commands, compress, describe
from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.cli import main
from kronecker_transformers.compression import activations, calibration, search
from kronecker_transformers.compression import compress as compress_module
from kronecker_transformers.compression import outputs as outputs_module
from kronecker_transformers.compression.activations import CalibrationBatch, calibration_batches, layers_of, word_counts
from kronecker_transformers.compression.calibration import calibrate
from kronecker_transformers.compression.outputs import HeldOutOutputs
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.evaluation.cost import recorded_errors

BERT_PLAN = {
    "embeddings.word_embeddings": (64, 8),
    "encoder.layer.*.attention.self.*": (8, 16),
    "encoder.layer.*.attention.output.dense": (32, 1, 3),
    "encoder.layer.*.intermediate.dense": (6, 2, 2),
    "encoder.layer.*[0-9].output.dense": (4, 12),
    "pooler.dense": (16, 8),
}
GPT2_PLAN = {"wte": (72, 4), "h.*.attn.c_attn": (12, 8), "h.*.mlp.c_fc": (96, 1, 4), "h.[12].mlp.c_proj": (8, 12, 2)}


TEACHERS = {
    "bert": BertForSequenceClassification, "distilbert": DistilBertForMaskedLM, "electra": ElectraForPreTraining,
    "gpt2": GPT2LMHeadModel, "mpnet": MPNetModel, "roberta": RobertaForTokenClassification,
    "xlm-roberta": XLMRobertaForQuestionAnswering,
}  # fmt: skip


@pytest.fixture(params=TEACHERS)
def family(request, tmp_path):
    """A teacher with a head, its tokenizer and a plan."""
    name = request.param
    plan = GPT2_PLAN if name == "gpt2" else as_family(BERT_PLAN, name)
    return teacher(TEACHERS[name]), tokenizer_for(name, tmp_path), plan


@torch.no_grad()
def output_rows(model, name, batch):
    """What a module puts out in a forward pass of the whole model, without padding; the pooler has a row a sequence."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output))
    model(batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    return found[0] if found[0].ndim == 2 else found[0][batch.real]


def judge_outputs(monkeypatch, *values):
    """Let the outputs of a student, before and after calibration, have these errors."""
    found = iter(values)
    monkeypatch.setattr(HeldOutOutputs, "lost", lambda self, model: next(found))


@pytest.mark.parametrize("outputs", [[0.2, 0.1], [0.1, 0.2]], ids=["better", "worse"])
def test_errors_are_those_of_whole_forward_passes_on_held_out_text(family, outputs, monkeypatch):
    dense, tokenizer, plan = family
    judge_outputs(monkeypatch, *([value] for value in outputs))
    batches = calibration_batches(texts(), tokenizer, dense)
    student = compress(dense, plan).model
    errors = calibrate(dense, student, batches)
    held_out = [batch for batch in batches if batch.held_out]
    assert errors.keys() == {name.removesuffix(".A") for name, _ in student.named_parameters() if name.endswith(".A")}
    better = 0
    for name, found in errors.items():
        if "embeddings." in name or "wte" in name:
            continue
        wanted, given = [], []
        for batch in held_out:
            wanted.append(output_rows(dense, name, batch))
            given.append(output_rows(student, name, batch))
        wanted, given = torch.cat(wanted), torch.cat(given)
        error = (given - wanted).norm() / (wanted - wanted.mean(0)).norm()
        assert found.calibrated == pytest.approx(error.item(), rel=1e-3), name
        assert found.calibrated <= found.nearest
        better += found.calibrated < found.nearest
    assert better > len(errors) / 2 if outputs[0] > outputs[1] else better == 0


def test_hidden_states_come_nearer(family, monkeypatch):
    dense, tokenizer, plan = family
    judge_outputs(monkeypatch, [0.2], [0.1])
    nearest = compress(dense, plan).model.base_model
    calibrated = compress(dense, plan, calibration=texts(), tokenizer=tokenizer).model.base_model
    (batch, *_) = calibration_batches(texts(seed=1), tokenizer, dense)
    wanted, *given = (
        m(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[batch.real]
        for m in (dense.base_model, nearest, calibrated)
    )
    distance = [(states - wanted).square().mean().item() for states in given]
    assert distance[1] < distance[0]


def test_teacher_is_unchanged_and_the_result_the_same_twice(family):
    dense, tokenizer, plan = family
    dense.train()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    states = [compress(dense, plan, calibration=texts(), tokenizer=tokenizer).model.state_dict() for _ in range(2)]
    assert dense.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_layers_that_do_worse_on_held_out_text_keep_their_nearest_factors(family, monkeypatch):
    dense, tokenizer, plan = family
    nearest = compress(dense, plan).model
    student = copy.deepcopy(nearest)
    real = calibration.calibrated_kronecker
    monkeypatch.setattr(
        calibration, "calibrated_kronecker", lambda *a: real(*a)._replace(bias=torch.full_like(real(*a).bias, 9))
    )
    errors = calibrate(dense, student, calibration_batches(texts(), tokenizer, dense))
    state = nearest.state_dict()
    for name, value in student.state_dict().items():
        if "word_embeddings" not in name and "wte" not in name and "lm_head" not in name:
            assert torch.equal(value, state[name]), name
    assert all(e.calibrated == e.nearest for name, e in errors.items() if "embedding" not in name and "wte" not in name)


def test_frequent_words_come_nearer():
    dense = teacher(BertModel)
    student = compress(dense, {"embeddings.word_embeddings": (64, 8)}).model
    W = dense.get_input_embeddings().weight

    def distances():
        return (student.embeddings.word_embeddings.to_dense() - W).norm(dim=1)

    before = distances()
    ids = torch.tensor([5, 9, 11]).repeat(12, 10)
    batches = [CalibrationBatch(ids, torch.ones_like(ids), held_out) for held_out in (False, True)]
    (error,) = calibrate(dense, student, batches).values()
    assert distances()[[5, 9, 11]].square().sum() < before[[5, 9, 11]].square().sum()
    squared = W[[5, 9, 11]].square().sum()
    assert error.nearest == pytest.approx((before[[5, 9, 11]].square().sum() / squared).sqrt().item(), rel=1e-4)
    assert error.calibrated == pytest.approx((distances()[[5, 9, 11]].square().sum() / squared).sqrt().item(), rel=1e-4)


def test_the_words_that_more_text_has_get_the_product_of_their_own():
    dense = teacher(BertModel)
    W = dense.get_input_embeddings().weight
    rare, frequent = torch.tensor([20, 21, 22, 23]), torch.tensor([8, 9, 13, 15])
    batches = [
        CalibrationBatch(ids.repeat(12, 10), torch.ones(12, 40, dtype=torch.int64), held_out)
        for ids, held_out in ((rare, False), (frequent, True))
    ]
    counts = torch.zeros(64, dtype=torch.float64).index_fill_(0, frequent, 900)
    lost = {}
    for name, known in (("counted", counts), ("not counted", None)):
        student = compress(dense, {"embeddings.word_embeddings": (64, 1, 2, 4, 4)}).model
        calibrate(dense, student, batches, counts=known)
        table = student.embeddings.word_embeddings
        assert (table.frequent.words.tolist() == frequent.tolist()) == (name == "counted")
        lost[name] = (table.to_dense() - W)[frequent].norm() / W[frequent].norm()
    assert lost["counted"] < 1e-3  # four words, and a product of rank four
    assert lost["not counted"] > 0.5


def test_words_count_by_a_power_of_their_number_in_more_text(monkeypatch):
    judge_outputs(monkeypatch, [0.2], [0.1])
    dense = teacher(BertModel)
    W = dense.get_input_embeddings().weight.detach().double()
    counts = torch.arange(64, dtype=torch.float64) ** 2
    ids = torch.arange(44, 64).repeat(12, 2)  # the words that counts have most often
    batches = [CalibrationBatch(ids, torch.ones_like(ids), held_out) for held_out in (False, True)]
    student = compress(dense, {"embeddings.word_embeddings": (64, 1, 4)}).model
    (error,) = calibrate(dense, student, batches, counts=counts).values()
    assert error.calibrated < error.nearest
    _, _, V = torch.linalg.svd((counts + 1).pow(1 / 3).unsqueeze(1) * W)  # squared: a power of 2/3
    expected = W @ V[:4].T @ V[:4]
    torch.testing.assert_close(student.embeddings.word_embeddings.to_dense().double(), expected, atol=1e-5, rtol=1e-4)


def test_words_are_counted_in_texts_and_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_COUNTED_AT_ONCE", 3)
    tokenizer = bert_tokenizer(tmp_path)
    counted = [*texts(7), ("the fox", "the dog"), "the " * 900]
    plain = [part for text in counted for part in ([text] if isinstance(text, str) else text)]
    expected = Counter(token for text in plain for token in tokenizer.encode(text))
    found = word_counts(counted, tokenizer, teacher(BertModel))
    assert {index: count for index, count in enumerate(found.tolist()) if count} == expected


def test_a_student_that_does_worse_as_a_whole_keeps_its_nearest_factors(family, monkeypatch, caplog):
    dense, tokenizer, plan = family
    nearest = compress(dense, plan).model
    student = copy.deepcopy(nearest)
    judge_outputs(monkeypatch, [0.2, 0.4], [0.25, 0.38])
    errors = calibrate(dense, student, calibration_batches(texts(), tokenizer, dense))
    state = nearest.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert all(error.calibrated == error.nearest for error in errors.values())
    assert (
        "no nearer to its teacher on held-out text than the nearest factors (errors of its outputs: 0.250, 0.380, near"
        in (caplog.text)
    )


def test_a_classifier_is_judged_by_its_hidden_states(tmp_path, caplog):
    """Its logits on some held-out texts may say nothing."""
    dense = teacher(BertForSequenceClassification)
    with torch.no_grad():
        dense.classifier.weight.zero_()
    found = compress(dense, BERT_PLAN, calibration=texts(150), tokenizer=bert_tokenizer(tmp_path))
    assert "no nearer" not in caplog.text
    assert any(layer.output_error < layer.nearest_output_error for layer in found.report.layers)


def test_outputs_are_compared_up_to_scale_and_mean(tmp_path):
    dense = teacher(BertModel)
    batches = calibration_batches(texts(), bert_tokenizer(tmp_path), dense)
    judged = HeldOutOutputs(dense, batches)
    assert judged.lost(dense) == pytest.approx([0, 0], abs=1e-3)
    student = compress(dense, BERT_PLAN).model
    hidden = []
    for model in (dense, student):
        rows = [
            model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[batch.real]
            for batch in batches
            if batch.held_out
        ]
        hidden.append(torch.cat(rows).detach().numpy())
    # tokens in one column each way: the correlation of all entries, every feature centred
    ours, theirs = ((x - x.mean(0)).ravel() for x in hidden)
    error = (1 - np.corrcoef(ours, theirs)[0, 1] ** 2) ** 0.5
    assert judged.lost(student)[0] == pytest.approx(error, rel=1e-4)
    # the means of the tokens of each text, without padding, are the second kind
    means = []
    for model in (dense, student):
        rows = [
            model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[i, : int(mask.sum())].mean(0)
            for batch in batches
            if batch.held_out
            for i, mask in enumerate(batch.attention_mask)
        ]
        means.append(torch.stack(rows).detach().numpy())
    ours, theirs = ((x - x.mean(0)).ravel() for x in means)
    correlation = np.corrcoef(ours, theirs)[0, 1]
    assert judged.lost(student)[1] == pytest.approx((1 - correlation**2) ** 0.5, rel=1e-4)
    against = copy.deepcopy(student)
    with torch.no_grad():
        for layer in against.encoder.layer[-1].output.LayerNorm.parameters():
            layer.mul_(-1)
    assert judged.lost(against)[1] == pytest.approx((1 + correlation**2) ** 0.5, rel=1e-4)
    with torch.no_grad():
        for layer in student.encoder.layer[-1].output.LayerNorm.parameters():
            layer.mul_(3)
    assert judged.lost(student)[0] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_outputs_that_say_nothing_are_lost(value, tmp_path):
    dense = teacher(BertModel)
    judged = HeldOutOutputs(dense, calibration_batches(texts(), bert_tokenizer(tmp_path), dense))
    broken = copy.deepcopy(dense)
    torch.nn.init.constant_(broken.encoder.layer[-1].output.LayerNorm.weight, value)
    assert judged.lost(broken) == pytest.approx([1, 1], abs=0.05)  # what is left of a constant is rounding


def test_words_that_the_text_does_not_repeat_keep_the_nearest_factors():
    dense = teacher(BertModel)
    student = compress(dense, {"embeddings.word_embeddings": (64, 8)}).model
    before = student.embeddings.word_embeddings.to_dense()
    batches = []
    for held_out, words in ((False, [5, 9, 11]), (True, list(range(20, 50)))):
        ids = torch.tensor(words).repeat(12, 30 // len(words))
        batches.append(CalibrationBatch(ids, torch.ones_like(ids), held_out))
    (error,) = calibrate(dense, student, batches).values()
    assert error.calibrated == error.nearest
    assert torch.equal(student.embeddings.word_embeddings.to_dense(), before)


def test_types_count_by_the_text_and_positions_all_the_same(monkeypatch, tmp_path):
    dense, tokenizer = teacher(BertModel), bert_tokenizer(tmp_path)
    judge_outputs(monkeypatch, [0.2], [0.1])
    plan = {"embeddings.position_embeddings": (40, 1, 5), "embeddings.token_type_embeddings": (2, 8)}
    student = compress(dense, plan).model
    before = student.embeddings.position_embeddings.to_dense()
    errors = calibrate(dense, student, calibration_batches(["the fox"] * 40, tokenizer, dense))
    assert errors.keys() == plan.keys()
    torch.testing.assert_close(student.embeddings.position_embeddings.to_dense(), before)
    assert errors["embeddings.token_type_embeddings"].calibrated < errors["embeddings.token_type_embeddings"].nearest


def test_a_model_without_layers_is_refused(tmp_path):
    dense = teacher(BertModel, num_hidden_layers=0)
    with pytest.raises(ValueError, match="num_hidden_layers=0 of the teacher leaves no layer to calibrate; leave"):
        compress(dense, {"pooler.dense": (8, 8)}, calibration=texts(), tokenizer=bert_tokenizer(tmp_path))


def test_cross_attention_keeps_its_nearest_factors(tmp_path):
    dense = teacher(BertModel, is_decoder=True, add_cross_attention=True)
    plan = {"encoder.layer.*.attention.self.*": (8, 16), "encoder.layer.*.crossattention.self.*": (8, 16)}
    nearest, result = (
        compress(dense, plan),
        compress(dense, plan, calibration=texts(), tokenizer=bert_tokenizer(tmp_path)),
    )
    state = nearest.model.state_dict()
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, state[name]) == ("attention.self" not in name or "cross" in name), name
    assert all((layer.output_error is None) == ("cross" in layer.name) for layer in result.report.layers)


def test_layers_in_chunks_are_refused(tmp_path):
    dense = teacher(BertModel, chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match="chunk_size_feed_forward=4 must be 0 for calibration"):
        compress(dense, BERT_PLAN, calibration=texts(), tokenizer=bert_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="chunk_size_feed_forward=4 must be 0 for calibration"):
        compress(dense, ratio=2, calibration=texts(), tokenizer=bert_tokenizer(tmp_path))


def test_words_that_the_embedding_does_not_have_are_refused(tmp_path):
    tokenizer = bert_tokenizer(tmp_path)
    dense = teacher(BertModel, vocab_size=16)
    with pytest.raises(ValueError, match="the tokenizer gives token 20, but the model's embedding has 16 rows; use"):
        calibration_batches(texts(), tokenizer, dense)


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path):
    tokenizer, dense = bert_tokenizer(tmp_path), teacher(BertModel)
    words = (TEXT.split() * 6)[:100]
    batches = calibration_batches([" ".join(words), *["the fox"] * 9, "  "], tokenizer, dense, length=20)
    rows = [row[real] for batch in batches for row, real in zip(batch.input_ids, batch.real, strict=True)]
    assert sum(len(batch.input_ids) for batch in batches if batch.held_out) == len(rows) // 10
    assert max(map(len, rows)) == 20
    inner = sorted((row[1:-1].tolist() for row in rows), key=len)
    assert sum(map(len, inner)) == 100 + 9 * 2
    assert all((row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for row in rows)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_pairs_are_read_as_pairs(kind, tmp_path):
    """As a classifier of pairs reads them: divided, with types of tokens where the model has some, and cut alike."""
    tokenizer = bert_tokenizer(tmp_path)
    dense = teacher({"bert": BertForSequenceClassification, "distilbert": DistilBertForSequenceClassification}[kind])
    given = [*zip(texts()[:30], texts(seed=1)[:30], strict=True), ("the fox " * 40, "jumps"), *texts(seed=2)[:9]]
    found = {}
    for batch in calibration_batches(given, tokenizer, dense, length=24):
        inputs = batch.inputs("cpu")
        assert kind == "bert" or "token_type_ids" not in inputs
        for place, logits in enumerate(dense(**inputs).logits):
            found[tuple(batch.input_ids[place, batch.real[place]].tolist())] = logits
    for text in given:
        encoded = tokenizer(
            *(text if isinstance(text, tuple) else (text,)), truncation=True, max_length=24, return_tensors="pt",
            return_token_type_ids=kind == "bert",
        )  # fmt: skip
        torch.testing.assert_close(found.pop(tuple(encoded["input_ids"][0].tolist())), dense(**encoded).logits[0])
    assert not found


def test_unchanged_layers_need_not_be_computed_again(family):
    dense, tokenizer, _ = family
    judged = HeldOutOutputs(dense, calibration_batches(texts(), tokenizer, dense), keep_layers=True)
    damaged = copy.deepcopy(dense)
    last = layers_of(damaged.base_model)[1][-1]
    for parameter in last.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    calls = []
    layers = layers_of(damaged.base_model)[1]
    for layer in layers:
        linear = next(module for module in layer.modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
        linear.register_forward_hook(lambda *_: calls.append("computed"))
    whole, computed = judged.lost(damaged), len(calls)
    calls.clear()
    assert judged.lost(damaged, unchanged=len(layers) - 1) == whole
    assert len(calls) * len(layers) == computed > 0
    assert min(whole) > 0
    assert judged.lost(damaged) == whole  # and all is as it was


def test_what_a_classifier_of_pairs_loses_is_seen_on_pairs(tmp_path):
    """A student whose second token type is damaged loses nothing on single texts."""
    tokenizer, dense = bert_tokenizer(tmp_path), teacher(BertForSequenceClassification)
    damaged = copy.deepcopy(dense)
    damaged.bert.embeddings.token_type_embeddings.weight.data[1] += torch.linspace(-3, 3, damaged.config.hidden_size)
    pairs = list(zip(texts(), texts(seed=1), strict=True))
    (lost,), (nothing,) = (
        HeldOutOutputs(dense, calibration_batches(given, tokenizer, dense)).lost(damaged) for given in (pairs, texts())
    )
    assert lost > 0.1
    assert nothing < 1e-3


def test_a_causal_model_reads_pairs_as_two_lines(tmp_path):
    tokenizer, dense = gpt2_tokenizer(tmp_path), teacher(GPT2LMHeadModel)
    pairs = list(zip(texts(), texts(seed=1), strict=True))
    found = [
        calibration_batches(given, tokenizer, dense, length=16)
        for given in (pairs, ["\n".join(pair) for pair in pairs])
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_gpt2_sees_blocks(tmp_path):
    tokenizer, dense = gpt2_tokenizer(tmp_path), teacher(GPT2LMHeadModel)
    given = texts()
    batches = calibration_batches(given, tokenizer, dense, length=16)
    rows = [row[real] for batch in batches for row, real in zip(batch.input_ids, batch.real, strict=True)]
    assert {len(row) for row in rows} == {16}  # what is left makes no block, and nothing is padded
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in given)
    assert len(rows) == total // 16


def test_a_slow_tokenizer_loses_nothing_either(tmp_path):
    fast, dense = bert_tokenizer(tmp_path), teacher(BertModel)
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("\n".join(sorted(fast.get_vocab(), key=fast.get_vocab().get)))
    slow = BertJapaneseTokenizer(str(vocabulary), word_tokenizer_type="basic")
    assert not slow.is_fast
    given = [" ".join((TEXT.split() * 6)[start : start + 70]) for start in range(12)]
    found = [calibration_batches(given, tokenizer, dense, length=20) for tokenizer in (fast, slow)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.attention_mask, other.attention_mask)


def test_a_causal_classifier_without_a_padding_token_is_refused_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "measured_layers", lambda *a: pytest.fail("work began"))
    dense = teacher(GPT2ForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match=r"has no pad_token_id in its config.*; set model\.config\.pad_token_id"):
        compress(dense, ratio=1.4, calibration=texts(), tokenizer=gpt2_tokenizer(tmp_path))


def test_of_much_held_out_text_every_length_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs_module, "PROBE_TOKENS", 150)
    dense, seen = teacher(BertModel), []
    dense.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    given = [" ".join((TEXT.split() * 6)[:number]) for number in range(1, 31) for _ in range(10)]
    batches = calibration_batches(given, bert_tokenizer(tmp_path), dense, length=40)
    HeldOutOutputs(dense, batches)
    lengths = [int(row.sum()) for mask in seen for row in mask]
    held_out = [int(row.sum()) for batch in batches if batch.held_out for row in batch.attention_mask]
    assert 75 < sum(lengths) <= 150 < sum(held_out)
    assert min(lengths) < 10 < 25 < max(lengths)
    assert abs(np.mean(lengths) - np.mean(held_out)) < 2


@pytest.mark.parametrize(("dense_class", "bounded"), [(BertForMaskedLM, True), (BertModel, False)])
def test_the_logits_of_a_vocabulary_that_are_kept_are_bounded(dense_class, bounded, tmp_path, monkeypatch):
    dense = teacher(dense_class)
    monkeypatch.setattr(outputs_module, "PROBE_VALUES", 100 * dense.config.vocab_size)
    batches = calibration_batches(texts(400), bert_tokenizer(tmp_path), dense)
    held_out = sum(int(batch.attention_mask.sum()) for batch in batches if batch.held_out)
    rows = len(HeldOutOutputs(dense, batches)._wanted[0])
    assert rows <= 100 < held_out if bounded else rows == held_out > 100


def test_distances_of_positions_count_all_the_same(tmp_path):
    dense, tokenizer = teacher(MPNetModel), tokenizer_for("mpnet", tmp_path)
    rows = len(dense.encoder.relative_attention_bias.weight)
    plan = {"encoder.relative_attention_bias": (rows, 1, 1)}
    result = compress(dense, plan, calibration=texts(), tokenizer=tokenizer)
    nearest = compress(dense, plan).model
    ours, expected = (m.encoder.relative_attention_bias.to_dense() for m in (result.model, nearest))
    torch.testing.assert_close(ours, expected)


def test_bad_calibration_text_is_refused(family):
    dense, tokenizer, plan = family
    with pytest.raises(ValueError, match="0 texts gives 0 sequences of at most 40 tokens; at least 10 are needed"):
        compress(dense, plan, calibration=["", " "], tokenizer=tokenizer)
    with pytest.raises(TypeError, match="one string; give a list of strings"):
        compress(dense, plan, calibration="the fox", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="calibration text 1 is of type int; give strings, or tuples of two"):
        compress(dense, plan, calibration=["a", 3], tokenizer=tokenizer)
    with pytest.raises(TypeError, match="calibration text 0 is of type tuple; give strings, or tuples of two"):
        compress(dense, plan, calibration=[("a", "b", "c")], tokenizer=tokenizer)
    with pytest.raises(TypeError, match="calibration text 0 is of type tuple; give strings, or tuples of two"):
        compress(dense, plan, calibration=[("a", 3)], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"calibration needs the teacher's tokenizer; pass it as tokenizer="):
        compress(dense, plan, calibration=texts())
    few = [CalibrationBatch(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.long), i < 3) for i in range(10)]
    with pytest.raises(ValueError, match=r"of 20 tokens is too little: .* has 96 inputs, .* give at least 5 times"):
        calibrate(dense, compress(dense, plan).model, few)


def test_too_few_sequences_to_compare_classifiers_on_are_refused(tmp_path):
    """One alone, with its mean taken away, would say that nothing is lost."""
    classifier, tokenizer = teacher(BertForSequenceClassification), bert_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"leaves 1 held-out sequences to .* at least 3 are needed; give some"):
        search_plan(classifier, texts()[:12], ratio=2, tokenizer=tokenizer)


@pytest.mark.parametrize("plan", ["search", {"encoder.layer.*[0-9].output.dense": (4, 16)}])
def test_too_little_text_is_refused_before_the_work(plan, tmp_path, monkeypatch):
    for module, name in ((search, "measured_layers"), (compress_module, "nearest_kronecker")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("work began"))
    dense = teacher(BertModel, intermediate_size=2048)
    with pytest.raises(ValueError, match=r"too little: the largest layer has 2,048 inputs"):
        compress(dense, plan, calibration=texts()[:30], tokenizer=bert_tokenizer(tmp_path))


def test_activations_that_overflow_are_refused(tmp_path):
    dense = teacher(BertModel)
    with torch.no_grad():
        dense.encoder.layer[1].intermediate.dense.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"layer 'intermediate.dense': .* NaN or infinite activations"):
        compress(dense, BERT_PLAN, calibration=texts(), tokenizer=bert_tokenizer(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    dense = teacher(BertModel, dtype=dtype)
    result = compress(dense, BERT_PLAN, calibration=texts(), tokenizer=bert_tokenizer(tmp_path))
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_little_text_is_told(tmp_path, caplog):
    dense, tokenizer = teacher(BertModel), bert_tokenizer(tmp_path)
    wanted = 8 * 96
    for number, tokens in ((40, "[0-9]+"), (150, None)):
        caplog.clear()
        compress(dense, ratio=2, calibration=texts(number), tokenizer=tokenizer)
        search_plan(dense, texts(number), ratio=2, tokenizer=tokenizer)
        told = re.findall(
            rf"calibration text of {tokens} tokens is little: {wanted} are better, 8 for each", caplog.text
        )
        assert len(told) == (2 if tokens else 0)


def test_as_much_text_is_read_as_the_teacher_needs(tmp_path, monkeypatch, capsys):
    teacher(BertModel, intermediate_size=1024).save_pretrained(tmp_path / "bert")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "bert")
    (tmp_path / "lines.txt").write_text("\n".join(texts(3000)))
    seen = []

    def stop(*args, **options):
        seen.append(options.get("calibration") or args[1])
        raise ValueError("seen")

    for name in ("compress", "search_plan"):
        monkeypatch.setattr(commands, name, stop)
    command = [
        str(tmp_path / "bert"),
        "--calibration",
        str(tmp_path / "lines.txt"),
        "--output",
        str(tmp_path / "a.yaml"),
    ]
    for arguments in (["compress", *command], ["search", *command, "--ratio", "2"]):
        assert main(arguments) == 1
        assert main([*arguments, "--calibration-texts", "30"]) == 1
    tokens = [sum(map(len, bert_tokenizer(tmp_path)(found).input_ids)) for found in seen]
    for enough, asked in (tokens[:2], tokens[2:]):
        assert enough == pytest.approx(8 * 1024, rel=0.1)
        assert asked < 700
    assert seen[1] == texts(3000)[:30]


def test_command_line(tmp_path, capsys):
    teacher(BertForSequenceClassification).save_pretrained(tmp_path / "bert")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "bert")
    (tmp_path / "lines.txt").write_text("\n".join(texts()))
    command = ["compress", str(tmp_path / "bert"), "--plan", "7.7x", "--calibration", str(tmp_path / "lines.txt")]
    assert main([*command, "--calibration-texts", "70", "--output", str(tmp_path / "student")]) == 0
    shown = capsys.readouterr()
    assert "nearest" in shown.out
    assert "calibrated" in shown.out
    assert "calibrating" in shown.err
    model, _ = load_student(tmp_path / "student")
    record = recorded_errors(tmp_path / "student", describe(model).factors_sha256)
    assert all(e.keys() == {"relative_error", "output_error", "nearest_output_error"} for e in record.values())
    wanted = compress(tmp_path / "bert", "7.7x", calibration=texts()[:70]).model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())

    assert main(["inspect", str(tmp_path / "student")]) == 0
    assert capsys.readouterr().out.rstrip() == shown.out[: shown.out.index("Saved in")].rstrip()
    assert main([*command, "--calibration-texts", "3", "--output", str(tmp_path / "none")]) == 1
    assert "3 texts gives 3 sequences" in capsys.readouterr().err
    assert main([*command, "--calibration-texts", "-1", "--output", str(tmp_path / "none")]) == 1
    assert "calibration-texts=-1 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
