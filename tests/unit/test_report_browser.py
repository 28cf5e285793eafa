"""The page in a headless Chromium: it opens offline, without an error, and the mouse and the keyboard work."""

import io

import pytest

from se_prune.report import write_gate_report, write_report
from se_prune.results import GateReport
from tests.browser import Browser, find_browser
from tests.runs import CLASSES, make_run

pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs a Chromium")

GATES = "#run-1-figure-gates"
SHOWN = f"{GATES} .panel:not([hidden]) svg.figure"
TIP = "document.getElementById('tip')"


@pytest.fixture(scope="module")
def browser():
    opened = Browser(find_browser())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report([make_run()], tmp_path_factory.mktemp("page") / "one.html")[0]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    runs = [make_run(), make_run(name="again", plan=make_run().plan)]
    return write_report(runs, tmp_path_factory.mktemp("page") / "two.html")[0]


def pixels(png):
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def brightness(image):
    small = image.convert("L").resize((64, 64))
    return sum(small.tobytes()) / 64**2


def tip(browser):
    return browser.run(f"{TIP}.hidden ? null : {TIP}.textContent")


def hover(browser, selector, across, down):
    left, top, width, height = browser.box(selector)
    browser.mouse("mouseMoved", left + across * width, top + down * height)
    return tip(browser)


def test_it_opens_offline_without_an_error(browser, page, compared):
    for file in (page, compared):
        browser.open(file)
        assert browser.run("document.documentElement.dataset.ready") == "yes"
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [file.resolve().as_uri()]
    browser.run("void fetch('https://example.org/').catch(() => {})")
    browser.run("new Promise((done) => { const i = new Image(); i.onerror = done; i.src = 'none.png'; })")
    assert browser.errors, "what goes wrong is seen"


def test_hovering_a_gate_says_channel_class_and_value(browser, page):
    browser.open(page)
    said = hover(browser, SHOWN, (17 + 0.5) / 64, 0.5)
    name, value = said.split("\n")
    assert name in (*CLASSES, "mean of all classes")
    profile = make_run().profiles[2]
    gates = profile.mean if name not in CLASSES else profile.per_class[name]
    channel, gate = value.removeprefix("channel ").split(": gate ")
    assert int(channel) == 17
    assert float(gate) == pytest.approx(gates[17], abs=0.002)
    browser.mouse("mouseMoved", 1, 1)
    assert tip(browser) is None


def test_hovering_a_bar_says_what_it_is(browser, page):
    browser.open(page)
    assert hover(browser, "#run-1-figure-channels svg.figure", 0.02, 0.03) == (
        "conv1 (stream): 8 of 16 channels kept"
    )


def test_a_class_is_brought_forward_and_back(browser, page):
    browser.open(page)
    button = f"{GATES} button[data-class='3']"
    opacity = (
        f"[...document.querySelectorAll('{SHOWN}')].map((f) => "
        "[...f.querySelectorAll('.curve')].map((e) => Number(getComputedStyle(e).opacity)))"
    )
    spreads = f"document.querySelectorAll('{SHOWN} .spread').length"
    browser.click(button)
    assert browser.run(f'document.querySelector("{button}").getAttribute("aria-pressed")') == "true"
    for lines in browser.run(opacity):
        assert [value for i, value in enumerate(lines) if i not in (3, 10)] == [0.14] * 9
        assert (lines[3], lines[10]) == (1, 1)
    assert browser.run(spreads) == 2, "dense and pruned"
    assert hover(browser, SHOWN, 0.5, 0.5).split("\n")[0] in {CLASSES[3], "mean of all classes"}
    browser.click(button)
    assert {value for lines in browser.run(opacity) for value in lines} == {1}
    assert browser.run(spreads) == 0


def test_another_site_is_shown(browser, page):
    browser.open(page)
    heads = f"[...document.querySelectorAll('{GATES} .panel')].map((p) => p.hidden)"
    assert browser.run(heads) == [True, True, False, True]
    browser.run(
        f"(() => {{ const s = document.querySelector('{GATES} select'); s.value = '0';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run(heads) == [False, True, True, True]


def view(browser, selector):
    return browser.run(f"document.querySelector('{selector} .lines').getAttribute('viewBox')").split()


def test_dragging_zooms_and_a_double_click_goes_back(browser, page):
    browser.open(page)
    whole = view(browser, SHOWN)
    left, top, width, height = browser.box(SHOWN)
    browser.mouse("mouseMoved", left + width / 4, top + height / 2)
    browser.mouse("mousePressed", left + width / 4, top + height / 2, button="left", clickCount=1)
    browser.mouse("mouseMoved", left + width / 2, top + height / 2, button="left")
    browser.mouse("mouseReleased", left + width / 2, top + height / 2, button="left", clickCount=1)
    x, _, across, _ = (float(number) for number in view(browser, SHOWN))
    assert (x, across) == pytest.approx((15.5, 16), abs=0.2)
    labels = browser.run(f"[...document.querySelectorAll('{SHOWN} .ticks-x')][0].textContent")
    assert labels.startswith("16")
    assert hover(browser, SHOWN, 0.5, 0.5).split("\n")[1].startswith(("channel 23", "channel 24"))
    for clicks in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            browser.mouse(kind, left + width / 2, top + height / 2, button="left", clickCount=clicks)
    assert view(browser, SHOWN) == whole
    assert browser.errors == []


def test_the_keyboard_reaches_figures_and_controls(browser, page):
    browser.open(page)
    browser.run(f"document.querySelector('{SHOWN}').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    name, value = tip(browser).split("\n")
    assert (name, value.split(":")[0]) == ("mean of all classes", "channel 2")
    browser.press("+")
    assert float(view(browser, SHOWN)[2]) == 32
    browser.press("Escape")
    assert float(view(browser, SHOWN)[2]) == 64
    reachable = browser.run(
        "[...document.querySelectorAll('a, button, select, summary, svg.figure, .scroll')]"
        ".filter((e) => e.tabIndex < 0).length"
    )
    assert reachable == 0


def test_links_lead_to_sections_far_down(browser, compared):
    browser.open(compared)
    for key in ("run-2-classes", "run-1-gates", "run-2-reproduce"):
        browser.run(f"document.querySelector('a[href=\"#{key}\"]').click()")
        top = browser.run(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done("
            f"document.getElementById('{key}').getBoundingClientRect().top))))"
        )
        assert -40 < top < 900, key


def test_points_move_with_the_zoom(browser, compared):
    browser.open(compared)
    figure = "#figure-tradeoff-macs"
    where = f"document.querySelector('{figure} circle').getAttribute('cx')"
    before = float(browser.run(where).rstrip("%"))
    browser.click(f"{figure} button[data-zoom='in']")
    after = float(browser.run(where).rstrip("%"))
    assert after == pytest.approx(50 + 2 * (before - 50), abs=0.1)
    browser.click(f"{figure} button[data-zoom='all']")
    assert float(browser.run(where).rstrip("%")) == pytest.approx(before)


@pytest.mark.parametrize(("width", "height"), [(1100, 900), (390, 844)], ids=["desk", "phone"])
def test_light_and_dark_are_drawn(browser, page, width, height):
    images = []
    for dark in (False, True):
        browser.open(page, width=width, height=height, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        browser.run(f"document.querySelector('{GATES}').scrollIntoView({{behavior: 'instant'}})")
        images.append(pixels(browser.screenshot()))
    light, dark = images
    assert light.size == dark.size == (width, height)
    assert brightness(light) > 200 > 80 > brightness(dark)
    for image in images:
        colours = image.getcolors(1 << 24)
        assert len(colours) > 100, "not blank"
        assert max(count for count, _ in colours) > 0.3 * width * height


def test_it_prints(browser, page):
    browser.open(page, dark=True)
    paper = browser.pdf()
    assert paper.startswith(b"%PDF")
    assert paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") >= 3
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_gates_alone_open_as_well(browser, tmp_path):
    run = make_run()
    report = GateReport(
        name="zoo:se_resnet20",
        command="se-prune analyze zoo:se_resnet20 --pretrained --data fashion-mnist --report gates.html",
        data="fashion-mnist",
        n=12_000,
        seed=0,
        outlook="The gates are alive.",
        environment=run.environment,
        sites=run.sites,
        profiles=run.profiles,
    )
    browser.open(write_gate_report(report, tmp_path / "gates.html")[0])
    assert browser.errors == []
    assert browser.run("document.querySelector('.verdict').textContent") == "The gates are alive."
    assert hover(browser, "#network-figure-gates .panel:not([hidden]) svg.figure", 0.5, 0.5)
