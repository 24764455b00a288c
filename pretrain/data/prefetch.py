"""Batches prepared ahead by threads: in the order of steps, a bounded number of them, every wait bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from core.failures import DataError
from pretrain.data.batch import PretrainBatch


class Prefetch(Iterator[PretrainBatch]):
    """`make(first_step)`, `make(first_step + 1)`, ... without end. Use it as a context, or call `close`.

    An error of a step is raised when that step's turn comes, and ends the iteration.
    """

    def __init__(
        self,
        make: Callable[[int], PretrainBatch],
        first_step: int,
        *,
        workers: int,
        depth: int,
        wait_s: float,
    ) -> None:
        """`depth`: batches that are ready or in the making at most; `wait_s`: longest wait for one."""
        self._make, self._next_step = make, first_step
        self._depth, self._wait_s = depth, wait_s
        self._waiting: deque[Future[PretrainBatch]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
        self._closed = False

    def __next__(self) -> PretrainBatch:
        """Raises DataError when a batch takes longer than `wait_s`, StopIteration once closed."""
        if self._closed:
            raise StopIteration
        while len(self._waiting) < self._depth:
            self._waiting.append(self._pool.submit(self._make, self._next_step))
            self._next_step += 1
        try:
            future = self._waiting.popleft()
            if not future.done():
                self._wait(future)
            return future.result()
        except BaseException:
            self.close()
            raise

    def _wait(self, future: Future[PretrainBatch]) -> None:
        try:
            future.exception(timeout=self._wait_s)
        except TimeoutError as error:
            raise DataError(
                f"no batch within data.wait_s={self._wait_s:.0f} s: the storage is slow or gone; raise it, or "
                "data.workers"
            ) from error

    def close(self) -> None:
        """Drop what is ready and start nothing new; a batch in the making is left to end by itself."""
        self._closed = True
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
