"""Several dispatchers in containers of one network, thousands of requests: balanced, exact, none twice, none left."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from balancer.workload import generate
from tests.integration.booker import Booker
from tests.integration.conftest import ROOT, Figures
from tests.integration.stack import DOCKER, PATIENT, Images, Stack, added, booked, docker, wait_until

PER_DISPATCHER = 800


def book_through(bookers: list[Booker], stack: Stack, figures: Figures, what: str) -> None:
    """Thousands of requests through all bookers at once, each twice; asserts balance, exactness and idempotence."""
    drawn = generate(PER_DISPATCHER * len(bookers), seed=7, rate_per_s=1)
    requests = [(f"{what}-{number}", request.input_tokens) for number, request in enumerate(drawn)]
    shares = [requests[index :: len(bookers)] for index in range(len(bookers))]
    with stack.watch() as watch:
        wait_until(lambda: watch.sees("is_idle"), "the pool is idle")
        began_s = time.monotonic()
        for booker, share in zip(bookers, shares, strict=True):
            booker.order(book=share)
        first = [answer for booker in bookers for answer in booker.placed()]
        took_s = time.monotonic() - began_s
        look = watch.look()
        # Given loads that only grow, the least loaded rank gets each request: so no two ranks differ by more than one
        loads = look.numbers("loads").values()
        largest = max(tokens for _, tokens in requests)
        assert max(loads) - min(loads) <= largest
        assert sum(loads) == sum(tokens for _, tokens in requests)
        assert Counter(outcome for _, _, outcome in first) == {"placed": len(requests)}
        assert look.bookings == len(requests)
        # When another dispatcher is asked for the same requests, they keep their ranks
        for booker, share in zip(bookers, [*shares[1:], shares[0]], strict=True):
            booker.order(book=share[:200])
        again = [answer for booker in bookers for answer in booker.placed()]
        ranks = {request_id: rank for request_id, rank, _ in first}
        assert all(outcome == "repeated" and rank == ranks[request_id] for request_id, rank, outcome in again)
        assert watch.look().bookings == len(requests)
        # And nothing is left when they are released, each by another dispatcher than booked it
        ended = 0
        for booker, share in zip(bookers, [*shares[1:], shares[0]], strict=True):
            for start in range(0, len(share), 500):
                booker.order(release=[request_id for request_id, _ in share[start : start + 500]])
                ended += booker.released()
        assert ended == len(requests)
        wait_until(lambda: watch.sees("is_empty"), "the pool is empty")
    assert not watch.mistakes, watch.mistakes[:5]
    figures(
        what,
        f"{len(requests):,} booked in {took_s:.1f} s, loads within {max(loads) - min(loads):,} tokens of each other "
        f"(largest request {largest:,}), {len(again)} asked twice and none booked twice, "
        f"{watch.looks} looks without a mistake",
    )


@pytest.fixture
def patient(plain: Stack) -> Stack:
    """Bookings that outlast the test's own pace."""
    plain.configure(booking_lease_ms=60_000)
    yield plain  # type: ignore[misc]
    plain.configure()


def test_many_dispatchers_share_one_exact_view(patient: Stack, figures: Figures) -> None:
    bookers = [Booker(patient, container) for container in patient.dispatchers]
    try:
        book_through(bookers, patient, figures, "Three dispatchers, requests that stay")
    finally:
        for booker in bookers:
            booker.end()


def test_thousands_of_requests_leave_nothing_behind(plain: Stack, figures: Figures) -> None:
    with plain.watch() as watch:
        options = ("--requests", str(PER_DISPATCHER), "--max-input", "1024")
        runs = [plain.traffic(container, 120, *options, **PATIENT) for container in plain.dispatchers]
        counted = [run.stop_when_done() for run in runs]
        wait_until(lambda: watch.sees("is_empty"), "the pool is empty")
    total = PER_DISPATCHER * len(runs)
    assert booked(counted) == added(counted, "ends", "finished") == total
    assert not watch.mistakes, watch.mistakes[:5]
    slowest = max(one["dispatch_ms"]["max"] for one in counted)
    median = sorted(one["dispatch_ms"]["p50"] for one in counted)[1]
    figures(
        "Three dispatchers, requests that run",
        f"{total:,} placed and finished, dispatch median {median:.1f} ms, slowest {slowest:.0f} ms, "
        f"{watch.looks} looks without a mistake, nothing left",
    )


def test_scripts_flushed_under_load_cost_a_round_trip(plain: Stack, figures: Figures) -> None:
    admin = plain.admin()
    with plain.watch() as watch:
        options = ("--requests", "300", "--max-input", "1024")
        runs = [plain.traffic(container, 60, *options, **PATIENT) for container in plain.dispatchers]
        flushed = 0
        while any(run.process.poll() is None for run in runs) and flushed < 200:
            admin.script_flush()
            flushed += 1
            time.sleep(0.025)
        counted = [run.stop_when_done() for run in runs]
        wait_until(lambda: watch.sees("is_empty"), "the pool is empty")
    assert flushed > 50
    assert booked(counted) == added(counted, "ends", "finished") == 900
    assert not watch.mistakes, watch.mistakes[:5]
    slowest = max(one["dispatch_ms"]["max"] for one in counted)
    figures(f"Scripts flushed {flushed} times under load", f"900 placed and finished, slowest answer {slowest:.0f} ms")


@pytest.fixture(scope="module")
def earlier(images: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The last commit whose library differs from this tree's (HEAD, in a clone without more), and an image of it."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout

    library = ("balancer", "lua")
    commit = "HEAD"
    if not subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *library], cwd=ROOT).returncode:
        changed = git("log", "-1", "--format=%H", "--", *library).decode().strip()
        before = subprocess.run(["git", "cat-file", "-e", f"{changed}~1:balancer"], cwd=ROOT, capture_output=True)
        commit = "HEAD" if before.returncode else f"{changed}~1"
    context = tmp_path_factory.mktemp("earlier")
    subprocess.run(["tar", "-x", "-C", str(context)], input=git("archive", commit), check=True)
    tag = images.build("earlier", "-f", str(DOCKER / "Dockerfile"), "--target", "dispatcher", str(context))
    return git("rev-parse", "--short", commit).decode().strip(), tag


def test_a_dispatcher_of_an_earlier_commit_works_beside_the_current_one(
    patient: Stack, figures: Figures, earlier: tuple[str, str]
) -> None:
    commit, image = earlier
    name = f"{patient.project}-earlier"
    current = patient.dispatchers[0]
    volume = f"{patient.project}_secrets-dispatcher:/run/secret:ro"
    settings = docker("inspect", "-f", "{{range .Config.Env}}{{println .}}{{end}}", current).splitlines()
    environment = [word for line in settings if line.startswith("DP_BALANCER_") for word in ("-e", line)]
    network = f"{patient.project}_pool"
    docker("run", "-d", "--rm", "--init", "--name", name, "--network", network, "-v", volume, *environment,
           image, "sleep", "infinity")  # fmt: skip
    bookers = []
    try:
        bookers = [Booker(patient, container) for container in (name, current)]
        book_through(bookers, patient, figures, f"A dispatcher of commit {commit} beside this tree's")
    finally:
        for booker in bookers:
            booker.end()
        docker("rm", "-f", name)


def test_clocks_minutes_apart_change_nothing(plain: Stack, figures: Figures, images: Images) -> None:
    clocks = ("-f", str(Path(__file__).with_name("clocks.Dockerfile")), str(DOCKER / "tls"))
    tags = {
        target: images.build(f"clocks-{target}", "--build-arg", f"OF={images.of(target)}", *clocks)
        for target in ("dispatcher", "engine")
    }
    late, early = f"{plain.project}-late", f"{plain.project}-early"
    shown = {}
    try:
        for name, target, shift, like in (
            (late, "dispatcher", -7 * 60, plain.dispatchers[0]),
            (early, "engine", 11 * 60, plain.container("engine")),
        ):
            environment = docker("inspect", "-f", "{{range .Config.Env}}{{println .}}{{end}}", like).splitlines()
            settings = [word for line in environment if line.startswith("DP_BALANCER_") for word in ("-e", line)]
            volume = f"{plain.project}_secrets-{'hook' if target == 'engine' else 'dispatcher'}:/run/secret:ro"
            command = ["sleep", "infinity"]
            if target == "engine":
                command = ["python", "-m", "scheduler_hooks.mock_engine", "--engine", "early", "--pool", "clocks"]
                command += ["--form", "leader", "--ranks", "4", "--host", early, "--port", "30000", "--speed", "10"]
            docker("run", "-d", "--rm", "--name", name, "--network", f"{plain.project}_pool", "-v", volume,
                   "-e", f"SHIFT_S={shift}", *settings, tags[target], *command)  # fmt: skip
            shown[target] = int(docker("exec", name, "python", "-c", "import time; print(int(time.time()))"))
        apart_s = shown["engine"] - shown["dispatcher"]
        assert apart_s > 17 * 60
        command = ["python", "-m", "scheduler_hooks.demo.traffic", "--pool", "clocks", "--requests", "300"]
        wait_until(lambda: b"early/3" in _engines(plain, "clocks"), "the engine has joined")
        out = docker("exec", late, *command, "--rate", "60", "--max-output", "30").splitlines()[-1]
    finally:
        for name in (late, early):
            subprocess.run(["docker", "rm", "-f", name], capture_output=True)
    counted = json.loads(out)
    assert counted["answers"] == {"placed": 300}, counted
    assert counted["ends"] == {"finished": 300}
    figures(f"Dispatcher and engine with clocks {apart_s // 60} minutes apart", "300 placed and finished")


def _engines(stack: Stack, pool: str) -> set[bytes]:
    return set(stack.admin().hkeys(f"dpb:{{{pool}}}:engines"))
