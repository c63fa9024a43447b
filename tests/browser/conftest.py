"""The demo as a visitor meets it: a real server in a process of its own, and a real Chromium."""

import shutil
import sys

import pytest
from serving import serve

CHROMIUM = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """`ppow demo` with the embedded pair."""
    folder = tmp_path_factory.mktemp("demo")
    running = serve(folder, [sys.executable, "-m", "ppow_hf.cli", "demo"], folder)
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="session")
def chromium():
    """A browser; skips where there is none."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM[0], args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture()
def open_page(chromium, server):
    """`open_page(width=1280, height=860, scheme="light")` -> the page once its stage stands; fails on script errors
    and on requests to any other host."""
    pages, problems = [], []

    def opened(width=1280, height=860, scheme="light"):
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on(
            "request",
            lambda asked: None if asked.url.startswith((server.url, "data:")) else problems.append(asked.url),
        )
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(server.url)
        page.wait_for_selector("#stage .pw-cell.target")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert problems == []
