"""The workload: generated streams have the published shape; traces are read, or refused with the reason."""

from __future__ import annotations

import gzip
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from balancer.workload import (
    CHAT_INPUT,
    CHAT_OUTPUT,
    LengthShape,
    TimedRequest,
    WorkloadError,
    generate,
    load_trace,
    scaled,
)

TRACES = Path(__file__).parents[2] / "../shared/traces"


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[int(share * len(values))]


def write(folder: Path, text: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# -- the generator -------------------------------------------------------------------------------------------


def test_one_seed_always_draws_the_same_requests() -> None:
    # The literal pins the stream across releases and Python versions: published results name their seed.
    assert generate(2, seed=7, rate_per_s=10) == [
        TimedRequest(0.0, 260, 401),
        TimedRequest(0.4075714512730749, 453, 110),
    ]
    assert generate(50, seed=7, rate_per_s=10) == generate(50, seed=7, rate_per_s=10)
    assert generate(50, seed=7, rate_per_s=10) != generate(50, seed=8, rate_per_s=10)


def test_fewer_requests_of_a_seed_are_the_first_of_more() -> None:
    assert generate(100, seed=1, rate_per_s=5)[:10] == generate(10, seed=1, rate_per_s=5)


def test_the_rate_does_not_change_the_lengths() -> None:
    slow, fast = generate(100, seed=1, rate_per_s=1), generate(100, seed=1, rate_per_s=math.inf)
    assert [(r.input_tokens, r.output_tokens) for r in slow] == [(r.input_tokens, r.output_tokens) for r in fast]


@pytest.mark.parametrize("shape", [CHAT_INPUT, CHAT_OUTPUT])
def test_lengths_have_the_published_mean_and_p99(shape: LengthShape) -> None:
    requests = generate(20_000, seed=3, rate_per_s=math.inf, input_shape=shape)
    lengths = [request.input_tokens for request in requests]
    assert statistics.fmean(lengths) == pytest.approx(shape.mean_tokens, rel=0.02)
    assert percentile(lengths, 0.99) == pytest.approx(shape.p99_tokens, rel=0.05)
    assert min(lengths) >= 1
    assert max(lengths) <= shape.max_tokens


def test_a_length_is_cut_at_the_maximum_of_its_shape() -> None:
    narrow = LengthShape(mean_tokens=100, p99_tokens=400, max_tokens=150)
    lengths = [r.output_tokens for r in generate(500, seed=1, rate_per_s=math.inf, output_shape=narrow)]
    assert max(lengths) == 150


def test_arrivals_are_a_poisson_process_of_the_rate_from_0() -> None:
    arrivals_s = [request.arrival_s for request in generate(20_001, seed=5, rate_per_s=40)]
    gaps_s = [later - earlier for earlier, later in pairwise(arrivals_s)]
    assert arrivals_s[0] == 0
    assert statistics.fmean(gaps_s) == pytest.approx(1 / 40, rel=0.03)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 40, rel=0.05)


def test_an_infinite_rate_lets_all_arrive_at_0() -> None:
    assert {request.arrival_s for request in generate(10, seed=1, rate_per_s=math.inf)} == {0.0}


@pytest.mark.parametrize("rate_per_s", [0, -1, math.nan])
def test_a_rate_not_above_0_is_refused(rate_per_s: float) -> None:
    with pytest.raises(WorkloadError, match="give a number above 0"):
        generate(1, seed=1, rate_per_s=rate_per_s)


def test_a_count_below_1_is_refused() -> None:
    with pytest.raises(WorkloadError, match="give at least 1"):
        generate(0, seed=1, rate_per_s=1)


@pytest.mark.parametrize(
    ("mean", "p99", "most"), [(100, 90, 200), (100, 2000, 5000), (0, 10, 20), (100, 400, 0), (math.nan, 4, 5)]
)
def test_a_shape_that_no_lognormal_has_is_refused(mean: float, p99: float, most: int) -> None:
    with pytest.raises(WorkloadError, match="no lognormal"):
        LengthShape(mean, p99, most)


# -- traces --------------------------------------------------------------------------------------------------

CSV = "arrival_s,input_len,output_len,client_id\n0.5,100,10,a\n2.0,300,30.0,b\n"
JSONL = (
    '{"timestamp": 500, "input_length": 100, "output_length": 10, "hash_ids": [1]}\n'
    '{"timestamp": 2000, "input_length": 300, "output_length": 30, "hash_ids": [1, 2]}\n'
)
TWO_REQUESTS = [TimedRequest(0.0, 100, 10), TimedRequest(1.5, 300, 30)]


@pytest.mark.parametrize("text", [CSV, JSONL], ids=["CSV", "JSONL"])
def test_both_formats_are_read_plain_and_gzipped_whatever_the_file_is_called(text: str, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(text.encode()))
    assert load_trace(write(tmp_path, text)) == TWO_REQUESTS
    assert load_trace(packed) == TWO_REQUESTS


def test_blank_lines_other_orders_of_columns_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    text = "\ufeff\noutput_len, input_len ,arrival_s\r\n\r\n10,100,1e1\r\n30,300,11.5\r\n\r\n"
    assert load_trace(write(tmp_path, text)) == TWO_REQUESTS
    assert load_trace(write(tmp_path, "\n" + JSONL.replace("\n", "\n\n"))) == TWO_REQUESTS


def test_arrivals_out_of_order_are_sorted(tmp_path: Path) -> None:
    header, first, second = CSV.splitlines()
    assert load_trace(write(tmp_path, "\n".join([header, second, first]))) == TWO_REQUESTS


@pytest.mark.parametrize(
    "text",
    [
        "input_len,output_len\n100,10\n300,30\n",
        '{"input_length": 100, "output_length": 10}\n{"input_length": 300, "output_length": 30}\n',
    ],
    ids=["CSV", "JSONL"],
)
def test_a_trace_without_arrivals_takes_drawn_ones_of_a_given_rate(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(WorkloadError, match="no arrival times: give a rate"):
        load_trace(path)
    first, second = load_trace(path, rate_per_s=2, seed=4)
    assert (first.arrival_s, first.input_tokens, second.input_tokens) == (0.0, 100, 300)
    assert second.arrival_s > 0
    assert load_trace(path, rate_per_s=2, seed=4) == [first, second]
    assert load_trace(path, rate_per_s=2, seed=5) != [first, second]


def test_a_trace_with_arrivals_keeps_them_whatever_the_rate(tmp_path: Path) -> None:
    assert load_trace(write(tmp_path, CSV), rate_per_s=1000) == TWO_REQUESTS


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "nan", "inf", "", "many", "1e30"])
def test_a_length_that_is_no_positive_whole_number_is_refused_with_its_line(value: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"input_len,output_len\n100,10\n100,{value}\n")
    with pytest.raises(WorkloadError, match=r"trace, line 3: output_len is .*: correct or remove"):
        load_trace(path, rate_per_s=1)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "NaN", "null", "true", "[1]", "1" + "0" * 400])
def test_a_json_length_that_is_no_positive_whole_number_is_refused_with_its_line(value: str, tmp_path: Path) -> None:
    path = write(tmp_path, f'\n{{"input_length": {value}, "output_length": 10}}\n')
    with pytest.raises(WorkloadError, match=r"trace, line 2: input_length is .*: correct or remove"):
        load_trace(path, rate_per_s=1)


@pytest.mark.parametrize("value", ["nan", "-inf", "", "noon"])
def test_an_arrival_that_is_no_moment_is_refused_with_its_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"line 2: arrival_s is"):
        load_trace(write(tmp_path, f"arrival_s,input_len,output_len\n{value},100,10\n"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n",
            "line 1: no column input_len and output_len among TIME",
        ),
        ("input_len,output_len\n1,2,3\n", "line 2: 3 cells under 2 columns"),
        ("input_len,output_len\n1\n", "line 2: 1 cells under 2 columns"),
        ('input_len,output_len\n1,"' + "2" * 200_000, "line 2: not CSV"),
        ('{"prompt_tokens": 1}', "line 1: no field input_length and output_length among prompt_tokens"),
        ('{"input_length": 1,\n "output_length": 2}', "line 1: not JSON .* one object on each line"),
        (JSONL + "[1, 2]", "line 3: not a JSON object"),
        (JSONL + '{"input_length": 1, "output_length": 2}', "line 3: no field timestamp"),
        ("", "holds no request"),
        ("\n\n", "holds no request"),
        ("input_len,output_len\n", "holds no request"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_reason(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=complaint):
        load_trace(write(tmp_path, text), rate_per_s=1)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"cannot read the trace .*absent.csv: No such file"):
        load_trace(tmp_path / "absent.csv")
    with pytest.raises(WorkloadError, match=r"cannot read the trace .*: Is a directory"):
        load_trace(tmp_path)


def test_damaged_gzip_and_other_bytes_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(CSV.encode())
    wrong_checksum = whole[:-8] + bytes(8)
    for number, damaged in enumerate([whole[:-12], whole[:3], wrong_checksum]):
        path = tmp_path / str(number)
        path.write_bytes(damaged)
        with pytest.raises(WorkloadError, match=r"is damaged beyond line .*: fetch it again"):
            load_trace(path)
    path = tmp_path / "bytes"
    path.write_bytes(b"input_len,output_len\n\xff\xfe,1\n")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        load_trace(path)


# -- smaller and faster --------------------------------------------------------------------------------------


def test_scaling_by_nothing_changes_nothing() -> None:
    requests = generate(20, seed=1, rate_per_s=3)
    assert scaled(requests) == requests
    assert scaled([]) == []


def test_the_first_requests_are_taken_and_all_where_there_are_fewer() -> None:
    requests = generate(20, seed=1, rate_per_s=3)
    assert scaled(requests, count=5) == requests[:5]
    assert scaled(requests, count=500) == requests


def test_a_new_rate_keeps_the_pattern_of_arrivals() -> None:
    bursts = [TimedRequest(arrival_s, 1, 1) for arrival_s in (10.0, 10.0, 10.0, 13.0, 16.0)]
    assert [r.arrival_s for r in scaled(bursts, rate_per_s=8)] == pytest.approx([0, 0, 0, 0.25, 0.5])
    assert [r.arrival_s for r in scaled(bursts, rate_per_s=math.inf)] == [0.0] * 5


def test_the_rate_is_that_of_the_requests_taken() -> None:
    requests = [TimedRequest(arrival_s, 1, 1) for arrival_s in (0.0, 1.0, 2.0, 50.0)]
    assert [r.arrival_s for r in scaled(requests, count=3, rate_per_s=10)] == pytest.approx([0, 0.1, 0.2])


def test_lengths_above_the_maxima_are_shortened_to_them() -> None:
    requests = [TimedRequest(0.0, 100, 10), TimedRequest(0.0, 5, 500)]
    assert scaled(requests, max_input_tokens=50, max_output_tokens=20) == [
        TimedRequest(0.0, 50, 10),
        TimedRequest(0.0, 5, 20),
    ]


def test_scaling_that_cannot_be_done_is_refused() -> None:
    at_once = generate(3, seed=1, rate_per_s=math.inf)
    with pytest.raises(WorkloadError, match="3 requests arrive at one moment"):
        scaled(at_once, rate_per_s=5)
    with pytest.raises(WorkloadError, match="give a number above 0"):
        scaled(at_once, rate_per_s=-5)
    with pytest.raises(WorkloadError, match="give at least 1"):
        scaled(at_once, count=0)
    with pytest.raises(WorkloadError, match="max_output_tokens is 0"):
        scaled(at_once, max_output_tokens=0)


# -- real traces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "input_mean", "output_mean", "rate_per_s"),
    [
        ("azure2023_conv.csv.gz", 19_366, 1155, 211, 5.5),
        ("mooncake_conversation.jsonl.gz", 12_031, 12_035, 343, 3.4),
        ("servegen_deepseek_r1.csv.gz", 40_000, 701, 797, 39),
        ("sharegpt_lengths.csv.gz", 30_731, 2340, 439, 20),
    ],
)
def test_a_real_trace_is_read_as_its_readme_says(
    name: str, count: int, input_mean: int, output_mean: int, rate_per_s: float
) -> None:
    if not (TRACES / name).exists():
        pytest.skip(f"the shared trace {name} is not on this machine")
    requests = load_trace(TRACES / name, rate_per_s=20)
    assert len(requests) == count
    assert statistics.fmean(r.input_tokens for r in requests) == pytest.approx(input_mean, abs=1)
    assert statistics.fmean(r.output_tokens for r in requests) == pytest.approx(output_mean, abs=1)
    assert requests[0].arrival_s == 0
    assert count / requests[-1].arrival_s == pytest.approx(rate_per_s, rel=0.02)


def test_the_built_in_chat_lengths_are_those_of_the_azure_trace() -> None:
    path = TRACES / "azure2023_conv.csv.gz"
    if not path.exists():
        pytest.skip("the shared trace azure2023_conv.csv.gz is not on this machine")
    requests = load_trace(path)
    for shape, lengths in (
        (CHAT_INPUT, [request.input_tokens for request in requests]),
        (CHAT_OUTPUT, [request.output_tokens for request in requests]),
    ):
        assert statistics.fmean(lengths) == pytest.approx(shape.mean_tokens, rel=0.001)
        assert percentile(lengths, 0.99) == pytest.approx(shape.p99_tokens, rel=0.001)
        assert max(lengths) == shape.max_tokens


def test_a_share_of_the_prompts_carries_a_document() -> None:
    chat, mixed = (generate(2_000, seed=2, rate_per_s=9, document_share=share) for share in (0.0, 0.1))
    longer = [one for one, other in zip(mixed, chat, strict=True) if one.input_tokens != other.input_tokens]
    assert 150 <= len(longer) <= 250
    assert max(request.input_tokens for request in longer) > CHAT_INPUT.max_tokens


def test_a_document_share_that_is_none_is_refused() -> None:
    with pytest.raises(WorkloadError, match="between 0 and 1"):
        generate(1, seed=1, rate_per_s=1, document_share=1.5)
