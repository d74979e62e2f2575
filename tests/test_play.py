"""The page as a person has it: the real server, driven in headless chromium, and nothing asked of any other machine."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest

from therapy_jax import browser as page_server
from therapy_jax import safety
from therapy_jax.config import Config, ConfigError

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
MARKUP = "<img src=x onerror=document.title='broken'> ${1+1} {{value}} **bold**"
# Python runs this before the server: it writes down every address that the process connects to or looks up.
AUDIT = """
import os, sys
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        where = args[1] if event != "socket.getaddrinfo" else args[0]
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{where[0] if isinstance(where, tuple) else where}\\n")
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def driver():
    pytest.importorskip("gradio", reason="no gradio: install the extra, pip install -e '.[ui]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium: on Debian install chromium")
    with playwright.sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def server(driver, tiny_run, tmp_path_factory):
    """-> (url, the file of addresses that the server talked to)."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "sitecustomize.py").write_text(AUDIT)
    (folder / "connections").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        **os.environ, "XLA_FLAGS": "", "PYTHONPATH": path, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1",
        "CONNECTIONS": str(folder / "connections"), "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True",
        **dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9"), "NO_PROXY": "", "no_proxy": "",  # nobody answers
    }  # fmt: skip
    args = [sys.executable, "scripts/play.py", "--config", str(tiny_run / "config.yaml")]
    with subprocess.Popen(
        args, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("open "):
                    break
            assert said[-1].startswith(f"open http://127.0.0.1:{port}/ "), "".join(said)
            yield f"http://127.0.0.1:{port}/", folder / "connections"
        finally:
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in rest, rest


def replies(page, model: str) -> list[str]:
    return page.locator(f".tj-card[data-model={model}] p").all_inner_texts()


@pytest.mark.slow
def test_a_conversation_in_the_browser(driver, server):
    url, connections = server
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_page()
    page.set_default_timeout(120_000)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    try:
        page.goto(url)
        disclosure = page.locator("#disclosure")
        disclosure.wait_for()
        assert " ".join(disclosure.inner_text().split()) == " ".join(safety.DISCLOSURE.split())
        assert disclosure.bounding_box()["y"] < page.locator("#message").bounding_box()["y"]
        assert page.locator(".tj-card").count() == 0

        page.fill("#message textarea", f"I can't sleep since my mother died. {MARKUP}")
        page.press("#message textarea", "Enter")
        page.wait_for_selector(".tj-card[data-model=ppo][data-done]")
        assert [replies(page, name).__len__() for name in ("base", "sft", "ppo")] == [1, 1, 1]
        assert page.locator(".tj-you").inner_text().endswith(MARKUP)  # as it was typed
        assert page.locator("#conversation img").count() == 0 and "broken" not in page.title()
        for card in page.locator(".tj-card").all():
            assert re.findall("context|repetition|ending|manner", card.inner_text()) == [
                "context", "repetition", "ending", "manner",
            ]  # fmt: skip
        felt = page.input_value("#emotion input")
        assert felt in ("neutral", "depression", "anger", "disgust", "joy", "sadness", "fear")

        strip = page.locator(".tj-card[data-model=ppo] .tj-strip")
        assert not strip.is_visible()
        page.locator(".tj-card[data-model=ppo] summary").click()  # one click away
        assert strip.is_visible() and strip.locator("span").count() > 0

        page.locator(".tj-card").evaluate_all("cards => cards.forEach(card => card.dataset.before = '')")
        page.click("#emotion input")
        page.get_by_role("option", name="disgust" if felt != "disgust" else "joy").click()
        # All is answered anew. That a card is gone lasts no longer than an answer takes; that it is another one stays.
        page.wait_for_selector(".tj-card[data-model=ppo][data-done]:not([data-before])")
        assert page.locator(".tj-card[data-before]").count() == 0
        assert page.input_value("#emotion input") == ("disgust" if felt != "disgust" else "joy")
        assert page.locator(".tj-you").count() == 1 and page.locator(".tj-card").count() == 3

        page.fill("#message textarea", "I want to kill myself.")
        page.click("#send")
        gate = page.locator("[data-crisis]")
        gate.wait_for()
        assert safety.answer("suicide", Config().safety) in gate.inner_text()
        assert page.locator(".tj-card").count() == 3  # no model was asked
        assert page.input_value("#message textarea") == ""

        page.set_viewport_size({"width": 360, "height": 740})  # a phone: nothing runs out at the side
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.click("#anew")
        page.wait_for_selector(".tj-you", state="detached")

        answers = []  # held back until both messages are sent
        page.route("**/queue/data*", lambda route: answers.append(route))
        holds = "text => document.querySelector('#message textarea').value === text"
        for text in ("My brother does not call me.", "I want to kill myself."):
            page.fill("#message textarea", text)
            page.press("#message textarea", "Enter")
            page.wait_for_function(holds, arg="")  # taken: gradio reads the box a moment after the key
        page.fill("#message textarea", "And then")
        assert page.locator(".tj-you").count() == 0
        for answer in answers:
            answer.continue_()
        page.unroute("**/queue/data*")
        gate.wait_for()
        said = [you.inner_text() for you in page.locator(".tj-you").all()]
        assert said == ["My brother does not call me.", "I want to kill myself."]
        assert page.locator(".tj-card[data-done]").count() == page.locator(".tj-card").count() == 3
        assert page.input_value("#message textarea") == "And then"  # what is typed meanwhile stays

        long = "I had a cup of tea. " * 200
        page.fill("#message textarea", long)
        page.press("#message textarea", "Enter")
        page.get_by_role("alert").filter(has_text="shorten it").wait_for()
        page.wait_for_function(holds, arg=long)
        assert page.locator(".tj-you").count() == 2
    finally:
        browser.close()
    assert errors == []
    assert requests and {urlsplit(r).hostname for r in requests if not r.startswith(("data:", "blob:"))} == {
        "127.0.0.1"
    }
    talked_to = set(connections.read_text().split("\n")) - {""}
    assert talked_to <= {"127.0.0.1", "localhost"}, talked_to


@pytest.mark.slow
def test_other_sites_get_no_answer(server):
    own = urlsplit(server[0]).netloc

    def status(path: str, body: bytes | None = None, **headers: str) -> int:
        connection = http.client.HTTPConnection(own, timeout=60)
        connection.request("GET" if body is None else "POST", path, body, headers)
        return connection.getresponse().status

    port = own.split(":")[1]
    assert status("/") == status("/", Origin=f"http://{own}") == 200
    assert status("/", Host=f"localhost:{port}", Origin=f"http://localhost:{port}") == 200
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
        assert status("/", Host=host) == 400, host
    for origin in ("http://evil.example", f"http://localhost:{port}", "http://127.0.0.1:1", "null"):
        assert status("/gradio_api/info", Origin=origin) == 403, origin
    file = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\na\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert status("/gradio_api/upload", file, **kind) == 403  # nobody's: the page takes none


def test_a_page_that_cannot_be_served_is_one_sentence(monkeypatch):
    seen = {}

    def launch(**_):
        seen.update(os.environ)
        raise Exception("Couldn't start the app")  # as gradio does, where a proxy is in the way

    app = SimpleNamespace(queue=lambda: None, launch=launch)
    for name in ("gradio", "starlette", "starlette.middleware", "starlette.middleware.trustedhost"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setattr(page_server, "prepare", lambda config: None)
    monkeypatch.setattr(page_server, "build", lambda gradio, play: app)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", {"NO_PROXY": "example.org"})
    with pytest.raises(ConfigError, match=r"cannot be served \(Couldn't start the app\)"):
        page_server.serve(Config())
    assert seen["NO_PROXY"] == seen["no_proxy"] == "example.org,127.0.0.1,localhost"


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError(\"No module named 'gradio'\")\n")  # in front of a real one
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    args = [sys.executable, "scripts/play.py", "--run_dir", str(tmp_path)]
    done = subprocess.run(
        args, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the page needs gradio" in done.stdout and "pip install -e '.[ui]'" in done.stdout
