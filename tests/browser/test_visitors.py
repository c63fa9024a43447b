"""Many visitors at once, by HTTP as the page itself speaks it: nobody sees an error but "busy", nothing is kept."""

import asyncio
import json
import shutil
import sys
import time

import httpx
import pytest
from serving import REPOSITORY, serve

pytestmark = pytest.mark.browser

CANARY = "canary_4711_nobody_writes_this"


async def visit(client, url, number, api="answer", data=None):
    """Ask as the page does; `"busy"`, or the stage's last value after all differences have been put together."""
    config = (await client.get(f"{url}/config")).json()
    function = next(d["id"] for d in config["dependencies"] if d["api_name"] == api)
    session = f"visitor{number}x{time.time_ns()}"
    data = data or [f"def {CANARY}_{number}():\n", "kl", 10, 0, 16, 0.2]
    body = {"data": data, "fn_index": function, "session_hash": session}
    joined = await client.post(f"{url}/gradio_api/queue/join", json=body)
    if joined.status_code == 503:
        return "busy"
    joined.raise_for_status()
    rounds = 0
    async with client.stream("GET", f"{url}/gradio_api/queue/data", params={"session_hash": session}) as events:
        async for line in events.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line[5:])
            rounds += event["msg"] == "process_generating"
            if event["msg"] == "process_completed":
                return {"success": event["success"], "output": event["output"], "rounds": rounds}
    raise AssertionError("the stream ended before the run did")


async def crowd(url, count):
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        return await asyncio.gather(*(visit(client, url, number) for number in range(count)))


def test_fifty_visitors_at_once_are_answered_or_told_that_it_is_busy(server):
    asyncio.run(crowd(server.url, 8))  # warm
    memory = []
    for _ in range(2):
        answers = asyncio.run(crowd(server.url, 50))
        served = [answer for answer in answers if answer != "busy"]
        assert len(served) >= 32, "the queue holds 32"
        assert all(answer["success"] and answer["rounds"] > 1 for answer in served)
        memory.append(server.memory())
    print(f"{len(served)} served, {50 - len(served)} busy; memory {memory[0]:.0f} then {memory[1]:.0f} MiB")
    assert memory[1] < memory[0] + 40

    written = server.log.read_text() + "".join(
        path.read_text(errors="replace") for path in server.scratch.rglob("*") if path.is_file()
    )
    assert CANARY not in written
    assert "Traceback" not in written


@pytest.mark.parametrize(
    "data",
    [
        ["x" * 5000, "kl", 10, 0, 16, 0.2],
        ["def f():", "../../etc/passwd", 10, 0, 16, 0.2],
        ["def f():", "kl", 10, 0, 100000, 0.2],
        ["def f():", "kl", 10**9, -3, 16, 0.2],
        [{"path": "/etc/passwd"}, "kl", 10, 0, 16, 0.2],
        [None, None, None, None, None, None],
    ],
)
def test_nothing_beyond_the_limits_runs_whoever_asks(server, data):
    async def ask():
        async with httpx.AsyncClient(timeout=120) as client:
            return await visit(client, server.url, 0, data=data)

    answer = asyncio.run(ask())
    assert "rounds" not in json.dumps(answer["output"])  # refused before or by the page: nothing was generated
    assert "root:" not in json.dumps(answer)


def test_the_spaces_own_file_starts_the_same_page_from_its_folder(tmp_path):
    """As on the Hub: space/ with the package beside app.py, and nothing of this checkout on the path."""
    space = tmp_path / "space"
    shutil.copytree(REPOSITORY / "space", space)
    shutil.copytree(REPOSITORY / "ppow_hf", space / "ppow_hf", ignore=shutil.ignore_patterns("__pycache__"))
    server = serve(tmp_path, [sys.executable, "app.py"], space, PYTHONVERBOSE="")
    try:
        page = httpx.get(server.url, timeout=60).text
        assert "pw-needle" in page and "How far ahead" in page
        assert str(space) not in page
    finally:
        server.process.terminate()
        server.process.wait(30)
