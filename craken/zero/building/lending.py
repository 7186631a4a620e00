"""Lends whole parameters to constructors that reach into modules which are shards already.

    class Model:
        def __init__(self):
            self.head = nn.Linear(...)             sharded when it is built
            nn.init.zeros_(self.head.weight)       read as an attribute: gathered, lent to Model's constructor
        returns                                    rank 0's values go into the shards, the whole is freed

Once the model is built, reads inside of a block of `GatheredParameters` that has a modifier are lent to that.

A constructor that reaches into everything it has built (`for module in self.modules(): ...`) must not end up with the
whole model: the oldest loans are called in when there is more than a few large weights' worth of them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from craken.zero.access.attributes import place_of
from craken.zero.access.gathered import GatheredParameters, are_too_many, was_read
from craken.zero.building.wrapping import ConstructionWatch
from craken.zero.hooks import watch_attributes


class _Loan(GatheredParameters):
    """One parameter, lent to the `depth`-th of the constructors that run; gives way to a block of the user's."""

    def __init__(self, param: nn.Parameter, depth: int, lending: Lending) -> None:
        super().__init__(param, modifier_rank=0)
        self._leads = False
        self.param, self.depth, self._lending = param, depth, lending

    def give_way(self) -> None:
        self._lending.end(self)


class Lending:
    """The parameters on loan, the oldest first."""

    def __init__(self, construction: ConstructionWatch) -> None:
        self._construction = construction
        self._loans: list[_Loan] = []

    def watch(self, module: nn.Module) -> None:
        """Have the module's parameters lent to those who read them, until it has an engine."""
        if module._parameters:
            watch_attributes(module, self._was_read)

    def has_lent(self, param: nn.Parameter) -> bool:
        return any(loan.param is param for loan in self._loans)

    def end(self, loan: _Loan) -> None:
        """Collective: make rank 0's values everybody's and free the whole."""
        self._loans.remove(loan)
        loan.__exit__(None, None, None)

    def constructor_returned(self) -> None:
        """Collective: end the loans to it."""
        while self._loans and self._loans[-1].depth > self._construction.depth:
            self.end(self._loans[-1])

    def stop(self, kind: type[BaseException] | None) -> None:
        """Collective, unless an exception (of `kind`) is on its way: end all loans."""
        while self._loans:
            self._loans.pop().__exit__(kind, None, None)

    def _was_read(self, param: Any) -> None:
        place = place_of(param)
        depth = 0 if self._construction.is_paused else self._construction.depth
        if not depth:
            return was_read(param)
        if place is None or place.residence is None or place.gatherers:
            return
        loan = _Loan(param, depth, self)
        self._loans.append(loan)
        loan.__enter__()
        while are_too_many([loan.param for loan in self._loans]):
            self.end(self._loans[0])
