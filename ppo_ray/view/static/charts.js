// Charts by uPlot: one or more runs over the steps, with healthy ranges and events.
import { colour, number, runColour } from "./dom.js"; // before uPlot, which asks for the language at once
import uPlot from "./uPlot.esm.js";

const HEIGHT = 168;

/** A running mean over `width` points, by as many before a point as behind it; null stays null. */
export function smooth(values, width) {
  if (width <= 1) return values;
  const half = Math.floor(width / 2);
  return values.map((value, index) => {
    if (value === null || value === undefined) return value;
    const around = values
      .slice(Math.max(0, index - half), index + half + 1)
      .filter((item) => item !== null && item !== undefined);
    return around.reduce((sum, item) => sum + item, 0) / around.length;
  });
}

/** What stands on the x axis, for each step of a run. */
export function abscissa(run, kind) {
  const steps = run.metrics.step ?? [];
  if (kind === "responses") return steps.map((step) => step * (run.batch_size ?? 1));
  if (kind !== "seconds") return steps;
  let sum = 0;
  return (run.metrics["time/step_s"] ?? []).map((value) => (sum += value ?? 0));
}

const WHOLE = [
  1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e7, 1e8, 1e9,
];

/** Write an axis' numbers with as many digits as tell them apart. */
function writeTicks(_, ticks) {
  const known = ticks.filter((tick) => tick !== null);
  const step = known.length > 1 ? Math.abs(known[1] - known[0]) : 0;
  const places = step > 0 ? Math.min(Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)), 6) : 3;
  const fixed = (tick) =>
    Math.abs(tick) >= 1e5 || (tick !== 0 && Math.abs(tick) < 1e-4)
      ? number(tick)
      : tick.toFixed(places).replace("-", "−");
  return ticks.map((tick) => (tick === null ? "" : fixed(tick)));
}
const writeLogTicks = (_, ticks) =>
  ticks.map((tick) =>
    tick === null
      ? ""
      : tick < 1e-3 || tick >= 1e5
        ? tick.toExponential(0).replace("e+", "e").replace("-", "−")
        : String(tick),
  );

function axes(isLog, height, isWhole) {
  const look = {
    stroke: colour("muted"),
    font: `11px ${colour("font")}`,
    grid: { stroke: colour("line"), width: 1 },
    ticks: { show: false },
  };
  return [
    { ...look, grid: { show: false }, size: 26, values: writeTicks, space: 60, ...(isWhole ? { incrs: WHOLE } : {}) },
    { ...look, size: 52, values: isLog ? writeLogTicks : writeTicks, space: isLog ? 24 : height / 5 },
  ];
}

/** Shade a healthy range. */
function shade(range) {
  return (plot) => {
    const { left, top, width, height } = plot.bbox;
    const at = (value, other) =>
      value === null ? other : Math.min(Math.max(plot.valToPos(value, "y", true), top), top + height);
    const high = at(range.high, top),
      low = at(range.low, top + height);
    plot.ctx.save();
    plot.ctx.fillStyle = colour("healthy");
    plot.ctx.fillRect(left, high, width, Math.max(low - high, 0));
    plot.ctx.restore();
  };
}

/** Mark events by lines. */
function mark(events) {
  return (plot) => {
    const { top, height, left, width } = plot.bbox;
    const ratio = devicePixelRatio;
    plot.ctx.save();
    plot.ctx.strokeStyle = plot.ctx.fillStyle = colour("event");
    plot.ctx.setLineDash([3 * ratio, 3 * ratio]);
    for (const event of events) {
      const x = plot.valToPos(event.x, "x", true);
      if (x < left || x > left + width) continue;
      plot.ctx.beginPath();
      plot.ctx.moveTo(x, top);
      plot.ctx.lineTo(x, top + height);
      plot.ctx.stroke();
      plot.ctx.beginPath();
      plot.ctx.arc(x, top + 3 * ratio, 3 * ratio, 0, 7);
      plot.ctx.fill();
    }
    plot.ctx.restore();
  };
}

/**
 * Draw lines into an element.
 * lines: [{x, y, stroke, width, points, dash, band}], each with its own x; range: {low, high} or null;
 * events: [{x}]; onCursor: is called with the index on the joined x axis, or null, and the joined data.
 */
export function draw(
  element,
  {
    lines,
    isLog = false,
    range = null,
    events = [],
    onCursor = null,
    bars = false,
    linked = true,
    isWhole = true,
    height = HEIGHT,
    bands = [],
  },
) {
  const clean = (values) =>
    isLog ? values.map((value) => (value > 0 ? value : null)) : values.map((value) => value ?? null);
  const data = uPlot.join(lines.map((line) => [line.x, clean(line.y)]));
  const series = lines.map((line) => ({
    stroke: line.stroke,
    width: line.width ?? 1.6,
    alpha: line.alpha ?? 1,
    dash: line.dash,
    fill: line.fill,
    paths: bars ? uPlot.paths.bars({ size: [1, Infinity], gap: 1 }) : undefined,
    points: { show: line.points ?? data[0].length < 2, size: line.points ? 7 : 4, fill: line.stroke },
    spanGaps: Boolean(line.points),
  }));
  const options = {
    width: Math.max(element.clientWidth, 120),
    height,
    legend: { show: false },
    padding: [8, 12, 0, 0],
    cursor: {
      ...(linked ? { sync: { key: "runs" } } : {}),
      y: false,
      points: { size: 6 },
      drag: { x: true, y: false, dist: 8 },
    },
    scales: { x: { time: false, range: padX }, y: isLog ? { distr: 3 } : { range: padY } },
    axes: axes(isLog, height, isWhole),
    series: [{}, ...series],
    bands,
    hooks: {
      drawClear: range ? [shade(range)] : [],
      draw: events.length ? [mark(events)] : [],
      setCursor: onCursor ? [(plot) => onCursor(plot.cursor.idx ?? null, plot.data)] : [],
    },
  };
  const plot = new uPlot(options, data, element);
  const observer = new ResizeObserver(() => plot.setSize({ width: Math.max(element.clientWidth, 120), height }));
  observer.observe(element);
  return { plot, close: () => (observer.disconnect(), plot.destroy()) };
}

const padX = (_, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]);
function padY(_, low, high) {
  if (low === null || high === null) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 && low < room * 3 ? 0 : low - room, high + room];
}

/** The lines of one metric of some runs: raw values faint, their running mean strong. */
export function runLines(runs, names, kind, width) {
  const lines = [];
  for (const [index, run] of runs) {
    const x = abscissa(run, kind);
    const stroke = runColour(index);
    const values = run.metrics[names[0]];
    if (values) {
      if (width > 1) lines.push({ x, y: values, stroke, alpha: 0.28, width: 1 });
      lines.push({ x, y: smooth(values, width), stroke, width: 1.8, run: index });
    }
    for (const name of names.slice(1)) {
      const held = name.startsWith("eval/") ? run.held_out.filter((item) => item[name] !== undefined) : [];
      // the policy after the last step is one step further than any that was logged
      const last = x.length - 1;
      const place = (step) => x[run.metrics.step.indexOf(step)] ?? (last > 0 ? 2 * x[last] - x[last - 1] : step);
      if (held.length)
        lines.push({
          x: held.map((item) => place(item.step)),
          y: held.map((item) => item[name]),
          stroke,
          width: 1.2,
          dash: [2, 4],
          points: true,
          held: index,
        });
    }
  }
  return lines;
}
