// The gallery: filters → positions of images → one page of cards.

const PER_PAGE = 60;
const controls = byId("controls");
const fields = controls.elements;
const usual = () => ({
  method: facts.methods[0], stage: facts.stages.includes("pseudo_masks") ? "pseudo_masks" : facts.stages[0], tag: "", kind: "", sort: "worst", reason: "",
  query: "", figure: fields.figure.options[0].value, low: 0, high: 1, layer: null, opacity: 70, beside: false, page: 0, open: null,
});
const state = usual();
state.layer = nameOf(state.stage);

const split = () => facts.splits[state.stage];

function matching({ withRange = true } = {}) {
  const query = state.query.trim().toLocaleLowerCase();
  const found = [];
  for (let at = 0; at < images.ids.length; at += 1) {
    if (images.splits[at] !== split() || !inGallery(state.method, at)) continue;
    if (state.tag !== "" && !images.tags[at]?.includes(Number(state.tag))) continue;
    if (state.kind !== "" && !(images.methods[state.method].kinds[at] & Number(state.kind))) continue;
    if (query && !images.ids[at].toLocaleLowerCase().includes(query)) continue;
    if (state.reason && !valueOf(state.method, state.stage, "reasons", at)?.includes(state.reason)) continue;
    const value = valueOf(state.method, state.stage, state.figure, at);
    if (withRange && (state.low > 0 || state.high < 1) && (value === null || value < state.low || value > state.high)) continue;
    found.push(at);
  }
  return found;
}

function ordered(found) {
  const value = (at) => valueOf(state.method, state.stage, state.figure, at);
  const change = (at) => changeOf(state.method, state.stage, at);
  const keys = { worst: value, best: (at) => negative(value(at)), lost: change, won: (at) => negative(change(at)) };
  const byName = (a, b) => (images.ids[a] < images.ids[b] ? -1 : 1);
  const key = keys[state.sort];
  if (!key) return found.sort(byName);
  const known = new Map(found.map((at) => [at, key(at) ?? Infinity])); // what has no figure comes last
  return found.sort((a, b) => (known.get(a) === known.get(b) ? byName(a, b) : known.get(a) - known.get(b)));
}

const negative = (value) => (value === null ? null : -value);
let shown = [];

function drawSpread() {
  const canvas = byId("spread");
  const bins = new Array(25).fill(0);
  for (const at of matching({ withRange: false })) {
    const value = valueOf(state.method, state.stage, state.figure, at);
    if (value !== null) bins[Math.min(bins.length - 1, Math.floor(value * bins.length))] += 1;
  }
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const most = Math.max(1, ...bins);
  const step = canvas.width / bins.length;
  context.clearRect(0, 0, canvas.width, canvas.height);
  bins.forEach((count, at) => {
    const inside = (at + 0.5) / bins.length >= state.low && (at + 0.5) / bins.length <= state.high;
    context.fillStyle = style.getPropertyValue(inside ? "--good-fill" : "--line");
    const high = count ? Math.max(1.5, canvas.height * count / most) : 0;
    context.fillRect(at * step, canvas.height - high, step - 1, high);
  });
}

function card(at) {
  const value = valueOf(state.method, state.stage, state.figure, at);
  const methods = state.beside ? facts.methods : [state.method];
  const change = ["lost", "won"].includes(state.sort) ? changeOf(state.method, state.stage, at) : null;
  const said = change === null ? figure(value) : `${change < 0 ? "▼" : "▲"} ${Math.abs(change).toFixed(3)}`;
  const label = (method) => (state.beside ? `${method} ${figure(valueOf(method, state.stage, state.figure, at))}` : null);
  const made = element(
    "button", { type: "button", class: "card", title: images.ids[at], "aria-label": `Open ${images.ids[at]}, ${FIGURES[state.figure]} ${figure(value)}` },
    element("div", { class: "pictures" }, ...methods.map((method) => picture(at, method, state, label(method)))),
    element("div", { class: "under-card" }, element("span", { class: "id" }, images.ids[at]), element("span", { class: "value" }, said)),
    element("span", { class: "gauge" }, element("i", { style: `width: ${100 * (value ?? 0)}%` })),
  );
  made.dataset.at = String(at);
  made.addEventListener("click", () => openImage(at));
  return element("li", {}, made);
}

function drawGallery() {
  shown = ordered(matching());
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  state.page = Math.min(state.page, pages - 1);
  const from = state.page * PER_PAGE;
  const some = shown.slice(from, from + PER_PAGE);
  const all = images.ids.filter((_, at) => images.splits[at] === split() && inGallery(state.method, at)).length;
  byId("count").textContent = `${shown.length} of ${all} pictures of split ${split()}`;
  const list = byId("cards");
  list.classList.toggle("beside", state.beside);
  list.replaceChildren(...(some.length ? some.map(card) : [element("li", { class: "empty" }, "No picture is like that. Reset brings all back.")]));
  byId("legend").replaceChildren(...legendItems(state.layer));
  byId("page-now").textContent = shown.length ? `${from + 1} to ${from + some.length} of ${shown.length}` : "";
  byId("page-before").disabled = state.page === 0;
  byId("page-after").disabled = state.page >= pages - 1;
  drawLayers("layers");
  drawSpread();
}

function drawLayers(where) {
  byId(where).replaceChildren(...layersOf(split()).map((layer, at) => {
    const made = element("button", { type: "button", "aria-pressed": String(layer === state.layer) }, layerName(layer), at < 9 ? element("kbd", {}, String(at + 1)) : null);
    made.dataset.layer = layer;
    made.addEventListener("click", () => { setLayer(layer); byId(where).querySelector('[aria-pressed="true"]')?.focus(); });
    return made;
  }));
}

// A mask's layer is a stage too: its figures are what the gallery then orders by.
function setLayer(layer) {
  state.layer = layer;
  const stage = facts.stages.find((name) => nameOf(name) === layer && facts.splits[name] === split());
  if (stage) state.stage = stage;
  update();
}

function setStage(stage) {
  const wasMask = facts.stages.some((name) => nameOf(name) === state.layer);
  state.stage = stage;
  if (wasMask || !layersOf(split()).includes(state.layer)) state.layer = nameOf(stage);
}

function update({ keepPage = false } = {}) {
  if (!keepPage) state.page = 0;
  for (const name of ["method", "stage", "tag", "kind", "sort", "reason", "query", "figure", "opacity", "low", "high"]) {
    if (fields[name] && document.activeElement !== fields[name]) fields[name].value = String(state[name]);
  }
  fields.beside.checked = state.beside;
  drawGallery();
  if (state.open !== null) drawViewer();
}

function setOpacity(value) {
  state.opacity = Math.max(0, Math.min(100, value));
  fields.opacity.value = String(state.opacity);
  byId("viewer-opacity").value = String(state.opacity);
  for (const canvas of document.querySelectorAll(".stack canvas")) canvas.style.opacity = String(state.opacity / 100);
}

function turnPage(by) {
  const pages = Math.ceil(shown.length / PER_PAGE);
  const to = state.page + by;
  if (to < 0 || to >= pages) return;
  state.page = to;
  update({ keepPage: true });
  byId("gallery").scrollIntoView({ block: "start" });
}

controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("input", ({ target }) => {
  if (target.name === "opacity") { setOpacity(Number(target.value)); return; }
  if (target.name === "stage") setStage(target.value);
  else if (target.name === "beside") state.beside = target.checked;
  else if (target.name === "low" || target.name === "high") {
    const value = Number.parseFloat(target.value);
    state[target.name] = Number.isFinite(value) ? Math.max(0, Math.min(1, value)) : target.name === "high" ? 1 : 0;
  } else state[target.name] = target.value;
  update();
});
byId("reset").addEventListener("click", () => {
  Object.assign(state, usual(), { method: state.method, stage: state.stage, layer: nameOf(state.stage) });
  setOpacity(state.opacity);
  update();
});
byId("page-before").addEventListener("click", () => turnPage(-1));
byId("page-after").addEventListener("click", () => turnPage(1));
