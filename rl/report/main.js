// Reads the document that stands in the page and builds the sections.

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === 'dark' : window.matchMedia('(prefers-color-scheme: dark)').matches;
}

function addThemeButton() {
  const button = document.getElementById('theme');
  const show = () => button.setAttribute('aria-pressed', String(isDark()));
  button.addEventListener('click', () => {
    document.documentElement.dataset.theme = isDark() ? 'light' : 'dark';
    show();
  });
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', show);
  show();
}

function build() {
  const report = JSON.parse(document.getElementById('document').textContent);
  const content = document.getElementById('content');
  const sections = [
    resultsSection(report),
    evaluationSection(report),
    panelsSection(report, 'reward', 'Training reward',
      'Rewards of the rollout’s samples. Two stages do not share a curve, since their rewards are not the same.'),
    gallerySection(report),
    groupsSection(report),
    panelsSection(report, 'policy', 'Policy and optimizer',
      'Ratios, clipping, distance to the reference, and how well rollout and learner agree.'),
    panelsSection(report, 'time', 'Speed', 'Seconds of each step, and what came out of them.'),
    timelineSection(report),
  ];
  content.append(...headline(report).filter(Boolean), ...sections);
  const title = (section) => section.querySelector('h2').textContent;
  document.getElementById('nav').append(...sections.map((s) => el('a', { href: `#${s.id}` }, title(s))));
}

addThemeButton();
build();
