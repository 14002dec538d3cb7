"""Speculative decoding: a cheap draft proposes tokens, one step of the model verifies them.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (ICML 2023,
arXiv:2211.17192): with ``k`` drafted tokens, each accepted with probability ``α`` given those before it were, a
step gains ``(1 - α^(k+1)) / (1 - α)`` tokens on average (their equation 1), because the model itself always
adds one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from servingtiers.performance.steps import GridStepModel, StepGrid, StepSource

__all__ = ["Speculation", "with_speculation"]


@dataclass(frozen=True, slots=True)
class Speculation:
    """Settings of speculative decoding."""

    tokens: int
    """Drafted tokens a step, ``k`` (vLLM's num_speculative_tokens), at least 1."""
    acceptance: float
    """Probability that a drafted token is accepted given those before it were, 0–1 exclusive of 1."""
    draft_cost: float = 0.0
    """Time of one draft token as a share of a pure decode step of the model: about 0 for n-gram look-up, the
    ratio of sizes for a draft model."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(
                f"speculative tokens {self.tokens} must be at least 1: leave speculation out instead"
            )
        if not 0.0 <= self.acceptance < 1.0:
            raise ValueError(f"acceptance {self.acceptance:g} must be at least 0 and below 1")
        if not 0.0 <= self.draft_cost <= 1.0:
            raise ValueError(
                f"draft cost {self.draft_cost:g} must be a share of a decode step, 0 to 1: a dearer draft never pays"
            )

    @property
    def tokens_per_step(self) -> float:
        """Tokens a decoding sequence gains in a step, on average."""
        return (1.0 - self.acceptance ** (self.tokens + 1)) / (1.0 - self.acceptance)


def with_speculation(model: GridStepModel, speculation: Speculation) -> GridStepModel:
    """Return the step model of the same engine with speculative decoding.

    A decoding sequence feeds ``k + 1`` tokens into each step; their linear layers cost what that many tokens
    cost, their attention reads the cached tokens once for all of them (they share keys and values), and
    drafting adds ``k`` times the draft's cost. Accepted tokens are in :attr:`StepGrid.tokens_per_step`.
    """
    grid, query = model.grid, float(speculation.tokens + 1)
    drafting = speculation.tokens * speculation.draft_cost
    decode: list[tuple[float, ...]] = []
    for batch, row in zip(grid.batch_axis, grid.decode_ms, strict=True):
        verified = row[0] * _growth(grid, batch, query)
        decode.append(tuple(verified + (value - row[0]) + drafting * value for value in row))
    for index in range(1, len(decode)):
        decode[index] = tuple(map(max, decode[index], decode[index - 1]))
    source = StepSource(
        model.source.kind,
        f"{model.source.detail}; speculation {speculation.tokens} tokens, acceptance {speculation.acceptance:g}",
        model.source.band_percent + 10.0,
    )
    return replace(
        model,
        source=source,
        grid=replace(
            grid,
            decode_ms=tuple(decode),
            query_tokens=query,
            tokens_per_step=speculation.tokens_per_step,
            acceptance=speculation.acceptance,
        ),
    )


def _growth(grid: StepGrid, batch: float, query: float) -> float:
    """Return by what factor a step without attention grows when each sequence feeds ``query`` tokens."""
    base = grid.token_step_ms(batch)
    return max(grid.token_step_ms(batch * query) / base, 1.0)
