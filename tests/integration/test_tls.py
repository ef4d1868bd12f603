"""TLS with certificates for both sides: it works, and each certificate that is wrong is a clear error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.conftest import Figures, Up
from tests.integration.stack import PATIENT, Stack, added, booked, docker
from tests.integration.test_acl import status


@pytest.fixture(scope="module")
def stack(up: Up) -> Iterator[Stack]:
    with up("tls", "compose.tls.yml", tls=True) as stack:
        yield stack


def test_requests_are_placed_over_tls(stack: Stack, figures: Figures) -> None:
    runs = [stack.traffic(container, 50, "--requests", "200", **PATIENT) for container in stack.dispatchers]
    counted = [run.stop_when_done() for run in runs]
    assert booked(counted) == added(counted, "ends", "finished") == 600
    slowest = max(one["dispatch_ms"]["max"] for one in counted)
    median = sorted(one["dispatch_ms"]["p50"] for one in counted)[1]
    figures(
        "TLS, certificates for both sides", f"600 placed, dispatch median {median:.1f} ms, slowest {slowest:.0f} ms"
    )


def test_a_server_of_another_authority_is_refused(stack: Stack) -> None:
    shown = status(stack, DP_BALANCER_CA_FILE="")
    assert shown.returncode not in (0, 1)
    assert "certificate not accepted" in shown.stderr
    assert "check CA" in shown.stderr


def test_a_client_without_a_certificate_is_told_so(stack: Stack) -> None:
    shown = status(stack, DP_BALANCER_CERT_FILE="", DP_BALANCER_KEY_FILE="")
    assert shown.returncode not in (0, 1)
    assert "certificate not accepted" in shown.stderr


def test_a_client_of_another_authority_is_told_so(stack: Stack) -> None:
    container = stack.dispatchers[0]
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    out = ("-keyout", "/tmp/stranger.key", "-out", "/tmp/stranger.crt")
    docker("exec", container, "openssl", "req", "-x509", *curve, "-nodes", "-subj", "/CN=stranger", *out)
    shown = status(stack, DP_BALANCER_CERT_FILE="/tmp/stranger.crt", DP_BALANCER_KEY_FILE="/tmp/stranger.key")
    assert shown.returncode not in (0, 1)
    assert "certificate not accepted" in shown.stderr
    key = docker("exec", container, "cat", "/tmp/stranger.key").splitlines()[1]
    assert key not in shown.stdout + shown.stderr


def test_a_name_that_the_certificate_does_not_have_is_refused(stack: Stack) -> None:
    address = stack.address(stack.container("redis"))
    shown = status(stack, DP_BALANCER_URL=f"rediss://{address}:6379/0")
    assert shown.returncode not in (0, 1)
    assert "certificate not accepted" in shown.stderr


def test_without_tls_nobody_is_served(stack: Stack) -> None:
    shown = status(stack, DP_BALANCER_URL="redis://redis:6379/0")
    assert shown.returncode not in (0, 1)
    assert "is not available" in shown.stderr
