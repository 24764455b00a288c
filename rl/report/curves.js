// Curves of training metrics and of held-out scores, of one run or of several over one another.

// Where each stage begins, if all runs agree on it.
function stageBorders(runs) {
  const starts = runs.map((run) => {
    const found = [];
    run.train.stages.forEach((stage, i) => {
      const known = found.length && found[found.length - 1].name === stage;
      if (stage && !known) found.push({ name: stage, from: run.train.steps[i] });
    });
    return found;
  });
  const equal = starts.every((found) => JSON.stringify(found) === JSON.stringify(starts[0]));
  return equal ? starts[0].map((stage, i) => ({ name: stage.name, from: i ? stage.from - 0.5 : stage.from })) : [];
}

function trainingPoints(run, metric, panel) {
  const { steps, stages, parts, stageSteps, columns } = run.train;
  const at = (name, i) => (columns[name] ? columns[name][i] : null);
  const points = [];
  steps.forEach((step, i) => {
    if (panel.stage !== null && parts[i] !== panel.stage) return;
    points.push({
      x: panel.stage === null || stageSteps[i] === null ? step : stageSteps[i],
      y: at(metric, i),
      low: panel.band ? at(panel.band[0], i) : null,
      high: panel.band ? at(panel.band[1], i) : null,
      cut: i > 0 && stages[i] !== stages[i - 1],
    });
  });
  return points;
}

function panelChart(report, panel, borders) {
  const several = report.runs.length > 1;
  const series = [];
  report.runs.forEach((run, r) => panel.metrics.forEach((metric, m) => {
    const points = trainingPoints(run, metric.name, panel);
    if (!points.some((p) => p.y !== null)) return;
    const label = several ? (panel.metrics.length > 1 ? `${run.label}: ${metric.label}` : run.label) : metric.label;
    const byRun = several && panel.metrics.length === 1;
    const dashes = byRun ? Math.floor(r / 8) : m;
    series.push({ label, metric: metric.name, run: r, color: several ? r : m, dash: dashes, points });
  }));
  return chart({
    title: panel.title, unit: panel.unit, zero: panel.zero, meaning: panel.meaning, series,
    write: panel.unit === 'ratio' ? ratio : short,
    stages: panel.stage === null ? borders : [], xLabel: panel.stage === null ? 'step' : 'step of the stage',
  });
}

function panelsSection(report, section, title, text) {
  const borders = stageBorders(report.runs);
  const panels = report.panels.filter((panel) => panel.section === section);
  const cards = panels.map((panel) => panelChart(report, panel, borders));
  return el('section', { id: section }, el('h2', null, title), el('p', { class: 'faint' }, text),
    cards.length ? el('div', { class: 'cards' }, cards) : el('p', null, 'Nothing is on record yet.'));
}

function scoreSeries(report, task, what, pick) {
  const several = report.runs.length > 1;
  const series = [];
  report.runs.forEach((run, r) => {
    const names = Object.keys(run.evaluation).filter((name) => name.split('/')[0] === task);
    names.forEach((name, n) => {
      const points = run.evaluation[name].map(pick).filter((p) => p !== null);
      if (!points.some((p) => p.y !== null)) return;
      const own = name === task ? 'score' : name.slice(task.length + 1);
      series.push({
        label: several ? `${run.label}${name === task ? '' : `: ${own}`}` : own,
        metric: `evaluation/${name}/${what}`, run: r, whiskers: true, points,
        color: several ? r : n, dash: several ? n + Math.floor(r / 8) : n,
      });
    });
  });
  return series;
}

function evaluationSection(report) {
  const names = report.runs.flatMap((run) => Object.keys(run.evaluation));
  const tasks = [...new Set(names.map((name) => name.split('/')[0]))].sort();
  const look = { unit: 'reward', wide: true, stages: stageBorders(report.runs) };
  const cards = tasks.flatMap((task) => {
    const rules = report.runs.length > 1 ? [] : (report.runs[0].guidance[task] || []).filter((p) => p.mean !== null)
      .map((p) => ({ label: `base at guidance ${p.scale}`, y: p.mean, color: 0 }));
    const means = scoreSeries(report, task, 'mean', (p) => ({ x: p.step, y: p.mean, low: p.low, high: p.high }));
    const changes = scoreSeries(report, task, 'difference', ({ step, change }) => (
      change ? { x: step, y: change[0], low: change[1], high: change[2] } : null));
    return [
      means.length && chart({
        ...look, title: `Held-out score, ${task}`, write: fixed, series: means, rules,
        meaning: 'Mean over the held-out prompts with its 95 % bootstrap interval over prompts.',
      }),
      changes.length && chart({
        ...look, title: `Change since before training, ${task}`, write: signed, series: changes,
        meaning: 'Mean difference to the same prompt before training, with its 95 % paired bootstrap interval.',
      }),
    ].filter(Boolean);
  });
  return el('section', { id: 'evaluation' }, el('h2', null, 'Held-out prompts'),
    el('p', { class: 'faint' },
      'The same prompts and seeds at every moment. Intervals cover the choice of prompts, not training seeds.'),
    cards.length ? el('div', { class: 'cards wide' }, cards) : el('p', null, 'No evaluation is on record yet.'));
}
