// The best and the worst group of each step, with what each sample earned from every reward and its parts.

function meter(value, low, high) {
  const share = value === null || high === low ? 0 : (value - low) / (high - low);
  const width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return el('span', { class: 'meter', 'aria-hidden': 'true' }, el('i', { style: { width } }));
}

// A single reward of weight 1 would stand beside the total a second time.
function shownParts(group) {
  const names = Object.keys(group.components).sort();
  const labels = names.filter((name) => !name.includes('/'));
  const twice = labels.length === 1 && group.components[labels[0]].every((value, k) => value === group.rewards[k]);
  return names.filter((name) => !twice || name !== labels[0]);
}

function groupTable(report, group, [low, high]) {
  const shown = shownParts(group);
  const labels = new Set(shown.map((name) => name.split('/')[0]));
  const titles = shown.map((name) => (labels.size === 1 ? name.replace(/^[^/]*\//, '') : name));
  const columns = [{ title: 'sample', number: true }, ...(group.pictures ? [{ title: 'picture' }] : []),
    ...['reward', ...titles].map((title) => ({ title, number: true }))];
  const rows = group.rewards.map((reward, k) => [String(k),
    ...(group.pictures ? [picture(report, group.pictures[k], `sample ${k} of: ${group.prompt}`)] : []),
    reward === null ? 'not scored' : [fixed(reward), meter(reward, low, high)],
    ...shown.map((name) => fixed(group.components[name][k]))]);
  return scroll(table(columns, rows), `Samples of group ${group.group}`);
}

function groupCard(report, title, group, range) {
  if (!group) {
    const text = title === 'Best' ? 'No group of this step was scored.' : 'No second group of this step was scored.';
    return el('div', { class: 'card' }, el('h3', null, title), el('p', null, text));
  }
  const source = group.reference !== null && picture(report, group.reference, `source of: ${group.prompt}`);
  const samples = plural(group.rewards.length, 'sample');
  return el('div', { class: 'card', 'data-group': group.group },
    el('h3', null, `${title}: mean ${fixed(group.mean)}`),
    el('div', { class: 'source' }, source, el('p', { class: 'prompt' }, group.prompt)),
    el('p', { class: 'faint' }, `group ${group.group}, ${samples}`, group.dropped && `; dropped: ${group.dropped}`),
    groupTable(report, group, range));
}

// Prompts whose samples all earned the same whenever they were drawn: too easy, too hard, or blind to the reward.
function flatPrompts(flat) {
  const scored = `${plural(flat.of, 'prompt')} that were scored`;
  if (!flat.count) return el('p', null, `Each of the ${scored} had spread at least once.`);
  const title = `${flat.count} of ${scored} never had spread and taught nothing`;
  const columns = ['stage', 'prompt', 'groups', 'mean'].map((name, i) => ({ title: name, number: i > 1 }));
  const rows = flat.shown.map((one) => [one.stage, one.prompt, String(one.groups), fixed(one.mean)]);
  const more = flat.count - flat.shown.length;
  const heading = more ? `${title}; ${flat.shown.length} are shown` : title;
  return el('details', { class: 'flat' }, el('summary', null, heading),
    scroll(table(columns, rows), 'Prompts without spread'));
}

function groupsOf(report, run, section) {
  const body = el('div', { class: 'ends' });
  const share = el('p');
  const pictured = run.groups.map((entry) => Boolean(entry.best && entry.best.pictures));
  const describe = (i) => `step ${run.groups[i].step}, ${run.groups[i].stage}${pictured[i] ? ', with pictures' : ''}`;
  const slider = scrubber('Step of the groups', run.groups.length, describe, (i) => {
    const entry = run.groups[i];
    share.textContent = `${plural(entry.groups, 'group')}; ${entry.equal} without spread, which teach nothing.`;
    const both = [entry.best, entry.worst].filter((group) => group !== null);
    const rewards = both.flatMap((group) => group.rewards).filter((reward) => reward !== null);
    const range = [Math.min(0, ...rewards), Math.max(1e-9, ...rewards)];
    body.replaceChildren(groupCard(report, 'Best', entry.best, range), groupCard(report, 'Worst', entry.worst, range));
  }, section);
  const jump = (label, pick) => el('button', { type: 'button', onclick: () => slider.move(pick()) }, label);
  const extreme = (end, sign) => run.groups.reduce((best, entry, i) => {
    const value = (j) => (run.groups[j][end] ? sign * run.groups[j][end].mean : -Infinity);
    return value(i) > value(best) ? i : best;
  }, 0);
  slider.move(Math.max(pictured.lastIndexOf(true), pictured.includes(true) ? 0 : run.groups.length - 1));
  return [el('div', { class: 'controls' }, slider.nodes, jump('Best of the run', () => extreme('best', 1)),
    jump('Worst of the run', () => extreme('worst', -1)),
    pictured.includes(true) && jump('Last with pictures', () => pictured.lastIndexOf(true))), share, body,
    flatPrompts(run.flat)];
}

function groupsSection(report) {
  const section = el('section', { id: 'groups' });
  const body = el('div');
  const runs = report.runs.filter((run) => run.groups.length);
  const heading = [el('h2', null, 'Best and worst groups'),
    el('p', { class: 'faint' },
      'By mean reward of a prompt’s samples: the place to look for a reward that is being fooled, or never earned.')];
  if (!runs.length) return fill(section, null, [...heading, el('p', null, 'No groups are on record.')]);
  const choose = (i) => body.replaceChildren(...groupsOf(report, runs[i], section));
  choose(0);
  const pick = picker('Run', runs.map((run) => run.label), choose);
  return fill(section, null, [...heading, pick && el('div', { class: 'controls' }, pick), body]);
}
