"""Continuous batching without a model: which rows of which requests are computed in which pass, and in which blocks.

Each pass has a budget of rows. Requests that run come first, then those that wait, as long as rows and blocks are left:
so prompts are cut into chunks, and prefill and decode share a pass. A request that waits finds blocks of its beginning
that others left (prefix reuse), and does not compute their rows. Where blocks run out, the request that came last loses
its own (preemption), and waits until it is computed anew.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from traffic import Conversation

BLOCK_SIZE, BLOCKS = 4, 12
ROWS_PER_PASS, MOST_RUNNING = 16, 3


class BlockPool:
    """Blocks of `BLOCK_SIZE` slots for keys and values. A full one is found by all tokens from the first to its last,

    also after its users are gone, until it is taken for other tokens.
    """

    def __init__(self, count: int = BLOCKS) -> None:
        self._users = [0] * count
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # the next to be taken first
        self._by_tokens: dict[tuple[int, ...], int] = {}
        self._tokens_of: dict[int, tuple[int, ...]] = {}

    @property
    def unused(self) -> int:
        return len(self._unused)

    def take(self) -> int:
        block, _ = self._unused.popitem(last=False)
        self._by_tokens.pop(self._tokens_of.pop(block, ()), None)
        self._users[block] = 1
        return block

    def share(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known beginning of `tokens`, now used once more."""
        found = []
        for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
            block = self._by_tokens.get(tuple(tokens[:end]))
            if block is None:
                break
            self._users[block] += 1
            self._unused.pop(block, None)
            found.append(block)
        return found

    def publish(self, block: int, tokens: Sequence[int]) -> None:
        """The block is full, and `tokens` are all from the first to its last."""
        if tuple(tokens) not in self._by_tokens and block not in self._tokens_of:
            self._by_tokens[tuple(tokens)] = block
            self._tokens_of[block] = tuple(tokens)

    def release(self, blocks: Sequence[int]) -> None:
        """Ends of sequences are taken again before their beginnings, which more requests share."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._unused[block] = None


@dataclass
class Request:
    """computed: how many of its tokens have keys and values in its blocks. hit: how many of these it found there."""

    conversation: Conversation
    answered: int = 0
    computed: int = 0
    hit: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.conversation.tokens[: len(self.conversation.prompt) + self.answered]

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Chunk:
    """Rows start ... start + count of a request, in one pass; `hit` as it was then. blocks: of all rows up to these."""

    request: Request
    start: int
    count: int
    hit: int
    blocks: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.request.conversation.name

    @property
    def ends(self) -> bool:
        """Whether its last row is the last token that is known, so that the next one comes from it."""
        return self.start + self.count == len(self.request.tokens)


class Scheduler:
    """`while chunks := scheduler.next_pass(): compute(chunks); scheduler.computed(chunks)`."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._pool = BlockPool()
        self._waiting = deque(Request(conversation) for conversation in conversations)
        self._running: list[Request] = []
        self.preempted: list[tuple[str, int]] = []  # which request, and how many rows it had

    def next_pass(self) -> list[Chunk]:
        """The rows of the next pass; none when all requests have ended."""
        chunks: list[Chunk] = []
        budget, preempted_before = ROWS_PER_PASS, len(self.preempted)
        for request in list(self._running):
            count = min(request.missing, budget)
            # Whoever lost its blocks to a request before it is among those that wait.
            if count and request in self._running and self._make_room(request, count):
                chunks.append(self._chunk(request, count))
                budget -= count
        if len(self.preempted) == preempted_before:
            while self._waiting and budget and len(self._running) < MOST_RUNNING:
                request = self._waiting[0]
                if not self._admit(request, budget):
                    break
                chunks.append(self._chunk(request, min(request.missing, budget)))
                budget -= chunks[-1].count
        return chunks

    def computed(self, chunks: Sequence[Chunk]) -> None:
        """The rows of this pass have keys and values, and each request whose last row was among them its next token."""
        for chunk in chunks:
            request = chunk.request
            is_next_known = chunk.ends
            request.computed += chunk.count
            for number in range(chunk.start // BLOCK_SIZE, request.computed // BLOCK_SIZE):
                self._pool.publish(request.blocks[number], request.tokens[: (number + 1) * BLOCK_SIZE])
            request.answered += is_next_known
            if request.answered == len(request.conversation.answer):
                self._running.remove(request)
                self._pool.release(request.blocks)

    def _admit(self, request: Request, budget: int) -> bool:
        # The last token is computed in any case: the next one comes from its row.
        request.blocks = self._pool.share(request.tokens[:-1])
        request.computed = request.hit = len(request.blocks) * BLOCK_SIZE
        if self._lacking(request, min(request.missing, budget)) > self._pool.unused:
            self._drop_blocks(request)
            return False
        self._running.append(self._waiting.popleft())
        return self._make_room(request, min(request.missing, budget))

    def _make_room(self, request: Request, count: int) -> bool:
        """Blocks for `count` more rows; False if the request itself had to give up its own."""
        while (lacking := self._lacking(request, count)) > self._pool.unused:
            victim = self._running.pop()
            self.preempted.append((victim.conversation.name, victim.computed))
            self._drop_blocks(victim)
            self._waiting.appendleft(victim)
            if victim is request:
                return False
        request.blocks += [self._pool.take() for _ in range(lacking)]
        return True

    def _drop_blocks(self, request: Request) -> None:
        self._pool.release(request.blocks)
        request.blocks, request.computed, request.hit = [], 0, 0

    @staticmethod
    def _lacking(request: Request, count: int) -> int:
        return -(-(request.computed + count) // BLOCK_SIZE) - len(request.blocks)

    @staticmethod
    def _chunk(request: Request, count: int) -> Chunk:
        return Chunk(request, request.computed, count, request.hit, tuple(request.blocks))
