"""Who holds which engine: tiers of one TierPool lend each other engines by a label, in seconds instead of minutes.

What is decided here, after scaling has said what every tier needs:

* A tier that needs more than what serves it borrows from tiers of lower priority: first engines that their home does
  not expect to need, then, of tiers whose work can wait (Throughput), engines that are at work. ``minKeep`` stays at home, and
  no more than ``maxBorrowed`` come.
* A load that comes and goes within seconds has engines stand by for its next rush, where their home expects no need of them
  and hardly answers later without them. What only stands by goes home as soon as that is no longer so.
* An engine leaves (no holder: routers send it nothing more), finishes what it has, and enters its new holder. It goes
  over in one step where what it has in flight is a small share of a batch.
* A loan ends when the borrower has been able to do without it for a while, when a home that cannot wait needs it, or
  when a member no longer takes part.
* Engines move before engines start: what a move gives is not started, what is borrowed goes back before a tier's own
  engines are stopped, and a home does not replace what it has lent while what it owns would do.
* For what a tier expects to go on needing, only such engines of others stand in as their home has not needed for an hour;
  the others bridge the start of its own.

Data that is missing begins nothing and ends nothing: an engine whose requests in flight are unknown is not taken, and a
tier of which not everything is seen has nothing to spare. Everything remembered is in
:class:`~servingtiers.api.status.PoolMemory` and in the labels themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from servingtiers.api.spec import PoolSpec, SharedPoolRef, Tier
from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import Binding, Decision, PoolFacts, TierDecision, TierObservation, acts
from servingtiers.core.sharing import Group, GroupDecision, Relabel, SharedEngine
from servingtiers.core.signals import Signal, Unknown, Value, Zero, number
from servingtiers.core.times import from_time, in_words, to_time
from servingtiers.policy.learning import slowness_of

__all__ = ["OVERLAP_SHARE", "RETURN_HOLD_SECONDS", "STAY_SECONDS", "decide"]

RETURN_HOLD_SECONDS = 60.0
"""For so long a borrower must have been able to do without an engine before it goes back. Shorter than the hold before
an engine is stopped, because it can be had again in seconds."""
STAY_SECONDS = 30.0
"""An engine stays at least so long where it came to, whoever calls."""
OVERLAP_SHARE = 1 / 8
"""Share of the smaller of both batches that an engine may still have in flight when it enters its new holder: so few
sequences lengthen a step by less than the headroom of any tier."""
_UNSEEN_SECONDS = 3.0
"""Requests in flight tell of a drained engine only if they were read so long after its routers were told to let go."""
_HOMECOMING_SECONDS = 60.0
"""An engine on its way home is let in after this time, whatever it still has to finish."""
_LOST_SECONDS = 300.0
"""An engine that could not be drained for a borrower in this time goes home."""
_LENT, _GIVEN_BACK = 1.08, 1.12
"""How much longer a lender's tokens may take for an engine that only stands by elsewhere, and from what on it goes home."""


def decide(group: Group, decided: tuple[TierDecision, ...], now: float) -> GroupDecision:
    """Decide which engines move, and what is started and stopped beside that.

    Args:
        group: The members of one TierPool with their engines. Engines whose holder is no member are called home.
        decided: What scaling decided for each tier, in the order of ``group.tiers``, with everything that is lent and
            borrowed as it is now: ``desired - current`` is what a tier lacks (or can do without) beside what serves it.
        now: Unix time, seconds.

    Returns:
        At most one relabel per engine, and the tiers' decisions with the replicas of their own Deployments.
    """
    book = _Book(group, decided, now)
    _go_on(book)
    _end_loans(book)
    reserved = _borrow(book)
    tiers = tuple(_after_moves(book, member, reserved) for member in book.members)
    return GroupDecision(_within_accelerators(book, tiers), tuple(book.relabels))


# --- what is known ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seat:
    """One engine, and where it is after what has been decided so far."""

    engine: SharedEngine
    holder: str | None
    bound_for: str | None
    moved: bool = False
    """It has been relabelled in this pass: once is enough."""

    @property
    def goes_to(self) -> str:
        """Key of the tier that has it or will have it."""
        return self.holder or self.bound_for or self.engine.home

    @property
    def usable(self) -> bool:
        return self.engine.ready and not self.engine.leaving

    @property
    def at_home(self) -> bool:
        return self.holder == self.engine.home

    @property
    def rested(self) -> bool:
        """Whether it has been where it is for long enough to move again."""
        return self.engine.held_seconds is None or self.engine.held_seconds >= STAY_SECONDS


@dataclass(frozen=True, slots=True)
class _Member:
    """One tier of the group."""

    observation: TierObservation
    decided: TierDecision

    @property
    def key(self) -> str:
        return self.observation.key

    @property
    def name(self) -> str:
        """Its name without the namespace, for people: all members are of one namespace."""
        return self.key.rpartition("/")[2]

    @property
    def terms(self) -> SharedPoolRef | None:
        return self.observation.spec.shared_pool

    @property
    def active(self) -> bool:
        """Whether it lends and borrows."""
        spec = self.observation.spec
        return (
            self.terms is not None
            and len(self.observation.pools) == 1
            and acts(spec.scaling.mode, suspended=spec.suspend)
        )

    @property
    def frozen(self) -> bool:
        """Whether nothing of it is to change: what it holds it keeps until its home needs it."""
        return self.observation.spec.suspend and self.terms is not None

    @property
    def priority(self) -> int:
        return self.terms.priority if self.terms is not None else 0

    @property
    def can_wait(self) -> bool:
        """Whether its work has a deadline instead of somebody who waits for the next token."""
        return self.observation.spec.tier is Tier.THROUGHPUT

    @property
    def facts(self) -> PoolFacts:
        return self.observation.pools[0]

    @property
    def decision(self) -> Decision:
        return self.decided.decisions[0]

    @property
    def needed(self) -> int | None:
        """Engines of its own kind that its load calls for; None: not known."""
        return self.decision.needed

    @property
    def wanted(self) -> int | None:
        """Engines that it is to have here: those that it needs, and those that stand by for its next rush."""
        if self.needed is None:
            return None
        return max(self.needed, self.decision.standby or 0)

    @property
    def keeps(self) -> int | None:
        """Engines that it does not spare: what it expects to need is no surplus."""
        if self.needed is None:
            return None
        return max(self.needed, self.decision.expected or 0)

    @property
    def may_need(self) -> int | None:
        """Engines that it may need sooner than one could be started: those of its highest load within the hour, too."""
        if self.keeps is None:
            return None
        return max(self.keeps, self.decision.highest or 0)

    def stretch(self, engines: float, of: float) -> float | None:
        """Return how much longer its tokens take on so many engines than on ``of``; None: not known.

        Infinity where so many do not keep up with what arrives: then it is not its pace that suffers, but everything.
        """
        curve, rate = self.facts.curve, number(self.observation.load.router.arrival_rate)
        if curve is None or rate is None:
            return None
        load = rate * slowness_of(self.before) / curve.saturation
        if load > 0.0 and load >= curve.loads[-1] * engines:
            return math.inf
        if load == 0.0:
            return 1.0
        return curve.at(load / engines, curve.tpot) / curve.at(load / max(of, engines), curve.tpot)

    @property
    def before(self) -> PoolMemory:
        """What was remembered before this pass; scaling need not know of lending's part of it."""
        return self.observation.memory.get(self.facts.name, PoolMemory())

    @property
    def memory(self) -> PoolMemory:
        return self.decided.memory.get(self.facts.name, PoolMemory())

    @property
    def seen_whole(self) -> bool:
        """Whether all of its load is seen: only then it has something to spare."""
        load = self.observation.load.pools.get(self.facts.name)
        arrivals = self.observation.load.router.arrival_rate
        return (
            load is not None
            and load.coverage.complete
            and all(_known(signal) for signal in (load.running, load.waiting, arrivals))
        )


def _known(signal: Signal) -> bool:
    return isinstance(signal, Zero) or (isinstance(signal, Value) and not signal.partial)


@dataclass(slots=True)
class _Book:
    """The group with all moves that have been decided so far."""

    group: Group
    decided: tuple[TierDecision, ...]
    now: float
    members: tuple[_Member, ...] = ()
    seats: list[_Seat] = field(default_factory=list)
    relabels: list[Relabel] = field(default_factory=list)
    spare: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Tier key to (since when it could do without a borrowed engine, most engines needed since)."""

    def __post_init__(self) -> None:
        self.members = tuple(
            _Member(observation, decision)
            for observation, decision in zip(self.group.tiers, self.decided, strict=True)
        )
        # By uid: the order in which a cluster lists pods must not decide.
        engines = sorted(self.group.engines, key=lambda engine: engine.uid)
        self.seats = [_Seat(engine, engine.holder, engine.bound_for) for engine in engines]

    def member(self, key: str) -> _Member | None:
        return next((member for member in self.members if member.key == key), None)

    def with_tier(self, key: str) -> list[_Seat]:
        """Engines that a tier has or that are on their way to it."""
        return [seat for seat in self.seats if seat.usable and seat.goes_to == key]

    def borrowed(self, key: str) -> list[_Seat]:
        """Engines of other tiers that a tier has or that are on their way to it."""
        return [seat for seat in self.with_tier(key) if seat.engine.home != key]

    def kept(self, key: str) -> int:
        """Engines of a tier that serve it now."""
        return sum(seat.usable and seat.engine.home == key and seat.at_home for seat in self.seats)

    def lent(self, key: str) -> int:
        """Engines of a tier that do not serve it: lent, or on their way there or back."""
        return sum(seat.usable and seat.engine.home == key and not seat.at_home for seat in self.seats)

    def spared(self, home: _Member) -> int:
        """Return the engines of a tier, wherever they are, that it has not needed within the hour: no rush calls for them."""
        if home.may_need is None or home.terms is None:
            return 0
        own = self.kept(home.key) + self.lent(home.key)
        return max(0, own - max(home.may_need, home.terms.min_keep))

    def lasting(self, borrower: _Member) -> float:
        """Return the borrowed engines that a tier can keep for good, in engines of its own."""
        borrowed = self.borrowed(borrower.key)
        stay = sum(
            min(sum(seat.engine.home == home.key for seat in borrowed), self.spared(home))
            for home in self.members
        )
        return stay * borrower.facts.borrowed_share

    def capacity(self, member: _Member) -> float:
        """Engines that a tier has or is about to have, in engines of its own."""
        borrowed = len(self.borrowed(member.key))
        own = len(self.with_tier(member.key)) - borrowed
        return own + borrowed * member.facts.borrowed_share

    def move(self, seat: _Seat, to: str, reason: str) -> None:
        """Send an engine to a tier: in one step where it has next to nothing in flight, else it leaves first."""
        direct = seat.holder is not None and self.fits(seat, to)
        self.put(seat, to if direct else None, None if direct else to, reason)

    def put(self, seat: _Seat, holder: str | None, bound_for: str | None, reason: str) -> None:
        seat.holder, seat.bound_for, seat.moved = holder, bound_for, True
        engine = seat.engine
        self.relabels.append(Relabel(engine.uid, engine.name, holder, bound_for, reason))

    def fits(self, seat: _Seat, to: str) -> bool:
        """Whether what an engine has in flight may run on beside the requests of its new holder."""
        flight = number(seat.engine.in_flight)
        batches = [
            member.facts.max_num_seqs
            for key in (seat.engine.home, to)
            if (member := self.member(key)) is not None and member.facts.max_num_seqs > 0
        ]
        if flight is None or not _known(seat.engine.in_flight):
            return False
        return flight == 0 or (bool(batches) and flight <= OVERLAP_SHARE * min(batches))


def _name(key: str) -> str:
    return key.rpartition("/")[2]


# --- moves ------------------------------------------------------------------------------------------------------


def _go_on(book: _Book) -> None:
    """Let engines without a holder enter where they are bound for, once they are drained."""
    for seat in book.seats:
        engine = seat.engine
        if seat.holder is not None or not seat.usable:
            continue
        waited = engine.held_seconds
        goal = seat.bound_for or engine.home
        if goal != engine.home and not _may_receive(book, goal, engine.home):
            why = (
                f"the spec of {_name(engine.home)} is not accepted"
                if engine.home in book.group.refused
                else f"{_name(goal)} no longer takes part"
            )
            book.put(seat, None, engine.home, f"{why}: it goes home to {_name(engine.home)}")
        elif _drained(book, seat, goal):
            left = number(engine.in_flight)
            rest = "nothing is in flight" if not left else f"only {left:.0f} requests are in flight"
            book.put(seat, goal, None, f"drained ({rest}): it serves {_name(goal)} now")
        elif goal == engine.home and waited is not None and waited >= _HOMECOMING_SECONDS:
            book.put(seat, goal, None, f"on its way home for {in_words(waited)}: it finishes the rest there")
        elif waited is not None and waited >= _LOST_SECONDS:
            book.put(
                seat,
                None,
                engine.home,
                f"not drained in {in_words(waited)}: it goes home to {_name(engine.home)}",
            )


def _may_receive(book: _Book, borrower: str, home: str) -> bool:
    to, of = book.member(borrower), book.member(home)
    return to is not None and of is not None and to.active and of.active


def _drained(book: _Book, seat: _Seat, goal: str) -> bool:
    signal, waited = seat.engine.in_flight, seat.engine.held_seconds
    if isinstance(signal, Unknown) or not book.fits(seat, goal):
        return False
    return waited is None or waited - signal.age >= _UNSEEN_SECONDS


def _end_loans(book: _Book) -> None:
    """Send engines home that are no longer needed, or that their home cannot do without."""
    for member in book.members:
        _note_spare(book, member)
    for seat in book.seats:
        if seat.moved or not seat.usable or seat.at_home or seat.holder is None:
            continue
        reason = _why_home(book, seat)
        if reason is not None:
            book.move(seat, seat.engine.home, reason)


def _note_spare(book: _Book, member: _Member) -> None:
    """Remember since when a borrower could do without one engine of what it has borrowed."""
    if len(member.observation.pools) != 1 or not book.borrowed(member.key):
        return
    needed = member.wanted
    if needed is None or not member.seen_whole:
        return
    if book.capacity(member) - member.facts.borrowed_share < needed:
        return
    since, peak = to_time(book.now), needed
    memory = member.before
    if memory.spare_since is not None and from_time(memory.spare_since) <= book.now:
        watched = member.observation.watching_since
        if watched is None or from_time(memory.spare_since) >= watched:
            earlier = max(needed, memory.spare_peak or 0)
            over = book.now - from_time(memory.spare_since) >= RETURN_HOLD_SECONDS
            # A wait that began under more load and is over says nothing of now: the next one counts from here.
            if not over or book.capacity(member) - member.facts.borrowed_share >= earlier:
                since, peak = memory.spare_since, earlier
    book.spare[member.key] = (since, peak)


def _why_home(book: _Book, seat: _Seat) -> str | None:
    """Return why a lent engine is called home; None: it stays."""
    home, holder = book.member(seat.engine.home), book.member(seat.holder or "")
    if home is None:
        return None  # nobody here may touch it: it is another group's
    if holder is None and home.terms is not None and seat.holder in book.group.refused:
        return None  # a mistake in its spec takes nothing away from it
    if holder is None or holder.terms is None or home.terms is None:
        return f"{_name(seat.holder or '')} and {home.name} share no pool any more"
    if not (holder.active or holder.frozen):
        return f"{holder.name} does not borrow in its scaling mode"
    if not seat.rested:
        return None
    if len(book.borrowed(holder.key)) > holder.terms.max_borrowed:
        return f"{holder.name} may borrow {holder.terms.max_borrowed} engines at most (maxBorrowed)"
    back = len([s for s in book.with_tier(home.key) if s.engine.home == home.key])
    if back < home.terms.min_keep:
        return f"{home.name} keeps {home.terms.min_keep} engines at least (minKeep)"
    waits = home.can_wait and home.priority < holder.priority
    lacks = home.needed is not None and home.needed > book.capacity(home)
    if lacks and not waits:
        return f"{home.name} needs {home.needed} engines itself and has {_figure(book.capacity(home))}"
    if _only_stands_by(book, holder):
        if lacks:
            return f"it only stands by for {holder.name}, and {home.name} needs {home.needed} engines itself"
        stretch = _stretched(book, home)
        if stretch is not None and stretch > _GIVEN_BACK:
            return f"it only stands by for {holder.name}, and {home.name} {_slower(stretch)} without it"
    if holder.key in book.spare and not holder.frozen:
        since, peak = book.spare[holder.key]
        passed = book.now - from_time(since)
        enough = book.capacity(holder) - holder.facts.borrowed_share >= peak
        if passed >= RETURN_HOLD_SECONDS and enough:
            return f"{holder.name} has needed {peak} engines at most for {in_words(passed)} and has one more"
    return None


def _only_stands_by(book: _Book, holder: _Member) -> bool:
    """Whether a tier has an engine of others for its next rush, and could do without it until then."""
    if holder.frozen or holder.needed is None or holder.decision.standby is None or not holder.seen_whole:
        return False
    return book.capacity(holder) - holder.facts.borrowed_share >= holder.needed


def _stretched(book: _Book, lender: _Member, more: int = 0) -> float | None:
    """Return how much longer a lender's tokens take for want of its engines that are not at home, and of ``more``."""
    here = book.capacity(lender) - more
    return lender.stretch(here, here + book.lent(lender.key) + more)


def _slower(stretch: float) -> str:
    return f"is {stretch - 1.0:.0%} slower" if math.isfinite(stretch) else "does not keep up"


def _borrow(book: _Book) -> dict[str, int]:
    """Fetch engines for tiers that lack them, the most important tier first.

    Returns:
        Tier key to engines that it does not need and that are kept for a tier which expects to need them.
    """
    reserved: dict[str, int] = {}
    for borrower in sorted(book.members, key=lambda member: (-member.priority, member.key)):
        if not borrower.active or borrower.terms is None:
            continue
        share = borrower.facts.borrowed_share
        if share <= 0:
            continue
        room = borrower.terms.max_borrowed - len(book.borrowed(borrower.key))
        if borrower.needed is not None:
            lacking = math.ceil((borrower.needed - book.capacity(borrower)) / share - 1e-9)
            for _ in range(min(lacking, room)):
                taken = _best(book, borrower)
                if taken is None:
                    break
                seat, why = taken
                reason = f"{borrower.name} needs {borrower.needed} engines and has {_figure(book.capacity(borrower))}; {why}"
                book.move(seat, borrower.key, reason)
                room -= 1
            _stand_by(book, borrower, room)
            room = borrower.terms.max_borrowed - len(book.borrowed(borrower.key))
        else:
            continue  # it would not come for what is kept for it
        if borrower.decision.standby is not None:
            continue  # a rush is over before what is kept for it has come
        ahead = borrower.decision.desired - borrower.decision.current - _on_the_way(book, borrower)
        for lender in book.members:
            if ahead <= 0 or room <= 0:
                break
            if lender.priority >= borrower.priority or not lender.active:
                continue
            could_go = sum(
                seat.usable
                and seat.engine.home == lender.key
                and seat.at_home
                and _known(seat.engine.in_flight)
                for seat in book.seats
            )
            for_good = book.spared(lender) - book.lent(lender.key)
            spare = min(_surplus(book, lender), could_go, for_good) - reserved.get(lender.key, 0)
            spare = min(spare, math.ceil(ahead / share), room)
            if spare > 0:
                reserved[lender.key] = reserved.get(lender.key, 0) + spare
                ahead -= spare * share
                room -= spare
    return reserved


def _stand_by(book: _Book, borrower: _Member, room: int) -> None:
    """Fetch engines for the next rush of a load that comes and goes, where that costs their home little."""
    wanted = borrower.wanted
    if wanted is None or not borrower.seen_whole:
        return
    for _ in range(room):
        if book.capacity(borrower) >= wanted:
            return
        taken = _best(book, borrower, standing_by=True)
        if taken is None:
            return
        seat, why = taken
        reason = f"{borrower.name} has {_figure(book.capacity(borrower))} engines and needs {wanted} whenever its load comes back; {why}"
        book.move(seat, borrower.key, reason)


def _best(book: _Book, borrower: _Member, *, standing_by: bool = False) -> tuple[_Seat, str] | None:
    """Return the engine that is missed least, and why it may go; None: there is none to be had."""
    offers = sorted(
        (offer for offer in _offers(book, borrower) if not standing_by or _costs_little(book, offer)),
        key=lambda offer: (offer[0], number(offer[1].engine.in_flight) or 0.0, offer[1].engine.uid),
    )
    return (offers[0][1], offers[0][2]) if offers else None


def _costs_little(book: _Book, offer: tuple[tuple[int, int], _Seat, str]) -> bool:
    """Whether an engine may stand by elsewhere: its home expects no need of it, and answers hardly later without it."""
    (kind, _), seat, _ = offer
    home = book.member(seat.engine.home)
    stretch = None if home is None else _stretched(book, home, 1)
    return kind == 0 and stretch is not None and stretch <= _LENT


def _offers(book: _Book, borrower: _Member) -> Iterator[tuple[tuple[int, int], _Seat, str]]:
    """Yield (how much it is missed, engine, why it may go) of all engines that a tier may have."""
    for seat in book.seats:
        engine = seat.engine
        if seat.moved or not seat.usable or seat.holder is None or not seat.rested:
            continue
        home, holder = book.member(engine.home), book.member(seat.holder)
        if home is None or holder is None or borrower.key in {home.key, holder.key}:
            continue
        if not (home.active and holder.active) or max(home.priority, holder.priority) >= borrower.priority:
            continue
        if not _known(engine.in_flight):
            continue
        if home.facts.rolling:  # some of its engines are still of another plan than what the members agree on
            continue
        if not seat.at_home:
            yield (
                (2, holder.priority),
                seat,
                f"{holder.name}, which has borrowed one of {home.name}, is less important",
            )
        elif home.terms is None or book.kept(home.key) <= home.terms.min_keep:
            continue
        elif _surplus(book, home) > 0:
            yield (0, home.priority), seat, f"{home.name} needs {home.needed} of its {book.kept(home.key)}"
        elif home.can_wait:
            yield (1, home.priority), seat, f"the work of {home.name} can wait"


def _surplus(book: _Book, member: _Member) -> int:
    """Return how many of its own engines a tier does not need; 0 where that is not known."""
    if member.keeps is None or not member.seen_whole or member.terms is None or member.facts.rolling:
        return 0
    spare = math.floor(book.capacity(member) + 1e-9) - member.keeps
    return max(0, min(spare, book.kept(member.key) - member.terms.min_keep))


# --- replicas ---------------------------------------------------------------------------------------------------


def _on_the_way(book: _Book, member: _Member) -> float:
    """Return engines that come to a tier and do not serve it yet, in engines of its own: its own ones first of all."""
    coming = sum(seat.engine.holder != member.key for seat in book.borrowed(member.key))
    away = sum(
        seat.usable and seat.engine.home == member.key and seat.engine.holder != member.key
        for seat in book.seats
    )
    return away + coming * member.facts.borrowed_share


def _after_moves(book: _Book, member: _Member, reserved: dict[str, int]) -> TierDecision:
    """Return a tier's decision with what its own Deployment does after the moves."""
    decided = member.decided
    if not member.active:
        return decided
    decision = member.decision
    ahead = decision.desired - decision.current
    if ahead > 0:
        decision = _starts(book, member, ahead, reserved)
    elif ahead < 0:
        decision = _stops(book, member, reserved)
    if ahead >= 0:
        decision = _starts_for_good(book, member, decision)
    since, peak = book.spare.get(member.key, (None, None))
    update: dict[str, str | int | None] = {"spare_since": since, "spare_peak": peak}
    before = member.before
    if ahead > 0 and decision.desired <= decision.current:
        update["last_scale_up"] = before.last_scale_up
    elif ahead < 0 and decision.desired >= decision.current:
        update["last_scale_down"] = before.last_scale_down
    if decision.desired > decision.current:
        update["last_scale_up"] = to_time(book.now)
    memory = decided.memory | {member.facts.name: member.memory.model_copy(update=update)}
    return replace(decided, decisions=(decision,), memory=memory)


def _starts(book: _Book, member: _Member, ahead: int, reserved: dict[str, int]) -> Decision:
    """Return the decision to start what no move gives."""
    decision = member.decision
    coming = _on_the_way(book, member)
    kept = (
        sum(reserved.get(other.key, 0) for other in book.members if other.priority < member.priority)
        * member.facts.borrowed_share
    )
    floor = min(decision.desired, member.facts.scaling.min_replicas)
    starts = max(0, math.ceil(ahead - coming - kept - 1e-9))
    desired = max(decision.current + starts, floor, decision.current)
    if desired == decision.desired:
        return decision
    lent = book.lent(member.key)
    own = f"{lent} of its own are lent" if lent else ""
    borrowed = len(book.borrowed(member.key))
    others = f"{borrowed} of other tiers are here or on their way" if borrowed else ""
    spare = "other tiers have engines to spare" if kept and not (own or others) else ""
    what = " and ".join(text for text in (own, others, spare) if text) or "engines are on their way"
    return replace(
        decision,
        desired=desired,
        binding=Binding.LENT if lent and not borrowed else Binding.BORROWED,
        reason=f"Starts {desired - decision.current or 'none'} of {ahead}: {what}. {decision.reason}",
    )


def _starts_for_good(book: _Book, member: _Member, decision: Decision) -> Decision:
    """Return the decision to start what a tier expects to need and has only for as long as others do not.

    A loan bridges a start-up. Where neither tier started anything, because each counted the engine between them as its
    own, the next rush of the lender would find it gone.
    """
    borrowed = len(book.borrowed(member.key))
    if not borrowed or decision.expected is None:
        return decision
    stays = book.lasting(member)
    served = decision.current + member.facts.borrowed - member.facts.lent
    target = served + member.decision.desired - decision.current
    lacking = math.ceil(min(decision.expected, target) - decision.current - stays - 1e-9)
    desired = min(decision.current + lacking, member.facts.scaling.max_replicas)
    if desired <= decision.desired:
        return decision
    return replace(
        decision,
        desired=desired,
        binding=Binding.FORECAST,
        reason=f"Starts {desired - decision.current}: {decision.expected} engines are expected to be needed, and of {borrowed}"
        f" borrowed ones {_figure(stays) if stays else 'none'} can stay, as their homes may need them again. {decision.reason}",
    )


def _stops(book: _Book, member: _Member, reserved: dict[str, int]) -> Decision:
    """Return the decision to stop engines that nobody else holds or expects."""
    decision = member.decision
    borrowed, lent, kept = len(book.borrowed(member.key)), book.lent(member.key), reserved.get(member.key, 0)
    ordered = decision.binding is Binding.MAX_REPLICAS
    if borrowed and not ordered:
        return replace(
            decision,
            desired=decision.current,
            binding=Binding.BORROWED,
            reason=f"Stops none: {borrowed} borrowed engines go back first. {decision.reason}",
        )
    desired = max(decision.desired, lent)
    if not ordered:
        desired = max(desired, decision.desired + kept)
    desired = min(desired, decision.current)
    if desired == decision.desired:
        return decision
    why = f"{lent} are lent" if desired == lent else f"{kept} are kept for tiers that expect to need them"
    return replace(
        decision,
        desired=desired,
        binding=Binding.LENT,
        reason=f"Goes to {desired} instead of {decision.desired}: {why}. {decision.reason}",
    )


def _within_accelerators(book: _Book, tiers: tuple[TierDecision, ...]) -> tuple[TierDecision, ...]:
    """Return the decisions with as many starts as the pool has accelerators for, the most important tier first."""
    limit = book.group.max_accelerators
    if limit is None:
        return tiers
    each = [
        (member.observation.spec.pool or PoolSpec()).hardware.tensor_parallel or 1 for member in book.members
    ]
    held = [
        each[i] * sum(max(d.current, 0) if d.desired >= d.current else d.desired for d in tier.decisions)
        for i, tier in enumerate(tiers)
    ]
    free = limit - sum(held)
    after = list(tiers)
    order = sorted(range(len(tiers)), key=lambda i: (-book.members[i].priority, book.members[i].key))
    for i in order:
        member = book.members[i]
        if not member.active:
            continue
        decision = tiers[i].decisions[0]
        wanted = decision.desired - decision.current
        if wanted <= 0:
            continue
        granted = min(wanted, max(0, free // each[i]))
        free -= granted * each[i]
        if granted == wanted:
            continue
        short = f"{wanted} more are wanted, the pool's maxAccelerators {limit} leaves room for {granted}"
        memory = tiers[i].memory
        if not granted:
            last = member.before.last_scale_up
            kept = memory[member.facts.name].model_copy(update={"last_scale_up": last})
            memory = memory | {member.facts.name: kept}
        held_back = replace(
            decision,
            desired=decision.current + granted,
            binding=Binding.MAX_ACCELERATORS,
            reason=f"{decision.reason} {short[0].upper()}{short[1:]}.",
            would_change="A larger maxAccelerators of the TierPool, or less load in its other tiers.",
            limited=short,
        )
        after[i] = replace(tiers[i], decisions=(held_back,), memory=memory)
    return tuple(after)


def _figure(value: float) -> str:
    return f"{value:.3g}"
