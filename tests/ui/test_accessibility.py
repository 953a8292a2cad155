"""Every page in a real browser, light and dark: axe-core's WCAG 2.2 A and AA rules, no sideways scrolling at 1280 px,
and a cell chosen from the keyboard alone.

axe-core (Deque, MPL-2.0) comes with axe-playwright-python. What Streamlit draws itself and a page cannot change is
named in ``STREAMLIT``; anything else is ours.
"""

from __future__ import annotations

import pytest

from tests.ui.test_journey import BEFORE, PATIENCE_S, address, browser

__all__ = ["address", "browser"]

PAGES = ("", "compare", "cell_types", "screen", "evidence", "report", "about")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
STREAMLIT: dict[str, tuple[str, ...]] = {}
"""axe rule -> parts of the HTML of elements that are Streamlit's own."""


def faults(page: object) -> list[str]:
    """One line per element that breaks a rule and is ours."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"runOnly": RULES, "resultTypes": ["violations"]}).response
    return [
        f"{rule['id']}: {node['html'][:200]} ({node['failureSummary']})"
        for rule in found["violations"]
        for node in rule["nodes"]
        if not any(part in node["html"] for part in STREAMLIT.get(rule["id"], ()))
    ]


def settle(page: object) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * PATIENCE_S)
    page.locator("[data-testid='stApp'][data-test-script-state='notRunning']").wait_for()
    expect(page.locator("[data-testid='stSkeleton']")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_can_be_read_by_everybody(address: str, browser: object, scheme: str) -> None:
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 800})
    page.emulate_media(color_scheme=scheme)
    found: dict[str, list[str]] = {}
    for name in PAGES:
        page.goto(f"{address}/{name}")
        if not name:
            page.get_by_alt_text(BEFORE).wait_for()
        settle(page)
        said = faults(page)
        wide = page.evaluate(
            "[...document.querySelectorAll('html, [data-testid=stMain], [data-testid=stSidebarContent]')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => `${e.tagName} ${e.scrollWidth}`)"
        )
        if said or wide:
            found[name or "explore"] = said + [f"scrolls sideways: {one}" for one in wide]
    page.close()
    assert found == {}


def test_a_cell_is_found_and_chosen_from_the_keyboard(address: str, browser: object) -> None:
    from playwright.sync_api import expect

    page = browser.new_page()
    page.goto(address)
    page.get_by_alt_text(BEFORE).wait_for()
    settle(page)
    heading = page.get_by_role("heading", name="Niche of")
    first = heading.inner_text()
    page.locator(".st-key-find summary").focus()
    page.keyboard.press("Enter")
    gene = page.get_by_role("textbox", name="Gene", exact=True)
    expect(gene).to_be_visible()
    for _ in range(3):  # the field follows the heading of the panel in the order of focus
        page.keyboard.press("Tab")
        if gene.evaluate("e => e === document.activeElement"):
            break
    expect(gene).to_be_focused()
    page.keyboard.type("CD8A")
    page.keyboard.press("Enter")
    listed = page.locator(".st-key-find-cell input")
    expect(listed).to_be_visible()
    settle(page)
    for _ in range(20):  # the list opens at the second stroke, and a rerun of the page closes it
        listed.press("ArrowDown")
        page.wait_for_timeout(500)
        if page.get_by_role("option").count():
            break
    expect(page.get_by_role("option").first).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(heading).not_to_have_text(first)
    page.close()
