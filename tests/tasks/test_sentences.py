import pytest
import tiny
import torch
from scipy.stats import spearmanr
from transformers import BertModel

from kronecker_transformers.tasks.sentences import encode, neighbour_agreement, random_pairs, similarity_fidelity


def unit_vectors(count, seed):
    vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_a_perfect_student_scores_1_and_a_random_one_0():
    teacher = unit_vectors(300, 0)
    assert similarity_fidelity(teacher, teacher) == pytest.approx(1)
    assert neighbour_agreement(teacher, teacher) == 1
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert neighbour_agreement(teacher, teacher @ rotation) == pytest.approx(1, abs=0.01)
    assert similarity_fidelity(teacher, unit_vectors(300, 1)) == pytest.approx(0, abs=0.05)
    assert neighbour_agreement(teacher, unit_vectors(300, 1)) == pytest.approx(10 / 299, abs=0.02)


def test_neighbours_against_a_plain_loop():
    teacher, student = unit_vectors(40, 2), unit_vectors(40, 2) + 0.3 * unit_vectors(40, 3)
    common = 0
    for i in range(40):
        others = [j for j in range(40) if j != i]
        nearest = [set(sorted(others, key=lambda j: -float(e[i] @ e[j]))[:10]) for e in (teacher, student)]
        common += len(nearest[0] & nearest[1])
    assert neighbour_agreement(teacher, student) == pytest.approx(common / (40 * 10))


def test_few_sentences_have_few_neighbours():
    teacher, student = unit_vectors(4, 2), unit_vectors(4, 3)
    assert neighbour_agreement(teacher, student) == 1  # all three others
    with pytest.raises(ValueError, match="1 sentences have no neighbours; at least 2 are needed"):
        neighbour_agreement(teacher[:1], student[:1])


def test_fidelity_is_a_rank_correlation_of_similarities():
    teacher, student = unit_vectors(50, 2), unit_vectors(50, 2) + 0.5 * unit_vectors(50, 3)
    left, right = torch.triu_indices(50, 50, offset=1)
    everything = [[float(e[i] @ e[j]) for i, j in zip(left, right, strict=True)] for e in (teacher, student)]
    expected = spearmanr(*everything).statistic
    assert similarity_fidelity(teacher, student) == pytest.approx(expected, abs=0.02)


def test_random_pairs_are_of_different_sentences_and_always_the_same():
    pairs = random_pairs(5, 1000)
    assert 700 < pairs.shape[1] < 900
    assert (pairs[0] != pairs[1]).all()
    assert torch.equal(pairs, random_pairs(5, 1000))
    assert not torch.equal(pairs[:, :50], random_pairs(5, 1000, seed=1)[:, :50])


def test_embeddings_against_one_sentence_at_a_time(tmp_path):
    """Neither padding nor the order of the batches shows."""
    model, tokenizer = tiny.teacher(BertModel), tiny.bert_tokenizer(tmp_path)
    sentences = ["the quick brown fox", "a dog", "what a large model knows a small model learns", "lazy"] * 3
    found = encode(model, tokenizer, sentences, batch_size=5, max_length=8)
    for sentence, embedding in zip(sentences, found, strict=True):
        batch = tokenizer(sentence, truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            mean = model(**batch).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm())
