// A line chart: one figure with curves, a cursor for pointer and arrow keys, a legend that reads the values there, and
// the values as a table. A point whose y is null is a gap, and so is the way to a point with `cut`.

const BOX = { width: 440, height: 216, left: 56, right: 12, top: 20, bottom: 30 };
const LONG = 150;
const WIDE_BOX = { ...BOX, width: 640, height: 240 };

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return { step, found };
}

function tickText(value, step) {
  if (Math.abs(value) < step * 1e-6) return '0';
  const size = Math.max(Math.abs(value), step);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(1).replace('.0e', 'e').replace('e+', 'e');
  let digits = 0;
  while (digits < 8 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits += 1;
  return value.toFixed(digits);
}

function rangeOf(spec) {
  const values = spec.series.flatMap((s) => s.points.flatMap((p) => [p.y, p.low, p.high]))
    .concat((spec.rules || []).map((rule) => rule.y)).filter((v) => v !== null && v !== undefined);
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (spec.zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
  if (low === high) { const room = Math.abs(low) * 0.05 || 1; low -= spec.zero && low === 0 ? 0 : room; high += room; }
  const room = (high - low) * 0.06;
  return [spec.zero && low === 0 ? 0 : low - room, spec.zero && high === 0 ? 0 : high + room];
}

function scales(spec) {
  const box = spec.wide ? WIDE_BOX : BOX;
  const xs = spec.series.flatMap((s) => s.points.map((p) => p.x));
  let first = Math.min(...xs);
  let last = Math.max(...xs);
  if (first === last) { first -= 1; last += 1; }
  const [low, high] = rangeOf(spec);
  const width = box.width - box.left - box.right;
  const height = box.height - box.top - box.bottom;
  return {
    first, last, low, high, box,
    x: (v) => box.left + ((v - first) / (last - first)) * width,
    y: (v) => box.top + ((high - v) / (high - low)) * height,
    xs: [...new Set(xs)].sort((a, b) => a - b),
  };
}

function axes(spec, scale) {
  const { box } = scale;
  const [left, right, bottom] = [box.left, box.width - box.right, box.height - box.bottom];
  const nodes = [];
  const vertical = ticks(scale.low, scale.high, 5);
  for (const v of vertical.found) {
    const y = scale.y(v);
    const zero = Math.abs(v) < vertical.step * 1e-6 && scale.low < 0;
    nodes.push(svg('line', { class: zero ? 'grid zero' : 'grid', x1: left, x2: right, y1: y, y2: y }));
    nodes.push(svg('text', { x: left - 6, y: y + 4, 'text-anchor': 'end' }, tickText(v, vertical.step)));
  }
  for (const v of ticks(scale.first, scale.last, 6).found.filter((t) => Number.isInteger(t))) {
    const anchor = scale.x(v) > right - 12 ? 'end' : 'middle';
    nodes.push(svg('text', { x: scale.x(v), y: bottom + 16, 'text-anchor': anchor }, String(v)));
  }
  nodes.push(svg('text', { x: right, y: box.height - 2, 'text-anchor': 'end' }, spec.xLabel || 'step'));
  for (const stage of spec.stages || []) {
    const x = Math.max(scale.x(stage.from), left);
    if (x > left) nodes.push(svg('line', { class: 'border', x1: x, x2: x, y1: 6, y2: bottom }));
    nodes.push(svg('text', { class: 'stage', x: x + 3, y: 13 }, stage.name));
  }
  return nodes;
}

// Runs of points without a gap between them.
function pieces(points) {
  const found = [];
  let piece = null;
  for (const point of points) {
    if (point.y === null || point.y === undefined) { piece = null; continue; }
    if (piece === null || point.cut) { piece = []; found.push(piece); }
    piece.push(point);
  }
  return found;
}

// Points over which the thick curves of a long chart are averaged; 0 for a short one, which is drawn as it is.
function trendWindow(spec) {
  const longest = Math.max(...spec.series.map((series) => series.points.length));
  return longest > LONG ? 2 * Math.round(longest / 80) + 1 : 0;
}

function trend(piece, window) {
  const half = (window - 1) / 2;
  return piece.map((p, i) => {
    const near = piece.slice(Math.max(0, i - half), i + half + 1);
    return { x: p.x, y: near.reduce((sum, q) => sum + q.y, 0) / near.length };
  });
}

function drawSeries(series, scale, look) {
  const paint = color(series.color);
  const { shift, window } = look;
  const line = { style: { stroke: paint }, 'stroke-dasharray': dash(series.dash) };
  const at = (p, v) => `${(scale.x(p.x) + shift).toFixed(2)},${scale.y(v).toFixed(3)}`;
  const nodes = [];
  for (const piece of pieces(series.points)) {
    const banded = piece.filter((p) => p.low !== null && p.low !== undefined && p.high !== null);
    if (look.bands && banded.length > 1) {
      const outline = [...banded.map((p) => at(p, p.high)), ...banded.reverse().map((p) => at(p, p.low))];
      nodes.push(svg('path', { class: 'band', style: { fill: paint }, d: `M${outline.join('L')}Z` }));
    }
    if (look.whiskers || banded.length === 1) {
      for (const p of banded) {
        const x = scale.x(p.x) + shift;
        const ends = { x1: x, x2: x, y1: scale.y(p.low), y2: scale.y(p.high) };
        nodes.push(svg('line', { class: 'whisker', style: { stroke: paint }, ...ends }));
      }
    }
    nodes.push(svg('path', {
      ...line, class: window ? 'curve raw' : 'curve', 'data-metric': series.metric, 'data-run': series.run,
      d: `M${piece.map((p) => at(p, p.y)).join('L')}`,
    }));
    if (window) {
      const smooth = trend(piece, window).map((p) => at(p, p.y)).join('L');
      nodes.push(svg('path', { ...line, class: 'trend', d: `M${smooth}` }));
    }
    if (piece.length === 1 || series.points.length <= 30) {
      for (const p of piece) {
        nodes.push(svg('circle', { cx: scale.x(p.x) + shift, cy: scale.y(p.y), r: 2.6, style: { fill: paint } }));
      }
    }
  }
  return nodes;
}

function pointText(spec, point) {
  const write = spec.write || short;
  return write(point.y) + interval(point.low, point.high, write);
}

function readings(spec, x) {
  return spec.series.map((series) => {
    const known = series.points.filter((p) => p.y !== null && p.y !== undefined);
    const point = x === null ? known[known.length - 1] : series.points.find((p) => p.x === x);
    return point ? pointText(spec, point) : '–';
  });
}

// A piece of a line for the legend.
function sample(attributes, index) {
  return svg('svg', { viewBox: '0 0 22 10', 'aria-hidden': 'true' },
    svg('line', { x1: 1, x2: 21, y1: 5, y2: 5, style: { stroke: color(index) }, ...attributes }));
}

function legendOf(spec) {
  const where = el('span', { class: 'faint' });
  const values = spec.series.map(() => el('b'));
  const keys = spec.series.map((series, i) => el('span', { class: 'key' },
    sample({ 'stroke-width': 2.5, 'stroke-dasharray': dash(series.dash) }, series.color),
    el('span', null, series.label), values[i]));
  const rules = (spec.rules || []).map((rule) => el('span', { class: 'key faint' },
    sample({ class: 'rule' }, rule.color), rule.label, ' ', (spec.write || short)(rule.y)));
  const show = (x) => {
    where.textContent = x === null ? 'last' : `${spec.xLabel || 'step'} ${x}`;
    readings(spec, x).forEach((text, i) => { values[i].textContent = text; });
  };
  show(null);
  const window = trendWindow(spec);
  const thick = window > 0 && el('span', { class: 'faint' }, `thick: mean of ${window} points`);
  return { show, node: el('div', { class: 'legend', 'aria-live': 'polite' }, where, keys, rules, thick) };
}

function valueTable(spec, scale) {
  const columns = [spec.xLabel || 'step', ...spec.series.map((s) => s.label)].map((title) => ({ title, number: true }));
  const maps = spec.series.map((s) => new Map(s.points.map((p) => [p.x, p])));
  const rows = scale.xs.map((x) => [String(x), ...maps.map((map) => {
    const p = map.get(x);
    return p ? pointText(spec, p) : '–';
  })]);
  return scroll(table(columns, rows), `Values of ${spec.title}`, true);
}

// Shows the cursor at the pointer, and at the arrow keys while the chart has the focus.
function addCursor(canvas, spec, scale, legend) {
  const { box } = scale;
  const line = svg('line', { class: 'cursor', y1: box.top, y2: box.height - box.bottom, visibility: 'hidden' });
  canvas.append(line);
  let at = null;
  const move = (x) => {
    at = x;
    line.setAttribute('visibility', x === null ? 'hidden' : 'visible');
    if (x !== null) { line.setAttribute('x1', scale.x(x)); line.setAttribute('x2', scale.x(x)); }
    legend.show(x);
  };
  canvas.addEventListener('pointermove', (event) => {
    const area = canvas.getBoundingClientRect();
    const wanted = ((event.clientX - area.left) / area.width) * box.width;
    const far = (x) => Math.abs(scale.x(x) - wanted);
    move(scale.xs.reduce((best, x) => (far(x) < far(best) ? x : best)));
  });
  canvas.addEventListener('pointerleave', () => move(null));
  canvas.addEventListener('blur', () => move(null));
  canvas.addEventListener('keydown', (event) => {
    const i = at === null ? scale.xs.length - 1 : scale.xs.indexOf(at);
    const to = { ArrowLeft: at === null ? i : i - 1, ArrowRight: i + 1, Home: 0, End: scale.xs.length - 1 }[event.key];
    if (event.key === 'Escape') move(null);
    if (to === undefined) return;
    event.preventDefault();
    move(scale.xs[Math.max(0, Math.min(scale.xs.length - 1, to))]);
  });
}

// spec: {title, unit, meaning, zero, wide, write, xLabel, stages: [{name, from}], rules: [{label, y, color}],
//        series: [{label, metric, run, color, dash, whiskers, points: [{x, y, low, high, cut}]}]}
function chart(spec) {
  const scale = scales(spec);
  const { box } = scale;
  const legend = legendOf(spec);
  const last = readings(spec, null).map((text, i) => `${spec.series[i].label} ${text}`).join(', ');
  const canvas = svg('svg', {
    viewBox: `0 0 ${box.width} ${box.height}`, tabindex: 0, role: 'img',
    'aria-label': `${spec.title}, ${spec.unit}. Last: ${last}. Arrow keys read the values.`,
    'data-x': JSON.stringify([scale.first, scale.last]), 'data-y': JSON.stringify([scale.low, scale.high]),
    'data-box': JSON.stringify(box),
  }, axes(spec, scale));
  for (const { y, color: index } of spec.rules || []) {
    const ends = { x1: box.left, x2: box.width - box.right, y1: scale.y(y), y2: scale.y(y) };
    canvas.append(svg('line', { class: 'rule', style: { stroke: color(index) }, ...ends }));
  }
  const count = spec.series.length;
  const window = trendWindow(spec);
  spec.series.forEach((series, i) => {
    // Intervals of many curves hide one another; the legend still reads them.
    const look = { bands: count <= 2, whiskers: series.whiskers && count <= 6, shift: 0, window };
    if (look.whiskers) look.shift = (i - (count - 1) / 2) * 3;
    canvas.append(...drawSeries(series, scale, look));
  });
  addCursor(canvas, spec, scale, legend);
  const values = el('details', null, el('summary', null, 'Values'), el('p', null, spec.meaning));
  values.addEventListener('toggle', () => {
    if (values.open && !values.querySelector('table')) values.append(valueTable(spec, scale));
  });
  return el('figure', { class: 'card chart' },
    el('figcaption', null, spec.title, el('span', null, spec.unit)), canvas, legend.node, values);
}
