"""The explorer, also in a real browser if there is one.

The browser tests need chromium, chromedriver (Debian's packages chromium and chromium-driver) and
selenium.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
from conftest import draw_photo
from matplotlib import colormaps
from PIL import Image

from minivit import Preprocess
from minivit.errors import UserError
from minivit.figures import explorer
from minivit.figures.explorer import Page, Pane, explorer_page
from minivit.figures.pages import write_page

GRID, BLOCKS, HEADS = (3, 5), (2, 3, 7), 3
HOSTILE = {
    "markup": "<img src=x onerror='window.pwned=1'>",
    "end of script": "</script><script>window.pwned=1</script><!--",
    "quotes": "\"'`${window.pwned=1} &quot; &lt;b&gt;",
    "terminal": "\x1b[2J\x07red\x00\u2028line\nline",
    "undecodable": "\udcff photo",
    "long": "x" * 5000,
    "right to left": "\u202eقطة مصرية‏ חתול",
}


def random_attn(
    heads=HEADS, grid=GRID, blocks=BLOCKS, seed=0, spread=1.5
) -> dict[int, torch.Tensor]:
    rng, N = np.random.default_rng(seed), 1 + grid[0] * grid[1]
    scores = rng.normal(0, spread, (len(blocks), heads, N, N)).astype(np.float32)
    return dict(zip(blocks, torch.from_numpy(scores).softmax(-1)))


def pane(name="a model", *, seed=0, size=(300, 200), box=None, methods=None, **sizes) -> Pane:
    grid = sizes.get("grid", GRID)
    predictions = [("tabby", 0.75), ("Egyptian Mau", 0.125)]
    return Pane(
        name,
        predictions,
        random_attn(seed=seed, **sizes),
        grid,
        box or (0, 0, *size),
        methods or {},
    )


def held(page: str) -> dict:
    """Return the data in a page."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


def unpack(pane: dict, num_blocks: int) -> list[np.ndarray]:
    """Return the maps (L, H, Q, P) of each method of a page's pane, as its script reads them."""
    data, P = zlib.decompress(base64.b64decode(pane["maps"])), pane["grid"][0] * pane["grid"][1]
    shapes = [(num_blocks, method["heads"], method["queries"]) for method in pane["methods"]]
    rows = sum(np.prod(shape) for shape in shapes)
    steps, codes = np.frombuffer(data, "<f4", rows), np.frombuffer(data, np.uint8, offset=4 * rows)
    values, maps = steps[:, None] * codes.reshape(-1, P), []
    for shape in shapes:
        maps.append(values[: np.prod(shape)].reshape(*shape, P))
        values = values[np.prod(shape) :]
    return maps


def half_step(rows: np.ndarray, steps=255) -> float:
    """Return the largest error of a stored value: half a step of the largest, plus rounding."""
    return rows.max() / (2 * steps) * 1.001


# Without a browser


def test_blocks_8_to_11_of_vit_b16_fit_in_3_mb_at_full_precision():
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    )  # compresses worst
    one = pane(
        heads=12, grid=(14, 14), blocks=range(8, 12), size=noise.size, spread=0.02
    )  # so do rows near uniform
    page = explorer_page([one], noise, "noise.jpg")
    assert 1_000_000 < len(page.encode()) <= 3_000_000
    assert (
        held(page)["stored"]
        == "All heads and patches are stored; rows are rounded to 255 steps of their largest value."
    )


def test_two_models_of_that_size_fit_too_in_fewer_steps():
    panes = [pane(heads=12, grid=(14, 14), blocks=range(8, 12), seed=seed) for seed in (0, 1)]
    page = explorer_page(panes, draw_photo(300, 200), "x.jpg")
    assert len(page.encode()) <= 3_000_000
    assert (
        held(page)["stored"]
        == "All heads and patches are stored; rows are rounded to 100 steps of their largest value."
    )
    for shown, given in zip(held(page)["panes"], panes):
        (maps,) = unpack(shown, 4)
        rows = np.stack([a.numpy() for a in given.attn.values()])[..., 1:]
        assert (abs(maps - rows) <= rows.max(-1, keepdims=True) / 200 * 1.001).all()


@pytest.mark.parametrize(
    ("limit", "heads", "queries", "says"),
    [
        (330_000, 1, 197, "Only the mean of the heads is stored (choose fewer"),
        (90_000, 12, 1, "Only the class token's rows are stored (choose fewer"),
    ],
    ids=["mean of heads", "class token"],
)
def test_a_page_that_is_too_large_stores_less_and_says_so(monkeypatch, limit, heads, queries, says):
    monkeypatch.setattr(explorer, "MAX_BYTES", limit)
    one = pane(heads=12, grid=(14, 14), blocks=range(8, 12))
    page = explorer_page([one], Image.new("RGB", (300, 200)), "x.jpg")
    data = held(page)
    assert len(page) <= limit
    assert says in data["stored"]
    assert data["panes"][0]["methods"] == [
        {"name": "attention", "heads": heads, "queries": queries}
    ]
    rows = np.stack([a.numpy() for a in one.attn.values()])[..., 1:]
    rows = rows.mean(1, keepdims=True) if heads == 1 else rows[:, :, :1]
    np.testing.assert_allclose(unpack(data["panes"][0], 4)[0], rows, rtol=0, atol=half_step(rows))


def test_maps_too_large_for_any_number_of_steps_are_not_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(explorer, "MAX_BYTES", 40_000)

    def try_pane(pane, maps, *_):
        tried.append(maps["attention"].shape[1:3])
        return {}

    monkeypatch.setattr(explorer, "_pane", try_pane)
    explorer_page([pane(heads=12, grid=(14, 14), blocks=(0,))], Image.new("RGB", (30, 20)), "x.jpg")
    assert tried == [(1, 197)]  # of 460,000 values none, of the heads' mean the first


def test_the_page_holds_everything_that_it_was_given():
    rollout = {i: a.mean(0) for i, a in random_attn(seed=1).items()}
    relevance = {i: a[0, 0, 1:].reshape(GRID) for i, a in random_attn(seed=2).items()}
    rows = {i: a[:1, :1] for i, a in random_attn(seed=3).items()}
    one = pane(
        "a model",
        box=(50, 0, 250, 200),
        methods={"rollout": rollout, "relevance": relevance, "rows": rows},
    )
    data = held(explorer_page([one], draw_photo(300, 200), "cat.jpg"))
    assert (data["title"], data["blocks"], data["size"]) == ("cat.jpg", [2, 3, 7], [300, 200])
    (shown,) = data["panes"]
    assert shown["name"] == "a model"
    assert shown["predictions"] == [["tabby", 0.75], ["Egyptian Mau", 0.125]]
    assert shown["box"] == pytest.approx([50 / 300, 0, 250 / 300, 1])
    given = [one.attn, rollout, {i: a.flatten() for i, a in relevance.items()}, rows]
    for maps, blocks, skipped in zip(unpack(shown, 3), given, (1, 1, 0, 1), strict=True):
        for stored, a in zip(maps, blocks.values(), strict=True):
            a = a.numpy()[..., skipped:]
            np.testing.assert_allclose(stored.reshape(a.shape), a, rtol=0, atol=half_step(a))
    sent = base64.b64decode(data["photo"].removeprefix("data:image/jpeg;base64,"))
    assert sent[:3] == b"\xff\xd8\xff"


def test_a_large_photo_is_sent_small_and_a_strip_keeps_its_shape():
    for size, sent in (
        ((3000, 1500), (1000, 500)),
        ((2000, 100), (1000, 50)),
        ((40, 30), (40, 30)),
    ):
        data = explorer._jpeg(Image.new("RGB", size, "teal"))
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == sent


def test_numpy_arrays_and_tensors_of_any_kind_are_the_same():
    attn = random_attn()
    kinds = [
        attn,
        {i: a.numpy() for i, a in attn.items()},
        {i: a.double().requires_grad_() for i, a in attn.items()},
    ]
    pages = {
        explorer_page([Pane("m", [], kind, GRID, (0, 0, 30, 20))], Image.new("RGB", (30, 20)), "x")
        for kind in kinds
    }
    assert len(pages) == 1


def test_the_page_may_load_nothing_and_run_only_its_own_script():
    page = explorer_page([pane()], draw_photo(300, 200), "x.jpg")
    policy = re.search(
        r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page, re.DOTALL
    )[1]
    directives = dict(part.split(maxsplit=1) for part in policy.split(";"))
    contents = {
        tag: re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1] for tag in ("script", "style")
    }
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in contents.items()
    }
    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "script-src": f"'sha256-{hashes['script']}'",
        "style-src": f"'sha256-{hashes['style']}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "SHARED_STYLE" not in page
    assert page.index("Content-Security-Policy") < page.index("<title>")
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<link", page.replace(held(page)["panes"][0]["maps"], "")
    )
    assert len(re.findall("<script", page)) == 2


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_names_never_leave_their_json(text):
    one = Pane(text, [(text, 0.5)], random_attn(), GRID, (0, 0, 30, 20), {text: random_attn()})
    page = explorer_page([one], Image.new("RGB", (30, 20)), text)
    plain = explorer_page([pane(methods={"m": random_attn()})], Image.new("RGB", (30, 20)), "x")
    data = held(page)
    assert data["title"] == data["panes"][0]["name"] == data["panes"][0]["predictions"][0][0]
    assert len(data["title"]) <= 200
    assert page.count("<") == plain.count("<")
    page.encode()


def test_maps_that_do_not_fit_are_refused():
    def fails(match, attn, methods=None, grid=GRID):
        with pytest.raises(UserError, match=match):
            explorer_page(
                [Pane("m", [], attn, grid, (0, 0, 30, 20), methods or {})],
                Image.new("RGB", (30, 20)),
                "x",
            )

    attn = random_attn()
    fails(
        "attention: found maps of .3, 16, 16., expected one shape for all blocks, of 5 x 5 patches",
        attn,
        grid=(5, 5),
    )
    fails("expected one shape", {0: attn[2], 1: attn[3][:1]})
    fails("expected one shape", {0: attn[2][None]})
    fails("expected one shape", {0: attn[2][:, :2]})  # which two rows?
    fails("at least 0", {0: -attn[2]})
    fails("at least 0", {0: attn[2] * torch.nan})
    fails("at least 0", {0: attn[2] + torch.inf})
    fails(r"attention: expected maps of the blocks of attn, \[\], found \[\]$", {})
    fails(
        r"rollout: expected maps of the blocks of attn, \[2, 3, 7\], found \[2\]",
        attn,
        {"rollout": {2: attn[2]}},
    )
    photo = Image.new("RGB", (300, 200))
    for panes in ([], [pane(), pane(blocks=(1, 2, 3))], [pane(), pane(methods={"m": attn})]):
        with pytest.raises(UserError, match="all of the same blocks and methods"):
            explorer_page(panes, photo, "x")


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    page = explorer_page([pane()], draw_photo(300, 200), "cat.jpg")
    write_page(tmp_path / "cat.html", page)
    assert (tmp_path / "cat.html").read_text(encoding="utf-8") == page
    with pytest.raises(UnicodeEncodeError):
        write_page(tmp_path / "dog.html", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.html"]


def test_a_notebook_shows_the_page_in_a_frame():
    page = explorer_page([pane()], draw_photo(30, 20), '"><script>')
    shown = page._repr_html_()
    assert isinstance(page, Page)
    assert len(repr(page)) < 40
    assert re.fullmatch(
        r'<iframe [^<>]*sandbox="allow-scripts"[^<>]* srcdoc="[^"<>]*"></iframe>', shown
    )
    assert explorer.html.unescape(re.search('srcdoc="([^"]*)"', shown)[1]) == page


# In a browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="no selenium (pip install selenium)"
    )
    from selenium.webdriver.chrome.service import Service

    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("no chromium or no chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    flags = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run "
        "disable-background-networking disable-component-update disable-sync window-size=1280,900 "
        "use-fake-device-for-media-stream"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = webdriver.Chrome(options=options, service=Service(paths[1]))
    yield driver
    driver.quit()


@pytest.fixture
def look(browser, tmp_path):
    """Return a function that opens a page in the browser.

    After the test, the page must have logged no error and requested nothing from the network.
    """

    def open_page(page: str, width=1280, height=900):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        browser.get(path.as_uri())
        wait_for(
            browser, "return !window.minivit || window.minivit.maps.length > 0 || !problem.hidden"
        )
        return browser

    browser.get("about:blank")
    (
        browser.get_log("browser"),
        browser.get_log("performance"),
    )  # what was logged before is none of this test's
    yield open_page
    assert browser.execute_script("return window.pwned") is None
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:", "blob:"))] == []


def wait_for(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, poll_frequency=0.05).until(
        lambda browser: browser.execute_script(script)
    )


def find(browser, css, i=0):
    return browser.find_elements("css selector", css)[i]


def texts(browser, css):
    return [element.text for element in browser.find_elements("css selector", css)]


def table(browser, css):
    return [
        [cell.text for cell in row.find_elements("css selector", "td")]
        for row in find(browser, css).find_elements("css selector", "tbody tr")
    ]


def assert_shows(browser, values, i=0):
    """Check that pane i shows the mean of these rows (H, P), within half a step of each row."""
    shown = np.array(browser.execute_script(f"return Array.from(window.minivit.maps[{i}])"))
    np.testing.assert_allclose(
        shown, values.mean(0), rtol=0, atol=(values.max(1) / 510).mean() * 1.001
    )


def rows_of(attn, block, query, head=None):
    """Return how a query spreads over the patches, by head: (H, P), or (1, P) for one head.

    The query is a patch's row and column, or None for the class token.
    """
    a = attn[block].numpy()[:, 0 if query is None else 1 + query[0] * GRID[1] + query[1], 1:]
    return a if head is None else a[[head]]


def point_at(browser, row, column, i=0, *, click=False, kind="mouse", grid=GRID):
    """Move the mouse or a finger to the middle of a patch of pane i.

    The patch may lie outside the photo.
    """
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    script = f"""
        const box = document.querySelectorAll('.box')[{i}];
        box.scrollIntoView({{block: 'center'}});
        return box.getBoundingClientRect().toJSON()
    """
    rect = browser.execute_script(script)
    x = rect["x"] + (column + 0.5) / grid[1] * rect["width"]
    y = rect["y"] + (row + 0.5) / grid[0] * rect["height"]
    actions = ActionBuilder(browser, mouse=PointerInput(kind, kind), duration=0)
    actions.pointer_action.move_to_location(int(x), int(y))
    if click:
        actions.pointer_action.pointer_down().pointer_up()
    actions.perform()


def choose(browser, method):
    from selenium.webdriver.support.ui import Select

    Select(find(browser, "#method")).select_by_visible_text(method)


def too_wide(browser):
    return browser.execute_script(
        "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    )


def press(browser, keys, shift=False):
    from selenium.webdriver import ActionChains

    chain = ActionChains(browser, duration=0)
    (
        chain.key_down("\ue008").send_keys(keys).key_up("\ue008")
        if shift
        else chain.send_keys(keys)
    ).perform()


UP, DOWN, LEFT, RIGHT, ESCAPE, TAB = "\ue013\ue015\ue012\ue014\ue00c\ue004"
PHOTO = draw_photo(300, 200)


def test_the_class_token_of_the_last_block_is_shown_first(look):
    one = pane()
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    values = rows_of(one.attn, 7, None)
    assert_shows(browser, values)
    mean = values.mean(0)
    order = np.argsort(-mean)[:5]
    row, column = divmod(int(order[0]), 5)
    assert texts(browser, "[role=status]") == [
        f"block 7, head mean, class token: largest {100 * mean.max():.0f} % "
        f"at row {row}, column {column}"
    ]
    assert find(browser, "#class-token").get_attribute("aria-pressed") == "true"
    assert not find(browser, ".mark").is_displayed()
    assert browser.title == "cat.jpg · minivit"
    assert texts(browser, "h1, h2") == ["cat.jpg", "a model"]
    assert table(browser, ".predictions") == [["tabby", "0.750"], ["Egyptian Mau", "0.125"]]
    strongest = table(browser, ".strongest")
    assert [(int(row), int(column)) for row, column, _ in strongest] == [
        divmod(int(i), 5) for i in order
    ]
    np.testing.assert_allclose(
        [float(percent) for *_, percent in strongest], 100 * mean[order], atol=0.1
    )


def test_pointing_at_a_patch_shows_where_it_looks(look):
    one = pane()
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    for row, column in ((0, 0), (2, 4), (1, 3)):
        point_at(browser, row, column)
        assert_shows(browser, rows_of(one.attn, 7, (row, column)))
        assert (
            f", patch at row {row}, column {column}: largest" in texts(browser, "[role=status]")[0]
        )
        mark, box = (find(browser, css).rect for css in (".mark", ".box"))
        assert mark["x"] == pytest.approx(box["x"] + column * box["width"] / 5, abs=1)
        assert mark["y"] == pytest.approx(box["y"] + row * box["height"] / 3, abs=1)
    point_at(browser, 1, 6)
    assert_shows(browser, rows_of(one.attn, 7, None))


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_a_click_or_tap_keeps_a_patch_until_it_is_undone(look, kind):
    one = pane()
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    undo = [lambda: point_at(browser, 1, 2, click=True, kind=kind), lambda: press(browser, ESCAPE)]
    for back in (*undo, lambda: find(browser, "#class-token").click()):
        point_at(browser, 1, 2, click=True, kind=kind)
        point_at(browser, 1, 6)
        assert_shows(browser, rows_of(one.attn, 7, (1, 2)))
        back()
        assert_shows(browser, rows_of(one.attn, 7, None))


def test_keys_move_the_patch_the_block_and_the_head(look):
    one = pane()
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    browser.execute_script("document.querySelector('.stage').focus()")
    steps = [
        (RIGHT, 7, (1, 2), None),  # from the class token to the patch in the middle
        (DOWN + RIGHT, 7, (2, 3), None),
        (UP * 4 + LEFT * 9, 7, (0, 0), None),  # no further than the edge
        ("1", 7, (0, 0), 1),
        ("hhh", 7, (0, 0), 2),  # nor than the last head
        ("9", 7, (0, 0), 2),  # there is none
        ("0", 7, (0, 0), 0),
        ("m", 7, (0, 0), None),
        ("b", 7, (0, 0), None),  # the last block
        (ESCAPE, 7, None, None),
    ]
    for keys, block, query, head in steps:
        press(browser, keys)
        assert_shows(browser, rows_of(one.attn, block, query, head))
    press(browser, "b", shift=True)
    assert_shows(browser, rows_of(one.attn, 3, None))
    press(browser, "h")
    press(browser, "h", shift=True)
    assert_shows(browser, rows_of(one.attn, 3, None))


def test_keys_work_only_while_the_mouse_or_focus_is_on_the_photo(look):
    one = pane()
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    press(browser, "1" + RIGHT)
    assert_shows(browser, rows_of(one.attn, 7, None))
    point_at(browser, 2, 0)
    press(browser, "1")
    assert_shows(browser, rows_of(one.attn, 7, (2, 0), 1))


def test_sliders_and_numbers_choose_what_is_shown(look):
    one = pane()
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    find(browser, "#block").send_keys(LEFT)
    find(browser, "#head").send_keys(RIGHT * 3)
    assert_shows(browser, rows_of(one.attn, 3, None, 2))
    assert [
        find(browser, f"#{name}").get_attribute("aria-valuetext")
        for name in ("block", "head", "opacity")
    ] == [
        "3",
        "2",
        "60 %",
    ]
    assert texts(browser, ".name b") == ["3", "2", "60 %"]
    find(browser, "#row").send_keys("2" + TAB + "4" + TAB)
    assert_shows(browser, rows_of(one.attn, 3, (2, 4), 2))
    find(browser, "#opacity").send_keys(LEFT)
    assert find(browser, "canvas").value_of_css_property("opacity") == "0.55"


def test_each_control_has_a_name_and_is_reached_by_tab(look):
    browser = look(explorer_page([pane(methods={"rollout": random_attn()})], PHOTO, "cat.jpg"))
    names = []
    for _ in range(10):
        press(browser, TAB)
        name = browser.switch_to.active_element.accessible_name
        names.append(" ".join(name.split()))  # Some versions of Chromium end it in a space.
    controls = [
        "block 7",
        "head mean",
        "opacity 60 %",
        "common scale",
        "smooth",
        "class token",
        "row",
        "column",
    ]
    assert names == ["method", *controls, "cat.jpg, as a model sees it"]


def test_other_methods_are_shown_even_for_the_class_token_only(look):
    rollout = {i: a.mean(0) for i, a in random_attn(seed=1).items()}
    relevance = {i: a[0, 0, 1:].reshape(GRID) for i, a in random_attn(seed=2).items()}
    one = pane(methods={"rollout": rollout, "relevance": relevance})
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    choose(browser, "rollout")
    point_at(browser, 2, 1)
    assert_shows(browser, rows_of({i: a[None] for i, a in rollout.items()}, 7, (2, 1)))
    assert texts(browser, "[role=status]")[0].startswith(
        "rollout, block 7, patch at row 2, column 1: "
    )
    assert texts(browser, ".unit") == ["% of rollout per patch (this map's own scale)"]
    assert not find(browser, "#head").is_enabled()
    choose(browser, "relevance")
    point_at(browser, 2, 2)
    assert_shows(browser, relevance[7].reshape(1, -1).numpy())
    assert texts(browser, "[role=status]")[0].startswith("relevance, block 7, class token: ")
    assert not find(browser, "#row").is_enabled()


def test_two_panes_show_their_own_patches_at_the_same_place(look):
    whole = pane("one")
    cropped = pane("a name of several lines " * 5, seed=1, box=(60, 80, 260, 200))
    browser = look(explorer_page([whole, cropped], PHOTO, "cat.jpg"))
    assert texts(browser, "h2")[0] == "one"
    tops = [find(browser, ".stage", i).rect["y"] for i in (0, 1)]
    assert tops[0] == tops[1]
    point_at(browser, 0, 3, 1)  # its middle is at 200, 100 of the photo's 300 x 200 pixels
    assert_shows(browser, rows_of(whole.attn, 7, (1, 3)), 0)
    assert_shows(browser, rows_of(cropped.attn, 7, (0, 3)), 1)
    point_at(browser, 1, 0, 0)  # cropped away in the other pane: its nearest patch
    press(browser, "1")
    press(browser, "b", shift=True)
    assert_shows(browser, rows_of(whole.attn, 3, (1, 0), 1), 0)
    assert_shows(browser, rows_of(cropped.attn, 3, (0, 0), 1), 1)
    spoken = browser.execute_script(
        "return [...document.querySelectorAll('[role=status]')].map(e => e.textContent)"
    )
    assert [text.partition(":")[0] for text in spoken] == ["one", cropped.name]
    look(explorer_page([whole, cropped], PHOTO, "cat.jpg"), 390, 844)
    assert (
        find(browser, ".pane", 1).rect["y"] > find(browser, ".pane").rect["y"] + 300
    )  # one above the other


CROP = Preprocess(256, (224, 224)).box(PHOTO.size)


def test_the_map_lies_on_what_the_model_saw_in_its_bars_colours(look):
    one = pane(box=CROP)
    browser = look(explorer_page([one], PHOTO, "cat.jpg"))
    point_at(browser, -0.6, 2)  # just above the crop
    assert_shows(browser, rows_of(one.attn, 7, None))
    canvas, image = (find(browser, css).rect for css in ("canvas", ".stage img"))
    scale = image["width"] / 300
    found = [canvas["x"] - image["x"], canvas["y"] - image["y"], canvas["width"], canvas["height"]]
    left, top, right, bottom = CROP
    assert found == pytest.approx(
        [v * scale for v in (left, top, right - left, bottom - top)], abs=0.5
    )
    assert image["width"] / image["height"] == pytest.approx(1.5, abs=0.01)
    read = """
        const canvas = document.querySelector('canvas');
        const context = canvas.getContext('2d');
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data]
    """
    pixels = np.array(browser.execute_script(read)).reshape(*GRID, 4)
    mean = rows_of(one.attn, 7, None).mean(0).reshape(GRID)
    expected = 255 * colormaps["inferno"]((mean - mean.min()) / (mean.max() - mean.min()))
    np.testing.assert_allclose(pixels, expected, atol=8)
    ticks = [float(text) for text in texts(browser, ".ticks span")]
    np.testing.assert_allclose(
        ticks, [100 * v for v in (mean.min(), (mean.min() + mean.max()) / 2, mean.max())], atol=0.1
    )
    assert texts(browser, ".unit") == ["% of attention per patch (this map's own scale)"]


def test_a_common_scale_is_that_of_all_blocks_and_models(look):
    panes = [pane("one"), pane("two", seed=1)]
    browser = look(explorer_page(panes, PHOTO, "cat.jpg"))
    find(browser, "#common").click()
    means = np.stack([rows_of(one.attn, block, None).mean(0) for one in panes for block in BLOCKS])
    ticks = [float(text) for text in texts(browser, ".ticks span")]
    np.testing.assert_allclose(
        ticks,
        2 * [100 * v for v in (means.min(), (means.min() + means.max()) / 2, means.max())],
        atol=0.1,
    )
    assert texts(browser, ".unit") == 2 * [
        "% of attention per patch (one scale for all blocks and models)"
    ]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_are_shown_as_text(look, text):
    maps = {i: torch.full(GRID, 0.05) for i in BLOCKS}
    panes = [Pane(text, [(text, 0.5)], random_attn(), GRID, (0, 0, 300, 200), {text: maps})] * 2
    browser = look(explorer_page(panes, PHOTO, text), 390, 844)
    line = explorer.shorten(text, explorer.MAX_NAME)
    css = "h1 bdi, h2 bdi, .predictions td:first-child, #method option"
    read = f"return [...document.querySelectorAll('{css}')].map(element => element.textContent)"
    assert browser.execute_script(read) == [line, "attention", line, line, line, line, line]
    assert browser.title == f"{line} · minivit"
    assert browser.execute_script("return [document.images.length, document.scripts.length]") == [
        2,
        2,
    ]
    assert too_wide(browser) == 0


@pytest.mark.parametrize("size", [(300, 200), (40, 800), (800, 40)], ids=["photo", "1:20", "20:1"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_page_scrolls_sideways_and_no_photo_is_too_small(look, size, width):
    panes = [pane("google/vit-base-patch16-224" * k, size=size) for k in (1, 4)]
    for some in (panes[:1], panes):
        browser = look(explorer_page(some, Image.new("RGB", size), "cat.jpg"), width, 844)
        assert too_wide(browser) == 0
        stage = find(browser, ".stage").rect
        assert min(stage["width"], stage["height"]) >= 60
        assert stage["width"] / stage["height"] == pytest.approx(size[0] / size[1], rel=0.02)


def test_a_model_of_one_block_and_no_classifier_is_shown_too(look):
    attn = random_attn(heads=1, blocks=(0,))
    browser = look(
        explorer_page([Pane("backbone", [], attn, GRID, (0, 0, 300, 200))], PHOTO, "cat.jpg")
    )
    assert_shows(browser, rows_of(attn, 0, None))
    assert texts(browser, ".predictions") == ["No classifier: attention only."]
    assert [find(browser, f"#{name}").is_enabled() for name in ("block", "head")] == [False, False]


def test_the_frame_of_a_notebook_shows_the_page(look):
    one = pane()
    frame = explorer_page([one], PHOTO, "cat.jpg")._repr_html_()
    browser = look(f"<!doctype html><title>notebook</title>{frame}")
    browser.switch_to.frame(find(browser, "iframe"))
    wait_for(browser, "return window.minivit && window.minivit.maps.length > 0")
    assert_shows(browser, rows_of(one.attn, 7, None))
    browser.switch_to.default_content()


def test_a_browser_that_cannot_draw_the_page_is_told_so(look):
    page = explorer_page([pane()], PHOTO, "cat.jpg")
    browser = look(page.replace('"maps":"', '"maps":"AAAA'))
    assert "needs a browser of 2023 or newer" in find(browser, "#problem").text


@pytest.mark.usefixtures("no_figures")
def test_infers_page_shows_the_rows_that_its_arrays_hold(look, tiny_folder, tmp_path, capsys):
    import infer

    draw_photo(320, 240).save(tmp_path / "<b>photo.png")
    flags = [
        "--model",
        str(tiny_folder),
        "--compare",
        str(tiny_folder),
        "--out",
        str(tmp_path / "out"),
        "--npz",
        "--device",
        "cpu",
    ]
    assert infer.main([str(tmp_path / "<b>photo.png"), *flags, "--html", "--layers", "9,11"]) == 0
    browser = look((tmp_path / "out" / "_b_photo.html").read_text(encoding="utf-8"))
    with np.load(tmp_path / "out" / "_b_photo.npz") as arrays:
        every = arrays["rows"]
    assert every.shape == (2, 3, 17, 17)
    assert_shows(browser, every[1, :, 0, 1:])
    point_at(browser, 3, 2, 1, grid=(4, 4))
    for i in (0, 1):
        assert_shows(browser, every[1, :, 15, 1:], i)
    assert (
        infer.main(
            [str(tmp_path / "<b>photo.png"), *flags, "--query", "200,230", "--layers", "9,11"]
        )
        == 0
    )
    with np.load(tmp_path / "out" / "_b_photo.npz") as arrays:
        np.testing.assert_allclose(arrays["rows"][:, :, 0], every[:, :, 15], rtol=1e-4, atol=1e-6)
    assert texts(browser, "#method option") == ["attention", "rollout", "relevance"]
    assert texts(browser, "h1") == ["<b>photo.png"]
