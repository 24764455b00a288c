// The same fixed prompts and seeds over the steps, scrubbed by slider and arrow keys.

function galleryCell(report, sample, pairs, number) {
  const slot = (text) => {
    const holder = el('div');
    return { holder, node: el('div', null, pairs && el('span', null, text), holder) };
  };
  const source = pairs ? slot('source') : null;
  const made = slot('edit');
  const reward = el('b');
  const put = (holder, picked, description) => {
    if (picked === null) {
      holder.replaceChildren(el('div', { class: 'hole' }, 'no picture'));
    } else if (holder.firstChild && holder.firstChild.tagName === 'IMG') {
      holder.firstChild.src = report.pictures[picked];
    } else {
      holder.replaceChildren(picture(report, picked, description));
    }
  };
  const show = (cell) => {
    if (source) put(source.holder, cell ? cell[1] : null, `source of: ${sample.prompt}`);
    put(made.holder, cell ? cell[0] : null, sample.prompt);
    reward.textContent = cell ? (cell[2] === null ? 'not scored' : fixed(cell[2])) : '–';
  };
  const node = el('figure', { 'data-sample': number },
    el('div', { class: 'pictures' }, source && source.node, made.node),
    el('figcaption', null, reward, ` ${sample.prompt}`));
  return { node, show };
}

function galleryTask(report, task, area) {
  const pairs = task.frames.some((frame) => frame.cells.some((cell) => cell && cell[1] !== null));
  const cells = task.samples.map((sample, i) => galleryCell(report, sample, pairs, i));
  const describe = (i) => `step ${task.frames[i].step}, ${task.frames[i].stage} (${i + 1} of ${task.frames.length})`;
  const slider = scrubber('Step', task.frames.length, describe, (i) => {
    cells.forEach((cell, c) => cell.show(task.frames[i].cells[c]));
  }, area);
  slider.move(task.frames.length - 1);
  return [el('div', { class: 'controls' }, slider.nodes),
    el('div', { class: pairs ? 'gallery pairs' : 'gallery', tabindex: 0, role: 'group', 'aria-label': 'Pictures' },
      cells.map((cell) => cell.node))];
}

function gallerySection(report) {
  const section = el('section', { id: 'gallery' });
  const body = el('div');
  const runs = report.runs.filter((run) => Object.keys(run.gallery).length);
  const heading = [el('h2', null, 'Fixed prompts over the steps'),
    el('p', { class: 'faint' }, 'The same prompts and seeds at every step, with their rewards. Slider or arrow keys.')];
  if (!runs.length) return fill(section, null, [...heading, el('p', null, 'No pictures are on record yet.')]);
  let run = runs[0];
  const tabs = el('span', { role: 'group', 'aria-label': 'Task' });
  const showTask = (name) => {
    const choose = (task) => {
      showTask(task);
      tabs.querySelector('[aria-pressed="true"]').focus();
    };
    tabs.replaceChildren(...Object.keys(run.gallery).map((task) => el('button', {
      type: 'button', 'aria-pressed': String(task === name), onclick: () => choose(task),
    }, task)));
    body.replaceChildren(...galleryTask(report, run.gallery[name], section));
  };
  const choose = (i) => { run = runs[i]; showTask(Object.keys(run.gallery)[0]); };
  choose(0);
  const pick = picker('Run', runs.map((r) => r.label), choose);
  return fill(section, null, [...heading, el('div', { class: 'controls' }, pick, tabs), body]);
}
