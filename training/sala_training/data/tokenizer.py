"""The demo tokenizer: byte-level BPE with single-digit tokens, and its ChatML template.

The pre-tokenizer cuts text into words with their leading space, single digits, runs of punctuation and
runs of newlines. Because no token crosses such a cut, token lists of pieces that meet at a cut can be
concatenated and equal the tokens of the joined text; :mod:`sala_training.data.tasks` relies on it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

VOCAB_SIZE = 4096

PAD, BOS, EOS, IM_START, IM_END = "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IM_START, IM_END)
PAD_ID, BOS_ID, EOS_ID, IM_START_ID, IM_END_ID = range(5)
EOS_IDS = (EOS_ID, IM_END_ID)
"""Generation ends at either."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as MiniCPM4 writes it, after one ``<s>``; roles system, user and assistant; no default system."""

# no alternative may match across a digit, a newline run or the space before a word
_PIECES = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"| ?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\n+"
    r"|[^\S\n]+(?!\S)"
    r"|[^\S\n]+"
)


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the tokenizer on ``texts``; the same texts give the same tokenizer.

    Args:
        texts: training text only, never held-out text.
        vocab_size: exact number of tokens, the 5 special and 256 byte tokens included.

    Raises:
        ValueError: the texts have too few distinct pairs for ``vocab_size`` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"expected {vocab_size} tokens, got {tokenizer.get_vocab_size()}: "
            "pass more text or a smaller vocab_size"
        )
    # plain completions start with <s> as training samples do; chat prompts get theirs from the template
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length_tokens: int = 1 << 20) -> None:
    """Write a Hugging Face tokenizer folder: tokenizer.json, tokenizer_config.json, special_tokens_map.json.

    Args:
        tokenizer: from :func:`train`.
        folder: made if missing.
        max_length_tokens: ``model_max_length`` of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "additional_special_tokens": [IM_START, IM_END],
        "model_max_length": max_length_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    special = {**roles, "additional_special_tokens": [IM_START, IM_END]}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder written by :func:`save`."""
    # not from_file: it reports a missing file as a bare Exception that does not name it
    return Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # the settings of transformers, so that both render the same bytes
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        CHAT_TEMPLATE
    )


def render(messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Return the chat as the text a model reads, through the same template as serving.

    Args:
        messages: each with ``role`` and ``content``.
        add_generation_prompt: end with the opening of an assistant turn.
    """
    text: str = _template().render(
        messages=messages, bos_token=BOS, add_generation_prompt=add_generation_prompt
    )
    return text


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return token ids of ``text`` without an added ``<s>``."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
