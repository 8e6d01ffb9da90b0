"""The values of the terms, and that neither padding nor the split into batches changes them."""

import copy

import pytest
import tiny
import torch
import transformers
from distilling import ALL_TERMS, assert_same_step, collate, examples, make_trainer, one_step, pair
from transformers import BertForSequenceClassification, BertModel, ElectraForPreTraining, GPT2LMHeadModel

from kronecker_transformers import compress
from kronecker_transformers.distillation import LOSSES, OBJECTIVES
from kronecker_transformers.distillation.heads import outputs_of
from kronecker_transformers.distillation.recorder import Recorder
from kronecker_transformers.models import DENSE_CLASSES

PROJECTIONS = ("query", "key", "value", "q_lin", "k_lin", "v_lin", "attn.q", "attn.k", "attn.v", "c_attn")
BASES = [cls for cls in DENSE_CLASSES.values() if "For" not in cls.__name__ and "LMHead" not in cls.__name__]


@pytest.mark.parametrize("dense_class", DENSE_CLASSES.values(), ids=lambda cls: cls.__name__)
def test_gradient_accumulation_and_padding_change_nothing(dense_class, tmp_path):
    whole = one_step(dense_class, tmp_path)
    assert whole[1], "there are gradients to compare"
    parts = one_step(dense_class, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_step(parts, whole)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_other_sequence_labels_under_gradient_accumulation(problem_type, tmp_path):
    logs = []
    for arguments in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        labels = 1 if problem_type == "regression" else 3
        teacher, student = pair(
            BertForSequenceClassification, problem_type=problem_type, id2label={i: f"L{i}" for i in range(labels)},
            label2id={f"L{i}": i for i in range(labels)},
        )  # fmt: skip
        trainer = make_trainer(student, teacher, tmp_path, **arguments)
        with torch.no_grad():
            batch = collate(examples(student))
            expected = float(student.eval()(**batch).loss)
        trainer.train()
        assert trainer.state.log_history[0]["supervised"] == pytest.approx(expected, rel=1e-5)
        logs.append(trainer.state.log_history[0])
    for term in ("loss", "logits", "supervised"):
        assert logs[0][term] == pytest.approx(logs[1][term], rel=1e-5, abs=1e-6)


def divergence(student, teacher, temperature, binary=False):
    """T^2 KL of one example, mean over its positions."""
    if binary:  # of one logit for each position
        student, teacher = (torch.stack((x, torch.zeros_like(x)), -1) for x in (student, teacher))
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    return temperature**2 * float((p * (p / q).log()).sum(-1).mean())


def stock_scores(model, hidden_states):
    """Q K^T / sqrt(d) + bias of each layer, (batch, heads, length, length), from the states that go into it."""
    base, name = model.base_model, tiny.model_type(type(model))
    for i, state in enumerate(hidden_states[:-1]):
        if name == "gpt2":
            query, key, _ = base.h[i].attn.c_attn(base.h[i].ln_1(state)).split(state.shape[-1], -1)
        elif name == "distilbert":
            attention = base.transformer.layer[i].attention
            query, key = attention.q_lin(state), attention.k_lin(state)
        elif name == "mpnet":
            attention = base.encoder.layer[i].attention.attn
            query, key = attention.q(state), attention.k(state)
        else:
            attention = base.encoder.layer[i].attention.self
            query, key = attention.query(state), attention.key(state)
        query, key = (x.unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2) for x in (query, key))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        yield scores + base.encoder.compute_position_bias(state) if name == "mpnet" else scores


@pytest.mark.parametrize("dense_class", DENSE_CLASSES.values(), ids=lambda cls: cls.__name__)
def test_terms_against_the_stock_outputs_in_float64(dense_class, tmp_path):
    """Each sequence alone, without padding, through eager attention and the loss of transformers itself."""
    log, _ = one_step(dense_class, tmp_path, temperature=2.0)
    teacher, student = pair(dense_class)
    head = dense_class.__name__
    rows = examples(student)
    sums = dict.fromkeys(("embedding_mse", "hidden_mse", "attention_mse", "attention_kl", "pooled"), 0.0)
    sequences, logits = 0, 0.0
    for model in (student, teacher):
        model.double().eval().set_attn_implementation("eager")
    for row in rows:
        batch = {key: value for key, value in collate([row]).items() if key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            s, t = (m(**batch, output_hidden_states=True, output_attentions=True) for m in (student, teacher))
            scores = [list(stock_scores(m, o.hidden_states)) for m, o in ((student, s), (teacher, t))]
        binary = head == "ElectraForPreTraining"
        logits += sum(divergence(s[name][0], t[name][0], 2.0, binary) for name in s if "logits" in name) / (
            2 if "QuestionAnswering" in head else 1  # start and end count half each
        )
        for one in range(s.hidden_states[0].shape[0]):
            sequences += 1
            for mine, theirs in zip(*scores, strict=True):
                squares = (mine[one] - theirs[one]).square().mean(0)
                length = squares.shape[-1]
                visible = [(i, j) for i in range(length) for j in range(i + 1 if "GPT2" in head else length)]
                sums["attention_mse"] += sum(float(squares[i, j]) for i, j in visible) / len(visible)
            distances = [
                float((a[one] - b[one]).square().mean()) for a, b in zip(s.hidden_states, t.hidden_states, strict=True)
            ]
            sums["embedding_mse"] += distances[0]
            sums["hidden_mse"] += sum(distances[1:])
            for p, q in zip(t.attentions, s.attentions, strict=True):
                p, q = p[one], q[one]
                sums["attention_kl"] += float(torch.where(p > 0, p * (p / q).log(), 0).sum(-1).mean())
            u, v = (m.hidden_states[-1][one].mean(0) for m in (s, t))
            sums["pooled"] += 1 - float(u @ v / u.norm() / v.norm())
    for term, value in sums.items():
        assert log[term] == pytest.approx(value / sequences, rel=1e-4, abs=1e-6), term
    if "For" in head or "LMHead" in head:
        assert log["logits"] == pytest.approx(logits / len(rows), rel=1e-4, abs=1e-6)
    if ("For" in head or "LMHead" in head) and "QuestionAnswering" not in head:
        with torch.no_grad():
            stock_loss = student(**collate(rows)).loss
        assert log["supervised"] == pytest.approx(float(stock_loss), rel=1e-5)


@pytest.mark.parametrize(("dense_class", "looks_back"), [(BertModel, True), (transformers.MPNetModel, False)])
def test_attention_of_an_encoder_that_is_a_decoder_is_compared_where_it_looks(dense_class, looks_back, tmp_path):
    """MPNet does not heed is_decoder."""
    teacher, student = pair(dense_class, is_decoder=True)
    expected, rows = 0.0, examples(student)
    for row in rows:
        batch = {name: value for name, value in collate([row]).items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = [m.eval()(**batch, output_hidden_states=True).hidden_states for m in (student, teacher)]
            scores = [stock_scores(*each) for each in zip((student, teacher), states, strict=True)]
            for mine, theirs in zip(*scores, strict=True):
                squares = (mine[0] - theirs[0]).square().mean(0)
                seen = torch.ones_like(squares).tril() if looks_back else torch.ones_like(squares)
                expected += float(squares[seen.bool()].mean()) / len(rows)
    trainer = make_trainer(student, teacher, tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["attention_mse"] == pytest.approx(expected, rel=1e-4)


def test_question_answering_loss_is_the_stock_one_without_padding(tmp_path):
    teacher, student = pair(transformers.BertForQuestionAnswering)
    rows = [row for row in examples(student, 16) if len(row["input_ids"]) == 7]
    assert len(rows) == 2
    log = make_trainer(student, teacher, tmp_path, rows=rows, max_steps=1)
    with torch.no_grad():
        expected = float(student.eval()(**collate(rows)).loss)
    log.train()
    assert log.state.log_history[0]["supervised"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dense_class", BASES, ids=lambda cls: cls.__name__)
def test_scores_are_those_of_the_eager_attention(dense_class):
    teacher, student = pair(dense_class)
    for model in (teacher, student):
        batch = {key: value for key, value in collate(examples(model)).items() if key != "labels"}
        recorder = Recorder()
        recorder.attach(model)
        with torch.no_grad(), recorder.recording() as read:
            model(**batch)
        recorder.detach()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions
        assert len(read.attention) == len(attentions) == 3
        mask = batch["attention_mask"].bool()[:, None, None, :]
        if dense_class is transformers.GPT2Model:
            mask = mask & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool).tril()
        for layer, expected in zip(read.attention, attentions, strict=True):
            scores = layer.scores().masked_fill(~mask, torch.finfo(torch.float32).min)
            torch.testing.assert_close(scores.softmax(-1), expected)


@pytest.mark.parametrize("dense_class", BASES, ids=lambda cls: cls.__name__)
def test_relations_are_products_of_what_the_projections_give(dense_class):
    teacher, student = pair(dense_class)
    for model in (teacher, student):
        batch = {key: value for key, value in collate(examples(model)).items() if key != "labels"}
        outputs, recorder = [], Recorder()
        for name, module in model.named_modules():
            if name.endswith(PROJECTIONS):
                module.register_forward_hook(lambda module, inputs, output: outputs.append(output))  # noqa: B023
        recorder.attach(model)
        with torch.no_grad(), recorder.recording() as read:
            model(**batch)
        width, heads = model.config.hidden_size, model.config.num_attention_heads
        size = width // heads
        together = torch.cat(outputs, -1)  # query, key and value of each layer, one after the other
        assert together.shape[-1] == 3 * 3 * width
        for layer, projected in zip(read.attention, together.split(3 * width, -1), strict=True):
            relations = layer.relations()
            for place in range(3 * heads):
                part = projected[..., place * size : (place + 1) * size]
                torch.testing.assert_close(relations[:, place], part @ part.mT / size**0.5)


def test_scores_honour_a_scaling_by_layer():
    teacher, _ = pair(GPT2LMHeadModel, scale_attn_by_inverse_layer_idx=True)
    recorder = Recorder()
    recorder.attach(teacher)
    with recorder.recording() as read:
        teacher(input_ids=torch.tensor([[5, 6]]))
    assert [layer.scaling for layer in read.attention] == pytest.approx([8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3])


def test_loss_is_the_weighted_sum_of_the_logged_terms(tmp_path):
    log, _ = one_step(BertForSequenceClassification, tmp_path)
    expected = sum(weight * log[name.removesuffix("_weight")] for name, weight in ALL_TERMS.items())
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dense_class", [BertModel, transformers.BertForMultipleChoice, GPT2LMHeadModel])
def test_similarities_are_those_of_the_stock_model(dense_class, tmp_path):
    log, _ = one_step(dense_class, tmp_path, objective="sentence_encoder", similarity_kl_weight=3.0)
    teacher, student = pair(dense_class)
    embeddings = []
    for model in (student, teacher):
        batch = {key: value for key, value in collate(examples(student)).items() if key != "labels"}
        with torch.no_grad():
            hidden = model.double().eval()(**batch, output_hidden_states=True).hidden_states[-1]
        rows = zip(hidden, batch["attention_mask"].flatten(0, -2).bool(), strict=True)
        embeddings.append(torch.stack([states[real].mean(0) for states, real in rows]))
    q, p = ((torch.cosine_similarity(x[:, None], embeddings[1][None], dim=-1) / 0.05).softmax(-1) for x in embeddings)
    assert log["similarity_kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    weights = {**OBJECTIVES["sentence_encoder"], "similarity_kl": 3.0}
    assert log["loss"] == pytest.approx(sum(weight * log[term] for term, weight in weights.items()), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_presets_use_their_terms_only(objective, tmp_path):
    dense_class = {"kngpt2": GPT2LMHeadModel, "sentence_encoder": BertModel}.get(
        objective, BertForSequenceClassification
    )
    log, _ = one_step(dense_class, tmp_path, objective=objective)
    assert set(LOSSES) & log.keys() == set(OBJECTIVES[objective])
    expected = sum(weight * log[term] for term, weight in OBJECTIVES[objective].items())
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_teacher_is_not_run_where_labels_alone_count(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    for module in (teacher, teacher.base_model):
        module.register_forward_pre_hook(lambda *_: pytest.fail("the teacher runs"))
    others = {key: 0.0 for key in ALL_TERMS if key != "supervised_weight"}
    trainer = make_trainer(student, teacher, tmp_path, max_steps=1, **others)
    expected = float(copy.deepcopy(student).eval()(**collate(examples(student))).loss.detach())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_papers_objectives():
    assert set(OBJECTIVES["kronecker_bert"]) == {"embedding_mse", "attention_mse", "hidden_mse", "logits", "supervised"}
    assert set(OBJECTIVES["kngpt2"]) == {"embedding_mse", "attention_kl", "hidden_mse", "supervised"}


@pytest.mark.parametrize("layer_map", [[0, 2], [1, 0]])
def test_layer_map_compares_the_layers_it_names(layer_map, tmp_path):
    teacher = tiny.teacher(BertModel)
    student = compress(tiny.teacher(BertModel, seed=1, num_hidden_layers=2), {"pooler.dense": (8, 4, 1)}).model
    trainer = make_trainer(
        student.eval(), teacher, tmp_path, max_steps=1, layer_map=layer_map, objective="sentence_encoder",
        hidden_mse_weight=1.0, attention_kl_weight=1.0,
    )  # fmt: skip
    batch = collate(examples(student))
    hidden, attention = 0.0, 0.0
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        s, t = (m(**batch, output_hidden_states=True, output_attentions=True) for m in (student, teacher))
    for mine, theirs in enumerate(layer_map):
        for b, n in enumerate(batch["attention_mask"].sum(-1).tolist()):
            difference = s.hidden_states[mine + 1][b, :n] - t.hidden_states[theirs + 1][b, :n]
            hidden += float(difference.square().mean()) / len(batch["input_ids"])
            q, p = (x[b, :, :n, :n].double() for x in (s.attentions[mine], t.attentions[theirs]))
            attention += float((p * (p / q).log()).sum(-1).mean()) / len(batch["input_ids"])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["hidden_mse"] == pytest.approx(hidden, rel=1e-4)
    assert log["attention_kl"] == pytest.approx(attention, rel=1e-4)


@pytest.mark.parametrize("layer_map", [[0, 1], [2, 0], [1, 2]])
def test_layers_of_gpt2_are_compared_before_its_last_norm_unless_both_are_the_last(layer_map, tmp_path):
    teacher = tiny.teacher(GPT2LMHeadModel)
    student = compress(tiny.teacher(GPT2LMHeadModel, seed=1, n_layer=2), {"wte": (72, 16, 1)}).model
    arguments = {"hidden_mse_weight": 1.0, **{key: 0.0 for key in ALL_TERMS if key != "hidden_mse_weight"}}
    trainer = make_trainer(student.eval(), teacher, tmp_path, max_steps=1, layer_map=layer_map, **arguments)
    rows, states = examples(student), {}
    for model in (student, teacher):
        for name, module in ((str(i), block) for i, block in enumerate(model.transformer.h)):
            module.register_forward_hook(lambda m, a, o, key=(model, name): states.update({key: o}))
        module = model.transformer.ln_f
        module.register_forward_hook(lambda m, a, o, key=(model, "normed"): states.update({key: o}))
    expected = 0.0
    for row in rows:
        with torch.no_grad():
            for model in (student, teacher):
                model(input_ids=torch.tensor([row["input_ids"]]))
        for mine, theirs in enumerate(layer_map):
            names = ("normed", "normed") if (mine, theirs) == (1, 2) else (str(mine), str(theirs))
            outputs = [states[key] for key in zip((student, teacher), names, strict=True)]
            s, t = (o[0] if isinstance(o, tuple) else o for o in outputs)
            expected += float((s - t).square().mean()) / len(rows)
    trainer.train()
    assert trainer.state.log_history[0]["hidden_mse"] == pytest.approx(expected, rel=1e-4)


def test_multiple_choice_without_its_logits(tmp_path):
    log, _ = one_step(transformers.BertForMultipleChoice, tmp_path)
    less, _ = one_step(transformers.BertForMultipleChoice, tmp_path, **{**ALL_TERMS, "logits_weight": 0.0})
    assert "logits" not in less
    for term in ("hidden_mse", "attention_kl", "supervised"):
        assert less[term] == pytest.approx(log[term], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_labels_of_replaced_words_may_be_truth_values(dtype):
    """As the stock model takes them: `ids != original`."""
    model = tiny.teacher(ElectraForPreTraining)
    inputs = tiny.inputs(model)
    labels = (inputs["input_ids"] % 2).to(dtype)
    output, head = model(**inputs, labels=labels), outputs_of(model)[0]
    inputs = {**inputs, "labels": labels}
    assert head.count(inputs) == int(inputs["attention_mask"].sum()) < labels.numel()
    assert float(head.supervised(output.logits, inputs)) / head.count(inputs) == pytest.approx(float(output.loss))
