"""Items prepared ahead and results consumed behind: order, bounds, errors of either side, and no thread left."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

import pytest

from pipeline.core.overlap import ProducerStopped, ahead, behind

PATIENCE = 60  # seconds until a test that hangs fails


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def counted(count: int) -> Generator[int, None, None]:
    yield from range(count)


def refuse_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    assert list(ahead(lambda number: number**2, range(20), threads, 2)) == [number**2 for number in range(20)]


def test_a_slow_item_does_not_let_later_ones_overtake() -> None:
    later = threading.Event()

    def function(number: int) -> int:
        if number == 0:
            assert later.wait(PATIENCE)
        if number == 1:
            later.set()
        return number

    assert list(ahead(function, range(4), 2, 3)) == [0, 1, 2, 3]


def test_items_are_prepared_while_the_consumer_holds_another() -> None:
    prepared = [threading.Event() for _ in range(3)]
    results = ahead(lambda number: prepared[number].set(), range(3), 1, 2)
    next(results)
    assert prepared[1].wait(PATIENCE) and prepared[2].wait(PATIENCE)
    results.close()


def test_no_more_items_than_the_bound_are_drawn_ahead() -> None:
    drawn = []

    def items() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    for consumed, _ in enumerate(ahead(lambda number: number, items(), 2, 3), start=1):
        assert len(drawn) <= consumed + 3


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_of_a_loader_is_raised_where_its_result_is_due(threads: int) -> None:
    results, received = ahead(refuse_three, range(9), threads, 4), []
    with pytest.raises(ValueError, match="three"):
        for number in results:
            received.append(number)
    assert received == [0, 1, 2]


def test_closing_ends_the_loaders_and_starts_no_further_item() -> None:
    started = []
    results = ahead(started.append, range(100), 2, 4)
    next(results)
    results.close()
    assert len(started) <= 5


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_the_consumer_gets_all_items_in_order_and_its_result_comes_back(bound: int) -> None:
    assert behind(counted(20), list, bound) == list(range(20))


def test_the_producer_stays_in_the_callers_thread_and_the_consumer_has_another() -> None:
    def items() -> Generator[int, None, None]:
        yield threading.get_ident()

    def consume(arriving: Iterator[int]) -> tuple[int, int]:
        return next(arriving), threading.get_ident()

    producer, consumer = behind(items(), consume, 1)
    assert producer == threading.get_ident() != consumer


def test_the_producer_goes_on_while_the_consumer_is_busy() -> None:
    second = threading.Event()

    def items() -> Generator[int, None, None]:
        yield 0
        second.set()
        yield 1

    def consume(arriving: Iterator[int]) -> int:
        next(arriving)
        assert second.wait(PATIENCE)
        return next(arriving)

    assert behind(items(), consume, 1) == 1


def test_no_more_items_than_the_bound_wait_for_the_consumer() -> None:
    produced, ahead_of_consumer = [0], []

    def items() -> Generator[int, None, None]:
        for number in range(50):
            produced[0] = number + 1
            yield number

    def consume(arriving: Iterator[int]) -> None:
        for number in arriving:
            ahead_of_consumer.append(produced[0] - number - 1)

    behind(items(), consume, 2)
    assert max(ahead_of_consumer) <= 2 + 1  # and the one that waits for a place


@pytest.mark.parametrize("bound", [0, 1])
@pytest.mark.parametrize("error", [ValueError("three"), KeyboardInterrupt()])
def test_an_error_of_the_producer_is_raised_and_the_consumer_never_meets_a_normal_end(
    bound: int, error: BaseException
) -> None:
    received, completed = [], []

    def items() -> Generator[int, None, None]:
        yield from range(3)
        raise error

    def consume(arriving: Iterator[int]) -> None:
        received.extend(arriving)
        completed.append(True)

    with pytest.raises(type(error)) as raised:
        behind(items(), consume, bound)
    assert raised.value is error and not isinstance(raised.value, ProducerStopped)
    assert not completed


@pytest.mark.parametrize("bound", [0, 1])
def test_an_error_of_the_consumer_is_raised_and_the_endless_producer_is_closed(bound: int) -> None:
    closed, error = [], OSError("no space left")

    def items() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed.append(threading.get_ident())

    def consume(arriving: Iterator[int]) -> None:
        next(arriving)
        raise error

    with pytest.raises(OSError, match="no space left") as raised:
        behind(items(), consume, bound)
    assert raised.value is error
    assert closed == [threading.get_ident()]
