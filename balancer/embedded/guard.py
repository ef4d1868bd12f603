"""The guard: a small process that runs a server until the server's owner is gone, in whatever way it went.

Run by path in a fresh interpreter (no site, nothing of ours imported: ready in 20 ms). It tells on its output the
server's process id and, later, "ended". Its input is a pipe that nobody ever writes to: the kernel closes it with the
owner, however that dies, and the guard takes this as the order to stop. `EmbeddedRedis.stop` asks in the same way, so
that there is one way of stopping and every test tests it.

Why not PR_SET_PDEATHSIG in the owner's preexec_fn: it fires when the forking *thread* ends, which kills a server that a
worker thread started, and a preexec_fn may deadlock a process that has threads. The guard has one thread when it forks,
so there both are harmless, and the signal covers the guard's own sudden death.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading


def main() -> None:
    """Run a server until its owner is gone. Arguments: a directory to remove then or ""; its command line."""
    private_directory, *command = sys.argv[1:]
    guard_pid = os.getpid()
    server_pid = os.fork()
    if server_pid == 0:
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG; it outlives exec
            if os.getppid() == guard_pid:  # else the guard died before the line above
                os.dup2(2, 1)  # a dynamic linker's complaint belongs into the log
                os.execv(command[0], command)
        except OSError as error:
            os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)
    # Whoever signals every process of a container takes the owner too: wait for that.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    ended = threading.Event()

    def tell(news: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(1, f"{news}\n".encode())

    def reap() -> None:
        os.waitpid(server_pid, 0)
        ended.set()
        tell("ended")

    tell(str(server_pid))
    threading.Thread(target=reap, daemon=True).start()
    os.read(0, 1)
    if not ended.is_set():
        os.kill(server_pid, signal.SIGTERM)
    if not ended.wait(2.0):  # paused by a test, or busy in a script
        os.kill(server_pid, signal.SIGKILL)
        ended.wait()
    if private_directory:
        shutil.rmtree(private_directory, ignore_errors=True)


if __name__ == "__main__":
    main()
