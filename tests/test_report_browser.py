"""The page in a real browser: every plot drawn, nothing fetched, nothing on the console."""

import shutil

import pytest

import report_folders as folders
from losslab.report import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# WebGL without a graphics card: the surfaces are drawn by software.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
DRAWN = """() => Object.fromEntries([...document.querySelectorAll(".plot")].map(div => {
  const box = div.getBoundingClientRect(), solid = div.querySelector("canvas");
  const paths = [...div.querySelectorAll(".main-svg .trace, .main-svg .contour")].length;
  const context = solid && (solid.getContext("webgl2") || solid.getContext("webgl"));
  return [div.id, {
    traces: (div._fullData || []).length,
    layers: div.querySelectorAll(".main-svg").length,
    marks: solid ? Number(Boolean(context && !context.isContextLost())) : paths,
    width: box.width,
    height: box.height,
  }];
}))"""

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return page.build(folders.write_study(tmp_path_factory.mktemp("studies") / "demo"))


def visit(chromium, path, **settings):
    """Open a page; what it drew, and everything that went wrong."""
    tab = chromium.new_page(**settings)
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:200]}"))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("() => [...document.querySelectorAll('.plot')].every(div => div._fullData?.length)")
    tab.wait_for_timeout(500)  # surfaces come a frame later
    assert tab.locator('.modebar-btn[data-title^="Share"]').count() == 0, "a button that uploads the chart"
    drawn = tab.evaluate(DRAWN)
    overflow = tab.evaluate("() => document.documentElement.scrollWidth - innerWidth")
    tab.close()
    return drawn, problems, [url for url in requests if not url.startswith(("data:", "blob:"))], overflow


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 420)])
def test_every_plot_is_drawn_without_an_error(chromium, report, scheme, width):
    drawn, problems, requests, overflow = visit(
        chromium, report, color_scheme=scheme, viewport={"width": width, "height": 900}
    )
    assert problems == []
    assert requests == [report.as_uri()]
    assert len(drawn) == 12
    for name, plot in drawn.items():
        assert plot["traces"] > 0, name
        assert plot["layers"] > 0, name
        assert plot["marks"] > 0, name
        assert plot["width"] > 200, name
        assert plot["height"] > 200, name
    assert overflow <= 0, "the page itself never scrolls sideways"


def test_hostile_names_run_nothing(chromium, tmp_path):
    study = tmp_path / "study"
    folder = folders.write_run(study / "<img src=x onerror=console.error(1)>")
    folder.write_config({"note": "</script><script>console.error(2)</script>"})
    drawn, problems, requests, _ = visit(chromium, page.build(study))
    assert problems == []
    assert len(requests) == 1
    assert all(plot["marks"] for plot in drawn.values())
