"""Every documented way of building and loading does what it does with the stock class, buffers and settings too."""

import contextlib
import copy
import logging

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.big_modeling import init_on_device
from students import ALL_MODELS, factored_modules, first_output, student
from tiny import inputs
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertPreTrainedModel
from transformers.initialization import no_init_weights

import kronecker_transformers as kt
from kronecker_transformers.models import DENSE_CLASSES
from kronecker_transformers.models.kronecker_layers import KroneckerEmbedding, KroneckerLinear
from kronecker_transformers.models.modeling_kronecker_bert import KroneckerBertPreTrainedModel

LANGUAGE_MODELS = pytest.mark.parametrize(
    "model_class", [kt.KroneckerBertForMaskedLM, kt.KroneckerBertForPreTraining, kt.KroneckerGPT2LMHeadModel]
)


SOME_MODELS = pytest.mark.parametrize(
    "model_class",
    [
        kt.KroneckerBertForMaskedLM,
        kt.KroneckerGPT2LMHeadModel,
        pytest.param(kt.KroneckerBertModel, marks=pytest.mark.slow),
        pytest.param(kt.KroneckerGPT2ForSequenceClassification, marks=pytest.mark.slow),
    ],
)


def assert_same(found, wanted):
    """Every parameter and buffer, bit by bit, with the same ties; and the outputs."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (found, wanted))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert not ours[name].is_meta, name
            assert torch.equal(ours[name].cpu(), value), name
    assert ties(found) == ties(wanted)
    assert_same_outputs(found, wanted)


def assert_same_outputs(found, wanted):
    batch = inputs(wanted)
    with torch.no_grad():
        assert torch.equal(first_output(found.eval()(**batch)), first_output(wanted(**batch)))


def ties(model):
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def layers_on_disk(model):
    """A device map with two of three layers on the disk."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    stack = prefix + model.config.family.layers
    own = [prefix + name for name, _ in model.base_model.named_children()]
    own += [name for name, _ in model.named_children() if model.base_model is not model]
    places = {name: "cpu" for name in own if f"{name}." != prefix and not f"{stack}.".startswith(f"{name}.")}
    return {**places, f"{stack}.0": "cpu", f"{stack}.1": "disk", f"{stack}.2": "disk"}


def stock(model_class, config):
    return DENSE_CLASSES[model_class](config.to_dense_config())


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        # torch 2.6 cannot be asked for its default device any longer after this
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


PLACES = {
    "constructor": contextlib.nullcontext,
    "no_init_weights": no_init_weights,
    "cpu context": lambda: torch.device("cpu"),
    "meta context": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "init_empty_weights": init_empty_weights,
    "init_empty_weights with buffers": lambda: init_empty_weights(include_buffers=True),
    "init_on_device": lambda: init_on_device(torch.device("cpu")),
}


@ALL_MODELS
@pytest.mark.parametrize("place", PLACES)
def test_tensors_are_where_the_stock_class_has_them(model_class, place):
    config = student(model_class).config
    # whatever is in memory, so that a buffer that nobody fills cannot be right by chance
    rubbish = [torch.full((40,), 7_777) for _ in range(200)]
    del rubbish
    with PLACES[place]():
        ours, theirs = model_class(copy.deepcopy(config)), stock(model_class, config)
        some_buffer = torch.nn.BatchNorm1d(1).running_mean
    assert {p.is_meta for p in ours.parameters()} == {p.is_meta for p in theirs.parameters()}
    buffers = dict(theirs.named_buffers())
    of_words = {name: words for name, words in ours.named_buffers() if name.endswith(".frequent.words")}
    assert len(of_words) == 1
    for words in of_words.values():
        assert words.is_meta == some_buffer.is_meta
        assert words.is_meta or torch.equal(words, torch.arange(len(words), dtype=torch.int32))
    own = {name: buffer for name, buffer in ours.named_buffers() if name not in of_words}
    assert own.keys() == buffers.keys()
    for name, buffer in own.items():
        assert buffer.is_meta == buffers[name].is_meta
        assert buffer.is_meta or torch.equal(buffer, buffers[name]), name
    assert {k for k in ours.state_dict() if k in buffers} == {k for k in theirs.state_dict() if k in buffers}


@ALL_MODELS
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_in_the_config(model_class, checkpointing):
    config = student(model_class).config
    config.gradient_checkpointing = checkpointing
    ours, theirs = model_class(copy.deepcopy(config)), stock(model_class, config)
    flags = [
        {name: m.gradient_checkpointing for name, m in model.named_modules() if hasattr(m, "gradient_checkpointing")}
        for model in (ours, theirs)
    ]
    assert flags[0] == flags[1]
    assert set(flags[0].values()) == ({checkpointing} if theirs.supports_gradient_checkpointing else set())
    assert getattr(ours.config, "gradient_checkpointing", False) == getattr(
        theirs.config, "gradient_checkpointing", False
    )


@ALL_MODELS
def test_state_dict_into_an_empty_model(model_class):
    model = student(model_class)
    with torch.device("meta"):
        empty = model_class(copy.deepcopy(model.config))
    assigned = empty.load_state_dict(model.state_dict(), assign=True, strict=True)
    assert not assigned.missing_keys
    for name, value in model.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value), name
    with no_init_weights():
        filled = model_class(copy.deepcopy(model.config))
    filled.load_state_dict(model.state_dict(), strict=True)
    assert_same(filled.tie_weights() or filled, model)


@SOME_MODELS
@pytest.mark.parametrize("device_map", ["cpu", "auto", "disk"])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_accelerate_loads_an_empty_model(model_class, device_map, shards, tmp_path):
    model = student(model_class)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    with init_empty_weights():
        empty = model_class(copy.deepcopy(model.config))
    empty.tie_weights()
    maps = {"cpu": {"": "cpu"}, "auto": "auto", "disk": layers_on_disk(model)}
    loaded = load_checkpoint_and_dispatch(
        empty, tmp_path, device_map=maps[device_map], offload_folder=tmp_path / "offload"
    )
    if device_map == "disk":  # its tensors come when they are needed
        assert_same_outputs(loaded, model)
    else:
        assert_same(loaded, model)


@SOME_MODELS
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_offloads(model_class, offload, tmp_path):
    model = student(model_class)
    offloaded = copy.deepcopy(model)
    if offload == "cpu":
        cpu_offload(offloaded, torch.device("cpu"))
    else:
        disk_offload(offloaded, tmp_path, torch.device("cpu"))
    assert_same_outputs(offloaded, model)


@SOME_MODELS
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize(
    "options",
    [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}],
    ids=str,
)
def test_from_pretrained(model_class, options, shards, tmp_path):
    model = student(model_class)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert_same(model_class.from_pretrained(tmp_path, **options), model)


@SOME_MODELS
def test_from_pretrained_with_layers_on_disk(model_class, tmp_path):
    model = student(model_class)
    model.save_pretrained(tmp_path / "model")
    places = layers_on_disk(model)
    loaded = model_class.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in loaded.parameters())
    assert_same_outputs(loaded, model)


@LANGUAGE_MODELS
class TestHeads:
    def test_a_state_dict_with_the_tied_head_opens_as_every_class(self, model_class, tmp_path):
        model = student(model_class)
        model.save_pretrained(tmp_path / "a", state_dict=model.state_dict())
        (tmp_path / "b").mkdir()
        model.config.save_pretrained(tmp_path / "b")
        torch.save(model.state_dict(), tmp_path / "b" / "pytorch_model.bin")
        family = "GPT2" if "GPT2" in model_class.__name__ else "Bert"
        for folder in ("a", "b"):
            assert_same(model_class.from_pretrained(tmp_path / folder), model)
            for kind in ("Model", "ForSequenceClassification", "ForTokenClassification"):
                other = getattr(kt, f"Kronecker{family}{kind}").from_pretrained(tmp_path / folder)
                for name, value in other.base_model.state_dict().items():
                    assert name.startswith("pooler") or torch.equal(value, model.base_model.state_dict()[name]), name

    def test_an_untied_checkpoint_is_not_loaded_as_tied(self, model_class, tmp_path):
        model = student(model_class, tie_word_embeddings=False)
        model.save_pretrained(tmp_path)
        assert_same(model_class.from_pretrained(tmp_path), model)
        with pytest.raises(ValueError, match="left over: their output head is not tied; load them with tie_"):
            model_class.from_pretrained(tmp_path, tie_word_embeddings=True)

    def test_factors_of_a_head_of_its_own_are_refused_before_they_are_saved(self, model_class, tmp_path):
        model = student(model_class)
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.A = nn.Parameter(head.A.detach().clone())
        with pytest.raises(ValueError, match="only a tied one can be; set it to True, or set_output_embeddings"):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_factors_of_a_head_that_only_claims_to_be_tied_stay_its_own(self, model_class, tmp_path, caplog):
        model = student(model_class)
        head = model.get_output_embeddings()
        head.A = nn.Parameter(head.A.detach() + 0.5)
        model.save_pretrained(tmp_path)
        assert_same_outputs(model_class.from_pretrained(tmp_path), model)  # as the stock class, with a warning
        assert "so we will NOT tie them" in " ".join(caplog.text.split())

    def test_a_dense_head_of_its_own(self, model_class, tmp_path):
        model = student(model_class)
        has_bias = model.get_output_embeddings().bias is not None
        dense = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=has_bias)
        before = first_output(model(**inputs(model)))
        model.set_output_embeddings(dense)
        assert model.config.tie_word_embeddings is False
        assert not torch.equal(first_output(model(**inputs(model))), before)
        model.save_pretrained(tmp_path)
        again = model_class.from_pretrained(tmp_path)
        assert_same(again, model)
        assert torch.equal(again.get_output_embeddings().weight, dense.weight)

    def test_a_dense_embedding_takes_its_head_along(self, model_class, tmp_path):
        model = student(model_class)
        dense = nn.Embedding(model.config.vocab_size, model.config.hidden_size)
        model.set_input_embeddings(dense)
        model.tie_weights()
        assert model.get_output_embeddings().weight is dense.weight
        assert not {"wte", "embeddings.word_embeddings"} & set(factored_modules(model.config))
        model.save_pretrained(tmp_path)
        assert_same(model_class.from_pretrained(tmp_path), model)

    def test_another_factored_embedding_takes_its_head_along(self, model_class, tmp_path):
        model = student(model_class)
        table = KroneckerEmbedding(model.config.vocab_size, model.config.hidden_size, model.config.vocab_size, 4)
        model.base_model.set_input_embeddings(table)
        model.tie_weights()
        assert model.get_output_embeddings().A is table.A
        model.save_pretrained(tmp_path)
        assert_same(model_class.from_pretrained(tmp_path), model)

    def test_a_head_that_is_tied_to_another_embedding_is_refused(self, model_class, tmp_path):
        model = student(model_class)
        table = KroneckerEmbedding(model.config.vocab_size, model.config.hidden_size, model.config.vocab_size, 4)
        model.set_input_embeddings(table)
        with pytest.raises(ValueError, match=r"head is not made of the embedding's factors; call tie_weights\(\), or"):
            model.save_pretrained(tmp_path)
        model.tie_weights()
        model.save_pretrained(tmp_path)
        assert_same(model_class.from_pretrained(tmp_path), model)

    def test_a_layer_that_is_not_in_the_plan_is_refused(self, model_class, tmp_path):
        model = student(model_class)
        name = next(n for n in factored_modules(model.config) if n.endswith(("intermediate.dense", "c_fc")))
        parent, _, leaf = name.rpartition(".")
        layer = model.base_model.get_submodule(name)
        setattr(model.base_model.get_submodule(parent), leaf, nn.Linear(layer.in_features, layer.out_features))
        with pytest.raises(ValueError, match=rf"{name}' has \(m1, .*\) = None, but .* in config.factor_plan"):
            model.save_pretrained(tmp_path)

    def test_parameters_without_embeddings(self, model_class):
        model = student(model_class)
        tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, KroneckerEmbedding))]
        inside = {id(p) for table in tables for p in table.parameters()}
        rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
        assert model.num_parameters(exclude_embeddings=True) == rest
        model.get_input_embeddings().requires_grad_(False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert model.num_parameters(only_trainable=True) == trained
        assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == rest

    @pytest.mark.parametrize(("multiple", "size"), [(64, 192), (6, 66), (5, 75), (9, 63)])
    def test_padding_to_a_multiple_where_rows_hold_several_words(self, model_class, multiple, size):
        name = "wte" if "GPT2" in model_class.__name__ else "embeddings.word_embeddings"
        model = student(model_class, plan={name: (20, 8, 2)}, vocab_size=60)  # m2 = 3
        before = model.get_input_embeddings().to_dense().detach()
        model.resize_token_embeddings(61, pad_to_multiple_of=multiple)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
        assert torch.equal(model.get_input_embeddings().to_dense()[:60], before)


def test_a_class_that_makes_its_own_base_model_is_refused_with_the_remedy():
    class Mine(KroneckerBertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = kt.KroneckerBertModel(config)

    config = student(kt.KroneckerBertModel).config
    with pytest.raises(
        TypeError, match="Mine has no base model when KroneckerBertConfig is factored; derive it from a"
    ):
        Mine(config)

    class Own(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = kt.KroneckerBertModel(config)
            self.post_init()

    assert Own(config).bert.encoder.layer[0].attention.self.query.A.isfinite().all()


def test_papers_sizes_without_embeddings():
    with torch.device("meta"):
        model = kt.KroneckerBertModel(kt.KroneckerBertConfig(factor_plan="7.7x"))
    assert model.num_parameters(exclude_embeddings=True) == 10_886_980


def test_sizes_do_not_depend_on_partitioned_factors():
    """ZeRO-3 leaves empty parameters between the passes."""
    model = student(kt.KroneckerGPT2LMHeadModel)
    shown = repr(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert repr(model) == shown
    head = KroneckerLinear.tied_to(model.get_input_embeddings())
    assert (head.out_features, head.m1, head.n1, head.m2, head.n2, head.terms) == (72, 72, 16, 1, 2, 2)


def test_quantisers_pass_factored_layers_by_with_a_word(tmp_path, caplog):
    model = student(kt.KroneckerBertModel)
    model.save_pretrained(tmp_path)

    class Refusing(dict):
        """No quantiser need be installed: what it would do comes after the warning."""

    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="quant"):
        kt.KroneckerBertModel.from_pretrained(tmp_path, quantization_config=Refusing(quant_method="none of these"))
    assert "quantisers look for nn.Linear, so they pass by the factored layers of KroneckerBertModel" in caplog.text


@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForCausalLM])
def test_auto_classes_build_what_the_constructors_build(auto_class):
    model_class = kt.KroneckerBertForMaskedLM if auto_class is AutoModelForMaskedLM else kt.KroneckerGPT2LMHeadModel
    config = student(model_class).config
    config.gradient_checkpointing = True
    model = auto_class.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(model) is model_class
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
