"""The stream of requests that demos and tests send: when each arrives and how long it is.

Requests come from the built-in generator (`generate`) or from the trace of a real service
(`load_trace`), may be cut and sped up (`scaled`), and go to whoever dispatches them. This room
only makes lists: it sends nothing, sleeps nowhere and reads no clock, so one seed or one file
always gives the same list.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TextIO

from balancer.errors import InvalidInput

MAX_TOKENS = 100_000_000
"""Longest length believed, in tokens: no context window is near it, so more is a wrong column."""

_NORMAL_P99 = 2.3263
"""The standard normal distribution lies below this with probability 0.99."""

_GZIP_MAGIC = b"\x1f\x8b"


class WorkloadError(InvalidInput):
    """A trace or a parameter of the workload that cannot be used; says where and what to do."""


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request: when it arrives, in seconds after the first one, and its lengths in tokens."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class LengthShape:
    """Lengths in tokens, lognormal: the curve with this mean and 99th percentile, cut at `max_tokens`.

    Raises WorkloadError for figures that no lognormal curve has.
    """

    mean_tokens: float
    p99_tokens: float
    max_tokens: int

    def __post_init__(self) -> None:
        highest = self.mean_tokens * math.exp(_NORMAL_P99**2 / 2)
        if not 0 < self.mean_tokens < self.p99_tokens <= highest or self.max_tokens < 1:
            raise WorkloadError(
                f"no lognormal lengths have {self}: give a mean above 0, a p99 above the mean and at most"
                " 14.9 times as large, and a maximum of at least 1"
            )

    def draw(self, source: random.Random) -> int:
        """One length: whole, at least 1 and at most `max_tokens`."""
        mu, sigma = self._parameters()
        return min(self.max_tokens, max(1, round(source.lognormvariate(mu, sigma))))

    def _parameters(self) -> tuple[float, float]:
        # ln mean = mu + sigma^2/2 and ln p99 = mu + z*sigma; the larger root would put nearly all mass at 0.
        z = _NORMAL_P99
        sigma = z - math.sqrt(z * z - 2 * math.log(self.p99_tokens / self.mean_tokens))
        return math.log(self.mean_tokens) - sigma * sigma / 2, sigma


# Chat as Azure served it: AzurePublicDataset, LLM inference trace 2023, conversation (19,366 requests; Patel
# et al., "Splitwise", ISCA 2024). Mean, p99 and maximum are the trace's own; the fit meets the first two and
# puts the medians at 944 and 186 tokens, where the trace has 1020 and 129.
CHAT_INPUT = LengthShape(mean_tokens=1155, p99_tokens=4142, max_tokens=14050)
CHAT_OUTPUT = LengthShape(mean_tokens=211, p99_tokens=601, max_tokens=1000)

# Prompts that carry a document: mean and 99th percentile of the inputs of Mooncake's conversation trace (FAST '25), cut
# at a context window of 32k.
DOCUMENT_INPUT = LengthShape(mean_tokens=12035, p99_tokens=85400, max_tokens=32768)


def generate(
    count: int,
    seed: int,
    rate_per_s: float,
    *,
    input_shape: LengthShape = CHAT_INPUT,
    output_shape: LengthShape = CHAT_OUTPUT,
    document_share: float = 0.0,
) -> list[TimedRequest]:
    """Draw `count` chat-like requests that arrive as a Poisson process of `rate_per_s` requests per second.

    The first arrives at 0; a rate of `math.inf` lets all arrive at 0. Prompts have a heavy tail: one in a
    hundred is longer than 4,142 tokens. Input and output lengths are drawn independently of each other and of
    the rate, so that one seed gives the same lengths at every rate. A `document_share` of the prompts, from 0 to
    1, has the lengths of DOCUMENT_INPUT instead.

    Raises WorkloadError for a count below 1, a rate that is not above 0, or a share that is none.
    """
    _check_count(count)
    if not 0 <= document_share <= 1:
        raise WorkloadError(f"document_share must be between 0 and 1, not {document_share!r}")
    lengths, documents = random.Random(f"{seed}/lengths"), random.Random(f"{seed}/documents")
    shapes = [DOCUMENT_INPUT if documents.random() < document_share else input_shape for _ in range(count)]
    return [
        TimedRequest(arrival_s, shape.draw(lengths), output_shape.draw(lengths))
        for arrival_s, shape in zip(_poisson_arrivals(count, seed, rate_per_s), shapes, strict=True)
    ]


def load_trace(path: str | os.PathLike[str], *, rate_per_s: float | None = None, seed: int = 0) -> list[TimedRequest]:
    """Read a trace, sorted by arrival and counted from its first request.

    Two formats, each plain or gzipped, told apart by their content; further columns or fields are ignored:

    - CSV with a header: `input_len`, `output_len` in tokens and `arrival_s` in seconds;
    - JSONL, one object a line: `input_length`, `output_length` in tokens and `timestamp` in milliseconds.

    Arrivals out of order are sorted, not refused: traces merged from several clients often come so, and the
    order of lines then means nothing. A trace without arrivals (no such column, or none in the first object)
    takes Poisson arrivals of `rate_per_s` requests per second drawn from `seed`; one that has its own keeps
    them and ignores both (`scaled` changes its rate).

    Raises WorkloadError, naming file and line, for a file that cannot be read, is empty or lacks a column,
    for a length that is not a whole number from 1 to MAX_TOKENS, for an arrival that is not finite, and for a
    trace without arrivals when no rate is given.
    """
    rows = _read_rows(Path(path))
    if not rows:
        raise WorkloadError(f"{path} holds no request: give a trace with at least one line after its header")
    arrivals_s = [row.arrival_s for row in rows if row.arrival_s is not None]
    if not arrivals_s:  # all lines have one or none has: the readers see to it
        if rate_per_s is None:
            raise WorkloadError(f"{path} has no arrival times: give a rate (requests per second) to draw them")
        arrivals_s = _poisson_arrivals(len(rows), seed, rate_per_s)
    requests = [
        TimedRequest(arrival_s, row.input_tokens, row.output_tokens)
        for arrival_s, row in zip(arrivals_s, rows, strict=True)
    ]
    return _from_zero(sorted(requests, key=lambda request: request.arrival_s))


def scaled(
    requests: Sequence[TimedRequest],
    *,
    count: int | None = None,
    rate_per_s: float | None = None,
    max_input_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> list[TimedRequest]:
    """The same stream, smaller or faster: what is left out stays as it is.

    `requests` are in order of arrival, as `generate` and `load_trace` return them. Takes the first `count` of
    them (all, where there are fewer), stretches time until they arrive at `rate_per_s` requests per second on
    average, bursts and lulls kept (`math.inf`: all at 0), and shortens inputs and outputs longer than the
    given maxima.

    Raises WorkloadError for a count or maximum below 1, a rate that is not above 0, and a finite rate for
    requests that all arrive at one moment, which no stretching spreads.
    """
    for name, limit in (("max_input_tokens", max_input_tokens), ("max_output_tokens", max_output_tokens)):
        if limit is not None and limit < 1:
            raise WorkloadError(f"{name} is {limit}: give at least 1 token")
    if count is not None:
        _check_count(count)
    taken = _from_zero(requests[:count])
    stretch = 1.0 if rate_per_s is None else _stretch(taken, rate_per_s)
    return [
        TimedRequest(
            request.arrival_s * stretch,
            min(request.input_tokens, max_input_tokens or request.input_tokens),
            min(request.output_tokens, max_output_tokens or request.output_tokens),
        )
        for request in taken
    ]


def _check_count(count: int) -> None:
    if count < 1:
        raise WorkloadError(f"the number of requests is {count}: give at least 1")


def _check_rate(rate_per_s: float) -> None:
    if not rate_per_s > 0:  # NaN is not above 0 either
        raise WorkloadError(f"the rate is {rate_per_s} per second: give a number above 0, or inf for all at once")


def _poisson_arrivals(count: int, seed: int, rate_per_s: float) -> list[float]:
    """Seconds at which `count` requests of a Poisson process arrive, the first at 0."""
    _check_rate(rate_per_s)
    if math.isinf(rate_per_s):
        return [0.0] * count
    source = random.Random(f"{seed}/arrivals")
    return list(accumulate((source.expovariate(rate_per_s) for _ in range(count - 1)), initial=0.0))


def _stretch(requests: Sequence[TimedRequest], rate_per_s: float) -> float:
    """The factor on arrival times that gives requests starting at 0 this mean rate."""
    _check_rate(rate_per_s)
    if math.isinf(rate_per_s) or len(requests) < 2:
        return 0.0
    span_s = requests[-1].arrival_s
    if not span_s > 0:
        raise WorkloadError(
            f"all {len(requests)} requests arrive at one moment, and no stretching spreads them:"
            " take more requests of the trace, or leave the rate out"
        )
    return (len(requests) - 1) / rate_per_s / span_s


def _from_zero(requests: Sequence[TimedRequest]) -> list[TimedRequest]:
    """The requests with arrivals counted from the first one."""
    return [replace(request, arrival_s=request.arrival_s - requests[0].arrival_s) for request in requests]


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a trace as it stands; no arrival where the trace has none."""

    arrival_s: float | None
    input_tokens: int
    output_tokens: int


class _Place:
    """Where in which file the reader is; every complaint about a line is worded here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0

    def wrong(self, complaint: str) -> WorkloadError:
        return WorkloadError(f"{self.path}, line {self.line}: {complaint}")

    def tokens(self, name: str, value: object) -> int:
        """A length in tokens; `374` and `374.0` alike, in a CSV cell or as a JSON number."""
        number = self._number(name, value)
        if not 1 <= number <= MAX_TOKENS or number != int(number):
            raise self.wrong(f"{name} is {value}, not a whole number from 1 to {MAX_TOKENS}: correct or remove it")
        return int(number)

    def seconds(self, name: str, value: object, unit_s: float) -> float:
        """A moment in seconds, from a value counted in units of `unit_s` seconds."""
        number = self._number(name, value)
        if not math.isfinite(number):
            raise self.wrong(f"{name} is {value}, not a moment in time: correct or remove it")
        return number * unit_s

    def _number(self, name: str, value: object) -> float:
        # A JSON true is an int to Python; nobody means one token by it.
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                pass
        raise self.wrong(f"{name} is {value!r}, not a number: correct or remove it")


def _read_rows(path: Path) -> list[_Row]:
    """All rows of a trace; what the disk, gzip or the encoding object to becomes a WorkloadError."""
    place = _Place(path)
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            content = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            # newline="" is what the csv module asks for; utf-8-sig drops the mark spreadsheets put first.
            with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
                is_jsonl = text.read(4096).lstrip().startswith("{")
                text.seek(0)
                return list(_jsonl_rows(text, place) if is_jsonl else _csv_rows(text, place))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise WorkloadError(f"{path} is damaged beyond line {place.line} ({error}): fetch it again") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path} is not UTF-8 beyond line {place.line}: give CSV or JSONL") from error
    except OSError as error:
        raise WorkloadError(f"cannot read the trace {path}: {error.strerror or error}") from error


def _csv_rows(text: TextIO, place: _Place) -> Iterator[_Row]:
    lines = csv.reader(text)
    try:
        header = [name.strip() for name in next((cells for cells in lines if cells), [])]
        place.line = lines.line_num
        if not header:
            return
        missing = [name for name in ("input_len", "output_len") if name not in header]
        if missing:
            raise place.wrong(
                f"no column {' and '.join(missing)} among {', '.join(header)}:"
                " name the columns arrival_s,input_len,output_len (arrival_s may be left out)"
            )
        has_arrivals = "arrival_s" in header
        for cells in lines:
            place.line = lines.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise place.wrong(f"{len(cells)} cells under {len(header)} columns: correct or remove it")
            cell = dict(zip(header, cells, strict=True))
            yield _Row(
                place.seconds("arrival_s", cell["arrival_s"], 1.0) if has_arrivals else None,
                place.tokens("input_len", cell["input_len"]),
                place.tokens("output_len", cell["output_len"]),
            )
    except csv.Error as error:
        place.line = lines.line_num
        raise place.wrong(f"not CSV ({error}): give CSV or JSONL, plain or gzipped") from error


def _jsonl_rows(text: TextIO, place: _Place) -> Iterator[_Row]:
    has_arrivals: bool | None = None
    for place.line, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise place.wrong(f"not JSON ({error}): put one object on each line") from error
        if not isinstance(fields, dict):
            raise place.wrong("not a JSON object: put one object on each line")
        if has_arrivals is None:
            has_arrivals = "timestamp" in fields
        missing = {"input_length", "output_length", *(["timestamp"] if has_arrivals else [])} - fields.keys()
        if missing:
            raise place.wrong(
                f"no field {' and '.join(sorted(missing))} among {', '.join(fields)}:"
                " name the fields timestamp (ms; in all lines or in none), input_length, output_length"
            )
        yield _Row(
            place.seconds("timestamp", fields["timestamp"], 0.001) if has_arrivals else None,
            place.tokens("input_length", fields["input_length"]),
            place.tokens("output_length", fields["output_length"]),
        )
