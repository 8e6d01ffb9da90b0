import json
import logging
import re
import sys

import peft
import pytest
import torch
from oracles import kronecker_sum
from safetensors.torch import load_file, save_file
from students import factorable_modules
from tiny import BERT_SIZES, bert_config, bert_tokenizer, inputs, teacher, texts, tokenizer_for
from torch import nn
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertModel,
    CamembertConfig,
    CamembertForMaskedLM,
    CamembertModel,
    DistilBertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import kronecker_transformers as kt
from kronecker_transformers import FactorPlan, compress, describe, to_dense
from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.evaluation.cost import recorded_errors
from kronecker_transformers.models import DENSE_CLASSES
from kronecker_transformers.models.kronecker_family import FAMILIES

ALL_TEACHERS = pytest.mark.parametrize("dense_class", DENSE_CLASSES.values(), ids=lambda c: c.__name__)


def exact_plan(model):
    """Every module that can be factored, in uneven shapes, with as many terms as make the sum exact."""
    config_class = FAMILIES[model.config.model_type]
    plan = {}
    for i, (name, (m, n)) in enumerate(factorable_modules(config_class.from_dense(model.config, {})).items()):
        m1, n1 = [(m, n // 4), (max(1, m // 2), n), (max(1, m // 2), n // 8), (2, n // 2), (m, 1)][i % 5]
        plan[name] = (m1, n1, min(m1 * n1, (m // m1) * (n // n1)))
    return FactorPlan(plan)


@ALL_TEACHERS
def test_exact_plan_gives_the_teachers_outputs(dense_class):
    dense = teacher(dense_class, dtype=torch.float64)
    student = compress(dense, exact_plan(dense)).model
    assert type(student).__name__ == "Kronecker" + dense_class.__name__
    batch = inputs(dense)
    ours, theirs = student(**batch), dense(**batch)
    for key in ours.keys() - {"past_key_values"}:
        assert (ours[key] - theirs[key]).abs().max() < 1e-9, key


@ALL_TEACHERS
def test_there_and_back_again(dense_class):
    dense = teacher(dense_class, dtype=torch.float64)
    twin = to_dense(compress(dense, exact_plan(dense)).model)
    assert type(twin) is dense_class
    assert twin.config.to_dict() == dense.config.to_dict()
    theirs = dense.state_dict()
    assert twin.state_dict().keys() == theirs.keys()
    torch.testing.assert_close(twin.state_dict(), theirs, rtol=1e-10, atol=1e-10)


@ALL_TEACHERS
def test_uncompressed_parts_are_copied_bit_by_bit(dense_class):
    dense = teacher(dense_class)
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    name = "wte" if "GPT2" in dense_class.__name__ else "embeddings.word_embeddings"
    student = compress(dense, {name: (dense.config.vocab_size, 8)}).model
    ours = student.state_dict()
    same = {key for key in state if key in ours}
    assert len(state) - len(same) <= 2  # the embedding and the head that is tied to it
    assert all(torch.equal(ours[key], state[key]) for key in same)
    assert all(ours[key].data_ptr() != state[key].data_ptr() for key in same)
    assert all(torch.equal(dense.state_dict()[key], value) for key, value in state.items())  # the teacher is unchanged


def test_student_holds_the_nearest_products():
    dense = teacher(GPT2LMHeadModel)
    result = compress(dense, {"h.1.mlp.c_fc": (12, 8, 2)})
    factored = result.model.transformer.h[1].mlp.c_fc
    W = dense.transformer.h[1].mlp.c_fc.weight.detach().t().double()
    error = ((kronecker_sum(factored.A, factored.B) - W).norm() / W.norm()).item()
    patches = W.reshape(12, 8, 8, 4).transpose(1, 2).reshape(96, 32)
    best = torch.linalg.svdvals(patches)[2:].square().sum().sqrt() / W.norm()
    assert error == pytest.approx(best.item(), rel=1e-5)
    (layer,) = result.report.layers
    assert layer.name == "transformer.h.1.mlp.c_fc"
    assert (layer.weight, layer.A, layer.B, layer.terms) == ((96, 32), (12, 8), (8, 4), 2)
    assert layer.relative_error == pytest.approx(error, rel=1e-4)


def test_labels_generation_and_mode_come_along():
    dense = teacher(GPT2LMHeadModel)
    dense.generation_config.update(max_new_tokens=7, temperature=0.7)
    student = compress(dense, "kngpt2").model
    assert student.generation_config.to_dict() == dense.generation_config.to_dict()
    assert student.generation_config is not dense.generation_config
    assert student.config.id2label == dense.config.id2label
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())


def test_attention_is_the_teachers():
    dense = teacher(BertModel, dtype=torch.float64)
    dense.set_attn_implementation("eager")
    student = compress(dense, exact_plan(dense)).model
    batch = inputs(dense)
    ours, theirs = (model(**batch, output_attentions=True).attentions for model in (student, dense))
    torch.testing.assert_close(ours, theirs)
    assert len(ours) == 3


def test_dtype_is_the_teachers_even_if_mixed():
    dense = teacher(BertModel, dtype=torch.bfloat16)
    dense.embeddings.LayerNorm.float()
    student = compress(dense, "7.7x").model
    assert student.embeddings.word_embeddings.A.dtype == torch.bfloat16
    assert student.embeddings.LayerNorm.weight.dtype == torch.float32


@pytest.mark.parametrize("dense_class", [BertForMaskedLM, GPT2LMHeadModel])
def test_untied_head_is_kept_dense(dense_class):
    dense = teacher(dense_class, dtype=torch.float64, tie_word_embeddings=False)
    student = compress(dense, exact_plan(dense)).model
    assert type(student.get_output_embeddings()) is nn.Linear
    batch = inputs(dense)
    torch.testing.assert_close(student(**batch).logits, dense(**batch).logits, rtol=1e-9, atol=1e-9)


def test_head_that_only_claims_to_be_tied():
    dense = teacher(GPT2LMHeadModel, dtype=torch.float64)
    dense.lm_head.weight = nn.Parameter(torch.randn_like(dense.lm_head.weight))
    student = compress(dense, exact_plan(dense)).model
    assert student.config.tie_word_embeddings is False
    batch = inputs(dense)
    torch.testing.assert_close(student(**batch).logits, dense(**batch).logits, rtol=1e-9, atol=1e-9)


def test_base_model_without_pooler():
    dense = BertModel(bert_config(), add_pooling_layer=False).eval()
    student = compress(dense, "7.7x").model
    assert student.pooler is None
    assert to_dense(student).pooler is None
    assert student(**inputs(dense)).pooler_output is None


def test_cross_attention():
    dense = teacher(BertForMaskedLM, dtype=torch.float64, is_decoder=True, add_cross_attention=True)
    student = compress(dense, exact_plan(dense)).model
    batch = {**inputs(dense), "encoder_hidden_states": torch.randn(3, 6, 32, dtype=torch.float64)}
    torch.testing.assert_close(student(**batch).logits, dense(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "plan", "message"),
    [
        (
            lambda: CamembertModel(CamembertConfig(**BERT_SIZES)), "7.7x",
            "class CamembertModel is not supported; supported are BertForMaskedLM",
        ),
        (lambda: teacher(BertModel), "3x", "plan='3x' is not a preset"),
        (lambda: teacher(BertModel), {"encoder.layer.9.*": (2, 2)}, "matches no module"),
        (lambda: compress(teacher(BertModel), "7.7x").model, "7.7x", "class KroneckerBertModel is not supported"),
    ],
)  # fmt: skip
def test_bad_input(make, plan, message):
    with pytest.raises(ValueError, match=message):
        compress(make(), plan)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("parameter", ["embeddings.LayerNorm.weight", "encoder.layer.1.output.dense.weight"])
def test_weights_that_are_not_finite(value, parameter):
    dense = teacher(BertModel)
    with torch.no_grad():
        dense.get_parameter(parameter).view(-1)[3] = value
    with pytest.raises(ValueError, match=f"parameter '{parameter}' of the BertModel holds NaN or infinite values"):
        compress(dense)


def test_other_families_are_not_mistaken_for_bert():
    # RoBERTa's layers have BERT's names
    camembert = CamembertForMaskedLM(CamembertConfig(**BERT_SIZES))
    with pytest.raises(ValueError, match="class CamembertForMaskedLM is not supported"):
        compress(camembert)


def test_frozen_parameters_stay_frozen_and_the_name_is_kept():
    dense = teacher(BertModel)
    dense.config.name_or_path = "some/teacher"
    dense.embeddings.requires_grad_(False)
    student = compress(dense).model
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in student.named_parameters() if name.startswith("embeddings.")}
    assert student.config.name_or_path == "some/teacher"


@pytest.mark.parametrize("dense_class", [BertModel, GPT2LMHeadModel])
def test_a_student_made_without_gradients_can_be_trained(dense_class):
    with torch.no_grad():
        student = compress(teacher(dense_class), "7.7x" if dense_class is BertModel else "kngpt2").model
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("plan", [{"pooler.dense": (16, 16)}, "7.7x"], ids=str)
def test_teacher_that_hides_a_weight(plan):
    dense = teacher(BertModel)
    torch.nn.utils.parametrizations.weight_norm(dense.encoder.layer[0].intermediate.dense)
    with pytest.raises(ValueError, match=r"'encoder.layer.0.intermediate.dense.*remove parametrizations"):
        compress(dense, plan)


@pytest.mark.parametrize("wrong", [None, 7, {"weight": 1}])
def test_teacher_that_is_none(wrong):
    with pytest.raises(TypeError, match=f"teacher of type {type(wrong).__name__} must be a name, a folder or a loaded"):
        compress(wrong)


def test_teacher_without_weights():
    with torch.device("meta"):
        dense = BertModel(bert_config())
    with pytest.raises(ValueError, match="is on the meta device; load its weights first"):
        compress(dense)


def test_teacher_whose_weights_are_not_those_of_its_config():
    dense = teacher(BertModel)
    dense.embeddings.word_embeddings = nn.Embedding(128, 32)
    for plan in ("7.7x", {"pooler.dense": (16, 16)}):
        with pytest.raises(
            ValueError, match=r"'embeddings.word_embeddings.weight' .* \(128, 32\), and its config says \(64, 32\)"
        ):
            compress(dense, plan)


def with_adapter(dense):
    dense.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda dense: setattr(dense, "classifier", nn.Linear(32, 7)), "classifier.weight"),
        (lambda dense: dense.bert.pooler.dense.register_parameter("bias", None), "bert.pooler.dense.bias"),
        (with_adapter, "bert.encoder.layer.0.attention.self.query.weight"),
        (lambda dense: torch.ao.quantization.quantize_dynamic(dense, inplace=True), "bert.encoder.layer.0.attention"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
def test_what_is_not_of_the_class_and_config_is_refused_before_the_search(change, name, monkeypatch, tmp_path):
    searched = "kronecker_transformers.compression.compress.search_batches"
    monkeypatch.setattr(searched, lambda *_, **__: pytest.fail("is searched"))
    dense = teacher(BertForSequenceClassification)
    change(dense)
    with pytest.raises(ValueError, match=f"'{name}.* of the BertForSequenceClassification .*, and its config says"):
        compress(dense, ratio=2, calibration=texts(150), tokenizer=bert_tokenizer(tmp_path))


@pytest.mark.parametrize("dense_class", [BertModel, BertForSequenceClassification, BertForMultipleChoice])
def test_a_config_that_asks_for_tuples_changes_nothing(dense_class, tmp_path):
    found = []
    for return_dict in (True, False):
        dense = teacher(dense_class, return_dict=return_dict)
        tokenizer = tokenizer_for(dense.config.model_type, tmp_path)
        result = compress(dense, ratio=1.3, calibration=texts(150), tokenizer=tokenizer)
        found.append(result.model.config.factor_plan)
    assert found[0] == found[1]


@pytest.mark.parametrize("layers", [2, 4])
def test_teacher_with_other_layers_than_its_config_says(layers):
    dense = teacher(BertModel)
    assert dense.config.num_hidden_layers == 3
    dense.encoder.layer = torch.nn.ModuleList([dense.encoder.layer[i % 3] for i in range(layers)])
    with pytest.raises(ValueError, match=f"teacher has {layers} layers, and its config says num_hidden_layers=3; make"):
        compress(dense, "7.7x")


def test_twin_of_a_classifier_that_reads_one_text_at_a_time():
    dense = teacher(GPT2ForSequenceClassification, pad_token_id=None)
    student = compress(dense, "kngpt2").model
    ids = torch.tensor([[3, 5, 7]])
    torch.testing.assert_close(to_dense(student)(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-5)


def test_positions_that_are_factored_are_not_resized():
    dense = teacher(DistilBertModel)
    rows = dense.config.max_position_embeddings
    whole = compress(dense, "7.7x").model
    factored = compress(dense, {"embeddings.position_embeddings": (rows, 4)}).model
    whole.resize_position_embeddings(rows + 8)
    assert len(whole.embeddings.position_embeddings.weight) == rows + 8
    before = factored.config.max_position_embeddings
    with pytest.raises(ValueError, match="the positions are factored; resize the teacher's, and compress it again"):
        factored.resize_position_embeddings(rows + 8)
    assert factored.config.max_position_embeddings == before


def test_twin_of_weights_that_are_not_finite():
    student = compress(teacher(BertModel)).model
    student.pooler.dense.A.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"'pooler.dense.A' of the KroneckerBertModel holds NaN"):
        to_dense(student)


def test_teacher_made_for_inference_only():
    with torch.inference_mode():
        dense = teacher(BertModel)
    assert compress(dense).model(**inputs(dense)).pooler_output.shape == (3, 32)


def test_errors_belong_to_the_factors_they_were_measured_on(tmp_path):
    result = compress(teacher(BertModel))
    result.save_pretrained(tmp_path / "as-compressed")
    student, _ = load_student(tmp_path / "as-compressed")
    assert recorded_errors(tmp_path / "as-compressed", describe(student).factors_sha256)
    with torch.no_grad():
        result.model.pooler.dense.B.add_(1)
    result.save_pretrained(tmp_path / "changed")
    student, _ = load_student(tmp_path / "changed")
    assert recorded_errors(tmp_path / "changed", describe(student).factors_sha256) == {}


@pytest.fixture
def load_reports():
    """What transformers reports on loading."""
    logger, records = logging.getLogger("transformers.modeling_utils"), []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_without_a_pooler_there_and_back(tmp_path, load_reports):
    result = compress(BertModel(bert_config(), add_pooling_layer=False).eval())
    result.save_pretrained(tmp_path / "student")
    student, _ = load_student(tmp_path / "student")
    assert student.pooler is None
    assert not load_reports  # it lacks nothing


def test_weights_that_are_left_over_are_reported_once(tmp_path, load_reports, caplog):
    compress(teacher(BertModel)).save_pretrained(tmp_path / "student")
    weights = load_file(tmp_path / "student" / "model.safetensors")
    save_file(weights | {"other": torch.ones(2)}, tmp_path / "student" / "model.safetensors", {"format": "pt"})
    load_student(tmp_path / "student")
    assert not load_reports
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'student'} holds weights that KroneckerBertModel does not use: other"
    ]


@ALL_TEACHERS
def test_factors_lie_in_memory_as_fresh_ones(dense_class):
    """DeepSpeed reads parameters byte by byte, which odd strides at an axis of size 1 do not allow."""
    for parameter in compress(teacher(dense_class)).model.parameters():
        assert parameter.stride() == torch.empty(parameter.shape).stride()


def untied(model, how):
    head, shape = model.get_output_embeddings(), (model.config.vocab_size, model.config.hidden_size)
    dense = nn.Linear(shape[1], shape[0], bias=head.bias is not None, dtype=torch.float64)
    if how == "factors":
        head.A = nn.Parameter(head.A.detach() + 0.5)
    elif how == "bias":
        head.bias = nn.Parameter(head.bias.detach() + 0.5)
    elif how == "by the method":
        model.set_output_embeddings(dense)
    elif hasattr(model, "lm_head"):
        model.lm_head = dense
    else:
        model.cls.predictions.decoder = dense
    return model


@pytest.mark.parametrize("how", ["factors", "layer", "by the method", "bias"])
@pytest.mark.parametrize("dense_class", [BertForMaskedLM, GPT2LMHeadModel])
def test_twin_of_a_head_of_its_own_whatever_the_config_says(dense_class, how):
    if how == "bias" and dense_class is GPT2LMHeadModel:
        pytest.skip("its head has no bias")
    model = untied(compress(teacher(dense_class, dtype=torch.float64)).model, how)
    twin = to_dense(model)
    assert twin.config.tie_word_embeddings is False
    batch = inputs(model)
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits, rtol=1e-9, atol=1e-9)


def test_twin_of_a_tied_head_whose_config_says_untied():
    model = compress(teacher(GPT2LMHeadModel)).model
    model.config.tie_word_embeddings = False
    twin = to_dense(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight


def test_a_twin_with_other_outputs_is_refused(monkeypatch):
    model = compress(teacher(BertForMaskedLM)).model
    monkeypatch.setattr(sys.modules["kronecker_transformers.export.dense"], "is_tied", lambda _: True)
    with pytest.raises(ValueError, match=r"the dense twin's logits differ from the model's by .* of their norm"):
        to_dense(untied(model.double(), "layer"))


class TestTeachersWhoseFilesAreOdd:
    @pytest.fixture
    def folder(self, tmp_path):
        teacher(BertModel).save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    @staticmethod
    def edit(folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in {**config, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    def test_a_pickle_alone(self, folder):
        torch.save(BertModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(
            OSError, match=r"holds no model\.safetensors, but pytorch_model\.bin; a pickle can run code"
        ) as e:
            compress(folder)
        line = re.search(r"AutoModel\.from_pretrained\(.*\)\.save_pretrained\(NEW_FOLDER\)", str(e.value))[0]
        exec(line, {"AutoModel": AutoModel, "NEW_FOLDER": folder.parent / "converted"})  # the remedy that it names
        assert compress(folder.parent / "converted").model

    def test_no_architectures(self, folder):
        self.edit(folder, architectures=None)
        assert type(compress(folder).model) is kt.KroneckerBertModel

    def test_no_architectures_and_a_head(self, tmp_path):
        teacher(BertForMaskedLM).save_pretrained(tmp_path)
        self.edit(tmp_path, architectures=None)
        with pytest.raises(
            ValueError, match=r"has no architectures, and the weights hold 'cls\..*', part of a head; add"
        ):
            compress(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model_type": None},
                r"has model_type=None, which is missing or misspelt; add or correct it, for example \"model",
            ),
            ({"model_type": "BERT"}, r"has model_type='BERT', which is missing or misspelt"),
            (
                {"architectures": ["BertForNextSentencePrediction"]},
                "'BertForNextSentencePrediction'; supported: .*; load it",
            ),
            ({"quantization_config": {"quant_method": "gptq"}}, "is quantized; give the weights from before"),
            (
                {"position_embedding_type": "relative_key"},
                "position_embedding_type='relative_key', which transformers 5",
            ),
            ({"num_hidden_layers": 2}, r"hold 'encoder\.layer\.2\..*', for which its config\.json has no place"),
            ({"num_hidden_layers": 4}, r"lack \d+ parameters, 'encoder\.layer\.3\."),
        ],
    )
    def test_configs(self, folder, changes, message):
        self.edit(folder, **changes)
        with pytest.raises(ValueError, match=message):
            compress(folder)

    def test_a_student_and_an_adapter(self, folder, tmp_path):
        compress(folder).save_pretrained(tmp_path / "student")
        with pytest.raises(ValueError, match="is compressed already; give the dense model it came from"):
            compress(tmp_path / "student")
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"holds a PEFT adapter; merge_and_unload\(\) it, save the model"):
            compress(folder)
