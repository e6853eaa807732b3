// The table of all images. Its rows lie in pages, of which those that are shown are loaded.

const ROWS_SHOWN = 50;
const MAX_PAGES = 12; // of rows, in memory at a time
const COLUMNS = ["id", "split", "tags", "score", "miou", "method_agreement", "reasons"]; // of a row
const pagesOfRows = new Map();
const tableFields = byId("images-controls").elements;
const tableState = { method: 0, order: "worst", reason: "", from: 0 };

const tableOf = () => report.tables[tableState.method];
const listName = () => (tableState.reason !== "" ? `reason-${tableState.reason}` : tableState.order === "id" ? "id" : "quality");
const listLength = () => (tableState.reason !== "" ? tableOf().reasons[tableState.reason][1] : tableOf().rows);

function pageOfRows(number) {
  const stem = `${tableState.method}-${listName()}-${numbered(number)}`;
  return loaded(pagesOfRows, MAX_PAGES, stem, `rows/${stem}.js`, stem);
}

// Rows `from` … `from + count - 1` of the list in its order.
async function rowsOf(from, count) {
  const [length, perPage] = [listLength(), tableOf().per_page];
  const places = Array.from({ length: Math.max(0, Math.min(count, length - from)) }, (_, at) => from + at);
  const positionsInList = tableState.order === "best" ? places.map((place) => length - 1 - place) : places;
  const numbers = [...new Set(positionsInList.map((position) => Math.floor(position / perPage)))];
  const pages = new Map(await Promise.all(numbers.map(async (number) => [number, await pageOfRows(number)])));
  return positionsInList.map((position) => pages.get(Math.floor(position / perPage))[position % perPage]);
}

function imageCell(id, imageSplit) {
  if (!positions.has(id)) return element("th", { scope: "row" }, id);
  const parts = [report.methods[tableState.method], report.last_stages[imageSplit], id];
  const href = `#${parts.map(encodeURIComponent).join("/")}`;
  return element("th", { scope: "row" }, element("a", { href, title: "Show the picture in the gallery" }, id));
}

function rowOfImage([id, imageSplit, tags, score, miou, agreement, reasons]) {
  const names = tags === null ? "untagged" : tags.map((tag) => report.classes[tag + 1]).join(", ") || "no class";
  const texts = reasons.map((at) => readable(tableOf().reasons[at][0]).replaceAll("%7C", "|")).join(", ");
  const cells = [figure(score), ...(hasTruth ? [figure(miou)] : []), ...(hasAgreement ? [figure(agreement)] : [])];
  return element(
    "tr", {}, imageCell(id, imageSplit), element("td", { class: "left" }, imageSplit),
    element("td", { class: "left wrap" }, names), ...cells.map((text) => element("td", {}, text)),
    element("td", { class: "left wrap" }, texts),
  );
}

const hasTruth = byId("images-head").dataset.truth === "1";
const hasAgreement = report.methods.length > 1;
let drawing = 0; // number of the latest drawing: an earlier one that is loaded later is not shown

async function drawImages() {
  drawing += 1;
  const [own, length] = [drawing, listLength()];
  const last = Math.max(0, Math.floor((length - 1) / ROWS_SHOWN) * ROWS_SHOWN);
  tableState.from = Math.max(0, Math.min(tableState.from, last));
  try {
    const rows = await rowsOf(tableState.from, ROWS_SHOWN);
    if (own !== drawing) return;
    byId("images-rows").replaceChildren(...rows.map(rowOfImage));
  } catch (error) {
    byId("images-count").textContent = error.message;
    return;
  }
  const [first, end] = [tableState.from + 1, Math.min(length, tableState.from + ROWS_SHOWN)];
  const count = (number) => number.toLocaleString("en");
  byId("images-count").textContent = length ? `${count(first)} to ${count(end)} of ${count(length)}` : "no image";
  for (const name of ["first", "before"]) byId(`images-${name}`).disabled = tableState.from === 0;
  for (const name of ["after", "last"]) byId(`images-${name}`).disabled = tableState.from >= last;
}

// Reasons of the method, the most frequent first.
function fillReasons() {
  const counted = tableOf().reasons.map(([reason, count], at) => ({ reason, count, at }));
  counted.sort((a, b) => b.count - a.count || a.at - b.at);
  const options = counted.map(({ reason, count, at }) => (
    element("option", { value: String(at) }, `${readable(reason).replaceAll("%7C", "|")} (${count.toLocaleString("en")})`)));
  tableFields.reason.replaceChildren(element("option", { value: "" }, "any"), ...options);
}

// Number of values that are less than or equal to the text, of values in the order of Python's strings: by code points.
function countUpTo(values, text) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (compareTexts(values[middle], text) <= 0) low = middle + 1; else high = middle;
  }
  return low;
}

function compareTexts(a, b) {
  const [left, right] = [[...a], [...b]];
  const at = left.findIndex((character, position) => character !== right[position]);
  if (at < 0) return left.length - right.length;
  return right[at] === undefined ? 1 : left[at].codePointAt(0) - right[at].codePointAt(0);
}

// Shows the list by id from the first id on that is not before the text.
async function goToId(text) {
  Object.assign(tableState, { order: "id", reason: "" });
  const number = Math.max(0, countUpTo(tableOf().first_ids, text) - 1);
  const ids = (await pageOfRows(number)).map((row) => row[0]);
  const after = countUpTo(ids, text);
  const at = ids[after - 1] === text ? after - 1 : after;
  tableState.from = number * tableOf().per_page + at;
  showTableState();
}

function showTableState() {
  tableFields.order.value = tableState.order;
  tableFields.reason.value = tableState.reason;
  tableFields.order.querySelector('[value="id"]').disabled = tableState.reason !== "";
  drawImages();
}

byId("images-controls").addEventListener("submit", (event) => event.preventDefault());
byId("images-controls").addEventListener("input", ({ target }) => {
  if (target.name === "id") { goToId(target.value); return; }
  tableState.from = 0;
  if (target.name === "tableMethod") {
    Object.assign(tableState, { method: Number(target.value), reason: "" });
    fillReasons();
  } else tableState[target.name] = target.value;
  if (tableState.reason !== "" && tableState.order === "id") tableState.order = "worst";
  showTableState();
});

const turnRows = (from) => { tableState.from = from; drawImages(); };
byId("images-first").addEventListener("click", () => turnRows(0));
byId("images-before").addEventListener("click", () => turnRows(tableState.from - ROWS_SHOWN));
byId("images-after").addEventListener("click", () => turnRows(tableState.from + ROWS_SHOWN));
byId("images-last").addEventListener("click", () => turnRows(listLength()));
fillReasons();
drawImages();
