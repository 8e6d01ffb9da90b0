"""Small dense teachers and tokenizers, built on the spot."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2Tokenizer,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

TEXT = "the quick brown fox jumps over the lazy dog and a small model learns what a large model knows"
LABELS = {0: "negative", 1: "neutral", 2: "positive"}

# Sizes are distinct and divide the presets: hidden 32, FFN 96, three layers.
BERT_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}
GPT2_SIZES = {"vocab_size": 72, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 40}
# Positions of RoBERTa and MPNet begin after that of the padding token, 1: there are two more.
AFTER_PADDING = {**BERT_SIZES, "max_position_embeddings": 42, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CONFIGS = {
    "bert": (BertConfig, BERT_SIZES),
    "distilbert": (DistilBertConfig, {
        "vocab_size": 64, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 40
    }),
    "electra": (ElectraConfig, {**BERT_SIZES, "embedding_size": 16}),
    "gpt2": (GPT2Config, {**GPT2_SIZES, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}),
    "mpnet": (MPNetConfig, AFTER_PADDING),
    "roberta": (RobertaConfig, {**AFTER_PADDING, "type_vocab_size": 1}),
    "xlm-roberta": (XLMRobertaConfig, {**AFTER_PADDING, "type_vocab_size": 1}),
}  # fmt: skip
"""Of every family, by the `model_type` of its dense models."""
OTHER_NAMES = {
    "distilbert": {
        "encoder.layer": "transformer.layer", "attention.self.*": "attention.[qkv]_lin",
        "attention.output.dense": "attention.out_lin", "intermediate.dense": "ffn.lin1", "output.dense": "ffn.lin2",
    },
    "mpnet": {"attention.self.*": "attention.attn.[qkv]", "attention.output.dense": "attention.attn.o"},
}  # fmt: skip
"""What families call the modules of BERT."""


def model_type(model_class):
    """Of the dense models of a class, dense or factored."""
    return model_class.config_class.model_type.removeprefix("kronecker_")


def family_config(name, **changes):
    config_class, sizes = CONFIGS[name]
    labels = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    return config_class(**{**sizes, **labels, **changes})


def bert_config(**changes):
    return family_config("bert", **changes)


def gpt2_config(**changes):
    return family_config("gpt2", **changes)


def as_family(plan, name):
    """A plan for BERT as one for another encoder of these sizes."""
    found = {}
    for pattern, entry in plan.items():
        if pattern == "pooler.dense" and name in ("distilbert", "electra"):
            continue
        for theirs, ours in OTHER_NAMES.get(name, {}).items():
            pattern = pattern.replace(theirs, ours)
        found[pattern] = entry
    if name == "electra":
        found["embeddings_project"] = (8, 4, 2)
    return found


def perturb(model, seed=0):
    """Give every parameter, biases and norms too, values that no initialisation would give."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def teacher(dense_class, seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    if "QuestionAnswering" in dense_class.__name__:
        changes = {"id2label": None, "label2id": None, **changes}  # two labels: start and end
    config = family_config(model_type(dense_class), **changes)
    return perturb(dense_class(config)).to(dtype).eval()


def inputs(model, batch=3, length=11, seed=1):
    """Token ids and a mask with sequences of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, length) if "MultipleChoice" in type(model).__name__ else (batch, length)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    for row, kept in enumerate((length, length - 4, 5)):
        mask[row, ..., kept:] = 0
    ids[mask == 0] = model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


def texts(number=80, seed=0):
    """Sentences of 2 to 24 words."""
    generator = torch.Generator().manual_seed(seed)
    words = TEXT.split()
    lengths = torch.randint(2, 25, (number,), generator=generator).tolist()
    return [" ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator)) for length in lengths]


def bert_tokenizer(folder, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    words = [*special, *sorted(set(TEXT.split())), *(f"##{c}" for c in "abcdefghij")]
    path = folder / "vocab.txt"
    path.write_text("\n".join(words))
    return BertTokenizer(str(path), mask_token=special[-1])


def tokenizer_for(name, folder):
    """One whose special tokens are where the config of a family has them."""
    if name == "gpt2":
        return gpt2_tokenizer(folder)
    if CONFIGS[name][1].get("pad_token_id") == 1:
        return bert_tokenizer(folder, ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"))
    return bert_tokenizer(folder)


def gpt2_tokenizer(folder):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [TEXT], BpeTrainer(vocab_size=72, special_tokens=["<pad>", "<|endoftext|>"], show_progress=False)
    )
    tokenizer.model.save(str(folder))
    return GPT2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>", pad_token="<pad>"
    )
