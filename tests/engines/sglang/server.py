"""A real SGLang on this machine's CPU, started by the kit beside the checkout: `../shared/engines/sglang`.

The server is unmodified SGLang with dp-balancer installed beside it (editable); everything else comes by environment.
DPB_SGLANG_PATH: a folder with another release's wheel unpacked, which then takes the place of the kit's.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
KIT = ROOT.parent / "shared" / "engines"
READY_S = 600
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def engines_home() -> Path:
    return Path(os.environ.get("ENGINES_HOME") or Path.home() / ".cache" / "engines")


def what_is_missing() -> str:
    """Why no SGLang can be started here, or nothing."""
    if not (KIT / "sglang" / "serve").exists():
        return f"no engine kit at {KIT}: these tests start a real SGLang with it"
    python = engines_home() / "sglang" / "bin" / "python"
    if not python.exists():
        return f"SGLang is not installed in {engines_home()}: run ../shared/engines/sglang/install"
    probe = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='sglang.srt.plugins')])"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True).stdout
    if "scheduler_hooks.sglang:register" not in found:
        return f"dp-balancer is not installed beside SGLang: run {python} -m pip install -e {ROOT}"
    return ""


class SGLangServer:
    """One server on `port`; stopped at the end of the `with`."""

    def __init__(self, port: int, *flags: str, **environment: str) -> None:
        self.port, self.flags = port, flags
        self.url = f"http://127.0.0.1:{port}"
        plugins = "dp_balancer" if "DP_BALANCER_URL" in environment else "none"
        self.environment = {"SGLANG_PLUGINS": plugins, "DP_BALANCER_BUDGET_MS": "250", **environment}
        paths = (os.environ.get("DPB_SGLANG_PATH"), environment.get("PYTHONPATH"))
        self.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.log_file = engines_home() / "run" / f"{port}.log"

    def start(self) -> SGLangServer:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DP_BALANCER_")}
        said = subprocess.run(
            [KIT / "sglang" / "serve", str(self.port), *self.flags],
            env={**clean, "READY_S": str(READY_S), **self.environment},
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, f"SGLang did not start:\n{said.stderr[-4000:]}"
        return self

    def stop(self) -> None:
        self.thaw()
        subprocess.run([KIT / "sglang" / "stop", str(self.port)], capture_output=True, check=True)

    def __enter__(self) -> SGLangServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def freeze(self) -> None:
        """Stop all its processes in place: an idle SGLang spins, and would take a core from what is measured."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        for pid in self.pids():
            os.kill(pid, signal.SIGCONT)

    # -- what one can ask it

    def get(self, path: str) -> Any:
        with _OPENER.open(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300, **headers: str) -> Any:
        names = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), names)
        with _OPENER.open(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())

    def generate(self, tokens: int = 8, new_tokens: int = 4, **more: Any) -> Any:
        """One native request with `tokens` prompt tokens; its answer's meta_info names the DP rank."""
        ids = random.choices(range(5, 95), k=tokens)
        sampling = {"max_new_tokens": new_tokens, "ignore_eos": True}
        return self.post("/generate", {"input_ids": ids, "sampling_params": sampling, **more})

    def counted(self) -> dict[int, int]:
        """DP rank -> tokens, as SGLang counts them itself."""
        return {load["dp_rank"]: load["num_total_tokens"] for load in self.get("/v1/loads?include=core")["loads"]}

    def requests(self) -> int:
        """Requests that its schedulers hold, running and queued, as SGLang counts them itself."""
        loads = self.get("/v1/loads?include=core")["loads"]
        return sum(int(load["num_running_reqs"] + load["num_waiting_reqs"]) for load in loads)

    def log(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_file.read_text(errors="replace"))

    def said(self, *words: str) -> list[str]:
        """The lines of its log that hold all of `words`."""
        return [line for line in self.log().splitlines() if all(word in line for word in words)]

    def pids(self, title: str = "") -> list[int]:
        """Processes of this server whose title begins so: `sglang::scheduler`, `sglang::data_parallel_controller`."""
        try:
            session = int((engines_home() / "run" / f"{self.port}.pid").read_text().split()[0])
        except FileNotFoundError:
            return []
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "stat").read_text().rpartition(") ")[2].split()
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if int(words[3]) == session and words[0] != "Z" and command.startswith(title):
                found.append(int(folder.name))
        return sorted(found)
