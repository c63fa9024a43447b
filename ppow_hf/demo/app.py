"""The page: what it consists of, what its buttons do, and what a visitor may ask for.

Knows Gradio; what is drawn comes from drawing.py and frames.py, what runs from running.py. Nothing that a visitor
sends is executed, written to disk or logged.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from . import drawing
from .frames import EXPLAINER_COST_RATIO, FrameMaker, Totals, outcome
from .running import Run, RunResult, RunSettings
from .settings import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, DemoSettings, Models, ShownDrafter, load_models

HERE = Path(__file__).parent
TITLE = "How far ahead should the drafter guess?"
LEAD = (
    "A small drafter guesses; the target checks all guesses in one pass. When they agree, PPOW stretches the window. "
    "When they part, it pulls back."
)
# Tells the stages that no further rounds will come of the run that they are showing.
STOPPED = '() => {{ document.dispatchEvent(new CustomEvent("pw-stop-{}")); }}'
REQUESTS_EACH = 4  # of one client, waiting or running at once
SESSIONS = 64  # visitors whose values and unread answers are kept: a copy of the page's components each
UNREAD_MESSAGES = 1000  # of one visitor
RULES = [("adaptive (KL)", "kl"), ("fixed", "fixed"), ("heuristic", "heuristic")]


class Refused(ValueError):
    """What a visitor asked for is not possible; the message is for the visitor."""


class Progress(NamedTuple):
    """A run so far: the stage's value, the sums of its rounds, and its result, which is complete at the end."""

    value: dict[str, Any]
    totals: Totals
    result: RunResult


class Demo:
    """The loaded models and what the page does with them. Calls share the models and nothing else."""

    def __init__(self, settings: DemoSettings, models: Models | None = None):
        self.settings = settings
        self.models = models or load_models(settings)
        self._numbers = itertools.count(1)
        self.opening: dict[str, Any] = {"run": "", "status": "empty", "prompt": "", "rounds": []}
        self.opening_totals: Totals | None = None

    # -- one run

    def checked(
        self, prompt: Any, window: Any, max_window: Any, temperature: Any, new_tokens: Any, seconds: float
    ) -> tuple[list[int], RunSettings]:
        """The prompt's tokens and the run's settings, or [`Refused`] with what is wrong with them."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise Refused("The prompt is empty: type something for the target to continue.")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise Refused(f"The prompt has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are taken.")
        if window not in [value for _, value in RULES]:
            raise Refused("The window rule is not one of adaptive, fixed, heuristic.")
        for name, value, low, high in (
            ("Longest window", max_window, 1, drawing.MAX_WINDOW),
            ("Temperature", temperature, 0, 2),
            ("New tokens", new_tokens, 1, MAX_NEW_TOKENS),
        ):
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise Refused(f"{name}: a number from {low} to {high} is needed.")
        tokenizer = self.models.tokenizer
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        context = getattr(self.models.target.config.get_text_config(), "max_position_embeddings", None)
        room = MAX_NEW_TOKENS if context is None else context - len(ids)
        if room < 1:
            raise Refused(f"The prompt has {len(ids)} tokens, which fill the target's context of {context}.")
        return list(ids), RunSettings(window, int(max_window), float(temperature), min(int(new_tokens), room), seconds)

    def rounds(self, drafter: ShownDrafter, prompt: str, ids: list[int], settings: RunSettings) -> Iterator[Progress]:
        """The run as it goes on, once a round and once at the end."""
        tokenizer = self.models.tokenizer
        run = Run(self.models.target, drafter.model, ids, settings)
        frames = FrameMaker(lambda token: tokenizer.decode([token]), lambda tokens: tokenizer.decode(tokens))
        value = {"run": str(next(self._numbers)), "status": "running", "prompt": prompt, "rounds": []}
        shown: list[str] = []
        yield Progress(value, frames.totals, run.result)
        for round_ in run:
            # Text rather than dictionaries: what is sent is the difference, found by comparing the whole.
            shown = [*shown, json.dumps(frames.frame(round_), ensure_ascii=False)]
            value = {**value, "rounds": shown}
            yield Progress(value, frames.totals, run.result)
        cards = outcome(run.result, settings.temperature <= 0)
        yield Progress({**value, "status": "done", "cards": cards}, frames.totals, run.result)

    # -- what the buttons do

    def answer(
        self, prompt: Any, window: Any, max_window: Any, temperature: Any, new_tokens: Any, cost_ratio: Any
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Run the prompt: values of the stage, and at the end of the run's sums and the explainer's panel."""
        try:
            ids, settings = self.checked(prompt, window, max_window, temperature, new_tokens, self.settings.seconds)
        except Refused as refusal:
            gr.Warning(str(refusal), title="Not run")
            yield gr.skip(), gr.skip(), gr.skip()
            return
        for now in self.rounds(self.models.drafter, prompt, ids, settings):
            if now.value["status"] == "running":
                yield now.value, gr.skip(), gr.skip()
        if now.result.stopped:
            gr.Info(f"The time limit of {self.settings.seconds:.0f} s ended the text.", title="Cut short")
        yield now.value, now.totals, drawing.cost_panel(_ratio(cost_ratio), now.totals)

    def compare(
        self, prompt: Any, window: Any, max_window: Any, temperature: Any, new_tokens: Any
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Run the prompt with one drafter, then with the other: both stages, and the table of both."""
        assert self.models.compare is not None
        try:
            ids, settings = self.checked(
                prompt, window, max_window, temperature, new_tokens, self.settings.seconds / 2
            )
        except Refused as refusal:
            gr.Warning(str(refusal), title="Not run")
            yield gr.skip(), gr.skip(), gr.skip()
            return
        lines: list[dict[str, str]] = []
        for place, drafter in enumerate((self.models.compare, self.models.drafter)):
            for now in self.rounds(drafter, prompt, ids, settings):
                if now.value["status"] == "running":
                    yield (now.value, gr.skip(), gr.skip()) if place == 0 else (gr.skip(), now.value, gr.skip())
            lines.append({**now.totals.counters(), **now.value["cards"], "name": drafter.label})
            table = drawing.comparison(lines)
            yield (now.value, gr.skip(), table) if place == 0 else (gr.skip(), now.value, table)

    def cost(self, cost_ratio: Any, totals: Totals | None) -> str:
        """The explainer's sum at another cost ratio, for this visitor's last run."""
        return drawing.cost_panel(_ratio(cost_ratio), totals or self.opening_totals)

    def record_opening(self, new_tokens: int = 64) -> None:
        """Run the first example, so that the page opens with a real run, and the first visitor finds warm models."""
        prompt = self.models.examples[0][1]
        for _ in range(2):  # the first run warms up: its speed would not be that of the second
            ids, settings = self.checked(prompt, "kl", 10, 0, new_tokens, self.settings.seconds)
            *_, end = self.rounds(self.models.drafter, prompt, ids, settings)
        kept = [json.loads(frame)["kept"] for frame in end.value["rounds"]]
        self.opening = {**end.value, "show": max(range(len(kept)), key=lambda place: kept[place])}
        self.opening_totals = end.totals

    # -- the page

    def blocks(self) -> gr.Blocks:
        """The page, its events and its queue."""
        with gr.Blocks(title=f"PPOW: {TITLE}", analytics_enabled=False) as page:
            gr.HTML(f'<header class="pw-header"><h1>{TITLE}</h1><p>{LEAD}</p></header>', apply_default_css=False)
            with gr.Tabs():
                with gr.Tab("Watch", id="watch"):
                    self._watch_tab()
                if self.models.compare is not None:
                    with gr.Tab("Compare", id="compare"):
                        self._compare_tab(self.models.compare)
                with gr.Tab("Training", id="results"):
                    gr.HTML(self._results(), apply_default_css=False)
        page.queue(max_size=self.settings.queue)
        share_queue(page)
        return page

    def _watch_tab(self) -> None:
        """One run on a stage, and what it would cost at another cost ratio."""
        prompt, settings, run, stop = self._inputs("watch")
        board = _stage("stage", "watch", self.opening, "speculative decoding, round by round")
        with gr.Column(elem_classes="pw-panel"):
            gr.HTML('<h2 class="pw-h2">What would it cost?</h2>', apply_default_css=False)
            ratio = gr.Slider(
                0.01,
                1,
                EXPLAINER_COST_RATIO,
                step=0.01,
                label="Cost ratio: a draft step over a target pass",
                elem_id="cost-ratio",
            )
            panel = gr.HTML(
                drawing.cost_panel(EXPLAINER_COST_RATIO, self.opening_totals),
                apply_default_css=False,
                elem_id="cost-panel",
            )
        gr.HTML(self._about(), apply_default_css=False)
        totals = gr.State(None, time_to_live=3600)
        inputs, outputs = [prompt, *settings, ratio], [board, totals, panel]
        self._on_run("watch", self.answer, prompt, inputs, outputs, run, stop)
        ratio.input(
            self.cost,
            [ratio, totals],
            panel,
            api_name="cost",
            show_progress="hidden",
            queue=False,
            trigger_mode="always_last",
        )

    def _compare_tab(self, compare: ShownDrafter) -> None:
        """The same prompt with two drafters, a stage for each, and the table of both."""
        prompt, settings, run, stop = self._inputs("compare")
        table = gr.HTML(
            '<p class="pw-soft">The same prompt, first with one drafter, then with the other.</p>',
            apply_default_css=False,
            elem_id="compare-table",
        )
        empty = {"run": "", "status": "empty", "prompt": "", "rounds": []}
        first = _stage("stage-first", "compare", empty, compare.label, compare.label)
        second = _stage("stage-second", "compare", empty, self.models.drafter.label, self.models.drafter.label)
        inputs, outputs = [prompt, *settings], [first, second, table]
        self._on_run("compare", self.compare, prompt, inputs, outputs, run, stop)

    def _on_run(
        self,
        tab: str,
        function: Callable[..., Any],
        prompt: gr.Textbox,
        inputs: list[Any],
        outputs: list[Any],
        run: gr.Button,
        stop: gr.Button,
    ) -> None:
        """Let a tab's run button call `function`, one call at a time for each visitor, and its stop button end it."""
        running = gr.on(
            [run.click, prompt.submit],
            function,
            inputs,
            outputs,
            api_name=function.__name__,
            show_progress="minimal",  # the place in the queue, while there is one
            show_progress_on=prompt,
            trigger_mode="once",
            concurrency_limit=self.settings.concurrency,
            concurrency_id="models",
        )
        stop.click(None, cancels=[running], queue=False, js=STOPPED.format(tab))

    def _inputs(self, name: str) -> tuple[gr.Textbox, list[Any], gr.Button, gr.Button]:
        """Prompt, settings, run and stop of a tab."""
        with gr.Row(equal_height=True, elem_classes="pw-ask"):
            prompt = gr.Textbox(
                value=self.models.examples[0][1],
                label="Prompt",
                lines=3,
                max_lines=4,
                max_length=MAX_PROMPT_CHARACTERS,
                scale=8,
                elem_id=f"{name}-prompt",
            )
            with gr.Column(scale=1, min_width=130):
                run = gr.Button("Compare" if name == "compare" else "Answer", variant="primary", elem_id=f"{name}-run")
                stop = gr.Button("Stop", elem_id=f"{name}-stop")
        gr.Examples(
            [[text] for _, text in self.models.examples],
            [prompt],
            example_labels=[label for label, _ in self.models.examples],
            label="Examples",
        )
        with gr.Accordion("Settings", open=False), gr.Row():
            settings = [
                gr.Radio(RULES, value="kl", label="Window rule", elem_id=f"{name}-rule"),
                gr.Slider(1, drawing.MAX_WINDOW, 10, step=1, label="Longest window"),
                gr.Slider(0, 2, 0, step=0.1, label="Temperature, 0 is greedy"),
                gr.Slider(16, MAX_NEW_TOKENS, 96, step=16, label="New tokens", elem_id=f"{name}-tokens"),
            ]
        return prompt, settings, run, stop

    def _about(self) -> str:
        models = self.models
        return (
            f'<p class="pw-soft">Target <code>{escape(models.target_label)}</code>, drafter '
            f"<code>{escape(models.drafter.label)}</code>. The gauge shows the running KL(P‖Q) of verified tokens "
            "on the draft vocabulary, on a scale of kl / (1 + kl); below it the target's mass outside, if any. "
            "Acceptance length counts the target's own token. The faint row is really drafted and verified from the "
            "same prefixes; its time is in no speed shown. The page opens with a run recorded when it started. "
            "Prompts are neither stored nor logged.</p>"
        )

    def _results(self) -> str:
        parts = []
        for drafter in (self.models.drafter, self.models.compare):
            if drafter is not None and drafter.log:
                title, charts = f"Training of {escape(drafter.label)}", drawing.curves(drafter.log)
                parts.append(f'<section class="pw-panel"><h2>{title}</h2>{charts}</section>')
        for name, result in self.models.benchmarks:
            title = f"Benchmark: {escape(name)}"
            parts.append(f'<section class="pw-panel"><h2>{title}</h2>{drawing.benchmark(result)}</section>')
        nothing = (
            '<p class="pw-soft">No training log lies beside the drafter and no stored benchmark was found. '
            "<code>ppow bench --json benchmark.json</code> makes one.</p>"
        )
        return "".join(parts) or nothing


def client_of(request: Any) -> str:
    """Who sent a request: the address that the nearest proxy saw, else the connection's own."""
    forwarded = request.headers.get("x-forwarded-for", "").split(",")[-1].strip()
    return forwarded or (request.client.host if request.client else "")


def share_queue(page: gr.Blocks) -> None:
    """Let no client fill the page's queue, or its memory with answers that nobody reads.

    Gradio limits the queue as a whole only, and keeps what was not read of 2,000 sessions.
    """
    queue, push = page._queue, page._queue.push
    unread = queue.pending_messages_per_session
    unread.max_size = SESSIONS

    async def push_of_client(body: Any, request: Any, username: Any) -> Any:
        client = client_of(request)
        waiting = [event for event in queue.event_ids_to_events.values() if client_of(event.request) == client]
        if len(waiting) >= REQUESTS_EACH:
            return False, f"{len(waiting)} of your requests are waiting or running. Wait for one to end.", "queue_full"
        if body.session_hash in unread:
            if unread[body.session_hash].qsize() > UNREAD_MESSAGES:
                return False, "Earlier answers were not read. Load the page again.", "queue_full"
            unread.move_to_end(body.session_hash)  # so that newer sessions push out those that ask for nothing
        return await push(body, request, username)

    queue.push = push_of_client  # type: ignore[method-assign]


def _stage(name: str, tab: str, value: dict[str, Any], label: str, who: str = "") -> gr.HTML:
    """A run's gauge, windows and text, drawn by stage.js from what is sent."""
    return gr.HTML(
        value=value,
        html_template=drawing.stage(name, tab, label, who),
        js_on_load=(HERE / "stage.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=name,
    )


def _ratio(value: Any) -> float:
    """A cost ratio within the slider's range, whatever was sent."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        return EXPLAINER_COST_RATIO
    return min(max(float(value), 0.01), 1.0)


def theme() -> gr.themes.Base:
    """The page's colours for Gradio's own parts, light and dark, and fonts that lie on the visitor's machine."""
    sans = ["Inter", "system-ui", "-apple-system", "Segoe UI", "Noto Sans", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "JetBrains Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    paper, card, line, ink, soft = "#fbfaf7", "#ffffff", "#d9dce3", "#1d2430", "#5d6779"
    night, night_card, night_line, night_ink, night_soft = "#12151b", "#191d25", "#323a48", "#e8ebf1", "#a3adbe"
    base = gr.themes.Base(
        font=sans, font_mono=mono, primary_hue="slate", neutral_hue="slate", radius_size="lg", spacing_size="sm"
    )
    colours = {
        "body_background_fill": (paper, night),
        "body_text_color": (ink, night_ink),
        "body_text_color_subdued": (soft, night_soft),
        "block_background_fill": (card, night_card),
        "block_border_color": (line, night_line),
        "block_label_text_color": (soft, night_soft),
        "block_title_text_color": (soft, night_soft),
        "background_fill_primary": (card, night_card),
        "background_fill_secondary": (paper, night),
        "border_color_primary": (line, night_line),
        "input_background_fill": (paper, night),
        "input_border_color": (line, night_line),
        "button_primary_background_fill": (ink, night_ink),
        "button_primary_background_fill_hover": (soft, night_soft),
        "button_primary_text_color": (card, night),
        "button_secondary_background_fill": (card, night_card),
        "button_secondary_border_color": (line, night_line),
        "button_secondary_text_color": (ink, night_ink),
        "checkbox_label_background_fill": (card, night_card),
        "slider_color": (soft, night_soft),
    }
    return base.set(
        **{name: light for name, (light, _) in colours.items()},
        **{f"{name}_dark": dark for name, (_, dark) in colours.items()},
        button_border_width="1px",
    )


def launch(settings: DemoSettings | None = None, **options: Any) -> Any:
    """Load the models, record the opening run, and serve the page; `options` go to Gradio's `launch`."""
    demo = Demo(settings or DemoSettings.from_environment(os.environ))
    demo.record_opening()
    return demo.blocks().launch(
        theme=theme(),
        css_paths=[HERE / "style.css"],
        footer_links=["gradio"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size=1,
        state_session_capacity=SESSIONS,
        **options,
    )
