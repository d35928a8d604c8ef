"""The radix tree against a dict of prefixes, and a router that hears its events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagedkv import BlockPool, RadixTree


class TreeMachine(RuleBasedStateMachine):
    """Against a dict of cached prefixes, with sequences that hold what they matched."""

    TOKENS = st.lists(st.integers(0, 1), max_size=8)
    NAMESPACES = st.sampled_from([None, "a"])

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12)
        self.radix = RadixTree(self.pool, 2, self.listen)
        self.mirror = {}  # what a router knows: block -> (namespace, its block before, tokens)
        self.known = {}  # (namespace, tokens of whole blocks) -> last block
        self.held = []  # (blocks, node, tokens, namespace)
        self.old = []  # the same from before a reset

    def listen(self, event):
        if event.kind == "cleared":
            self.mirror = {}
        elif event.kind == "removed":
            for block in reversed(event.blocks):
                del self.mirror[block]
                assert block not in [parent for _, parent, _ in self.mirror.values()]
        else:
            before = event.parent
            for block, tokens in zip(event.blocks, event.tokens.reshape(-1, 2), strict=True):
                assert before is None or before in self.mirror
                self.mirror[block] = (event.namespace, before, tuple(tokens))
                before = block

    def prefixes(self, tokens):
        return [tuple(tokens[:end]) for end in range(2, len(tokens) + 1, 2)]

    def expected(self, tokens, namespace):
        blocks = []
        for prefix in self.prefixes(tokens):
            if (namespace, prefix) not in self.known:
                break
            blocks.append(self.known[namespace, prefix])
        return blocks

    def forget(self):
        """Drop from the model what was evicted; a prefix never goes before what goes on from it."""
        gone = set()
        for namespace, prefix in self.known:
            if self.expected(prefix, namespace) != self.radix_blocks(prefix, namespace):
                gone.add((namespace, prefix))
        for namespace, prefix in gone:
            del self.known[namespace, prefix]
        return len(gone)

    def radix_blocks(self, prefix, namespace):
        return self.radix.match_prefix(prefix, namespace).blocks

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def insert(self, tokens, namespace):
        cached = self.expected(tokens, namespace)
        prefixes = self.prefixes(tokens)
        missing = len(prefixes) - len(cached)
        if missing > self.pool.num_free:
            return
        new = self.pool.allocate(missing)
        match = self.radix.insert(tokens, cached + new, namespace)
        assert match.blocks == cached + new
        self.pool.release(new)
        for prefix, block in zip(prefixes[len(cached) :], new, strict=True):
            self.known[namespace, prefix] = block

    @rule(tokens=TOKENS, namespace=NAMESPACES, hold=st.booleans())
    def match(self, tokens, namespace, hold):
        match = self.radix.match_prefix(tokens, namespace)
        assert match.blocks == self.expected(tokens, namespace)
        if hold:
            self.pool.retain(match.blocks)
            self.held.append((match.blocks, match.node, tokens, namespace))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=TOKENS)
    def go_on(self, data, more):
        """A sequence caches what follows its match."""
        index = data.draw(st.integers(0, len(self.held) - 1))
        blocks, node, tokens, namespace = self.held[index]
        before = [*tokens[: 2 * len(blocks)]]
        after = self.expected(before + more, namespace)[len(blocks) :]
        missing = len(more) // 2 - len(after)
        if missing > self.pool.num_free:
            return
        new = self.pool.allocate(missing)
        end = self.radix.extend(node, more, after + new)
        assert end.blocks == after + new
        self.pool.retain(after)  # what is new is kept as it is
        tokens, blocks = before + more, blocks + end.blocks
        new_prefixes = self.prefixes(tokens)[len(blocks) - missing :]
        for prefix, block in zip(new_prefixes, new, strict=True):
            self.known[namespace, prefix] = block
        self.held[index] = (blocks, end.node, tokens, namespace)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data):
        blocks, *_ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def let_go_of_what_is_forgotten(self, data):
        blocks, node, *_ = self.old.pop(data.draw(st.integers(0, len(self.old) - 1)))
        if blocks:
            assert self.radix.extend(node, [0, 0], blocks).blocks == []
        self.pool.release(blocks)

    @rule()
    def reset(self):
        evictable, free = self.radix.num_evictable, self.pool.num_free
        assert self.radix.reset() == evictable == self.pool.num_free - free
        self.known = {}
        self.old += self.held
        self.held = []

    @rule(count=st.integers(0, 12))
    def evict(self, count):
        evictable, free = self.radix.num_evictable, self.pool.num_free
        freed = self.radix.evict(count)
        assert freed == min(count, evictable) == self.pool.num_free - free
        assert self.forget() == freed

    @invariant()
    def agrees(self):
        self.radix.check_invariants()
        self.pool.check_invariants()
        assert self.radix.num_blocks == len(self.known)
        theirs = {block for blocks, *_ in self.held + self.old for block in blocks}
        assert self.radix.num_evictable == len({*self.known.values()} - theirs)
        assert self.mirror == {
            block: (namespace, self.known.get((namespace, prefix[:-2])), prefix[-2:])
            for (namespace, prefix), block in self.known.items()
        }
        held = [0] * 12
        for block in self.known.values():
            held[block] += 1
        for blocks, _, tokens, namespace in self.held:
            assert self.expected(tokens, namespace)[: len(blocks)] == blocks
        for blocks, *_ in self.held + self.old:
            for block in blocks:
                held[block] += 1
        assert held == [self.pool.reference_count(block) for block in range(12)]


TreeMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestTree = TreeMachine.TestCase
