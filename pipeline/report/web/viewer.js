// One image in large: all layers, all methods beside one another, its figures at every stage, and what lies under the pointer.

const viewer = byId("viewer");
let opener = null;

function address(at) {
  return `#${[state.method, state.stage, images.ids[at]].map(encodeURIComponent).join("/")}`;
}

function openImage(at) {
  if (state.open === null) opener = images.ids[at];
  state.open = at;
  history.replaceState(null, "", address(at));
  drawViewer();
  if (!viewer.open) viewer.showModal();
}

function closeImage() { if (viewer.open) viewer.close(); }

viewer.addEventListener("close", () => {
  state.open = null;
  history.replaceState(null, "", "#gallery");
  const at = positions.get(opener);
  document.querySelector(`.card[data-at="${at}"]`)?.focus();
});

function step(by) {
  const now = shown.indexOf(state.open);
  const next = shown[now < 0 ? 0 : now + by];
  if (next === undefined) return;
  const page = Math.floor(shown.indexOf(next) / PER_PAGE);
  opener = images.ids[next];
  if (page !== state.page) { state.page = page; drawGallery(); }
  openImage(next);
}

function figuresTable(at) {
  const stages = facts.stages.filter((stage) => facts.splits[stage] === images.splits[at]);
  const what = state.figure === "method_agreement" ? fields.figure.options[0].value : state.figure; // it has a row of its own
  const head = element("tr", {}, element("th", { scope: "col" }, FIGURES[what]), ...facts.methods.map((method) => element("th", { scope: "col" }, method)));
  const row = (name, of, now) => element(
    "tr", { class: now ? "now" : "" }, element("th", { scope: "row" }, name), ...facts.methods.map((method) => element("td", {}, figure(of(method)))),
  );
  const rows = stages.map((stage) => row(spoken(nameOf(stage)), (method) => valueOf(method, stage, what, at), stage === state.stage));
  const agreement = (method) => valueOf(method, state.stage, "method_agreement", at);
  if (facts.methods.some((method) => agreement(method) !== null)) rows.push(row("method agreement", agreement, false));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

function sharesOf(values) {
  const counts = new Map();
  for (const value of values) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) => ({ value, share: count / values.length }));
}

function errorShares(found) {
  const counts = {};
  found.values.forEach((value, at) => {
    const kind = errorOf(found.truth[at], value);
    if (kind) counts[kind] = (counts[kind] ?? 0) + 1;
  });
  return legendItems("error").map((item, at) => {
    item.append(element("span", {}, percent((counts[Object.keys(ERRORS)[at]] ?? 0) / found.values.length)));
    return item;
  });
}

function drawSide(at, found) {
  const part = (title, ...inside) => [element("h3", {}, title), ...inside];
  const reasons = valueOf(state.method, state.stage, "reasons", at);
  const tags = images.tags[at];
  const items = found?.kind === "error" ? errorShares(found) : legendItems(state.layer, found?.kind === "mask" ? sharesOf(found.values) : undefined);
  byId("viewer-side").replaceChildren(
    ...part("Tags", element("span", {}, tags === null ? "untagged" : tags.map((tag) => facts.classes[tag + 1]).join(", ") || "no class")),
    ...part(`Split ${images.splits[at]}`, figuresTable(at)),
    ...(reasons ? part(`Why look here (${state.method}, ${spoken(state.stage)})`, element("span", {}, reasons.map(spoken).join(", "))) : []),
    ...(state.layer !== "photograph" && found ? part(`${layerName(state.layer)}${state.layer === "error" ? ` of ${spoken(state.stage)}` : ""} (${state.method})`, element("ul", {}, ...items)) : []),
  );
}

// What the masks say at the pixel under the pointer.
function readAt(stack, at, method, found) {
  return (event) => {
    const [height, width] = images.sizes[at];
    const box = stack.getBoundingClientRect();
    const scale = Math.min(box.width / width, box.height / height);
    const x = Math.floor((event.clientX - box.left - (box.width - width * scale) / 2) / scale);
    const y = Math.floor((event.clientY - box.top - (box.height - height * scale) / 2) / scale);
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    const pixel = y * width + x;
    const named = (value) => (value === IGNORE ? "255" : facts.classes[value] ?? String(value));
    const words = [method];
    if (found?.kind === "scores") words.push(`score ${(found.values[pixel] / 255).toFixed(2)}`);
    else if (found) words.push(`${layerName(state.layer === "error" ? nameOf(state.stage) : state.layer)}: ${named(found.values[pixel])}`);
    if (found?.truth) words.push(`truth: ${named(found.truth[pixel])}`);
    byId("viewer-readout").textContent = words.join(" · ");
  };
}

function drawViewer() {
  const at = state.open;
  byId("viewer-title").textContent = images.ids[at];
  const [height, width] = images.sizes[at];
  const methods = state.beside ? facts.methods : [state.method];
  byId("viewer-readout").textContent = "";
  byId("viewer-pictures").replaceChildren(...methods.map((method) => {
    const label = state.beside ? `${method} ${figure(valueOf(method, state.stage, state.figure, at))}` : null;
    const made = picture(at, method, state, label);
    made.style.aspectRatio = `${width} / ${height}`;
    made.style.maxWidth = `calc(70vh * ${width / height})`;
    made.filled.then((found) => {
      if (!made.isConnected) return; // another picture has taken its place
      made.addEventListener("pointermove", readAt(made, at, method, found));
      if (method === state.method) drawSide(at, found);
    });
    return made;
  }));
  drawLayers("viewer-layers");
  byId("viewer-opacity").value = String(state.opacity);
  byId("viewer-beside").checked = state.beside;
  const place = shown.indexOf(at);
  byId("viewer-before").disabled = place === 0;
  byId("viewer-after").disabled = place === shown.length - 1;
  history.replaceState(null, "", address(at));
}

byId("viewer-close").addEventListener("click", closeImage);
byId("viewer-before").addEventListener("click", () => step(-1));
byId("viewer-after").addEventListener("click", () => step(1));
byId("viewer-opacity").addEventListener("input", ({ target }) => setOpacity(Number(target.value)));
byId("viewer-beside").addEventListener("input", ({ target }) => { state.beside = target.checked; update({ keepPage: true }); });
