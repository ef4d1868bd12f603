"""`docker compose up`, as it stands in docker/: a working system, with no more rights than it needs."""

from __future__ import annotations

import json
import subprocess
import urllib.request

import pytest

from tests.integration.conftest import Figures, Up
from tests.integration.stack import Images, docker, wait_until


def test_it_works_as_it_stands(up: Up, images: Images, figures: Figures) -> None:
    with up("shipped", told=False) as stack:
        services = ("redis", "engine", "dispatcher")
        states = {name: json.loads(docker("inspect", stack.container(name)))[0] for name in services}
        assert {state["State"]["Health"]["Status"] for state in states.values()} == {"healthy"}
        assert {state["HostConfig"]["RestartPolicy"]["Name"] for state in states.values()} == {"unless-stopped"}
        for name in services:
            assert docker("exec", stack.container(name), "id", "-u") not in ("0", "")
        # The dispatcher's image installs in seconds: no torch
        torch = ("python", "-c", "import importlib.util as u; print(u.find_spec('torch'))")
        assert docker("exec", stack.container("dispatcher"), *torch) == "None"
        # Both dispatchers place, and requests finish
        logs = {index: stack.container("dispatcher", index) for index in (1, 2)}
        for container in logs.values():
            wait_until(lambda of=container: " finished" in docker_logs(of), f"requests of {container} finish", 40)
        # The first session of docker/README.md
        first = docker("exec", stack.container("redis"), "/etc/dpb/as", "reader", "hgetall", "dpb:{demo}:holding")
        assert set(first.split()[::2]) == {f"mock-0/{index}" for index in range(4)}
        shown = docker("exec", stack.container("dispatcher"), "balancer", "status", "demo")
        assert shown.count("mock-0/") >= 4
        sizes = {
            target: int(docker("image", "inspect", "-f", "{{.Size}}", images.of(target)))
            for target in ("dispatcher", "engine")
        }
        base = int(docker("image", "inspect", "-f", "{{.Size}}", "python:3.11-slim-bookworm"))
        added_mb = (sizes["dispatcher"] - base) / 1e6
        measured = f"healthy, requests finish; dispatcher image {added_mb:.1f} MB over Python's"
        figures("`docker compose up` as it stands", measured)
        assert added_mb < 50


def test_serve_answers_in_a_container_with_no_more_rights_than_a_dispatchers(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPB_PORT", "0")  # a free one
    with up("serve", told=False) as stack:
        stack.compose("--profile serve up --build --quiet-pull --detach --wait --wait-timeout 120 serve")
        port = docker("port", stack.container("serve"), "8080").rpartition(":")[2]
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/chat/completions", body, timeout=10) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        shown = docker("exec", stack.container("serve"), "balancer", "status", "serve")
        assert shown.count("mock/") == 4
        assert docker("exec", stack.container("serve"), "id", "-u") == "10001"
        state = json.loads(docker("inspect", stack.container("serve")))[0]
        assert state["State"]["Health"]["Status"] == "healthy"
        stack.compose("--profile serve down -v -t 1")


def docker_logs(container: str) -> str:
    """What a container has said."""
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
    return done.stdout + done.stderr
