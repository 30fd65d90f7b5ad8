"""Prompts are handed out evenly, move to who has nothing to do, and are answered once each, whoever comes and goes."""

import random

import pytest

from actors.dispatch import SLOW_SECONDS, Dispatch, Lengths


def handed(dispatch: Dispatch, *workers: int) -> dict[int, list[int]]:
    """What each is told, after a balance among all of them."""
    dispatch.balance(workers, now=0.0)
    return {worker: dispatch.orders(worker).new for worker in workers}


def test_prompts_of_the_source_with_the_longest_responses_go_first_then_the_longest_prompts() -> None:
    lengths, prompts = Lengths(), [("sums", 5), ("proofs", 3), ("sums", 9), ("proofs", 8), ("sums", 1), ("poems", 2)]
    assert lengths.longest_first(prompts, chunk=6) == [2, 3, 0, 1, 5, 4]  # nothing is known but the prompts
    for tokens in (10, 12):
        lengths.see("sums", tokens)
        lengths.see("proofs", 20 * tokens)
    assert lengths.longest_first(prompts, chunk=6) == [5, 3, 1, 2, 0, 4]  # a poem may be of any length
    assert lengths.longest_first(prompts, chunk=3) == [1, 2, 0, 5, 3, 4]
    for _ in range(40):
        lengths.see("proofs", 1)
    lengths.see("poems", 5)
    assert lengths.longest_first(prompts, chunk=6) == [2, 0, 4, 5, 3, 1]  # what is newer counts more


def test_one_worker_gets_everything_at_once_in_the_given_order() -> None:
    assert handed(Dispatch([2, 0, 1], capacity=1), 7) == {7: [2, 0, 1]}


def test_several_get_even_shares_of_which_the_first_prompts_are_dealt_first() -> None:
    assert handed(Dispatch(range(7), capacity=9), 1, 2, 3) == {1: [0, 3, 6], 2: [1, 4], 3: [2, 5]}


def test_a_worker_that_joins_gets_what_another_holds_and_has_not_begun() -> None:
    dispatch = Dispatch(range(10), capacity=4)
    handed(dispatch, 1)
    assert dispatch.queue_depth == 6
    dispatch.balance([1, 2], now=1.0)
    assert dispatch.orders(1) == ([8], [4, 5, 6, 7, 8, 9])  # it forgets first, then learns
    assert dispatch.orders(2) == ([4, 5, 6, 7, 9], [])
    assert dispatch.queue_depth == 2


def test_what_a_lost_worker_held_goes_to_the_others_before_all_else() -> None:
    dispatch = Dispatch(range(4), capacity=4)
    handed(dispatch, 1, 2)
    dispatch.finish(1, 0, now=1.0)
    dispatch.lost(1, now=2.0)
    assert handed(dispatch, 2) == {2: [2]}
    assert dispatch.open == {1, 2, 3}


def test_what_a_slow_worker_holds_is_given_a_second_time_and_the_first_answer_counts() -> None:
    dispatch = Dispatch(range(4), capacity=4)
    handed(dispatch, 1, 2)
    for position in (0, 2):
        dispatch.finish(1, position, now=1.0)
    dispatch.balance([1, 2], now=SLOW_SECONDS)
    assert not dispatch.holds(1)  # not yet slow
    dispatch.balance([1, 2], now=SLOW_SECONDS + 0.1)
    assert dispatch.orders(1).new == [1, 3] and not dispatch.orders(2)
    assert dispatch.finish(1, 1, now=7.0) and not dispatch.finish(2, 1, now=8.0)
    assert dispatch.finish(2, 3, now=8.0) and not dispatch.open
    assert dispatch.orders(2).dropped == [1] and dispatch.orders(1).dropped == [3]


def test_a_short_call_is_never_given_a_second_time() -> None:
    dispatch = Dispatch(range(2), capacity=4)
    handed(dispatch, 1, 2)
    dispatch.finish(1, 0, now=0.1)
    dispatch.balance([1, 2], now=SLOW_SECONDS - 0.1)
    assert not dispatch.orders(1)


def test_a_leaving_worker_keeps_what_it_has_begun() -> None:
    dispatch = Dispatch(range(6), capacity=2)
    handed(dispatch, 1)
    dispatch.take_back(1)
    dispatch.balance([2], now=0.0)
    assert dispatch.orders(1).dropped == [2, 3, 4, 5] and dispatch.orders(2).new == [2, 3, 4, 5] and dispatch.holds(1)


def test_a_prompt_that_a_worker_has_not_heard_of_is_taken_back_in_silence() -> None:
    dispatch = Dispatch(range(3), capacity=1)
    dispatch.balance([1], now=0.0)
    dispatch.take_back(1)
    assert dispatch.orders(1) == ([0], [])


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_answered_once_whatever_happens(seed: int) -> None:
    """Workers that follow their orders, at random speeds, while others join, leave and die."""
    chance, now = random.Random(seed), 0.0
    dispatch = Dispatch(range(50), capacity=chance.choice([1, 3, 50]))
    at_work: dict[int, list[int]] = {0: []}
    leaving: set[int] = set()
    answered: list[int] = []
    numbers = 1
    while dispatch.open:
        now += chance.uniform(0, 3)
        event = chance.random()
        if event < 0.1:
            at_work[numbers] = []
            numbers += 1
        elif event < 0.15 and len(at_work) > 1:
            lost = chance.choice(list(at_work))
            del at_work[lost]
            leaving.discard(lost)
            dispatch.lost(lost, now, blameless=True)
        elif event < 0.2 and len(at_work) - len(leaving) > 1:
            leaving.add(chance.choice(list(at_work)))
        for worker in leaving:
            dispatch.take_back(worker)
        dispatch.balance([worker for worker in at_work if worker not in leaving] or list(at_work), now)
        for worker, queue in at_work.items():
            told = dispatch.orders(worker)
            assert set(told.dropped) <= set(queue) | set(answered) and not set(told.new) & (set(queue) - set(told.dropped))
            queue[:] = [position for position in queue if position not in told.dropped] + told.new
        for worker, queue in at_work.items():
            if queue and chance.random() < 0.7:
                position = queue.pop(0)
                if dispatch.finish(worker, position, now):
                    answered.append(position)
    assert sorted(answered) == list(range(50))


def answer_all(dispatch: Dispatch, fatal: set[int], workers: int) -> tuple[list[int], list[int], int, int]:
    """Engines that die when they are told a fatal prompt, and compute others as many as fit at once: positions answered, given up, deaths, rounds."""
    at_work: dict[int, list[int]] = {worker: [] for worker in range(workers)}
    answered: list[int] = []
    given_up: list[int] = []
    deaths = rounds = 0
    while dispatch.open:
        rounds += 1
        dispatch.balance(list(at_work), float(rounds))
        for worker in list(at_work):
            told = dispatch.orders(worker)
            at_work[worker] = [position for position in at_work[worker] if position not in told.dropped] + told.new
            begun = at_work[worker][: dispatch.capacity]
            if fatal & set(at_work[worker]):
                del at_work[worker]
                at_work[max(at_work, default=0) + 1 + worker] = []
                deaths += 1
                died_of = dispatch.lost(worker, float(rounds)).fatal
                if died_of is not None:
                    given_up.append(died_of)
                continue
            at_work[worker] = at_work[worker][dispatch.capacity :]
            answered += [position for position in begun if dispatch.finish(worker, position, float(rounds))]
        assert rounds < 1000
    return answered, given_up, deaths, rounds


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("capacity", [32, 256])
@pytest.mark.parametrize("fatal", [{0}, {17}, {255}, {3, 200}, set(range(5))])
def test_the_prompts_of_which_workers_die_are_found_with_few_deaths_and_all_others_are_answered(workers: int, capacity: int, fatal: set[int]) -> None:
    answered, given_up, deaths, rounds = answer_all(Dispatch(range(256), capacity), fatal, workers)
    assert set(given_up) == fatal and sorted(answered) == sorted(set(range(256)) - fatal)
    assert len(answered) == len(set(answered))
    assert deaths <= 5 * len(fatal) and rounds <= 40 * len(fatal)


def test_prompts_that_were_with_one_death_alone_are_no_suspects() -> None:
    dispatch = Dispatch(range(8), capacity=8)
    for worker, known in ((1, False), (2, True)):
        dispatch.balance([worker], now=0.0)
        assert dispatch.orders(worker).new == list(range(8)) and not dispatch.holds_suspects(worker)
        assert dispatch.lost(worker, now=1.0) == (None, known)
    dispatch.balance([3], now=2.0)
    assert dispatch.orders(3).new == [0] and dispatch.holds_suspects(3)


def test_a_death_with_another_reason_and_a_prompt_of_which_the_dead_had_not_heard_do_not_count() -> None:
    dispatch = Dispatch([0], capacity=1)
    for worker in range(4):
        dispatch.balance([worker], now=0.0)
        assert dispatch.lost(worker, now=0.0) == (None, False)  # before it was told anything
    for worker in range(4, 8):
        dispatch.balance([worker], now=0.0)
        dispatch.orders(worker)
        assert dispatch.lost(worker, now=0.0, blameless=True) == (None, False)  # its node went
    for worker, fatal in ((8, None), (9, None), (10, 0)):
        dispatch.balance([worker], now=0.0)
        dispatch.orders(worker)
        assert dispatch.lost(worker, now=0.0).fatal == fatal
    assert not dispatch.open


def test_an_answer_that_comes_after_its_worker_was_given_up_ends_the_wait_for_another() -> None:
    dispatch = Dispatch([0, 1], capacity=1)
    dispatch.balance([1], now=0.0)
    dispatch.orders(1)
    dispatch.lost(1, now=1.0)
    assert dispatch.finish(1, 0, now=1.0)
    dispatch.balance([2], now=2.0)
    assert dispatch.orders(2).new == [1] and dispatch.finish(2, 1, now=3.0) and not dispatch.holds(2) and not dispatch.open
