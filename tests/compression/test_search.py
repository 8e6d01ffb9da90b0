import copy

import pytest
import torch
from students import CAN_EXPORT, factorable_modules
from tiny import bert_tokenizer, gpt2_tokenizer, teacher, texts, tokenizer_for
from transformers import (
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2LMHeadModel,
)

from kronecker_transformers import KroneckerBertConfig, compress, describe
from kronecker_transformers.cli import main
from kronecker_transformers.compression import latency, search
from kronecker_transformers.compression.activations import calibration_batches, word_counts
from kronecker_transformers.compression.candidates import STEP, Candidate, MeasuredLayer, influences
from kronecker_transformers.compression.latency import LatencyTable, Runtime
from kronecker_transformers.compression.moments import kronecker_product
from kronecker_transformers.compression.plan_file import read_plan, write_plan
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.display import plan_picture, plan_table
from kronecker_transformers.evaluation.cost import REPORT_LENGTH
from kronecker_transformers.models import FACTORED_CLASSES
from kronecker_transformers.models.factor_plan import FactorEntry, FactorPlan
from kronecker_transformers.models.kronecker_blocks import BLOCK
from kronecker_transformers.models.kronecker_contraction import multiplications
from kronecker_transformers.models.kronecker_family import family_of
from kronecker_transformers.models.kronecker_layers import kronecker_linear
from kronecker_transformers.models.kronecker_nearest import nearest_kronecker


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    tokenizer = bert_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    dense = teacher(BertForSequenceClassification, max_position_embeddings=REPORT_LENGTH)
    return dense, tokenizer, search_plan(dense, texts(), ratio=2.5, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    tokenizer = gpt2_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    dense = teacher(GPT2LMHeadModel, n_positions=REPORT_LENGTH)
    return dense, tokenizer, search_plan(dense, texts(), ratio=2.5, tokenizer=tokenizer)


def size(model):
    return sum(parameter.numel() for parameter in model.base_model.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_budget_is_used_and_the_counts_are_true(family, request):
    dense, _, found = request.getfixturevalue(family)
    student = compress(dense, found.plan).model
    assert found.dense_parameters == size(dense)
    assert found.parameters == size(student)
    assert 0.99 <= found.parameters / (size(dense) / 2.5) <= 1
    assert found.flops == describe(student.base_model).factored.linear_flops
    noise = sum(x.influence * x.chosen.error**2 / (1 - x.chosen.error**2) for x in found.layers)
    assert found.error == pytest.approx((noise / (1 + noise)) ** 0.5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_low_rank_alone(family, request):
    dense, tokenizer, other = request.getfixturevalue(family)
    found = search_plan(dense, texts(), ratio=2.5, low_rank=True, tokenizer=tokenizer)
    entries = found.plan.values()
    assert entries
    assert all(entry.n1 == 1 and weight[0] == entry.m1 for entry, weight in zip(entries, _weights(found), strict=True))
    assert 0.99 <= found.parameters / (size(dense) / 2.5) <= 1
    assert found.error >= other.error - 1e-9  # a part of what the other has searched
    result = compress(dense, "low-rank", ratio=2.5, calibration=texts(), tokenizer=tokenizer)
    assert result.search.plan == found.plan


def _weights(found):
    return [layer.weight for layer in found.layers if layer.name in found.plan]


def test_every_layer_is_there(bert, gpt2):
    config = KroneckerBertConfig.from_dense(bert[0].config, {})
    names = [name for name in factorable_modules(config) if "token_type" not in name]
    assert [layer.name for layer in bert[2].layers] == names
    assert [layer.name for layer in gpt2[2].layers[:4]] == ["wte", "wpe", "h.0.attn.c_attn", "h.0.attn.c_proj"]
    assert len(gpt2[2].layers) == 2 + 3 * 4


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_searched_plan_beats_one_with_equal_ranks(family, request):
    dense, tokenizer, found = request.getfixturevalue(family)
    equal = {
        layer.name: (layer.weight[0], 1, max(1, int(layer.weight[0] * layer.weight[1] / 2.5 / sum(layer.weight))))
        for layer in found.layers
    }
    batch = tokenizer(texts(30, seed=5), padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()

    def outputs(model):  # those that count
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if "Classification" in type(model).__name__:
            return model.base_model(**inputs).last_hidden_state[real]
        return model(**inputs).logits[real]

    wanted = outputs(dense)
    students = [compress(dense, plan, calibration=texts(), tokenizer=tokenizer).model for plan in (found.plan, equal)]
    assert size(students[0]) <= 1.02 * size(students[1])
    errors = [outputs(student) - wanted for student in students]
    distance = [(error - error.mean(0)).norm().item() for error in errors]  # a bias would mend the mean
    assert distance[0] < distance[1]


def test_influences_follow_what_the_head_uses(bert, tmp_path):
    influence = {layer.name: layer.influence for layer in bert[2].layers}
    assert influence["pooler.dense"] > influence["encoder.layer.2.attention.self.query"] > 0
    tokenizer = bert_tokenizer(tmp_path)
    found = search_plan(teacher(BertForPreTraining), texts(), ratio=2.5, tokenizer=tokenizer)
    assert {layer.name: layer.influence for layer in found.layers}["pooler.dense"] > 0
    for dense_class in (BertModel, BertForTokenClassification):
        found = search_plan(teacher(dense_class), texts(), ratio=2.5, tokenizer=tokenizer)
        influence = {layer.name: layer.influence for layer in found.layers}
        assert influence.get("pooler.dense", 0) == 0, dense_class  # the last hidden states are what counts


@pytest.mark.parametrize("dense_class", FACTORED_CLASSES, ids=lambda dense_class: dense_class.__name__)
def test_influences_are_measured_with_any_head(dense_class, tmp_path):
    dense = teacher(dense_class)
    tokenizer = tokenizer_for(dense.config.model_type, tmp_path)
    W = dense.get_input_embeddings().weight
    A, B, _ = nearest_kronecker(W, len(W), 1, 4)
    errors = 0.1**0.5, 0.5**0.5
    words = family_of(dense).words
    layers = [MeasuredLayer(words, W, [], (A, B, None), error) for error in errors]
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    one, two = influences(dense, layers, calibration_batches(texts(), tokenizer, dense), progress=False)
    assert 0 < one < float("inf")
    noise = [STEP**2 * error**2 / (1 - STEP**2 * error**2) for error in errors]
    assert one * noise[0] == pytest.approx(two * noise[1])
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_of_a_classifier_hidden_states_count(tmp_path):
    """What its layers lose is seen in them, whatever its head makes of it; what its pooler loses, in the logits.

    A layer has a part of its probe's error, as if it were a mean of both weights.
    """
    tokenizer, dense = bert_tokenizer(tmp_path), teacher(BertForSequenceClassification)
    batches = calibration_batches(texts(), tokenizer, dense)
    names = ["embeddings.word_embeddings", "encoder.layer.1.output.dense", "pooler.dense"]
    layers = []
    for name in names:
        W = dense.base_model.get_submodule(name).weight
        A, B, _ = nearest_kronecker(W, len(W), 1, 4)
        layers.append(MeasuredLayer(name, W, [], (A, B, None), 1 / (2**0.5 * STEP)))  # noise over signal is 1
    found = influences(dense, layers, batches, progress=False)

    @torch.no_grad()
    def seen(model):
        held_out = [batch for batch in batches if batch.held_out]
        return torch.cat([model.base_model(**batch.inputs("cpu")).last_hidden_state[batch.real] for batch in held_out])

    wanted = seen(dense)
    for name, influence in zip(names[:2], found[:2], strict=True):
        damaged = copy.deepcopy(dense)
        module = damaged.base_model.get_submodule(name)
        probe = kronecker_product(*nearest_kronecker(module.weight, len(module.weight), 1, 4)[:2]).float()
        module.weight.data = (1 - STEP) * module.weight.data + STEP * probe
        a, b = ((states - states.mean(0)).flatten().double() for states in (wanted, seen(damaged)))
        share = float(a @ b / (a.norm() * b.norm())) ** 2  # of the variance that is kept
        assert influence == pytest.approx((1 - share) / share, rel=1e-3)
    dense.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    again = influences(dense, layers, batches, progress=False)
    assert again[:2] == found[:2]
    assert again[2] != found[2] > 0


def test_a_tied_head_counts(tmp_path):
    tied, tokenizer = teacher(GPT2LMHeadModel), gpt2_tokenizer(tmp_path)
    untied = teacher(GPT2LMHeadModel, tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    found = []
    for dense in (tied, untied):
        A, B, _ = nearest_kronecker(dense.transformer.wte.weight, 72, 1, 4)
        layer = MeasuredLayer("wte", dense.transformer.wte.weight, [], (A, B, None), 1)
        found += influences(dense, [layer], calibration_batches(texts(), tokenizer, dense), progress=False)
    assert found[0] > 1.2 * found[1]


def test_presets_stand_beside_the_frontier(bert, gpt2):
    assert bert[2].presets.keys() == {"7.7x", "21x"}
    assert gpt2[2].presets.keys() == {"kngpt2"}
    for (dense, _, found), preset in ((bert, "7.7x"), (gpt2, "kngpt2")):
        parameters, error = found.presets[preset]
        assert parameters == size(compress(dense, preset).model)
        best = min(e for p, e in found.frontier if p <= parameters)
        assert best <= error * (1 + 1e-9)
    sizes, errors = zip(*bert[2].frontier, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(errors) == sorted(errors, reverse=True)


def test_other_budgets(bert):
    dense, tokenizer, _ = bert
    parameters = size(dense) // 3
    by_bytes = search_plan(dense, texts(), size_bytes=4 * parameters, tokenizer=tokenizer)
    assert 0.99 * parameters <= by_bytes.parameters <= parameters
    both = search_plan(dense, texts(), parameters=parameters, flops=by_bytes.flops * 0.8, tokenizer=tokenizer)
    assert both.parameters <= parameters
    assert 0.9 * 0.8 * by_bytes.flops <= both.flops <= 0.8 * by_bytes.flops
    assert both.error > by_bytes.error


def test_a_budget_of_time_takes_the_best_of_what_is_measured(bert, monkeypatch):
    """With times that follow the FLOPs, the plan is the best one for these FLOPs."""
    dense, tokenizer, _ = bert

    def milliseconds(self, layer, entries):
        m, n = layer.weight.shape
        if "embeddings" in layer.name:
            return [1.0 for entry in entries]  # as the dense one: no more
        tokens = 1 if layer.name == "pooler.dense" else REPORT_LENGTH
        sizes = [(e.m1, e.n1, *e.b_shape(m, n), e.terms) if e else (m, n, 1, 1, 1) for e in entries]
        return [2e-6 * tokens * (min(multiplications(*s)) if e else m * n) for s, e in zip(sizes, entries, strict=True)]

    monkeypatch.setattr(LatencyTable, "_milliseconds", milliseconds)
    monkeypatch.setattr(LatencyTable, "rest", lambda self, base: 3.0)
    by_flops = search_plan(dense, texts(), flops=2.5e6, tokenizer=tokenizer)
    by_time = search_plan(dense, texts(), milliseconds=3.0 + 2.5, runtime=Runtime(2, 16), tokenizer=tokenizer)
    assert by_time.latency.runtime == Runtime(2, 16)
    assert 5.4 < by_time.latency.predicted <= 5.5
    assert by_time.latency.predicted == pytest.approx(3 + 1e-6 * by_time.flops)
    assert by_time.error == pytest.approx(by_flops.error, rel=0.02)  # between measured sizes times are rounded
    assert by_time.latency.measured > 0
    assert by_time.latency.dense > 0
    both = search_plan(dense, texts(), ratio=2.5, milliseconds=5.5, tokenizer=tokenizer)
    assert both.parameters <= size(dense) / 2.5
    assert both.latency.predicted <= 5.5
    with pytest.raises(ValueError, match=r"milliseconds=3.1 cannot be met: at least 3\.\d+ is possible"):
        search_plan(dense, texts(), milliseconds=3.1, tokenizer=tokenizer)


def test_times_are_those_of_the_blocks_that_a_batch_goes_through_in(monkeypatch):
    dense = teacher(BertModel, hidden_size=32)
    seen = []

    def milliseconds(work, device):
        seen.append(work.args[0].shape[:1].numel())
        return 5.0 + (work.args[1].shape[1] if work.func is kronecker_linear else 0)  # terms

    monkeypatch.setattr(latency, "BLOCK", 64 * 32)
    monkeypatch.setattr(latency, "_milliseconds", milliseconds)
    entries = [FactorEntry(32, 1, terms) for terms in (1, 2, 3, 4, 5, 6)]
    choices = [Candidate(entry, 64 * entry.terms, 0, 0.5) for entry in entries]
    names = (
        "encoder.layer.0.output.dense",
        "pooler.dense",
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
    )
    layers = [MeasuredLayer(name, torch.ones(32, 32), [Candidate(None, 1024, 0, 0.0), *choices], (None,) * 3, 0.1)
              for name in names]  # fmt: skip
    found = dict(zip(names, LatencyTable(dense, Runtime(12, 16)).timed(layers), strict=True))
    assert set(seen) == {4 * 16, 4, 16}  # tokens of a block, its sequences, positions
    for name in names[:2]:  # three blocks; terms 1, 5 and 6 are measured, and what lies between them interpolated
        assert [c.milliseconds for c in found[name]] == pytest.approx([15, 18, 21, 24, 27, 30, 33])
    for name in names[2:]:  # no more than the dense one
        assert [c.milliseconds for c in found[name]] == [0] * 7
    assert sum(tokens == 64 for tokens in seen) == 4 + 4  # dense and 1, 5, 6 terms, linear and of the words


@pytest.mark.parametrize(("changes", "rows"), [({}, 8), ({"is_decoder": True}, 24)])
def test_a_decoder_is_timed_as_a_whole(changes, rows, monkeypatch):
    sizes = []
    monkeypatch.setattr(latency, "BLOCK", 8 * 32)
    monkeypatch.setattr(
        latency, "_milliseconds", lambda work, device: sizes.append(work.args[0].shape[:1].numel()) or 1
    )
    layer = MeasuredLayer(
        "encoder.layer.0.output.dense",
        torch.ones(32, 32),
        [Candidate(None, 1024, 0, 0.0), Candidate(FactorEntry(32, 1, 1), 64, 0, 0.5)],
        (None,) * 3,
        0.1,
    )
    LatencyTable(teacher(BertModel, **changes), Runtime(3, 8)).timed([layer])
    assert set(sizes) == {rows}


def test_sizes_of_a_pass_are_checked_before_anything_is_measured(bert, monkeypatch):
    dense, tokenizer, _ = bert
    monkeypatch.setattr(search, "measured_layers", None)
    for name in ("batch", "length"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            Runtime(**{name: 0})
    with pytest.raises(ValueError, match="length=129 is more than the 128 tokens of the teacher"):
        search_plan(dense, texts(), milliseconds=5, runtime=Runtime(1, 129), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="2 x 8 tokens, eager were given without milliseconds"):
        search_plan(dense, texts(), ratio=2, runtime=Runtime(2, 8), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="engine='onnx' is not known; choose from torch, onnxruntime"):
        Runtime(engine="onnx")
    with pytest.raises(ValueError, match="int8 is timed in ONNX Runtime"):
        Runtime(int8=True)
    if not CAN_EXPORT:
        with pytest.raises(ImportError, match="export to ONNX needs"):
            search_plan(dense, texts(), milliseconds=5, runtime=Runtime(engine="onnxruntime"), tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_frequent_words_compete_where_they_are_counted(family, request):
    dense, tokenizer, without = request.getfixturevalue(family)
    counted = [*texts(400), *["the fox"] * 4000]
    found = search_plan(dense, texts(), ratio=2.5, counted=counted, tokenizer=tokenizer)
    assert not any(c.entry and c.entry.frequent for layer in without.layers for c in layer.candidates)
    words, *others = found.layers
    assert not any(c.entry and c.entry.frequent for layer in others for c in layer.candidates)
    entries = {c.entry: c for c in words.candidates if c.entry and c.entry.frequent}
    assert entries
    for entry, candidate in entries.items():
        assert candidate.parameters == entry.parameters(*words.weight)
        shared = [c.error for c in words.candidates if c.entry == FactorEntry(entry.m1, 1, entry.terms)]
        assert all(candidate.error < error for error in shared)
    W = dense.get_input_embeddings().weight.detach().double()
    relative = W / W.norm(dim=1, keepdim=True) * (word_counts(counted, tokenizer, dense) + 1).pow(1 / 6).unsqueeze(1)
    lost = torch.linalg.svdvals(relative).square().flip(0).cumsum(0).flip(0)
    shared = [c for c in words.candidates if c.entry and c.entry.n1 == 1 and not c.entry.frequent]
    assert shared
    for candidate in shared:  # the errors of the rows relative to these, weighted with the third root of their numbers
        assert candidate.error == pytest.approx((lost[candidate.entry.terms] / lost[0]).sqrt().item(), rel=1e-4)
    less = words.weight[0] * words.weight[1] * 3 // 4
    small = search_plan(
        dense, texts(), parameters=size(dense) - less, only="embedding", counted=counted, tokenizer=tokenizer
    )
    entry = small.plan[words.name]
    assert entry.frequent  # two words make up most of the text
    result = compress(dense, small.plan, calibration=texts(), counted=counted, tokenizer=tokenizer)
    assert size(result.model) == small.parameters <= size(dense) - less
    shown = next(iter(plan_table(small).columns[3].cells))
    assert shown == f"{entry.m1}x1\n+ {entry.frequent}x1"


@pytest.mark.parametrize(
    ("counted", "error", "message"),
    [
        ("the fox", TypeError, "counted text is one string"),
        (["the fox", 3], TypeError, "counted text 1 is of type int"),
        ([], ValueError, "counted text has no words"),
    ],
)
def test_bad_counted_text_is_refused_before_the_work(counted, error, message, bert, monkeypatch):
    monkeypatch.setattr(search, "measured_layers", lambda *a: pytest.fail("work began"))
    dense, tokenizer, _ = bert
    for function in (compress, search_plan):
        with pytest.raises(error, match=message):
            function(dense, calibration=texts(), ratio=2.5, counted=counted, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="counted text was given without calibration text"):
        compress(dense, "7.7x", counted=["the fox"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but the model's embedding has 6 rows"):
        word_counts(["the fox"], tokenizer, teacher(BertModel, vocab_size=6))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_times_are_measured(family, request):
    dense, tokenizer, _ = request.getfixturevalue(family)
    found = search_plan(
        dense, texts(), milliseconds=1e6, runtime=Runtime(1, 8), counted=texts(400), tokenizer=tokenizer
    )
    assert any(c.entry and c.entry.frequent for c in found.layers[0].candidates)
    assert not found.plan  # all may stay dense
    assert found.latency.predicted > 0
    for layer in found.layers:
        embedding = layer.name.startswith(("embeddings.", "wte", "wpe"))
        assert all(c.milliseconds >= 0 if embedding else c.milliseconds > 0 for c in layer.candidates)


def test_the_rest_is_the_time_of_a_pass_for_each_block(monkeypatch):
    def milliseconds(work, device):
        assert work().last_hidden_state.shape == (rows, 8, 32)
        return 1.5

    dense = teacher(BertModel)
    monkeypatch.setattr(latency, "_milliseconds", milliseconds)
    rows = 1
    assert LatencyTable(dense, Runtime(1, 8)).rest(dense) == 1.5
    rows = BLOCK // (8 * 32)  # as many values at once as an encoder computes on a CPU
    assert LatencyTable(dense, Runtime(4 * rows, 8)).rest(dense) == pytest.approx(4 * 1.5)


def test_the_teacher_is_unchanged_and_the_plan_the_same_twice(gpt2):
    dense, tokenizer, found = gpt2
    dense.train()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    try:
        again = search_plan(dense, texts(), ratio=2.5, tokenizer=tokenizer)
        assert dense.training
    finally:
        dense.eval()  # other tests use it too
    assert again.plan == found.plan
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())


def test_bytes_are_those_of_the_teachers_precision(tmp_path):
    dense = teacher(BertModel, dtype=torch.bfloat16)
    limit = size(dense) * 2 // 3
    found = search_plan(dense, texts(), size_bytes=limit, tokenizer=bert_tokenizer(tmp_path))
    student = compress(dense, found.plan).model
    held = sum(p.nbytes for p in student.parameters())
    assert 0.9 * limit < held <= limit
    with pytest.raises(ValueError, match=r"size_bytes=100 cannot be met"):
        search_plan(dense, texts(), size_bytes=100, tokenizer=bert_tokenizer(tmp_path))


def test_a_shape_that_is_not_of_low_rank_is_found(tmp_path):
    dense = teacher(BertModel)
    with torch.no_grad():
        for layer in dense.encoder.layer:  # shapes are tried in one of them, for all
            W = layer.intermediate.dense.weight
            blocks = [torch.kron(torch.randn(8, 8), torch.randn(len(W) // 8, W.shape[1] // 8)) for _ in range(2)]
            W.copy_(sum(blocks) / 8)  # two terms, and a rank of 8
    found = search_plan(dense, texts(), ratio=3, tokenizer=bert_tokenizer(tmp_path))
    layers = [layer for layer in found.layers if layer.name.endswith("intermediate.dense")]
    assert layers
    for layer in layers:
        errors = {(c.entry.m1, c.entry.n1, c.entry.terms): c.error for c in layer.candidates if c.entry}
        assert errors[8, 8, 2] < 0.01
        assert errors[8, 8, 1] > 0.3  # though the try, of three terms, leaves nothing to compare with
        assert errors[96, 1, 3] > 0.3


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_file_and_picture(bert, tmp_path, name):
    _, _, found = bert
    found.save(tmp_path / name)
    assert read_plan(tmp_path / name) == found.plan
    plan_picture(found, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {name, "search.png"}
    with pytest.raises(ValueError, match=r"must end in \.yaml, \.yml or \.json"):
        found.save(tmp_path / "plan.txt")


def test_a_budget_that_is_no_number_is_named(bert):
    dense, tokenizer, _ = bert
    with pytest.raises(TypeError, match="ratio='2' must be a number; give one"):
        search_plan(dense, texts(40), tokenizer=tokenizer, ratio="2")


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({}, "budgets given: none; give one or two of ratio, parameters, size_bytes, flops"),
        ({"ratio": 2, "parameters": 9, "flops": 3}, "budgets given: ratio, parameters, flops; give one or two"),
        ({"ratio": 1}, r"ratio=1 must be above 1; give a larger number"),
        ({"flops": float("nan")}, "flops=nan must be above 0"),
        ({"flops": 10}, r"flops=10 cannot be met: at least [\d,]+ is possible"),
    ],
)
def test_bad_budgets_are_refused(bert, budgets, message):
    dense, tokenizer, _ = bert
    with pytest.raises(ValueError, match=message):
        search_plan(dense, texts(40), tokenizer=tokenizer, **budgets)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (
            {"ratio": 1000},
            r"ratio=1,000 cannot be met: [\d,]+ of [\d,]+ parameters are in modules that stay dense, and",
        ),
        ({"parameters": 10}, r"parameters=10 cannot be met: .*, or factor more modules"),
        ({"size_bytes": 40}, r"size_bytes=40 cannot be met: .*, or factor more modules"),
        ({"ratio": 6, "only": "encoder.layer.0.*"}, "ratio=6 cannot be met"),
    ],
)
def test_what_no_plan_can_meet_is_refused_before_anything_is_measured(bert, budgets, message, monkeypatch):
    monkeypatch.setattr(search, "measured_layers", lambda *a: pytest.fail("work began"))
    dense, tokenizer, _ = bert
    with pytest.raises(ValueError, match=message):
        search_plan(dense, texts(40), tokenizer=tokenizer, **budgets)


@pytest.mark.parametrize("pattern", ["*", "[ab]*.dense", "?.query", "!x", "encoder.layer.*.output.dense", "a b", "- a"])
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_any_pattern_is_read_as_it_was_written(pattern, ending, tmp_path):
    plan = FactorPlan({pattern: (2, 2, 3), "plain": (4, 1)})
    assert read_plan(write_plan(tmp_path / f"plan.{ending}", plan)) == plan


def test_compress_by_ratio(bert):
    dense, tokenizer, found = bert
    result = compress(dense, ratio=2.5, calibration=iter(texts()), tokenizer=tokenizer)
    assert result.model.config.factor_plan == found.plan.to_dict()
    assert any(layer.output_error for layer in result.report.layers)
    with pytest.raises(ValueError, match=r"ratio=2\.5 was given beside a plan"):
        compress(dense, "7.7x", ratio=2.5, calibration=texts(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"ratio=2\.5 needs calibration text"):
        compress(dense, ratio=2.5)
    with pytest.raises(TypeError, match="give a list of strings"):
        compress(dense, ratio=2.5, calibration="the fox", tokenizer=tokenizer)


@pytest.mark.parametrize(("dense_class", "ratio"), [(BertModel, 7.7), (GPT2LMHeadModel, 1.48)])
def test_with_calibration_text_alone_compress_searches_a_plan_of_the_size_of_the_preset(dense_class, ratio, tmp_path):
    dense = teacher(dense_class, vocab_size=4000 if dense_class is BertModel else 800)
    tokenizer = (bert_tokenizer if dense_class is BertModel else gpt2_tokenizer)(tmp_path)
    student = compress(dense, calibration=texts(), tokenizer=tokenizer).model
    assert 0.98 <= ratio * size(student) / size(dense) <= 1
    found = search_plan(dense, texts(), ratio=ratio, tokenizer=tokenizer)
    assert student.config.factor_plan == found.plan.to_dict()


def test_command_line(tmp_path, capsys):
    teacher(BertForSequenceClassification).save_pretrained(tmp_path / "bert")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "bert")
    (tmp_path / "lines.txt").write_text("\n".join(texts()))
    command = ["search", str(tmp_path / "bert"), "--calibration", str(tmp_path / "lines.txt")]
    plan, picture = tmp_path / "plan.yaml", tmp_path / "plan.png"
    assert main([*command, "--ratio", "2.5", "-o", str(plan), "--picture", str(picture)]) == 0
    shown = capsys.readouterr()
    assert "encoder.layer.1.output.dense" in shown.out
    assert "influences" in shown.err
    assert picture.exists()
    assert main(["compress", str(tmp_path / "bert"), "--plan", str(plan), "--output", str(tmp_path / "student")]) == 0
    capsys.readouterr()
    by_ratio = ["compress", *command[1:], "--ratio", "2.5", "--output", str(tmp_path / "by_ratio")]
    assert main(by_ratio) == 0
    assert "nearest" in capsys.readouterr().out
    assert main([*by_ratio[:2], *by_ratio[4:-1], str(tmp_path / "uncalibrated")]) == 1
    assert "ratio=2.5 needs calibration text" in capsys.readouterr().err
    assert main([*command, "--ratio", "100", "-o", str(tmp_path / "none.yaml")]) == 1
    assert "ratio=100.0 cannot be met" in capsys.readouterr().err
    assert not (tmp_path / "none.yaml").exists()
    by_time = ["--milliseconds", "1e6", "--batch", "2", "--length", "8", "-o", str(tmp_path / "by_time.yaml")]
    assert main([*command, *by_time]) == 0
    assert "2 x 8 tokens, eager: " in capsys.readouterr().out
