"""The page as people have it: `tprl app` in a process of its own, and a browser. `make test-app` runs it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

try:
    import gradio  # noqa: F401
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError as error:
    pytest.skip(f"{error}: make test-app", allow_module_level=True)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

PATIENCE = 120_000  # milliseconds
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
# Runs the command; whoever wants to reach another machine is named on stderr, and does not get there.
WITHOUT_NETWORK = """
import socket, sys
def is_here(host):
    return host in (None, "", "localhost", b"localhost") or str(host).startswith(("127.", "0.0.0.0", "::1"))
def refuse_elsewhere(function, host_of):
    def call(*arguments, **keywords):
        host = host_of(*arguments)
        if not is_here(host):
            print("ELSEWHERE", host, file=sys.stderr, flush=True)
            raise OSError(f"no network: {host}")
        return function(*arguments, **keywords)
    return call
socket.getaddrinfo = refuse_elsewhere(socket.getaddrinfo, lambda host, *_: host)
for name in ("connect", "connect_ex"):
    own = getattr(socket.socket, name)
    host_of = lambda self, address: address[0] if isinstance(address, tuple) else None
    setattr(socket.socket, name, refuse_elsewhere(own, host_of))
from tprl_hf.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
# Of every text in a card: how much lighter or darker it is than what it stands on, by the formula of WCAG 2.
CONTRASTS = """() => {
  const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (colours) => {
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
      (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  };
  const light = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  const found = {};
  for (const element of document.querySelectorAll(".tprl *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!text || !element.offsetParent) continue;
    const grounds = [];
    for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const b = light(over(["white", ...grounds]));
    const a = light(over(["white", ...grounds, getComputedStyle(element).color]));
    found[text] = Math.max(a, b) / Math.min(a, b);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a page with the embedded model is served, by a process that cannot reach other machines."""
    log = tmp_path_factory.mktemp("log") / "stderr"
    command = [sys.executable, "-c", WITHOUT_NETWORK, "app", "--port", "0", "--max-new-tokens", "8"]
    with log.open("w") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        line = server.stdout.readline()
        found = re.search(r"The embedded model at (http://127\.0\.0\.1:\d+/)", line)
        assert found, line + log.read_text()
        yield found[1]
        assert "ELSEWHERE" not in log.read_text()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Browser, address: str, size: str = "desktop", scheme: str = "light") -> Page:
    """A person's page. It asks this server alone, and logs no error."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on(
        "request",
        lambda asked: asked.url.startswith((address, "data:", "blob:")) or page.errors.append(asked.url),
    )
    page.goto(address)
    page.wait_for_selector("#ask")
    return page


def wait(page: Page, selector: str) -> None:
    page.wait_for_selector(selector)
    page.wait_for_timeout(300)  # until it has faded in


def upload(page: Page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(file)


def check_looks(page: Page, path: Path) -> None:
    """A screenshot for eyes; and what a program can see: nothing juts out, pictures are there, texts can be read."""
    page.screenshot(path=path, full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    sizes = page.evaluate("[...document.querySelectorAll('.tprl img')].map((i) => i.naturalWidth)")
    assert all(sizes), path
    low = {text: ratio for text, ratio in page.evaluate(CONTRASTS).items() if ratio < 4.5}
    assert not low, (path, low)
    shown = page.inner_text("body")
    assert "/tmp" not in shown and ".png" not in shown


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_that_can_be_done_is_clicked_through(browser, address, size, scheme, tmp_path):
    page = open_page(browser, address, size, scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
    page.click("#ask")
    wait(page, "#answered table")
    assert page.locator("#answered img").count() == 2
    assert page.locator("#answered td").all_inner_texts()[2::4] == ["144 of 144", "48 of 144"]
    check_looks(page, tmp_path / "ask.png")

    page.get_by_role("tab", name="Two questions").click()
    page.click("#ask-two")
    wait(page, "#both table")
    assert page.locator("#both img").count() == 4 and "of the 48 tokens" in page.inner_text("#both")
    check_looks(page, tmp_path / "two.png")

    page.get_by_role("tab", name="Chat").click()
    for question in ("Is there a purple circle?", "What color is the ring?"):
        page.fill("#turn textarea", question)
        page.click("#say")
        wait(page, f"#talk .turn:has-text('{question}')")
    assert page.locator("#talk .turn").count() == 2
    check_looks(page, tmp_path / "chat.png")
    page.click("#again")
    expect(page.locator("#talk .turn")).to_have_count(0)

    page.get_by_role("tab", name="Steps").click()
    page.click("#show")
    wait(page, "#steps figure")
    assert page.locator("#steps img").count() == 4 + 3
    check_looks(page, tmp_path / "steps.png")
    assert page.errors == []
    page.context.close()


def test_a_picture_of_ones_own_and_what_is_not_one(browser, address, tmp_path):
    page = open_page(browser, address)
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "secret holiday.jpg")
    before = page.get_attribute("#picture img", "src")
    upload(page, tmp_path / "secret holiday.jpg")
    expect(page.locator("#picture img")).not_to_have_attribute("src", before)
    assert "holiday" not in page.inner_text("body")
    Image.effect_noise((90, 60), 80).save(tmp_path / "scan.tiff")  # which browsers do not show
    upload(page, tmp_path / "scan.tiff")
    page.wait_for_function("document.querySelector('#picture img').naturalWidth === 90")
    own = page.get_attribute("#picture img", "src")
    (tmp_path / "words.png").write_text("not a picture")
    Image.new("RGB", (4000, 10)).save(tmp_path / "thread.png")
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 99)
    for file, why in [
        ("words.png", "The picture is not an image that Pillow can read"),
        ("thread.png", "The picture has 4000 x 10 pixels; a side is at most 100 times the other."),
        ("film.mp4", "The embedded model does not read videos (its processor takes none): upload a picture."),
    ]:
        upload(page, tmp_path / file)
        expect(page.locator("#problem")).to_contain_text(why)
        expect(page.locator("#problem")).to_contain_text("The picture above stays.")
    assert page.get_attribute("#picture img", "src") == own
    page.click("#ask")
    wait(page, "#answered table")
    page.get_by_label("Question", exact=True).first.fill(" ")
    page.click("#ask")
    expect(page.locator("#answered")).to_contain_text("Write a question first.")
    page.locator("#examples button").nth(2).click()
    expect(page.get_by_label("Question", exact=True).first).to_have_value(re.compile("Is the .* below the"))
    expect(page.locator("#problem .notice")).to_have_count(0)
    assert page.errors == []
    page.context.close()


def test_the_slider_and_the_pruners_decide_what_is_kept(browser, address):
    page = open_page(browser, address)
    page.locator("#keep input[type=number]").fill("8")
    page.get_by_label("Pruners").click()
    page.get_by_role("option", name="divprune").click()
    page.keyboard.press("Escape")
    page.click("#ask")
    wait(page, "#answered td:has-text('divprune')")
    cells = page.locator("#answered td").all_inner_texts()
    assert cells[0::4] == ["unpruned", "learned", "divprune"]
    assert cells[2::4] == ["144 of 144", "8 of 144", "8 of 144"]
    page.context.close()


def test_two_people_do_not_mix(browser, address):
    people = [open_page(browser, address) for _ in range(2)]
    questions = ["Is there a purple circle?", "What color is the ring?"]
    people[1].locator("#examples button").nth(1).click()
    for person in people:
        person.get_by_role("tab", name="Chat").click()
    for number in range(2):  # both at once
        for person, question in zip(people, questions, strict=True):
            person.fill("#turn textarea", question)
            person.click("#say")
        for person in people:
            expect(person.locator("#talk .turn")).to_have_count(number + 1)
    for person, question in zip(people, questions, strict=True):
        assert person.locator("#talk .turn > .said").all_inner_texts() == [question] * 2
        other = next(one for one in questions if one != question)
        assert other not in person.inner_text("#talk")
    sources = [person.get_attribute("#picture img", "src") for person in people]
    assert sources[0] != sources[1]
    for person in people:
        person.context.close()


def test_a_spaces_folder_serves_its_own_copy(browser, tmp_path):
    from tprl_hf.app.space import write_space
    from tprl_hf.cli.serve import bind

    folder = tmp_path / "space"
    write_space(folder)
    copied = folder / "tprl_hf" / "app" / "page.py"
    copied.write_text(copied.read_text().replace("# Which visual tokens does an answer need?", "# A copy"))
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    # a Space tells gradio by its environment where to listen
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": ""}
    server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment)
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(address, server)
        page = open_page(browser, address)
        expect(page.get_by_role("heading", name="A copy")).to_be_visible()
        page.click("#ask")
        wait(page, "#answered table")
        assert page.errors == []
        page.context.close()
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen) -> None:
    """Until something answers at an address."""
    for _ in range(PATIENCE // 500):
        assert server.poll() is None
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(address):
            return
        time.sleep(0.5)
    pytest.fail(f"nobody answers at {address}")
