"""Some modules are factored, all others stay dense: --only."""

import json

import pytest
import torch
from tiny import CONFIGS, family_config, inputs, teacher, texts, tokenizer_for
from transformers import AutoModel, BertForMaskedLM, BertForSequenceClassification, GPT2LMHeadModel

from kronecker_transformers import compress, distill, search_plan
from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.cli import main
from kronecker_transformers.compression.plan_file import read_plan


def linear_flops(dense, length=128):
    """2 m n for every token and linear layer of a base model without a pooler."""
    shapes = [
        m.weight.shape for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and "pool" not in name
    ]
    return sum(2 * length * m * n for m, n in shapes)


def test_the_embedding_alone(tmp_path):
    dense = teacher(BertForMaskedLM, vocab_size=900)
    tokenizer = tokenizer_for("bert", tmp_path)
    base = sum(p.numel() for p in dense.base_model.parameters())
    result = compress(dense, ratio=1.5, only="embedding", calibration=texts(), tokenizer=tokenizer)
    assert list(result.model.config.factor_plan) == ["embeddings.word_embeddings"]
    factored = result.model.base_model.num_parameters()
    assert 0.97 <= factored * 1.5 / base <= 1
    assert result.search.parameters == factored
    assert result.search.flops == linear_flops(dense.base_model)
    kept = {n: p for n, p in dense.named_parameters() if "word_embeddings" not in n and "decoder" not in n}
    ours = dict(result.model.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in kept.items())
    assert result.search.presets == {}


def test_a_budget_of_flops_counts_what_stays_dense(tmp_path):
    dense, tokenizer = teacher(BertForMaskedLM), tokenizer_for("bert", tmp_path)
    whole = linear_flops(dense.base_model)
    only = ["encoder.layer.1.*"]
    found = search_plan(dense, texts(), flops=0.8 * whole, only=only, tokenizer=tokenizer)
    assert set(found.plan) <= {
        name for name, _ in dense.base_model.named_modules() if name.startswith("encoder.layer.1.")
    }
    assert 0.7 * whole < found.flops <= 0.8 * whole
    with pytest.raises(ValueError, match=r"flops=.* cannot be met: at least [\d,.]+ is possible"):
        search_plan(dense, texts(), flops=0.5 * whole, only=only, tokenizer=tokenizer)


def test_a_preset_is_cut_down():
    dense = teacher(BertForSequenceClassification)
    model = compress(dense, "7.7x", only=["encoder.layer.[01].attention.*", "embedding"]).model
    wanted = {"embeddings.word_embeddings"}
    for layer in (0, 1):
        wanted |= {f"encoder.layer.{layer}.attention.self.{name}" for name in ("query", "key", "value")}
        wanted.add(f"encoder.layer.{layer}.attention.output.dense")
    assert set(model.config.factor_plan) == wanted
    whole = compress(dense, "7.7x").model
    weights = dict(whole.named_parameters())
    for name, value in model.named_parameters():
        if name[-2:] in (".A", ".B"):
            assert torch.equal(weights[name], value)
    batch = inputs(model)
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_word_embedding_of_every_family(name):
    dense = AutoModel.from_config(family_config(name)).eval()
    model = compress(dense, only="embedding").model
    assert [type(m).__name__ for m in model.modules() if hasattr(m, "A")] == ["KroneckerEmbedding"]
    assert model.get_input_embeddings().A.shape[0] == dense.config.vocab_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "encoder.layers.*"}, r"only='encoder.layers.\*' matches no module .* for example encoder.layer"),
        ({"only": []}, r"only=\[\] leaves no module"),
        ({"only": "embedding", "plan": {"pooler.dense": (4, 4)}}, "other modules .* 'embeddings.word_emb"),
        ({"only": "embedding", "calibration": texts()}, "only='embedding' needs a ratio: the default, 7.7,"),
    ],
    ids=["no module", "no pattern", "another plan", "no ratio"],
)  # fmt: skip
def test_bad_input(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compress(teacher(BertForSequenceClassification), tokenizer=tokenizer_for("bert", tmp_path), **options)


def test_command_line_and_distillation(tmp_path, capsys):
    folder = tmp_path / "teacher"
    teacher(GPT2LMHeadModel, vocab_size=900).save_pretrained(folder)
    tokenizer_for("gpt2", tmp_path).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(texts(300)))
    options = ["--only", "embedding,h.1.*", "--ratio", "1.4", "--calibration", str(text)]
    assert main(["search", str(folder), *options, "-o", str(tmp_path / "plan.yaml")]) == 0
    plan = read_plan(tmp_path / "plan.yaml")
    assert {name.split(".")[0] for name in plan} <= {"wte", "h"}
    assert all(name == "wte" or name.startswith("h.1.") for name in plan)
    assert main(["compress", str(folder), *options, "--output", str(tmp_path / "student")]) == 0
    assert set(load_student(tmp_path / "student")[0].config.factor_plan) == set(plan)
    capsys.readouterr()
    assert main(["compress", str(folder), "--only", "x.*", "--output", str(tmp_path / "none")]) == 1
    assert "only='x.*' matches no module" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    options = {"ratio": 1.4, "only": "embedding", "steps": 2, "learning_rate": 1e-4, "bf16": True}
    done = distill(folder, text, tmp_path / "distilled", **options)
    assert list(done.model.config.factor_plan) == ["wte"]
    assert next(done.model.parameters()).dtype == torch.float32
    command = json.loads((tmp_path / "distilled" / "results.json").read_text())["options"]["command"]
    rest = ["--ratio", "1.4", "--only", "embedding", "--steps", "2", "--learning-rate", "0.0001", "--bf16"]
    assert command == ["kronecker-transformers", "distill", str(folder), "--text", str(text), *rest]
