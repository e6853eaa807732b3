// The gallery: filters → positions of images → one page of cards.

const PER_PAGE = 60;
const controls = byId("controls");
const fields = controls.elements;
const defaults = () => ({
  method: report.methods[0], stage: report.stages.includes("pseudo_masks") ? "pseudo_masks" : report.stages[0],
  tag: "", kind: "", reason: "", query: "", sort: "worst", figure: fields.figure.options[0].value, low: 0, high: 1,
  layer: null, opacity: 70, sideBySide: false, page: 0, open: null,
});
const state = defaults();
state.layer = nameOf(state.stage);

const split = () => report.splits[state.stage];

function matching({ withRange = true } = {}) {
  const query = state.query.trim().toLocaleLowerCase();
  const matches = [];
  for (let at = 0; at < images.ids.length; at += 1) {
    if (images.splits[at] !== split() || !inGallery(state.method, at)) continue;
    if (state.tag !== "" && !images.tags[at]?.includes(Number(state.tag))) continue;
    if (state.kind !== "" && !(images.methods[state.method].kinds[at] & Number(state.kind))) continue;
    if (query && !images.ids[at].toLocaleLowerCase().includes(query)) continue;
    if (state.reason && !valueOf(state.method, state.stage, "reasons", at)?.includes(state.reason)) continue;
    const value = valueOf(state.method, state.stage, state.figure, at);
    const inRange = (state.low <= 0 && state.high >= 1) || (value !== null && value >= state.low && value <= state.high);
    if (withRange && !inRange) continue;
    matches.push(at);
  }
  return matches;
}

function ordered(matches) {
  const value = (at) => valueOf(state.method, state.stage, state.figure, at);
  const change = (at) => changeOf(state.method, state.stage, at);
  const keys = { worst: value, best: (at) => negative(value(at)), lost: change, won: (at) => negative(change(at)) };
  const byName = (a, b) => (images.ids[a] < images.ids[b] ? -1 : 1);
  const key = keys[state.sort];
  if (!key) return matches.sort(byName);
  const known = new Map(matches.map((at) => [at, key(at) ?? Infinity])); // images without the figure come last
  return matches.sort((a, b) => (known.get(a) === known.get(b) ? byName(a, b) : known.get(a) - known.get(b)));
}

const negative = (value) => (value === null ? null : -value);
let shown = [];

function drawHistogram() {
  const canvas = byId("histogram");
  const bins = new Array(25).fill(0);
  for (const at of matching({ withRange: false })) {
    const value = valueOf(state.method, state.stage, state.figure, at);
    if (value !== null) bins[Math.min(bins.length - 1, Math.floor(value * bins.length))] += 1;
  }
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const highest = Math.max(1, ...bins);
  const step = canvas.width / bins.length;
  context.clearRect(0, 0, canvas.width, canvas.height);
  bins.forEach((count, at) => {
    const centre = (at + 0.5) / bins.length;
    const inRange = centre >= state.low && centre <= state.high;
    context.fillStyle = style.getPropertyValue(inRange ? "--good-fill" : "--line");
    const height = count ? Math.max(1.5, canvas.height * count / highest) : 0;
    context.fillRect(at * step, canvas.height - height, step - 1, height);
  });
}

function card(at) {
  const value = valueOf(state.method, state.stage, state.figure, at);
  const methods = state.sideBySide ? report.methods : [state.method];
  const change = ["lost", "won"].includes(state.sort) ? changeOf(state.method, state.stage, at) : null;
  const shownValue = change === null ? figure(value) : `${change < 0 ? "▼" : "▲"} ${Math.abs(change).toFixed(3)}`;
  const label = (method) => `${method} ${figure(valueOf(method, state.stage, state.figure, at))}`;
  const pictures = methods.map((method) => picture(at, method, state, state.sideBySide ? label(method) : null));
  const description = `Open ${images.ids[at]}, ${FIGURES[state.figure]} ${figure(value)}`;
  const button = element(
    "button", { type: "button", class: "card", title: images.ids[at], "aria-label": description },
    element("div", { class: "pictures" }, ...pictures),
    element(
      "div", { class: "under-card" },
      element("span", { class: "id" }, images.ids[at]), element("span", { class: "value" }, shownValue),
    ),
    element("span", { class: "gauge" }, element("i", { style: `width: ${100 * (value ?? 0)}%` })),
  );
  button.dataset.at = String(at);
  button.addEventListener("click", () => openImage(at));
  return element("li", {}, button);
}

function drawGallery() {
  shown = ordered(matching());
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  state.page = Math.min(state.page, pages - 1);
  const from = state.page * PER_PAGE;
  const onPage = shown.slice(from, from + PER_PAGE);
  const total = images.ids.filter((_, at) => images.splits[at] === split() && inGallery(state.method, at)).length;
  byId("count").textContent = `${shown.length} of ${total} images of split ${split()}`;
  const list = byId("cards");
  list.classList.toggle("side-by-side", state.sideBySide);
  const none = element("li", { class: "empty" }, "No image matches the filters. “Reset filters” shows all images.");
  list.replaceChildren(...(onPage.length ? onPage.map(card) : [none]));
  byId("legend").replaceChildren(...legendItems(state.layer));
  byId("page-now").textContent = shown.length ? `${from + 1} to ${from + onPage.length} of ${shown.length}` : "";
  byId("page-before").disabled = state.page === 0;
  byId("page-after").disabled = state.page >= pages - 1;
  drawLayers("layers");
  drawHistogram();
}

function drawLayers(groupId) {
  byId(groupId).replaceChildren(...layersOf(split()).map((layer, at) => {
    const key = at < 9 ? element("kbd", {}, String(at + 1)) : null;
    const pressed = String(layer === state.layer);
    const button = element("button", { type: "button", "aria-pressed": pressed }, layerName(layer), key);
    button.dataset.layer = layer;
    button.addEventListener("click", () => {
      setLayer(layer);
      byId(groupId).querySelector('[aria-pressed="true"]')?.focus();
    });
    return button;
  }));
}

// The layer of a mask selects its stage too, by whose figures the gallery is then ordered.
function setLayer(layer) {
  state.layer = layer;
  const stage = report.stages.find((name) => nameOf(name) === layer && report.splits[name] === split());
  if (stage) state.stage = stage;
  update();
}

function setStage(stage) {
  const showsMask = report.stages.some((name) => nameOf(name) === state.layer);
  state.stage = stage;
  if (showsMask || !layersOf(split()).includes(state.layer)) state.layer = nameOf(stage);
}

function update({ keepPage = false } = {}) {
  if (!keepPage) state.page = 0;
  for (const name of ["method", "stage", "tag", "kind", "sort", "reason", "query", "figure", "opacity", "low", "high"]) {
    if (fields[name] && document.activeElement !== fields[name]) fields[name].value = String(state[name]);
  }
  fields.sideBySide.checked = state.sideBySide;
  drawGallery();
  if (state.open !== null) drawViewer();
}

function setOpacity(value) {
  state.opacity = Math.max(0, Math.min(100, value));
  fields.opacity.value = String(state.opacity);
  byId("viewer-opacity").value = String(state.opacity);
  for (const canvas of document.querySelectorAll(".stack canvas")) canvas.style.opacity = String(state.opacity / 100);
}

function turnPage(pagesForward) {
  const pages = Math.ceil(shown.length / PER_PAGE);
  const target = state.page + pagesForward;
  if (target < 0 || target >= pages) return;
  state.page = target;
  update({ keepPage: true });
  byId("gallery").scrollIntoView({ block: "start" });
}

controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("input", ({ target }) => {
  if (target.name === "opacity") { setOpacity(Number(target.value)); return; }
  if (target.name === "stage") setStage(target.value);
  else if (target.name === "sideBySide") state.sideBySide = target.checked;
  else if (target.name === "low" || target.name === "high") {
    const value = Number.parseFloat(target.value);
    state[target.name] = Number.isFinite(value) ? Math.max(0, Math.min(1, value)) : target.name === "high" ? 1 : 0;
  } else state[target.name] = target.value;
  update();
});
byId("reset").addEventListener("click", () => {
  Object.assign(state, defaults(), { method: state.method, stage: state.stage, layer: nameOf(state.stage) });
  setOpacity(state.opacity);
  update();
});
byId("page-before").addEventListener("click", () => turnPage(-1));
byId("page-after").addEventListener("click", () => turnPage(1));
