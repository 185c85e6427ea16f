"""What a tune is to find: the least of one thing while another stays within a bound."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from statistics import NormalDist

from foveate.core.errors import FoveateError
from foveate.tune.evidence import COSTS, Evidence, Interval

DROP = "drop"
_LEVEL = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Goal:
    """Find the least ``target`` with ``bounded`` at most ``bound``; one of the two is the drop, the other a cost.

    Costs are shares of the unmodified model's.
    """

    target: str
    bounded: str
    bound: float

    def __post_init__(self) -> None:
        for cost in {self.target, self.bounded} - {DROP}:
            if cost not in COSTS:
                raise FoveateError(f"target={cost!r}: must be one of {', '.join(COSTS)}")
        most = f"max-{self.bounded}={self.bound}"
        if self.bounded == DROP and not 0 <= self.bound < 1:
            raise FoveateError(f"{most}: must be in [0, 1), such as 0.02 for two points of a hundred")
        if self.bounded != DROP and not 0 < self.bound <= 1:
            raise FoveateError(f"{most}: must be a share of the unmodified model's, in (0, 1]")

    @property
    def cost(self) -> str:
        """The cost that it is about, as target or as what is bounded."""
        return self.target if self.bounded == DROP else self.bounded

    @property
    def starts(self) -> tuple[float, ...]:
        """The budgets at which to try every method first; a cost is of more than the tokens that ``keep`` counts."""
        return (0.5, 0.7, 0.3) if self.bounded == DROP else (max(0.05, round(0.75 * self.bound, 2)),)

    def wanted(self, evidence: Evidence) -> Interval:
        """What is to be the least."""
        return self._of(self.target, evidence)

    def limited(self, evidence: Evidence) -> Interval:
        """What is to stay within the bound."""
        return self._of(self.bounded, evidence)

    def within(self, evidence: Evidence) -> bool:
        """Whether the estimate is within the bound."""
        return self.limited(evidence).value <= self.bound

    def hopeless(self, evidence: Evidence) -> bool:
        """Whether the whole interval is beyond the bound."""
        return self.limited(evidence).low > self.bound

    def dominated(self, evidence: Evidence, best: Evidence) -> bool:
        """Whether ``best``, which is within the bound, leaves nothing to hope for: better in what is wanted, and no worse
        in what is limited, or within the bound for certain."""
        if self.target == DROP:
            wanted = evidence.drop.low > best.drop.value
            return wanted or (evidence.drop.value >= best.drop.value and self._dearer(evidence, best))
        certain = best.drop.high <= self.bound or best.drop.value <= evidence.drop.value
        return certain and self.wanted(evidence).low > self.wanted(best).value

    def hope(self, evidence: Evidence) -> float:
        """How much to expect of a recipe when it is validated: the saving times the chance that the bound holds.

        The fastest recipe of a search is often one whose drop was underestimated: its chance is even, and a slower one that
        will hold is worth more. Under a bound on the cost, which is known well, it is the quality alone.
        """
        if self.target == DROP:
            return -evidence.drop.value
        return -log(max(self.wanted(evidence).value, 1e-6)) * _chance(evidence.drop, self.bound)

    def __str__(self) -> str:
        if self.target == DROP:
            return f"best quality with {self.bounded} at most {self.bound:g} of the unmodified model's"
        return f"least {self.target} with a drop of at most {self.bound:g}"

    def _of(self, what: str, evidence: Evidence) -> Interval:
        if what == DROP:
            return evidence.drop
        if what not in evidence.shares:
            raise FoveateError(f"target={what!r}: no answer is longer than one token, so no step of decoding was timed")
        return evidence.shares[what]

    def _dearer(self, evidence: Evidence, best: Evidence) -> bool:
        return self.limited(evidence).value >= self.limited(best).value


def _chance(estimate: Interval, bound: float) -> float:
    """How likely the true value is within the bound."""
    spread = max(estimate.high - estimate.low, 1e-9) / (2 * _LEVEL)
    return NormalDist(estimate.value, spread).cdf(bound)
