from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sala_kernels.spec import SalaSpec
from sala_training.config import RecipeError, with_overrides
from sala_training.export import export
from sala_training.loop import ResumeError, load_trained, train, weighted_loss
from sala_training.recipes import RECIPES, demo, tiny

if TYPE_CHECKING:
    from pathlib import Path

    from sala_training.config import Recipe, Stage
    from sala_training.loop import BatchFn

CPU = torch.device("cpu")
SHORT = [
    "model.vocab_size=64",
    "batch_tokens=512",
    "log_every_steps=1",
    "stages.0.num_steps=4",
    "stages.0.length_tokens=128",
    "stages.1.num_steps=4",
    "stages.1.length_tokens=256",
    "optim.warmup_steps=2",
]


@pytest.fixture
def recipe() -> Recipe:
    """Four dense steps and four sparse ones."""
    return with_overrides(tiny(), SHORT)


def batches(step: int, stage: Stage, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A walk through the vocabulary, so that there is something to learn; some answers."""
    generator = torch.Generator().manual_seed(step)
    shape = (num_seqs, stage.length_tokens + 1)
    steps = torch.randint(1, 3, shape, generator=generator)
    weights = 1 + 7 * (torch.rand(shape, generator=generator) < 0.1).float()
    return steps.cumsum(1) % 64, weights


def stopping(after_step: int, action: Any) -> BatchFn:
    """The same data; when the batch of ``after_step`` is asked for, something happens first."""

    def with_action(step: int, stage: Stage, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == after_step:
            action()
        return batches(step, stage, num_seqs)

    return with_action


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def assert_same_run(recipe: Recipe, first: Path, second: Path) -> None:
    assert log_of(first) == log_of(second)
    weights = load_trained(recipe, second).state_dict()
    for name, value in load_trained(recipe, first).state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(with_overrides(tiny(), SHORT), run_dir, batches, CPU)
    return run_dir


def test_loss_falls(tmp_path: Path) -> None:
    recipe = with_overrides(tiny(), [*SHORT, "stages.0.num_steps=40", "optim.lr=0.01"])
    assert train(recipe, tmp_path, batches, CPU)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[0] > 3.5  # near the 4.2 of a guess among 64
    assert max(losses[-4:]) < 2.0


class Killed(Exception):  # noqa: N818  (it stands for no error of the program)
    """Stands for SIGKILL: the process stops without saving."""


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_a_killed_run_resumes_to_the_same_weights_and_log(
    recipe: Recipe, whole_run: Path, tmp_path: Path, killed_at: int
) -> None:
    def die() -> None:
        raise Killed

    # state saved after every second step at the latest: a deadline in the past stops after one
    assert not train(recipe, tmp_path, batches, CPU, max_seconds=0)
    with pytest.raises(Killed):
        train(recipe, tmp_path, stopping(killed_at, die), CPU)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "los')  # and a line was cut
    assert train(recipe, tmp_path, batches, CPU)
    assert_same_run(recipe, whole_run, tmp_path)


def test_sigterm_saves_and_the_run_goes_on(recipe: Recipe, whole_run: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    terminate = stopping(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not train(recipe, tmp_path, terminate, CPU)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ResumeError, match="finished run, got step 6 of 8"):
        load_trained(recipe, tmp_path)
    assert train(recipe, tmp_path, batches, CPU)
    assert_same_run(recipe, whole_run, tmp_path)
    parts = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert [(part["first_step"], part["last_step"]) for part in parts] == [(0, 6), (6, 8)]


def test_a_finished_run_is_left_alone(recipe: Recipe, whole_run: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole_run.iterdir()}

    def never(*arguments: object) -> Any:
        raise AssertionError("asked for data")

    assert train(recipe, whole_run, never, CPU)
    assert {path.name: path.read_bytes() for path in whole_run.iterdir()} == before


def test_another_recipe_is_refused(recipe: Recipe, whole_run: Path) -> None:
    other = with_overrides(recipe, ["seed=1"])
    with pytest.raises(ResumeError, match=f"another recipe.*{other.digest()}"):
        train(other, whole_run, batches, CPU)


@pytest.mark.parametrize("num_bytes", [0, 1000, -1000])
def test_a_torn_state_is_refused(
    recipe: Recipe, whole_run: Path, tmp_path: Path, num_bytes: int
) -> None:
    torn = (whole_run / "state.pt").read_bytes()[:num_bytes]
    (tmp_path / "state.pt").write_bytes(torn)
    with pytest.raises(ResumeError, match="cannot be read"):
        train(recipe, tmp_path, batches, CPU)
    assert (tmp_path / "state.pt").read_bytes() == torn


def test_an_unfinished_run_is_not_exported(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="got step 0 of 8"):
        export(recipe, tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# "aot_eager" traces and differentiates as on a GPU and then runs the graphs with eager kernels;
# while tracing, torch warns of what it does itself
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("first_step", "num_graphs"), [(0, 2 + 2), (6, 2)], ids=["from the start", "resumed"]
)
def test_compiled_layers_are_whole_graphs_and_train_as_eager_ones(
    recipe: Recipe, whole_run: Path, tmp_path: Path, first_step: int, num_graphs: int
) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    if first_step:
        terminate = stopping(first_step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert not train(recipe, tmp_path, terminate, CPU)
    assert train(recipe, tmp_path, batches, CPU, compile_backend="aot_eager")
    compiled, eager = ([line["loss"] for line in log_of(d)] for d in (tmp_path, whole_run))
    assert compiled == pytest.approx(eager, rel=2e-3)
    # a stage: lightning layers, and sparse layers or their MLPs
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]


def test_answers_weigh_more_and_zeros_nothing() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = 5.0
    targets, weights = torch.tensor([[1, 2, 3]]), torch.tensor([[8.0, 1.0, 0.0]])
    losses = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none")
    metrics = weighted_loss(logits, targets, weights)
    assert metrics.loss == pytest.approx(((8 * losses[0] + losses[1]) / 9).item())
    assert metrics.answer_loss == pytest.approx(losses[0].item())
    assert metrics.answer_accuracy == 1


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    recipe = demo()
    assert recipe.num_steps == 3100
    assert recipe.lr_at(0) == pytest.approx(recipe.optim.lr / 100)
    assert recipe.lr_at(99) == recipe.lr_at(2014) == recipe.optim.lr
    assert recipe.lr_at(2558) == pytest.approx(recipe.optim.lr / 2, rel=2e-3)
    assert recipe.lr_at(3099) == pytest.approx(recipe.optim.lr * 0.05)
    with pytest.raises(IndexError):
        recipe.stage_at(3100)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_a_whole_number_of_sequences(name: str) -> None:
    recipe = RECIPES[name]()
    assert all(recipe.batch_tokens % stage.length_tokens == 0 for stage in recipe.stages)
    assert recipe.stages[-1].sparse


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "no field 'sed' in Recipe"),
        ("optim.rate=1", "no field 'rate' in Optim"),
        ("stages.7.num_steps=1", "no field '7' in tuple"),
        ("stages.-1.num_steps=1", "no field '-1' in tuple"),
        ("model.width=1", "no field 'width' in dict"),
        ("seed.low=1", "no field 'low' in int"),
        ("seed=1.5", "expected int, got 1.5"),
        ("seed=true", "expected int, got True"),
        ('optim.lr="high"', "expected float, got 'high'"),
        ("stages.0.sparse=1", "expected bool, got 1"),
        ("seed", "expected path=value"),
        ("seed=one", "expected a JSON value"),
    ],
)
def test_an_override_that_fits_no_field_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        with_overrides(demo(), [override])


def test_an_override_changes_its_field_and_the_digest_alone() -> None:
    recipe, before = tiny(), tiny().digest()
    changed = with_overrides(recipe, ["optim.lr=1", "stages.1.sparse=false", "model.head_dim=8"])
    assert changed.optim.lr == 1.0
    assert isinstance(changed.optim.lr, float)
    assert [stage.sparse for stage in changed.stages] == [False, False]
    assert changed.model["head_dim"] == 8
    assert recipe.digest() == before != changed.digest()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_ends_with_blocks_that_are_chosen_and_blocks_that_are_not(name: str) -> None:
    recipe = RECIPES[name]()
    sparse = SalaSpec.from_config(recipe.model).sparse
    num_forced = sparse.init_blocks + sparse.local_blocks + 1
    num_blocks = recipe.stages[-1].length_tokens // 64
    assert num_forced < sparse.num_selected_blocks < num_blocks
    assert sparse.dense_len < recipe.stages[-1].length_tokens
