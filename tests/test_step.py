"""A step of the core: runs of several sequences, rows whose bytes depend on their kind and on nothing beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_gguf
from reference.cases import text
from tiny import TinySpec

import pyllava
from pyllava import _lib
from pyllava._lib import NOTHING, Rows, Run, Span, Tokens
from pyllava._script import Script, Stretch
from pyllava._sequences import Sequences

SPEC = TinySpec(seed=90, n_layer=3, n_embd=256, n_head=4, n_head_kv=2, n_ff=512, n_ctx=512)
N_SEQ = 6
Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tiny_gguf.Files:
    return tiny_gguf.convert(tmp_path_factory.mktemp("step"), SPEC)


@pytest.fixture(scope="module")
def model(files: tiny_gguf.Files) -> Iterator[_lib.ModelHandle]:
    handle = _lib.ModelHandle(files.model, files.mmproj, placement=_lib.Placement(device="cpu"))
    yield handle
    handle.close()


def opened(model: _lib.ModelHandle, precision: str, **options: Any) -> _lib.SessionHandle:
    return _lib.SessionHandle(
        model,
        **{"n_ctx": 512, "n_seq": N_SEQ, "n_batch": 64, "n_threads": 2, "precision": precision, **options},
    )


@pytest.fixture(params=["exact", "fast"])
def session(model: _lib.ModelHandle, request: pytest.FixtureRequest) -> Iterator[_lib.SessionHandle]:
    with_session = opened(model, request.param)
    yield with_session
    with_session.close()


def ids(seed: int, n: int) -> list[int]:
    return text(seed, n, SPEC.n_vocab)


def picture(seed: int, n: int = 16) -> Rows:
    return Rows(np.random.RandomState(seed).standard_normal((n, SPEC.n_embd)).astype(np.float32), seed)


def question(seed: int, n: int = 30) -> list[Span]:
    return [Tokens([1, *ids(seed, 5)]), picture(seed), Tokens(ids(seed + 1, n))]


def test_prefill_decode_and_logits_are_uses_of_it(session: _lib.SessionHandle) -> None:
    every = session.logits(question(1), seq=0)
    (ran,) = session.step([Run(question(1), seq=1)])
    assert (ran.n_reused, ran.choice) == (0, None)
    assert ran.logits.tobytes() == every[-1:].tobytes() == session.prefill(question(1), seq=2)[0].tobytes()
    (ran,) = session.step([Run([Tokens([7])], seq=1, append=True, answer=True)])
    assert ran.logits.tobytes() == session.decode([7], seqs=[2]).tobytes()


def test_ten_scores_behind_one_picture(session: _lib.SessionHandle) -> None:
    """Only what follows it is computed again."""
    before = question(3)
    n_before = sum(map(len, before))
    for i in range(10):
        tail: Span = Tokens(ids(50 + i, 6))
        (ran,) = session.step([Run([*before, tail], first=n_before - 1)])
        assert ran.logits.shape == (7, SPEC.n_vocab)
        assert ran.n_reused == (0 if i == 0 else n_before - 1)
        every = session.logits([*before, tail], seq=1)
        assert ran.logits.tobytes() == every[n_before - 1 :].tobytes()


def test_nothing_is_wanted(session: _lib.SessionHandle) -> None:
    (ran,) = session.step([Run(question(4), first=NOTHING)])
    assert (ran.logits.shape, ran.n_reused) == ((0, SPEC.n_vocab), 0)
    assert session.seq_length(0) == sum(map(len, question(4)))
    (ran,) = session.step([Run(question(4), first=NOTHING)])
    assert ran.n_reused == session.seq_length(0)
    assert session.prefill(question(4))[1] == session.seq_length(0) - 1


def test_many_rows_of_logits(session: _lib.SessionHandle) -> None:
    """More than a graph gives at once, of several runs, before and after rows that nobody wants."""
    runs = [
        Run([Tokens([1, *ids(seed, 150)])], seq=seed, first=first) for seed, first in enumerate((0, 149, 70))
    ]
    together = session.step(runs)
    for run, ran in zip(runs, together, strict=True):
        assert ran.logits.shape[0] == 151 - run.first
        session.seq_trim(5, 0)
        (alone,) = session.step([Run(run.parts, seq=5, first=run.first)])
        assert ran.logits.tobytes() == alone.logits.tobytes()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "a step of 0 runs: need 1..6"),
        ([Run([Tokens([1])], seq=9)], "sequence: found 9, need 0..5"),
        ([Run([Tokens([1])]), Run([Tokens([1])])], "sequence 0 stands twice in one step"),
        ([Run([])], "run 0: need at least one span"),
        ([Run([Tokens([])])], "empty prompt"),
        ([Run([Tokens([1])]), Run([Tokens([-1])], seq=1)], "token 0: found -1, need 0"),
        ([Run([Tokens([1])], first=-2)], "first: found -2, need -1 or more"),
        ([Run([Tokens([1])])] * 7, "a step of 7 runs: need 1..6"),
    ],
)
def test_wrong_runs_change_nothing(session: _lib.SessionHandle, runs: list[Run], message: str) -> None:
    session.prefill(question(1))
    with pytest.raises(ValueError, match=message):
        session.step(runs)
    assert session.prefill(question(1))[1] == session.seq_length(0) - 1


def test_full_sequences(session: _lib.SessionHandle) -> None:
    session.prefill([Tokens([5] * 500)])
    with pytest.raises(
        pyllava.ContextOverflowError, match=r"sequence 0 is full: n_ctx is 512 \(it holds 500, 13 more"
    ):
        session.step([Run([Tokens([1])], seq=1), Run([Tokens([5] * 13)], append=True)])
    assert (session.seq_length(0), session.seq_length(1)) == (500, 0)
    session.step([Run([Tokens([5] * 12)], append=True, first=NOTHING)])
    assert session.seq_length(0) == 512


def test_a_step_that_fails_has_not_happened(session: _lib.SessionHandle) -> None:
    """But prompts with what is no number leave their sequences empty: rows before it may hold the cause."""
    session.prefill(question(1), seq=0)
    session.prefill(question(2), seq=1)
    expected = session.decode([3, 4], seqs=[0, 1])
    session.seq_trim(0, session.seq_length(0) - 1)
    session.seq_trim(1, session.seq_length(1) - 1)
    bad = Rows(np.full((3, SPEC.n_embd), np.nan, np.float32), 1)
    with pytest.raises(pyllava.NumericError):
        session.step(
            [
                Run([Tokens([3])], seq=0, append=True, answer=True),
                Run([Tokens([4])], seq=1, append=True, answer=True),
                Run([Tokens(ids(9, 100)), bad], seq=2),
            ]
        )
    assert session.seq_length(2) == 0
    assert session.decode([3, 4], seqs=[0, 1]).tobytes() == expected.tobytes()


def test_choices_instead_of_logits(model: _lib.ModelHandle, session: _lib.SessionHandle) -> None:
    """As by sample() from the logits, with mask and alternatives, of a prompt and of answers in one step."""
    options = {"temperature": 0.8, "top_k": 40, "repeat_penalty": 1.1, "seed": 5}
    mask = np.full((SPEC.n_vocab + 31) // 32, 0x55555555, np.uint32)
    here, there = ([_lib.SamplerHandle(model, **options) for _ in range(3)] for _ in range(2))
    for seq in (0, 1):
        session.prefill(question(seq + 1), seq=seq)
    tokens = [3, 4]
    for turn in range(4):
        runs = [
            Run(
                [Tokens([tokens[seq]])],
                seq,
                append=True,
                answer=True,
                sampler=here[seq],
                mask=mask,
                n_alternatives=3,
            )
            for seq in (0, 1)
        ]
        runs.append(Run(question(20 + turn), 2, sampler=here[2]))
        found = [ran.choice for ran in session.step(runs)]
        assert session.seq_length(0) == sum(map(len, question(1))) + turn + 1
        for seq in (0, 1):
            session.seq_trim(seq, session.seq_length(seq) - 1)
        rows = session.decode(tokens, seqs=[0, 1])
        expected = [there[seq].sample(rows[seq], mask=mask, n_alternatives=3) for seq in (0, 1)]
        session.seq_trim(3, 0)
        expected.append(there[2].sample(session.prefill(question(20 + turn), seq=3)[0]))
        assert found == expected
        tokens = [choice.id for choice in expected[:2]]
        assert all(token % 2 == 0 for token in tokens)


def test_wrong_choices_change_nothing(model: _lib.ModelHandle, session: _lib.SessionHandle) -> None:
    session.prefill(question(1))
    n = session.seq_length()
    sampler, other = (_lib.SamplerHandle(model, temperature=1.0, seed=1) for _ in range(2))
    more = [Tokens([5])]
    none = np.zeros((SPEC.n_vocab + 31) // 32, np.uint32)
    for runs, message in (
        (
            [Run(more, append=True, sampler=sampler, first=0)],
            "run 0: a sampler's choice, or logits, not both",
        ),
        (
            [Run(more, append=True, sampler=sampler), Run(more, 1, sampler=sampler)],
            "run 1: its sampler is that of run 0",
        ),
        (
            [Run(more, append=True, sampler=sampler), Run(more, 1, sampler=other, mask=none)],
            "mask: no token of 384 is left",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            session.step(runs)
    assert (session.seq_length(0), session.seq_length(1)) == (n, 0)
    logits = session.prefill(question(1))[0]
    assert sampler.sample(logits) == _lib.SamplerHandle(model, temperature=1.0, seed=1).sample(logits)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_caller_who_stops_a_step(session: _lib.SessionHandle, at: float) -> None:
    """Even at the very end nothing has happened, and again the same is asked for."""
    session.prefill(question(1), seq=0)
    session.prefill(question(2), seq=1)
    before = [session.seq_length(seq) for seq in range(3)]
    runs = [
        Run([Tokens([7])], 0, append=True, answer=True),
        Run([Tokens(ids(5, 90))], 1, append=True),
        Run(question(3), 2),
    ]
    session.set_progress(lambda _, fraction: fraction < at)
    for _ in range(3):
        with pytest.raises(pyllava.GenerationCancelled):
            session.step(runs)
        assert [session.seq_length(seq) for seq in range(3)] == before
    session.set_progress(None)
    assert len(session.step(runs)) == 3


def test_cancelling_a_step_without_work(session: _lib.SessionHandle) -> None:
    session.step([Run(question(1), first=NOTHING)])
    session.cancel(True)
    with pytest.raises(pyllava.GenerationCancelled):
        session.step([Run(question(1), first=NOTHING)])
    session.cancel(False)
    session.step([Run(question(1), first=NOTHING)])


def test_calls_from_a_callback_are_refused(session: _lib.SessionHandle) -> None:
    expected = session.prefill(question(1, 200), seq=1)[0]
    refused = []

    def calls(*_: object) -> bool:
        for call in (
            lambda: session.decode([7], seqs=[1]),
            lambda: session.seq_trim(0, 0),
            lambda: session.seq_copy(1, 2, 5),
            lambda: session.prefill(question(2), seq=3),
        ):
            with pytest.raises(ValueError, match="the session is at work"):
                call()
            refused.append(call)
        return True

    session.set_progress(calls)
    assert session.prefill(question(1, 200))[0].tobytes() == expected.tobytes()
    session.set_progress(None)
    assert len(refused) > 8
    session.seq_trim(0, 3)


def test_a_mask_that_changes_meanwhile(model: _lib.ModelHandle, session: _lib.SessionHandle) -> None:
    sampler = _lib.SamplerHandle(model, temperature=1.0, seed=1)
    mask = np.full((SPEC.n_vocab + 31) // 32, 0xFFFFFFFF, np.uint32)
    session.set_progress(lambda *_: mask.fill(0) or True)
    (ran,) = session.step([Run(question(1), sampler=sampler, mask=mask)])
    session.set_progress(None)
    other = _lib.SamplerHandle(model, temperature=1.0, seed=1)
    assert ran.choice == other.sample(session.prefill(question(1), seq=1)[0])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_what_nobody_wants_must_be_numbers_too(
    files: tiny_gguf.Files, tmp_path: Path, precision: str
) -> None:
    file = tiny_gguf.read(files.model)
    broken = {"blk.1.ffn_norm.weight": tiny_gguf.f32(np.full(SPEC.n_embd, np.nan, np.float32))}
    path = tiny_gguf.write(tmp_path / "broken.gguf", file.with_tensors(broken))
    model = _lib.ModelHandle(path, None, placement=_lib.Placement(device="cpu"))
    session = opened(model, precision)
    with pytest.raises(pyllava.NumericError):
        session.step([Run([Tokens(ids(1, 40))], first=NOTHING), Run([Tokens(ids(2, 5))], 1, first=NOTHING)])
    assert (session.seq_length(0), session.seq_length(1)) == (0, 0)
    session.close()
    model.close()


class Alone:
    """Each sequence computed by itself, its prompt in one piece, its answer row by row: what every mix has to equal."""

    def __init__(self, model: _lib.ModelHandle, precision: str) -> None:
        self.session = opened(model, precision, n_seq=1, n_batch=512)

    def rows(self, prompt: list[Span], answer: list[int]) -> tuple[Array, Array]:
        self.session.seq_trim(0, 0)
        every = self.session.logits(prompt)
        answered = [self.session.decode([token])[0] for token in answer]
        return every, np.array(answered, np.float32).reshape(len(answer), SPEC.n_vocab)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_200_mixes_are_equal_to_the_byte(model: _lib.ModelHandle, precision: str) -> None:
    """Prompts in pieces of any length, beside answers of others, reused or not: nothing of that is in a row."""
    random = np.random.RandomState(7)
    prompts = [question(seed, int(random.randint(1, 120))) for seed in range(10, 22)]
    answers = [ids(100 + seed, 8) for seed in range(12)]
    alone = Alone(model, precision)
    expected = [alone.rows(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    alone.session.close()
    session = opened(model, precision, n_batch=int(random.randint(3, 70)), n_threads=3)
    holds: dict[
        int, tuple[int, int, int]
    ] = {}  # sequence -> which text, positions of its prompt, of its answer
    n_rows = 0
    for _ in range(200):
        runs, wanted = [], []
        for seq in random.permutation(N_SEQ)[: random.randint(1, N_SEQ + 1)]:
            which, n_prompt, n_answer = holds.get(int(seq), (-1, 0, 0))
            total = sum(map(len, prompts[which])) if which >= 0 else 0
            if which >= 0 and n_prompt == total and n_answer < len(answers[which]) and random.rand() < 0.8:
                n = min(int(random.randint(1, 4)), len(answers[which]) - n_answer)
                tokens = Tokens(answers[which][n_answer : n_answer + n])
                runs.append(Run([tokens], int(seq), append=True, answer=True, first=0))
                wanted.append(expected[which][1][n_answer : n_answer + n])
                holds[int(seq)] = (which, n_prompt, n_answer + n)
                continue
            if which < 0 or n_prompt == total:
                which, n_prompt = int(random.randint(len(prompts))), 0
                if random.rand() < 0.5:  # as the whole, with what the sequence still has of it
                    total = sum(map(len, prompts[which]))
                    first = int(random.randint(total))
                    runs.append(Run(prompts[which], int(seq), first=first))
                    wanted.append(expected[which][0][first:])
                    holds[int(seq)] = (which, total, 0)
                    continue
                session.seq_trim(int(seq), 0)
            total = sum(map(len, prompts[which]))
            n = min(int(random.randint(1, 60)), total - n_prompt)
            first = int(random.randint(n + 1))
            runs.append(Run(part(prompts[which], n_prompt, n), int(seq), append=True, first=first))
            wanted.append(expected[which][0][n_prompt + first : n_prompt + n])
            holds[int(seq)] = (which, n_prompt + n, 0)
        for ran, rows in zip(session.step(runs), wanted, strict=True):
            assert ran.logits.tobytes() == np.ascontiguousarray(rows).tobytes()
            n_rows += len(rows)
    session.close()
    assert n_rows > 3000


def part(spans: list[Span], start: int, n: int) -> list[Span]:
    """Rows start to start + n - 1 of the spans."""
    found: list[Span] = []
    for span in spans:
        a, b = max(start, 0), min(start + n, len(span))
        if a < b:
            cut = Tokens(span.ids[a:b]) if isinstance(span, Tokens) else None
            found.append(cut or Rows(span.embd[a:b], span.key + a))  # type: ignore[union-attr]
        start -= len(span)
    return found


# Several steps in one call


def ends_at(model: _lib.ModelHandle, choices: Sequence[_lib.Choice]) -> int:
    """How many choices there are up to the first that ends an answer."""
    return next((i + 1 for i, choice in enumerate(choices) if model.is_end(choice.id)), len(choices))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generate_is_one_step_after_the_other(
    model: _lib.ModelHandle, session: _lib.SessionHandle, temperature: float
) -> None:
    def samplers() -> list[_lib.SamplerHandle]:
        return [_lib.SamplerHandle(model, temperature=temperature, seed=seed) for seed in range(2)]

    def begin() -> list[int]:
        for seq in range(2):
            session.prefill(question(60 + seq), seq=seq)
        return [5, 6]

    last, one_by_one = begin(), list[list[_lib.Choice]]()
    mine = samplers()
    for _ in range(12):
        runs = [
            Run([Tokens([last[i]])], i, append=True, answer=True, sampler=mine[i], n_alternatives=2)
            for i in range(2)
        ]
        chosen = [ran.choice for ran in session.step(runs)]
        assert None not in chosen
        one_by_one.append([choice for choice in chosen if choice])
        last = [choice.id for choice in one_by_one[-1]]
    last = begin()
    runs = [
        Run([Tokens([last[i]])], i, append=True, answer=True, sampler=sampler, n_alternatives=2)
        for i, sampler in enumerate(samplers())
    ]
    found = session.generate(runs, 12)
    n = min(ends_at(model, [step[i] for step in one_by_one]) for i in range(2))
    assert found == [[step[i] for step in one_by_one[:n]] for i in range(2)]
    assert [session.seq_length(i) for i in range(2)] == [
        sum(map(len, question(60 + i))) + n for i in range(2)
    ]


def test_generate_ends_when_its_time_is_up_or_a_step_fails(
    model: _lib.ModelHandle, session: _lib.SessionHandle
) -> None:
    session.prefill(question(70))
    n = session.seq_length()

    def run(**changes: Any) -> Run:
        usual = {"append": True, "answer": True, "sampler": _lib.SamplerHandle(model, temperature=2.0)}
        return Run([Tokens([9])], **(usual | changes))

    assert len(session.generate([run()], 50, 0.0)[0]) == 1
    (found,) = session.generate([run()], 5000)  # steps that stand although the next one had no room
    assert session.seq_length() == n + 1 + len(found)
    assert session.seq_length() == 512 or model.is_end(found[-1].id)
    for wrong in ({"append": False}, {"answer": False}, {"sampler": None}):
        with pytest.raises(ValueError, match="run 0: need"):
            session.generate([run(**wrong)], 5)
    for runs, n_steps in (([], 5), ([run()], 0), ([run(seq=N_SEQ)], 1)):
        with pytest.raises(ValueError, match=r"need|n_steps"):
            session.generate(runs, n_steps)


def test_what_a_sequence_shares_with_runs(session: _lib.SessionHandle) -> None:
    before, answer, after = question(80), Tokens(ids(81, 5)), Tokens(ids(82, 4))
    n = sum(map(len, before))
    session.step([Run(before, first=NOTHING)])
    session.step([Run([answer], append=True, answer=True, first=NOTHING)])
    session.step([Run([after], append=True, first=NOTHING)])
    as_computed = [Run(before), Run([answer], answer=True), Run([after])]
    assert session.seq_shared([0], as_computed) == [n + 9]
    assert session.seq_shared([0], as_computed[:1]) == [n]
    assert session.seq_shared([0], [Run([*before, answer, after])]) == [n]  # an answer's rows are no prompt's
    other = [Run(before), Run([Tokens(ids(81, 5)[:3])], answer=True), Run([after])]
    assert session.seq_shared([0, 1], other) == [n + 3, 0]
    assert session.seq_shared([1], as_computed) == [0]
    with pytest.raises(ValueError, match="at least one span"):
        session.seq_shared([0], [Run([])])


def test_cells_that_sequences_would_leave(session: _lib.SessionHandle) -> None:
    for seq in range(N_SEQ):
        session.seq_trim(seq, 0)
    free = session.cells_free()
    session.step([Run([Tokens(ids(1, 30))], 0, first=NOTHING), Run([Tokens(ids(2, 7))], 1, first=NOTHING)])
    session.seq_copy(0, 2, 20)
    assert session.cells_free() == free - 37
    assert session.cells_free([0]) == free - 27
    assert session.cells_free([2]) == free - 37
    assert session.cells_free([2, 0]) == free - 7
    assert session.cells_free([0, 1, 2]) == free
    for wrong in ([0, 0], [-1], [N_SEQ]):
        with pytest.raises(ValueError, match=r"once|sequence"):
            session.cells_free(wrong)


@pytest.mark.parametrize(("least", "shared"), [(1, 40), (40, 40), (41, 0)])
def test_few_common_rows_need_not_be_shared(session: _lib.SessionHandle, least: int, shared: int) -> None:
    """Where sequences should lie in ranges of their own; what a sequence itself holds is always kept."""
    common, n = ids(83, 40), 512 * N_SEQ
    scripts = [Script([Stretch(Tokens((*common, *ids(seed, 9))))]) for seed in (84, 85)]
    sequences = Sequences(session, N_SEQ, n, least_shared=least)
    first, held = sequences.take(scripts[0], 100)
    assert held == 0
    session.prefill([stretch.span for stretch in scripts[0].stretches], seq=first)
    assert sequences.fits(n - 40, scripts[1], reuse=True) == (shared > 0)
    second, held = sequences.take(scripts[1], 100)
    assert second != first
    assert held == session.seq_length(second) == shared
    assert sequences.n_used() == 49
    sequences.leave(first)
    assert sequences.take(scripts[0], 100) == (first, 49)
