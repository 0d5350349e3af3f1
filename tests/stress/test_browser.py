"""What a reader of the report sees in a real browser, where there is one."""
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import made  # noqa: F401

BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
                if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0), None)
SEEN = """<script>addEventListener("load", () => { const all = s => [...document.querySelectorAll(s)];
  all("details").forEach(d => d.open = true);
  document.body.innerHTML = JSON.stringify({width: innerWidth, needs: document.documentElement.scrollWidth,
    pictures: all("section svg[role]").map(e => e.getBoundingClientRect()).map(r => [r.width, r.height]),
    tables: all("td").every(e => e.getBoundingClientRect().height > 8), page: getComputedStyle(document.body).color,
    line: getComputedStyle(document.querySelector("#loss svg .run")).stroke, letters: Math.min(...all("svg text").map(
      e => e.getBoundingClientRect().height)),
    loads: performance.getEntriesByType("resource").length}); })</script></body>"""
"""What a reader of the page would see, instead of the page."""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; its structure was checked without one")
def test_a_browser_shows_every_picture_wide_and_narrow_light_and_dark(made: tuple,  # noqa: F811
                                                                       tmp_path: Path):
    text, parsed = made
    (tmp_path / "page.html").write_text(text.replace("</body>", SEEN), encoding="utf-8")
    looks = []
    for width, scheme in ((1280, 1), (500, 0)):  # 0: dark
        done = subprocess.run([BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
                               f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path}/{width}",
                               "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True,
                              timeout=120)
        seen = json.loads(html.unescape(re.search(r"<body[^>]*>(\{.*?\})</body>", done.stdout, re.S).group(1)))
        assert seen["width"] == width and seen["needs"] <= width and seen["loads"] == 0 and seen["tables"]
        assert len(seen["pictures"]) == sum(parsed.pictures.values())
        assert all(200 < w <= width and h > 80 for w, h in seen["pictures"])
        assert seen["letters"] > 12
        looks.append({seen["page"], seen["line"]})
    assert len(looks[0]) == len(looks[1]) == 2 and not looks[0] & looks[1]
