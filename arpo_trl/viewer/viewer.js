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
const TOTAL = "";

// What the page shows; all of it is kept in the address, so that a link leads to the same segment.
const state = { step: null, group: 0, row: null, token: null, other: null, measure: "entropy", metric: null, theme: null };
let groups = []; // of the step that is shown
let group = null;
let largestReward = 1;
let shapes = new Map(); // part → its shape in the tree

// ---------------------------------------------------------------------------------------------- values and words

const number = (value, digits = 3) => (value == null ? "–" : String(+value.toFixed(digits)).replace("-", "−"));
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const joined = (facts) => facts.filter(Boolean).join(" · ");
const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

function reward(row) {
  const name = $("reward").value;
  if (name !== TOTAL) return row.rewards[name] ?? null;
  const present = Object.values(row.rewards).filter((value) => value != null);
  return present.length ? present.reduce((a, b) => a + b, 0) : null;
}

function rewardColour(value) {
  const amount = (100 * Math.abs(value ?? 0)) / largestReward;
  return `color-mix(in oklab, var(--zero), var(${value < 0 ? "--negative" : "--positive"}) ${amount}%)`;
}

function rowTitle(row) {
  if (row.kind !== "fork") return `Row ${row.row} · ${row.kind}`;
  return `Row ${row.row} · ` + (row.parent == null ? "fork, its parent is missing" : `fork of row ${row.parent} at token ${row.fork}`);
}

function partTitle(part) {
  if (part.kind === "model") return "Model";
  const names = [...new Set(part.calls.map((call) => call.name))];
  return names.length ? names.join(", ") : "Not sampled by the model";
}

// Under hard attribution a stretch that rows share has an advantage of its own.
function advantage(row, part) {
  const span = row.shared_advantages?.find((each) => each.start <= part.start && part.start < each.end);
  return (span ?? row).advantage;
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

const callFacts = (call) =>
  joined([
    call.error != null && "failed",
    call.seconds != null && (call.seconds < 0.001 ? "under 1 ms" : `${number(call.seconds)} s`),
    call.cached && "from cache",
    call.shared && "shared, not run again",
  ]);

// ------------------------------------------------------------------------------------------------------- the tree

// Parts of a trajectory from its start: those of its ancestors up to the fork, then its own. → [[part, owner], …]
function path(row) {
  const own = row.parts.map((part) => [part, row]);
  if (row.parent == null) return own;
  return [...path(group.byRow.get(row.parent)).filter(([part]) => part.start < row.fork), ...own];
}

// Rows from top to bottom: a fork under its parent, the later fork the nearer one, so that no two lines cross.
function lanes() {
  const children = (parent) => group.rows.filter((row) => row.parent === parent).sort((a, b) => b.fork - a.fork);
  const below = (row) => [row, ...children(row.row).flatMap(below)];
  return children(null).flatMap(below);
}

// 0…1 of the colour scale, and its sign.
function amount(part, row) {
  const value = state.measure === "advantage" ? advantage(row, part) : part[state.measure];
  return value == null ? null : Math.min(Math.abs(value) / (index.scales[state.measure] || 1), 1) * (value < 0 ? -1 : 1);
}
const isSigned = () => state.measure === "gap" || state.measure === "advantage";

function ticks(low, high, count) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const first = Math.ceil(low / size - 1e-9);
  return Array.from({ length: Math.floor(high / size + 1e-9) - first + 1 }, (_, i) => +((first + i) * size).toPrecision(12));
}

const stripes = () =>
  svg("pattern", { id: "stripes", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("rect", { class: "stripe-back", width: 6, height: 6 }), svg("line", { class: "stripe", x1: 1, x2: 1, y2: 6 }));

function drawTree() {
  const LANE = 27, TOP = 24, LEFT = 54, RIGHT = 84;
  const order = lanes();
  const length = Math.max(...order.map((row) => row.length), 1);
  const width = Math.max(($("tree").clientWidth - LEFT - RIGHT - 2) * $("zoom").value, 120);
  const x = (token) => LEFT + (token / length) * width;
  const y = (row) => TOP + (order.indexOf(row) + 0.5) * LANE;
  const bottom = TOP + order.length * LANE;
  const current = group.byRow.get(state.row);
  const onPath = new Set(current ? path(current).map(([part]) => part) : []);

  const under = ticks(0, length, clampTicks(width)).flatMap((token) => [
    svg("line", { class: "grid", x1: x(token), x2: x(token), y1: TOP - 4, y2: bottom }),
    svg("text", { x: x(token), y: 14, "text-anchor": "middle" }, token ? number(token) : "token 0"),
  ]);
  const over = [], dots = [];
  shapes = new Map();
  for (const row of order) {
    const out = matches(row) ? "" : " out";
    const middle = y(row);
    const parent = row.parent == null ? null : path(row).filter(([part]) => part.end <= row.fork).at(-1)?.[1];
    if (parent) {
      const from = y(parent), at = x(row.fork);
      under.push(svg("path", { class: "fork" + out, d: `M${at} ${from} V${middle - 5} q0 5 5 5` }));
      dots.push(svg("circle", { class: "fork-dot" + out, cx: at, cy: from, r: 3.5 }));
    }
    over.push(svg("text", { class: "name" + out + (row === current ? " current" : ""), x: 8, y: middle + 4, onclick: () => select(row) },
      (row.kind === "fork" ? "└ " : row.kind === "supplement" ? "+ " : "") + row.row));
    for (const part of row.parts) {
      const left = x(part.start) + (parent && part === row.parts[0] ? 5 : 0.75);
      const wide = Math.max(x(part.end) - left - 0.75, 3);
      const shape = drawPart(part, row, left, middle, wide, out);
      if (onPath.has(part)) under.unshift(svg("rect", { class: "on-path", x: x(part.start), y: middle - LANE / 2, width: x(part.end) - x(part.start), height: LANE }));
      shape.addEventListener("click", () => select(row, part));
      shape.addEventListener("keydown", moveByKey);
      hint(shape, row, part);
      shapes.set(part, shape);
      over.push(shape);
      if (part.calls?.some((call) => call.error != null) && wide > 12)
        over.push(svg("path", { class: "cross" + out, "pointer-events": "none", d: `M${left + wide / 2 - 3} ${middle - 3} l6 6 m0 -6 l-6 6` }));
    }
    const value = reward(row), end = x(row.length) + 12;
    over.push(svg("circle", { class: "leaf" + out, cx: end, cy: middle, r: 6, "--colour": rewardColour(value) }));
    over.push(svg("text", { class: "score" + out, x: end + 10, y: middle + 4 }, signed(value) + (row.truncated ? " cut" : "")));
  }
  const drawing = svg("svg", { width: LEFT + width + RIGHT, height: bottom + 8, role: "group", "aria-label": `Tree of group ${state.group}` },
    svg("defs", {}, stripes()), under, over, dots);
  $("tree").replaceChildren(drawing);
  markCurrent();
}

const clampTicks = (width) => Math.min(Math.max(Math.round(width / 70), 2), 60);

function drawPart(part, row, left, middle, wide, out) {
  const label = `${partTitle(part)}, ${partFacts(part, row)}`;
  const attributes = { x: left, width: wide, rx: 2, role: "button", tabindex: -1, "aria-label": label };
  if (part.kind === "tool") {
    const failed = part.calls.some((call) => call.error != null);
    return svg("rect", { ...attributes, class: `piece result${failed ? " failed" : ""}${out}`, y: middle - 5, height: 10 });
  }
  const share = amount(part, row);
  const thick = share == null ? 10 : 5 + 15 * Math.abs(share);
  const kind = share == null ? "unread" : !isSigned() ? "" : share < 0 ? "negative" : "positive";
  return svg("rect", { ...attributes, class: `piece segment ${kind}${out}`, y: middle - thick / 2, height: thick, "--amount": `${100 * Math.abs(share ?? 0)}%` });
}

function drawLegend() {
  const top = index.scales[state.measure];
  const sample = (shape) => svg("svg", { width: 26, height: 14 }, shape);
  const entry = (picture, text) => node("span", {}, picture, text);
  const ramp = node("span", { class: "ramp" + (isSigned() ? " signed" : "") });
  const unit = state.measure === "entropy" ? " nats" : "";
  $("legend").replaceChildren(
    node("span", {}, isSigned() ? `≤ −${number(top, 2)}` : "0", ramp, (state.measure === "probability" ? "1" : `≥ ${number(top, 2)}`) + unit),
    entry(sample(svg("rect", { class: "segment unread", x: 1, y: 2, width: 24, height: 10, rx: 2 })), "no reading"),
    entry(sample(svg("rect", { class: "result", x: 1, y: 2, width: 24, height: 10, rx: 2 })), "tool result"),
    entry(sample([svg("rect", { class: "result failed", x: 1, y: 2, width: 24, height: 10, rx: 2 }), svg("path", { class: "cross", d: "M10 4 l6 6 m0 -6 l-6 6" })]), "failed call"),
    entry(sample([svg("path", { class: "fork", d: "M6 3 V8 q0 4 4 4 H24" }), svg("circle", { class: "fork-dot", cx: 6, cy: 3, r: 3 })]), "fork"),
    entry(node("b", {}, "+"), "supplement"),
    entry(sample([-1, 0, 1].map((value, i) => svg("circle", { class: "leaf", cx: 5 + 8 * i, cy: 7, r: 4.5, "--colour": rewardColour(value * largestReward) }))), "reward −, 0, +"),
  );
}

// One shape is in the tab order; the arrow keys move from it.
function markCurrent() {
  const part = currentPart();
  for (const [each, shape] of shapes) {
    shape.setAttribute("aria-pressed", each === part);
    shape.setAttribute("tabindex", -1);
  }
  (shapes.get(part) ?? shapes.values().next().value)?.setAttribute("tabindex", 0);
}

function moveByKey(event) {
  const key = event.key;
  if (key === "Enter" || key === " ") event.target.dispatchEvent(new MouseEvent("click"));
  else if (key.startsWith("Arrow")) {
    const row = group.byRow.get(state.row), parts = path(row).map(([part]) => part), at = parts.indexOf(currentPart());
    if (key === "ArrowRight") select(row, parts[Math.min(at + 1, parts.length - 1)]);
    if (key === "ArrowLeft") select(row, parts[Math.max(at - 1, 0)]);
    if (key === "ArrowUp" || key === "ArrowDown") {
      const order = lanes(), next = order[order.indexOf(row) + (key === "ArrowUp" ? -1 : 1)];
      if (next) select(next, path(next).map(([part]) => part).findLast((part) => part.start <= (state.token ?? 0)));
    }
    shapes.get(currentPart())?.focus();
  } else return;
  event.preventDefault();
}

// ------------------------------------------------------------------------------------------------- the trajectory

function currentPart() {
  const row = group.byRow.get(state.row);
  return state.token == null || !row ? null : path(row).map(([part]) => part).find((part) => part.start === state.token) ?? null;
}

function textOf(text, attributes = {}) {
  return node("pre", { tabindex: 0, ...attributes }, text === "" ? "(empty)" : text);
}

function card(part, owner, row) {
  const failed = part.kind === "tool" && part.calls.some((call) => call.error != null);
  const current = part === currentPart() && row.row === state.row;
  return node("article", { class: `card ${part.kind}${failed ? " failed" : ""}${current ? " current" : ""}`, "aria-current": current },
    node("h3", {}, partTitle(part)),
    node("div", { class: "facts" }, joined([partFacts(part, row), owner !== row && `shared with row ${owner.row}`, part.calls?.length === 1 && callFacts(part.calls[0])])),
    part.kind === "model" ? textOf(part.text) : [
      part.calls.map((call) => callCard(call, part.calls.length > 1)),
      part.text && node("details", {}, node("summary", {}, "as the model read it"), textOf(part.text)),
    ]);
}

function callCard(call, named) {
  const given = call.arguments && typeof call.arguments === "object" ? Object.entries(call.arguments) : [["arguments", call.arguments ?? ""]];
  return [
    named && node("div", { class: "facts" }, node("b", {}, call.name), " ", callFacts(call)),
    node("div", { class: "call" },
      given.map(([name, value]) => [node("div", {}, name), textOf(asText(value), { class: "given" })]),
      node("div", {}, "result"), textOf(call.result, { class: "answer" })),
    call.error != null && call.error !== call.result && node("pre", { class: "failed-text" }, call.error),
  ];
}

function rowFacts(row) {
  return node("div", { class: "facts" },
    node("b", {}, rowTitle(row)), node("br"),
    joined([
      ...Object.entries(row.rewards).map(([name, value]) => `${name} ${signed(value)}`),
      row.advantage != null && `advantage ${signed(row.advantage)}`,
      plural(row.length, "token"),
      row.truncated && "cut at a length or call limit",
    ]));
}

// One row, or two: what they share once, then each on its own side.
function drawTranscript() {
  const row = group.byRow.get(state.row), other = group.byRow.get(state.other);
  document.querySelector("main").classList.toggle("comparing", other != null);
  const name = (each) => [each.row, `${each.row} (${each.kind}, ${signed(reward(each))})`];
  options($("row"), group.rows.map(name));
  options($("other"), [["", "–"], ...group.rows.filter((each) => each !== row).map(name)]);
  $("row").value = row.row;
  $("other").value = other?.row ?? "";

  const rows = other ? [row, other] : [row];
  const paths = rows.map(path);
  const differs = other ? paths[0].findIndex(([part], i) => part !== paths[1][i]?.[0]) : 0;
  const shared = differs < 0 ? paths[0].length : differs;
  $("transcript").replaceChildren(
    node("details", { class: "prompt" }, node("summary", {}, `Prompt · ${plural(group.prompt_tokens, "token")}`), textOf(group.prompt)),
    node("div", { class: "sides" }, rows.map(rowFacts)),
    ...paths[0].slice(0, shared).map(([part, owner]) => card(part, owner, row)),
    ...(other ? [node("div", { class: "divider" }, shared ? "Here they part" : "They share the prompt alone")] : []),
    node("div", { class: "sides" }, paths.map((parts, side) =>
      node("div", { class: "side" }, parts.slice(shared).map(([part, owner]) => card(part, owner, rows[side]))))),
  );
  document.querySelector(".card.current")?.scrollIntoView({ block: "nearest" });
}

// -------------------------------------------------------------------------------------- groups, filters, metrics

function matches(row) {
  const value = reward(row), low = $("reward-min").value, high = $("reward-max").value, tool = $("tool").value;
  if (low !== "" && !(value >= +low)) return false;
  if (high !== "" && !(value <= +high)) return false;
  if (tool === "any") return true;
  const calls = row.calls;
  if (tool === "none") return calls.length === 0;
  return calls.some((call) => (tool === "failed" ? call.error != null : `tool ${call.name}` === tool));
}

function drawGroups() {
  largestReward = 1e-9;
  for (const each of groups) for (const row of each.rows) largestReward = Math.max(largestReward, Math.abs(reward(row) ?? 0));
  let matching = 0, all = 0;
  const items = groups.map((each, at) => {
    const found = each.rows.filter(matches), values = each.rows.map(reward).filter((value) => value != null);
    matching += found.length;
    all += each.rows.length;
    if (!found.length) return null;
    const mean = values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
    const forks = each.rows.filter((row) => row.kind === "fork").length;
    return node("li", {}, node("button", { "aria-current": at === state.group, onclick: () => openGroup(at) },
      node("div", { class: "top" }, node("b", {}, `Group ${at}`), node("span", {}, joined([`reward ${signed(mean == null ? null : +mean.toFixed(2))}`, plural(forks, "fork")]))),
      node("div", { class: "preview" }, each.preview),
      node("div", { class: "leaves" }, each.rows.map((row) => node("i", { class: found.includes(row) ? "" : "out", "--colour": rewardColour(reward(row)) })))));
  });
  $("groups").replaceChildren(...items.filter(Boolean));
  $("matches").textContent = matching === all ? plural(all, "trajectory").replace("ys", "ies") : `${matching} of ${all} trajectories match`;
}

function drawChart() {
  const chart = $("chart"), width = chart.clientWidth, height = 120, LEFT = 46, RIGHT = 12, TOP = 8, BOTTOM = 20;
  const points = index.steps.map((step) => [step.step, step.metrics[state.metric], step.tree]);
  const values = points.map(([, value]) => value).filter((value) => value != null);
  if (!width || !values.length) return chart.replaceChildren();
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (width - LEFT - RIGHT) * (last > first) + (last === first) * (width - LEFT - RIGHT) / 2;
  const y = (value) => TOP + ((high - value) / (high - low)) * (height - TOP - BOTTOM);
  let line = "", pen = "M";
  for (const [step, value] of points) {
    if (value == null) pen = "M";
    else { line += `${pen}${x(step)} ${y(value)}`; pen = "L"; }
  }
  chart.replaceChildren(
    ...ticks(low, high, 3).flatMap((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)),
    ]),
    ...ticks(first, last, clampTicks(width - LEFT)).filter(Number.isInteger).map((step) => svg("text", { x: x(step), y: height - 4, "text-anchor": "middle" }, step)),
    svg("line", { class: "now", x1: x(state.step), x2: x(state.step), y1: TOP, y2: height - BOTTOM }),
    svg("path", { class: "curve", d: line }),
    ...points.filter(([, value]) => value != null).filter(([step], i, all) => all.length <= 120 || step === state.step)
      .map(([step, value, tree]) => svg("circle", { class: tree ? "" : "bare", cx: x(step), cy: y(value), r: step === state.step ? 4.5 : 2.5 })),
  );
  const nearest = (event, steps) => {
    const at = event.clientX - chart.getBoundingClientRect().left;
    return steps.reduce((best, step) => (Math.abs(x(step) - at) < Math.abs(x(best) - at) ? step : best));
  };
  chart.onclick = (event) => openStep(nearest(event, stepsWithTrees));
  chart.onpointermove = (event) => {
    const step = nearest(event, points.map(([each]) => each));
    showTip(event, [`step ${step}: ${number(points.find(([each]) => each === step)[1])}`]);
  };
  chart.onpointerleave = hideTip;
  const now = points.find(([step]) => step === state.step);
  $("metric-value").textContent = now ? `${number(now[1])} at step ${state.step}` : "";
}

// ---------------------------------------------------------------------------------------------------- small things

function showTip(event, children) {
  const tip = $("tip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(Math.min(event.clientX + 14, innerWidth - width - 8), 8)}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
}
const hideTip = () => ($("tip").hidden = true);

function hint(shape, row, part) {
  shape.addEventListener("pointermove", (event) => {
    const text = (part.kind === "model" ? part.text : part.calls.map((call) => call.result).join("\n")).trim();
    showTip(event, [
      node("div", { class: "facts" }, node("b", {}, joined([partTitle(part), ...(part.calls ?? []).map(callFacts)])), node("br"), rowTitle(row), node("br"), partFacts(part, row)),
      node("pre", {}, text.length > 280 ? text.slice(0, 280) + "…" : text || "(empty)"),
    ]);
  });
  shape.addEventListener("pointerleave", hideTip);
}

function saveAddress() {
  const kept = Object.entries(state).filter(([, value]) => value != null);
  // a page inside a notebook (about:srcdoc) has no address of its own
  if (location.protocol !== "about:") history.replaceState(null, "", "#" + new URLSearchParams(kept));
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of ["step", "group", "row", "token", "other"]) {
    const value = given.get(name);
    state[name] = value == null || value === "" || Number.isNaN(+value) ? null : +value;
  }
  state.metric = metrics.includes(given.get("metric")) ? given.get("metric") : metrics[0];
  state.measure = given.get("measure") in index.scales ? given.get("measure") : "entropy";
  state.theme = given.get("theme");
}

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
    for (const row of group.rows) row.calls = path(row).flatMap(([part]) => part.calls ?? []);
  }
  const kept = [$("reward").value, $("tool").value];
  const rewards = [...new Set(groups.flatMap((each) => each.rows.flatMap((row) => Object.keys(row.rewards))))];
  const tools = [...new Set(groups.flatMap((each) => each.rows.flatMap((row) => row.calls.map((call) => call.name))))].sort();
  options($("reward"), rewards.length > 1 ? [[TOTAL, "sum of all"], ...rewards.map((name) => [name])] : rewards.map((name) => [name]));
  options($("tool"), [["any"], ["none", "none called"], ["failed", "a call failed"], ...tools.map((name) => [`tool ${name}`, name])]);
  for (const [i, select_] of [$("reward"), $("tool")].entries())
    if ([...select_.options].some((option) => option.value === kept[i])) select_.value = kept[i];
  const position = stepsWithTrees.indexOf(step);
  $("step").value = position;
  $("previous-step").disabled = position === 0;
  $("next-step").disabled = position === stepsWithTrees.length - 1;
  $("step-name").textContent = `step ${step}` + (stepsWithTrees.length > 1 ? ` (${stepsWithTrees[0]} to ${stepsWithTrees.at(-1)})` : "");
  drawChart();
  openGroup(groups[target.group] ? target.group : 0, target);
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
  drawTree();
  drawTranscript();
  if (!part) $("reader").scrollTop = 0;
  saveAddress();
}

function draw() {
  drawGroups();
  drawLegend();
  drawTranscript(); // before the tree: comparing changes how wide the tree is
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

const metrics = [...new Set(index.steps.flatMap((step) => Object.keys(step.metrics)))];
options($("metric"), metrics.map((name) => [name]));
$("notes").textContent = index.notes.join("\n");
$("notes").hidden = !index.notes.length;
$("step").max = stepsWithTrees.length - 1;
$("step").oninput = (event) => openStep(stepsWithTrees[+event.target.value]);
$("previous-step").onclick = () => openStep(stepsWithTrees[+$("step").value - 1]);
$("next-step").onclick = () => openStep(stepsWithTrees[+$("step").value + 1]);
$("theme").onclick = () => { state.theme = setTheme() ? "light" : "dark"; setTheme(); saveAddress(); };
$("metric").onchange = (event) => { state.metric = event.target.value; drawChart(); saveAddress(); };
$("measure").onchange = (event) => { state.measure = event.target.value; draw(); };
$("zoom").oninput = drawTree;
for (const id of ["reward", "reward-min", "reward-max", "tool"]) $(id).oninput = draw;
$("row").onchange = (event) => select(group.byRow.get(+event.target.value));
$("other").onchange = (event) => { state.other = event.target.value === "" ? null : +event.target.value; draw(); };
matchMedia("(prefers-color-scheme: dark)").onchange = setTheme;
addEventListener("hashchange", restore);
new ResizeObserver(() => { drawChart(); if (group) drawTree(); }).observe($("middle"));
await restore();
document.body.dataset.ready = "";
