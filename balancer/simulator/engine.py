"""A barrier-coupled engine: some ranks, each with its queue and its KV pool, that all step together.

Pure: the simulation tells it the time. One step is `take` (requests that have arrived are received), `begin` (its work
and how long it takes), then at its end `grow` (tokens appear) and `release` (what is complete leaves). The rules are
those of `scheduler_hooks.mock_engine.scheduler`, made for a million steps: first come, first served; a request is
admitted when its prompt and its whole answer fit beside those admitted, so nothing is ever evicted; one that is larger
than the pool runs when its rank is empty. A decode step costs a few operations per rank, whatever runs there: a request
is touched when it comes, when it starts and when it is complete, which is known when it starts.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

from balancer.simulator.scenario import EngineKind, Scenario
from balancer.simulator.stream import Stream

NOT_YET = -1.0
"""A moment that has not come."""


@dataclass(slots=True)
class Progress:
    """What has happened to each request, by its index: its rank in the pool and moments in seconds."""

    rank: list[int]
    dispatched_s: list[float]
    received_s: list[float]
    first_token_s: list[float]
    finished_s: list[float]

    @classmethod
    def of(cls, count: int) -> Progress:
        """Nothing has happened yet."""
        return cls([-1] * count, *([NOT_YET] * count for _ in range(4)))


@dataclass(frozen=True, slots=True)
class StepCost:
    """How long a step takes, and how long it would if the ranks' own work were the same on all; seconds."""

    duration_s: float
    balanced_s: float


class Engine:
    """`scenario.ranks` ranks of the pool, from `first_rank` on. Lists are by the rank's place in the engine."""

    def __init__(self, scenario: Scenario, stream: Stream, progress: Progress, first_rank: int = 0) -> None:
        size = scenario.ranks
        self.first_rank = first_rank
        self.held = [0] * size
        """Tokens: whole prompts of all requests here, and what they have generated."""
        self.requests = [0] * size
        """Requests, running and queued."""
        self.running = [0] * size
        """Requests that decode."""
        self.kv = [0] * size
        """Tokens that they attend to."""
        self.pending = [0] * size
        """Tokens of prompts here that are not yet prefilled; of a decode engine none, since they come with their KV."""
        self.coming_tokens = [0] * size
        """Prompts dispatched and not yet received."""
        self.coming_requests = [0] * size
        self.prefilling: set[int] = set()
        """Ranks that prefill in this step."""
        self.taken: list[int] = []
        """Requests received at the begin of this step."""
        self.finished: list[int] = []
        """Requests complete at the end of the last step."""
        self.stepping = False
        self._scenario, self._stream, self._progress = scenario, stream, progress
        self._mail: deque[tuple[float, int, int]] = deque()
        self._queues: list[deque[int]] = [deque() for _ in range(size)]
        self._queued: set[int] = set()
        self._reserved = [0] * size
        self._admitted = [0] * size
        self._cut: dict[int, tuple[int, int]] = {}
        self._decoding: list[int] = []
        self._chunks: dict[int, int] = {}
        self._prefilled: list[tuple[int, int]] = []
        self._fresh: list[int] = []
        self._turns = [0] * size
        self._ending: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in range(size)]
        self._ended: list[tuple[int, list[int]]] = []

    def send(self, index: int, place: int, arrives_s: float) -> None:
        """A request is on its way here; requests are sent in the order in which they arrive."""
        self._mail.append((arrives_s, index, place))
        self.coming_tokens[place] += self._stream.input_tokens[index]
        self.coming_requests[place] += 1

    @property
    def next_mail_s(self) -> float | None:
        """When the next request arrives, if one is on its way."""
        return self._mail[0][0] if self._mail else None

    @property
    def cut(self) -> dict[int, int]:
        """Tokens missing of the prompt that a chunk has cut, for each rank that has one."""
        return {place: self._stream.input_tokens[index] - done for place, (index, done) in self._cut.items()}

    def take(self, now_s: float) -> None:
        """Receive what has arrived: its prompts count as held from now on."""
        self.taken = []
        mail, inputs = self._mail, self._stream.input_tokens
        while mail and mail[0][0] <= now_s:
            _, index, place = mail.popleft()
            tokens = inputs[index]
            self.coming_tokens[place] -= tokens
            self.coming_requests[place] -= 1
            self.held[place] += tokens
            self.requests[place] += 1
            if self._scenario.kind is not EngineKind.DECODE:
                self.pending[place] += tokens
            self._queues[place].append(index)
            self._queued.add(place)
            self._progress.received_s[index] = now_s
            self.taken.append(index)

    def begin(self) -> StepCost | None:
        """Choose the work of the next step; None where there is none on any rank."""
        profile, size = self._scenario.profile, len(self.held)
        prefill: dict[int, tuple[int, float]] = {}
        if self._scenario.kind is EngineKind.DECODE:
            for place in list(self._queued):
                self._start_decoding(place)
        else:
            for place in sorted(self._queued | self._cut.keys()):
                tokens, pairs = self._fill_chunk(place)
                if tokens:
                    prefill[place] = tokens, pairs
        self.prefilling = set(prefill)
        self._chunks = {place: tokens for place, (tokens, _) in prefill.items()}
        kv_s, request_s = profile.kv_ns / 1e9, profile.request_us / 1e6
        own_s = [kv_s * kv + request_s * count for kv, count in zip(self.kv, self.running, strict=True)]
        self._decoding = [place for place, count in enumerate(self.running) if count]
        decoded, chunks = sum(self.running), 0
        for place, (tokens, pairs) in prefill.items():
            if self._scenario.kind is EngineKind.PREFILL_FIRST:
                decoded -= self.running[place]
                own_s[place] = 0.0
            own_s[place] += tokens * profile.prefill_us / 1e6 + pairs * profile.context_ns / 1e9
            chunks += tokens
        if self._scenario.kind is EngineKind.PREFILL_FIRST and prefill:
            self._decoding = [place for place in self._decoding if place not in prefill]
        self.stepping = bool(decoded or chunks)
        if not self.stepping:
            return None
        common_s = profile.base_ms / 1e3 + decoded / size * profile.shared_request_us / 1e6
        common_s += chunks / size * profile.shared_prefill_us / 1e6
        return StepCost(common_s + max(own_s), common_s + sum(own_s) / size)

    def grow(self, now_s: float) -> None:
        """The step has ended: every decoded request has one token more, every prefilled one its first."""
        held, kv, running, turns = self.held, self.kv, self.running, self._turns
        self._ended = ended = []
        for place in self._decoding:
            count = running[place]
            held[place] += count
            kv[place] += count
            turns[place] = turn = turns[place] + 1
            done = self._ending[place].pop(turn, None)
            if done:
                ended.append((place, done))
        for place, tokens in self._chunks.items():
            self.pending[place] -= tokens
        first_token_s = self._progress.first_token_s
        for index in self._fresh:
            first_token_s[index] = now_s
        self._fresh = []
        for place, index in self._prefilled:
            first_token_s[index] = now_s
            held[place] += 1
            kv[place] += self._stream.input_tokens[index] + 1
            running[place] += 1
            left = self._stream.output_tokens[index] - 1
            if left:
                self._ending[place][turns[place] + left].append(index)
            else:
                ended.append((place, [index]))
        self._prefilled = []

    def release(self, now_s: float) -> None:
        """What is complete leaves."""
        inputs, outputs, finished_s = self._stream.input_tokens, self._stream.output_tokens, self._progress.finished_s
        self.finished = []
        for place, indices in self._ended:
            tokens = 0
            for index in indices:
                finished_s[index] = now_s
                tokens += inputs[index] + outputs[index]
            count = len(indices)
            self.held[place] -= tokens
            self.kv[place] -= tokens
            self.running[place] -= count
            self.requests[place] -= count
            self._reserved[place] -= tokens
            self._admitted[place] -= count
            self.finished += indices
        self._ended = []
        self.stepping = False

    def _admit(self, place: int) -> int | None:
        """The next request of this rank's queue, admitted, or None where there is none or no room."""
        queue = self._queues[place]
        if not queue:
            self._queued.discard(place)
            return None
        index = queue[0]
        tokens = self._stream.input_tokens[index] + self._stream.output_tokens[index]
        admitted = self._admitted[place]
        room = self._reserved[place] + tokens <= self._scenario.profile.kv_capacity_tokens
        if admitted and (not room or admitted >= self._scenario.max_running):
            return None
        queue.popleft()
        self._reserved[place] += tokens
        self._admitted[place] += 1
        return index

    def _start_decoding(self, place: int) -> None:
        """Admit what there is room for; its KV has come with it."""
        while (index := self._admit(place)) is not None:
            self.running[place] += 1
            self.kv[place] += self._stream.input_tokens[index]
            self._ending[place][self._turns[place] + self._stream.output_tokens[index]].append(index)
            self._fresh.append(index)

    def _fill_chunk(self, place: int) -> tuple[int, float]:
        """Choose this rank's prefill: the prompt that was cut, then new ones. Returns tokens, and pairs of tokens."""
        budget = self._scenario.chunk_tokens
        if self._scenario.kind is EngineKind.MIXED:
            budget -= self.running[place]
        filled, pairs = 0, 0.0
        while filled < budget:
            if place in self._cut:
                index, done = self._cut.pop(place)
            elif (admitted := self._admit(place)) is not None:
                index, done = admitted, 0
            else:
                break
            whole = self._stream.input_tokens[index]
            tokens = min(budget - filled, whole - done)
            filled += tokens
            pairs += tokens * (done + tokens / 2)
            if done + tokens < whole:
                self._cut[place] = index, done + tokens
            else:
                self._prefilled.append((place, index))
        return filled, pairs
