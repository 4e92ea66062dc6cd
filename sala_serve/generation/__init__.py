"""The life of one generation: count, reserve, wait, prefill, answer, settle; whoever asks for it.

``Generations.run`` is the only way to an engine. It yields updates; when it ends without an error the answer is
complete, and when it is closed early everything it holds is given back.
"""

from sala_serve.generation.call import (
    PROMPT_FIELDS,
    Call,
    Chunk,
    Deadlines,
    Path,
    Prefilling,
    Quiet,
    Reserved,
    Update,
    Whole,
)
from sala_serve.generation.life import Generations
from sala_serve.scheduling.work import Waiting

__all__ = [
    "PROMPT_FIELDS",
    "Call",
    "Chunk",
    "Deadlines",
    "Generations",
    "Path",
    "Prefilling",
    "Quiet",
    "Reserved",
    "Update",
    "Waiting",
    "Whole",
]
