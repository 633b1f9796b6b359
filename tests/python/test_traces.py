"""Traces: readers and their errors, generator, scaling, and tokens that share what ids share."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualkv import traces
from dualkv.traces import Conversation, Session, Turn

VOCAB = 32000
_ROOT = Path(__file__).resolve().parents[2]
TRACE_FILE = Path(os.environ.get("DUALKV_TRACE_FILE") or _ROOT.parent / "shared/data/agentic_coding_traces.jsonl.gz")
needs_trace_file = pytest.mark.skipif(
    not TRACE_FILE.is_file(), reason=f"no trace file {TRACE_FILE}: set DUALKV_TRACE_FILE"
)
# turns, append, generated, total, context: Table 2 of arXiv 2602.21548
TABLE_2 = {
    "32K": (60, 608, 148, 28639, 17183),
    "48K": (106, 474, 172, 42607, 25120),
    "64K": (157, 429, 176, 55958, 32721),
}


def session_of(*turns: tuple[int, int, tuple[int, ...]], block: int = 4, **fields: Any) -> Session:
    """A session of (input_tokens, output_tokens, block_ids)."""
    made = tuple(Turn(*turn, start_s=10.0 * i, think_time_s=1.0) for i, turn in enumerate(turns))
    return Session(fields.pop("id", "s"), block, made, **fields)


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    """A session whose turns continue or part from any earlier turn."""
    block = draw(st.integers(1, 9))
    turns: list[tuple[int, int, tuple[int, ...]]] = []
    for index in range(draw(st.integers(1, 8))):
        base = draw(st.sampled_from(turns))[2] if turns else ()
        kept = base[: draw(st.integers(0, len(base)))] if draw(st.booleans()) else base
        fresh = tuple(100 * index + i for i in range(draw(st.integers(0, 6))))
        ids = kept + fresh
        tail = draw(st.integers(0 if ids or block == 1 else 1, block - 1))
        turns.append((max(1, len(ids) * block + tail), draw(st.integers(0, 12)), ids))
        if block == 1 and not ids:
            turns[-1] = (1, 0, (100 * index,))
    return session_of(*turns, block=block)


def shared_prefix(a: Any, b: Any) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def replay(session: Session, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and outputs of a conversation with a model of random words."""
    rng = np.random.default_rng(seed)
    conversation = Conversation(session, VOCAB)
    prompts, outputs = [], []
    while not conversation.done:
        prompts.append(conversation.prompt())
        outputs.append(rng.integers(VOCAB, size=conversation.turn.output_tokens))
        conversation.add_output(outputs[-1])
    return prompts, outputs


# --- sessions -----------------------------------------------------------------------------------

BRANCHING = session_of(
    (8, 3, (1, 2)),  # whole input new
    (14, 2, (1, 2, 3)),  # 8 + 3 known, 3 appended
    (12, 1, (1, 2, 9)),  # continues turn 0, but 1 token of the 4 is appended
    (9, 1, (1, 7)),  # one block known
    (18, 1, (1, 2, 3, 4)),  # continues turn 1: 14 + 2 known
    (7, 0, (8,)),  # nothing known
)


def test_what_a_turn_shares_with_earlier_ones() -> None:
    assert [link.turn for link in BRANCHING.links] == [None, 0, 0, 2, 1, None]
    assert BRANCHING.hit_tokens == (0, 8, 8, 4, 12, 0)
    assert BRANCHING.append_tokens == (8, 3, 1, 5, 2, 7)
    assert BRANCHING.endings == (4, 4, 2, 3, 4, 5)
    assert BRANCHING.hit_rate == pytest.approx(32 / 68)


def test_statistics_are_means_over_sessions() -> None:
    short = session_of((10, 5, (1, 2)))
    long = session_of((4, 1, (1,)), (8, 3, (1, 2)))
    assert traces.statistics([short, long]) == traces.Statistics(
        turns=1.5,
        append_tokens=(10 + (4 + 3) / 2) / 2,
        generated_tokens=(5 + 2) / 2,
        total_tokens=(15 + 11) / 2,
        context_tokens=(10 + 6) / 2,
        hit_rate=4 / 22,
    )
    with pytest.raises(ValueError, match="no sessions"):
        traces.statistics([])


@pytest.mark.parametrize(
    ("turns", "block", "message"),
    [
        ([], 4, "no turns"),
        ([(8, 1, (1,))], 4, "turn 0: 1 block ids for 8 tokens, which are 2"),
        ([(8, 1, (1, 2))], 0, "block_size 0"),
        ([(0, 1, ())], 4, "0 input"),
        ([(1, -1, ())], 4, "-1 output"),
    ],
)
def test_a_session_whose_counts_do_not_fit(turns: Any, block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session_of(*turns, block=block)


# --- readers ------------------------------------------------------------------------------------

REQUEST = {"t": 1.5, "in": 9, "out": 2, "hash_ids": [5, 6], "think_time": 0.5}
AGENTIC = {"id": "a", "block_size": 4, "hash_id_scope": "local", "requests": [REQUEST]}
MOONCAKE = {"timestamp": 1500, "input_length": 1030, "output_length": 7, "hash_ids": [0, 1, 2]}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_agentic_lines_become_sessions(tmp_path: Path) -> None:
    second = {**AGENTIC, "id": "b", "hash_id_scope": "team", "requests": [REQUEST, REQUEST]}
    path = write(tmp_path / "trace.jsonl", AGENTIC, second)
    turn = Turn(9, 2, (5, 6), start_s=1.5, think_time_s=0.5)
    expected = [Session("a", 4, (turn,)), Session("b", 4, (turn, turn), scope="team")]
    assert traces.read(path) == traces.read_agentic(path) == expected
    assert traces.read(path, sessions=1) == expected[:1]
    assert [len(session.turns) for session in traces.read(path, turns=1)] == [1, 1]


def test_gzip_is_known_by_its_content_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "trace.bin"
    path.write_bytes(gzip.compress(b"\n" + json.dumps(AGENTIC).encode() + b"\n\n"))
    assert traces.read(path)[0].id == "a"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"trace\.bin: damaged gzip"):
        traces.read(path)


def test_mooncake_requests_are_grouped_by_prefix(tmp_path: Path) -> None:
    requests = [  # input tokens, ids, session it belongs to
        (1030, [0, 1, 2], 0),
        (1500, [0, 1, 3], 0),  # less the last one, 0 1 is a prefix
        (1500, [0, 4, 5], 1),  # is no continuation of 0 1
        (2048, [0, 4, 6, 7], 1),
        (2050, [0, 1, 3, 8, 9], 0),
        (100, [10], 2),
        (1024, [10, 11], 3),  # a request of one id is never continued
        (2048, [20, 21, 22, 23], 4),
        (1536, [20, 21, 40], 5),
        (1536, [20, 21, 22], 4),  # now 4 and 5 both wait for 20 21:
        (2048, [20, 21, 50, 51], 4),  # the most recent
        (1536, [20, 21, 60], 5),
    ]
    lines = [{**MOONCAKE, "input_length": size, "hash_ids": ids} for size, ids, _ in requests]
    found = traces.read(write(tmp_path / "talk.v1.jsonl", *lines))
    for index, session in enumerate(found):
        sizes = [size for size, _, group in requests if group == index]
        assert [turn.input_tokens for turn in session.turns] == sizes
    assert [(s.id, s.scope) for s in found] == [(f"talk-{i}", "talk") for i in range(6)]
    assert found[0].turns[0] == Turn(1030, 7, (0, 1), start_s=1.5, think_time_s=0.0)
    assert len(traces.read_mooncake(tmp_path / "talk.v1.jsonl", sessions=2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ({**AGENTIC, "id": "first"}, "id = 'first': an earlier line"),
        ({**AGENTIC, "id": 7}, "id = 7: must be a string"),
        ({**AGENTIC, "block_size": 0}, "block_size = 0: must be an integer from 1"),
        ({**AGENTIC, "requests": []}, r"requests = \[\]: must be a list"),
        ({**AGENTIC, "requests": [REQUEST, 3]}, r"requests\[1\] = 3: must be an object"),
    ]
    + [
        ({**AGENTIC, "requests": [{**REQUEST, field: value}]}, rf"requests\[0\]\.{message}")
        for field, value, message in [
            ("t", -1, "t = -1: must be a finite number"),
            ("t", float("nan"), "t = nan: must be a finite number"),
            ("think_time", "1", "think_time = '1': must be a finite number"),
            ("in", True, "in = True: must be an integer"),
            ("in", 12, r"hash_ids = \[5, 6\]: 2 ids for 12 tokens, which are 3"),
            ("out", -1, "out = -1: must be an integer from 0"),
            ("out", None, "out = None: must be"),
            ("hash_ids", [1, "2"], r"hash_ids = \[1, '2'\]: must be a list of integers"),
            ("hash_ids", [1, 1 << 63], "hash_ids = .*64 bits"),
        ]
    ]
    + [({**AGENTIC, "requests": [{"t": 0}]}, r"requests\[0\]\.in is missing")],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "trace.jsonl", {**AGENTIC, "id": "first"})
    with path.open("a") as file:
        file.write(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(ValueError, match=rf"trace\.jsonl:2: .*{message}"):
        traces.read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("timestamp", "0"), ("input_length", 0), ("output_length", 1.5), ("hash_ids", [1])],
)
def test_a_malformed_mooncake_line_is_named(tmp_path: Path, field: str, value: Any) -> None:
    path = write(tmp_path / "trace.jsonl", MOONCAKE, {**MOONCAKE, field: value})
    with pytest.raises(ValueError, match=rf"trace\.jsonl:2: {field} = "):
        traces.read(path)


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sessions"):
        traces.read(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"other\.jsonl:1: .*'x'.*neither"):
        traces.read(write(tmp_path / "other.jsonl", {"x": 1}))
    with pytest.raises(ValueError, match="turns 0"):
        traces.read_agentic(write(tmp_path / "good.jsonl", AGENTIC), turns=0)
    with pytest.raises(FileNotFoundError):
        traces.read(tmp_path / "absent.jsonl")


@needs_trace_file
def test_the_public_trace() -> None:
    found = traces.read(TRACE_FILE)
    assert len(found) == 64
    means = traces.statistics(found)
    assert means.turns == pytest.approx(39, rel=0.01)
    assert means.hit_rate == pytest.approx(0.949, abs=0.001)
    small = traces.scale(found, 32, block_size=16, turns=8)
    assert traces.statistics(small).turns <= 8
    for session in small[:8]:
        prompts, _ = replay(session)
        assert [len(prompt) for prompt in prompts] == [t.input_tokens for t in session.turns]


# --- generator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dataset", TABLE_2)
def test_generated_means_are_table_2(dataset: str, seed: int) -> None:
    found = traces.generate(dataset, agents=200, seed=seed)
    *means, hit_rate = asdict(traces.statistics(found)).values()
    assert means == pytest.approx(TABLE_2[dataset], rel=0.05)
    assert hit_rate >= 0.95
    longest = max(s.turns[-1].input_tokens + s.turns[-1].output_tokens for s in found)
    assert longest <= int(dataset[:-1]) * 1024


def test_generated_sessions_grow_turn_by_turn_and_depend_on_the_seed_alone() -> None:
    found = traces.generate("32K", agents=5, seed=7, block_size=16)
    assert found == traces.generate("32K", agents=5, seed=7, block_size=16)
    assert found != traces.generate("32K", agents=5, seed=8, block_size=16)
    assert len({len(session.turns) for session in found}) > 1
    for session in found:
        assert min(session.append_tokens) >= 1
        assert min(turn.output_tokens for turn in session.turns) >= 1
        assert all(link.continues for link in session.links[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("16K", 1, 0), "16K"), (("32K", 0, 0), "agents 0"), (("32K", 1, -1), "seed -1")],
)
def test_generator_arguments(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        traces.generate(*arguments)


# --- scaling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", TABLE_2)
def test_scaled_sessions_still_hit(dataset: str) -> None:
    found = traces.scale(traces.generate(dataset, agents=50, seed=3), 32, block_size=16)
    assert traces.statistics(found).hit_rate >= 0.9
    assert min(min(session.append_tokens) for session in found) >= 1
    assert min(turn.output_tokens for session in found for turn in session.turns) >= 1
    assert all(link.continues for session in found for link in session.links[1:])


@settings(deadline=None)
@given(sessions(), st.sampled_from([1, 1.5, 2, 3.7, 8]), st.integers(1, 5), st.integers(0, 10))
def test_scaling_keeps_shared_prefixes(session: Session, factor: float, block_size: int, skip_tokens: int) -> None:
    small = traces.scale(session, factor, block_size=block_size, skip_tokens=skip_tokens)
    for later, turn in enumerate(session.turns):
        assert small.turns[later].input_tokens >= (turn.input_tokens - skip_tokens) // factor
        for earlier in range(later):
            ids = [session.turns[index].block_ids for index in (earlier, later)]
            tokens = shared_prefix(*ids) * session.block_size - skip_tokens
            ids = [small.turns[index].block_ids for index in (earlier, later)]
            assert shared_prefix(*ids) >= int(max(0, tokens) / factor) // block_size


def test_scaled_ids_tell_blocks_and_orders_apart() -> None:
    session = session_of((8, 1, (1, 2)), (8, 1, (2, 1)), (8, 1, (1, 2)))
    for factor, block_size in ((1, 1), (1, 3), (2, 1), (2, 4)):
        there, back, again = traces.scale(session, factor, block_size=block_size).turns
        assert len(set(there.block_ids)) == len(there.block_ids) == 8 // factor // block_size
        assert there.block_ids == again.block_ids[: len(there.block_ids)]
        assert not set(there.block_ids) & set(back.block_ids)


def test_scaling_keeps_prefixes_of_sessions_with_one_scope() -> None:
    pair = [session_of((40, 1, (*range(5), *range(x, x + 5))), id=str(x), scope="all") for x in (50, 60)]
    small = traces.scale(pair, 2, block_size=4)
    assert shared_prefix(small[0].turns[0].block_ids, small[1].turns[0].block_ids) == 2
    prompts = [traces.tokens(session, 0, VOCAB) for session in small]
    assert shared_prefix(*prompts) == 8


def test_a_window_begins_at_the_mean_context() -> None:
    sizes = (4, 8, 12, 40, 44)  # mean 21.6
    session = session_of(*((size, 1, tuple(range(size // 4))) for size in sizes))
    kept = traces.scale(session, 1, block_size=4, turns=2).turns
    assert [turn.input_tokens for turn in kept] == [12, 40]
    assert [turn.start_s for turn in kept] == [0.0, 10.0]
    kept = traces.scale(session, 1, block_size=4, turns=4).turns
    assert [turn.input_tokens for turn in kept] == [8, 12, 40, 44]
    assert len(traces.scale(session, 1, block_size=4, turns=9).turns) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0.5},
        {"factor": float("nan")},
        {"block_size": 0},
        {"turns": 0},
        {"skip_tokens": -1},
    ],
)
def test_scale_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(*wrong.values())):
        traces.scale(BRANCHING, **{"factor": 2, "block_size": 4, **wrong})


# --- tokens -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(sessions())
def test_equal_prefixes_are_equal_tokens_and_others_are_not(session: Session) -> None:
    inputs = [traces.tokens(session, index, 1 << 32) for index in range(len(session.turns))]
    for a, turn_a in zip(inputs, session.turns, strict=True):
        assert a.dtype == np.uint32
        assert a.shape == (turn_a.input_tokens,)
        for b, turn_b in zip(inputs, session.turns, strict=True):
            blocks = shared_prefix(turn_a.block_ids, turn_b.block_ids)
            assert shared_prefix(a, b) >= blocks * session.block_size
            if blocks < min(len(turn_a.block_ids), len(turn_b.block_ids)):
                assert shared_prefix(a, b) < (blocks + 1) * session.block_size


def test_scopes_and_ids_choose_the_tokens() -> None:
    turn = (32, 1, (1, 2, 1, -1))
    local, other = session_of(turn, block=8), session_of(turn, block=8, id="t")
    shared = [session_of(turn, block=8, id=name, scope="all") for name in "ab"]
    first = traces.tokens(local, 0, VOCAB).reshape(4, 8)
    assert first.max() < VOCAB
    assert (first[0] == first[2]).all()
    assert (first[0] != first[1]).any()
    assert (first != traces.tokens(other, 0, VOCAB).reshape(4, 8)).any(axis=1).all()
    assert (traces.tokens(shared[0], 0, VOCAB) == traces.tokens(shared[1], 0, VOCAB)).all()
    assert (traces.tokens(shared[0], 0, VOCAB) != traces.tokens(local, 0, VOCAB)).any()


def test_tokens_stay_the_same_from_version_to_version() -> None:
    found = traces.tokens(session_of((6, 1, (3,))), 0, VOCAB)
    assert found.tolist() == [20027, 19848, 14936, 8144, 615, 6223]


@settings(deadline=None)
@given(sessions())
def test_a_conversation_follows_the_trace_and_the_model(session: Session) -> None:
    prompts, outputs = replay(session)
    for index, (turn, link) in enumerate(zip(session.turns, session.links, strict=True)):
        assert len(prompts[index]) == turn.input_tokens
        assert (prompts[index] == traces.tokens(session, index, VOCAB, outputs[:index])).all()
        if link.turn is not None and link.continues:
            before = np.concatenate([prompts[link.turn], outputs[link.turn]])
            assert shared_prefix(prompts[index], before) >= min(len(before), turn.input_tokens)
        for earlier in range(index):
            ids = [session.turns[i].block_ids for i in (earlier, index)]
            shared = shared_prefix(*ids) * session.block_size
            assert (prompts[index][:shared] == prompts[earlier][:shared]).all()


def test_a_compacted_context_keeps_the_common_blocks() -> None:
    session = session_of((10, 6, (1, 2)), (18, 2, (1, 2, 3, 4)), (13, 1, (1, 2, 3)), (9, 1, (1, 9)))
    prompts, outputs = replay(session)
    assert (prompts[1][:16] == [*prompts[0], *outputs[0]]).all()
    assert (prompts[2][:12] == prompts[1][:12]).all()
    assert (prompts[3][:4] == prompts[1][:4]).all()
    assert (prompts[3][4:] == traces.tokens(session, 3, VOCAB)[4:]).all()


def test_a_model_may_say_more_or_less_than_the_trace() -> None:
    session = session_of((6, 2, (1,)), (12, 2, (1, 2, 3)))
    for size in (0, 1, 6, 50):
        conversation = Conversation(session, VOCAB)
        first = conversation.prompt()
        conversation.add_output(list(range(size)))
        prompt = conversation.prompt()
        assert len(prompt) == 12
        assert prompt[: min(12, 6 + size)].tolist() == [*first, *range(size)][:12]


def test_what_tokens_and_conversations_refuse() -> None:
    conversation = Conversation(session_of((6, 2, (1,))), VOCAB)
    for output in ([-1], [1 << 32], [0.5], [[1]]):
        with pytest.raises(ValueError, match=r"output (of shape|has)"):
            conversation.add_output(output)  # type: ignore[arg-type]
    assert not conversation.done
    conversation.add_output([1])
    for call in (
        conversation.prompt,
        lambda: conversation.add_output([1]),
        lambda: conversation.turn,
    ):
        with pytest.raises(RuntimeError, match="done"):
            call()
    for vocab in (1, (1 << 32) + 1):
        with pytest.raises(ValueError, match="vocab_size"):
            Conversation(BRANCHING, vocab)
    with pytest.raises(IndexError, match="turn 6"):
        traces.tokens(BRANCHING, 6, VOCAB)
    with pytest.raises(ValueError, match="1 outputs given, turn 2 needs 2"):
        traces.tokens(BRANCHING, 2, VOCAB, [[1]])
