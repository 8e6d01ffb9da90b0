"""Students and twins of a sentence encoder encode, in sentence-transformers itself, as the teacher's settings say."""

import json
import shutil

import pytest
import tiny
import torch
from datasets import Dataset
from examples_runner import run_example
from huggingface_hub import constants
from loopback_hub import Fault
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import LayerNorm, Normalize, Pooling
from stranger import run
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertModel,
    DistilBertModel,
    ElectraModel,
    GPT2Model,
    MPNetModel,
    RobertaModel,
    XLMRobertaModel,
)

from kronecker_transformers import compress, to_dense
from kronecker_transformers.checkpoint.load import load_student, load_teacher, save_folder
from kronecker_transformers.checkpoint.pooling import MODES
from kronecker_transformers.checkpoint.pooling import Pooling as OurPooling
from kronecker_transformers.checkpoint.sentence_modules import encoder_settings, modules_of, read_modules
from kronecker_transformers.cli import main
from kronecker_transformers.experiments import training
from kronecker_transformers.experiments.distill import distill
from kronecker_transformers.hub.files import published_files
from kronecker_transformers.tasks.sentences import encode

SENTENCES = ["the quick brown fox", "a lazy dog jumps over a small model what a large model knows", "dog", "jumps over"]


def encoder(folder, dense_class=BertModel, modules=None, mode="mean", include_prompt=True, **settings):
    """A teacher in the folder, saved by sentence-transformers itself."""
    plain = folder.with_name(f"{folder.name}-plain")
    plain.mkdir(parents=True)
    tokenizer = tiny.tokenizer_for(tiny.model_type(dense_class), plain)
    tiny.teacher(dense_class).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=9)
    pooling = Pooling(32, mode, include_prompt=include_prompt)
    SentenceTransformer(modules=[transformer, pooling, *(modules or [])], device="cpu", **settings).save(str(folder))
    return folder


def embeddings(folder, **options):
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu").encode(
        SENTENCES, convert_to_tensor=True, **options
    )


def exact(model):
    """A plan with which the student is the teacher, so that any difference comes from the settings."""
    name = "wte" if model.config.model_type == "gpt2" else "embeddings.word_embeddings"
    return {name: (model.config.vocab_size, 1, 32)}


TEACHERS = {
    "mean": {"modules": [Normalize()]},
    "not normalised": {"similarity_fn_name": "dot"},
    **{mode: {"mode": mode} for mode in MODES},
    "two modes": {"mode": ("cls", "max")},
    "prompts": {
        "mode": "cls", "prompts": {"query": "what a ", "document": "the "}, "default_prompt_name": "query",
        "include_prompt": False,
    },
    "dense": {"modules": [Dense(32, 5), LayerNorm(5), Normalize()]},
}  # fmt: skip


@pytest.mark.parametrize("name", TEACHERS)
def test_student_and_twin_encode_as_the_teacher(name, tmp_path):
    teacher = encoder(tmp_path / "teacher", **TEACHERS[name])
    dense, _ = load_teacher(teacher)
    compress(teacher, exact(dense)).save_pretrained(tmp_path / "student")
    assert main(["expand", str(tmp_path / "student"), "--output", str(tmp_path / "twin")]) == 0
    wanted = SentenceTransformer(str(teacher), device="cpu")
    for folder in ("student", "twin"):
        found = SentenceTransformer(str(tmp_path / folder), trust_remote_code=True, device="cpu")
        assert found.max_seq_length == wanted.max_seq_length == 9
        assert (found.prompts, found.default_prompt_name) == (wanted.prompts, wanted.default_prompt_name)
        assert found.similarity_fn_name == wanted.similarity_fn_name
        assert [type(module) for module in found][1:] == [type(module) for module in wanted][1:]
        torch.testing.assert_close(embeddings(tmp_path / folder), embeddings(teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "dense"])
def test_our_own_encoding_is_that_of_sentence_transformers(name, tmp_path):
    folder = encoder(tmp_path / "teacher", **TEACHERS[name])
    model, tokenizer = load_teacher(folder)
    settings = encoder_settings(model, tokenizer)
    assert settings.max_length == 9  # by the tokenizer
    found = encode(model, tokenizer, SENTENCES, max_length=settings.max_length, settings=settings)
    wanted = embeddings(folder, normalize_embeddings=settings.normalize)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("skip", [0, 2])
def test_pooling_is_that_of_sentence_transformers(mode, side, skip):
    hidden = torch.randn(3, 7, 4, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4], [3]])
    mask = mask.flip(1) if side == "left" else mask
    features = {"token_embeddings": hidden, "attention_mask": mask.long(), "prompt_length": skip}
    wanted = Pooling(4, mode, include_prompt=False)(features)["sentence_embedding"]
    hidden = hidden.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()  # at padding anything may stand
    found = OurPooling((mode,), skip)(hidden, mask)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert not hidden.grad[~mask].any()


def test_the_trainer_of_sentence_transformers_trains_a_student(tmp_path):
    """Fine-tuned on pairs, saved by sentence-transformers, and opened by both packages with the same embeddings."""
    teacher = encoder(tmp_path / "teacher", modules=[Normalize()])
    plan = {"embeddings.word_embeddings": (64, 2, 3), "encoder.layer.*.intermediate.dense": (4, 2, 2)}
    compress(str(teacher), plan).save_pretrained(tmp_path / "student")
    model = SentenceTransformer(str(tmp_path / "student"), trust_remote_code=True, device="cpu")
    before = {name: value.clone() for name, value in model[0].auto_model.state_dict().items()}
    pairs = {"first": SENTENCES[:2], "second": SENTENCES[2:], "score": [1.0, 0.0]}
    loss = CosineSimilarityLoss(model)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=20, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True, seed=0,
        report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    SentenceTransformerTrainer(model, arguments, Dataset.from_dict(pairs), loss=loss).train()
    first, second = (model.encode(pairs[name]) for name in ("first", "second"))
    similar, different = (first * second).sum(1)
    assert similar > different + 0.5
    trained = model[0].auto_model.state_dict()
    factors = [name for name in trained if name.endswith((".A", ".B"))]
    assert factors
    assert not any(torch.equal(trained[name], before[name]) for name in factors)
    model.save(str(tmp_path / "trained"))
    ours, tokenizer = load_student(tmp_path / "trained")
    settings = encoder_settings(ours, tokenizer)
    found = encode(ours, tokenizer, SENTENCES, max_length=settings.max_length, settings=settings)
    torch.testing.assert_close(found, embeddings(tmp_path / "trained"))
    torch.testing.assert_close(found, model.encode(SENTENCES, convert_to_tensor=True))


def test_unknown_pooling():
    with pytest.raises(ValueError, match=r"pooling modes \('median',\) must be one or more of mean, cls"):
        OurPooling(("median",))


def test_gpt2_with_its_last_token(tmp_path):
    teacher = encoder(tmp_path / "teacher", GPT2Model, mode="lasttoken")
    compress(teacher, exact(load_teacher(teacher)[0])).save_pretrained(tmp_path / "student")
    torch.testing.assert_close(embeddings(tmp_path / "student"), embeddings(teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense_class", [DistilBertModel, ElectraModel, MPNetModel, RobertaModel, XLMRobertaModel])
def test_encoders_of_other_families(dense_class, tmp_path):
    folder = encoder(tmp_path / "teacher", dense_class)
    wanted = embeddings(folder)
    # as all-mpnet-base-v2 has it: the head of the model that it was made from, without its weights
    config = json.loads((folder / "config.json").read_text())
    name = dense_class.__name__.replace("Model", "ForMaskedLM")
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    dense, tokenizer = load_teacher(folder)
    assert type(dense) is dense_class
    table = dense.get_input_embeddings().weight
    plan = {"embeddings.word_embeddings": (len(table), 1, table.shape[1])}  # exact
    compress(dense, plan, tokenizer=tokenizer).save_pretrained(tmp_path / "student")
    torch.testing.assert_close(embeddings(tmp_path / "student"), wanted, rtol=1e-4, atol=1e-5)


def test_every_way_of_saving_carries_them(tmp_path):
    teacher = encoder(tmp_path / "teacher", mode="cls", modules=[Normalize()])
    names = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    loaded = AutoModel.from_pretrained(teacher)  # by transformers, as a user would
    save_folder(tmp_path / "a", compress(loaded, "7.7x").model)
    again, _ = load_student(tmp_path / "a")
    save_folder(tmp_path / "b", again)
    save_folder(tmp_path / "c", to_dense(again))
    for folder in "abc":
        files = {str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*")}
        assert names <= files
        for name in names:
            assert (tmp_path / folder / name).read_bytes() == (teacher / name).read_bytes()
        assert names <= {file.name for file in published_files(tmp_path / folder)}


def test_a_classifier_made_from_an_encoder_is_no_encoder(tmp_path):
    teacher = encoder(tmp_path / "teacher")
    assert modules_of(AutoModel.from_pretrained(teacher))
    assert modules_of(BertForMaskedLM.from_pretrained(teacher)) is None


def test_old_layout_with_the_encoder_in_a_folder_of_its_own_and_pickled_weights(tmp_path):
    teacher = encoder(tmp_path / "teacher", modules=[Dense(32, 5)])
    wanted = embeddings(teacher)
    old = tmp_path / "teacher" / "0_Transformer"
    old.mkdir()
    for path in list(teacher.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(old / path.name)
    modules = json.loads((teacher / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (teacher / "modules.json").write_text(json.dumps(modules))
    dense = teacher / modules[2]["path"]
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    torch.testing.assert_close(embeddings(teacher), wanted)
    compress(teacher, exact(load_teacher(teacher)[0])).save_pretrained(tmp_path / "student")
    assert not list((tmp_path / "student").rglob("*.bin"))
    torch.testing.assert_close(embeddings(tmp_path / "student"), wanted, rtol=1e-4, atol=1e-4)


def test_without_the_package(tmp_path):
    teacher = encoder(tmp_path / "teacher", mode="cls", modules=[Normalize()])
    compress(teacher, exact(load_teacher(teacher)[0])).save_pretrained(tmp_path / "student")
    code = """
        import sys
        sys.modules["kronecker_transformers"] = None
        import torch
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
        assert type(model[0].auto_model).__module__.startswith("transformers_modules.")
        torch.save(model.encode(sys.argv[3:], convert_to_tensor=True), sys.argv[2])
        print("done")
    """
    process = run(code, tmp_path / "student", tmp_path / "found.pt", *SENTENCES, tmp_path=tmp_path)
    assert process.stdout.strip().endswith("done"), process.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found, embeddings(teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["cls", "max"])
def test_distillation_follows_the_pooling_and_the_prompt(mode, tmp_path):
    prompts = {"prompts": {"query": "what a "}, "default_prompt_name": "query"}
    teacher = encoder(tmp_path / "teacher", mode=mode, modules=[Normalize()], **prompts)
    text, sts = tmp_path / "text.txt", tmp_path / "sts.csv"
    text.write_text("\n".join(SENTENCES * 5))
    sts.write_text(
        "sentence1,sentence2,label\n" + "".join(f"{a},{SENTENCES[0]},{i}.5\n" for i, a in enumerate(SENTENCES))
    )
    results = run_example(
        "run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[text], validation_text=[text], sts_file=sts,
        per_device_train_batch_size=4, max_steps=4, save_steps=2, plan="7.7x",
    )  # fmt: skip
    assert results["rows"]["similarity fidelity (Spearman)"][0] == pytest.approx(1)
    assert "STS, Spearman" in results["rows"]
    for folder in (tmp_path / "out" / "student", tmp_path / "out" / "checkpoints" / "checkpoint-4"):
        model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        assert model[1].pooling_mode == mode
        assert (model.max_seq_length, model.default_prompt_name) == (9, "query")
        assert (
            torch.linalg.vector_norm(model.encode(SENTENCES, convert_to_tensor=True), dim=-1).sub(1).abs().max() < 1e-5
        )


def test_a_prompt_that_does_not_count_does_not_count_in_the_command_distill(tmp_path, monkeypatch):
    prompts = {"prompts": {"query": "what a "}, "default_prompt_name": "query"}
    teacher = encoder(tmp_path / "teacher", mode="cls", include_prompt=False, **prompts)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{sentence} {number}" for number in range(40) for sentence in SENTENCES))
    used = []

    class Noted(training.DistillationTrainer):
        def __init__(self, *given, **options):
            used.append(options["pooling"])
            super().__init__(*given, **options)

    monkeypatch.setattr(training, "DistillationTrainer", Noted)
    distill(teacher, text, tmp_path / "student", ratio=3, steps=2)
    assert used == [OurPooling(("cls",), skip=3)]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BROKEN = {
    "foreign": (lambda m: m[1].update(type="evil.Pooling"), "has the module 'evil.Pooling', where Pooling or"),
    "unknown": (lambda m: m[1].update(type="sentence_transformers.models.CLIPModel"), r"module '.*CLIPModel', where"),
    "outside": (lambda m: m[1].update(path="../1_Pooling"), "path '../1_Pooling', no folder of its own"),
    "hidden": (lambda m: m[1].update(path="/etc"), "path '/etc', no folder of its own"),
    "root": (lambda m: m[1].update(path=""), "path '', no folder of its own"),
    "twice": (lambda m: m.append(m[1]), "path '1_Pooling', no folder of its own"),
    "no encoder": (
        lambda m: m.pop(0),
        "where Transformer or MLMTransformer of sentence-transformers can be taken over",
    ),
    "empty": (lambda m: m.clear(), "remove modules.json from a copy of it to compress its encoder alone"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_student_could_not_take_over_is_refused_at_once(case, tmp_path):
    teacher = encoder(tmp_path / "teacher")
    change, message = BROKEN[case]
    edit(teacher / "modules.json", change)
    with pytest.raises(ValueError, match=message):
        compress(teacher, "7.7x")


def test_settings_that_name_code_are_refused(tmp_path):
    teacher = encoder(tmp_path / "teacher", modules=[Dense(32, 5)])
    compress(teacher, "7.7x").save_pretrained(tmp_path / "student")
    for folder in (teacher, tmp_path / "student"):
        edit(folder / "2_Dense" / "config.json", lambda c: c.update(activation_function="platform.node"))
    message = r"activation_function='platform.node' in 2_Dense/config.json of the teacher could run code \(an "
    with pytest.raises(ValueError, match=message):
        compress(teacher, "7.7x")
    with pytest.raises(ValueError, match=message):
        published_files(tmp_path / "student")


@pytest.mark.parametrize("key", ["config_args", "model_args", "tokenizer_args", "config_kwargs"])
def test_settings_of_the_encoder_that_name_a_repository_are_refused(key, tmp_path):
    teacher = encoder(tmp_path / "teacher")
    edit(
        teacher / "sentence_bert_config.json", lambda c: c.update({key: [{"auto_map": {"AutoModel": "org/evil--m.M"}}]})
    )
    with pytest.raises(ValueError, match=r"auto_map={.*} in sentence_bert_config.json of the teacher could run code"):
        compress(teacher, "7.7x")


def test_settings_that_are_no_object_are_refused(tmp_path):
    teacher = encoder(tmp_path / "teacher")
    (teacher / "config_sentence_transformers.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config_sentence_transformers.json of the teacher holds \[\], not an object"):
        compress(teacher, "7.7x")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "config_sentence_transformers.json",
            {"prompts": ["query: "]},
            r"prompts=\['query: '\] in .* must be an object",
        ),
        (
            "sentence_bert_config.json",
            {"max_seq_length": "9"},
            "max_seq_length='9' of the teacher's encoder must be a num",
        ),
    ],
)
def test_settings_of_a_wrong_type_are_refused(name, changes, message, tmp_path):
    teacher = encoder(tmp_path / "teacher")
    edit(teacher / name, lambda c: c.update(changes))
    with pytest.raises(ValueError, match=message):
        encoder_settings(*load_teacher(teacher))


@pytest.mark.parametrize(("length", "wanted"), [(1e30, None), (7.0, 7)])
def test_a_length_of_the_tokenizer_may_be_a_float(length, wanted, tmp_path):
    teacher = encoder(tmp_path / "teacher")
    edit(teacher / "sentence_bert_config.json", lambda c: c.pop("max_seq_length", None))
    model, tokenizer = load_teacher(teacher)
    tokenizer.model_max_length = length
    assert encoder_settings(model, tokenizer).max_length == wanted


@pytest.mark.parametrize("changes", [{"sentence_transformers": {"activation_fn": "platform.node"}},
                                     {"sbert_ce_default_activation_function": "platform.node"}])  # fmt: skip
def test_code_in_the_config_of_a_cross_encoder_is_refused(changes, tmp_path):
    teacher = encoder(tmp_path / "teacher")
    edit(teacher / "config.json", lambda c: c.update(changes))
    with pytest.raises(ValueError, match=r"='platform.node' in config.json of the teacher could run code"):
        compress(teacher, "7.7x")


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"])
def test_a_module_that_lacks_a_file_is_refused(name, tmp_path):
    teacher = encoder(tmp_path / "teacher", modules=[Dense(32, 5)])
    (teacher / name).unlink()
    kind = name.partition("/")[0][2:]
    with pytest.raises(ValueError, match=f"has the module {kind}, but {name} is missing; save or download"):
        compress(teacher, "7.7x")


def test_letters_that_only_sentence_transformers_would_lower_are_refused(tmp_path):
    teacher, settings = encoder(tmp_path / "teacher"), "sentence_bert_config.json"
    model, tokenizer = load_teacher(teacher)
    edit(teacher / settings, lambda c: c.update(do_lower_case=True))
    assert encoder_settings(load_teacher(teacher)[0], tokenizer).pooling.modes == ("mean",)  # it lowers them itself
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.add_tokens(["A", "a"])
    with pytest.raises(ValueError, match="do_lower_case=True in the settings of the teacher's encoder is not what its"):
        encoder_settings(load_teacher(teacher)[0], tokenizer)
    assert encoder_settings(model, tokenizer).pooling.modes == ("mean",)  # without that setting


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_prompt_that_leaves_no_room_for_a_sentence_is_refused(include_prompt, tmp_path):
    prompts = {"prompts": {"query": "the dog jumps over a lazy fox"}, "default_prompt_name": "query"}
    teacher = encoder(tmp_path / "teacher", include_prompt=include_prompt, **prompts)
    model, tokenizer = load_teacher(teacher)
    assert len(tokenizer("the dog jumps over a lazy fox").input_ids) == 9
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 20))
    message = "a sentence is cut at 9 tokens, and the prompt 'the dog jumps over a lazy fox' alone has 9"
    with pytest.raises(ValueError, match=message):
        encode(model, tokenizer, SENTENCES, max_length=9, settings=encoder_settings(model, tokenizer))
    assert len(encode(model, tokenizer, SENTENCES, max_length=10, settings=encoder_settings(model, tokenizer))) == 4
    with pytest.raises(ValueError, match=message):
        distill(str(teacher), text=tmp_path / "text.txt", output=tmp_path / "student")
    with pytest.raises(ValueError, match=message):
        run_example("run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[tmp_path / "text.txt"])
    assert not (tmp_path / "student").exists()
    assert not (tmp_path / "out").exists()


def test_embeddings_that_are_cut_are_refused(tmp_path):
    teacher = encoder(tmp_path / "teacher", truncate_dim=16)
    assert embeddings(teacher).shape == (4, 16)
    with pytest.raises(ValueError, match=r"truncate_dim=16 of the teacher would cut the embeddings"):
        encoder_settings(*load_teacher(teacher))


@pytest.mark.parametrize("kind", ["text", "common"])
def test_settings_of_the_processing_count(kind, tmp_path):
    folder = encoder(tmp_path / "teacher")
    given = json.loads((folder / "sentence_bert_config.json").read_text())
    processing = {"processing_kwargs": {kind: {"max_length": 6, "truncation": True, "padding": True}}}
    (folder / "sentence_bert_config.json").write_text(json.dumps({**given, **processing}))
    model, tokenizer = load_teacher(folder)
    settings = encoder_settings(model, tokenizer)
    assert settings.max_length == 6
    found = encode(model, tokenizer, SENTENCES, max_length=settings.max_length, settings=settings)
    torch.testing.assert_close(found, embeddings(folder, normalize_embeddings=True), rtol=1e-5, atol=1e-5)
    processing["processing_kwargs"]["text"] = {"add_special_tokens": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps({**given, **processing}))
    with pytest.raises(
        ValueError, match=r"processing_kwargs of the teacher's encoder has \{'add_special_tokens': False"
    ):
        encoder_settings(*load_teacher(folder))


def test_a_pooling_in_a_folder_of_another_name(tmp_path):
    teacher = encoder(tmp_path / "teacher", mode="cls")
    (teacher / "1_Pooling").rename(teacher / "pool")
    edit(teacher / "modules.json", lambda m: m[1].update(path="pool"))
    model, tokenizer = load_teacher(teacher)
    settings = encoder_settings(model, tokenizer)
    assert settings.pooling.modes == ("cls",)
    wanted = embeddings(teacher, normalize_embeddings=True)
    torch.testing.assert_close(encode(model, tokenizer, SENTENCES, 64, 9, settings), wanted)


def test_a_way_of_pushing_that_would_leave_them_out_is_refused(tmp_path):
    model = compress(encoder(tmp_path / "teacher"), "7.7x").model
    with pytest.raises(ValueError, match="would leave out the pooling and prompts of this sentence encoder"):
        model.save_pretrained(tmp_path / "student", push_to_hub=True)
    assert not (tmp_path / "student").exists()


def put_on_hub(hub, folder, name="org/encoder"):
    hub.repos[f"models/{name}"] = repo = hub.empty_repo()
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repo.commit("main", files, "upload")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_that_the_hub_fails_to_send_is_not_a_file_that_is_not_there(hub, cache, tmp_path):
    put_on_hub(hub, encoder(tmp_path / "teacher", mode="cls"))
    assert read_modules("org/encoder").pooling().modes == ("cls",)
    shutil.rmtree(cache)
    hub.faults = [Fault(method, "1_Pooling/config.json", 500, times=9) for method in ("HEAD", "GET")]
    with pytest.raises(OSError, match=r"1_Pooling/config.json of 'org/encoder' cannot be (looked up|read)"):
        read_modules("org/encoder")


def test_a_model_that_was_passed_does_not_know_its_pooling_and_says_so(hub, cache, tmp_path, caplog):
    put_on_hub(hub, encoder(tmp_path / "teacher", mode="cls"))
    model = AutoModel.from_pretrained("org/encoder", cache_dir=cache)
    assert modules_of(model) is None
    assert "whether org/encoder has pooling and prompts of sentence-transformers is not known" in caplog.text
    caplog.clear()
    assert modules_of(load_teacher("org/encoder")[0]).pooling().modes == ("cls",)
    assert not caplog.text


def test_modules_that_no_distillation_follows_are_refused_before_it(tmp_path):
    teacher = encoder(tmp_path / "teacher", modules=[Dense(32, 5)])
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(ValueError, match="has the modules Pooling, Dense; embeddings are compared after Pooling"):
        run_example("run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[tmp_path / "text.txt"])
    assert not (tmp_path / "out").exists()
