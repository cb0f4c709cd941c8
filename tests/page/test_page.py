"""The page in a browser: headless Chromium beside a real relay, whose streams flow between namespaces.

One browser and one relay serve all tests but the one that stops its relay; each test begins with rules of its own.
Needs Chromium, and what requirements-page.lock names; `make test-page` installs both. With SCREENSHOTS=DIR the
pictures for the documentation are left there. axe-core, which judges accessibility, is under the MPL 2.0.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mrelay import reasons
from netns.lab import Lab, Star, eventually
from netns.relay import Relay, rule

if shutil.which("chromium") is None:
    pytest.skip("needs chromium (make test-page)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (make test-page)")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core (make test-page)")
expect = playwright.expect
PATIENCE = 30_000  # milliseconds for whatever is awaited; only a failure takes so long
expect.set_options(timeout=PATIENCE)

pytestmark = [
    pytest.mark.netns,
    pytest.mark.xdist_group("page"),
    pytest.mark.timeout(240),
]  # a browser on a busy machine
URL, OTHER_URL = "http://127.0.0.1:8080/", "http://127.0.0.1:8081/"
SETTINGS = '[relay]\nlisten = "{}"\nworkers = 1\n'
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
# A datagram every two milliseconds to each group, for at most two minutes.
SENDER = """
import socket, sys, time
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
out.bind(("10.99.9.1", 0))
for _ in range(60_000):
    for group in sys.argv[1:]:
        out.sendto(bytes(1000), (group, 5000))
    time.sleep(0.002)
"""
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 320, "height": 640}
Page = Any  # playwright.sync_api.Page, which need not be installed


@contextlib.contextmanager
def sending(star: Star, *groups: str) -> Iterator[None]:
    """A stream to each of these groups meanwhile."""
    command = ["ip", "netns", "exec", star.source.name, sys.executable, "-c", SENDER, *groups]
    sender = subprocess.Popen(command)
    try:
        yield
    finally:
        sender.kill()
        sender.wait()


@contextlib.contextmanager
def ruled(relay: Relay, page: Page, config: str) -> Iterator[None]:
    """The relay has these rules meanwhile, and its page is left before they go."""
    try:
        apply(relay, config)
        yield
    except BaseException as error:
        error.add_note(f"---- relay, standard error:\n{relay.stderr[-8000:]}")
        raise
    finally:
        page.goto("about:blank")
        apply(relay, "")


def apply(relay: Relay, config: str) -> None:
    status, body = relay.request("PUT", "/v1/rules", {"rules": tomllib.loads(config).get("rule", [])})
    assert status == 200, body


def settings(url: str) -> str:
    return SETTINGS.format(urlsplit(url).netloc)


def tokens_of(relay: Relay) -> dict[str, str]:
    text = (relay.state_dir / "tokens").read_text()
    return dict(line.split() for line in text.splitlines() if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def star() -> Iterator[Star]:
    with Lab() as lab:
        yield lab.star(outputs=2)


@pytest.fixture(scope="module")
def relay(star: Star) -> Iterator[Relay]:
    """Without rules; `ruled` gives it some."""
    with Relay(star.relay, settings(URL)) as started:
        yield started


@pytest.fixture(scope="module")
def browser(star: Star, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium in the relay's namespace; it is spoken to over a pipe."""
    wrapper = tmp_path_factory.mktemp("browser") / "chromium"
    wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {star.relay.name} chromium "$@"\n')
    wrapper.chmod(0o755)
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(wrapper), args=FLAGS)
        yield running
        running.close()


class Errors(list[str]):
    """What the browser's console complained of."""

    def watch(self, page: Page) -> None:
        page.on("console", lambda said: self.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.append(str(error)))

    def expect(self, part: str) -> None:
        """There is one of these, and it is meant."""
        found = [error for error in self if part in error]
        assert found, self
        for error in found:
            self.remove(error)


@pytest.fixture
def errors() -> Iterator[Errors]:
    found = Errors()
    yield found
    assert found == []


@pytest.fixture
def page(browser: Any, errors: Errors) -> Iterator[Page]:
    with contextlib.closing(browser.new_context(viewport=DESKTOP)) as context:
        made = context.new_page()
        made.set_default_timeout(PATIENCE)
        errors.watch(made)
        yield made


@pytest.fixture
def shoot(page: Page) -> Callable[[str], None]:
    """Leave a picture of the page under this name, if pictures are asked for."""

    def take(name: str) -> None:
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            save(page, Path(folder) / f"{name}.png")

    return take


def save(page: Page, path: Path) -> None:
    """With few colours, which is how it is drawn, so that it is small."""
    from PIL import Image

    page.evaluate("document.getElementById('said').replaceChildren()")  # it would lie over what is to be seen
    page.screenshot(path=path, full_page=True, animations="disabled")
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
    assert path.stat().st_size < 150_000


def accessible(page: Page, where: str) -> None:
    """axe finds nothing serious or critical, in light and dark."""
    everything = {"resultTypes": ["violations"]}
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):  # all that can differ
        page.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(page, options=everything | rules).response["violations"]
        wrong = [
            (one["id"], one["impact"], node["html"], node.get("failureSummary"))
            for one in found
            for node in one["nodes"]
            if one["impact"] in ("serious", "critical")
        ]
        assert not wrong, f"{where}, {scheme}: {wrong}"
    page.emulate_media(color_scheme="light")


def enter(page: Page, relay: Relay, kind: str = "change", url: str = URL) -> None:
    page.goto(url)
    page.get_by_label("Token").fill(tokens_of(relay)[kind])
    page.get_by_role("button", name="Open").click()


def test_a_rule_from_its_first_to_its_last_day(
    star: Star, relay: Relay, page: Page, errors: Errors, shoot: Callable[[str], None]
) -> None:
    """Added, seen at work, broken, told why, removed; and nothing on the way is inaccessible."""
    with ruled(relay, page, ""), sending(star, "239.1.1.1"):
        page.goto(URL)
        accessible(page, "token")
        page.get_by_label("Token").fill("x" * 43)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_contain_text("does not know this token")
        page.get_by_label("Token").fill(tokens_of(relay)["change"])
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Nothing to forward")
        accessible(page, "no rules")

        page.get_by_role("link", name="Add a rule").click()
        page.get_by_label("Name").fill("studio-a")
        page.get_by_label("From").fill("in0:239.1.1.1")
        page.get_by_label("To", exact=True).fill("out0:239.2.2.2:6000")
        page.get_by_role("button", name="Another output").click()
        page.get_by_label("To, output 2").fill("out1:239.2.2.3:70000")
        page.get_by_role("button", name="Add the rule").click()
        wrong = page.get_by_role("group", name="Not added")
        expect(wrong).to_be_focused()
        expect(wrong.get_by_role("listitem")).to_have_count(2)
        for label in ("From", "To, output 2"):
            field = page.get_by_label(label)
            expect(field).to_have_attribute("aria-invalid", "true")
            assert field.evaluate("node => document.getElementById(node.id + '-wrong').textContent.length") > 20
        expect(page.get_by_label("Name")).to_have_value("studio-a")
        assert relay.rules() == {}
        errors.expect("422")
        accessible(page, "a form that was refused")
        shoot("form")
        wrong.get_by_role("link").first.click()
        expect(page.get_by_label("From")).to_be_focused()
        page.keyboard.type(":5000")
        page.get_by_label("To, output 2").fill("out1:239.2.2.3:6000")
        page.keyboard.press("Enter")

        expect(page.get_by_role("heading", level=1)).to_have_text("studio-a")
        expect(page.locator(".heading .badge")).to_have_text("●forwarding")
        rate = page.locator(".picture .rate").first
        expect(rate).to_have_text(re.compile(r"^[1-9][0-9,]*/s$"))
        flows = page.get_by_role("table", name="Flows")
        expect(flows.get_by_role("rowheader")).to_have_text("10.99.9.1")
        assert relay.stats()["rules"][0]["packets"] > 0
        accessible(page, "a rule")

        page.get_by_role("link", name="Edit").click()
        page.get_by_label("From").fill("in0:239.1.1.1:5004")
        page.get_by_role("button", name="Save").click()
        expect(page.locator(".heading .badge")).to_have_text("○up, silent")
        page.get_by_role("link", name="Why?").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Why studio-a?")
        expect(page.get_by_role("heading", level=2)).to_have_text("Not forwarding")
        expect(page.locator(".stages .failed")).to_contain_text("5000")
        expect(page.locator(".remedy")).to_contain_text("5000")
        accessible(page, "why")
        shoot("why")

        page.get_by_role("link", name="Overview").click()
        dropped = page.get_by_role("table", name="Dropped datagrams by reason")
        expect(dropped).to_contain_text(reasons.DROPS["no_rule"])
        page.get_by_role("table", name="Rules").get_by_role("link", name="studio-a").click()
        page.get_by_role("button", name="Remove").click()
        dialog = page.get_by_role("dialog", name="Remove studio-a?")
        expect(dialog.get_by_role("button", name="Keep it")).to_be_focused()
        accessible(page, "a question")
        dialog.get_by_role("button", name="Remove it").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Nothing to forward")
        assert relay.rules() == {}
        page.get_by_role("button", name="Put it back").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("studio-a")
        assert relay.rules()["studio-a"]["from"] == "in0:239.1.1.1:5004"


CONFIG = (
    rule("studio-a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000", "out1:239.2.2.3:6000")
    + rule("studio-b", "in0:239.1.1.2:5000", "out1:239.2.2.4:6000,ttl=8", health="any,silence=9s")
    + rule("feed-north", "eth9:239.1.1.3:5000", "out0:239.2.2.5:6000")
)


def test_a_rule_shows_what_it_drops(star: Star, relay: Relay, page: Page) -> None:
    """Its own, and not another's."""
    config = rule("slow", "in0:239.1.1.1:5000", "out0:*:*", rate="1pps") + rule(
        "b", "in0:239.1.1.2:5000", "out0:*:*"
    )
    with ruled(relay, page, config), sending(star, "239.1.1.1", "239.1.1.2"):
        enter(page, relay, "look")
        expect(page.get_by_role("heading", level=1)).to_have_text("All 2 rules are forwarding")
        page.get_by_role("table", name="Rules").get_by_role("link", name="slow").click()
        dropped = page.get_by_role("table", name="Dropped datagrams by reason").get_by_role("row").nth(1)
        expect(dropped).to_contain_text(reasons.DROPS["rate_limited"])
        expect(dropped.get_by_role("cell").nth(1)).to_have_text(re.compile(r"^[1-9][0-9.]*$"))
        accessible(page, "a rule that drops")
        page.goto(f"{URL}#/rule/b")
        expect(page.get_by_text("This rule passed on all that it took.")).to_be_visible()


def test_what_it_shows(star: Star, relay: Relay, page: Page, shoot: Callable[[str], None]) -> None:
    """Every page with a relay at work: accessible, in light and dark, and no wider than a phone."""
    with ruled(relay, page, CONFIG), sending(star, "239.1.1.1", "239.1.1.2"):
        enter(page, relay)
        heading = page.get_by_role("heading", level=1)
        expect(heading).to_have_text("1 of 3 rules needs attention")
        rows = page.get_by_role("table", name="Rules").get_by_role("rowheader")
        expect(rows).to_have_text(["feed-north", "studio-a", "studio-b"])
        expect(page.get_by_role("table", name="Rules").get_by_text("forwarding")).to_have_count(2)
        page.get_by_role("searchbox", name="Filter").fill("studio")
        expect(rows).to_have_count(2)
        page.get_by_role("button", name="Rule", exact=True).click()
        page.get_by_role("button", name="Rule", exact=True).click()
        expect(rows).to_have_text(["studio-b", "studio-a"])
        expect(page.get_by_role("columnheader", name="Rule")).to_have_attribute("aria-sort", "descending")
        page.get_by_role("searchbox", name="Filter").fill("")
        accessible(page, "overview")
        narrow(page, "overview")
        pages = {"rule/studio-a": "studio-a", "events": "Events", "relay": "Relay", "add": "Add a rule"}
        for place, title in pages.items():
            page.evaluate("place => { location.hash = `#/${place}`; }", place)
            expect(heading).to_have_text(title)
            expect(heading).to_be_focused()
            accessible(page, place)
            narrow(page, place)
        page.evaluate("location.hash = '#/rule/studio-b'")
        health = page.get_by_role("table", name="Stream health")
        expect(health.get_by_role("rowheader")).to_contain_text("239.1.1.2:5000")
        expect(health.get_by_role("row").nth(1)).to_contain_text("none")
        accessible(page, "stream health")
        page.get_by_role("link", name="Edit").click()
        expect(page.get_by_role("textbox", name="Stream health")).to_have_value("any,silence=9s")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Rule studio-b was saved.")).to_be_visible()
        assert relay.rules()["studio-b"]["health"] == "any,silence=9s", "what was not edited stays"
        page.evaluate("location.hash = '#/'")
        expect(page.locator(".plot .series")).to_have_count(2)
        page.get_by_role("button", name="State", exact=True).click()
        shoot("overview")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size(PHONE)
        expect(page.locator(".picture")).to_have_attribute("width", re.compile("^2[0-9][0-9]$"))
        shoot("phone")


def narrow(page: Page, where: str) -> None:
    """Nothing is wider than a phone, once the page has drawn itself anew."""
    page.set_viewport_size(PHONE)
    wide = partial(page.evaluate, "Math.max(innerWidth, document.documentElement.scrollWidth)")
    eventually(lambda: wide() == PHONE["width"], f"{where} is as narrow as a phone", PATIENCE / 1000)
    page.set_viewport_size(DESKTOP)


def test_many_rules(relay: Relay, page: Page) -> None:
    """More than can be drawn, or listed at once."""
    many = "".join(
        rule(f"r-{n:03}", f"in0:239.1.{n // 200}.{n % 200}:5000", f"out{n % 2}:*:*") for n in range(1, 301)
    )
    with ruled(relay, page, many):
        enter(page, relay, "look")
        expect(page.get_by_role("heading", level=1)).to_have_text("All 300 rules are up, nothing arrives")
        rows = page.get_by_role("table", name="Rules").get_by_role("rowheader")
        expect(rows).to_have_count(50)
        page.get_by_role("button", name="Show 50 more").click()
        expect(rows).to_have_count(100)
        expect(page.locator(".picture .node")).to_have_count(4)
        narrow(page, "300 rules")


def test_with_a_token_for_looking(relay: Relay, page: Page) -> None:
    with ruled(relay, page, CONFIG):
        enter(page, relay, "look")
        page.get_by_role("table", name="Rules").get_by_role("link", name="studio-a").click()
        expect(page.get_by_text("You may only look")).to_be_visible()
        for name in ("Edit", "Remove", "Add rule"):
            assert page.get_by_role("link", name=name).or_(page.get_by_role("button", name=name)).count() == 0
        page.goto(f"{URL}#/add")
        expect(page.get_by_text("You can't change anything here")).to_be_visible()


def test_by_keyboard_alone(relay: Relay, page: Page) -> None:
    with ruled(relay, page, ""):
        keys = page.keyboard
        page.goto(URL)
        expect(page.get_by_label("Token")).to_be_visible()

        def reach(role: str, name: str) -> None:
            """By the tabulator, as far as it takes."""
            wanted = page.get_by_role(role, name=name, exact=True)
            for _ in range(30):
                keys.press("Tab")
                if wanted.evaluate("node => node === document.activeElement"):
                    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                    return
            raise AssertionError(f"{role} {name!r} is not to be reached")

        keys.press("Tab")
        expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
        reach("textbox", "Token")
        keys.type(tokens_of(relay)["change"])
        keys.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("Nothing to forward")
        reach("link", "Add a rule")
        keys.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_be_focused()
        for name, text in (("Name", "k"), ("From", "in0:239.1.1.9:5000"), ("To", "out0:*:*")):
            reach("textbox", name)
            keys.type(text)
        keys.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("k")
        relay.await_rule("k", "up")
        reach("button", "Remove")
        keys.press("Enter")
        expect(page.get_by_role("button", name="Keep it")).to_be_focused()
        keys.press("Escape")
        expect(page.get_by_role("button", name="Remove")).to_be_focused()
        keys.press("Enter")
        reach("button", "Remove it")
        keys.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_be_focused()
        assert relay.rules() == {}


def test_a_relay_that_goes_and_comes_back(star: Star, page: Page, errors: Errors) -> None:
    folder = Path(tempfile.mkdtemp(prefix="mrelay-test-"))
    folder.chmod(0o755)
    try:
        with Relay(star.relay, settings(OTHER_URL), folder=folder) as relay:
            enter(page, relay, url=OTHER_URL)
            expect(page.get_by_text("live")).to_be_visible()
        expect(page.get_by_text("No answer from the relay since")).to_be_visible()
        with Relay(star.relay, settings(OTHER_URL), folder=folder):
            expect(page.get_by_text("live")).to_be_visible()
            expect(page.get_by_text("No answer from the relay since")).to_be_hidden()
            page.goto("about:blank")
    finally:
        shutil.rmtree(folder)
    errors.expect("Failed to load resource: net::ERR_")  # what there was meanwhile
