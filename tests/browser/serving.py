"""Starts a demo in a process of its own, and keeps pictures of it in out/browser/ (ignored by git)."""

import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ARTIFACTS = REPOSITORY / "out" / "browser"


@dataclass
class Server:
    """A running demo."""

    process: subprocess.Popen
    url: str
    log: Path
    scratch: Path

    def memory(self) -> float:
        """Resident memory in MiB."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss / 2**20


def serve(folder: Path, command: list[str], cwd: Path, **variables: str) -> Server:
    """Start `command` with `variables` and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scratch, log = folder / "scratch", folder / "server.log"
    scratch.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PPOW_", "GRADIO_"))}
    environment = {
        **kept,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(scratch),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Server(process, f"http://127.0.0.1:{port}", log, scratch)
        time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the demo did not start: {log.read_text()[-2000:]}")


def screenshot(page, name: str) -> None:
    """Keep a picture of the whole page."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(700)  # the pointer comes to rest
    page.screenshot(path=str(ARTIFACTS / f"{name}.png"), full_page=True)
