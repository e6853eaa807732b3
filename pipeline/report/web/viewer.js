// One image enlarged: all layers, methods side by side, its figures at every stage, and the values at the pointer.

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

function step(imagesForward) {
  const position = shown.indexOf(state.open);
  const next = shown[position < 0 ? 0 : position + imagesForward];
  if (next === undefined) return;
  const page = Math.floor(shown.indexOf(next) / PER_PAGE);
  opener = images.ids[next];
  if (page !== state.page) { state.page = page; drawGallery(); }
  openImage(next);
}

function figuresTable(at) {
  const stages = report.stages.filter((stage) => report.splits[stage] === images.splits[at]);
  // method agreement has a row of its own
  const figureName = state.figure === "method_agreement" ? fields.figure.options[0].value : state.figure;
  const heading = (text) => element("th", { scope: "col" }, text);
  const head = element("tr", {}, heading(FIGURES[figureName]), ...report.methods.map(heading));
  const row = (name, valueOfMethod, current) => element(
    "tr", { class: current ? "current" : "" }, element("th", { scope: "row" }, name),
    ...report.methods.map((method) => element("td", {}, figure(valueOfMethod(method)))),
  );
  const rows = stages.map((stage) => (
    row(readable(nameOf(stage)), (method) => valueOf(method, stage, figureName, at), stage === state.stage)));
  const agreement = (method) => valueOf(method, state.stage, "method_agreement", at);
  if (report.methods.some((method) => agreement(method) !== null)) rows.push(row("method agreement", agreement, false));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

// Classes of a mask, without background, by descending fraction of its pixels.
function classFractions(values) {
  const counts = new Map();
  for (const value of values) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) => ({ value, fraction: count / values.length }));
}

// The legend of the error map, with the fraction of pixels of each kind.
function errorLegend({ values, truth }) {
  const counts = {};
  values.forEach((value, at) => {
    const kind = errorOf(truth[at], value);
    if (kind) counts[kind] = (counts[kind] ?? 0) + 1;
  });
  return legendItems("error").map((item, at) => {
    item.append(element("span", {}, percent((counts[Object.keys(ERRORS)[at]] ?? 0) / values.length)));
    return item;
  });
}

function drawSide(at, content) {
  const section = (title, ...children) => [element("h3", {}, title), ...children];
  const reasons = valueOf(state.method, state.stage, "reasons", at);
  const fractions = content?.kind === "mask" ? classFractions(content.values) : undefined;
  const legend = content?.kind === "error" ? errorLegend(content) : legendItems(state.layer, fractions);
  const ofStage = state.layer === "error" ? ` of ${readable(state.stage)}` : "";
  const layer = `${layerName(state.layer)}${ofStage} (${state.method})`;
  const marked = `Reasons for review (${state.method}, ${readable(state.stage)})`;
  byId("viewer-side").replaceChildren(
    ...section("Tags", element("span", {}, tagNames(at))),
    ...section(`Split ${images.splits[at]}`, figuresTable(at)),
    ...(reasons ? section(marked, element("span", {}, reasons.map(readable).join(", "))) : []),
    ...(state.layer !== "photograph" && content ? section(layer, element("ul", {}, ...legend)) : []),
  );
}

// Shows the classes of the masks, or the score, at the pixel under the pointer.
function readoutOf(stack, at, method, content) {
  return (event) => {
    const [height, width] = images.sizes[at];
    const box = stack.getBoundingClientRect();
    const scale = Math.min(box.width / width, box.height / height);
    const x = Math.floor((event.clientX - box.left - (box.width - width * scale) / 2) / scale);
    const y = Math.floor((event.clientY - box.top - (box.height - height * scale) / 2) / scale);
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    const pixel = y * width + x;
    const className = (value) => (value === IGNORE ? "255" : report.classes[value] ?? String(value));
    const parts = [method];
    const layer = state.layer === "error" ? nameOf(state.stage) : state.layer;
    if (content?.kind === "scores") parts.push(`score ${(content.values[pixel] / 255).toFixed(2)}`);
    else if (content?.kind === "confidence") parts.push(`confidence ${(content.values[pixel] / 255).toFixed(2)}`);
    else if (content) parts.push(`${layerName(layer)}: ${className(content.values[pixel])}`);
    if (content?.truth) parts.push(`ground truth: ${className(content.truth[pixel])}`);
    byId("viewer-readout").textContent = parts.join(" · ");
  };
}

function drawViewer() {
  const at = state.open;
  byId("viewer-title").textContent = images.ids[at];
  const [height, width] = images.sizes[at];
  const methods = state.sideBySide ? report.methods : [state.method];
  byId("viewer-readout").textContent = "";
  byId("viewer-pictures").replaceChildren(...methods.map((method) => {
    const label = state.sideBySide ? `${method} ${figure(valueOf(method, state.stage, state.figure, at))}` : null;
    const stack = picture(at, method, state, label);
    stack.style.aspectRatio = `${width} / ${height}`;
    stack.style.maxWidth = `calc(70vh * ${width / height})`;
    stack.filled.then((content) => {
      if (!stack.isConnected) return; // it was replaced by a later picture
      stack.addEventListener("pointermove", readoutOf(stack, at, method, content));
      if (method === state.method) drawSide(at, content);
    });
    return stack;
  }));
  drawLayers("viewer-layers");
  byId("viewer-opacity").value = String(state.opacity);
  byId("viewer-side-by-side").checked = state.sideBySide;
  const position = shown.indexOf(at);
  byId("viewer-before").disabled = position === 0;
  byId("viewer-after").disabled = position === shown.length - 1;
  history.replaceState(null, "", address(at));
}

byId("viewer-close").addEventListener("click", closeImage);
byId("viewer-before").addEventListener("click", () => step(-1));
byId("viewer-after").addEventListener("click", () => step(1));
byId("viewer-opacity").addEventListener("input", ({ target }) => setOpacity(Number(target.value)));
byId("viewer-side-by-side").addEventListener("input", ({ target }) => {
  state.sideBySide = target.checked;
  update({ keepPage: true });
});
