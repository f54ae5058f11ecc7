"""The report in a real browser: headless Chromium, skipped where there is none."""

import json
import os
import shutil
import subprocess
import time

import pytest
from test_report import evaluation, every_metric, make_run, write

from socratiq.report import page as report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)


class Browser:
    """Chromium's DevTools protocol over a pair of pipes: JSON messages, each ended by a zero byte."""

    def __init__(self, profile):
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()

        def three_and_four():  # Chromium reads from descriptor 3 and writes to 4
            ends = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *QUIET.split(), f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=three_and_four, close_fds=False, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.sent, self.buffer, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                read = os.read(self.back, 1 << 16)
                assert read, "Chromium has ended"
                self.buffer += read
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script, seconds=30):
        until = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < until, f"never came true: {script}"
            time.sleep(0.05)

    def open(self, url, width, height=900):
        self.events.clear()
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'")

    def complaints(self):
        """Exceptions and error messages of the page since it was opened."""
        self.run("0")  # whatever was on its way has arrived
        return [
            event
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
        ]

    def asked_for(self):
        """Addresses that the page has fetched since it was opened."""
        return {e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("sft", "dpo", "ppo"):
        make_run(folder, stage, every_metric(stage))
    write(folder / "evaluation.json", evaluation(say="W" * 300, context="A rather long text. " * 40))
    report.write([str(folder)])
    return (folder / "report.html").as_uri()


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"  # else it scrolls sideways


@pytest.mark.parametrize("width", [390, 500, 1280])
def test_the_report_fits_a_phone_and_a_desk(browser, page, width):
    browser.open(page, width)
    browser.run("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert browser.run(FITS)
    widths = browser.run("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(widths) > 30 and min(widths) > 200
    assert browser.complaints() == []
    assert all(url.startswith(("file:", "data:")) for url in browser.asked_for())


def test_the_report_is_dark_where_the_reader_wants_it_dark(browser, page):
    shades = {}
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(page, 1280)
        colours = browser.run(
            "[['body', 'backgroundColor'], ['body', 'color'], ['svg text', 'fill']]"
            ".map(([part, name]) => getComputedStyle(document.querySelector(part))[name].match(/\\d+/g).map(Number))"
        )
        shades[scheme] = [sum(colour[:3]) / 3 for colour in colours]
    browser.call("Emulation.setEmulatedMedia", features=[])
    (light_page, light_text, light_chart), (dark_page, dark_text, dark_chart) = shades["light"], shades["dark"]
    assert light_page > 200 > 120 > max(light_text, light_chart)
    assert dark_page < 60 < 150 < min(dark_text, dark_chart)
