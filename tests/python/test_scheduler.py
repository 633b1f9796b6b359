"""The scheduler from Python; its rules are tested in C++ (tests/cpp/scheduler_test.cpp)."""

from __future__ import annotations

import pytest
from support import error_of

import dualkv
from dualkv.scheduler import AttentionModel, EngineReport, Scheduler, select_batch


def two_sides() -> Scheduler:
    scheduler = Scheduler(short_queue_tokens=1000, full_tokens=500)
    scheduler.join("p", "prefill", group="P", node="pn")
    scheduler.join("d", "decode", group="D", node="dn")
    return scheduler


def test_a_request_gets_both_engines_and_a_side_that_reads() -> None:
    scheduler = two_sides()
    scheduler.submit(7, 100, 80)
    first = scheduler.fetch("P", [EngineReport("p", read_queue_tokens=50)])
    assert [(one.request, one.engine, one.number) for one in first.assignments] == [(7, "p", 1)]
    assert "short" in first.assignments[0].reason
    second = scheduler.fetch("D", [EngineReport("d", free_tokens=1000, read_queue_tokens=10)])
    [placed] = second.placements
    assert (placed.request, placed.prefill, placed.decode, placed.read) == (7, "p", "d", dualkv.Path.DECODE)
    assert placed.reason == "read queues in tokens: prefill 50, decode 10"
    scheduler.prefilled(7)
    scheduler.finished(7)
    scheduler.finished(7)
    assert scheduler.stats() == {
        "engines": 2,
        "waiting_prefill": 0,
        "waiting_decode": 0,
        "requests": 0,
        "reports_stale": 0,
    }


def test_an_engine_that_leaves_gives_its_requests_back() -> None:
    scheduler = two_sides()
    for request in (1, 2):
        scheduler.submit(request, 100)
    scheduler.fetch("P")
    assert scheduler.leave("p") == [1, 2]
    assert scheduler.stats()["waiting_prefill"] == 2


@pytest.mark.parametrize(
    ("call", "code", "mentions"),
    [
        (lambda s: s.join("p", "prefill", group="P", node="n"), "invalid_argument", "'p' has joined"),
        (lambda s: s.join("x", "both", group="P", node="n"), "invalid_argument", "prefill or decode"),
        (lambda s: s.join("x", "decode", group="P", node="n"), "invalid_argument", "other role"),
        (lambda s: s.fetch("nowhere"), "not_found", "nowhere"),
        (lambda s: s.fetch("P", [EngineReport("d")]), "invalid_argument", "not of group"),
        (lambda s: s.fetch("P", [EngineReport("p", seen=3)]), "invalid_argument", "seen 3"),
        (lambda s: s.leave("nobody"), "not_found", "nobody"),
        (lambda s: s.submit(1, 0), "invalid_argument", "0 tokens"),
        (lambda s: s.submit(1, 10, 11), "invalid_argument", "hit of 11"),
        (lambda _: Scheduler(short_queue_tokens=0, full_tokens=1), "invalid_argument", "alpha"),
        (lambda _: Scheduler(short_queue_tokens=1, full_tokens=1, even_slack=0.5), "invalid_argument", "even_slack"),
    ],
)
def test_wrong_calls_say_so_and_change_nothing(call: object, code: str, mentions: str) -> None:
    scheduler = two_sides()
    before = scheduler.stats()
    error = error_of(lambda: call(scheduler))  # type: ignore[operator]
    assert error is not None
    assert error.code == code
    assert mentions in error.message
    assert scheduler.stats() == before


def test_batches_by_attention_time() -> None:
    batches = [[(0, 100)], [(1000, 100), (0, 200)], [(5000, 50)]]
    truth = AttentionModel(0.002, 3e-9)
    model = AttentionModel.fit(batches, [truth.seconds(batch) for batch in batches])
    assert model.base_s == pytest.approx(0.002)
    assert model.s_per_operation == pytest.approx(3e-9)
    waiting = [(30_000, 400), (0, 50_000), (0, 10)]
    chosen = select_batch(model, waiting, quota_s=0.3)
    assert chosen[0] == 400
    assert len(chosen) == 2
    assert 0 < chosen[1] < 50_000, "the second in part, and nothing behind it"
    part = [(30_000, 400), (0, chosen[1])]
    assert model.seconds(part) <= 0.3 < model.seconds([part[0], (0, chosen[1] + 1)])
    assert error_of(lambda: AttentionModel.fit(batches[:1], [1.0])) is not None
