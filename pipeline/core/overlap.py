"""Work done side by side by threads: items prepared ahead of their consumer, results consumed behind their producer.

The calling thread alone runs what lies between, so a network's forward stays in one thread. Nothing here changes a result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

END, FAILED = object(), object()  # the last message of a producer


class ProducerStopped(Exception):
    """What a consumer's thread meets in place of the next item once the producer has failed."""


def ahead(function: Callable[[In], Out], items: Iterable[In], threads: int, bound: int) -> Generator[Out, None, None]:
    """function(item) in the order of the items, computed by `threads` threads, 0: by the caller's when asked for it.

    bound: results, at most, that threads work on or hold beyond the one that the caller has.

    An error of `function` is raised where its result is due. Close the generator (contextlib.closing) to end the threads.
    """
    if threads == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from through(pool, function, items, bound)
    finally:
        pool.shutdown(cancel_futures=True)


def through(pool: Executor, function: Callable[[In], Out], items: Iterable[In], bound: int) -> Iterator[Out]:
    """function(item) in the order of the items, computed by the pool; bound: as above."""
    waiting: deque[Future[Out]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > bound:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def behind(items: Generator[In, None, None], consume: Callable[[Iterator[In]], Out], bound: int) -> Out:
    """consume(items) in a thread of its own, while the caller's runs the generator; bound 0: both in the caller's thread.

    bound: items, at most, that wait for the consumer.

    An error of either side is raised here; the other side has ended by then, and the generator is closed.
    """
    if bound == 0:
        with closing(items):
            return consume(items)
    queue: SimpleQueue[Any] = SimpleQueue()
    places = Semaphore(bound)
    outcome: Future[Out] = Future()

    def arriving() -> Iterator[In]:
        while (item := queue.get()) is not END:
            if item is FAILED:
                raise ProducerStopped
            places.release()
            yield item

    def work() -> None:
        try:
            outcome.set_result(consume(arriving()))
        except BaseException as error:
            outcome.set_exception(error)
        places.release()  # a producer that waits for a place learns that nobody consumes any more

    thread = Thread(target=work, daemon=True)
    thread.start()
    last = FAILED
    try:
        with closing(items):
            for item in items:
                places.acquire()
                if outcome.done():
                    break
                queue.put(item)
        last = END
    finally:
        queue.put(last)
        thread.join()
    return outcome.result()
