// Who did what when: one row a worker, of one step or of the whole run, with idle shares.

const LANE = 15;
const KIND_COLORS = [0, 1, 2, 3, 5, 6];
const TIME_BOX = { width: 1180, left: 110, right: 150, top: 8, bottom: 26 };

function union(spans) {
  let covered = 0;
  let reached = -Infinity;
  for (const [from, to] of spans.slice().sort((a, b) => a[0] - b[0])) {
    covered += Math.max(0, to - Math.max(from, reached));
    reached = Math.max(reached, to);
  }
  return covered;
}

// Bars of one row: what would be closer than half a pixel is one bar; what overlaps goes to lanes of its own.
function bars(spans, scale) {
  const found = [];
  const open = new Map();
  for (const [, kind, start, length] of spans) {
    const bar = open.get(kind);
    const small = scale(start + length) - scale(start) < 1;
    if (bar && small && Math.abs(scale(start) - scale(bar.end)) < 0.5) {
      bar.end = Math.max(bar.end, start + length);
      bar.count += 1;
    } else {
      const next = { kind, start, end: start + length, count: 1 };
      open.set(kind, next);
      found.push(next);
    }
  }
  const lanes = [];
  for (const bar of found.sort((a, b) => a.start - b.start)) {
    const free = lanes.findIndex((end) => end <= bar.start + 1);
    bar.lane = free < 0 ? lanes.length : free;
    lanes[bar.lane] = bar.end;
  }
  return { found, lanes: Math.max(1, lanes.length) };
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(2)} s`;
}

function timeAxis(from, to, scale, height) {
  const { step, found } = ticks(0, (to - from) / 1000, 8);
  return found.map((t) => {
    const x = scale(from + 1000 * t);
    return [svg('line', { class: 'grid', x1: x, x2: x, y1: TIME_BOX.top, y2: height - TIME_BOX.bottom }),
      svg('text', { x, y: height - 8, 'text-anchor': 'middle' }, `${tickText(t, step)} s`)];
  });
}

function drawTimeline(timeline, spans) {
  const from = Math.min(...spans.map((s) => s[2]));
  const to = Math.max(...spans.map((s) => s[2] + s[3]), from + 1);
  const inner = TIME_BOX.width - TIME_BOX.left - TIME_BOX.right;
  const scale = (t) => TIME_BOX.left + ((t - from) / (to - from)) * inner;
  const rows = [];
  const marks = [];
  let y = TIME_BOX.top;
  timeline.rows.forEach((row, r) => {
    const own = spans.filter((span) => span[0] === r);
    const { found, lanes } = bars(own, scale);
    const height = lanes * LANE + 3;
    const idle = 1 - union(own.map((s) => [s[2], s[2] + s[3]])) / (to - from);
    const text = row.idle === null ? '' : `idle ${percent(idle)} (run ${percent(row.idle)})`;
    const middle = y + height / 2 + 4;
    rows.push(svg('rect', { class: 'row', x: TIME_BOX.left, y, width: inner, height, rx: 3 }),
      svg('text', { class: 'name', x: TIME_BOX.left - 8, y: middle, 'text-anchor': 'end' },
        row.label, svg('title', null, row.worker)),
      svg('text', { x: TIME_BOX.width - TIME_BOX.right + 8, y: middle }, text));
    for (const bar of found) {
      const kind = timeline.kinds[bar.kind];
      const width = Math.max(0.75, scale(bar.end) - scale(bar.start));
      const when = `${seconds(bar.start - from)} to ${seconds(bar.end - from)} (${seconds(bar.end - bar.start)})`;
      marks.push(svg('rect', {
        x: scale(bar.start), y: y + 2 + bar.lane * LANE, width, height: LANE - 1, rx: 2,
        style: { fill: color(KIND_COLORS[bar.kind]) }, 'data-kind': kind,
      }, svg('title', null, `${row.label}: ${kind}${bar.count > 1 ? ` ×${bar.count}` : ''}, ${when}`)));
    }
    y += height + 5;
  });
  const height = y + TIME_BOX.bottom;
  const viewBox = `0 0 ${TIME_BOX.width} ${height}`;
  return svg('svg', { viewBox, role: 'img', 'aria-label': 'Time-line of the workers' },
    rows, timeAxis(from, to, scale, height).flat(), marks);
}

function timelineOf(run, section) {
  const { timeline } = run;
  const holder = el('div', { class: 'timeline' });
  const view = scroll(holder, 'Time-line');
  const describe = (i) => `step ${timeline.steps[i].step} (${i + 1} of ${timeline.steps.length})`;
  let whole = false;
  let place = Math.min(timeline.steps.length - 1, 1);
  const draw = () => {
    const spans = whole ? timeline.steps.flatMap((s) => s.spans) : timeline.steps[place].spans;
    holder.replaceChildren(drawTimeline(timeline, spans));
  };
  const all = el('button', { type: 'button' }, 'Whole run');
  const toggle = (on) => {
    whole = on;
    all.setAttribute('aria-pressed', String(on));
    draw();
  };
  all.addEventListener('click', () => toggle(!whole));
  const slider = scrubber('Step of the time-line', timeline.steps.length, describe, (i) => {
    place = i;
    toggle(false);
  }, section);
  slider.move(place);
  const kinds = [...new Set(timeline.steps.flatMap((s) => s.spans.map((span) => span[1])))].sort();
  return [el('div', { class: 'controls' }, slider.nodes, timeline.complete && timeline.steps.length > 1 && all), view,
    el('div', { class: 'legend' }, kinds.map((kind) => el('span', { class: 'key' },
      el('span', { class: 'swatch', style: { background: color(KIND_COLORS[kind]) } }), timeline.kinds[kind])),
    run.trace && el('span', null, 'Every span at any scale: ', el('a', { href: run.trace }, run.trace),
      ' in Perfetto or chrome://tracing'))];
}

function timelineSection(report) {
  const section = el('section', { id: 'timeline' });
  const body = el('div', { class: 'card' });
  const runs = report.runs.filter((run) => run.timeline.steps.length);
  const heading = [el('h2', null, 'Time-line'), el('p', { class: 'faint' },
    'Seconds of working time; pauses between steps are left out. '
    + 'Idle is the share of that time in which a worker did nothing.')];
  if (!runs.length) return fill(section, null, [...heading, el('p', null, 'No spans are on record yet.')]);
  const choose = (i) => body.replaceChildren(...timelineOf(runs[i], section));
  choose(0);
  const pick = picker('Run', runs.map((run) => run.label), choose);
  return fill(section, null, [...heading, pick && el('div', { class: 'controls' }, pick), body]);
}
