// Tables of classes: rows are sorted by a click on a heading, and filtered by a part of the class's name.

const NUMBERS_FIRST = { ascending: 1, descending: -1 };

// A click sorts from low to high, a second one from high to low, a third one back to the order of the classes.
const NEXT_ORDER = { none: "ascending", ascending: "descending", descending: "none" };

function sortTable(table, column, order) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  rows.forEach((row, at) => { row.dataset.at ??= String(at); });
  const key = (row) => row.cells[column].dataset.value ?? "";
  const compare = (a, b) => {
    if (order === "none") return a.dataset.at - b.dataset.at;
    const [left, right] = [key(a), key(b)];
    if (left === "" || right === "") return (left === "") - (right === ""); // rows without the figure come last
    const difference = column === 0 ? left.localeCompare(right) : left - right;
    return NUMBERS_FIRST[order] * difference || a.dataset.at - b.dataset.at;
  };
  body.append(...rows.sort(compare));
  for (const heading of table.tHead.rows[0].cells) heading.setAttribute("aria-sort", "none");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", order);
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", ({ target }) => {
    const heading = target.closest("button")?.closest("th");
    if (heading) sortTable(table, heading.cellIndex, NEXT_ORDER[heading.getAttribute("aria-sort")]);
  });
}

byId("class-query")?.addEventListener("input", ({ target }) => {
  const query = target.value.trim().toLocaleLowerCase();
  for (const row of document.querySelectorAll("table.sortable tbody tr")) {
    row.hidden = !row.cells[0].dataset.value.toLocaleLowerCase().includes(query);
  }
});
