// Elements and numbers. Text from a run only ever becomes a text node or a plain attribute, never markup.

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === 'style') Object.assign(node.style, value);
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function color(index) {
  return `var(--c${index % 8})`;
}

const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2 1 2'];

function dash(index) {
  return DASHES[index % DASHES.length] || null;
}

// Four digits; what is missing is a dash and never a zero.
function short(value) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace('e+', 'e');
  if (Number.isInteger(value)) return String(value);
  return size >= 1000 ? value.toFixed(0) : value.toPrecision(4);
}

function signed(value) {
  if (value === null || value === undefined) return '–';
  return (value >= 0 ? '+' : '−') + Math.abs(value).toFixed(3);
}

function fixed(value) {
  if (value === null || value === undefined) return '–';
  return Math.abs(value) < 100 ? value.toFixed(3) : short(value);
}

// Ratios differ from 1 in their last digits.
function ratio(value) {
  return value === null || value === undefined ? '–' : value.toFixed(5);
}

function interval(low, high, write) {
  return low === null || high === null || low === undefined ? '' : ` [${write(low)}, ${write(high)}]`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}

function percent(share) {
  return share === null || share === undefined ? '–' : `${(100 * share).toFixed(0)} %`;
}

// columns: [{title, number}], rows: arrays of text or nodes. The first cell of a row is its heading.
function table(columns, rows, caption) {
  const kind = (i) => (columns[i].number ? 'number' : 'wrap');
  return el('table', null,
    caption && el('caption', null, caption),
    el('thead', null, el('tr', null, columns.map((c, i) => el('th', { scope: 'col', class: kind(i) }, c.title)))),
    el('tbody', null, rows.map((row) => el('tr', null, row.map((cell, i) => (i === 0
      ? el('th', { scope: 'row', class: kind(0) }, cell)
      : el('td', { class: kind(i) }, cell)))))));
}

function scroll(node, label, tall) {
  return el('div', { class: tall ? 'scroll tall' : 'scroll', tabindex: 0, role: 'region', 'aria-label': label }, node);
}

// A labelled slider over `count` places. Arrow keys, Home and End work on it, and the arrows anywhere in `area`.
function scrubber(name, count, describe, show, area) {
  const output = el('output');
  const range = el('input', { type: 'range', min: 0, max: count - 1, step: 1, 'aria-label': name });
  const move = (to) => {
    const at = Math.max(0, Math.min(count - 1, to));
    range.value = at;
    output.textContent = describe(at);
    range.setAttribute('aria-valuetext', describe(at));
    show(at);
  };
  range.addEventListener('input', () => move(Number(range.value)));
  area.onkeydown = (event) => {
    if (event.target.matches('input, select, summary, .scroll')) return;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(Number(range.value) + step);
  };
  const by = (step, label, text) => el('button', {
    type: 'button', 'aria-label': label, onclick: () => move(Number(range.value) + step),
  }, text);
  return { move, nodes: [by(-1, `${name}: back`, '◀'), range, by(1, `${name}: on`, '▶'), output] };
}

function picker(name, options, change) {
  if (options.length < 2) return null;
  const select = el('select', { onchange: () => change(Number(select.value)) },
    options.map((text, i) => el('option', { value: i }, text)));
  return el('label', null, `${name} `, select);
}

// A picture by its number. Small ones are shown as the pixels they are.
function picture(report, number, description) {
  const image = el('img', { src: report.pictures[number], alt: description });
  const sharpen = () => image.classList.toggle('pixels', image.naturalWidth > 0 && image.naturalWidth <= 160);
  image.addEventListener('load', sharpen);
  return image;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? '' : 's'}`;
}
