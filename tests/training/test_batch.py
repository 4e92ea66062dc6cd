from __future__ import annotations

import pytest
import torch

from sala_training.batch import CuSeqlens, concatenate, pack


def document(*tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.ones(len(tokens))
    weights[0] = 9.0  # of predicting the first token: never used
    return torch.tensor(tokens), weights


def test_a_document_takes_one_place_for_each_token_that_is_predicted() -> None:
    batch = pack([document(1, 2, 3), document(4, 5)])
    assert batch.tokens.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [2, 3, 5]
    assert batch.weights.tolist() == [1, 1, 1]
    assert batch.cu_seqlens.offsets.tolist() == [0, 2, 3]
    assert batch.cu_seqlens.offsets.dtype == torch.int32
    assert batch.cu_seqlens.positions.tolist() == [0, 1, 0]


def test_rows_are_put_together_and_their_documents_stay_apart() -> None:
    first, second = pack([document(1, 2, 3)]), pack([document(4, 5), document(6, 7)])
    both = concatenate([first, second])
    assert both.tokens.tolist() == [1, 2, 4, 6]
    assert both.cu_seqlens.lengths == (2, 1, 1)
    assert both.cu_seqlens.offsets.tolist() == [0, 2, 3, 4]


def test_equal_lengths_are_seen_on_the_host() -> None:
    assert CuSeqlens.of([3, 3]).equal_length == 3
    assert CuSeqlens.of([3, 3]).positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert CuSeqlens.of([3, 2]).equal_length is None


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_an_empty_document_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        CuSeqlens.of(lengths)


def test_a_document_of_one_token_or_without_its_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        pack([document(1)])
    with pytest.raises(ValueError, match="3 tokens and 2 weights"):
        pack([(torch.tensor([1, 2, 3]), torch.ones(2))])
