"""Sequences that are forked and given back at random, beside a model of what each holds."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule


class TablesMachine(RuleBasedStateMachine):
    """Has `tables` and, in the same order, `models` of them, `MOST` at most."""

    MOST = 6

    def draw(self, data, many=False):
        index = st.integers(0, len(self.tables) - 1)
        return data.draw(st.lists(index, min_size=1, unique=True) if many else index)

    @precondition(lambda self: len(self.tables) < self.MOST)
    @rule(data=st.data())
    def fork(self, data):
        which = self.draw(data)
        self.tables.append(self.tables[which].fork())
        self.models.append(self.models[which])

    @precondition(lambda self: len(self.tables) > 1)
    @rule(data=st.data())
    def free(self, data):
        which = self.draw(data)
        self.tables.pop(which).truncate(0)
        self.models.pop(which)
