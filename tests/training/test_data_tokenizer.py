from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sala_training.data.stream import PhraseEncoder
from sala_training.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    IM_END_ID,
    IM_START_ID,
    PAD_ID,
    encode,
    render,
    train,
)

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = [
    "The passkey for the north tower is 48213.",
    "It's  a\ttab, two  spaces and a trailing one \n\n\nthree newlines; 3.14 = pi?",
    "naïve café — “quoted” … 東京 \N{GRINNING FACE}",
    "def f(x):\n    return x[0]\n\n    # comment",
    "",
]
CHATS = [
    [{"role": "user", "content": "What is the passkey?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Line one.\n\nLine two: {{ not_a_variable }} {% raw %}"},
        {"role": "assistant", "content": "48213"},
        {"role": "user", "content": " leading space and trailing newline\n"},
    ],
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_returns_the_same_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


def test_every_digit_is_its_own_token(tokenizer) -> None:
    pieces = [tokenizer.id_to_token(i) for i in encode(tokenizer, "Code 90210, year 1984.")]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("902101984")


def test_special_tokens_have_their_fixed_ids(tokenizer) -> None:
    names = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    ids = [tokenizer.token_to_id(name) for name in names]
    assert ids == [PAD_ID, BOS_ID, EOS_ID, IM_START_ID, IM_END_ID]


@pytest.mark.parametrize("text", [*TEXTS[:2], TEXTS[3], "What's it? We'll see (\"now\")... 12,5 %"])
def test_phrase_encoder_equals_the_tokenizer(tokenizer, text: str) -> None:
    assert PhraseEncoder(tokenizer).encode(text) == encode(tokenizer, text)


def test_phrase_encoder_refuses_text_it_would_cut_differently(tokenizer) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        PhraseEncoder(tokenizer).encode("café")


def test_training_twice_gives_the_same_tokenizer() -> None:
    texts = ["some words about the tower and the harbour\n\nmore words"] * 3
    assert train(texts, 280).to_str() == train(texts, 280).to_str()


def test_train_names_the_size_it_could_not_reach() -> None:
    with pytest.raises(ValueError, match="expected 4096 tokens"):
        train(["too little text"])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_render_equals_transformers(
    data_folder: Path, tokenizer, chat: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    from transformers import AutoTokenizer

    served = AutoTokenizer.from_pretrained(data_folder / "tokenizer")
    options = {"add_generation_prompt": add_generation_prompt}
    text = served.apply_chat_template(chat, tokenize=False, **options)
    assert render(chat, **options) == text
    ids = served.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert encode(tokenizer, text) == list(ids)
    # a plain completion starts like a training sample
    assert served("Hello")["input_ids"] == [BOS_ID, *encode(tokenizer, "Hello")]
    assert served.eos_token_id == EOS_ID


def test_config_holds_the_template(data_folder: Path) -> None:
    config = json.loads((data_folder / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["chat_template"].startswith("{{ bos_token }}")
