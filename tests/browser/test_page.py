"""What a visitor sees: a prompt typed, rounds appearing, the pictures equal to an independent run's trace."""

import pytest
import torch
from serving import screenshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow_hf import PPOWDrafter, tiny

pytestmark = pytest.mark.browser

PROMPT = "class Stack:\n    def push(self, item):\n        self."


@pytest.fixture(scope="module")
def models():
    target = AutoModelForCausalLM.from_pretrained(tiny.target_path(), dtype="float32").eval()
    drafter = PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-eagle"), dtype="float32").eval()
    return target, AutoTokenizer.from_pretrained(tiny.target_path()), drafter


def ask(page, prompt, rule=None, tokens=None, tab="watch"):
    """Type the prompt, choose, press the button."""
    page.fill(f"#{tab}-prompt textarea", prompt)
    if rule or tokens:
        if not page.locator(f"#{tab}-rule").is_visible():
            page.locator("button.label-wrap:visible").click()
        if rule:
            page.locator(f"#{tab}-rule").get_by_text(rule, exact=True).click()
        if tokens:
            page.locator(f"#{tab}-tokens input[type=number]").fill(str(tokens))
            page.keyboard.press("Tab")
    page.evaluate("window.before = [...document.querySelectorAll('[data-run]')].map(stage => stage.dataset.run)")
    page.click(f"#{tab}-run")


def finished(page, stage="stage"):
    """Wait until a run has ended and its last round is shown."""
    page.wait_for_function(
        "name => { const at = document.querySelector(`#${name} [data-state]`);"
        " const done = document.querySelector(`#${name} .pw-same`).textContent;"
        " return !window.before.includes(at.dataset.run) && at.dataset.state === 'paused' && done !== '…'; }",
        arg=stage,
        timeout=120_000,
    )


def cells(page, row, stage="stage"):
    """Text and kind of the shown cells of a row."""
    return page.evaluate(
        """([stage, row]) => [...document.querySelectorAll(`#${stage} .pw-cells`)[row].children]
        .filter(cell => cell.dataset.kind && cell.dataset.kind !== 'off')
        .map(cell => [cell.firstChild.textContent, cell.dataset.kind])""",
        [stage, row],
    )


def shown(page):
    """The numbers that stand on the page."""
    return page.evaluate(
        """() => ({kl: +document.querySelector('#stage .pw-kl').textContent.slice(3),
        angle: +document.querySelector('#stage .pw-needle').style.transform.match(/-?[0-9.]+/)[0],
        where: document.querySelector('#stage .pw-where').textContent,
        tau: document.querySelector('#stage .pw-tau').textContent,
        text: [...document.querySelectorAll('#stage .pw-round')].map(r => r.textContent).join(''),
        prompt: document.querySelector('#stage .pw-prompt').textContent})"""
    )


def test_first_paint_comes_within_two_seconds_and_shows_a_real_run(open_page):
    open_page().close()  # the browser has read the scripts once, as on any visit but the first
    page = open_page()
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 2000, f"first contentful paint after {paint:.0f} ms"
    assert cells(page, 0)[-1][1] == "target" and len(cells(page, 1)) > 0


def test_gauge_cells_and_rows_equal_an_independent_run(open_page, models):
    target, tokenizer, drafter = models
    page = open_page()
    ask(page, PROMPT, rule="fixed", tokens=32)  # a fixed rule drafts the same tokens whatever the clock says
    finished(page)
    ids = tokenizer(PROMPT)["input_ids"]
    decoding = drafter.generate_with(window="fixed", max_window=10)
    output = target.generate(torch.tensor([ids]), custom_generate=decoding, max_new_tokens=32, do_sample=False)
    rounds = decoding.last_trace.rounds
    text = output[0, len(ids) :].tolist()
    assert shown(page)["text"] == tokenizer.decode(text) and shown(page)["prompt"] == PROMPT
    drafting = [r for r in rounds if r.window]
    assert float(shown(page)["tau"]) == pytest.approx(sum(r.accepted + 1 for r in drafting) / len(drafting), abs=0.006)
    page.click("#stage .pw-first")
    kl, at = 1.0, 0
    for place, record in enumerate(rounds):
        for value in record.kl:
            kl = 0.7 * kl + 0.3 * min(value, 20.0)
        assert shown(page)["where"] == f"round {place + 1} of {len(rounds)}"
        assert shown(page)["kl"] == pytest.approx(kl, abs=0.011)
        assert shown(page)["angle"] == pytest.approx(180 * kl / (1 + kl) - 90, abs=0.3)
        adaptive, fixed = cells(page, 0), cells(page, 1)
        assert [kind for _, kind in adaptive].count("kept") == min(record.accepted, len(text) - at)
        drafted = [cell for cell in adaptive if cell[1] != "target"]
        assert len(drafted) == record.window
        for (cell, _), token in zip(drafted, record.draft_ids, strict=True):
            word = tokenizer.decode([token])
            assert cell == word or not word.strip() or "\n" in word
        if place and record.window >= 8:  # the same prefix, so the same first eight drafts
            assert [cell[0] for cell in fixed] == [cell[0] for cell in drafted[:8]]
            assert [kind for _, kind in fixed].count("kept") == min(record.accepted, 8)
        at += record.accepted + 1
        if place < len(rounds) - 1:
            page.click("#stage .pw-step")


def test_rounds_appear_one_after_the_other_without_redrawing_the_page(open_page, models):
    target, tokenizer, _ = models
    page = open_page()
    page.evaluate(
        "window.kept = [document.querySelector('#stage .pw-stage'), document.querySelector('#stage .pw-needle')]"
    )
    page.evaluate(
        """() => { window.seen = []; const stage = document.querySelector('#stage');
        new MutationObserver(() => { const at = stage.querySelector('[data-round]').dataset.round;
        if (window.seen.at(-1) !== at) window.seen.push(at); })
        .observe(stage, {attributes: true, subtree: true, attributeFilter: ['data-round']}); }"""
    )
    ask(page, PROMPT)
    finished(page)
    seen = [int(number) for number in page.evaluate("window.seen")]
    assert seen == list(range(1, len(seen) + 1)) and len(seen) > 10
    assert page.evaluate("window.kept.every(node => node.isConnected)")
    plain = target.generate(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False), max_new_tokens=96)
    assert shown(page)["text"] == tokenizer.decode(plain[0, len(tokenizer(PROMPT)["input_ids"]) :])
    assert page.inner_text("#stage .pw-same") == "identical" and page.inner_text("#stage .pw-ratio").endswith("×")
    assert any(
        len(cells(page, 1)) != len([cell for cell in cells(page, 0) if cell[1] != "target"])
        for _ in range(12)
        if page.click("#stage .pw-back") is None
    )  # the fixed row differs from the adaptive one
    screenshot(page, "after-a-run")


def test_play_pause_step_and_keys(open_page):
    page = open_page()
    page.click("#stage .pw-first")
    assert shown(page)["where"].startswith("round 1 of")
    page.click("#stage .pw-play")
    page.wait_for_function("+document.querySelector('#stage [data-round]').dataset.round >= 3")
    page.click("#stage .pw-play")
    at = shown(page)["where"]
    page.wait_for_timeout(1800)  # two rounds' time
    assert shown(page)["where"] == at
    page.focus("#stage .pw-step")
    page.keyboard.press("Enter")
    after = shown(page)["where"]
    assert int(after.split()[1]) == int(at.split()[1]) + 1
    page.focus("#stage .pw-seek")
    page.keyboard.press("ArrowLeft")
    assert shown(page)["where"] == at
    page.keyboard.press("End")
    assert shown(page)["where"].split()[1] == shown(page)["where"].split()[3]


def test_every_control_is_reached_with_the_keyboard(open_page):
    page = open_page()
    page.click("#stage .pw-first")
    page.click("#stage .pw-step")
    page.focus("#watch-prompt textarea")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.className + ' ' + document.activeElement.closest('[id]')?.id")
        )
    for control in (
        "pw-first",
        "pw-back",
        "pw-play",
        "pw-step",
        "pw-seek",
        "pw-text",
        "watch-run",
        "watch-stop",
        "cost-ratio",
    ):
        assert any(control in element for element in reached), control


def test_a_stopped_run_can_be_stepped_through(open_page):
    page = open_page()
    ask(page, PROMPT, tokens=512)
    page.wait_for_function(
        "document.querySelector('#stage .pw-where').textContent === 'round 3 of 3' ||"
        " +document.querySelector('#stage [data-round]').dataset.round === 4"
    )
    page.click("#watch-stop")
    page.wait_for_function("document.querySelector('#stage [data-state]').dataset.state === 'paused'")
    count = shown(page)["where"].split()[3]
    page.wait_for_timeout(1000)
    assert shown(page)["where"].split()[3] == count
    page.click("#stage .pw-back")
    assert page.inner_text("#stage .pw-ratio") == "–"


def test_markup_in_a_prompt_is_text(open_page):
    page = open_page()  # the fixture fails on any dialog and any request
    attack = "<img src=x onerror=alert(1)>\n<script>alert(2)</script>${alert(3)}{{constructor}}"
    ask(page, attack, tokens=16)
    finished(page)
    assert shown(page)["prompt"] == attack
    assert page.locator("#stage img, #stage script").count() == 0


def test_what_is_refused_is_said_in_a_friendly_way(open_page):
    page = open_page()
    before = shown(page)
    ask(page, "   ")
    page.get_by_text("The prompt is empty").wait_for()
    assert shown(page) == before
    page.fill("#watch-prompt textarea", "x" * 2500)
    assert len(page.input_value("#watch-prompt textarea")) <= 2000


def test_the_cost_slider_recomputes_the_sum(open_page):
    page = open_page()
    rows = page.locator("#cost-panel td.ms")
    assert rows.all_inner_texts()[:2] == ["130 ms", "53 ms"]
    field = page.locator("#cost-ratio input[type=number]")
    field.fill("0.1")
    field.press("Tab")
    page.wait_for_function("document.querySelector('#cost-panel td.ms').innerText !== '130 ms'")
    assert rows.all_inner_texts()[:2] == ["90 ms", "38 ms"]  # (15 * 8 + 150) / 3, (15 * 6.5 + 150) / 6.5


def test_two_drafters_answer_the_same_prompt(open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    ask(page, PROMPT, tokens=32, tab="compare")
    finished(page, "stage-first")
    finished(page, "stage-second")
    texts = [page.inner_text(f"#{name} .pw-text") for name in ("stage-first", "stage-second")]
    assert texts[0] == texts[1]
    assert page.locator("#compare-table tbody tr").count() == 2
    screenshot(page, "compare")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 860), (390, 844)])
def test_both_themes_at_both_sizes(open_page, scheme, width, height):
    page = open_page(width, height, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for sample in ("#stage .pw-title", "#stage .pw-note, #stage .note", "#stage .pw-cell.kept b", "#stage .pw-move"):
        assert contrast(page, sample) >= 4.5, sample
    screenshot(page, f"{scheme}-{width}")
    page.get_by_role("tab", name="Training").click()
    assert page.locator(".pw-charts svg:visible, .pw-bench:visible").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    screenshot(page, f"{scheme}-{width}-training")


def contrast(page, selector):
    """WCAG contrast of an element's text against the nearest filled background behind it."""
    colours = page.evaluate(
        """selector => { let at = document.querySelector(selector); const ink = getComputedStyle(at).color;
        for (; at; at = at.parentElement) { const fill = getComputedStyle(at).backgroundColor;
        if (!/rgba\\(.*, 0\\)|transparent/.test(fill)) return [ink, fill]; } return [ink, 'rgb(255, 255, 255)']; }""",
        selector,
    )

    def luminance(colour):
        channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)
