// The part of the page that draws the tree of a group. One script with viewer.js, before it.

// Parts of a trajectory from its start: those of its ancestors up to the fork, then its own. → [[part, owner], …]
function path(row) {
  const own = row.parts.map((part) => [part, row]);
  if (row.parent == null) return own;
  return [...path(group.byRow.get(row.parent)).filter(([part]) => part.start < row.fork), ...own];
}
const partsOf = (row) => path(row).map(([part]) => part);

// Rows from top to bottom: a fork under its parent, the later fork the nearer one, so that no two lines cross.
function lanes() {
  const children = (parent) => group.rows.filter((row) => row.parent === parent).sort((a, b) => b.fork - a.fork);
  const below = (row) => [row, ...children(row.row).flatMap(below)];
  return children(null).flatMap(below);
}

const isSigned = () => state.measure === "gap" || state.measure === "advantage";

// The part on the colour scale, −1…1.
function amount(part, row) {
  const value = state.measure === "advantage" ? advantage(row, part) : part[state.measure];
  return value == null ? null : Math.max(-1, Math.min(value / index.scales[state.measure], 1));
}

function drawTree() {
  const LANE = 27, TOP = 24, LEFT = 54, RIGHT = 84;
  const order = lanes();
  const length = Math.max(...order.map((row) => row.length), 1);
  const width = Math.max(($("tree").clientWidth - LEFT - RIGHT - 2) * $("zoom").value, 120);
  const x = (token) => LEFT + (token / length) * width;
  const middles = new Map(order.map((row, lane) => [row, TOP + (lane + 0.5) * LANE]));
  const bottom = TOP + order.length * LANE;
  const current = group.byRow.get(state.row);
  const onPath = new Set(partsOf(current));
  const back = [], lines = [], front = [], dots = [];
  shapes = new Map();

  for (const token of ticks(0, length, ticksFor(width))) {
    lines.push(svg("line", { class: "grid", x1: x(token), x2: x(token), y1: TOP - 4, y2: bottom }));
    lines.push(svg("text", { x: x(token), y: 14, "text-anchor": "middle" }, token ? number(token) : "token 0"));
  }
  for (const [row, middle] of middles) {
    const out = matches(row) ? "" : " out";
    const sign = { fork: "└ ", supplement: "+ ", initial: "" }[row.kind];
    const name = { class: `name${out}${row === current ? " current" : ""}`, x: 8, y: middle + 4 };
    front.push(svg("text", { ...name, onclick: () => select(row) }, sign + row.row));
    if (row.parent != null) {
      const owner = path(row).findLast(([part]) => part.end <= row.fork)[1], at = x(row.fork);
      lines.push(svg("path", { class: "fork" + out, d: `M${at} ${middles.get(owner)} V${middle - 5} q0 5 5 5` }));
      dots.push(svg("circle", { class: "fork-dot" + out, cx: at, cy: middles.get(owner), r: 3.5 }));
    }
    for (const part of row.parts) {
      const afterFork = row.parent != null && part === row.parts[0];
      const left = x(part.start) + (afterFork ? 5 : 0.75), wide = Math.max(x(part.end) - left - 0.75, 3);
      const shape = drawPart(part, row, { x: left, width: wide }, middle, out);
      shapes.set(part, shape);
      front.push(shape);
      if (failed(part) && wide > 12) front.push(cross(left + wide / 2, middle, out));
      if (onPath.has(part)) {
        const span = { x: x(part.start), width: x(part.end) - x(part.start) };
        back.push(svg("rect", { class: "on-path", ...span, y: middle - LANE / 2, height: LANE }));
      }
    }
    const leaf = x(row.length) + 12, score = signed(reward(row)) + (row.truncated ? " cut" : "");
    const colour = { "--colour": rewardColour(reward(row)) };
    front.push(svg("circle", { class: "leaf" + out, cx: leaf, cy: middle, r: 6, ...colour }));
    front.push(svg("text", { class: "score" + out, x: leaf + 10, y: middle + 4 }, score));
  }
  const frame = { width: LEFT + width + RIGHT, height: bottom + 8, role: "group" };
  $("tree").replaceChildren(
    svg("svg", { ...frame, "aria-label": `Tree of group ${state.group}` },
      svg("defs", {}, stripes()), back, lines, front, dots));
  markCurrent();
}

function drawPart(part, row, span, middle, out) {
  const label = `${partTitle(part)}, ${partFacts(part, row)}`;
  const shape = svg("rect", { ...span, rx: 2, role: "button", tabindex: -1, "aria-label": label });
  if (part.kind === "tool")
    fill(shape, { class: `piece result${failed(part) ? " failed" : ""}${out}`, y: middle - 5, height: 10 }, []);
  else {
    const share = amount(part, row), size = Math.abs(share ?? 0);
    const height = share == null ? 10 : 5 + 15 * size;
    const kind = share == null ? "unread" : !isSigned() ? "" : share < 0 ? "negative" : "positive";
    const colour = { class: `piece segment ${kind}${out}`, "--amount": `${100 * size}%` };
    fill(shape, { ...colour, y: middle - height / 2, height }, []);
  }
  shape.addEventListener("click", () => select(row, part));
  shape.addEventListener("keydown", moveByKey);
  shape.addEventListener("pointermove", (event) => showTip(event, partTip(part, row)));
  shape.addEventListener("pointerleave", hideTip);
  return shape;
}

const cross = (x, y, out = "") => svg("path", { class: "cross" + out, d: `M${x - 3} ${y - 3} l6 6 m0 -6 l-6 6` });

function stripes() {
  const size = { width: 6, height: 6 };
  const tiling = { id: "stripes", ...size, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
  return svg("pattern", tiling,
    svg("rect", { class: "stripe-back", ...size }), svg("line", { class: "stripe", x1: 1, x2: 1, y2: 6 }));
}

function partTip(part, row) {
  const text = (part.kind === "model" ? part.text : part.calls.map((call) => call.result).join("\n")).trim();
  const title = joined([partTitle(part), ...(part.calls ?? []).map(callFacts)]);
  return [
    node("div", { class: "facts" },
      node("b", {}, title), node("br"), rowTitle(row), node("br"), partFacts(part, row)),
    node("pre", {}, text.length > 280 ? text.slice(0, 280) + "…" : text || "(empty)"),
  ];
}

function drawLegend() {
  const box = { x: 1, y: 2, width: 24, height: 10, rx: 2 };
  const sample = (...drawn) => svg("svg", { width: 26, height: 14 }, drawn);
  const leaf = (value, i) =>
    svg("circle", { class: "leaf", cx: 5 + 8 * i, cy: 7, r: 4.5, "--colour": rewardColour(value * largestReward) });
  const top = number(index.scales[state.measure], 2);
  const high = { entropy: `≥ ${top} nats`, probability: "1" }[state.measure] ?? `≥ ${top}`;
  const entries = [
    [isSigned() ? `≤ −${top}` : "0", node("span", { class: "ramp" + (isSigned() ? " signed" : "") }), high],
    [sample(svg("rect", { class: "segment unread", ...box })), "no reading"],
    [sample(svg("rect", { class: "result", ...box })), "tool result"],
    [sample(svg("rect", { class: "result failed", ...box }), cross(13, 7)), "failed call"],
    [
      sample(
        svg("path", { class: "fork", d: "M6 3 V8 q0 4 4 4 H24" }),
        svg("circle", { class: "fork-dot", cx: 6, cy: 3, r: 3 })),
      "fork",
    ],
    [node("b", {}, "+"), "supplement"],
    [sample([-1, 0, 1].map(leaf)), "reward −, 0, +"],
  ];
  $("legend").replaceChildren(...entries.map((entry) => node("span", {}, entry)));
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
  const row = group.byRow.get(state.row), parts = partsOf(row), at = parts.indexOf(currentPart());
  const order = lanes(), lane = order.indexOf(row);
  const go = {
    ArrowRight: () => select(row, parts[Math.min(at + 1, parts.length - 1)]),
    ArrowLeft: () => select(row, parts[Math.max(at - 1, 0)]),
    ArrowDown: () => selectNear(order[lane + 1]),
    ArrowUp: () => selectNear(order[lane - 1]),
    Enter: () => event.target.dispatchEvent(new MouseEvent("click")),
    " ": () => event.target.dispatchEvent(new MouseEvent("click")),
  }[event.key];
  if (!go) return;
  event.preventDefault();
  go();
  shapes.get(currentPart())?.focus();
}

function selectNear(row) {
  if (row) select(row, partsOf(row).findLast((part) => part.start <= (state.token ?? 0)));
}

