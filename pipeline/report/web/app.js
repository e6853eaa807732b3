// Addresses, keys, panels and theme.

// #method/stage/id opens an image, #method/stage/ the gallery at that stage; other addresses are elements of the page.
function followAddress() {
  const parts = location.hash.slice(1).split("/");
  if (parts.length < 3) {
    const panel = parts[0].startsWith("method-") ? parts[0].slice(7) : null;
    if (panel !== null) { showPanel("methods", panel); byId(parts[0])?.scrollIntoView(); }
    return;
  }
  let [method, stage, id] = parts;
  try { [method, stage, id] = parts.map(decodeURIComponent); } catch { id = parts[2]; }
  if (!report.methods.includes(method) || !report.stages.includes(stage)) {
    showStatus(`This report has no stage ${stage} of a method ${method}.`);
    return;
  }
  state.method = method;
  setStage(stage);
  update();
  if (id === "") { goToGallery(); return; }
  const at = positions.get(id);
  if (at === undefined) { showStatus(`The gallery has no picture of ${id}.`); byId("gallery").scrollIntoView(); return; }
  openImage(at);
}

const showStatus = (text) => { byId("count").textContent = text; };

function goToGallery() {
  byId("gallery").scrollIntoView();
  byId("gallery").focus({ preventScroll: true });
}

function showPanel(group, name) {
  for (const panel of document.querySelectorAll(`[data-panel-of="${group}"]`)) panel.hidden = panel.dataset.name !== name;
  for (const button of document.querySelectorAll(`[data-panels="${group}"] button`)) {
    button.setAttribute("aria-pressed", String(button.dataset.panel === name));
  }
}

for (const group of document.querySelectorAll("[data-panels]")) {
  group.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) showPanel(group.dataset.panels, button.dataset.panel);
  });
}

const THEMES = ["system", "light", "dark"];

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = `Theme: ${name}`;
  storage.set("theme", name);
  drawHistogram();
}

const nextTheme = () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
byId("theme").addEventListener("click", nextTheme);

const help = byId("help");
byId("help-open").addEventListener("click", () => help.showModal());
byId("help-close").addEventListener("click", () => help.close());

let previousLayer = null; // that e or t was pressed at

function toggleLayer(layer) {
  if (!layersOf(split()).includes(layer)) return;
  if (state.layer === layer) setLayer(previousLayer ?? nameOf(state.stage));
  else { previousLayer = state.layer; setLayer(layer); }
}

function nextMethod() {
  const at = report.methods.indexOf(state.method);
  state.method = report.methods[(at + 1) % report.methods.length];
  update();
}

const KEYS = {
  "?": () => (help.open ? help.close() : help.showModal()),
  "/": () => { if (!viewer.open) { fields.query.focus(); fields.query.select(); } },
  "[": () => setOpacity(state.opacity - 10),
  "]": () => setOpacity(state.opacity + 10),
  ArrowLeft: () => (viewer.open ? step(-1) : turnPage(-1)),
  ArrowRight: () => (viewer.open ? step(1) : turnPage(1)),
  d: nextTheme,
  e: () => toggleLayer("error"),
  g: () => { if (!viewer.open) goToGallery(); },
  i: () => { if (!viewer.open) byId("images").scrollIntoView(); },
  m: nextMethod,
  s: () => { state.sideBySide = !state.sideBySide; update({ keepPage: true }); },
  t: () => toggleLayer("truth"),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches('select, input[type="search"], input[type="number"]');
  if (typing || (event.target.matches('input[type="range"]') && event.key.startsWith("Arrow"))) return;
  if (help.open && event.key !== "?") return;
  const layer = /^[1-9]$/.test(event.key) ? layersOf(split())[Number(event.key) - 1] : undefined;
  const action = layer ? () => setLayer(layer) : KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

setTheme(THEMES.includes(storage.get("theme")) ? storage.get("theme") : "system");
window.addEventListener("hashchange", followAddress);
// On paper nothing can be opened.
window.addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
update();
followAddress();
