from __future__ import annotations

import numpy as np
import pytest

from sala_training.data import words
from sala_training.data.tasks import Mix, Sample, SampleStream
from sala_training.data.tokenizer import BOS_ID, IM_END_ID, IM_START_ID, encode

RECALL = Mix(text=0, recall=1, chat=0)
CHAT = Mix(text=0, recall=0, chat=1)
TEXT = Mix(text=1, recall=0, chat=0)


def _decode(tokenizer, sample: Sample, start: int, end: int) -> str:
    return tokenizer.decode(sample.tokens[start:end].tolist(), skip_special_tokens=False)


def test_same_seed_and_step_give_the_same_batch(data_folder, samples: SampleStream) -> None:
    again = SampleStream.open(data_folder, seed=5)
    other = SampleStream.open(data_folder, seed=6)
    for step in (0, 7):
        tokens, weights = samples.batch(step, 6, 512, Mix())
        same_tokens, same_weights = again.batch(step, 6, 512, Mix())
        np.testing.assert_array_equal(tokens, same_tokens)
        np.testing.assert_array_equal(weights, same_weights)
        assert not np.array_equal(tokens, other.batch(step, 6, 512, Mix())[0])
    assert not np.array_equal(
        samples.batch(0, 6, 512, Mix())[0], samples.batch(1, 6, 512, Mix())[0]
    )


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_slices_of_any_world_make_the_same_global_batch(
    samples: SampleStream, world_size: int
) -> None:
    whole, weights = samples.batch(3, 6, 512, Mix())
    local = 6 // world_size
    parts = [samples.batch(3, local, 512, Mix(), rank * local) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in parts]), whole)
    np.testing.assert_array_equal(np.concatenate([w for _, w in parts]), weights)


@pytest.mark.parametrize("mix", [TEXT, RECALL, CHAT], ids=["text", "recall", "chat"])
@pytest.mark.parametrize("length_tokens", [256, 511, 1024, 4099, 16_384])
def test_batch_has_exact_length_and_types(
    samples: SampleStream, mix: Mix, length_tokens: int
) -> None:
    tokens, weights = samples.batch(0, 2, length_tokens, mix)
    assert tokens.shape == weights.shape == (2, length_tokens + 1)
    assert (tokens.dtype, weights.dtype) == (np.uint16, np.float32)
    assert (tokens[:, 0] == BOS_ID).all()
    assert (weights[:, 0] == 0).all()
    assert weights.sum() > 0


@pytest.mark.parametrize("index", range(12))
def test_recall_states_each_fact_once_where_it_says(
    samples: SampleStream, tokenizer, index: int
) -> None:
    sample = samples.sample(1, index, 2048, RECALL)
    assert sample.facts
    assert sample.turns
    question_start = sample.turns[0].answer_start
    text = _decode(tokenizer, sample, 0, question_start)
    for placed in sample.facts:
        piece = _decode(tokenizer, sample, placed.start, placed.start + placed.num_tokens)
        assert piece.strip() == placed.fact.text
        assert placed.fact.value in placed.fact.text
        assert text.count(placed.fact.text) == 1
        assert (sample.weights[placed.start : placed.start + placed.num_tokens] == 0).all()


@pytest.mark.parametrize("index", range(12))
@pytest.mark.parametrize("mix", [RECALL, CHAT], ids=["recall", "chat"])
def test_answer_spans_decode_to_the_answers(
    samples: SampleStream, tokenizer, mix: Mix, index: int
) -> None:
    sample = samples.sample(2, index, 1024, mix)
    for turn in sample.turns:
        answer = _decode(tokenizer, sample, turn.answer_start, turn.answer_end)
        assert answer == turn.answer
        assert turn.value in answer
        assert sample.tokens[turn.answer_end] == IM_END_ID
        # the model learns the answer and to stop after it
        span = sample.weights[turn.answer_start : turn.answer_end + 1]
        assert (span == mix.answer_weight).all()
        before = _decode(tokenizer, sample, 0, turn.answer_start)
        assert before.endswith(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("mix", [RECALL, CHAT], ids=["recall", "chat"])
def test_samples_are_tokenised_as_serving_would(samples: SampleStream, tokenizer, mix: Mix) -> None:
    for index in range(8):
        sample = samples.sample(4, index, 1500, mix)
        text = tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False)
        # a chat sample is cut in its last conversation, where the cut may fall inside a word
        whole = len(sample.tokens) - (32 if mix is CHAT else 0)
        assert encode(tokenizer, text)[:whole] == sample.tokens[:whole].tolist()


def test_questions_and_template_weigh_nothing(samples: SampleStream) -> None:
    sample = samples.sample(5, 0, 1024, RECALL)
    for at in np.flatnonzero(sample.tokens == IM_START_ID):
        assert sample.weights[at] == 0
    last_turn = sample.turns[-1]
    between = sample.weights[sample.turns[0].answer_end + 1 :] if len(sample.turns) > 1 else None
    if between is not None:
        answers = sum(t.answer_end + 1 - t.answer_start for t in sample.turns[1:])
        assert np.count_nonzero(between) == answers
    assert last_turn.answer_end < len(sample.tokens)


def test_keys_and_values_of_a_sample_differ(samples: SampleStream) -> None:
    for index in range(10):
        facts = [placed.fact for placed in samples.sample(6, index, 4096, RECALL).facts]
        keys = [fact.key for fact in facts]
        numbers = [fact.value for fact in facts if fact.value.isdigit()]
        assert len(set(keys)) == len(keys)
        assert len(set(numbers)) == len(numbers)


def test_held_out_key_words_are_in_no_training_list() -> None:
    held = {*words.HELD_OUT_ADJECTIVES, *words.HELD_OUT_PLACES}
    assert not held & {*words.ADJECTIVES, *words.PLACES}


def test_recall_refuses_a_length_without_room(samples: SampleStream) -> None:
    with pytest.raises(ValueError, match="at least 256 tokens, got 255"):
        samples.batch(0, 1, 255, RECALL)


def test_batch_refuses_a_mix_of_nothing(samples: SampleStream) -> None:
    with pytest.raises(ValueError, match="shares"):
        samples.batch(0, 1, 512, Mix(text=0, recall=0, chat=0))
