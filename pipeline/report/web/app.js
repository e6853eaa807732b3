// Addresses, keys, panels, theme and provenance.

// #method/stage/id opens an image, #method/stage/ the gallery at that stage; others are places on the page.
function follow() {
  const parts = location.hash.slice(1).split("/");
  if (parts.length < 3) {
    const panel = parts[0].startsWith("method-") ? parts[0].slice(7) : null;
    if (panel !== null) { showPanel("methods", panel); byId(parts[0])?.scrollIntoView(); }
    return;
  }
  let [method, stage, id] = parts;
  try { [method, stage, id] = parts.map(decodeURIComponent); } catch { id = parts[2]; }
  if (!facts.methods.includes(method) || !facts.stages.includes(stage)) { say(`There is no ${method} at ${stage} in this report.`); return; }
  state.method = method;
  setStage(stage);
  update();
  if (id === "") { byId("gallery").scrollIntoView(); byId("gallery").focus({ preventScroll: true }); return; }
  const at = positions.get(id);
  if (at === undefined) { say(`The gallery has no picture of ${id}.`); byId("gallery").scrollIntoView(); return; }
  openImage(at);
}

const say = (words) => { byId("count").textContent = words; };

function showPanel(group, name) {
  for (const panel of document.querySelectorAll(`[data-panel-of="${group}"]`)) panel.hidden = panel.dataset.name !== name;
  for (const button of document.querySelectorAll(`[data-panels="${group}"] button`)) button.setAttribute("aria-pressed", String(button.dataset.panel === name));
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
  memory.set("theme", name);
  drawSpread();
}

const nextTheme = () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
byId("theme").addEventListener("click", nextTheme);

const help = byId("help");
byId("help-open").addEventListener("click", () => help.showModal());
byId("help-close").addEventListener("click", () => help.close());

let before = null; // the layer that e or t came from

function flip(layer) {
  if (!layersOf(split()).includes(layer)) return;
  if (state.layer === layer) setLayer(before ?? nameOf(state.stage));
  else { before = state.layer; setLayer(layer); }
}

function nextMethod() {
  const at = facts.methods.indexOf(state.method);
  state.method = facts.methods[(at + 1) % facts.methods.length];
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
  e: () => flip("error"),
  g: () => { if (!viewer.open) { byId("gallery").scrollIntoView(); byId("gallery").focus({ preventScroll: true }); } },
  m: nextMethod,
  s: () => { state.beside = !state.beside; update({ keepPage: true }); },
  t: () => flip("truth"),
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

function provenanceTable(found) {
  const versions = [...new Set(found.flatMap((one) => Object.keys(one.versions ?? {})))].sort();
  const short = (text) => (text ?? "–").slice(0, 12);
  const head = ["stage", "seconds", "MiB", "MiB, largest child", "device", "python", ...versions, "params", "code"];
  const rows = found.map((one) => [
    one.stage, one.seconds?.toFixed(1), one.peak_memory_mib, one.peak_memory_mib_largest_child, one.device, one.python,
    ...versions.map((name) => one.versions?.[name]), short(one.params_digest), short(one.code_digest),
  ]);
  const cell = (value, at) => element(at === 0 ? "th" : "td", at === 0 ? { scope: "row" } : {}, String(value ?? "–"));
  return element(
    "table", {}, element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))),
  );
}

byId("provenance-load").addEventListener("click", async () => {
  try {
    const found = await script("../provenance/provenance.js", "provenance");
    byId("provenance-table").replaceChildren(provenanceTable(found));
    byId("provenance-note").textContent = `${found.length} runs`;
  } catch {
    byId("provenance-note").textContent = "provenance/provenance.js is not there: this report has been moved, or no stage has run here.";
  }
});

setTheme(THEMES.includes(memory.get("theme")) ? memory.get("theme") : "system");
window.addEventListener("hashchange", follow);
update();
follow();
