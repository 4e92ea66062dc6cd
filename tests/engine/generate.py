"""Run one vLLM engine as a user would: `python generate.py JOB.json RESULT.json`.

The job holds the arguments of `vllm.LLM`, batches of prompts (token ids) that are sent one after another,
and those of `vllm.SamplingParams` beyond greedy ones.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(skip_tokenizer_init=True, disable_log_stats=False, **job["engine"])
    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **job["sampling"])
    batches = []
    for prompts in job["batches"]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
        batches.append(
            [
                {
                    "tokens": list(o.outputs[0].token_ids),
                    "cached": o.num_cached_tokens,
                    "prompt_logprobs": [
                        entry[token].logprob
                        for entry, token in zip(
                            o.prompt_logprobs or [], o.prompt_token_ids, strict=False
                        )
                        if entry
                    ],
                }
                for o in outputs
            ]
        )
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result = {
        "batches": batches,
        "preemptions": counters["vllm:num_preemptions"],
        "drafts": counters.get("vllm:spec_decode_num_draft_tokens", 0),
        "drafts_accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
