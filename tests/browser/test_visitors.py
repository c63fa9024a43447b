"""Many visitors at once, by HTTP as the page itself speaks it: nobody sees an error but "busy", nothing is kept."""

import asyncio
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import REPOSITORY, screenshot, serve

pytestmark = pytest.mark.browser

CANARY = "canary_4711_nobody_writes_this"


def run_apart(coroutine):
    """In a thread of its own: where the browser has been started, this one has an event loop already."""
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, coroutine).result()


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
    # No connection is used twice: the server closes idle ones, which a slow machine would notice too late.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        return await asyncio.gather(*(visit(client, url, number) for number in range(count)))


def test_fifty_visitors_at_once_are_answered_or_told_that_it_is_busy(server):
    run_apart(crowd(server.url, 8))  # warm
    memory = []
    for _ in range(2):
        answers = run_apart(crowd(server.url, 50))
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
        [None, None, None, None, None, None],
    ],
)
def test_nothing_beyond_the_limits_runs_whoever_asks(server, data):
    async def ask():
        async with httpx.AsyncClient(timeout=120) as client:
            return await visit(client, server.url, 0, data=data)

    answer = run_apart(ask())
    assert "rounds" not in json.dumps(answer["output"])  # refused before or by the page: nothing was generated


def test_a_path_sent_as_a_prompt_is_only_text(server):
    async def ask():
        async with httpx.AsyncClient(timeout=120) as client:
            return await visit(client, server.url, 0, data=[{"path": "/etc/passwd"}, "kl", 10, 0, 16, 0.2])

    value = run_apart(ask())["output"]["data"][0]
    assert "root:" not in json.dumps(value)


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


def test_a_visitor_of_a_full_page_reads_that_it_is_busy(chromium, tmp_path):
    server = serve(tmp_path, [sys.executable, "-m", "ppow_hf.cli", "demo"], tmp_path, PPOW_DEMO_QUEUE="1")
    try:
        config = httpx.get(f"{server.url}/config", timeout=60).json()
        function = next(d["id"] for d in config["dependencies"] if d["api_name"] == "answer")
        for number in range(3):  # one runs, one waits, the third is told to come again
            data = ["def long_run():\n", "kl", 10, 0, 512, 0.2]
            body = {"data": data, "fn_index": function, "session_hash": f"full{number}"}
            joined = httpx.post(f"{server.url}/gradio_api/queue/join", json=body, timeout=60)
            time.sleep(1)
        assert joined.status_code == 503
        page = chromium.new_page()
        page.goto(server.url)
        page.wait_for_selector("#stage .pw-cell.target")
        page.click("#watch-run")
        page.get_by_text("busy").first.wait_for(timeout=20_000)
        screenshot(page, "busy")
        page.close()
    finally:
        server.process.terminate()
        server.process.wait(30)
