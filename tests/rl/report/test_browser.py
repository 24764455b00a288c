"""The report in a real headless Chromium: what it shows is what the run wrote, and it asks nobody for anything."""

import json
import shutil

import pytest
from playwright.sync_api import sync_playwright

from rl.recipe.schema import load_config
from rl.report.__main__ import main
from rl.train import train
from tests.fakes.tiny_run import tiny_recipe
from tests.rl.report.report_runs import HOSTILE, write_run

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

CURVES = """() => [...document.querySelectorAll('path.curve')].map((path) => {
  const canvas = path.closest('svg').dataset;
  return {
    metric: path.dataset.metric, run: Number(path.dataset.run), d: path.getAttribute('d'),
    title: path.closest('figure').querySelector('figcaption').textContent,
    x: JSON.parse(canvas.x), y: JSON.parse(canvas.y), box: JSON.parse(canvas.box),
  };
})"""

CONTRASTS = """() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parts(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    throw new Error('nothing opaque behind');
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const shown = walker.currentNode.textContent.trim() && node.getClientRects().length;
    if (!shown || node.closest('.skip, script, title')) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(parts(node.closest('svg') ? style.fill : style.color)), light(behind(node))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.textContent.trim()]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium with an empty profile, without network."""
    path = shutil.which("chromium")
    assert path, "the report is tested in Chromium: scripts/chromium.sh installs it, or says what is needed"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=path, headless=True, args=FLAGS, offline=True,
            color_scheme="light", viewport={"width": 1280, "height": 900},
        )  # fmt: skip
        yield context
        context.close()


@pytest.fixture
def opened(browser):
    """Opens a page, and fails the test for any console message, error or request beyond the file itself."""
    pages, troubles = [], []

    def open_page(path):
        page = browser.new_page()
        pages.append(page)
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("request", lambda request: troubles.append(request.url) if foreign(request.url) else None)

        def foreign(url):
            return url != path.as_uri() and not url.startswith("data:")

        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert troubles == []


@pytest.fixture(scope="module")
def live(tmp_path_factory, ray_session):
    """A real tiny run and its report."""
    folder = tmp_path_factory.mktemp("live")
    assert train(load_config(tiny_recipe(folder), ["checkpoint.every=100"])) == 0
    assert main([str(folder / "runs" / "tiny")]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with gaps and hostile prompts, not finished."""
    out = write_run(tmp_path_factory.mktemp("made"), finish=False)
    assert main([str(out)]) == 0
    return out


def drawn(page):
    """(metric, run) -> the pieces of its curves as lists of (x, y), read back from the pixels."""
    found = {}
    for curve in page.evaluate(CURVES):
        box, (x0, x1), (y0, y1) = curve["box"], curve["x"], curve["y"]
        width = box["width"] - box["left"] - box["right"]
        height = box["height"] - box["top"] - box["bottom"]
        points = [tuple(map(float, pair.split(","))) for pair in curve["d"].lstrip("M").split("L")]
        pieces = found.setdefault((curve["metric"], curve["run"], curve["title"]), [])
        pieces.append(
            [
                (x0 + (x - box["left"]) / width * (x1 - x0), y1 - (y - box["top"]) / height * (y1 - y0))
                for x, y in points
            ]
        )
    return found


def logged(out, name):
    """(stage, step, value) of a metric in the file that the run wrote."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["stage"], r["step"], r[name]) for r in records if r.get(name) is not None]


def test_curves_are_those_of_metrics_jsonl(live, opened):
    curves = drawn(opened(live / "report.html"))
    names = {metric for metric, _, _ in curves}
    assert names >= {
        "reward/mean", "policy/ratio_mean", "policy/kl", "policy/clip_fraction_low", "gate/log_prob_gap_mean",
        "reward/zero_spread_share", "evaluation/edit/mean", "evaluation/t2i/mean", "evaluation/edit/difference",
    }  # fmt: skip
    for metric in names:
        values = [value for _, _, value in logged(live, metric)]
        pieces = [piece for (name, _, _), found in curves.items() if name == metric for piece in found]
        shown = [y for piece in pieces for _, y in piece]
        if metric.endswith("/difference"):  # the first point, before training, has no record
            assert shown.pop(0) == pytest.approx(0, abs=1e-4)
        span = max(map(abs, values)) or 1.0
        assert shown == pytest.approx(values, abs=2e-3 * span), metric
    steps = [
        x for _, found in sorted(curves.items()) if _[0] == "policy/kl" for piece in found for x, _ in piece
    ]
    assert steps == pytest.approx([step for _, step, _ in logged(live, "policy/kl")], abs=0.02)


def test_the_gallery_scrubs_by_slider_and_by_keyboard(live, opened):
    page = opened(live / "report.html")
    gallery, slider = page.locator("#gallery"), page.locator("#gallery input[type=range]")
    frames = {}
    for path in (live / "samples" / "edit").glob("step_*.json"):
        index = json.loads(path.read_text())
        frames[index["step"]] = [f"{sample['reward']:.3f}" for sample in index["samples"]]
    steps = sorted(frames)

    def shown():
        pictures = gallery.locator("figure").first.locator("img")
        assert pictures.count() == 2, "source and edit"
        return (
            gallery.locator("output").inner_text().split(",")[0],
            [text.split()[0] for text in gallery.locator("figcaption").all_inner_texts()],
            [pictures.nth(i).get_attribute("src") for i in range(2)],
        )

    assert shown()[:2] == (f"step {steps[-1]}", frames[steps[-1]])
    last = shown()[2]
    slider.fill("0")
    assert shown()[:2] == (f"step {steps[0]}", frames[steps[0]])
    assert shown()[2][0] == last[0] and shown()[2][1] != last[1], "the source stays, the edit changes"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert shown()[:2] == (f"step {steps[1]}", frames[steps[1]])
    page.keyboard.press("End")
    assert shown()[0] == f"step {steps[-1]}"
    gallery.locator("[aria-label=Pictures]").focus()
    page.keyboard.press("ArrowLeft")
    assert shown()[:2] == (f"step {steps[-2]}", frames[steps[-2]])
    assert page.evaluate("() => [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    gallery.get_by_role("button", name="t2i").press("Enter")
    assert gallery.locator("figure").first.locator("img").count() == 1
    assert page.evaluate("() => document.activeElement.textContent") == "t2i"


def test_groups_and_time_line_show_each_step(live, opened):
    page = opened(live / "report.html")
    lines = [json.loads(line) for line in (live / "groups.jsonl").read_text().splitlines()]
    first = [line["rewards"] for line in lines if line["step"] == 1]
    means = sorted(sum(rewards) / len(rewards) for rewards in first)
    groups = page.locator("#groups")
    groups.locator("input[type=range]").press("Home")
    headings = groups.locator("h3").all_inner_texts()
    assert headings == [f"Best: mean {means[-1]:.3f}", f"Worst: mean {means[0]:.3f}"]
    best = max(first, key=sum)
    cells = groups.locator("[data-group]").first.locator("tbody tr td:nth-child(3)").all_inner_texts()
    assert [cell.strip() for cell in cells] == [f"{reward:.3f}" for reward in best]
    assert groups.locator("tbody img").count() == 8
    timeline = page.locator("#timeline")
    timeline.get_by_role("button", name="Whole run").click()
    kinds = page.evaluate(
        "() => [...document.querySelectorAll('#timeline rect[data-kind]')].map((r) => r.dataset.kind)"
    )
    assert set(kinds) == {"rollout", "reward", "update", "publish", "evaluate", "checkpoint"}
    assert timeline.locator("text=/idle \\d+ %/").count() == 3, "rollout, reward and learner"
    assert timeline.get_by_role("link", name="trace.json").get_attribute("href") == "trace.json"


def test_what_is_missing_is_a_gap(made, opened):
    page = opened(made / "report.html")
    curves = drawn(page)
    reward = next(found for key, found in curves.items() if key[2].startswith("Training reward, stage edit"))
    assert [[round(x) for x, _ in piece] for piece in reward] == [[1], [3]], "step 2 was not scored"
    kl = next(found for key, found in curves.items() if key[0] == "policy/kl")
    assert [[round(x) for x, _ in piece] for piece in kl] == [[1, 2, 3], [4], [6]], (
        "stages part, step 5 learned nothing"
    )
    assert page.locator("#notes li").count() == 0 and "not finished" in page.locator("main").inner_text()
    page.locator("#reward summary").first.click()
    rows = page.locator("#reward details").first.locator("tbody tr")
    assert rows.all_inner_texts() == ["1\t0.1000", "2\t–", "3\t0.3000"]


def test_charts_read_their_values_by_keyboard(made, opened):
    page = opened(made / "report.html")
    page.locator("#reward svg[tabindex]").first.focus()
    legend = page.locator("#reward .legend").first
    assert legend.inner_text().split() == ["last", "mean", "0.3000"]
    page.keyboard.press("Home")
    assert legend.inner_text().split()[-1] == "0.1000"
    page.keyboard.press("ArrowRight")
    assert legend.inner_text().split()[-1] == "–"
    page.keyboard.press("Escape")
    assert legend.inner_text().split()[-1] == "0.3000"


def test_prompts_stay_text(made, opened):
    page = opened(made / "report.html")
    assert page.evaluate("() => window.broken") is None
    captions = page.locator("#gallery figcaption").all_text_contents()
    for prompt, caption in zip(HOSTILE, captions, strict=True):
        assert caption.endswith(f" {prompt}")
    assert page.locator("#groups .prompt").first.text_content() == HOSTILE[0]
    assert page.locator("main script").count() == 0


def test_light_and_dark_can_be_read(live, opened):
    page = opened(live / "report.html")
    button, seen = page.locator("#theme"), set()
    for details in page.locator("details").all():
        details.evaluate("node => { node.open = true; }")
    for pressed in ("false", "true"):
        assert button.get_attribute("aria-pressed") == pressed
        seen.add(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        contrasts = page.evaluate(CONTRASTS)
        assert contrasts[0][0] >= 4.5, contrasts
        button.click()
    assert len(seen) == 2
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") in seen


def test_several_runs_lie_over_one_another(tmp_path, live, opened):
    other = write_run(tmp_path, name="other", shift=0.1)
    page_path = tmp_path / "both.html"
    assert main([str(other), str(live), "--output", str(page_path)]) == 0
    page = opened(page_path)
    assert {run for _, run, _ in drawn(page)} == {0, 1}
    assert page.locator("#results table").first.locator("tbody th").all_inner_texts() == ["other", "tiny"]
    rows = page.locator("#ablation tbody tr").all_inner_texts()
    assert len(rows) == 2 and "+0.100 [+0.100, +0.100]" in rows[0]
    assert page.locator("#settings tbody th", has_text="learner.learning_rate").count() == 1
    page.locator("#gallery select").select_option("1")
    assert page.locator("#gallery figcaption").first.inner_text().endswith("make it red")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth"), (
        "narrow screens scroll down only"
    )
