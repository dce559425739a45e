"""The page of a set in a real browser: filters, keyboard, large pictures, and no request that leaves it."""

import contextlib
import io
import os
import shutil
import socket

import PIL.Image
import pytest
from datasets import Dataset
from playwright.sync_api import Error, expect, sync_playwright

from dsco_hf import look
from dsco_hf.studies.figures import page as figures
from hub.samples import HOSTILE_NAMES, RECORD, RESULTS, tiny_dataset


pytestmark = pytest.mark.slow
NAMES = ["<script>alert(1)</script>", "cat"]
NAMES += [name for name in HOSTILE_NAMES if len(name) < 99 and name not in NAMES]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    found = [{"executable_path": path} for path in map(shutil.which, BROWSERS) if path]
    with sync_playwright() as tool:
        for options in (*found[:1], {}, {"channel": "chrome"}):  # that of playwright; Chrome where systems have it
            with contextlib.suppress(Error):
                opened = tool.chromium.launch(**options)
                break
        else:
            (pytest.fail if "CI" in os.environ else pytest.skip)(
                "there is no browser: `make browser` or `.venv/bin/playwright install chromium` brings one"
            )
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, tmp_path, monkeypatch):
    """Opens a page of a set; afterwards, nothing may have been asked for, shown as a dialog, or gone wrong."""
    monkeypatch.setattr(figures, "COLUMNS", 3)
    monkeypatch.setattr(figures, "SHEET", 6)
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: wrong.append(dialog.message) or dialog.dismiss())
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))

    def of(dataset, **told):
        page.goto(look(dataset, tmp_path / "look.html", progress=False, **told).as_uri())
        return page

    yield of
    assert not wrong and {url for url in asked if not url.startswith("data:")} == {(tmp_path / "look.html").as_uri()}
    page.close()


def shown(page):
    return [text.split()[1] for text in page.locator("li:visible small").all_text_contents()]


def test_filters_leave_what_they_say(opened):
    """Classes are named with what would be code; blocks are told of drawn rows only."""
    small = tiny_dataset(2, NAMES, real=3)
    blocks = [row % 2 for row in range(len(small))]
    small = small.remove_columns("block").add_column("block", blocks)
    page = opened(small, record=RECORD, results=RESULTS)
    assert page.locator("h2").first.inner_text() == NAMES[0] and page.locator("script").count() == 1
    assert page.get_by_label("class").locator("option").all_inner_texts()[:3] == ["all", *NAMES[:2]]
    page.get_by_label("class").select_option(label="cat")
    assert shown(page) == ["2", "3"] and page.locator("output").inner_text() == f"2 of {len(small)} images"
    page.get_by_label("block").select_option("1")
    assert shown(page) == ["3"]
    page.get_by_label("class").select_option("")
    page.get_by_label("block").select_option("")
    page.get_by_label("source").select_option("real")
    last = len(small) - 1
    assert shown(page) == [str(row) for row in range(last - 2, last + 1)]
    assert page.locator("section:visible").count() == 2  # classes without such an image are away


def test_one_click_or_key_shows_an_image_large(opened):
    page = opened(tiny_dataset([4, 1]), real=tiny_dataset(3, seed=1))
    dialog = page.get_by_role("dialog")
    page.locator("li button").nth(1).click()
    expect(dialog).to_be_visible()
    assert "row 1" in dialog.inner_text() and "nearest" in dialog.inner_text()
    assert dialog.get_by_role("img").all()[1].get_attribute("aria-label") == "nearest real image"
    assert dialog.get_by_role("img").first.bounding_box()["width"] > 200
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.locator("li button").first.focus()
    for key, row in {"ArrowRight": "1", "End": "3", "Home": "0", "ArrowLeft": "0", "ArrowDown": "3"}.items():
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.innerText").split()[1] == row
    page.keyboard.press("Tab")  # one stop for a class
    assert page.evaluate("document.activeElement.closest('section').querySelector('h2').innerText") == "dog"
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("button", name="Close")).to_be_focused()
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()


def test_every_picture_is_the_images_own(opened):
    """Plain colours on three sheets, as the browser draws them; each is called by its class."""
    small = tiny_dataset(8, side=4, mode="RGB")
    colours = [(30 * row % 256, 255 - 30 * row % 256, 16 * row % 256) for row in range(16)]
    images = [PIL.Image.new("RGB", (8, 8), colour) for colour in colours]
    page = opened(Dataset.from_dict({**small.to_dict(), "image": images}, features=small.features))
    for row, picture in enumerate(page.get_by_role("img").all()):
        taken = PIL.Image.open(io.BytesIO(picture.screenshot())).convert("RGB")
        assert taken.getpixel((taken.width // 2, taken.height // 2)) == colours[row]
        assert taken.getpixel((1, 1)) == taken.getpixel((taken.width - 2, taken.height - 2)) == colours[row]
        assert picture.get_attribute("aria-label") == small.features["label"].names[row // 8]


def test_it_follows_the_readers_colours_and_its_own_policy(opened):
    page, paper = opened(tiny_dataset(1)), "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) != light == "rgb(255, 255, 255)"
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy


def test_what_would_get_in_is_not_run_and_asks_for_nothing(browser, tmp_path):
    """A page with somebody's script and picture in it: the policy keeps both from doing anything."""
    path = look(tiny_dataset(1), tmp_path / "look.html", progress=False)
    page, refused = browser.new_page(), []
    page.on("console", lambda message: refused.append(message.text))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        foreign = f"<img src='http://127.0.0.1:{server.getsockname()[1]}/x.png'>"
        foreign += "<img src='data:,' onerror='document.title = 1'><script>document.title = 2</script>"
        path.write_text(path.read_text("utf-8").replace("<main>", f"<main>{foreign}"), "utf-8")
        page.goto(path.as_uri())
        page.get_by_label("source").select_option("synthetic")
        assert page.title() == "A concentrated set" and page.locator("output").inner_text() == "2 of 2 images"
        with pytest.raises(TimeoutError):
            server.accept()
    assert sum("violates" in text for text in refused) == 3
    page.close()
