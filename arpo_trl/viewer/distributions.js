// The part of the page that shows how readings and forks of a step are distributed. One script with viewer.js.

// What the rows of the step that is shown have: ΔH and P where they were read, and where forks were made.
function readings() {
  const found = { gap: [], probability: [], depth: [], result: [] };
  for (const each of groups) {
    const depths = new Map();
    for (const row of each.rows) {
      const depth = row.parent == null ? 0 : (depths.get(row.parent) ?? 0) + 1;
      depths.set(row.row, depth);
      for (const name of ["gap", "probability"])
        found[name].push(...row.parts.map((part) => part[name]).filter((value) => value != null));
      if (row.parent == null) continue;
      found.depth.push(depth);
      found.result.push(row.result);
    }
  }
  return found;
}

// Values between two ends in bins of one width; what lies outside is counted in the bins at the ends.
function bins(values, low, high, count) {
  const counts = Array(count).fill(0), width = (high - low) / count;
  for (const value of values) counts[Math.max(Math.min(Math.floor((value - low) / width), count - 1), 0)]++;
  return counts.map((size, i) => [low + i * width, low + (i + 1) * width, size]);
}

function meanAndSpread(values) {
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  const spread = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
  return `mean ${number(mean, 2)} · std ${number(spread, 2)}`;
}

function drawDistributions() {
  const { gap, probability, depth, result } = readings();
  const place = (values, word) => ({
    title: `Forks by ${word}`, facts: plural(values.length, "fork"), unit: "fork", ends: [],
    bars: Array.from({ length: Math.max(...values, 0) }, (_, i) =>
      [String(i + 1), values.filter((value) => value === i + 1).length]),
  });
  const top = index.scales.gap;
  const histogram = (title, values, unit, low, high, count, ends) => ({
    title, unit, ends, facts: values.length ? meanAndSpread(values) : "",
    bars: !values.length ? [] : bins(values, low, high, count)
      .map(([from, to, size]) => [`${number(from, 2)} to ${number(to, 2)}`, size]),
  });
  const drawn = [
    histogram("Entropy gap ΔH", gap, "segment", -top, top, 12, [`≤ −${number(top, 2)}`, "0", `≥ ${number(top, 2)}`]),
    histogram("Branch probability P", probability, "decision", 0, 1, 10, ["0", "0.5", "1"]),
    place(depth, "depth"),
    place(result, "tool result"),
  ].filter(({ bars }) => bars.length);
  $("distributions").hidden = !drawn.length || isEvaluation();
  $("histograms").replaceChildren(...drawn.map(bars));
}

function bars({ title, facts, unit, ends, bars }) {
  const WIDTH = 150, TOP = 12, HEIGHT = 84, BOTTOM = HEIGHT - 16;
  const most = Math.max(...bars.map(([, size]) => size), 1), wide = WIDTH / Math.max(bars.length, ends.length ? 1 : 6);
  const tall = (size) => (size / most) * (BOTTOM - TOP);
  const shapes = bars.map(([name, size], i) => {
    const told = `${name}: ${plural(size, unit)}`;
    const bar = svg("rect", { class: "column", "aria-label": told, role: "img",
      x: i * wide + 1, width: wide - 2, y: BOTTOM - tall(size), height: tall(size) });
    bar.addEventListener("pointermove", (event) => showTip(event, [told]));
    bar.addEventListener("pointerleave", hideTip);
    return bar;
  });
  const text = (words, x, y, anchor = "middle") => svg("text", { x, y, "text-anchor": anchor }, words);
  return node("figure", {},
    node("figcaption", {}, node("b", {}, title), node("br"), facts),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": title },
      svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: BOTTOM, y2: BOTTOM }), shapes,
      ends.length ? ends.map((end, i) => text(end, (i * WIDTH) / 2, HEIGHT - 3, ["start", "middle", "end"][i]))
        : bars.map(([name, size], i) => [
          text(name, (i + 0.5) * wide, HEIGHT - 3), text(size, (i + 0.5) * wide, BOTTOM - tall(size) - 2)])));
}
