// The head of the page: what the runs came to, what is missing, and how several runs compare.

function changeCell(change) {
  if (!change || change[0] === null) return '–';
  const sure = change[1] !== null && (change[1] > 0 || change[2] < 0);
  const kind = sure ? (change[0] > 0 ? 'up' : 'down') : null;
  return el('span', { class: kind }, signed(change[0]) + interval(change[1], change[2], signed));
}

function notes(report) {
  const lines = report.runs.flatMap((run) => {
    const head = report.runs.length > 1 ? `${run.label}: ` : '';
    return [...run.alarms.map((line) => `${head}alarm: ${line}`), ...run.notes.map((line) => head + line)];
  });
  return lines.length ? el('div', { class: 'note', id: 'notes' }, el('strong', null, 'To know'),
    el('ul', null, lines.map((line) => el('li', null, line)))) : null;
}

function tiles(run) {
  const whole = run.changes.filter((c) => c.over === 'whole run' || c.over === 'so far');
  return el('div', { class: 'tiles' }, whole.map((c) => el('div', { class: 'card tile' },
    el('div', { class: 'faint' }, `${c.name}, ${c.over}`),
    el('div', { class: 'big' }, fixed(c.before), el('span', { class: 'arrow' }, ' → '), fixed(c.after)),
    el('div', null, changeCell(c.change)))));
}

function resultTable(run) {
  const columns = [{ title: 'over' }, { title: 'score' },
    ...['before', 'after', 'difference (95 %)', 'prompts'].map((title) => ({ title, number: true }))];
  const rows = run.changes.map((c) => [c.over, c.name, fixed(c.before), fixed(c.after), changeCell(c.change),
    c.missing ? `${c.n} of ${c.n + c.missing}` : String(c.n)]);
  if (!rows.length) return el('p', null, 'No two evaluations to compare yet.');
  return scroll(table(columns, rows), `Results of ${run.label}`);
}

function runTable(report) {
  const lastReward = (run) => run.stages.flatMap((stage) => stage.parts).map((part) => {
    const values = run.train.columns['reward/mean'] || [];
    const own = values.filter((value, i) => run.train.parts[i] === part && value !== null);
    return `${part} ${own.length ? fixed(own[own.length - 1]) : '–'}`;
  }).join(', ');
  const columns = [{ title: 'run' }, { title: 'state' }, { title: 'last training reward' },
    ...['images', 'time', 'restarts'].map((title) => ({ title, number: true })), { title: 'trace' }];
  const rows = report.runs.map((run, r) => [
    el('span', { class: 'key' }, el('span', { class: 'swatch', style: { background: color(r) } }), run.label),
    run.state, lastReward(run), run.images === null ? '–' : run.images.toLocaleString('en'), duration(run.seconds),
    short(run.restarts),
    run.trace ? el('a', { href: run.trace }, 'trace.json') : '–']);
  return scroll(table(columns, rows), 'Runs');
}

function scoreCell(cell) {
  if (!cell) return '–';
  return [el('div', null, fixed(cell.mean) + interval(cell.low, cell.high, fixed)),
    el('div', null, changeCell(cell.change)),
    cell.seeds.length > 1 && el('div', { class: 'faint' }, `by seed ${cell.seeds.map(signed).join(', ')}`)];
}

function ablationTable(report) {
  const names = [...new Set(report.ablation.flatMap((row) => Object.keys(row.scores)))];
  const columns = [{ title: 'stages and rewards' }, { title: 'runs' },
    ...names.map((title) => ({ title, number: true }))];
  const rows = report.ablation.map((row) => [row.setting, row.runs.join(', '),
    ...names.map((name) => scoreCell(row.scores[name]))]);
  return el('div', { id: 'ablation' }, el('h3', null, 'Ablation'),
    el('p', { class: 'faint' },
      'Last held-out score with its interval; below it the paired change since before training. '
      + 'Runs that differ by their seed only share a row, and each prompt counts with its mean over them.'),
    scroll(table(columns, rows), 'Ablation'));
}

function settingsTable(report) {
  if (!report.settings.length) return null;
  const columns = [{ title: 'setting' }, ...report.runs.map((run) => ({ title: run.label }))];
  const rows = report.settings.map((s) => [s.key, ...s.values.map((value) => (value === null ? '–' : value))]);
  return el('div', { id: 'settings' }, el('h3', null, 'Settings that differ'),
    scroll(table(columns, rows), 'Settings that differ', true));
}

function headline(report) {
  const single = report.runs.length === 1 ? report.runs[0] : null;
  const facts = !single ? [plural(report.runs.length, 'run')] : [
    single.state,
    single.images !== null && `${single.images.toLocaleString('en')} images`,
    single.seconds !== null && duration(single.seconds),
    single.restarts && plural(single.restarts, 'worker restart'),
    single.learnerRestarts && plural(single.learnerRestarts, 'learner restart'),
    single.commit && `commit ${single.commit.slice(0, 12)}`,
  ];
  return [el('h1', null, single ? single.label : 'Comparison of runs'),
    el('p', { class: 'faint' },
      [...facts, `report of ${report.made}`, `version ${report.version}`].filter(Boolean).join(' · ')),
    notes(report)];
}

function resultsSection(report) {
  const single = report.runs.length === 1 ? report.runs[0] : null;
  const body = single
    ? [single.changes.length ? tiles(single) : null, resultTable(single),
      single.stages.length ? el('p', { class: 'faint' }, `Recipe: ${report.ablation[0].setting}`) : null]
    : [runTable(report), ablationTable(report), settingsTable(report),
      report.runs.map((run) => el('details', null,
        el('summary', null, `Results of ${run.label} by stage`), resultTable(run)))];
  return el('section', { id: 'results' }, el('h2', null, 'Results'), body);
}
