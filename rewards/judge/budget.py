"""The hard budget: one row in a file that all workers share, changed before and after every HTTP request.

Before a request its upper bound is *held*; after it what was billed is *spent* and the hold is given back.
No request is sent that could take spent + held above a limit. A worker that dies between the two leaves its hold
in place for good, since the endpoint may have billed it: at most `concurrency` requests for each death.
What the bound does not cover is a bill above it, from a model whose images cost more than `pricing.py` knows;
it is counted in full and logged, and can overdraw by the requests in flight at that moment.
"""

from __future__ import annotations

import logging

from rewards.judge.pricing import NANO, Amount
from rewards.judge.store import Store

logger = logging.getLogger(__name__)


class BudgetExhausted(Exception):
    """The next request could go above a limit; the message names the key, the count and the remedy."""


class Budget(Store):
    """Limits on what everybody with the same ledger file spends together. Every method blocks: see `store.py`.

    max_nano_usd, max_tokens: None for no limit.
    """

    name = "a ledger of the judge"
    kind = 0x6A756C65
    version = 1
    schema = """CREATE TABLE ledger (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    spent_nano_usd INTEGER NOT NULL, spent_tokens INTEGER NOT NULL,
    held_nano_usd INTEGER NOT NULL, held_tokens INTEGER NOT NULL,
    requests INTEGER NOT NULL
)"""

    def __init__(self, path: str, *, max_nano_usd: int | None, max_tokens: int | None) -> None:
        super().__init__(path)
        self._max_nano_usd, self._max_tokens = max_nano_usd, max_tokens

    def hold(self, most: Amount) -> None:
        """Set aside what the next request can cost. Raises BudgetExhausted, then nothing is held; StoreError."""
        with self.transaction(write=True) as connection:
            connection.execute("INSERT OR IGNORE INTO ledger VALUES (1, 0, 0, 0, 0, 0)")
            row = connection.execute(
                "SELECT spent_nano_usd, spent_tokens, held_nano_usd, held_tokens FROM ledger"
            ).fetchone()
            self._refuse(Amount(*row[:2]), Amount(*row[2:]), most)
            connection.execute(
                "UPDATE ledger SET held_nano_usd = held_nano_usd + ?, held_tokens = held_tokens + ?, "
                "requests = requests + 1",
                most,
            )

    def settle(self, held: Amount, used: Amount) -> None:
        """Turn a hold into what the request was billed. Raises StoreError."""
        if used.nano_usd > held.nano_usd or used.tokens > held.tokens:
            logger.warning(
                "judge: a request was billed %d tokens, at most %d were expected; the budget can be overdrawn by "
                "the requests in flight",
                used.tokens,
                held.tokens,
            )
        with self.transaction(write=True) as connection:
            connection.execute(
                "UPDATE ledger SET held_nano_usd = held_nano_usd - ?, held_tokens = held_tokens - ?, "
                "spent_nano_usd = spent_nano_usd + ?, spent_tokens = spent_tokens + ?",
                (*held, *used),
            )

    def _refuse(self, spent: Amount, held: Amount, most: Amount) -> None:
        limits = (
            ("max_cost_usd", self._max_nano_usd, lambda nano_usd: f"${nano_usd / NANO:.6f}"),
            ("max_total_tokens", self._max_tokens, str),
        )
        for (key, limit, show), used, open_, asked in zip(limits, spent, held, most, strict=True):
            if limit is not None and used + open_ + asked > limit:
                raise BudgetExhausted(
                    f"{key} {show(limit)} does not cover the next request, which takes up to {show(asked)}: "
                    f"{show(used)} spent and {show(open_)} held by requests in flight or lost, by the count in "
                    f"{self.path}; raise {key} and resume: answers in the cache are not paid again"
                )
