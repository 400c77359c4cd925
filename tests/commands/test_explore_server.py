"""`explore` as it is used: its own process, a real browser, and strangers that talk to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser
from small_models import run_of_sums, run_of_texts

from looplm.corpora.text_tokenizer import ByteTokenizer

HOSTILE = '<img src=x onerror=document.title="ran"><script>document.title="ran"</script>'


class Server:
    """A process of `explore`."""

    def __init__(self, *argv: object) -> None:
        command = [sys.executable, "-m", "looplm", "explore", "--no_browser", *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, f"{line} {self.process.communicate()}"
        self.address, self.port = found[0], int(found[1])

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, host: str | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Return status, headers and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Host": host or f"127.0.0.1:{self.port}", "Content-Type": "application/json", **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body=data, headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, text

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; return the exit code and what stood on standard error."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a random model of sums, whose answers change from depth to depth."""
    server = Server(run_of_sums(tmp_path_factory.mktemp("server") / "sums"), "--max_depth", 4000)
    yield server
    code, err = server.end(signal.SIGINT)
    assert (code, err) == (0, "")


@pytest.fixture(scope="module")
def page(sums: Server, chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(chromium, tmp_path_factory.mktemp("profile")) as browser:
        browser.open(sums.address)
        browser.wait("document.title.includes('sums')")
        yield browser


def _answer(page: Browser, problem: str, depth: int) -> None:
    page.type("#problem", problem)
    page.type("#greatest", str(depth))
    page.evaluate("document.querySelector('#problem').focus()")
    page.press("Enter", 13)
    page.wait("document.querySelector('#go').disabled === false")


TOKENS = "[...document.querySelectorAll('#tokens .token')].map((token) => token.textContent).join('')"


# In the browser.


def test_typed_problem_is_answered_and_the_slider_shows_other_depths(page: Browser, sums: Server) -> None:
    _answer(page, "12+34", 9)
    page.wait("document.querySelector('#result').hidden === false")
    _, _, text = sums.ask("POST", "/api/answer", {"problem": "12+34", "max_depth": 9})
    known = json.loads(text)
    said = ["".join(known["answers"][n]["tokens"]) for n in known["chosen"]]
    assert len(set(said)) > 1
    assert page.evaluate(TOKENS) == said[9]
    seen = [said[9]]
    page.evaluate("document.querySelector('#depth').focus()")
    for _ in range(9):
        page.press("ArrowLeft", 37)
        seen.append(page.evaluate(TOKENS))
    assert seen == said[::-1]
    assert page.evaluate("document.querySelector('#depth-shown').textContent") == "0"
    assert page.evaluate("document.querySelectorAll('#grid tbody tr.now').length") == 1
    # A click on a row of the table is the other way to a depth.
    page.evaluate("document.querySelectorAll('#grid tbody tr')[4].click()")
    assert page.evaluate(TOKENS) == said[4]
    assert page.evaluate("document.querySelector('#depth').value") == "4"


def test_page_shows_every_depth_curve_exit_and_the_path(page: Browser) -> None:
    _answer(page, "12+34", 9)
    assert page.evaluate("document.querySelectorAll('#grid tbody tr').length") == 10
    charts = page.evaluate(
        "['residual', 'entropy', 'path'].map((id) => document.querySelector(`#${id} .bold`).getBBox().width)"
    )
    assert all(width > 50 for width in charts)
    names = page.evaluate("[...document.querySelectorAll('#exits tbody th')].map((cell) => cell.textContent)")
    assert names == ["residual", "kl", "entropy", "confidence"]
    colours = page.evaluate(
        "[...document.querySelectorAll('#grid .token')].map((token) => getComputedStyle(token).backgroundColor)"
    )
    assert len(set(colours)) > 5
    dark = "getComputedStyle(document.body).backgroundColor"
    page.prefer("dark")
    night = page.evaluate(dark)
    page.prefer("light")
    assert page.evaluate(dark) != night


def test_the_example_is_asked_where_nothing_is_typed(page: Browser) -> None:
    example = page.evaluate("document.querySelector('#problem').placeholder")
    _answer(page, "", 9)
    page.wait("document.querySelector('#result').hidden === false")
    assert page.evaluate("document.querySelector('#prompt').textContent").startswith(example)


def test_error_is_one_line_on_the_page(page: Browser) -> None:
    _answer(page, "two and two", 9)
    message = page.evaluate("document.querySelector('#message').textContent")
    assert message == "expected a problem such as 12+34, got 'two and two'."
    assert page.evaluate("document.querySelector('#result').hidden") is True
    _answer(page, "12+34", 9)
    assert page.evaluate("document.querySelector('#message').hidden") is True


def test_hostile_problem_is_text_where_it_is_refused(page: Browser) -> None:
    _answer(page, HOSTILE, 9)
    assert HOSTILE in page.evaluate("document.querySelector('#message').textContent")
    assert page.evaluate("document.images.length") == 0
    assert "ran" not in page.evaluate("document.title")


def test_page_says_nothing_on_the_console_and_asks_nobody_else(page: Browser, sums: Server) -> None:
    _answer(page, "12+34", 40)
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {"page.css", "explorer.css", "page.js", "charts.js"} <= {name.rsplit("/", 1)[-1] for name in loaded}
    assert all(name.startswith((sums.address, "data:")) for name in loaded)
    # A refused problem is a status 400, which browsers note by themselves.
    said = [event for event in page.events if "status of 400" not in json.dumps(event)]
    assert said == []


def test_policy_stops_a_script_that_gets_into_the_page(page: Browser) -> None:
    # The second line of defence, and the control: the first one would not let the element in.
    page.evaluate(f"document.querySelector('#message').innerHTML = {json.dumps(HOSTILE)}")
    page.evaluate("new Promise((done) => setTimeout(done, 300))")
    assert "ran" not in page.evaluate("document.title")
    assert page.evaluate("document.images.length") == 1
    assert any("Content Security Policy" in json.dumps(event) for event in page.events)
    page.events.clear()
    page.open(page.evaluate("location.href"))
    page.wait("document.title.includes('sums')")


def test_hostile_text_is_echoed_as_text_by_a_model_of_texts(chromium: str, tmp_path: Path) -> None:
    server = Server(run_of_texts(tmp_path / "run", ByteTokenizer(), template="{question}"), "--max_new_tokens", 4)
    with Browser(chromium, tmp_path / "profile") as page:
        page.open(server.address)
        page.wait("document.title.includes(':')")
        _answer(page, HOSTILE, 4)
        assert page.evaluate("document.querySelector('#prompt').textContent") == HOSTILE.replace(" ", "␣")
        assert page.evaluate("document.images.length") == 0
        assert page.evaluate("document.querySelectorAll('script').length") == 1
        assert page.evaluate("document.querySelectorAll('#grid tbody tr').length") == 5
        assert "ran" not in page.evaluate("document.title")
    server.end(signal.SIGTERM)


# Without one.


@pytest.mark.parametrize(
    ("headers", "host", "status"),
    [
        ({}, None, 200),
        ({}, "localhost:{port}", 200),
        ({"Origin": "http://127.0.0.1:{port}"}, None, 200),
        ({"Origin": "http://evil.example"}, None, 403),
        ({"Origin": "http://127.0.0.1"}, None, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, None, 403),
        ({"Origin": "null"}, None, 403),
        ({}, "evil.example", 403),
        ({}, "evil.example:{port}", 403),
        ({}, "127.0.0.1", 403),
        ({}, "127.0.0.1:{port}.evil.example", 403),
        ({"Sec-Fetch-Site": "cross-site"}, None, 403),
        ({"Sec-Fetch-Site": "same-site"}, None, 403),
        ({"Sec-Fetch-Site": "same-origin"}, None, 200),
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/model"])
def test_strangers_are_refused(sums: Server, path: str, headers: dict[str, str], host: str | None, status: int) -> None:
    filled = {name: value.format(port=sums.port) for name, value in headers.items()}
    found, answered, text = sums.ask("GET", path, headers=filled, host=host and host.format(port=sums.port))
    assert found == status
    assert "access-control-allow-origin" not in answered
    assert ("sums" in text) == (status == 200 and path == "/api/model")


def test_link_of_another_page_may_lead_here_but_not_post(sums: Server) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert sums.ask("GET", "/", headers=link)[0] == 200
    assert sums.ask("POST", "/api/answer", {"problem": "1+1"}, headers=link)[0] == 403


def test_every_answer_has_the_policy_and_is_not_kept(sums: Server) -> None:
    requests = [("GET", "/"), ("GET", "/page.js"), ("GET", "/api/model"), ("GET", "/none"), ("POST", "/api/answer")]
    for method, path in requests:
        _, headers, _ = sums.ask(method, path)
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/api/answer", b"x" * 17_000, {}, 413),
        ("POST", "/api/answer", b"x" * 17_000, {"Origin": "http://evil.example"}, 403),
        ("POST", "/api/answer", {"problem": "12+34"}, {"Content-Type": "text/plain"}, 415),
        ("POST", "/api/answer", b"{", {}, 400),
        ("POST", "/api/answer", b"[" * 16_000, {}, 400),
        ("POST", "/api/answer", b"\xff\xfe", {}, 400),
        ("POST", "/api/answer", {"problem": "1" * 3000}, {}, 400),
        ("POST", "/api/answer", {"problem": "12+34", "max_depth": 4001}, {}, 400),
        ("POST", "/api/answer", {"problem": "12+34", "max_depth": 4}, {}, 200),
        ("GET", "/api/answer", None, {}, 405),
        ("DELETE", "/", None, {}, 405),
        ("GET", "/../explorer/app.py", None, {}, 404),
        ("GET", "/app.py", None, {}, 404),
    ],
)
def test_request_gets_its_status(
    sums: Server, method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    found, _, text = sums.ask(method, path, body, headers)
    assert found == status
    if path == "/api/answer" and status in (400, 403, 413, 415):
        (line,) = json.loads(text).values()
        assert "\n" not in line
        assert len(line) < 400


def test_body_without_a_length_is_bounded_too(sums: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", sums.port, timeout=60)
    connection.putrequest("POST", "/api/answer", skip_host=True)
    headers = {"Host": f"127.0.0.1:{sums.port}", "Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    for _ in range(17):
        connection.send(b"400\r\n" + b"1" * 1024 + b"\r\n")
    # No last chunk: whoever waited for it would wait for ever.
    assert connection.getresponse().status == 413
    connection.close()


def test_one_problem_is_computed_at_a_time(sums: Server) -> None:
    long = {"problem": "98+76", "max_depth": 120}
    seen: list[int] = []
    for _ in range(10):
        threads = [
            threading.Thread(target=lambda: seen.append(sums.ask("POST", "/api/answer", long)[0])) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert sums.ask("GET", "/api/model")[0] == 200  # the page itself still loads
        for thread in threads:
            thread.join()
        if 503 in seen:
            break
    assert set(seen) == {200, 503}
    assert sums.ask("POST", "/api/answer", {"problem": "12+34", "max_depth": 1})[0] == 200


def test_end_does_not_wait_for_a_computation(tmp_path: Path) -> None:
    server = Server(run_of_sums(tmp_path / "run"), "--max_depth", 4000, "--max_seconds", 10**6)
    told: list[tuple[int, str]] = []

    def compute() -> None:
        while not told or told[-1][0] == 503:
            told.append(server.ask("POST", "/api/answer", {"problem": "12+34", "max_depth": 4000})[::2])

    thread = threading.Thread(target=compute)
    thread.start()
    while server.ask("POST", "/api/answer", {"problem": "12+34", "max_depth": 1})[0] != 503:
        assert thread.is_alive()
    code, err = server.end(signal.SIGINT)
    thread.join()
    assert (code, err) == (0, "")
    assert told[-1] == (400, '{"error":"the server ends."}')
