from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from sala_kernels.spec import SalaSpec
from sala_training.model.sala import SalaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    RunJob = Callable[[str, Any, Path, dict[str, str]], tuple[Any, str]]

HERE = Path(__file__).parent
TIME_LIMIT_S = 300

# the oracle's matrices are small, and there are other processes for the other cores
torch.set_num_threads(1)

SPARSE, LIGHTNING = "minicpm4", "lightning-attn"
# 5 blocks a token (1 initial, 3 local, 1 by score) from 512 tokens on: selective at every length tested
CONFIG: dict[str, Any] = {
    "architectures": ["MiniCPMSALAForCausalLM"],
    "model_type": "minicpm_sala",
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "lightning_nh": 8,
    "lightning_nkv": 8,
    "lightning_head_dim": 32,
    "mixer_types": [SPARSE, LIGHTNING, LIGHTNING, SPARSE, LIGHTNING, SPARSE],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attn_use_rope": False,
    "lightning_use_rope": True,
    "qk_norm": True,
    "use_output_norm": True,
    "use_output_gate": True,
    "attn_use_output_gate": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "lightning_scale": "1/sqrt(d)",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 32,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": [2, 499],
    "torch_dtype": "float32",
    "sparse_config": {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 128,
        "topk": 3,
        "use_nope": False,
        "dense_len": 512,
    },
}


def random_model(config: dict[str, Any]) -> SalaForCausalLM:
    """Random weights whose attention is peaked enough that what is attended matters."""
    model = SalaForCausalLM(SalaSpec.from_config(config))
    model.initialise(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter *= 3
    return model


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    return CONFIG


@pytest.fixture(scope="session")
def model() -> SalaForCausalLM:
    return random_model(CONFIG)


def save(config: dict[str, Any], model: SalaForCausalLM, path: Path) -> Path:
    """Write a folder that holds config.json and model.safetensors, nothing else."""
    (path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def checkpoint(model: SalaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(CONFIG, model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def odd_checkpoint(tmp_path: Path) -> tuple[Path, Oracle]:
    """One query head a KV head, one table, no initial block, a lightning layer first, a prime vocabulary."""
    config = CONFIG | {
        "vocab_size": 509,
        "num_hidden_layers": 3,
        "num_key_value_heads": 8,
        "mixer_types": [LIGHTNING, SPARSE, LIGHTNING],
        "tie_word_embeddings": True,
        "sparse_config": CONFIG["sparse_config"] | {"init_blocks": 0, "topk": 1},
    }
    model = random_model(config)
    return save(config, model, tmp_path), Oracle(model)


@pytest.fixture(scope="session")
def repeating_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """Mixers and MLPs weigh so little that the next token follows from the last one most of the time."""
    model = random_model(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter *= 0.3
    return save(CONFIG, model, tmp_path_factory.mktemp("repeating")), Oracle(model)


@pytest.fixture
def one_kv_head_checkpoint(tmp_path: Path) -> tuple[Path, Oracle]:
    config = CONFIG | {"num_key_value_heads": 1}
    model = random_model(config)
    return save(config, model, tmp_path), Oracle(model)


def random_prompts(*lengths: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 499, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Dense, mixed and far into the sparse range, crossing dense_len while generating; on and off boundaries."""
    return random_prompts(1, 900, 1500, 2300, 640, 505, 100, seed=1)


@dataclass
class Oracle:
    """The model in plain PyTorch, one pass over whole sequences."""

    model: SalaForCausalLM
    _chosen: dict[Any, list[int]] = field(default_factory=dict)

    @torch.no_grad()
    def log_probability(self, prompt: list[int]) -> torch.Tensor:
        """Of each prompt token but the first, given those before it."""
        log_probability = self.model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)
        return log_probability.gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)

    @torch.no_grad()
    def next_tokens(self, prompt: list[int], tokens: list[int], **options: Any) -> list[int]:
        """Its greedy choice at each step, given the prompt and the tokens before that step."""
        # most tests ask the same questions and get the same answers
        key = (tuple(prompt), tuple(tokens), *sorted(options.items()))
        if key not in self._chosen:
            logits = self.model(torch.tensor([prompt + tokens]), **options)[0]
            self._chosen[key] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return self._chosen[key]

    def assert_greedy(self, run: EngineRun, *batches: list[list[int]]) -> None:
        """Check that every token an engine generated is the one this model would choose."""
        assert len(run.batches) == len(batches)
        for batch, outputs in zip(batches, run.batches, strict=True):
            for prompt, output in zip(batch, outputs, strict=True):
                assert output["tokens"] == self.next_tokens(prompt, output["tokens"])


@pytest.fixture(scope="session")
def oracle(model: SalaForCausalLM) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="session")
def always_sparse_oracle(oracle: Oracle) -> Oracle:
    spec = replace(oracle.model.spec, sparse=replace(oracle.model.spec.sparse, dense_len=0))
    model = SalaForCausalLM(spec)
    model.load_state_dict(oracle.model.state_dict())
    return Oracle(model)


@pytest.fixture(scope="session")
def engine_environment() -> dict[str, str]:
    """One process and one thread: starts fastest, and does not fight for cores with its neighbours."""
    return os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


class WarmProcesses:
    """Runs scripts of this folder in processes that have imported vLLM already, one of these per environment."""

    def __init__(self) -> None:
        self._processes: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}

    def run(
        self, script: str, job: Any, folder: Path, environment: dict[str, str]
    ) -> tuple[Any, str]:
        """Run a script on a job, in a process of its own; return its result and its log."""
        paths = folder / "job.json", folder / "result.json", folder / "log"
        for path in paths:
            path.unlink(missing_ok=True)
        paths[0].write_text(json.dumps(job))
        # on a GPU vLLM is imported by the process that uses it: what it finds out then does not survive a fork
        start = _run_alone if torch.cuda.is_available() else self._run_in_fork
        code = start([str(HERE / script), *map(str, paths)], environment)
        log = paths[2].read_text() if paths[2].exists() else ""
        assert code == "0", f"{script} ended with {code or 'nothing in time'}: {log[-5000:]}"
        return json.loads(paths[1].read_text()), log

    def _run_in_fork(self, command: list[str], environment: dict[str, str]) -> str:
        """Return the exit code, nothing if the time was over."""
        process = self._process(environment)
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(command), file=process.stdin, flush=True)
        if not select.select([process.stdout], [], [], TIME_LIMIT_S)[0]:
            os.killpg(process.pid, signal.SIGKILL)
        return process.stdout.readline().strip()

    def _process(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        key = frozenset(environment.items())
        if key not in self._processes or self._processes[key].poll() is not None:
            self._processes[key] = subprocess.Popen(
                [sys.executable, HERE / "warm.py"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._processes[key]

    def close(self) -> None:
        for process in self._processes.values():
            with process:  # closes its input, which ends it
                pass


def _run_alone(command: list[str], environment: dict[str, str]) -> str:
    """Return the exit code, nothing if the time was over."""
    with Path(command[-1]).open("wb") as log:
        try:
            code = subprocess.run(
                [sys.executable, *command[:-1]],
                env=environment,
                stdout=log,
                stderr=log,
                timeout=TIME_LIMIT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return ""
    return str(code)


@pytest.fixture(scope="session")
def run_job() -> Iterator[RunJob]:
    processes = WarmProcesses()
    yield processes.run
    processes.close()


@pytest.fixture(scope="session")
def newer_runner() -> dict[str, str]:
    """Environment in which the engine uses vLLM's V2 runner, its Triton kernels interpreted on a CPU."""
    if torch.cuda.is_available():
        return {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    return {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": str(HERE / "v2_on_cpu"),
    }


@dataclass
class EngineRun:
    """What an engine process generated."""

    batches: list[list[dict[str, Any]]]
    """Per batch and prompt: tokens, how many prompt tokens were cached, log-probabilities if asked for."""
    preemptions: int
    drafts: int
    """Tokens proposed by speculation."""
    drafts_accepted: int
    log: str


@dataclass
class Engine:
    """Starts an engine in a process of its own per call."""

    checkpoint: Path
    folder: Path
    environment: dict[str, str]
    run_job: RunJob

    def generate(
        self,
        *batches: list[list[int]],
        max_tokens: int = 16,
        prompt_logprobs: bool = False,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> EngineRun:
        """Generate greedily; ``arguments`` are those of ``vllm.LLM``."""
        defaults = {
            "model": str(self.checkpoint),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2560,
            "kv_cache_memory_bytes": 64 << 20,
            "gpu_memory_utilization": 0.2,  # on a GPU, other tests run beside it
        }
        sampling = {"max_tokens": max_tokens, "prompt_logprobs": 0 if prompt_logprobs else None}
        job = {"engine": defaults | arguments, "batches": batches, "sampling": sampling}
        result, log = self.run_job(
            "generate.py", job, self.folder, self.environment | (environment or {})
        )
        return EngineRun(**result, log=log)


@pytest.fixture
def engine(
    checkpoint: Path, tmp_path: Path, engine_environment: dict[str, str], run_job: RunJob
) -> Engine:
    return Engine(checkpoint, tmp_path, engine_environment, run_job)
