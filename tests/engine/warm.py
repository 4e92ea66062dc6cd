"""Run scripts of this folder in forks of one process that has imported vLLM, which is most of what a start costs.

Reads a line of JSON for each job from standard input, `[script, job, result, log]` as paths, and answers with a line: the
exit code of the script. The scripts run as if started by themselves, with standard output and error in the log.
"""

import functools
import gc
import json
import multiprocessing
import os
import runpy
import sys

import compressed_tensors  # noqa: F401 - a start imports it
import vllm.entrypoints.launchers.cli_args
import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401 - on a CPU machine a start imports it
from vllm.platforms import current_platform
from vllm.v1.executor import multiproc_executor


def prepare() -> None:
    """Do once what each start would do again."""
    # looks through all that is imported
    current_platform.register_triton_kernel_overrides()
    current_platform.register_triton_kernel_overrides = lambda: None
    # ranks are forks too; the CPU platform insists on processes that import everything again
    multiproc_executor.get_mp_context = functools.partial(multiprocessing.get_context, "fork")
    gc.freeze()  # vLLM collects several times while it starts: only what is new


def main() -> None:
    prepare()
    for line in sys.stdin:
        script, job, result, log = json.loads(line)
        if (pid := os.fork()) == 0:
            for source, target in ((os.devnull, 0), (log, 1), (log, 2)):
                os.dup2(os.open(source, os.O_RDWR | os.O_CREAT | os.O_APPEND), target)
            sys.argv = [script, job, result]
            runpy.run_path(script, run_name="__main__")
            return
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
