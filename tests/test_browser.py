"""The report in a real browser: headless Chromium, skipped where there is none.

That it runs no script and fetches nothing shows in its text: test_report.py.
"""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_report import evaluation, every_metric, make_run, write

from socratiq.report import page as report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files --dump-dom"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three stages, an evaluation with a very long word, and their report.html."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("sft", "dpo", "ppo"):
        make_run(folder, stage, every_metric(stage))
    write(folder / "evaluation.json", evaluation(say="W" * 300, context="A rather long text. " * 40))
    report.write([str(folder)])
    return folder


def measure(folder, width, expression, scheme="light"):
    """What a JavaScript expression of the document `page` gives, in a frame of this width in pixels."""
    (folder / "frame.html").write_text(
        '<meta name="color-scheme" content="light dark"><title></title>'
        f"<script>function measure(page) {{ document.title = JSON.stringify({expression}) }}</script>"
        f'<iframe src="report.html" width="{width}" onload="measure(this.contentDocument)" style="border: 0"></iframe>'
    )
    prefers = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    command = [CHROMIUM, *QUIET.split(), prefers, f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, text=True)
    return json.loads(html.unescape(re.search("<title>(.+?)</title>", done.stdout)[1]))


@pytest.mark.parametrize("width", [390, 500, 1280])
def test_the_report_fits_a_phone_and_a_desk(folder, width):
    unfolded = "[...page.querySelectorAll('details')].forEach(fold => fold.open = true)"
    charts = "[...page.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)"
    _, needed, given, widths = measure(
        folder, width, f"[{unfolded}, page.documentElement.scrollWidth, page.documentElement.clientWidth, {charts}]"
    )
    assert needed <= given == width  # else it scrolls sideways
    assert len(widths) > 30 and min(widths) > 200


def test_the_report_is_dark_where_the_reader_wants_it_dark(folder):
    colours = (
        "[['body', 'backgroundColor'], ['body', 'color'], ['svg text', 'fill']].map(([part, name]) =>"
        "page.defaultView.getComputedStyle(page.querySelector(part))[name].match(/[0-9]+/g).slice(0, 3).map(Number))"
    )
    shades = {scheme: [sum(x) / 3 for x in measure(folder, 1280, colours, scheme)] for scheme in ("light", "dark")}
    (light_page, light_text, light_chart), (dark_page, dark_text, dark_chart) = shades["light"], shades["dark"]
    assert light_page > 200 > 120 > max(light_text, light_chart)
    assert dark_page < 60 < 150 < min(dark_text, dark_chart)
