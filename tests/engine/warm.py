"""Run scripts of this folder in forks of one process that has imported vLLM, which is half of what a start costs.

Reads a line of JSON for each job from standard input, `[script, job, result, log]` as paths, and answers with a line: the
exit code of the script. The scripts run as if started by themselves, with standard output and error in the log.
"""

import json
import os
import runpy
import sys

import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401 - on a CPU machine a start imports it


def main() -> None:
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
