"""Run requests that arrive while others run: `python schedule.py JOB.json RESULT.json`.

The job holds the arguments of `vllm.LLM` and scenarios, run one after another on one engine. A scenario maps names
to requests: prompt (token ids), max_tokens and the step before which it arrives. The result says for every scenario
how many tokens of which request each step computed, what each generated and how many of its tokens were cached.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from vllm_ext.scheduler import SalaScheduler

STEPS: list[dict[str, int]] = []
"""Tokens of each request, step by step."""


class RecordingScheduler(SalaScheduler):
    def schedule(self, throttle_prefills: bool = False) -> Any:
        output = super().schedule(throttle_prefills)
        # vLLM appends a random suffix to the names
        STEPS.append({k.rsplit("-", 1)[0]: n for k, n in output.num_scheduled_tokens.items()})
        return output


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(skip_tokenizer_init=True, scheduler_cls=RecordingScheduler, **job["engine"])
    engine = llm.llm_engine
    result = []
    for scenario in job["scenarios"]:
        STEPS.clear()
        arriving, finished = dict(scenario), {}
        while arriving or engine.has_unfinished_requests():
            for name in [n for n, request in arriving.items() if request["step"] <= len(STEPS)]:
                request = arriving.pop(name)
                params = SamplingParams(
                    temperature=0,
                    ignore_eos=True,
                    detokenize=False,
                    max_tokens=request["max_tokens"],
                )
                engine.add_request(name, {"prompt_token_ids": request["prompt"]}, params)
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = {
                        "tokens": list(output.outputs[0].token_ids),
                        "cached": output.num_cached_tokens,
                    }
        result.append({"steps": list(STEPS), "outputs": finished})
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
