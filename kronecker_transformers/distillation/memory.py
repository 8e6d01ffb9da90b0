"""What a teacher said of a sentence, kept for the next time that the sentence comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

LIMIT = 2**30
"""Bytes of embeddings that are kept."""


class TeacherMemory:
    """A teacher's sentence embeddings by the tokens of the sentences, so that it reads each only once.

    A student that is trained for several epochs, or several students of one teacher, see the same sentences again, and
    a forward pass of the teacher costs about as much as a training step of a student that is a third of its size.

    It is for one teacher and one way of pooling.

    Args:
        limit: bytes of embeddings; when they are full, new sentences are read each time.

    Attributes:
        keeps: whether new sentences are kept; False while they will not come again.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.keeps = True
        self._limit, self._bytes = limit, 0
        self._kept: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self._kept)

    def embeddings(
        self, features: Mapping[str, Any], mask: Tensor, read: Callable[[Mapping[str, Any], Tensor], Tensor]
    ) -> Tensor:
        """Embeddings of the sentences of a batch; those that are new are read together.

        A batch with padding on the left is read each time: many models count their positions with it.

        Args:
            features: inputs of the teacher, (S, L) each.
            mask: (S, L), 1 at real positions.
            read: gives the embeddings (N, width) of N rows of both.

        Returns:
            (S, width).
        """
        if not bool(mask[:, 0].all()):
            return read(features, mask)
        keys = _keys(features, mask)
        new = [row for row, key in enumerate(keys) if key not in self._kept]
        found: dict[bytes, Tensor] = {}
        if new:
            rows = torch.tensor(new, device=mask.device)
            some = {n: value[rows] if isinstance(value, Tensor) else value for n, value in features.items()}
            values = read(some, mask[rows])
            found = dict(zip((keys[row] for row in new), values, strict=True))
            if self.keeps and self._bytes < self._limit:
                self._kept |= found
                self._bytes += values.nbytes
        return torch.stack([found[key] if key in found else self._kept[key] for key in keys])


def _keys(features: Mapping[str, Any], mask: Tensor) -> list[bytes]:
    """A digest of each sentence's real tokens, whatever the padding."""
    columns = [value.cpu().numpy() for name, value in sorted(features.items()) if isinstance(value, Tensor)]
    real = mask.bool().cpu().numpy()
    return [
        blake2b(b"".join(column[row][real[row]].tobytes() for column in columns), digest_size=16).digest()
        for row in range(len(real))
    ]
