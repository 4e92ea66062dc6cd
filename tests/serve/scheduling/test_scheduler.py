from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from fairness.engine import Facts, SimulatedPrompt
from sala_serve.errors import EngineUnavailable, PromptDoesNotFit, QueueFull, QueueTimeout

if TYPE_CHECKING:
    from fairness.play import Outcome, Play
    from sala_serve.scheduling.scheduler import Scheduler
    from tests.serve.scheduling.conftest import RunPlay

LONG = 20_480
"""Ten times what is long, 20 s."""


def assert_nothing_left(play: Play) -> None:
    snapshot = play.scheduler.snapshot()
    assert (snapshot.num_queued, snapshot.queued_tokens, snapshot.tenants) == (0, 0, ())
    scheduler: Scheduler = play.scheduler
    for ledger in scheduler._ledgers.values():
        assert (ledger.jobs, ledger.besides) == ([], [])
        assert ledger.short_rate._num_running == ledger.long_rate._num_running == 0
        assert ledger.kv_held_tokens() == 0
    assert not scheduler._plan
    assert scheduler._chooser._reservation is None
    assert all(not engine.requests for engine in play.engines)


async def cancel(task: asyncio.Task[Outcome]) -> None:
    task.cancel()
    await asyncio.wait({task})


def test_first_request_starts_at_once_and_is_told_nothing(run_play: RunPlay):
    async def scene(play: Play) -> None:
        outcome = await play.send(play.work("a", 1000))
        assert outcome.told == []
        assert outcome.ttft_s == pytest.approx(1.0)
        assert_nothing_left(play)

    run_play(scene)


def test_waiting_request_is_told_at_once_and_every_second(run_play: RunPlay):
    async def scene(play: Play) -> None:
        play.send(play.work("a", LONG))
        outcome = await play.send(play.work("b", LONG))
        times = [at_s for at_s, _ in outcome.told]
        assert times[0] == 0
        assert all(0 < later - at <= 1.0 for at, later in zip(times, times[1:], strict=False))
        assert outcome.started_at_s - times[-1] <= 1.0
        first = outcome.told[0][1]
        assert (first.place, first.num_ahead) == (1, 0)

    run_play(scene)


def test_short_question_does_not_wait_for_long_prompts_of_its_own_tenant(run_play: RunPlay):
    async def scene(play: Play) -> None:
        for _ in range(20):
            play.send(play.work("a", LONG))
        await asyncio.sleep(15)
        question = await play.send(play.work("a", 500))
        assert question.ttft_s < 2.1

    run_play(scene)


def test_long_prompt_finishes_under_a_stream_of_short_ones(run_play: RunPlay):
    async def scene(play: Play) -> None:
        async def questions() -> None:
            while True:
                play.send(play.work("a", 500, 4))
                await asyncio.sleep(0.55)  # 91 % of what the engine can do

        play.run(questions())
        await asyncio.sleep(20)
        long = await play.send(play.work("a", LONG))
        assert long.ended_at_s is not None
        assert long.ttft_s < 60 + 10 * 20 + 200

    run_play(scene)


@pytest.mark.parametrize("max_long_prefills", [1, 2])
def test_long_prefills_at_the_same_time_are_capped(run_play: RunPlay, max_long_prefills: int):
    async def scene(play: Play) -> None:
        for _ in range(4):
            play.send(play.work("a", LONG))
        most = 0
        for _ in range(60):
            await asyncio.sleep(0.5)
            most = max(most, play.scheduler.snapshot().engines[0].num_long_prefills)
        assert most == max_long_prefills

    run_play(scene, max_long_prefills=max_long_prefills)


def test_next_long_prefill_is_there_before_the_last_one_ends(run_play: RunPlay):
    async def scene(play: Play) -> None:
        tasks = [play.send(play.work("a", LONG)) for _ in range(3)]
        await asyncio.wait(tasks)
        assert play.clock() == pytest.approx(3 * LONG / 1000, rel=0.03)

    run_play(scene)


def test_no_more_requests_run_than_the_engine_has_places(run_play: RunPlay):
    async def scene(play: Play) -> None:
        tasks = [play.send(play.work("a", 10, 100)) for _ in range(10)]
        await asyncio.sleep(0.5)
        snapshot = play.scheduler.snapshot()
        assert (snapshot.engines[0].num_running, snapshot.num_queued) == (4, 6)
        await asyncio.wait(tasks)
        assert_nothing_left(play)

    run_play(scene, engine={"facts": Facts(max_num_seqs=4)})


def test_what_does_not_fit_beside_others_waits_and_what_fits_passes(run_play: RunPlay):
    async def scene(play: Play) -> None:
        first = play.send(play.work("a", 1000, 1000))
        await asyncio.sleep(0.1)
        large = play.send(play.work("a", 1500, 100))
        small = await play.send(play.work("a", 100, 10))
        assert small.ttft_s < 2
        await large
        assert large.result().started_at_s == pytest.approx(first.result().ended_at_s)

    run_play(scene, engine={"facts": Facts(kv_capacity_tokens=3000)})


def test_memory_is_kept_free_for_a_request_that_waited_too_long(run_play: RunPlay):
    async def scene(play: Play) -> None:
        # each takes more than half of what a long one leaves
        async def crowd() -> None:
            while True:
                play.send(play.work("b", 2000, 400))
                await asyncio.sleep(2.5)

        play.run(crowd())
        await asyncio.sleep(10)
        large = await play.send(play.work("a", 7000, 100))
        assert large.ttft_s < 40

    run_play(
        scene,
        engine={"facts": Facts(kv_capacity_tokens=8000)},
        overdue_s=5.0,
        overdue_prefills=1.0,
        long_prompt_tokens=1024,
        max_long_prefills=4,
    )


@pytest.mark.parametrize(("num_tokens", "fits"), [(2999, True), (3000, False)])
def test_prompt_that_no_engine_can_ever_hold_is_refused(
    run_play: RunPlay, num_tokens: int, fits: bool
):
    async def scene(play: Play) -> None:
        if fits:
            assert (await play.send(play.work("a", num_tokens, 1))).ended_at_s
            return
        with pytest.raises(PromptDoesNotFit, match="3000 tokens"):
            async with play.scheduler.turn(play.work("a", num_tokens), print):
                pass
        assert_nothing_left(play)

    run_play(scene, engine={"facts": Facts(kv_capacity_tokens=3000)})


def test_without_an_engine_requests_are_refused_and_waiting_ones_go_on_waiting(run_play: RunPlay):
    async def scene(play: Play) -> None:
        first = play.send(play.work("a", LONG, 4))
        second = play.send(play.work("a", LONG, 4))
        await asyncio.sleep(1)
        play.engines[0].is_ready = False
        with pytest.raises(EngineUnavailable):
            async with play.scheduler.turn(play.work("a", 10), print):
                pass
        await asyncio.sleep(60)
        assert first.done()
        assert not second.done()
        told = play.outcomes[1].told[-1][1]
        assert (told.expected_start_s, told.place) == (None, 1)
        play.engines[0].is_ready = True
        await second

    run_play(scene)


@pytest.mark.parametrize("limit", [{"max_queued_requests": 8}, {"max_queued_tokens": 8 * LONG}])
def test_one_tenant_takes_half_of_the_queue_and_leaves_room(
    run_play: RunPlay, limit: dict[str, int]
):
    async def scene(play: Play) -> None:
        play.send(play.work("flood", LONG))
        await asyncio.sleep(0.1)
        for _ in range(4):
            play.send(play.work("flood", LONG))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull, match="5 with") as refused:
            async with play.scheduler.turn(play.work("flood", LONG), print):
                pass
        assert refused.value.headers["X-Sala-Queue-Place"] == "5"
        assert float(refused.value.headers["X-Sala-Expected-Wait-S"]) == pytest.approx(100, abs=5)
        assert play.scheduler.snapshot().num_refused == 1
        # there is room for others, and what can start needs none
        other = play.send(play.work("other", LONG))
        assert (await play.send(play.work("flood", 100))).ttft_s < 3
        assert not other.done()
        assert play.scheduler.snapshot().num_queued == 5

    run_play(scene, **limit)


def test_turn_that_does_not_come_in_time_is_given_up(run_play: RunPlay):
    async def scene(play: Play) -> None:
        running = play.send(play.work("a", LONG))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueTimeout, match="7 s"):
            async with play.scheduler.turn(play.work("b", LONG, deadline_s=7.0), lambda told: None):
                pass
        assert play.clock() == pytest.approx(7.1)
        await running
        assert_nothing_left(play)

    run_play(scene)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 2.0, 9.0, 19.0, 20.6, 25.0])
@pytest.mark.parametrize("num_before", [0, 1])
def test_request_cancelled_in_any_state_leaves_nothing(
    run_play: RunPlay, after_s: float, num_before: int
):
    async def scene(play: Play) -> None:
        before = [play.send(play.work("a", LONG)) for _ in range(num_before)]
        task = play.send(play.work("b", LONG, 1000))
        await asyncio.sleep(after_s)
        await cancel(task)
        if before:
            await asyncio.wait(before)
        assert_nothing_left(play)
        # and the next one finds everything free
        assert (await play.send(play.work("c", 1000))).told == []

    run_play(scene)


def test_cancelled_prefill_is_charged_for_what_was_computed(run_play: RunPlay):
    async def scene(play: Play) -> None:
        keeper = play.send(play.work("b", 100, 3000))
        task = play.send(play.work("b", LONG))
        await asyncio.sleep(10.1)
        await cancel(task)
        (tenant,) = play.scheduler.snapshot().tenants
        computed = play.engines[0].prefilled_tokens
        generated = play.engines[0].progress[play.outcomes[0].work.request_id].num_output_tokens
        # to the last look at it
        assert tenant.charged_tokens == pytest.approx(computed + 4 * generated, abs=800)
        await cancel(keeper)

    run_play(scene)


def test_when_all_is_done_everybody_has_paid_what_was_computed(run_play: RunPlay):
    async def scene(play: Play) -> None:
        watcher = play.send(play.work("a", 100, 9000))
        shared = play.blocks(8192)
        tasks = [play.send(play.work("a", 9000 + idx, 5, prefix=shared)) for idx in range(4)]
        await asyncio.wait(tasks)
        (tenant,) = play.scheduler.snapshot().tenants
        generated = play.engines[0].progress[play.outcomes[0].work.request_id].num_output_tokens
        expected = play.engines[0].prefilled_tokens + 4 * (generated + 4 * 5)
        assert tenant.charged_tokens == pytest.approx(expected, abs=4 * 51)
        await cancel(watcher)

    run_play(scene)


def test_long_prompt_is_charged_in_pieces(run_play: RunPlay):
    async def scene(play: Play) -> None:
        play.send(play.work("a", LONG))
        for _ in range(18):
            await asyncio.sleep(1.0)
            (tenant,) = play.scheduler.snapshot().tenants
            computed = play.engines[0].prefilled_tokens
            assert computed < tenant.charged_tokens <= computed + 2048

    run_play(scene)


def test_shared_document_is_prefilled_exactly_once(run_play: RunPlay):
    async def scene(play: Play) -> None:
        document = play.blocks(16_384)
        tasks = [play.send(play.work("a", 16_484 + idx, prefix=document)) for idx in range(5)]
        await asyncio.wait(tasks)
        first, *others = [task.result() for task in tasks]
        assert first.cached_tokens == 0
        assert all(other.cached_tokens >= 15_360 for other in others)
        assert all(other.predicted_cached_tokens == other.cached_tokens for other in others)
        assert play.engines[0].prefilled_tokens < 16_484 + 4 * 1200

    run_play(scene)


def test_with_several_engines_a_shared_document_is_still_prefilled_once(run_play: RunPlay):
    async def scene(play: Play) -> None:
        document = play.blocks(16_384)
        tasks = [play.send(play.work("a", 16_484 + idx, prefix=document)) for idx in range(5)]
        await asyncio.wait(tasks)
        assert sum(engine.prefilled_tokens for engine in play.engines) < 16_484 + 4 * 1200

    run_play(scene, engine={"num_engines": 3})


def test_when_who_prefills_a_shared_document_leaves_the_next_goes_on(run_play: RunPlay):
    async def scene(play: Play) -> None:
        document = play.blocks(16_384)
        first, second, third = (
            play.send(play.work("a", 16_484 + idx, prefix=document)) for idx in range(3)
        )
        await asyncio.sleep(9)
        await cancel(first)
        await asyncio.wait({second, third})
        # from what the engine had kept of the first
        assert second.result().cached_tokens == 8192
        assert third.result().cached_tokens >= 15_360

    run_play(scene)


def test_same_document_of_another_tenant_hits_nothing_and_waits_for_nobody(run_play: RunPlay):
    async def scene(play: Play) -> None:
        document = play.blocks(1536)
        one = play.send(play.work("a", 1600, prefix=document))
        other = play.send(play.work("b", 1600, prefix=document))
        await asyncio.wait({one, other})
        assert one.result().cached_tokens == other.result().cached_tokens == 0
        assert other.result().predicted_cached_tokens == 0
        again = await play.send(play.work("a", 1600, prefix=document))
        assert again.cached_tokens > 0

    run_play(scene, max_prefill_ahead_tokens=8192)


def test_question_goes_to_the_engine_that_holds_its_document(run_play: RunPlay):
    async def scene(play: Play) -> None:
        documents = [play.blocks(8192) for _ in range(3)]
        for document in documents:
            play.send(play.work("a", 8200, prefix=document))
        await asyncio.sleep(60)
        for _ in range(3):
            for document in documents:
                outcome = await play.send(play.work("a", 8292, prefix=document))
                assert outcome.cached_tokens >= 7168
        assert len({engine.prefilled_tokens for engine in play.engines}) <= 2

    run_play(scene, engine={"num_engines": 3})


def test_short_shared_prompt_does_not_draw_everything_to_one_engine(run_play: RunPlay):
    async def scene(play: Play) -> None:
        system = play.blocks(512)
        await play.send(play.work("a", 1500, prefix=system))
        tasks = [play.send(play.work("a", 1500, 100, prefix=system)) for _ in range(12)]
        await asyncio.wait(tasks)
        done = [engine.prefilled_tokens for engine in play.engines]
        assert max(done) < 2 * min(done)

    run_play(scene, engine={"num_engines": 3})


def test_pinned_requests_go_to_one_engine_unless_that_costs_more_than_their_prompt(
    run_play: RunPlay,
):
    async def scene(play: Play) -> None:
        async def ask() -> None:
            await play.send(play.work("a", 400, 50, pin_key="session"))

        await ask()
        (pinned,) = [engine for engine in play.engines if engine.prefilled_tokens]
        busy = [play.send(play.work("b", 100, 500)) for _ in range(4)]
        for _ in range(5):
            await ask()
        assert pinned.prefilled_tokens >= 2400
        await asyncio.wait(busy)
        before = pinned.prefilled_tokens
        # all at once: some would wait longer for it than their prompt takes elsewhere
        await asyncio.gather(*(ask() for _ in range(6)))
        assert before + 800 <= pinned.prefilled_tokens <= before + 1200
        before = pinned.prefilled_tokens
        await ask()
        assert pinned.prefilled_tokens == before + 400
        # without the engine the pin moves, for good
        pinned.is_ready = False
        await ask()
        pinned.is_ready = True
        await ask()
        assert pinned.prefilled_tokens == before + 400

    run_play(scene, engine={"num_engines": 3})


def test_prefixes_are_forgotten_when_the_engine_restarts(run_play: RunPlay):
    async def scene(play: Play) -> None:
        document = play.blocks(8192)
        await play.send(play.work("a", 8300, prefix=document))
        hit = await play.send(play.work("a", 8301, prefix=document))
        assert hit.predicted_cached_tokens > 0
        play.engines[0].restart()
        missed = await play.send(play.work("a", 8302, prefix=document))
        assert missed.predicted_cached_tokens == missed.cached_tokens == 0

    run_play(scene)


def test_work_of_another_replica_on_the_engine_is_seen(run_play: RunPlay):
    async def scene(play: Play) -> None:
        play.engines[0].submit("foreign", SimulatedPrompt(LONG), "salt", 1)
        await asyncio.sleep(0.1)
        long = play.send(play.work("a", LONG))
        await asyncio.sleep(10)
        assert play.outcomes[0].started_at_s is None
        await long
        assert play.outcomes[0].started_at_s == pytest.approx(18.4, abs=1.5)

    run_play(scene)


def test_priority_is_tier_first_then_length(run_play: RunPlay):
    async def scene(play: Play) -> None:
        priorities = []
        for num_tokens in (100, 1500, 2000, LONG):
            async with play.scheduler.turn(play.work("a", num_tokens), print) as turn:
                priorities.append(turn.vllm_priority)
        assert priorities == sorted(priorities)
        assert 0 <= priorities[0] < priorities[-1] < 16

    run_play(scene)


def test_heavier_tier_gets_more_in_proportion(run_play: RunPlay):
    async def scene(play: Play) -> None:
        for _ in range(90):
            play.send(play.work("gold", 1000, 1, weight=3.0))
            play.send(play.work("basic", 1000, 1, weight=1.0))
        await asyncio.sleep(100)
        charged = {t.tenant_id: t.charged_tokens for t in play.scheduler.snapshot().tenants}
        assert charged["gold"] / charged["basic"] == pytest.approx(3, rel=0.1)

    run_play(scene)


def test_snapshot_adds_up(run_play: RunPlay):
    async def scene(play: Play) -> None:
        for tenant_id in ("a", "b"):
            for _ in range(3):
                play.send(play.work(tenant_id, LONG))
        await asyncio.sleep(5)
        snapshot = play.scheduler.snapshot()
        assert snapshot.num_queued == sum(t.num_queued for t in snapshot.tenants) == 5
        assert snapshot.queued_tokens == snapshot.queued_work_tokens == 5 * LONG
        (engine,) = snapshot.engines
        assert (engine.num_running, engine.num_prefilling, engine.num_decoding) == (1, 1, 0)
        assert engine.prefill_left_tokens == pytest.approx(LONG - 5000, abs=1024)
        assert engine.kv_held_tokens == LONG + 16
        assert snapshot.expected_drain_s == pytest.approx(6 * 20.5 - 5, rel=0.1)
        forecast = play.scheduler.forecast(play.work("c", LONG))
        assert forecast.num_ahead <= 5
        assert play.scheduler.snapshot().num_queued == 5

    run_play(scene)
