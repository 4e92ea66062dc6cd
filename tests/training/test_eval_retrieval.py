from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest

from sala_training.data.tokenizer import encode, render
from sala_training.eval.bits import bits_per_byte, token_bytes
from sala_training.eval.retrieval import (
    Case,
    Variant,
    evaluate,
    is_right,
    openai_generator,
    placements,
)

if TYPE_CHECKING:
    from sala_training.data.stream import TokenStream


@pytest.mark.parametrize("variant", list(Variant))
def test_prompts_are_exact_and_equal_the_rendered_chat(
    tokenizer, held_out: TokenStream, variant: Variant
) -> None:
    cases = placements(10, 1024, 3, tokenizer, held_out, variant)
    assert len(cases) == 10
    for case in cases:
        text = render(case.messages, add_generation_prompt=True)
        assert encode(tokenizer, text) == list(case.prompt_ids)
        assert len(case.prompt_ids) == 1024
        content = case.messages[0]["content"]
        assert content.count(case.fact) == 1
        assert case.answer in case.fact
        assert case.answer not in case.distractors
        assert all(value in content for value in case.distractors)


def test_depths_cover_the_prompt_evenly_and_name_the_fact(tokenizer, held_out: TokenStream) -> None:
    cases = placements(20, 2048, 0, tokenizer, held_out)
    depths = [case.depth_frac for case in cases]
    assert max(abs(depth - (i + 0.5) / 20) for i, depth in enumerate(depths)) < 0.08
    for case in cases:
        at = round(case.depth_frac * 2048)
        text = tokenizer.decode(list(case.prompt_ids[at:]), skip_special_tokens=False)
        assert text.lstrip().startswith(case.fact)


def test_placements_repeat_with_their_seed(tokenizer, held_out: TokenStream) -> None:
    first, again, other = (placements(4, 512, s, tokenizer, held_out) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_placements_refuse_a_length_without_room(tokenizer, held_out: TokenStream) -> None:
    with pytest.raises(ValueError, match="room for text"):
        placements(1, 64, 0, tokenizer, held_out)
    with pytest.raises(ValueError, match="expected a stream of more than"):
        placements(1, 1 << 20, 0, tokenizer, held_out)


def _case(answer: str, distractors: tuple[str, ...] = ()) -> Case:
    return Case(
        variant=Variant.PASSKEY,
        messages=(),
        prompt_ids=(1, 2, 3),
        fact="The fact.",
        answer=answer,
        reply="",
        distractors=distractors,
        depth_frac=0.5,
    )


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("48213", "48213", True),
        ("The passkey for the north tower is 48213.", "48213", True),
        ("482134", "48213", False),
        ("48213 or 51111", "48213", False),
        ("I do not know.", "48213", False),
        ("She lives in LISBON.", "Lisbon", True),
        ("Lisbonne", "Lisbon", False),
        ("Lisbon or Rome", "Lisbon", False),
    ],
)
def test_only_the_exact_value_counts(text: str, answer: str, right: bool) -> None:
    assert is_right(text, _case(answer, ("51111", "Rome"))) is right


def test_evaluate_reports_by_depth(tokenizer, held_out: TokenStream) -> None:
    cases = placements(10, 512, 0, tokenizer, held_out)
    report = evaluate(cases, lambda case: case.answer if case.depth_frac > 0.5 else "?")
    assert report.exact_frac == sum(c.depth_frac > 0.5 for c in cases) / 10
    assert len(report.failures) == 10 - round(10 * report.exact_frac)
    right = [frac for frac in report.exact_frac_by_depth if frac is not None]
    assert right == sorted(right)
    assert (right[0], right[-1]) == (0.0, 1.0)
    assert report.length_tokens == 512
    json.dumps(report.to_json())
    with pytest.raises(ValueError, match="at least one case"):
        evaluate([], lambda case: "")


def test_openai_generator_sends_the_chat_greedily(
    tokenizer, held_out: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = placements(1, 512, 0, tokenizer, held_out)
    seen = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(
            (request.url.path, request.headers["authorization"], json.loads(request.content))
        )
        message = {"role": "assistant", "content": f"It is {case.answer}."}
        return httpx.Response(200, json={"choices": [{"message": message}]})

    client = httpx.Client
    transport = httpx.MockTransport(reply)
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=transport, **options))
    generate = openai_generator("http://engine/v1", "demo", api_key="key")
    assert evaluate([case], generate).exact_frac == 1.0
    path, authorization, body = seen[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer key")
    assert body["messages"] == list(case.messages)
    assert body["temperature"] == 0.0


def test_bits_per_byte_of_a_uniform_model(tokenizer, held_out: TokenStream) -> None:
    vocab = tokenizer.get_vocab_size()

    def uniform(tokens: np.ndarray) -> np.ndarray:
        return np.full(len(tokens) - 1, -np.log(vocab))

    bits = bits_per_byte(uniform, held_out.tokens, tokenizer, 256, max_windows=3)
    assert bits.bits_per_byte == pytest.approx(np.log2(vocab) * bits.num_tokens / bits.num_bytes)
    assert bits.num_tokens <= 3 * 256
    with pytest.raises(ValueError, match="at least"):
        bits_per_byte(uniform, held_out.tokens[:10], tokenizer, 256)


def test_token_bytes_add_up_to_the_text(tokenizer) -> None:
    text = "naïve café — plain words, 123"
    ids = encode(tokenizer, text)
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
