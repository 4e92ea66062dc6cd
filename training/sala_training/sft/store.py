"""Rendered chats on disk, and packed rows of them as a function of the training step."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sala_training.batch import pack
from sala_training.checkpoint import write_json
from sala_training.sft.chats import ChatError, read
from sala_training.sft.render import Renderer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sala_training.batch import Batch, StepPosition
    from sala_training.sft.chats import Chat
    from sala_training.sft.render import Rendered

logger = logging.getLogger(__name__)

TOKENS_NAME, SCORED_NAME, OFFSETS_NAME = "tokens.bin", "scored.bin", "offsets.bin"
MANIFEST_NAME = "chats.json"
_LOOK_AHEAD = 256
"""Samples that are tried for the room left in a row."""


def prepare(
    files: Sequence[Path],
    tokenizer_folder: Path,
    stop_ids: Collection[int],
    out: Path,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Render files of chats and write them for training.

    Args:
        files: as :func:`sala_training.sft.chats.read` takes them.
        tokenizer_folder: of the checkpoint that is to be served.
        stop_ids: token ids that end an answer in serving.
        out: folder, made if missing.
        skip_bad: leave out rows that are no chats or that the template refuses, and count them.

    Returns:
        What is also in ``chats.json``: digests of the files and the template, and counts.

    Raises:
        ChatError: a row is no chat or cannot be rendered, and ``skip_bad`` is not set; or none is left.
    """
    errors: list[ChatError] | None = [] if skip_bad else None
    renderer = Renderer(tokenizer_folder, stop_ids)
    counts: Counter[str] = Counter()

    def samples() -> Iterable[Rendered]:
        for path in files:
            for chat in read(path, errors):
                yield from _rendered(renderer, chat, errors, counts)

    written = write(samples(), out)
    if not written["samples"]:
        raise ChatError(f"expected chats in {[path.name for path in files]}, got none")
    manifest = {
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "tokenizer": _digest(tokenizer_folder),
        "stop_ids": sorted(stop_ids),
        **written,
        **counts,
        "left_out": len(errors or ()),
    }
    write_json(out / MANIFEST_NAME, manifest)
    for error in (errors or ())[:20]:
        logger.warning("left out: %s", error)
    logger.info("%s", manifest)
    return manifest


def _rendered(
    renderer: Renderer, chat: Chat, errors: list[ChatError] | None, counts: Counter[str]
) -> list[Rendered]:
    try:
        samples = renderer.render(chat)
    except ChatError as error:
        if errors is None:
            raise
        errors.append(error)
        return []
    counts["chats"] += 1
    counts["turns_alone"] += max(0, len(samples) - 1)
    return samples


def write(samples: Iterable[Rendered], out: Path) -> dict[str, int]:
    """Write samples; return how many there are, and how many tokens."""
    out.mkdir(parents=True, exist_ok=True)
    offsets, num_scored = [0], 0
    with (out / TOKENS_NAME).open("wb") as tokens, (out / SCORED_NAME).open("wb") as scored:
        for sample in samples:
            tokens.write(np.array(sample.tokens, "<u4").tobytes())
            scored.write(np.array(sample.is_scored, np.uint8).tobytes())
            offsets.append(offsets[-1] + len(sample.tokens))
            num_scored += sum(sample.is_scored)
    np.array(offsets, "<i8").tofile(out / OFFSETS_NAME)
    return {"samples": len(offsets) - 1, "tokens": offsets[-1], "scored_tokens": num_scored}


def _digest(folder: Path) -> str:
    """Return a digest of everything that decides how chats are rendered."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


class ChatRows:
    """Whole chats packed into rows; a :class:`~sala_training.batch.DataSource`.

    Chats are packed once, in an order drawn with the seed; every epoch reads the rows in another order. A
    chat never spans two rows. The room that no chat fits in is filled with the beginning of another one,
    not scored; a chat longer than a row is cut at its end.
    """

    def __init__(self, folder: Path, length_tokens: int, rows_per_step: int, seed: int = 0) -> None:
        """Pack what :func:`prepare` wrote.

        Args:
            folder: of the prepared chats.
            length_tokens: of a row.
            rows_per_step: of a training step, over all ranks.
            seed: of the order.

        Raises:
            ChatError: no chat has anything to learn within ``length_tokens``.
        """
        self._tokens = np.memmap(folder / TOKENS_NAME, "<u4", mode="r")
        self._scored = np.memmap(folder / SCORED_NAME, np.uint8, mode="r")
        self._offsets = np.fromfile(folder / OFFSETS_NAME, "<i8")
        self._length, self._rows_per_step, self._seed = length_tokens, rows_per_step, seed
        self.rows: list[list[tuple[int, int, bool]]] = self._pack()
        """Each row's documents: sample, tokens it takes, whether it is scored."""
        if not self.rows:
            raise ChatError(f"{folder}: expected chats with answers within {length_tokens} tokens")

    def _pack(self) -> list[list[tuple[int, int, bool]]]:
        lengths = np.diff(self._offsets) - 1
        order = np.random.default_rng((self._seed, 0)).permutation(len(lengths))
        waiting = [int(i) for i in order[::-1] if self._has_answer(int(i))]  # taken from the end
        rows = []
        fillers = 0
        while waiting:
            row: list[tuple[int, int, bool]] = []
            room = self._length
            while room and waiting:
                ahead = range(min(_LOOK_AHEAD, len(waiting)))
                fits = next((j for j in ahead if lengths[waiting[-1 - j]] <= room), None)
                if fits is None and row:
                    break
                sample = waiting.pop(-1 - (fits or 0))
                taken = min(int(lengths[sample]), room)
                row.append((sample, taken, True))
                room -= taken
            while room:
                sample = int(order[fillers % len(order)])
                fillers += 1
                if (taken := min(int(lengths[sample]), room)) > 0:
                    row.append((sample, taken, False))
                    room -= taken
            rows.append(row)
        return rows

    def _has_answer(self, sample: int) -> bool:
        start = self._offsets[sample]
        end = min(self._offsets[sample + 1], start + self._length + 1)
        return bool(self._scored[start:end].any())

    def batch(self, position: StepPosition, rows: range) -> Batch:
        """Return rows of a step; see :class:`~sala_training.batch.DataSource`."""
        documents = []
        for number in rows:
            epoch, place = divmod(
                position.stage_step * self._rows_per_step + number, len(self.rows)
            )
            documents += [self._document(*part) for part in self.rows[self._order(epoch)[place]]]
        return pack(documents)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, 1, epoch)).permutation(len(self.rows))

    def _document(
        self, sample: int, taken: int, is_scored: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part = slice(int(self._offsets[sample]), int(self._offsets[sample]) + taken + 1)
        tokens = torch.from_numpy(self._tokens[part].astype(np.int64))
        weights = torch.from_numpy(self._scored[part].astype(np.float32))
        return tokens, weights if is_scored else torch.zeros_like(weights)


def manifest(folder: Path) -> dict[str, Any]:
    """Return ``chats.json`` of a prepared folder."""
    content: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return content
