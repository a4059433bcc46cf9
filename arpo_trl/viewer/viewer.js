// The page of `arpo_trl.viewer`. Data: an "index" block and one block a step (made in page.py), unpacked when needed.
// Every text of a record becomes a text node or an attribute value (`node`, `svg`); nothing here writes HTML.

const $ = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}
const node = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const options = (select, entries) =>
  select.replaceChildren(...entries.map(([value, text = value]) => node("option", { value }, String(text))));

async function unpack(id) {
  const packed = atob($(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const index = await unpack("index");
const stepsWithTrees = index.steps.filter((step) => step.tree).map((step) => step.step);
const metrics = [...new Set(index.steps.flatMap((step) => Object.keys(step.metrics)))];

// What the page shows. The address keeps it, so that a link leads to the same segment.
const state = {
  step: null, group: 0, row: null, token: null, other: null, measure: "entropy", metric: null, theme: null,
};
let groups = []; // of the step that is shown
let group = null;
let largestReward = 1;
let shapes = new Map(); // part → its shape in the tree

// ----------------------------------------------------------------------------------------------- values and words

const number = (value, digits = 3) => (value == null ? "–" : String(+value.toFixed(digits)).replace("-", "−"));
const signed = (value, digits) => (value > 0 ? "+" : "") + number(value, digits);
const plural = (count, word, words = word + "s") => `${count} ${count === 1 ? word : words}`;
const joined = (facts) => facts.filter(Boolean).join(" · ");
const unique = (values) => [...new Set(values)];
const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
const failed = (part) => part.kind === "tool" && part.calls.some((call) => call.error != null);

// Of a training run its number, of an evaluation the benchmark.
const stepName = (step) => index.steps.find((each) => each.step === step).name;
const isEvaluation = () => groups[0]?.question != null;

// Of the function that is chosen, or the sum of all.
function reward(row) {
  const name = $("reward").value;
  if (name) return row.rewards[name] ?? null;
  const present = Object.values(row.rewards).filter((value) => value != null);
  return present.length ? present.reduce((a, b) => a + b, 0) : null;
}

function rewardColour(value) {
  const amount = (100 * Math.abs(value ?? 0)) / largestReward;
  return `color-mix(in oklab, var(--zero), var(${value < 0 ? "--negative" : "--positive"}) ${amount}%)`;
}

// Under hard attribution a stretch that rows share has an advantage of its own.
function advantage(row, part) {
  const span = row.shared_advantages?.find((each) => each.start <= part.start && part.start < each.end);
  return (span ?? row).advantage;
}

function rowTitle(row) {
  if (row.kind !== "fork") return `Row ${row.row} · ${row.kind}`;
  if (row.parent == null) return `Row ${row.row} · fork, its parent is missing`;
  return `Row ${row.row} · fork of row ${row.parent} at token ${row.fork}`;
}

function partTitle(part) {
  if (part.kind === "model") return "Model";
  return unique(part.calls.map((call) => call.name)).join(", ") || "Not sampled by the model";
}

function partFacts(part, row) {
  const tokens = part.end > part.start ? `tokens ${part.start}–${part.end}` : "not read: the row ended here";
  if (part.kind === "tool") return tokens;
  return joined([
    tokens,
    part.entropy != null && `entropy ${number(part.entropy)} nats`,
    part.gap != null && `gap ${signed(part.gap)}`,
    part.probability != null && `branch probability ${number(part.probability)}`,
    part.forks != null && plural(part.forks, "fork"),
    advantage(row, part) != null && `advantage ${signed(advantage(row, part))}`,
  ]);
}

function callFacts(call) {
  return joined([
    call.error != null && "failed",
    call.seconds != null && (call.seconds < 0.001 ? "under 1 ms" : `${number(call.seconds)} s`),
    {
      shared: "shared, not run again",
      merged: "merged with another row's, not run again",
      cached: "from cache",
      refused: "not run",
    }[call.kind],
  ]);
}

// Round numbers between two values, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const first = Math.ceil(low / size - 1e-9), last = Math.floor(high / size + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => +((first + i) * size).toPrecision(12));
}
const ticksFor = (pixels) => Math.max(Math.round(pixels / 70), 2);

// -------------------------------------------------------------------------------------------------- the trajectory

function currentPart() {
  const row = group.byRow.get(state.row);
  return partsOf(row).find((part) => part.start === state.token) ?? null;
}

const textOf = (text, attributes = {}) => node("pre", { tabindex: 0, ...attributes }, text === "" ? "(empty)" : text);

function card(part, owner, row) {
  const current = part === currentPart() && row.row === state.row;
  const kind = `card ${part.kind}${failed(part) ? " failed" : ""}${current ? " current" : ""}`;
  const facts = [
    partFacts(part, row),
    owner !== row && `shared with row ${owner.row}`,
    part.calls?.length === 1 && callFacts(part.calls[0]),
  ];
  return node("article", { class: kind, "aria-current": current },
    node("h3", {}, partTitle(part)),
    node("div", { class: "facts" }, joined(facts)),
    part.kind === "model" ? textOf(part.text) : [
      part.calls.map((call) => callCard(call, part.calls.length > 1)),
      part.text && node("details", {}, node("summary", {}, "as the model read it"), textOf(part.text)),
    ]);
}

const pictures = (names) =>
  names.filter((name) => index.images[name]).map((name) => node("img", { src: index.images[name], alt: "image" }));

function callCard(call, named) {
  const isObject = call.arguments !== null && typeof call.arguments === "object";
  const given = isObject ? Object.entries(call.arguments) : [["arguments", call.arguments ?? ""]];
  return [
    named && node("div", { class: "facts" }, node("b", {}, call.name), " ", callFacts(call)),
    node("div", { class: "call" },
      given.map(([name, value]) => [node("div", {}, name), textOf(asText(value), { class: "given" })]),
      node("div", {}, "result"), node("div", {}, pictures(call.images), textOf(call.result, { class: "answer" }))),
    call.error != null && call.error !== call.result && node("pre", { class: "failed-text" }, call.error),
  ];
}

function rowFacts(row) {
  const facts = [
    ...Object.entries(row.rewards).map(([name, value]) => `${name} ${signed(value)}`),
    row.advantage != null && `advantage ${signed(row.advantage)}`,
    plural(row.length, "token"),
    row.truncated && { true: "cut at the call limit", false: "cut at the length limit" }[row.out_of_turns] ||
      row.truncated && "cut at a length or call limit",
  ];
  const answered = isEvaluation() && [node("br"), "answered ", node("b", {}, row.prediction ?? "nothing")];
  return node("div", { class: "facts" }, node("b", {}, rowTitle(row)), node("br"), joined(facts), answered);
}

// One row, or two: what they share once, then each on its own side.
function drawTranscript() {
  const row = group.byRow.get(state.row), other = group.byRow.get(state.other);
  const entry = (each) => [each.row, `${each.row} (${each.kind}, ${signed(reward(each))})`];
  options($("row"), group.rows.map(entry));
  options($("other"), [["", "–"], ...group.rows.filter((each) => each !== row).map(entry)]);
  $("row").value = row.row;
  $("other").value = other?.row ?? "";
  document.querySelector("main").classList.toggle("comparing", other != null);

  const rows = other ? [row, other] : [row];
  const paths = rows.map(path);
  const differ = paths[0].findIndex(([part], i) => part !== paths[1]?.[i]?.[0]);
  const shared = differ < 0 ? paths[0].length : differ;
  const side = (parts, i) =>
    node("div", { class: "side" }, parts.slice(shared).map(([part, owner]) => card(part, owner, rows[i])));
  const prompt = [node("summary", {}, `Prompt · ${plural(group.prompt_tokens, "token")}`), pictures(group.images), textOf(group.prompt)];
  $("transcript").replaceChildren(
    isEvaluation() ? node("div", { class: "asked" }, group.question,
      node("div", { class: "facts" }, "accepted ", node("b", {}, joined([group.answer ?? "nothing"].flat())))) : "",
    group.example ? node("dl", { class: "example" },
      Object.entries(group.example).map(([name, text]) => [node("dt", {}, name), node("dd", {}, text)])) : "",
    node("details", { class: "prompt" }, prompt),
    node("div", { class: "sides" }, rows.map(rowFacts)),
    ...paths[0].slice(0, shared).map(([part, owner]) => card(part, owner, row)),
    other ? node("div", { class: "divider" }, shared ? "Here they part" : "They share the prompt alone") : "",
    node("div", { class: "sides" }, paths.map(side)),
  );
  document.querySelector(".card.current")?.scrollIntoView({ block: "nearest" });
}

// --------------------------------------------------------------------------------------- groups, filters, metrics

function matches(row) {
  const value = reward(row), low = $("reward-min").value, high = $("reward-max").value, tool = $("tool").value;
  if (low !== "" && !(value >= +low)) return false;
  if (high !== "" && !(value <= +high)) return false;
  if (tool === "any") return true;
  if (tool === "none") return row.calls.length === 0;
  return row.calls.some((call) => (tool === "failed" ? call.error != null : `tool ${call.name}` === tool));
}

function drawGroups() {
  const all = groups.flatMap((each) => each.rows), found = new Set(all.filter(matches));
  largestReward = all.reduce((largest, row) => Math.max(largest, Math.abs(reward(row) ?? 0)), 1e-9);
  $("matches").textContent = found.size === all.length
    ? plural(all.length, "trajectory", "trajectories")
    : `${found.size} of ${plural(all.length, "trajectory", "trajectories")} match`;
  const shown = groups.map((each, at) => [each, at]).filter(([each]) => each.rows.some((row) => found.has(row)));
  $("groups").replaceChildren(...shown.map(([each, at]) => groupItem(each, at, found)));
}

function groupItem(each, at, found) {
  const name = isEvaluation() ? `Question ${each.prompt_index}` : `Group ${at}`;
  const rewards = each.rows.map(reward).filter((value) => value != null);
  const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
  const forks = each.rows.filter((row) => row.kind === "fork").length;
  const leaf = (row) => node("i", { class: found.has(row) ? "" : "out", "--colour": rewardColour(reward(row)) });
  return node("li", {},
    node("button", { "aria-current": at === state.group, onclick: () => openGroup(at) },
      node("div", { class: "top" },
        node("b", {}, name),
        node("span", {}, joined([`reward ${signed(mean, 2)}`, !isEvaluation() && plural(forks, "fork")]))),
      node("div", { class: "preview" }, each.preview),
      node("div", { class: "leaves" }, each.rows.map(leaf))));
}

function drawChart() {
  const chart = $("chart"), LEFT = 46, RIGHT = 12, TOP = 8, HEIGHT = 120, BOTTOM = HEIGHT - 20;
  const right = chart.clientWidth - RIGHT;
  const points = index.steps.map(({ step, tree, metrics }) => ({ step, tree, value: metrics[state.metric] }));
  const present = points.filter((point) => point.value != null), values = present.map((point) => point.value);
  const now = points.find((point) => point.step === state.step);
  $("metric-value").textContent = now ? `${number(now.value)} at ${stepName(state.step)}` : "";
  if (right < LEFT || !values.length) return chart.replaceChildren();

  const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);
  const padded = (low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]);
  const steps = padded(points[0].step, points.at(-1).step), range = padded(Math.min(...values), Math.max(...values));
  const x = scale(...steps, LEFT, right), y = scale(...range, BOTTOM, TOP);
  const curve = points.map(({ step, value }, i) => {
    const pen = i && points[i - 1].value != null ? "L" : "M"; // a step without a value leaves a gap
    return value == null || isEvaluation() ? "" : `${pen}${x(step)} ${y(value)}`;
  });
  const isNow = (point) => point.step === state.step;
  const edges = points.length > 1 && isEvaluation() ? { [points[0].step]: "start", [points.at(-1).step]: "end" } : {};
  const anchor = (step) => edges[step] ?? "middle"; // a name is too long for the margin
  const dot = (point) =>
    svg("circle", {
      class: point.tree ? "" : "bare", cx: x(point.step), cy: y(point.value), r: isNow(point) ? 4.5 : 2.5,
    });
  chart.replaceChildren(
    ...ticks(...range, 3).flatMap((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)),
    ]),
    ...ticks(...steps, ticksFor(right - LEFT)).filter(Number.isInteger).map((step) =>
      svg("text", { x: x(step), y: HEIGHT - 4, "text-anchor": anchor(step) }, isEvaluation() ? stepName(step).split(" ")[0] : step)),
    svg("line", { class: "now", x1: x(state.step), x2: x(state.step), y1: TOP, y2: BOTTOM }),
    svg("path", { class: "curve", d: curve.join("") }),
    ...present.filter((point) => present.length <= 120 || isNow(point)).map(dot),
  );
  const nearest = (event, among) => {
    const distance = (step) => Math.abs(x(step) + chart.getBoundingClientRect().left - event.clientX);
    return among.reduce((best, step) => (distance(step) < distance(best) ? step : best));
  };
  chart.onclick = (event) => openStep(nearest(event, stepsWithTrees));
  chart.onpointermove = (event) => {
    const step = nearest(event, points.map((point) => point.step));
    showTip(event, [`${stepName(step)}: ${number(points.find((point) => point.step === step).value)}`]);
  };
  chart.onpointerleave = hideTip;
}

// ------------------------------------------------------------------------------------- tip, address, light and dark

function showTip(event, children) {
  const tip = $("tip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const fitsBelow = event.clientY + 18 + height <= innerHeight;
  tip.style.left = `${Math.max(Math.min(event.clientX + 14, innerWidth - width - 8), 8)}px`;
  tip.style.top = `${event.clientY + (fitsBelow ? 18 : -height - 12)}px`;
}
const hideTip = () => ($("tip").hidden = true);

function saveAddress() {
  const kept = Object.entries(state).filter(([, value]) => value != null);
  // a page inside a notebook (about:srcdoc) has no address of its own
  if (location.protocol !== "about:") history.replaceState(null, "", "#" + new URLSearchParams(kept));
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of ["step", "group", "row", "token", "other"])
    state[name] = /^\d+$/.test(given.get(name)) ? +given.get(name) : null;
  state.metric = metrics.includes(given.get("metric")) ? given.get("metric") : metrics[0];
  state.measure = given.get("measure") in index.scales ? given.get("measure") : "entropy";
  state.theme = given.get("theme");
}

// The theme that was chosen, or else the system's.
function setTheme() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.classList.toggle("dark", dark);
  $("theme").textContent = dark ? "Light" : "Dark";
  return dark;
}

// ------------------------------------------------------------------------------------------------------ navigation

async function openStep(step, target = {}) {
  state.step = step;
  const loaded = await unpack(`step-${step}`);
  if (state.step !== step) return; // another step was asked for meanwhile
  groups = loaded;
  for (group of groups) {
    group.byRow = new Map(group.rows.map((row) => [row.row, row]));
    for (const row of group.rows) {
      row.calls = partsOf(row).flatMap((part) => part.calls ?? []);
      // the tool result at which a fork left: the first is 1
      row.result = partsOf(row).filter((part) => part.kind === "model" && part.start < row.fork).length;
    }
  }
  offerFilters();
  const at = stepsWithTrees.indexOf(step), last = stepsWithTrees.length - 1;
  $("step").value = at;
  $("previous-step").disabled = at === 0;
  $("next-step").disabled = at === last;
  const among = isEvaluation() ? `${at + 1} of ${last + 1}` : `${stepsWithTrees[0]} to ${stepsWithTrees[last]}`;
  $("step-name").textContent = stepName(step) + (last ? ` (${among})` : "");
  drawChart();
  drawDistributions();
  openGroup(groups[target.group] ? target.group : 0, target);
}

// Reward functions and tools of the step; what was chosen before stays chosen if it is there.
function offerFilters() {
  const rows = groups.flatMap((each) => each.rows);
  const names = unique(rows.flatMap((row) => Object.keys(row.rewards)));
  const tools = unique(rows.flatMap((row) => row.calls.map((call) => call.name))).sort();
  const offered = {
    reward: [...(names.length > 1 && !isEvaluation() ? [["", "sum of all"]] : []), ...names.map((name) => [name])],
    tool: [
      ["any"], ["none", "none called"], ["failed", "a call failed"], ...tools.map((name) => [`tool ${name}`, name]),
    ],
  };
  for (const [id, entries] of Object.entries(offered)) {
    const before = $(id).value;
    options($(id), entries);
    if (entries.some(([value]) => value === before)) $(id).value = before;
  }
}

function openGroup(at, target = {}) {
  state.group = at;
  group = groups[at];
  const first = group.rows.find(matches) ?? group.rows[0];
  state.row = group.byRow.has(target.row) ? target.row : first.row;
  state.token = target.token ?? null;
  state.other = group.byRow.has(target.other) && target.other !== state.row ? target.other : null;
  draw();
}

function select(row, part = null) {
  if (state.other === row.row) state.other = null;
  state.row = row.row;
  state.token = part?.start ?? null;
  if (!part) $("reader").scrollTop = 0;
  drawTranscript();
  drawTree();
  saveAddress();
}

function draw() {
  drawGroups();
  drawLegend();
  drawTranscript(); // before the tree: two rows side by side leave it less room
  drawTree();
  saveAddress();
}

function restore() {
  readAddress();
  setTheme();
  $("measure").value = state.measure;
  $("metric").value = state.metric;
  return openStep(stepsWithTrees.includes(state.step) ? state.step : stepsWithTrees[0], { ...state });
}

options($("metric"), metrics.map((name) => [name]));
$("notes").textContent = index.notes.join("\n");
$("notes").hidden = !index.notes.length;
$("step").max = stepsWithTrees.length - 1;
$("step").oninput = () => openStep(stepsWithTrees[+$("step").value]);
$("previous-step").onclick = () => openStep(stepsWithTrees[+$("step").value - 1]);
$("next-step").onclick = () => openStep(stepsWithTrees[+$("step").value + 1]);
$("theme").onclick = () => {
  state.theme = setTheme() ? "light" : "dark";
  setTheme();
  saveAddress();
};
$("metric").onchange = () => {
  state.metric = $("metric").value;
  drawChart();
  saveAddress();
};
$("measure").onchange = () => {
  state.measure = $("measure").value;
  draw();
};
$("other").onchange = () => {
  state.other = $("other").value === "" ? null : +$("other").value;
  draw();
};
$("row").onchange = () => select(group.byRow.get(+$("row").value));
$("zoom").oninput = drawTree;
for (const id of ["reward", "reward-min", "reward-max", "tool"]) $(id).oninput = draw;
matchMedia("(prefers-color-scheme: dark)").onchange = setTheme;
addEventListener("hashchange", restore);

await restore();
new ResizeObserver(() => {
  drawChart();
  drawTree();
}).observe($("middle"));
document.body.dataset.ready = "";
