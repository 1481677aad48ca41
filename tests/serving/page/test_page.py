# SPDX-License-Identifier: Apache-2.0
"""The page in a real Chromium, over a real server: by mouse and by keyboard, light and dark, wide and narrow."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect
from prometheus_client.parser import text_string_to_metric_families

from serving.engine import Loaded
from tests.serving.page.conftest import MARKUP, SCREENSHOTS, Serving
from tests.serving.support import Switch, wait_until

AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text(encoding="utf-8")
USER = "10"


@pytest.fixture(scope="module")
def address(serving: Serving, named: Callable[..., Loaded]) -> Iterator[str]:
    """A server whose version 2 is live and whose version 1, the former champion, is still loaded."""
    source = Switch(v1=lambda: named(1), v2=lambda: named(2, rank_weight=25.0))
    with serving(source) as address:
        wait_until(lambda: httpx.get(f"{address}/readyz").is_success)
        source.wanted = 2
        wait_until(lambda: len(httpx.get(f"{address}/page/bundles").json()["bundles"]) == 2)
        yield address


def supposed(address: str, **asked: Any) -> dict[str, Any]:
    answer = httpx.post(f"{address}/page/what-if", json=asked, timeout=60)
    assert answer.is_success
    return answer.json()


def ids(things: Locator) -> list[str]:
    return things.evaluate_all("found => found.map((one) => one.dataset.item ?? '')")


def lists(page: Page) -> list[list[str]]:
    """All at one moment: a list may give way to another while it is read."""
    look = "lists => lists.map((list) => [...list.querySelectorAll('.item')].map((one) => one.dataset.item))"
    return page.locator("#columns .list").evaluate_all(look)


def history(page: Page) -> list[str]:
    """Oldest first, as the models read it."""
    return ids(page.locator("#history > li"))[::-1]


def settled(page: Page, expected: list[list[str]]) -> None:
    """Wait until the page shows these lists."""

    def shown() -> bool:
        page.wait_for_timeout(20)
        return lists(page) == expected

    wait_until(shown)


def items(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def opened(page: Page, address: str, user: str = USER) -> dict[str, Any]:
    """The page, once it shows a user's list, which is given."""
    page.goto(address)
    page.get_by_role("combobox", name="User").fill(user)
    page.get_by_role("option", name=re.compile(f"^{re.escape(user)}, ")).click()
    own = supposed(address, user_id=user)
    settled(page, [items(own)])
    return own


def test_search_then_a_list_then_another_history_then_another_list(page: Page, address: str) -> None:
    own = opened(page, address)
    past = [event["item_id"] for event in own["history"]]
    assert history(page) == past

    page.get_by_role("button", name=re.compile("^Remove: ")).first.click()
    settled(page, [items(supposed(address, user_id=USER, history=past[:-1]))])
    assert lists(page) != [items(own)]

    page.get_by_role("button", name=re.compile("^Earlier: ")).first.click()
    past = [*past[:-3], past[-2], past[-3]]
    assert history(page) == past
    settled(page, [items(supposed(address, user_id=USER, history=past))])

    before = lists(page)[0]
    page.get_by_role("combobox", name="Add a title").fill("no. 53")
    page.locator("#add-options li").click()
    assert history(page) == [*past, "53"]
    changed = items(supposed(address, user_id=USER, history=[*past, "53"]))
    settled(page, [changed])
    for place, item in enumerate(changed):
        moved = page.locator(f'.item[data-item="{item}"] .moved')
        came = before.index(item) if item in before else None
        if came == place:
            expect(moved).to_have_count(0)
        else:
            mark = "new" if came is None else f"{'▲' if came > place else '▼'} {abs(came - place)}"
            expect(moved).to_have_text(mark)

    page.get_by_role("button", name="Undo all changes").click()
    settled(page, [items(own)])
    assert history(page) == [event["item_id"] for event in own["history"]]


def test_an_item_shows_what_each_event_does_to_it(page: Page, address: str) -> None:
    own = opened(page, address)
    item = own["items"][3]
    button = page.locator(f'.item[data-item="{item["item_id"]}"]')
    for look in (button.hover, button.focus):
        look()
        shown = [float(text.replace("−", "-")) for text in page.locator("#history .number").all_inner_texts()][::-1]
        assert shown == pytest.approx(item["effects"], abs=0.0051)
        page.mouse.move(0, 0)
    best = sorted(range(len(shown)), key=lambda j: -item["effects"][j])[:3]
    causes = {own["history"][j]["item_id"] for j in best if item["effects"][j] > 0}
    assert set(ids(page.locator("#history .cause"))) == causes
    page.locator("#user").focus()
    expect(page.locator("#history .number")).to_have_count(0)
    button.click()
    page.locator("#user").focus()
    page.mouse.move(0, 0)
    expect(page.locator("#history .number")).to_have_count(len(shown))


def test_two_versions_stand_beside_each_other(page: Page, address: str) -> None:
    opened(page, address)
    page.get_by_label("beside").select_option(label="1")
    live, former = (items(supposed(address, user_id=USER, version=version)) for version in (2, 1))
    assert live != former
    settled(page, [live, former])
    expect(page.locator("#columns h3")).to_have_text(["Version 2, live", "Version 1"])
    marked = page.locator("#columns .list").nth(1).locator(".item:has(.moved)")
    assert ids(marked) == [item for place, item in enumerate(former) if live[place] != item]
    page.screenshot(path=SCREENSHOTS / "compared.png", full_page=True)
    page.get_by_label("Version", exact=True).select_option(label="1")
    settled(page, [former])


def test_all_of_it_can_be_done_by_keyboard(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("#columns .item")).to_have_count(10)
    focused = page.locator(":focus")

    def tab_to(name: str) -> None:
        for _ in range(200):
            page.keyboard.press("Tab")
            ring = focused.evaluate("e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth]")
            assert ring == ["solid", "2px"], "the focus is seen wherever it is"
            if focused.evaluate("(e, name) => (e.ariaLabel ?? e.labels?.[0]?.textContent ?? e.textContent).startsWith(name)", name):
                return
        raise AssertionError(f"{name!r} is not reached")

    tab_to("User")
    page.keyboard.type(USER)
    expect(page.locator("#user")).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowDown")
    active = page.locator("#user").get_attribute("aria-activedescendant")
    expect(page.locator(f"#{active}")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Enter")
    settled(page, [items(supposed(address, user_id=USER))])

    tab_to("Add a title")
    page.keyboard.type("horror")
    expect(page.locator("#add-options li")).to_have_count(10)
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    wanted = page.locator("#add-options li").last.inner_text()
    expect(page.locator('#add-options li[aria-selected="true"]')).to_have_text(wanted)
    page.keyboard.press("Escape")
    expect(page.locator("#add-options")).to_be_hidden()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#add-options")).to_be_visible()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page.locator("#history > li").first).to_contain_text(wanted)
    settled(page, [items(supposed(address, user_id=USER, history=history(page)))])

    tab_to("Remove")
    newest = history(page)[-1]
    page.keyboard.press("Enter")
    assert history(page)[-1] != newest
    expect(focused).to_have_attribute("aria-label", re.compile("^Remove: "))
    expect(page.locator("#announce")).to_have_text(re.compile("The list (changed|is the same)"))
    settled(page, [items(supposed(address, user_id=USER, history=history(page)))])
    tab_to("1")
    assert focused.get_attribute("data-item") == lists(page)[0][0]
    assert page.locator("#history .number").count() == len(history(page))
    page.keyboard.press("Enter")
    expect(focused).to_have_attribute("aria-pressed", "true")


def test_light_and_dark_follow_the_system_until_one_is_chosen(page: Page, address: str) -> None:
    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 765

    opened(page, address)
    switch = page.locator("#theme")
    for scheme, bright in (("light", True), ("dark", False)):
        page.emulate_media(color_scheme=scheme)
        assert (brightness() > 0.5) is bright
        page.screenshot(path=SCREENSHOTS / f"{scheme}.png", full_page=True)
    switch.click()
    expect(switch).to_have_text("Theme: light")
    assert brightness() > 0.5
    page.reload()
    expect(switch).to_have_text("Theme: light")
    assert brightness() > 0.5
    switch.click()
    page.emulate_media(color_scheme="light")
    assert brightness() < 0.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, address: str, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    opened(page, address)
    page.get_by_label("beside").select_option(label="1")
    expect(page.locator("#columns .list")).to_have_count(2)
    page.get_by_role("button", name=re.compile("^Remove: ")).first.click()
    expect(page.locator("#reset")).to_be_visible()
    page.locator("#columns .item").first.hover()
    page.get_by_role("combobox", name="Add a title").fill("horror")
    expect(page.locator("#add-options li")).to_have_count(10)
    page.keyboard.press("ArrowDown")
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})")
    problems = [f"{v['id']}: {node['html'][:160]}: {node['failureSummary']}" for v in found["violations"] for node in v["nodes"]]
    assert problems == []
    assert {"color-contrast", "aria-required-attr", "label"} <= {rule["id"] for rule in found["passes"]}


@pytest.mark.parametrize("width", [360, 768, 1240, 1920])
def test_nothing_is_wider_than_the_window(page: Page, address: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    opened(page, address)
    page.get_by_label("beside").select_option(label="1")
    expect(page.locator("#columns .list")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=SCREENSHOTS / f"{width}.png", full_page=True)


def test_titles_with_markup_are_text(page: Page, address: str) -> None:
    opened(page, address, user="who?")
    page.get_by_role("combobox", name="Add a title").fill("<img")
    expect(page.locator("#add-options li")).to_have_text(MARKUP)
    page.keyboard.press("Enter")
    expect(page.locator("#history .title")).to_have_text(MARKUP)
    expect(page.locator("#history button").last).to_have_attribute("aria-label", f"Remove: {MARKUP}")
    settled(page, [items(supposed(address, user_id="who?", history=["7"]))])
    expect(page.locator(".reason .name", has_text=MARKUP).first).to_be_attached()
    page.get_by_role("button", name=re.compile("^Remove: ")).click()
    page.get_by_role("combobox", name="User").fill(MARKUP)
    expect(page.locator("#user-options li")).to_contain_text(MARKUP)
    page.keyboard.press("Enter")
    expect(page.locator("#history-note")).to_contain_text(MARKUP)
    assert page.evaluate("window.taken") is None
    assert page.locator("main img, main script").count() == 0


def test_the_figures_are_the_servers(page: Page, address: str) -> None:
    assert httpx.post(f"{address}/v1/recommend", json={"user_id": ""}).status_code == 422
    assert httpx.post(f"{address}/v1/recommend", json={"user_id": "who?"}, timeout=60).json()["flags"] == ["new_user"]
    opened(page, address)
    stages = page.locator("#stages .name").all_inner_texts()
    assert stages == ["features", "retrieve", "items", "rank", "explain", "together"]
    expect(page.locator("#live dd").first).not_to_have_text("–", timeout=20_000)
    live = dict(zip(page.locator("#live dt").all_inner_texts(), page.locator("#live dd").all_inner_texts(), strict=True))
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    rejected = sum(s.value for family in families for s in family.samples if s.name == "recsys_rejected_total")
    assert float(live["rejected"]) == rejected >= 1
    assert float(live["new user"]) == 1
    titles = page.locator("#report h3").all_inner_texts()
    assert titles[:2] == ["Ranking: AUC", "Retrieval: recall@10"]
    first = httpx.get(f"{address}/page/report").json()["plots"][0]["bars"]
    shown = page.locator("#report .figure").first.locator(".number").all_inner_texts()
    assert shown == [f"{bar['value']:.4f}" for bar in first]


def test_quantiles_are_the_bounds_of_the_buckets_between_two_readings(page: Page, address: str) -> None:
    page.goto(address)

    def reading(*counts: int) -> str:
        bounds = ("0.01", "0.1", "1.0", "+Inf")
        line = 'recsys_request_seconds_bucket{{le="{}",route="/v1/rank"}} {}'
        other = 'recsys_request_seconds_bucket{le="+Inf",route="/metrics"} 900'
        return "\n".join([*(line.format(bound, count) for bound, count in zip(bounds, counts, strict=True)), other])

    script = """async ([before, now]) => {
      const { parse, summary } = await import("/page/static/metrics.js");
      return summary({ samples: parse(now), at: 5000 }, before && { samples: parse(before), at: 0 });
    }"""
    earlier, later = reading(90, 95, 99, 100), reading(90, 104, 109, 110)
    found = page.evaluate(script, [earlier, later])
    assert (found["rate"], found["p50"], found["p99"]) == (2, 100, 1000)
    found = page.evaluate(script, [None, later])
    assert (found["rate"], found["p50"], found["p99"]) == (None, 10, 1000)
    restarted = page.evaluate(script, [later, reading(1, 1, 1, 1)])
    assert (restarted["rate"], restarted["p50"]) == (0, 10)


def test_a_server_that_is_not_ready_says_so_and_recovers(page: Page, serving: Serving, named: Callable[..., Loaded]) -> None:
    source = Switch()
    with serving(source) as address:
        page.goto(address)
        expect(page.locator("#state")).to_have_text(re.compile("^The server is not ready: .*not in the registry"))
        expect(page.locator("#columns .item")).to_have_count(0)
        page.screenshot(path=SCREENSHOTS / "not_ready.png")
        source.loaders[1] = lambda: named(1)
        source.wanted = 1
        expect(page.locator("#columns .item")).to_have_count(10)
        expect(page.locator("#state")).to_be_hidden()
        expect(page.locator("#error")).to_be_hidden()
        expect(page.locator("#model")).to_contain_text("recsys, version 1")
    expect(page.locator("#state")).to_have_text("The server cannot be reached.")
