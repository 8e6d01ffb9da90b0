"""Factored word embeddings and the output heads that are tied to them: tying, replacing, resizing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .factor_plan import resolve_plan
from .kronecker_layers import FrequentWords, KroneckerEmbedding, KroneckerLinear
from .kronecker_matching import factorable_modules


class FactoredEmbeddings(PreTrainedModel):
    """The methods of a `PreTrainedModel` on embeddings and heads, for factored ones too; to stand before a class."""

    config: Any

    def _tie_head(self) -> None:
        """Make the output head one of the embedding's kind: of its factors, or dense; nothing if it is so already."""
        embedding: Any = self.get_input_embeddings()
        head, factored = self.get_output_embeddings(), isinstance(embedding, KroneckerEmbedding)
        if head is None or not self.config.tie_word_embeddings:
            return
        if isinstance(head, KroneckerLinear) == factored:
            if isinstance(head, KroneckerLinear):
                head.tied = (embedding,)  # it may be another one than before
            return
        names = {module: name for name, module in self.named_modules()}
        source, target = names[embedding], names[head]
        ties = type(self)._tied_weights_keys
        if factored:
            ties = {key: value for key, value in ties.items() if key != f"{target}.weight"}
            ties |= {f"{target}.{factor}": f"{source}.{factor}" for factor in "AB"}
            tied: Any = KroneckerLinear.tied_to(embedding)
        else:
            tied = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
            tied.weight = embedding.weight
        self._tied_weights_keys, tied.bias = ties, head.bias
        super().set_output_embeddings(tied)
        if head.bias is not None and head.bias.is_meta:
            # BERT has just made it the bias of its predictions too; the stock class ties the two after loading
            tied.bias = nn.Parameter(torch.empty_like(head.bias))

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method; a head that is tied becomes factored or dense, as the embedding is."""
        self._tie_head()
        super().tie_weights(*args, **kwargs)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As the stock method; the plan follows. As there, the head is tied anew by `tie_weights`."""
        if self.base_model is not self:
            super().set_input_embeddings(value)  # by this method of the base model
            return
        old = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is old)
        super().set_input_embeddings(value)
        factored = isinstance(value, KroneckerEmbedding)
        entry = value.entry if factored else None
        plan = resolve_plan(self.config.factor_plan, self.config).with_entry(name, entry, factorable_modules(self))
        self.config.factor_plan = plan.to_dict()

    def set_output_embeddings(self, value: Any) -> None:
        """As the stock method; a dense head beside a factored embedding is one of its own, and the config says so."""
        super().set_output_embeddings(value)
        if isinstance(value, KroneckerLinear) or not isinstance(self.get_input_embeddings(), KroneckerEmbedding):
            return
        self.config.tie_word_embeddings = False
        self._tied_weights_keys = type(self)._tied_weights_keys
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        if value.bias is not None:
            # BERT has just made it the bias of its predictions too; loading an untied model keeps them apart
            value.bias = nn.Parameter(value.bias.detach().clone(), requires_grad=value.bias.requires_grad)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As the stock method; factored embeddings are embeddings too."""
        found: int = super().num_parameters(only_trainable, exclude_embeddings)
        if exclude_embeddings:
            tables = [module for module in self.modules() if isinstance(module, (KroneckerEmbedding, FrequentWords))]
            factors = {factor for table in tables for factor in (table.A, table.B)}
            found -= sum(factor.numel() for factor in factors if factor.requires_grad or not only_trainable)
        return found

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As the stock method, also for a factored embedding and the head that is tied to it; the plan follows.

        Every row of A stands for m2 words, so the new size must be a multiple of m2; with `pad_to_multiple_of` it
        becomes one. New rows of A are drawn as the stock method draws new words: the words are linear in them. Of the
        frequent words those stay that are still there.

        Raises:
            ValueError: the new size is not a multiple of m2, or too small for the terms; nothing has changed then.
        """
        embedding = self.get_input_embeddings()
        if not isinstance(embedding, KroneckerEmbedding):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        size, m2 = embedding.num_embeddings if new_num_tokens is None else new_num_tokens, embedding.m2
        if pad_to_multiple_of is not None:
            multiple = math.lcm(pad_to_multiple_of, m2)
            size = -(-size // multiple) * multiple
        if size < 1 or size % m2:
            raise ValueError(
                f"new_num_tokens={size} must be a positive multiple of m2={m2}, the words per row of A; "
                f"pass pad_to_multiple_of={m2}"
            )

        name = next(name for name, module in self.base_model.named_modules() if module is embedding)
        old_rows, new_rows = embedding.m1, size // m2
        modules = factorable_modules(self.base_model)
        frequent = embedding.frequent
        left = None if frequent is None else frequent.words < size
        own = (0, 0) if frequent is None or left is None or not left.any() else (int(left.sum()), frequent.terms)
        entry = (new_rows, embedding.n1, embedding.terms, *own)
        plan = resolve_plan(self.config.factor_plan, self.config).with_entry(name, entry, modules)
        plan.match({**modules, name: (size, embedding.embedding_dim)})  # refuses before anything has changed
        self.config.factor_plan, self.config.vocab_size = plan.to_dict(), size
        rows = self._get_resized_embeddings(_rows_of_a(embedding), new_rows, None, mean_resizing).weight.detach()
        if not mean_resizing:  # drawn with the standard deviation of a word; turn it into that of a row of A
            rows[old_rows:] *= (m2 * embedding.n2) ** 0.5 / torch.linalg.vector_norm(embedding.B.detach())
        embedding.A.data = rows.unflatten(-1, embedding.A.shape[1:])  # in place, as in the stock method: ties hold
        embedding.A.grad = None
        if frequent is not None:
            frequent.words, frequent.m1 = frequent.words[left], own[0]
            frequent.A.data, frequent.A.grad = frequent.A.data[left], None
            embedding.frequent = frequent if own[0] else None
        embedding.num_embeddings, embedding.m1 = size, new_rows
        if embedding.padding_idx is not None and embedding.padding_idx >= size:
            embedding.padding_idx = None

        head = self.get_output_embeddings()
        if isinstance(head, KroneckerLinear):
            head.out_features, head.m1 = size, new_rows
            if head.bias is not None:
                head.bias.data = nn.functional.pad(head.bias.data, (0, size - head.bias.numel()))
                head.bias.grad = None
        elif head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, size, mean_resizing=mean_resizing))
        self.tie_weights()
        return embedding


def _rows_of_a(embedding: KroneckerEmbedding) -> nn.Embedding:
    """The rows of A, (m1, R n1), as a stock embedding of their own."""
    return nn.Embedding.from_pretrained(embedding.A.detach().flatten(1))
