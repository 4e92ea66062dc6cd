from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sala_training.data.miniature import miniature
from sala_training.data.stream import TokenStream
from sala_training.data.tasks import SampleStream
from sala_training.data.tokenizer import load

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole data folder made from the help texts of this Python."""
    folder = tmp_path_factory.mktemp("data")
    miniature(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(data_folder: Path):
    return load(data_folder / "tokenizer")


@pytest.fixture(scope="session")
def samples(data_folder: Path) -> SampleStream:
    return SampleStream.open(data_folder, seed=5)


@pytest.fixture(scope="session")
def held_out(data_folder: Path, tokenizer) -> TokenStream:
    return TokenStream.open(data_folder / "heldout.bin", tokenizer)
