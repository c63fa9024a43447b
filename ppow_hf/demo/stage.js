// Puts a run's frames into the stage's fixed places, and plays them. Runs inside gr.HTML (element, props, watch).
// Every text goes in as textContent: nothing of a prompt or an answer is ever read as markup.
const one = (selector) => element.querySelector(selector);
const rows = [...element.querySelectorAll(".pw-cells")].map((row) => [...row.children]);
const [button_first, button_back, button_play, button_step] = ["first", "back", "play", "step"].map((n) => one(".pw-" + n));
const seek = one(".pw-seek"), text = one(".pw-text"), svg = one(".pw-time");
const TALLEST = 16, LIVE_MS = 150, HURRY_MS = 45, REPLAY_MS = 750;
const tab = one(".pw-stage").dataset.tab;
let run = "", stopped = "", frames = [], spans = [], shown = -1, playing = false, live = false, timer = 0;

const running = () => (props.value || {}).status === "running" && stopped !== run;
const put = (target, value) => { if (target.textContent !== value) target.textContent = value; };

function fill(cells, contents) {
  cells.forEach((cell, place) => {
    const content = contents[place];
    const kind = content ? content[1] : "off";
    if (cell.dataset.kind !== kind) { cell.dataset.kind = kind; cell.className = "pw-cell " + kind; }
    if (!content) { cell.setAttribute("aria-hidden", "true"); return; }
    put(cell.firstChild, content[0]);
    put(cell.lastChild, content[2]);
    cell.title = content[3];
    cell.setAttribute("aria-label", content[3]);
    cell.removeAttribute("aria-hidden");
  });
}

function show(place, speak) {
  const frame = frames[place];
  if (!frame) return;
  shown = place;
  element.dataset.round = frame.n;
  one(".pw-needle").style.transform = "rotate(" + frame.angle + "deg)";
  one(".pw-gauge svg").setAttribute("aria-label", "KL " + frame.kl.toFixed(2) + " nats");
  put(one(".pw-kl"), "KL " + frame.kl.toFixed(2));
  put(one(".pw-outside"), frame.outside);
  put(one(".pw-p"), frame.p ? "first draft kept with p = " + frame.p : "\u00a0");
  put(one(".pw-title"), frame.head);
  put(one(".pw-move"), frame.move);
  put(one(".pw-where"), "round " + frame.n + " of " + frames.length);
  put(one(".pw-fixed-title"), frame.fixed_head);
  put(one(".pw-fixed-note"), frame.fixed_note);
  fill(rows[0], frame.cells);
  fill(rows[1], frame.fixed);
  for (const name of ["rounds", "rounds_note", "tau", "wasted", "fixed", "speed"]) put(one(".pw-" + name), frame.counters[name]);
  put(one(".pw-wasted-too"), frame.counters.wasted);
  one(".bar-a").style.width = frame.counters.wasted_bar + "%";
  one(".bar-f").style.width = frame.counters.fixed_bar + "%";
  spans.forEach((span, i) => { span.dataset.when = i < place ? "past" : i === place ? "now" : "later"; });
  const now = spans[place];
  if (now && text.scrollHeight > text.clientHeight) text.scrollTop = now.offsetTop - text.clientHeight / 2;
  seek.max = frames.length - 1;
  seek.value = place;
  seek.setAttribute("aria-valuetext", "round " + frame.n + ": " + frame.head);
  svg.querySelector(".cursor").setAttribute("x", place);
  cards();
  buttons();
  if (speak) put(one(".pw-said"), "Round " + frame.n + ". " + frame.head + ". " + frame.fixed_head + ".");
}

function cards() {
  const done = (props.value || {}).cards;
  for (const name of ["ratio", "ratio_note", "same", "same_note"]) {
    const note = stopped === run ? "stopped before plain generate ran" : name[0] === "r" ? "measured when the text is done" : "compared when the text is done";
    put(one(".pw-" + name), (done && done[name]) || (name.endsWith("note") ? note : stopped === run ? "–" : "…"));
  }
  if (done && shown === frames.length - 1) put(one(".pw-speed"), done.speed);
}

function buttons() {
  const none = frames.length === 0;
  button_first.disabled = button_back.disabled = none || shown <= 0;
  button_step.disabled = none || shown >= frames.length - 1;
  button_play.disabled = seek.disabled = none;
  put(button_play, playing ? "❚❚ pause" : "▶ play");
  element.dataset.state = none ? "empty" : running() ? "running" : playing ? "playing" : "paused";
}

function timeline() {
  let kept = "", drafted = "";
  frames.forEach((frame, x) => {
    const bar = (from, to) => "M" + (x + 0.15) + " " + (TALLEST - from) + "V" + (TALLEST - to) + "H" + (x + 0.85) + "V" + (TALLEST - from) + "Z";
    if (frame.kept) kept += bar(0, frame.kept);
    if (frame.window > frame.kept) drafted += bar(frame.kept, frame.window);
    if (!frame.window) drafted += bar(0, 0.25);
  });
  svg.setAttribute("viewBox", "0 0 " + Math.max(frames.length, 24) + " " + TALLEST);
  svg.querySelector(".kept").setAttribute("d", kept);
  svg.querySelector(".drafted").setAttribute("d", drafted);
  seek.style.width = (100 * frames.length) / Math.max(frames.length, 24) + "%";
}

function add(frame, place) {
  const span = document.createElement("span");
  span.className = "pw-round r" + (place % 4);
  span.title = "round " + frame.n + ": " + frame.kept + " kept";
  for (const [piece, kind] of [[frame.text[0], "kept"], [frame.text[1], "own"]]) {
    const part = document.createElement("span");
    part.className = kind;
    part.textContent = piece;
    span.append(part);
  }
  span.dataset.when = "later";
  span.addEventListener("click", () => { pause(); show(place, true); });
  text.append(span);
  spans.push(span);
}

function pause() { playing = live = false; clearTimeout(timer); timer = 0; buttons(); }
function play() {
  if (shown >= frames.length - 1 && !running()) shown = -1;
  playing = true;
  tick();
}
function tick() {
  clearTimeout(timer);
  timer = 0;
  if (!playing) return;
  if (shown < frames.length - 1) {
    show(shown + 1, false);
    const behind = frames.length - 1 - shown;
    timer = setTimeout(tick, live ? (behind > 4 ? HURRY_MS : LIVE_MS) : REPLAY_MS);
  } else if (!running()) {
    playing = live = false;
    buttons();
  }
}

function update() {
  const value = props.value || {};
  if (value.run !== run) {
    run = value.run;
    element.dataset.run = run;
    frames = [];
    spans.forEach((span) => span.remove());
    spans = [];
    shown = -1;
    put(one(".pw-prompt"), value.prompt || "");
    put(one(".pw-said"), "");
    fill(rows[0], []);
    fill(rows[1], []);
    playing = live = value.status === "running";
  }
  for (let place = frames.length; place < (value.rounds || []).length; place++) {
    frames.push(JSON.parse(value.rounds[place]));
    add(frames[place], place);
  }
  timeline();
  if (value.show !== undefined && !playing && shown < 0) show(value.show, false);
  if (shown >= 0) put(one(".pw-where"), "round " + frames[shown].n + " of " + frames.length);
  if (shown >= 0) seek.max = frames.length - 1;
  cards();
  buttons();
  if (playing && !timer) tick();
}

button_first.addEventListener("click", () => { pause(); show(0, true); });
button_back.addEventListener("click", () => { pause(); show(Math.max(shown - 1, 0), true); });
button_step.addEventListener("click", () => { pause(); show(Math.min(shown + 1, frames.length - 1), true); });
button_play.addEventListener("click", () => (playing ? pause() : play()));
seek.addEventListener("input", () => { pause(); show(+seek.value, false); });
document.addEventListener("pw-stop-" + tab, () => {
  if (!running()) return;
  stopped = run;
  if (!timer) playing = live = false;
  cards();
  buttons();
 });
watch("value", update);
update();
