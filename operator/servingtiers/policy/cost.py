"""What a tier costs: replicas × accelerators × price, and that over what it generates."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

from servingtiers.api.status import CostStatus
from servingtiers.core.signals import Signal, Value, number

__all__ = ["PoolCost", "compute"]


@dataclass(frozen=True, slots=True)
class PoolCost:
    """What one pool holds and how busy it is."""

    replicas: int
    """Replicas that hold accelerators: starting and draining ones are paid too, unschedulable ones are not."""
    tensor_parallel: int
    """Accelerators of one replica."""
    price_per_hour: Decimal
    """Of one accelerator."""
    price_source: str
    max_num_seqs: int
    """Largest batch of one replica."""
    running: Signal
    """Sequences being served, all replicas together."""

    @property
    def per_hour(self) -> Decimal:
        """Price of the pool for one hour."""
        return self.price_per_hour * self.tensor_parallel * self.replicas

    @property
    def idle_per_hour(self) -> Decimal | None:
        """Price of the batch slots that nobody uses; None where use is unknown."""
        if self.replicas == 0:
            return Decimal(0)
        running = number(self.running)
        if running is None or self.max_num_seqs <= 0:
            return None
        used = min(running / (self.replicas * self.max_num_seqs), 1.0)
        return self.per_hour * (1 - Decimal(str(used)))


def compute(
    pools: tuple[PoolCost, ...], output_token_rate: Signal, currency: str, window_seconds: float
) -> CostStatus:
    """Return the cost of a tier at this moment.

    Cost per token is the present price over the present rate: it says what tokens cost while the fleet is like
    this, start-up and idle replicas included, and is left out while nothing is generated.

    Args:
        pools: All pools.
        output_token_rate: Tokens generated per second by the pools that answer users.
        currency: Of the prices.
        window_seconds: Window of the rate.
    """
    per_hour = sum((pool.per_hour for pool in pools), Decimal(0))
    idle = [pool.idle_per_hour for pool in pools]
    known = [each for each in idle if each is not None]
    per_million = None
    if isinstance(output_token_rate, Value) and output_token_rate.value > 0 and not output_token_rate.partial:
        hourly = Decimal(str(output_token_rate.value)) * 3600
        per_million = per_hour / hourly * 1_000_000
    sources = dict.fromkeys(pool.price_source for pool in pools)
    return CostStatus(
        window=f"{window_seconds:.0f}s",
        per_hour=_money(per_hour),
        idle_per_hour=_money(sum(known, Decimal(0))) if len(known) == len(idle) else None,
        per_million_output_tokens=None if per_million is None else _money(per_million),
        currency=currency,
        price_source="; ".join(sources)[:256],
    )


def _money(amount: Decimal) -> str:
    """Return an amount with two decimals; small ones with two digits that matter."""
    if 0 < amount < 1:
        return f"{float(amount):.2g}" if amount >= Decimal("0.0001") else "0.0001"
    return str(amount.quantize(Decimal("0.01"), rounding=ROUND_HALF_EVEN))
