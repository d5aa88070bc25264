(() => {
  'use strict';

  const data = JSON.parse(document.getElementById('data').textContent);
  const START = Object.freeze({
    view: '', text: '', scene: '', low: 1, high: 10, attribute: 0, least: 0, sort: 'view', descending: true, photo: -1,
  });
  const OWN_SECTIONS = ['errors', 'runs'];
  const SLIDERS = ['low', 'high', 'least'];
  const SVG = 'http://www.w3.org/2000/svg';

  const byId = (id) => document.getElementById(id);
  const panel = byId('panel');
  const viewButtons = [...document.querySelectorAll('.views button')];
  const viewNames = viewButtons.map((button) => button.dataset.view);

  let state = { ...START };
  /** The buttons that are shown, the places in data.photos of their photos, and the one that the tab key stops at. */
  let cards = [];
  let order = [];
  let stop = null;

  // --- making elements: text is only ever text -----------------------------------------------------------------------

  function element(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  function drawing(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }

  function fill(made, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  const fixed = (value, digits = 1) => (value === null ? '–' : value.toFixed(digits));
  const count = (value) => value.toLocaleString('en-US');

  // --- thumbnails: a block of them is parsed when its first is needed ------------------------------------------------

  const blocks = new Map();

  function thumbnail(index) {
    const at = Math.floor(index / data.chunk);
    if (!blocks.has(at)) {
      const script = byId(`thumbnails-${at}`);
      blocks.set(at, JSON.parse(script.textContent));
      script.remove();
    }
    const content = blocks.get(at)[index % data.chunk];
    return content && `data:image/webp;base64,${content}`;
  }

  function picture(index, alt = '') {
    const photo = data.photos[index];
    const source = photo.missing ? null : thumbnail(index);
    if (!source) return element('span', { class: 'missing' }, photo.missing || 'no picture');
    const image = element('img', { alt, decoding: 'async' });
    image.src = source;
    return image;
  }

  const nearScreen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((found) => found.isIntersecting)) {
      nearScreen.unobserve(entry.target);
      entry.target.prepend(picture(Number(entry.target.dataset.index)));
    }
  }, { rootMargin: '500px' });

  // --- which photos, in which order ----------------------------------------------------------------------------------

  function matches(photo) {
    const value = photo.attributes[state.attribute];
    return photo.quality >= state.low - 1e-9 && photo.quality <= state.high + 1e-9
      && (!state.scene || photo.scene === state.scene)
      && (!state.least || (value !== null && value >= state.least))
      && (!state.text || textOf(photo).includes(state.text.toLowerCase()));
  }

  function textOf(photo) {
    const facts = photo.facts.map(([, value]) => value);
    const advice = photo.suggestions.map((suggestion) => suggestion.text);
    photo.searched ??= [photo.path, photo.scene, photo.caption, photo.reason, ...facts, ...advice].join('\n').toLowerCase();
    return photo.searched;
  }

  function sortKey(photo) {
    if (state.sort.startsWith('a')) return photo.attributes[Number(state.sort.slice(1))];
    return photo[state.sort];
  }

  /** Largest first where descending; photos without the value last, whichever way; then the better photo. */
  function compare(left, right) {
    const [a, b] = [data.photos[left], data.photos[right]];
    const [x, y] = [sortKey(a), sortKey(b)];
    const [noX, noY] = [x === null || x === '', y === null || y === ''];
    if (noX !== noY) return noX ? 1 : -1;
    if (x === y || noX) return a.rank - b.rank;
    const larger = typeof x === 'string' ? (x < y ? -1 : 1) : x - y;
    return state.descending ? -larger : larger;
  }

  /** Of each view the places in data.photos, in its order. */
  const places = {
    ...data.views,
    groups: data.groups.flatMap((group) => group.members),
    all: data.photos.map((_, index) => index).sort((a, b) => data.photos[a].rank - data.photos[b].rank),
  };

  function wantedOf(view) {
    const wanted = (places[view] || []).filter((index) => matches(data.photos[index]));
    if (state.sort === 'view') return state.descending ? wanted : wanted.reverse();
    return wanted.sort(compare);
  }

  // --- showing them: what is made once for a view is shown again, or left out, or moved -------------------------------

  function card(index) {
    const photo = data.photos[index];
    const frame = element('span', { class: 'frame', 'data-index': index });
    const badge = state.view === 'groups' ? photo.rankInGroup === 1 && 'pick'
      : state.view !== 'selected' && photo.selected !== null && 'selected';
    if (badge) frame.append(element('span', { class: 'badge' }, badge));
    nearScreen.observe(frame);
    const words = element('span', { class: 'words' },
      element('b', {}, fixed(photo.quality)),
      element('bdi', { class: 'name' }, photo.name),
      state.view === 'improvable' ? element('span', { class: 'gain' }, `+${fixed(photo.gain)}`) : null);
    const pick = photo.rankInGroup === 1 ? ', the pick of its group' : '';
    const selected = photo.selected === null ? '' : ', selected';
    const label = `${photo.name}, quality ${fixed(photo.quality)}, ${photo.scene}${pick}${selected}`;
    const button = element('button', { type: 'button', class: 'card', tabindex: -1, 'aria-label': label, 'data-index': index },
      frame, words);
    const item = element('li', {}, button);
    item.style.setProperty('--ratio', Math.min(2.4, Math.max(0.62, photo.ratio)).toFixed(3));
    return item;
  }

  function groupSection(at) {
    const group = data.groups[at];
    const pick = data.photos[group.members[0]];
    const more = group.size - group.members.length;
    const rest = more > 0 ? ` ${count(more)} more ${more === 1 ? 'is' : 'are'} not shown.` : '';
    return element('section', { class: 'group' },
      element('h3', {}, group.kind === 'burst' ? `Burst of ${group.size}` : `${group.size} ${group.kind}`),
      element('p', {}, 'Pick: ', element('bdi', {}, pick.name), pick.reason ? ` – ${pick.reason}.` : '.', rest),
      element('ul', { class: 'photos' }, ...group.members.map(card)));
  }

  /** Of each view its element, and the parts made so far: cards by photo; in the view `groups` sections by group. */
  const made = {};

  /** Groups with a photo that is wanted, all of their members; sorted by the first of those. */
  function partsOf(wanted) {
    const groups = state.view === 'groups';
    made[state.view] ??= { whole: groups ? element('div') : element('ul', { class: 'photos' }), parts: new Map() };
    const { parts } = made[state.view];
    const keys = groups ? new Set(wanted.map((index) => data.photos[index].group)) : wanted;
    return [...keys].map((key) => {
      if (!parts.has(key)) parts.set(key, groups ? groupSection(key) : card(key));
      return parts.get(key);
    });
  }

  /** Give a parent these children, in this order. Those that stay in place are not touched: that is what takes time. */
  function arrange(parent, children) {
    const wanted = new Set(children);
    for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
    let next = parent.firstElementChild;
    for (const child of children) {
      if (child === next) next = next.nextElementSibling;
      else parent.insertBefore(child, next);
    }
  }

  function show() {
    const own = OWN_SECTIONS.includes(state.view);
    for (const name of OWN_SECTIONS) byId(name).hidden = name !== state.view;
    byId('lead').textContent = data.leads[state.view] || '';
    const wanted = wantedOf(state.view);
    const parts = own ? [] : partsOf(wanted);
    if (parts.length) {
      arrange(made[state.view].whole, parts);
      arrange(byId('view'), [made[state.view].whole]);
    } else {
      byId('view').replaceChildren(...(own ? [] : [element('p', { class: 'empty' }, 'No photo of this view fits these filters.')]));
    }
    cards = parts.flatMap((part) => [...part.querySelectorAll('.card')]);
    order = cards.map((button) => Number(button.dataset.index));
    if (cards.length) stopAt(cards[0]);
    const all = own ? 0 : places[state.view].length;
    byId('status').textContent = own ? '' : wanted.length === all ? `${count(all)} photos` : `${count(wanted.length)} of ${count(all)} photos fit`;
  }

  function showControls() {
    for (const button of viewButtons) button.setAttribute('aria-pressed', String(button.dataset.view === state.view));
    for (const name of ['text', 'scene', 'low', 'high', 'attribute', 'least', 'sort']) {
      const control = byId(name);
      if (control.value !== String(state[name])) control.value = state[name];
    }
    byId('range-output').textContent = `${fixed(state.low)} to ${fixed(state.high)}`;
    const between = byId('low').parentElement;
    between.style.setProperty('--from', `${(100 * (state.low - 1)) / 9}%`);
    between.style.setProperty('--to', `${(100 * (10 - state.high)) / 9}%`);
    byId('low').classList.toggle('above', state.low > 5.5); // or both at the right end could not be parted
    byId('filters').hidden = byId('filters-toggle').hidden = OWN_SECTIONS.includes(state.view);
    byId('least-output').textContent = String(state.least);
    byId('direction').textContent = state.descending ? '↓' : '↑';
    byId('direction').setAttribute('aria-label', state.descending ? 'Highest first' : 'Lowest first');
    for (const bar of document.querySelectorAll('.histogram .bar')) {
      const low = Number(bar.dataset.low);
      bar.classList.toggle('out', low + 0.25 <= state.low || low > state.high);
    }
  }

  function change(changes) {
    if ('view' in changes) bringIntoSight(viewButtons.find((button) => button.dataset.view === changes.view));
    state = { ...state, ...changes };
    if (state.low > state.high) [state.low, state.high] = 'low' in changes ? [state.low, state.low] : [state.high, state.high];
    showControls();
    show();
  }

  /** On a phone the row of views is wider than the screen. */
  function bringIntoSight(button) {
    const row = button.parentElement;
    row.scrollLeft = button.offsetLeft - row.offsetLeft - (row.clientWidth - button.offsetWidth) / 2;
  }

  let frame = 0;

  function update(changes) {
    cancelAnimationFrame(frame);
    change(changes);
    writeHash();
  }

  /** While a slider is dragged: once a frame, and not into the address, which browsers let a page write so often only. */
  function drag(changes) {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => change(changes));
  }

  // --- the address keeps the state -----------------------------------------------------------------------------------

  function writeHash() {
    const changed = Object.entries(state).filter(([name, value]) => value !== (name === 'view' ? viewNames[0] : START[name]));
    const words = new URLSearchParams(changed).toString();
    history.replaceState(null, '', words ? `#${words}` : location.pathname + location.search);
  }

  function readHash() {
    const words = new URLSearchParams(location.hash.slice(1));
    const number = (name, low, high) => {
      const value = Number(words.get(name) ?? START[name]);
      return value >= low && value <= high ? value : START[name];
    };
    const option = (name) => {
      const known = [...byId(name).options].some((found) => found.value === words.get(name));
      return known ? words.get(name) : START[name];
    };
    return {
      view: viewNames.includes(words.get('view')) ? words.get('view') : viewNames[0],
      text: words.get('text') ?? '',
      scene: option('scene'),
      low: number('low', 1, 10),
      high: number('high', 1, 10),
      attribute: Math.trunc(number('attribute', 0, data.labels.length - 1)),
      least: number('least', 0, 100),
      sort: option('sort'),
      descending: words.get('descending') !== 'false',
      photo: Math.trunc(number('photo', 0, data.photos.length - 1)),
    };
  }

  // --- one photo -----------------------------------------------------------------------------------------------------

  function radar(photo) {
    const [centre, top, radius] = [170, 130, 90];
    const corner = (at, value) => {
      const angle = (2 * Math.PI * at) / data.labels.length;
      return [centre + radius * (value / 100) * Math.sin(angle), top - radius * (value / 100) * Math.cos(angle)];
    };
    const outline = (values) => values.map((value, at) => corner(at, value).map((part) => part.toFixed(1)).join(',')).join(' ');
    const even = (value) => data.labels.map(() => value);
    const values = photo.attributes.map((value) => value ?? 0);
    const told = data.labels.map((label, at) => `${label} ${fixed(photo.attributes[at], 0)}`).join(', ');
    const chart = drawing('svg', { class: 'radar', viewBox: '0 0 340 258', role: 'img', 'aria-label': `Attributes, 0 to 100: ${told}` });
    for (const ring of [20, 40, 60, 80, 100]) chart.append(drawing('polygon', { class: 'ring', points: outline(even(ring)) }));
    data.labels.forEach((_, at) => {
      const [x, y] = corner(at, 100);
      chart.append(drawing('line', { class: 'spoke', x1: centre, y1: top, x2: x.toFixed(1), y2: y.toFixed(1) }));
    });
    chart.append(drawing('polygon', { class: 'shape', points: outline(values) }));
    values.forEach((value, at) => {
      const [x, y] = corner(at, value);
      chart.append(drawing('circle', { class: 'dot', cx: x.toFixed(1), cy: y.toFixed(1), r: 3.2 }));
      chart.append(...radarLabel(corner(at, 112), centre, data.labels[at], fixed(photo.attributes[at], 0)));
    });
    return chart;
  }

  function radarLabel([x, y], centre, label, value) {
    const anchor = Math.abs(x - centre) < 1 ? 'middle' : x > centre ? 'start' : 'end';
    const lift = anchor !== 'middle' ? 0 : y < 100 ? -11 : 9;
    const at = (below, kind) => ({ x: x.toFixed(1), y: (y + lift + below).toFixed(1), 'text-anchor': anchor, class: kind });
    return [drawing('text', at(-1, 'label'), label), drawing('text', at(13, 'value'), value)];
  }

  function scale(photo) {
    const x = (score) => (10 + ((score - 1) / 9) * 320).toFixed(1);
    const line = (kind, from, to) => drawing('line', { class: kind, x1: x(from), y1: 12, x2: x(to), y2: 12 });
    const known = photo.low !== null && photo.high !== null;
    return drawing('svg', { class: 'scale', viewBox: '0 0 340 24', 'aria-hidden': 'true' },
      line('track', 1, 10),
      known ? line('range', photo.low, photo.high) : null,
      drawing('circle', { cx: x(photo.quality), cy: 12, r: 7 }));
  }

  function siblings(index) {
    const group = data.groups[data.photos[index].group];
    if (!group) return [];
    const buttons = group.members.map((member) => {
      const photo = data.photos[member];
      const button = element('button', { type: 'button', 'aria-label': `${photo.name}, quality ${fixed(photo.quality)}`,
        'aria-current': String(member === index) }, picture(member),
      photo.rankInGroup === 1 ? element('span', { class: 'badge' }, 'pick') : null);
      button.addEventListener('click', () => openPhoto(member));
      return button;
    });
    const photo = data.photos[index];
    return [
      element('h3', {}, `Group: ${group.kind}, ${photo.rankInGroup} of ${group.size}`),
      photo.reason ? element('p', {}, photo.reason) : null,
      element('div', { class: 'siblings' }, ...buttons),
    ].filter((part) => part !== null);
  }

  function standing(photo) {
    const scene = `, ${fixed(photo.scenePercentile, 0)} of its scene`;
    const selected = photo.selected === null ? '' : ` Selected, number ${count(photo.selected)} of ${count(data.selected)}.`;
    return `Rank ${count(photo.rank)} of ${count(data.total)}: percentile ${fixed(photo.percentile, 0)} of the library${scene}.${selected}`;
  }

  function details(index) {
    const photo = data.photos[index];
    const probability = photo.sceneProbability === null ? '' : ` ${Math.round(100 * photo.sceneProbability)} %`;
    const interval = photo.low === null || photo.high === null ? '' : `likely ${fixed(photo.low)} to ${fixed(photo.high)}`;
    const source = photo.captionSource && photo.captionSource !== 'model' ? ` (${photo.captionSource})` : '';
    const suggestions = photo.suggestions.map((suggestion) => element('li', {}, suggestion.text,
      suggestion.gain === null ? null : element('span', { class: 'gain' }, ` +${fixed(suggestion.gain)}`)));
    const facts = photo.facts.flatMap(([name, value]) => [element('dt', {}, name), element('dd', {}, element('bdi', {}, value))]);
    return [
      element('h2', { id: 'panel-name' }, element('bdi', {}, photo.name)),
      element('p', { class: 'headline' }, element('b', {}, fixed(photo.quality)), element('span', { class: 'soft' }, 'of 10'),
        element('span', { class: 'scene' }, photo.scene, element('span', { class: 'soft' }, probability))),
      scale(photo),
      interval ? element('p', { class: 'soft' }, interval) : null,
      element('p', { class: 'soft' }, standing(photo)),
      radar(photo),
      photo.caption ? element('p', { class: 'caption' }, photo.caption, element('span', { class: 'soft' }, source)) : null,
      suggestions.length ? element('h3', {}, 'What would raise the score') : null,
      suggestions.length ? element('ul', { class: 'suggestions' }, ...suggestions) : null,
      ...siblings(index),
      facts.length ? element('h3', {}, 'Facts') : null,
      facts.length ? element('dl', { class: 'facts' }, ...facts) : null,
      element('h3', {}, 'Where it is'),
      element('bdi', { class: 'where path' }, photo.path),
    ].filter((part) => part !== null);
  }

  function openPhoto(index) {
    const photo = data.photos[index];
    const image = picture(index, photo.caption || photo.name);
    byId('stage').replaceChildren(image);
    // Twice its pixels and no more: a thumbnail is no photo.
    if (image.decode) image.decode().then(() => image.style.setProperty('--most', `${2 * Math.max(image.naturalWidth, image.naturalHeight)}px`), () => {});
    byId('details').replaceChildren(...details(index));
    byId('details').scrollTop = 0;
    const at = order.indexOf(index);
    byId('position').textContent = at < 0 ? '' : `${count(at + 1)} of ${count(order.length)}`;
    byId('previous').disabled = at <= 0;
    byId('next').disabled = at < 0 || at >= order.length - 1;
    state.photo = index;
    if (!panel.open) {
      panel.showModal();
      byId('close').focus();
    }
    writeHash();
  }

  function step(by) {
    const next = order[order.indexOf(state.photo) + by];
    if (order.includes(state.photo) && next !== undefined) openPhoto(next);
  }

  function closed() {
    const shown = cards.find((button) => Number(button.dataset.index) === state.photo);
    state.photo = -1;
    writeHash();
    if (shown) focusCard(shown);
  }

  // --- keys ----------------------------------------------------------------------------------------------------------

  function stopAt(button) {
    if (stop) stop.tabIndex = -1;
    stop = button;
    stop.tabIndex = 0;
  }

  function focusCard(button) {
    stopAt(button);
    button.focus();
    button.scrollIntoView({ block: 'nearest' });
  }

  /** The card of the next row up or down that is nearest across. */
  function vertical(from, down) {
    const here = from.getBoundingClientRect();
    const middle = here.left + here.width / 2;
    const boxes = cards.map((button) => ({ button, box: button.getBoundingClientRect() }));
    const beyond = boxes.filter(({ box }) => (down ? box.top > here.top + 5 : box.top < here.top - 5));
    if (!beyond.length) return null;
    const tops = beyond.map(({ box }) => box.top);
    const row = tops.reduce((a, b) => (down ? Math.min(a, b) : Math.max(a, b)));
    const across = ({ box }) => Math.abs(box.left + box.width / 2 - middle);
    return beyond.filter(({ box }) => Math.abs(box.top - row) <= 5).reduce((a, b) => (across(b) < across(a) ? b : a)).button;
  }

  function moved(from, key) {
    const at = cards.indexOf(from);
    switch (key) {
      case 'ArrowRight': return cards[at + 1];
      case 'ArrowLeft': return cards[at - 1];
      case 'ArrowDown': return vertical(from, true);
      case 'ArrowUp': return vertical(from, false);
      case 'Home': return cards[0];
      case 'End': return cards[cards.length - 1];
      default: return undefined;
    }
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (panel.open) {
      if (event.key === 'ArrowLeft' || event.key === 'ArrowRight') {
        event.preventDefault();
        step(event.key === 'ArrowLeft' ? -1 : 1);
      }
      return;
    }
    const typing = event.target.matches('input[type="search"], select');
    if (event.key === 'Escape' && event.target.id === 'text') event.target.blur();
    if (typing || byId('help').open) return;
    const card = event.target.closest('.card');
    const target = card && moved(card, event.key);
    if (target) {
      event.preventDefault();
      focusCard(target);
    } else if (event.key === '/') {
      event.preventDefault();
      openFilters(true);
      byId('text').focus();
    } else if (event.key === '?') {
      byId('help').showModal();
    }
  }

  // --- wiring --------------------------------------------------------------------------------------------------------

  function openFilters(open) {
    byId('filters').classList.toggle('open', open);
    byId('filters-toggle').setAttribute('aria-expanded', String(open));
  }

  function listen() {
    for (const button of viewButtons) button.addEventListener('click', () => update({ view: button.dataset.view, sort: 'view', descending: true }));
    for (const name of ['text', 'scene', 'sort']) byId(name).addEventListener('input', (event) => update({ [name]: event.target.value }));
    byId('attribute').addEventListener('input', (event) => update({ attribute: Number(event.target.value) }));
    for (const name of SLIDERS) {
      byId(name).addEventListener('input', (event) => drag({ [name]: Number(event.target.value) }));
      byId(name).addEventListener('change', (event) => update({ [name]: Number(event.target.value) }));
    }
    byId('direction').addEventListener('click', () => update({ descending: !state.descending }));
    byId('reset').addEventListener('click', () => update({ ...START, view: state.view }));
    byId('filters-toggle').addEventListener('click', () => openFilters(!byId('filters').classList.contains('open')));
    byId('help-open').addEventListener('click', () => byId('help').showModal());
    byId('view').addEventListener('click', (event) => {
      const button = event.target.closest('.card');
      if (button) openPhoto(Number(button.dataset.index));
    });
    byId('previous').addEventListener('click', () => step(-1));
    byId('next').addEventListener('click', () => step(1));
    byId('close').addEventListener('click', () => panel.close());
    panel.addEventListener('click', (event) => { if (event.target === panel) panel.close(); });
    panel.addEventListener('close', closed);
    document.addEventListener('keydown', onKey);
    window.addEventListener('hashchange', () => {
      if (location.hash !== '#photos') start();
    });
  }

  function start() {
    const { photo, ...rest } = readHash();
    update({ ...rest, photo: -1 });
    if (photo >= 0) openPhoto(photo);
    else if (panel.open) panel.close();
  }

  listen();
  start();
})();
