"""One way through the app in a real browser, with the demo bundle and its cells, as a new user would go.

Start, pick, knock out, watch, compare, download, open the report, add a drug signature, fit a network and leave it out,
compare scenarios, cancel a screen and a goal search. Screenshots go to ``ci-output/``. With ``CI=true`` a missing
browser is a failure, elsewhere the test is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = Path(os.environ.get("GE2HIST_CI_OUTPUT", ROOT / "ci-output"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_S = 120
BEFORE = "Generated H&E picture of the niche, Before: unedited"
AFTER = "Generated H&E picture of the niche, After: edited, same noise"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app as a user starts it, on a free loopback port and with a cache of its own."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GE2HIST_")}
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true"]
    command += [f"--server.port={port}", "--server.address=127.0.0.1", "--server.fileWatcherType=none"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env=kept | {"GE2HIST_HOME": str(folder / "home")}, stdout=log, stderr=log
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for_health(url, server)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
    said = (folder / "server.log").read_text()
    assert "Traceback" not in said, said


def _wait_for_health(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the app did not start (exit code {server.poll()})")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A fresh Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path, sync_playwright = None, None
    if path is None or sync_playwright is None:
        text = "no Chromium or no playwright here: apt-get install chromium, pip install -r requirements-dev.txt"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=path,
            headless=True,
            args=FLAGS,
            viewport={"width": 1366, "height": 768},
            accept_downloads=True,
        )
        context.set_default_timeout(1000 * PATIENCE_S)
        yield context
        context.close()


def test_journey(address: str, browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * PATIENCE_S)
    PICTURES.mkdir(exist_ok=True)
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))

    # The link of a page is the first that a fresh server sees: it opens in the app, not by itself.
    page.goto(f"{address}/about")
    expect(page.get_by_role("link", name="Explore")).to_be_visible()

    # Start: the first picture, marked and described.
    page.goto(address)
    expect(page.get_by_alt_text(BEFORE)).to_be_visible()
    page.screenshot(path=PICTURES / "0-tour.png")
    page.get_by_role("button", name="Got it").click()
    expect(page.get_by_role("button", name="Got it")).to_have_count(0)
    page.locator("[data-testid='stApp'][data-test-script-state='notRunning']").wait_for()
    expect(page.get_by_text("Draft: one draw from one seed, unedited.")).to_be_visible()

    # Pick another cell.
    heading = page.get_by_role("heading", name="Niche of")
    first = heading.inner_text()
    page.get_by_role("button", name="Next cell of this type").or_(page.locator(".st-key-step-1 button")).first.click()
    expect(heading).not_to_have_text(first)
    expect(page.get_by_alt_text(BEFORE)).to_be_visible()
    # Until the script has ended, the suggested genes may still be those of the cell before.
    page.locator("[data-testid='stApp'][data-test-script-state='notRunning']").wait_for()
    page.screenshot(path=PICTURES / "1-start.png")

    # Knock one of its genes out and watch the draft.
    suggested = page.locator("[class*='st-key-suggest'] button").first
    gene = suggested.inner_text().strip()
    suggested.click()
    card = page.locator(f".st-key-gene-{gene}")
    expect(card).to_be_visible()
    page.locator("[data-testid='stApp'][data-test-script-state='notRunning']").wait_for()
    card.locator("label", has_text="Knock out").click()
    expect(page.get_by_alt_text(AFTER)).to_be_visible()
    expect(page.get_by_role("button", name=f"{gene} knocked out")).to_be_visible()
    expect(page).to_have_url(re.compile(rf"[?&]edit={re.escape(gene)}(%3A|:)ko"))
    page.screenshot(path=PICTURES / "2-draft.png")

    # Compare over all seeds, and see it happen.
    page.get_by_role("button", name="Compare over 16 seeds").click()
    expect(page.get_by_role("combobox", name="Seed", exact=True)).to_be_visible()
    expect(page.locator(".js-plotly-plot")).to_have_count(3)
    page.screenshot(path=PICTURES / "3-result.png")
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "4-charts.png")

    # A reload loses nothing.
    page.reload()
    expect(page.get_by_role("combobox", name="Seed", exact=True)).to_be_visible()

    # Download.
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Everything (ZIP)").click()
    waiting.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.testzip() is None
        assert {"report.html", "recipe.json", "comparison.csv", "result.h5ad"} <= set(archive.namelist())
        archive.extract("report.html", tmp_path)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Report (PDF)").click()
    assert Path(waiting.value.path()).read_bytes()[:5] == b"%PDF-"

    # The report, in the app and by itself without a network.
    page.get_by_role("link", name="Report").click()
    inside = page.frame_locator("iframe").first
    expect(inside.get_by_role("heading", level=1)).to_contain_text(f"{gene} is knocked out")
    page.screenshot(path=PICTURES / "5-report-page.png")
    alone = browser.new_page()
    alone.on("pageerror", lambda error: faults.append(str(error)))
    alone.goto((tmp_path / "report.html").as_uri())
    expect(alone.locator(".js-plotly-plot")).to_have_count(4)
    alone.screenshot(path=PICTURES / "6-report.png", full_page=True)

    # A drug signature in its place, with a dose.
    page.get_by_role("link", name="Explore").click()
    page.get_by_role("button", name=f"{gene} knocked out").click()
    expect(page.get_by_text("Draft: one draw from one seed, unedited.")).to_be_visible()
    page.get_by_text("Add a drug signature or gene set").click()
    choice = page.locator(".st-key-signature input")
    choice.fill("MEK")
    expect(page.get_by_role("option", name=re.compile("MEK")).first).to_be_visible()
    choice.press("Enter")
    page.get_by_role("button", name="Add it at dose 1").click()
    expect(page.get_by_role("button", name=re.compile("at dose 1"))).to_be_visible()
    expect(page.get_by_alt_text(AFTER)).to_be_visible()
    page.screenshot(path=PICTURES / "7-signature.png")

    # A network is fitted by the worker, chosen, and left out again.
    page.get_by_text("Let edits spread through a network").click()
    search = page.get_by_label("Fit a network to these cells: regulators: search")
    search.fill(gene)
    search.press("Enter")
    expect(page.get_by_test_id("stMultiSelectTagsContainer").filter(has_text=gene)).to_be_visible()
    page.get_by_role("button", name="Fit", exact=True).click()
    expect(page.get_by_text("edges start at an edited gene")).to_be_visible()
    page.screenshot(path=PICTURES / "7b-network.png", full_page=True)
    page.locator("[data-testid='stApp'][data-test-script-state='notRunning']").wait_for()
    choice = page.locator(".st-key-network input")
    choice.fill("Off")
    expect(page.get_by_role("option", name=re.compile("^Off")).first).to_be_visible()
    choice.press("Enter")
    expect(page.get_by_text("edges start at an edited gene")).to_have_count(0)

    # Scenarios are named, duplicated and drawn side by side.
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("button", name="Add what Explore shows").click()
    page.get_by_role("textbox", name="Name of scenario 1").fill("Signature")
    page.get_by_role("textbox", name="Name of scenario 1").press("Enter")
    page.get_by_role("button", name="Duplicate scenario 1").or_(
        page.locator(".st-key-copy-scenario-0 button")
    ).first.click()
    expect(page.get_by_role("textbox", name="Name of scenario 2")).to_be_visible()
    page.get_by_role("button", name=re.compile("^Draw 2 scenarios")).click()
    expect(page.get_by_role("button", name="Table (CSV)")).to_be_visible()
    expect(page.get_by_alt_text("Generated H&E picture of scenario Signature", exact=True)).to_be_visible()
    page.screenshot(path=PICTURES / "8-compare.png", full_page=True)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Report (ZIP)").click()
    with zipfile.ZipFile(waiting.value.path()) as archive:
        assert archive.testzip() is None
        assert {"effects.csv", "workspace.json", "1_Signature/recipe.json"} <= set(archive.namelist())

    # A screen is started, seen at work and cancelled; its ranking is kept.
    page.get_by_role("link", name="Screen").click()
    page.get_by_role("button", name="Start the screen").click()
    expect(page.get_by_text(re.compile("^Drawing "))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Go on with the screen")).to_be_visible()
    expect(page.get_by_text("All candidates, ranked without drawing")).to_be_visible()
    page.screenshot(path=PICTURES / "9-screen.png", full_page=True)
    # Streamlit's own CSV of a table is hidden: it hands formulas on as they are.
    page.locator("[data-testid='stDataFrame']").first.hover()
    expect(page.get_by_role("button", name=re.compile("^Search")).first).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("^Download as CSV"))).to_have_count(0)

    # A goal search of single edits is cancelled while it draws; what it has judged is kept.
    page.get_by_text("Edits towards a target").click()
    page.locator(".st-key-goal-edits").get_by_text("1", exact=True).click()
    expect(page.get_by_text(re.compile("no p is below"))).to_be_visible()
    page.get_by_role("button", name="Start the search").click()
    expect(page.get_by_text(re.compile("^Drawing "))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Go on with the search")).to_be_visible()
    expect(page.get_by_text("Best sets, judged without drawing")).to_be_visible()
    page.screenshot(path=PICTURES / "10-goal.png", full_page=True)
    assert faults == []
