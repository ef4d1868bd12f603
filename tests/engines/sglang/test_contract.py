"""Every SGLang release that we say we know: its wheel is read, not run, and must have what the hooks count on.

Wheels are taken from the package index once, without their dependencies, and kept in ENGINES_HOME/wheels.
DPB_SGLANG_RELEASES names the releases to read (with commas), by default all of them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from scheduler_hooks.sglang import counting, scheduling, targets
from tests.engines.sglang.server import engines_home

RELEASES = [
    *("0.5.13", "0.5.13.post1", "0.5.14", "0.5.15", "0.5.15.post1", "0.5.16", "0.5.17", "0.5.18"),
    *("0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"),
]
FIRST_WITH_PLUGINS_IN_THE_CONTROLLER = (0, 5, 22)
chosen = [release for release in os.environ.get("DPB_SGLANG_RELEASES", "").split(",") if release]
pytestmark = pytest.mark.parametrize("release", chosen or RELEASES)


@cache
def wheel(release: str) -> zipfile.ZipFile:
    folder = engines_home() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"sglang-{release}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        words = ["--python-version", "3.11", "-d", str(folder), f"sglang=={release}"]
        subprocess.run([*pip, *words], check=True, capture_output=True)
    (found,) = folder.glob(f"sglang-{release}-*.whl")
    return zipfile.ZipFile(found)


def source(release: str, path: str) -> str:
    return wheel(release).read(f"sglang/srt/{path}").decode()


@cache
def module(release: str, path: str) -> ast.Module:
    return ast.parse(source(release, path))


def class_of(release: str, path: str, name: str) -> ast.ClassDef:
    (found,) = [node for node in module(release, path).body if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def fields(node: ast.ClassDef) -> set[str]:
    return {one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}


def test_every_target_is_there_with_the_parameters_that_the_hooks_count_on(release: str) -> None:
    for target in targets.TARGETS:
        *folders, class_name, method = target.path.removeprefix("sglang.srt.").split(".")
        node = class_of(release, "/".join(folders) + ".py", class_name)
        (function,) = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == method]
        given = tuple(argument.arg for argument in function.args.args)[1:]
        assert given[: len(target.parameters)] == target.parameters, target.path


def test_a_request_carries_its_id_its_tokens_and_the_rank_it_is_sent_to(release: str) -> None:
    for name in ("TokenizedGenerateReqInput", "TokenizedEmbeddingReqInput"):
        assert {"input_ids", "routed_dp_rank"} <= fields(class_of(release, "managers/io_struct.py", name))
    for name in ("BatchTokenizedGenerateReqInput", "BatchTokenizedEmbeddingReqInput"):
        assert "batch" in fields(class_of(release, "managers/io_struct.py", name))


def test_the_controller_says_which_ranks_are_active(release: str) -> None:
    text = source(release, "managers/data_parallel_controller.py")
    assert "self.workers" in text
    assert "self.status" in text
    assert "self.load_balance_method" in text
    if "is not active" in text:
        assert "self._active_workers" in text
    assert re.search(r"FOLLOW_BOOTSTRAP_ROOM = ", text)


def test_a_scheduler_has_what_is_read_of_it(release: str) -> None:
    text = source(release, "managers/scheduler.py")
    names = ("load_snapshot_writer", "load_inquirer", "tp_cpu_group", "req_to_token_pool", "chunked_req")
    for name in (*names, "_engine_paused"):
        assert f"self.{name}" in text, name
    assert "self.grammar_manager.grammar_queue" in text
    assert "def available_size" in source(release, "mem_cache/memory_pool.py")
    snapshot = fields(class_of(release, "managers/load_snapshot.py", "LoadSnapshot"))
    assert {
        "num_total_tokens",
        "num_used_tokens",
        "max_total_num_tokens",
        "num_running_reqs",
        "num_waiting_reqs",
    } <= snapshot
    requests = source(release, "managers/schedule_batch.py")
    assert re.search(r"kv_allocated_len\b", requests)
    assert "def seqlen" in requests
    assert re.search(r"self\.dp_rank = dp_rank", source(release, "managers/load_snapshot.py"))


def test_a_decode_servers_requests_without_a_row_and_sessions_without_a_turn_can_be_told(release: str) -> None:
    text = source(release, "managers/scheduler.py")
    names = ("disaggregation_mode", "disagg_decode_prealloc_queue", "pool_stats_observer", "session_controller")
    for name in (*names, "waiting_queue", "tree_cache"):
        assert f"self.{name}" in text, name
    decode = source(release, "disaggregation/decode.py")
    assert "self.queue: " in decode
    assert "self.retracted_queue: " in decode
    observer = source(release, "managers/scheduler_components/pool_stats_observer.py")
    assert "def session_held_req_count(self)" in observer
    assert ("session_records" in observer) == (targets.numbers(release) >= (0, 5, 22))
    sessions = source(release, "session/session_controller.py")
    for name in ("sessions", "session_id", "_inflight", "req_nodes"):
        assert re.search(rf"self\.{name}\b", sessions), name
    assert "self.session" in source(release, "managers/schedule_batch.py")


def test_a_decode_servers_requests_are_counted_once_from_the_release_that_the_hook_reports(release: str) -> None:
    text = source(release, "managers/scheduler_components/load_inquirer.py")
    counts_once = "pending_token_queues = [decode_prealloc_queue, decode_retracted_queue]" in text
    assert counts_once == (targets.numbers(release) >= scheduling.FIRST_RIGHT_ON_DECODE)


def test_a_server_says_where_its_nodes_meet_and_whether_ranks_come_and_go(release: str) -> None:
    fields_of_a_server = [
        name for name in wheel(release).namelist() if re.search(r"srt/(server_args|arg_groups/.*)\.py$", name)
    ]
    text = "".join(wheel(release).read(name).decode() for name in fields_of_a_server)
    names = ("nnodes", "node_rank", "dist_init_addr", "elastic_ep_backend", "port", "enable_streaming_session")
    for name in names:
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
    if "ep_join_mode: " in text:  # from 0.5.16 a node may join a running server, its ranks numbered from 0
        assert re.search(r"^    ep_join_rank_offset: ", text, re.MULTILINE)


def test_sglangs_own_exchange_says_to_all_alike_whether_anybody_computes(release: str) -> None:
    names = fields(class_of(release, "managers/scheduler_components/dp_attn.py", "MLPSyncBatchInfo"))
    assert "global_num_tokens" in names
    assert names & {"num_dp_ranks", "dp_size"}
    assert "mlp_sync_info.all_gather(" in source(release, "managers/scheduler_components/dp_attn.py")


def test_sglangs_probes_are_known_by_their_ids(release: str) -> None:
    for path in ("constants.py", "managers/utils.py", "managers/io_struct.py"):
        try:
            text = source(release, path)
        except KeyError:
            continue
        if found := re.search(r'^HEALTH_CHECK_RID_PREFIX = "(\w+)"', text, re.MULTILINE):
            assert found[1].startswith(counting.PROBE)
            return
    raise AssertionError("SGLang's prefix of probes has moved")


def test_plugins_are_loaded_where_we_need_them_or_the_shim_finds_its_place(release: str) -> None:
    registry = class_of(release, "plugins/hook_registry.py", "HookRegistry")
    assert "_patched" in fields(registry)
    (register,) = [one for one in registry.body if isinstance(one, ast.FunctionDef) and one.name == "register"]
    assert [argument.arg for argument in register.args.args][:4] == ["cls", "target", "hook", "hook_type"]
    assert "load_plugins()" in source(release, "managers/scheduler.py")
    number = tuple(int(part) for part in re.findall(r"\d+", release)[:3])
    controller = source(release, "managers/data_parallel_controller.py")
    if number >= FIRST_WITH_PLUGINS_IN_THE_CONTROLLER:
        assert "load_plugins()" in controller
    else:
        assert "load_plugins" not in controller
        engine = source(release, "entrypoints/engine.py")
        assert "target=run_data_parallel_controller_process" in engine
        assert "load_plugins()" in engine


def test_the_releases_read_are_the_range_that_register_accepts(release: str) -> None:
    numbers = [tuple(int(part) for part in re.findall(r"\d+", one)[:3]) for one in RELEASES]
    assert (min(numbers), max(numbers)) == (targets.OLDEST, targets.NEWEST)
    assert Path(str(wheel(release).filename)).exists()
