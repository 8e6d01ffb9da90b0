import copy

import pytest
import torch
import transformers
from students import ALL_MODELS, BERT_PLAN, MODELS, factored_modules, first_output, student
from tiny import bert_config, gpt2_config, inputs
from transformers import AttentionInterface, AutoModel, BertConfig, GPT2Config, GPT2LMHeadModel, MPNetConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kronecker_transformers as kt
from kronecker_transformers import to_dense
from kronecker_transformers.models import DENSE_CLASSES, kronecker_blocks
from kronecker_transformers.models.kronecker_family import FAMILIES


@pytest.mark.parametrize(
    ("model_class", "dense_config", "plan", "parameters"),
    [
        (kt.KroneckerBertModel, BertConfig(), {}, 109_482_240),
        (kt.KroneckerBertModel, BertConfig(), "7.7x", 14_211_852),
        (kt.KroneckerBertModel, BertConfig(), "21x", 5_228_272),
        # beside BERT-base: 5 words of 96 more, 2 positions more, no token types, 32 biases of 12 heads
        (kt.KroneckerMPNetModel, MPNetConfig(max_position_embeddings=514), "7.7x", 14_211_852 + 480 + 384),
        (kt.KroneckerGPT2LMHeadModel, GPT2Config(), {}, 124_439_808),
        (kt.KroneckerGPT2LMHeadModel, GPT2Config(), "kngpt2", 83_907_506),
    ],
)
def test_sizes_of_the_papers(model_class, dense_config, plan, parameters):
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dense(dense_config, plan))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_shapes_of_kngpt2():
    with torch.device("meta"):
        model = kt.KroneckerGPT2LMHeadModel(kt.KroneckerGPT2Config.from_dense(GPT2Config(), "kngpt2"))
    shapes = {name: tuple(p.shape) for name, p in model.transformer.h[1].named_parameters() if name[-1] in "AB"}
    assert shapes == {
        "attn.c_attn.A": (1152, 1, 768), "attn.c_attn.B": (2, 1, 1),
        "attn.c_proj.A": (384, 1, 768), "attn.c_proj.B": (2, 1, 1),
        "mlp.c_fc.A": (1536, 1, 768), "mlp.c_fc.B": (2, 1, 1),
        "mlp.c_proj.A": (384, 1, 3072), "mlp.c_proj.B": (2, 1, 1),
    }  # fmt: skip
    assert tuple(model.transformer.wte.A.shape) == (50257, 1, 384)
    assert tuple(model.transformer.wte.B.shape) == (1, 1, 2)
    assert model.lm_head.A is model.transformer.wte.A


@pytest.mark.parametrize(
    ("activation", "found"), [("gelu_new", "GELUTanh"), ("gelu", "GELUActivation"), ("relu", "ReLU")]
)
def test_gelu_of_gpt2_is_one_kernel_and_other_activations_are_theirs(activation, found):
    model = student(kt.KroneckerGPT2LMHeadModel, activation_function=activation)
    assert {type(block.mlp.act).__name__ for block in model.transformer.h} == {found}
    assert model.config.activation_function == activation
    batch, twin = inputs(model), to_dense(model)
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, rtol=1e-4, atol=1e-5)


@ALL_MODELS
def test_equals_its_dense_twin(model_class):
    model = student(model_class, dtype=torch.float64)
    twin = to_dense(model)
    assert type(twin).__module__.startswith("transformers.models.")
    batch = inputs(model)
    ours, theirs = model(**batch), twin(**batch)
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"past_key_values"}:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9)


@ALL_MODELS
def test_is_what_it_says(model_class):
    model = student(model_class)
    assert type(model.base_model) is model.config.base_class
    assert isinstance(model, DENSE_CLASSES[model_class])
    planned = set(factored_modules(model.config))
    built = {
        n for n, m in model.base_model.named_modules() if isinstance(m, (kt.KroneckerLinear, kt.KroneckerEmbedding))
    }
    assert built == planned - (set() if getattr(model.base_model, "pooler", None) else {"pooler.dense"})


@ALL_MODELS
def test_padding_does_not_change_the_rest(model_class):
    model = student(model_class, dtype=torch.float64)
    batch = inputs(model)
    alone = {key: value[1:2, ..., :7] for key, value in batch.items()}
    padded, short = first_output(model(**batch))[1:2], first_output(model(**alone))
    if padded.shape != short.shape:
        padded = padded[:, :7]
    torch.testing.assert_close(padded, short, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_class", [kt.KroneckerMPNetModel, kt.KroneckerBertModel])
def test_an_attention_of_ones_own_whose_mask_is_boolean(model_class, monkeypatch):
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))
    AttentionInterface.register("mine", sdpa_attention_forward)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = student(model_class, dtype=torch.float64)
    batch = inputs(model)
    real = batch["attention_mask"].bool()
    wanted = model(**batch).last_hidden_state[real]
    model.set_attn_implementation("mine")
    torch.testing.assert_close(model(**batch).last_hidden_state[real], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_class", [kt.KroneckerBertForMaskedLM, kt.KroneckerGPT2LMHeadModel])
def test_hidden_states_attentions_and_both_attention_paths(model_class):
    model = student(model_class, dtype=torch.float64)
    twin = to_dense(model)
    batch = inputs(model)
    fast = model(**batch).logits
    model.set_attn_implementation("eager")
    twin.set_attn_implementation("eager")
    ours = model(**batch, output_hidden_states=True, output_attentions=True)
    theirs = twin(**batch, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(ours.logits, fast, rtol=1e-9, atol=1e-9)
    assert len(ours.hidden_states) == 4
    assert len(ours.attentions) == 3
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.attentions, theirs.attentions, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_class", [kt.KroneckerBertForMaskedLM, kt.KroneckerGPT2LMHeadModel])
def test_gradient_checkpointing_gives_the_same_gradients(model_class):
    model = student(model_class, dtype=torch.float64, **(
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if "Bert" in model_class.__name__ else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    )).train()  # fmt: skip
    batch = inputs(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = "activation_checkpointing_enable"  # not yet there in transformers 5.17
            getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any(name.endswith(".A") for name in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.9},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generation_equals_the_dense_twin(settings):
    model = student(kt.KroneckerGPT2LMHeadModel, dtype=torch.float64)
    twin = to_dense(model)
    ids = torch.randint(2, 72, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids[mask == 0] = 0
    outputs = []
    for candidate in (model, twin):
        torch.manual_seed(3)
        outputs.append(candidate.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=8, **settings))
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] >= 13


@pytest.mark.parametrize("model_class", [kt.KroneckerBertForPreTraining, kt.KroneckerGPT2LMHeadModel])
def test_losses_equal_the_dense_twin(model_class):
    model = student(model_class, dtype=torch.float64)
    batch = inputs(model)
    labels = {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    if model_class is kt.KroneckerBertForPreTraining:
        labels["next_sentence_label"] = torch.tensor([0, 1, 1])
    torch.testing.assert_close(model(**batch, **labels).loss, to_dense(model)(**batch, **labels).loss)


class TestInitialisation:
    def test_products_have_the_stock_variance(self):
        config = kt.KroneckerGPT2Config.from_dense(gpt2_config(n_embd=256, n_inner=512, vocab_size=512, n_layer=2), {
            "wte": (512, 32, 2), "h.0.attn.c_proj": (32, 16, 3),
            "h.0.mlp.c_fc": (64, 32, 2), "h.0.mlp.c_proj": (256, 1, 40),
        })  # fmt: skip
        h = (model := kt.KroneckerGPT2LMHeadModel(config)).transformer.h
        residual = 0.02 / 2  # 0.02 / sqrt(2 n_layer)
        for layer, std in (
            (model.transformer.wte.to_dense(), 0.02), (h[0].mlp.c_fc.to_dense(), 0.02),
            (h[0].attn.c_proj.to_dense(), residual), (h[0].mlp.c_proj.to_dense(), residual),
            (h[1].attn.c_proj.weight, residual), (h[1].mlp.c_proj.weight, residual), (h[1].mlp.c_fc.weight, 0.02),
        ):  # fmt: skip
            assert layer.std().item() == pytest.approx(std, rel=0.15)

    def test_everything_is_initialised(self):
        """Memory that is not filled holds NaN here."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory
            assert torch.empty(3).isnan().all()
            models = [model_class(student(model_class).config) for model_class in MODELS]
        finally:
            torch.use_deterministic_algorithms(before)
        for model in models:
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                assert not tensor.is_meta, name
                assert tensor.isfinite().all(), name
        position_ids = kt.KroneckerBertModel(student(kt.KroneckerBertModel).config).embeddings.position_ids
        assert torch.equal(position_ids, torch.arange(40).unsqueeze(0))

    def test_padding_word_starts_at_zero(self):
        model = kt.KroneckerBertModel(kt.KroneckerBertConfig.from_dense(bert_config(pad_token_id=7), BERT_PLAN))
        table = model.get_input_embeddings()
        assert table.padding_idx == 7
        assert not table(torch.tensor(7)).any()
        tied = kt.KroneckerBertForMaskedLM(kt.KroneckerBertConfig.from_dense(bert_config(pad_token_id=7), BERT_PLAN))
        assert tied.get_output_embeddings().A is tied.get_input_embeddings().A
        assert not tied.get_input_embeddings()(torch.tensor(7)).any()
        assert tied.get_input_embeddings()(torch.tensor(8)).any()

    def test_seeded_and_in_the_asked_dtype(self):
        config = student(kt.KroneckerBertModel).config
        states = []
        for _ in range(2):
            torch.manual_seed(5)
            states.append(AutoModel.from_config(config, dtype=torch.bfloat16).state_dict())
        assert states[0]["embeddings.word_embeddings.A"].dtype == torch.bfloat16
        torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("model_class", [kt.KroneckerBertForMaskedLM, kt.KroneckerGPT2LMHeadModel])
class TestResize:
    @pytest.mark.parametrize("size", [64 + 21, 50])
    def test_old_words_stay_and_new_ones_work(self, model_class, size, tmp_path):
        model = student(model_class, dtype=torch.float64)
        before = model.get_input_embeddings()(torch.arange(50)).detach().clone()
        parameter = model.get_input_embeddings().A
        batch = {"input_ids": torch.randint(2, 50, (2, 6))}
        logits = model(**batch).logits[..., :50]
        model.resize_token_embeddings(size)

        table = model.get_input_embeddings()
        assert torch.equal(table(torch.arange(50)), before)
        assert table.num_embeddings == model.config.vocab_size == size
        output = model(**batch).logits
        assert output.shape[-1] == size
        torch.testing.assert_close(output[..., :50], logits, rtol=1e-10, atol=1e-10)
        assert model.get_output_embeddings().A is table.A
        assert table.A is parameter  # an optimizer that holds it goes on working

        model.save_pretrained(tmp_path)
        again = model_class.from_pretrained(tmp_path, dtype="auto")
        assert torch.equal(again(**batch).logits, output)
        torch.testing.assert_close(to_dense(model)(**batch).logits, output, rtol=1e-9, atol=1e-9)

    def test_new_words_look_like_the_old_ones(self, model_class):
        model = student(model_class)
        table = model.get_input_embeddings()
        with torch.no_grad():
            table.A.add_(3 * table.A.std())
        old = table.to_dense().detach()
        allowed = 0.25 * (old - old.mean(0)).std()
        assert old.mean(0).abs().max() > 2 * allowed  # words that are drawn around 0 would differ
        model.resize_token_embeddings(4000)
        new = table(torch.arange(old.shape[0], 4000)).detach()
        torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=allowed.item())

    def test_without_mean_resizing_new_words_have_the_initial_variance(self, model_class):
        model = student(model_class)
        size = model.config.vocab_size
        model.resize_token_embeddings(4000, mean_resizing=False)
        new = model.get_input_embeddings()(torch.arange(size, 4000))
        assert new.std().item() == pytest.approx(0.02, rel=0.1)

    def test_pad_to_multiple_and_no_change(self, model_class):
        model = student(model_class)
        assert model.resize_token_embeddings() is model.get_input_embeddings()
        model.resize_token_embeddings(pad_to_multiple_of=100)
        assert model.config.vocab_size == 100

    def test_rows_of_several_words(self, model_class):
        name = "wte" if "GPT2" in model_class.__name__ else "embeddings.word_embeddings"
        model = student(model_class, plan={name: (8, 4, 3)})
        words = model.get_input_embeddings().B.shape[0]
        with pytest.raises(ValueError, match=f"must be a positive multiple of m2={words}"):
            model.resize_token_embeddings(10 * words + 1)
        before = model.get_input_embeddings().to_dense()
        model.resize_token_embeddings(10 * words)
        assert torch.equal(model.get_input_embeddings().to_dense()[: len(before)], before)

    def test_training_goes_on(self, model_class):
        model = student(model_class)
        model.resize_token_embeddings(90)
        model(input_ids=torch.tensor([[88, 3]]), labels=torch.tensor([[2, 88]])).loss.backward()
        assert model.get_input_embeddings().A.grad[88].any()


def test_resizing_the_base_model_keeps_the_tie():
    model = student(kt.KroneckerGPT2LMHeadModel)
    model.transformer.resize_token_embeddings(90)
    assert model.lm_head.A is model.transformer.wte.A
    assert model(torch.tensor([[89, 3]])).logits.shape[-1] == 90


def test_a_size_that_does_not_fit_the_plan_changes_nothing():
    model = student(kt.KroneckerGPT2LMHeadModel, plan={"wte": (8, 1, 8)})
    with pytest.raises(ValueError, match="terms=8 must be <= 4"):
        model.resize_token_embeddings(36)
    assert model.config.vocab_size == model.transformer.wte.num_embeddings == 72
    assert model.config.factor_plan["wte"]["m1"] == 8


def test_resizing_an_untied_model_resizes_its_dense_head():
    model = student(kt.KroneckerGPT2LMHeadModel, tie_word_embeddings=False)
    assert type(model.lm_head) is torch.nn.Linear
    model.resize_token_embeddings(80)
    assert model(torch.tensor([[79, 2]])).logits.shape[-1] == 80


def test_resizing_an_untied_masked_language_model_loses_no_bias(tmp_path):
    model = student(kt.KroneckerBertForMaskedLM, tie_word_embeddings=False)
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path)
    batch = {"input_ids": torch.tensor([[79, 2]])}
    again = kt.KroneckerBertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_dense_embedding_resizes_as_in_the_stock_model():
    model = student(kt.KroneckerBertForMaskedLM, plan={"pooler.dense": (16, 16)})
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert model(torch.tensor([[69, 2]])).logits.shape[-1] == 70


def test_padding_row_is_dropped_when_it_is_cut_off():
    model = student(kt.KroneckerBertModel, pad_token_id=60)
    model.resize_token_embeddings(50)
    assert model.get_input_embeddings().padding_idx is None


def test_preset_names_work_wherever_a_plan_stands():
    config = kt.KroneckerBertConfig.from_dense(bert_config(), {})
    config.factor_plan = "7.7x"
    assert isinstance(kt.KroneckerBertModel(config).pooler.dense, kt.KroneckerLinear)


def test_deepcopy_keeps_the_tie():
    model = copy.deepcopy(student(kt.KroneckerGPT2LMHeadModel))
    assert model.lm_head.A is model.transformer.wte.A


def test_compiles_as_a_whole():
    model = student(kt.KroneckerBertForSequenceClassification)
    batch = inputs(model)
    torch._dynamo.reset()
    try:
        torch.compile(to_dense(model), fullgraph=True, backend="aot_eager")(**batch)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"this torch does not compile the stock model either: {error}")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_dense_twin_of_a_dense_model_is_refused():
    with pytest.raises(ValueError, match=r"class .*GPT2LMHeadModel is not one of this package's factored models"):
        to_dense(GPT2LMHeadModel(gpt2_config()))


def test_every_class_is_registered():
    for config_class in set(FAMILIES.values()):
        for auto_class, reference in config_class.auto_classes.items():
            if auto_class != "AutoConfig":
                with torch.device("meta"):
                    model = getattr(transformers, auto_class).from_config(config_class())
                assert type(model) is getattr(kt, reference.split(".")[1])


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of two sequences of 12 tokens; the batch sizes that pass through an encoder are counted."""
    monkeypatch.setattr(kronecker_blocks, "BLOCK", 30 * 32)
    sizes, models = [], transformers.models
    for encoder in (
        models.bert.modeling_bert.BertEncoder, models.distilbert.modeling_distilbert.Transformer,
        models.electra.modeling_electra.ElectraEncoder, models.mpnet.modeling_mpnet.MPNetEncoder,
        models.roberta.modeling_roberta.RobertaEncoder, models.xlm_roberta.modeling_xlm_roberta.XLMRobertaEncoder,
    ):  # fmt: skip

        def counted(self, hidden_states, *args, forward=encoder.forward, **kwargs):
            sizes.append(len(hidden_states))
            return forward(self, hidden_states, *args, **kwargs)

        monkeypatch.setattr(encoder, "forward", counted)
    return sizes


@pytest.mark.parametrize("model_class", [c for c in MODELS if "GPT2" not in c.__name__], ids=lambda c: c.__name__)
def test_blocks_of_a_large_batch_give_the_outputs_of_the_whole(model_class, blocks, monkeypatch):
    model = student(model_class, dtype=torch.float64)
    model.set_attn_implementation("eager")  # which gives attentions too
    batch = inputs(model, batch=7, length=12)
    batch |= {"output_hidden_states": True, "output_attentions": True}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = batch["input_ids"] % 2
    with torch.no_grad():
        found = model(**batch)
        assert max(blocks) == 2
        assert sum(blocks) == len(batch["input_ids"].flatten(0, -2))
        assert len(found.attentions) == len(found.hidden_states) - 1 == 3
        monkeypatch.setattr(kronecker_blocks, "BLOCK", 10**9)
        whole = model(**batch)
    assert found.keys() == whole.keys()
    torch.testing.assert_close(dict(found), dict(whole), rtol=1e-12, atol=1e-12)


def test_blocks_take_the_arguments_of_the_stock_model(blocks, monkeypatch):
    model = student(kt.KroneckerBertModel, dtype=torch.float64)
    ids, mask = inputs(model, batch=5, length=12).values()
    positions = torch.arange(12).flip(0).unsqueeze(0)
    arguments = (
        ((ids, mask), {}),
        ((ids,), {"position_ids": positions, "token_type_ids": torch.zeros(1, 12, dtype=torch.long)}),
        ((ids, mask[:, None, None, :].bool().expand(-1, 1, 12, -1)), {"position_ids": positions.expand(5, -1)}),
        ((), {"inputs_embeds": torch.randn(5, 12, 32, dtype=torch.float64), "attention_mask": mask}),
        ((ids, None, ids % 2), {"return_dict": False}),
    )
    with torch.no_grad():
        for args, kwargs in arguments:
            blocks.clear()
            monkeypatch.setattr(kronecker_blocks, "BLOCK", 30 * 32)
            found = model(*args, **kwargs)
            assert blocks == [2, 2, 1]
            monkeypatch.setattr(kronecker_blocks, "BLOCK", 10**9)
            whole = model(*args, **kwargs)
            assert type(found) is type(whole)
            for mine, other in zip(tuple(found), tuple(whole), strict=True):
                if isinstance(other, torch.Tensor):
                    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
                else:
                    assert mine == other


def test_a_compiled_encoder_is_called_once_for_each_block(blocks, monkeypatch):
    model = student(kt.KroneckerBertModel, dtype=torch.float64)
    batch = inputs(model, batch=5, length=12)
    with torch.no_grad():
        monkeypatch.setattr(kronecker_blocks, "BLOCK", 10**9)
        whole = model(**batch).last_hidden_state
        monkeypatch.setattr(kronecker_blocks, "BLOCK", 30 * 32)
        blocks.clear()
        model.encoder.compile(backend="eager")
        found = model(**batch).last_hidden_state
    assert blocks == [2, 2, 1]
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_the_batch_stays_whole_for_gradients_hooks_caches_and_decoders(blocks):
    model = student(kt.KroneckerBertModel)
    batch = inputs(model, batch=4, length=12)
    for args, kwargs in (((batch["input_ids"],), {"input_ids": batch["input_ids"]}), ((batch["input_ids"],) * 12, {})):
        with torch.no_grad(), pytest.raises(TypeError):
            model(*args, **kwargs)
    model(**batch).last_hidden_state.sum().backward()
    with torch.no_grad():
        seen = []
        hook = model.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        model(**batch)
        hook.remove()
        assert seen == [4]
        model(batch["input_ids"][:2], batch["attention_mask"][:2])
        decoder = student(kt.KroneckerBertModel, is_decoder=True)
        assert len(decoder(**batch, use_cache=True).past_key_values) == 3
        prefix = transformers.DynamicCache(config=decoder.config)
        model(batch["input_ids"], past_key_values=prefix)
        assert prefix.get_seq_length() == 12
        assert blocks == [4, 4, 2, 4, 4]
        blocks.clear()
        model(**batch)
        assert blocks == [2, 2]
