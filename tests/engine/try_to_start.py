"""Try to start engines one after another: `python try_to_start.py JOBS.json RESULT.json`.

The jobs map names to arguments of `vllm.LLM`; the result maps each name to the error it met, or to null.
"""

import json
import sys
from pathlib import Path

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory


def main() -> None:
    errors = {}
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        try:
            LLM(skip_tokenizer_init=True, enforce_eager=True, **arguments)
        except Exception as error:  # noqa: BLE001  # any error is the result
            errors[name] = f"{type(error).__name__}: {error}"
        else:
            errors[name] = None
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
