"""Small dense teachers and tokenizers, built on the spot."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import BertConfig, BertTokenizer, GPT2Config, GPT2Tokenizer

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


def bert_config(**changes):
    return BertConfig(**{**BERT_SIZES, "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}, **changes})


def gpt2_config(**changes):
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    labels = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    return GPT2Config(**{**GPT2_SIZES, **special, **labels, **changes})


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
    config = (bert_config if dense_class.config_class is BertConfig else gpt2_config)(**changes)
    return perturb(dense_class(config)).to(dtype).eval()


def inputs(model, batch=3, length=11, seed=1):
    """Token ids and a mask with sequences of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, length) if "MultipleChoice" in type(model).__name__ else (batch, length)
    ids = torch.randint(2, model.config.vocab_size, shape, generator=generator)
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


def bert_tokenizer(folder):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(set(TEXT.split())),
        *(f"##{c}" for c in "abcdefghij"),
    ]
    path = folder / "vocab.txt"
    path.write_text("\n".join(words))
    return BertTokenizer(str(path))


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
